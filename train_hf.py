"""Distils a DeiT-Ti from a teacher, or trains it or a CNN without one, on any image-classification dataset.

    accelerate launch train_hf.py --distill_mode hard
    accelerate launch train_hf.py --config recipes/digits.yaml --learning_rate 1e-3

A run, from top to bottom: load and check the images; prepare the teacher (fit it if its labels differ from the
dataset's, evaluate it, refuse it if it is no better than chance); train and evaluate the student; save a folder that
`from_pretrained` loads.
"""

import gc
import logging
import os
import pickle
import sys
import time


gc.disable()  # imports create no garbage, and looking for it takes a fifth of their seven seconds

from accelerate import PartialState

from modeling_deit_ti import preflight
from modeling_deit_ti.arguments import Arguments
from modeling_deit_ti.checkpoints import settings_of
from modeling_deit_ti.data import ImageData, load_images
from modeling_deit_ti.errors import (
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    StorageError,
    UserError,
    first_line,
    is_out_of_memory,
    list_some,
    storing,
)
from modeling_deit_ti.fitting import prepare_teacher
from modeling_deit_ti.interruption import Interrupted, interrupt_on_signals
from modeling_deit_ti.outcome import address_card, push, summary
from modeling_deit_ti.parsing import parse_stages
from modeling_deit_ti.progress import quiet_libraries
from modeling_deit_ti.runs import (
    build_network,
    build_trainer,
    continue_steps,
    evaluation_images,
    isolated_accelerator_state,
    resume_precision,
    resume_steps,
    resume_steps_without_checkpoint,
    run_settings,
    train_and_save,
)
from modeling_deit_ti.teacher import check_better_than_chance
from modeling_deit_ti.teacher_cache import make_teacher_cache


gc.enable()


def main() -> None:
    *earlier, last = stages = parse_stages(sys.argv[1:], description=__doc__.splitlines()[0])
    quiet_libraries(all_bars=last.training.disable_tqdm or last.training.process_index > 0)
    if last.training.process_index == 0:
        flags = [flag.partition("=")[0].replace("-", "_").lstrip("_") for flag in last.flags if flag.startswith("--")]
        if "hub_token" in flags:
            print("--hub_token: every user of this machine can see it in the process list; HF_TOKEN is safer.")
        if not last.training.mode.has_teacher and any(flag.startswith("teacher_") for flag in flags):
            print(f"Teacher: none; --distill_mode {last.training.mode.name} does not use the --teacher_* flags")
    if earlier and not preflight.is_finished(last.training, is_last=True):
        # Fail now, not after hours of earlier stages.
        preflight.checkpoint_to_resume(last.training)
        if last.training.push_to_hub and last.training.process_index == 0:
            preflight.check_hub_access(last.training)
    for number, args in enumerate(stages, start=1):
        if earlier and args.training.process_index == 0:
            print(f"Stage {number} of {len(stages)}: {args.training.output_dir}", flush=True)
        with isolated_accelerator_state():
            train(args, is_last=args is last)
    PartialState().destroy_process_group()  # otherwise torch may abort distributed processes at exit


def train(args: Arguments, is_last: bool = True) -> None:
    """One run. If it has finished before, it is only pushed; a finished earlier stage is skipped."""
    # 1. Checks before anything else
    training, mode = args.training, args.training.mode
    preflight.check_one_gpu(training)
    is_finished = preflight.is_finished(training, is_last)
    checkpoint = training.output_dir if is_finished else preflight.checkpoint_to_resume(training)
    preflight.check_folders(args)
    is_main = training.process_index == 0
    if training.push_to_hub and is_main:
        preflight.check_hub_access(training)

    # 2. Images
    data = load_data(args)
    if data.unseen_labels and is_main:
        print(f"Images: no training image is labelled {list_some(data.unseen_labels)}")
    if checkpoint is None and args.earlier_stages:
        continue_steps(args, args.earlier_stages[-1])
    elif checkpoint is None and training.resume_from_checkpoint == "auto":
        note = resume_steps_without_checkpoint(args, data)
        if note and is_main:
            print(f"Student: starting over; {note}", flush=True)
    if checkpoint is not None:
        resume_precision(training, checkpoint)
        note = resume_steps(args, settings_of(checkpoint))
        preflight.check_same_run(checkpoint, run_settings(args, data))
        if is_main:
            told = "finished by an earlier run" if is_finished else f"resuming from {checkpoint}"
            print(f"Student: {told}" + (f"; {note}" if note else ""), flush=True)
    if is_finished:
        if training.push_to_hub and is_main:
            address_card(args)
            push(training)
        return

    # 3. Student
    student, image_processor, notes = build_network(args, data)
    preflight.check_training(training, student)
    if notes and is_main:
        print("Student:", *notes)

    # 4. Teacher
    teacher = teacher_record = teacher_path = teacher_cache = None
    if mode.has_teacher:
        with storing(args.teacher.teacher_output_dir, "Make room, then run the same command again."):
            teacher, teacher_record, teacher_path = prepare_teacher(args, data, image_processor)
        teacher_cache = make_teacher_cache(args, teacher, data, image_processor)

    # 5. Trainer, and a teacher that is better than chance
    trainer = build_trainer(args, data, student, image_processor, teacher, teacher_cache)
    if teacher is not None:
        teacher_record.accuracy = trainer.measure_teacher(evaluation_images(trainer, data))
        if is_main:
            name, accuracy = teacher_record.name, teacher_record.accuracy
            print(f"Teacher: {name} classifies {accuracy:.2%} of the {data.eval_split} split correctly")
        if not args.teacher.allow_untrained_teacher:
            check_better_than_chance(teacher_record.accuracy, data.evaluation["label"][:], teacher_record.name)

    # 6. Training, evaluation, and the files in the output folder
    advice = "Files written earlier are intact: make room, then run the same command again."
    with storing(training.output_dir, advice):
        metrics = train_and_save(trainer, args, data, checkpoint, teacher_record, teacher_path)

    # 7. Summary
    if is_main:
        print(summary(trainer, teacher_record, metrics))

    # 8. The Hub
    if training.push_to_hub and is_main:
        push(training)


def load_data(args: Arguments) -> ImageData:
    """The images, checked by the first process of each machine while the others wait."""
    with args.training.main_process_first(desc="loading the images"):
        return load_images(args.images, labels_needed=args.training.mode.needs_labels)


def run() -> int:
    """Runs `main`, reports whatever ends it in one message, and returns the exit code."""
    gc.freeze()  # imports are never freed; without this, each collection during training would scan all of them
    interrupt_on_signals()
    library = logging.getLogger("modeling_deit_ti")
    library.addHandler(logging.StreamHandler(sys.stdout))
    library.setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.WARNING)
    try:
        main()
    except UserError as error:
        return _end(f"error: {error}", EXIT_USER_ERROR)
    except pickle.UnpicklingError:
        # From torch.load, which transformers calls with weights_only=True; its own advice is to load the file anyway.
        return _end(
            "error: the checkpoint holds more than data and was not unpickled: it could run code.", EXIT_USER_ERROR
        )
    except (FloatingPointError, StorageError) as error:
        return _end(f"error: {error}", 1)
    except Interrupted as interruption:
        return _end(f"{interruption} Run the same command again to resume.", EXIT_INTERRUPTED)
    except Exception as error:
        if is_out_of_memory(error):
            advice = (
                "Lower --per_device_train_batch_size (and --per_device_eval_batch_size) and raise "
                "--gradient_accumulation_steps to match; fewer --dataloader_num_workers also save memory."
            )
            return _end(f"error: out of memory ({first_line(error)}). {advice}", 1)
        # A bug of ours or a fault of the machine: the reason first, then the traceback.
        _end(f"process {os.environ.get('RANK', 0)} failed: {first_line(error)}", 1)
        raise
    return 0


def _end(message: str, exit_code: int) -> int:
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        # A user's mistake is found by all processes, and the launcher ends them once the first has reported it. An
        # error found only by this one is still reported.
        time.sleep(3)
    print(f"train_hf.py: {message}", file=sys.stderr, flush=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(run())

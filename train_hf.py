"""Distils a DeiT-Ti from a teacher, or trains it or a CNN without one, on any image-classification dataset.

    accelerate launch train_hf.py --distill_mode hard
    accelerate launch train_hf.py --config recipes/digits.yaml --learning_rate 1e-3

A run, from top to bottom: read the flags, load and check the images, prepare the teacher (fit it if its labels are not
the dataset's, measure it, refuse it if it knows nothing), train the student, evaluate it, and leave a folder that
`from_pretrained` loads.
"""

import argparse
import difflib
import importlib.util
import json
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import yaml
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi, snapshot_download
from transformers import HfArgumentParser, PreTrainedModel, Trainer, get_scheduler, set_seed
from transformers.hf_argparser import string_to_bool
from transformers.integrations import get_reporting_integration_callbacks

from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.checkpoints import checkpoints_of, flaw_of, last_complete
from modeling_deit_ti.classifiers import check_takes_images, is_timm_architecture, label_maps, new_timm_classifier
from modeling_deit_ti.data import (
    DataArguments,
    EvalImages,
    ImageData,
    load_images,
    make_image_processor,
    make_train_images,
    random_rows,
    read_image,
)
from modeling_deit_ti.distillation import DistillMode
from modeling_deit_ti.errors import StorageError, UserError, check_writable, first_line, list_some, storing
from modeling_deit_ti.interop import export_onnx, load_student, save_timm, save_transformers
from modeling_deit_ti.interruption import Interrupted, interrupt_on_signals
from modeling_deit_ti.model_card import (
    CURVES_FILE,
    EXAMPLE_FILE,
    DatasetRecord,
    RunRecord,
    TeacherRecord,
    describe_hardware,
    plot_training_curves,
    write_model_card,
)
from modeling_deit_ti.streaming import load_streamed_images
from modeling_deit_ti.teacher import TeacherArguments, check_better_than_chance, prepare_teacher
from modeling_deit_ti.teacher_cache import make_teacher_cache
from modeling_deit_ti.trainer import DistillationTrainer, DistillationTrainingArguments


# What a card shows of the arguments.
DATA_HYPERPARAMETERS = (
    "max_train_samples",
    "max_eval_samples",
    "max_validation_samples",
    "crop",
    "horizontal_flip",
    "auto_augment",
    "random_erasing",
    "eval_crop_ratio",
)
TRAINING_HYPERPARAMETERS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "mixup",
    "cutmix",
    "repeated_augmentation",
    "load_best_model_at_end",
    "seed",
)


@dataclass
class ModelArguments:
    """The student."""

    model_name_or_path: str = field(
        default="deit_ti",
        metadata={
            "help": "`deit_ti`; any timm architecture, such as resnet18 (the CNN baseline, mode none); or a local "
            "folder or Hub id to start from."
        },
    )
    image_size: int = field(default=224, metadata={"help": "Height and width of the student's input, in pixels."})
    patch_size: int = field(default=16, metadata={"help": "Height and width of a patch, in pixels."})
    drop_path_rate: float = field(default=0.1, metadata={"help": "Stochastic depth of the last block."})
    export: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What else to save, and push, beside the model and its `transformers/`: `timm` (a checkpoint for "
            "timm.create_model), `onnx` (model.onnx).",
            "choices": ["timm", "onnx"],
        },
    )
    license: str = field(
        default="unknown", metadata={"help": "License of the trained weights, for the card, such as apache-2.0."}
    )

    def __post_init__(self):
        if self.image_size < 2 or self.patch_size < 1:  # torch's resizing dies of a result of one pixel
            raise UserError(
                f"--image_size {self.image_size} --patch_size {self.patch_size}: an image has 2 or more a side, a "
                "patch 1 or more."
            )
        if self.image_size % self.patch_size and not self.is_timm_architecture:
            raise UserError(
                f"--patch_size {self.patch_size} does not divide --image_size {self.image_size}: take a multiple, "
                f"such as --image_size {max(1, round(self.image_size / self.patch_size)) * self.patch_size}."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise UserError(f"--drop_path_rate {self.drop_path_rate}: it is 0 or more and below 1.")

    @property
    def is_timm_architecture(self) -> bool:
        """To train from scratch. A name with a tag, such as `.fb_in1k`, is one of weights to start from."""
        return "." not in self.model_name_or_path and is_timm_architecture(self.model_name_or_path)


Arguments = tuple[ModelArguments, DataArguments, TeacherArguments, DistillationTrainingArguments]


# How a run ended, to the scheduler: a user's mistake, and what is worth starting again (sysexits.h's EX_TEMPFAIL).
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75


def run() -> int:
    """`main`, with what ends it told in one message; returns the exit code."""
    interrupt_on_signals()
    try:
        main()
    except UserError as error:
        return _told(f"error: {error}", EXIT_USER_ERROR)
    except (FloatingPointError, StorageError) as error:
        return _told(f"error: {error}", 1)
    except Interrupted as interruption:
        return _told(
            f"{interruption} Go on with the same command and --resume_from_checkpoint True.", EXIT_INTERRUPTED
        )
    except Exception as error:  # a fault, of ours or of the machine: the reason first, then where it happened
        _told(f"process {os.environ.get('RANK', 0)} failed: {first_line(error)}", 1)
        raise
    return 0


def _told(message: str, exit_code: int) -> int:
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        # All processes find the same mistake, and the launcher ends them once the first has told it. What only this
        # one has found is told all the same.
        time.sleep(3)
    print(f"train_hf.py: {message}", file=sys.stderr, flush=True)
    return exit_code


def main() -> None:
    groups = model_args, data_args, teacher_args, training_args = parse_arguments(sys.argv[1:])
    mode = training_args.mode
    checkpoint = checkpoint_to_resume(training_args)
    check_folders(groups)
    if training_args.push_to_hub and training_args.process_index == 0:
        check_hub_access(training_args)

    cache = datasets.config.HF_DATASETS_CACHE
    with (
        storing(cache, "Make room, or set HF_DATASETS_CACHE to a folder on another disk.", UserError),
        training_args.main_process_first(desc="loading the images"),
    ):
        load = load_streamed_images if data_args.streaming else load_images
        data = load(data_args, labels_needed=mode.needs_labels)
    if data.unseen_labels and training_args.process_index == 0:
        print(f"Images: no training image has a label of {list_some(data.unseen_labels)}")
    image_processor = make_image_processor(data_args, model_args.image_size)
    train_images, augment = make_train_images(data.train, data_args, image_processor, training_args.device.type)
    set_seed(training_args.seed)  # the Trainer seeds again before training, so fitting a teacher changes nothing
    student, not_taken_over = make_student(model_args, mode, data.label_names, image_processor)
    check_training(training_args, student)
    if model_args.is_timm_architecture:
        check_takes_images(
            student,
            model_args.model_name_or_path,
            model_args.image_size,
            min(training_args.train_batch_size, len(train_images)),
        )

    teacher = teacher_path = teacher_record = None
    if mode.has_teacher:
        with storing(teacher_args.teacher_output_dir, "Make room, and run the same command again."):
            teacher, teacher_path, teacher_facts = prepare_teacher(
                teacher_args, data, data_args, training_args, image_processor
            )

    evaluation = validation = EvalImages(data.evaluation, image_processor)
    if data_args.max_validation_samples is not None:
        rows = random_rows(len(data.evaluation), data_args.max_validation_samples)
        validation = EvalImages(data.evaluation.select(rows), image_processor)
    try:
        trainer = DistillationTrainer(
            model=student,
            args=training_args,
            teacher=teacher,
            augment=augment,
            train_dataset=train_images,
            eval_dataset=validation,
            processing_class=image_processor,
        )
    except (ValueError, ImportError) as error:  # of flags that only the Trainer looks at
        raise UserError(str(error)) from error
    is_main = trainer.is_world_process_zero()
    if is_main and not_taken_over:
        print("Student:", *not_taken_over)

    if teacher is not None:
        accuracy = trainer.measure_teacher(evaluation)
        if is_main:
            print(f"Teacher: {teacher_facts['name']} is right on {accuracy:.2%} of the split {data.eval_split}")
        check_better_than_chance(accuracy, data.evaluation["label"][:], teacher_facts["name"])
        teacher_record = TeacherRecord(accuracy=accuracy, **teacher_facts)
        trainer.teacher_cache = make_teacher_cache(
            teacher_args, teacher, data, data_args, training_args, image_processor
        )

    with storing(
        training_args.output_dir,
        "What was written before is intact: make room, and give the same command with --resume_from_checkpoint True. "
        "It goes on from the last complete checkpoint, or from the beginning where there is none.",
    ):
        results = train_and_save(trainer, groups, data, evaluation, checkpoint, teacher_record, teacher_path)
    if is_main:
        print_summary(trainer, teacher_record, results)
        push(trainer)


def train_and_save(
    trainer: DistillationTrainer,
    groups: Arguments,
    data: ImageData,
    evaluation: EvalImages,
    checkpoint: str | None,
    teacher: TeacherRecord | None,
    teacher_path: str | None,
) -> dict[str, dict]:
    """Trains and evaluates the student, and writes all that a run leaves; returns the results, by their file."""
    results = {"train": trainer.train(resume_from_checkpoint=checkpoint).metrics, "eval": trainer.evaluate(evaluation)}
    results["all"] = results["train"] | results["eval"]
    if teacher is not None:
        results["all"] |= {"teacher_accuracy": teacher.accuracy, "teacher_path": teacher_path}
    if trainer.teacher_cache is not None:
        results["all"]["teacher_cached"] = trainer.teacher_cache.share_read

    trainer.save_model(_internal_call=True)  # else it pushes what is not complete yet, and ends the run if it cannot
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_exports(trainer, groups[0])
        write_reports(trainer, groups, data, teacher, results)
    return results


def parse_arguments(argv: list[str]) -> Arguments:
    """The four groups of arguments, from `--config FILE.yaml` and the flags on top of it."""
    parser = _Parser(
        (ModelArguments, DataArguments, TeacherArguments, DistillationTrainingArguments),
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.type is float:
            action.type = finite_float
    parser.add_argument("--config", help="A YAML file that sets any of the flags; the command line wins.")
    if "--config" in argv or any(argument.startswith("--config=") for argument in argv):
        file = parser.parse_known_args(argv)[0].config
        argv = [*_flags_of_recipe(file, parser), *argv]
    try:
        *groups, _, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except UserError:
        raise
    except ValueError as error:  # of a combination of options
        raise UserError(str(error)) from error
    except Exception as error:  # whatever TrainingArguments and what it configures make of the flags
        raise UserError(f"the flags cannot be used: {first_line(error)}.") from error
    if unknown:
        raise UserError(f"unknown flag {unknown[0]}{_closest(unknown[0].split('=')[0], parser)}")
    model_args, data_args, _, training_args = groups
    if model_args.is_timm_architecture and model_args.export:
        raise UserError("--export is for a DeiT-Ti; a timm architecture is saved as timm's own model already.")
    if model_args.is_timm_architecture and training_args.mode.tokens != ("class",):
        raise UserError(
            f"--model_name_or_path {model_args.model_name_or_path} has one head, and --distill_mode "
            f"{training_args.distill_mode} needs a class and a distillation token: use deit_ti, or mode none, soft "
            "or hard."
        )
    if data_args.max_validation_samples is not None and training_args.dataloader_persistent_workers:
        raise UserError(
            "--max_validation_samples: it does not go with --dataloader_persistent_workers; leave one out."
        )
    if "onnx" in model_args.export and importlib.util.find_spec("onnxscript") is None:
        raise UserError("--export onnx: ONNX needs packages that are missing; pip install onnx onnxscript.")
    if training_args.has_default_output_dir:
        dataset = Path(data_args.dataset_name).name
        name = f"{Path(model_args.model_name_or_path).name}-{dataset}-{training_args.distill_mode}"
        training_args.output_dir = os.path.join("outputs", name + "-single_token" * training_args.single_token)
    return tuple(groups)


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise UserError(message)  # without the usage text of more than a hundred flags


def finite_float(text: str) -> float:
    """A flag's value. Trained with nan or inf, a model is worth nothing, and most code takes them without a word."""
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid float value: {text!r}") from error
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def _flags_of_recipe(file: str, parser: _Parser) -> list[str]:
    """A recipe as flags, so that one parser checks the types of both."""
    try:
        recipe = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (
        OSError,
        ValueError,
        OverflowError,
        RecursionError,
        yaml.YAMLError,
    ) as error:  # a 13th month is a ValueError
        raise UserError(f"--config {file}: the file cannot be read as YAML ({error}).") from error
    if not isinstance(recipe, dict):
        raise UserError(f"--config {file}: it has to hold `flag: value` lines.")
    flags = []
    for key, value in recipe.items():
        if f"--{key}" not in parser._option_string_actions or key == "config":
            raise UserError(f"--config {file}: unknown key {key!r}{_closest(f'--{key}', parser)}")
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            if isinstance(value, bool) and parser._option_string_actions[f"--{key}"].type is not string_to_bool:
                value = "yes" if value else "no"  # YAML reads a bare `no` as false: save_strategy: no
            if isinstance(value, dict):
                try:
                    value = json.dumps(value, default=str)
                except (TypeError, ValueError, RecursionError) as error:  # of its keys, or it holds itself
                    raise UserError(f"--config {file}: {key} has no such value ({first_line(error)}).") from error
            flags.append(f"--{key}={value}")
    return flags


def _closest(flag: str, parser: _Parser) -> str:
    close = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
    return f"; did you mean {close[0]}?" if close else "; --help lists those that there are."


def checkpoint_to_resume(args: DistillationTrainingArguments) -> str | None:
    """
    The checkpoint to go on from, if any. `True` means the last complete one, or the beginning where there is none yet.

    Raises:
        UserError: if the output folder holds a finished run, or something that is not to be resumed and would be
            overwritten; or if the checkpoint is not there, incomplete or damaged.
    """
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: there is a file of this name.")
    if (folder / "all_results.json").is_file():
        raise UserError(
            f"--output_dir {folder} already holds a finished run: name another folder, or delete this one."
        )
    if resume is None or resume.lower() == "false":
        if checkpoints_of(folder):
            raise UserError(
                f"--output_dir {folder} holds an unfinished run: go on with --resume_from_checkpoint True, or name "
                "another folder."
            )
        for name in ("model.safetensors", "config.json", "README.md"):
            if (folder / name).exists():
                raise UserError(f"--output_dir {folder}: its {name} would be overwritten; name another folder.")
        return None
    if resume.lower() == "true":
        # One process decides for all: on another machine the folder may look different.
        return broadcast_object_list([last_complete(folder)])[0]
    if resume == "last-checkpoint" and not os.path.isdir(resume):
        resume = _pushed_checkpoint(args)
    if not os.path.isdir(resume):
        raise UserError(f"--resume_from_checkpoint {resume}: there is no such folder.")
    flaw = flaw_of(resume) if args.process_index == 0 else None
    if flaw is not None:
        raise UserError(f"--resume_from_checkpoint {resume}: it is no complete checkpoint; {flaw}.")
    return resume


def _pushed_checkpoint(args: DistillationTrainingArguments) -> str:
    """The checkpoint that `--hub_strategy checkpoint` keeps on the Hub, from the output folder or fetched."""
    local = os.path.join(args.output_dir, "last-checkpoint")
    if os.path.isdir(local) or not (args.hub_model_id or args.push_to_hub):
        return local
    name = hub_repository(args)
    try:
        if "/" not in name:  # a push adds the user by itself, a download does not
            name = f"{HfApi(token=args.hub_token).whoami()['name']}/{name}"
        pushed = snapshot_download(
            name, revision=args.hub_revision, allow_patterns="last-checkpoint/*", token=args.hub_token
        )
    except Exception as error:  # of the network or the Hub
        raise UserError(
            f"--resume_from_checkpoint last-checkpoint: it cannot be fetched from {name} ({first_line(error)})."
        ) from error
    pushed = os.path.join(pushed, "last-checkpoint")
    if not os.path.isdir(pushed):
        raise UserError(f"--resume_from_checkpoint last-checkpoint: the repository {name} has no such folder.")
    return pushed


def hub_repository(args: DistillationTrainingArguments) -> str:
    """What the user calls the repository to push to, with or without its owner; by default as the output folder."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def check_hub_access(args: DistillationTrainingArguments) -> None:
    """
    Creates the repository to push to, and sets `args.hub_model_id` to its full name: before training, not after it.

    Raises:
        UserError: if the Hub is not reachable, or the token is missing, invalid or may not write there.
    """
    api = HfApi(token=args.hub_token)
    name = hub_repository(args)
    try:
        role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise UserError("--push_to_hub: the token may only read; make one that may write.")
        args.hub_model_id = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
        api.auth_check(args.hub_model_id, write=True)
        if args.hub_revision and not api.revision_exists(args.hub_model_id, args.hub_revision):
            api.create_branch(args.hub_model_id, branch=args.hub_revision)
    except UserError:
        raise
    except Exception as error:  # of the network, the Hub or the token's file: all mean that a push would fail
        raise UserError(
            f"--push_to_hub: cannot write to the repository {name} ({first_line(error)}). "
            "Log in with `hf auth login`, or set HF_TOKEN to a token that may write; or train without --push_to_hub "
            "and use `hf upload` later."
        ) from error


def check_folders(groups: Arguments) -> None:
    """Raises a `UserError` where a run could not write what it has to: found now, not after hours of training."""
    _, _, teacher_args, training_args = groups
    if training_args.local_process_index == 0:  # the datasets' cache is each machine's own
        check_writable("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE)
    if training_args.process_index == 0:
        check_writable("--output_dir", training_args.output_dir)
        if training_args.mode.has_teacher:
            check_writable("--teacher_output_dir", teacher_args.teacher_output_dir)


def check_training(args: DistillationTrainingArguments, student: PreTrainedModel) -> None:
    """
    Tries out, on one number, what the Trainer makes only when training starts: after a teacher is fitted.

    Raises:
        UserError: if the optimizer, the schedule, `torch.compile` or a reporting integration does not take its flags.
    """
    number = [torch.nn.Parameter(torch.zeros(1))]
    flags = f"--optim {args.optim.value}, with --learning_rate, --weight_decay, --adam_* and --optim_args"
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, student)
        if kind in vars(torch.optim).values():
            kind(number, weight_decay=args.weight_decay, **options)
        flags = f"--lr_scheduler_type {args.lr_scheduler_type.value}, with --lr_scheduler_kwargs"
        optimizer = torch.optim.SGD(number, args.learning_rate)
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, args.lr_scheduler_kwargs)
        flags = f"--torch_compile_backend {args.torch_compile_backend} --torch_compile_mode {args.torch_compile_mode}"
        if args.torch_compile:
            torch.compile(student, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        flags = f"--report_to {' '.join(args.report_to)}"
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except Exception as error:  # of many libraries, each with its own
        raise UserError(f"{flags}: {first_line(error)}.") from error


def make_student(model_args: ModelArguments, mode: DistillMode, label_names: list[str], image_processor):
    """The network to train, with random weights or those of `--model_name_or_path`, and what was not taken over."""
    if model_args.is_timm_architecture:
        name = model_args.model_name_or_path
        return new_timm_classifier(name, label_names, model_args.image_size, image_processor), []
    config = DeiTTiConfig(
        image_size=model_args.image_size,
        patch_size=model_args.patch_size,
        drop_path_rate=model_args.drop_path_rate,
        **label_maps(label_names),
        **mode.network,
    )
    if model_args.model_name_or_path == "deit_ti":
        try:
            return DeiTTiForImageClassification(config), []
        except (RuntimeError, TypeError, OverflowError) as error:
            raise UserError(
                f"--image_size {model_args.image_size} --patch_size {model_args.patch_size}: there is no room for so "
                f"many patches ({first_line(error)})."
            ) from error
    return load_student(model_args.model_name_or_path, config)


def save_exports(trainer: DistillationTrainer, model_args: ModelArguments) -> None:
    """The same model for those who do not run this project's code."""
    if model_args.is_timm_architecture:
        return
    folder = Path(trainer.args.output_dir)
    # From the file, since a wrapped or sharded model has its weights elsewhere.
    saved = DeiTTiForImageClassification.from_pretrained(folder, use_safetensors=True)
    save_transformers(saved, trainer.processing_class, folder / "transformers")
    if "timm" in model_args.export:
        save_timm(saved, trainer.processing_class, folder / "timm")
    if "onnx" in model_args.export:
        export_onnx(saved, folder / "model.onnx")


def write_reports(
    trainer: DistillationTrainer,
    groups: Arguments,
    data: ImageData,
    teacher: TeacherRecord | None,
    results: dict[str, dict],
) -> None:
    """Curves, card and results. `all_results.json` comes last: where it is, the run is finished."""
    folder = Path(trainer.args.output_dir)
    plot_training_curves(trainer.state.log_history, folder / CURVES_FILE, teacher.accuracy if teacher else None)
    example_label = None
    if data.source != "local":  # somebody's own images are nobody else's business
        example = data.evaluation[0]
        read_image(example).save(folder / EXAMPLE_FILE)
        example_label = data.label_names[example["label"]]
    record = describe_run(trainer, groups, data, teacher, results["all"], example_label)
    record.save(folder)
    write_model_card(record, folder)
    for name, metrics in results.items():
        (folder / f"{name}_results.json").write_text(json.dumps(metrics, indent=4, sort_keys=True) + "\n")


def describe_run(
    trainer: DistillationTrainer,
    groups: Arguments,
    data: ImageData,
    teacher: TeacherRecord | None,
    metrics: dict,
    example_label: str | None,
) -> RunRecord:
    """What the card tells."""
    model_args, data_args, _, training_args = groups
    is_deit_ti = not model_args.is_timm_architecture
    started_from = model_args.model_name_or_path if is_deit_ti else "deit_ti"
    hyperparameters = {name: getattr(training_args, name) for name in TRAINING_HYPERPARAMETERS}
    if training_args.max_steps < 0:
        del hyperparameters["max_steps"]  # epochs decide
    hyperparameters |= {name: getattr(data_args, name) for name in DATA_HYPERPARAMETERS}
    hyperparameters["augment_on"] = "loader" if trainer.augment is None else "device"
    if data_args.streaming:
        hyperparameters |= {"streaming": True, "shuffle_buffer_size": data_args.shuffle_buffer_size}
    hyperparameters |= {"precision": training_args.mixed_precision, "num_processes": training_args.world_size}
    return RunRecord(
        architecture="deit_ti" if is_deit_ti else model_args.model_name_or_path,
        num_parameters=trainer.model.num_parameters(),
        image_size=model_args.image_size,
        patch_size=model_args.patch_size if is_deit_ti else None,
        drop_path_rate=model_args.drop_path_rate if is_deit_ti else None,
        mode=training_args.mode,
        teacher=teacher,
        dataset=DatasetRecord(
            name=data.name,
            source=data.source,
            config_name=data_args.dataset_config_name,
            label_names=data.label_names,
            num_train_images=len(data.train),
            num_eval_images=len(data.evaluation),
            eval_split=data.eval_split,
        ),
        metrics=metrics,
        hyperparameters=hyperparameters,
        hardware=describe_hardware(training_args),
        base_model=None if started_from == "deit_ti" else started_from,
        base_model_on_hub=started_from != "deit_ti" and not os.path.isdir(started_from),
        hub_model_id=training_args.hub_model_id if training_args.push_to_hub else None,
        license=model_args.license,
        # `accelerate launch` leaves its settings in the environment.
        command=[*(["accelerate", "launch"] if "ACCELERATE_MIXED_PRECISION" in os.environ else ["python"]), *sys.argv],
        example_label=example_label,
    )


def push(trainer: DistillationTrainer) -> None:
    """
    Uploads the finished run; checkpoints stay here, but for those that --hub_strategy has pushed.

    Raises:
        SystemExit: with exit code 1 if the push fails; the run is complete on disk, the message says how to push it.
    """
    args = trainer.args
    if not args.push_to_hub:
        return
    unwanted = ["checkpoint-*", "last-checkpoint/*", "_*"]
    try:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=args.output_dir,
            commit_message="End of training",
            ignore_patterns=[*unwanted],  # it adds to the list
            revision=args.hub_revision,
        )
    except Exception as error:  # whatever the network or the Hub did, nothing is lost
        revision = f" --revision {args.hub_revision}" if args.hub_revision else ""
        excluded = " ".join(f'--exclude "{pattern}"' for pattern in unwanted)
        print(
            f"train_hf.py: the run is finished and saved in {args.output_dir}, but the push failed "
            f"({first_line(error)}). Push it later, logged in by `hf auth login` or HF_TOKEN, with\n\n"
            f"    hf upload {trainer.hub_model_id} {shlex.quote(args.output_dir)} .{revision} {excluded}\n",
            file=sys.stderr,
        )
        raise SystemExit(1) from error


def print_summary(trainer: DistillationTrainer, teacher: TeacherRecord | None, results: dict[str, dict]) -> None:
    """What a person wants to know at the end."""
    folder, metrics = trainer.args.output_dir, results["all"]
    print(f"\n{'':34}{'top-1':>8}{'top-5':>9}")
    if teacher is not None:
        print(f"{'teacher, ' + teacher.name:34}{teacher.accuracy:8.2%}")
    for readout in trainer.readouts:
        name = {"": "student", "_both": "  mean of both heads"}.get(readout, f"  {readout[1:]} head")
        print(f"{name:34}{metrics[f'eval_accuracy{readout}']:8.2%}{metrics[f'eval_accuracy{readout}_top5']:9.2%}")
    minutes, seconds = divmod(round(metrics["train_runtime"]), 60)
    cached = metrics.get("teacher_cached", 0)
    cached = f", {cached:.0%} of the teacher's logits read from its cache" if cached else ""
    remote_code = ", trust_remote_code=True" if isinstance(trainer.model.config, DeiTTiConfig) else ""
    print(
        f"\nTrained in {minutes} min {seconds} s, {metrics['train_samples_per_second']:.0f} images/s{cached}.\n"
        f"The model, its card (README.md) and its curves are in {folder}\n"
        + (f"The teacher is in {metrics['teacher_path']}\n" if teacher is not None else "")
        + "\n    from transformers import pipeline\n"
        f'    print(pipeline("image-classification", "{folder}"{remote_code})("image.png"))\n'
    )


if __name__ == "__main__":
    sys.exit(run())

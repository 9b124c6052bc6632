"""Distils a DeiT-Ti from a teacher, or trains it or a CNN without one, on any image-classification dataset.

    accelerate launch train_hf.py --distill_mode hard
    accelerate launch train_hf.py --config recipes/digits.yaml --learning_rate 1e-3

A run, from top to bottom: read the flags, load and check the images, prepare the teacher (fit it if its labels are not
the dataset's, measure it, refuse it if it knows nothing), train the student, evaluate it, and leave a folder that
`from_pretrained` loads.
"""

import difflib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import timm
import yaml
from huggingface_hub import HfApi, snapshot_download
from transformers import HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.data import (
    DataArguments,
    EvalImages,
    ImageData,
    UserError,
    load_images,
    make_image_processor,
    make_train_images,
    read_image,
)
from modeling_deit_ti.distillation import DistillMode
from modeling_deit_ti.interop import export_onnx, load_student, save_timm, save_transformers
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
from modeling_deit_ti.teacher import TeacherArguments, check_better_than_chance, new_timm_classifier, prepare_teacher
from modeling_deit_ti.trainer import DistillationTrainer, DistillationTrainingArguments


# What a card shows of the training arguments.
HYPERPARAMETERS = (
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
        if self.image_size < 1 or self.patch_size < 1:
            raise UserError("--image_size and --patch_size are 1 or more.")
        if self.image_size % self.patch_size and not self.is_timm_architecture:
            raise UserError(
                f"--patch_size {self.patch_size} does not divide --image_size {self.image_size}: take a multiple, "
                f"such as --image_size {max(1, round(self.image_size / self.patch_size)) * self.patch_size}."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise UserError(f"--drop_path_rate {self.drop_path_rate}: it is 0 or more and below 1.")

    @property
    def is_timm_architecture(self) -> bool:
        return not os.path.isdir(self.model_name_or_path) and timm.is_model(self.model_name_or_path)


Arguments = tuple[ModelArguments, DataArguments, TeacherArguments, DistillationTrainingArguments]


def main() -> None:
    groups = model_args, data_args, teacher_args, training_args = parse_arguments(sys.argv[1:])
    mode = training_args.mode
    checkpoint = checkpoint_to_resume(training_args)
    if training_args.push_to_hub and training_args.process_index == 0:
        check_hub_access(training_args)

    with training_args.main_process_first(desc="loading the images"):
        data = load_images(data_args, labels_needed=mode.needs_labels)
    image_processor = make_image_processor(data_args, model_args.image_size)

    teacher = teacher_path = teacher_record = None
    if mode.has_teacher:
        teacher, teacher_path, teacher_facts = prepare_teacher(
            teacher_args, data, data_args, training_args, image_processor, model_args.image_size
        )

    set_seed(training_args.seed)  # the same student, whether a teacher was fitted before it or not
    student, not_taken_over = make_student(model_args, mode, data.label_names, image_processor)
    train_images, augment = make_train_images(data.train, data_args, model_args.image_size)
    trainer = DistillationTrainer(
        model=student,
        args=training_args,
        teacher=teacher,
        augment=augment,
        train_dataset=train_images,
        eval_dataset=EvalImages(data.evaluation, image_processor),
        processing_class=image_processor,
    )
    if trainer.is_world_process_zero():
        print(*not_taken_over, sep="\n", end="\n" if not_taken_over else "")

    if teacher is not None:
        accuracy = trainer.measure_teacher()
        check_better_than_chance(accuracy, data.evaluation["label"][:], teacher_facts["name"])
        teacher_record = TeacherRecord(accuracy=accuracy, **teacher_facts)
        trainer.log({"teacher_accuracy": accuracy})

    results = {"train": trainer.train(resume_from_checkpoint=checkpoint).metrics, "eval": trainer.evaluate()}
    results["all"] = results["train"] | results["eval"]
    if teacher is not None:
        results["all"] |= {"teacher_accuracy": accuracy, "teacher_path": teacher_path}

    save_run(trainer, groups, data, teacher_record, results)
    print_summary(trainer, teacher_record, results)
    push(trainer)


def parse_arguments(argv: list[str]) -> Arguments:
    """The four groups of arguments, from `--config FILE.yaml` and the flags on top of it."""
    parser = _Parser(
        (ModelArguments, DataArguments, TeacherArguments, DistillationTrainingArguments),
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="A YAML file that sets any of the flags; the command line wins.")
    if "--config" in argv or any(argument.startswith("--config=") for argument in argv):
        file = parser.parse_known_args(argv)[0].config
        argv = [*_flags_of_recipe(file, parser), *argv]
    try:
        *groups, _, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except UserError:
        raise
    except ValueError as error:  # of TrainingArguments or of a combination of options
        raise UserError(str(error)) from error
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
    if training_args.output_dir == "outputs":
        dataset = Path(data_args.dataset_name).name
        name = f"{Path(model_args.model_name_or_path).name}-{dataset}-{training_args.distill_mode}"
        training_args.output_dir = os.path.join("outputs", name + "-single_token" * training_args.single_token)
    return tuple(groups)


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise UserError(message)  # without the usage text of more than a hundred flags


def _flags_of_recipe(file: str, parser: _Parser) -> list[str]:
    """A recipe as flags, so that one parser checks the types of both."""
    try:
        recipe = yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
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
            flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _closest(flag: str, parser: _Parser) -> str:
    close = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
    return f"; did you mean {close[0]}?" if close else "; --help lists those that there are."


def checkpoint_to_resume(args: DistillationTrainingArguments) -> str | None:
    """
    The checkpoint to go on from, if any.

    Raises:
        UserError: if the output folder holds a finished run, or an unfinished one that is not resumed; or if the
            checkpoint is not there or incomplete.
    """
    folder, resume = args.output_dir, args.resume_from_checkpoint
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"--output_dir {folder}: there is a file of this name.")
    if os.path.isfile(os.path.join(folder, "all_results.json")):
        raise UserError(
            f"--output_dir {folder} already holds a finished run: name another folder, or delete this one."
        )
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    if resume is None or resume.lower() == "false":
        if last is not None:
            raise UserError(
                f"--output_dir {folder} holds an unfinished run: go on with --resume_from_checkpoint True, or name "
                "another folder."
            )
        return None
    if resume.lower() == "true":
        return last
    if resume == "last-checkpoint" and not os.path.isdir(resume):
        resume = _pushed_checkpoint(args)
    missing = [name for name in ("trainer_state.json", "model.safetensors") if not Path(resume, name).is_file()]
    if missing:
        raise UserError(
            f"--resume_from_checkpoint {resume}: no complete checkpoint; it has no {' and no '.join(missing)}."
        )
    return resume


def _pushed_checkpoint(args: DistillationTrainingArguments) -> str:
    """The checkpoint that `--hub_strategy checkpoint` keeps on the Hub, from the output folder or fetched."""
    local = os.path.join(args.output_dir, "last-checkpoint")
    if os.path.isdir(local) or not args.hub_model_id:
        return local
    try:
        pushed = snapshot_download(args.hub_model_id, allow_patterns="last-checkpoint/*", token=args.hub_token)
    except Exception as error:  # of the network or the Hub
        raise UserError(
            f"--resume_from_checkpoint last-checkpoint: it cannot be fetched from {args.hub_model_id} "
            f"({type(error).__name__}: {_first_line(error)})."
        ) from error
    return os.path.join(pushed, "last-checkpoint")


def check_hub_access(args: DistillationTrainingArguments) -> None:
    """
    Creates the repository to push to, and sets `args.hub_model_id` to its full name: before training, not after it.

    Raises:
        UserError: if the Hub is not reachable, or the token is missing, invalid or may not write there.
    """
    api = HfApi(token=args.hub_token)
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    try:
        role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise UserError("--push_to_hub: the token may only read; make one that may write.")
        args.hub_model_id = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
        api.auth_check(args.hub_model_id, write=True)
    except UserError:
        raise
    except Exception as error:  # of the network, the Hub or the token's file: all mean that a push would fail
        raise UserError(
            f"--push_to_hub: cannot write to the repository {name} ({type(error).__name__}: {_first_line(error)}). "
            "Log in with `hf auth login`, or set HF_TOKEN to a token that may write; or train without --push_to_hub "
            "and use `hf upload` later."
        ) from error


def make_student(model_args: ModelArguments, mode: DistillMode, label_names: list[str], image_processor):
    """The network to train, with random weights or those of `--model_name_or_path`, and what was not taken over."""
    if model_args.is_timm_architecture:
        name = model_args.model_name_or_path
        return new_timm_classifier(name, label_names, model_args.image_size, image_processor), []
    config = DeiTTiConfig(
        image_size=model_args.image_size,
        patch_size=model_args.patch_size,
        drop_path_rate=model_args.drop_path_rate,
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        **mode.network,
    )
    if model_args.model_name_or_path == "deit_ti":
        return DeiTTiForImageClassification(config), []
    return load_student(model_args.model_name_or_path, config)


def save_run(
    trainer: DistillationTrainer,
    groups: Arguments,
    data: ImageData,
    teacher: TeacherRecord | None,
    results: dict[str, dict],
) -> None:
    """The folder that a run leaves. `all_results.json` comes last: where it is, the run is finished."""
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    model_args, data_args, _, training_args = groups
    folder = Path(training_args.output_dir)
    if not model_args.is_timm_architecture:
        # From the file, since a wrapped or sharded model has its weights elsewhere.
        saved = DeiTTiForImageClassification.from_pretrained(folder, use_safetensors=True)
        save_transformers(saved, trainer.processing_class, folder / "transformers")
        if "timm" in model_args.export:
            save_timm(saved, trainer.processing_class, folder / "timm")
        if "onnx" in model_args.export:
            export_onnx(saved, folder / "model.onnx")
    plot_training_curves(trainer.state.log_history, folder / CURVES_FILE, teacher.accuracy if teacher else None)
    on_hub = data_args.dataset_name != "digits" and not os.path.isdir(data_args.dataset_name)
    example_label = None
    if on_hub or data_args.dataset_name == "digits":  # somebody's own images are nobody else's business
        first = data.evaluation[0]
        read_image(first).save(folder / EXAMPLE_FILE)
        example_label = data.label_names[first["label"]]
    started_from = model_args.model_name_or_path
    is_new = model_args.is_timm_architecture or started_from == "deit_ti"
    record = RunRecord(
        architecture=started_from if model_args.is_timm_architecture else "deit_ti",
        num_parameters=sum(parameter.numel() for parameter in trainer.model.parameters()),
        image_size=model_args.image_size,
        patch_size=None if model_args.is_timm_architecture else model_args.patch_size,
        drop_path_rate=None if model_args.is_timm_architecture else model_args.drop_path_rate,
        mode=training_args.mode,
        teacher=teacher,
        dataset=DatasetRecord(
            name=data_args.dataset_name,
            source="hub" if on_hub else "scikit-learn" if data_args.dataset_name == "digits" else "local",
            config_name=data_args.dataset_config_name,
            label_names=data.label_names,
            num_train_images=len(data.train),
            num_eval_images=len(data.evaluation),
            eval_split=data.eval_split,
        ),
        metrics=results["all"],
        hyperparameters={
            name: getattr(group, name)
            for group, names in (
                (training_args, HYPERPARAMETERS),
                (
                    data_args,
                    ("crop", "horizontal_flip", "auto_augment", "random_erasing", "augment_on", "eval_crop_ratio"),
                ),
            )
            for name in names
        }
        | {"precision": training_args.mixed_precision, "num_processes": training_args.world_size},
        hardware=describe_hardware(training_args),
        base_model=None if is_new else started_from,
        base_model_on_hub=not is_new and not os.path.isdir(started_from),
        hub_model_id=training_args.hub_model_id if training_args.push_to_hub else None,
        license=model_args.license,
        command=["accelerate", "launch", *sys.argv],
        example_label=example_label,
    )
    record.save(folder)
    write_model_card(record, folder)
    for name, metrics in results.items():
        (folder / f"{name}_results.json").write_text(json.dumps(metrics, indent=4, sort_keys=True) + "\n")


def push(trainer: DistillationTrainer) -> None:
    """
    Uploads the finished run; checkpoints stay here, but for those that --hub_strategy has pushed.

    Raises:
        SystemExit: with exit code 1 if the push fails; the run is complete on disk, the message says how to push it.
    """
    args = trainer.args
    if not args.push_to_hub or not trainer.is_world_process_zero():
        return
    unwanted = ["checkpoint-*", "last-checkpoint/*", "_*"]
    try:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=args.output_dir,
            commit_message="End of training",
            ignore_patterns=unwanted,
            revision=args.hub_revision,
        )
    except Exception as error:  # whatever the network or the Hub did, nothing is lost
        revision = f" --revision {args.hub_revision}" if args.hub_revision else ""
        excluded = " ".join(f'--exclude "{pattern}"' for pattern in unwanted)
        print(
            f"train_hf.py: the run is finished and saved in {args.output_dir}, but the push failed "
            f"({type(error).__name__}: {_first_line(error)}). Push it later with\n\n"
            f"    hf upload {trainer.hub_model_id} {args.output_dir} .{revision} {excluded}\n",
            file=sys.stderr,
        )
        raise SystemExit(1) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def print_summary(trainer: DistillationTrainer, teacher: TeacherRecord | None, results: dict[str, dict]) -> None:
    """What a person wants to know at the end."""
    if not trainer.is_world_process_zero():
        return
    folder, metrics = trainer.args.output_dir, results["all"]
    print(f"\n{'':34}{'top-1':>8}{'top-5':>9}")
    if teacher is not None:
        print(f"{'teacher, ' + teacher.name:34}{teacher.accuracy:8.2%}")
    for readout in trainer.readouts:
        name = {"": "student", "_both": "  mean of both heads"}.get(readout, f"  {readout[1:]} head")
        print(f"{name:34}{metrics[f'eval_accuracy{readout}']:8.2%}{metrics[f'eval_accuracy{readout}_top5']:9.2%}")
    minutes, seconds = divmod(round(metrics["train_runtime"]), 60)
    remote_code = ", trust_remote_code=True" if isinstance(trainer.model.config, DeiTTiConfig) else ""
    print(
        f"\nTrained in {minutes} min {seconds} s, {metrics['train_samples_per_second']:.0f} images/s. The model, its "
        f"card (README.md) and its curves are in {folder}\n"
        + (f"The teacher is in {metrics['teacher_path']}\n" if teacher is not None else "")
        + "\n    from transformers import pipeline\n"
        f'    print(pipeline("image-classification", "{folder}"{remote_code})("image.png"))\n'
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"train_hf.py: error: {error}", file=sys.stderr)
        sys.exit(2)

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
from transformers import HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.data import (
    DataArguments,
    EvalImages,
    TrainImages,
    UserError,
    load_images,
    make_image_processor,
    make_train_transform,
)
from modeling_deit_ti.teacher import TeacherArguments, check_better_than_chance, new_timm_classifier, prepare_teacher
from modeling_deit_ti.trainer import DistillationTrainer, DistillationTrainingArguments


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
    model_args, data_args, teacher_args, training_args = parse_arguments(sys.argv[1:])
    mode = training_args.mode
    checkpoint = checkpoint_to_resume(training_args)

    with training_args.main_process_first(desc="loading the images"):
        data = load_images(data_args, labels_needed=mode.needs_labels)
    image_processor = make_image_processor(data_args, model_args.image_size)

    teacher, teacher_facts = None, {}
    if mode.has_teacher:
        teacher, teacher_facts = prepare_teacher(
            teacher_args, data, data_args, training_args, image_processor, model_args.image_size
        )

    set_seed(training_args.seed)  # the same student, whether a teacher was fitted before it or not
    trainer = DistillationTrainer(
        model=make_student(model_args, mode, data.label_names, image_processor),
        args=training_args,
        teacher=teacher,
        train_dataset=TrainImages(data.train, make_train_transform(data_args, model_args.image_size)),
        eval_dataset=EvalImages(data.evaluation, image_processor),
        processing_class=image_processor,
    )

    metrics = {}
    if teacher is not None:
        metrics["teacher_accuracy"] = trainer.measure_teacher()
        metrics["teacher_path"] = teacher_facts["path"]
        trainer.log({"teacher_accuracy": metrics["teacher_accuracy"]})
        check_better_than_chance(metrics["teacher_accuracy"], data.evaluation["label"][:], teacher_facts["name"])

    train_metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    eval_metrics = trainer.evaluate()

    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_results(Path(training_args.output_dir), train_metrics, eval_metrics, metrics)
        print_summary(trainer, train_metrics, eval_metrics, metrics)


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
    if training_args.mixed_precision == "fp16" and training_args.device.type == "cpu":
        raise UserError("fp16 is asked for (by a flag or the accelerate config), and there is no GPU here.")
    if model_args.is_timm_architecture and len(training_args.mode.tokens) > 1:
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
    missing = [name for name in ("trainer_state.json", "model.safetensors") if not Path(resume, name).is_file()]
    if missing:
        raise UserError(
            f"--resume_from_checkpoint {resume}: no complete checkpoint; it has no {' and no '.join(missing)}."
        )
    return resume


def make_student(model_args: ModelArguments, mode, label_names: list[str], image_processor):
    """The network to train, with random weights or those of `--model_name_or_path`."""
    if model_args.is_timm_architecture:
        return new_timm_classifier(model_args.model_name_or_path, label_names, model_args.image_size, image_processor)
    config = DeiTTiConfig(
        image_size=model_args.image_size,
        patch_size=model_args.patch_size,
        drop_path_rate=model_args.drop_path_rate,
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        **mode.network,
    )
    return DeiTTiForImageClassification(config)


def write_results(folder: Path, train_metrics: dict, eval_metrics: dict, teacher_metrics: dict) -> None:
    """`all_results.json` comes last: where it is, the run is finished."""
    for name, metrics in (
        ("train_results.json", train_metrics),
        ("eval_results.json", eval_metrics),
        ("all_results.json", {**train_metrics, **eval_metrics, **teacher_metrics}),
    ):
        (folder / name).write_text(json.dumps(metrics, indent=4, sort_keys=True) + "\n")


def print_summary(
    trainer: DistillationTrainer, train_metrics: dict, eval_metrics: dict, teacher_metrics: dict
) -> None:
    """What a person wants to know at the end."""
    folder = trainer.args.output_dir
    rows = [("teacher", teacher_metrics.get("teacher_accuracy"), None)]
    for name in trainer._readout_names:
        rows.append(
            (
                f"student, {name[1:]} read-out" if name else "student",
                eval_metrics[f"eval_accuracy{name}"],
                eval_metrics[f"eval_accuracy{name}_top5"],
            )
        )
    print(f"\n{'':34}{'top-1':>8}{'top-5':>8}")
    for name, top1, top5 in rows:
        if top1 is not None:
            print(f"{name:34}{top1:8.2%}" + (f"{top5:8.2%}" if top5 is not None else ""))
    minutes, seconds = divmod(train_metrics["train_runtime"], 60)
    print(
        f"\nTrained in {minutes:.0f} min {seconds:.0f} s, {train_metrics['train_samples_per_second']:.0f} images/s. "
        f"Everything is in {folder}; use it with\n\n"
        "    from transformers import pipeline\n"
        f'    pipeline("image-classification", "{folder}", trust_remote_code=True)("image.png")\n'
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"train_hf.py: error: {error}", file=sys.stderr)
        sys.exit(2)

"""Turns flags and YAML recipes into [`Arguments`]: the student's run and, from it, the run that fits its teacher."""

import argparse
import dataclasses
import difflib
import importlib.util
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .arguments import (
    DEFAULT_TEACHER,
    TEACHER_RECIPE,
    Arguments,
    AugmentationArguments,
    DistillationTrainingArguments,
    ImageArguments,
    ModelArguments,
    TeacherArguments,
)
from .errors import UserError, first_line


GROUPS = (ImageArguments, AugmentationArguments, ModelArguments, TeacherArguments, DistillationTrainingArguments)

# What a teacher's run inherits from its student's: the machine, the batch sizes and the reporting.
INHERITED_BY_TEACHER = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("fp16", "bf16", "tf32", "use_cpu", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    "full_determinism",
    *("dataloader_num_workers", "disable_tqdm", "log_level"),
    *("project", "trackio_space_id", "trackio_static_space_id", "trackio_bucket_id", "hub_private_repo"),
)
MAX_YAML_NODES = 10_000  # in a recipe
# The tools that --report_to calls by the name of the package that they need.
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
# What --teacher_config may not set.
FORBIDDEN_IN_TEACHER_CONFIG = {
    *("distill_mode", "teacher_targets", "single_token", "distillation_alpha", "distillation_temperature"),
    *("output_dir", "resume_from_checkpoint", "push_to_hub", "export"),
    *(entry.name for group in (ImageArguments, TeacherArguments) for entry in dataclasses.fields(group)),
}
MODE_OPTIONS = ("teacher_targets", "distillation_alpha", "distillation_temperature", "single_token")
# What the stages of a recipe may not set, since it is the same for all.
FORBIDDEN_IN_STAGES = {
    *("output_dir", "resume_from_checkpoint", "model_name_or_path", "single_token", "push_to_hub", "export"),
    *(entry.name for entry in dataclasses.fields(ImageArguments)),
}


class _Parser(HfArgumentParser):
    def __init__(self, description: str | None = None):
        super().__init__(GROUPS, description=description, allow_abbrev=False)
        for action in self._actions:
            if action.type is float:
                action.type = number
            elif action.type is string_to_bool and action.nargs is None:  # a flag that is true, false or unset
                action.nargs, action.const = "?", True
        self.add_argument("--config", help="A YAML file that sets any of the flags; the command line wins.")

    def error(self, message: str):
        raise UserError(message)  # without the usage text of more than a hundred flags

    def parse(self, argv: list[str]) -> Arguments:
        try:
            *groups, _, unknown = self.parse_args_into_dataclasses(
                argv, return_remaining_strings=True, look_for_args_file=False
            )
        except ValueError as error:  # a UserError, or a combination of options
            raise UserError(str(error)) from error
        except Exception as error:  # from whatever TrainingArguments configures
            raise UserError(f"the flags cannot be used: {first_line(error)}.") from error
        if unknown:
            raise UserError(f"unknown flag {unknown[0]}{self.closest(unknown[0].split('=')[0])}")
        args = Arguments(*groups, flags=argv)
        args.training.division = args.division(args.training.world_size)
        return args

    def closest(self, flag: str) -> str:
        close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"; did you mean {close[0]}?" if close else "; --help lists all flags."

    def read_recipe(self, option: str, file: str) -> dict:
        """The flags that a YAML file sets."""
        try:
            text = Path(file).read_text(encoding="utf-8")
            if any(True for _ in itertools.islice(_nodes(yaml.compose(text, yaml.SafeLoader)), MAX_YAML_NODES, None)):
                raise ValueError(f"it expands to more than {MAX_YAML_NODES:,} values")
            recipe = yaml.safe_load(text)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"{option} {file}: it cannot be read as YAML ({error}).") from error
        if not isinstance(recipe, dict):
            raise UserError(f"{option} {file}: it must consist of `flag: value` lines.")
        self.check_keys(option, file, recipe.keys() - {"stages"} if option == "--config" else recipe)
        return recipe

    def check_keys(self, option: str, file: str, keys: Iterable[str]) -> None:
        for key in keys:
            if f"--{key}" not in self._option_string_actions or key == "config":
                raise UserError(f"{option} {file}: unknown key {key!r}{self.closest(f'--{key}')}")
            if key.replace("-", "_") == "trust_remote_code":  # recipes are passed around
                raise UserError(f"{option} {file}: {key} can only be set on the command line.")

    def flags(self, recipe: dict) -> list[str]:
        """A recipe as flags, so that one parser checks the types of both."""
        flags = []
        for key, value in recipe.items():
            if isinstance(value, list):
                flags += [f"--{key}", *map(str, value)]
            elif value is not None:
                if isinstance(value, bool) and self._option_string_actions[f"--{key}"].type is not string_to_bool:
                    value = "yes" if value else "no"  # YAML reads a bare `no` as false: save_strategy: no
                flags.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
        return flags


def _nodes(node: yaml.Node | None) -> Iterator[yaml.Node | None]:
    """A document's nodes, each as often as aliases repeat it: a few lines of aliases can expand to billions."""
    yield node
    if isinstance(node, yaml.CollectionNode):
        for part in node.value:
            for child in part if isinstance(part, tuple) else (part,):  # the keys and values of a mapping
                yield from _nodes(child)


def number(text: str) -> float:
    """A flag's value. Most code accepts nan and inf without a word, and the trained model is worthless."""
    value = float(text)  # if it is not a number, argparse says "invalid number value"
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def parse_arguments(argv: list[str], description: str | None = None) -> Arguments:
    """
    The groups of arguments, from `--config FILE.yaml` and the flags that override it; `description` is for `--help`.

    Raises:
        UserError: if a flag is unknown, has a value out of range, or contradicts another.
    """
    *_, last = parse_stages(argv, description)
    return last


def parse_stages(argv: list[str], description: str | None = None) -> list[Arguments]:
    """
    Like [`parse_arguments`], for each of the recipe's `stages`; a single run if it has none.

    `stages` lists what differs between the runs. Each run starts from the model of the previous one. The last is saved
    in --output_dir, the others in its subfolders stage-1, stage-2, ...
    """
    parser = _Parser(description)
    config = parser.parse_known_args(argv)[0].config
    recipe = {} if config is None else parser.read_recipe("--config", config)
    stages = recipe.pop("stages", [{}])
    if not (isinstance(stages, list) and stages and all(isinstance(stage, dict) for stage in stages)):
        raise UserError(f"--config {config}: stages must be a list of entries with `flag: value` lines.")
    mode = recipe.get("distill_mode")
    if mode is not None and parser.parse_known_args([f"--distill_mode={mode}", *argv])[0].distill_mode != mode:
        recipe, *stages = map(_without_mode_options, (recipe, *stages))
    for stage in stages:
        parser.check_keys("--config", f"{config}, stages", stage)
        for key in stage.keys() & FORBIDDEN_IN_STAGES:
            raise UserError(f"--config {config}: {key} must be the same for all stages: set it outside them.")
    shared = parser.flags(recipe)
    final = _parse_run(parser, [*shared, *parser.flags(stages[-1]), *argv], argv)
    if len(stages) == 1:
        return [final]
    if final.training.resume_from_checkpoint not in ("auto", "false"):
        raise UserError(
            f"--resume_from_checkpoint {final.training.resume_from_checkpoint}: a recipe with stages finds its own "
            "checkpoint; leave this flag out."
        )
    runs, folders = [], [os.path.join(final.training.output_dir, f"stage-{i}") for i in range(1, len(stages))]
    for position, (stage, folder) in enumerate(zip(stages, [*folders, final.training.output_dir], strict=True)):
        own = [*parser.flags(stage), *argv, f"--output_dir={folder}"]
        if position > 0:
            own += [f"--model_name_or_path={folders[position - 1]}"]
        if position < len(folders):
            name = final.training.run_name or Path(final.training.output_dir).name
            own += [f"--run_name={name}-stage-{position + 1}", "--push_to_hub=False", "--temperature_scaling=False"]
        run = _parse_run(parser, [*shared, *own], argv)
        runs.append(run._replace(earlier_stages=tuple(folders[:position])))
        if position < len(folders):
            run.model.export.clear()
    return runs


def _without_mode_options(recipe: dict) -> dict:
    """A recipe without the options of its mode, for another mode, which they may not suit."""
    return {key: value for key, value in recipe.items() if str(key).replace("-", "_") not in MODE_OPTIONS}


def _parse_run(parser: _Parser, flags: list[str], argv: list[str]) -> Arguments:
    args = parser.parse(flags)._replace(flags=argv)
    _check_combinations(args)
    model, training = args.model, args.training
    if training.has_default_output_dir:
        dataset = Path(args.images.dataset_name).name
        name = f"{Path(model.model_name_or_path).name}-{dataset}-{training.distill_mode}"
        training.output_dir = os.path.join("outputs", name + "-single_token" * training.single_token)
    return args._replace(fitting=_fitting_arguments(args)) if training.mode.has_teacher else args


def _check_combinations(args: Arguments) -> None:
    model, training = args.model, args.training
    if model.is_timm_architecture and model.export:
        raise UserError("--export is for a DeiT-Ti; a timm architecture is already saved as timm's own model.")
    if model.is_timm_architecture and training.mode.tokens != ("class",):
        raise UserError(
            f"--model_name_or_path {model.model_name_or_path} has one head, but --distill_mode "
            f"{training.distill_mode} needs a class and a distillation token: use deit_ti, or mode none, soft or hard."
        )
    if model.is_new_deit_ti or training.mode.tokens != ("class",):  # other weights may be of a network without patches
        model.check_patch_size()
    if args.images.streaming and args.augmentation.augment_on == "device":
        raise UserError(
            "--augment_on device needs images of one size, which --streaming cannot know: use --augment_on loader."
        )
    if args.images.max_validation_samples is not None and training.dataloader_persistent_workers:
        raise UserError("--max_validation_samples and --dataloader_persistent_workers cannot be combined.")
    for tool in training.report_to:
        if tool in TRACKERS and importlib.util.find_spec(tool) is None:
            raise UserError(f"--report_to {tool} is not installed: pip install {tool}.")
    if "onnx" in model.export and not all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript"))):
        raise UserError("--export onnx needs more packages: pip install onnx onnxruntime onnxscript.")


# ---- The teacher's own run ----


def fitting_flags(args: Arguments) -> list[str]:
    """
    The flags of the run that fits the teacher, in mode `none`, on its student's images and machine. `--teacher_config`
    can set any part of its recipe, and the `--teacher_*` flags override that.

    Raises:
        UserError: if `--teacher_config` cannot be read, or sets what it may not set.
    """
    parser = _Parser()
    student, teacher = args.augmentation, args.teacher
    recipe = {
        **{name: getattr(args.training, name) for name in INHERITED_BY_TEACHER},
        **({"report_to": args.training.report_to} if args.training.report_to else {}),
        "model_name_or_path": DEFAULT_TEACHER,
        "image_size": args.model.image_size,
        "crop": student.crop_at(args.model.image_size),  # whatever its own size, it sees what its student sees
        "horizontal_flip": student.horizontal_flip,
        "augment_on": student.augment_on,
        "class_weights": args.training.class_weights,
        **TEACHER_RECIPE,
        **_own_recipe(teacher, parser),
    }
    # Without flags that equal their defaults: what is left is the command in the teacher's card.
    defaults = {entry.name: entry.default for group in GROUPS for entry in dataclasses.fields(group)}
    given = vars(args.images) | recipe
    return parser.flags({name: value for name, value in given.items() if value != defaults[name]})


def _own_recipe(teacher: TeacherArguments, parser: _Parser) -> dict:
    """What the user has set for the teacher's run."""
    file = teacher.teacher_config
    recipe = {} if file is None else parser.read_recipe("--teacher_config", file)
    for key in recipe:
        if key in FORBIDDEN_IN_TEACHER_CONFIG:
            raise UserError(
                f"--teacher_config {file}: {key} cannot be set here: a teacher is fitted to its student's images, "
                "with their labels, in --teacher_output_dir."
            )
    flags = {
        "model_name_or_path": teacher.teacher_model_name_or_path,
        "image_size": teacher.teacher_image_size,
        "num_train_epochs": teacher.teacher_num_train_epochs or None,  # 0: it will not be fitted
        "learning_rate": teacher.teacher_learning_rate,
    }
    return recipe | {name: value for name, value in flags.items() if value is not None}


def _fitting_arguments(args: Arguments) -> Arguments:
    """The arguments of the teacher's own run; also updates `args.teacher` with what `--teacher_config` sets."""
    teacher, parser, flags = args.teacher, _Parser(), fitting_flags(args)
    try:
        fitting = parser.parse(flags)
    except UserError as error:
        if teacher.teacher_config is None:
            raise
        raise UserError(f"--teacher_config {teacher.teacher_config}: {error}") from error
    teacher.teacher_model_name_or_path = fitting.model.model_name_or_path
    if "image_size" in _own_recipe(teacher, parser):
        teacher.teacher_image_size = fitting.model.image_size
    return fitting

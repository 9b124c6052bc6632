"""The teacher: any image classifier, fitted to the dataset where it does not know its labels, measured, frozen.

It speaks the student's language: it takes the images as the student sees them and answers in the student's order of
labels.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, set_seed

from .checkpoints import checkpoints_of, last_complete
from .classifiers import (
    check_takes_images,
    input_format,
    is_timm_architecture,
    label_maps,
    label_names,
    load_classifier,
    new_timm_classifier,
    timm_hub_id,
)
from .configuration_deit_ti import DeiTTiConfig
from .data import DataArguments, EvalImages, ImageData, make_image_processor, make_train_images
from .errors import UserError, first_line
from .interop import load_student
from .trainer import DistillationTrainer, DistillationTrainingArguments


# A teacher is fitted with one seed, whatever the run's: it then serves runs that differ in their seed.
TEACHER_SEED = 42
# Bump when the way of fitting changes in code: teachers that were fitted the old way are not reused then.
FITTING_VERSION = 1
RECIPE_FILE = "teacher_recipe.json"
SHOWN_OF_RECIPE = ("num_train_epochs", "learning_rate", "batch_size", "crop", "horizontal_flip", "precision")


@dataclass
class TeacherArguments:
    """Which teacher, and how it is fitted when its labels are not the dataset's."""

    teacher_model_name_or_path: str = field(
        default="regnetx_004",
        metadata={
            "help": "A timm architecture, or a folder or Hub id of any image classifier that "
            "AutoModelForImageClassification loads."
        },
    )
    teacher_output_dir: str = field(
        default="outputs/teachers", metadata={"help": "Where fitted teachers are kept for later runs."}
    )
    teacher_pretrained: bool = field(
        default=False, metadata={"help": "Start a timm architecture from timm's weights on the Hub, not from scratch."}
    )
    teacher_image_size: int | None = field(
        default=None,
        metadata={
            "help": "The teacher's input size. Default: its own, or the student's where it starts from scratch."
        },
    )
    teacher_num_train_epochs: float = field(
        default=20.0, metadata={"help": "Epochs of fitting; 0: do not fit, take the teacher as it is or not at all."}
    )
    teacher_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of fitting."})
    teacher_cache: str = field(
        default="auto",
        metadata={
            "help": "Store the teacher's logits under --teacher_output_dir, in half precision, for later epochs and "
            "runs that show it the same images. `auto`: where they take no more than 1 GiB.",
            "choices": ["auto", "on", "off"],
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that a teacher of another project brings along."}
    )

    def __post_init__(self):
        if not self.teacher_output_dir:
            raise UserError("--teacher_output_dir: the name of a folder is missing.")
        if self.teacher_learning_rate < 0:
            raise UserError(f"--teacher_learning_rate {self.teacher_learning_rate}: it is 0 or more.")
        if self.teacher_num_train_epochs < 0:
            raise UserError(f"--teacher_num_train_epochs {self.teacher_num_train_epochs}: it is 0 or more.")
        if self.teacher_image_size is not None and self.teacher_image_size < 2:
            raise UserError(f"--teacher_image_size {self.teacher_image_size}: it is 2 or more.")


class Teacher(nn.Module):
    """
    A frozen classifier behind the student's inputs and labels.

    Args:
        model (`PreTrainedModel`): an image classifier.
        image_size (`int`): its input size, in pixels.
        image_mean, image_std (`list[float]`): its normalisation.
        student_mean, student_std (`list[float]`): the normalisation of the images it is given.
        label_order (`list[int]`, *optional*): for each of the dataset's labels, its id in the model. Default: as is.
    """

    def __init__(self, model, image_size, image_mean, image_std, student_mean, student_std, label_order=None):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.image_size = image_size
        # One affine map takes an image from the student's normalisation to the teacher's.
        mean, std = torch.tensor(image_mean), torch.tensor(image_std)
        scale = torch.tensor(student_std) / std
        shift = (torch.tensor(student_mean) - mean) / std
        self.same_normalisation = torch.allclose(scale, torch.ones(3)) and torch.allclose(shift, torch.zeros(3))
        self.register_buffer("scale", scale.view(3, 1, 1))
        self.register_buffer("shift", shift.view(3, 1, 1))
        same_order = label_order is None or label_order == list(range(model.config.num_labels))
        self.register_buffer("label_order", None if same_order else torch.tensor(label_order))
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode: batch norms and dropout do not move, whoever calls this."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, height, width)`): as the student sees them.

        Returns:
            `torch.Tensor` of shape `(B, num_labels)`, float32: logits in the dataset's order of labels.
        """
        if not self.same_normalisation:
            pixel_values = torch.addcmul(self.shift.float(), pixel_values, self.scale.float())
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            # In float32: bicubic interpolation has no half precision on the CPU.
            pixel_values = F.interpolate(
                pixel_values.float(), (self.image_size, self.image_size), mode="bicubic", antialias=True
            )
        pixel_values = pixel_values.to(self.scale.dtype, memory_format=torch.channels_last)
        logits = self.model(pixel_values=pixel_values).logits.float()
        return logits if self.label_order is None else logits[:, self.label_order]


def teacher_folder_name(teacher: str, dataset: str, digest: str) -> str:
    """Of what is kept for a teacher and a dataset: their names, so far as a file system takes them, and the digest."""
    parts = (re.sub(r"[^\w.-]+", "-", Path(part).name) for part in (teacher, dataset))
    return f"{'-'.join(parts)}-{digest}"


def match_labels(teacher_names: list[str], names: list[str]) -> list[int] | None:
    """
    For each of the dataset's labels its id in the teacher, matched by name (case, `_` and `-` do not count). A teacher
    with unnamed labels (`LABEL_0`, ...) matches by order where the numbers of labels are equal. A teacher with more
    labels than the dataset, all of the dataset's among them, matches too.

    Returns:
        `list[int]` of length `len(names)`, or `None` where the teacher knows other labels.

    Raises:
        UserError: if the names match in part, or not one to one.
    """
    plain = [re.sub(r"[\s_-]+", " ", str(name)).strip().casefold() for name in names]
    teacher_plain = [re.sub(r"[\s_-]+", " ", str(name)).strip().casefold() for name in teacher_names]
    if teacher_plain == plain:
        return list(range(len(names)))
    unnamed = all(re.fullmatch(r"label \d+", name) for name in teacher_plain)
    if len(teacher_names) == len(names) and unnamed:
        return list(range(len(names)))
    known = set(teacher_plain)
    missing = [name for name, key in zip(names, plain, strict=True) if key not in known]
    if not missing:
        positions = [[i for i, name in enumerate(teacher_plain) if name == key] for key in plain]
        twice = [name for name, found in zip(names, positions, strict=True) if len(found) > 1]
        if twice or len(set(plain)) < len(plain):
            raise UserError(
                f"The teacher's labels cannot be matched to the dataset's: {', '.join(map(repr, twice or names))} "
                "stand for more than one. Rename them in the teacher's config.json (id2label)."
            )
        return [found[0] for found in positions]
    if len(missing) < len(names) and len(teacher_names) == len(names):
        unmatched = [name for name, key in zip(teacher_names, teacher_plain, strict=True) if key not in set(plain)]
        raise UserError(
            f"The teacher's labels cannot be matched to the dataset's: {len(names) - len(missing)} of {len(names)} "
            f"have the same name; the dataset has {', '.join(map(repr, missing[:10]))} where the teacher has "
            f"{', '.join(map(repr, unmatched[:10]))}. Rename them in the teacher's config.json (id2label)."
        )
    return None


def prepare_teacher(
    args: TeacherArguments,
    data: ImageData,
    data_args: DataArguments,
    training_args: DistillationTrainingArguments,
    image_processor,
) -> tuple[Teacher, str, dict]:
    """
    Loads the teacher; fits it first, or takes the one that an earlier run fitted, where its labels are not the
    dataset's.

    Args:
        image_processor: the student's.

    Returns:
        The teacher, where its model is, and what `model_card.TeacherRecord` says of it but for its accuracy.

    Raises:
        UserError: if there is no such model, its labels cannot be matched, it has to be fitted and cannot, or it does
            not take images of `--teacher_image_size`.
    """
    name = args.teacher_model_name_or_path
    is_timm = is_timm_architecture(name)
    path, fitted = timm_hub_id(name) if is_timm and args.teacher_pretrained else name, None
    model = label_order = None
    if not is_timm or args.teacher_pretrained:
        model, missing = load_classifier(path, "--teacher_model_name_or_path", args.trust_remote_code)
        if not missing:  # a backbone lacks the head
            label_order = match_labels(label_names(model.config), data.label_names)
    if label_order is None:
        fitted = "scratch" if model is None else "pretrained"
        path = _fit(args, model, path, data, data_args, training_args, image_processor)
        model, _ = load_classifier(path, "--teacher_model_name_or_path", args.trust_remote_code)
    image_size, mean, std = input_format(model, path, args.trust_remote_code)
    image_size = args.teacher_image_size or image_size
    student_mean, student_std = list(image_processor.image_mean), list(image_processor.image_std)
    try:
        teacher = Teacher(model, image_size, mean, std, student_mean, student_std, label_order)
        teacher(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # of any architecture, and of whatever its config says of size, mean and deviation
        raise UserError(
            f"The teacher {name} cannot take images of {image_size}x{image_size} pixels ({first_line(error)})."
        ) from error
    facts = {
        "name": name,
        "source": "timm" if is_timm else "local" if os.path.isdir(name) else "hub",
        "fitted": fitted,
        "image_size": image_size,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    if fitted is not None:
        recipe = json.loads(Path(path, RECIPE_FILE).read_text())
        facts["hyperparameters"] = {key: recipe[key] for key in SHOWN_OF_RECIPE}
    return teacher, path, facts


def check_better_than_chance(accuracy: float, labels: list[int], name: str) -> None:
    """
    Refuses a teacher that knows nothing of the dataset.

    Chance is the share of the commonest label; a teacher has to be above it by five standard errors and by half of
    it, at most 5 percentage points: untrained networks reach more than chance now and then. Half of the way from
    chance to perfect is always enough.

    Raises:
        UserError: with the teacher's accuracy.
    """
    chance = torch.bincount(torch.tensor(labels)).max().item() / len(labels)
    margin = max(5 * (chance * (1 - chance) / len(labels)) ** 0.5, min(0.5 * chance, 0.05))
    if accuracy <= chance + min(margin, 0.5 * (1 - chance)):
        raise UserError(
            f"The teacher {name} is no better than chance: its accuracy on the evaluation split is {accuracy:.4f}, "
            f"and always naming the commonest label gives {chance:.4f}. A student would learn noise from it. Fit it "
            "longer (--teacher_num_train_epochs, --teacher_learning_rate) or name another "
            "(--teacher_model_name_or_path)."
        )


def _fit(
    args: TeacherArguments,
    pretrained: PreTrainedModel | None,
    source: str,
    data: ImageData,
    data_args: DataArguments,
    training_args: DistillationTrainingArguments,
    student_processor,
) -> str:
    """The folder of the teacher that this recipe makes; fits it where no earlier run has."""
    name = args.teacher_model_name_or_path
    if args.teacher_num_train_epochs == 0:
        raise UserError(
            f"The labels of the teacher {name} are not the dataset's, and --teacher_num_train_epochs 0 forbids to fit "
            "it."
        )
    if "label" not in data.train.column_names:
        raise UserError(
            f"The teacher {name} has to be fitted, and the training images have no labels: name a teacher that knows "
            "the dataset's labels."
        )
    if pretrained is None:
        image_size = student_processor.crop_size["height"]
        mean, std = list(student_processor.image_mean), list(student_processor.image_std)
    else:
        image_size, mean, std = input_format(pretrained, source, args.trust_remote_code)
    image_size = args.teacher_image_size or image_size
    # Crops and flips alone: a CNN that has a few epochs to learn in does not need to be slowed down.
    light = DataArguments(
        crop=data_args.crop_at(image_size),
        horizontal_flip=data_args.horizontal_flip,
        auto_augment="none",
        random_erasing=0.0,
        augment_on=data_args.augment_on,
    )
    teacher_processor = make_image_processor(light, image_size, mean, std)
    train_images, augment = make_train_images(data.train, light, teacher_processor, training_args.device.type)
    recipe = {
        "teacher": name,
        "pretrained": pretrained is not None,
        "image_size": image_size,
        "dataset": data.fingerprint,
        "crop": light.crop,
        "horizontal_flip": light.horizontal_flip,
        "augment_on": "loader" if augment is None else "device",
        "num_train_epochs": args.teacher_num_train_epochs,
        "learning_rate": args.teacher_learning_rate,
        "batch_size": training_args.total_train_batch_size,
        "precision": training_args.mixed_precision,
        "version": FITTING_VERSION,
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(args.teacher_output_dir) / teacher_folder_name(name, data.name, digest)
    is_main = training_args.process_index == 0
    # Fitted beside its place and moved there whole, so that what is there is always finished. One run fits at a time:
    # others that want the same teacher wait for it.
    Path(args.teacher_output_dir).mkdir(parents=True, exist_ok=True)
    with _alone(folder) if is_main else contextlib.nullcontext():
        # One process decides for all: on another machine the folder may look different.
        (is_fitted,) = broadcast_object_list([_has_recipe(folder, recipe)])
        elsewhere = UserError(
            f"--teacher_output_dir {args.teacher_output_dir}: the fitted teacher is there on the first machine, not "
            "on this one; name a folder on storage that all machines share."
        )
        if is_fitted and not _has_recipe(folder, recipe):
            raise elsewhere
        if is_main:
            how = (
                "fitted by an earlier run, from"
                if is_fitted
                else f"fitting for {args.teacher_num_train_epochs:g} epochs, into"
            )
            print(f"Teacher: {name}, {how} {folder}")
        if is_fitted:
            return str(folder)

        set_seed(TEACHER_SEED)
        if pretrained is None:
            model = new_timm_classifier(name, data.label_names, image_size, teacher_processor)
        else:
            model = _with_labels(pretrained, source, data.label_names, args.trust_remote_code)
        check_takes_images(model, name, image_size, min(training_args.train_batch_size, len(data.train)))
        unfinished = f"{folder}.unfinished"
        trainer = DistillationTrainer(
            model=model,
            args=_fitting_arguments(args, training_args, unfinished),
            augment=augment,
            train_dataset=train_images,
            eval_dataset=EvalImages(data.evaluation, teacher_processor),
            processing_class=teacher_processor,
        )
        (checkpoint,) = broadcast_object_list([last_complete(unfinished)])
        if is_main and checkpoint is not None:
            print(f"Teacher: an earlier run was interrupted while it fitted; going on from {checkpoint}")
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        if is_main:
            Path(unfinished, RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n")
            for leftover in checkpoints_of(unfinished):
                shutil.rmtree(leftover)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(unfinished, folder)
        trainer.accelerator.wait_for_everyone()
        if not _has_recipe(folder, recipe):
            raise elsewhere
    if trainer.is_deepspeed_enabled:
        # accelerate takes one DeepSpeed plugin, and the student's Trainer brings its own.
        AcceleratorState._reset_state()
    return str(folder)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; a killed one lets go. Who waited finds the teacher fitted, so the lock can be deleted."""
    with FileLock(f"{folder}.lock"):
        yield
    Path(f"{folder}.lock").unlink(missing_ok=True)


def _has_recipe(folder: Path, recipe: dict) -> bool:
    try:
        return json.loads((folder / RECIPE_FILE).read_text()) == recipe
    except (OSError, ValueError):
        return False


def _with_labels(
    pretrained: PreTrainedModel, source: str, names: list[str], trust_remote_code: bool
) -> PreTrainedModel:
    """The classifier with a new head for these labels."""
    labels = label_maps(names)
    if isinstance(pretrained.config, DeiTTiConfig):
        # With a class token alone, whatever it had: it is fitted without a teacher, and no other head would learn.
        size = {name: getattr(pretrained.config, name) for name in ("image_size", "patch_size")}
        return load_student(source, DeiTTiConfig(**size, **labels))[0]
    model, _ = load_classifier(
        source,
        "--teacher_model_name_or_path",
        trust_remote_code,
        ignore_mismatched_sizes=True,
        num_labels=len(names),
        **labels,
    )
    return model


def _fitting_arguments(
    args: TeacherArguments, training_args: DistillationTrainingArguments, output_dir: str
) -> DistillationTrainingArguments:
    """The run's device, precision and batch size with a plain recipe: no mixing, no heavy augmentation."""
    return DistillationTrainingArguments(
        output_dir=output_dir,
        num_train_epochs=args.teacher_num_train_epochs,
        learning_rate=args.teacher_learning_rate,
        mixup=0.0,
        cutmix=0.0,
        repeated_augmentation=1,
        save_total_limit=1,
        seed=TEACHER_SEED,
        **{
            name: getattr(training_args, name)
            for name in (
                "per_device_train_batch_size",
                "per_device_eval_batch_size",
                "gradient_accumulation_steps",
                "fp16",
                "bf16",
                "tf32",
                "use_cpu",
                "torch_compile",
                "torch_compile_backend",
                "torch_compile_mode",
                "dataloader_num_workers",
                "dataloader_pin_memory",
                "disable_tqdm",
                "log_level",
                "report_to",
            )
        },
    )


__all__ = [
    "Teacher",
    "TeacherArguments",
    "check_better_than_chance",
    "match_labels",
    "prepare_teacher",
]

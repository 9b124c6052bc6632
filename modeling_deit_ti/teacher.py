"""The teacher: any image classifier, fitted to the dataset where it does not know its labels, measured, frozen.

It speaks the student's language: it takes the images as the student sees them and answers in the student's order of
labels.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    set_seed,
)

from .data import (
    DataArguments,
    EvalImages,
    ImageData,
    UserError,
    make_image_processor,
    make_train_images,
)
from .interop import timm_hub_id, why_not_loaded
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

    def __post_init__(self):
        if self.teacher_num_train_epochs < 0:
            raise UserError(f"--teacher_num_train_epochs {self.teacher_num_train_epochs}: it is 0 or more.")
        if self.teacher_image_size is not None and self.teacher_image_size < 1:
            raise UserError(f"--teacher_image_size {self.teacher_image_size}: it is 1 or more.")


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


def new_timm_classifier(
    architecture: str, label_names: list[str], image_size: int, image_processor
) -> TimmWrapperForImageClassification:
    """
    A timm network with timm's own random initialisation, as a transformers model.

    Args:
        architecture (`str`): a name that `timm.create_model` knows.
        label_names (`list[str]`)
        image_size (`int`): input size, in pixels.
        image_processor: where its normalisation comes from.
    """
    pretrained_cfg = timm.get_pretrained_cfg(architecture)
    model_args = {"img_size": image_size} if pretrained_cfg is not None and pretrained_cfg.fixed_input_size else None
    config = TimmWrapperConfig(
        architecture=architecture,
        model_args=model_args,
        id2label=dict(enumerate(label_names)),
        label2id={name: index for index, name in enumerate(label_names)},
        pretrained_cfg={
            "input_size": [3, image_size, image_size],
            "mean": list(image_processor.image_mean),
            "std": list(image_processor.image_std),
            "crop_pct": image_size / image_processor.size["shortest_edge"],
            "interpolation": "bicubic",
        },
    )
    model = TimmWrapperForImageClassification(config)
    # The wrapper's constructor has drawn every convolution from a normal of width 0.02, which suits no CNN.
    initialised = timm.create_model(architecture, num_classes=len(label_names), **(model_args or {}))
    model.timm_model.load_state_dict(initialised.state_dict())
    return model


def match_labels(teacher_names: list[str], names: list[str]) -> list[int] | None:
    """
    For each of the dataset's labels its id in the teacher, matched by name (case, `_` and `-` do not count). A teacher
    with unnamed labels (`LABEL_0`, ...), or for a dataset whose labels are numbers, matches by order where the numbers
    of labels are equal. A teacher with more labels than the dataset, all of the dataset's among them, matches too.

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
    image_size: int,
) -> tuple[Teacher, str, dict]:
    """
    Loads the teacher; fits it first, or takes the one that an earlier run fitted, where its labels are not the
    dataset's.

    Args:
        image_processor: the student's.
        image_size (`int`): the student's, in pixels.

    Returns:
        The teacher, where its model is, and what `model_card.TeacherRecord` says of it but for its accuracy.

    Raises:
        UserError: if there is no such model, its labels cannot be matched, or it has to be fitted and cannot.
    """
    name = args.teacher_model_name_or_path
    model = None
    if not _starts_from_scratch(args):
        model = _load(name if not _is_timm_architecture(name) else timm_hub_id(name))
        label_order = match_labels(
            [model.config.id2label[i] for i in range(model.config.num_labels)], data.label_names
        )
    if model is not None and label_order is not None:
        path, fitted = name, None
    else:
        path = _fitted(args, model, data, data_args, training_args, image_processor, image_size)
        fitted = "scratch" if model is None else "pretrained"
        model, label_order = _load(path), None
    own_size, mean, std = _input_format(model, path, image_size)
    if args.teacher_image_size is not None:
        own_size = args.teacher_image_size
    teacher = Teacher(
        model, own_size, mean, std, list(image_processor.image_mean), list(image_processor.image_std), label_order
    )
    facts = {
        "name": name,
        "source": "timm" if _is_timm_architecture(name) else "local" if os.path.isdir(name) else "hub",
        "fitted": fitted,
        "image_size": own_size,
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
    it, at most 5 percentage points: untrained networks reach more than chance now and then.

    Raises:
        UserError: with the teacher's accuracy.
    """
    chance = torch.bincount(torch.tensor(labels)).max().item() / len(labels)
    margin = max(5 * (chance * (1 - chance) / len(labels)) ** 0.5, min(0.5 * chance, 0.05))
    if accuracy <= chance + margin:
        raise UserError(
            f"The teacher {name} is no better than chance: its accuracy on the evaluation split is {accuracy:.4f}, "
            f"and always naming the commonest label gives {chance:.4f}. A student would learn noise from it. Fit it "
            "longer (--teacher_num_train_epochs, --teacher_learning_rate) or name another "
            "(--teacher_model_name_or_path)."
        )


def _is_timm_architecture(name: str) -> bool:
    return not os.path.isdir(name) and timm.is_model(name)


def _starts_from_scratch(args: TeacherArguments) -> bool:
    return _is_timm_architecture(args.teacher_model_name_or_path) and not args.teacher_pretrained


def _load(name: str, **kwargs) -> PreTrainedModel:
    """Weights come from safetensors alone: a pickle could run anything."""
    try:
        return AutoModelForImageClassification.from_pretrained(name, use_safetensors=True, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"--teacher_model_name_or_path {name}: it is neither a timm architecture, nor a local folder or Hub model "
            f"that AutoModelForImageClassification loads from safetensors: {why_not_loaded(name, error)} Offline, "
            "name a timm architecture without --teacher_pretrained, or a folder."
        ) from error


def _input_format(model: PreTrainedModel, path: str, default_size: int) -> tuple[int, list[float], list[float]]:
    """Input size, mean and standard deviation of a classifier, from its image processor or its timm config."""
    pretrained_cfg = getattr(model.config, "pretrained_cfg", None)
    if pretrained_cfg:
        data_config = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg, verbose=False)
        return data_config["input_size"][-1], list(data_config["mean"]), list(data_config["std"])
    try:
        processor = AutoImageProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--teacher_model_name_or_path {path}: the model has no image processor ({error}).") from error
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    own_size = size.get("height") or size.get("shortest_edge") or getattr(model.config, "image_size", default_size)
    return own_size, list(processor.image_mean), list(processor.image_std)


def _fitted(
    args: TeacherArguments,
    pretrained: PreTrainedModel | None,
    data: ImageData,
    data_args: DataArguments,
    training_args: DistillationTrainingArguments,
    image_processor,
    image_size: int,
) -> str:
    """The folder of the teacher fitted by this recipe; fits it where no earlier run has."""
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
    if pretrained is not None:
        image_size = _input_format(pretrained, name, image_size)[0]
    image_size = args.teacher_image_size or image_size
    recipe = {
        "teacher": name,
        "pretrained": pretrained is not None,
        "image_size": image_size,
        "dataset": data.fingerprint,
        "crop": data_args.crop_at(image_size),
        "horizontal_flip": data_args.horizontal_flip,
        "augment_on": data_args.augment_on,
        "num_train_epochs": args.teacher_num_train_epochs,
        "learning_rate": args.teacher_learning_rate,
        "batch_size": training_args.total_train_batch_size,
        "precision": training_args.mixed_precision,
        "version": FITTING_VERSION,
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    parts = (re.sub(r"[^\w.-]+", "-", Path(part).name) for part in (name, data.name))
    folder = Path(args.teacher_output_dir) / f"{'-'.join(parts)}-{digest}"
    recipe_file = folder / RECIPE_FILE
    if recipe_file.is_file() and json.loads(recipe_file.read_text()) == recipe:
        if training_args.process_index == 0:
            print(f"Teacher: {name}, fitted by an earlier run, from {folder}")
        return str(folder)

    if training_args.process_index == 0:
        print(f"Teacher: fitting {name} to {data.name}, {args.teacher_num_train_epochs:g} epochs, into {folder}")
    light = DataArguments(
        crop=recipe["crop"],
        horizontal_flip=data_args.horizontal_flip,
        auto_augment="none",
        random_erasing=0.0,
        augment_on=data_args.augment_on,
    )
    teacher_processor = make_image_processor(light, image_size)
    if pretrained is None:
        set_seed(TEACHER_SEED)
        model = new_timm_classifier(name, data.label_names, image_size, teacher_processor)
    else:
        labels = {"id2label": dict(enumerate(data.label_names))}
        labels["label2id"] = {label: index for index, label in labels["id2label"].items()}
        source = name if not _is_timm_architecture(name) else timm_hub_id(name)
        _, mean, std = _input_format(pretrained, source, image_size)
        teacher_processor.image_mean, teacher_processor.image_std = mean, std
        model = _load(source, ignore_mismatched_sizes=True, num_labels=len(data.label_names), **labels)
    # Fitted beside its place and moved there whole: what is there is always finished.
    unfinished = folder.with_name(folder.name + ".unfinished")
    train_images, augment = make_train_images(data.train, light, image_size)
    trainer = DistillationTrainer(
        model=model,
        args=_fitting_arguments(args, training_args, str(unfinished)),
        augment=augment,
        train_dataset=train_images,
        eval_dataset=EvalImages(data.evaluation, teacher_processor),
        processing_class=teacher_processor,
    )
    trainer.train()
    trainer.save_model()
    if training_args.process_index == 0:
        (unfinished / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    trainer.accelerator.wait_for_everyone()
    return str(folder)


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
        save_strategy="no",
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
                "dataloader_num_workers",
                "dataloader_pin_memory",
                "disable_tqdm",
                "log_level",
                "report_to",
            )
        },
    )


__all__ = ["Teacher", "TeacherArguments", "check_better_than_chance", "match_labels", "prepare_teacher"]

"""The teacher: a frozen image classifier, adapted to its student's images and labels; refused if it knows nothing."""

import hashlib
import json
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from .errors import UserError, list_some


class Teacher(nn.Module):
    """
    A frozen classifier that takes images as the student sees them and returns logits in the dataset's label order.

    Args:
        model (`PreTrainedModel`): an image classifier.
        image_size (`int`): its input size, in pixels.
        image_mean, image_std (`list[float]`): its normalisation.
        student_mean, student_std (`list[float]`): the normalisation of the images it is given.
        label_order (`list[int]`, *optional*): for each of the dataset's labels, its id in the model, if they differ.
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
        """Stays in eval mode, whoever calls this: batch norms keep their statistics, and dropout stays off."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Maps `pixel_values` `(B, 3, height, width)` as the student sees them to float32 logits `(B, num_labels)`."""
        if not self.same_normalisation:
            pixel_values = torch.addcmul(self.shift.float(), pixel_values, self.scale.float())
        if pixel_values.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            # In float32: bicubic interpolation does not support half precision on the CPU.
            pixel_values = F.interpolate(pixel_values.float(), size, mode="bicubic", antialias=True)
        pixel_values = pixel_values.to(self.scale.dtype, memory_format=torch.channels_last)
        with torch.autocast(pixel_values.device.type, enabled=False):  # in its own precision, not the student's
            logits = self.model(pixel_values=pixel_values).logits.float()
        return logits if self.label_order is None else logits[:, self.label_order]


def match_labels(model_names: list[str], names: list[str], model: str = "the teacher") -> list[int] | None:
    """
    For each of the dataset's labels, its id in a model, matched by name (ignoring case, `_` and `-`, unless both have
    exactly the same names). A model with unnamed labels (`LABEL_0`, ...) is matched by order if it has the same
    number. It may have more labels than the dataset.

    Args:
        model_names, names (`list[str]`): names of the model's labels and the dataset's, by label id.
        model (`str`): what an error calls the model.

    Returns:
        `list[int]` of length `len(names)`, or `None` if the model knows other labels.

    Raises:
        UserError: if only some of the names match, or they do not match one to one.
    """
    ids = {str(name): i for i, name in enumerate(model_names)}
    if ids.keys() == set(names) and len(model_names) == len(names):  # of which some may differ only in case
        return [ids[name] for name in names]
    plain = [re.sub(r"[\s_-]+", " ", str(name)).strip().casefold() for name in names]
    model_plain = [re.sub(r"[\s_-]+", " ", str(name)).strip().casefold() for name in model_names]
    unnamed = all(re.fullmatch(r"label \d+", name) for name in model_plain)
    if len(model_names) == len(names) and unnamed:
        return list(range(len(names)))
    known = set(model_plain)
    missing = [name for name, key in zip(names, plain, strict=True) if key not in known]
    if not missing:
        positions = [[i for i, name in enumerate(model_plain) if name == key] for key in plain]
        twice = [name for name, found in zip(names, positions, strict=True) if len(found) > 1]
        if twice or len(set(plain)) < len(plain):
            raise UserError(
                f"The labels of {model} cannot be matched to the dataset's: more than one label is called "
                f"{list_some(twice or names)}. Rename them in its config.json (id2label)."
            )
        return [found[0] for found in positions]
    if len(missing) < len(names) and len(model_names) == len(names):
        unmatched = [name for name, key in zip(model_names, model_plain, strict=True) if key not in plain]
        raise UserError(
            f"The labels of {model} cannot be matched to the dataset's: {len(names) - len(missing)} of {len(names)} "
            f"have the same name; the dataset has {list_some(missing)} where {model} has {list_some(unmatched)}. "
            "Rename them in its config.json (id2label)."
        )
    return None


def check_better_than_chance(accuracy: float, labels: list[int], name: str) -> None:
    """
    Raises a `UserError` for a teacher that knows nothing about the dataset.

    Chance is the share of the most common label. A teacher must exceed it by five standard errors, and by half of it
    or 5 percentage points, whichever is less, since untrained networks are sometimes better than chance. Halfway from
    chance to perfect is always enough. If all images have the same label, no teacher is refused.
    """
    chance = torch.bincount(torch.tensor(labels)).max().item() / len(labels)
    if chance == 1:
        return  # nobody can be better
    margin = max(5 * (chance * (1 - chance) / len(labels)) ** 0.5, min(0.5 * chance, 0.05))
    if accuracy <= chance + min(margin, 0.5 * (1 - chance)):
        raise UserError(
            f"The teacher {name} is no better than chance: its accuracy on the evaluation split is {accuracy:.4f}, "
            f"and always predicting the most common label gives {chance:.4f}. A student would learn noise from it. "
            "Fit it longer (--teacher_num_train_epochs, --teacher_learning_rate) or name another "
            "(--teacher_model_name_or_path)."
        )


def recipe_digest(recipe: dict) -> str:
    """A hash that identifies a recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()


def teacher_folder_name(teacher: str, dataset: str, recipe: dict) -> str:
    """The folder name for a teacher, a dataset and a recipe: both names, made safe for file systems, and a hash."""
    parts = (re.sub(r"[^\w.-]+", "-", Path(part).name) for part in (teacher, dataset))
    return f"{'-'.join(parts)}-{recipe_digest(recipe)[:12]}"

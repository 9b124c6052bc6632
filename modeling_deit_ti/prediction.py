"""A classifier that is ready to predict, and the logits of each of its heads."""

import argparse
import contextlib
from collections.abc import Iterator

import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import ModelOutput

from .classifiers import check_complete, load_classifier, load_image_processor
from .device import PRECISION_NAMES, automatic_precision
from .errors import UserError, first_line, is_out_of_memory


PRECISIONS = {name: precision for precision, name in PRECISION_NAMES.items()}


def add_prediction_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for how a model computes, shared by the commands that predict."""
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch (default: 64)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--precision",
        choices=["auto", *PRECISIONS],
        default="auto",
        help="precision to compute in (default: the fastest that suits the device, as in training)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")


def chosen_precision(name: str, model: PreTrainedModel) -> str:
    """The precision that `--precision` names, for `device.autocast`; `auto` depends on the model's device."""
    return PRECISIONS.get(name) or automatic_precision(model.device)


def load_for_prediction(
    name: str, flag: str, trust_remote_code: bool = False, device: str | None = None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """
    A complete classifier in `eval()` on `device` (default: a GPU if there is one), and its image processor, both tried
    on a picture. Names and errors are as in [`load_classifier`].

    Raises:
        UserError: if it cannot be loaded, lacks weights, does not match its image processor or returns logits that
            are not finite, or if there is no such device.
    """
    model, missing = load_classifier(name, flag, trust_remote_code)
    check_complete(missing, name, flag)
    image_processor = load_image_processor(name, flag, trust_remote_code)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {first_line(error)}.") from error
    with reporting_image_errors(f"{flag} {name}"), torch.no_grad():
        pixel_values = image_processor(images=Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"]
        if not model(pixel_values=pixel_values.to(model.device, model.dtype)).logits.isfinite().all():
            raise UserError(f"{flag} {name}: its logits are not finite.")
    return model, image_processor


@contextlib.contextmanager
def reporting_image_errors(name: str) -> Iterator[None]:
    """Turns errors inside into a `UserError`: the model `name`, or its image processor, does not accept the images."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # any architecture, and any image processor
        if is_out_of_memory(error):
            raise UserError(f"{name}: out of memory ({first_line(error)}). Lower --batch_size.") from error
        raise UserError(f"{name}: it does not accept these images ({first_line(error)}).") from error


def head_logits(output: ModelOutput, readout: str | None) -> dict[str, torch.Tensor]:
    """Logits `(B, K)` of each head: `class`, `distillation` and their mean `both`, or the one head of other models."""
    class_logits = output.get("class_logits", output.get("cls_logits"))  # ours, transformers' DeiT
    distillation_logits = output.get("distillation_logits")
    if class_logits is None or distillation_logits is None:
        return {readout or "class": output.logits}
    both = (class_logits + distillation_logits) / 2
    return {"class": class_logits, "distillation": distillation_logits, "both": both}

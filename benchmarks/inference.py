"""Inference side by side, with the same weights: this model, compiled, in transformers, in timm and in ONNX Runtime.

    python benchmarks/inference.py
    python benchmarks/inference.py --model FOLDER --dataset_name uoft-cs/cifar10

A model is timed only if it agrees with this one: in its logits, or, if its precision is lower and there are labelled
images, in its accuracy. The models take turns, so that drifts in the machine's speed affect them all. The results go
to `--output_dir`; see report.py. Run nothing else on the machine meanwhile.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnxruntime
import torch
from torch import nn
from transformers import AutoImageProcessor, set_seed
from transformers.hf_argparser import HfArg

from benchmarks.report import finish, make_result, spread
from benchmarks.setting import SpeedSetting, parse_setting, run
from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.arguments import ImageArguments, check_at_least
from modeling_deit_ti.card.record import folder_name
from modeling_deit_ti.data import load_images
from modeling_deit_ti.data.inputs import EvalImages
from modeling_deit_ti.device import autocast
from modeling_deit_ti.distillation import MODES
from modeling_deit_ti.errors import UserError, first_line
from modeling_deit_ti.interop import export_onnx, quantize_onnx, to_timm, to_transformers


Predict = Callable[[torch.Tensor], torch.Tensor]  # images to logits
# How far logits may differ, as a share of the largest: by rounding only.
TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCES = {"bfloat16": 0.1, "int8": 0.5}  # by a word in the name; only without labelled images
LARGEST_LOSS = 0.01  # of accuracy, at lower precision


# ---- Models ----


def logits_of(model: nn.Module) -> Predict:
    return lambda images: model(pixel_values=images).logits


def with_autocast(model: nn.Module) -> Predict:
    """In bfloat16, as in predict.py."""

    def predict(images: torch.Tensor) -> torch.Tensor:
        with autocast(images.device, "bf16"):
            return model(pixel_values=images).logits

    return predict


def onnx_session(model: DeiTTiForImageClassification, setting: SpeedSetting, int8: bool = False) -> Predict:
    """In ONNX Runtime; with `int8`, weights and activations are quantized, the latter by scales per batch."""
    provider = "CUDAExecutionProvider" if setting.device == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise UserError(f"this onnxruntime has no {provider}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    with tempfile.TemporaryDirectory(prefix="inference-") as folder:
        file = Path(folder, "model.onnx")
        export_onnx(model, file)
        if int8:
            quantize_onnx(file, file)
        session = onnxruntime.InferenceSession(str(file), options, providers=[provider])

    def predict(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(["logits"], {"pixel_values": images.cpu().numpy()})
        return torch.from_numpy(logits)

    return predict


MAKERS: dict[str, Callable[[DeiTTiForImageClassification, SpeedSetting], Predict]] = {
    "native": lambda model, _: logits_of(model),
    "native, bfloat16 autocast": lambda model, _: with_autocast(model),
    "compiled": lambda model, _: logits_of(torch.compile(model, dynamic=False)),
    "transformers": lambda model, _: logits_of(to_transformers(model)),
    "timm": lambda model, _: to_timm(model),
    "ONNX Runtime": onnx_session,
    "ONNX Runtime, dynamic int8": partial(onnx_session, int8=True),
}


# ---- The command ----


@dataclass
class InferenceSetting(SpeedSetting):
    model: str | None = HfArg(default=None, help="The folder of a trained DeiT-Ti. Default: random weights.")
    dataset_name: str | None = HfArg(default=None, help="The trained model's dataset, as in train_hf.py.")
    max_eval_samples: int = HfArg(default=2000, help="Number of labelled images for the accuracy.")
    batch_sizes: list[int] = HfArg(default_factory=lambda: [1, 256], help="Images per call.")
    models: list[str] = HfArg(
        default_factory=lambda: list(MAKERS),
        help="The models to run; `native` always runs.",
        metadata={"choices": list(MAKERS)},
    )
    seconds: float = HfArg(default=3.0, help="Minimum duration of a turn; each has at least two calls.")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, max_eval_samples=1)
        if (self.model is None) != (self.dataset_name is None):
            raise UserError("--model and --dataset_name go together: accuracy needs a trained model and its images.")
        self.models = [name for name in MAKERS if name == "native" or name in self.models]


def main(argv: list[str]) -> int:
    """The exit code: 1 if a model failed."""
    setting = parse_setting(InferenceSetting, argv, __doc__.splitlines()[0])
    torch.set_num_threads(setting.threads)
    began = time.monotonic()
    set_seed(0)
    native, images, labels = load(setting)
    sizes = {"image_size": native.config.image_size, "patch_size": native.config.patch_size}
    rows = measure(setting, native, images, labels)
    names = {name: folder_name(value) for name in ("model", "dataset_name") if (value := getattr(setting, name))}
    setting = replace(setting, **sizes, **names)
    result = make_result(setting, began, rows, "inference", "onnxruntime", "onnx", labelled_images=len(images))
    return finish(result, setting.output_dir)


def load(setting: InferenceSetting) -> tuple[DeiTTiForImageClassification, torch.Tensor, torch.Tensor | None]:
    """
    The native model, images `(N, 3, size, size)` and their labels `(N,)`; random images without labels if there is no
    trained model.

    Raises:
        UserError: if the model cannot be loaded, or its labels are not those of the images.
    """
    if setting.model is None:
        sizes = {"image_size": setting.image_size, "patch_size": setting.patch_size}
        native = DeiTTiForImageClassification(DeiTTiConfig(**sizes, num_labels=10, **MODES["both"].network))
        images, labels = torch.randn(max(setting.batch_sizes), 3, setting.image_size, setting.image_size), None
    else:
        try:
            native = DeiTTiForImageClassification.from_pretrained(setting.model)
            image_processor = AutoImageProcessor.from_pretrained(setting.model)
        except (OSError, ValueError) as error:
            raise UserError(f"--model {setting.model}: cannot be loaded ({first_line(error)}).") from error
        data = load_images(ImageArguments(setting.dataset_name, max_eval_samples=setting.max_eval_samples))
        if list(native.config.id2label.values()) != data.label_names:
            raise UserError(f"--dataset_name {setting.dataset_name}: its labels are not those of --model.")
        batch = EvalImages(data.evaluation, image_processor).__getitems__(list(range(len(data.evaluation))))
        images, labels = batch["pixel_values"], batch["labels"]
    return native.eval().to(setting.device), images, labels


# ---- Measurement ----


def measure(
    setting: InferenceSetting, native: DeiTTiForImageClassification, images: torch.Tensor, labels: torch.Tensor | None
) -> list[dict]:
    """One row per batch size and model: images/s, latency, accuracy and its logits' distance from the native ones."""
    rows, models, accuracies, failures = [], {}, dict.fromkeys(setting.models), dict.fromkeys(setting.models)
    for name in setting.models:
        try:
            models[name] = MAKERS[name](native, setting)
            if labels is not None:
                accuracies[name] = accuracy(models[name], images, labels, max(setting.batch_sizes), setting.device)
        except Exception as error:  # from any library: the others are still measured
            failures[name] = first_line(error)
    for batch_size in setting.batch_sizes:
        batch = images[torch.arange(batch_size) % len(images)].to(setting.device)
        expected = logits(models["native"], batch)
        facts = {"batch_size": batch_size, "largest_logit": expected.abs().max().item()}
        found = [{"name": name, "failed": why, "accuracy": accuracies[name]} | facts for name, why in failures.items()]
        for row in found:
            if not row["failed"]:
                row |= compare(row, models[row["name"]], batch, expected, accuracies["native"])
        timed = [row for row in found if not row["failed"]]
        turns = [[time_calls(models[row["name"]], batch, setting) for row in timed] for _ in range(setting.repeats)]
        for row, of_model in zip(timed, zip(*turns, strict=True), strict=True):
            row["images_per_second"] = spread([batch_size * len(turn) / sum(turn) for turn in of_model])
            calls = [1000 * seconds for turn in of_model for seconds in turn]
            p95 = statistics.quantiles(calls, n=20, method="inclusive")[-1]
            row["latency_ms"] = {"median": statistics.median(calls), "p95": p95, "calls": len(calls)}
        rows += found
    return rows


@torch.inference_mode()
def logits(model: Predict, images: torch.Tensor) -> torch.Tensor:
    return model(images).float().cpu()


def accuracy(model: Predict, images: torch.Tensor, labels: torch.Tensor, batch_size: int, device: str) -> float:
    """Top-1, in batches of equal size, since a model may be compiled for each size."""
    padded = torch.arange(-(-len(labels) // batch_size) * batch_size) % len(labels)
    predicted = torch.cat([logits(model, images[rows].to(device)).argmax(dim=-1) for rows in padded.split(batch_size)])
    return (predicted[: len(labels)] == labels).float().mean().item()


def compare(
    row: dict, model: Predict, images: torch.Tensor, expected: torch.Tensor, native_accuracy: float | None
) -> dict:
    """What a model's first call adds to its row, before it is timed; the call also compiles and allocates."""
    try:
        difference = (logits(model, images) - expected).abs().max().item()
    except Exception as error:  # from any library
        return {"failed": first_line(error)}
    failed = None
    low = [limit for word, limit in LOW_PRECISION_TOLERANCES.items() if word in row["name"]]
    if low and native_accuracy is not None:
        if row["accuracy"] < native_accuracy - LARGEST_LOSS:
            failed = f"its top-1 is {row['accuracy']:.2%}, the native model's {native_accuracy:.2%}"
    elif difference > (low[0] if low else TOLERANCE) * row["largest_logit"]:
        failed = f"its logits differ by {difference:.1e} from the native model's"
    return {"failed": failed, "max_abs_difference": difference}


@torch.inference_mode()
def time_calls(model: Predict, images: torch.Tensor, setting: InferenceSetting) -> list[float]:
    """Seconds of each call in a turn."""
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < setting.seconds:
        began = time.perf_counter()
        model(images)
        if setting.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    run(main)

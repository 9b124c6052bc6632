"""Inference side by side, with the same weights: this model, compiled, as transformers' and timm's, in ONNX Runtime.

    python benchmarks/inference.py
    python benchmarks/inference.py --model FOLDER --dataset_name uoft-cs/cifar10

A model is timed only if it agrees with this one: in its logits, or, if its precision is lower and there are labelled
images, in its accuracy. The models take turns, so that a machine whose speed drifts affects them all. The results go
to `--output_dir`; see report.py. Run nothing else on the machine meanwhile.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.optimizer import optimize_model
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
from modeling_deit_ti.data.sampling import random_rows
from modeling_deit_ti.distillation import MODES
from modeling_deit_ti.errors import UserError, first_line
from modeling_deit_ti.interop import export_onnx, to_timm, to_transformers


Predict = Callable[[torch.Tensor], torch.Tensor]  # images to logits
# How far logits may differ, as a share of the largest: rounding, and nothing but rounding.
TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCES = {"bfloat16": 0.1, "int8": 0.5}  # by a word in the name; only without labelled images
LARGEST_LOSS = 0.01  # of accuracy, at lower precision
CALIBRATION_IMAGES = 128
# Products with weights alone: in those of attention, rounding loses accuracy and gains no time.
QUANTIZED = {"op_types_to_quantize": ["MatMul", "Gemm"], "extra_options": {"MatMulConstBOnly": True}}


@dataclass
class Images:
    """What the models are given, `(N, 3, size, size)`: labelled or random images, and some for scales of int8."""

    pixel_values: torch.Tensor
    labels: torch.Tensor | None
    calibration: torch.Tensor


# ---- Models ----


def logits_of(model: nn.Module) -> Predict:
    return lambda images: model(pixel_values=images).logits


def with_autocast(model: nn.Module) -> Predict:
    def predict(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, torch.bfloat16):
            return model(pixel_values=images).logits

    return predict


def with_bfloat16_weights(model: DeiTTiForImageClassification) -> Predict:
    copy = DeiTTiForImageClassification(model.config).to(model.device, torch.bfloat16).eval()
    copy.load_state_dict(model.state_dict())
    return lambda images: copy(pixel_values=images.bfloat16()).logits


def exported(model: DeiTTiForImageClassification, folder: Path) -> Path:
    """The model as an ONNX file."""
    file = folder / "model.onnx"
    if not file.exists():
        export_onnx(model, file)
    return file


def fused(model: DeiTTiForImageClassification, folder: Path) -> Path:
    """With the fusions that ONNX Runtime has for transformers: here of layer norms and GELUs, but not of attention."""
    file = folder / "fused.onnx"
    config = model.config
    sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
    optimize_model(str(exported(model, folder)), model_type="vit", opt_level=0, **sizes).save_model_to_file(str(file))
    return file


def shaped(model: DeiTTiForImageClassification, folder: Path) -> Path:
    """With the shapes that quantization asks for."""
    file = folder / "shaped.onnx"
    if not file.exists():
        quant_pre_process(str(exported(model, folder)), str(file))
    return file


def dynamic_int8(model: DeiTTiForImageClassification, folder: Path) -> Path:
    """Weights in int8; activations, too, with the scales of each batch."""
    file = folder / "dynamic.onnx"
    quantize_dynamic(shaped(model, folder), file, **QUANTIZED)
    return file


def static_int8(model: DeiTTiForImageClassification, folder: Path, calibration: torch.Tensor) -> Path:
    """Weights in int8, each channel with a scale of its own; activations with those of the calibration images."""

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches: Iterator[torch.Tensor] = iter(calibration.split(16))

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {"pixel_values": batch.numpy()}

    file = folder / "static.onnx"
    quantize_static(shaped(model, folder), file, Reader(), per_channel=True, **QUANTIZED)
    return file


def onnx_session(file: Path, setting: SpeedSetting) -> Predict:
    provider = "CUDAExecutionProvider" if setting.device == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise UserError(f"this onnxruntime has no {provider}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    session = onnxruntime.InferenceSession(str(file), options, providers=[provider])

    def predict(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(["logits"], {"pixel_values": images.cpu().numpy()})
        return torch.from_numpy(logits)

    return predict


# From the native model, the setting, an empty folder and calibration images.
MAKERS: dict[str, Callable[[DeiTTiForImageClassification, SpeedSetting, Path, torch.Tensor], Predict]] = {
    "native": lambda model, *_: logits_of(model),
    "native, bfloat16 autocast": lambda model, *_: with_autocast(model),
    "native, bfloat16 weights": lambda model, *_: with_bfloat16_weights(model),
    "compiled": lambda model, *_: logits_of(torch.compile(model, dynamic=False)),
    "transformers": lambda model, *_: logits_of(to_transformers(model)),
    "timm": lambda model, *_: to_timm(model),
    "ONNX Runtime": lambda model, setting, folder, _: onnx_session(exported(model, folder), setting),
    "ONNX Runtime, fused": lambda model, setting, folder, _: onnx_session(fused(model, folder), setting),
    "ONNX Runtime, dynamic int8": lambda model, setting, folder, _: onnx_session(dynamic_int8(model, folder), setting),
    "ONNX Runtime, static int8": lambda model, setting, *rest: onnx_session(static_int8(model, *rest), setting),
}


# ---- The command ----


@dataclass
class InferenceSetting(SpeedSetting):
    model: str | None = HfArg(default=None, help="The folder of a trained DeiT-Ti. Default: random weights.")
    dataset_name: str | None = HfArg(default=None, help="The trained model's images, as train_hf.py takes them.")
    max_eval_samples: int = HfArg(default=2000, help="Labelled images for the accuracy.")
    batch_sizes: list[int] = HfArg(default_factory=lambda: [1, 256], help="Images per call.")
    models: list[str] = HfArg(
        default_factory=lambda: list(MAKERS),
        help="Which to run; `native` always runs.",
        metadata={"choices": list(MAKERS)},
    )
    seconds: float = HfArg(default=3.0, help="Shortest duration of a turn; it has at least two calls.")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, max_eval_samples=1)
        if (self.model is None) != (self.dataset_name is None):
            raise UserError("--model and --dataset_name go together: accuracy takes a trained model and its images.")
        self.models = [name for name in MAKERS if name == "native" or name in self.models]


def main(argv: list[str]) -> int:
    """The exit code: 1 if a model failed."""
    setting = parse_setting(InferenceSetting, argv, __doc__.splitlines()[0])
    torch.set_num_threads(setting.threads)
    began = time.monotonic()
    set_seed(0)
    native, images = load(setting)
    sizes = {"image_size": native.config.image_size, "patch_size": native.config.patch_size}
    rows = measure(setting, make_models(setting, native, images.calibration), images)
    names = {name: folder_name(value) for name in ("model", "dataset_name") if (value := getattr(setting, name))}
    counts = {"labelled_images": len(images.pixel_values), "calibration_images": len(images.calibration)}
    setting = replace(setting, **sizes, **names)
    return finish(make_result(setting, began, rows, "inference", "onnxruntime", "onnx", **counts), setting.output_dir)


def load(setting: InferenceSetting) -> tuple[DeiTTiForImageClassification, Images]:
    """
    The native model and its images, random if there is no trained one.

    Raises:
        UserError: if the model cannot be loaded, or has other labels than the images.
    """
    if setting.model is None:
        sizes = {"image_size": setting.image_size, "patch_size": setting.patch_size}
        native = DeiTTiForImageClassification(DeiTTiConfig(**sizes, num_labels=10, **MODES["both"].network))
        noise = torch.randn(max(setting.batch_sizes) + CALIBRATION_IMAGES, 3, *2 * [setting.image_size])
        images = Images(noise[CALIBRATION_IMAGES:], None, noise[:CALIBRATION_IMAGES])
    else:
        try:
            native = DeiTTiForImageClassification.from_pretrained(setting.model)
            image_processor = AutoImageProcessor.from_pretrained(setting.model)
        except (OSError, ValueError) as error:
            raise UserError(f"--model {setting.model}: cannot be loaded ({first_line(error)}).") from error
        data = load_images(ImageArguments(setting.dataset_name, max_eval_samples=setting.max_eval_samples))
        if list(native.config.id2label.values()) != data.label_names:
            raise UserError(f"--dataset_name {setting.dataset_name}: its labels are not those of --model.")
        labelled = EvalImages(data.evaluation, image_processor).__getitems__(list(range(len(data.evaluation))))
        some = EvalImages(data.train.select(random_rows(len(data.train), CALIBRATION_IMAGES)), image_processor)
        calibration = some.__getitems__(list(range(len(some))))["pixel_values"]
        images = Images(labelled["pixel_values"], labelled["labels"], calibration)
    return native.eval().to(setting.device), images


def make_models(
    setting: InferenceSetting, native: DeiTTiForImageClassification, calibration: torch.Tensor
) -> dict[str, Predict | str]:
    """Each model as a function from images to logits, or why there is none."""
    models: dict[str, Predict | str] = {}
    with tempfile.TemporaryDirectory(prefix="inference-") as folder:
        for name in setting.models:
            try:
                models[name] = MAKERS[name](native, setting, Path(folder), calibration)
            except Exception as error:  # from any library: the others are still measured
                models[name] = first_line(error)
    return models


# ---- Measurement ----


@torch.inference_mode()
def measure(setting: InferenceSetting, models: dict[str, Predict | str], images: Images) -> list[dict]:
    """A row per batch size and model: images/s, latency, accuracy, and how far its logits are from the native ones."""
    rows = []
    models, accuracies = dict(models), dict.fromkeys(models)
    for name, model in models.items():
        if images.labels is not None and not isinstance(model, str):
            try:
                accuracies[name] = accuracy(model, images, max(setting.batch_sizes), setting.device)
            except Exception as error:  # from any library
                models[name] = first_line(error)
    for batch_size in setting.batch_sizes:
        batch = images.pixel_values[torch.arange(batch_size) % len(images.pixel_values)].to(setting.device)
        expected = models["native"](batch).float().cpu()
        found = [compare(name, model, batch, expected, accuracies) for name, model in models.items()]
        timed = [row for row in found if not row["failed"]]
        turns = [[time_calls(models[row["name"]], batch, setting) for row in timed] for _ in range(setting.repeats)]
        for row, of_model in zip(timed, zip(*turns, strict=True), strict=True):
            row["images_per_second"] = spread([batch_size * len(turn) / sum(turn) for turn in of_model])
            calls = [1000 * seconds for turn in of_model for seconds in turn]
            p95 = statistics.quantiles(calls, n=20, method="inclusive")[-1]
            row["latency_ms"] = {"median": statistics.median(calls), "p95": p95, "calls": len(calls)}
        rows += found
    return rows


def accuracy(model: Predict, images: Images, batch_size: int, device: str) -> float:
    """Top-1 on the labelled images, in batches of one size, since a model may be compiled for each."""
    padded = torch.arange(-(-len(images.labels) // batch_size) * batch_size) % len(images.labels)
    batches = (images.pixel_values[rows].to(device) for rows in padded.split(batch_size))
    logits = torch.cat([model(batch).float().cpu() for batch in batches])
    return (logits[: len(images.labels)].argmax(dim=-1) == images.labels).float().mean().item()


def compare(
    name: str, model: Predict | str, images: torch.Tensor, expected: torch.Tensor, accuracies: dict[str, float | None]
) -> dict:
    """A model's row before it is timed; the first call also compiles and allocates."""
    largest = expected.abs().max().item()
    row = {"name": name, "batch_size": len(images), "failed": None, "largest_logit": largest}
    row["accuracy"] = accuracies[name]
    if isinstance(model, str):
        return row | {"failed": model}
    try:
        difference = (model(images).float().cpu() - expected).abs().max().item()
    except Exception as error:  # from any library
        return row | {"failed": first_line(error)}
    low = [limit for word, limit in LOW_PRECISION_TOLERANCES.items() if word in name]
    if low and row["accuracy"] is not None:
        if row["accuracy"] < accuracies["native"] - LARGEST_LOSS:
            row["failed"] = f"its top-1 is {row['accuracy']:.2%}, the native model's {accuracies['native']:.2%}"
    elif difference > (low[0] if low else TOLERANCE) * largest:
        row["failed"] = f"its logits are {difference:.1e} from the native model's"
    return row | {"max_abs_difference": difference}


def time_calls(model: Predict, images: torch.Tensor, setting: InferenceSetting) -> list[float]:
    """Seconds of each call of a turn."""
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

"""Inference side by side, with the same weights: this model, compiled, as transformers' and timm's, in ONNX Runtime.

    python benchmarks/inference.py
    python benchmarks/inference.py --image_size 224 --patch_size 16

A model is timed only if its logits agree with this model's. The models take turns, so that a machine whose speed
drifts affects them all. The results go to `--output_dir`; see report.py. Run nothing else on the machine meanwhile.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnxruntime
import torch
from torch import nn
from transformers import set_seed
from transformers.hf_argparser import HfArg

from benchmarks.report import finish, spread
from benchmarks.setting import DTYPES, Precision, Setting, parse_setting, run
from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.distillation import MODES
from modeling_deit_ti.errors import UserError, first_line
from modeling_deit_ti.interop import export_onnx, to_timm, to_transformers


# How far logits may differ, as a share of the largest: rounding, and nothing but rounding.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}
Predict = Callable[[torch.Tensor], torch.Tensor]  # images to logits


@dataclass
class InferenceSetting(Setting):
    batch_sizes: list[int] = HfArg(default_factory=lambda: [1, 256], help="Images per call.")
    precision: Precision = HfArg(default="fp32", help="Of weights and images; always fp32 for ONNX Runtime.")
    models: list[str] = HfArg(
        default_factory=lambda: list(MAKERS),
        help="Which to run; `native` always runs.",
        metadata={"choices": ["native", "compiled", "transformers", "timm", "ONNX Runtime"]},
    )
    seconds: float = HfArg(default=3.0, help="Shortest duration of a turn; it has at least two calls.")

    def __post_init__(self):
        super().__post_init__()
        self.models = [name for name in MAKERS if name == "native" or name in self.models]


def main(argv: list[str]) -> int:
    """The exit code: 1 if a model failed."""
    setting = parse_setting(InferenceSetting, argv, __doc__.splitlines()[0])
    torch.set_num_threads(setting.threads)
    began = time.monotonic()
    set_seed(0)
    return finish(setting, began, measure(setting, make_models(setting)), "inference", "onnxruntime", "onnx")


# ---- Models ----


def logits_of(model: nn.Module) -> Predict:
    return lambda images: model(pixel_values=images).logits


def onnx_session(model: DeiTTiForImageClassification, setting: InferenceSetting) -> Predict:
    provider = "CUDAExecutionProvider" if setting.device == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise UserError(f"this onnxruntime has no {provider}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    with tempfile.TemporaryDirectory(prefix="inference-") as folder:
        file = f"{folder}/model.onnx"
        export_onnx(model, file)
        session = onnxruntime.InferenceSession(file, options, providers=[provider])

    def predict(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(["logits"], {"pixel_values": images.float().cpu().numpy()})
        return torch.from_numpy(logits)

    return predict


MAKERS: dict[str, Callable[[DeiTTiForImageClassification, InferenceSetting], Predict]] = {
    "native": lambda model, setting: logits_of(model),
    "compiled": lambda model, setting: logits_of(torch.compile(model, dynamic=False)),
    "transformers": lambda model, setting: logits_of(to_transformers(model)),
    "timm": lambda model, setting: to_timm(model),
    "ONNX Runtime": onnx_session,
}


def make_models(setting: InferenceSetting) -> dict[str, Predict | str]:
    """Each model as a function from images to logits, or why there is none."""
    sizes = {"image_size": setting.image_size, "patch_size": setting.patch_size}
    native = DeiTTiForImageClassification(DeiTTiConfig(**sizes, num_labels=10, **MODES["both"].network))
    native.eval().to(setting.device, DTYPES[setting.precision])
    models: dict[str, Predict | str] = {}
    for name in setting.models:
        try:
            models[name] = MAKERS[name](native, setting)
        except Exception as error:  # from any library: the others are still measured
            models[name] = first_line(error)
    return models


# ---- Measurement ----


@torch.inference_mode()
def measure(setting: InferenceSetting, models: dict[str, Predict | str]) -> list[dict]:
    """A row per batch size and model: images/s, latency, and how far its logits are from the native model's."""
    rows = []
    for batch_size in setting.batch_sizes:
        shape = (batch_size, 3, setting.image_size, setting.image_size)
        images = torch.randn(shape, device=setting.device, dtype=DTYPES[setting.precision])
        expected = models["native"](images).float().cpu()
        found = [compare(name, model, images, expected, setting.precision) for name, model in models.items()]
        timed = [row for row in found if not row["failed"]]
        turns = [[time_calls(models[row["name"]], images, setting) for row in timed] for _ in range(setting.repeats)]
        for row, of_model in zip(timed, zip(*turns, strict=True), strict=True):
            row["images_per_second"] = spread([batch_size * len(turn) / sum(turn) for turn in of_model])
            calls = [1000 * seconds for turn in of_model for seconds in turn]
            p95 = statistics.quantiles(calls, n=20, method="inclusive")[-1]
            row["latency_ms"] = {"median": statistics.median(calls), "p95": p95, "calls": len(calls)}
        rows += found
    return rows


def compare(name: str, model: Predict | str, images: torch.Tensor, expected: torch.Tensor, precision: str) -> dict:
    """A model's row before it is timed; the first call also compiles and allocates."""
    largest = expected.abs().max().item()
    row = {"name": name, "batch_size": len(images), "failed": None, "largest_logit": largest}
    if isinstance(model, str):
        return row | {"failed": model}
    try:
        difference = (model(images).float().cpu() - expected).abs().max().item()
    except Exception as error:  # from any library
        return row | {"failed": first_line(error)}
    if difference > TOLERANCES[precision] * largest:
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

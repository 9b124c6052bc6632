"""Inference side by side, with the same weights: this model, compiled, as transformers' and timm's, in ONNX Runtime.

    python benchmarks/inference.py
    python benchmarks/inference.py --image_size 224 --patch_size 16

All have to agree on the logits before anything is timed. They take turns, so that a machine that drifts drifts for
all. The results go to `--output_dir`; see report.py. Nothing else should run on the machine meanwhile.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnxruntime
import torch
from transformers import HfArgumentParser, TrainingArguments, set_seed

from benchmarks.report import describe_machine, spread, write_result
from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.distillation import MODES
from modeling_deit_ti.errors import UserError, first_line
from modeling_deit_ti.interop import export_onnx, to_timm, to_transformers


NUM_LABELS = 10
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# How far logits may be apart, as a share of the largest one: rounding, and nothing but rounding.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}


@dataclass
class Setting:
    """What is measured. `None` and `auto` are resolved by [`resolve`], and recorded so."""

    image_size: int = field(default=32, metadata={"help": "Height and width of the input, in pixels."})
    patch_size: int = field(default=4, metadata={"help": "Height and width of a patch, in pixels."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 256], metadata={"help": "Images at once."})
    precision: str = field(
        default="fp32",
        metadata={"help": "Of the weights and images; ONNX Runtime's are fp32.", "choices": list(DTYPES)},
    )
    device: str = field(default="auto", metadata={"help": "Where.", "choices": ["auto", "cpu", "cuda"]})
    models: list[str] | None = field(
        default=None,
        metadata={
            "help": "Which. Default: all.",
            "choices": ["native", "compiled", "transformers", "timm", "ONNX Runtime"],
        },
    )
    repeats: int = field(default=3, metadata={"help": "Turns of each model and batch size."})
    seconds: float = field(
        default=3.0, metadata={"help": "How long a turn takes at least; it has two calls at the least."}
    )
    threads: int | None = field(default=None, metadata={"help": "Of torch and ONNX Runtime. Default: all cores."})
    output_dir: str = field(default="results/throughput", metadata={"help": "Where the results go."})


Predict = Callable[[torch.Tensor], torch.Tensor]


def main(argv: list[str]) -> int:
    """The exit code: 1 where a model failed."""
    (setting,) = HfArgumentParser(Setting, description=__doc__.splitlines()[0]).parse_args_into_dataclasses(argv)
    # One GPU, also where there are more.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    resolve(setting)
    torch.set_num_threads(setting.threads)
    began = time.monotonic()
    set_seed(0)
    with tempfile.TemporaryDirectory(prefix="inference-") as work_dir:
        machine = describe_machine(
            TrainingArguments(output_dir=work_dir, use_cpu=setting.device == "cpu", report_to="none")
        )
        rows = measure(setting, make_models(setting, work_dir))
    result = {
        "benchmark": "inference",
        **machine,
        "setting": asdict(setting),
        "seconds": round(time.monotonic() - began),
        "rows": rows,
    }
    remarks = [
        f"{setting.repeats} turns of at least {setting.seconds:g} s and two calls each, after a first call that does "
        "not count; images/s: median of the turns, and the smallest to the largest; latency: of all calls. "
        f"Threads: {setting.threads}. The whole took {result['seconds']} s.",
        "One set of weights, random, mode `both`. The difference is the largest to the native model's logits, "
        f"which are up to {rows[0]['largest_logit']:.2g}, on the first images.",
        "Images are on the device before the call; ONNX Runtime takes them from the host and returns them there.",
    ]
    file = write_result(result, Path(setting.output_dir), remarks)
    print(f"\n{file.read_text()}\nWritten to {file}, and the index beside it.")
    return 1 if any(row["failed"] for row in rows) else 0


def resolve(setting: Setting) -> None:
    """
    Fills in what depends on the machine.

    Raises:
        UserError: if the machine does not have what is asked for.
    """
    has_gpu = torch.cuda.is_available()
    if setting.device == "cuda" and not has_gpu:
        raise UserError("--device cuda: torch finds no GPU here; leave it out, or take --device cpu.")
    if setting.device == "auto":
        setting.device = "cuda" if has_gpu else "cpu"
    if setting.threads is None:
        setting.threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if setting.models is None:
        setting.models = list(MAKERS)
    if "native" not in setting.models:
        setting.models = ["native", *setting.models]  # the others are held against it
    if setting.image_size % setting.patch_size:
        raise UserError(f"--patch_size {setting.patch_size} does not divide --image_size {setting.image_size}.")


def make_native(model: DeiTTiForImageClassification, setting: Setting, work_dir: str) -> Predict:
    return lambda images: model(pixel_values=images).logits


def make_compiled(model: DeiTTiForImageClassification, setting: Setting, work_dir: str) -> Predict:
    compiled = torch.compile(model, dynamic=False)
    return lambda images: compiled(pixel_values=images).logits


def make_transformers(model: DeiTTiForImageClassification, setting: Setting, work_dir: str) -> Predict:
    exported = to_transformers(model)
    return lambda images: exported(pixel_values=images).logits


def make_timm(model: DeiTTiForImageClassification, setting: Setting, work_dir: str) -> Predict:
    return to_timm(model)


def make_onnx(model: DeiTTiForImageClassification, setting: Setting, work_dir: str) -> Predict:
    provider = "CUDAExecutionProvider" if setting.device == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise UserError(f"this onnxruntime has no {provider}")
    file = os.path.join(work_dir, "model.onnx")
    export_onnx(model, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    session = onnxruntime.InferenceSession(file, options, providers=[provider])

    def predict(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(["logits"], {"pixel_values": images.float().cpu().numpy()})
        return torch.from_numpy(logits)

    return predict


MAKERS = {
    "native": make_native,
    "compiled": make_compiled,
    "transformers": make_transformers,
    "timm": make_timm,
    "ONNX Runtime": make_onnx,
}


def make_models(setting: Setting, work_dir: str) -> dict[str, Predict | str]:
    """Each model as a function from images to logits, or why there is none."""
    config = DeiTTiConfig(
        image_size=setting.image_size,
        patch_size=setting.patch_size,
        num_labels=NUM_LABELS,
        **MODES["both"].network,
    )
    native = DeiTTiForImageClassification(config).eval().to(setting.device, DTYPES[setting.precision])
    models: dict[str, Predict | str] = {}
    for name in MAKERS:
        if name not in setting.models:
            continue
        try:
            models[name] = MAKERS[name](native, setting, work_dir)
        except Exception as error:  # of whatever library: the others are measured all the same
            models[name] = first_line(error)
    return models


@torch.inference_mode()
def measure(setting: Setting, models: dict[str, Predict | str]) -> list[dict]:
    """One row a model and batch size: images/s, latency, and how far its logits are from the native model's."""
    rows = []
    for batch_size in setting.batch_sizes:
        shape = (batch_size, 3, setting.image_size, setting.image_size)
        images = torch.randn(shape, device=setting.device, dtype=DTYPES[setting.precision])
        expected = models["native"](images).float().cpu()
        largest = expected.abs().max().item()
        calls: dict[str, Predict] = {}
        turns: dict[str, list[list[float]]] = {}
        found = {}
        for name, model in models.items():
            row = {"name": name, "batch_size": batch_size, "failed": None, "largest_logit": largest}
            rows.append(row)
            if isinstance(model, str):
                row["failed"] = model
                continue
            try:
                logits = model(images).float().cpu()  # the first call, which compiles and allocates
            except Exception as error:  # of whatever library
                row["failed"] = first_line(error)
                continue
            row["max_abs_difference"] = (logits - expected).abs().max().item()
            if row["max_abs_difference"] > TOLERANCES[setting.precision] * largest:
                row["failed"] = f"its logits are {row['max_abs_difference']:.1e} from the native model's"
                continue
            calls[name], turns[name], found[name] = model, [], row
        for _ in range(setting.repeats):
            for name, model in calls.items():
                turns[name].append(time_calls(model, images, setting))
        for name, row in found.items():
            row |= summarise(batch_size, turns[name])
    return rows


def time_calls(model: Predict, images: torch.Tensor, setting: Setting) -> list[float]:
    """Seconds of each call of a turn."""
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < setting.seconds:
        began = time.perf_counter()
        model(images)
        if setting.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


def summarise(batch_size: int, turns: list[list[float]]) -> dict:
    calls = [1000 * seconds for turn in turns for seconds in turn]
    return {
        "images_per_second": spread([batch_size * len(turn) / sum(turn) for turn in turns]),
        "latency_ms": {
            "median": statistics.median(calls),
            "p95": statistics.quantiles(calls, n=20, method="inclusive")[-1],
            "calls": len(calls),
        },
    }


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"inference.py: error: {error}", file=sys.stderr)
        sys.exit(2)

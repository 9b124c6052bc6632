"""What the benchmarks share: flags, names, the description of the machine, and how each measures and exits."""

import datetime
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NoReturn
from unittest.mock import patch

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg

from modeling_deit_ti.arguments import Arguments, check_at_least
from modeling_deit_ti.card import describe_cores, describe_hardware, library_versions, processor_facts
from modeling_deit_ti.device import cpu_count
from modeling_deit_ti.errors import UserError, first_line


Precision = Literal["fp32", "fp16", "bf16"]
# The rows of a table by name: each one's contender and precision (`None`: what train_hf.py chooses by itself).
Rows = dict[str, tuple[str, Precision | None]]
BARE, PUBLISHED_BASELINE = "bare step", "published baseline's loop"
OURS = ("ours, augment on loader", "ours, augment on device")
PEERS = ("timm", "transformers")
BASELINE_SIZES = {"image_size": 224, "patch_size": 16}
# Memory over the epochs: few images in few patches, so that an epoch takes seconds.
MEMORY_FLAGS = {"augment_on": "loader", "image_size": 32, "patch_size": 16, "per_device_train_batch_size": 64}
MEMORY_FLAGS |= {"num_train_epochs": 8, "max_train_samples": 256, "max_eval_samples": 64, "eval_strategy": "epoch"}


@dataclass
class Setting:
    """Where to measure. Whatever is left out is filled in to suit the machine, and recorded."""

    device: Literal["auto", "cpu", "cuda"] = HfArg(default="auto", help="Where to run.")
    threads: int | None = HfArg(default=None, help="Number of CPU threads. Default: one per core.")
    output_dir: str = HfArg(default="results/throughput", help="Where the results go.")

    def __post_init__(self):
        has_gpu = torch.cuda.is_available()
        if self.device == "cuda" and not has_gpu:
            raise UserError("--device cuda: torch finds no GPU; leave the flag out, or use --device cpu.")
        if self.device == "auto":
            self.device = "cuda" if has_gpu else "cpu"
        if self.threads is None:
            self.threads = cpu_count()
        check_at_least(self, threads=1)

    def rows_of(self, contenders: list[str], only: Precision | None = None) -> Rows:
        """The contenders' rows. A peer has one in float32, one in the half precision that users would switch on."""
        half = "bf16" if self.device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        rows: Rows = {}
        for name in contenders:
            if name in PEERS:
                for precision in ("fp32", half) if only is None else (only,):
                    rows[name if precision == "fp32" else f"{name}, {precision}"] = name, precision
            else:
                rows[name] = name, "fp32" if name == PUBLISHED_BASELINE else only
        return rows


@dataclass
class SpeedSetting(Setting):
    """Which sizes to measure, and how often."""

    image_size: int = HfArg(default=32, help="Height and width of the model's input, in pixels.")
    patch_size: int = HfArg(default=4, help="Height and width of a patch, in pixels.")
    repeats: int = HfArg(default=3, help="How often each measurement is repeated.")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, image_size=1, patch_size=1, repeats=1)
        if self.image_size % self.patch_size:
            raise UserError(f"--patch_size {self.patch_size} does not divide --image_size {self.image_size}.")


def parse_setting(kind: type[Setting], argv: list[str], description: str) -> Setting:
    """Raises a `UserError` if the machine or the libraries lack what is asked for."""
    # One GPU, even if there are more: a Trainer would use them all.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return HfArgumentParser(kind, description=description).parse_args_into_dataclasses(argv)[0]


def run_in_subprocess(function: Callable[..., Any], *args, environment: dict[str, str]) -> Any:
    """
    Calls the function in a fresh process with these environment variables, so that start-up and peak memory are its
    own, and returns its result. Raises what the function raises, or `BrokenProcessPool` if the process was killed.
    """
    spawn = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, environment, TQDM_DISABLE="1"), ProcessPoolExecutor(1, spawn) as process:
        return process.submit(function, *args).result()


def attempt(function: Callable[..., dict], setting: Setting, *args) -> dict:
    """What the function returns in a fresh process, or `{"failed": why}`."""
    threads = {"OMP_NUM_THREADS": str(setting.threads), "MKL_NUM_THREADS": str(setting.threads)}
    try:
        return run_in_subprocess(function, setting, *args, environment=threads)
    except Exception as error:  # from any library, or the process was killed
        traceback.print_exc()
        return {"failed": first_line(error)[:200]}


def precision_of(args: Arguments) -> Precision:
    return {"no": "fp32"}.get(args.training.mixed_precision, args.training.mixed_precision)


def describe_machine(device: str, *more_libraries: str) -> dict:
    """Device, processor, versions and date, as every result records them."""
    on_gpu = device == "cuda"
    return {
        "device": device,
        "hardware": describe_hardware(TrainingArguments(report_to="none")) if on_gpu else describe_cores(),
        "processor": ", ".join(processor_facts()) or None,
        "versions": library_versions() | {library: version(library) for library in more_libraries},
        "date": datetime.date.today().isoformat(),
    }


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Exits with `main`'s exit code, or with 2 and a single message if the user made a mistake."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)

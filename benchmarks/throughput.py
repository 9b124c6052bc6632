"""Training throughput side by side: this trainer, timm, transformers, the published baseline's loop, a bare step.

    python benchmarks/throughput.py --image_size 32 --patch_size 4 --batch_size 128
    python benchmarks/throughput.py --image_size 224 --patch_size 16 --batch_size 1024        # on a GPU

Each measurement runs in its own process, so that start-up and peak memory are its own. The contenders take turns
(A B C A B C), so that a machine whose speed drifts affects them all. All see the same images, decoded in memory, in
batches of one size, with the same augmentation, teacher and precision; only the published baseline's loop has its own
augmentation and precision. The results go to `--output_dir`; see report.py. Run nothing else on the machine meanwhile.
"""

import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import set_seed
from transformers.hf_argparser import HfArg

from benchmarks.contenders import CONTENDERS, train_ours
from benchmarks.report import finish, spread
from benchmarks.setting import (
    MEMORY_FLAGS,
    PUBLISHED_BASELINE,
    Precision,
    Setting,
    cpu_count,
    in_own_process,
    parse_setting,
    run,
)
from benchmarks.step_clock import StepClock
from modeling_deit_ti.arguments import Arguments, check_at_least
from modeling_deit_ti.classifiers import is_timm_architecture, new_timm_classifier
from modeling_deit_ti.data import ImageData, load_images
from modeling_deit_ti.data.inputs import make_image_processor
from modeling_deit_ti.errors import UserError, first_line
from modeling_deit_ti.parsing import parse_arguments


BASELINE_SHARE_OF_STEPS = 3  # its steps take several times as long, so it makes a third as many
RECIPE = {
    "distill_mode": "both",  # the one mode that timm's task and transformers' two-headed DeiT have, too
    "learning_rate": 5e-4,
    "weight_decay": 0.05,
    "max_grad_norm": 1.0,
    "label_smoothing_factor": 0.1,
    "drop_path_rate": 0.1,
    "repeated_augmentation": 1,  # timm repeats only across several processes
}
AUGMENTATIONS = {
    "paper": {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0},
    "light": {"auto_augment": "none", "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0},
}


# ---- Setting ----


@dataclass
class ThroughputSetting(Setting):
    dataset_name: str = HfArg(default="uoft-cs/cifar10", help="A Hub id, a local folder or `digits`.")
    batch_size: int = HfArg(default=128, help="Images per step.")
    teacher: str = HfArg(default="regnetx_004", help="A timm architecture; its weights are random.")
    precision: Precision | None = HfArg(default=None, help="Default: fp32 on the CPU, bf16 on a GPU.")
    recipe: Literal["paper", "light"] = HfArg(default="paper", help="The paper's augmentation, or crops and flips.")
    steps: int | None = HfArg(default=None, help="Measured steps. Default: 3 on the CPU, 50 on a GPU.")
    warmup_steps: int | None = HfArg(default=None, help="Steps before those. Default: 1 on the CPU, 10 on a GPU.")
    split_steps: int | None = HfArg(
        default=None,
        help="Steps after those, in the first repeat only, in which each part of a step is timed; 0 turns it off. "
        "Default: 1 on the CPU, 10 on a GPU, 0 with --torch_compile.",
    )
    contenders: list[str] = HfArg(
        default_factory=lambda: list(CONTENDERS), help="Which to run.", metadata={"choices": list(CONTENDERS)}
    )
    dataloader_num_workers: int | None = HfArg(
        default=None, help="Except in the published baseline's loop. Default: 0 on the CPU; at most 16 on a GPU."
    )
    torch_compile: bool = HfArg(default=False, help="Except in the published baseline's loop.")
    measure_memory: bool = HfArg(default=True, help="Also watch the host's memory over epochs of our trainer.")

    def __post_init__(self):
        super().__post_init__()
        for name, on_cpu, on_gpu in (
            ("precision", "fp32", "bf16"),
            ("steps", 3, 50),
            ("warmup_steps", 1, 10),
            ("split_steps", 1, 10),
            ("dataloader_num_workers", 0, min(16, cpu_count())),
        ):
            if getattr(self, name) is None:
                setattr(self, name, on_gpu if self.device == "cuda" else on_cpu)
        if self.torch_compile:
            self.split_steps = 0  # its hooks would be compiled into the networks
        if self.precision == "fp16" and self.device == "cpu":
            raise UserError("--precision fp16 needs a GPU: use fp32 or bf16.")
        if not is_timm_architecture(self.teacher):
            raise UserError(f"--teacher {self.teacher}: timm has no such architecture.")
        check_at_least(self, steps=1, warmup_steps=1, split_steps=0, batch_size=1, dataloader_num_workers=0)


def make_arguments(setting: ThroughputSetting, work_dir: str, **flags) -> Arguments:
    """The arguments of a contender, from flags as train_hf.py takes them."""
    same = ("dataset_name", "image_size", "patch_size", "dataloader_num_workers", "torch_compile")
    flags = {
        **RECIPE,
        **AUGMENTATIONS[setting.recipe],
        **{name: getattr(setting, name) for name in same},
        "per_device_train_batch_size": setting.batch_size,
        "teacher_model_name_or_path": f"{work_dir}/teacher",
        "output_dir": f"{work_dir}/run",
        "use_cpu": setting.device == "cpu",
        "fp16": setting.precision == "fp16",
        "bf16": setting.precision == "bf16",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **flags,
    }
    return parse_arguments([f"--{name}={value}" for name, value in flags.items()])


# ---- Turns, each a process ----


def main(argv: list[str]) -> int:
    """The exit code: 1 if a contender failed."""
    setting = parse_setting(ThroughputSetting, argv, __doc__.splitlines()[0])
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="throughput-") as work_dir:
        args = make_arguments(setting, work_dir)
        data = load_images(args.images)  # also fills the cache that every process reads
        save_teacher(setting.teacher, args, data)
        reports: dict[str, list[dict]] = {contender: [] for contender in setting.contenders}
        for repeat in range(setting.repeats):
            of_turn = replace(setting, split_steps=setting.split_steps if repeat == 0 else 0)
            for contender, earlier in reports.items():
                if not any("failed" in report for report in earlier):
                    earlier.append(attempt(measure, of_turn, work_dir, contender, time.time()))
        memory = attempt(measure_memory, setting, work_dir) if setting.measure_memory else {}
    # Of a local folder, its own name alone.
    setting = replace(setting, dataset_name=Path(data.name).name if data.source == "local" else data.name)
    rows = [summary(contender, found) for contender, found in reports.items()]
    epochs = memory.get("host_bytes_by_epoch")
    return finish(setting, began, rows, "throughput", host_bytes_by_epoch=epochs) or int("failed" in memory)


def save_teacher(architecture: str, args: Arguments, data: ImageData) -> None:
    """The teacher that all load. Its weights are random: a fitted one is just as fast."""
    set_seed(0)
    image_processor = make_image_processor(args.model, args.augmentation)
    teacher = new_timm_classifier(architecture, data.label_names, args.model.image_size, image_processor)
    teacher.save_pretrained(args.teacher.teacher_model_name_or_path)


def attempt(function: Callable[..., dict], setting: ThroughputSetting, *args) -> dict:
    """What the function returns in a fresh process, or `{"failed": why}`."""
    threads = {"OMP_NUM_THREADS": str(setting.threads), "MKL_NUM_THREADS": str(setting.threads)}
    try:
        return in_own_process(function, setting, *args, environment=threads)
    except Exception as error:  # from any library, or the process was killed
        traceback.print_exc()
        return {"failed": first_line(error)[:200]}


def measure(setting: ThroughputSetting, work_dir: str, contender: str, started: float) -> dict:
    """[`StepClock.report`] of the contender."""
    torch.set_num_threads(setting.threads)
    set_seed(0)
    share = BASELINE_SHARE_OF_STEPS if contender == PUBLISHED_BASELINE else 1
    steps = (setting.warmup_steps, max(1, setting.steps // share), setting.split_steps)
    clock = StepClock(setting.device, setting.batch_size, started, *steps)
    train, flags = CONTENDERS[contender]
    args = make_arguments(setting, work_dir, **flags, max_steps=clock.steps, eval_strategy="no")
    train(args, load_images(args.images), clock)
    report = clock.report()
    print(f"{contender}: {report['images_per_second']:.1f} images/s", flush=True)
    return report


def measure_memory(setting: ThroughputSetting, work_dir: str) -> dict:
    """The host's memory after each epoch of our trainer."""
    torch.set_num_threads(setting.threads)
    set_seed(0)
    args = make_arguments(setting, work_dir, **MEMORY_FLAGS)
    clock = StepClock(setting.device, args.training.train_batch_size, time.time())
    train_ours(args, load_images(args.images), clock)
    return {"host_bytes_by_epoch": clock.host_bytes_by_epoch}


def summary(contender: str, reports: list[dict]) -> dict:
    """A row of the table: the spread over a contender's processes."""
    failed = reports[-1].get("failed")
    row = {"name": contender, "failed": failed}
    if failed:
        return row
    for name in ("images_per_second", "step_ms", "startup_seconds", "peak_host_bytes", "peak_device_bytes"):
        values = [report[name] for report in reports]
        row[name] = None if None in values else spread(values)
    return row | {"split_ms": reports[0]["split_ms"]}


if __name__ == "__main__":
    run(main)

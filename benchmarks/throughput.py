"""Training throughput side by side: this trainer, timm, transformers, the published baseline's loop and a bare step.

    python benchmarks/throughput.py --image_size 32 --patch_size 8 --batch_size 128
    python benchmarks/throughput.py --image_size 224 --patch_size 16 --batch_size 1024        # on a GPU

Each measurement runs in its own process, so that start-up and peak memory are its own. The contenders take turns
(A B C A B C), so that drifts in the machine's speed affect them all. All see the same images, decoded in memory, in
batches of the same size, with the same augmentation and teacher; only the published baseline's loop has its own
augmentation. Ours and the bare step run in the precision that train_hf.py chooses by itself, timm and transformers in
float32, their default, and in a second row with the machine's half precision switched on. Ours starts with an empty
cache of teacher logits, which it computes and stores. The results go to `--output_dir`; see report.py. Run nothing
else on the machine meanwhile.
"""

import copy
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import set_seed
from transformers.hf_argparser import HfArg

from benchmarks import contenders
from benchmarks.report import finish, make_result, spread
from benchmarks.setting import (
    BARE,
    BASELINE_SIZES,
    MEMORY_FLAGS,
    OURS,
    PUBLISHED_BASELINE,
    Precision,
    Rows,
    SpeedSetting,
    attempt,
    parse_setting,
    precision_of,
    run,
)
from benchmarks.step_clock import StepClock
from modeling_deit_ti.arguments import Arguments, check_at_least
from modeling_deit_ti.classifiers import is_timm_architecture, new_timm_classifier
from modeling_deit_ti.data import ImageData, load_images
from modeling_deit_ti.data.inputs import make_image_processor
from modeling_deit_ti.device import HALF_DTYPES, cpu_count
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.parsing import parse_arguments


# How each trains, and the flags it adds to those that all share.
CONTENDERS: dict[str, tuple[contenders.Train, dict]] = {
    BARE: (contenders.train_bare, {}),
    OURS[0]: (contenders.train_ours, {"augment_on": "loader"}),
    OURS[1]: (contenders.train_ours, {"augment_on": "device"}),
    "timm": (contenders.train_timm, {}),
    "transformers": (contenders.train_transformers, {}),
    PUBLISHED_BASELINE: (contenders.train_as_the_published_baseline, BASELINE_SIZES),
}
BASELINE_SHARE_OF_STEPS = 3  # its steps take several times as long, so it runs a third as many
RECIPE = {
    "distill_mode": "both",  # the one mode that timm's task and transformers' two-headed DeiT also have
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
class ThroughputSetting(SpeedSetting):
    dataset_name: str = HfArg(default="uoft-cs/cifar10", help="A Hub id, a local folder or `digits`.")
    batch_size: int = HfArg(default=128, help="Images per step.")
    teacher: str = HfArg(default="regnetx_004", help="A timm architecture; its weights are random.")
    precision: Precision | None = HfArg(
        default=None,
        help="Precision of every row. Default: for ours, what train_hf.py chooses by itself; for timm and "
        "transformers, fp32 and the machine's half precision.",
    )
    automatic_precision: Precision = field(init=False)  # what train_hf.py chooses by itself
    recipe: Literal["paper", "light"] = HfArg(default="paper", help="The paper's augmentation, or crops and flips.")
    steps: int | None = HfArg(default=None, help="Measured steps. Default: 3 on the CPU, 50 on a GPU.")
    warmup_steps: int | None = HfArg(default=None, help="Warm-up steps. Default: 1 on the CPU, 10 on a GPU.")
    split_steps: int | None = HfArg(
        default=None,
        help="Steps after those, in the first repeat only, in which each part of a step is timed; 0 turns it off. "
        "Default: 1 on the CPU, 10 on a GPU, 0 with --torch_compile.",
    )
    contenders: list[str] = HfArg(
        default_factory=lambda: list(CONTENDERS), help="The contenders to run.", metadata={"choices": list(CONTENDERS)}
    )
    dataloader_num_workers: int | None = HfArg(
        default=None, help="Loader workers; the baseline's loop has none. Default: 0 on the CPU, at most 16 on a GPU."
    )
    torch_compile: bool = HfArg(default=False, help="Compile, except in the published baseline's loop.")
    measure_memory: bool = HfArg(default=True, help="Also measure host memory over several epochs of our trainer.")

    def __post_init__(self):
        super().__post_init__()
        defaults = {"steps": (3, 50), "warmup_steps": (1, 10), "split_steps": (1, 10)}
        for name, (on_cpu, on_gpu) in (defaults | {"dataloader_num_workers": (0, min(16, cpu_count()))}).items():
            if getattr(self, name) is None:
                setattr(self, name, on_gpu if self.device == "cuda" else on_cpu)
        if self.torch_compile:
            self.split_steps = 0  # its hooks would be compiled into the networks
        if self.precision == "fp16" and self.device == "cpu":
            raise UserError("--precision fp16 needs a GPU: use fp32 or bf16.")
        if not is_timm_architecture(self.teacher):
            raise UserError(f"--teacher {self.teacher}: timm has no such architecture.")
        check_at_least(self, steps=1, warmup_steps=1, split_steps=0, batch_size=1, dataloader_num_workers=0)
        by_itself = parse_arguments([f"--use_cpu={self.device == 'cpu'}", "--report_to=none"])
        self.automatic_precision = precision_of(by_itself)

    @property
    def rows(self) -> Rows:
        return self.rows_of(self.contenders, self.precision)


def make_arguments(
    setting: ThroughputSetting, work_dir: str, precision: Precision | None = None, **flags
) -> Arguments:
    """[`contenders.make_arguments`] with the recipe and teacher that all share."""
    recipe = RECIPE | AUGMENTATIONS[setting.recipe] | {"per_device_train_batch_size": setting.batch_size}
    recipe |= {name: getattr(setting, name) for name in ("dataloader_num_workers", "torch_compile")}
    recipe["teacher_model_name_or_path"] = f"{work_dir}/teacher"
    recipe["teacher_output_dir"] = tempfile.mkdtemp(dir=work_dir)  # no logits are stored yet
    return contenders.make_arguments(setting, work_dir, precision, **(recipe | flags))


# ---- Turns, each in its own process ----


def main(argv: list[str]) -> int:
    """The exit code: 1 if a contender failed."""
    setting = parse_setting(ThroughputSetting, argv, __doc__.splitlines()[0])
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="throughput-") as work_dir:
        args = make_arguments(setting, work_dir)
        data = load_images(args.images)  # also fills the cache that every process reads
        save_teacher(setting.teacher, args, data)
        reports: dict[str, list[dict]] = {row: [] for row in setting.rows}
        for repeat in range(setting.repeats):
            of_turn = replace(setting, split_steps=setting.split_steps if repeat == 0 else 0)
            for row, earlier in reports.items():
                if not any("failed" in report for report in earlier):
                    earlier.append(attempt(measure, of_turn, work_dir, row, time.time()))
        memory = attempt(measure_memory, setting, work_dir) if setting.measure_memory else {}
    # Of a local folder, only the name.
    setting = replace(setting, dataset_name=Path(data.name).name if data.source == "local" else data.name)
    rows = [summary(row, found) for row, found in reports.items()]
    epochs = memory.get("host_bytes_by_epoch")
    result = make_result(setting, began, rows, "throughput", host_bytes_by_epoch=epochs)
    return finish(result, setting.output_dir) or int("failed" in memory)


def save_teacher(architecture: str, args: Arguments, data: ImageData) -> None:
    """Saves the teacher that all load. Its weights are random: a fitted one is just as fast."""
    set_seed(0)
    image_processor = make_image_processor(args.model, args.augmentation)
    teacher = new_timm_classifier(architecture, data.label_names, args.model.image_size, image_processor)
    teacher.save_pretrained(args.teacher.teacher_model_name_or_path)


def measure(setting: ThroughputSetting, work_dir: str, row: str, started: float) -> dict:
    """[`StepClock.report`] of a row's contender, and its precision; for the bare step, also what bounds it."""
    torch.set_num_threads(setting.threads)
    set_seed(0)
    contender, precision = setting.rows[row]
    train, flags = CONTENDERS[contender]
    share = BASELINE_SHARE_OF_STEPS if contender == PUBLISHED_BASELINE else 1
    steps = (setting.warmup_steps, max(1, setting.steps // share), setting.split_steps)
    clock = StepClock(setting.device, setting.batch_size, started, *steps)
    args = make_arguments(setting, work_dir, precision, max_steps=clock.steps, **flags)
    train(args, load_images(args.images), clock)
    report = clock.report() | {"precision": precision_of(args)}
    if contender == BARE:
        report |= step_flops(**clock.networks, args=args) | {"product_flops_per_second": matmul_rate(args, clock)}
    print(f"{row}: {report['images_per_second']:.1f} images/s", flush=True)
    return report


def step_flops(student: torch.nn.Module, teacher: torch.nn.Module, args: Arguments) -> dict[str, int]:
    """Floating-point operations per image: of the student, forward and backward, and of the teacher."""
    size, device = args.model.image_size, args.training.device
    image = torch.zeros(1, 3, size, size, device=device)
    student = copy.deepcopy(student)
    student.set_attn_implementation("eager")  # the counter does not know a CPU's fused attention
    with FlopCounterMode(display=False) as of_student:
        outputs = student(pixel_values=image)
        (outputs["class_logits"].sum() + outputs["distillation_logits"].sum()).backward()
    with FlopCounterMode(display=False) as of_teacher:
        teacher(image)
    return {"student_flops": of_student.get_total_flops(), "teacher_flops": of_teacher.get_total_flops()}


def matmul_rate(args: Arguments, clock: StepClock) -> float:
    """
    Floating-point operations per second of the student's largest matrix product alone: a step's tokens, from 192 to
    768 channels, in the step's precision. Median over at least a second.
    """
    num_tokens = (args.model.image_size // args.model.patch_size) ** 2 + len(args.training.mode.tokens)
    options = {"device": args.training.device, "dtype": HALF_DTYPES.get(args.training.mixed_precision, torch.float32)}
    tokens = torch.randn(args.training.train_batch_size * num_tokens, 192, **options)
    weight, bias = torch.randn(768, 192, **options), torch.randn(768, **options)
    seconds: list[float] = []
    while len(seconds) < 20 or sum(seconds) < 1:
        began = clock.now()
        F.linear(tokens, weight, bias)
        seconds.append(clock.now() - began)
    return 2 * tokens.numel() * len(weight) / statistics.median(seconds)


def measure_memory(setting: ThroughputSetting, work_dir: str) -> dict:
    """The host's memory after each epoch of our trainer."""
    torch.set_num_threads(setting.threads)
    set_seed(0)
    args = make_arguments(setting, work_dir, **MEMORY_FLAGS)
    clock = StepClock(setting.device, args.training.train_batch_size, time.time())
    contenders.train_ours(args, load_images(args.images), clock)
    return {"host_bytes_by_epoch": clock.host_bytes_by_epoch}


def summary(name: str, reports: list[dict]) -> dict:
    """A row of the table: the spread of what its processes have measured, and what the first has counted."""
    row = {"name": name, "failed": reports[-1].get("failed")}
    if row["failed"]:
        return row
    for key, first in reports[0].items():
        is_counted = first is None or key in ("split_ms", "precision", "student_flops", "teacher_flops")
        row[key] = first if is_counted else spread([report[key] for report in reports])
    return row


if __name__ == "__main__":
    run(main)

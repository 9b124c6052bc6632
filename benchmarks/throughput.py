"""Training throughput side by side: this trainer, timm, transformers, the published baseline's loop, a bare step.

    python benchmarks/throughput.py --image_size 32 --patch_size 4 --batch_size 128
    python benchmarks/throughput.py --image_size 224 --patch_size 16 --batch_size 1024        # on a GPU

Each measurement runs in its own process, so that start-up and peak memory are its own. The contenders take turns
(A B C A B C), so that a machine whose speed drifts affects them all. All see the same images, decoded in memory, in
batches of one size, with the same augmentation, teacher and precision; only the published baseline's loop has its own
augmentation and precision. The results go to `--output_dir`; see report.py. Run nothing else on the machine meanwhile.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import set_seed
from transformers.hf_argparser import HfArg

from benchmarks.contenders import BASELINE_SIZES, CONTENDERS, watch_memory
from benchmarks.report import PUBLISHED_BASELINE, spread, write_result
from benchmarks.setting import DTYPES, Setting, cpu_count, describe_machine, parse_setting, run
from benchmarks.step_clock import StepClock
from modeling_deit_ti.arguments import Arguments, check_at_least
from modeling_deit_ti.classifiers import is_timm_architecture, new_timm_classifier
from modeling_deit_ti.data import ImageData, load_images
from modeling_deit_ti.data.inputs import make_image_processor
from modeling_deit_ti.errors import UserError
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
# Memory over the epochs: few images in few patches, so that an epoch takes seconds.
MEMORY = "memory"
MEMORY_FLAGS = {
    "augment_on": "loader",
    "image_size": 32,
    "patch_size": 16,
    "per_device_train_batch_size": 64,
    "num_train_epochs": 8,
    "max_train_samples": 256,
    "max_eval_samples": 64,
}


# ---- Setting ----


@dataclass
class ThroughputSetting(Setting):
    dataset_name: str = HfArg(
        default="uoft-cs/cifar10", help="As for train_hf.py: a Hub id, a local folder or `digits`."
    )
    batch_size: int = HfArg(default=128, help="Images per step.")
    teacher: str = HfArg(default="regnetx_004", help="A timm architecture; its weights are random.")
    precision: str | None = HfArg(
        default=None, help="Default: fp32 on the CPU, bf16 on a GPU.", metadata={"choices": list(DTYPES)}
    )
    recipe: str = HfArg(
        default="paper",
        help="`paper`: crops, flips, RandAugment, erasing, mixup and CutMix; `light`: crops and flips.",
        metadata={"choices": list(AUGMENTATIONS)},
    )
    steps: int | None = HfArg(default=None, help="Measured steps. Default: 3 on the CPU, 50 on a GPU.")
    warmup_steps: int | None = HfArg(default=None, help="Steps before those. Default: 1 on the CPU, 10 on a GPU.")
    split_steps: int | None = HfArg(
        default=None,
        help="Steps after those, in the first repeat only, in which each part of a step is timed; 0 turns it off. "
        "Default: 1 on the CPU, 10 on a GPU, 0 with --torch_compile.",
    )
    contenders: list[str] | None = HfArg(
        default=None, help="Which to run. Default: all.", metadata={"choices": list(CONTENDERS)}
    )
    dataloader_num_workers: int | None = HfArg(
        default=None,
        help="For all but the published baseline's loop, which has none. Default: 0 on the CPU; on a GPU one per "
        "core, at most 16.",
    )
    torch_compile: bool = HfArg(default=False, help="For all but the published baseline's loop.")
    measure_memory: bool = HfArg(
        default=True, help="Also train our model for several epochs and watch the host's memory."
    )

    def __post_init__(self):
        super().__post_init__()
        for name, on_cpu, on_gpu in (
            ("precision", "fp32", "bf16"),
            ("steps", 3, 50),
            ("warmup_steps", 1, 10),
            ("split_steps", 1, 10),
            ("dataloader_num_workers", 0, min(16, cpu_count())),
            ("contenders", list(CONTENDERS), list(CONTENDERS)),
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


@dataclass
class Job:
    """One measurement, as its process is told."""

    contender: str
    setting: ThroughputSetting
    teacher_folder: str
    work_dir: str
    started: float  # time.time() when the process was started
    split: bool  # whether to time the parts of a step as well


def make_arguments(setting: ThroughputSetting, work_dir: str, **flags) -> Arguments:
    """The arguments of a contender, from flags as train_hf.py takes them."""
    flags = {
        **RECIPE,
        **AUGMENTATIONS[setting.recipe],
        "dataset_name": setting.dataset_name,
        "image_size": setting.image_size,
        "patch_size": setting.patch_size,
        "output_dir": os.path.join(work_dir, "run"),
        "per_device_train_batch_size": setting.batch_size,
        "dataloader_num_workers": setting.dataloader_num_workers,
        "torch_compile": setting.torch_compile,
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
        teacher_folder = save_teacher(setting.teacher, args, data, work_dir)
        reports: dict[str, list[dict]] = {contender: [] for contender in setting.contenders}
        for repeat in range(setting.repeats):
            for contender, earlier in reports.items():
                if not any("failed" in report for report in earlier):
                    job = Job(contender, setting, teacher_folder, work_dir, time.time(), split=repeat == 0)
                    earlier.append(run_process(job))
        memory = {}
        if setting.measure_memory:
            memory = run_process(Job(MEMORY, setting, teacher_folder, work_dir, time.time(), split=False))
    result = {
        "benchmark": "throughput",
        **describe_machine(setting.device),
        # Of a local folder, its own name alone.
        "setting": asdict(setting) | {"dataset_name": Path(data.name).name if data.source == "local" else data.name},
        "seconds": round(time.monotonic() - began),
        "rows": [summary(contender, found) for contender, found in reports.items()],
        "host_bytes_by_epoch": memory.get("host_bytes_by_epoch"),
    }
    file = write_result(result, Path(setting.output_dir), remarks(result))
    print(f"\n{file.read_text()}\nWritten to {file}, and the index beside it.")
    return 1 if "failed" in memory or any(row["failed"] for row in result["rows"]) else 0


def save_teacher(architecture: str, args: Arguments, data: ImageData, work_dir: str) -> str:
    """The teacher that all load. Its weights are random: a fitted one is just as fast."""
    set_seed(0)
    folder = os.path.join(work_dir, "teacher")
    image_processor = make_image_processor(args.model, args.augmentation)
    teacher = new_timm_classifier(architecture, data.label_names, args.model.image_size, image_processor)
    teacher.save_pretrained(folder)
    return folder


def run_process(job: Job) -> dict:
    """The report of a fresh process, or `{"failed": why}`."""
    report_file = Path(job.work_dir, "report.json")
    threads = str(job.setting.threads)
    done = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps(asdict(job)), str(report_file)],
        env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
        print("\n".join(lines[-30:]), file=sys.stderr)
        print(f"{job.contender}: failed: {lines[-1]}", file=sys.stderr)
        return {"failed": lines[-1][:200]}
    report = json.loads(report_file.read_text())
    if "images_per_second" in report:
        print(f"{job.contender}: {report['images_per_second']:.1f} images/s", flush=True)
    return report


def measure(job: Job) -> dict:
    """In that process: [`StepClock.report`] of the contender, or the host's memory after each epoch."""
    setting = job.setting
    torch.set_num_threads(setting.threads)
    set_seed(0)
    if job.contender == MEMORY:
        args = make_arguments(setting, job.work_dir, teacher_model_name_or_path=job.teacher_folder, **MEMORY_FLAGS)
        return {"host_bytes_by_epoch": watch_memory(args, load_images(args.images))}
    steps = setting.steps
    if job.contender == PUBLISHED_BASELINE:
        steps = max(1, steps // BASELINE_SHARE_OF_STEPS)
    split_steps = setting.split_steps if job.split else 0
    clock = StepClock(setting.device, setting.batch_size, job.started, setting.warmup_steps, steps, split_steps)
    train, flags = CONTENDERS[job.contender]
    flags = flags | {"teacher_model_name_or_path": job.teacher_folder, "max_steps": clock.steps, "eval_strategy": "no"}
    args = make_arguments(setting, job.work_dir, **flags)
    train(args, load_images(args.images), clock)
    return clock.report()


# ---- Result ----


def summary(contender: str, reports: list[dict]) -> dict:
    """A row of the table: the spread over a contender's processes."""
    row = {"name": contender, "failed": reports[-1].get("failed")}
    if row["failed"]:
        return row
    for name in ("images_per_second", "step_ms", "startup_seconds", "peak_host_bytes", "peak_device_bytes"):
        values = [report[name] for report in reports]
        row[name] = None if None in values else spread(values)
    return row | {"split_ms": reports[0]["split_ms"]}


def remarks(result: dict) -> list[str]:
    """How it was measured, for the reader of the table."""
    setting = result["setting"]
    lines = [
        f"Processes per contender, taking turns: {setting['repeats']}; the table shows their median and range. Steps "
        f"in each: {setting['warmup_steps']} to warm up, then {setting['steps']} measured. Threads: "
        f"{setting['threads']}. Loader workers: {setting['dataloader_num_workers']}. Total: {result['seconds']} s.",
        f"The parts of a step were timed separately, in the first process (steps: {setting['split_steps']}). `data` "
        "is everything before the first network starts: loading, augmenting, mixing, copying. `student` is forward, "
        "loss and backward; `optimizer` is clipping and the step.",
        "Start-up: from the start of the process to the first batch, imports included, with the decoded images in "
        "`datasets`' cache. Peak host memory: of the main process.",
        f"Mode `both` on {setting['dataset_name']}, whose images are decoded in memory for all contenders; this "
        "favours those that would otherwise decode them one by one. The teacher's weights are random.",
        f"The {PUBLISHED_BASELINE} runs at its own setting: {BASELINE_SIZES['image_size']}/"
        f"{BASELINE_SIZES['patch_size']}, resized image by image, no other augmentation, fp32, no workers, with this "
        "project's network, for a third of the measured steps.",
        "The bare step is teacher, student, clipping and AdamW on one synthetic batch: an upper bound.",
    ]
    if result["host_bytes_by_epoch"]:
        megabytes = ", ".join(f"{value / 1e6:,.0f}" for value in result["host_bytes_by_epoch"])
        lines.append(
            f"Our trainer's resident host memory in MB after each of {MEMORY_FLAGS['num_train_epochs']} epochs of "
            f"{MEMORY_FLAGS['max_train_samples']} images at {MEMORY_FLAGS['image_size']}/{MEMORY_FLAGS['patch_size']}"
            f", batch {MEMORY_FLAGS['per_device_train_batch_size']}, evaluation included: {megabytes}."
        )
    return lines


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        described, report_file = json.loads(sys.argv[2]), sys.argv[3]
        job = Job(**described | {"setting": ThroughputSetting(**described["setting"])})
        Path(report_file).write_text(json.dumps(measure(job)))
    else:
        run(main)

"""Training throughput, side by side: this trainer, timm, plain transformers, the seed's loop and the bare step.

    python benchmarks/throughput.py --image_size 32 --patch_size 4 --batch_size 128
    python benchmarks/throughput.py --image_size 224 --patch_size 16 --batch_size 1024        # on a GPU

Every measurement is a process of its own, so that start-up and peak memory are its own, and the contenders take turns
(A B C A B C), so that a machine that drifts drifts for all. All see the same images, decoded in memory, in the same
batches, with the same augmentation (the seed's loop has its own), the same teacher and the same precision. The results
go to `--output_dir`; see report.py. Nothing else should run on the machine meanwhile.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
from datasets import Dataset
from timm.data import create_loader
from timm.data.mixup import FastCollateMixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import TokenDistillationTask
from timm.utils import NativeScaler, dispatch_clip_grad
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision import transforms
from torchvision.transforms import v2
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.report import BARE, OURS, SEED, TIMM, TRANSFORMERS, describe_machine, spread, write_result
from modeling_deit_ti.classifiers import is_timm_architecture, label_maps, new_timm_classifier
from modeling_deit_ti.data import (
    DataArguments,
    EvalImages,
    ImageData,
    load_images,
    make_image_processor,
    make_train_images,
    make_train_transform,
    read_image,
)
from modeling_deit_ti.distillation import MODES, distillation_loss
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.teacher import Teacher, prepare_teacher
from modeling_deit_ti.trainer import DistillationTrainer
from train_hf import make_student, parse_arguments


MODE = MODES["both"]  # the one that timm's task and transformers' two-headed DeiT have as well
LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING, DROP_PATH_RATE, MAX_GRAD_NORM = 5e-4, 0.05, 0.1, 0.1, 1.0
MIXUP, CUTMIX = 0.8, 1.0
SEED_IMAGE_SIZE, SEED_PATCH_SIZE = 224, 16
SEED_SHARE_OF_STEPS = 3  # it takes several times as long for a step as the others: a third of their steps
# Memory over the epochs: a network of few patches and few images, so that an epoch takes seconds.
MEMORY_EPOCHS, MEMORY_IMAGES, MEMORY_BATCH_SIZE, MEMORY_IMAGE_SIZE, MEMORY_PATCH_SIZE = 8, 256, 64, 32, 16
MEMORY = "memory"
# What a recipe says to our trainer; all others take theirs from here as well.
RECIPES = {
    "paper": {},
    "light": {"auto_augment": "none", "random_erasing": 0.0, "mixup": 0.0, "cutmix": 0.0},
}


@dataclass
class Setting:
    """What is measured. `None` and `auto` are resolved by [`resolve`], and recorded so."""

    dataset_name: str = field(
        default="uoft-cs/cifar10", metadata={"help": "As train_hf.py takes it: a Hub id, a local folder or `digits`."}
    )
    image_size: int = field(default=32, metadata={"help": "Height and width of the student's input, in pixels."})
    patch_size: int = field(default=4, metadata={"help": "Height and width of a patch, in pixels."})
    batch_size: int = field(default=128, metadata={"help": "Images in a step."})
    teacher: str = field(default="regnetx_004", metadata={"help": "A timm architecture; its weights are random."})
    precision: str | None = field(
        default=None,
        metadata={"help": "Default: fp32 on the CPU, bf16 on a GPU.", "choices": ["fp32", "fp16", "bf16"]},
    )
    recipe: str = field(
        default="paper",
        metadata={
            "help": "`paper`: crops, flips, RandAugment, erasing, mixup and CutMix; `light`: crops and flips.",
            "choices": list(RECIPES),
        },
    )
    device: str = field(default="auto", metadata={"help": "Where.", "choices": ["auto", "cpu", "cuda"]})
    steps: int | None = field(default=None, metadata={"help": "Measured steps. Default: 3 on the CPU, 50 on a GPU."})
    warmup_steps: int | None = field(
        default=None, metadata={"help": "Steps before them. Default: 1 on the CPU, 10 on a GPU."}
    )
    split_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps after them in which the parts of a step are timed, in the first repeat; 0: none. Default: "
            "1 on the CPU, 10 on a GPU. Not with --torch_compile."
        },
    )
    repeats: int = field(default=3, metadata={"help": "Processes a contender."})
    contenders: list[str] | None = field(
        default=None,
        metadata={
            "help": "Which. Default: all.",
            "choices": [BARE, *OURS, TIMM, TRANSFORMERS, SEED],
        },
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "For all but the seed's loop, which has none. Default: 0 on the CPU, on a GPU the cores, at most "
            "16."
        },
    )
    threads: int | None = field(default=None, metadata={"help": "Of torch. Default: all cores."})
    torch_compile: bool = field(default=False, metadata={"help": "For all but the seed's loop."})
    measure_memory: bool = field(
        default=True, metadata={"help": "Also train our model for some epochs and watch the host's memory."}
    )
    output_dir: str = field(default="results/throughput", metadata={"help": "Where the results go."})


@dataclass
class Job:
    """One measurement: what a process is told."""

    contender: str
    setting: Setting
    teacher_folder: str
    work_dir: str
    started: float  # time.time() when the process was started
    split: bool

    @property
    def measured_steps(self) -> int:
        steps = self.setting.steps
        return max(1, steps // SEED_SHARE_OF_STEPS) if self.contender == SEED else steps

    @property
    def steps(self) -> int:
        """All steps: warm-up, measured, split."""
        return self.setting.warmup_steps + self.measured_steps + self.setting.split_steps * self.split


def main(argv: list[str]) -> int:
    """The exit code: 1 where a contender failed."""
    (setting,) = HfArgumentParser(Setting, description=__doc__.splitlines()[0]).parse_args_into_dataclasses(argv)
    # One GPU, also where there are more: the Trainers would take them all.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    resolve(setting)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="throughput-") as work_dir:
        machine = describe_machine(training_arguments(setting, work_dir))
        data = load_images(data_arguments(setting))  # also fills the cache that every process reads
        teacher_folder = save_teacher(setting, data, work_dir)
        turns = [(repeat, contender) for repeat in range(setting.repeats) for contender in setting.contenders]
        reports: dict[str, list[dict]] = {contender: [] for contender in setting.contenders}
        failures: dict[str, str] = {}
        host_bytes = None
        for repeat, contender in turns:
            if contender in failures:
                continue
            report = run_process(contender, setting, teacher_folder, work_dir, split=repeat == 0)
            if "failed" in report:
                failures[contender] = report["failed"]
                print(f"{contender}: failed: {report['failed']}", file=sys.stderr)
            else:
                reports[contender].append(report)
                print(f"{contender}: {report['images_per_second']:.1f} images/s", flush=True)
        if setting.measure_memory:
            report = run_process(MEMORY, setting, teacher_folder, work_dir, split=False)
            host_bytes = report.get("host_bytes_by_epoch")
            if host_bytes is None:
                failures[MEMORY] = report["failed"]
                print(f"memory over epochs: failed: {report['failed']}", file=sys.stderr)
    result = {
        "benchmark": "throughput",
        **machine,
        "setting": asdict(setting) | {"dataset_name": dataset_title(data)},
        "seconds": round(time.monotonic() - began),
        "rows": [summary(contender, reports[contender], failures.get(contender)) for contender in reports],
        "host_bytes_by_epoch": host_bytes,
    }
    file = write_result(result, Path(setting.output_dir), remarks(result))
    print(f"\n{file.read_text()}\nWritten to {file}, and the index beside it.")
    return 1 if failures else 0


def resolve(setting: Setting) -> None:
    """
    Fills in what depends on the machine.

    Raises:
        UserError: if the machine or the libraries do not have what is asked for.
    """
    has_gpu = torch.cuda.is_available()
    if setting.device == "cuda" and not has_gpu:
        raise UserError("--device cuda: torch finds no GPU here; leave it out, or take --device cpu.")
    if setting.device == "auto":
        setting.device = "cuda" if has_gpu else "cpu"
    on_gpu = setting.device == "cuda"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for name, on_cpu, otherwise in (
        ("precision", "fp32", "bf16"),
        ("steps", 3, 50),
        ("warmup_steps", 1, 10),
        ("split_steps", 1, 10),
        ("dataloader_num_workers", 0, min(16, cores)),
        ("threads", cores, cores),
        ("contenders", list(CONTENDERS), list(CONTENDERS)),
    ):
        if getattr(setting, name) is None:
            setattr(setting, name, otherwise if on_gpu else on_cpu)
    if setting.torch_compile:
        setting.split_steps = 0  # its hooks would be compiled into the networks
    if setting.precision == "fp16" and not on_gpu:
        raise UserError("--precision fp16 needs a GPU: take fp32 or bf16.")
    if setting.image_size % setting.patch_size:
        raise UserError(f"--patch_size {setting.patch_size} does not divide --image_size {setting.image_size}.")
    if not is_timm_architecture(setting.teacher):
        raise UserError(f"--teacher {setting.teacher}: timm has no such architecture.")
    if min(setting.steps, setting.warmup_steps, setting.repeats, setting.batch_size) < 1:
        raise UserError("--steps, --warmup_steps, --repeats and --batch_size are 1 or more.")


def data_arguments(setting: Setting) -> DataArguments:
    recipe = RECIPES[setting.recipe]
    return DataArguments(
        dataset_name=setting.dataset_name,
        **{name: recipe[name] for name in ("auto_augment", "random_erasing") if name in recipe},
    )


def mixing(setting: Setting) -> tuple[float, float]:
    """Alphas of mixup and CutMix."""
    recipe = RECIPES[setting.recipe]
    return recipe.get("mixup", MIXUP), recipe.get("cutmix", CUTMIX)


def training_arguments(setting: Setting, output_dir: str, **kwargs) -> TrainingArguments:
    """Those of a plain Trainer; ours are parsed from flags by train_hf.py."""
    return TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=setting.batch_size,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        fp16=setting.precision == "fp16",
        bf16=setting.precision == "bf16",
        use_cpu=setting.device == "cpu",
        torch_compile=setting.torch_compile,
        dataloader_num_workers=setting.dataloader_num_workers,
        dataloader_pin_memory=setting.device == "cuda",
        dataloader_drop_last=True,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **kwargs,
    )


def save_teacher(setting: Setting, data: ImageData, work_dir: str) -> str:
    """The teacher that all load: a fitted one is as fast as this one, which has random weights."""
    set_seed(0)
    processor = make_image_processor(data_arguments(setting), setting.image_size)
    folder = os.path.join(work_dir, "teacher")
    new_timm_classifier(setting.teacher, data.label_names, setting.image_size, processor).save_pretrained(folder)
    return folder


def run_process(contender: str, setting: Setting, teacher_folder: str, work_dir: str, split: bool) -> dict:
    """The report of a fresh process, or `{"failed": why}`."""
    report_file = Path(work_dir, "report.json")
    report_file.unlink(missing_ok=True)
    threads = str(setting.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    job = asdict(Job(contender, setting, teacher_folder, work_dir, time.time(), split))
    done = subprocess.run(
        [sys.executable, __file__, "--measure", json.dumps(job), str(report_file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode or not report_file.exists():
        lines = done.stdout.strip().splitlines()
        print("\n".join(lines[-30:]), file=sys.stderr)
        return {"failed": lines[-1][:200] if lines else f"exit code {done.returncode}"}
    return json.loads(report_file.read_text())


def dataset_title(data: ImageData) -> str:
    """Of a local folder its own name alone."""
    return Path(data.name).name if data.source == "local" else data.name


def summary(contender: str, reports: list[dict], failed: str | None) -> dict:
    """A row of the table: the spread over a contender's processes."""
    row = {"name": contender, "failed": failed}
    if failed:
        return row

    def over(name: str) -> dict | None:
        values = [report[name] for report in reports]
        return spread(values) if None not in values else None

    names = ("images_per_second", "step_ms", "startup_seconds", "peak_host_bytes", "peak_device_bytes")
    return row | {name: over(name) for name in names} | {"split_ms": reports[0]["split_ms"]}


def remarks(result: dict) -> list[str]:
    setting = result["setting"]
    lines = [
        f"{setting['warmup_steps']} warm-up and {setting['steps']} measured steps in each of {setting['repeats']} "
        "processes a contender, which take turns; median, and the smallest to the largest. "
        f"Threads: {setting['threads']}, loader workers: {setting['dataloader_num_workers']}. "
        f"The whole took {result['seconds']} s.",
        f"The parts of a step are from {setting['split_steps']} more of the first process: `data` until "
        "the first network starts (loading, augmenting, mixing, copying), `student` forward, loss and backward, "
        "`optimizer` clipping and step.",
        "Start-up: from the start of the process to the first batch, imports included, with the decoded images in "
        "`datasets`' cache. Peak host memory: of the main process.",
        f"Mode `both`, images of {setting['dataset_name']}, decoded in memory for all contenders, which favours those "
        "that would decode them image by image. The teacher's weights are random.",
        f"The seed's loop is its own setting: {SEED_IMAGE_SIZE}/{SEED_PATCH_SIZE}, resized image by image, no further "
        "augmentation, fp32, no workers, around this project's network; a third of the measured steps.",
        "The bare step is teacher, student, clipping and AdamW on one synthetic batch: the ceiling.",
    ]
    if result["host_bytes_by_epoch"]:
        megabytes = ", ".join(f"{value / 1e6:,.0f}" for value in result["host_bytes_by_epoch"])
        lines.append(
            f"Our trainer's resident host memory after each of {MEMORY_EPOCHS} epochs of {MEMORY_IMAGES} images, at "
            f"{MEMORY_IMAGE_SIZE}/{MEMORY_PATCH_SIZE}, batch {MEMORY_BATCH_SIZE}, evaluation included, in MB: "
            f"{megabytes}."
        )
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# One measurement
# ---------------------------------------------------------------------------------------------------------------------


def measure(job: Job) -> dict:
    """Runs one contender in this process; see [`StepClock.report`] for what it returns."""
    torch.set_num_threads(job.setting.threads)
    set_seed(0)
    if job.contender == MEMORY:
        return {"host_bytes_by_epoch": watch_memory(job)}
    clock = StepClock(job)
    CONTENDERS[job.contender](job, clock)
    return clock.report()


def host_bytes(field: str) -> int | None:
    """Memory of this process: `VmRSS` now, `VmHWM` at its peak. (`getrusage` has the parent's peak in it.)"""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


class StepClock:
    """
    Times the steps of a training loop, whoever runs it: first whole steps, undisturbed; then, if the job says so, the
    parts of some more steps, from hooks on the networks, on `backward` and on the optimizer.

    The loop calls `batch_ready` and `step_done`; the networks are named by `watch`.
    """

    def __init__(self, job: Job):
        self.job = job
        self.step = 0
        self.startup_seconds = self.began = self.seconds = None
        self.mark = 0.0
        self.split: dict[str, float] | None = None
        self.networks: dict[str, torch.nn.Module] = {}
        self.in_first_network = False
        self.undo: list[Callable[[], None]] = []

    def watch(self, student: torch.nn.Module, teacher: torch.nn.Module) -> None:
        self.networks = {"student": student, "teacher": teacher}

    def now(self) -> float:
        if self.job.setting.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def batch_ready(self) -> None:
        if self.startup_seconds is None:
            self.startup_seconds = time.time() - self.job.started
        self.in_first_network = True

    def step_done(self) -> bool:
        """Whether that was the last step."""
        self.step += 1
        setting = self.job.setting
        if self.step == setting.warmup_steps:
            self.began = self.now()
        elif self.step == setting.warmup_steps + self.job.measured_steps:
            self.seconds = self.now() - self.began
            self.peaks = self.memory()
            if self.job.split:
                self.start_split()
        elif self.split is not None:
            self.add("other")
        if self.step == self.job.steps:
            while self.undo:
                self.undo.pop()()
            return True
        return False

    def memory(self) -> dict[str, int | None]:
        on_gpu = self.job.setting.device == "cuda"
        return {
            "peak_host_bytes": host_bytes("VmHWM"),
            "peak_device_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        }

    def add(self, part: str) -> None:
        """The time since the last mark belongs to that part of the step."""
        now = self.now()
        self.split[part] += now - self.mark
        self.mark = now

    def start_split(self) -> None:
        self.split = dict.fromkeys(("data", "teacher", "student", "optimizer", "other"), 0.0)

        def network_starts(*_):
            if self.in_first_network:
                self.add("data")
                self.in_first_network = False

        for part, network in self.networks.items():
            starts = network.register_forward_pre_hook(network_starts)
            ends = network.register_forward_hook(lambda *_, part=part: self.add(part))
            self.undo += [starts.remove, ends.remove]
        self.undo.append(register_optimizer_step_post_hook(lambda *_: self.add("optimizer")).remove)
        original = torch.Tensor.backward

        def backward(*args, **kwargs):
            original(*args, **kwargs)
            self.add("student")

        torch.Tensor.backward = backward
        self.undo.append(lambda: setattr(torch.Tensor, "backward", original))
        self.mark = self.now()

    def report(self) -> dict:
        """Images a second, milliseconds a step, its parts, seconds to the first batch, peaks of memory in bytes."""
        setting = self.job.setting
        step_seconds = self.seconds / self.job.measured_steps
        split = self.split and {part: 1000 * total / setting.split_steps for part, total in self.split.items()}
        return {
            "images_per_second": setting.batch_size / step_seconds,
            "step_ms": 1000 * step_seconds,
            "startup_seconds": self.startup_seconds,
            "split_ms": split or None,
            **self.peaks,
        }


class ClockCallback(TrainerCallback):
    """A clock in a Trainer, which calls `on_step_begin` once it has the batch."""

    def __init__(self, clock: StepClock):
        self.clock = clock

    def on_step_begin(self, args, state, control, **kwargs):
        self.clock.batch_ready()

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.step_done()


class MemoryCallback(TrainerCallback):
    """Resident memory of the host after each epoch, in bytes."""

    def __init__(self):
        self.epochs: list[int] = []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epochs.append(host_bytes("VmRSS"))


def forever(loader) -> Iterator:
    while True:
        yield from loader


def autocast(setting: Setting) -> torch.autocast:
    dtype = torch.float16 if setting.precision == "fp16" else torch.bfloat16
    return torch.autocast(setting.device, dtype, enabled=setting.precision != "fp32")


def load_teacher(job: Job):
    return AutoModelForImageClassification.from_pretrained(job.teacher_folder).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Contenders
# ---------------------------------------------------------------------------------------------------------------------


def make_our_trainer(job: Job, augment_on: str, *more_flags: str) -> DistillationTrainer:
    """The trainer as train_hf.py puts it together, from its flags."""
    setting = job.setting
    flags = {
        "distill_mode": MODE.name,
        "dataset_name": setting.dataset_name,
        "image_size": setting.image_size,
        "patch_size": setting.patch_size,
        "drop_path_rate": DROP_PATH_RATE,
        "augment_on": augment_on,
        "repeated_augmentation": 1,  # timm has it for several processes only
        "teacher_model_name_or_path": job.teacher_folder,
        "output_dir": os.path.join(job.work_dir, "ours"),
        "per_device_train_batch_size": setting.batch_size,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "label_smoothing_factor": LABEL_SMOOTHING,
        "max_grad_norm": MAX_GRAD_NORM,
        "mixup": MIXUP,
        "cutmix": CUTMIX,
        "dataloader_num_workers": setting.dataloader_num_workers,
        "torch_compile": setting.torch_compile,
        "use_cpu": setting.device == "cpu",
        "fp16": setting.precision == "fp16",
        "bf16": setting.precision == "bf16",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **RECIPES[setting.recipe],
    }
    model_args, data_args, teacher_args, training_args = parse_arguments(
        [*(f"--{name}={value}" for name, value in flags.items()), *more_flags]
    )
    data = load_images(data_args, labels_needed=training_args.mode.needs_labels)
    image_processor = make_image_processor(data_args, model_args.image_size)
    train_images, augment = make_train_images(data.train, data_args, image_processor)
    student, _ = make_student(model_args, training_args.mode, data.label_names, image_processor)
    teacher, _, _ = prepare_teacher(teacher_args, data, data_args, training_args, image_processor)
    return DistillationTrainer(
        model=student,
        args=training_args,
        teacher=teacher,
        augment=augment,
        train_dataset=train_images,
        eval_dataset=EvalImages(data.evaluation, image_processor),
        processing_class=image_processor,
    )


def train_ours(job: Job, clock: StepClock, augment_on: str) -> None:
    trainer = make_our_trainer(job, augment_on, f"--max_steps={job.steps}", "--eval_strategy=no")
    clock.watch(trainer.model, trainer.teacher)
    trainer.add_callback(ClockCallback(clock))
    trainer.train()


def watch_memory(job: Job) -> list[int]:
    """Our trainer over several epochs of few images in large patches, evaluation and logging included."""
    job.setting.image_size, job.setting.patch_size = MEMORY_IMAGE_SIZE, MEMORY_PATCH_SIZE
    job.setting.batch_size = MEMORY_BATCH_SIZE
    callback = MemoryCallback()
    trainer = make_our_trainer(
        job,
        "loader",
        f"--num_train_epochs={MEMORY_EPOCHS}",
        f"--max_train_samples={MEMORY_IMAGES}",
        f"--max_eval_samples={MEMORY_BATCH_SIZE}",
    )
    trainer.add_callback(callback)
    trainer.train()
    return callback.epochs


def train_bare(job: Job, clock: StepClock) -> None:
    """The two networks as our trainer has them, on one synthetic batch: no data, no logging, nothing else."""
    setting, device = job.setting, torch.device(job.setting.device)
    data = load_images(data_arguments(setting))
    processor = make_image_processor(data_arguments(setting), setting.image_size)
    flags = [f"--image_size={setting.image_size}", f"--patch_size={setting.patch_size}"]
    flags += [f"--drop_path_rate={DROP_PATH_RATE}", f"--distill_mode={MODE.name}"]
    student, _ = make_student(parse_arguments(flags)[0], MODE, data.label_names, processor)
    student.to(device).train()
    normalisation = (list(processor.image_mean), list(processor.image_std))
    teacher = Teacher(load_teacher(job), setting.image_size, *normalisation, *normalisation)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(setting.precision, torch.float32)
    teacher.to(device, dtype)
    clock.watch(student, teacher)
    network = torch.compile(student) if setting.torch_compile else student
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    scaler = torch.amp.GradScaler(setting.device, enabled=setting.precision == "fp16")
    images = torch.randn(setting.batch_size, 3, setting.image_size, setting.image_size, device=device)
    labels = torch.randint(len(data.label_names), (setting.batch_size,), device=device)
    while True:
        clock.batch_ready()
        with autocast(setting):
            teacher_logits = teacher(images)
            outputs = network(pixel_values=images)
            loss = distillation_loss(
                MODE, outputs["class_logits"], outputs["distillation_logits"], labels, teacher_logits, LABEL_SMOOTHING
            ).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if clock.step_done():
            return


class PilImages(torch.utils.data.Dataset):
    """Rows of `datasets` as timm's and torchvision's have them: (image, label), with the attribute `transform`."""

    def __init__(self, dataset: Dataset, transform: Callable | None = None):
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self.dataset[index]
        return self.transform(read_image(row)), row["label"]


def train_timm(job: Job, clock: StepClock) -> None:
    """timm's loader, model, task, optimizer and loss scaler, in the loop of its train.py."""
    setting, device = job.setting, torch.device(job.setting.device)
    data_args = data_arguments(setting)
    data = load_images(data_args)
    num_labels = len(data.label_names)
    mixup, cutmix = mixing(setting)
    mixes = mixup > 0 or cutmix > 0
    collate = FastCollateMixup(mixup, cutmix, label_smoothing=LABEL_SMOOTHING, num_classes=num_labels)
    images = PilImages(data.train)
    loader = create_loader(
        images,
        input_size=(3, setting.image_size, setting.image_size),
        batch_size=setting.batch_size,
        is_training=True,
        re_prob=data_args.random_erasing,
        re_mode="pixel",
        hflip=data_args.horizontal_flip,
        color_jitter=None,
        auto_augment=None if data_args.auto_augment == "none" else data_args.auto_augment,
        interpolation="bicubic",
        num_workers=setting.dataloader_num_workers,
        collate_fn=collate if mixes else None,
        pin_memory=setting.device == "cuda",
        device=device,
    )
    if data_args.crop_at(setting.image_size) == "padded":  # as DeiT's code does, on what timm's factory has made
        crop = transforms.RandomCrop(setting.image_size, padding=setting.image_size // 8)
        resize = transforms.Resize((setting.image_size, setting.image_size), transforms.InterpolationMode.BICUBIC)
        images.transform.transforms[0] = transforms.Compose([resize, crop])
    student = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        num_classes=num_labels,
        img_size=setting.image_size,
        patch_size=setting.patch_size,
        drop_path_rate=DROP_PATH_RATE,
    )
    task = TokenDistillationTask(
        student.to(device),
        load_teacher(job).timm_model.to(device),
        criterion=SoftTargetCrossEntropy() if mixes else LabelSmoothingCrossEntropy(LABEL_SMOOTHING),
        distill_type="hard",
        task_loss_weight=1 - MODE.alpha,
        device=device,
    )
    clock.watch(student, task.teacher)
    optimizer = create_optimizer_v2(student, opt="adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    scaler = NativeScaler(device=setting.device) if setting.precision == "fp16" else None
    task.train()
    if setting.torch_compile:
        task.compile()
    for pixel_values, labels in forever(loader):
        clock.batch_ready()
        with autocast(setting):
            loss = task(pixel_values, labels)["loss"]
        if scaler is not None:
            scaler(loss, optimizer, clip_grad=MAX_GRAD_NORM, parameters=student.parameters())
        else:
            loss.backward()
            dispatch_clip_grad(student.parameters(), MAX_GRAD_NORM)
            optimizer.step()
        optimizer.zero_grad()
        if clock.step_done():
            return


class GuideTrainer(Trainer):
    """The trainer of transformers' guide "Knowledge Distillation for Computer Vision", with DeiT's two-headed loss."""

    def __init__(self, teacher_model, **kwargs):
        super().__init__(**kwargs)
        self.teacher = teacher_model.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixel_values, labels = inputs["pixel_values"], inputs["labels"]
        outputs = model(pixel_values=pixel_values)
        with torch.no_grad():
            teacher_labels = self.teacher(pixel_values=pixel_values).logits.argmax(dim=-1)
        label_loss = F.cross_entropy(outputs.cls_logits, labels, label_smoothing=LABEL_SMOOTHING)
        teacher_loss = F.cross_entropy(outputs.distillation_logits, teacher_labels)
        loss = (1 - MODE.alpha) * label_loss + MODE.alpha * teacher_loss
        return (loss, outputs) if return_outputs else loss


def train_transformers(job: Job, clock: StepClock) -> None:
    """transformers' DeiT in a plain Trainer, `datasets.with_transform` image by image, torchvision's mixing."""
    setting = job.setting
    data_args = data_arguments(setting)
    data = load_images(data_args)
    transform = make_train_transform(data_args, make_image_processor(data_args, setting.image_size))
    mixup, cutmix = mixing(setting)
    num_labels = len(data.label_names)
    mixes = [v2.MixUp(alpha=mixup, num_classes=num_labels)] if mixup > 0 else []
    mixes += [v2.CutMix(alpha=cutmix, num_classes=num_labels)] if cutmix > 0 else []
    mix = v2.RandomChoice(mixes) if mixes else None

    def preprocess(columns: dict) -> dict:
        rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
        return {"pixel_values": [transform(read_image(row)) for row in rows], "label": columns["label"]}

    def collate(samples: list[dict]) -> dict:
        pixel_values = torch.stack([sample["pixel_values"] for sample in samples])
        labels = torch.tensor([sample["label"] for sample in samples])
        if mix is not None:
            pixel_values, labels = mix(pixel_values, labels)
        return {"pixel_values": pixel_values, "labels": labels}

    student = DeiTForImageClassificationWithTeacher(
        DeiTConfig(
            hidden_size=192,
            num_hidden_layers=12,
            num_attention_heads=3,
            intermediate_size=768,
            image_size=setting.image_size,
            patch_size=setting.patch_size,
            **label_maps(data.label_names),
        )
    )
    trainer = GuideTrainer(
        teacher_model=load_teacher(job),
        model=student,
        args=training_arguments(
            setting, os.path.join(job.work_dir, "transformers"), max_steps=job.steps, logging_strategy="epoch"
        ),
        train_dataset=data.train.with_transform(preprocess),
        data_collator=collate,
    )
    clock.watch(student, trainer.teacher)
    trainer.add_callback(ClockCallback(clock))
    trainer.train()


def train_as_the_seed(job: Job, clock: StepClock) -> None:
    """A notebook's loop: 224x224, images transformed one by one in this process, fp32, the loss read every step."""
    setting, device = job.setting, torch.device(job.setting.device)
    data = load_images(data_arguments(setting))
    processor = make_image_processor(data_arguments(setting), SEED_IMAGE_SIZE)
    transform = transforms.Compose(
        [
            transforms.Resize((SEED_IMAGE_SIZE, SEED_IMAGE_SIZE)),
            transforms.ToTensor(),
            transforms.Normalize(processor.image_mean, processor.image_std),
        ]
    )
    loader = torch.utils.data.DataLoader(
        PilImages(data.train, transform), setting.batch_size, shuffle=True, num_workers=0, drop_last=True
    )
    flags = [f"--image_size={SEED_IMAGE_SIZE}", f"--patch_size={SEED_PATCH_SIZE}", f"--distill_mode={MODE.name}"]
    student, _ = make_student(parse_arguments(flags)[0], MODE, data.label_names, processor)
    student.to(device).train()
    teacher = load_teacher(job).timm_model.to(device)
    clock.watch(student, teacher)
    optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE)
    running_loss = 0.0
    for pixel_values, labels in forever(loader):
        clock.batch_ready()
        pixel_values, labels = pixel_values.to(device), labels.to(device)
        optimizer.zero_grad()
        outputs = student(pixel_values=pixel_values)
        with torch.no_grad():
            teacher_logits = teacher(pixel_values)
        loss = distillation_loss(
            MODE, outputs["class_logits"], outputs["distillation_logits"], labels, teacher_logits
        ).loss
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        if clock.step_done():
            return


CONTENDERS: dict[str, Callable[[Job, StepClock], None]] = {
    BARE: train_bare,
    OURS[0]: lambda job, clock: train_ours(job, clock, "loader"),
    OURS[1]: lambda job, clock: train_ours(job, clock, "device"),
    TIMM: train_timm,
    TRANSFORMERS: train_transformers,
    SEED: train_as_the_seed,
}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        described, report_file = json.loads(sys.argv[2]), sys.argv[3]
        Path(report_file).write_text(
            json.dumps(measure(Job(**described | {"setting": Setting(**described["setting"])})))
        )
        sys.exit()
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"throughput.py: error: {error}", file=sys.stderr)
        sys.exit(2)

"""How long the steps of a training loop take, and how much memory."""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback


PARTS = ("data", "teacher", "student", "optimizer", "other")  # of a step, in this order


def host_bytes(field: str) -> int | None:
    """This process's memory: `VmRSS` now, `VmHWM` at its peak. (`getrusage` includes the parent's peak.)"""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return None
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


@dataclass
class StepClock(TrainerCallback):
    """
    Times the steps of any training loop: first whole steps, undisturbed; then the parts of a few more, through hooks
    on the networks, on `backward` and on the optimizer.

    Call `watch` first. A Trainer takes the clock as a callback; a loop of its own takes its batches from `batches`.
    """

    device: str  # "cpu" or "cuda"
    batch_size: int
    started: float  # time.time() when the process was started
    warmup_steps: int = 0
    measured_steps: int = 0
    split_steps: int = 0  # whose parts are timed

    def __post_init__(self):
        self.steps = self.warmup_steps + self.measured_steps + self.split_steps
        self.step = 0
        self.startup_seconds: float | None = None
        self.split: dict[str, float] | None = None  # seconds of each part
        self.hooks = ExitStack()
        self.host_bytes_by_epoch: list[int] = []

    def watch(self, student: torch.nn.Module, teacher: torch.nn.Module) -> None:
        self.networks = {"student": student, "teacher": teacher}

    def batches(self, loader: Iterable) -> Iterator:
        """A batch for each step, from a loader that may have fewer."""
        while True:
            for batch in loader:
                self.on_step_begin()
                yield batch
                self.on_step_end()
                if self.step == self.steps:
                    return

    def on_step_begin(self, *_, **__):
        if self.startup_seconds is None:
            self.startup_seconds = time.time() - self.started

    def on_step_end(self, *_, **__):
        self.step += 1
        if self.split is not None:
            self.add("other")
        if self.step == self.warmup_steps:
            self.began = self.now()
        elif self.step == self.warmup_steps + self.measured_steps:
            self.seconds = self.now() - self.began
            self.peak_host_bytes = host_bytes("VmHWM")
            self.peak_device_bytes = torch.cuda.max_memory_reserved() if self.device == "cuda" else None
            if self.split_steps:
                self.start_split()
        if self.step == self.steps:
            self.hooks.close()

    def on_epoch_end(self, *_, **__):
        self.host_bytes_by_epoch.append(host_bytes("VmRSS"))

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def add(self, part: str) -> None:
        """Counts the time since the last mark towards that part of the step."""
        now = self.now()
        self.split[part] += now - self.mark
        self.mark = now

    def start_split(self) -> None:
        self.split = dict.fromkeys(PARTS, 0.0)
        handles = [register_optimizer_step_post_hook(lambda *_: self.add("optimizer"))]
        for part, network in self.networks.items():
            # Data is what comes before the first network: nothing lies between the two.
            handles.append(network.register_forward_pre_hook(lambda *_: self.add("data")))
            handles.append(network.register_forward_hook(lambda *_, part=part: self.add(part)))
        for handle in handles:
            self.hooks.callback(handle.remove)
        original = torch.Tensor.backward

        def backward(*args, **kwargs):
            original(*args, **kwargs)
            self.add("student")

        torch.Tensor.backward = backward
        self.hooks.callback(setattr, torch.Tensor, "backward", original)
        self.mark = self.now()

    def report(self) -> dict:
        """Images per second, milliseconds per step and per part, seconds to the first batch, peak memory in bytes."""
        step_seconds = self.seconds / self.measured_steps
        return {
            "images_per_second": self.batch_size / step_seconds,
            "step_ms": 1000 * step_seconds,
            "startup_seconds": self.startup_seconds,
            "split_ms": self.split and {part: 1000 * total / self.split_steps for part, total in self.split.items()},
            "peak_host_bytes": self.peak_host_bytes,
            "peak_device_bytes": self.peak_device_bytes,
        }

"""Measures how long the steps of a training loop take, and how much memory they use."""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback, TrainerControl


PARTS = ("data", "teacher", "student", "optimizer", "other")  # of a step, in this order


def host_bytes(field: str) -> int | None:
    """This process's memory: `VmRSS` now, `VmHWM` at its peak. (`getrusage` includes the parent's peak.)"""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return None
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


class Clock(TrainerCallback):
    """
    Watches any training loop, and says when it has seen enough. A Trainer uses it as a callback; any other loop gets
    each epoch's batches from `batches`, until `is_done`.
    """

    device: str  # "cpu" or "cuda"
    is_done = False

    def watch(self, student: torch.nn.Module, teacher: torch.nn.Module) -> None:
        """Must be called first."""
        self.networks = {"student": student, "teacher": teacher}

    def now(self) -> float:
        """Seconds, once the device has finished its pending work."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def batches(self, loader: Iterable) -> Iterator:
        """The batches of an epoch, or of as much of it as is watched."""
        arguments = (None, None, TrainerControl())  # as a Trainer calls its callbacks
        self.on_epoch_begin(*arguments)
        for batch in loader:
            self.on_step_begin(*arguments)
            yield batch
            self.on_step_end(*arguments)
            if self.is_done:
                return
        self.on_epoch_end(*arguments)


@dataclass
class StepClock(Clock):
    """
    Times the steps: first whole steps, undisturbed; then the parts of a few more, through hooks on the networks, on
    `backward` and on the optimizer. The time between two epochs counts towards the step after it.
    """

    device: str
    batch_size: int
    started: float  # time.time() at the start of the process
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

    @property
    def is_done(self) -> bool:
        return self.step == self.steps

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
        if self.is_done:
            self.hooks.close()

    def on_epoch_end(self, *_, **__):
        self.host_bytes_by_epoch.append(host_bytes("VmRSS"))

    def add(self, part: str) -> None:
        """Counts the time since the last mark towards this part of the step."""
        now = self.now()
        self.split[part] += now - self.mark
        self.mark = now

    def start_split(self) -> None:
        self.split = dict.fromkeys(PARTS, 0.0)
        handles = [register_optimizer_step_post_hook(lambda *_: self.add("optimizer"))]
        for part, network in self.networks.items():
            # Everything before the first network counts as data; nothing happens between the two networks.
            handles.append(network.register_forward_pre_hook(lambda *_: self.add("data")))
            handles.append(network.register_forward_hook(lambda *_, part=part: self.add(part)))
        for handle in handles:
            self.hooks.callback(handle.remove)
        original = torch.Tensor.backward

        def backward(*args, **kwargs):
            original(*args, **kwargs)
            self.add("student")

        self.hooks.enter_context(patch.object(torch.Tensor, "backward", backward))
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

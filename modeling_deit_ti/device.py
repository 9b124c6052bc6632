"""What suits the training device: precision, attention, memory, and copies that nothing waits for.

The device is queried, not timed, so that a resumed run makes the same choices.
"""

import contextlib
import ctypes
import os
import platform
from functools import cache
from pathlib import Path

import torch
from torch import nn


# By Trainer's and accelerate's names for mixed precision. Their name for float32 is "no".
HALF_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
PRECISION_NAMES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Eager attention keeps its matrix of probabilities for the backward pass. At 258 tokens it is still faster in
# bfloat16; longer sequences were not measured.
MAX_EAGER_TOKENS = 258


def automatic_precision(device: torch.device | str, network: nn.Module | None = None) -> str:
    """
    `"bf16"` on GPUs from compute capability 8.0 and on CPUs that are faster in it, `"fp16"` on older GPUs, else
    `"no"`, which is float32. On a CPU, a `network` with depthwise convolutions trains faster in float32
    (EfficientNet-Lite0 at 114 images/s, against 56 in bfloat16; with AMX, 224 against 123); frozen, it too is faster
    in bfloat16.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    is_fast = kind == "cpu" and cpu_is_fast_in_bfloat16() and (network is None or not has_depthwise(network))
    return "bf16" if is_fast else "no"


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """`torch.autocast` for `"fp16"`, `"bf16"` or `"no"`."""
    dtype = HALF_DTYPES.get(precision)
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None)


def cpu_is_fast_in_bfloat16() -> bool:
    """
    Whether matrix products are faster in bfloat16: with AMX, or with AVX512_BF16 on AMD's CPUs (GFLOP/s on two cores:
    AMX 2,600, in float32 280; Zen 5 790 and 206; Zen 4 250 and 105). Intel's AVX512_BF16 alone is slower (Emerald
    Rapids without AMX: 165 and 305). False if `ONEDNN_MAX_CPU_ISA` is set, which may hide the instructions from torch.
    """
    if "ONEDNN_MAX_CPU_ISA" in os.environ:
        return False
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and _is_amd())


def cpu_count() -> int:
    """The number of cores that this process may use: in a container, maybe not all. Only Linux can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@cache
def cpu_info() -> str:
    """What Linux says about the processors; empty on other systems."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _is_amd() -> bool:
    return "AuthenticAMD" in (cpu_info() or platform.processor())


def has_depthwise(network: nn.Module) -> bool:
    """Whether the network has convolutions that see a single channel each."""
    return any(isinstance(part, nn.Conv2d) and 1 < part.groups == part.in_channels for part in network.modules())


def teacher_dtype(precision: str) -> torch.dtype:
    """
    The dtype of a frozen teacher whose student trains in `precision`: the same, even with depthwise convolutions
    (EfficientNet-Lite0 at 64 px on two cores of a Zen 4: 1,370 to 1,750 images/s, in float32 700 to 840; on 5,000
    images it was right on 89.54%, in float32 on 89.66).
    """
    return HALF_DTYPES.get(precision, torch.float32)


def is_faster_in_eager_attention(device: torch.device | str, precision: str, num_tokens: int) -> bool:
    """
    Whether transformers' `attn_implementation="eager"` trains faster than torch's fused attention. On CPUs the fused
    one is slow in bfloat16, above all in the backward pass: a step at 32/4 takes 1.3 (Emerald Rapids) to 1.9 times as
    long (Zen 5). In float32 it is only slower on AMD's CPUs, by 7 to 14%.
    """
    on_cpu = torch.device(device).type == "cpu"
    return on_cpu and num_tokens <= MAX_EAGER_TOKENS and (precision == "bf16" or _is_amd())


def keep_freed_memory() -> None:
    """
    Makes glibc keep the memory of a step's activations for the next step. Otherwise it returns the memory, and the
    system zeroes it again: a step at 32/8, batch 128, took 1.14 times as long. Does nothing with another libc.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for large blocks
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


# ---- Copies ----


class HostCopy:
    """
    The values of a tensor, on their way to the CPU. A GPU copies them once it has computed them. On the CPU there is
    nothing to copy; any other device is waited for when the values are read.
    """

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._copied = tensor, None
        if tensor.is_cuda:
            self._tensor = tensor.to("cpu", non_blocking=True)  # into pinned memory
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def is_there(self) -> bool:
        """Whether a GPU has copied the values; always true on other devices."""
        return self._copied is None or self._copied.query()

    def read(self) -> torch.Tensor:
        """The values on the CPU, after waiting for them if necessary."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor.cpu()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device. With a GPU, nothing waits for the copy."""
    # From memory that is not pinned, the copy would wait until the GPU has finished everything before it.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

"""Copies between the CPU and a GPU that nothing waits for."""

import torch


class HostCopy:
    """
    The values of a tensor, on their way to the CPU. What a GPU computes it copies when it gets there. On the CPU there
    is nothing to copy; any other device is waited for when the values are read.
    """

    def __init__(self, tensor: torch.Tensor):
        self._tensor, self._copied = tensor, None
        if tensor.is_cuda:
            self._tensor = tensor.to("cpu", non_blocking=True)  # into pinned memory
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def is_there(self) -> bool:
        """Whether a GPU has copied the values; on other devices always true."""
        return self._copied is None or self._copied.query()

    def read(self) -> torch.Tensor:
        """The values on the CPU, waited for if they are not there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor.cpu()


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on the device; a GPU copies it when it gets there."""
    # Memory that is not pinned is copied when the GPU has done all the rest.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

"""Batch norms that share their statistics across processes, as if one process had all the images."""

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_batch_norms(network: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in network.modules())


def synchronise_batch_norms(network: nn.Module, device: torch.device) -> None:
    """
    Makes the network's batch norms share their statistics across processes in training. The names and values of its
    weights stay the same. All processes must have batches of the same size.
    """
    if device.type != "cpu":
        convert_sync_batchnorm(network)
        return
    # On the CPU, SyncBatchNorm works neither by itself nor in torch's DDP.
    for module in network.modules():
        if isinstance(module, BatchNormAct2d):
            module.__class__ = _CpuSyncBatchNormAct
        elif isinstance(module, _BatchNorm):
            module.__class__ = _CpuSyncBatchNorm


class _MeanOfProcesses(torch.autograd.Function):
    """
    The mean of a tensor over all processes. Its gradient is averaged, too, to be that of the sum of all losses, since
    whatever averages the gradients of the weights (DDP, FSDP, DeepSpeed) divides by the number of processes later.
    """

    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        total = values.contiguous().clone()
        distributed.all_reduce(total)
        return total / distributed.get_world_size()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _MeanOfProcesses.apply(gradient)


class _CpuSyncBatchNorm(_BatchNorm):
    """Replaces any of torch's batch norms. Like them, it computes in float32 if the input is in half precision."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Accepts any number of dimensions, since it may replace a 1D, 2D or 3D batch norm."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(input)
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [0, *range(2, values.ndim)]
        own_variance, own_mean = torch.var_mean(values, dims, correction=0, keepdim=True)
        mean = _MeanOfProcesses.apply(own_mean)
        variance = _MeanOfProcesses.apply(own_variance + (own_mean - mean) ** 2)
        if self.track_running_stats:
            count = values.numel() // values.shape[1] * distributed.get_world_size()
            self.num_batches_tracked += 1
            weight = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean.flatten(), weight)
                self.running_var.lerp_(variance.flatten() * count / (count - 1), weight)
        output = (values - mean) * (variance + self.eps).rsqrt()
        if self.affine:
            output = output * self.weight.view_as(mean) + self.bias.view_as(mean)
        return output.to(input.dtype)


class _CpuSyncBatchNormAct(_CpuSyncBatchNorm):
    """Replaces timm's `BatchNormAct2d`, which includes an activation."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(input)))

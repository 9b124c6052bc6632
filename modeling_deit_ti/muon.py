"""The optimizer of `--optim muon`: Muon for the matrices inside a network, AdamW for everything else."""

from collections import defaultdict
from collections.abc import Collection

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel, TimmWrapperForImageClassification, TrainingArguments

from .device import cpu_is_fast_in_bfloat16
from .errors import UserError


# What --optim_args may set, and the defaults: those of timm's Muon.
OPTIONS = {"momentum": 0.95, "ns_steps": 5, "adamw_lr_scale": 1.0}
# (a, b, c) of each Newton-Schulz step X <- a X + b (X X^T) X + c (X X^T)^2 X; further steps repeat the last. Chosen to
# converge fast (Cesista et al., "Squeezing 1-2% efficiency gains out of Muon", 2025); timm's default, "quintic".
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def muon_options(optim_args: str | None) -> dict[str, float]:
    """
    `OPTIONS`, updated from `--optim_args` (such as `momentum=0.9,adamw_lr_scale=2`).

    Raises:
        UserError: if an option is unknown, or a value is not a number or out of range.
    """
    options = dict(OPTIONS)
    for setting in (optim_args or "").replace(" ", "").split(","):
        name, _, value = setting.partition("=")
        if not setting:
            continue
        try:
            options[name] = type(OPTIONS[name])(value)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"--optim_args {optim_args}: {setting!r} is not a valid muon option; the options and their defaults "
                f"are {','.join(f'{name}={default}' for name, default in OPTIONS.items())}."
            ) from error
    for name, is_valid, requirement in (
        ("momentum", 0 <= options["momentum"] < 1, "at least 0 and below 1"),
        ("ns_steps", 1 <= options["ns_steps"] <= 100, "between 1 and 100"),
        ("adamw_lr_scale", 0 <= options["adamw_lr_scale"] < float("inf"), "finite and at least 0"),
    ):
        if not is_valid:
            raise UserError(f"--optim_args {name}={options[name]}: must be {requirement}.")
    return options


def make_muon(model: PreTrainedModel, decaying: Collection[str], args: TrainingArguments) -> "Muon":
    """
    The optimizer for a model.

    Args:
        model (`PreTrainedModel`): an image classifier.
        decaying (`Collection[str]`): names of the parameters that weight decay applies to.
        args ([`TrainingArguments`]): `learning_rate` is for the matrices; the other parameters use it times
            `adamw_lr_scale`, with `adam_beta1`, `adam_beta2` and `adam_epsilon`.
    """
    options, decaying = muon_options(args.optim_args), set(decaying)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = hidden_matrices(model, decaying)
    groups = [
        {
            "params": [named[name] for name in matrices],
            "weight_decay": args.weight_decay,
            "momentum": options["momentum"],
            "ns_steps": options["ns_steps"],
        }
    ]
    for weight_decay, names in ((args.weight_decay, decaying - set(matrices)), (0.0, named.keys() - decaying)):
        groups.append(
            {
                "params": [parameter for name, parameter in named.items() if name in names],
                "weight_decay": weight_decay,
                "lr": args.learning_rate * options["adamw_lr_scale"],
            }
        )
    betas, eps = (args.adam_beta1, args.adam_beta2), args.adam_epsilon
    # With a fused AdamW, the gradient scaler leaves it to the optimizer to skip steps in which fp16 overflows.
    return Muon(groups, lr=args.learning_rate, betas=betas, eps=eps, fused=args.mixed_precision != "fp16")


def hidden_matrices(model: PreTrainedModel, decaying: Collection[str]) -> list[str]:
    """
    Names of the parameters that Muon optimises: the linear layers and convolutions between the first one, which sees
    pixels, and the classifier's heads, which see labels. Depthwise convolutions are left out, since each of their
    filters is independent, and so are parameters without weight decay, such as tokens, positions and biases.
    """
    if isinstance(model, TimmWrapperForImageClassification):
        heads = model.timm_model.get_classifier()
        heads = heads if isinstance(heads, tuple | list | nn.ModuleList) else [heads]
        inside = {*model.timm_model.parameters()} - {weight for head in heads for weight in head.parameters()}
    else:
        inside = {*model.base_model.parameters()}
    matrices = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name in decaying and parameter in inside and parameter.requires_grad
    ]
    return [name for name in matrices[1:] if min(model.get_parameter(name).shape[:2]) > 1]


class Muon(torch.optim.AdamW):
    """
    AdamW, except for parameter groups with `momentum`: their parameters, matrices `(out, in)` or convolutions
    `(out, in, height, width)` viewed as matrices `(out, in * height * width)`, take the step of "Muon: An optimizer
    for hidden layers in neural networks" (Jordan et al., 2024), the orthogonalised running mean of their gradients. It
    is scaled to the size of AdamW's steps, by 0.2 sqrt(max(out, in)), so that both share learning rate and weight
    decay ("Muon is scalable for LLM training", Liu et al., 2025, section 2.2). Like timm's `Muon`, for all matrices of
    one shape at once.
    """

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if "momentum" in group:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict) -> None:
        by_shape = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape].append(parameter)
        for shape, parameters in by_shape.items():
            for parameter in parameters:
                if not self.state[parameter]:
                    # AdamW expects a step count when a state is loaded.
                    self.state[parameter] = {"step": torch.tensor(0.0), "momentum_buffer": torch.zeros_like(parameter)}
            means = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_add_([self.state[parameter]["step"] for parameter in parameters], 1)
            torch._foreach_lerp_(means, [parameter.grad for parameter in parameters], 1 - group["momentum"])
            updates = _orthogonal_updates(means, group["ns_steps"])
            rows, columns = shape[0], shape[1:].numel()
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)


def _orthogonal_updates(means: list[torch.Tensor], steps: int) -> list[torch.Tensor]:
    """Orthogonalises matrices or convolutions of one shape. If FSDP2 has sharded their rows, gathers them first."""
    matrices = torch.stack([mean.flatten(1) for mean in means])
    is_sharded = isinstance(matrices, DTensor)
    on_slow_cpu = matrices.device.type == "cpu" and not cpu_is_fast_in_bfloat16()
    dtype = torch.float32 if on_slow_cpu else torch.bfloat16
    updates = orthogonalize(matrices.full_tensor() if is_sharded else matrices, steps, dtype)
    updates = [update.reshape(mean.shape) for update, mean in zip(updates, means, strict=True)]
    if not is_sharded:
        return updates
    mesh = matrices.device_mesh
    return [
        DTensor.from_local(update, mesh, [Replicate()] * mesh.ndim).redistribute(mesh, mean.placements)
        for update, mean in zip(updates, means, strict=True)
    ]


def orthogonalize(matrices: torch.Tensor, steps: int, dtype: torch.dtype) -> torch.Tensor:
    """
    Roughly the nearest matrices with orthonormal rows or columns: a few Newton-Schulz steps in `dtype` bring all
    singular values close to 1.

    Args:
        matrices (`torch.Tensor` of shape `(B, M, N)`)
        steps (`int`): number of steps, usually 5.
        dtype (`torch.dtype`): float32 or bfloat16.

    Returns:
        `torch.Tensor` of the same shape and dtype as the matrices.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if is_tall else matrices).to(dtype)  # (B, rows, columns), no more rows than columns
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    coefficients = [*COEFFICIENTS, *[COEFFICIENTS[-1]] * (steps - len(COEFFICIENTS))][:steps]
    if x.shape[2] >= 2 * x.shape[1]:
        # Several steps are done on X X^T only, before the product of their factors is applied to X: for a DeiT-Ti, a
        # third fewer operations. Rounding errors grow with each step, so X X^T is computed anew after a few.
        at_once = 5 if dtype == torch.float32 else 3
        for start in range(0, steps, at_once):
            gram, factor, product = x @ x.mT, None, None
            for a, b, c in coefficients[start : start + at_once]:
                if factor is not None:  # of the previous step
                    gram = factor @ gram @ factor
                factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
                factor.diagonal(dim1=1, dim2=2).add_(a)
                product = factor if product is None else factor @ product
            x = product @ x
    else:
        for a, b, c in coefficients:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)

"""Ways to initialise a DeiT-Ti other than with the authors' small normal values: choices of a training run, not part
of the saved model's config."""

import torch
from torch import nn
from torch.nn import functional as F

from .modeling_deit_ti import DeiTTiForImageClassification


WHITENING_FLOOR = 0.01  # added to each component's variance, as a share of the pixels' variance


@torch.no_grad()
def start_from_sincos_positions(network: DeiTTiForImageClassification) -> None:
    """
    Initialises the position embeddings, which stay learnable, as sines and cosines of a patch's row and column. Those
    of the tokens start at zero, as in MoCo v3 and MAE: a token's own values already set it apart from the patches.
    """
    config, positions = network.config, network.deit_ti.embeddings.position_embeddings
    patches = sincos_positions(config.image_size // config.patch_size, config.hidden_size)
    positions.zero_()
    positions[0, len(config.tokens) :] = patches


def sincos_positions(side: int, width: int, temperature: float = 10_000.0) -> torch.Tensor:
    """
    Two-dimensional sine-cosine positions ("An empirical study of training self-supervised vision transformers", Chen
    et al., 2021, section 3; "Attention is all you need", Vaswani et al., 2017, section 3.5, for each axis).

    Args:
        side (`int`): rows and columns of the grid.
        width (`int`): a multiple of 4. Half of it encodes the column and half the row, each as sines, then cosines,
            with wavelengths from 2 pi to `temperature` times that.

    Returns:
        `torch.Tensor` of shape `(side * side, width)`, row by row, with root mean square 0.71.
    """
    frequencies = temperature ** (-torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies  # (side, width / 4)
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat((columns, rows), dim=1)


@torch.no_grad()
def start_from_whitened_patches(network: DeiTTiForImageClassification, images: torch.Tensor) -> None:
    """
    Initialises the patch projection to whiten: it maps the patches of `images` to their principal components, each
    divided by its standard deviation, so that edges weigh as much as the brightness that dominates the pixels. Like
    the first layer of "94% on CIFAR-10 in 3.29 seconds on a single GPU" (Jordan, 2024, section 3.2), but learnable.
    If a patch has fewer values than the network's width, a random orthogonal map spreads the components over it.

    Args:
        network ([`DeiTTiForImageClassification`])
        images (`torch.Tensor` of shape `(B, C, height, width)`): normalised, as the network expects them.
    """
    projection, width = network.deit_ti.embeddings.patch_projection, network.config.hidden_size
    patches = F.unfold(images, projection.kernel_size, stride=projection.stride).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(patches.T.cov())  # in ascending order
    rank = min(width, len(values))
    values, components = values[-rank:], vectors[:, -rank:].T
    # Components that hardly vary are mostly noise; without the floor, they would dominate.
    whitening = components / (values + WHITENING_FLOOR * patches.var()).sqrt()[:, None]
    if rank < width:
        whitening = (width / rank) ** 0.5 * nn.init.orthogonal_(torch.empty(width, rank)) @ whitening
    projection.weight.copy_(whitening.view_as(projection.weight))
    projection.bias.zero_()

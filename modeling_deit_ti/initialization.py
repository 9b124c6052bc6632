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


@torch.no_grad()
def start_from_mimetic_attention(network: DeiTTiForImageClassification) -> None:
    """
    Initialises attention as it looks in trained networks ("Mimetic initialization of self-attention layers", Trockman
    and Kolter, 2023, section 4): in each head, W_query W_key^T is close to 0.7 Z + 0.7 I; over all heads, W_value
    W_projection is close to 0.4 Z - 0.4 I. Each Z is a new square matrix of normal values with variance 1 / D, where D
    is the width.
    """
    width = network.config.hidden_size
    for layer in network.deit_ti.layers:
        attention = layer.attention
        query, key, value = attention.qkv.weight.view(3, width, width)
        for head in range(attention.num_heads):
            rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            left, right = _factors(0.7 * _noise(width) + 0.7 * torch.eye(width), attention.head_dim)
            query[rows], key[rows] = left.T, right.T
        left, right = _factors(0.4 * _noise(width) - 0.4 * torch.eye(width), width)
        value.copy_(left.T)
        attention.projection.weight.copy_(right)


def _noise(width: int) -> torch.Tensor:
    return torch.randn(width, width) * width**-0.5


def _factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(D, rank)` matrices L and R whose product L R^T is as close to the `(D, D)` matrix as that rank allows."""
    left, values, right = torch.linalg.svd(matrix)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, right[:rank].T * root

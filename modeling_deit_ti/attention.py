"""Where a network's learned tokens look: attention rollout, drawn over the picture that the network sees."""

import math

import matplotlib
import numpy as np
import torch
from PIL import Image as PILImage
from transformers import BaseImageProcessor, PreTrainedModel

from .interop.names import token_order
from .interop.student import TOKENS_AND_READOUT
from .modeling_deit_ti import DeiTTiForImageClassification


def learned_tokens(model: PreTrainedModel) -> list[str]:
    """The tokens before the patches, in order; empty unless it is a DeiT-Ti, or transformers' ViT or DeiT."""
    if isinstance(model, DeiTTiForImageClassification):
        return list(model.config.tokens)
    if type(model) not in TOKENS_AND_READOUT:
        return []
    # This project's exports put the token that is read out first; their config says which one that is.
    exported = hasattr(model.config, "tokens")
    return token_order(model.config) if exported else list(TOKENS_AND_READOUT[type(model)][0])


def attention_rollout(attentions: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """
    How much of each token at the input reaches each token at the output: "Quantifying attention flow in transformers"
    (Abnar & Zuidema, 2020), section 3. The residual connection counts for half; heads are averaged.

    Args:
        attentions (`tuple` of `torch.Tensor` of shape `(B, H, N, N)`): attention probabilities, first block first.

    Returns:
        `torch.Tensor` of shape `(B, N, N)`: row i is the share of each input token in output token i. Rows sum to 1.
    """
    identity = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    rollout = identity
    for attention in attentions:
        rollout = (attention.float().mean(dim=1) + identity) / 2 @ rollout
    return rollout


def attention_maps(attentions: tuple[torch.Tensor, ...], tokens: list[str]) -> dict[str, torch.Tensor]:
    """
    The rollout from each learned token to the patches of a square image, as shares of its total over all patches.

    Args:
        attentions: see [`attention_rollout`].
        tokens: those of [`learned_tokens`].

    Returns:
        `dict` of `torch.Tensor` of shape `(B, rows, columns)`: for each token a map that sums to 1.
    """
    to_patches = attention_rollout(attentions)[:, : len(tokens), len(tokens) :]  # (B, tokens, patches)
    side = math.isqrt(to_patches.shape[-1])
    shares = to_patches / to_patches.sum(dim=-1, keepdim=True)
    return dict(zip(tokens, shares.unflatten(-1, (side, side)).unbind(dim=1), strict=True))


# ---- Pictures ----


def network_view(image: PILImage.Image, image_processor: BaseImageProcessor, pixels: int = 384) -> PILImage.Image:
    """The part of an image that the network sees, at least `pixels` wide rather than at the network's input size."""
    crop = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else image_processor.size
    factor = math.ceil(pixels / min(dict(crop).values()))
    larger = {
        name: {edge: factor * length for edge, length in dict(size).items() if length is not None}
        for name in ("size", "crop_size")
        if (size := getattr(image_processor, name, None)) is not None
    }
    inputs = image_processor(images=image, **larger, do_rescale=False, do_normalize=False, return_tensors="np")
    pixel_values = np.asarray(inputs["pixel_values"][0])  # (3, height, width), from 0 to 255
    return PILImage.fromarray(np.uint8(pixel_values.clip(0, 255).round().transpose(1, 2, 0)))


def overlay(picture: PILImage.Image, values: torch.Tensor, colours: str) -> PILImage.Image:
    """
    One value from 0 to 1 per patch, `(rows, columns)`, as colours over a greyscale picture. Each patch stays one
    block, since attention is no finer.

    Args:
        colours (`str`): a colour map of matplotlib.
    """
    blocks = PILImage.fromarray(np.uint8(255 * matplotlib.colormaps[colours](values.cpu().numpy())[..., :3]))
    blocks = blocks.resize(picture.size, PILImage.Resampling.NEAREST)
    return PILImage.blend(picture.convert("L").convert("RGB"), blocks, 0.5)


def draw_attention(picture: PILImage.Image, maps: dict[str, torch.Tensor]) -> tuple[dict[str, PILImage.Image], str]:
    """
    Each token's map, `(rows, columns)`, over the picture, on one scale from the least attention (violet) to the most
    (yellow); with two tokens, also their difference. Also says in words how uneven they are.
    """
    uneven = {token: shares * shares.numel() for token, shares in maps.items()}  # 1: an even share
    low, high = min(map(torch.min, uneven.values())), max(map(torch.max, uneven.values()))
    pictures = {
        f"{token} token": overlay(picture, (shares - low) / (high - low).clamp(min=1e-6), "viridis")
        for token, shares in uneven.items()
    }
    words = f"A patch gets from {low:.2f} (violet) to {high:.2f} (yellow) times an even share of the attention."
    if len(uneven) == 2:
        first, second = uneven
        difference = uneven[first] - uneven[second]
        most = difference.abs().max().item()
        # Full colour means at least a tenth of an even share: less is next to nothing, and must look like it.
        pictures["difference"] = overlay(picture, difference / max(most, 0.1) / 2 + 0.5, "coolwarm")
        words += (
            f" The tokens are at most {max(most, 1e-4):.4f} even shares apart: red is where the {first} token looks "
            f"more, blue where the {second} token does."
        )
    return pictures, words

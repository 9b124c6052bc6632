"""Attention maps say which patches a token's output comes from, on the part of the picture that the network sees."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_predict import make_model
from transformers import DeiTConfig, DeiTForImageClassification, DeiTImageProcessor, ViTImageProcessor

from modeling_deit_ti.attention import (
    attention_maps,
    attention_rollout,
    draw_attention,
    learned_tokens,
    network_view,
    overlay,
)
from modeling_deit_ti.interop import to_transformers


def maps_of(model, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(pixel_values=pixel_values, output_attentions=True)
    return attention_maps(output.attentions, learned_tokens(model))


def test_rollout_follows_attention_through_the_blocks_with_half_in_the_residual():
    # Token 0 looks at 1 in the second block, and 1 looks at 2 in the first, each with one of two heads.
    first, second = (torch.eye(3).repeat(1, 2, 1, 1) for _ in range(2))
    first[0, 0, 1], second[0, 0, 0] = torch.tensor([0.0, 0, 1]), torch.tensor([0.0, 1, 0])
    expected = torch.tensor([[[3 / 4, 3 / 16, 1 / 16], [0, 3 / 4, 1 / 4], [0, 0, 1]]])
    torch.testing.assert_close(attention_rollout((first, second)), expected)


def test_maps_are_shares_of_the_patches_row_by_row():
    attention = torch.zeros(1, 1, 6, 6)
    attention[..., 0, :] = torch.tensor([0.5, 0.1, 0.4, 0, 0, 0])  # the class token: mostly itself, then top left
    attention[..., 1, :] = torch.tensor([0, 0, 0, 0.3, 0, 0.1])  # the distillation token: right, top and bottom
    maps = attention_maps((attention,), ["class", "distillation"])
    torch.testing.assert_close(maps["class"], torch.tensor([[[1.0, 0], [0, 0]]]))
    torch.testing.assert_close(maps["distillation"], torch.tensor([[[0, 0.75], [0, 0.25]]]))


@pytest.mark.parametrize(
    ("mode", "options"), [("both", {}), ("distill", {}), ("none", {}), ("distill", {"single_token": True})]
)
def test_exports_look_where_the_model_looks_whichever_token_comes_first(mode, options):
    model, pixel_values = make_model(mode, **options), torch.randn(2, 3, 32, 32)
    maps, exported = maps_of(model, pixel_values), maps_of(to_transformers(model), pixel_values)
    assert list(maps) == model.config.tokens
    assert maps.keys() == exported.keys()
    for token in maps:
        assert maps[token].shape == (2, 4, 4)
        torch.testing.assert_close(maps[token].sum((1, 2)), torch.ones(2))
        torch.testing.assert_close(exported[token], maps[token], atol=1e-5, rtol=0)


def test_a_deit_that_is_not_an_export_has_both_tokens():
    small = {"hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3}
    assert learned_tokens(DeiTForImageClassification(DeiTConfig(**small))) == ["class", "distillation"]


@pytest.mark.parametrize(
    "processor",
    [
        DeiTImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        DeiTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
        ViTImageProcessor(size={"height": 32, "width": 32}),
    ],
    ids=["the centre", "part of the centre", "everything, squashed"],
)
def test_network_view_is_what_the_processor_gives_the_network_but_larger(processor):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((128, 64), Image.Resampling.BICUBIC)
    seen = network_view(image, processor, 100)
    assert seen.size == (128, 128)
    network = processor(images=image, do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0]
    shrunk = np.asarray(seen.resize((32, 32), Image.Resampling.BOX), dtype=float).transpose(2, 0, 1)
    assert np.abs(shrunk - network).mean() < 6  # of 255
    assert np.corrcoef(shrunk.ravel(), network.ravel())[0, 1] > 0.98


def test_a_patch_with_more_attention_is_drawn_brighter_at_its_own_place():
    values = torch.zeros(4, 4)
    values[1, 2] = 1
    drawn = np.asarray(overlay(Image.new("RGB", (40, 40)), values, "viridis"), dtype=int).sum(-1)
    bright = drawn > drawn.min()
    expected = np.zeros((40, 40), dtype=bool)
    expected[10:20, 20:30] = True
    np.testing.assert_array_equal(bright, expected)


def test_similar_maps_have_a_grey_difference_and_the_text_says_how_similar():
    shares = torch.full((2, 2), 0.25)
    other = shares + torch.tensor([[1e-4, -1e-4], [0, 0]])
    pictures, words = draw_attention(Image.new("RGB", (8, 8)), {"class": shares, "distillation": other})
    assert list(pictures) == ["class token", "distillation token", "difference"]
    colours = np.asarray(pictures["difference"], dtype=int)
    assert np.ptp(colours, axis=-1).max() <= 4  # no hue
    assert "at most 0.0004 even shares apart" in words

"""How a network from scratch starts: the formulas, and that the command applies them only to such a network."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from building import TINY_CNN, arguments, image_processor
from torch.nn import functional as F

from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.arguments import ImageArguments
from modeling_deit_ti.classifiers import new_timm_classifier
from modeling_deit_ti.data import load_images
from modeling_deit_ti.data.inputs import EvalImages, make_image_processor, sample_images
from modeling_deit_ti.initialization import sincos_positions, start_from_whitened_patches
from modeling_deit_ti.runs import build_network, run_settings


@pytest.fixture(scope="module")
def digits():
    return load_images(ImageArguments("digits", max_train_samples=64, max_eval_samples=50))


def network(digits, folder, **flags):
    defaults = {"output_dir": folder, "dataset_name": "digits", "image_size": 32, "patch_size": 8}
    args = arguments(**defaults | flags)
    return build_network(args, digits)[0]


def positions_of(model) -> torch.Tensor:
    return model.deit_ti.embeddings.position_embeddings.detach()


def patches_weight_of(model) -> torch.Tensor:
    return model.deit_ti.embeddings.patch_projection.weight.detach()


# ---- Positions ----


def test_positions_are_sines_and_cosines_of_column_and_row():
    positions = sincos_positions(side=3, width=8).numpy()
    for row in range(3):
        for column in range(3):
            expected = [
                wave(place / 10_000 ** (index / 2))
                for place in (column, row)
                for wave in (math.sin, math.cos)
                for index in range(2)
            ]
            np.testing.assert_allclose(positions[3 * row + column], expected, atol=1e-6)


def test_positions_are_as_large_as_sines_and_closest_to_their_neighbours():
    positions = sincos_positions(side=8, width=192)
    assert positions.shape == (64, 192)
    assert positions.square().mean().sqrt().item() == pytest.approx(0.5**0.5, abs=1e-6)
    distances = torch.cdist(positions, positions)[27]  # row 3, column 3
    assert set(distances.argsort()[1:5].tolist()) == {19, 26, 28, 35}


@pytest.mark.parametrize(("mode", "tokens"), [("none", 1), ("both", 2)])
def test_new_deit_ti_starts_with_sincos_positions_and_zeros_for_its_tokens(digits, tmp_path, mode, tokens):
    positions = positions_of(network(digits, tmp_path, distill_mode=mode))
    assert positions[:, :tokens].count_nonzero() == 0
    assert torch.equal(positions[0, tokens:], sincos_positions(4, 192))


def test_only_the_positions_differ_and_normal_ones_are_as_before(digits, tmp_path):
    new = network(digits, tmp_path, distill_mode="both").state_dict()
    normal = network(digits, tmp_path, distill_mode="both", position_init="normal").state_dict()
    differing = [name for name in new if not torch.equal(new[name], normal[name])]
    assert differing == ["deit_ti.embeddings.position_embeddings"]
    assert normal[differing[0]].std().item() == pytest.approx(0.02, rel=0.05)


def test_network_started_from_another_keeps_its_positions_and_patches(digits, tmp_path):
    source = network(digits, tmp_path, position_init="normal")
    source.save_pretrained(tmp_path / "source")
    student = network(digits, tmp_path, model_name_or_path=tmp_path / "source", patch_init="whitening")
    assert torch.equal(positions_of(student), positions_of(source))
    assert torch.equal(patches_weight_of(student), patches_weight_of(source))


# ---- Patches ----


def patches_of(images, size: int) -> torch.Tensor:
    """`(patches, 3 size size)`, cut by reshaping."""
    count, channels, height, width = images.shape
    cut = images.reshape(count, channels, height // size, size, width // size, size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * size * size)


def network_for(size: int):
    return DeiTTiForImageClassification(DeiTTiConfig(image_size=16, patch_size=size))


def smooth_images() -> torch.Tensor:
    """Neighbouring pixels are alike, as in photos."""
    noise = torch.randn(400, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return F.avg_pool2d(noise, 3, stride=1, padding=1) + noise.mean(dim=(1, 2, 3), keepdim=True) * 10


def test_whitened_patches_vary_equally_in_all_large_components_and_are_uncorrelated():
    images, model = smooth_images(), network_for(8)
    start_from_whitened_patches(model, images)
    projection = model.deit_ti.embeddings.patch_projection
    seen = projection(images).detach().flatten(2).mT.flatten(0, 1)
    variances, pixels = torch.linalg.eigvalsh(patches_of(images, 8).T.cov()), patches_of(images, 8).var()
    expected = variances / (variances + 0.01 * pixels)
    torch.testing.assert_close(seen.T.cov(), torch.diag(expected), atol=4e-3, rtol=1e-3)
    assert 0.9 < expected.max() < 1 and expected.min() < 0.8  # not the noise
    assert projection.bias.count_nonzero() == 0


def test_large_patches_start_with_their_largest_components():
    images, model = smooth_images(), network_for(16)  # 768 values, 192 directions
    start_from_whitened_patches(model, images)
    weight = patches_weight_of(model).flatten(1)
    directions = F.normalize(weight, dim=1)
    torch.testing.assert_close(directions @ directions.T, torch.eye(192), atol=1e-4, rtol=0)
    covariance = patches_of(images, 16).T.cov()
    kept = (directions @ covariance @ directions.T).trace()
    torch.testing.assert_close(kept, torch.linalg.eigvalsh(covariance)[-192:].sum(), rtol=1e-3, atol=0)


def test_small_patches_keep_their_variance_in_more_directions_than_values():
    images, model = smooth_images(), network_for(4)  # 48 values, 192 directions
    start_from_whitened_patches(model, images)
    weight = patches_weight_of(model).flatten(1)
    seen = patches_of(images, 4) @ weight.T
    variances, pixels = torch.linalg.eigvalsh(patches_of(images, 4).T.cov()), patches_of(images, 4).var()
    expected = (variances / (variances + 0.01 * pixels)).mean()
    assert seen.var(dim=0).mean().item() == pytest.approx(expected.item(), rel=1e-3)
    assert torch.linalg.matrix_rank(weight) == 48


def test_only_the_patches_start_differently_and_from_the_training_images(digits, tmp_path):
    normal = network(digits, tmp_path, distill_mode="both").state_dict()
    args = arguments(output_dir=tmp_path, image_size=32, patch_size=8)
    whitened = network(digits, tmp_path, distill_mode="both", patch_init="whitening")
    state = whitened.state_dict()
    differing = [name for name in normal if not torch.equal(normal[name], state[name])]
    assert differing == ["deit_ti.embeddings.patch_projection.weight"]  # the bias starts at zero in both
    again = DeiTTiForImageClassification(whitened.config)
    images = EvalImages(digits.train, make_image_processor(args.model, args.augmentation))  # few enough to use all
    start_from_whitened_patches(again, images.__getitems__(range(64))["pixel_values"])
    torch.testing.assert_close(patches_weight_of(again), patches_weight_of(whitened))


@pytest.mark.parametrize("heights", [(8,), (7, 8)], ids=["one size", "several sizes"])
def test_images_without_labels_whiten_the_patches_too(digits, tmp_path, heights):
    def cut(row, index):
        height = heights[index % len(heights)]
        return {"height": height, "pixels": row["pixels"][: 3 * row["width"] * height]}

    labelled = digits.train.map(cut, with_indices=True)
    unlabelled = dataclasses.replace(digits, train=labelled.remove_columns("label"))
    whitened = network(unlabelled, tmp_path, distill_mode="distill", single_token=True, patch_init="whitening")
    args = arguments(output_dir=tmp_path, image_size=32, patch_size=8)
    images = EvalImages(labelled, make_image_processor(args.model, args.augmentation)).__getitems__(range(64))
    again = DeiTTiForImageClassification(whitened.config)
    start_from_whitened_patches(again, images["pixel_values"])
    assert torch.equal(patches_weight_of(again), patches_weight_of(whitened))


def test_stream_provides_its_first_images(tmp_path):
    whole, streamed = (
        load_images(ImageArguments("digits", streaming=streaming, max_eval_samples=50)) for streaming in (False, True)
    )
    args = arguments(output_dir=tmp_path, image_size=32, patch_size=8)
    processor = make_image_processor(args.model, args.augmentation)
    first = sample_images(streamed, processor, 100)
    torch.testing.assert_close(first, EvalImages(whole.train, processor).__getitems__(range(100))["pixel_values"])
    assert len(sample_images(streamed, processor, 5_000)) == len(whole.train)
    network(streamed, tmp_path, patch_init="whitening")


# ---- The command ----


def test_a_pretrained_cnn_sees_images_that_patches_would_not_fill(digits, tmp_path):
    cnn = new_timm_classifier(TINY_CNN, digits.label_names, 30, image_processor(30))
    cnn.save_pretrained(tmp_path / "cnn")
    flags = {"distill_mode": "none", "model_name_or_path": tmp_path / "cnn", "image_size": 30, "patch_size": 16}
    again = network(digits, tmp_path, **flags)
    state = again.state_dict()
    assert state and all(torch.equal(value, state[name]) for name, value in cnn.state_dict().items())


def test_only_a_new_deit_ti_records_its_initialisation(digits, tmp_path):
    args = arguments(output_dir=tmp_path, patch_init="whitening", distill_mode="hard")
    settings = run_settings(args, digits)
    assert (settings["patch_init"], settings["position_init"]) == ("whitening", "sincos")
    cnn = arguments(output_dir=tmp_path, model_name_or_path=TINY_CNN)
    assert not [name for name in (*run_settings(cnn, digits), *run_settings(args.fitting, digits)) if "_init" in name]

"""Batch augmentation does to each image what timm and Pillow do to a single one, whatever else is in the batch."""

import math
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as TF

from modeling_deit_ti.arguments import AugmentationArguments, ModelArguments
from modeling_deit_ti.data.augmentation import (
    GEOMETRIC,
    INCREASING_OPERATIONS,
    ORDER,
    PLAIN_OPERATIONS,
    BatchAugmentation,
    RandAugment,
    apply_operations,
    bicubic_weights,
    draw_crop_boxes,
    draw_erasing_boxes,
    draw_operations,
    erase,
    normal_quantiles,
    rand_augment,
    resize,
)
from modeling_deit_ti.data.inputs import make_image_processor
from modeling_deit_ti.data.randomness import mix_bits, random_uniform


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (124, 116, 104)  # MEAN as a colour, rounded: what timm shows beyond an image's edge
RECIPE = "rand-m9-mstd0.5-inc1"
BICUBIC = Image.Resampling.BICUBIC
CPU_AND_GPU = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def photos(size: int) -> torch.Tensor:
    """Parts of scikit-learn's two photos, noise, and flat or nearly flat images, `(32, 3, size, size)` uint8."""
    images = []
    for photo in load_sample_images().images:
        photo = Image.fromarray(photo)
        for i in range(12):
            side = 60 + 25 * i
            left, top = 20 * i, 5 * i
            box = (left, top, left + side, top + side)
            images.append(from_pil(photo.resize((size, size), BICUBIC, box=box)))
    noise = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flat = torch.tensor([0, 77, 255]).to(torch.uint8)[:, None, None, None].expand(3, 3, size, size)
    dim = torch.full((1, 3, size, size), 9, dtype=torch.uint8)
    dim[:, :, 0, 0] = torch.tensor([8, 9, 10], dtype=torch.uint8)  # two values, one value, two values
    return torch.cat([torch.stack(images), noise, flat, dim])


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return photos(32)


def augmentation(size: int = 32, **settings) -> BatchAugmentation:
    args = AugmentationArguments(**{"crop": "resized", **settings})
    return BatchAugmentation(args, make_image_processor(ModelArguments(image_size=size), args, MEAN, STD))


def equally_distributed(first: torch.Tensor, second: torch.Tensor) -> bool:
    """The two-sample Kolmogorov-Smirnov test at level 2e-5. The seeds are fixed, so it is never flaky."""
    first, second = first.sort().values.contiguous(), second.sort().values.contiguous()
    points = torch.cat([first, second])
    below = [torch.searchsorted(sample, points, right=True) / len(sample) for sample in (first, second)]
    return (below[0] - below[1]).abs().max() < 2.4 * math.sqrt(1 / len(first) + 1 / len(second))


def normalised(images: torch.Tensor) -> torch.Tensor:
    return torch.stack([TF.normalize(TF.to_tensor(to_pil(image)), MEAN, STD) for image in images])


# --- Random numbers --------------------------------------------------------------------------------------------------


def test_random_bits_are_splitmix64():
    golden = 0x9E3779B97F4A7C15
    states = torch.tensor([(golden * i + 2**63) % 2**64 - 2**63 for i in (1, 2)])
    # The first two numbers of the reference implementation with seed 0.
    assert mix_bits(states).tolist() == [0xE220A8397B1DCDAF - 2**64, 0x6E789E6AA1B965F4]


def test_neighbouring_seeds_give_independent_uniform_numbers():
    numbers = random_uniform(torch.arange(4000), 0, 10)
    assert numbers.min() >= 0 and numbers.max() < 1
    histogram = torch.histc(numbers.flatten(), bins=20, min=0, max=1) / numbers.numel()
    assert (histogram - 0.05).abs().max() < 5 * math.sqrt(0.05 * 0.95 / numbers.numel())
    of_seeds_and_draws = torch.cat([numbers[:-1, :5], numbers[1:, :5], numbers[:-1, 5:]], dim=1)
    correlation = torch.corrcoef(of_seeds_and_draws.T) - torch.eye(15)
    assert correlation.abs().max() < 5 / math.sqrt(3999)


def test_noise_has_the_quantiles_of_the_normal_distribution():
    normal = normal_quantiles()
    assert normal.mean().abs() < 1e-6
    assert normal.std().item() == pytest.approx(1, abs=1e-4)
    expected = [-1.95996, -0.67449, 0, 0.67449, 1.95996]
    found = torch.quantile(normal, torch.tensor([0.025, 0.25, 0.5, 0.75, 0.975])).tolist()
    assert found == pytest.approx(expected, abs=1e-3)


# --- Crop, resize, flip ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "size"), [(32, 32), (32, 48), (64, 20), (224, 32), (32, 224)])
def test_crop_and_resize_match_pillow(source, size):
    """Identical in 99 % of the pixels, else at most 2 levels off (Pillow rounds its weights to 22 bits, we to 15)."""
    images = photos(source)[::2, :, : source - 5].contiguous()  # height and width differ
    boxes = draw_crop_boxes(torch.arange(16), source - 5, source)
    flips = torch.arange(16) % 2 == 0
    expected = []
    for image, (top, left, height, width), flip in zip(images, boxes.long().tolist(), flips, strict=True):
        crop = to_pil(image).crop((left, top, left + width, top + height)).resize((size, size), BICUBIC)
        expected.append(from_pil(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop))
    difference = (resize(images, boxes, size, flips).int() - torch.stack(expected).int()).abs()
    assert difference.max() <= 2
    assert (difference > 0).float().mean() < 0.01


def test_a_crop_that_is_not_resized_is_exact(images):
    boxes = torch.tensor([[0, 0, 32, 32]]).expand(32, 4)
    assert torch.equal(resize(images, boxes, 32, torch.zeros(32, dtype=torch.bool)), images)


@pytest.mark.parametrize(("source", "size"), [(32, 32), (32, 224), (500, 32)])
def test_resizing_sums_exactly_so_the_order_of_summation_does_not_matter(source, size):
    boxes = draw_crop_boxes(torch.arange(64), source, source).float()
    weights = bicubic_weights(boxes[:, 1], boxes[:, 3], source, size, torch.zeros(64, dtype=torch.bool))
    assert torch.equal(weights * 2**15, (weights * 2**15).round())
    # Every partial sum of 8-bit pixels is a multiple of 2**-15 that fits into float32's 24 bits.
    assert weights.abs().sum(dim=-1).max() * 255 * 2**15 < 2**24
    assert (weights.sum(dim=-1) - 1).abs().max() < 0.4 / 255  # a flat area keeps its value


def test_crop_boxes_have_the_same_distribution_as_in_timm():
    ours = draw_crop_boxes(torch.arange(20000), 32, 40)
    random.seed(0)
    image, scale, ratio = Image.new("RGB", (40, 32)), (0.08, 1.0), (3 / 4, 4 / 3)
    timms = torch.tensor(
        [RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(20000)]
    ).double()
    top, left, height, width = ours.T
    assert ((top >= 0) & (left >= 0) & (top + height <= 32) & (left + width <= 40)).all()
    assert ((height * width) / (32 * 40)).mean().item() == pytest.approx(0.5, abs=0.05)
    for quantity in (
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 2] * box[:, 3],
        lambda box: torch.log(box[:, 3] / box[:, 2]),
    ):
        assert equally_distributed(quantity(ours), quantity(timms))


def test_a_very_elongated_image_is_cropped_at_its_centre_as_in_timm(monkeypatch):
    for height, width in ((20, 1000), (1000, 20)):
        boxes = draw_crop_boxes(torch.arange(200), height, width)
        monkeypatch.setattr(random, "uniform", lambda low, high: high)  # the largest area: never fits
        image = Image.new("RGB", (width, height))
        central = RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        monkeypatch.undo()
        assert boxes.tolist() == [list(central)] * 200


def test_padded_crop_matches_torchvision(images):
    seeds = torch.arange(32)
    found = augmentation(crop="padded", auto_augment="none", random_erasing=0.0)(images, seeds)
    padded = normalised(TF.pad(images, 4))
    offsets, flips = set(), 0
    for image, candidates in zip(found, padded, strict=True):
        matches = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(image.flip(-1) if flip else image, candidates[:, top : top + 32, left : left + 32])
        ]
        assert matches
        if len(matches) == 1:
            offsets.add(matches[0][:2])
            flips += matches[0][2]
    assert len(offsets) > 15
    assert 5 < flips < 25


def test_padded_crops_use_every_offset_equally_often():
    position = torch.arange(16 * 16).reshape(1, 1, 16, 16).to(torch.uint8).expand(8100, 3, 16, 16).clone()
    found = augmentation(16, crop="padded", horizontal_flip=0.0, auto_augment="none", random_erasing=0.0)(
        position, torch.arange(8100)
    )
    # The pixel at the centre of a crop is never padding, and shows where the crop was taken.
    centre = (found[:, 0, 8, 8] * STD[0] + MEAN[0]).mul(255).round().long()
    counts = torch.bincount(centre, minlength=256).reshape(16, 16)[6:11, 6:11]
    assert counts.sum() == 8100
    assert ((counts - 324).abs() < 5 * math.sqrt(324)).all()


def test_without_a_crop_the_whole_image_is_resized(images):
    found = augmentation(48, crop="none", horizontal_flip=0.0, auto_augment="none", random_erasing=0.0)(
        images, torch.arange(32)
    )
    expected = normalised(torch.stack([from_pil(to_pil(image).resize((48, 48), BICUBIC)) for image in images]))
    assert (found - expected).abs().max() < 2.01 / 255 / min(STD)
    assert (found - expected).abs().mean() < 1e-3


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_images_are_flipped_with_the_given_probability(images, probability):
    image = images[:1].expand(4000, 3, 32, 32)
    found = augmentation(crop="none", horizontal_flip=probability, auto_augment="none", random_erasing=0.0)(
        image, torch.arange(4000)
    )
    flipped = (found == normalised(images[:1].flip(-1))).flatten(1).all(dim=1)
    straight = (found == normalised(images[:1])).flatten(1).all(dim=1)
    assert (flipped ^ straight).all()
    assert flipped.double().mean().item() == pytest.approx(probability, abs=0.03)


def test_normalisation_matches_torchvision_exactly(images):
    found = augmentation(crop="none", horizontal_flip=0.0, auto_augment="none", random_erasing=0.0)(
        images, torch.arange(32)
    )
    assert torch.equal(found, normalised(images))


# --- RandAugment -----------------------------------------------------------------------------------------------------


OPERATIONS = list(INCREASING_OPERATIONS | PLAIN_OPERATIONS)


def test_rand_augment_has_the_same_operations_as_timm():
    for config, operations in (("rand-inc1", INCREASING_OPERATIONS), ("rand-inc0", PLAIN_OPERATIONS)):
        timms = [op.name for op in rand_augment_transform(config, {"img_mean": FILL}).ops]
        assert sorted(operations) == sorted(timms)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_matches_timm(images, name):
    """Pixel-wise ones exactly; geometric ones up to 1 level in 1 of 1000 pixels (positions are float32 here)."""
    arguments = timm_arguments(name, magnitudes=np.linspace(0, 10, len(images)))
    expected = torch.stack(
        [
            from_pil(NAME_TO_OP[name](to_pil(image), *argument, fillcolor=FILL, resample=BICUBIC))
            for image, argument in zip(images, arguments, strict=True)
        ]
    )
    argument = torch.tensor([argument[0] if argument else 0.0 for argument in arguments], dtype=torch.float64)
    counts = [len(images) if other == name.removesuffix("Increasing") else 0 for other in ORDER]
    found, fill = images.clone(), torch.tensor(FILL, dtype=torch.uint8)[:, None, None]
    apply_operations(found, counts, argument[:, None, None, None], fill)
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= (1 if name in GEOMETRIC else 0)
    assert (difference > 0).float().mean() < 1e-3


def timm_arguments(name: str, magnitudes) -> list[tuple]:
    random.seed(0)
    rule = LEVEL_TO_ARG[name]
    return [rule(magnitude, {}) if rule else () for magnitude in magnitudes]


@pytest.mark.parametrize("increasing", [0, 1])
@pytest.mark.parametrize("magnitude", [0, 1, 3, 5, 9, 10])
def test_magnitude_becomes_the_same_argument_as_in_timm(magnitude, increasing):
    settings = RandAugment.from_string(f"rand-m{magnitude}-p1-inc{increasing}")
    chosen, arguments = draw_operations(settings, torch.arange(1000))
    for place, (name, operation) in enumerate(settings.operations.items()):
        found = arguments[chosen == place].unique().tolist()
        if operation.step:
            expected = sorted({argument for (argument,) in timm_arguments(name, [magnitude] * 50)})
            assert found == pytest.approx(expected, abs=1e-12), name


def timm_draws(config: str, count: int) -> list[tuple[str, tuple]]:
    """The names and arguments of the operations that timm's RandAugment applies to `count` images."""
    augment = rand_augment_transform(config, {"img_mean": FILL, "interpolation": BICUBIC})
    applied = []
    for op in augment.ops:
        op.aug_fn = lambda image, *arguments, name=op.name, **_: applied.append((name, arguments))
    random.seed(0)
    np.random.seed(0)
    for _ in range(count):
        augment(None)
    return applied


@pytest.mark.parametrize("config", [RECIPE, "rand-m7-n3-p0.8-mstd101-inc0", "rand-m9-mstd2-mmax8-inc1"])
def test_operations_and_magnitudes_have_the_same_distribution_as_in_timm(config):
    settings = RandAugment.from_string(config)
    count = 10000
    chosen, arguments = draw_operations(settings, torch.arange(count))
    applied = timm_draws(config, count)
    total = count * settings.layers
    for place, (name, operation) in enumerate(settings.operations.items()):
        ours = arguments[chosen == place]
        timms = [drawn for drawn_name, drawn in applied if drawn_name == name]
        share = settings.probability / 15
        for number in (len(ours), len(timms)):
            assert abs(number - total * share) < 4.5 * math.sqrt(total * share * (1 - share)), name
        if operation.step:
            timms = torch.tensor([drawn[0] for drawn in timms], dtype=torch.float64)
            assert equally_distributed(ours, timms), name
    # The layers are independent.
    both = (chosen[:, :2] < 15).all(dim=1).double().mean().item()
    assert both == pytest.approx(settings.probability**2, abs=0.015)
    same = (chosen[:, 0] == chosen[:, 1])[(chosen[:, :2] < 15).all(dim=1)].double().mean().item()
    assert same == pytest.approx(1 / 15, abs=0.015)  # with replacement


@pytest.mark.parametrize(
    "config",
    ["rand", RECIPE, "rand-m9-n3-mstd0.5", "rand-inc1-p0.25-m3", "rand-mstd1000-mmax15-inc0", "rand-m9-mmax0"],
)
def test_configuration_is_parsed_as_in_timm(config):
    settings = RandAugment.from_string(config)
    timms = rand_augment_transform(config, {"img_mean": FILL})
    assert settings.layers == timms.num_layers
    assert sorted(settings.operations) == sorted(op.name for op in timms.ops)
    op = timms.ops[0]
    assert (settings.magnitude, settings.probability) == (op.magnitude, op.prob)
    assert settings.magnitude_max == (op.magnitude_max or 10)
    assert settings.magnitude_std == op.magnitude_std


@pytest.mark.parametrize(
    "config",
    ["original-mstd0.5", "rand-m9-tweights-inc1", "rand-m9-w0", "rand-m9.5", "rand-m", "rand--m9"],
)
def test_the_error_for_an_unsupported_configuration_quotes_it(config):
    with pytest.raises(ValueError, match=f"auto_augment='{re.escape(config)}': only RandAugment"):
        augmentation(auto_augment=config)


# --- Random erasing --------------------------------------------------------------------------------------------------


def test_erasing_fills_the_box_with_normal_noise_and_changes_nothing_else():
    images = torch.full((6, 3, 40, 40), 7.0)
    boxes = torch.tensor([[0, 0, 40, 39], [3, 5, 1, 1], [10, 0, 30, 40], [1, 2, 3, 4], [39, 39, 1, 1], [0, 7, 39, 30]])
    erased = torch.tensor([True, True, True, False, True, True])
    erase(images, boxes.double(), erased, torch.arange(6), normal_quantiles())
    expected = torch.zeros(6, 40, 40, dtype=torch.bool)
    for mask, (top, left, height, width), erase_it in zip(expected, boxes.tolist(), erased.tolist(), strict=True):
        mask[top : top + height, left : left + width] = erase_it
    assert torch.equal(images != 7.0, expected[:, None].expand(6, 3, 40, 40))
    noise = images[images != 7.0]
    assert noise.mean().abs() < 5 / math.sqrt(len(noise))
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    channels = images[0, :, :, :39].flatten(1)
    correlation = torch.corrcoef(torch.cat([channels, channels.roll(1, dims=1)])) - torch.eye(6)
    assert correlation.abs().max() < 5 / math.sqrt(channels.shape[1])


def test_erased_boxes_have_the_same_distribution_as_in_timm():
    count, size = 5000, 32
    boxes, erased = draw_erasing_boxes(torch.arange(count), size, 0.25)
    assert erased.double().mean().item() == pytest.approx(0.25, abs=0.025)
    always, _ = draw_erasing_boxes(torch.arange(count), size, 1.0)
    assert torch.equal(always, boxes)

    timms, erasing = [], RandomErasing(1.0, mode="const", max_count=1, device="cpu")
    random.seed(0)
    ones = torch.ones(1, size, size)
    for _ in range(count):
        image = erasing(ones.clone())[0] == 0
        rows, columns = image.any(dim=1).nonzero(), image.any(dim=0).nonzero()
        timms.append([rows[0].item(), columns[0].item(), len(rows), len(columns)])
    timms = torch.tensor(timms).double()
    for quantity in (
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 2] * box[:, 3],
        lambda box: torch.log(box[:, 3] / box[:, 2]),
    ):
        assert equally_distributed(quantity(boxes), quantity(timms))


def test_erasing_comes_after_normalisation(images):
    clean = augmentation(auto_augment="none", random_erasing=0.0)(images, torch.arange(32))
    found = augmentation(auto_augment="none", random_erasing=1.0)(images, torch.arange(32))
    boxes, _ = draw_erasing_boxes(torch.arange(32), 32, 1.0)
    inside = torch.zeros(32, 1, 32, 32, dtype=torch.bool)
    for mask, (top, left, height, width) in zip(inside, boxes.long().tolist(), strict=True):
        mask[:, top : top + height, left : left + width] = True
    assert torch.equal(found[~inside.expand_as(found)], clean[~inside.expand_as(found)])
    noise = found[inside.expand_as(found)]
    assert noise.mean().abs() < 0.05
    assert noise.std().item() == pytest.approx(1, abs=0.05)


# --- All of it -------------------------------------------------------------------------------------------------------


def test_a_batch_matches_timms_images_for_the_same_parameters(images):
    """With the same boxes, flips, operations and magnitudes, in the same order, 99 % of the pixels are identical."""
    seeds = torch.arange(100, 132)
    found = augmentation(48, random_erasing=0.0)(images, seeds)
    settings = RandAugment.from_string(RECIPE)
    chosen, arguments = draw_operations(settings, seeds)
    flips = random_uniform(seeds, 1, 1)[:, 0] < 0.5
    names, expected = list(settings.operations), []
    for i, (top, left, height, width) in enumerate(draw_crop_boxes(seeds, 32, 32).long().tolist()):
        image = TF.resized_crop(to_pil(images[i]), top, left, height, width, [48, 48], TF.InterpolationMode.BICUBIC)
        image = TF.hflip(image) if flips[i] else image
        for place, argument in zip(chosen[i].tolist(), arguments[i].tolist(), strict=True):
            if place < len(names):
                operation = settings.operations[names[place]]
                argument = (int(argument) if operation.whole else argument,) if operation.step else ()
                image = NAME_TO_OP[names[place]](image, *argument, fillcolor=FILL, resample=BICUBIC)
        expected.append(from_pil(image))
    difference = (found - normalised(torch.stack(expected))).abs()
    assert (difference > 0).float().mean() < 0.01
    assert difference.mean() < 1e-3
    assert (chosen < len(names)).float().mean() == pytest.approx(0.5, abs=0.15)


def test_the_mean_augmented_image_matches_timms(images):
    transform = create_transform(
        32,
        is_training=True,
        color_jitter=None,
        auto_augment=RECIPE,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        re_prob=0.25,
        re_mode="pixel",
    )
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    count = 600
    timms = torch.stack([transform(to_pil(images[3])) for _ in range(count)])
    ours = augmentation()(images[3:4].expand(count, 3, 32, 32), torch.arange(count))
    spread = timms.std(dim=0)
    # Each sample's mean has a standard error of spread / sqrt(count) per pixel; 3072 pixels are compared.
    assert ((ours.mean(dim=0) - timms.mean(dim=0)).abs() / (spread * math.sqrt(2 / count))).max() < 5.5
    assert (ours.std(dim=0) / spread - 1).abs().mean() < 0.05


@pytest.mark.parametrize(("crop", "size"), [("resized", 32), ("resized", 48), ("padded", 32), ("none", 48)])
def test_an_image_does_not_depend_on_its_batch(images, crop, size):
    augment = augmentation(size, crop=crop)
    seeds = torch.arange(32) * 11
    together = augment(images, seeds)
    assert torch.equal(augment(images, seeds), together)
    assert torch.equal(augment(images.flip(0), seeds.flip(0)).flip(0), together)
    for parts in (1, 7):
        split = [augment(*part) for part in zip(images.split(parts), seeds.split(parts), strict=True)]
        assert torch.equal(torch.cat(split), together), parts


class CountKernels(TorchDispatchMode):
    """Counts the operations that are not just views: on a GPU, each of them launches a kernel."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_larger_batch_launches_no_more_kernels(images):
    """About 240 of these operations draw the parameters; those stay on the CPU."""
    counts = []
    for repeats in (4, 8):
        batch = images.repeat(repeats, 1, 1, 1)
        with CountKernels() as kernels:
            augmentation()(batch, torch.arange(len(batch)))
        counts.append(kernels.count)
    assert counts[0] == counts[1] < 720


def test_augmentation_depends_only_on_the_seed(images):
    augment = augmentation()
    image = images[6:7].expand(50, 3, 32, 32)
    torch.manual_seed(1)
    first = augment(image, torch.arange(50))
    torch.manual_seed(2)
    random.seed(2)
    assert torch.equal(augment(image, torch.arange(50)), first)
    assert len({bytes(result.numpy().tobytes()) for result in first}) == 50
    assert not (augment(image, torch.arange(50) + 50) == first).flatten(1).all(dim=1).any()


def test_turning_one_augmentation_off_leaves_the_others_unchanged(images):
    seeds = torch.arange(32)
    full = augmentation(random_erasing=0.0)(images, seeds)
    erased = augmentation(random_erasing=1.0)(images, seeds)
    assert (full == erased).float().mean() > 0.6  # at most a third of an image is erased
    plain = augmentation(random_erasing=0.0, auto_augment="none")(images, seeds)
    untouched = (draw_operations(RandAugment.from_string(RECIPE), seeds)[0] == 15).all(dim=1)
    assert torch.equal(full[untouched], plain[untouched])
    assert untouched.sum() > 3


@pytest.mark.parametrize("device", CPU_AND_GPU)
def test_every_device_gives_the_same_image_even_under_autocast(images, device):
    augment, seeds = augmentation(48), torch.arange(32)
    expected = augment(images, seeds)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = augment(images.to(device), seeds)
    assert found.dtype == torch.float32
    assert found.device.type == device
    assert ((found.cpu() - expected).abs() > 1e-5).float().mean() < (0.001 if device == "cuda" else 1e-12)


def test_resizing_is_exact_whatever_the_matmul_precision(images, monkeypatch):
    matmul, bmm, used = torch.backends.cuda.matmul, torch.bmm, []
    monkeypatch.setattr(torch, "bmm", lambda *args: used.append(matmul.fp32_precision) or bmm(*args))
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        augmentation(48)(images, torch.arange(len(images)))
        assert used == ["ieee", "ieee"] and matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_the_input_is_not_modified(images):
    before = images.clone()
    for crop in ("resized", "padded", "none"):
        augmentation(crop=crop)(images, torch.arange(32))
    assert torch.equal(images, before)


def test_rand_augment_leaves_images_without_drawn_operations_unchanged(images):
    found = rand_augment(images.clone(), RandAugment.from_string("rand-p0"), torch.arange(32), torch.zeros(3, 1, 1))
    assert torch.equal(found, images)

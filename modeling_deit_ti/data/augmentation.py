"""Training augmentation of whole uint8 batches, on the training device.

The recipe is DeiT's, as timm's `create_transform(is_training=True, interpolation="bicubic", re_mode="pixel")` builds
it for one PIL image. Here every step takes a batch `(B, 3, H, W)` and one set of parameters per image, so that the
whole recipe launches about 400 kernels for any number of images.

- Everything random about an image is a function of its seed alone (see randomness.py).
- The parameters are drawn on the CPU, which therefore knows which images an operation applies to. The pixels never
  leave their device, and nothing waits for it.
- The arithmetic is Pillow's: the same integer rounding, the same filters. tests/test_augmentation.py compares every
  step with the timm and Pillow code that it replaces.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data.auto_augment import rand_augment_transform
from transformers import DeiTImageProcessor

from ..arguments import AugmentationArguments
from .randomness import (
    CROP_STREAM,
    ERASING_STREAM,
    FLIP_STREAM,
    NOISE_STREAM,
    RAND_AUGMENT_STREAM,
    mix_bits,
    random_bits,
    random_uniform,
)


ATTEMPTS = 10  # timm's crop and its erasing both draw up to ten boxes and take the first that fits


def normal_quantiles() -> torch.Tensor:
    """The standard normal distribution as 65536 equally likely values (float32, at most 4.3 from 0).

    Picking one with 16 random bits needs no logarithm or cosine, which CPU and GPU round differently.
    """
    return torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16).float()


# ---- Crop, resize, flip ----


def draw_boxes(
    uniform: torch.Tensor, height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], margin: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image's first random box, rounded as in timm, that is at least `margin` pixels smaller than the image.

    Args:
        uniform: `(B, ATTEMPTS, 4)`, random numbers in [0, 1); height, width: of the images, in pixels.
        area, ratio: ranges of the box's share of the image and of its width / height (log-uniform).

    Returns:
        Boxes (top, left, height, width) in pixels, `(B, 4)` float64, and whether they fit, `(B,)`.
    """
    target_area = (area[0] + (area[1] - area[0]) * uniform[..., 0]) * (height * width)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = torch.exp(low + (high - low) * uniform[..., 1])
    box_width = torch.sqrt(target_area * ratios).round()
    box_height = torch.sqrt(target_area / ratios).round()
    top = torch.floor(uniform[..., 2] * (height - box_height + 1))
    left = torch.floor(uniform[..., 3] * (width - box_width + 1))
    fits = (box_height <= height - margin) & (box_width <= width - margin)
    first = fits.int().argmax(dim=1)
    boxes = torch.stack((top, left, box_height, box_width), dim=-1)
    return boxes[torch.arange(len(boxes)), first], fits.any(dim=1)


def draw_crop_boxes(seeds: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """timm's `RandomResizedCropAndInterpolation.get_params`: (top, left, height, width) in pixels, `(B, 4)`."""
    smallest, largest = 3 / 4, 4 / 3
    uniform = random_uniform(seeds, CROP_STREAM, ATTEMPTS, 4)
    boxes, fits = draw_boxes(uniform, height, width, area=(0.08, 1.0), ratio=(smallest, largest), margin=0)
    # If none of the ten boxes fits (in a very elongated image), take the largest central part within the ratios.
    box_width, box_height = min(width, round(height * largest)), min(height, round(width / smallest))
    central = [(height - box_height) // 2, (width - box_width) // 2, box_height, box_width]
    return torch.where(fits[:, None], boxes, torch.tensor(central).double())


def bicubic_weights(
    starts: torch.Tensor, extents: torch.Tensor, length: int, size: int, flips: torch.Tensor
) -> torch.Tensor:
    """Pillow's antialiased bicubic resize along one axis, as one matrix per image: `(B, size, length)`.

    Pixels `starts` to `starts + extents` (both `(B,)`) of an axis of `length` become `size` pixels, in reverse order
    where `flips` `(B,)` is set. As in Pillow's `Resample.c`, the filter widens when it shrinks an image, and pixels
    outside the box have no weight: a crop never sees its surroundings.
    """
    starts, extents = starts.float()[:, None, None], extents.float()[:, None, None]
    outputs = torch.arange(size, device=starts.device, dtype=torch.float32)[None, :, None]
    outputs = torch.where(flips[:, None, None], size - 1 - outputs, outputs)
    scale = extents / size
    inputs = torch.arange(length, device=starts.device, dtype=torch.float32)[None, None, :] + 0.5
    distance = (inputs - (starts + (outputs + 0.5) * scale)).div_(scale.clamp(min=1)).abs_()  # (B, size, length)
    # Keys' cubic, a = -1/2: one polynomial up to distance 1, another from 1 to 2. Both are 0 at 1, the second also at
    # 2, so with clamped distances their sum is the cubic.
    near, far = distance.clamp(max=1), distance.clamp_(1, 2)
    weights = (near * 1.5).sub_(2.5).mul_(near).mul_(near).add_(1)
    weights += (far * -0.5).add_(2.5).mul_(far).sub_(4).mul_(far).add_(2)
    weights *= (inputs > starts) & (inputs < starts + extents)
    weights /= weights.sum(dim=-1, keepdim=True)
    # Fixed point, as in Pillow, but with 15 bits: products with 8-bit pixels add up exactly in float32, so the result
    # depends neither on the order of summation nor on the batch size that a matrix product is tuned for.
    return weights.mul_(2**15).round_().mul_(2.0**-15)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """CUDA's matrix products inside are in full float32, regardless of `--tf32`."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def resize(images: torch.Tensor, boxes: torch.Tensor, size: int, flips: torch.Tensor) -> torch.Tensor:
    """Each image's box (top, left, height, width), resized to `size` x `size` and mirrored where `flips` is set.

    Two batched matrix products, columns first and rounded to 8 bits in between, like Pillow's two passes. From
    `(B, 3, H, W)` to `(B, 3, size, size)` uint8; boxes `(B, 4)` in pixels; flips `(B,)` bool; all on one device.
    """
    batch, _, height, width = images.shape
    # Rows and columns at once, as a batch of twice the size. Positions beyond the shorter axis have no weight.
    starts, extents = boxes.T.reshape(2, 2 * batch)
    flips = torch.cat((torch.zeros_like(flips), flips))
    rows, columns = bicubic_weights(starts, extents, max(height, width), size, flips).chunk(2)
    # With the channels between rows and columns, both products have one matrix per image.
    pixels = images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    pixels = torch.bmm(pixels.view(batch, height * 3, width), columns[..., :width].transpose(1, 2))
    pixels = pixels.add_(0.5).floor_().clamp_(0, 255)
    pixels = torch.bmm(rows[..., :height], pixels.view(batch, height, 3 * size))
    pixels = pixels.add_(0.5).clamp_(0, 255)
    pixels = pixels.view(batch, size, 3, size).transpose(1, 2)
    return pixels.to(torch.uint8, memory_format=torch.contiguous_format)


def shifted_crop(images: torch.Tensor, offsets: torch.Tensor, padding: int, flips: torch.Tensor) -> torch.Tensor:
    """Zero-pads images and crops them to their original size, mirrored where `flips` is set, in a single gather.

    Images `(B, 3, H, W)` uint8; flips `(B,)` bool; offsets `(B, 2)` int64: (top, left) in the padded image.
    """
    batch, _, height, width = images.shape
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flips[:, None], width - 1 - columns, columns) + offsets[:, 1:]  # (B, W)
    rows = torch.arange(height, device=images.device) + offsets[:, :1]  # (B, H)
    index = rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]
    padded = F.pad(images, (padding, padding, padding, padding))
    return padded.flatten(2).gather(2, index.view(batch, 1, -1).expand(-1, 3, -1)).view_as(images)


# ---- RandAugment's operations, as in Pillow ----
# Divided among four functions, so that one kernel serves several operations. They change `(b, 3, S, S)` uint8 images
# in place, sorted by operation (`counts` of each). Every image has one argument, `(b, 1, 1, 1)` float64; `fill` is the
# colour beyond the edges, `(3, 1, 1)` uint8.


def apply_tables(images: torch.Tensor, counts: list[int], arguments: torch.Tensor, _: torch.Tensor) -> None:
    """AutoContrast, Equalize, Posterize, Invert, Solarize, SolarizeAdd: a table per channel, and one gather."""
    pixels = images.flatten(2)
    index = pixels.long()
    values = torch.arange(256, dtype=torch.uint8, device=images.device)
    stretched, equalized = counts[0], counts[0] + counts[1]
    lowest, highest = pixels[:equalized].aminmax(dim=2, keepdim=True)

    low, high = lowest[:stretched].double(), highest[:stretched].double()
    # float64, and these operations in this order: where Pillow gets 254.99 instead of 255, it truncates that to 254.
    # (`255 / tensor` would not do: torch multiplies by the reciprocal.)
    scale = torch.tensor(255.0) / (high - low)
    table = (values * scale).sub_(low * scale).clamp_(0, 255).to(torch.uint8)
    tables = [torch.where(high > low, table, values)]

    places = index[stretched:equalized]
    histogram = torch.zeros(counts[1], 3, 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, places, histogram.new_ones(()).expand_as(places))
    below = histogram.cumsum(dim=2).sub_(histogram)  # number of pixels with a lower value
    step = below.gather(2, highest[stretched:].long()) // 255
    table = (below + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=255).to(torch.uint8)
    tables.append(torch.where(step > 0, table, values))

    bits, threshold, addend = arguments[equalized:, 0].short().split([counts[2], counts[3] + counts[4], counts[5]])
    posterized = values & torch.bitwise_right_shift(-256, bits).to(torch.uint8)
    solarized = torch.where(values < threshold, values, values.bitwise_not())  # Invert's threshold is 0
    added = torch.where(values < 128, (values + addend).clamp_(max=255).to(torch.uint8), values)
    tables += [table.expand(-1, 3, -1) for table in (posterized, solarized, added)]
    torch.gather(torch.cat(tables), 2, index, out=pixels)


def blend(images: torch.Tensor, counts: list[int], arguments: torch.Tensor, _: torch.Tensor) -> None:
    """Brightness, Contrast, Color, Sharpness: blends with black, the mean grey, the grey image, the smoothed image."""
    degenerate = images.float()
    black, flat, grey, smooth = degenerate.split(counts)
    # `PIL.Image.convert("L")`: ITU-R 601-2 luma in 16-bit fixed point, which float32 represents exactly.
    red, green, blue = degenerate[counts[0] : sum(counts[:3])].split(1, dim=1)
    luma = (red * (19595 / 2**16)).add_(green, alpha=38470 / 2**16).add_(blue, alpha=7471 / 2**16).add_(0.5).floor_()
    area = images.shape[2] * images.shape[3]
    total = luma[: counts[1]].sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    flat.copy_(total.add_(area / 2).div_(area, rounding_mode="floor"))
    grey.copy_(luma[counts[1] :])
    black.zero_()
    # Pillow's `SMOOTH` filter: a 3x3 mean with weight 5 of 13 at its centre, the border left alone.
    total = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
    total = total[..., :-2] + total[..., 1:-1] + total[..., 2:]
    centre = smooth[:, :, 1:-1, 1:-1]
    centre.copy_(total.add_(centre, alpha=4).add_(6.5).div_(13).floor_())
    # `PIL.Image.blend`: factor 0 gives the degenerate image, 1 the original. Fractions are truncated.
    images.copy_((images - degenerate).mul_(arguments.float()).add_(degenerate).clamp_(0, 255))


def cubic(p0: torch.Tensor, p1: torch.Tensor, p2: torch.Tensor, p3: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The cubic through four neighbours, with `at` in [0, 1) from p1 to p2, as in Pillow's `Geometry.c` (a = -1).

    From differences rather than four weights, so that a flat area stays exactly the same when fractions are truncated.
    """
    before, after = p0 - p1, p2 - p3
    third = before + after
    second = before.add_(third)
    return second.sub_(third.mul_(at)).mul_(at).add_(p2).sub_(p0).mul_(at).add_(p1)


def slide(images: torch.Tensor, counts: list[int], arguments: torch.Tensor, fill: torch.Tensor) -> None:
    """TranslateX, ShearX, ShearY, TranslateY: shifts each row or column, bicubically, with `fill` beyond its ends."""
    size, sheared, along_x = images.shape[3], slice(counts[0], sum(counts[:3])), sum(counts[:2])
    rows = torch.cat((images[:along_x], images[along_x:].mT))
    centres = torch.arange(0.5, size, device=images.device)
    shifts = (arguments * size).float().repeat(1, 1, size, 1)  # to the left, in pixels: (b, 1, S, 1)
    torch.mul(arguments[sheared].float(), centres[:, None], out=shifts[sheared])
    whole = shifts.floor()
    # All columns that a row reads, with four neighbours per pixel: (b, 1, S, S + 3).
    columns = torch.arange(-1, size + 2, device=images.device) + whole.long()
    pixels = rows.gather(3, columns.clamp_(0, size - 1).expand(-1, 3, -1, -1)).float()
    slid = cubic(*pixels.unfold(3, size, 1).unbind(dim=3), at=shifts - whole).clamp_(0, 255)
    sources = centres + shifts
    slid = torch.where((sources >= 0) & (sources < size), slid, fill)
    images[:along_x] = slid[:along_x]
    images[along_x:] = slid[along_x:].mT


def rotate(images: torch.Tensor, _: list[int], degrees: torch.Tensor, fill: torch.Tensor) -> None:
    """Rotate: counter-clockwise about the centre, bicubic over 4 x 4 neighbours."""
    batch, channels, size, _ = images.shape
    radians = torch.deg2rad(degrees)
    cosine, sine = radians.cos().float(), radians.sin().float()
    x = torch.arange(0.5 - size / 2, size / 2, device=images.device)
    y = x[:, None]
    sources = torch.stack((cosine * x - sine * y, sine * x + cosine * y)).add_(size / 2)  # x and y: (2, b, 1, S, S)
    inside = ((sources >= 0) & (sources < size)).all(dim=0)
    positions = sources.sub_(0.5)
    whole = positions.floor()
    at_x, at_y = positions.sub_(whole)
    columns, lines = (whole.long() + torch.arange(-1, 3, device=images.device)[:, None, None]).clamp_(0, size - 1)
    index = (lines * size)[:, :, None] + columns[:, None]  # (b, 4, 4, S, S)
    pixels = images.flatten(2).gather(2, index.view(batch, 1, -1).expand(-1, channels, -1)).float()
    pixels = pixels.view(batch, channels, 4, 4, size, size)
    pixels = cubic(*pixels.unbind(dim=3), at=at_x[:, :, None])
    rotated = cubic(*pixels.unbind(dim=2), at=at_y).clamp_(0, 255)
    images.copy_(torch.where(inside, rotated, fill))


# The operations of each function, in the order in which images are sorted.
OPERATIONS_OF = {
    apply_tables: ["AutoContrast", "Equalize", "Posterize", "Invert", "Solarize", "SolarizeAdd"],
    blend: ["Brightness", "Contrast", "Color", "Sharpness"],
    slide: ["TranslateXRel", "ShearX", "ShearY", "TranslateYRel"],
    rotate: ["Rotate"],
}
ORDER = [name for names in OPERATIONS_OF.values() for name in names]


def apply_operations(images: torch.Tensor, counts: list[int], arguments: torch.Tensor, fill: torch.Tensor) -> None:
    """Applies all operations; `counts` are in the order of `ORDER`."""
    for function, names in OPERATIONS_OF.items():
        own, counts = counts[: len(names)], counts[len(names) :]
        batch = sum(own)
        if batch > 0:
            function(images[:batch], own, arguments[:batch], fill)
        images, arguments = images[batch:], arguments[batch:]


# ---- RandAugment (Cubuk et al. 2020, arXiv:1909.13719), timm's variant ----


class Operation(NamedTuple):
    """How a magnitude m (0 to 10) becomes the argument of one of RandAugment's operations (timm's `LEVEL_TO_ARG`).

    It is start + step * m / 10 or, if `random_sign`, start - step * m / 10 half of the time, clamped to [lowest,
    highest]. If `whole`, the change from start is truncated to an integer.
    """

    start: float = 0.0
    step: float = 0.0
    random_sign: bool = False
    whole: bool = False
    lowest: float = -math.inf
    highest: float = math.inf


GEOMETRIC = {
    "Rotate": Operation(step=30.0, random_sign=True),
    **dict.fromkeys(("ShearX", "ShearY"), Operation(step=0.3, random_sign=True)),
    **dict.fromkeys(("TranslateXRel", "TranslateYRel"), Operation(step=0.45, random_sign=True)),
}
ENHANCEMENTS = ("Color", "Contrast", "Brightness", "Sharpness")
WITHOUT_MAGNITUDE = dict.fromkeys(("AutoContrast", "Equalize", "Invert"), Operation())
# `inc1`: the larger the magnitude, the stronger the change (timm's `_RAND_INCREASING_TRANSFORMS`).
INCREASING_OPERATIONS = {
    **WITHOUT_MAGNITUDE,
    "PosterizeIncreasing": Operation(start=4, step=-4, whole=True, lowest=0),
    "SolarizeIncreasing": Operation(start=256, step=-256, whole=True, lowest=0),
    "SolarizeAdd": Operation(step=110, whole=True, highest=128),
    **{f"{name}Increasing": Operation(1.0, step=0.9, random_sign=True, lowest=0.1) for name in ENHANCEMENTS},
    **GEOMETRIC,
}
# `inc0`: the ranges of the first implementations (timm's `_RAND_TRANSFORMS`).
PLAIN_OPERATIONS = {
    **WITHOUT_MAGNITUDE,
    "Posterize": Operation(step=4, whole=True, highest=8),
    "Solarize": Operation(step=256, whole=True, highest=256),
    "SolarizeAdd": Operation(step=110, whole=True, highest=128),
    **dict.fromkeys(ENHANCEMENTS, Operation(start=0.1, step=1.8)),
    **GEOMETRIC,
}


class RandAugment(NamedTuple):
    """The settings in a configuration string such as `rand-m9-mstd0.5-inc1`."""

    operations: dict[str, Operation]
    magnitude: float
    layers: int  # operations per image
    probability: float  # of each
    magnitude_std: float  # if infinite, the magnitude is uniform
    magnitude_max: int

    @classmethod
    def from_string(cls, config: str) -> "RandAugment":
        """Parses it as timm does. Raises a `ValueError` if whole batches cannot be augmented this way."""
        if re.fullmatch(r"rand(-(m|n|mmax|inc)\d+|-(p|mstd)\d+(\.\d+)?)*", config) is None:
            raise ValueError(
                f"auto_augment={config!r}: only RandAugment (`rand-...`) can augment whole batches. Its options are m "
                "(magnitude), n (operations per image), mmax (highest magnitude) and inc (0 or 1), each an integer, "
                "and p (probability of an operation) and mstd (standard deviation of the magnitude), each a number."
            )
        timms = rand_augment_transform(config, {})
        op = timms.ops[0]
        is_increasing = {op.name for op in timms.ops} == set(INCREASING_OPERATIONS)
        operations = INCREASING_OPERATIONS if is_increasing else PLAIN_OPERATIONS
        return cls(operations, op.magnitude, timms.num_layers, op.prob, op.magnitude_std, op.magnitude_max or 10)


def draw_operations(settings: RandAugment, seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The operations that each image undergoes, and their arguments: two tensors `(B, layers)`.

    An operation is given by its index in `settings.operations`, or by their number where none is applied (int64).
    Arguments are float64.
    """
    count = len(settings.operations)
    draws = random_uniform(seeds, RAND_AUGMENT_STREAM, settings.layers, 5)
    which, apply, negate, radius, angle = draws.unbind(dim=-1)
    chosen = (which * count).long()
    if settings.magnitude_std == math.inf:
        magnitude = settings.magnitude * radius
    else:  # Box-Muller, as in `random.gauss`
        normal = torch.cos(2 * math.pi * angle) * torch.sqrt(-2 * torch.log(1 - radius))
        magnitude = settings.magnitude + settings.magnitude_std * normal
    magnitude = magnitude.clamp(0, settings.magnitude_max)

    rules = torch.tensor(list(settings.operations.values()), dtype=torch.float64)
    start, step, random_sign, whole, lowest, highest = rules[chosen].unbind(dim=-1)
    change = magnitude / 10 * step
    change = torch.where(whole.bool(), change.trunc(), change)
    change = torch.where(random_sign.bool() & (negate > 0.5), -change, change)
    argument = (start + change).clamp(lowest, highest)
    return torch.where(apply < settings.probability, chosen, count), argument


def rand_augment(images: torch.Tensor, settings: RandAugment, seeds: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Applies the operations drawn for each seed to uint8 images `(B, 3, S, S)`, in place.

    `seeds` `(B,)` are on the CPU; `fill` `(3, 1, 1)` uint8, on the images' device, is the colour beyond the edges.
    """
    chosen, arguments = draw_operations(settings, seeds)
    # Once sorted, the images of each operation are a slice: the CPU knows the slices, the device only needs the order.
    places = [ORDER.index(name.removesuffix("Increasing")) for name in settings.operations]
    chosen, order = torch.tensor([*places, len(ORDER)])[chosen].sort(dim=0)
    arguments = arguments.gather(0, order)[..., None, None, None].to(images.device, non_blocking=True)
    order = order.to(images.device, non_blocking=True)
    for layer in range(settings.layers):
        counts = chosen[:, layer].bincount(minlength=len(ORDER)).tolist()[: len(ORDER)]
        index = order[: sum(counts), layer]  # without the images that get no operation, which come last
        changed = images.index_select(0, index)
        apply_operations(changed, counts, arguments[:, layer], fill)
        images.index_copy_(0, index, changed)
    return images


# ---- Random erasing (Zhong et al. 2017, arXiv:1708.04896), timm's mode "pixel" ----


def draw_erasing_boxes(seeds: torch.Tensor, size: int, probability: float) -> tuple[torch.Tensor, torch.Tensor]:
    """timm's `RandomErasing`: boxes (top, left, height, width) `(B, 4)`, and which of them are erased `(B,)`."""
    uniform = random_uniform(seeds, ERASING_STREAM, 1 + ATTEMPTS, 4)
    boxes, fits = draw_boxes(uniform[:, 1:], size, size, area=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), margin=1)
    return boxes, (uniform[:, 0, 0] < probability) & fits


def erase(
    images: torch.Tensor, boxes: torch.Tensor, erased: torch.Tensor, seeds: torch.Tensor, normal: torch.Tensor
) -> None:
    """Overwrites each box with standard normal noise, in place; only erased pixels are computed, as one flat list.

    Images `(B, 3, S, S)`, normalised, and `normal` are on the device; boxes `(B, 4)`, erased `(B,)` and seeds `(B,)`
    on the CPU.
    """
    which = erased.nonzero().squeeze(1)
    top, left, height, width = boxes.long()[which].unbind(dim=1)
    areas = height * width
    total = int(areas.sum())
    plan = torch.stack((which, top, left, width, areas.cumsum(0) - areas, mix_bits(seeds[which]), areas), dim=1)
    plan = plan.to(images.device, non_blocking=True)
    owner = torch.repeat_interleave(plan[:, -1], output_size=total)  # (total,): the box that an erased pixel lies in
    image, top, left, width, first, seed, _ = plan[owner].unbind(dim=1)
    place = torch.arange(total, device=images.device) - first
    bits = random_bits(seed, NOISE_STREAM, place)  # 64 per pixel: 16 per channel, and 16 to spare
    noise = normal[bits[:, None].view(torch.int16)[:, :3].long()]  # a negative index counts from the end
    images[image, :, top + place // width, left + place % width] = noise.to(images.dtype)


# ---- All of it ----


class BatchAugmentation:
    """Augments batches of images on the device they are on (CPU or CUDA), each image from its seed.

    The steps and their order are those of timm's `create_transform(is_training=True)`: crop and resize, horizontal
    flip, RandAugment, normalisation, random erasing.

    Args:
        args ([`AugmentationArguments`])
        image_processor: The model's, for the size and normalisation of the result.

    Raises:
        ValueError: If the policy of `--auto_augment` is not RandAugment.
    """

    def __init__(self, args: AugmentationArguments, image_processor: DeiTImageProcessor):
        self.image_size = image_processor.crop_size["height"]
        self.crop = args.crop_at(self.image_size)
        self.horizontal_flip = args.horizontal_flip
        self.rand_augment = None if args.auto_augment == "none" else RandAugment.from_string(args.auto_augment)
        self.random_erasing = args.random_erasing
        mean = image_processor.image_mean
        # timm fills beyond an image's edges with the mean colour. Python's `round`, as in timm.
        fill = [min(255, round(255 * channel)) for channel in mean]
        self.fill = torch.tensor(fill, dtype=torch.uint8)[:, None, None]
        self.mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self.std = torch.tensor(image_processor.image_std, dtype=torch.float32)[:, None, None]
        self.normal = normal_quantiles()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor`): `(B, 3, H, W)` uint8, on any device.
            seeds (`torch.Tensor`): `(B,)` int64, on the CPU: everything random about an image follows from its seed.

        Returns:
            `torch.Tensor`: `(B, 3, image_size, image_size)` float32, normalised, on the images' device.
        """
        if self.normal.device != images.device:
            for name in ("mean", "std", "fill", "normal"):
                setattr(self, name, getattr(self, name).to(images.device))
        # Autocast would compute the resize's products in 16 bits, and TF32 would cut their factors to 11.
        with torch.autocast(images.device.type, enabled=False), full_float32():
            images = self.crop_and_flip(images, seeds)
            if self.rand_augment is not None:
                images = rand_augment(images, self.rand_augment, seeds, self.fill)
            pixels = images.float().div_(255).sub_(self.mean).div_(self.std)
            if self.random_erasing > 0:
                boxes, erased = draw_erasing_boxes(seeds, self.image_size, self.random_erasing)
                erase(pixels, boxes, erased, seeds, self.normal)
        return pixels

    def crop_and_flip(self, images: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """The geometric part before RandAugment: uint8 images to new uint8 images `(B, 3, image_size, image_size)`.

        A padded crop is cut from the image with `image_size // 8` zeros on each side (4 at 32, as in DeiT's code).
        """
        batch, _, height, width = images.shape
        size, device = self.image_size, images.device
        flips = random_uniform(seeds, FLIP_STREAM, 1)[:, 0] < self.horizontal_flip
        flips = flips.to(device, non_blocking=True)
        if self.crop == "resized":
            boxes = draw_crop_boxes(seeds, height, width)
            return resize(images, boxes.to(device, non_blocking=True), size, flips)
        if (height, width) != (size, size):
            whole = torch.tensor([0, 0, height, width]).expand(batch, 4)
            images = resize(images, whole.to(device, non_blocking=True), size, torch.zeros_like(flips))
        padding = size // 8 if self.crop == "padded" else 0
        offsets = (random_uniform(seeds, CROP_STREAM, 2) * (2 * padding + 1)).long()
        return shifted_crop(images, offsets.to(device, non_blocking=True), padding, flips)

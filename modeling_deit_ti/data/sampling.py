"""Which images an epoch sees, in which order and with which seeds; how they are batched and mixed."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from scipy.special import betaincinv

from ..device import to_device
from .randomness import MIXING_STREAM, random_uniform


# The subsets that --max_train_samples and --train_val_split choose are the same in every run, whatever its --seed, so
# that runs to be compared see the same images and share a fitted teacher.
SUBSET_SEED = 0


def random_rows(num_rows: int, size: int | None) -> Sequence[int]:
    """`size` random rows of a split, the same in every run; all rows if there are no more, or if `size` is `None`."""
    if size is None or size >= num_rows:
        return range(num_rows)
    # Shuffled, since image folders are ordered by class; sorted, so that the file is read front to back.
    return sorted(np.random.default_rng(SUBSET_SEED).permutation(num_rows)[:size].tolist())


class TrainSampler(torch.utils.data.Sampler):
    """
    The keys of each epoch, over all processes: `(index, seed)` pairs in random order. Everything random in an image
    follows from its seed (see randomness.py).

    Args:
        batch_size (`int`): images per optimizer step, over all processes. Images that do not fill a step are left out
            (different ones each epoch); only a dataset smaller than a step is used in full.
        seed (`int`): the run's.
        repeats (`int`, *optional*, defaults to 1): repeated augmentation (Hoffer et al., 2020): each image occurs this
            many times in a batch, augmented differently; the length of an epoch stays the same.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, repeats: int = 1):
        self.num_images = num_images
        self.batch_size = batch_size
        self.num_samples = num_images // batch_size * batch_size or num_images
        self.seed = seed
        self.repeats = repeats
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        state = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
        order = torch.randperm(self.num_images, generator=generator).repeat_interleave(self.repeats)
        order = order[: self.num_samples]
        if self.repeats > 1:
            # Mixup pairs neighbours, so the views of an image are spread over its batch.
            batches = order.split(self.batch_size)
            order = torch.cat([batch[torch.randperm(len(batch), generator=generator)] for batch in batches])
        seeds = torch.randint(2**62, (self.num_samples,), generator=generator)
        yield from zip(order.tolist(), seeds.tolist(), strict=True)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and torch's CPU generators inside, and restores them afterwards."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def augmented_batch(
    images: Iterable[Image], labels: Sequence[int] | None, seeds: Sequence[int], transform: Callable
) -> dict:
    """
    Images, each transformed with its own seed, as `pixel_values` (B, 3, height, width); their `labels` (B,), if any;
    and their `seeds` (B,), a NumPy array, so that it stays on the CPU when the tensors go to the device.
    """
    pixel_values = []
    for image, seed in zip(images, seeds, strict=True):
        with seeded(seed):
            pixel_values.append(transform(image))
    batch = {"pixel_values": torch.stack(pixel_values), "seeds": np.array(seeds)}
    return batch if labels is None else batch | {"labels": torch.tensor(labels)}


def collate_images(batch: dict) -> dict:
    """A no-op for loaders: images already come as whole batches."""
    return batch


def partners(batch_size: int) -> np.ndarray:
    """
    The index of each image's mixing partner in its batch, `(B,)`: neighbours are paired, so that a batch may be split
    into parts of any even size. In a batch of odd size, the last image is its own partner.
    """
    return np.minimum(np.arange(batch_size) ^ 1, batch_size - 1)


def mix_images(
    pixel_values: torch.Tensor,
    labels: torch.Tensor | None,
    seeds: np.ndarray,
    num_labels: int,
    mixup: float,
    cutmix: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019) of each image with its partner (see [`partners`]); if both
    are on, a fair coin decides, as in DeiT's code. There, one coin, share and box serve the whole batch; here each
    image has its own (timm's mode `elem`), from its seed.

    Args:
        pixel_values, labels (`torch.Tensor`): images `(B, 3, height, width)`, and label ids `(B,)`, if any.
        seeds (`np.ndarray` of shape `(B,)`): of the images.
        mixup, cutmix (`float`): alpha of the Beta distribution of the share; 0 turns it off.

    Returns:
        The mixed images, and the labels as distributions `(B, num_labels)` (ids if nothing is mixed).
    """
    if mixup <= 0 and cutmix <= 0:
        return pixel_values, labels
    height, width = pixel_values.shape[-2:]
    coin, share, row, column = random_uniform(torch.from_numpy(seeds), MIXING_STREAM, 4).T.numpy()
    is_cut = (coin < 0.5) if mixup > 0 and cutmix > 0 else np.full(len(seeds), cutmix > 0)
    alpha = np.where(is_cut, cutmix, mixup)
    share = betaincinv(alpha, alpha, share)  # of the image itself: a quantile of the Beta distribution
    # CutMix: the partner's box has a random centre and 1 - share of the area, and is clipped to the image.
    half = np.where(is_cut, np.sqrt(1 - share) / 2, 0)
    (top, bottom), (left, right) = (
        np.clip(np.floor(centre * length) + np.floor(half * length) * [[-1], [1]], 0, length)
        for centre, length in ((row, height), (column, width))
    )
    outside = np.where(is_cut, 1, share)  # what an image keeps of itself outside the box; inside, nothing
    share = np.where(is_cut, 1 - (bottom - top) * (right - left) / (height * width), share)

    device, partner = pixel_values.device, torch.from_numpy(partners(len(seeds)))
    plan = to_device(torch.from_numpy(np.stack((top, bottom, left, right, outside, share))).float(), device)
    top, bottom, left, right, outside, share = plan[..., None]
    partner = to_device(partner, device)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    is_inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None]
    kept = torch.where(is_inside, 0, outside[..., None])[:, None]  # (B, 1, height, width)
    pixel_values = torch.lerp(pixel_values[partner], pixel_values, kept)
    if labels is None:
        return pixel_values, None
    labels = F.one_hot(labels, num_labels).float()
    return pixel_values, torch.lerp(labels[partner], labels, share)

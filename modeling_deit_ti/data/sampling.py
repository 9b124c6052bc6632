"""Which images an epoch sees, in which order and with which random seeds; their batches, and the mixing of these."""

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


# The subsets that --max_train_samples and --train_val_split take are the same in every run, whatever its --seed: runs
# that are compared see the same images, and a fitted teacher serves them all.
SUBSET_SEED = 0


def random_rows(num_rows: int, size: int | None) -> Sequence[int]:
    """So many of a split's rows, the same in every run; all of them if there are no more, or `size` is `None`."""
    if size is None or size >= num_rows:
        return range(num_rows)
    # Shuffled: image folders come class by class. Sorted: reading goes forward through the file.
    return sorted(np.random.default_rng(SUBSET_SEED).permutation(num_rows)[:size].tolist())


class TrainSampler(torch.utils.data.Sampler):
    """
    The keys of each epoch, for all processes together: `(index, seed)` pairs in random order. The seed is that of all
    that is random in the image (see randomness.py).

    Args:
        batch_size (`int`): images in a step of the optimizer, all processes together. Those that do not fill one are
            left out (others each epoch); only a dataset smaller than a step is used whole.
        seed (`int`): of the run.
        repeats (`int`, *optional*, defaults to 1): repeated augmentation (Hoffer et al., 2020): each image comes
            this often in a batch, differently augmented, and an epoch sees as many images as without.
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
            # Mixup takes neighbours: the views of one image must not be each other's.
            batches = order.split(self.batch_size)
            order = torch.cat([batch[torch.randperm(len(batch), generator=generator)] for batch in batches])
        seeds = torch.randint(2**62, (self.num_samples,), generator=generator)
        yield from zip(order.tolist(), seeds.tolist(), strict=True)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's CPU generators start from `seed` inside, and are restored afterwards."""
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
    """For a loader of images: they come as whole batches."""
    return batch


def partners(batch_size: int) -> np.ndarray:
    """
    Which image of a batch each is mixed with, `(B,)`: its neighbour, two by two, so that a batch may be cut into any
    even parts. The last of an odd number has no partner but itself.
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
    are on, one of them by a fair coin, as in DeiT's code. But there a batch tosses one coin and draws one share and
    one box for all of its images; here each image has its own (timm's mode `elem`), from its seed.

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
    share = betaincinv(alpha, alpha, share)  # the image's own, as its distribution's quantile
    # CutMix: the partner's box has a random centre and 1 - share of the area, but for what lies outside of the image.
    half = np.where(is_cut, np.sqrt(1 - share) / 2, 0)
    (top, bottom), (left, right) = (
        np.clip(np.floor(centre * length) + np.floor(half * length) * [[-1], [1]], 0, length)
        for centre, length in ((row, height), (column, width))
    )
    outside = np.where(is_cut, 1, share)  # what an image keeps of itself there; inside, nothing
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

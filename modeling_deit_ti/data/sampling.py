"""Which images an epoch sees, in which order and with which random seeds; their batches, and the mixing of these.

An image's augmentation depends on the run's seed, the epoch and the image's position in it, and on nothing else: not
on the workers, the number of processes or where a run was resumed.
"""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL.Image import Image
from torchvision.transforms import v2


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
    The keys of each epoch, for all processes together: `(index, seed)` pairs in random order.

    Args:
        batch_size (`int`): images in a step of all processes. Those that do not fill one are left out (others each
            epoch), so that all batches have one shape; only a dataset smaller than a batch is used whole.
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


def mix_images(
    pixel_values: torch.Tensor, labels: torch.Tensor | None, seed: int, num_labels: int, mixup: float, cutmix: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019) of each image with its neighbour in the batch; if both
    are on, one of them by a fair coin, as in DeiT's code.

    Args:
        pixel_values, labels (`torch.Tensor`): images `(B, 3, height, width)`, and label ids `(B,)`, if any.
        seed (`int`): decides the coin, the share of each image and the box.
        mixup, cutmix (`float`): alpha of the Beta distribution of the share; 0 turns it off.

    Returns:
        The mixed images, and the labels as distributions `(B, num_labels)` (ids if nothing is mixed).
    """
    if mixup <= 0 and cutmix <= 0:
        return pixel_values, labels
    has_labels = labels is not None
    if not has_labels:  # torchvision's transforms always mix labels
        labels = torch.zeros(len(pixel_values), dtype=torch.long, device=pixel_values.device)
    with seeded(seed):
        use_cutmix = cutmix > 0 and (mixup <= 0 or torch.rand(()).item() < 0.5)
        mix = v2.CutMix if use_cutmix else v2.MixUp
        pixel_values, labels = mix(alpha=cutmix if use_cutmix else mixup, num_classes=num_labels)(pixel_values, labels)
    return pixel_values, labels if has_labels else None

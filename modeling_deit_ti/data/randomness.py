"""Everything random in training follows from an image's seed, and from nothing else.

An image's seed is a function of the run's seed, the epoch and the image's position in the epoch (see `TrainSampler`
and `StreamedBatches`). Its crop, its augmentation, how it is mixed with its neighbour, and which of its branches (drop
path) and patches are dropped are functions of that seed. So they are the same whichever process, worker or micro-batch
an image ends up in, and wherever a run was resumed: there is no generator state to save.

What networks other than DeiT-Ti draw in their forward pass (dropout) comes from torch's generator, which is reseeded
for each micro-batch with the seed of its first image.
"""

import math

import torch


# One stream per purpose: switching one off does not change the random numbers of the others.
(
    CROP_STREAM,
    FLIP_STREAM,
    RAND_AUGMENT_STREAM,
    ERASING_STREAM,
    NOISE_STREAM,
    MIXING_STREAM,
    DROP_PATH_STREAM,
    PATCH_DROP_STREAM,
) = range(8)


# ---- SplitMix64 (Steele, Lea, Flood 2014), a hash of (seed, counter), on wrapping int64 ----


def mix_bits(bits: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function. `>>` keeps the sign of an int64, so the masks make its shifts logical."""
    bits = (bits ^ ((bits >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    bits = (bits ^ ((bits >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return bits ^ ((bits >> 31) & (2**33 - 1))


def random_bits(mixed_seeds: torch.Tensor, stream: int, counters: torch.Tensor) -> torch.Tensor:
    """64 random bits, as int64, for each pair of `mixed_seeds` and `counters` (int64, broadcast together)."""
    # Seeds are mixed first: neighbouring ones, such as dataset indices, must not give overlapping counter sequences.
    return mix_bits(mixed_seeds + (counters + ((stream << 40) + 1)) * (0x9E3779B97F4A7C15 - 2**64))


def random_uniform(seeds: torch.Tensor, stream: int, *shape: int) -> torch.Tensor:
    """Uniform float64 numbers in [0, 1), `(B, *shape)`, for seeds `(B,)`."""
    bits = random_bits(mix_bits(seeds)[:, None], stream, torch.arange(math.prod(shape), device=seeds.device))
    return ((bits >> 11) & (2**53 - 1)).double().mul_(2.0**-53).view(len(seeds), *shape)


def start_generator(seed: int, device: torch.device) -> None:
    """Seeds torch's generators: the CPU's, and the GPU's if the device is one."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would collect a stack trace where there is no GPU
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)

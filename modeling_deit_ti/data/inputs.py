"""Turns checked images into the model's inputs: augmented for training, preprocessed as shipped for evaluation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset
from PIL import Image as PILImage
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from transformers import DeiTImageProcessor

from ..arguments import AugmentationArguments, DistillationTrainingArguments, ModelArguments
from ..errors import UserError
from .augmentation import BatchAugmentation
from .decoding import read_image
from .loading import ImageData
from .sampling import TrainSampler, augmented_batch, mix_images, random_rows
from .streaming import StreamedImages


# Up to this height and width, of both the images and the model's input, a CPU augments whole batches faster than timm
# augments their images; far above it, it is slower (results/augment_on.md).
MAX_CPU_BATCH_AUGMENTATION_SIZE = 64
# If evaluation images take more once resized and cropped, they are prepared again in each evaluation.
MAX_KEPT_BYTES = 2 * 2**30


def make_image_processor(
    model: ModelArguments,
    augmentation: AugmentationArguments,
    image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> DeiTImageProcessor:
    """The preprocessing for evaluation and for the shipped model: resize, centre crop, normalisation."""
    is_resized = augmentation.crop_at(model.image_size) == "resized"
    ratio = model.eval_crop_ratio or (0.875 if is_resized else 1.0)
    return DeiTImageProcessor(
        size={"shortest_edge": round(model.image_size / ratio)},
        crop_size={"height": model.image_size, "width": model.image_size},
        image_mean=list(image_mean),
        image_std=list(image_std),
        do_convert_rgb=True,
    )


# ---- Training ----


@dataclass
class DeviceAugmentation:
    """What is left to do to training batches on the model's device: at least mixing (see [`mix_images`])."""

    augment: BatchAugmentation | None  # `None` if the loader augments the images
    mixup: float
    cutmix: float
    num_labels: int

    def __call__(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None, seeds: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        From images `(B, 3, height, width)`, uint8 if it augments, else float32, and label ids `(B,)`, if any, to
        float32 images `(B, 3, image_size, image_size)` and label ids `(B,)` or distributions `(B, K)`.
        """
        if self.augment is not None:
            pixel_values = self.augment(pixel_values, torch.from_numpy(seeds))
        return mix_images(pixel_values, labels, seeds, self.num_labels, self.mixup, self.cutmix)


def make_train_images(
    data: ImageData, args: AugmentationArguments, image_processor, device: str = "cpu"
) -> tuple["TrainImages | StreamedImages", DeviceAugmentation]:
    """
    The training images, and what is left to do to their batches on the training `device` (`"cpu"`, `"cuda"`, ...).

    Raises:
        UserError: if the device cannot augment these images, or timm does not know the policy.
    """
    image_size = image_processor.crop_size["height"]
    size = None if data.is_streamed else common_size(data.train)
    is_small = size is not None and max(*size, image_size) <= MAX_CPU_BATCH_AUGMENTATION_SIZE
    on_device = args.augment_on == "device" or (
        args.augment_on == "auto" and size is not None and (device == "cuda" or (device == "cpu" and is_small))
    )
    augment = None
    if on_device:
        try:
            if size is None:
                raise ValueError("the images are not all of one size, or there are too many to keep decoded.")
            augment = BatchAugmentation(args, image_processor)
        except ValueError as error:
            if args.augment_on == "device":
                raise UserError(f"--augment_on device: {error} Use --augment_on loader.") from error
    transform = make_train_transform(args, image_processor) if augment is None else None
    kind = StreamedImages if data.is_streamed else TrainImages
    images = kind(data.train, transform, args.repeated_augmentation)
    return images, DeviceAugmentation(augment, args.mixup, args.cutmix, len(data.label_names))


def make_train_transform(args: AugmentationArguments, image_processor) -> Callable[[PILImage.Image], torch.Tensor]:
    """
    The augmentation of one RGB image to `(3, image_size, image_size)` float32, from timm's factory as in DeiT's code
    (paper, table 9), with the size and normalisation of the image processor.

    Raises:
        UserError: if timm does not know the policy of `--auto_augment`.
    """
    image_size = image_processor.crop_size["height"]
    crop = args.crop_at(image_size)
    try:
        first, second, last = create_transform(
            image_size,
            is_training=True,
            hflip=args.horizontal_flip,
            color_jitter=None,
            auto_augment=None if args.auto_augment == "none" else args.auto_augment,
            interpolation="bicubic",
            mean=tuple(image_processor.image_mean),
            std=tuple(image_processor.image_std),
            re_prob=args.random_erasing,
            re_mode="pixel",
            separate=True,
        )
    except (AssertionError, ValueError, KeyError, IndexError) as error:  # timm checks policies with assert
        raise UserError(f"--auto_augment {args.auto_augment}: timm does not know this policy.") from error
    if crop != "resized":
        resize = transforms.Resize((image_size, image_size), InterpolationMode.BICUBIC)
        shift = [transforms.RandomCrop(image_size, padding=image_size // 8)] if crop == "padded" else []
        first = transforms.Compose([resize, *shift, *first.transforms[1:]])
    return transforms.Compose([first, second, last])


def common_size(dataset: Dataset) -> tuple[int, int] | None:
    """Height and width of the images, if they are decoded and all of one size."""
    if "pixels" not in dataset.column_names:
        return None
    heights, widths = dataset.unique("height"), dataset.unique("width")
    return (heights[0], widths[0]) if len(heights) == len(widths) == 1 else None


class _Images(torch.utils.data.Dataset):
    """A split of [`ImageData`] that loaders fetch in whole batches; with `in_batches`, as uint8 pixels."""

    def __init__(self, dataset: Dataset, in_batches: bool):
        self.dataset = dataset
        self.batches = ImageBatches(dataset) if in_batches else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        return {name: values[0] for name, values in self.__getitems__([key]).items()}


class TrainImages(_Images):
    """
    Training images. The keys are those of [`TrainSampler`]: an index, and the seed of everything random in the image.

    Args:
        transform (`Callable`, *optional*): RGB image to `pixel_values`. `None` gives batches of uint8 pixels, for
            [`BatchAugmentation`].
        repeats (`int`, *optional*, defaults to 1): repeated augmentation.
    """

    is_streamed = False

    def __init__(self, dataset: Dataset, transform: Callable[[PILImage.Image], torch.Tensor] | None, repeats: int = 1):
        super().__init__(dataset, in_batches=transform is None)
        self.transform = transform
        self.repeats = repeats

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        indices, seeds = map(list, zip(*keys, strict=True))
        if self.batches is not None:
            return self.batches.fetch(indices) | {"seeds": np.array(seeds)}
        rows = self.dataset.__getitems__(indices)
        labels = [row["label"] for row in rows] if "label" in rows[0] else None
        return augmented_batch(map(read_image, rows), labels, seeds, self.transform)

    def order(self, args: DistillationTrainingArguments) -> TrainSampler:
        """The keys of each epoch, over all processes."""
        return TrainSampler(len(self), args.total_train_batch_size, args.order_seed, self.repeats)


# ---- Evaluation ----


class EvalImages(_Images):
    """Images as prepared by the image processor that ships with the model; `cropped` has them not yet normalised."""

    def __init__(self, dataset: Dataset, image_processor):
        super().__init__(dataset, in_batches=False)
        self.cropped = CroppedImages(dataset, image_processor)

    def __getitems__(self, indices: list[int]) -> dict:
        batch = self.cropped.__getitems__(indices)
        return batch | {"pixel_values": normalised(batch["pixel_values"], self.cropped.image_processor)}


class CroppedImages(_Images):
    """
    Images as resized and cropped by the image processor: uint8, with their labels. If they are decoded, of one size
    and fit into `MAX_KEPT_BYTES`, they are prepared once and kept in memory for later evaluations.
    """

    def __init__(self, dataset: Dataset, image_processor):
        super().__init__(dataset, in_batches=common_size(dataset) is not None)
        self.image_processor = image_processor
        self.shape = (len(dataset), 3, image_processor.crop_size["height"], image_processor.crop_size["width"])
        self.are_kept = self.batches is not None and math.prod(self.shape) <= MAX_KEPT_BYTES
        self.is_prepared = np.zeros(len(dataset), bool)

    @cached_property
    def kept(self) -> torch.Tensor:
        """`(rows, 3, height, width)`. Rows that are never read, such as another process's, take no memory."""
        return torch.empty(self.shape, dtype=torch.uint8)

    def __getitems__(self, indices: Sequence[int]) -> dict:
        if not self.are_kept:
            return self._prepared(indices)
        indices = np.asarray(indices)
        missing = indices[~self.is_prepared[indices]]
        if len(missing) > 0:
            self.kept[missing] = self._prepared(missing)["pixel_values"]
            self.is_prepared[missing] = True
        rows = slice(indices[0], indices[0] + len(indices))  # evaluations read consecutive rows: no copy needed
        if not np.array_equal(indices, np.arange(rows.start, rows.stop)):
            rows = torch.from_numpy(indices)
        return {"pixel_values": self.kept[rows], "labels": self.batches.labels[rows]}

    def _prepared(self, indices: Sequence[int]) -> dict:
        if self.batches is not None:  # the processor gives the same result for tensors, without PIL
            batch = self.batches.fetch(indices)
            images = batch["pixel_values"]
        else:
            rows = self.dataset.__getitems__(indices)
            batch = {"labels": torch.tensor([row["label"] for row in rows])}
            images = [read_image(row) for row in rows]
        cropped = self.image_processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")
        return batch | {"pixel_values": cropped["pixel_values"]}


def sample_images(data: ImageData, image_processor, count: int) -> torch.Tensor:
    """
    Training images `(count, 3, image_size, image_size)` as prepared by the image processor, the same in every run:
    random ones or, from a stream, the first. Fewer if there are no more.
    """
    if data.is_streamed:
        images = data.train.first_images(count)
    else:
        images = [read_image(row) for row in data.train.select(random_rows(len(data.train), count))]
    return image_processor(images, return_tensors="pt")["pixel_values"]


def normalised(images: torch.Tensor, image_processor) -> torch.Tensor:
    """Resized and cropped uint8 images `(B, 3, height, width)`, on any device, as the image processor's float32."""
    return image_processor.rescale_and_normalize(
        images,
        image_processor.do_rescale,
        image_processor.rescale_factor,
        image_processor.do_normalize,
        tuple(image_processor.image_mean),  # hashable: it caches them as tensors
        tuple(image_processor.image_std),
    )


# ---- Both ----


class ImageBatches:
    """
    Whole batches of decoded images of one size. NumPy gathers the rows from the Arrow files that `datasets` has mapped
    into memory, so that no image becomes a Python object and each is copied only once, into its batch.
    """

    def __init__(self, dataset: Dataset):
        # `datasets` keeps a selection of rows as a second table, of indices into the first.
        self.dataset = dataset if dataset._indices is None else dataset.flatten_indices()

    def __getstate__(self) -> dict:
        """For workers that are not forked: they map the files themselves, since pickled arrays would be copies."""
        return {"dataset": self.dataset}

    @cached_property
    def chunks(self) -> list[np.ndarray]:
        """The images as stored in the files: `(rows, height, width, 3)` uint8, each a view of one Arrow array."""
        height, width = self.dataset[0]["height"], self.dataset[0]["width"]
        chunks = []
        for array in filter(len, self.dataset.data.column("pixels").chunks):
            _, offsets, values = array.buffers()  # of a `binary` array: validity, where each row starts, all rows
            start = int(np.frombuffer(offsets, np.int32)[array.offset])
            pixels = np.frombuffer(values, np.uint8, count=len(array) * height * width * 3, offset=start)
            chunks.append(pixels.reshape(len(array), height, width, 3))
        return chunks

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of each chunk, then the total number of rows."""
        return np.cumsum([0, *map(len, self.chunks)])

    @cached_property
    def labels(self) -> torch.Tensor | None:
        """`(rows,)` int64, if the images have labels."""
        if "label" not in self.dataset.column_names:
            return None
        return torch.from_numpy(self.dataset.data.column("label").to_numpy().copy())

    def fetch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`pixel_values` `(B, 3, height, width)` uint8, with the channels last in memory; `labels` `(B,)`, if any."""
        indices = np.asarray(indices)
        batch = np.empty((len(indices), *self.chunks[0].shape[1:]), np.uint8)
        order = np.argsort(indices)
        rows = indices[order]
        bounds = np.searchsorted(rows, self.starts)  # once sorted, each chunk's rows are a slice
        for chunk in np.flatnonzero(np.diff(bounds)):
            here = slice(bounds[chunk], bounds[chunk + 1])
            batch[order[here]] = self.chunks[chunk][rows[here] - self.starts[chunk]]
        fetched = {"pixel_values": torch.from_numpy(batch).permute(0, 3, 1, 2)}
        return fetched if self.labels is None else fetched | {"labels": self.labels[torch.from_numpy(indices)]}

"""Datasets in, `pixel_values` and `labels` out.

`load_images` brings any source to one form: two splits of RGB images with label ids, every row checked. `TrainImages`
and `EvalImages` make the model's inputs of them; `TrainSampler` says which images an epoch sees and with which random
seeds, so that an image's augmentation depends on nothing but the run's seed, the epoch and the position in it: not on
the workers, the processes or where a run was resumed.
"""

import contextlib
import hashlib
import io
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from PIL import Image as PILImage
from PIL import ImageOps
from sklearn.datasets import load_digits
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2
from transformers import DeiTImageProcessor

from .augmentation import BatchAugmentation
from .errors import UserError, first_line, list_some


# Where a data set is decoded once for all epochs: above this size it stays encoded, as it came.
MAX_DECODED_BYTES = 8 * 2**30
MAX_BATCH_BYTES = 128 * 2**20
# Longer ones are refused: the other side alone, brought to the model's size, would fill the memory.
MAX_ASPECT_RATIO = 200
# Bump when images or labels come out differently than before: what `datasets` has cached is then made anew.
CHECK_VERSION = 1
# Up to this height and width, of the images and of the model's input, a CPU augments whole batches faster than timm
# does their images; far above it is slower (results/augment_on.md).
MAX_CPU_BATCH_AUGMENTATION_SIZE = 64
# The subsets that --max_train_samples and --train_val_split take are the same in every run, whatever its --seed:
# runs that are compared then see the same images, and a fitted teacher serves them all.
SUBSET_SEED = 0
EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "test")


@dataclass
class DataArguments:
    """Which images, and how they are augmented."""

    dataset_name: str = field(
        default="uoft-cs/cifar10",
        metadata={
            "help": "A dataset on the Hub, a local folder (Parquet files, or one folder of images a class, or what "
            "`save_to_disk` wrote), or `digits`: the handwritten digits that ship inside scikit-learn."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The dataset's configuration."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "The column of images. Default: the first that holds images."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "The column of labels. Default: the first of class labels, or `label`."}
    )
    train_val_split: float = field(
        default=0.1, metadata={"help": "Share of the training images to evaluate on where the dataset has one split."}
    )
    validation_from_train: bool = field(
        default=False,
        metadata={
            "help": "Evaluate on --train_val_split of the training images although the dataset has another split: to "
            "choose a recipe without looking at the test images."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random subset of this size."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on a random subset of this size."})
    max_validation_samples: int | None = field(
        default=None,
        metadata={
            "help": "While training goes on, evaluate on a random subset of this size; at its end on all images that "
            "there are to evaluate on."
        },
    )
    crop: str = field(
        default="auto",
        metadata={
            "help": "Training crops. `resized`: a random part of the image, 8 to 100 %% of its area, resized. "
            "`padded`: the image with zeros around it, shifted. `none`: the image, resized. `auto`: as DeiT's code, "
            "`padded` up to 32 pixels and `resized` above.",
            "choices": ["auto", "resized", "padded", "none"],
        },
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    auto_augment: str = field(
        default="rand-m9-mstd0.5-inc1", metadata={"help": "timm's AutoAugment or RandAugment policy, or `none`."}
    )
    random_erasing: float = field(default=0.25, metadata={"help": "Probability of random erasing."})
    augment_on: str = field(
        default="auto",
        metadata={
            "help": "`loader`: timm's transforms, image by image, in the loader's workers. `device`: the same recipe "
            "on whole batches where the model is; for images that all have one size. `auto`: `device` where that "
            "is possible and, without a GPU, the images and the model's input have at most 64 pixels a side.",
            "choices": ["auto", "loader", "device"],
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training images while training, and keep none on disk or in memory: for Parquet (local "
            "or on the Hub) and image folders larger than both."
        },
    )
    shuffle_buffer_size: int = field(
        default=10_000,
        metadata={"help": "With --streaming: the encoded images that each process holds to draw its batches from."},
    )
    eval_crop_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Evaluation resizes the shorter edge to image_size / ratio and takes the centre. Default: as "
            "DeiT's code, 0.875 where training takes resized crops, 1 elsewhere."
        },
    )

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples", "max_validation_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: it has to be at least 1.")
        for name in ("horizontal_flip", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} {getattr(self, name)}: a probability is between 0 and 1.")
        if self.shuffle_buffer_size < 1:
            raise UserError(f"--shuffle_buffer_size {self.shuffle_buffer_size}: it has to be at least 1.")
        if self.streaming and self.max_train_samples is not None:
            raise UserError("--max_train_samples takes a random subset, which --streaming cannot: leave one out.")
        if self.streaming and self.augment_on == "device":
            raise UserError(
                "--augment_on device needs images of one size, which --streaming knows when it has read them all: "
                "use --augment_on loader."
            )
        if not 0 < self.train_val_split < 1:
            raise UserError(f"--train_val_split {self.train_val_split}: a share is between 0 and 1.")
        if self.eval_crop_ratio is not None and not 0 < self.eval_crop_ratio <= 1:
            raise UserError(f"--eval_crop_ratio {self.eval_crop_ratio}: it is above 0 and at most 1.")

    def crop_at(self, image_size: int) -> str:
        """The training crop at that size: `crop`, with `auto` resolved."""
        if self.crop != "auto":
            return self.crop
        return "resized" if image_size > 32 else "padded"


@dataclass
class ImageData:
    """
    Two splits of checked images, each a `datasets.Dataset` with `label` (absent where the training images have none)
    and either `pixels`, `height` and `width` (decoded RGB) or `image` (encoded, decoded when read). With
    `--streaming`, `train` is a `streaming.StreamedImages`, which are checked when they are read.
    """

    train: Dataset
    evaluation: Dataset
    label_names: list[str]
    name: str
    source: str  # "hub", "local" or "scikit-learn"
    eval_split: str
    fingerprint: str  # of the training images, their labels and the label names: the content, not where it lies

    @property
    def unseen_labels(self) -> list[str]:
        """Labels without a training image: no mistake, since a subset may lack them, but worth telling."""
        if not isinstance(self.train, Dataset) or "label" not in self.train.column_names:
            return []  # streamed or without labels: nobody knows
        seen = set(self.train.unique("label"))
        return [name for index, name in enumerate(self.label_names) if index not in seen]


# ---------------------------------------------------------------------------------------------------------------------
# Loading and checking
# ---------------------------------------------------------------------------------------------------------------------


def load_images(args: DataArguments, labels_needed: bool = True) -> ImageData:
    """
    Loads, checks and decodes the images.

    Args:
        args ([`DataArguments`])
        labels_needed (`bool`, *optional*, defaults to `True`): whether training needs labels. Without, the training
            split may lack them.

    Raises:
        UserError: if the dataset is neither on disk nor reachable, lacks a column, has labels that are missing, out
            of range or different in the two splits, or holds an image that cannot be decoded.
    """
    splits, source = load_splits(args.dataset_name, args.dataset_config_name)
    train, evaluation, eval_split = train_and_evaluation(splits, args)
    image_column = find_image_column(train, args)
    label_column = find_label_column(evaluation, args)
    is_held_out = eval_split not in splits
    train, evaluation, label_names = with_label_ids(train, evaluation, label_column, labels_needed, is_held_out)
    check_label_names(label_names, label_column, args.dataset_name)
    train = check_split(
        train, "train", image_column, label_column, len(label_names), args.max_train_samples, labels_needed
    )
    evaluation = check_split(
        evaluation, eval_split, image_column, label_column, len(label_names), args.max_eval_samples, True
    )
    content = hashlib.sha256("\0".join(label_names).encode())
    content.update(np.asarray(train.with_format("numpy")["digest"][:]).tobytes())
    return ImageData(
        train.remove_columns("digest"),
        evaluation.remove_columns("digest"),
        label_names,
        args.dataset_name,
        source,
        eval_split,
        content.hexdigest(),
    )


def load_splits(name: str, config_name: str | None) -> tuple[DatasetDict, str]:
    """The dataset's splits, and where they come from."""
    if name == "digits" and not os.path.isdir(name):
        return _digits(), "scikit-learn"
    folder = os.path.expanduser(name)
    if os.path.isfile(folder):  # else `datasets` would look for a cached dataset of that name
        raise UserError(f"--dataset_name {name}: it is a file, not a folder.")
    with naming_the_dataset(name):
        if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
            # Through the cache: of rows that lie in the user's folder, `datasets` would keep results in that folder.
            files = {
                split: [file["filename"] for file in rows.cache_files]
                for split, rows in load_from_disk(folder).items()
            }
            return _load_each("arrow", files), "local"
        if os.path.isdir(folder):
            return _load_folder(folder, config_name), "local"
        return load_dataset(name, config_name), "hub"


@contextlib.contextmanager
def naming_the_dataset(name: str) -> Iterator[None]:
    """
    Raises:
        UserError: if `name` stands for a folder that is not there, or loading it fails inside.
    """
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not os.path.isdir(os.path.expanduser(name)):
        raise UserError(f"--dataset_name {name}: there is no such folder.")
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the builder or the network raises, it is about what the user named
        raise UserError(
            f"--dataset_name {name}: the dataset is neither a readable local folder nor reachable on the Hub "
            f"({first_line(error)}). To run offline, name a folder of Parquet files or of one folder of "
            "images a class, or use `--dataset_name digits`; a dataset that was loaded before is taken from the cache "
            "with HF_HUB_OFFLINE=1."
        ) from error


def _load_folder(folder: str, config_name: str | None) -> DatasetDict:
    builder = load_dataset_builder(folder, config_name)
    if not isinstance(builder.config, ParquetConfig):
        return load_dataset(folder, config_name)
    return _load_each("parquet", {str(split): list(files) for split, files in builder.config.data_files.items()})


def _load_each(kind: str, files: dict[str, list[str]]) -> DatasetDict:
    """
    Splits, one by one: together, all are read with the features of the first file, whatever the others say of theirs.
    Label 0 would then be `cat` in training and `dog` in evaluation, and nobody would know.
    """
    return DatasetDict(
        {split: load_dataset(kind, data_files={split: names}, split=split) for split, names in files.items()}
    )


def _digits() -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey pixels (Alpaydin, 1998); every fifth is held out."""
    digits = load_digits()
    images = [PILImage.fromarray(np.uint8(image * 255 / 16)) for image in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    rows = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    held_out = np.arange(len(rows)) % 5 == 4
    return DatasetDict(
        {"train": rows.select(np.flatnonzero(~held_out)), "test": rows.select(np.flatnonzero(held_out))}
    )


def train_and_evaluation(splits: DatasetDict, args: DataArguments) -> tuple[Dataset, Dataset, str]:
    if "train" not in splits:
        raise UserError(f"{args.dataset_name} has no split `train`; it has {', '.join(splits)}.")
    for name in EVALUATION_SPLITS:
        if name in splits and not args.validation_from_train:
            evaluation, eval_split = splits[name], name
            train = splits["train"]
            break
    else:
        if len(splits["train"]) < 2:
            raise UserError(f"{args.dataset_name} has {len(splits['train'])} images: too few to hold some out.")
        held_out = max(1, round(args.train_val_split * len(splits["train"])))
        parts = splits["train"].train_test_split(test_size=held_out, seed=SUBSET_SEED)
        train, evaluation, eval_split = parts["train"], parts["test"], "train (held out)"
    for name, split in (("train", train), (eval_split, evaluation)):
        if len(split) == 0:
            raise UserError(f"{args.dataset_name}: split `{name}` is empty.")
    return train, evaluation, eval_split


def find_image_column(split: Dataset, args: DataArguments) -> str:
    name = args.image_column_name
    if name is not None and name not in split.column_names:
        raise UserError(f"--image_column_name {name}: no such column; there are {', '.join(split.column_names)}.")
    images = [column for column, feature in split.features.items() if isinstance(feature, Image)]
    if name is None:
        if not images:
            raise UserError(
                f"{args.dataset_name} has no column of images; its columns are "
                + ", ".join(f"{column} ({_kind(feature)})" for column, feature in split.features.items())
                + "."
            )
        return images[0]
    if name not in images:
        raise UserError(
            f"--image_column_name {name}: the column holds {_kind(split.features[name])}, not images"
            + (f"; {', '.join(images)} does." if images else ".")
        )
    return name


def find_label_column(split: Dataset, args: DataArguments) -> str:
    name = args.label_column_name
    if name is not None and name not in split.column_names:
        raise UserError(f"--label_column_name {name}: no such column; there are {', '.join(split.column_names)}.")
    if name is None:
        labels = [column for column, feature in split.features.items() if isinstance(feature, ClassLabel)]
        labels += [column for column in ("label", "labels") if column in split.column_names]
        if not labels:
            raise UserError(
                f"{args.dataset_name} has no column of class labels; name one with --label_column_name. "
                f"Its columns are {', '.join(split.column_names)}."
            )
        name = labels[0]
    feature = split.features[name]
    is_label = isinstance(feature, ClassLabel) or (
        isinstance(feature, Value) and (feature.dtype in ("string", "large_string") or "int" in feature.dtype)
    )
    if not is_label:
        raise UserError(
            f"--label_column_name {name}: the column holds {_kind(feature)}; labels are class labels, strings or "
            "integers."
        )
    return name


def _kind(feature) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def with_label_ids(
    train: Dataset, evaluation: Dataset, column: str, labels_needed: bool, is_held_out: bool
) -> tuple[Dataset, Dataset, list[str]]:
    """Both splits with ids in the label column (missing ones stay `None`), and the names of the ids."""
    if column not in train.column_names:
        if labels_needed:
            raise UserError(
                f"The training split has no column {column!r}; it has {', '.join(train.column_names)}. Training "
                "without labels is `--distill_mode distill --single_token`."
            )
        train = train.add_column(column, [None] * len(train), feature=evaluation.features[column])
    kinds = [split.features[column] for split in (train, evaluation)]
    if all(isinstance(kind, ClassLabel) for kind in kinds):
        names = kinds[0].names
        differ = set(names) ^ set(kinds[1].names)
        if differ:
            raise UserError(
                f"The splits' labels differ: {list_some(sorted(differ))} in one only. Training has "
                f"{list_some(names)}, evaluation {list_some(kinds[1].names)}."
            )
        if names != kinds[1].names:
            evaluation = evaluation.align_labels_with_mapping({name: i for i, name in enumerate(names)}, column)
        return train, evaluation, names

    found = [{label for label in split.unique(column) if label is not None} for split in (train, evaluation)]
    if len({type(label) for label in found[0] | found[1]}) > 1:
        raise UserError(f"Column {column!r} holds {_kind(kinds[0])} in one split and {_kind(kinds[1])} in the other.")
    # A negative number stands for a missing label, and is told with its row.
    found = [{label for label in labels if isinstance(label, str) or label >= 0} for labels in found]
    # A label of one image may well be held out; that two splits differ is a mistake.
    names = sorted(found[0] | found[1] if is_held_out else found[0] or found[1])
    unknown = sorted(found[1] - set(names))
    if unknown:
        raise UserError(
            f"The splits' labels differ: evaluation has {list_some(unknown)} in column {column!r}, which "
            f"training lacks "
            f"(it has {list_some(names)})."
        )
    train, evaluation = (
        split.map(
            _encode_labels,
            batched=True,
            fn_kwargs={"column": column, "names": names},
            features=Features({**split.features, column: Value("int64")}),
            desc="Numbering the labels",
        )
        for split in (train, evaluation)
    )
    return train, evaluation, [str(name) for name in names]


def _encode_labels(rows: dict, column: str, names: list) -> dict:
    ids = {name: i for i, name in enumerate(names)}
    return {column: [None if name is None else ids.get(name, -1) for name in rows[column]]}


def check_split(
    split: Dataset,
    split_name: str,
    image_column: str,
    label_column: str,
    num_labels: int,
    max_samples: int | None,
    labels_needed: bool,
) -> Dataset:
    """Every row's image decoded and label checked, once: `datasets` caches the result."""
    if image_column not in split.column_names:
        raise UserError(
            f"Split `{split_name}` has no column {image_column!r}; it has {', '.join(split.column_names)}."
        )
    rows = None
    if max_samples is not None and max_samples < len(split):
        rows = random_rows(len(split), max_samples)
        split = split.select(rows)
    split = split.select_columns([image_column, label_column]).cast_column(image_column, Image(decode=False))

    arguments = {
        "split_name": split_name,
        "image_column": image_column,
        "label_column": label_column,
        "num_labels": num_labels,
        "rows": rows,
        "labels_needed": labels_needed,
        "version": CHECK_VERSION,
    }
    image_bytes = _mean_decoded_bytes(split[:: max(1, len(split) // 100)][image_column])
    decode = image_bytes * len(split) <= MAX_DECODED_BYTES
    features = {"label": Value("int64"), "digest": Value("int64")}
    if decode:
        features |= {"pixels": Value("binary"), "height": Value("int32"), "width": Value("int32")}
    batch_size = int(max(1, min(1000, MAX_BATCH_BYTES // image_bytes)))
    checked = split.map(
        _check_rows,
        batched=True,
        batch_size=batch_size,
        writer_batch_size=batch_size,
        with_indices=True,
        remove_columns=split.column_names,
        features=Features(features),
        fn_kwargs={"decode": decode, **arguments},
        # Processes cost more to start than a small set takes.
        num_proc=min(len(os.sched_getaffinity(0)), 16) if len(split) >= 20_000 else None,
        desc=f"Checking {split_name}",
    )
    if not decode:
        encoded = split.select_columns(image_column).rename_column(image_column, "image").cast_column("image", Image())
        checked = concatenate_datasets([encoded, checked], axis=1)
    if not labels_needed and -1 in checked.unique("label"):
        checked = checked.remove_columns("label")
    return checked


def random_rows(num_rows: int, size: int) -> list[int]:
    """So many of the rows of a split, the same in every run; all of them where there are no more."""
    # Shuffled: image folders come class by class. Sorted: reading goes forward through the file.
    return sorted(np.random.default_rng(SUBSET_SEED).permutation(num_rows)[:size].tolist())


def check_label_names(label_names: list[str], label_column: str, dataset_name: str) -> None:
    """Raises a `UserError` where there is nothing to tell apart."""
    if len(label_names) < 2:
        raise UserError(
            f"{dataset_name}: column {label_column!r} has the one label {label_names}; classifying takes two."
        )


def check_label(label: int | None, num_labels: int, place: str) -> None:
    """Raises a `UserError` that begins with the row's place, where its label is missing or out of range."""
    if label is None or label < 0:
        raise UserError(f"{place}: the label is {'missing' if label is None else label}.")
    if label >= num_labels:
        raise UserError(f"{place}: label {label} is out of range; there are {num_labels} labels.")


def decode_checked(encoded: dict, image_column: str, place: str) -> PILImage.Image:
    """As `decode_image`. Raises a `UserError` that begins with the row's place, where that fails."""
    try:
        return decode_image(encoded)
    except Exception as error:  # PIL raises many kinds for what is not an image, or half of one
        raise UserError(
            f"{place}: the image in column {image_column!r} cannot be decoded ({first_line(error)})."
        ) from error


def _check_rows(
    batch: dict,
    indices: list[int],
    decode: bool,
    split_name: str,
    image_column: str,
    label_column: str,
    num_labels: int,
    rows: list[int] | None,
    labels_needed: bool,
    version: int,  # in the fingerprint of the result, so that no older one is taken from the cache
) -> dict:
    """One batch of `Dataset.map`: label, RGB pixels where they are kept, and a digest of both, for each row."""
    output = {"label": [], "digest": []}
    output |= {"pixels": [], "height": [], "width": []} if decode else {}
    for index, encoded, label in zip(indices, batch[image_column], batch[label_column], strict=True):
        row = index if rows is None else rows[index]
        place = f"Split `{split_name}`, row {row}"
        if labels_needed or not (label is None or label < 0):
            check_label(label, num_labels, place)
        else:
            label = -1
        image = decode_checked(encoded, image_column, place)
        pixels = image.tobytes()
        digest = hashlib.blake2b(pixels, digest_size=8, salt=label.to_bytes(8, "little", signed=True))
        output["label"].append(label)
        output["digest"].append(int.from_bytes(digest.digest(), "little", signed=True))
        if decode:
            output["pixels"].append(pixels)
            output["height"].append(image.height)
            output["width"].append(image.width)
    return output


def _mean_decoded_bytes(encoded_images: list[dict]) -> float:
    """Bytes of an RGB image, by the headers of a sample; those that cannot be read are told when they are checked."""
    sizes = []
    for encoded in encoded_images:
        try:
            with _open(encoded) as image:
                sizes.append(image.width * image.height * 3)
        except Exception:
            continue
    return max(1, sum(sizes) / max(1, len(sizes)))


def _open(encoded: dict) -> PILImage.Image:
    return PILImage.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] is not None else encoded["path"])


def decode_image(encoded: dict) -> PILImage.Image:
    """An RGB image, upright, from `datasets`' encoded form: a dict with `bytes` or `path`."""
    if encoded is None:
        raise ValueError("it is missing")
    with _open(encoded) as image:
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise ValueError(
                f"it has {image.width}x{image.height} pixels, one side over {MAX_ASPECT_RATIO} times the other"
            )
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Grey, palette, RGBA, CMYK, 16-bit and float images as 8-bit RGB. 16 bits are scaled, where PIL would clip."""
    if image.mode.startswith("I"):
        image = PILImage.fromarray(np.uint8(np.clip(np.asarray(image, dtype=np.int64) // 257, 0, 255)))
    elif image.mode == "F":
        values = np.asarray(image)
        image = PILImage.fromarray(np.uint8(np.clip(values * (255 if values.max(initial=0) <= 1 else 1), 0, 255)))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# Images to model inputs
# ---------------------------------------------------------------------------------------------------------------------


def make_image_processor(
    args: DataArguments,
    image_size: int,
    image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> DeiTImageProcessor:
    """The preprocessing of evaluation and of the shipped model: resize, centre crop, normalisation."""
    ratio = args.eval_crop_ratio or (0.875 if args.crop_at(image_size) == "resized" else 1.0)
    resized = round(image_size / ratio)
    return DeiTImageProcessor(
        size={"shortest_edge": resized},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(image_mean),
        image_std=list(image_std),
        do_convert_rgb=True,
    )


def make_train_transform(args: DataArguments, image_processor) -> Callable[[PILImage.Image], torch.Tensor]:
    """
    The augmentation of one image, from timm's factory as in DeiT's code: crop, flip, RandAugment, normalisation,
    random erasing (paper, table 9). RGB image in, `(3, image_size, image_size)` float32 out, in the size and
    normalisation of the image processor.

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
    except (AssertionError, ValueError, KeyError, IndexError) as error:  # timm asserts what it knows
        raise UserError(f"--auto_augment {args.auto_augment}: timm does not know this policy.") from error
    if crop != "resized":
        resize = transforms.Resize((image_size, image_size), InterpolationMode.BICUBIC)
        shift = [transforms.RandomCrop(image_size, padding=image_size // 8)] if crop == "padded" else []
        first = transforms.Compose([resize, *shift, *first.transforms[1:]])
    return transforms.Compose([first, second, last])


def read_image(row: dict) -> PILImage.Image:
    """The RGB image of a row of [`ImageData`]'s splits."""
    if "pixels" in row:
        return PILImage.frombuffer("RGB", (row["width"], row["height"]), row["pixels"], "raw", "RGB", 0, 1)
    return to_rgb(row["image"])


def _rows(dataset: Dataset, indices: list[int]) -> Iterator[dict]:
    columns = dataset[indices]
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's CPU generators start from `seed` inside, and go on as before after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def make_train_images(
    dataset: Dataset, args: DataArguments, image_processor, device: str = "cpu"
) -> tuple["TrainImages", BatchAugmentation | None]:
    """
    The training images, and what is left to do to their batches where the model is: nothing with
    `--augment_on loader`, all augmentation with `device`.

    Args:
        device (`str`, *optional*, defaults to `"cpu"`): type of the device that trains; `auto` goes by it.

    Raises:
        UserError: if the device is to augment images of different sizes, or with a policy it does not know.
    """
    if not isinstance(dataset, Dataset):  # streamed
        return dataset.with_transform(make_train_transform(args, image_processor)), None
    image_size = image_processor.crop_size["height"]
    size = common_size(dataset)
    # Where whole batches were measured to be faster (results/augment_on.md); the loader's way works on any device.
    is_small = size is not None and max(*size, image_size) <= MAX_CPU_BATCH_AUGMENTATION_SIZE
    wanted = args.augment_on == "device" or (
        args.augment_on == "auto" and (device == "cuda" or (device == "cpu" and is_small))
    )
    augment = None
    try:
        if wanted and size is None:
            raise ValueError("the images are not all of one size, or too many to be kept decoded.")
        if wanted:
            augment = BatchAugmentation(
                image_size,
                crop=args.crop_at(image_size),
                horizontal_flip=args.horizontal_flip,
                auto_augment=None if args.auto_augment == "none" else args.auto_augment,
                random_erasing=args.random_erasing,
                image_mean=image_processor.image_mean,
                image_std=image_processor.image_std,
            )
    except ValueError as error:
        if args.augment_on == "device":
            raise UserError(f"--augment_on device: {error} Use --augment_on loader.") from error
    return TrainImages(dataset, None if augment else make_train_transform(args, image_processor)), augment


def common_size(dataset: Dataset) -> tuple[int, int] | None:
    """Height and width of the images, where they are decoded and all of one size."""
    if "pixels" not in dataset.column_names:
        return None
    heights, widths = dataset.unique("height"), dataset.unique("width")
    return (heights[0], widths[0]) if len(heights) == len(widths) == 1 else None


class ImageBatches:
    """
    Whole batches of decoded images of one size: NumPy gathers the rows where `datasets` has mapped its Arrow files
    into memory, so that no image becomes a Python object and none is copied but into its batch.

    Args:
        dataset (`datasets.Dataset`): a split of [`ImageData`].
    """

    def __init__(self, dataset: Dataset):
        # A selection of rows is a second table, of indices into the first.
        self.dataset = dataset if dataset._indices is None else dataset.flatten_indices()

    def __getstate__(self) -> dict:
        """For a worker that is not forked: it maps the files itself, where pickled arrays would be copies."""
        return {"dataset": self.dataset}

    @cached_property
    def chunks(self) -> list[np.ndarray]:
        """The images as the file has them: `(rows, height, width, 3)` uint8, each a view of one Arrow array."""
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
        """The row that each chunk starts with, and behind the last one the number of rows."""
        return np.cumsum([0, *map(len, self.chunks)])

    @cached_property
    def labels(self) -> torch.Tensor | None:
        """`(rows,)` int64, where the images have labels."""
        if "label" not in self.dataset.column_names:
            return None
        return torch.from_numpy(self.dataset.data.column("label").to_numpy().copy())

    def fetch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """`pixel_values` `(B, 3, height, width)` uint8, with the channels last in memory; `labels` `(B,)`, if any."""
        indices = np.asarray(indices)
        batch = np.empty((len(indices), *self.chunks[0].shape[1:]), np.uint8)
        order = np.argsort(indices)
        rows = indices[order]
        bounds = np.searchsorted(rows, self.starts)  # sorted, the rows of one chunk are a slice
        for chunk in np.flatnonzero(np.diff(bounds)):
            here = slice(bounds[chunk], bounds[chunk + 1])
            batch[order[here]] = self.chunks[chunk][rows[here] - self.starts[chunk]]
        fetched = {"pixel_values": torch.from_numpy(batch).permute(0, 3, 1, 2)}
        return fetched if self.labels is None else fetched | {"labels": self.labels[torch.from_numpy(indices)]}


class TrainImages(torch.utils.data.Dataset):
    """
    Training images. Its keys are those of [`TrainSampler`]: an index, and the seed of all that is random in the image.

    Args:
        dataset (`datasets.Dataset`): a split of [`ImageData`].
        transform (`Callable`, *optional*): RGB image to `pixel_values`. `None` gives batches of uint8 pixels, for
            [`BatchAugmentation`].
    """

    def __init__(self, dataset: Dataset, transform: Callable[[PILImage.Image], torch.Tensor] | None):
        self.dataset = dataset
        self.transform = transform
        self.batches = ImageBatches(dataset) if transform is None else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return {name: values[0] for name, values in collate_images(self.__getitems__([key])).items()}

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[dict] | dict:
        if self.batches is not None:
            return self.batches.fetch([index for index, _ in keys]) | {"seeds": np.array([seed for _, seed in keys])}
        samples = []
        for (_, seed), row in zip(keys, _rows(self.dataset, [index for index, _ in keys]), strict=True):
            with seeded(seed):
                sample = {"pixel_values": self.transform(read_image(row)), "seeds": seed}
            if "label" in row:
                sample["labels"] = row["label"]
            samples.append(sample)
        return samples


class EvalImages(torch.utils.data.Dataset):
    """Images as the image processor, which ships with the model, prepares them."""

    def __init__(self, dataset: Dataset, image_processor):
        self.dataset = dataset
        self.image_processor = image_processor
        self.batches = ImageBatches(dataset) if common_size(dataset) else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return {name: values[0] for name, values in collate_images(self.__getitems__([index])).items()}

    def __getitems__(self, indices: list[int]) -> list[dict] | dict:
        if self.batches is not None:  # the processor makes the same of tensors, without the way through PIL
            batch = self.batches.fetch(indices)
            return batch | {"pixel_values": self._processed(batch["pixel_values"])}
        rows = list(_rows(self.dataset, indices))
        pixel_values = self._processed([read_image(row) for row in rows])
        return [
            {"pixel_values": pixels, "labels": row["label"]} for pixels, row in zip(pixel_values, rows, strict=True)
        ]

    def _processed(self, images: torch.Tensor | list[PILImage.Image]) -> torch.Tensor:
        return self.image_processor(images, return_tensors="pt")["pixel_values"]


def collate_images(samples: list[dict] | dict) -> dict[str, torch.Tensor]:
    """
    A batch of samples, or the batch that a dataset has fetched whole:
    `pixel_values` (B, 3, height, width); `labels` (B,), where the images have them; and in training `seeds` (B,), a
    NumPy array, so that it stays on the CPU when the tensors go to the device.
    """
    if isinstance(samples, dict):
        return samples
    batch = {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}
    if "labels" in samples[0]:
        batch["labels"] = torch.tensor([sample["labels"] for sample in samples])
    if "seeds" in samples[0]:
        batch["seeds"] = np.array([sample["seeds"] for sample in samples])
    return batch


def mix_images(
    pixel_values: torch.Tensor, labels: torch.Tensor | None, seed: int, num_labels: int, mixup: float, cutmix: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019) of each image with its neighbour in the batch; where both
    are on, one of them by a fair coin, as in DeiT's code.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, 3, height, width)`)
        labels (`torch.Tensor` of shape `(B,)`, *optional*): label ids.
        seed (`int`): decides the coin, the share of each image and the box.
        num_labels (`int`): K.
        mixup, cutmix (`float`): alpha of the Beta distribution of the share; 0 turns it off.

    Returns:
        The mixed images, and the labels as distributions of shape `(B, K)` (ids where nothing is mixed).
    """
    if mixup <= 0 and cutmix <= 0:
        return pixel_values, labels
    has_labels = labels is not None
    if not has_labels:  # torchvision's transforms mix labels whatever
        labels = torch.zeros(len(pixel_values), dtype=torch.long, device=pixel_values.device)
    with seeded(seed):
        use_cutmix = cutmix > 0 and (mixup <= 0 or torch.rand(()).item() < 0.5)
        mix = v2.CutMix if use_cutmix else v2.MixUp
        pixel_values, labels = mix(alpha=cutmix if use_cutmix else mixup, num_classes=num_labels)(pixel_values, labels)
    return pixel_values, labels if has_labels else None


class TrainSampler(torch.utils.data.Sampler):
    """
    The keys of an epoch, for all processes together: `(index, seed)` pairs in random order.

    Args:
        num_images (`int`): size of the dataset.
        batch_size (`int`): images in a step of all processes. The rest that does not fill one is left out (other
            images each epoch), so that all batches have one shape; only a dataset smaller than a batch is taken whole.
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
            order = torch.cat(
                [part[torch.randperm(len(part), generator=generator)] for part in order.split(self.batch_size)]
            )
        seeds = torch.randint(2**62, (self.num_samples,), generator=generator)
        yield from zip(order.tolist(), seeds.tolist(), strict=True)

"""Brings any source into one form: two splits of RGB images with label ids, every row checked."""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets
from PIL import Image as PILImage
from sklearn.model_selection import train_test_split

from ..arguments import ImageArguments
from ..device import cpu_count
from ..errors import UserError, first_line, list_some
from .decoding import decode_image, open_image
from .sampling import SUBSET_SEED, random_rows
from .sources import EVALUATION_SPLITS, check_not_empty, find_eval_split, load_splits, storing_in_cache


# Larger splits stay encoded, and are decoded again in each epoch.
MAX_DECODED_BYTES = 8 * 2**30
MAX_BATCH_BYTES = 128 * 2**20
HELD_OUT = "train (held out)"  # the name of an evaluation split that is taken from the training split
# Bump when images or labels come out differently than before, so that `datasets` does not reuse what it has cached.
CHECK_VERSION = 1
# The columns of a checked split, and those added for images that are kept decoded.
CHECKED = {"label": Value("int64"), "digest": Value("int64")}
DECODED = {"pixels": Value("binary"), "height": Value("int32"), "width": Value("int32")}


@dataclass
class ImageData:
    """
    Two splits of checked images, each a `datasets.Dataset` with `label` (absent if the training images have none) and
    either `pixels`, `height` and `width` (decoded RGB) or `image` (encoded, decoded when read). With `--streaming`,
    `train` is a `streaming.StreamedSplit`, checked as it is read.
    """

    args: ImageArguments
    train: Dataset
    evaluation: Dataset
    label_names: list[str]
    source: str  # "hub", "local" or "scikit-learn"
    eval_split: str
    fingerprint: str  # of the training images, their labels and the label names: their content, not their location

    @property
    def name(self) -> str:
        return self.args.dataset_name

    @property
    def validation(self) -> Dataset:
        """The images to evaluate on during training: all of `evaluation`, or --max_validation_samples of them."""
        return self.evaluation.select(random_rows(len(self.evaluation), self.args.max_validation_samples))

    @property
    def is_streamed(self) -> bool:
        return not isinstance(self.train, Dataset)

    @property
    def has_train_labels(self) -> bool:
        return "label" in self.train.column_names

    def label_counts(self) -> np.ndarray:
        """
        The number of training images of each label, `(K,)`.

        Raises:
            UserError: if they are streamed from the Hub, where counting would read the whole label column.
        """
        if self.is_streamed and self.source == "hub":
            raise UserError(
                "--class_weights needs the number of images in each class, which --streaming from the Hub does not "
                "count: download the dataset first, or leave out --class_weights."
            )
        labels = self.train.label_ids() if self.is_streamed else self.train["label"][:]
        return np.bincount(labels, minlength=len(self.label_names))

    @property
    def unseen_labels(self) -> list[str]:
        """Labels without training images: not a mistake, since a subset may lack them, but worth mentioning."""
        if self.is_streamed or not self.has_train_labels:
            return []  # unknown
        seen = set(self.train.unique("label"))
        return [name for index, name in enumerate(self.label_names) if index not in seen]


def load_stored_images(args: ImageArguments, labels_needed: bool = True) -> ImageData:
    """As [`load_images`], with every row checked up front, and kept decoded if all of them fit."""
    splits, source = load_splits(args.dataset_name, args.dataset_config_name)
    train, evaluation, eval_split = train_and_evaluation(splits, args)
    image_column = find_image_column(train.features, args)
    label_column = find_label_column(evaluation.features, args)
    is_held_out = eval_split == HELD_OUT
    train, evaluation, label_names = with_label_ids(train, evaluation, label_column, labels_needed, is_held_out)
    columns = image_column, label_column, len(label_names)
    train = check_split(train, "train", *columns, args.max_train_samples, labels_needed)
    evaluation = check_split(evaluation, eval_split, *columns, args.max_eval_samples).remove_columns("digest")
    content = hashlib.sha256("\0".join(label_names).encode())
    content.update(np.asarray(train.with_format("numpy")["digest"][:]).tobytes())
    train = train.remove_columns("digest")
    return ImageData(args, train, evaluation, label_names, source, eval_split, content.hexdigest())


class EvaluationData(NamedTuple):
    """One split of checked images, with fields as in [`ImageData`]."""

    images: Dataset
    label_names: list[str]
    source: str
    split: str


@storing_in_cache()
def load_evaluation_images(args: ImageArguments, split: str | None = None) -> EvaluationData:
    """
    The images to evaluate a finished model on. By default, those that a run with these arguments evaluates on; if the
    dataset has no training split, its evaluation split or else its first split.

    Raises:
        UserError: as `load_images`, or if there is no such split.
    """
    splits, source = load_splits(args.dataset_name, args.dataset_config_name)
    if split is None and "train" in splits:
        train, images, split = train_and_evaluation(splits, args)
    else:
        split = split or next((name for name in EVALUATION_SPLITS if name in splits), next(iter(splits)))
        if split not in splits:
            raise UserError(f"--split {split}: {args.dataset_name} has no such split; it has {', '.join(splits)}.")
        images = splits[split]
        train = splits.get("train", images)  # it determines the ids of labels without names
    image_column = find_image_column(images.features, args)
    label_column = find_label_column(images.features, args)
    train = train.select_columns([name for name in train.column_names if name == label_column])
    _, images, label_names = with_label_ids(train, images, label_column, False, split == HELD_OUT)
    images = check_split(images, split, image_column, label_column, len(label_names), args.max_eval_samples)
    return EvaluationData(images.remove_columns("digest"), label_names, source, split)


# ---- Splits, columns and labels ----


def train_and_evaluation(splits: DatasetDict, args: ImageArguments) -> tuple[Dataset, Dataset, str]:
    """The training split, the evaluation split, and the latter's name."""
    eval_split = find_eval_split(splits, args.dataset_name)
    if eval_split is not None and not args.validation_from_train:
        train, evaluation = splits["train"], splits[eval_split]
    else:
        if len(splits["train"]) < 2:
            raise UserError(f"{args.dataset_name} has {len(splits['train'])} images: too few to hold some out.")
        find_image_column(splits["train"].features, args)  # so that a lack of images is reported first
        labels = splits["train"][find_label_column(splits["train"].features, args)][:]
        kept, held_out = hold_out(labels, args.train_val_split)
        train, evaluation = splits["train"].select(kept), splits["train"].select(held_out)
        eval_split = HELD_OUT
    check_not_empty(args.dataset_name, {"train": len(train), eval_split: len(evaluation)})
    return train, evaluation, eval_split


def hold_out(labels: list, share: float) -> tuple[list[int], list[int]]:
    """The rows to keep and those to hold out: the same share of each label, if every label has enough images."""
    held_out = max(1, round(share * len(labels)))
    counts = Counter(labels)
    is_divisible = min(counts.values()) > 1 and len(counts) <= min(held_out, len(labels) - held_out)
    return train_test_split(
        range(len(labels)),
        test_size=held_out,
        random_state=SUBSET_SEED,
        stratify=[str(label) for label in labels] if is_divisible else None,
    )


def find_image_column(features: Features, args: ImageArguments) -> str:
    name = args.image_column_name
    _check_column("--image_column_name", name, features)
    images = [column for column, feature in features.items() if isinstance(feature, Image)]
    if name is None:
        if not images:
            columns = (f"{column} ({_kind(feature)})" for column, feature in features.items())
            raise UserError(f"{args.dataset_name} has no image column; its columns are {', '.join(columns)}.")
        return images[0]
    if name not in images:
        raise UserError(
            f"--image_column_name {name}: the column holds {_kind(features[name])}, not images"
            + (f"; images are in {', '.join(images)}." if images else ".")
        )
    return name


def find_label_column(features: Features, args: ImageArguments) -> str:
    name = args.label_column_name
    _check_column("--label_column_name", name, features)
    if name is None:
        labels = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
        labels += [column for column in ("label", "labels") if column in features]
        if not labels:
            raise UserError(
                f"{args.dataset_name} has no label column; name one with --label_column_name. "
                f"Its columns are {', '.join(features)}."
            )
        name = labels[0]
    kind = _kind(features[name])
    if kind not in ("ClassLabel", "string", "large_string") and "int" not in kind:
        raise UserError(
            f"--label_column_name {name}: the column holds {kind}; labels must be class labels, strings or integers."
        )
    return name


def _check_column(flag: str, name: str | None, features: Features) -> None:
    if name is not None and name not in features:
        raise UserError(f"{flag} {name}: no such column; the columns are {', '.join(features)}.")


def _kind(feature) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def with_label_ids(
    train: Dataset, evaluation: Dataset, column: str, labels_needed: bool, is_held_out: bool
) -> tuple[Dataset, Dataset, list[str]]:
    """Both splits with ids in the label column (missing ones stay `None`), and the label names."""
    if column not in train.column_names:
        if labels_needed:
            raise UserError(
                f"The training split has no column {column!r}; it has {', '.join(train.column_names)}. To train "
                "without labels, use `--distill_mode distill --single_token`."
            )
        train = train.add_column(column, [None] * len(train), feature=evaluation.features[column])
    kinds = [split.features[column] for split in (train, evaluation)]
    if all(isinstance(kind, ClassLabel) for kind in kinds):
        names = kinds[0].names
        differ = set(names) ^ set(kinds[1].names)
        if differ:
            raise UserError(
                f"The splits' labels differ: {list_some(sorted(differ))} in one split only. Training has "
                f"{list_some(names)}, evaluation {list_some(kinds[1].names)}."
            )
        if names != kinds[1].names:
            # (`datasets`' own align_labels_with_mapping takes names that differ only in case for one.)
            ids = {name: i for i, name in enumerate(names)}
            evaluation = _number_labels(evaluation, column, {i: ids[name] for i, name in enumerate(kinds[1].names)})
    else:
        names = _distinct_labels(train, evaluation, column, is_held_out)
        ids = {name: i for i, name in enumerate(names)}
        train, evaluation = (_number_labels(split, column, ids) for split in (train, evaluation))
    if len(names) < 2:
        raise UserError(f"Column {column!r} has only the labels {names}; a classifier needs at least two.")
    return train, evaluation, [str(name) for name in names]


def _distinct_labels(train: Dataset, evaluation: Dataset, column: str, is_held_out: bool) -> list:
    """Sorted strings or numbers: the training split's, or both splits' if one is held out from the other."""
    found = [set(split.unique(column)) - {None} for split in (train, evaluation)]
    if len({type(label) for label in found[0] | found[1]}) > 1:
        kinds = [_kind(split.features[column]) for split in (train, evaluation)]
        raise UserError(f"Column {column!r} holds {kinds[0]} in one split and {kinds[1]} in the other.")
    # A negative number means a missing label, and is reported with its row.
    found = [{label for label in labels if isinstance(label, str) or label >= 0} for labels in found]
    # A label's only image may happen to be held out; in splits that the dataset has, a difference is a mistake.
    names = sorted(found[0] | found[1] if is_held_out else found[0] or found[1])
    unknown = sorted(found[1] - set(names))
    if unknown:
        raise UserError(
            f"The splits' labels differ: evaluation has {list_some(unknown)} in column {column!r}, which training "
            f"lacks (it has {list_some(names)})."
        )
    return names


def _number_labels(split: Dataset, column: str, ids: dict) -> Dataset:
    """Replaces labels by their ids. Others, which are missing or out of range, stay, to be reported with their row."""
    return split.map(
        _numbered,
        batched=True,
        fn_kwargs={"column": column, "ids": ids},
        features=Features({**split.features, column: Value("int64")}),
        desc="Numbering the labels",
    )


def _numbered(rows: dict, column: str, ids: dict) -> dict:
    return {column: [ids.get(label, label) for label in rows[column]]}


# ---- Rows ----


def check_split(
    split: Dataset,
    split_name: str,
    image_column: str,
    label_column: str,
    num_labels: int,
    max_samples: int | None,
    labels_needed: bool = True,
) -> Dataset:
    """Decodes every row's image and checks its label, once: `datasets` caches the result."""
    if image_column not in split.column_names:
        raise UserError(
            f"Split `{split_name}` has no column {image_column!r}; it has {', '.join(split.column_names)}."
        )
    rows = random_rows(len(split), max_samples)
    split = split.select(rows).select_columns([image_column, label_column])
    split = split.cast_column(image_column, Image(decode=False))
    image_bytes = _mean_decoded_bytes(split[:: max(1, len(split) // 100)][image_column])
    decode = image_bytes * len(split) <= MAX_DECODED_BYTES
    batch_size = int(max(1, min(1000, MAX_BATCH_BYTES // image_bytes)))
    checked = split.map(
        _RowCheck(split_name, image_column, label_column, num_labels, rows, labels_needed, decode),
        batched=True,
        batch_size=batch_size,
        writer_batch_size=batch_size,
        with_indices=True,
        remove_columns=split.column_names,
        features=Features(CHECKED | DECODED if decode else CHECKED),
        # Starting processes takes longer than checking a small split.
        num_proc=min(cpu_count(), 16) if len(split) >= 20_000 else None,
        desc=f"Checking {split_name}",
    )
    if not decode:
        encoded = split.select_columns(image_column)
        if image_column != "image":  # `datasets` refuses to rename a column to its own name
            encoded = encoded.rename_column(image_column, "image")
        checked = concatenate_datasets([encoded.cast_column("image", Image()), checked], axis=1)
    if not labels_needed and -1 in checked.unique("label"):
        checked = checked.remove_columns("label")
    return checked


@dataclass
class _RowCheck:
    """For `Dataset.map`: each row's label, a digest of label and pixels, and the RGB pixels if they are kept."""

    split_name: str
    image_column: str
    label_column: str
    num_labels: int
    rows: Sequence[int]  # their numbers in the whole split
    labels_needed: bool
    decode: bool
    version: int = CHECK_VERSION  # part of the fingerprint, so that the cache returns no results of older versions

    def __call__(self, batch: dict, indices: list[int]) -> dict:
        output = {column: [] for column in (CHECKED | DECODED if self.decode else CHECKED)}
        for index, encoded, label in zip(indices, batch[self.image_column], batch[self.label_column], strict=True):
            place = f"Split `{self.split_name}`, row {self.rows[index]}"
            if self.labels_needed or not (label is None or label < 0):
                check_label(label, self.num_labels, place)
            else:
                label = -1
            image = decode_checked(encoded, self.image_column, place)
            pixels = image.tobytes()
            digest = hashlib.blake2b(pixels, digest_size=8, salt=label.to_bytes(8, "little", signed=True)).digest()
            values = label, int.from_bytes(digest, "little", signed=True), pixels, image.height, image.width
            for column, value in zip(output.values(), values, strict=False):  # without the pixels if they are not kept
                column.append(value)
        return output


def check_label(label: int | None, num_labels: int, place: str) -> None:
    """Raises a `UserError` that starts with the row's location if its label is missing or out of range."""
    if label is None or label < 0:
        raise UserError(f"{place}: the label is {'missing' if label is None else label}.")
    if label >= num_labels:
        raise UserError(f"{place}: label {label} is out of range; there are {num_labels} labels.")


def decode_checked(encoded: dict, image_column: str, place: str) -> PILImage.Image:
    """As `decode_image`. Raises a `UserError` that starts with the row's location if that fails."""
    try:
        return decode_image(encoded)
    except Exception as error:  # PIL raises many kinds of error if a file is no image or is truncated
        raise UserError(
            f"{place}: the image in column {image_column!r} cannot be decoded ({first_line(error)})."
        ) from error


def _mean_decoded_bytes(encoded_images: list[dict]) -> float:
    """Mean bytes of a decoded RGB image, from the headers of a sample; unreadable ones are reported when checked."""
    sizes = []
    for encoded in encoded_images:
        with contextlib.suppress(Exception), open_image(encoded) as image:
            sizes.append(image.width * image.height * 3)
    return max(1, sum(sizes) / max(1, len(sizes)))

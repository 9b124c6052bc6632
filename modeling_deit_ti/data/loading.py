"""Any source becomes one form: two splits of RGB images with label ids, every row checked."""

import contextlib
import hashlib
import os
from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets
from PIL import Image as PILImage

from ..arguments import ImageArguments
from ..errors import UserError, first_line, list_some
from .decoding import decode_image, open_image
from .sampling import random_rows
from .sources import load_splits, train_and_evaluation


# Larger splits stay encoded, and are decoded again in each epoch.
MAX_DECODED_BYTES = 8 * 2**30
MAX_BATCH_BYTES = 128 * 2**20
# Bump when images or labels come out differently than before: what `datasets` has cached is then made anew.
CHECK_VERSION = 1


@dataclass
class ImageData:
    """
    Two splits of checked images, each a `datasets.Dataset` with `label` (absent if the training images have none) and
    either `pixels`, `height` and `width` (decoded RGB) or `image` (encoded, decoded when read). With `--streaming`,
    `train` is a `streaming.StreamedImages`, checked as it is read.
    """

    train: Dataset
    evaluation: Dataset
    validation: Dataset  # what is evaluated during training: all of `evaluation`, or --max_validation_samples of it
    label_names: list[str]
    name: str
    source: str  # "hub", "local" or "scikit-learn"
    eval_split: str
    fingerprint: str  # of the training images, their labels and the label names: the content, not where it lies

    @property
    def is_streamed(self) -> bool:
        return not isinstance(self.train, Dataset)

    @property
    def has_train_labels(self) -> bool:
        return "label" in self.train.column_names

    @property
    def unseen_labels(self) -> list[str]:
        """Labels without a training image: not a mistake, since a subset may lack them, but worth mentioning."""
        if self.is_streamed or not self.has_train_labels:
            return []  # unknown
        seen = set(self.train.unique("label"))
        return [name for index, name in enumerate(self.label_names) if index not in seen]


def load_stored_images(args: ImageArguments, labels_needed: bool = True) -> ImageData:
    """As [`load_images`], with every row checked now, and decoded if all of them fit."""
    splits, source = load_splits(args.dataset_name, args.dataset_config_name)
    train, evaluation, eval_split = train_and_evaluation(splits, args)
    image_column = find_image_column(train, args)
    label_column = find_label_column(evaluation, args)
    is_held_out = eval_split not in splits
    train, evaluation, label_names = with_label_ids(train, evaluation, label_column, labels_needed, is_held_out)
    check_label_names(label_names, label_column, args.dataset_name)
    columns = image_column, label_column, len(label_names)
    train = check_split(train, "train", *columns, args.max_train_samples, labels_needed)
    evaluation = check_split(evaluation, eval_split, *columns, args.max_eval_samples, True)
    content = hashlib.sha256("\0".join(label_names).encode())
    content.update(np.asarray(train.with_format("numpy")["digest"][:]).tobytes())
    evaluation = evaluation.remove_columns("digest")
    return ImageData(
        train.remove_columns("digest"),
        evaluation,
        random_subset(evaluation, args.max_validation_samples),
        label_names,
        args.dataset_name,
        source,
        eval_split,
        content.hexdigest(),
    )


# ---- Columns and labels ----


def find_image_column(split: Dataset, args: ImageArguments) -> str:
    name = args.image_column_name
    _check_column("--image_column_name", name, split)
    images = [column for column, feature in split.features.items() if isinstance(feature, Image)]
    if name is None:
        if not images:
            columns = (f"{column} ({_kind(feature)})" for column, feature in split.features.items())
            raise UserError(f"{args.dataset_name} has no column of images; its columns are {', '.join(columns)}.")
        return images[0]
    if name not in images:
        raise UserError(
            f"--image_column_name {name}: the column holds {_kind(split.features[name])}, not images"
            + (f"; {', '.join(images)} does." if images else ".")
        )
    return name


def find_label_column(split: Dataset, args: ImageArguments) -> str:
    name = args.label_column_name
    _check_column("--label_column_name", name, split)
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


def _check_column(flag: str, name: str | None, split: Dataset) -> None:
    if name is not None and name not in split.column_names:
        raise UserError(f"{flag} {name}: no such column; there are {', '.join(split.column_names)}.")


def _kind(feature) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def with_label_ids(
    train: Dataset, evaluation: Dataset, column: str, labels_needed: bool, is_held_out: bool
) -> tuple[Dataset, Dataset, list[str]]:
    """Both splits with ids in the label column (missing ones stay `None`), and the names of the ids."""
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
                f"The splits' labels differ: {list_some(sorted(differ))} in one only. Training has "
                f"{list_some(names)}, evaluation {list_some(kinds[1].names)}."
            )
        if names != kinds[1].names:
            evaluation = evaluation.align_labels_with_mapping({name: i for i, name in enumerate(names)}, column)
        return train, evaluation, names

    found = [{label for label in split.unique(column) if label is not None} for split in (train, evaluation)]
    if len({type(label) for label in found[0] | found[1]}) > 1:
        raise UserError(f"Column {column!r} holds {_kind(kinds[0])} in one split and {_kind(kinds[1])} in the other.")
    # A negative number stands for a missing label, and is reported with its row.
    found = [{label for label in labels if isinstance(label, str) or label >= 0} for labels in found]
    # The only image of a label may happen to be held out; if two splits differ, it is a mistake.
    names = sorted(found[0] | found[1] if is_held_out else found[0] or found[1])
    unknown = sorted(found[1] - set(names))
    if unknown:
        raise UserError(
            f"The splits' labels differ: evaluation has {list_some(unknown)} in column {column!r}, which training "
            f"lacks (it has {list_some(names)})."
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


def check_label_names(label_names: list[str], label_column: str, dataset_name: str) -> None:
    """Raises a `UserError` if there is nothing to tell apart."""
    if len(label_names) < 2:
        raise UserError(
            f"{dataset_name}: column {label_column!r} has the one label {label_names}; a classifier needs two."
        )


# ---- Rows ----


def random_subset(split: Dataset, size: int | None) -> Dataset:
    """So many random rows of the split, the same in every run; all of them if there are no more."""
    return split if size is None or size >= len(split) else split.select(random_rows(len(split), size))


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
        fn_kwargs={
            "decode": decode,
            "split_name": split_name,
            "image_column": image_column,
            "label_column": label_column,
            "num_labels": num_labels,
            "rows": rows,
            "labels_needed": labels_needed,
            "version": CHECK_VERSION,
        },
        # Starting processes takes longer than checking a small split.
        num_proc=min(len(os.sched_getaffinity(0)), 16) if len(split) >= 20_000 else None,
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
    version: int,  # part of the result's fingerprint, so that no older one is taken from the cache
) -> dict:
    """One batch of `Dataset.map`: for each row its label, its RGB pixels if they are kept, and a digest of both."""
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


def check_label(label: int | None, num_labels: int, place: str) -> None:
    """Raises a `UserError` that begins with the row's place if its label is missing or out of range."""
    if label is None or label < 0:
        raise UserError(f"{place}: the label is {'missing' if label is None else label}.")
    if label >= num_labels:
        raise UserError(f"{place}: label {label} is out of range; there are {num_labels} labels.")


def decode_checked(encoded: dict, image_column: str, place: str) -> PILImage.Image:
    """As `decode_image`. Raises a `UserError` that begins with the row's place if that fails."""
    try:
        return decode_image(encoded)
    except Exception as error:  # PIL raises many kinds for what is not an image, or half of one
        raise UserError(
            f"{place}: the image in column {image_column!r} cannot be decoded ({first_line(error)})."
        ) from error


def _mean_decoded_bytes(encoded_images: list[dict]) -> float:
    """Bytes of an RGB image, by the headers of a sample; unreadable ones are reported when they are checked."""
    sizes = []
    for encoded in encoded_images:
        with contextlib.suppress(Exception), open_image(encoded) as image:
            sizes.append(image.width * image.height * 3)
    return max(1, sum(sizes) / max(1, len(sizes)))

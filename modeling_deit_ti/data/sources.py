"""Where rows come from, split by split: the Hub, a local folder, scikit-learn."""

import contextlib
import glob
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import SPLIT_KEYWORDS
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from ..errors import UserError, first_line, list_some, storing
from ..hub import retrying


logger = logging.getLogger(__name__)

EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "test")


def load_splits(name: str, config_name: str | None) -> tuple[DatasetDict, str]:
    """The dataset's splits, and where they come from."""
    if name == "digits" and not os.path.isdir(name):
        return _digits(), "scikit-learn"
    folder = os.path.expanduser(name)
    if os.path.isfile(folder):  # `datasets` would look for a cached dataset of that name
        raise UserError(f"--dataset_name {name}: this is a file, not a folder.")
    with explaining_dataset_errors(name):
        if is_saved_to_disk(folder):
            saved = load_from_disk(folder)
            saved = saved if isinstance(saved, DatasetDict) else {"train": saved}
            # Through the cache: `datasets` writes results beside the rows, which would be in the user's folder.
            names = {split: [file["filename"] for file in rows.cache_files] for split, rows in saved.items()}
            files = {split: [*map(pattern_of, files)] for split, files in names.items()}
            return _load_each("arrow", files), "local"
        if os.path.isdir(folder):
            return _load_folder(folder, config_name), "local"
        return retrying(lambda: load_dataset(name, config_name)), "hub"


@contextlib.contextmanager
def storing_in_cache() -> Iterator[None]:
    """Raises a `UserError` if the disk with `datasets`' cache, which holds what it has read and checked, is full."""
    advice = "Make room, or set HF_DATASETS_CACHE to a folder on another disk."
    with storing(datasets.config.HF_DATASETS_CACHE, advice, UserError):
        yield


@contextlib.contextmanager
def explaining_dataset_errors(name: str) -> Iterator[None]:
    """Raises a `UserError` if `name` is the path of a folder that does not exist, or if loading it fails inside."""
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not os.path.isdir(os.path.expanduser(name)):
        raise UserError(f"--dataset_name {name}: there is no such folder.")
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the builder or the network raises concerns that dataset
        raise UserError(
            f"--dataset_name {name}: the dataset is neither a readable local folder nor reachable on the Hub "
            f"({first_line(error)}). To run offline, name a folder of Parquet files or one with a subfolder of images "
            "per class, or use `--dataset_name digits`; with HF_HUB_OFFLINE=1, a dataset that was loaded before is "
            "read from the cache."
        ) from error


def is_saved_to_disk(folder: str) -> bool:
    """Whether `save_to_disk` wrote the folder, of a `DatasetDict` or of a single `Dataset`."""
    kinds = ["dataset_dict.json"], ["dataset_info.json", "state.json"]
    return any(all(os.path.isfile(os.path.join(folder, file)) for file in files) for files in kinds)


def _load_folder(folder: str, config_name: str | None) -> DatasetDict:
    class_folders = find_class_folders(folder)
    if class_folders is not None:
        files = {split: patterns for split, (patterns, _) in class_folders.items()}
        splits = _load_each("imagefolder", files, drop_labels=False)  # by default, it drops those of a single class
        for split, (_, expected) in class_folders.items():
            if len(splits[split]) != expected:
                raise UserError(
                    f"--dataset_name {folder}: {len(splits[split])} of {expected} images in `{split}` were loaded."
                )
            names = splits[split].features["label"].names
            logger.info(f"Images: {expected:,} in {len(names)} classes ({split}): {list_some(names)}")
        return splits
    builder = load_dataset_builder(folder, config_name)
    if not isinstance(builder.config, ParquetConfig):
        return load_dataset(folder, config_name)
    files = {str(split): [*map(pattern_of, files)] for split, files in builder.config.data_files.items()}
    return _load_each("parquet", files, features=builder.info.features)  # those that the dataset card declares, if any


def find_class_folders(folder: str) -> dict[str, tuple[list[str], int]] | None:
    """
    The splits of a folder with one subfolder of images per class, optionally under `train/`, `test/`, `validation/`
    (case-insensitive): the patterns of each split's files, and its number of images. `None` for other folders.

    (`datasets` would guess the splits from the names of all files and folders, and lose a class `bus stop` beside the
    classes `train station` and `train track`.)

    Raises:
        UserError: if images are at different depths, too deep, or in two folders for one split.
    """
    counts, with_metadata = Counter(), set()
    for path, _, files in os.walk(folder, followlinks=True):
        parts = Path(path).relative_to(folder).parts
        if any(part.startswith(".") for part in parts):
            continue
        counts[parts] = sum(
            os.path.splitext(file)[1].lower() in ImageFolder.EXTENSIONS for file in files if not file.startswith(".")
        )
        if not set(files).isdisjoint(ImageFolder.METADATA_FILENAMES):
            with_metadata.add(parts)
    counts = +counts  # without empty folders
    depths = {len(parts) for parts in counts}
    if depths in (set(), {0}) or (depths == {1} and any(len(parts) == 1 for parts in with_metadata)):
        return None  # no images, or their labels are in a metadata file
    parents = Counter(parts[:-1] for parts in counts)
    if all(number == 1 and parent in with_metadata for parent, number in parents.items()):
        return None  # the same, with the images in a folder beside it
    if depths == {1}:
        return {"train": (_patterns(folder, counts), counts.total())}
    tops = sorted({parts[0] for parts in counts if parts}, key=str.lower, reverse=True)
    splits = {name: str(split) for split, names in SPLIT_KEYWORDS.items() for name in names}
    if depths != {2} or not all(top.lower() in splits for top in tops):
        example = os.path.join("", *max(counts, key=len))
        raise UserError(
            f"--dataset_name {folder}: images must be in one folder per class, optionally under train/ and test/, but "
            f"they are at different depths, or too deep ({example})."
        )
    if len({splits[top.lower()] for top in tops}) < len(tops):
        raise UserError(f"--dataset_name {folder}: {list_some(sorted(tops))} are two folders for one split.")
    of_top = {top: {parts: count for parts, count in counts.items() if parts[0] == top} for top in tops}
    return {splits[top.lower()]: (_patterns(folder, of_top[top]), sum(of_top[top].values())) for top in tops}


def _patterns(folder: str, class_folders: Iterable[tuple[str, ...]]) -> list[str]:
    """One pattern per class: in `*/*`, `datasets` would skip linked folders, and those called `__...`."""
    return [f"{glob.escape(path)}*" for path in sorted(os.path.join(folder, *parts, "") for parts in class_folders)]


def pattern_of(file: str) -> str:
    """A pattern for this file alone: `datasets` takes all names for patterns, and brackets for a choice of letters."""
    return file if "://" in file else glob.escape(file)


def _load_each(kind: str, files: dict[str, list[str]], **options) -> DatasetDict:
    """Loads splits one by one: together, all would get the features, and so the label names, of the first file."""
    return DatasetDict(
        {
            split: load_dataset(kind, data_files={split: names}, split=split, **options)
            for split, names in files.items()
        }
    )


def _digits() -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey pixels (Alpaydin, 1998); every fifth is held out."""
    digits = load_digits()
    images = [PILImage.fromarray(np.uint8(image * 255 / 16)) for image in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    rows = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    held_out = np.arange(len(rows)) % 5 == 4
    train, test = (rows.select(np.flatnonzero(selected)) for selected in (~held_out, held_out))
    return DatasetDict({"train": train, "test": test})


def find_eval_split(splits: Collection[str], dataset_name: str) -> str | None:
    if "train" not in splits:
        raise UserError(f"{dataset_name} has no split `train`; it has {', '.join(splits)}.")
    return next((name for name in EVALUATION_SPLITS if name in splits), None)


def check_not_empty(dataset_name: str, sizes: dict[str, int]) -> None:
    for split, size in sizes.items():
        if size == 0:
            raise UserError(f"{dataset_name}: split `{split}` is empty.")

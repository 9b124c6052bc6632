"""Training images that are read during training, for datasets larger than disk and memory (`--streaming`).

The rows of a dataset lie in shards whose sizes are known before anything is read: the row groups of Parquet files, or
the files of an image folder. So every epoch is planned before it is read: the shards are shuffled, and each lane gets
a range of their rows, exactly as long as its share of the steps. Each image then occurs at most once per epoch, and
all processes take the same number of steps, whatever the file sizes. A run keeps its lanes; the workers of all
processes, however many there are now, divide them among themselves.

(`datasets`' own streaming assigns whole shards, so some processes get more than others, and loses the contents of its
shuffle buffer when it resumes.)
"""

import dataclasses
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from typing import ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import ClassLabel, Dataset, DatasetBuilder, Features, Image, load_dataset, load_dataset_builder
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolderConfig
from datasets.packaged_modules.parquet.parquet import ParquetConfig
from datasets.table import table_cast
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from ..arguments import DistillationTrainingArguments, Division, ImageArguments
from ..errors import UserError, first_line
from ..hub import retrying
from ..interruption import ignore_signals
from .loading import (
    HELD_OUT,
    ImageData,
    check_label,
    check_split,
    decode_checked,
    find_image_column,
    find_label_column,
    train_and_evaluation,
    with_label_ids,
)
from .sampling import augmented_batch, collate_images
from .sources import (
    check_not_empty,
    explaining_dataset_errors,
    find_class_folders,
    find_eval_split,
    is_saved_to_disk,
    load_splits,
    pattern_of,
)


# A lane's shuffle buffer is filled from this many shards at a time, since files are often sorted by label.
MAX_OPEN_SHARDS = 2
ROWS_AT_ONCE = 16


class UnreadableRow(UserError):
    """A row that cannot be trained on, found in the middle of a run by only one process."""


# ---- Where rows come from ----


class ParquetRows:
    """
    The rows of Parquet files, local or on the Hub; each row group is a shard. At first, only footers are read. The
    `features` are those that the dataset card declares, if any.
    """

    def __init__(self, files: list[str], features: Features | None):
        self.files = files
        self.shards: list[tuple[int, int, int]] = []  # file, row group, rows before it in the file
        sizes, footers = [], hashlib.sha256()
        for number, file in enumerate(files):
            with _open(file) as opened:
                metadata = pq.read_metadata(opened)
            before = 0
            for group in range(metadata.num_row_groups):
                row_group = metadata.row_group(group)
                self.shards.append((number, group, before))
                sizes.append(row_group.num_rows)
                before += row_group.num_rows
                columns = [row_group.column(index) for index in range(row_group.num_columns)]
                sizes_of_columns = [(c.total_compressed_size, c.total_uncompressed_size) for c in columns]
                footers.update(repr((row_group.num_rows, sizes_of_columns)).encode())
            if "://" in file:
                footers.update(file.encode())  # it contains the commit
            if number == 0:
                own = Features.from_arrow_schema(metadata.schema.to_arrow_schema())
                self.features = Features({name: (features or own).get(name, own[name]) for name in own})
                self.schema = self.features.arrow_schema
        self.sizes = np.array(sizes, dtype=np.int64)  # rows in each shard
        self.digest = footers.hexdigest()

    def column(self, name: str) -> Iterator[list]:
        for file in self.files:
            with _open(file) as opened:
                for batch in pq.ParquetFile(opened).iter_batches(columns=[name], use_threads=False):
                    yield self._cast(batch).column(0).to_pylist()

    def read(self, shard: int, start: int, stop: int, columns: list[str]) -> Iterator[dict]:
        """Rows `start` to `stop` of a shard. Row groups of any size are read page by page."""
        number, group, _ = self.shards[shard]
        position = 0
        with _open(self.files[number]) as opened:
            parquet = pq.ParquetFile(opened, buffer_size=2**20)
            for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
                first, last = max(0, start - position), min(len(batch), stop - position)
                if first < last:
                    yield from self._cast(batch.slice(first, last - first)).to_pylist()
                position += len(batch)
                if position >= stop:
                    return

    def _cast(self, batch: pa.RecordBatch) -> pa.Table:
        """As `datasets` would load it: the card may declare plain bytes to be images, and strings class labels."""
        schema = pa.schema([self.schema.field(name) for name in batch.schema.names], self.schema.metadata)
        return table_cast(pa.Table.from_batches([batch]), schema)

    def place(self, shard: int, row: int) -> str:
        number, _, before = self.shards[shard]
        return f"file {self.files[number]}, row {before + row}"


class TableRows:
    """The rows of a `datasets.Dataset` that holds only paths (of an image folder) or is on disk."""

    def __init__(self, dataset: Dataset, rows_per_shard: int, digest: str):
        self.dataset = dataset
        self.rows_per_shard = rows_per_shard
        self.sizes = np.full(-(-len(dataset) // rows_per_shard), rows_per_shard, dtype=np.int64)
        self.sizes[-1] -= self.sizes.sum() - len(dataset)
        self.digest = digest
        self.features = dataset.features

    def column(self, name: str) -> Iterator[list]:
        for batch in self.dataset.select_columns(name).iter(1000):
            yield batch[name]

    def read(self, shard: int, start: int, stop: int, columns: list[str]) -> Iterator[dict]:
        first = shard * self.rows_per_shard
        yield from self.dataset.__getitems__(range(first + start, first + stop))

    def place(self, shard: int, row: int) -> str:
        return f"row {shard * self.rows_per_shard + row}"


def _open(file: str):
    if "://" not in file:
        return open(file, "rb")
    files, path = fsspec.url_to_fs(file)
    return retrying(lambda: files.open(path, "rb"))


def _table_rows(dataset: Dataset, image_column: str, folder: str) -> TableRows:
    dataset = dataset.cast_column(image_column, Image(decode=False))
    first = dataset[0][image_column]
    if first is None or first["bytes"] is not None:
        return TableRows(dataset, 100, dataset._fingerprint)
    # Files are read one by one anyway, so each is its own shard and the whole epoch is shuffled.
    names = hashlib.sha256()
    for image in dataset[image_column]:
        names.update(repr((os.path.relpath(image["path"], folder), os.path.getsize(image["path"]))).encode())
    return TableRows(dataset, 1, names.hexdigest())


# ---- Loading ----


def load_streamed_images(args: ImageArguments, labels_needed: bool = True) -> ImageData:
    """
    As [`load_images`], but the training split is a [`StreamedSplit`], checked as it is read.

    `ImageData.fingerprint` covers the labels. It identifies the images, which are not read yet, by the sizes of each
    Parquet row group (on the Hub, by the commit), or by file names and sizes (image folder).

    Raises:
        UserError: as `load_images`, or if the dataset is neither Parquet with an evaluation split nor an image folder.
    """
    rows, evaluation, eval_split, image_column, source = _open_splits(args)
    label_column = find_label_column(evaluation.features, args)
    features, content, found = rows.features, hashlib.sha256(rows.digest.encode()), set()
    has_labels = label_column in features
    has_names = has_labels and all(isinstance(of[label_column], ClassLabel) for of in (features, evaluation.features))
    if has_labels and not (has_names and source == "hub"):  # on the Hub, it would take a request per row group
        for values in rows.column(label_column):
            found.update(values)
            content.update(repr(values).encode())
    # What the checks need of a split: its columns, and one row for each label that has no name yet.
    values = list(found) if has_labels and not has_names else []
    columns = {name: values if name == label_column else [None] * len(values) for name in features}
    train = Dataset.from_dict(columns, features=features)
    is_held_out = eval_split == HELD_OUT
    train, evaluation, label_names = with_label_ids(train, evaluation, label_column, labels_needed, is_held_out)
    ids = dict(zip(values, train[label_column], strict=True)) if values else None
    content.update("\0".join(label_names).encode())
    columns = image_column, label_column, len(label_names)
    evaluation = check_split(evaluation, eval_split, *columns, args.max_eval_samples).remove_columns("digest")
    some_missing = any(label is None or label < 0 for label in (found if has_names else train[label_column]))
    if not has_labels or (some_missing and not labels_needed):
        label_column = None
    split = StreamedSplit(rows, image_column, label_column, ids, len(label_names))
    return ImageData(args, split, evaluation, label_names, source, eval_split, content.hexdigest())


def _open_splits(args: ImageArguments) -> tuple[ParquetRows | TableRows, Dataset, str, str, str]:
    """The training rows, the evaluation split and its name, the image column, and the source."""
    name, folder = args.dataset_name, os.path.expanduser(args.dataset_name)
    is_folder = os.path.isdir(folder)
    is_table = is_saved_to_disk(folder) or (name == "digits" and not is_folder)
    if not is_table and not (is_folder and find_class_folders(folder)):
        with explaining_dataset_errors(name):
            source = folder if is_folder else name
            builder = retrying(lambda: load_dataset_builder(source, args.dataset_config_name))
        if isinstance(builder.config, ParquetConfig):
            return *_open_parquet(args, builder), "local" if is_folder else "hub"
        if not (isinstance(builder.config, ImageFolderConfig) and is_folder):
            raise UserError(
                f"--streaming reads Parquet files, local or on the Hub, and local image folders, but {name} is "
                f"{type(builder).__name__}. Convert it to Parquet: load_dataset(...).push_to_hub(...), or to_parquet."
            )
    splits, source = load_splits(name, args.dataset_config_name)
    train, evaluation, eval_split = train_and_evaluation(splits, args)
    image_column = find_image_column(train.features, args)
    return _table_rows(train, image_column, folder), evaluation, eval_split, image_column, source


def _open_parquet(args: ImageArguments, builder: DatasetBuilder) -> tuple[ParquetRows, Dataset, str, str]:
    files = {str(split): list(names) for split, names in builder.config.data_files.items()}
    eval_split = find_eval_split(files, args.dataset_name)
    if eval_split is None or args.validation_from_train:
        raise UserError(
            f"{args.dataset_name}: --streaming cannot hold out images from the split `train`: move some of its "
            "Parquet files to another split (test-00000.parquet, or a folder test/), and run without "
            "--validation_from_train."
        )
    with explaining_dataset_errors(args.dataset_name):
        features = builder.info.features
        rows = ParquetRows(files["train"], features)
        evaluation_files = {eval_split: [*map(pattern_of, files[eval_split])]}
        evaluation = load_dataset("parquet", data_files=evaluation_files, split=eval_split, features=features)
    check_not_empty(args.dataset_name, {"train": rows.sizes.sum(), eval_split: len(evaluation)})
    return rows, evaluation, eval_split, find_image_column(rows.features, args)


# ---- Images and batches ----


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
    """The training split of an [`ImageData`], not read yet."""

    rows: ParquetRows | TableRows
    image_column: str
    label_column: str | None  # `None` if the images have no labels
    ids: dict | None  # the id of each value in the label column; `None` if the values are ids
    num_labels: int

    def __len__(self) -> int:
        return int(self.rows.sizes.sum())

    @property
    def column_names(self) -> list[str]:
        return ["image"] if self.label_column is None else ["image", "label"]

    def label_ids(self) -> np.ndarray:
        """`(rows,)`, without those that are missing or out of range, which are reported when they are read."""
        values = chain.from_iterable(self.rows.column(self.label_column))
        ids = (value if self.ids is None else self.ids[value] for value in values)
        return np.array([label for label in ids if label is not None and 0 <= label < self.num_labels])

    def read(self, shard: int, start: int, stop: int) -> Iterator[dict]:
        columns = [self.image_column] if self.label_column is None else [self.image_column, self.label_column]
        try:
            yield from self.rows.read(shard, start, stop, columns)
        except (OSError, pa.ArrowException) as error:
            place = f"Split `train`, {self.rows.place(shard, start)} or later"
            raise UnreadableRow(f"{place}: cannot be read ({first_line(error)}).") from error

    def first_images(self, count: int) -> list[PILImage.Image]:
        """RGB images, fewer if there are no more. Raises an `UnreadableRow` if one of the rows is unusable."""
        rows = (
            (shard, number, row)
            for shard, size in enumerate(self.rows.sizes.tolist())
            for number, row in enumerate(self.read(shard, 0, size))
        )
        return [self.decode(*row)[0] for row in islice(rows, count)]

    def decode(self, shard: int, number: int, row: dict) -> tuple[PILImage.Image, int | None]:
        """The RGB image and the label id of a row. Raises an `UnreadableRow` if either is unusable."""
        place = f"Split `train`, {self.rows.place(shard, number)}"
        encoded, label = row[self.image_column], None
        path = f", {encoded['path']}" if encoded and encoded["bytes"] is None else ""
        try:
            if self.label_column is not None:
                label = row[self.label_column]
                label = label if self.ids is None else self.ids[label]
                check_label(label, self.num_labels, place)
            return decode_checked(encoded, self.image_column, place + path), label
        except UserError as error:
            raise UnreadableRow(str(error)) from error


@dataclasses.dataclass
class _Range:
    """Rows `position` to `stop` of a shard, opened when the first of them is read."""

    shard: int
    position: int
    stop: int
    rows: Iterator[dict] | None = None

    def next(self, split: StreamedSplit | None) -> tuple[int, int, dict | None]:
        """Shard, number and content of the next row; without content if `split` is `None`."""
        if split is not None and self.rows is None:
            self.rows = split.read(self.shard, self.position, self.stop)
        self.position += 1
        return self.shard, self.position - 1, None if split is None else next(self.rows)


@dataclasses.dataclass
class StreamedImages:
    """Training images of a split that is read during training."""

    split: StreamedSplit
    transform: Callable[[PILImage.Image], torch.Tensor]  # RGB image to `pixel_values`
    repeats: int = 1  # repeated augmentation
    is_streamed: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.split)

    def order(self, args: DistillationTrainingArguments) -> "StreamedBatches":
        """The batches of each epoch, for this process."""
        sizes = args.total_train_batch_size, args.train_batch_size
        readers = args.dataloader_num_workers, args.process_index, args.world_size
        return StreamedBatches(self, args.division, *sizes, args.order_seed, *readers)


class StreamedBatches(torch.utils.data.IterableDataset):
    """
    One process's batches of an epoch, as `augmented_batch` makes them, for a `DataLoader` with `batch_size=None`.

    The lanes take turns of `division.together` images, each from its own part of the rows and its own shuffle buffer.
    So the contents of a step follow from the seed, the epoch and the lanes, not from which process reads them. Each
    lane has one reader: one worker of one process. As with `TrainSampler`, images that do not fill a step are left
    out, different ones each epoch.

    Args:
        step_size (`int`): images per optimizer step, over all processes.
        batch_size (`int`): images in a batch of this process, a multiple of `division.together`.
        seed (`int`): the run's.
        num_workers (`int`): the maximum number of the loader's workers.

    Raises:
        UserError: if there are fewer images than one step takes.
    """

    def __init__(
        self,
        images: StreamedImages,
        division: Division,
        step_size: int,
        batch_size: int,
        seed: int,
        num_workers: int,
        process_index: int,
        num_processes: int,
    ):
        self.images = images
        self.split = images.split
        self.division = division
        self.batch_size = batch_size
        self.seed = seed
        self.repeats = images.repeats  # occurrences of an image, in one turn or two consecutive ones
        self.process_index = process_index
        self.num_processes = num_processes
        num_steps = len(images) // step_size
        if num_steps == 0:
            raise UserError(
                f"--streaming: {len(images)} training images are too few for one step over all processes "
                f"({step_size}): use a smaller --per_device_train_batch_size, or leave out --streaming."
            )
        self.num_batches = num_steps * step_size // (batch_size * num_processes)
        self.num_turns = num_steps * step_size // division.together  # over all lanes
        # The workers take this process's batches in turn. When all lanes have had their turns, the next batch must be
        # the first worker's again, or two workers would read the same lanes.
        cycle = division.lanes * division.together // (batch_size * num_processes)
        self.num_workers = max(number for number in range(1, max(1, num_workers) + 1) if cycle % number == 0)
        # The epoch; the epoch in which batches are skipped, and their number. Shared, since persistent workers have
        # copies of everything else.
        self._progress = torch.zeros(3, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self.num_batches

    def loader(self, args: DistillationTrainingArguments) -> DataLoader:
        """A loader of these batches, which are already this process's own: no further sharding is needed."""
        loader = DataLoader(
            self,
            batch_size=None,
            collate_fn=collate_images,  # torch's default would turn the seeds into tensors
            num_workers=min(args.dataloader_num_workers, self.num_workers),
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=ignore_signals,
        )
        # Declared as one process: otherwise, accelerate would have each process read all images, or the first for all.
        return prepare_data_loader(
            loader,
            args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=args.accelerator_config.non_blocking,
        )

    def set_epoch(self, epoch: int) -> None:
        self._progress[0] = epoch

    def skip(self, epoch: int, num_batches: int) -> None:
        """Leaves the first batches of that epoch empty, `{}`: nothing is read, decoded or augmented for them."""
        self._progress[1:] = torch.tensor([epoch, num_batches])

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        worker = 0 if worker is None else worker.id
        epoch, skipped_epoch, skipped = self._progress.tolist()
        skipped = skipped if skipped_epoch == epoch else 0
        turns_of_batch = self.batch_size // self.division.together
        turns_skipped = skipped * self.num_processes * turns_of_batch
        shards = self._shards(epoch)
        lanes: dict[int, Iterator[tuple[PILImage.Image, int | None]]] = {}
        for number in range(worker, self.num_batches, self.num_workers):  # the loader takes the workers in turn
            if number < skipped:
                yield {}
                continue
            views, seeds = [], []
            first = (number * self.num_processes + self.process_index) * turns_of_batch
            try:
                for turn in range(first, first + turns_of_batch):
                    lane = turn % self.division.lanes
                    if lane not in lanes:
                        lanes[lane] = self._views(epoch, lane, shards, turns_skipped)
                    views += self._separate_views(list(islice(lanes[lane], self.division.together)))
                    generator = np.random.default_rng([self.seed, epoch, turn, 1])
                    seeds += generator.integers(2**62, size=self.division.together).tolist()
                images, labels = zip(*views, strict=True)
                yield augmented_batch(images, None if labels[0] is None else labels, seeds, self.images.transform)
            except UnreadableRow as error:
                yield {"error": str(error)}  # if raised, the loader would add the worker's traceback
                return

    def _separate_views(self, views: list) -> list:
        """With repeated augmentation, avoids pairing views of the same image (see `sampling.partners`) if possible."""
        if self.repeats == 1:
            return views
        half = len(views) // 2
        pairs = zip(views[:half], views[half:], strict=False)
        return [*chain.from_iterable(pairs), *views[2 * half :]]

    def _views(
        self, epoch: int, lane: int, shards: tuple[np.ndarray, np.ndarray], turns_skipped: int
    ) -> Iterator[tuple[PILImage.Image, int | None]]:
        """A lane's images and labels, each repeated, without those of the first `turns_skipped` turns of all lanes."""
        samples_skipped = len(range(lane, turns_skipped, self.division.lanes)) * self.division.together
        rows = self._rows(epoch, lane, shards, samples_skipped // self.repeats)
        views = (view for row in rows for view in repeat(self.split.decode(*row), self.repeats))
        return islice(views, samples_skipped % self.repeats, None)

    def _rows(
        self, epoch: int, lane: int, shards: tuple[np.ndarray, np.ndarray], skipped: int
    ) -> Iterator[tuple[int, int, dict]]:
        """A lane's rows in shuffled order, without the first `skipped`: (shard, row in the shard, content)."""
        turns = (self.num_turns - np.arange(self.division.lanes) - 1) // self.division.lanes + 1
        counts = -(-turns * self.division.together // self.repeats)
        start, count = int(counts[:lane].sum()), int(counts[lane])
        ranges = self._ranges(*shards, start, start + count)
        seed = np.random.SeedSequence([self.seed, epoch, lane, 2]).generate_state(1, np.uint64)
        generator = random.Random(int(seed[0]))
        opened: list[_Range] = []
        buffer: list[tuple[int, int, dict | None]] = []
        for emitted in range(count):
            if emitted == skipped and skipped:
                # So far, only the order was followed; now read the rows that an uninterrupted run would hold.
                buffer = self._refill(buffer)
            while len(buffer) < self.division.lane_buffer_size:
                opened += islice(ranges, MAX_OPEN_SHARDS - len(opened))
                if not opened:
                    break
                source = generator.randrange(len(opened))
                buffer.append(opened[source].next(self.split if emitted >= skipped else None))
                if opened[source].position == opened[source].stop:
                    opened.pop(source)
            chosen = generator.randrange(len(buffer))
            buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
            row = buffer.pop()
            if emitted >= skipped:
                yield row

    def _shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the epoch's order, and their cumulative numbers of rows; the same for all readers."""
        sizes = self.split.rows.sizes
        order = np.random.default_rng([self.seed, epoch]).permutation(len(sizes))
        return order, np.cumsum(sizes[order])

    def _ranges(self, order: np.ndarray, ends: np.ndarray, start: int, stop: int) -> Iterator[_Range]:
        """Rows `start` to `stop` of the epoch."""
        for index in range(int(np.searchsorted(ends, start, side="right")), len(order)):
            first = int(ends[index] - self.split.rows.sizes[order[index]])
            if first >= stop:
                return
            range_ = _Range(int(order[index]), max(start - first, 0), int(min(stop, ends[index])) - first)
            if range_.position < range_.stop:
                yield range_

    def _refill(self, buffer: list[tuple[int, int, None]]) -> list[tuple[int, int, dict]]:
        wanted: dict[int, set[int]] = {}
        for shard, number, _ in buffer:
            wanted.setdefault(shard, set()).add(number)
        rows = {}
        for shard, numbers in wanted.items():
            first, stop = min(numbers), max(numbers) + 1
            read = enumerate(self.split.read(shard, first, stop), start=first)
            rows |= {(shard, number): row for number, row in read if number in numbers}
        return [(shard, number, rows[shard, number]) for shard, number, _ in buffer]

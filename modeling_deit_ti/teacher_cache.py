"""The teacher's logits on disk, computed once and read by later epochs and runs.

Everything random about a training image follows from the run's seed, the epoch and the image's position in it:

- If nothing is random, logits depend only on the image. One file of N rows serves every epoch after the first, and all
  other runs on the same images.
- Otherwise one file per epoch serves later runs with the same seed, augmentation and global batch size, whatever their
  mode, learning rate or student. That is how modes are compared.

Neither depends on how a step is divided among processes: the files serve any number of them.

A row is trusted only if it was stored for exactly these images and its checksum matches. So a file may be truncated,
damaged or shared by several processes and runs at any time: invalid rows are computed again.

Training does not wait for a GPU to copy its logits: they are written a step or two later, at the latest at the end of
the epoch or run. If the process is killed before that, they have to be computed again.
"""

import hashlib
import importlib.metadata
import json
import logging
import math
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin

from .arguments import Arguments
from .data import ImageData
from .data.sampling import TrainSampler, partners
from .device import HostCopy, teacher_dtype, to_device
from .errors import UserError, first_line
from .teacher import Teacher, recipe_digest, teacher_folder_name


logger = logging.getLogger(__name__)

MAX_AUTO_BYTES = 2**30  # for all files of a run; --teacher_cache auto stores nothing if they would be larger
RECIPE_FILE = "recipe.json"  # for people: what a folder's logits depend on
LIBRARIES = ("numpy", "pillow", "timm", "torch", "torchvision", "transformers")
# The code that computes pixels and logits: all of it, instead of a version to bump by hand whenever they change.
CODE = (
    *("data/augmentation.py", "data/decoding.py", "data/inputs.py", "data/randomness.py", "data/sampling.py"),
    *("teacher.py", "modeling_deit_ti.py", "configuration_deit_ti.py"),
)


class TeacherCache:
    """
    Answers in place of a teacher: reads the logits that are stored, asks the teacher for the others and stores them.

    Logits are float16 on disk, and freshly computed ones are rounded to it too, so a run ends with the same weights
    whether they were stored or not. (Except that runs with other batches or processes share them, and a network's
    logits differ slightly with the batch.) A batch with logits beyond float16's range is neither rounded nor stored.
    If the disk cannot be written to, training continues without the cache.

    Args:
        folder (`Path`): where the files are.
        recipe (`dict`): everything that determines the logits; a row stored under another recipe is not read.
        num_labels (`int`): K.
        is_static (`bool`): whether the logits depend only on the image.
        mixes (`bool`): whether images are mixed, so that logits depend on the image's partner (`sampling.partners`).
    """

    def __init__(self, folder: Path, recipe: dict, num_labels: int, is_static: bool, mixes: bool):
        self.folder, self.recipe = folder, recipe
        self.is_static, self.mixes = is_static, mixes
        self.num_read = self.num_computed = 0  # images, by this process
        self._record = np.dtype([("checksum", "<u4"), ("tag", "<i8"), ("logits", "<f2", (num_labels,))])
        self._salt = zlib.crc32(recipe_digest(recipe).encode())
        self._is_disabled = False
        self._opened: tuple[TrainSampler | None, int] = None, -1
        # Rows of the open file, their tags, a mask of their images in the batch, and the logits of the whole batch.
        self._unwritten: list[tuple[np.ndarray, np.ndarray, np.ndarray, HostCopy]] = []

    @property
    def share_read(self) -> float:
        """Share of the images, 0 to 1, whose logits were read rather than computed."""
        return self.num_read / max(1, self.num_read + self.num_computed)

    def __call__(
        self, teacher: Teacher, pixel_values: torch.Tensor, seeds: np.ndarray, sampler: TrainSampler
    ) -> torch.Tensor:
        """
        Float32 logits `(B, K)`, on the device of the images.

        Args:
            teacher ([`Teacher`]): called only if a row is missing, and then with the whole batch.
            pixel_values (`torch.Tensor` of shape `(B, 3, height, width)`): as the student sees them.
            seeds (`np.ndarray` of shape `(B,)`): the images' seeds, which locate the batch in the sampler's epoch.
        """
        stored = np.zeros((len(seeds), *self._record["logits"].shape), dtype=np.float16)
        is_stored = np.zeros(len(seeds), dtype=bool)
        if not self._is_disabled:
            try:
                self._open_epoch(sampler)
                rows, tags = self._locate(seeds)
                records = self._records[rows]
                is_stored = (records["tag"] == tags) & (records["checksum"] == self._checksums(records))
                stored[is_stored] = records["logits"][is_stored]
            except (OSError, ValueError) as error:
                self._disable(error)
        missing = ~is_stored
        self.num_read += int(is_stored.sum())
        self.num_computed += int(missing.sum())
        device = pixel_values.device
        if not missing.any():
            logits = to_device(torch.from_numpy(stored), device).float()
        else:
            exact = teacher(pixel_values)
            logits = exact.half()
            fits = logits.isfinite().all()
            if not self._is_disabled:
                self._unwritten.append((rows[missing], tags[missing], missing, HostCopy(logits)))
            if is_stored.any():
                # Stored logits win: all runs use the same numbers, whichever batch computes them again.
                is_missing, known = (to_device(torch.from_numpy(values), device) for values in (missing, stored))
                logits = torch.where(is_missing[:, None], logits, known)
            logits = torch.where(fits, logits.float(), exact)
        self.flush(wait=False)
        return logits

    def flush(self, wait: bool = True) -> None:
        """Writes what is pending; unless told to `wait` for a GPU, only what it has already copied."""
        while self._unwritten and (wait or self._unwritten[0][-1].is_there):
            rows, tags, missing, copy = self._unwritten.pop(0)
            logits = copy.read().numpy()
            if not self._is_disabled and np.isfinite(logits).all():
                self._store(rows, tags, logits[missing])

    def _open_epoch(self, sampler: TrainSampler) -> None:
        if self._opened == (sampler, sampler.epoch):
            return
        self.flush()  # to the file that is open, or before it is read again
        indices, seeds = np.array(list(sampler), dtype=np.int64).T
        order = np.argsort(seeds)
        self._seeds, self._indices = seeds[order], indices[order]
        self._positions = self._indices if self.is_static else order
        num_rows = sampler.num_images if self.is_static else sampler.num_samples
        self.folder.mkdir(parents=True, exist_ok=True)
        recipe_file = self.folder / RECIPE_FILE
        if not recipe_file.exists():
            recipe_file.write_text(json.dumps(self.recipe, indent=2, default=str) + "\n")
        self._path = self.folder / ("images.bin" if self.is_static else f"epoch-{sampler.epoch:04d}.bin")
        self._path.touch()
        num_bytes = num_rows * self._record.itemsize
        if self._path.stat().st_size < num_bytes:
            os.truncate(self._path, num_bytes)  # extends a new or truncated file; zeros are not a valid row
        self._records = np.memmap(self._path, self._record, mode="r", shape=(num_rows,))
        self._opened = sampler, sampler.epoch

    def _locate(self, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a batch, and the tags that they hold if they were stored for its images."""
        at = np.searchsorted(self._seeds, seeds).clip(max=len(self._seeds) - 1)
        if not np.array_equal(self._seeds[at], seeds):
            raise ValueError("a batch has seeds that are not from its epoch")
        rows, indices = self._positions[at], self._indices[at].astype(np.uint64)
        if self.is_static:
            return rows, rows
        # Image and seed, and those of the mixing partner: this identifies the order where the recipe does not.
        tags = seeds.view(np.uint64) ^ (indices * np.uint64(0x9E3779B97F4A7C15))
        if self.mixes:
            tags = tags ^ (tags[partners(len(seeds))] * np.uint64(0xBF58476D1CE4E5B9))
        return rows, tags.view(np.int64)

    def _checksums(self, records: np.ndarray) -> np.ndarray:
        after_checksum = records.view(np.uint8).reshape(len(records), -1)[:, 4:]
        return np.array([zlib.crc32(row, self._salt) for row in after_checksum], dtype=np.uint32)

    def _store(self, rows: np.ndarray, tags: np.ndarray, logits: np.ndarray) -> None:
        records = np.zeros(len(rows), self._record)
        records["tag"], records["logits"] = tags, logits
        records["checksum"] = self._checksums(records)
        try:
            # Read through a memory map, but written as a file: a full disk is then an error, not a crash.
            with open(self._path, "r+b", buffering=0) as file:
                for row, record in zip(rows.tolist(), records, strict=True):
                    file.seek(row * self._record.itemsize)
                    file.write(record.tobytes())
        except OSError as error:
            self._disable(error)

    def _disable(self, error: Exception) -> None:
        self._is_disabled = True  # except for the rounding: the rest of the run must not depend on the disk
        logger.warning(
            f"Teacher: cannot store its logits in {self.folder} ({first_line(error)}); training continues without them"
        )


def make_teacher_cache(args: Arguments, teacher: Teacher, data: ImageData, image_processor) -> TeacherCache | None:
    """
    The cache of this run's teacher, if `--teacher_cache` asks for one; `image_processor` is the student's.

    Raises:
        UserError: if `--teacher_cache on` is combined with streaming.
    """
    setting = args.teacher.teacher_cache
    if setting == "on" and data.is_streamed:
        raise UserError("--teacher_cache on: the images of a stream have no fixed order. Leave the flag out.")
    if setting == "off" or data.is_streamed:
        return None
    recipe = _recipe(args, teacher, data, image_processor)
    num_labels, num_rows = len(data.label_names), len(data.train)
    if "order" in recipe:
        num_rows *= math.ceil(args.training.num_train_epochs)
        if args.training.max_steps > 0:
            num_rows = args.training.max_steps * args.training.total_train_batch_size
    num_bytes = num_rows * (2 * num_labels + 12)
    if setting == "auto" and num_bytes > MAX_AUTO_BYTES:
        logger.info(
            f"Teacher: its logits are not stored, since they would take {num_bytes / 2**30:.1f} GiB; --teacher_cache "
            "on stores them anyway"
        )
        return None
    name = teacher_folder_name(args.teacher.teacher_model_name_or_path, data.name, recipe)
    folder = Path(args.teacher.teacher_output_dir) / "logits" / name
    mixes = args.augmentation.mixup > 0 or args.augmentation.cutmix > 0
    cache = TeacherCache(folder, recipe, num_labels, is_static="order" not in recipe, mixes=mixes)
    if num_files := len(list(folder.glob("*.bin"))):
        logger.info(f"Teacher: reading its logits from {folder}" + f" (epochs: {num_files})" * (not cache.is_static))
    else:
        logger.info(f"Teacher: storing its logits for later {'epochs and ' * cache.is_static}runs in {folder}")
    return cache


def _recipe(args: Arguments, teacher: Teacher, data: ImageData, image_processor) -> dict:
    """Everything that determines the logits. Has an `order` if they depend on the seed and the batches."""
    training, image_size = args.training, image_processor.crop_size["height"]
    package = Path(__file__).parent
    compilation = TorchDynamoPlugin(training.torch_compile_backend, training.torch_compile_mode)  # flags or launcher
    recipe = {
        "teacher": _teacher_digest(teacher),
        "images": data.fingerprint,
        "image_size": image_size,
        "image_mean": list(image_processor.image_mean),
        "image_std": list(image_processor.image_std),
        "augmentation": vars(args.augmentation) | {"crop": args.augmentation.crop_at(image_size)},
        "device": training.device.type,
        "precision": str(teacher_dtype(training.mixed_precision)),
        "tf32": training.tf32,
        "compile": None if compilation.backend == DynamoBackend.NO else compilation.to_kwargs(),
        "deepspeed": training.deepspeed_plugin is not None,  # rounds the images to its own precision
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "code": hashlib.sha256(b"".join((package / file).read_bytes() for file in CODE)).hexdigest(),
    }
    if args.augmentation.is_random:
        recipe["order"] = {"seed": training.order_seed, "batch_size": training.total_train_batch_size}
    return recipe


def _teacher_digest(teacher: Teacher) -> str:
    """A hash of the teacher's network, its weights, and how it maps the student's images and labels."""
    config = {name: value for name, value in teacher.model.config.to_dict().items() if not name.startswith("_")}
    facts = [type(teacher.model).__name__, config, teacher.image_size]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(teacher.state_dict().items()):  # including scale, shift and label order
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

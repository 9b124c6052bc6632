"""Streaming: every image once per epoch, whichever process reads it; order set by the seed; exact resuming."""

import dataclasses
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from building import arguments
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader

import train_hf
from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.arguments import AugmentationArguments, Division, ImageArguments, ModelArguments
from modeling_deit_ti.data import ImageData, load_images
from modeling_deit_ti.data.inputs import TrainImages, make_image_processor, make_train_images
from modeling_deit_ti.data.streaming import (
    ParquetRows,
    StreamedBatches,
    StreamedImages,
    StreamedSplit,
    UnreadableRow,
)
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.runs import build_trainer
from modeling_deit_ti.trainer import DistillationTrainer


REPOSITORY = Path(train_hf.__file__).parent
NAMES = ["a", "b", "c"]
ENCODED = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
# Files and row groups of various sizes: 487 images, sorted by label as image folders are.
FILES = ((100, 40), (203, 64), (17, 17), (167, 30))
NUM_IMAGES = sum(size for size, _ in FILES)


def picture(number: int) -> bytes:
    """An 8x8 PNG that encodes its number."""
    file = io.BytesIO()
    PILImage.new("RGB", (8, 8), (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, numbers: range, rows_per_group: int, features=ENCODED, label=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    label = label or (lambda number: 3 * number // NUM_IMAGES)
    images = [{"bytes": picture(number), "path": None} for number in numbers]
    rows = Dataset.from_dict({"image": images, "label": [label(number) for number in numbers]}, features=features)
    rows.to_parquet(path, batch_size=rows_per_group)


def write_dataset(folder: Path, features=ENCODED, label=None) -> Path:
    first = 0
    for number, (size, rows_per_group) in enumerate(FILES):
        write_parquet(
            folder / f"train-{number:05}.parquet", range(first, first + size), rows_per_group, features, label
        )
        first += size
    write_parquet(folder / "test-00000.parquet", range(0, NUM_IMAGES, 12), 20, features, label)
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(60):
        for split in ("train", "test") if number % 10 == 0 else ("train",):
            path = folder / split / NAMES[number // 20] / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number))
    return folder


def load(folder, labels_needed: bool = True, **flags) -> ImageData:
    return load_images(ImageArguments(dataset_name=str(folder), streaming=True, **flags), labels_needed)


def number_of(image: PILImage.Image) -> torch.Tensor:
    red, green, _ = image.getpixel((0, 0))
    return torch.tensor([red + 256 * green, torch.randint(10**6, ()).item()])


def division_of(**flags) -> Division:
    return arguments(streaming=True, **flags).training.division


def epoch(
    split,
    number=0,
    processes=1,
    workers=0,
    batch_size=10,
    seed=0,
    repeats=1,
    skip=0,
    buffer_size=10_000,
    accumulation=1,
    division=None,
) -> list[list[dict]]:
    """The batches of each process, through real loaders with real workers. `pixel_values`: the image's number."""
    images, batches = StreamedImages(split, number_of, repeats), []
    if division is None:
        flags = {"dataloader_num_workers": workers, "shuffle_buffer_size": buffer_size}
        division = division_of(per_device_train_batch_size=batch_size, **flags)
        division = dataclasses.replace(division, lanes=division.lanes * processes)
    for process in range(processes):
        sizes = batch_size * accumulation * processes, batch_size
        dataset = StreamedBatches(images, division, *sizes, seed, workers, process, processes)
        dataset.set_epoch(number)
        dataset.skip(number, skip)
        workers = min(workers, dataset.num_workers)
        batches.append(list(DataLoader(dataset, batch_size=None, collate_fn=lambda batch: batch, num_workers=workers)))
    return batches


def numbers(batches: list[list[dict]]) -> list[int]:
    return [number for process in batches for batch in process for number in batch["pixel_values"][:, 0].tolist()]


# ---- Which images, in which order ----


@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_comes_once_per_epoch_across_all_processes_and_workers(parquet, workers):
    split = load(parquet).train
    assert len(split) == NUM_IMAGES
    left_out = []
    for number in range(2):
        batches = epoch(split, number, processes=2, workers=workers)
        assert [len(process) for process in batches] == [24, 24]  # the same number of steps in each process
        assert all(batch["pixel_values"].shape == (10, 2) for process in batches for batch in process)
        seen = numbers(batches)
        assert len(set(seen)) == len(seen) == 480
        left_out.append(set(range(NUM_IMAGES)) - set(seen))
        for batch in batches[0] + batches[1]:
            assert batch["labels"].tolist() == [3 * n // NUM_IMAGES for n in batch["pixel_values"][:, 0].tolist()]
    assert left_out[0] != left_out[1]


def test_each_process_reads_only_its_own_part(parquet, monkeypatch):
    split, read = load(parquet).train, []
    original = ParquetRows.read
    monkeypatch.setattr(
        ParquetRows, "read", lambda self, *args: (read.append(row) or row for row in original(self, *args))
    )
    epoch(split, processes=2)
    assert len(read) == 480


def test_seed_and_epoch_determine_the_order_and_the_augmentation(parquet):
    split = load(parquet).train
    runs = [epoch(split, number, seed=seed, workers=2) for seed, number in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert all(
        torch.equal(first["pixel_values"], second["pixel_values"])
        for first, second in zip(runs[0][0], runs[1][0], strict=True)
    )
    orders = {tuple(numbers(run)) for run in runs}
    assert len(orders) == 3
    seeds = [seed for batch in runs[0][0] for seed in batch["seeds"].tolist()]
    assert len(set(seeds)) == len(seeds)


def test_the_buffer_mixes_files_sorted_by_label(parquet):
    def labels_of_first_batch(buffer_size):
        return set(epoch(load(parquet).train, batch_size=40, buffer_size=buffer_size)[0][0]["labels"].tolist())

    assert labels_of_first_batch(400) == {0, 1, 2}
    unshuffled = numbers(epoch(load(parquet).train, batch_size=40, buffer_size=1))
    shuffled = numbers(epoch(load(parquet).train, batch_size=40))
    # Neighbours in the file are hardly ever neighbours in the epoch.
    assert sum(abs(a - b) == 1 for a, b in zip(shuffled, shuffled[1:], strict=False)) < 20
    assert sorted(shuffled) != shuffled and sorted(unshuffled) != unshuffled


@pytest.mark.parametrize("workers", [0, 2])
def test_repeated_augmentation_shows_three_different_views_of_each_image(parquet, workers):
    (batches,) = epoch(load(parquet).train, repeats=3, workers=workers)
    assert len(batches) == 48
    seen = numbers([batches])
    counts = np.bincount(seen)
    assert len(seen) == 480 and 160 <= len(set(seen)) <= 162 and counts.max() == 3
    augmented = {tuple(view) for batch in batches for view in batch["pixel_values"].tolist()}
    assert len(augmented) == 480


@pytest.mark.parametrize(
    ("processes", "workers", "accumulation"), [(2, 0, 1), (2, 0, 4), (4, 3, 1), (8, 0, 1), (1, 0, 2)]
)
def test_a_step_has_the_same_images_whoever_reads_it_and_each_is_read_once(
    parquet, monkeypatch, processes, workers, accumulation
):
    split, read = load(parquet).train, []
    division = division_of(per_device_train_batch_size=80, dataloader_num_workers=2, shuffle_buffer_size=300)
    ((_, _, *whole),) = epoch(split, batch_size=80, repeats=3, skip=2, division=division)
    original = ParquetRows.read
    monkeypatch.setattr(
        ParquetRows, "read", lambda self, *args: (read.append(row) or row for row in original(self, *args))
    )
    options = {"batch_size": 80 // processes // accumulation, "accumulation": accumulation, "workers": workers}
    batches = epoch(split, processes=processes, repeats=3, division=division, **options)
    steps = zip(*[iter(zip(*batches, strict=True))] * accumulation, strict=True)
    for expected, step in zip(whole, list(steps)[2:], strict=True):
        parts = [batch for micro in step for batch in micro]
        for name in ("pixel_values", "labels"):
            assert torch.equal(torch.cat([part[name] for part in parts]), expected[name])
        assert (np.concatenate([part["seeds"] for part in parts]) == expected["seeds"]).all()
    if workers == 0:
        assert len({json.dumps(row, default=str) for row in read}) == len(read) == 160  # three views of each


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("repeats", [1, 3])
def test_skipping_batches_does_not_change_the_others(parquet, workers, repeats):
    split, options = load(parquet).train, {"workers": workers, "repeats": repeats, "buffer_size": 100}
    (whole,) = epoch(split, 3, **options)
    for skip in (1, 17, 48):
        (rest,) = epoch(split, 3, **options, skip=skip)
        assert rest[:skip] == [{}] * skip and len(rest) == 48
        for first, second in zip(whole[skip:], rest[skip:], strict=True):
            assert torch.equal(first["pixel_values"], second["pixel_values"])
            assert (first["seeds"] == second["seeds"]).all()


def test_skipped_batches_are_not_read(parquet, monkeypatch):
    split, read = load(parquet).train, []
    original = ParquetRows.read
    monkeypatch.setattr(
        ParquetRows, "read", lambda self, *args: (read.append(row) or row for row in original(self, *args))
    )
    epoch(split, skip=40, buffer_size=50)  # reads the 80 images left, and the buffer's from their row groups
    assert 80 <= len(read) < 350


def test_streamed_images_are_augmented_like_those_of_a_split_in_memory(parquet):
    streamed = load(parquet)
    args = AugmentationArguments(augment_on="loader", repeated_augmentation=1)
    processor = make_image_processor(ModelArguments(image_size=32), args)
    in_memory, _ = make_train_images(load_images(ImageArguments(dataset_name=str(parquet))), args, processor)
    division = division_of(per_device_train_batch_size=8)
    batches = StreamedBatches(make_train_images(streamed, args, processor)[0], division, 8, 8, 0, 0, 0, 1)
    (numbered,) = epoch(streamed.train, batch_size=8)
    assert isinstance(in_memory, TrainImages)
    batch = next(iter(batches))
    for index, number in enumerate(numbered[0]["pixel_values"][:, 0].tolist()):
        sample = in_memory[number, int(batch["seeds"][index])]
        assert torch.equal(sample["pixel_values"], batch["pixel_values"][index])
        assert sample["labels"] == batch["labels"][index]


# ---- Sources ----


def test_an_image_folder_streams_with_mixed_classes_even_without_a_buffer(image_folder):
    data = load(image_folder)
    assert data.label_names == NAMES and len(data.train) == 60 and len(data.evaluation) == 6
    (batches,) = epoch(data.train, workers=2, buffer_size=1)
    assert sorted(numbers([batches])) == list(range(60))
    assert all(len(set(batch["labels"].tolist())) > 1 for batch in batches)
    for batch in batches:
        assert batch["labels"].tolist() == [n // 20 for n in batch["pixel_values"][:, 0].tolist()]


def test_string_labels_are_numbered_as_without_streaming(tmp_path):
    features = Features({"image": Image(), "label": Value("string")})
    folder = write_dataset(tmp_path, features, label=lambda number: "xyz"[3 * number // NUM_IMAGES])
    data = load(folder)
    assert data.label_names == load_images(ImageArguments(dataset_name=str(folder))).label_names == ["x", "y", "z"]
    batch = epoch(data.train)[0][0]
    assert batch["labels"].tolist() == [3 * n // NUM_IMAGES for n in batch["pixel_values"][:, 0].tolist()]


@pytest.mark.parametrize("are_plain", [False, True], ids=["encoded", "plain bytes and strings"])
def test_features_that_only_the_dataset_card_declares_are_used_as_without_streaming(tmp_path, are_plain):
    folder, names = write_dataset(tmp_path), ["c", "a", "b"]
    for file in folder.glob("*.parquet"):
        table = pq.read_table(file).replace_schema_metadata()
        if are_plain:
            table = pa.table(
                {
                    "image": [row["bytes"] for row in table["image"].to_pylist()],
                    "label": [names[label] for label in table["label"].to_pylist()],
                }
            )
        pq.write_table(table, file, row_group_size=50)
    features = [{"name": "image", "dtype": "image"}, {"name": "label", "dtype": {"class_label": {"names": names}}}]
    (folder / "README.md").write_text(f"---\n{json.dumps({'dataset_info': {'features': features}})}\n---\n")
    stored, streamed = load_images(ImageArguments(dataset_name=str(folder))), load(folder)
    assert stored.label_names == streamed.label_names == names
    assert stored.train["label"][:] == streamed.train.label_ids().tolist() == [3 * n // 487 for n in range(487)]
    batch = epoch(streamed.train)[0][0]
    assert batch["labels"].tolist() == [3 * n // NUM_IMAGES for n in batch["pixel_values"][:, 0].tolist()]


def test_save_to_disk_datasets_and_the_digits_stream_too(tmp_path):
    digits = load("digits")
    assert len(digits.train) == 1438 and digits.fingerprint == load("digits").fingerprint
    batch = epoch(digits.train, batch_size=16)[0][0]
    assert len(set(batch["labels"].tolist())) > 5
    splits = {name: Dataset.from_dict({"image": [picture(0)] * 30, "label": [0, 1, 2] * 10}) for name in ("a", "b")}
    DatasetDict(train=splits["a"].cast(ENCODED), test=splits["b"].cast(ENCODED)).save_to_disk(tmp_path)
    assert len(load(tmp_path).train) == 30


def test_labels_are_counted_without_reading_an_image(parquet, image_folder):
    for folder in (parquet, image_folder):
        streamed = load_images(ImageArguments(str(folder), streaming=True))
        stored = load_images(ImageArguments(str(folder)))
        assert streamed.label_counts().tolist() == np.bincount(stored.train["label"]).tolist()
    with pytest.raises(UserError, match="^--class_weights needs .* download the dataset first"):
        dataclasses.replace(streamed, source="hub").label_counts()


def test_the_fingerprint_depends_on_the_files_not_their_location(parquet, image_folder, tmp_path):
    for source in (parquet, image_folder):
        before = load(source).fingerprint
        copy = tmp_path / source.name
        shutil.copytree(source, copy)
        assert load(copy).fingerprint == before
    write_parquet(tmp_path / parquet.name / "train-00001.parquet", range(103, 306), 64)
    assert load(tmp_path / parquet.name).fingerprint != load(parquet).fingerprint
    next((tmp_path / image_folder.name / "train").rglob("*.png")).unlink()
    assert load(tmp_path / image_folder.name).fingerprint != load(image_folder).fingerprint


def test_unlabelled_images_stream_for_the_teacher_to_label(tmp_path):
    folder = write_dataset(tmp_path)
    for file in folder.glob("train-*.parquet"):
        Dataset.from_parquet(str(file)).remove_columns("label").to_parquet(file)
    with pytest.raises(UserError, match="The training split has no column 'label'"):
        load(folder)
    data = load(folder, labels_needed=False)
    assert data.train.column_names == ["image"] and data.label_names == NAMES
    assert "labels" not in epoch(data.train)[0][0]


# ---- Training ----


def make_trainer(folder: Path, output_dir: Path, **flags) -> DistillationTrainer:
    """Six steps of 80 images per epoch with a one-block student, and everything random on."""
    settings = {
        "per_device_train_batch_size": 80,
        "num_train_epochs": 2,
        "save_strategy": "no",
        "eval_strategy": "no",
        "save_total_limit": 9,
        "disable_tqdm": True,
        **flags,
    }
    args = arguments(
        dataset_name=folder,
        streaming=True,
        shuffle_buffer_size=120,
        output_dir=output_dir,
        image_size=32,
        patch_size=16,
        **settings,
    )
    data, image_processor = load_images(args.images), make_image_processor(args.model, args.augmentation)
    torch.manual_seed(3)
    network = DeiTTiForImageClassification(
        DeiTTiConfig(image_size=32, patch_size=16, num_labels=3, num_hidden_layers=1)
    )
    return build_trainer(args, data, network, image_processor)


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (4, {}),
        (6, {"dataloader_num_workers": 2}),
        (9, {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}),
        (3, {"per_device_train_batch_size": 40, "gradient_accumulation_steps": 2, "repeated_augmentation": 1}),
    ],
    ids=["mid-epoch", "end of an epoch, workers", "second epoch, workers", "accumulation"],
)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(parquet, tmp_path, step, options):
    recipe = {"save_strategy": "steps", "save_steps": step, "logging_strategy": "steps", "logging_steps": 3} | options
    whole = make_trainer(parquet, tmp_path, **recipe)
    whole.train()
    assert whole.state.global_step == 12
    resumed = make_trainer(parquet, tmp_path, **recipe)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    assert losses[0] == losses[1]


TINY = [
    "--streaming=true",
    "--image_size=32",
    "--patch_size=16",
    "--auto_augment=none",
    "--mixup=0",
    "--cutmix=0",
    "--random_erasing=0",
    "--crop=none",
    "--disable_tqdm=true",
]


def in_process(monkeypatch, *flags: str) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["train_hf.py", *TINY, *flags])
    train_hf.main()


def test_a_streamed_run_fits_its_teacher_and_the_next_run_reuses_it(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO, "modeling_deit_ti")
    flags = [
        "--dataset_name=digits",
        "--distill_mode=hard",
        "--teacher_model_name_or_path=test_resnet",
        "--teacher_num_train_epochs=2",
        "--teacher_learning_rate=2e-2",
        "--per_device_train_batch_size=32",
        "--max_steps=2",
        "--max_eval_samples=100",
        f"--teacher_output_dir={tmp_path}/teachers",
    ]
    in_process(monkeypatch, *flags, f"--output_dir={tmp_path}/first")
    assert "fitting for 2 epochs" in caplog.text
    caplog.clear()
    in_process(monkeypatch, *flags, f"--output_dir={tmp_path}/second", "--seed=7")
    assert "fitted by an earlier run" in caplog.text and "fitting for" not in caplog.text
    results = json.loads((tmp_path / "first" / "all_results.json").read_text())
    assert results["teacher_accuracy"] > 0.3
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    right = report["teacher"]["both_right"] + report["teacher"]["only_teacher_right"]
    assert (report["num_images"], right) == (100, round(100 * results["teacher_accuracy"]))
    card = (tmp_path / "first" / "README.md").read_text()
    assert "1,438" in card and "streaming" in card


def test_a_bad_image_mid_run_ends_it_naming_the_row_and_keeps_the_checkpoint(monkeypatch, tmp_path):
    folder = write_dataset(tmp_path / "data")
    images = [{"bytes": picture(n) if n != 317 else b"no image", "path": None} for n in range(303, 320)]
    Dataset.from_dict({"image": images, "label": [2] * 17}, features=ENCODED).to_parquet(
        folder / "train-00002.parquet", batch_size=10
    )
    with pytest.raises(UnreadableRow) as caught:
        in_process(
            monkeypatch,
            f"--dataset_name={folder}",
            f"--output_dir={tmp_path}/run",
            "--per_device_train_batch_size=8",
            "--repeated_augmentation=1",
            "--save_strategy=steps",
            "--save_steps=1",
            "--dataloader_num_workers=2",
            "--seed=4",
        )
    message = str(caught.value)
    assert f"Split `train`, file {folder}/train-00002.parquet, row 14: the image in column 'image'" in message
    assert "Traceback" not in message and "Repair that row, then run the same command again." in message
    (checkpoint, *_) = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert (checkpoint / "trainer_state.json").is_file()


def test_two_processes_stream_through_accelerate_launch(parquet, tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            "--config_file=accelerate_configs/cpu_two_processes.yaml",
            *("train_hf.py", "--use_cpu", *TINY),
            f"--dataset_name={parquet}",
            f"--output_dir={tmp_path}/run",
            "--dataloader_num_workers=2",
            "--per_device_train_batch_size=40",
            "--num_train_epochs=1",
        ],
        cwd=REPOSITORY,
        env=os.environ.copy(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == NUM_IMAGES // 80 and state["epoch"] == 1
    assert "| Training images | 487" in (tmp_path / "run" / "README.md").read_text().replace("**", "")


# ---- Mistakes ----


@pytest.mark.parametrize("label", [None, -1])
def test_a_missing_label_is_reported_with_its_row(tmp_path, label):
    folder = write_dataset(tmp_path)
    write_parquet(folder / "train-00002.parquet", range(17), 5, label=lambda n: label if n == 11 else 0)
    (batches,) = epoch(load(folder).train, workers=2)
    (error,) = [batch["error"] for batch in batches if "error" in batch]
    said = "missing" if label is None else "-1"
    assert error == f"Split `train`, file {folder}/train-00002.parquet, row 11: the label is {said}."


def test_an_out_of_range_label_and_a_truncated_file_are_reported(tmp_path):
    folder = write_dataset(tmp_path)
    data = load(folder)
    out_of_range = StreamedSplit(data.train.rows, "image", "label", None, num_labels=1)
    ((batch,),) = epoch(out_of_range, batch_size=400)
    assert re.search(r"row \d+: label [12] is out of range; there are 1 labels", batch["error"])
    os.truncate(folder / "train-00001.parquet", 2000)
    errors = [batch["error"] for batch in epoch(data.train)[0] if "error" in batch]
    assert "train-00001.parquet" in errors[0] and "cannot be read" in errors[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_train_samples": 10}, "--max_train_samples draws a random subset"),
        ({"augment_on": "device"}, "--augment_on device"),
        ({"shuffle_buffer_size": 0}, "--shuffle_buffer_size 0"),
    ],
)
def test_flags_that_streaming_cannot_honour_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        arguments(streaming=True, **flags)


def test_datasets_that_cannot_be_streamed_are_reported_before_training(parquet, tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("label,file\n1,a.png\n")
    with pytest.raises(UserError, match="--streaming reads Parquet files.*Csv"):
        load(tmp_path / "csv")
    write_parquet(tmp_path / "one" / "train-00000.parquet", range(20), 10)
    with pytest.raises(UserError, match="cannot hold out images from the split `train`"):
        load(tmp_path / "one")
    with pytest.raises(UserError, match="without --validation_from_train"):
        load(parquet, validation_from_train=True)
    with pytest.raises(UserError, match="--image_column_name nothing: no such column"):
        load(parquet, image_column_name="nothing")
    with pytest.raises(UserError, match=r"487 training images are too few for one step.*\(600\)"):
        epoch(load(parquet).train, processes=2, batch_size=300)

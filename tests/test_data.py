"""Datasets in, tensors out: every source, every kind of image, every mistake, and the randomness in between."""

import dataclasses
import io
import pickle
import random

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from building import NOTHING_RANDOM, arguments
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets
from PIL import Image as PILImage
from scipy.stats import beta, kstest
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader

from modeling_deit_ti.arguments import AugmentationArguments, ImageArguments, ModelArguments
from modeling_deit_ti.data import ImageData, inputs, load_images
from modeling_deit_ti.data.decoding import read_image, to_rgb
from modeling_deit_ti.data.inputs import (
    EvalImages,
    ImageBatches,
    TrainImages,
    make_image_processor,
    make_train_images,
    make_train_transform,
)
from modeling_deit_ti.data.loading import hold_out
from modeling_deit_ti.data.sampling import TrainSampler, collate_images, mix_images, partners
from modeling_deit_ti.errors import UserError


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def write_parquet(folder, labels=(0, 1, 0, 1), names=("cat", "dog"), split="train", kind=None, **columns) -> None:
    """A split as one Parquet file, as `push_to_hub` lays it out."""
    folder.mkdir(exist_ok=True)
    values = {"image": [picture(i) for i in range(len(labels))], "label": list(labels), **columns}
    features = Features({"image": Image(), "label": kind or ClassLabel(names=list(names))})
    Dataset.from_dict(values, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def image_processor(image_size: int, **parts):
    return make_image_processor(ModelArguments(image_size=image_size), AugmentationArguments(**parts))


def train_transform(args: AugmentationArguments, image_size: int):
    return make_train_transform(args, image_processor(image_size))


def train_images(data: ImageData, args: AugmentationArguments, image_size: int, device: str = "cpu"):
    return make_train_images(data, args, image_processor(image_size), device)


def load(folder, labels_needed: bool = True, **flags) -> ImageData:
    return load_images(ImageArguments(dataset_name=str(folder), **flags), labels_needed)


def pixels(row) -> np.ndarray:
    return np.frombuffer(row["pixels"], np.uint8).reshape(row["height"], row["width"], 3)


# ---- Sources ----


def test_digits_need_no_network():
    data = load("digits")
    assert (len(data.train), len(data.evaluation), data.eval_split) == (1438, 359, "test")
    assert data.label_names == [str(digit) for digit in range(10)]
    first = pixels(data.train[0])
    assert first.shape == (8, 8, 3) and first.max() == 255 * 15 // 16 and data.train[0]["label"] == 0


def test_a_parquet_folder_loads(tmp_path):
    write_parquet(tmp_path / "data", split="train")
    write_parquet(tmp_path / "data", labels=[1, 0], split="test")
    data = load(tmp_path / "data")
    assert (data.train["label"][:], data.evaluation["label"][:]) == ([0, 1, 0, 1], [1, 0])
    assert (data.label_names, data.eval_split) == (["cat", "dog"], "test")
    np.testing.assert_array_equal(pixels(data.train[2]), np.asarray(picture(2)))


def test_class_folders_load_and_a_share_is_held_out(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            picture(i).save(tmp_path / "photos" / name / f"{i}.png")
    data = load(tmp_path / "photos", train_val_split=0.25)
    assert data.label_names == ["ant", "bee"] and data.eval_split == "train (held out)"
    assert (len(data.train), len(data.evaluation)) == (15, 5)


def test_the_same_share_of_each_label_is_held_out():
    labels = ["ant"] * 40 + ["bee"] * 20
    kept, held_out = hold_out(labels, 0.1)
    assert sorted(kept + held_out) == list(range(60))
    assert [labels[row] for row in sorted(held_out)] == ["ant"] * 4 + ["bee"] * 2
    assert len(hold_out(["ant"] * 9 + ["bee"], 0.2)[1]) == 2  # a single bee cannot be split


@pytest.mark.parametrize("streaming", [False, True])
def test_a_labels_only_image_may_be_held_out(tmp_path, streaming):
    labels = ["cat", "dog"] * 10
    _, (row, _) = hold_out([*labels[1:], "emu"], 0.1)
    labels[row] = "emu"
    features = Features({"image": Image(), "label": Value("string")})
    rows = Dataset.from_dict({"image": [picture(i) for i in range(20)], "label": labels}, features=features)
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved", streaming=streaming)
    assert data.label_names == ["cat", "dog", "emu"] and 2 in data.evaluation["label"][:]
    assert data.label_counts()[2] == 0


def test_a_recipe_can_be_chosen_without_the_test_images():
    test = {row["pixels"] for row in load("digits").evaluation}
    data = load("digits", validation_from_train=True, train_val_split=0.25)
    assert data.eval_split == "train (held out)"
    assert (len(data.train), len(data.evaluation)) == (1078, 360)
    train, held_out = ({row["pixels"] for row in split} for split in (data.train, data.evaluation))
    assert not held_out & train and not (held_out | train) & test


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_written_by_save_to_disk_loads(tmp_path, streaming):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    split = Dataset.from_dict({"image": [picture(0), picture(1)], "label": [0, 1]}, features=features)
    DatasetDict({"train": split, "validation": split}).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved", streaming=streaming)
    assert (len(data.train), len(data.evaluation), data.eval_split) == (2, 2, "validation")
    single = tmp_path / "my [photos]" / "single"
    concatenate_datasets([split] * 5).save_to_disk(single)
    before = {path.name: path.read_bytes() for path in single.iterdir()}
    data = load(single, streaming=streaming)
    assert (len(data.train), len(data.evaluation), data.eval_split) == (9, 1, "train (held out)")
    assert data.label_names == ["a", "b"] and sorted(data.label_counts()) == [4, 5]
    assert {path.name: path.read_bytes() for path in single.iterdir()} == before


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_may_have_brackets_in_their_names(tmp_path, streaming):
    for split in ("train", "test"):
        write_parquet(tmp_path, split=split)
        (tmp_path / f"{split}-00000-of-00001.parquet").rename(tmp_path / f"{split} [1].parquet")
    data = load(tmp_path, streaming=streaming)
    assert (len(data.train), len(data.evaluation), data.eval_split) == (4, 4, "test")


@pytest.mark.parametrize("streaming", [False, True])
def test_label_names_in_one_split_and_text_in_the_other_are_refused(tmp_path, streaming):
    write_parquet(tmp_path, names=("dog", "cat"))
    write_parquet(tmp_path, labels=("dog", "cat"), kind=Value("string"), split="test")
    with pytest.raises(UserError, match="holds ClassLabel in one split and string in the other"):
        load(tmp_path, streaming=streaming)


@pytest.mark.parametrize(
    ("labels", "kind", "names", "ids"),
    [
        (["dog", "cat", "dog", "emu"], Value("string"), ["cat", "dog", "emu"], [1, 0, 1, 2]),
        ([2, 0, 1, 2], Value("int64"), ["0", "1", "2"], [2, 0, 1, 2]),
        ([7, 3, 10**12, 3], Value("int64"), ["3", "7", "1000000000000"], [1, 0, 2, 0]),
    ],
)
def test_labels_without_a_class_feature_get_names(tmp_path, labels, kind, names, ids):
    for split in ("train", "test"):
        write_parquet(tmp_path / "data", labels=labels, kind=kind, split=split)
    data = load(tmp_path / "data")
    assert (data.label_names, data.train["label"][:], data.evaluation["label"][:]) == (names, ids, ids)


@pytest.mark.parametrize("names", [["cat", "dog"], ["A", "a"]])
def test_the_same_labels_in_a_different_order_are_aligned(tmp_path, names):
    write_parquet(tmp_path / "data", labels=[0, 1], names=names, split="train")
    write_parquet(tmp_path / "data", labels=[0, 1], names=names[::-1], split="test")
    data = load(tmp_path / "data")
    assert (data.label_names, data.evaluation["label"][:]) == (names, [1, 0])


def test_a_subset_is_drawn_from_all_rows_and_is_always_the_same():
    subset, again = (load("digits", max_train_samples=100, max_eval_samples=50) for _ in range(2))
    assert (len(subset.train), len(subset.evaluation)) == (100, 50)
    assert subset.train["label"][:] == again.train["label"][:] and len(set(subset.train["label"][:])) == 10
    assert subset.fingerprint == again.fingerprint


def test_the_fingerprint_depends_on_pixels_and_labels_but_not_on_the_folder(tmp_path):
    for name, labels in (("a", [0, 1, 0, 1]), ("b", [0, 1, 0, 1]), ("c", [0, 1, 1, 1])):
        write_parquet(tmp_path / name, labels=labels)
        write_parquet(tmp_path / name, split="test")
    a, b, c = (load(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_training_without_labels_accepts_a_split_without_a_label_column(tmp_path):
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"image": [picture(0)]}, features=Features({"image": Image()})).to_parquet(
        tmp_path / "data" / "train-0.parquet"
    )
    write_parquet(tmp_path / "data", split="test")
    data = load(tmp_path / "data", labels_needed=False)
    assert "label" not in data.train.column_names and data.label_names == ["cat", "dog"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("labels", "kind"),
    [([0, None, -1, 1], None), ([5, None, -1, 3], Value("int64")), (["dog", None, "cat", "cat"], Value("string"))],
)
def test_training_without_labels_accepts_rows_with_missing_labels(tmp_path, labels, kind, streaming):
    write_parquet(tmp_path / "data", labels=labels, kind=kind)
    write_parquet(tmp_path / "data", labels=[labels[0], labels[3]], kind=kind, split="test")
    data = load(tmp_path / "data", labels_needed=False, streaming=streaming)
    assert len(data.train) == 4 and "label" not in data.train.column_names
    assert data.evaluation["label"][:] == ([0, 1] if kind is None else [1, 0])
    if streaming:
        for number, image in enumerate(data.train.first_images(4)):
            np.testing.assert_array_equal(image, picture(number))


# ---- Mistakes ----


def broken_image(folder):
    write_parquet(folder, split="test")
    good = io.BytesIO()
    picture(0).save(good, "PNG")
    images = [{"bytes": good.getvalue(), "path": None}, {"bytes": good.getvalue()[:60], "path": None}]
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["cat", "dog"])})
    rows = Dataset.from_dict({"image": images, "label": [0, 1]}, features=features)
    rows.cast_column("image", Image()).to_parquet(folder / "train-00000-of-00001.parquet")


def splits(train: dict, test: dict):
    def write(folder):
        write_parquet(folder, **train)
        write_parquet(folder, split="test", **test)

    return write


@pytest.mark.parametrize(
    ("write", "flags", "message"),
    [
        (broken_image, {}, r"Split `train`, row 1: the image in column 'image' cannot be decoded"),
        (splits({"labels": [0, 1, None]}, {}), {}, "Split `train`, row 2: the label is missing"),
        (splits({}, {"labels": [0, -1]}), {}, "Split `test`, row 1: the label is -1"),
        (splits({}, {"labels": [0, -1], "names": ["dog", "cat"]}), {}, "Split `test`, row 1: the label is -1"),
        (
            splits({"names": ["cat", "dog"]}, {"names": ["cat", "emu"]}),
            {},
            "labels differ: 'dog', 'emu' in one split only",
        ),
        (
            splits({"labels": ["a", "b"], "kind": Value("string")}, {"labels": ["a", "c"], "kind": Value("string")}),
            {},
            "labels differ: evaluation has 'c'",
        ),
        (
            splits({"labels": [0, 1], "kind": Value("int64")}, {"labels": [0, 7], "kind": Value("int64")}),
            {},
            "labels differ: evaluation has 7",
        ),
        (
            splits({"labels": [0, 0], "names": ["cat"]}, {"labels": [0], "names": ["cat"]}),
            {},
            "a classifier needs at least two",
        ),
        (splits({}, {}), {"image_column_name": "photo"}, "no such column; the columns are image, label"),
        (splits({}, {}), {"label_column_name": "kind"}, "no such column; the columns are image, label"),
        (splits({}, {}), {"image_column_name": "label"}, "holds ClassLabel, not images; images are in image"),
        (
            splits({}, {}),
            {"label_column_name": "image"},
            "holds Image; labels must be class labels, strings or integers",
        ),
    ],
)
def test_mistakes_in_the_data_are_reported(tmp_path, write, flags, message):
    write(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "data", **flags)


def test_a_missing_dataset_is_an_error_that_explains_how_to_run_offline(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        load(tmp_path / "missing")
    with pytest.raises(UserError, match="(?s)nobody/nothing.*To run offline"):
        load("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a readable local folder nor reachable"):
        load(tmp_path / "empty")


@pytest.mark.parametrize(
    "flag",
    [
        {"max_train_samples": 0},
        {"horizontal_flip": 1.5},
        {"random_erasing": -1},
        {"train_val_split": 1.0},
        {"eval_crop_ratio": 0.0},
    ],
)
def test_the_error_for_an_argument_out_of_range_names_its_flag(flag):
    with pytest.raises(UserError, match=f"--{next(iter(flag))}"):
        arguments(**flag)


# ---- Kinds of images ----


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_kind_of_image_becomes_rgb(mode):
    image = picture(0).convert(mode)
    assert to_rgb(image).mode == "RGB"
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bit_images_are_scaled_to_8_bits(dtype, tmp_path):
    values = np.array([[0, 257, 25_700, 65_535]], dtype=dtype)
    PILImage.fromarray(values).save(tmp_path / "deep.png" if dtype == np.uint16 else tmp_path / "deep.tiff")
    image = to_rgb(PILImage.open(next(tmp_path.iterdir())))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 100, 255]


def test_an_image_with_an_orientation_tag_is_turned_upright(tmp_path):
    folder = tmp_path / "data"
    for split in ("train", "test"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            exif = PILImage.Exif()
            exif[0x0112] = 6  # rotate by 270 degrees
            picture(0, (4, 9)).save(folder / split / name / "0.png", exif=exif)
    row = load(folder).train[0]
    np.testing.assert_array_equal(pixels(row), np.rot90(np.asarray(picture(0, (4, 9))), -1))


# ---- Model inputs ----


def normalised(image: PILImage.Image) -> torch.Tensor:
    values = (np.asarray(image) / 255 - np.array(IMAGENET_DEFAULT_MEAN)) / np.array(IMAGENET_DEFAULT_STD)
    return torch.tensor(values, dtype=torch.float32).permute(2, 0, 1)


def plain(**parts) -> AugmentationArguments:
    return AugmentationArguments(**{**NOTHING_RANDOM, **parts})


def test_with_all_augmentation_off_training_sees_the_normalised_image():
    transform = train_transform(plain(), 16)
    torch.testing.assert_close(transform(picture(0, (16, 16))), normalised(picture(0, (16, 16))))


def test_each_augmentation_can_be_enabled_on_its_own():
    image = picture(0, (16, 16))
    for part in (
        {"horizontal_flip": 1.0},
        {"crop": "padded"},
        {"crop": "resized"},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"random_erasing": 1.0},
    ):
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        result = train_transform(plain(**part), 16)(image)
        assert result.shape == (3, 16, 16) and not torch.equal(result, normalised(image)), part
    flipped = train_transform(plain(horizontal_flip=1.0), 16)(image)
    torch.testing.assert_close(flipped, normalised(image).flip(-1))


def test_crops_are_padded_up_to_32_pixels_and_resized_above():
    assert [AugmentationArguments().crop_at(size) for size in (32, 33, 224)] == ["padded", "resized", "resized"]


def test_evaluation_resizes_the_shorter_edge_and_crops_the_centre():
    processor = image_processor(224)
    assert processor.size["shortest_edge"] == 256 and processor.crop_size["height"] == 224
    data = load("digits", max_eval_samples=4)
    images = EvalImages(data.evaluation, image_processor(8))
    expected = normalised(PILImage.fromarray(pixels(data.evaluation[1])))
    torch.testing.assert_close(images[1]["pixel_values"], expected, atol=1e-6, rtol=0)
    assert images[1]["labels"] == data.evaluation[1]["label"]


def test_an_images_augmentation_depends_only_on_its_seed():
    data = load("digits", max_train_samples=40)
    images = TrainImages(data.train, train_transform(AugmentationArguments(), 32))
    keys = list(TrainSampler(40, 8, seed=5))
    alone = torch.stack([images[key]["pixel_values"] for key in keys])
    for workers in (0, 2):
        loader = DataLoader(images, batch_size=8, sampler=keys, collate_fn=collate_images, num_workers=workers)
        torch.testing.assert_close(torch.cat([batch["pixel_values"] for batch in loader]), alone, atol=0, rtol=0)
    assert not torch.equal(images[keys[0]]["pixel_values"], images[(keys[0][0], 1)]["pixel_values"])


def test_augmentation_leaves_the_global_generators_alone():
    images = TrainImages(load("digits", max_train_samples=4).train, train_transform(AugmentationArguments(), 32))
    draws = []
    for augment in (False, True):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        if augment:
            images[(0, 99)]
        draws.append((torch.rand(()).item(), random.random(), np.random.rand()))
    assert draws[0] == draws[1]


def test_an_epoch_covers_every_image_once_in_full_batches():
    sampler = TrainSampler(num_images=103, batch_size=10, seed=0)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        indices = [index for index, _ in epochs[-1]]
        assert len(indices) == len(sampler) == 100 == len(set(indices))
        assert len({seed for _, seed in epochs[-1]}) == 100
    assert epochs[0] != epochs[1]
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0]
    assert list(TrainSampler(103, 10, seed=1)) != epochs[0]
    assert len(TrainSampler(num_images=7, batch_size=10, seed=0)) == 7


def test_repeated_augmentation_shows_each_image_three_times_with_different_seeds():
    keys = list(TrainSampler(num_images=90, batch_size=10, seed=0, repeats=3))
    assert len(keys) == 90 and len({index for index, _ in keys}) == 30 and len({seed for _, seed in keys}) == 90
    sampler = TrainSampler(num_images=1280, batch_size=128, seed=0, repeats=3)
    batches = torch.tensor([index for index, _ in sampler]).view(10, 128)
    views = [len(batch.unique()) for batch in batches]
    assert all(43 <= count <= 44 for count in views)  # a third of the batch, and one split between batches
    partner = torch.from_numpy(partners(128))
    assert (batches == batches[:, partner]).float().mean() < 0.05  # mixup blends different images


def test_mixup_blends_neighbours_and_their_labels_in_the_same_proportion():
    images, labels = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0])
    mixed, targets = mix_images(images, labels, np.arange(5), num_labels=4, mixup=0.8, cutmix=0)
    neighbours = torch.tensor([1, 0, 3, 2, 4])  # the last has none
    one_hot, share = torch.eye(4)[labels], targets.gather(1, labels[:, None])
    torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot[neighbours])
    assert len(share[:4].unique()) == 4 and torch.equal(mixed[4], images[4])
    share = share.view(5, 1, 1, 1)
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[neighbours])


def test_cutmix_pastes_a_box_and_weights_labels_by_its_area():
    images, labels = torch.zeros(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    images += labels.view(4, 1, 1, 1)
    mixed, targets = mix_images(images, labels, np.arange(3, 7), num_labels=4, mixup=0, cutmix=1.0)
    own = (mixed == images).float().mean(dim=(1, 2, 3))
    assert ((own > 0) & (own < 1)).any() and set(mixed.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    for image, pasted in zip(mixed, mixed != images, strict=True):
        rows, columns = pasted[0].any(dim=1).sum(), pasted[0].any(dim=0).sum()
        assert pasted.sum() == 3 * rows * columns and len(image.unique()) <= 2
    torch.testing.assert_close(targets.gather(1, labels[:, None])[:, 0], own)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_a_fair_coin_picks_mixup_or_cutmix_with_beta_shares_whatever_the_batch():
    images, labels, seeds = torch.rand(4000, 1, 8, 8), torch.arange(4000) % 2, np.arange(4000)
    mixed, targets = mix_images(images, labels, seeds, 2, mixup=0.8, cutmix=1.0)
    neighbours = images.view(2000, 2, 1, 8, 8).flip(1).view_as(images)
    pasted = ((mixed == images) | (mixed == neighbours)).all(dim=(1, 2, 3)).flatten()
    assert 1850 < pasted.sum() < 2150
    shares = targets.gather(1, labels[:, None])[~pasted, 0].numpy()
    assert kstest(shares, beta(0.8, 0.8).cdf).pvalue > 0.01
    parts = [mix_images(images[part], labels[part], seeds[part], 2, 0.8, 1.0) for part in (slice(6), slice(6, 4000))]
    for whole, *pieces in zip((mixed, targets), *parts, strict=True):
        assert torch.equal(whole, torch.cat(pieces))


def test_mixing_works_without_labels_and_can_be_turned_off():
    images = torch.rand(4, 3, 8, 8)
    seeds = np.arange(4)
    mixed, labels = mix_images(images, None, seeds, 4, mixup=0.8, cutmix=0)
    assert labels is None and not torch.equal(mixed, images)
    unmixed, ids = mix_images(images, torch.tensor([0, 1, 2, 3]), seeds, 4, mixup=0, cutmix=0)
    assert unmixed is images and ids.dtype == torch.long


# ---- Augmentation on the device ----

UNMIXED = AugmentationArguments(augment_on="device", mixup=0, cutmix=0)


def test_the_device_turns_raw_pixels_into_what_the_loader_would_produce():
    data = load("digits", max_train_samples=8)
    keys = list(TrainSampler(8, 8, seed=0))
    images, augment = train_images(data, plain(augment_on="device"), 8)
    batch = collate_images(images.__getitems__(keys))
    assert batch["pixel_values"].shape == (8, 3, 8, 8) and batch["pixel_values"].dtype == torch.uint8
    by_loader, only_mix = train_images(data, plain(augment_on="loader"), 8)
    expected = collate_images(by_loader.__getitems__(keys))
    pixel_values, labels = augment(batch["pixel_values"], batch["labels"], batch["seeds"])
    torch.testing.assert_close(pixel_values, expected["pixel_values"])
    assert torch.equal(labels, expected["labels"])
    assert only_mix(expected["pixel_values"], None, expected["seeds"])[0] is expected["pixel_values"]


@pytest.mark.parametrize(
    "rows",
    [
        lambda split: split,  # two Arrow arrays
        lambda split: split.select(range(997, 1005)),  # a slice across both
        lambda split: split.select([1200, 3, 999, 1000, 3, 7]),  # indices into them
        lambda split: split.shuffle(seed=0).select(range(40)).select([0, 39, 1]),
        lambda split: concatenate_datasets([split.select(range(5)), split.select([1437, 0])]),
        lambda split: split.remove_columns("label"),
    ],
)
def test_fetching_a_whole_batch_returns_the_requested_rows(rows):
    split = rows(load("digits").train)
    indices = np.random.default_rng(0).integers(0, len(split), 50)
    batches = ImageBatches(split)
    for fetch in (batches.fetch, pickle.loads(pickle.dumps(batches)).fetch):
        batch = fetch(indices.tolist())
        expected = np.stack([pixels(split[int(index)]) for index in indices])
        np.testing.assert_array_equal(batch["pixel_values"].permute(0, 2, 3, 1), expected)
        if "label" in split.column_names:
            assert batch["labels"].tolist() == [split[int(index)]["label"] for index in indices]
        else:
            assert "labels" not in batch
    assert all(not chunk.flags.owndata and not chunk.flags.writeable for chunk in batches.chunks)  # memory-mapped
    assert len(pickle.dumps(batches)) < len(pickle.dumps(batches.dataset)) + 200  # and workers are not sent a copy


def test_whole_batches_are_the_same_for_any_number_of_workers():
    images, augment = train_images(load("digits", max_train_samples=40), UNMIXED, 32)
    keys = list(TrainSampler(40, 8, seed=5))
    epochs = []
    for workers in (0, 2):
        loader = DataLoader(images, batch_size=8, sampler=keys, collate_fn=collate_images, num_workers=workers)
        epochs.append([augment(batch["pixel_values"], None, batch["seeds"])[0] for batch in loader])
    torch.testing.assert_close(epochs[0], epochs[1], atol=0, rtol=0)
    alone = images[keys[3]]
    again = augment(alone["pixel_values"][None], None, np.array([alone["seeds"]]))[0]
    torch.testing.assert_close(again[0], epochs[0][0][3], atol=0, rtol=0)


def test_two_processes_together_see_the_batches_of_one():
    images, augment = train_images(load("digits", max_train_samples=40), UNMIXED, 32)
    keys = list(TrainSampler(40, 8, seed=5))

    def augmented(**processes) -> list[torch.Tensor]:
        loader = DataLoader(images, batch_size=4, sampler=keys, collate_fn=collate_images)
        loader = prepare_data_loader(loader, put_on_device=True, device=torch.device("cpu"), **processes)
        return [augment(batch["pixel_values"], None, batch["seeds"])[0] for batch in loader]

    first, second = (augmented(num_processes=2, process_index=index) for index in (0, 1))
    together = [batch for pair in zip(first, second, strict=True) for batch in pair]
    torch.testing.assert_close(together, augmented(num_processes=1, process_index=0), atol=0, rtol=0)


@pytest.mark.parametrize(("image_size", "parts"), [(8, {}), (20, {"crop": "none"}), (48, {})])
def test_evaluation_batches_match_the_shipped_processor_image_by_image(image_size, parts):
    split = load("digits", max_eval_samples=6).evaluation
    processor = image_processor(image_size, **parts)
    batch = collate_images(EvalImages(split, processor).__getitems__([5, 0, 3]))
    for position, index in enumerate([5, 0, 3]):
        expected = processor(read_image(split[index]), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(batch["pixel_values"][position], expected, atol=0, rtol=0)
    assert batch["labels"].tolist() == [split[index]["label"] for index in [5, 0, 3]]


@pytest.mark.parametrize("is_kept", [True, False])
@pytest.mark.parametrize(("image_size", "parts"), [(8, {}), (48, {})])
def test_evaluation_images_are_prepared_once_if_they_fit_into_memory(monkeypatch, image_size, parts, is_kept):
    split = load("digits", max_eval_samples=23).evaluation
    processor = image_processor(image_size, **parts)
    expected = processor([read_image(row) for row in split], return_tensors="pt")["pixel_values"]
    prepared, resize = [], type(processor).resize

    def counted(self, image, *args, **kwargs):
        prepared.append(len(image))
        return resize(self, image, *args, **kwargs)

    monkeypatch.setattr(type(processor), "resize", counted)
    if not is_kept:
        monkeypatch.setattr(inputs, "MAX_KEPT_BYTES", 23 * 3 * image_size**2 - 1)
    images = EvalImages(split, processor)
    passes = (range(23), range(23), [22, 5, 5, 0], [21, 22, 0, 1])  # the last one as padded for several processes
    for rows, size in zip(passes, (10, 7, 4, 4), strict=True):
        loader = DataLoader(images, batch_size=size, sampler=rows, collate_fn=collate_images)
        batches = list(loader)
        torch.testing.assert_close(
            torch.cat([batch["pixel_values"] for batch in batches]), expected[list(rows)], atol=0, rtol=0
        )
        assert torch.cat([batch["labels"] for batch in batches]).tolist() == [split[row]["label"] for row in rows]
    assert sum(prepared) == (23 if is_kept else 23 + 23 + 4 + 4)
    assert images.cropped[3]["pixel_values"].dtype == torch.uint8


def test_evaluation_images_of_different_sizes_are_prepared_one_by_one():
    pictures = [picture(0, (9, 12)), picture(1, (12, 9))]
    features = Features({"image": Image(), "label": Value("int64")})
    split = Dataset.from_dict({"image": pictures, "label": [0, 1]}, features=features)
    processor = image_processor(16)
    batch = collate_images(EvalImages(split, processor).__getitems__([1, 0]))
    expected = processor([pictures[1], pictures[0]], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected, atol=0, rtol=0)


def test_auto_augments_on_the_device_where_possible_and_faster():
    digits = load("digits", max_train_samples=8)
    features = Features({"pixels": Value("binary"), "height": Value("int32"), "width": Value("int32")})
    two_sizes = {"pixels": [bytes(12), bytes(18)], "height": [2, 2], "width": [2, 3]}
    mixed = dataclasses.replace(digits, train=Dataset.from_dict(two_sizes, features=features))
    on_device = [
        train_images(data, AugmentationArguments(**parts), image_size, device)[1].augment is not None
        for data, parts, image_size, device in (
            (digits, {}, 64, "cpu"),
            (digits, {}, 65, "cpu"),
            (digits, {}, 224, "cuda"),
            (digits, {}, 32, "mps"),
            (mixed, {}, 32, "cuda"),
            (digits, {"auto_augment": "augmix-m5"}, 32, "cpu"),
            (digits, {"augment_on": "device"}, 65, "cpu"),
            (digits, {"augment_on": "loader"}, 32, "cuda"),
        )
    ]
    assert on_device == [True, False, True, False, False, False, True, False]


def test_augmentation_on_the_device_needs_images_of_one_size_and_a_known_policy(tmp_path):
    (tmp_path / "data").mkdir()
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    mixed = Dataset.from_dict({"image": [picture(0), picture(1, (5, 6))], "label": [0, 1]}, features=features)
    for split in ("train", "test"):
        mixed.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(UserError, match="not all of one size"):
        train_images(load(tmp_path / "data"), plain(augment_on="device"), 32)
    with pytest.raises(UserError, match="--augment_on device: .*augmix"):
        train_images(load("digits"), plain(augment_on="device", auto_augment="augmix-m5"), 32)

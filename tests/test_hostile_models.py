"""Hostile model folders: each ends in one message, wherever it is loaded."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from building import DIGITS, TINY_CNN, arguments, image_processor
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import app
import evaluate_hf
import predict
from modeling_deit_ti import DeiTTiConfig
from modeling_deit_ti.arguments import ImageArguments
from modeling_deit_ti.classifiers import label_maps, new_timm_classifier
from modeling_deit_ti.data import load_images
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.fitting import prepare_teacher
from modeling_deit_ti.interop import load_student


class Bomb:
    """Leaves a file behind when unpickled."""

    def __reduce__(self):
        return open, ("exploded", "w")


# Spoils one of the two models and returns its name.
Spoil = Callable[[Path], str]


def change(file: str, base: str = "vit", **values) -> Spoil:
    """Changes fields of a JSON file."""

    def spoil(folder: Path) -> str:
        path = folder / base / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return base

    return spoil


def config(**values) -> Spoil:
    return change("config.json", **values)


def timm_config(**values) -> Spoil:
    return change("config.json", "timm", **values)


def processor(**values) -> Spoil:
    return change("preprocessor_config.json", **values)


def write(file: str, content: bytes) -> Spoil:
    def spoil(folder: Path) -> str:
        (folder / "vit" / file).write_bytes(content)
        return "vit"

    return spoil


def header(tensors: dict, data: bytes = b"") -> Spoil:
    """A safetensors file with a header that need not be true."""
    encoded = json.dumps(tensors).encode()
    return write("model.safetensors", struct.pack("<Q", len(encoded)) + encoded + data)


def not_finite(folder: Path) -> str:
    model = ViTForImageClassification.from_pretrained(folder / "vit")
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    model.save_pretrained(folder / "vit")
    return "vit"


def checkpoint_elsewhere(folder: Path) -> str:
    """timm would load this file as well, and its older versions would unpickle it."""
    torch.save(Bomb(), folder / "bomb.bin")
    return timm_config(model_args={"checkpoint_path": str(folder / "bomb.bin")})(folder)


ONE_TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
# How to spoil a model folder, and what the message must contain.
HOSTILE_MODELS = {
    "a billion labels": (config(num_labels=10**9, id2label=None, label2id=None), "its num_labels is 1000000000"),
    "millions of layers": (config(num_hidden_layers=10**7), "its num_hidden_layers is 10000000"),
    "millions of timm blocks": (timm_config(model_args={"layers": [10**7, 1]}), "its layers is 10000000"),
    "an image size of 100,000": (config(image_size=10**5), "its image_size is 100000, .* more than 8,192"),
    "a width that contradicts the weights": (config(hidden_size=10**6), "RuntimeError"),
    "no attention heads": (config(num_attention_heads=0), "ZeroDivisionError"),
    "a negative width": (config(hidden_size=-8), "RuntimeError"),
    "a number with 6,000 digits": (write("config.json", b'{"hidden_size":' + b"9" * 6000 + b"}"), "ValueError"),
    "a number instead of labels": (config(id2label=7), "AttributeError"),
    "deeply nested lists": (write("config.json", b"[" * 100_000), "RecursionError"),
    "bytes that are not text": (write("config.json", b"\xff\xfe\x00"), "not a valid JSON"),
    "an attention kernel from the Hub": (config(attn_implementation="evil/kernel"), "kernels"),
    "a dtype that is a module": (config(dtype="os"), "TypeError"),
    "an architecture on the Hub": (
        timm_config(architecture="hf-hub:evil/x"),
        "'hf-hub:evil/x', that timm does not have",
    ),
    "an architecture in a folder": (timm_config(architecture="local-dir:/etc"), "that timm does not have"),
    "another checkpoint to load": (checkpoint_elsewhere, "its config has model_args with checkpoint_path"),
    "an endless header": (write("model.safetensors", struct.pack("<Q", 2**63 - 1) + b"{}"), "SafetensorError"),
    "a header that is not JSON": (write("model.safetensors", struct.pack("<Q", 4) + b"evil"), "SafetensorError"),
    "weights past the end of the file": (header({"a": {**ONE_TENSOR, "data_offsets": [0, 2**40]}}), "SafetensorError"),
    "a shape that overflows": (header({"a": {**ONE_TENSOR, "shape": [2**62, 4]}}, bytes(16)), "SafetensorError"),
    "mismatched shapes": (header({"classifier.weight": ONE_TENSOR}, bytes(16)), "RuntimeError"),
    "weights that are not there": (header({}), "incomplete|cannot be had"),
}
HOSTILE_PROCESSORS = {
    "sides of a million pixels": (processor(size={"height": 10**6, "width": 10**6}), "its height is 1000000"),
    "an edge of a billion pixels": (processor(size={"shortest_edge": 10**9}), "its shortest_edge is 1000000000"),
    "pictures without pixels": (processor(size={"height": 0, "width": 0}), "ValueError"),
    "a standard deviation of 0": (processor(image_std=[0, 0, 0]), "values that are not finite"),
    "a scale that is not a number": (processor(rescale_factor="x"), "TypeError"),
    "an unknown filter": (processor(resample=99), "KeyError"),
    "no size": (processor(size=None), "ValueError"),
    "an unknown class": (processor(image_processor_type="Evil"), "ValueError"),
    "not JSON": (write("preprocessor_config.json", b"{"), "not a valid JSON"),
    "deeply nested lists": (write("preprocessor_config.json", b"[" * 100_000), "RecursionError"),
}
HOSTILE_TO_PICTURES = {
    "a size other than the model's": (processor(size={"height": 20, "width": 20}), "does not accept these images"),
    "weights that are not numbers": (not_finite, "its logits are not finite"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`vit/` and `timm/`: harmless classifiers of the digits."""
    folder = tmp_path_factory.mktemp("models")
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vit = ViTConfig(**size, image_size=32, patch_size=16, **label_maps(DIGITS))
    ViTForImageClassification(vit).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    new_timm_classifier(TINY_CNN, DIGITS, 32, image_processor(32)).save_pretrained(folder / "timm")
    image_processor(32).save_pretrained(folder / "timm")
    Image.new("RGB", (8, 8)).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def digits():
    return load_images(ImageArguments(dataset_name="digits", max_train_samples=16, max_eval_samples=16))


@pytest.fixture
def spoilt(models, tmp_path, monkeypatch) -> Path:
    """A copy of the models to spoil, as the current folder."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def teach(folder: str, digits) -> None:
    args = arguments(distill_mode="hard", teacher_model_name_or_path=folder, output_dir="run", dataset_name="digits")
    prepare_teacher(args, digits, image_processor(32))


def assert_refused_by_the_commands(folder: str, message: str, capsys) -> None:
    """Exit code 2 and one line with the message. The page shows the same instead of an answer: see `test_app.py`."""
    for main, rest in (
        (predict.main, ["picture.png"]),
        (evaluate_hf.main, ["--dataset_name=digits", "--max_eval_samples=4", "--output_dir=report"]),
        (app.main, ["--no_browser"]),
    ):
        capsys.readouterr()
        assert main([folder, *rest]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if f": MODEL {folder}: " in line]
        assert len(lines) == 1
        assert re.search(message, lines[0]), lines[0]
    assert not Path("report").exists() and not Path("exploded").exists()


@pytest.mark.parametrize("harm", HOSTILE_MODELS)
def test_a_hostile_model_is_refused_at_every_entry_point(harm, spoilt, digits, capsys):
    spoil, message = HOSTILE_MODELS[harm]
    folder = spoil(spoilt)
    assert_refused_by_the_commands(folder, message, capsys)
    with pytest.raises(UserError, match=f"^--model_name_or_path {folder}: .*({message})"):
        load_student(folder, DeiTTiConfig(image_size=32, patch_size=16, **label_maps(DIGITS)))
    if harm != "weights that are not there":  # a teacher without a head for the digits would be fitted
        with pytest.raises(UserError, match=f"^--teacher_model_name_or_path {folder}: .*({message})"):
            teach(folder, digits)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("harm", HOSTILE_PROCESSORS)
def test_a_hostile_image_processor_is_refused_at_every_entry_point(harm, spoilt, digits, capsys):
    spoil, message = HOSTILE_PROCESSORS[harm]
    spoil(spoilt)
    assert_refused_by_the_commands("vit", message, capsys)
    with pytest.raises(UserError, match=f"^--teacher_model_name_or_path vit: .*{message}"):
        teach("vit", digits)


@pytest.mark.parametrize("harm", HOSTILE_TO_PICTURES)
def test_a_model_that_cannot_predict_is_refused(harm, spoilt, capsys):
    spoil, message = HOSTILE_TO_PICTURES[harm]
    spoil(spoilt)
    assert_refused_by_the_commands("vit", message, capsys)


def test_a_picture_that_a_model_does_not_accept_is_reported_without_a_crash(spoilt, capsys):
    """This image processor does not resize, so the trial picture passes, but pictures of any other size fail."""
    processor(do_resize=False)(spoilt)
    assert predict.main(["vit", "picture.png"]) == 2
    assert "MODEL: it does not accept these images (RuntimeError" in capsys.readouterr().err
    page = app.Models({"vit": "vit"})
    said, *_ = page.answer("picture.png", "vit", 0.5, next(iter(app.BLOCKS)))
    assert said.startswith("### vit: it does not accept these images (RuntimeError")

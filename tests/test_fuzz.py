"""Input nobody thought of: flags, recipes, images and label names made up by hypothesis.

By default, a few examples that are always the same; `pytest -m slow tests/test_fuzz.py` tries many others.
"""

import io
import json
import math
import os
import struct
import zlib
from dataclasses import fields
from unittest import mock

import pytest
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image as PILImage
from transformers import HfArgumentParser

from modeling_deit_ti import DeiTTiConfig
from modeling_deit_ti.arguments import ImageArguments
from modeling_deit_ti.card import DatasetRecord, RunRecord, write_model_card
from modeling_deit_ti.card.markdown import clean
from modeling_deit_ti.classifiers import label_maps
from modeling_deit_ti.data import load_images
from modeling_deit_ti.data.decoding import decode_image
from modeling_deit_ti.distillation import MODES
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.parsing import GROUPS, parse_arguments


COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("fast", derandomize=True, max_examples=30, **COMMON)
settings.register_profile("soak", derandomize=False, max_examples=1000, **COMMON)
PROFILES = ["fast", pytest.param("soak", marks=pytest.mark.slow)]


def fuzz(profile: str, *strategies):
    """A decorator that runs a check on examples from the strategies, as many as the profile sets."""
    return lambda check: settings.get_profile(profile)(given(*strategies)(check))()


# ---- Flags and recipes ----

NAMES = [entry.name for group in GROUPS for entry in fields(group) if entry.init]
CHOICES = [
    choice for action in HfArgumentParser(GROUPS)._actions for choice in action.choices or () if choice is not None
]
NUMBERS = st.one_of(st.integers(), st.integers(-3, 3), st.floats(), st.sampled_from([2**31, 2**63, -(2**63), 10**400]))
WORDS = st.one_of(
    st.text(max_size=12), st.sampled_from(["", "true", "no", "none", "all", "{}", "[]", "--seed", *map(str, CHOICES)])
)
FLAGS = st.lists(st.tuples(st.sampled_from(NAMES), st.one_of(NUMBERS, WORDS)), min_size=1, max_size=4)


def is_accepted(argv: list[str]) -> bool:
    """Whether the flags are accepted. If so, all numbers are finite; if not, the error is one line."""
    try:
        # Some flags set variables that other libraries read.
        with mock.patch.dict(os.environ):
            args = parse_arguments(argv)
    except UserError as error:
        assert str(error).strip() and len(str(error).splitlines()) == 1
        return False
    groups = [group for group in (*args, *(args.fitting or ())) if isinstance(group, GROUPS)]
    values = [getattr(group, entry.name) for group in groups for entry in fields(group)]
    assert all(math.isfinite(value) for value in values if isinstance(value, float))
    return True


@pytest.mark.parametrize("profile", PROFILES)
def test_flags_are_accepted_or_refused(profile):
    outcomes = set()

    @fuzz(profile, FLAGS)
    def check(flags):
        outcomes.add(is_accepted([f"--{name}={value}" for name, value in flags]))

    assert outcomes == {True, False}


SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, WORDS, st.binary(max_size=8), st.dates(), st.datetimes(), st.just(".inf")
)
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(st.text(), st.one_of(NUMBERS, WORDS), max_size=3)
)
RECIPES = st.one_of(
    st.dictionaries(st.one_of(st.sampled_from(NAMES), SCALARS), VALUES, max_size=4).map(
        lambda recipe: yaml.safe_dump(recipe).encode("utf-8", "surrogatepass")
    ),
    st.binary(max_size=60),
    st.text(alphabet="abc:-[]{}&*!|>'\"%@`#,?0.~ \n\t", max_size=60).map(str.encode),
    st.sampled_from([b"seed: " + b"9" * 5000, b"\xff\xfes\x00", b"<<: 1", b"? []\n: 1"]),
)


@pytest.mark.parametrize("profile", PROFILES)
def test_recipes_are_accepted_or_refused(profile, tmp_path):
    outcomes = set()

    @fuzz(profile, RECIPES)
    def check(recipe):
        (tmp_path / "recipe.yaml").write_bytes(recipe)
        outcomes.add(is_accepted([f"--config={tmp_path / 'recipe.yaml'}"]))
        outcomes.add(is_accepted(["--distill_mode=hard", f"--teacher_config={tmp_path / 'recipe.yaml'}"]))

    assert outcomes == {True, False}


# ---- Images ----


def encode(kind: str, mode: str, width: int, height: int, fill: int) -> bytes:
    file = io.BytesIO()
    pixels = bytes((fill + 7 * index) % 256 for index in range(width * height * 4))
    image = PILImage.frombytes("RGBA", (width, height), pixels).convert(mode)
    image.save(file, kind, **({"save_all": True, "append_images": [image]} if kind in ("GIF", "TIFF") else {}))
    return file.getvalue()


def declared(width: int, height: int) -> bytes:
    """A PNG that declares a size but has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


SIDES = st.one_of(st.integers(1, 16), st.sampled_from([1, 300]))
WHOLE = st.one_of(
    st.builds(
        encode,
        st.sampled_from(["PNG", "TIFF", "WEBP"]),
        st.sampled_from(["RGB", "RGBA"]),
        SIDES,
        SIDES,
        st.integers(0, 255),
    ),
    st.builds(
        encode,
        st.sampled_from(["PNG", "GIF", "TIFF"]),
        st.sampled_from(["1", "L", "P"]),
        SIDES,
        SIDES,
        st.integers(0, 255),
    ),
    st.builds(
        encode, st.sampled_from(["JPEG", "TIFF"]), st.sampled_from(["L", "CMYK"]), SIDES, SIDES, st.integers(0, 255)
    ),
)


def damage(image: bytes, cut: float, flips: list[tuple[float, int]]) -> bytes:
    """The beginning of the image, with bits of some bytes flipped."""
    content = bytearray(image[: math.ceil(cut * len(image))])
    for place, bits in flips:
        if content:
            content[int(place * (len(content) - 1))] ^= bits
    return bytes(content)


SHARES = st.floats(0, 1)
DAMAGED = st.builds(
    damage, WHOLE, st.one_of(st.just(1.0), SHARES), st.lists(st.tuples(SHARES, st.integers(1, 255)), max_size=4)
)
SIZES = st.sampled_from([0, 1, 2, 201, 20_000, 100_000, 2**31 - 1, 2**32 - 1])
IMAGES = st.one_of(WHOLE, WHOLE, DAMAGED, st.binary(max_size=40), st.builds(declared, SIZES, SIZES))


def size_of(image: bytes) -> tuple[int, int] | None:
    """Width and height of the image, or `None` if it cannot be decoded."""
    try:
        return decode_image({"bytes": image, "path": None}).size
    except Exception:
        return None


@pytest.mark.parametrize("profile", PROFILES)
def test_images_load_in_their_size_or_are_refused_with_their_row(profile, tmp_path_factory):
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=["a", "b"])})

    @fuzz(profile, st.lists(IMAGES, min_size=1, max_size=6))
    def check(images):
        folder = tmp_path_factory.mktemp("images")
        encoded = [{"bytes": image, "path": None} for image in images]
        split = Dataset.from_dict({"image": encoded, "label": [0] * len(images)}, features=features)
        split = split.cast_column("image", Image())
        DatasetDict({"train": split, "test": split}).save_to_disk(folder)
        sizes = [size_of(image) for image in images]
        try:
            train = load_images(ImageArguments(dataset_name=str(folder))).train
        except UserError as error:
            assert f"Split `train`, row {sizes.index(None)}: the image in column 'image' cannot be" in str(error)
            return
        assert [(row["width"], row["height"]) for row in train] == sizes
        assert [len(row["pixels"]) for row in train] == [3 * width * height for width, height in sizes]


# ---- Label names ----

PIECES = [
    *("|", "`", "```", "\n", "\r\n", "\n---\n", "<b>", "</td>", "<!--", "# ", "- ", "*", "_", "__", "~~", "\\", "$x$"),
    *(
        "{{ x }}",
        "{% raw %}",
        "&amp;",
        "&#124;",
        "![a](b)",
        "[a](b)",
        "<http://a.b>",
        "https://a.b",
        "key: value",
        "'",
        '"',
    ),
    *(
        "\u202e",
        "\u200f",
        "\u2028",
        "\x00",
        "\x1b[31m",
        "\ud800",
        "\ufeff",
        "\u00a0",
        "null",
        "true",
        "1",
        "2026-01-01",
    ),
    *("1. ", "> ", "|---|", "@a", ":smile:", "x" * 2000, "\u05d0\u05d1", "\U0001f993", "e\u0301", " ", "\t"),
]
LABEL = st.one_of(
    st.text(max_size=12),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=4).map("".join),
)
LABELS = st.one_of(
    st.lists(LABEL, min_size=2, max_size=25),
    st.integers(1000, 5000).map(lambda count: [f"kind {i}" for i in range(count)]),
)


def cell(content: str, row: str) -> str:
    """The second cell of a table row, as a reader of the card sees it."""
    tokens = MarkdownIt("commonmark").enable("table").parse(content)
    cells = [
        following for token, following in zip(tokens, tokens[1:], strict=False) if token.type in ("td_open", "th_open")
    ]
    shown = ["".join(child.content for child in token.children) for token in cells]
    assert shown.count(row) == 1
    assert {child.type for child in cells[shown.index(row) + 1].children} <= {"text", "text_special"}
    return shown[shown.index(row) + 1]


@pytest.mark.parametrize("profile", PROFILES)
def test_label_names_do_not_break_the_card(profile, tmp_path):
    @fuzz(profile, LABELS, LABEL)
    def check(names, dataset_name):
        assume(clean(dataset_name))
        record = RunRecord(
            architecture="deit_ti",
            num_parameters=5_000_000,
            image_size=32,
            patch_size=4,
            mode=MODES["none"],
            dataset=DatasetRecord(dataset_name, "scikit-learn", names, 10, 10),
            metrics={
                "eval_accuracy": 0.5,
                "eval_accuracy_top5": 0.75,
                "epoch": 1.0,
                "train_runtime": 10.0,
                "train_samples_per_second": 1.0,
            },
            hyperparameters={"learning_rate": 1e-3, "lr_scheduler_type": "cosine"},
            hardware="2 CPU cores",
            example_label=names[0],
        )
        record.save(tmp_path)
        (tmp_path / "example.png").touch()
        write_model_card(record, tmp_path)
        content = (tmp_path / "README.md").read_text(encoding="utf-8")
        front_matter, card = content.removeprefix("---\n").split("\n---\n", 1)
        metadata = yaml.safe_load(front_matter)
        assert metadata["model-index"][0]["results"][0]["dataset"]["name"] == clean(dataset_name)
        assert (metadata["pipeline_tag"], metadata["library_name"]) == ("image-classification", "transformers")
        shown = [clean(name) or "(blank)" for name in names]
        more = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
        assert cell(card, "Labels") == f"{len(names)}: " + ", ".join(shown[:20]) + more
        blocks = [token.content for token in MarkdownIt("commonmark").parse(card) if token.info == "python"]
        assert len(blocks) >= 2
        for block in blocks:
            compile(block, "README.md", "exec")


@pytest.mark.parametrize("profile", PROFILES)
def test_label_names_survive_a_config_round_trip(profile, tmp_path):
    @fuzz(profile, LABELS)
    def check(names):
        DeiTTiConfig(**label_maps(names)).save_pretrained(tmp_path)
        config = DeiTTiConfig.from_pretrained(tmp_path)
        assert config.id2label == dict(enumerate(names)) and config.label2id == label_maps(names)["label2id"]
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "deit_ti"

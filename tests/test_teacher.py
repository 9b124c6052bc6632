"""The teacher: it speaks the student's language, knows something, and never changes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.classifiers import input_format, label_maps
from modeling_deit_ti.data import DataArguments, EvalImages, load_images, make_image_processor
from modeling_deit_ti.distillation import resolve_mode
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.teacher import (
    Teacher,
    TeacherArguments,
    check_better_than_chance,
    match_labels,
    prepare_teacher,
)
from modeling_deit_ti.trainer import DistillationTrainingArguments


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
DIGITS = [str(digit) for digit in range(10)]
# A CNN of timm's own tests: 16 to 64 channels, real architecture, fitted in seconds.
TINY_CNN = "test_resnet"


def tiny_vit(labels: list[str], image_size: int = 16) -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=image_size,
            patch_size=8,
            id2label=dict(enumerate(labels)),
            hidden_dropout_prob=0.5,
        )
    )


def save_classifier(folder: Path, labels: list[str]) -> str:
    tiny_vit(labels).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


# ---- Speaking the student's language ----


def test_it_sees_the_students_image_in_its_own_normalisation_and_size():
    model = tiny_vit(["a", "b"])
    teacher = Teacher(model, 16, [0.5, 0.4, 0.3], [0.5, 0.25, 0.2], MEAN, STD)
    images = torch.rand(2, 3, 32, 32)  # what the camera saw
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    own_mean, own_std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.5, 0.25, 0.2]))
    expected = F.interpolate((images - own_mean) / own_std, (16, 16), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher((images - mean) / std), model(expected).logits, atol=1e-5, rtol=1e-5)


def test_an_image_in_its_own_format_is_not_touched():
    model, images = tiny_vit(["a", "b"]), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(Teacher(model, 16, MEAN, STD, MEAN, STD)(images), model(images).logits, atol=0, rtol=0)


def test_it_answers_in_the_datasets_order_of_labels():
    model, images = tiny_vit(["dog", "emu", "cat"]), torch.randn(2, 3, 16, 16)
    order = match_labels(["dog", "emu", "cat"], ["cat", "dog", "emu"])
    teacher = Teacher(model, 16, MEAN, STD, MEAN, STD, order)
    torch.testing.assert_close(teacher(images), model(images).logits[:, [2, 0, 1]])


@pytest.mark.parametrize(
    ("teacher", "dataset", "order"),
    [
        (["cat", "dog"], ["cat", "dog"], [0, 1]),
        (["dog", "cat"], ["cat", "dog"], [1, 0]),
        (["Great White-Shark", "CAT"], ["cat", "great_white_shark"], [1, 0]),
        (["LABEL_0", "LABEL_1"], ["cat", "dog"], [0, 1]),
        (["emu", "dog", "cat", "fox"], ["cat", "dog"], [2, 1]),
        (["tench", "goldfish", "shark"], ["cat", "dog"], None),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["cat", "dog"], None),
        (["wolf", "lynx"], ["cat", "dog"], None),
        (["cat", "lynx", "wolf"], ["cat", "dog"], None),
    ],
)
def test_labels_match_by_name(teacher, dataset, order):
    assert match_labels(teacher, dataset) == order


@pytest.mark.parametrize(
    ("teacher", "dataset", "message"),
    [
        (
            ["cat", "hound"],
            ["cat", "dog"],
            "1 of 2 have the same name; the dataset has 'dog' where the teacher has",
        ),
        (["cat", "Cat", "dog"], ["cat", "dog"], "'cat' stand for more than one"),
    ],
)
def test_labels_that_match_in_part_or_twice_are_refused(teacher, dataset, message):
    with pytest.raises(UserError, match=message):
        match_labels(teacher, dataset)


# ---- Never changing ----


def test_it_stays_in_eval_mode_and_frozen():
    teacher = Teacher(tiny_vit(["a", "b"]), 16, MEAN, STD, MEAN, STD).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    logits = teacher(images)
    assert not logits.requires_grad and torch.equal(logits, teacher(images))  # no dropout


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_still_answers_in_float32(dtype):
    model, images = tiny_vit(["a", "b"]), torch.randn(2, 3, 32, 32)
    expected = Teacher(model, 16, [0.5] * 3, [0.5] * 3, MEAN, STD)(images)
    logits = Teacher(model, 16, [0.5] * 3, [0.5] * 3, MEAN, STD).to(dtype)(images)
    assert logits.dtype == torch.float32 and next(model.parameters()).dtype == dtype
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.05)


# ---- Loading and fitting ----


@pytest.fixture(scope="module")
def digits():
    return load_images(DataArguments(dataset_name="digits"))


def prepare(digits, folder, training=None, **arguments):
    defaults = {
        "teacher_model_name_or_path": TINY_CNN,
        "teacher_output_dir": str(folder / "teachers"),
        "teacher_num_train_epochs": 6,
        "teacher_learning_rate": 1e-2,
    }
    data_args = DataArguments(dataset_name="digits", crop="none", horizontal_flip=0)
    training_args = DistillationTrainingArguments(
        output_dir=str(folder / "run"), per_device_train_batch_size=64, disable_tqdm=True, **(training or {})
    )
    return prepare_teacher(
        TeacherArguments(**{**defaults, **arguments}),
        digits,
        data_args,
        training_args,
        make_image_processor(data_args, 32),
    )


def accuracy_on(teacher, data) -> float:
    processor = make_image_processor(DataArguments(crop="none"), 32)
    samples = EvalImages(data.evaluation, processor).__getitems__(list(range(len(data.evaluation))))
    return (teacher(samples["pixel_values"]).argmax(-1) == samples["labels"]).float().mean().item()


def test_a_teacher_that_does_not_know_the_labels_is_fitted_kept_and_reused(digits, tmp_path, capsys):
    teacher, path, facts = prepare(digits, tmp_path)
    assert accuracy_on(teacher, digits) > 0.8
    assert (facts["fitted"], facts["image_size"], facts["source"]) == ("scratch", 32, "timm")
    assert facts["hyperparameters"]["num_train_epochs"] == 6
    folder = Path(path)
    assert folder.parent == tmp_path / "teachers" and folder.name.startswith("test_resnet-digits-")
    assert json.loads((folder / "teacher_recipe.json").read_text())["dataset"] == digits.fingerprint
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert list(loaded.config.id2label.values()) == DIGITS
    written = (folder / "model.safetensors").stat().st_mtime_ns

    again, *_ = prepare(digits, tmp_path, training={"distill_mode": "both", "seed": 7})
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert "fitted by an earlier run" in capsys.readouterr().out
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(images), teacher(images), atol=0, rtol=0)


def test_another_recipe_or_dataset_fits_another_teacher(digits, tmp_path):
    quick = {"teacher_num_train_epochs": 0.1}
    paths = {prepare(digits, tmp_path, **quick)[1]}
    paths.add(prepare(digits, tmp_path, **quick, teacher_learning_rate=5e-3)[1])
    paths.add(prepare(digits, tmp_path, **quick, teacher_image_size=24)[1])
    paths.add(prepare(digits, tmp_path, teacher_num_train_epochs=0.2)[1])
    paths.add(prepare(replace(digits, fingerprint="another"), tmp_path, **quick)[1])
    assert len(paths) == 5


def test_fitting_gives_the_same_teacher_again(digits, tmp_path):
    weights = []
    for name in ("a", "b"):
        torch.manual_seed(len(name))
        teacher, *_ = prepare(digits, tmp_path / name, teacher_num_train_epochs=0.2)
        weights.append(teacher.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_folder_without_its_recipe_is_not_reused(digits, tmp_path):
    _, path, _ = prepare(digits, tmp_path, teacher_num_train_epochs=0.1)
    recipe = Path(path, "teacher_recipe.json")
    content = recipe.read_text()
    recipe.unlink()
    prepare(digits, tmp_path, teacher_num_train_epochs=0.1)
    assert recipe.read_text() == content
    assert [path.name for path in (tmp_path / "teachers").iterdir()] == [Path(path).name]
    assert not list(Path(path).glob("checkpoint-*"))


def test_a_teacher_that_knows_the_labels_is_taken_as_it_is(digits, tmp_path):
    folder = save_classifier(tmp_path / "vit", list(reversed(DIGITS)))
    teacher, path, facts = prepare(digits, tmp_path, teacher_model_name_or_path=folder)
    assert facts["fitted"] is None and path == folder and not (tmp_path / "teachers").exists()
    images = torch.randn(2, 3, 16, 16)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    own = (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1) - 0.5) / 0.5
    torch.testing.assert_close(teacher(images), model(own).logits.flip(1), atol=1e-5, rtol=1e-5)


def test_a_classifier_of_other_labels_is_fitted_from_its_weights(digits, tmp_path):
    folder = save_classifier(tmp_path / "vit", ["cat", "dog"])
    teacher, _, facts = prepare(
        digits, tmp_path, teacher_model_name_or_path=folder, teacher_num_train_epochs=0.1, teacher_learning_rate=1e-9
    )
    assert facts["fitted"] == "pretrained" and facts["image_size"] == 16
    start = AutoModelForImageClassification.from_pretrained(folder).vit.state_dict()
    fitted = teacher.model.vit.state_dict()
    assert all(torch.allclose(start[name], fitted[name], atol=1e-5) for name in start)
    assert teacher.model.classifier.out_features == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"teacher_model_name_or_path": "no_such_model"},
            "no_such_model: there is no such folder or timm architecture",
        ),
        ({"teacher_num_train_epochs": 0}, "--teacher_num_train_epochs 0 forbids"),
    ],
)
def test_a_teacher_that_cannot_be_had_is_an_error(digits, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        prepare(digits, tmp_path, **arguments)


def test_fitting_needs_labels(digits, tmp_path):
    unlabelled = replace(digits, train=digits.train.remove_columns("label"))
    with pytest.raises(UserError, match="has to be fitted, and the training images have no labels"):
        prepare(unlabelled, tmp_path)


def test_a_pickled_teacher_is_never_loaded(digits, tmp_path):
    folder = Path(save_classifier(tmp_path / "vit", DIGITS))
    (folder / "model.safetensors").unlink()
    torch.save(tiny_vit(DIGITS).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="from safetensors"):
        prepare(digits, tmp_path, teacher_model_name_or_path=str(folder))


# ---- Knowing something ----


@pytest.mark.parametrize(
    ("labels", "refused", "accepted"),
    [
        (list(range(10)) * 1000, 0.149, 0.151),
        (list(range(10)) * 36, 0.17, 0.2),
        (list(range(1000)) * 50, 0.0016, 0.0018),
        ([0] * 7000 + [1] * 3000, 0.72, 0.76),
    ],
)
def test_no_better_than_chance_is_refused_with_the_accuracy(labels, refused, accepted):
    check_better_than_chance(accepted, labels, "good")
    with pytest.raises(UserError, match=f"no better than chance: its accuracy .* is {refused:.4f}"):
        check_better_than_chance(refused, labels, "bad")


@pytest.mark.parametrize("labels", [[0, 1] * 10, [0] * 180 + [1] * 20, [0] * 9600 + [1] * 400])
def test_a_perfect_teacher_is_never_refused(labels):
    check_better_than_chance(1.0, labels, "perfect")


# ---- Other people's image processors ----


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 16, "width": 16}),
        ViTImageProcessor(size={"height": 16, "width": 16}, do_normalize=False),
        ConvNextImageProcessor(size={"shortest_edge": 16}),
        EfficientNetImageProcessor(size={"height": 16, "width": 16}, include_top=True),
        DeiTImageProcessor(size={"height": 24, "width": 24}, crop_size={"height": 16, "width": 16}),
    ],
    ids=["ViT", "ViT without normalisation", "ConvNext", "EfficientNet, which normalises twice", "DeiT"],
)
def test_the_teacher_sees_what_its_own_image_processor_would_give_it(tmp_path, processor):
    model = tiny_vit(["a", "b"]).eval()
    processor.save_pretrained(tmp_path)
    size, mean, std = input_format(model, str(tmp_path))
    assert size == 16
    image = PILImage.new("RGB", (16, 16), (200, 100, 50))
    own = torch.as_tensor(processor([image], return_tensors="pt")["pixel_values"]).float()
    ours = make_image_processor(DataArguments(crop="none"), 16)([image], return_tensors="pt")["pixel_values"]
    teacher = Teacher(model, size, mean, std, MEAN, STD)
    torch.testing.assert_close(teacher(ours), model(own).logits, atol=1e-4, rtol=1e-4)


# ---- Models of this project as teachers ----


@pytest.mark.parametrize("mode", [resolve_mode("distill"), resolve_mode("distill", single_token=True)])
def test_a_deit_ti_of_other_labels_is_fitted_with_the_head_that_learns(digits, tmp_path, mode):
    config = DeiTTiConfig(image_size=32, patch_size=16, **label_maps(["cat", "dog"]), **mode.network)
    DeiTTiForImageClassification(config).save_pretrained(tmp_path / "deit")
    make_image_processor(DataArguments(crop="none"), 32).save_pretrained(tmp_path / "deit")
    teacher, _, facts = prepare(
        digits,
        tmp_path,
        teacher_model_name_or_path=str(tmp_path / "deit"),
        teacher_num_train_epochs=0.1,
        teacher_learning_rate=1e-3,
    )
    assert facts["fitted"] == "pretrained"
    assert (teacher.model.config.tokens, teacher.model.config.readout) == (["class"], "class")
    assert teacher(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_backbone_without_a_head_does_not_know_any_labels(digits, tmp_path):
    folder = Path(save_classifier(tmp_path / "vit", ["0", "1"]))
    tiny_vit(["0", "1"]).vit.save_pretrained(folder)
    two = replace(digits, label_names=["a", "b"])
    with pytest.raises(UserError, match="forbids to fit"):
        prepare(two, tmp_path, teacher_model_name_or_path=str(folder), teacher_num_train_epochs=0)


def test_a_damaged_teacher_is_an_error(digits, tmp_path):
    folder = Path(save_classifier(tmp_path / "vit", DIGITS))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="from safetensors"):
        prepare(digits, tmp_path, teacher_model_name_or_path=str(folder))


def test_an_image_size_that_the_teacher_cannot_take_is_an_error(digits, tmp_path):
    folder = save_classifier(tmp_path / "vit", DIGITS)
    with pytest.raises(UserError, match="cannot take images of 24x24 pixels"):
        prepare(digits, tmp_path, teacher_model_name_or_path=folder, teacher_image_size=24)

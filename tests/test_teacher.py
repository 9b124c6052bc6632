"""The teacher: it speaks the student's language, knows something, and never changes."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from building import DIGITS, TINY_CNN, arguments, image_processor
from filelock import FileLock
from PIL import Image as PILImage
from torch.nn import functional as F
from transformers import (
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.arguments import ImageArguments
from modeling_deit_ti.checkpoints import save_settings, seal, settings_of
from modeling_deit_ti.classifiers import input_format, label_maps, label_names, load_classifier, new_timm_classifier
from modeling_deit_ti.data import load_images
from modeling_deit_ti.data.inputs import EvalImages, make_image_processor
from modeling_deit_ti.distillation import resolve_mode
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.fitting import prepare_teacher
from modeling_deit_ti.teacher import Teacher, check_better_than_chance, match_labels


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


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


def test_an_image_already_in_its_own_format_is_left_untouched():
    model, images = tiny_vit(["a", "b"]), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(Teacher(model, 16, MEAN, STD, MEAN, STD)(images), model(images).logits, atol=0, rtol=0)


def test_it_answers_in_the_datasets_label_order():
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
        (["A", "a"], ["a", "A"], [1, 0]),
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
        (["cat", "Cat", "dog"], ["cat", "dog"], "more than one label is called 'cat'"),
        (["cat", "Cat"], ["cat", "CAT"], "more than one label is called 'cat', 'CAT'"),
    ],
)
def test_labels_that_match_only_partly_or_twice_are_refused(teacher, dataset, message):
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
    return load_images(ImageArguments("digits"))


def student_arguments(folder, **flags):
    """The arguments of a run whose teacher learns the digits within seconds, unless a flag says otherwise."""
    defaults = {
        "dataset_name": "digits",
        "distill_mode": "both",
        "image_size": 32,
        "crop": "none",
        "horizontal_flip": 0,
        "per_device_train_batch_size": 64,
        "disable_tqdm": True,
        "output_dir": folder / "run",
        "teacher_output_dir": folder / "teachers",
    }
    if "teacher_config" not in flags:
        defaults["teacher_model_name_or_path"] = TINY_CNN
        defaults["teacher_num_train_epochs"] = 6
        defaults["teacher_learning_rate"] = 1e-2
    return arguments(**{**defaults, **flags})


def prepare(digits, folder, **flags):
    args = student_arguments(folder, **flags)
    return prepare_teacher(args, digits, make_image_processor(args.model, args.augmentation))


def accuracy_on(teacher, data) -> float:
    samples = EvalImages(data.evaluation, image_processor(32)).__getitems__(list(range(len(data.evaluation))))
    return (teacher(samples["pixel_values"]).argmax(-1) == samples["labels"]).float().mean().item()


def test_a_teacher_that_does_not_know_the_labels_is_fitted_kept_and_reused(digits, tmp_path, caplog):
    caplog.set_level("INFO", "modeling_deit_ti")
    teacher, record, path = prepare(digits, tmp_path)
    assert accuracy_on(teacher, digits) > 0.8
    assert (record.fitted, record.image_size, record.source) == ("scratch", 32, "timm")
    assert record.hyperparameters["num_train_epochs"] == 6
    folder = Path(path)
    assert folder.parent == tmp_path / "teachers" and folder.name.startswith("test_resnet-digits-")
    recipe = json.loads((folder / "teacher_recipe.json").read_text())
    assert (recipe["teacher"], recipe["images"]) == (TINY_CNN, digits.fingerprint[:12])
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert list(loaded.config.id2label.values()) == DIGITS
    written = (folder / "model.safetensors").stat().st_mtime_ns

    again, *_ = prepare(digits, tmp_path, distill_mode="soft", seed=7, learning_rate=1, mixup=0.5, num_train_epochs=2)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert "fitted by an earlier run" in caplog.text
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(images), teacher(images), atol=0, rtol=0)


def test_another_recipe_or_dataset_fits_another_teacher(digits, tmp_path):
    quick = {"teacher_num_train_epochs": 0.1}
    paths = {prepare(digits, tmp_path, **quick)[2]}
    paths.add(prepare(digits, tmp_path, **quick, teacher_learning_rate=5e-3)[2])
    paths.add(prepare(digits, tmp_path, **quick, teacher_image_size=24)[2])
    paths.add(prepare(digits, tmp_path, teacher_num_train_epochs=0.2)[2])
    paths.add(prepare(replace(digits, fingerprint="another"), tmp_path, **quick)[2])
    assert len(paths) == 5


def test_fitting_again_gives_the_same_teacher(digits, tmp_path):
    weights = []
    for name in ("a", "b"):
        torch.manual_seed(len(name))
        teacher, *_ = prepare(digits, tmp_path / name, teacher_num_train_epochs=0.2)
        weights.append(teacher.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_folder_without_its_recipe_is_not_reused(digits, tmp_path):
    *_, path = prepare(digits, tmp_path, teacher_num_train_epochs=0.1)
    recipe = Path(path, "teacher_recipe.json")
    content = recipe.read_text()
    recipe.unlink()
    prepare(digits, tmp_path, teacher_num_train_epochs=0.1)
    assert recipe.read_text() == content
    assert [path.name for path in (tmp_path / "teachers").iterdir()] == [Path(path).name]
    assert not list(Path(path).glob("checkpoint-*"))


def test_a_teacher_killed_while_saving_resumes_and_ends_the_same(digits, tmp_path, monkeypatch, caplog):
    few, quick = replace(digits, train=digits.train.select(range(128))), {"teacher_num_train_epochs": 2}
    whole, *_ = prepare(few, tmp_path / "whole", **quick)

    def seal_the_first_alone(checkpoint):
        if checkpoint.endswith("checkpoint-4"):
            raise KeyboardInterrupt
        seal(checkpoint)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("modeling_deit_ti.trainer.seal", seal_the_first_alone)
        prepare(few, tmp_path, **quick)
    (checkpoint,) = (tmp_path / "teachers").glob("*/checkpoint-2")
    own = settings_of(checkpoint)
    for sharded_by in ("FSDP", None):
        save_settings(checkpoint, own | {"sharded_by": sharded_by})
        seal(checkpoint)
        if sharded_by is not None:
            with pytest.raises(UserError, match=f"^{checkpoint} belongs to .* sharded_by FSDP, not None. .* delete "):
                prepare(few, tmp_path, **quick)
    caplog.set_level("INFO", "modeling_deit_ti")
    resumed, _, path = prepare(few, tmp_path, **quick)
    assert f"resuming from {path}/checkpoint-2" in caplog.text
    weights = resumed.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in whole.model.state_dict().items())
    assert not list(Path(path).glob("checkpoint-*"))


def test_a_run_says_that_it_waits_for_another_that_fits_the_same_teacher(digits, tmp_path, caplog):
    caplog.set_level("INFO", "modeling_deit_ti")
    quick = {"teacher_num_train_epochs": 0.1}
    *_, path = prepare(digits, tmp_path, **quick)
    caplog.clear()
    with ThreadPoolExecutor() as other:
        with FileLock(f"{path}.lock"):
            run = other.submit(prepare, digits, tmp_path, **quick)
            with pytest.raises(TimeoutError):
                run.result(timeout=4)
        assert run.result()[2] == path
    assert [record.getMessage() for record in caplog.records if record.name == "modeling_deit_ti.fitting"] == [
        f"Teacher: waiting for another run that is fitting it, into {path}",
        f"Teacher: {TINY_CNN}, fitted by an earlier run, from {path}",
    ]


def test_a_teacher_that_knows_the_labels_is_used_as_it_is(digits, tmp_path):
    folder = save_classifier(tmp_path / "vit", list(reversed(DIGITS)))
    teacher, record, path = prepare(digits, tmp_path, teacher_model_name_or_path=folder)
    assert record.fitted is None and path == folder and not (tmp_path / "teachers").exists()
    images = torch.randn(2, 3, 16, 16)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    own = (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1) - 0.5) / 0.5
    torch.testing.assert_close(teacher(images), model(own).logits.flip(1), atol=1e-5, rtol=1e-5)


def test_a_classifier_with_other_labels_is_fitted_from_its_weights(digits, tmp_path):
    folder = save_classifier(tmp_path / "vit", ["cat", "dog"])
    teacher, record, _ = prepare(
        digits, tmp_path, teacher_model_name_or_path=folder, teacher_num_train_epochs=0.1, teacher_learning_rate=1e-9
    )
    assert record.fitted == "pretrained" and record.image_size == 16
    start = AutoModelForImageClassification.from_pretrained(folder).vit.state_dict()
    fitted = teacher.model.vit.state_dict()
    assert all(torch.allclose(start[name], fitted[name], atol=1e-5) for name in start)
    assert teacher.model.classifier.out_features == 10


def test_a_pretrained_timm_network_fitted_at_another_size_is_later_used_at_that_size(digits, tmp_path):
    pretrained = new_timm_classifier(TINY_CNN, ["cat", "dog"], 48, image_processor(48))
    pretrained.save_pretrained(tmp_path / "pretrained")
    flags = {"teacher_num_train_epochs": 0.1, "teacher_image_size": 64}
    fitted, record, path = prepare(digits, tmp_path, teacher_model_name_or_path=tmp_path / "pretrained", **flags)
    assert record.fitted == "pretrained" and record.image_size == 64
    later, record, _ = prepare(digits, tmp_path, teacher_model_name_or_path=path, teacher_num_train_epochs=0)
    assert record.fitted is None and record.image_size == 64
    assert label_names(later.model.config) == DIGITS
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(later(images), fitted(images), rtol=0, atol=0)


def test_a_linear_probe_trains_only_the_head_and_keeps_the_batch_norm_statistics(digits, tmp_path):
    pretrained = new_timm_classifier(TINY_CNN, ["cat", "dog"], 32, image_processor(32))
    pretrained.save_pretrained(tmp_path / "pretrained")
    config = tmp_path / "probe.yaml"
    config.write_text("{freeze_backbone: true, num_train_epochs: 0.2, learning_rate: 0.1}")
    teacher, _, _ = prepare(
        digits, tmp_path, teacher_config=config, teacher_model_name_or_path=tmp_path / "pretrained"
    )
    before, after = pretrained.state_dict(), teacher.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"timm_model.fc.weight", "timm_model.fc.bias"}
    first, _ = load_classifier(
        str(tmp_path / "pretrained"), "", num_labels=10, id2label=dict(enumerate(DIGITS)), ignore_mismatched_sizes=True
    )
    assert after["timm_model.fc.weight"].std() > 2 * first.timm_model.fc.weight.std()  # it has learned


def test_a_teacher_with_an_untrained_head_is_refused_unless_allowed(digits, tmp_path):
    folder = save_classifier(tmp_path / "vit", ["cat", "dog"])
    flags = {"teacher_model_name_or_path": folder, "teacher_num_train_epochs": 0}
    with pytest.raises(UserError, match="--teacher_num_train_epochs 0 forbids fitting"):
        prepare(digits, tmp_path, **flags)
    teacher, record, path = prepare(digits, tmp_path, **flags, allow_untrained_teacher=True)
    assert record.fitted == "untrained" and path == folder and not (tmp_path / "teachers").exists()
    own = AutoModelForImageClassification.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(own.vit.parameters(), teacher.model.vit.parameters(), strict=True))
    assert teacher(torch.zeros(2, 3, 16, 16)).shape == (2, 10) and 0 < accuracy_on(teacher, digits) < 0.3


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
def test_an_unavailable_teacher_is_an_error(digits, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        prepare(digits, tmp_path, **arguments)


def test_fitting_needs_labels(digits, tmp_path):
    unlabelled = replace(digits, train=digits.train.remove_columns("label"))
    with pytest.raises(UserError, match="has to be fitted, but the training images have no labels"):
        prepare(unlabelled, tmp_path)


def test_a_pickled_teacher_is_never_loaded(digits, tmp_path):
    folder = Path(save_classifier(tmp_path / "vit", DIGITS))
    (folder / "model.safetensors").unlink()
    torch.save(tiny_vit(DIGITS).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="from safetensors"):
        prepare(digits, tmp_path, teacher_model_name_or_path=str(folder))


# ---- The teacher's own recipe ----


def write_config(folder: Path, **recipe) -> Path:
    file = folder / "teacher.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML too
    return file


RECIPE = {
    "model_name_or_path": TINY_CNN,
    "optim": "sgd",
    "learning_rate": 0.03,
    "num_train_epochs": 0.2,
    "image_size": 24,
    "auto_augment": "rand-m3-mstd0.5-inc1",
    "per_device_train_batch_size": 48,
}


def test_a_teacher_config_sets_any_flag_of_the_teachers_run_and_none_of_the_students(digits, tmp_path):
    args = student_arguments(tmp_path, teacher_config=write_config(tmp_path, **RECIPE))
    run = args.fitting
    assert (run.model.model_name_or_path, run.model.image_size) == (TINY_CNN, 24)
    assert (run.training.optim, run.training.learning_rate, run.training.num_train_epochs) == ("sgd", 0.03, 0.2)
    assert (run.augmentation.auto_augment, run.training.per_device_train_batch_size) == ("rand-m3-mstd0.5-inc1", 48)
    assert run.training.distill_mode == "none" and run.images == args.images
    own = student_arguments(tmp_path)
    assert args.model == own.model and args.augmentation == own.augmentation
    assert args.training.to_dict() == own.training.to_dict()

    teacher, record, path = prepare(digits, tmp_path, teacher_config=tmp_path / "teacher.yaml")
    assert (record.name, record.image_size, teacher.image_size) == (TINY_CNN, 24, 24)
    recipe = json.loads(Path(path, "teacher_recipe.json").read_text())
    expected = {**RECIPE, "batch_size": 48, "teacher": TINY_CNN}
    del expected["per_device_train_batch_size"], expected["model_name_or_path"]
    assert {name: recipe[name] for name in expected} == expected
    assert (record.hyperparameters["optim"], record.hyperparameters["batch_size"]) == ("sgd", 48)


def test_the_teachers_own_flags_override_its_config(tmp_path):
    flags = {
        "teacher_model_name_or_path": "resnet18",
        "teacher_image_size": 40,
        "teacher_num_train_epochs": 3,
        "teacher_learning_rate": 0.5,
    }
    run = student_arguments(tmp_path, teacher_config=write_config(tmp_path, **RECIPE), **flags).fitting
    assert (run.model.model_name_or_path, run.model.image_size) == ("resnet18", 40)
    assert (run.training.num_train_epochs, run.training.learning_rate) == (3, 0.5)
    assert (run.training.optim, run.training.per_device_train_batch_size) == ("sgd", 48)  # no flag sets these


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dataset_name", "digits", "dataset_name cannot be set here"),
        ("max_train_samples", 10, "max_train_samples cannot be set here"),
        ("distill_mode", "soft", "distill_mode cannot be set here"),
        ("output_dir", "teacher", "output_dir cannot be set here"),
        ("teacher_learning_rate", 0.1, "teacher_learning_rate cannot be set here"),
        ("learning_rat", 0.1, "unknown key 'learning_rat'; did you mean --learning_rate"),
        ("learning_rate", "fast", "argument --learning_rate.*: invalid number value: 'fast'"),
        ("learning_rate", -1, "--learning_rate -1.0: must be at least 0"),
        ("num_train_epochs", 0, "--num_train_epochs 0.0: must be above 0"),
        ("crop", "round", "argument --crop: invalid choice: 'round'"),
        ("optim", "newton", "newton"),
    ],
)
def test_invalid_teacher_config_settings_are_refused_naming_the_file_and_the_flag(tmp_path, key, value, message):
    file = write_config(tmp_path, **{key: value})
    with pytest.raises(UserError, match=f"^--teacher_config {re.escape(str(file))}: .*{message}"):
        student_arguments(tmp_path, teacher_config=file)


@pytest.mark.parametrize("text", [None, "a: [", "- a\n- b\n"], ids=["missing", "broken", "a list"])
def test_a_teacher_config_that_is_not_a_recipe_is_refused_naming_the_file(tmp_path, text):
    file = tmp_path / "teacher.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=f"^--teacher_config {re.escape(str(file))}: "):
        student_arguments(tmp_path, teacher_config=file)


def test_each_teacher_config_has_its_own_teacher(digits, tmp_path):
    quick = {"model_name_or_path": TINY_CNN, "num_train_epochs": 0.1}
    changes = [{"optim": "sgd"}, {"auto_augment": "rand-m3-mstd0.5-inc1"}, {"weight_decay": 0}, {"mixup": 0.2}]
    paths = [
        prepare(digits, tmp_path, teacher_config=write_config(tmp_path, **quick, **change))[2]
        for change in ({}, *changes, {})
    ]
    assert len(set(paths)) == 5 and paths[0] == paths[-1]


def test_a_fitted_teacher_is_a_finished_run_with_its_card_curves_and_results(digits, tmp_path):
    teacher, _, path = prepare(digits, tmp_path, teacher_config=write_config(tmp_path, **RECIPE))
    folder = Path(path)
    card = (folder / "README.md").read_text()
    assert "A `test_resnet`" in card and "24x24 pixels" in card and "without distillation" in card
    for flag, value in {**RECIPE, "lr_scheduler_type": "cosine"}.items():
        if flag not in ("model_name_or_path", "image_size"):
            assert f"| {flag} | `{value}` |" in card
    results = json.loads((folder / "all_results.json").read_text())
    processor = DeiTImageProcessor.from_pretrained(folder)
    samples = EvalImages(digits.evaluation, processor).__getitems__(list(range(len(digits.evaluation))))
    logits = teacher.model(samples["pixel_values"]).logits
    assert results["eval_accuracy"] == pytest.approx((logits.argmax(-1) == samples["labels"]).double().mean().item())
    assert f"{results['eval_accuracy']:.2%}".replace("%", " %") in card
    assert PILImage.open(folder / "training_curves.png").width > 100
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert any("loss" in entry for entry in log) and any("eval_accuracy" in entry for entry in log)
    assert not list(folder.glob("checkpoint-*"))


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
def test_a_teacher_no_better_than_chance_is_refused_with_its_accuracy(labels, refused, accepted):
    check_better_than_chance(accepted, labels, "good")
    with pytest.raises(UserError, match=f"no better than chance: its accuracy .* is {refused:.4f}"):
        check_better_than_chance(refused, labels, "bad")


@pytest.mark.parametrize("labels", [[3], [0, 1] * 10, [0] * 180 + [1] * 20, [0] * 9600 + [1] * 400])
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
    size, mean, std = input_format(model.config, str(tmp_path), "--teacher_model_name_or_path")
    assert size == 16
    image = PILImage.new("RGB", (16, 16), (200, 100, 50))
    own = torch.as_tensor(processor([image], return_tensors="pt")["pixel_values"]).float()
    ours = image_processor(16)([image], return_tensors="pt")["pixel_values"]
    teacher = Teacher(model, size, mean, std, MEAN, STD)
    torch.testing.assert_close(teacher(ours), model(own).logits, atol=1e-4, rtol=1e-4)


def test_a_processor_that_swaps_colours_is_refused(tmp_path):
    MobileViTImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match="swaps or mixes the colours"):
        input_format(tiny_vit(["a", "b"]).config, str(tmp_path), "--teacher_model_name_or_path")


# ---- Models of this project as teachers ----


@pytest.mark.parametrize("mode", [resolve_mode("distill"), resolve_mode("distill", single_token=True)])
def test_a_deit_ti_with_other_labels_is_fitted_with_only_a_class_token(digits, tmp_path, mode):
    config = DeiTTiConfig(image_size=32, patch_size=16, **label_maps(["cat", "dog"]), **mode.network)
    DeiTTiForImageClassification(config).save_pretrained(tmp_path / "deit")
    image_processor(32).save_pretrained(tmp_path / "deit")
    teacher, record, _ = prepare(
        digits,
        tmp_path,
        teacher_model_name_or_path=str(tmp_path / "deit"),
        teacher_num_train_epochs=0.1,
        teacher_learning_rate=1e-3,
    )
    assert record.fitted == "pretrained"
    assert (teacher.model.config.tokens, teacher.model.config.readout) == (["class"], "class")
    assert teacher(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_backbone_without_a_head_knows_no_labels(digits, tmp_path):
    folder = Path(save_classifier(tmp_path / "vit", ["0", "1"]))
    tiny_vit(["0", "1"]).vit.save_pretrained(folder)
    two = replace(digits, label_names=["a", "b"])
    with pytest.raises(UserError, match="forbids fitting"):
        prepare(two, tmp_path, teacher_model_name_or_path=str(folder), teacher_num_train_epochs=0)


def test_a_damaged_teacher_is_an_error(digits, tmp_path):
    folder = Path(save_classifier(tmp_path / "vit", DIGITS))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="from safetensors"):
        prepare(digits, tmp_path, teacher_model_name_or_path=str(folder))


def test_an_image_size_that_the_teacher_does_not_accept_is_an_error(digits, tmp_path):
    folder = save_classifier(tmp_path / "vit", DIGITS)
    with pytest.raises(UserError, match="does not accept images of 24x24 pixels"):
        prepare(digits, tmp_path, teacher_model_name_or_path=folder, teacher_image_size=24)

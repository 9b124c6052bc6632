"""The record, the curves and the model card: rendered, validated as the Hub does, and every code block run."""

import functools
import inspect
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jinja2.meta
import numpy as np
import pytest
import yaml
from building import NASTY_LABELS, arguments, report_of
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from markdown_it import MarkdownIt
from PIL import Image
from transformers import (
    DeiTImageProcessor,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TrainingArguments,
)
from transformers.trainer_utils import SchedulerType

from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.card import (
    DatasetRecord,
    RunRecord,
    TeacherRecord,
    curve_series,
    describe_cores,
    describe_hardware,
    make_model_card,
    plot_training_curves,
    write_model_card,
)
from modeling_deit_ti.card.card import TEMPLATE, confidence_interval, loss_equation
from modeling_deit_ti.card.markdown import text
from modeling_deit_ti.distillation import MODES, resolve_mode
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.interop import save_transformers
from modeling_deit_ti.outcome import address_card


CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TOKEN = "hf_" + "AbCdEfGhIj" * 3
VARIANTS = {
    **{name: {"name": name} for name in MODES},
    "class, single token": {"name": "class", "single_token": True},
    "distill, single token": {"name": "distill", "single_token": True},
    "both, soft teacher": {"name": "both", "teacher_targets": "soft"},
    "soft, standardized": {"name": "soft", "teacher_targets": "standardized"},
    "both, standardized": {"name": "both", "teacher_targets": "standardized"},
    "both, alpha 0": {"name": "both", "alpha": 0.0},
    "distill, alpha 1": {"name": "distill", "alpha": 1.0},
}


# Compiled once: compiling takes longer than rendering.
STRICT_TEMPLATE = functools.cache(functools.partial(jinja2.Template, undefined=jinja2.StrictUndefined))


@pytest.fixture(autouse=True)
def strict_template(monkeypatch):
    """Makes a template variable that `write_model_card` does not pass an error, not an empty string."""
    monkeypatch.setattr(jinja2, "Template", STRICT_TEMPLATE)


def make_record(mode=MODES["both"], **changes) -> RunRecord:
    """A run as `train_hf.py` records it."""
    metrics = {
        "eval_accuracy": 0.6919,
        "eval_accuracy_top5": 0.9712,
        "epoch": 20.0,
        "train_loss": 1.2,
        "train_runtime": 754.3,
        "train_samples_per_second": 1234.5,
    }
    if len(mode.tokens) == 2:
        top1 = {"class": 0.6801, "distillation": 0.6877, "both": 0.6919}
        metrics["eval_accuracy"] = top1[mode.readout]
        for readout, accuracy in top1.items():
            metrics |= {f"eval_accuracy_{readout}": accuracy, f"eval_accuracy_{readout}_top5": accuracy + 0.28}
        metrics["eval_accuracy_top5"] = metrics["eval_accuracy"] + 0.28
    values = {
        "architecture": "deit_ti",
        "num_parameters": 5_365_076,
        "image_size": 32,
        "patch_size": 4,
        "drop_path_rate": 0.1,
        "mode": mode,
        "dataset": DatasetRecord("uoft-cs/cifar10", "hub", CIFAR10, 50_000, 10_000, "test", "plain_text"),
        "metrics": metrics,
        "hyperparameters": {
            "num_train_epochs": 20.0,
            "learning_rate": 5e-4,
            "lr_scheduler_type": SchedulerType.COSINE,
            "label_smoothing_factor": 0.1,
            "mixup": 0.8,
            "cutmix": 1.0,
            "auto_augment": "rand-m9-mstd0.5-inc1",
            "max_train_samples": None,
            "fp16": False,
        },
        "teacher": TeacherRecord("regnetx_004", "timm", 5_157_512, 224, 0.9312, "scratch", {"num_train_epochs": 10})
        if mode.has_teacher
        else None,
        "hardware": "2 CPU cores (x86_64)",
        "hub_model_id": "someone/deit-ti-cifar10",
        "license": "apache-2.0",
        "command": ["accelerate", "launch", "train_hf.py", "--distill_mode", mode.name],
    }
    return RunRecord(**{**values, **changes})


def render(record: RunRecord, folder: Path) -> str:
    write_model_card(record, folder)
    return (folder / "README.md").read_text(encoding="utf-8")


def check_card(content: str, folder: Path) -> ModelCard:
    """Checks what every card must satisfy; returns the card as huggingface_hub reads it."""
    card = ModelCard.load(folder / "README.md")
    metadata = yaml.safe_load(content.split("\n---\n")[0])
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "image-classification"
    name, evaluations = model_index_to_eval_results(metadata["model-index"])
    assert eval_results_to_model_index(name, evaluations) == metadata["model-index"]
    assert card.data.eval_results == evaluations
    for gap in ("None", "nan", "More information", "Undefined", "TODO", "[]", "\n\n\n"):
        assert gap not in content, gap
    assert not re.search(r"\{\{|\{%", card.text)
    assert not re.search(r"(?<![\w:/.])/(home|root|tmp|work|Users)\b", content)
    for block in code_blocks(content):
        compile(block, "README.md", "exec")
    for table in tables(content):
        assert {len(row) for row in table} == {len(table[0])}
    return card


def code_blocks(content: str, language: str = "python") -> list[str]:
    return [token.content for token in markdown(content) if token.type == "fence" and token.info == language]


def markdown(content: str) -> list:
    return MarkdownIt("commonmark").enable("table").parse(content.split("\n---\n", 1)[1])


def tables(content: str) -> list[list[list[str]]]:
    """The rows of each table; a row lists its cells' text as a reader sees it."""
    found, tokens = [], markdown(content)
    for token, following in zip(tokens, tokens[1:], strict=False):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append("".join(child.content for child in following.children))
    return found


def results_table(content: str) -> dict[str, list[str]]:
    (table,) = (table for table in tables(content) if table[0][0] == "read-out")
    return {row[0]: row[1:] for row in table}


# ---- The card ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_mode_has_a_valid_card_that_says_how_it_was_trained(variant, tmp_path):
    mode = resolve_mode(**VARIANTS[variant])
    content = render(make_record(mode), tmp_path)
    card = check_card(content, tmp_path)
    assert loss_equation(mode) in code_blocks(content, "text")[0]
    assert card.data.datasets == ["uoft-cs/cifar10"]
    assert card.data.license == "apache-2.0"
    assert ("## How it was distilled" in content) == mode.has_teacher
    assert ("distillation" in card.data.tags) == mode.has_teacher
    assert ("regnetx_004" in content) == mode.has_teacher
    assert ("93.12 %" in content) == mode.has_teacher
    assert ("head was not trained**" in content) == ("alpha" in variant)


def test_loss_equations_match_the_paper():
    assert loss_equation(MODES["none"]) == "loss = CE(class, y)"
    assert loss_equation(MODES["soft"]) == (
        "loss = 0.9 CE(class, y) + 0.1 3^2 KL(softmax(teacher / 3) || softmax(class / 3))"
    )
    assert loss_equation(resolve_mode("soft", teacher_targets="standardized")) == (
        "loss = 0.9 CE(class, y) + 0.1 2^2 KL(softmax(z(teacher) / 2) || softmax(z(class) / 2))"
    )
    assert loss_equation(MODES["hard"]) == "loss = 0.5 CE(class, y) + 0.5 CE(class, argmax teacher)"
    assert loss_equation(MODES["both"]) == "loss = 0.5 CE(class, y) + 0.5 CE(distillation, argmax teacher)"
    assert loss_equation(resolve_mode("distill", single_token=True)) == "loss = CE(distillation, argmax teacher)"
    assert loss_equation(resolve_mode("class", single_token=True)) == "loss = CE(class, y)"
    weighted = loss_equation(MODES["both"], has_class_weights=True)
    assert weighted == "loss = 0.5 w(y) CE(class, y) + 0.5 CE(distillation, argmax teacher)"


def test_every_read_out_is_shown_beside_its_published_row(tmp_path):
    rows = results_table(render(make_record(MODES["distill"]), tmp_path))
    assert rows["distillation head (predicts)"] == ["68.77 %", "96.77 %", "8.07 %"]
    assert rows["both heads, mean of logits"] == ["69.19 %", "97.19 %", "46.11 %"]
    assert rows["class head"] == ["68.01 %", "96.01 %", "61.69 %"]
    soft = results_table(render(make_record(resolve_mode("both", teacher_targets="soft")), tmp_path))
    assert soft["read-out"] == ["top-1", "top-5", "published baseline, top-1"]
    assert soft["both heads, mean of logits (predicts)"][-1] == "69.19 %"
    for name, published in (("none", "67.69 %"), ("soft", "68.85 %"), ("hard", "40.19 %")):
        assert results_table(render(make_record(MODES[name]), tmp_path))["class head"][-1] == published


def test_standardized_targets_are_explained_and_have_no_published_row(tmp_path):
    content = render(make_record(resolve_mode("soft", teacher_targets="standardized")), tmp_path)
    assert "z standardises the logits of each image to mean 0 and standard deviation 1" in content
    assert "| teacher's targets | standardized |" in content and "| temperature | 2 |" in content
    assert "published baseline" not in str(results_table(content))
    assert "z standardises" not in render(make_record(MODES["soft"]), tmp_path)


@pytest.mark.parametrize(
    "dataset",
    [
        DatasetRecord("digits", "scikit-learn", [str(digit) for digit in range(10)], 1437, 360),
        DatasetRecord("uoft-cs/cifar100", "hub", [f"label {index}" for index in range(100)], 50_000, 10_000),
        DatasetRecord("/data/cifar10", "local", ["cat", "dog", "bird", "frog", "ship", "deer"], 100, 10),
    ],
    ids=lambda dataset: dataset.name,
)
def test_other_datasets_have_no_published_baseline_column(dataset, tmp_path):
    content = render(make_record(dataset=dataset), tmp_path)
    check_card(content, tmp_path)
    assert results_table(content)["read-out"] == ["top-1", "top-5"]
    assert "published baseline" not in content


def test_model_index_lists_the_predicting_read_out_first(tmp_path):
    content = render(make_record(MODES["class"]), tmp_path)
    _, evaluations = model_index_to_eval_results(yaml.safe_load(content.split("\n---\n")[0])["model-index"])
    assert [(result.metric_name, result.metric_value) for result in evaluations[:3]] == [
        ("Accuracy", 0.6801),
        ("Top-5 accuracy", 0.9601),
        ("Accuracy, both heads, mean of logits", 0.6919),
    ]
    assert len(evaluations) == 6
    assert evaluations[0].dataset_type == "uoft-cs/cifar10"
    assert (evaluations[0].dataset_config, evaluations[0].dataset_split) == ("plain_text", "test")


def test_local_names_never_become_hub_ids(tmp_path):
    teacher = TeacherRecord("/home/me/models/my teacher", "local", 1000, 32, 0.9)
    record = make_record(
        dataset=DatasetRecord("/home/me/secret project/cifar10/", "local", CIFAR10, 500, 100),
        teacher=teacher,
        base_model="/home/me/outputs/first-run",
    )
    content = render(record, tmp_path)
    card = check_card(content, tmp_path)
    assert card.data.datasets is None and card.data.base_model is None and "teacher" not in card.data
    assert card.data.eval_results[0].dataset_type == "imagefolder"
    assert card.data.eval_results[0].dataset_name == "cifar10"
    assert "`my teacher`" in content and "`first-run`" in content
    assert "secret project" not in content and "/home" not in content


def test_hub_ids_of_teacher_and_base_model_are_in_the_metadata(tmp_path):
    record = make_record(
        teacher=TeacherRecord("someone/teacher", "hub", 1000, 224, 0.95),
        base_model="facebook/deit-tiny-distilled-patch16-224",
        base_model_on_hub=True,
    )
    card = check_card(render(record, tmp_path), tmp_path)
    assert card.data["teacher"] == "someone/teacher"  # not a base model: the student has none of its weights
    assert card.data.base_model == "facebook/deit-tiny-distilled-patch16-224"
    assert card.data["base_model_relation"] == "finetune"


def test_cnn_baseline_has_a_card_without_distillation_or_remote_code(tmp_path):
    record = make_record(MODES["none"], architecture="resnet18", patch_size=None, drop_path_rate=None)
    content = render(record, tmp_path)
    card = check_card(content, tmp_path)
    assert results_table(content)["resnet18"] == ["69.19 %", "97.12 %", "88.46 %"]
    for word in ("trust_remote_code", "subfolder", "DeiT-Ti (", "How it was distilled", "class token"):
        assert word not in content
    assert "timm" in code_blocks(content, "bash")[0]
    assert card.data.tags == ["vision", "timm", "resnet18"]


def test_label_names_leave_table_yaml_and_code_intact(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "example.png")
    for label in NASTY_LABELS:
        dataset = DatasetRecord(label.strip() or "x", "scikit-learn", NASTY_LABELS, 100, 10)
        content = render(make_record(dataset=dataset, example_label=label), tmp_path)
        check_card_with_braces(content, tmp_path)
    (labels,) = (row[1] for row in tables(content)[0] if row[0] == "Labels")
    shown = [" ".join(name.split()) or "(blank)" for name in NASTY_LABELS]
    assert labels == f"{len(NASTY_LABELS)}: " + ", ".join(shown)


def check_card_with_braces(content: str, folder: Path) -> None:
    """Like `check_card`, for labels with braces, which may appear only in the comment of a code block."""
    outside = re.sub(r"  # labelled .*", "", content)
    (folder / "README.md").write_text(outside, encoding="utf-8")
    check_card(outside, folder)
    for block in code_blocks(content):
        compile(block, "README.md", "exec")
    assert len(code_blocks(content)) == 3


def test_markdown_shows_escaped_text_unchanged():
    for name in NASTY_LABELS:
        (paragraph,) = (token for token in MarkdownIt("commonmark").parse(f"# {text(name)}") if token.type == "inline")
        assert "".join(child.content for child in paragraph.children) == (" ".join(name.split()) or "(blank)")
        assert {child.type for child in paragraph.children} <= {"text", "text_special"}
    assert text("half a pair \ud83d") == "half a pair"
    assert text("num_train_epochs") == "num_train_epochs"


def test_only_the_first_of_thousands_of_labels_are_listed(tmp_path):
    names = [f"species {index}" for index in range(21_841)]
    content = render(make_record(dataset=DatasetRecord("a/b", "hub", names, 10**7, 10**5)), tmp_path)
    check_card(content, tmp_path)
    assert "21841: species 0, species 1," in content
    assert "species 19 and 21,821 more" in content
    assert len(content) < 15_000


def test_datasets_with_few_labels_have_no_top5(tmp_path):
    content = render(make_record(dataset=DatasetRecord("a/b", "hub", ["cat", "dog"], 100, 50)), tmp_path)
    card = check_card(content, tmp_path)
    assert results_table(content)["read-out"] == ["top-1"]
    assert [result.metric_name for result in card.data.eval_results] == [
        "Accuracy",
        "Accuracy, class head",
        "Accuracy, distillation head",
    ]


def test_example_and_curves_are_shown_only_if_the_run_left_them(tmp_path):
    without = render(make_record(example_label="cat"), tmp_path)
    assert "example.png" not in without and "training_curves.png" not in without
    for name in ("example.png", "training_curves.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with_both = render(make_record(example_label="cat"), tmp_path)
    assert 'hf_hub_download("someone/deit-ti-cifar10", "example.png")' in with_both
    assert "](training_curves.png)" in with_both
    local = render(make_record(example_label="cat", hub_model_id=None), tmp_path)
    assert 'Image.open("example.png")' in local and "in the folder that holds this file" in local
    assert "huggingface_hub import" not in local


def test_whitened_patches_are_not_reported_as_random_weights(tmp_path):
    record = make_record()
    assert "| Initial weights | random |" in render(record, tmp_path)
    record.hyperparameters["patch_init"] = "whitening"
    assert "| Initial weights | random, except for the patch projection, which starts from" in render(record, tmp_path)


def test_epochs_and_time_include_all_stages(tmp_path):
    record = make_record()
    record.metrics["epoch"] = 8.0
    record.earlier_stages = [{**record.as_stage(), "epochs": 20.0, "seconds": 4266.0, "images_seen": 1_000_000}]
    card = render(record, tmp_path)
    assert "This model was trained for 28 epochs at 32x32 pixels" in card
    assert "| 1 | 32x32 | 4x4 | 0 % | 20 |" in card
    cnn = render(replace(record, architecture="resnet18", patch_size=None), tmp_path)
    assert "pip install torch torchvision transformers pillow timm\n" in cnn and "- timm\n" in cnn
    other = render(replace(record, architecture="resnet", patch_size=None), tmp_path)
    assert "pip install torch torchvision transformers pillow\n" in other and "- timm\n" not in other
    assert "| stage | input | epochs |" in cnn and "| 1 | 32x32 | 20 |" in cnn
    # plus 754.3 seconds at 1234.5 images per second
    assert "Training took 1 h 24 min for all stages together (385 images per second) on 2 CPU cores" in card


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="only Linux names its processor there")
def test_processor_is_named_with_its_instruction_sets(tmp_path):
    facts = dict(re.findall(r"^(.+?)\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    described = describe_hardware(TrainingArguments(use_cpu=True, report_to="none"))
    assert described.startswith(describe_cores()[:-1]) and described.endswith(")")
    assert facts.get("model name", "") in described
    for instructions in ("avx2", "avx512_bf16", "amx_bf16"):
        assert (f", {instructions}" in described) == (instructions in facts.get("flags", "").split())
    assert f"per second) on {text(described)}, " in render(make_record(hardware=described), tmp_path)


def test_card_says_if_the_checkpoint_was_chosen_on_the_evaluation_split(tmp_path):
    record = make_record()
    assert "flatter" not in render(record, tmp_path)
    record.hyperparameters["load_best_model_at_end"] = True
    assert "flatter" in render(record, tmp_path)


def test_accuracy_interval_is_wilsons():
    # 50 of 100: Wilson (1927) gives 0.4038 to 0.5962 at 95 %.
    assert confidence_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert confidence_interval(1.0, 100) == pytest.approx((0.9630, 1.0), abs=1e-4)


def test_a_finished_run_names_the_repository_that_it_is_pushed_to_unless_its_card_was_edited(tmp_path):
    def finish(card: str | None = None, **flags) -> str:
        record = make_record(hub_model_id=None, license="unknown")
        record.save(tmp_path)
        write_model_card(record, tmp_path)
        if card is not None:
            (tmp_path / "README.md").write_text(card)
        address_card(arguments(output_dir=tmp_path, hub_model_id="someone/new", license="mit", **flags))
        return (tmp_path / "README.md").read_text()

    card = finish()
    assert 'model="someone/new"' in card and ModelCard(card).data.license == "mit"
    assert RunRecord.load(tmp_path).hub_model_id == "someone/new"
    assert finish(card="Edited.") == "Edited."
    with pytest.raises(UserError, match=f"--export timm: .* python -m modeling_deit_ti.interop {tmp_path} --to timm"):
        finish(export="timm")


@pytest.mark.parametrize(("best", "said"), [(3.0, "; the model is from epoch 3."), (None, ".")])
def test_card_says_when_the_run_stopped_early_and_which_epochs_model_it_has_if_known(best, said, tmp_path):
    record = make_record()
    record.metrics |= {"stopped_early": True, "epoch": 5.0, "best_epoch": best}
    record.hyperparameters |= {"metric_for_best_model": "accuracy", "early_stopping_patience": 2}
    expected = f"It stopped early, after 5 epochs, when `accuracy` had not improved in 2 evaluations{said}\n"
    assert expected in render(record, tmp_path)


def test_every_template_variable_is_passed():
    wanted = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(TEMPLATE.read_text(encoding="utf-8")))
    source = inspect.getsource(make_model_card)
    assert {name for name in wanted if f"        {name}=" not in source} == {"card_data"}


# ---- The report in the card ----


@pytest.mark.parametrize("with_teacher", [False, True])
def test_card_includes_the_report_and_stays_intact_whatever_the_labels(with_teacher, tmp_path):
    numbers = np.arange(len(NASTY_LABELS))
    dataset = DatasetRecord("digits", "scikit-learn", NASTY_LABELS, 100, 13)
    teacher = np.zeros_like(numbers) if with_teacher else None
    report_of(numbers, np.roll(numbers, 1), NASTY_LABELS, teacher=teacher).save(tmp_path)
    (tmp_path / "mistakes.png").touch()
    content = render(make_record(dataset=dataset), tmp_path)
    check_card(content, tmp_path)
    (classes,) = (table for table in tables(content) if table[0][0] == "class")
    assert [row[0] for row in classes[1:]] == [" ".join(name.split()) or "(blank)" for name in NASTY_LABELS]
    assert classes[1][1:] == ["1", "0.00 %", "0.00 %", "0.00 %"]
    for picture in ("confusion_matrix.png", "reliability.png", "mistakes.png"):
        assert f"]({picture})" in content
    assert ("### Against its teacher" in content) == with_teacher
    assert "as far off as [Calibration](#calibration) shows" in content and "were not calibrated" not in content


def test_card_lists_only_the_worst_of_many_classes(tmp_path):
    labels = np.repeat(np.arange(40), 2)
    predicted = np.where(labels < 10, (labels + 1) % 10, labels)  # the first ten are always wrong
    report_of(labels, predicted, [f"species {number}" for number in range(41)]).save(tmp_path)
    content = render(make_record(), tmp_path)
    assert "These are the 10 classes with the lowest F1, out of 41:" in content
    (classes,) = (table for table in tables(content) if table[0][0] == "class")
    assert [row[0] for row in classes[1:]] == [f"species {number}" for number in range(10)]


# ---- The record ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_record_survives_json(variant, tmp_path):
    record = make_record(resolve_mode(**VARIANTS[variant]), example_label="zèbre 🦓")
    record.save(tmp_path)
    assert RunRecord.load(tmp_path) == record
    assert render(RunRecord.load(tmp_path), tmp_path) == render(record, tmp_path)


def test_record_keeps_only_finite_numeric_metrics():
    metrics = {"eval_accuracy": 0.5, "epoch": 2, "train_loss": math.nan, "eval_loss": math.inf, "precision": "bf16"}
    assert make_record(metrics=metrics).metrics == {"eval_accuracy": 0.5, "epoch": 2}


def test_record_keeps_neither_credentials_nor_absolute_paths(tmp_path):
    record = make_record(
        hyperparameters={
            "hub_token": "s3cr3t",
            "note": f"pushed with {TOKEN}",
            "single_token": False,
            "output_dir": "/home/me/my runs/first",
            "data_dir": "~/data",
            "windows": r"C:\Users\me\images",
            "deepspeed": {"config_file": "/home/me/zero2.json"},
            "resolution": "224/16",
            "source": "https://example.org/a/b",
            "learning_rate": 5e-4,
            "lr_scheduler_type": SchedulerType.COSINE,
        },
        command=[
            *("accelerate", "launch", "/home/me/project/train_hf.py", "--dataset_name", "/home/me/data/cats"),
            *("--output_dir=/home/me/out", "--hub_token", "s3cr3t", "--push_to_hub_token=s3cr3t"),
            *("--single_token", "--single-token", "true", "--seed", "1"),
        ],
    )
    assert record.hyperparameters == {
        "note": "pushed with (hidden)",
        "single_token": False,
        "output_dir": "first",
        "data_dir": "data",
        "windows": "images",
        "deepspeed": {"config_file": "zero2.json"},
        "resolution": "224/16",
        "source": "https://example.org/a/b",
        "learning_rate": 5e-4,
        "lr_scheduler_type": "cosine",
    }
    flags = "--dataset_name cats --output_dir=out --single_token --single-token true --seed 1"
    assert " ".join(record.command) == f"accelerate launch train_hf.py {flags}"
    record.save(tmp_path)
    for content in (render(record, tmp_path), (tmp_path / "run_record.json").read_text()):
        for secret in (TOKEN, "s3cr3t", "/home", "Users"):
            assert secret not in content


# ---- The curves ----


def training_log(epochs: int, logs_per_epoch: int = 1, two_tokens: bool = True, teacher: bool = True) -> list[dict]:
    """A log as the Trainer keeps it, including its summary and the evaluation after training."""
    log = []
    for step in range(1, epochs * logs_per_epoch + 1):
        epoch = step / logs_per_epoch
        entry = {"loss": 2 / epoch, "label_loss": 3 / epoch, "learning_rate": 1e-3, "epoch": epoch, "step": step}
        if teacher:
            entry |= {"distillation_loss": 1 / epoch, "teacher_agreement": 1 - 1 / (1 + epoch)}
        log.append(entry)
        if step % logs_per_epoch == 0:
            entry = {"eval_loss": 2.5 / epoch, "eval_accuracy": 1 - 1 / (2 + epoch), "epoch": epoch, "step": step}
            if two_tokens:
                accuracy = entry["eval_accuracy"]
                for readout, below in (("both", 0), ("class", 0.02), ("distillation", 0.01)):
                    entry[f"eval_accuracy_{readout}"] = accuracy - below
            log.append(entry)
    log.append({"train_runtime": 1.0, "train_loss": 0.5, "epoch": float(epochs), "step": len(log)})
    log.append({**log[-2], "eval_accuracy": 0.0})
    return log


def drawn(axes) -> dict[str, list[float]]:
    """The curves by their names in the legend, without the last values that it also shows."""
    return {re.sub(r" [\d.]+( %)?$", "", line.get_label()): list(line.get_ydata()) for line in axes.get_lines()}


def legend(axes) -> list[str]:
    return [entry.get_text() for entry in axes.get_legend().get_texts()]


def test_curves_hold_the_logged_values(tmp_path):
    figure = plot_training_curves(training_log(3), tmp_path / "training_curves.png", teacher_accuracy=0.9)
    accuracy, loss = figure.axes
    lines = drawn(accuracy)
    assert lines["both heads"] == pytest.approx([1 - 1 / 3, 1 - 1 / 4, 1 - 1 / 5])
    assert lines["class head"] == pytest.approx([1 - 1 / 3 - 0.02, 1 - 1 / 4 - 0.02, 1 - 1 / 5 - 0.02])
    assert lines["distillation head"] == pytest.approx([1 - 1 / 3 - 0.01, 1 - 1 / 4 - 0.01, 1 - 1 / 5 - 0.01])
    assert lines["agrees with teacher (training)"] == pytest.approx([1 / 2, 2 / 3, 3 / 4])
    assert "student" not in lines
    assert lines["teacher"] == [0.9, 0.9]
    assert drawn(loss)["training loss"] == pytest.approx([2, 1, 2 / 3])
    assert drawn(loss)["label term"] == pytest.approx([3, 1.5, 1])
    assert drawn(loss)["teacher term"] == pytest.approx([1, 0.5, 1 / 3])
    assert drawn(loss)["evaluation loss"] == pytest.approx([2.5, 1.25, 2.5 / 3])
    figure.draw_without_rendering()
    assert all(label.get_text().endswith(" %") for label in accuracy.get_yticklabels())
    with Image.open(tmp_path / "training_curves.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1650, 660))


def test_without_a_teacher_there_is_one_training_loss(tmp_path):
    figure = plot_training_curves(training_log(2, two_tokens=False, teacher=False), tmp_path / "curves.png")
    accuracy, loss = figure.axes
    assert set(drawn(accuracy)) == {"student"}
    assert set(drawn(loss)) == {"training loss", "evaluation loss"}


def test_legends_show_each_curves_name_and_last_value(tmp_path):
    figure = plot_training_curves(training_log(3), tmp_path / "curves.png", teacher_accuracy=0.9)
    accuracy, loss = figure.axes
    assert legend(accuracy) == [
        *("both heads 80.0 %", "class head 78.0 %", "distillation head 79.0 %"),
        *("agrees with teacher (training) 75.0 %", "teacher 90.0 %"),
    ]
    assert legend(loss) == ["training loss 0.667", "label term 1", "teacher term 0.333", "evaluation loss 0.833"]


@pytest.mark.parametrize(("epochs", "logs_per_epoch"), [(1, 1), (300, 1), (5, 100)])
def test_legends_overlap_nothing_and_are_not_cut_off(epochs, logs_per_epoch, tmp_path):
    figure = plot_training_curves(training_log(epochs, logs_per_epoch), tmp_path / "curves.png", teacher_accuracy=0.6)
    left, right = (axes.get_legend().get_window_extent() for axes in figure.axes)
    assert not left.overlaps(right)
    for box in (left, right):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
        for axes in figure.axes:
            assert box.y1 < axes.xaxis.get_tightbbox().y0  # below the ticks and the axis label


def test_curves_logged_by_step_are_smoothed_over_an_epoch_or_less(tmp_path):
    figure = plot_training_curves(training_log(5, 100), tmp_path / "curves.png")
    each, mean = (list(line.get_ydata()) for line in figure.axes[1].get_lines()[:2])
    assert len(each) == len(mean) == 500
    assert mean[250] == pytest.approx(sum(each[240:260]) / 20)  # a 25th of the run


def test_non_finite_values_and_empty_logs_do_not_break_the_plot(tmp_path):
    log = [{"loss": 1.0, "epoch": 1.0}, {"loss": math.nan, "epoch": 2.0}, {"loss": 0.5, "epoch": 3.0}]
    assert curve_series(log, "loss") == ([1.0, 3.0], [1.0, 0.5])
    assert curve_series(training_log(2), "eval_accuracy") == ([1.0, 2.0], [1 - 1 / 3, 1 - 1 / 4])
    figure = plot_training_curves([], tmp_path / "curves.png")
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["nothing was logged"] * 2


# ---- End to end ----


def save_deit(folder: Path, mode) -> None:
    labels = dict(enumerate(NASTY_LABELS[:3]))
    config = DeiTTiConfig(
        hidden_size=24,
        num_hidden_layers=1,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        **mode.network,
    )
    model, processor = DeiTTiForImageClassification(config), image_processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    save_transformers(model, processor, folder / "transformers")


def save_cnn(folder: Path) -> None:
    config = TimmWrapperConfig(architecture="test_resnet", num_labels=3)
    TimmWrapperForImageClassification(config).save_pretrained(folder)
    image_processor().save_pretrained(folder)


def image_processor() -> DeiTImageProcessor:
    return DeiTImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)


def test_every_code_block_of_a_card_runs_in_a_fresh_process(tmp_path):
    runs = {"both": MODES["both"], "none": MODES["none"], "cnn": MODES["none"]}
    jobs = []
    for name, mode in runs.items():
        folder = tmp_path / name
        folder.mkdir()
        record = make_record(
            mode,
            architecture="test_resnet" if name == "cnn" else "deit_ti",
            hub_model_id=None,
            dataset=DatasetRecord("images", "local", NASTY_LABELS[:3], 10, 10),
            example_label=None if name == "none" else NASTY_LABELS[2],
        )
        if name == "cnn":
            save_cnn(folder)
        else:
            save_deit(folder, mode)
        if record.example_label is not None:
            Image.new("L", (40, 20), 128).save(folder / "example.png")
        content = render(record, folder)
        check_card(content, folder)
        jobs += [(str(folder), block) for block in code_blocks(content)]
    assert len(jobs) == 3 + 3 + 2

    # One process for all: importing torch and transformers takes most of the time. Each block has its own namespace.
    program = (
        "import json, os, sys\nfor folder, block in json.load(sys.stdin):\n    os.chdir(folder)\n    exec(block, {})\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(jobs),
        cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("[{'label':")]) == 5
    assert [line.partition(":")[0] for line in lines if not line.startswith("[{")] == [
        *("prediction", "class head", "distillation head"),
        *("prediction", "prediction"),
    ]

"""The report: its figures in cases small enough to count by hand, its pictures, and `evaluate_hf.py` on any model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from building import DIGITS, NASTY_LABELS, image_processor, report_of
from PIL import Image
from scipy.special import softmax
from transformers import ResNetConfig, ResNetForImageClassification

from evaluate_hf import main
from modeling_deit_ti.arguments import ImageArguments
from modeling_deit_ti.card import Predictions, Report, compare, draw_report, scale_temperature, verdict
from modeling_deit_ti.card.report import agreement, calibration
from modeling_deit_ti.card.report_pictures import draw_confused_pairs, draw_confusion_matrix, draw_mistakes, plain
from modeling_deit_ti.classifiers import label_maps
from modeling_deit_ti.data import load_evaluation_images


def report_of_many(num_classes: int) -> Report:
    """Two images of each class, the second mistaken for the next class."""
    labels = np.repeat(np.arange(num_classes), 2)
    predicted = (labels + np.arange(2 * num_classes) % 2) % num_classes
    return report_of(labels, predicted, [f"species {number}" for number in range(num_classes)])


# ---- Figures ----


def test_each_class_has_its_precision_recall_and_f1():
    names = ["cat", "dog", "emu", "fox"]  # no fox, and nothing taken for one
    report = report_of([0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0, 1], names)
    assert report.accuracy == pytest.approx(4 / 7)
    scores = [(one.label, one.num_images, one.precision, one.recall, one.f1) for one in report.classes]
    assert scores == [
        ("cat", 4, 3 / 4, 3 / 4, 3 / 4),
        ("dog", 2, 1 / 3, 1 / 2, pytest.approx(2 / 5)),
        ("emu", 1, None, 0, 0),
        ("fox", 0, None, None, None),
    ]
    assert report.balanced_accuracy == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert report.macro_f1 == pytest.approx((3 / 4 + 2 / 5 + 0) / 3)
    assert report.confusion == [[3, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_most_confident_mistakes_and_most_common_pairs_come_first():
    report = report_of([0, 0, 0, 1], [1, 0, 1, 0], ["cat", "dog"], [0.6, 0.99, 0.9, 0.7])
    assert [(one.row, one.label, one.predicted, one.confidence) for one in report.mistakes] == [
        (2, "cat", "dog", 0.9),
        (3, "dog", "cat", 0.7),
        (0, "cat", "dog", 0.6),
    ]
    pairs = [(pair.label, pair.predicted, pair.count, pair.num_images) for pair in report.confused_pairs]
    assert pairs == [("cat", "dog", 2, 3), ("dog", "cat", 1, 1)]


def test_reports_on_over_thirty_classes_list_the_most_confused_pairs():
    assert len(report_of_many(30).confusion) == 30
    report = report_of_many(31)
    assert report.confusion is None and len(report.confused_pairs) == 20 and len(report.classes) == 31


def test_calibration_error_is_the_mean_gap_weighted_by_image_count():
    measured = calibration(np.array([0.95, 0.97, 0.58, 0.58, 0.56]), np.array([True, False, True, True, False]))
    assert [(one.num_images, one.confidence, one.accuracy) for one in measured.bins] == [
        (3, pytest.approx(0.5733, abs=1e-4), pytest.approx(2 / 3)),
        (2, pytest.approx(0.96), 0.5),
    ]
    assert measured.expected_calibration_error == pytest.approx(0.6 * (2 / 3 - 0.57333) + 0.4 * (0.96 - 0.5), abs=1e-4)
    assert measured.mean_confidence == pytest.approx(0.728)


def test_temperature_scales_inflated_logits_back():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].numpy()
    logits = 3 * logits.numpy()
    predictions = Predictions(labels, logits.argmax(-1), softmax(logits, -1).max(-1), logits)
    scaling = scale_temperature(predictions)
    assert scaling.temperature == pytest.approx(3, rel=0.1)
    assert (scaling.num_fitted, scaling.num_measured) == (2000, 2000)
    assert scaling.after.expected_calibration_error < 0.04 < 0.15 < scaling.before.expected_calibration_error
    scaled = predictions.divided_by(scaling.temperature)
    assert calibration(scaled.confidence, scaled.predicted == labels).expected_calibration_error < 0.04


def test_no_temperature_is_fitted_to_a_single_image_or_if_all_are_right():
    labels, logits = np.array([0, 1, 0]), np.eye(2, dtype=np.float32)[[0, 1, 0]]
    confidence = np.full(3, 0.73)
    assert scale_temperature(Predictions(labels[:1], labels[:1], confidence[:1], logits[:1])) is None
    assert scale_temperature(Predictions(labels, labels, confidence)) is None  # without logits
    assert scale_temperature(Predictions(labels, labels, confidence, logits)).temperature == 1


# ---- Two models ----


def test_agreement_of_two_models_counts_four_cases_and_shared_wrong_labels():
    labels, first, second = (np.array(ids) for ids in ([0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 0, 0], [0, 1, 1, 1, 0, 1]))
    counts = {"both_right": 2, "only_teacher_right": 1, "only_student_right": 1, "neither_right": 2}
    assert agreement(labels, first, second, ("teacher", "student")) == counts | {"same_wrong_label": 1}
    report = report_of(labels, second, ["cat", "dog", "emu"], teacher=first)
    assert report.teacher == counts | {"same_wrong_label": 1}


def two_models(both: int, only_first: int, only_second: int, neither: int) -> dict:
    counts = [both, only_first, only_second, neither]
    first, second = np.repeat([0, 0, 1, 1], counts), np.repeat([0, 1, 0, 1], counts)
    return compare(np.zeros(sum(counts), int), first, second)


def test_the_difference_has_mcnemars_exact_p_value():
    # One against nine: 2 (1 + 10) / 2^10.
    assert two_models(90, 1, 9, 0)["p_value"] == pytest.approx(22 / 1024)
    assert two_models(90, 5, 5, 0)["p_value"] == 1
    assert two_models(90, 0, 0, 10)["p_value"] == 1


def test_the_difference_has_an_interval_for_paired_proportions():
    # Agresti, Categorical Data Analysis (2002), table 10.1: approval of a prime minister in two surveys of the same
    # 1,600 people; the difference is -0.04, with an interval from -0.06 to -0.02.
    approval = two_models(794, 150, 86, 570)
    assert approval["difference"] == -0.04
    assert [round(bound, 2) for bound in approval["interval"]] == [-0.06, -0.02]
    # With half a person added to each cell: -64 / 1602, and 1.96 standard errors of sqrt(237 - 64^2 / 1602) / 1602.
    assert approval["interval"] == pytest.approx([-0.039950 - 0.018733, -0.039950 + 0.018733], abs=1e-5)
    low, high = two_models(10, 0, 0, 0)["interval"]
    assert low == -high and high == pytest.approx(1.96 * math.sqrt(1) / 12, abs=1e-4)  # two that never differ


def test_the_verdict_is_one_sentence():
    def said(*counts: int) -> str:
        return verdict(two_models(*counts), "A", "B")

    assert said(794, 150, 86, 570) == ("A is 4.0 points more accurate than B (95 % interval 2.1 to 5.9, p < 0.001).")
    assert said(90, 1, 9, 0) == "B is 8.0 points more accurate than A (95 % interval 1.7 to 14.0, p = 0.021)."
    assert said(90, 4, 6, 0) == (
        "B is 2.0 points more accurate than A, but that may be chance (95 % interval -4.4 to 8.3, p = 0.75)."
    )
    assert said(90, 5, 5, 0) == "A and B are equally accurate (95 % interval -6.4 to 6.4, p = 1)."


# ---- Pictures ----


def test_the_matrix_shows_its_counts_and_class_names():
    figure = draw_confusion_matrix(report_of([0, 0, 0, 1], [1, 0, 1, 0], ["cat", "dog"]))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["1", "2", "1", ""]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["cat", "dog"]
    figure = draw_confused_pairs(report_of_many(31))
    assert [text.get_text() for text in figure.axes[0].texts] == ["1 of 2"] * 20
    assert figure.axes[0].get_yticklabels()[0].get_text() == "species 0 → species 1"


@pytest.mark.filterwarnings("error")
def test_any_label_can_be_drawn_and_mistakes_are_drawn_only_with_images(tmp_path):
    numbers = np.arange(len(NASTY_LABELS))
    report = report_of(numbers, np.roll(numbers, 1), NASTY_LABELS)
    draw_report(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"confusion_matrix.png", "reliability.png"}
    figure = draw_mistakes(report, lambda row: Image.new("RGB", (300, 1 + 20 * row)))
    assert len(report.mistakes) == 12
    assert figure.axes[1].get_title() == "true: *bold* __init__\npredicted: a|b, 90 %"
    draw_report(report_of([0, 1], [0, 1], ["cat", "dog"]), tmp_path, image=None)  # without a mistake
    assert plain("a species of bird, the female", 20) == "a species…the female"
    assert plain("$x$", 20) == r"\$x\$"


# ---- evaluate_hf.py ----


def save_classifier(folder: Path, names: list[str], order: list[int] | None = None, seed: int = 0) -> Path:
    """An untrained classifier from another project; `order` reorders its outputs."""
    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", **label_maps(names))
    model = ResNetForImageClassification(config).eval()
    head = model.classifier[1]
    with torch.no_grad():
        head.weight.mul_(50)  # so that it is confident of something
        if order is not None:
            head.weight.copy_(head.weight[order])
            head.bias.copy_(head.bias[order])
    model.save_pretrained(folder)
    image_processor(32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A digits classifier, the same with its labels reversed, one with other weights, and two with other labels."""
    folder = tmp_path_factory.mktemp("models")
    save_classifier(folder / "digits", DIGITS)
    save_classifier(folder / "turned", DIGITS[::-1], list(range(9, -1, -1)))
    save_classifier(folder / "other", DIGITS, seed=1)
    save_classifier(folder / "animals", ["cat", "dog"])
    save_classifier(folder / "more", [*DIGITS, "letter"])
    return folder


def evaluate(*arguments, output: Path) -> dict:
    flags = ["--max_eval_samples=60", "--device=cpu", f"--output_dir={output}"]
    assert main([*map(str, arguments), *flags]) == 0
    name = "report.json" if (output / "report.json").exists() else "comparison.json"
    return json.loads((output / name).read_text())


def test_model_from_another_project_is_matched_by_label_names(models, tmp_path, capsys):
    first = evaluate(models / "digits", "--dataset_name=digits", output=tmp_path / "first")
    turned = evaluate(models / "turned", "--dataset_name=digits", "--batch_size=7", output=tmp_path / "turned")
    assert (first["model"], first["dataset"], first["split"], first["num_images"]) == ("digits", "digits", "test", 60)
    assert first["confusion"] == turned["confusion"]
    assert {path.name for path in (tmp_path / "first").iterdir()} == {
        *("report.json", "report.md", "confusion_matrix.png", "reliability.png", "mistakes.png")
    }
    assert f"{first['accuracy']:.2%}" in capsys.readouterr().out
    more = evaluate(models / "more", "--dataset_name=digits", "--temperature_scaling", output=tmp_path / "more")
    assert [one["label"] for one in more["classes"]] == [*DIGITS, "letter"]
    assert more["temperature_scaling"]["num_measured"] == 30
    assert "The model knows 1 labels that the dataset lacks" in (tmp_path / "more" / "report.md").read_text()


def test_two_models_are_compared_on_the_same_images(models, tmp_path, capsys):
    comparison = evaluate(models / "digits", models / "other", "--dataset_name=digits", output=tmp_path / "two")
    reports = [json.loads((tmp_path / "two" / name / "report.json").read_text()) for name in ("first", "second")]
    right = [report["accuracy"] * 60 for report in reports]
    assert comparison["both_right"] + comparison["only_first_right"] == pytest.approx(right[0])
    assert comparison["both_right"] + comparison["only_second_right"] == pytest.approx(right[1])
    assert comparison["difference"] == pytest.approx((right[1] - right[0]) / 60)
    assert comparison["verdict"] in capsys.readouterr().out
    same = evaluate(models / "digits", models / "turned", "--dataset_name=digits", output=tmp_path / "same")
    assert same["verdict"].startswith("digits and turned are equally accurate")
    assert same["neither_right"] == same["same_wrong_label"] > 0


def test_users_own_images_are_shown_only_on_request(models, tmp_path):
    for split, count in (("train", 2), ("test", 3)):
        for label in ("cat", "dog"):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40 + number, 30), (100 * number, 9, 9)).save(folder / f"{number}.png")
    data = f"--dataset_name={tmp_path / 'photos'}"
    hidden = evaluate(models / "animals", data, output=tmp_path / "hidden")
    assert (hidden["dataset"], hidden["split"], hidden["num_images"]) == ("photos", "test", 6)
    shown = evaluate(models / "animals", data, "--split=train", "--thumbnails", output=tmp_path / "shown")
    assert (shown["split"], shown["num_images"]) == ("train", 4)
    assert shown["mistakes"] and hidden["mistakes"]
    assert (tmp_path / "shown" / "mistakes.png").exists() and not (tmp_path / "hidden" / "mistakes.png").exists()
    assert str(tmp_path) not in (tmp_path / "hidden" / "report.md").read_text()


def test_dataset_without_training_images_is_evaluated_on_its_test_split(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "test" / label).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(tmp_path / "test" / label / "1.png")
    data = load_evaluation_images(ImageArguments(dataset_name=str(tmp_path)))
    assert (data.split, data.label_names, data.images["label"][:]) == ("test", ["cat", "dog"], [0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{models}/digits", "--dataset_name=no/such/folder"], "--dataset_name no/such/folder: there is no such"),
        (["{models}/digits", "--dataset_name=digits", "--split=dev"], "--split dev: digits has no such split; it has"),
        (["{models}/none", "--dataset_name=digits"], "MODEL {models}/none: there is no such folder"),
        (["{models}/digits", "{models}/none", "--dataset_name=digits"], "OTHER_MODEL {models}/none: there is no such"),
        (["{models}/animals", "--dataset_name=digits"], "MODEL {models}/animals: it does not know all labels"),
        (["{models}/digits", "--dataset_name=digits", "--batch_size=0"], "--batch_size 0: must be at least 1"),
        (["{models}/digits", "--dataset_name=digits", "--max_eval_samples=0"], "--max_eval_samples 0: must be"),
        (["{models}/digits", "--dataset_name=digits", "--output_dir={tmp}/old"], "it already holds a report"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(arguments, message, models, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").write_text("precious")
    places = {"models": models, "tmp": tmp_path}
    flags = [f"--output_dir={tmp_path / 'new'}", *(argument.format(**places) for argument in arguments)]
    assert main(flags) == 2
    errors = capsys.readouterr().err
    assert message.format(**places) in errors and "Traceback" not in errors
    assert not (tmp_path / "new").exists() and (tmp_path / "old" / "report.json").read_text() == "precious"

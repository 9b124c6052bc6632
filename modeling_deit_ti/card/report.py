"""Evaluates a classifier's predictions: scores per class, calibration, and the comparison of two models."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from scipy.stats import binned_statistic, binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch.nn import functional as F


REPORT_FILE = "report.json"
# With more classes, the most confused pairs are shown instead of the whole matrix.
MAX_MATRIX_CLASSES = 30
MAX_PAIRS = 20
MAX_MISTAKES = 12
NUM_BINS = 15  # for confidence, as in Guo et al. (2017)
SPLIT_SEED = 0  # decides which images a temperature is fitted on


@dataclass
class Predictions:
    """
    A classifier's predictions for N images with K possible labels, in the order of the images.

    Args:
        labels, predicted (`np.ndarray`): true and predicted label ids, `(N,)`.
        confidence (`np.ndarray`): softmax probability of the predicted label, `(N,)`.
        logits (`np.ndarray`, *optional*): `(N, K)`, to fit a temperature to.
    """

    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    logits: np.ndarray | None = None

    def divided_by(self, temperature: float) -> "Predictions":
        """The predictions after dividing the logits by a temperature."""
        logits = self.logits / temperature
        return replace(self, confidence=softmax(logits, axis=-1).max(axis=-1), logits=logits)


@dataclass
class ClassScores:
    """Scores of one class, from 0 to 1. `None` is undefined: no images of the class, or none predicted as it."""

    label: str
    num_images: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass
class ConfusedPair:
    """How many of the `num_images` images of one class are predicted as another."""

    label: str
    predicted: str
    count: int
    num_images: int


@dataclass
class Mistake:
    """A wrong prediction. `row` is the index of the evaluated image; `confidence` is in the wrong label."""

    row: int
    label: str
    predicted: str
    confidence: float


@dataclass
class ConfidenceBin:
    """The images with similar confidence: their number, mean confidence and accuracy."""

    num_images: int
    confidence: float
    accuracy: float


@dataclass
class Calibration:
    """How well confidence matches accuracy. `bins` are the non-empty ones of `NUM_BINS` bins of equal width."""

    expected_calibration_error: float
    mean_confidence: float
    bins: list[ConfidenceBin]


@dataclass
class TemperatureScaling:
    """
    A temperature fitted on a random half of the images, and its effect on the calibration on the other half.
    `is_applied`: it is folded into the model's weights, and the rest of the report is about that model.
    """

    temperature: float
    num_fitted: int
    num_measured: int
    before: Calibration
    after: Calibration
    is_applied: bool = False


@dataclass
class Report:
    """
    The report on one model and one split. Accuracies and scores are from 0 to 1; means over classes leave out those
    without images.
    """

    model: str
    dataset: str
    split: str
    num_images: int
    accuracy: float
    balanced_accuracy: float  # mean recall of the classes
    macro_f1: float
    classes: list[ClassScores]
    confusion: list[list[int]] | None  # [true][predicted], up to MAX_MATRIX_CLASSES classes
    confused_pairs: list[ConfusedPair]  # the most frequent, at most MAX_PAIRS
    mistakes: list[Mistake]  # those with the highest confidence, at most MAX_MISTAKES
    calibration: Calibration
    temperature_scaling: TemperatureScaling | None = None
    teacher: dict[str, int] | None = None  # the `agreement` of teacher and student

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `report.json` to the folder."""
        content = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        # A label read from a broken file name may contain a lone surrogate, which UTF-8 cannot encode.
        Path(folder, REPORT_FILE).write_text(content + "\n", encoding="utf-8", errors="replace")


def make_report(
    predictions: Predictions,
    label_names: Sequence[str],
    model: str,
    dataset: str,
    split: str,
    teacher: np.ndarray | None = None,
    temperature_scaling: TemperatureScaling | None = None,
) -> Report:
    """
    Args:
        predictions ([`Predictions`]): at least one.
        label_names (`Sequence[str]`): by label id.
        model, dataset, split (`str`): their names in the report.
        teacher (`np.ndarray`, *optional*): the label ids that the model's teacher predicts, `(N,)`.
        temperature_scaling ([`TemperatureScaling`], *optional*): see [`scale_temperature`].
    """
    labels, predicted = predictions.labels, predictions.predicted
    is_right, ids = predicted == labels, range(len(label_names))
    # Undefined scores are NaN.
    scores = precision_recall_fscore_support(labels, predicted, labels=ids, zero_division=np.nan)
    precision, recall, f1, support = scores
    is_seen = support > 0
    wrong = np.flatnonzero(~is_right)
    pairs = Counter(zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    most_confident = wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:MAX_MISTAKES]
    return Report(
        model=model,
        dataset=dataset,
        split=split,
        num_images=len(labels),
        accuracy=float(is_right.mean()),
        balanced_accuracy=float(recall[is_seen].mean()),
        macro_f1=float(f1[is_seen].mean()),
        classes=[
            ClassScores(name, int(support[i]), *(_defined(score[i]) for score in (precision, recall, f1)))
            for i, name in enumerate(label_names)
        ],
        confusion=(
            confusion_matrix(labels, predicted, labels=ids).tolist() if len(ids) <= MAX_MATRIX_CLASSES else None
        ),
        confused_pairs=[
            ConfusedPair(label_names[true], label_names[taken], count, int(support[true]))
            for (true, taken), count in pairs.most_common(MAX_PAIRS)
        ],
        mistakes=[
            Mistake(row, label_names[labels[row]], label_names[predicted[row]], float(predictions.confidence[row]))
            for row in most_confident.tolist()
        ],
        calibration=calibration(predictions.confidence, is_right),
        temperature_scaling=temperature_scaling,
        teacher=None if teacher is None else agreement(labels, teacher, predicted, ("teacher", "student")),
    )


def _defined(score: float) -> float | None:
    return None if np.isnan(score) else float(score)


def confidence_interval(accuracy: float, num_images: int) -> tuple[float, float]:
    """The 95 % Wilson interval of an accuracy measured on this many images."""
    return binomtest(round(accuracy * num_images), num_images).proportion_ci(method="wilson")


# ---- Calibration ----


def calibration(confidence: np.ndarray, is_right: np.ndarray) -> Calibration:
    """The expected calibration error (Guo et al., 2017, equation 3), and the bins behind it."""
    bins = {"bins": NUM_BINS, "range": (0, 1)}
    counts = binned_statistic(confidence, confidence, "count", **bins).statistic
    means, accuracies = binned_statistic(confidence, [confidence, is_right], "mean", **bins).statistic
    filled = [
        ConfidenceBin(int(count), float(mean), float(accuracy))
        for count, mean, accuracy in zip(counts, means, accuracies, strict=True)
        if count > 0
    ]
    error = sum(one.num_images * abs(one.accuracy - one.confidence) for one in filled) / len(confidence)
    return Calibration(error, float(confidence.mean()), filled)


def scale_temperature(predictions: Predictions) -> TemperatureScaling | None:
    """
    Temperature scaling (Guo et al., 2017, section 4.2). `None` if there are no logits, or fewer than two predictions.
    If all images that it is fitted on are classified correctly, there is no best temperature, and it is 1.
    """
    if predictions.logits is None or len(predictions.labels) < 2:
        return None
    logits, labels = torch.from_numpy(predictions.logits).float(), torch.from_numpy(predictions.labels)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    fitted, measured = np.split(order, [len(order) // 2])

    def loss(log_temperature: float) -> float:
        return F.cross_entropy(logits[fitted] / np.exp(log_temperature), labels[fitted]).item()

    is_right = predictions.predicted == predictions.labels
    temperature = 1.0
    if not is_right[fitted].all():
        temperature = float(np.exp(minimize_scalar(loss, bounds=np.log([0.05, 20]), method="bounded").x))

    def measure(logits: torch.Tensor) -> Calibration:
        return calibration(logits.softmax(dim=-1).amax(dim=-1).numpy(), is_right[measured])

    before, after = measure(logits[measured]), measure(logits[measured] / temperature)
    return TemperatureScaling(temperature, len(fitted), len(measured), before, after)


# ---- Two models ----


def agreement(labels: np.ndarray, first: np.ndarray, second: np.ndarray, names: tuple[str, str]) -> dict[str, int]:
    """
    How many images both, only one or neither of two models get right, and how many get the same wrong label from both.

    Args:
        labels, first, second (`np.ndarray`): the true labels and those that each model predicts, `(N,)`.
        names (`tuple[str, str]`): the models' names, for the keys.
    """
    first_right, second_right = first == labels, second == labels
    return {
        "both_right": int((first_right & second_right).sum()),
        f"only_{names[0]}_right": int((first_right & ~second_right).sum()),
        f"only_{names[1]}_right": int((~first_right & second_right).sum()),
        "neither_right": int((~first_right & ~second_right).sum()),
        "same_wrong_label": int((~first_right & (first == second)).sum()),
    }


def compare(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> dict:
    """
    Whether the second of two models is right more often than the first on the same images.

    Returns:
        The counts of [`agreement`] (`first`, `second`); `difference` of the accuracies, second minus first, from -1 to
        1; its 95 % `interval` for paired proportions (Agresti and Min, 2005: Wald's, with half an image added to each
        of the four counts); the `p_value` of McNemar's exact test.
    """
    counts = agreement(labels, first, second, ("first", "second"))
    losses, gains = counts["only_first_right"], counts["only_second_right"]
    p_value = binomtest(gains, gains + losses).pvalue if gains + losses else 1.0
    total, more, discordant = len(labels) + 2, gains - losses, gains + losses + 1
    centre, margin = more / total, 1.959964 * np.sqrt(discordant - more**2 / total) / total
    return counts | {
        "difference": more / len(labels),
        "interval": [float(centre - margin), float(centre + margin)],
        "p_value": float(p_value),
    }


def verdict(comparison: dict, first: str, second: str) -> str:
    """A comparison in one sentence; `first` and `second` are the models' names."""
    difference, (low, high), p = (comparison[name] for name in ("difference", "interval", "p_value"))
    if difference < 0:
        first, second, difference, low, high = second, first, -difference, -high, -low
    probability = f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"
    facts = f"(95 % interval {100 * low:.1f} to {100 * high:.1f}, {probability})"
    if difference == 0:
        return f"{first} and {second} are equally accurate {facts}."
    found = f"{second} is {100 * difference:.1f} points more accurate than {first}"
    return f"{found} {facts}." if p < 0.05 else f"{found}, but that may be chance {facts}."

"""The figures of a report: confusions, calibration and the most confident mistakes."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image as PILImage
from sklearn.metrics import ConfusionMatrixDisplay

from .curves import BLUE, GREY, VERMILLION
from .markdown import clean
from .report import NUM_BINS, Report, confidence_interval


CONFUSION_FILE = "confusion_matrix.png"
RELIABILITY_FILE = "reliability.png"
MISTAKES_FILE = "mistakes.png"

DPI = 150
MISTAKE_COLUMNS = 4
MAX_THUMBNAIL_SIZE = 224  # pixels


def draw_report(
    report: Report, folder: str | os.PathLike, image: Callable[[int], PILImage.Image] | None = None
) -> None:
    """
    Saves the figures to the folder.

    Args:
        image (`Callable`, *optional*): returns the RGB image of a mistake's `row`. Without it, no images are shown.
    """
    folder = Path(folder)
    confusion = draw_confused_pairs(report) if report.confusion is None else draw_confusion_matrix(report)
    figures = {CONFUSION_FILE: confusion, RELIABILITY_FILE: draw_reliability(report)}
    if image is not None and report.mistakes:
        figures[MISTAKES_FILE] = draw_mistakes(report, image)
    with warnings.catch_warnings():
        # matplotlib's default font lacks the characters of some scripts, and draws boxes for them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        for name, figure in figures.items():
            figure.savefig(folder / name)


def draw_confusion_matrix(report: Report) -> Figure:
    """Counts of each true (row) and predicted (column) class, coloured by their share of the row."""
    counts = np.array(report.confusion)
    names = [plain(scores.label, 24) for scores in report.classes]
    longest = max(map(len, names))
    cell, letter = max(0.36, 2.4 / len(names)), 0.085  # inches
    side = 1.5 + letter * longest + cell * len(names)
    figure = Figure(figsize=(side, side), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    display = ConfusionMatrixDisplay(shares, display_labels=names)
    display.plot(
        ax=axes,
        cmap="Blues",
        colorbar=False,
        text_kw={"fontsize": 8},
        im_kw={"vmin": 0, "vmax": 1},
        xticks_rotation="horizontal" if letter * longest < cell else "vertical",
    )
    for text, count in zip(display.text_.flat, counts.flat, strict=True):
        text.set_text(f"{count}" if count else "")
        text.set_in_layout(False)  # hundreds of texts would take seconds to measure, and all are inside the axes
    axes.set_title(f"Images by true and predicted class ({report.num_images:,})", loc="left", fontsize=10)
    axes.set(xlabel="predicted class", ylabel="true class")
    return figure


def draw_confused_pairs(report: Report) -> Figure:
    """The pairs of classes that are confused most often, with their counts."""
    pairs = report.confused_pairs
    figure = Figure(figsize=(9, 1.2 + 0.3 * max(len(pairs), 1)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_title("The most confused pairs: true class → predicted class", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if not pairs:
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color=GREY)
        axes.set(xticks=[], yticks=[])
        return figure
    bars = axes.barh(range(len(pairs)), [pair.count for pair in pairs], color=BLUE, height=0.7)
    axes.bar_label(bars, [f"{pair.count} of {pair.num_images:,}" for pair in pairs], padding=3, fontsize=8)
    axes.set_yticks(
        range(len(pairs)), [f"{plain(pair.label, 32)} → {plain(pair.predicted, 32)}" for pair in pairs], fontsize=8
    )
    axes.set_xlabel("images")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.15, y=0.01)
    axes.invert_yaxis()
    return figure


def draw_reliability(report: Report) -> Figure:
    """Accuracy by confidence, with the diagonal of a calibrated model, and the share of images at each confidence."""
    calibration, scaling = report.calibration, report.temperature_scaling
    figure = Figure(figsize=(5.2, 6.2), dpi=DPI, layout="constrained")
    accuracy, share = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    accuracy.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="calibrated")
    series = [(calibration, BLUE, "o", "as it is")]
    if scaling is not None and scaling.temperature != 1:
        other, how = (scaling.before, "without its") if scaling.is_applied else (scaling.after, "with a")
        series.append((other, VERMILLION, "s", f"{how} temperature of {scaling.temperature:.2f}"))
    for shown, colour, marker, name in series:
        label = f"{name}: calibration error {100 * shown.expected_calibration_error:.1f} %"
        confidences = [one.confidence for one in shown.bins]
        accuracies = np.array([one.accuracy for one in shown.bins])
        # The accuracy of a bin with few images is uncertain: 95 % intervals show how much.
        bounds = np.array([confidence_interval(one.accuracy, one.num_images) for one in shown.bins]).T
        lengths = np.abs(bounds - accuracies)
        accuracy.errorbar(
            confidences, accuracies, lengths, fmt=marker, color=colour, markersize=5, elinewidth=1, label=label
        )
    accuracy.set(xlim=(0, 1.01), ylim=(0, 1.02), ylabel="accuracy, with 95 % interval")
    accuracy.set_title("Accuracy by confidence", loc="left", fontsize=10)
    figure.legend(loc="outside lower left", frameon=False, fontsize=9)
    total = report.num_images
    confidences = [one.confidence for one in calibration.bins]
    weights = [one.num_images / total for one in calibration.bins]
    share.hist(confidences, bins=NUM_BINS, range=(0, 1), weights=weights, color=BLUE, rwidth=0.9)
    share.set(ylabel="images", xlabel="confidence: probability of the predicted class", ylim=(0, None))
    for axis in (accuracy.yaxis, share.yaxis, share.xaxis):
        axis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %", decimals=0))
    for axes in (accuracy, share):
        axes.grid(color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_mistakes(report: Report, image: Callable[[int], PILImage.Image]) -> Figure:
    """The most confident mistakes, each with its true and predicted class."""
    rows = -(-len(report.mistakes) // MISTAKE_COLUMNS)
    height = 0.4 + 2.6 * rows  # inches
    figure = Figure(figsize=(9, height), dpi=DPI)  # laid out by hand: matplotlib takes a second to measure all titles
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.1 / height, top=1 - 0.75 / height, hspace=0.25, wspace=0.05)
    figure.text(0.01, 1 - 0.1 / height, "Wrong predictions with the highest confidence", va="top", fontsize=10)
    grid = figure.subplots(rows, MISTAKE_COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
        axes.set_anchor("N")
    for axes, mistake in zip(grid, report.mistakes, strict=False):
        thumbnail = image(mistake.row)
        thumbnail.thumbnail((MAX_THUMBNAIL_SIZE, MAX_THUMBNAIL_SIZE))
        axes.imshow(thumbnail, interpolation="nearest")
        said = f"{plain(mistake.predicted, 17)}, {mistake.confidence:.0%}".replace("%", " %")
        axes.set_title(f"true: {plain(mistake.label, 22)}\npredicted: {said}", fontsize=8)
    return figure


def plain(label: str, length: int) -> str:
    """A label for matplotlib: at most `length` characters, with dollar signs escaped, which would start formulas."""
    line = clean(label) or "(blank)"
    if len(line) > length:  # many names differ in their last word
        line = f"{line[: length - length // 2 - 1].rstrip()}…{line[-(length // 2) :].lstrip()}"
    return line.replace("$", r"\$")

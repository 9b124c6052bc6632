"""The training curves of a run: accuracies and losses over the epochs, in one figure."""

import os

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .record import is_finite


CURVES_FILE = "training_curves.png"

# Name, colour and line style. Okabe and Ito's colours can be told apart with any type of colour vision.
BLUE, VERMILLION, GREEN, PURPLE, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#777777", "#000000"
ACCURACY_CURVES = {
    "eval_accuracy_both": ("both heads", GREEN, "-"),
    "eval_accuracy_class": ("class head", BLUE, "-"),
    "eval_accuracy_distillation": ("distillation head", VERMILLION, "-"),
    "eval_accuracy": ("student", BLUE, "-"),
    "teacher_agreement": ("agrees with teacher (training)", GREY, ":"),
}
LOSS_CURVES = {
    "loss": ("training loss", BLACK, "-"),
    "label_loss": ("label term", BLUE, "-"),
    "distillation_loss": ("teacher term", VERMILLION, "-"),
    "eval_loss": ("evaluation loss", PURPLE, "--"),
}


def curve_series(log_history: list[dict], key: str) -> tuple[list[float], list[float]]:
    """
    One quantity from a Trainer's `state.log_history`, as epochs and values. Values that are not finite are dropped.

    If an epoch has two values, the first is used: the second comes from the evaluation after training, possibly of
    another checkpoint.
    """
    values = {}
    for entry in log_history:
        if is_finite(entry.get(key)):
            values.setdefault(float(entry["epoch"]), float(entry[key]))
    epochs = sorted(values)
    return epochs, [values[epoch] for epoch in epochs]


def plot_training_curves(
    log_history: list[dict], file: str | os.PathLike, teacher_accuracy: float | None = None
) -> Figure:
    """Saves a plot of accuracies and losses over the epochs, 1650 x 660 pixels. Accuracies are from 0 to 1."""
    accuracies = {key: curve_series(log_history, key) for key in ACCURACY_CURVES}
    losses = {key: curve_series(log_history, key) for key in LOSS_CURVES}
    if accuracies["eval_accuracy_both"][0]:
        del accuracies["eval_accuracy"]  # it is one of the three read-outs
    if not (losses["label_loss"][0] and losses["distillation_loss"][0]):
        del losses["label_loss"], losses["distillation_loss"]  # a single term is the loss itself

    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    left, right = figure.subplots(1, 2, sharex=True)
    for axes, title in ((left, "Accuracy on the evaluation split"), (right, "Loss")):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("epoch")
        axes.grid(color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    left.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))

    for key, (epochs, values) in accuracies.items():
        _draw(left, epochs, values, *ACCURACY_CURVES[key], lambda value: f"{100 * value:.1f} %")
    if teacher_accuracy is not None:
        label = f"teacher {100 * teacher_accuracy:.1f} %"
        left.axhline(teacher_accuracy, color=BLACK, linestyle="--", linewidth=1.2, label=label)
    for key, (epochs, values) in losses.items():
        _draw(right, epochs, values, *LOSS_CURVES[key], lambda value: f"{value:.3g}")

    for axes in (left, right):
        if axes.get_lines():
            # Below the axes, where no curve can be; constrained layout makes room for it.
            axes.legend(loc="upper left", bbox_to_anchor=(-0.025, -0.17), ncols=2, frameon=False, fontsize=9)
        else:
            axes.text(0.5, 0.5, "nothing was logged", transform=axes.transAxes, ha="center", va="center", color=GREY)
            axes.set_yticks([])
    left.set_xlim(left=0)
    # Runs of less than one epoch need ticks between 0 and 1.
    left.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=left.get_xlim()[1] >= 1))
    figure.savefig(file)
    return figure


def _draw(axes: Axes, epochs: list, values: list, name: str, colour: str, style: str, show) -> None:
    """Draws one curve, labelled with its name and its last value, which `show` formats."""
    if not epochs:
        return
    logs_per_epoch = len(epochs) / max(epochs[-1], 1)
    if len(epochs) > 60 and logs_per_epoch > 3:
        # Many logs per epoch: draw them faintly, with their running mean over an epoch or a 25th of the run on top.
        axes.plot(epochs, values, color=colour, linewidth=0.6, alpha=0.25)
        axes.set_xlabel("epoch (faint: each log, bold: running mean)")
        window = np.ones(max(3, round(min(logs_per_epoch, len(epochs) / 25))))
        # At either end, the window covers fewer values.
        values = np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
    label, marker = f"{name} {show(values[-1])}", "o" if len(epochs) <= 30 else None
    axes.plot(epochs, values, style, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=label)

"""What a finished run says of itself: its record, its training curves and its model card.

`RunRecord` is plain data that the run fills in and keeps as json beside the model. `write_model_card` renders it
through `model_cards/template.md`; the prose is there, the numbers and the escaping are here.
"""

import json
import math
import os
import platform
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from enum import Enum
from importlib.metadata import version
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from transformers import TrainingArguments

from .configuration_deit_ti import READOUTS
from .distillation import DistillMode


TEMPLATE = Path(__file__).parent.parent / "model_cards" / "template.md"
RECORD_FILE = "run_record.json"
CURVES_FILE = "training_curves.png"
EXAMPLE_FILE = "example.png"

# Top-1 on CIFAR-10 of a published student re-implementation: 20 epochs, 224x224, one T4 GPU. A token mode's rows are
# named after the read-out, and its class and distillation rows are networks with that token alone.
SEED_CIFAR10 = {
    "none": 0.6769,
    "soft": 0.6885,
    "hard": 0.4019,
    "distillation": 0.0807,
    "class": 0.6169,
    "both, soft teacher": 0.6919,
    "both, hard teacher": 0.4611,
    "resnet18": 0.8846,
}
CIFAR10_LABELS = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}
READOUT_NAMES = {"class": "class head", "distillation": "distillation head", "both": "both heads, mean of logits"}
MAX_LABELS_SHOWN = 20


# ---------------------------------------------------------------------------------------------------------------------
# The record
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class DatasetRecord:
    """
    The images of a run.

    Args:
        name (`str`): what `--dataset_name` said. Of a local folder only its own name is kept.
        source (`str`): `"hub"`, `"local"` or `"scikit-learn"`.
        label_names (`list[str]`): in the order of the label ids.
        num_train_images (`int`), num_eval_images (`int`): after `--max_train_samples` and `--max_eval_samples`.
        eval_split (`str`): the split that was evaluated on.
        config_name (`str`, *optional*): the dataset's configuration.
    """

    name: str
    source: Literal["hub", "local", "scikit-learn"]
    label_names: list[str]
    num_train_images: int
    num_eval_images: int
    eval_split: str = "test"
    config_name: str | None = None

    def __post_init__(self):
        if self.source == "local":
            self.name = folder_name(self.name)
        self.label_names = [str(name) for name in self.label_names]

    @property
    def is_cifar10(self) -> bool:
        name = re.sub(r"[^a-z0-9]", "", self.name.lower().rpartition("/")[2])
        return name == "cifar10" and set(self.label_names) == CIFAR10_LABELS


@dataclass
class TeacherRecord:
    """
    The teacher of a run.

    Args:
        name (`str`): a timm architecture, a Hub id or a folder. Of a local folder only its own name is kept.
        source (`str`): `"timm"`, `"hub"` or `"local"`.
        accuracy (`float`): top-1 on the evaluation split, 0 to 1.
        num_parameters (`int`)
        image_size (`int`): height and width of the images it sees, in pixels.
        fitted (`str`, *optional*): how it was fitted to the dataset: `"scratch"`, or `"pretrained"` for on top of
            weights it came with; `None` where it was taken as given.
        hyperparameters (`dict`, *optional*): of that fitting.
    """

    name: str
    source: Literal["timm", "hub", "local"]
    accuracy: float
    num_parameters: int
    image_size: int
    fitted: Literal["scratch", "pretrained"] | None = None
    hyperparameters: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.source == "local":
            self.name = folder_name(self.name)
        self.hyperparameters = shareable(self.hyperparameters)


def library_versions() -> dict[str, str]:
    """Version of each library that decides what a run computes."""
    libraries = ("torch", "torchvision", "transformers", "accelerate", "datasets", "timm", "huggingface_hub")
    return {"Python": platform.python_version(), **{library: version(library) for library in libraries}}


def describe_hardware(args: TrainingArguments) -> str:
    """The devices that a run uses, in words: `2 x NVIDIA H100`, `8 CPU cores`."""
    if args.device.type == "cuda":
        count = args.world_size * max(1, args.n_gpu)
        name = torch.cuda.get_device_name(args.device)
    elif args.device.type == "cpu":
        # A container or a scheduler may allow fewer cores than the machine has.
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"{count} CPU core{'s' if count != 1 else ''} ({platform.machine()})"
    else:
        count, name = args.world_size, args.device.type.upper()
    return f"{count} x {name}"


@dataclass
class RunRecord:
    """
    Everything that a model card says of a run. Plain data: `save` and `load` keep it as json in the run's folder.

    Whatever is put in, no credentials and no absolute paths stay in: the record is pushed with the model.

    Args:
        architecture (`str`): `"deit_ti"`, or the name of a timm architecture.
        num_parameters (`int`): of the student.
        image_size (`int`): height and width of its images, in pixels.
        mode (`DistillMode`)
        dataset (`DatasetRecord`)
        metrics (`dict`): those of `all_results.json`. What is not a finite number is left out.
        hyperparameters (`dict`): every training argument that matters, by its flag's name. `None` is left out.
        hardware (`str`): see `describe_hardware`.
        teacher (`TeacherRecord`, *optional*)
        patch_size (`int`, *optional*), drop_path_rate (`float`, *optional*): of a DeiT-Ti.
        base_model (`str`, *optional*): what the student's weights started from, where they were not random.
        base_model_on_hub (`bool`): whether that is a Hub id.
        hub_model_id (`str`, *optional*): `owner/name` where the model is pushed to.
        license (`str`): one of the Hub's identifiers.
        command (`list[str]`, *optional*): the whole command line, such as `["accelerate", "launch", *sys.argv]`.
        example_label (`str`, *optional*): label of the image that the run saved beside the model as `example.png`.
            `None` where it saved none.
        versions (`dict`), date (`str`): of the run; now's where they are not given.
    """

    architecture: str
    num_parameters: int
    image_size: int
    mode: DistillMode
    dataset: DatasetRecord
    metrics: dict[str, float]
    hyperparameters: dict
    hardware: str
    teacher: TeacherRecord | None = None
    patch_size: int | None = None
    drop_path_rate: float | None = None
    base_model: str | None = None
    base_model_on_hub: bool = False
    hub_model_id: str | None = None
    license: str = "unknown"
    command: list[str] | None = None
    example_label: str | None = None
    versions: dict[str, str] = field(default_factory=library_versions)
    date: str = field(default_factory=lambda: date.today().isoformat())

    def __post_init__(self):
        if self.base_model is not None and not self.base_model_on_hub:
            self.base_model = folder_name(self.base_model)
        self.metrics = {name: value for name, value in self.metrics.items() if _is_finite(value)}
        self.hyperparameters = shareable(self.hyperparameters)
        self.command = None if self.command is None else shareable_command(self.command)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `run_record.json` into the folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        # A label that came from a broken file name may hold half a character, which has no UTF-8.
        Path(folder, RECORD_FILE).write_text(text + "\n", encoding="utf-8", errors="replace")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "RunRecord":
        """Reads `run_record.json` from the folder."""
        values = json.loads(Path(folder, RECORD_FILE).read_text(encoding="utf-8"))
        values["mode"] = DistillMode(**{**values["mode"], "tokens": tuple(values["mode"]["tokens"])})
        values["dataset"] = DatasetRecord(**values["dataset"])
        if values["teacher"] is not None:
            values["teacher"] = TeacherRecord(**values["teacher"])
        # A later version may record more.
        return cls(**{entry.name: values[entry.name] for entry in fields(cls) if entry.name in values})


def _is_finite(value) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


# ---------------------------------------------------------------------------------------------------------------------
# What may be published
# ---------------------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}")
_SECRET_FLAG = re.compile(r"(?:token|secret|password|api_key)$")
# Not in a word (224/16, and/or), not in a URL (https://...), not relative (../data).
_ABSOLUTE_PATH = re.compile(r"(?<![\w:/.\\-])(?:~|[A-Za-z]:)?[/\\][^\s'\",;]+")


def folder_name(path: str | os.PathLike) -> str:
    """The last part of a path, which says nothing of the machine it is on."""
    return re.split(r"[/\\]", str(Path(path).expanduser().resolve()))[-1]


def shareable(value):
    """The value as plain data for json: enums as their values, no `None`, credentials or absolute paths in it."""
    if isinstance(value, dict):
        # A credential is a string: --single_token and --tokens are none.
        return {
            str(name): shareable(inner)
            for name, inner in value.items()
            if inner is not None and not (isinstance(inner, str) and _SECRET_FLAG.search(str(name).lower()))
        }
    if isinstance(value, Enum):
        return shareable(value.value)
    if isinstance(value, bool | int | float) or value is None:
        return value
    if isinstance(value, list | tuple | set):
        return [shareable(inner) for inner in value]
    text = str(value)
    if _ABSOLUTE_PATH.match(text):  # as a whole: a path may have blanks in it
        return folder_name(text)
    text = _ABSOLUTE_PATH.sub(lambda found: folder_name(found.group()), text)
    return _TOKEN.sub("(hidden)", text)


def shareable_command(command: Iterable[str]) -> list[str]:
    """The command line without the flags that carry credentials, and with the last part of every absolute path."""
    words, drop_value = [], False
    for word in command:
        flag, equals, value = word.partition("=")
        if drop_value and not word.startswith("-"):
            drop_value = False
            continue
        drop_value = False
        if word.startswith("-") and _SECRET_FLAG.search(flag.lower()) and flag.strip("-") != "single_token":
            drop_value = not equals
            continue
        words.append(f"{flag}={shareable(value)}" if word.startswith("-") and equals else shareable(word))
    return words


# ---------------------------------------------------------------------------------------------------------------------
# The curves
# ---------------------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours: told apart with any kind of colour vision. (label, colour, line style)
_BLUE, _VERMILLION, _GREEN, _PURPLE, _GREY, _BLACK = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#777777", "#000000"
ACCURACY_CURVES = {
    "eval_accuracy_both": ("both heads", _GREEN, "-"),
    "eval_accuracy_class": ("class head", _BLUE, "-"),
    "eval_accuracy_distillation": ("distillation head", _VERMILLION, "-"),
    "eval_accuracy": ("student", _BLUE, "-"),
    "teacher_agreement": ("agrees with teacher\n(training images)", _GREY, ":"),
}
LOSS_CURVES = {
    "loss": ("training loss", _BLACK, "-"),
    "label_loss": ("label term", _BLUE, "-"),
    "distillation_loss": ("teacher term", _VERMILLION, "-"),
    "eval_loss": ("evaluation loss", _PURPLE, "--"),
}


def curve_series(log_history: list[dict], key: str) -> tuple[list[float], list[float]]:
    """
    What the log says of one quantity.

    Args:
        log_history (`list[dict]`): a Trainer's.
        key (`str`): the entry's name.

    Returns:
        `(epochs, values)`, in order of the epochs. Of two values at one epoch the first counts: the second is of the
        evaluation after training, maybe of another checkpoint. What is not finite is left out.
    """
    values = {}
    for entry in log_history:
        if _is_finite(entry.get(key)) and _is_finite(entry.get("epoch")):
            values.setdefault(float(entry["epoch"]), float(entry[key]))
    epochs = sorted(values)
    return epochs, [values[epoch] for epoch in epochs]


def plot_training_curves(
    log_history: list[dict], file: str | os.PathLike, teacher_accuracy: float | None = None
) -> Figure:
    """
    Draws accuracies and losses over the epochs and saves them as a picture of 1650 x 660 pixels.

    Args:
        log_history (`list[dict]`): a Trainer's `state.log_history`.
        file (`str` or `os.PathLike`): where to, with an ending that matplotlib knows.
        teacher_accuracy (`float`, *optional*): top-1 of the teacher on the evaluation split, 0 to 1.
    """
    accuracies = {key: curve_series(log_history, key) for key in ACCURACY_CURVES}
    losses = {key: curve_series(log_history, key) for key in LOSS_CURVES}
    if any(accuracies[f"eval_accuracy_{readout}"][0] for readout in READOUTS):
        del accuracies["eval_accuracy"]  # it is one of the read-outs
    if not (losses["label_loss"][0] and losses["distillation_loss"][0]):
        del losses["label_loss"], losses["distillation_loss"]  # a single term is the loss itself

    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    last_epoch = max((epochs[-1] for epochs, _ in [*accuracies.values(), *losses.values()] if epochs), default=0) or 1
    for axes in (left, right):
        axes.set_xlim(0, last_epoch * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=last_epoch >= 1))
        axes.set_xlabel("epoch")
        axes.grid(color="#E6E6E6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)

    labels = [_draw(left, *accuracies[key], *ACCURACY_CURVES[key]) for key in accuracies]
    if teacher_accuracy is not None:
        left.axhline(teacher_accuracy, color=_BLACK, linestyle="--", linewidth=1.2)
        labels.append((last_epoch, teacher_accuracy, "teacher", _BLACK))
    _finish(left, "Accuracy on the evaluation split", labels, lambda value: f"{100 * value:.1f} %", (-0.02, 1.02))
    if any(labels):
        left.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))

    labels = [_draw(right, *losses[key], *LOSS_CURVES[key]) for key in losses]
    _finish(right, "Loss", labels, lambda value: f"{value:.3g}", (-math.inf, math.inf))
    figure.savefig(file)
    return figure


def _draw(
    axes: Axes, epochs: list[float], values: list[float], name: str, colour: str, style: str
) -> tuple[float, float, str, str] | None:
    """Draws one curve; returns where it ends, with its name and colour, or `None` where there is nothing."""
    if not epochs:
        return None
    points_per_epoch = len(epochs) / max(epochs[-1], 1)
    if len(epochs) > 60 and points_per_epoch > 3:
        # Logged by step: every log faintly, and on top their running mean over an epoch or a 25th of the run.
        axes.plot(epochs, values, color=colour, linewidth=0.6, alpha=0.25)
        values = _running_mean(values, max(3, round(min(points_per_epoch, len(epochs) / 25))))
        axes.set_xlabel("epoch (faint: each log, bold: running mean)")
    marker = "o" if len(epochs) <= 30 else None
    axes.plot(epochs, values, color=colour, linestyle=style, linewidth=1.6, marker=marker, markersize=3.5, label=name)
    return epochs[-1], values[-1], name, colour


def _running_mean(values: list[float], width: int) -> list[float]:
    """Mean over the `width` values around each; over fewer at both ends."""
    half = width // 2
    windows = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _finish(
    axes: Axes,
    title: str,
    labels: list[tuple[float, float, str, str] | None],
    show: Callable[[float], str],
    limits: tuple[float, float],
) -> None:
    """Title, limits and, in place of a legend, each curve's name and last value at its end."""
    axes.set_title(title, loc="left", fontsize=11)
    labels = sorted((label for label in labels if label is not None), key=lambda label: label[1])
    if not labels:
        axes.text(0.5, 0.5, "nothing was logged", transform=axes.transAxes, ha="center", va="center", color=_GREY)
        axes.set_yticks([])
        return
    axes.margins(y=0.1)
    low, high = max(axes.get_ylim()[0], limits[0]), min(axes.get_ylim()[1], limits[1])
    axes.set_ylim(low, high)
    heights = [(label[1] - low) / (high - low) for label in labels]
    # In fractions of the axes: a line of text is 0.055 high, and some labels have two.
    sizes = [0.065 + 0.05 * label[2].count("\n") for label in labels]
    for (epoch, value, name, colour), height in zip(labels, _spread(heights, sizes), strict=True):
        first, *rest = name.split("\n")
        axes.annotate(
            "\n".join([f"{first} {show(value)}", *rest]),
            xy=(epoch, value),
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 0},
            annotation_clip=False,
        )


def _spread(heights: list[float], sizes: list[float]) -> list[float]:
    """Pushes ascending heights apart, each as far as the other, until labels of these sizes fit into 0 to 1."""
    heights = list(heights)
    for _ in range(200):  # for the few labels of a panel it settles within some tens of rounds
        heights[0] = max(heights[0], sizes[0] / 2)
        heights[-1] = min(heights[-1], 1 - sizes[-1] / 2)
        for below, above in pairwise(range(len(heights))):
            overlap = (sizes[below] + sizes[above]) / 2 - (heights[above] - heights[below])
            if overlap > 0:
                heights[below] -= overlap / 2
                heights[above] += overlap / 2
    return heights


# ---------------------------------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------------------------------


def write_model_card(record: RunRecord, folder: str | os.PathLike) -> None:
    """
    Renders the card of a run to `README.md` in its folder. Shows `training_curves.png`, uses `example.png` and
    tells of `timm/` and `model.onnx` where the run left them there, so it comes last.

    Args:
        record (`RunRecord`)
        folder (`str` or `os.PathLike`): the run's.
    """
    folder = Path(folder)
    name = record.hub_model_id.rpartition("/")[2] if record.hub_model_id else folder_name(folder)
    rows = results(record)
    card = ModelCard.from_template(
        card_metadata(record, name),
        template_path=str(TEMPLATE),
        record=record,
        mode=record.mode,
        data=record.dataset,
        teacher=record.teacher,
        name=name,
        is_deit=record.architecture == "deit_ti",
        results=rows,
        accuracy=rows[0].accuracy if rows else None,
        interval=wilson_interval(rows[0].accuracy, record.dataset.num_eval_images) if rows else None,
        # max_steps may have ended the run before its num_train_epochs.
        epochs=record.metrics.get("epoch", record.hyperparameters.get("num_train_epochs")),
        has_reference=any(row.reference is not None for row in rows),
        equation=loss_equation(record.mode),
        untrained_head=untrained_head(record.mode),
        labels_in_training=labels_in_training(record.hyperparameters),
        dataset_link=dataset_link(record.dataset),
        label_list=label_list(record.dataset.label_names),
        has_curves=(folder / CURVES_FILE).is_file(),
        has_timm=(folder / "timm" / "config.json").is_file(),
        has_onnx=(folder / "model.onnx").is_file(),
        has_example=record.example_label is not None and (folder / EXAMPLE_FILE).is_file(),
        # As Python literals: what stands in a code block has to run.
        repo_literal=json.dumps(record.hub_model_id or "."),
        example_label_literal=json.dumps(clean(record.example_label or ""), ensure_ascii=False),
        command=clean(shlex.join(record.command)) if record.command else None,
        text=text,
        code=code,
        percent=percent,
        duration=duration,
    )
    card.save(folder / "README.md")


def card_metadata(record: RunRecord, name: str) -> ModelCardData:
    """The card's YAML block: what the Hub reads."""
    distilled = record.mode.has_teacher
    tags = ["vision", *(["deit", "vit"] if record.architecture == "deit_ti" else ["timm", record.architecture])]
    if distilled:
        tags += ["distillation", "knowledge-distillation"]
    dataset = record.dataset
    on_hub = dataset.source == "hub" and is_hub_id(dataset.name)
    # The Hub links a dataset's type to the dataset of that id, so it must not be the name of a folder.
    not_on_hub = "scikit-learn-digits" if dataset.source == "scikit-learn" else "imagefolder"
    evaluations = []
    for row in results(record):
        of_head = "" if row.predicts else f", {READOUT_NAMES[row.readout]}"
        evaluations.append(("Accuracy" + of_head, row.accuracy))
        if row.top5 is not None:
            evaluations.append(("Top-5 accuracy" + of_head, row.top5))
    metadata = ModelCardData(
        license=record.license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=tags,
        datasets=[dataset.name] if on_hub else None,
        metrics=["accuracy"] if evaluations else None,
        model_name=name if evaluations else None,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                task_name="Image Classification",
                dataset_type=dataset.name if on_hub else not_on_hub,
                dataset_name=clean(dataset.name),
                dataset_config=dataset.config_name,
                dataset_split=dataset.eval_split,
                metric_type="accuracy",
                metric_name=metric_name,
                metric_value=round(value, 6),
            )
            for metric_name, value in evaluations
        ]
        or None,
    )
    if record.base_model_on_hub and is_hub_id(record.base_model):
        metadata["base_model"] = record.base_model
        metadata["base_model_relation"] = "finetune"
    # The Hub's relations to a base model are adapter, finetune, merge and quantized. A teacher's is none of them.
    if distilled and record.teacher is not None and record.teacher.source == "hub" and is_hub_id(record.teacher.name):
        metadata["teacher"] = record.teacher.name
    return metadata


def is_hub_id(name: str | None) -> bool:
    """Whether the Hub could have a repository of that name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


# ---- Results ----


@dataclass
class ResultRow:
    """Accuracies of one read-out, 0 to 1. `reference` is the published re-implementation's."""

    readout: str
    name: str
    predicts: bool
    accuracy: float
    top5: float | None
    reference: float | None


def results(record: RunRecord) -> list[ResultRow]:
    """A row for each read-out that was evaluated, the predicting one first."""
    mode, metrics = record.mode, record.metrics
    readouts = [mode.readout]
    if len(mode.tokens) == 2:
        readouts += [readout for readout in ("both", "class", "distillation") if readout != mode.readout]
    rows = []
    for readout in readouts:
        predicts = readout == mode.readout
        key = "eval_accuracy" if predicts else f"eval_accuracy_{readout}"
        if key not in metrics:
            continue
        rows.append(
            ResultRow(
                readout=readout,
                name=READOUT_NAMES[readout] if record.architecture == "deit_ti" else record.architecture,
                predicts=predicts,
                accuracy=metrics[key],
                # With five labels or fewer every answer is among the first five.
                top5=metrics.get(f"{key}_top5") if len(record.dataset.label_names) > 5 else None,
                reference=seed_row(record, readout),
            )
        )
    return rows


def seed_row(record: RunRecord, readout: str) -> float | None:
    """The row of `SEED_CIFAR10` that a read-out stands beside; `None` where there is none."""
    mode = record.mode
    if not record.dataset.is_cifar10:
        return None
    if record.architecture != "deit_ti":
        return SEED_CIFAR10.get(record.architecture) if mode.name == "none" else None
    if mode.name in ("none", "soft", "hard"):
        return SEED_CIFAR10[mode.name]
    if readout == "both":
        return SEED_CIFAR10[f"both, {mode.teacher_targets} teacher"]
    return SEED_CIFAR10[readout]


def wilson_interval(accuracy: float, num_images: int) -> tuple[float, float]:
    """95 % interval of an accuracy that was measured on so many images (Wilson, 1927); right at 0 and 1 as well."""
    z = 1.96
    centre = accuracy + z**2 / (2 * num_images)
    half = z * math.sqrt(accuracy * (1 - accuracy) / num_images + (z / (2 * num_images)) ** 2)
    return max(0.0, (centre - half) / (1 + z**2 / num_images)), min(1.0, (centre + half) / (1 + z**2 / num_images))


# ---- How it was trained, in formulas and words ----


def loss_equation(mode: DistillMode) -> str:
    """The training loss of a mode with its numbers; heads and `teacher` are logits, `y` the labels."""
    on_labels = "CE(class, y)"
    if not mode.has_teacher:
        return f"loss = {on_labels}"
    head = "distillation" if "distillation" in mode.tokens else "class"
    if mode.teacher_targets == "hard":
        weight, on_teacher = mode.alpha, f"CE({head}, argmax teacher)"
    else:
        over_t = "" if mode.temperature == 1 else f" / {mode.temperature:g}"
        squared = "" if mode.temperature == 1 else f"{mode.temperature:g}^2 "
        weight, on_teacher = mode.alpha, f"{squared}KL(softmax(teacher{over_t}) || softmax({head}{over_t}))"
    if not mode.needs_labels:
        return f"loss = {on_teacher}"
    return f"loss = {1 - weight:g} {on_labels} + {weight:g} {on_teacher}"


def untrained_head(mode: DistillMode) -> str | None:
    """The head of a two-token student whose term has no weight, where alpha is 0 or 1."""
    if len(mode.tokens) < 2:
        return None
    if not mode.has_teacher:
        return "distillation"
    return None if mode.needs_labels else "class"


def labels_in_training(hyperparameters: dict) -> str:
    """What is done to the true labels before the student sees them."""
    done = []
    if hyperparameters.get("label_smoothing_factor"):
        done.append(f"smoothed by {hyperparameters['label_smoothing_factor']:g}")
    mixes = [name for key, name in (("mixup", "mixup"), ("cutmix", "CutMix")) if hyperparameters.get(key)]
    if mixes:
        done.append(f"mixed by {' and '.join(mixes)}")
    return " and ".join(done) or "as they are"


def dataset_link(dataset: DatasetRecord) -> str:
    """The dataset's name as markdown, with a link where the Hub has it."""
    if dataset.source == "hub" and is_hub_id(dataset.name):
        return f"[{text(dataset.name)}](https://huggingface.co/datasets/{dataset.name})"
    return text(dataset.name)


def label_list(names: list[str]) -> str:
    """The labels as markdown, in the order of their ids; of many only the first."""
    shown = ", ".join(text(name) for name in names[:MAX_LABELS_SHOWN])
    more = len(names) - MAX_LABELS_SHOWN
    return f"{shown} and {more:,} more" if more > 0 else shown


# ---- Text that is safe in markdown ----


def clean(value: object) -> str:
    """One line of printable text: a label may hold line breaks, control characters or halves of surrogate pairs."""
    joiners = "\u200c\u200d"  # not printable to Python, but emoji and some scripts need them
    line = "".join(character if character.isprintable() or character in joiners else " " for character in str(value))
    return " ".join(line.split())


def text(value: object) -> str:
    """Text that markdown, tables, HTML and formulas leave as it is."""
    line = clean(value) or "(blank)"
    # Entities, not backslashes: they mean nothing to any of the four. Nor does an underscore inside a word.
    return re.sub(r"[\\`*<>\[\]|~&${}!#]|(?<![^\W_])_|_(?![^\W_])", lambda found: f"&#{ord(found.group())};", line)


def code(value: object) -> str:
    """A value of the record as inline code, where it can be: a code span ends at a backtick, a table cell at a bar."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    line = clean(f"{value:g}" if isinstance(value, float) else value)
    return f"`{line}`" if line and not re.search(r"[`|]", line) else text(line)


def percent(value: float) -> str:
    """A fraction as a percentage."""
    return f"{100 * value:.2f} %"


def duration(seconds: float) -> str:
    """A time in the two units that matter."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.0f} s"


__all__ = [
    "DatasetRecord",
    "RunRecord",
    "TeacherRecord",
    "describe_hardware",
    "library_versions",
    "plot_training_curves",
    "write_model_card",
]

"""The model card of a run. The templates hold the prose; this module supplies numbers, formulas and metadata."""

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..classifiers import is_timm_architecture
from ..distillation import DistillMode
from .curves import CURVES_FILE
from .markdown import clean, code, duration, percent, text
from .record import RunRecord, folder_name
from .report import MAX_MATRIX_CLASSES, NUM_BINS, REPORT_FILE, confidence_interval
from .report_pictures import MISTAKES_FILE


TEMPLATE, REPORT_TEMPLATE = (Path(__file__).with_name(name) for name in ("template.md", "report.md"))
EXAMPLE_FILE = "example.png"  # and example_2.png, ...

# Top-1 of the published baseline, a student project's DeiT-Ti on CIFAR-10: 20 epochs, 224x224, one T4 GPU.
# Its token rows are named after their read-out; "class" and "distillation" are networks with only that token.
PUBLISHED_BASELINE = {
    "none": 0.6769,
    "soft": 0.6885,
    "hard": 0.4019,
    "distillation": 0.0807,
    "class": 0.6169,
    "both, soft teacher": 0.6919,
    "both, hard teacher": 0.4611,
    "resnet18": 0.8846,
}
NUM_WORST_CLASSES = 10  # listed if there are more than MAX_MATRIX_CLASSES
READOUT_NAMES = {"class": "class head", "distillation": "distillation head", "both": "both heads, mean of logits"}


@dataclass
class ResultRow:
    """Accuracies of one read-out, from 0 to 1. `baseline` is the published baseline's top-1."""

    name: str
    predicts: bool
    accuracy: float
    top5: float | None
    baseline: float | None


def example_files(folder: str | os.PathLike) -> list[Path]:
    """The example images that a run has saved to try its model on, each of a different class."""
    return sorted(Path(folder).glob("example*.png"))


def write_model_card(record: RunRecord, folder: str | os.PathLike) -> None:
    """Writes the card to `README.md` in the run's folder. Call it last: it only covers the files already there."""
    make_model_card(record, folder).save(Path(folder, "README.md"))


def make_model_card(record: RunRecord, folder: str | os.PathLike) -> ModelCard:
    """The card of the run in this folder, as far as the files there go."""
    folder = Path(folder)
    name = record.hub_model_id.rpartition("/")[2] if record.hub_model_id else folder_name(folder)
    rows = results(record)
    return ModelCard.from_template(
        card_metadata(record, name, rows),
        template_path=str(TEMPLATE),
        record=record,
        name=name,
        results=rows,
        interval=confidence_interval(rows[0].accuracy, record.dataset.num_eval_images),
        has_baseline=any(row.baseline is not None for row in rows),
        equation=loss_equation(record.mode, record.hyperparameters.get("class_weights") is not None),
        labels_in_training=labels_in_training(record.hyperparameters),
        is_timm=is_timm_architecture(record.architecture),
        has_curves=(folder / CURVES_FILE).is_file(),
        report=report_section(folder) if (folder / REPORT_FILE).is_file() else None,
        has_timm=(folder / "timm" / "config.json").is_file(),
        has_onnx=(folder / "transformers" / "onnx" / "model.onnx").is_file(),
        has_example=record.example_label is not None and (folder / EXAMPLE_FILE).is_file(),
        # As Python literals, so that the code blocks run.
        repo_literal=json.dumps(record.hub_model_id or "."),
        example_label_literal=json.dumps(clean(record.example_label), ensure_ascii=False),
        command=clean(shlex.join(record.command)) if record.command else None,
        text=text,
        code=code,
        percent=percent,
        duration=duration,
    )


def card_metadata(record: RunRecord, name: str, rows: list[ResultRow]) -> ModelCardData:
    """The card's YAML block, which the Hub reads."""
    mode, dataset, teacher = record.mode, record.dataset, record.teacher
    own = ["deit", "vit"] if record.architecture == "deit_ti" else [record.architecture]
    tags = ["vision", *(["timm"] if is_timm_architecture(record.architecture) else []), *own]
    # The Hub links a dataset's type to the dataset with that id, so it must not be the name of a local folder.
    dataset_type = {"hub": dataset.name, "local": "imagefolder", "scikit-learn": "scikit-learn-digits"}[dataset.source]
    evaluations = [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=dataset_type,
            dataset_name=clean(dataset.name),
            dataset_config=dataset.config_name,
            dataset_split=dataset.eval_split,
            metric_type="accuracy",
            metric_name=metric_name if row.predicts else f"{metric_name}, {row.name}",
            metric_value=round(value, 6),
        )
        for row in rows
        for metric_name, value in (("Accuracy", row.accuracy), ("Top-5 accuracy", row.top5))
        if value is not None
    ]
    metadata = ModelCardData(
        license=record.license,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=tags + (["distillation", "knowledge-distillation"] if mode.has_teacher else []),
        datasets=[dataset.name] if dataset.source == "hub" else None,
        metrics=["accuracy"],
        model_name=name,
        eval_results=evaluations,
    )
    if record.base_model_on_hub:
        metadata["base_model"], metadata["base_model_relation"] = record.base_model, "finetune"
    # Not a base model: the Hub's relations are adapter, finetune, merge and quantized, and a student is none of these.
    if mode.has_teacher and teacher.source == "hub":
        metadata["teacher"] = teacher.name
    return metadata


# ---- Results ----


def results(record: RunRecord) -> list[ResultRow]:
    """One row per read-out, the one that predicts first."""
    mode, metrics = record.mode, record.metrics
    keys = {mode.readout: "eval_accuracy"}
    if len(mode.tokens) == 2:
        keys |= {name: f"eval_accuracy_{name}" for name in ("both", "class", "distillation") if name != mode.readout}
    return [
        ResultRow(
            name=READOUT_NAMES[readout] if record.architecture == "deit_ti" else record.architecture,
            predicts=readout == mode.readout,
            accuracy=metrics[key],
            # With five labels or fewer, top-5 accuracy is always 1.
            top5=metrics[f"{key}_top5"] if len(record.dataset.label_names) > 5 else None,
            baseline=baseline_row(record, readout),
        )
        for readout, key in keys.items()
    ]


def baseline_row(record: RunRecord, readout: str) -> float | None:
    """The top-1 in `PUBLISHED_BASELINE` that corresponds to a read-out, if any."""
    mode = record.mode
    if not record.dataset.is_cifar10:
        return None
    if record.architecture != "deit_ti":
        return PUBLISHED_BASELINE.get(record.architecture) if mode.name == "none" else None
    if mode.teacher_targets == "standardized":
        return None
    if mode.name in ("none", "soft", "hard"):
        return PUBLISHED_BASELINE[mode.name]
    return PUBLISHED_BASELINE.get(f"both, {mode.teacher_targets} teacher" if readout == "both" else readout)


def report_section(folder: str | os.PathLike) -> str:
    """A summary of the report in the folder, as Markdown."""
    folder = Path(folder)
    report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    classes = report["classes"]
    if len(classes) > MAX_MATRIX_CLASSES:
        with_images = [row for row in classes if row["num_images"]]
        classes = sorted(with_images, key=lambda row: row["f1"])[:NUM_WORST_CLASSES]
    return jinja2.Template(REPORT_TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        classes=classes,
        num_bins=NUM_BINS,
        has_mistakes=(folder / MISTAKES_FILE).is_file(),
        text=text,
        percent=percent,
    )


# ---- How it was trained ----


def loss_equation(mode: DistillMode, has_class_weights: bool = False) -> str:
    """The training loss of a mode, with its alpha and temperature filled in. `class`, `distillation` and `teacher` are
    logits, `y` labels, `w` class weights; `z` standardises logits."""
    label_term = "w(y) CE(class, y)" if has_class_weights else "CE(class, y)"
    if not mode.has_teacher:
        return f"loss = {label_term}"
    teacher, head = "teacher", "distillation" if "distillation" in mode.tokens else "class"
    if mode.teacher_targets == "standardized":
        teacher, head = f"z({teacher})", f"z({head})"
    if mode.teacher_targets == "hard":
        teacher_term = f"CE({head}, argmax teacher)"
    elif mode.temperature == 1:
        teacher_term = f"KL(softmax({teacher}) || softmax({head}))"
    else:
        t = f"{mode.temperature:g}"
        teacher_term = f"{t}^2 KL(softmax({teacher} / {t}) || softmax({head} / {t}))"
    if not mode.needs_labels:
        return f"loss = {teacher_term}"
    return f"loss = {1 - mode.alpha:g} {label_term} + {mode.alpha:g} {teacher_term}"


def labels_in_training(hyperparameters: dict) -> str:
    """What happens to the true labels before the student sees them."""
    smoothing = hyperparameters.get("label_smoothing_factor")
    mixing = [name for key, name in (("mixup", "mixup"), ("cutmix", "CutMix")) if hyperparameters.get(key)]
    steps = [f"smoothed by {smoothing:g}"] if smoothing else []
    steps += [f"mixed by {' and '.join(mixing)}"] if mixing else []
    return " and ".join(steps) or "unchanged"

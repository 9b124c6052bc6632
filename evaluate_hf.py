"""Reports how good an image classifier is on a dataset, or whether another one is better.

    python evaluate_hf.py MODEL --dataset_name DATA
    python evaluate_hf.py MODEL OTHER_MODEL --dataset_name DATA

A MODEL is the folder of a run, another folder or Hub id that transformers can load, or a timm architecture, whose
pretrained weights then come from the Hub. The report is the one that train_hf.py writes at the end of a run.
Exit code 0: success; 1: the disk is full; 2: nothing was done, and stderr says why.
"""

import argparse
import dataclasses
import functools
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BaseImageProcessor

from modeling_deit_ti.arguments import ImageArguments, check_at_least
from modeling_deit_ti.card import (
    REPORT_FILE,
    Predictions,
    Report,
    compare,
    confidence_interval,
    display_names,
    draw_report,
    make_report,
    report_section,
    scale_temperature,
    verdict,
)
from modeling_deit_ti.card.markdown import percent, text
from modeling_deit_ti.classifiers import label_names
from modeling_deit_ti.data import EvaluationData, load_evaluation_images
from modeling_deit_ti.data.decoding import read_image
from modeling_deit_ti.device import autocast
from modeling_deit_ti.errors import UserError, check_writable, exit_code, list_some, storing
from modeling_deit_ti.prediction import (
    add_prediction_flags,
    chosen_precision,
    load_for_prediction,
    reporting_image_errors,
)
from modeling_deit_ti.teacher import match_labels


REPORT_TEXT_FILE = "report.md"
COMPARISON_FILE = "comparison.json"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="evaluate_hf.py", description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL", help="folder of a run, Hub id, or timm architecture")
    parser.add_argument(
        "other", metavar="OTHER_MODEL", nargs="?", help="a second model, to compare on the same images"
    )
    images = parser.add_argument_group("images", "as in train_hf.py; by default those that a run evaluates on")
    images.add_argument("--dataset_name", required=True, help="a Hub id, a local folder, or `digits`")
    images.add_argument("--dataset_config_name", help="the dataset's configuration")
    images.add_argument("--split", help="another split of the dataset, such as train")
    images.add_argument("--image_column_name", help="image column (default: the first that holds images)")
    images.add_argument(
        "--label_column_name", help="label column (default: the first that holds class labels, or `label`)"
    )
    images.add_argument("--train_val_split", type=float, default=0.1, help="share held out if there is no other split")
    images.add_argument("--validation_from_train", action="store_true", help="hold it out even if there is one")
    images.add_argument("--max_eval_samples", type=int, help="evaluate on a random subset of this size")
    parser.add_argument("--output_dir", type=Path, help="default: outputs/reports/<models>-<dataset>")
    parser.add_argument(
        "--temperature_scaling",
        action="store_true",
        help="fit a temperature on half of the images, and measure the calibration with it on the other half",
    )
    parser.add_argument(
        "--thumbnails", action="store_true", help="also show mistakes from a local folder, whose images may be private"
    )
    parser.add_argument("--num_workers", type=int, default=0, help="processes that prepare images (default: none)")
    add_prediction_flags(parser)
    return parser.parse_args(arguments)


def prepare_batch(rows: list[dict], image_processor: BaseImageProcessor) -> torch.Tensor:
    """`pixel_values` `(B, 3, height, width)` of rows of [`EvaluationData`]."""
    return image_processor(images=[read_image(row) for row in rows], return_tensors="pt")["pixel_values"]


@torch.no_grad()
def predict(name: str, flag: str, data: EvaluationData, options: argparse.Namespace) -> tuple[Predictions, list[str]]:
    """
    The predictions of the model `name`, which the user gave as `flag`, for the images; and the names of their label
    ids: the dataset's, followed by any that only the model knows. Predicting one of the latter is always wrong.

    Raises:
        UserError: if the model cannot be loaded, lacks a label, or does not accept the images.
    """
    model, image_processor = load_for_prediction(name, flag, options.trust_remote_code, options.device)
    known = label_names(model.config)
    order = match_labels(known, data.label_names, f"{flag} {name}")
    if order is None:
        raise UserError(
            f"{flag} {name}: it does not know all labels of {options.dataset_name}. It knows {list_some(known)}; the "
            f"dataset has {list_some(data.label_names)}."
        )
    others = sorted(set(range(len(known))) - set(order))
    precision = chosen_precision(options.precision, model)
    prepare = functools.partial(prepare_batch, image_processor=image_processor)
    loader = DataLoader(data.images, options.batch_size, num_workers=options.num_workers, collate_fn=prepare)
    predicted, confidence, kept = [], [], []
    progress = tqdm(total=len(data.images), unit="image", desc=display_names([name])[0], disable=None)
    with reporting_image_errors(f"{flag} {name}"), progress:
        for pixel_values in loader:
            with autocast(model.device, precision):
                logits = model(pixel_values=pixel_values.to(model.device, model.dtype)).logits
            logits = logits.float()[:, order + others]
            best = logits.softmax(dim=-1).max(dim=-1)
            predicted.append(best.indices.cpu())
            confidence.append(best.values.cpu())
            if options.temperature_scaling:
                kept.append(logits.cpu())
            progress.update(len(pixel_values))
    predictions = Predictions(
        labels=np.asarray(data.images["label"][:]),
        predicted=torch.cat(predicted).numpy(),
        confidence=torch.cat(confidence).numpy(),
        logits=torch.cat(kept).numpy() if kept else None,
    )
    return predictions, data.label_names + [known[label] for label in others]


def write_report(report: Report, data: EvaluationData, folder: Path, thumbnails: bool) -> None:
    """Writes one model's report, with pictures of its mistakes only if they may be shown."""
    folder.mkdir(parents=True, exist_ok=True)
    report.save(folder)
    may_show = thumbnails or data.source != "local"
    draw_report(report, folder, (lambda row: read_image(data.images[row])) if may_show else None)
    low, high = confidence_interval(report.accuracy, report.num_images)
    accuracy = f"Accuracy: **{percent(report.accuracy)}** (95 % interval {percent(low)} to {percent(high)})."
    unasked = len(report.classes) - len(data.label_names)
    if unasked:
        accuracy += f" The model knows {unasked:,} labels that the dataset lacks; predicting one counts as wrong."
    heading = f"# {text(report.model)} on {text(report.dataset)}, split {text(report.split)}"
    content = "\n\n".join([heading, accuracy, report_section(folder)])
    (folder / REPORT_TEXT_FILE).write_text(content + "\n", encoding="utf-8")


def print_reports(reports: list[Report]) -> None:
    """Prints a table with one row per model."""
    rows = [["", "accuracy", "95 % interval", "mean recall", "mean F1", "calibration error"]]
    for report in reports:
        low, high = confidence_interval(report.accuracy, report.num_images)
        scores = report.balanced_accuracy, report.macro_f1, report.calibration.expected_calibration_error
        interval = f"{low:.2%} to {high:.2%}"
        rows.append([report.model, f"{report.accuracy:.2%}", interval, *(f"{score:.2%}" for score in scores)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for model, *cells in rows:
        print(
            model.ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)),
            sep="  ",
        )


def print_comparison(comparison: dict) -> None:
    rows = [
        ("both are right", "both_right"),
        (f"only {comparison['first']} is right", "only_first_right"),
        (f"only {comparison['second']} is right", "only_second_right"),
        ("neither is right", "neither_right"),
        ("  with the same wrong label", "same_wrong_label"),
    ]
    width = max(len(row) for row, _ in rows) + 2
    print("", *(f"{row:{width}}{comparison[key]:>9,}" for row, key in rows), sep="\n")
    print(f"\n{comparison['verdict']}")
    print("(This is about these two models. To compare the methods behind them, train each with several seeds.)")


def run(options: argparse.Namespace) -> None:
    """Evaluates and writes the reports. Raises a `UserError`, or a `StorageError` if the disk is full."""
    check_at_least(options, batch_size=1, num_workers=0)
    names = {"MODEL": options.model} | ({"OTHER_MODEL": options.other} if options.other else {})
    called, (dataset,) = display_names(list(names.values())), display_names([options.dataset_name])
    folder = options.output_dir or Path("outputs", "reports", re.sub(r"[^\w.-]+", "-", "-".join([*called, dataset])))
    for file in (REPORT_FILE, COMPARISON_FILE):
        if (folder / file).exists():
            raise UserError(
                f"--output_dir {folder}: it already holds a report; choose another folder, or delete this one."
            )
    check_writable("--output_dir", folder)

    fields = {field.name for field in dataclasses.fields(ImageArguments)}
    images = ImageArguments(**{name: value for name, value in vars(options).items() if name in fields})
    data = load_evaluation_images(images, options.split)
    answers = [predict(name, flag, data, options) for flag, name in names.items()]
    reports = [
        make_report(
            predictions, label_names, model, dataset, data.split, temperature_scaling=scale_temperature(predictions)
        )
        for model, (predictions, label_names) in zip(called, answers, strict=True)
    ]
    with storing(folder, f"Make room, delete {folder}, then run the same command again."):
        folders = [folder] if len(reports) == 1 else [folder / "first", folder / "second"]
        for report, its_folder in zip(reports, folders, strict=True):
            write_report(report, data, its_folder, options.thumbnails)
        print_reports(reports)
        if len(reports) == 2:
            # By name: each model may have its own extra labels.
            labels = np.array(data.label_names, dtype=object)[answers[0][0].labels]
            said = [np.array(names, dtype=object)[predictions.predicted] for predictions, names in answers]
            comparison = {
                "first": called[0],
                "second": called[1],
                "dataset": dataset,
                "split": data.split,
                "num_images": len(labels),
                **compare(labels, *said),
            }
            comparison["verdict"] = verdict(comparison, *called)
            content = json.dumps(comparison, indent=2, ensure_ascii=False)
            (folder / COMPARISON_FILE).write_text(content + "\n", encoding="utf-8")
            print_comparison(comparison)
    print(f"\nThe report is in {folder}" + (", each model's in first/ and second/" if len(reports) == 2 else ""))


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return exit_code("evaluate_hf.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

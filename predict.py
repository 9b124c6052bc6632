"""Labels images: `python predict.py MODEL IMAGES_OR_FOLDERS...`

MODEL is any image classifier: the folder of a run, another folder or Hub id that transformers can load, or a timm
architecture, whose pretrained weights then come from the Hub.
Exit code 0: success; 1: some images could not be read and were skipped, or the disk is full; 2: nothing was done.
What went wrong is on stderr.
"""

import argparse
import csv
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path


gc.disable()  # imports create no garbage, and looking for it takes a fifth of their time

import torch
from PIL import Image
from tqdm import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from modeling_deit_ti.arguments import check_at_least
from modeling_deit_ti.data.decoding import decode_image
from modeling_deit_ti.device import autocast
from modeling_deit_ti.errors import UserError, exit_code, storing
from modeling_deit_ti.prediction import (
    add_prediction_flags,
    chosen_precision,
    head_logits,
    load_for_prediction,
    reporting_image_errors,
)


gc.enable()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="predict.py", description="Labels images.")
    parser.add_argument("model", metavar="MODEL", help="folder of a run, Hub id, or timm architecture")
    parser.add_argument(
        "images", metavar="IMAGE_OR_FOLDER", nargs="+", type=Path, help="folders are searched recursively"
    )
    parser.add_argument("--top_k", type=int, default=3, help="labels to list for each head (default: 3)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a new .csv or .json file instead of a table")
    add_prediction_flags(parser)
    return parser.parse_args(arguments)


def find_images(paths: list[Path]) -> list[Path]:
    """The files among the paths, and the image files in the folders among them, in alphabetical order."""
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
    files = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
            if not found:
                raise UserError(f"There are no images in the folder {path}.")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"There is no file or folder {path}.")
    return list(dict.fromkeys(files))


def read_images(files: list[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """The images that can be read, upright and in RGB; the others are reported on stderr."""
    for file in files:
        try:
            yield file, decode_image({"bytes": None, "path": file})
        except Exception as error:  # PIL's decoders may raise anything on a broken file
            tqdm.write(f"skipped {file}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)


@torch.no_grad()
def predict_batch(
    model: PreTrainedModel, image_processor: BaseImageProcessor, images: list[Image.Image], top_k: int, precision: str
) -> list[dict]:
    """
    For each image, the model's `prediction` with its `score`, and `heads`: for each head, a list of the `top_k` labels
    with their softmax scores, best first.
    """
    pixel_values = image_processor(images=images, return_tensors="pt")["pixel_values"]
    with autocast(model.device, precision):
        output = model(pixel_values=pixel_values.to(model.device, model.dtype))
    logits = {"prediction": output.logits, **head_logits(output, getattr(model.config, "readout", None))}
    stacked = torch.stack(list(logits.values()), dim=1).float()  # (B, heads, K)
    scores, labels = stacked.softmax(dim=-1).topk(min(top_k, stacked.shape[-1]))
    id2label, predictions = model.config.id2label, []
    # Moved to the host once per batch, not per image and head: each transfer waits for the device.
    for image_labels, image_scores in zip(labels.tolist(), scores.tolist(), strict=True):
        heads = {
            head: [{"label": id2label[label], "score": round(score, 6)} for label, score in zip(*best, strict=True)]
            for head, *best in zip(logits, image_labels, image_scores, strict=True)
        }
        first = heads.pop("prediction")[0]
        predictions.append({"prediction": first["label"], "score": first["score"], "heads": heads})
    return predictions


def predict(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    files: list[Path],
    top_k: int,
    batch_size: int,
    precision: str,
) -> list[dict]:
    """For each image, its `file` and the result of [`predict_batch`]. Files that cannot be read are left out."""
    predictions = []
    with tqdm(total=len(files), unit="image", desc="Predicting", disable=None) as progress:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            images = dict(read_images(batch))
            if images:
                with reporting_image_errors("MODEL"):
                    found = predict_batch(model, image_processor, list(images.values()), top_k, precision)
                # A name need not be valid UTF-8, but the output is.
                names = [os.fsencode(file).decode(errors="backslashreplace") for file in images]
                predictions += [{"file": name, **row} for name, row in zip(names, found, strict=True)]
            progress.update(len(batch))
    return predictions


def print_table(predictions: list[dict]) -> None:
    """Prints one row per image, with the labels and scores of each head."""
    heads = list(predictions[0]["heads"])
    rows = [["file", "prediction", *heads]]
    for prediction in predictions:
        guesses = [prediction["heads"][head] for head in heads]
        cells = [", ".join(f"{guess['label']} {guess['score']:.1%}" for guess in cell) for cell in guesses]
        rows.append([prediction["file"], prediction["prediction"], *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in [rows[0], ["-" * width for width in widths], *rows[1:]]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def write_csv(predictions: list[dict], file: Path) -> None:
    """One row per image, with columns `HEAD_RANK` and `HEAD_RANK_score` for each head's labels."""
    rows = []
    for prediction in predictions:
        row = {key: value for key, value in prediction.items() if key != "heads"}
        for head, guesses in prediction["heads"].items():
            for rank, guess in enumerate(guesses, start=1):
                row |= {f"{head}_{rank}": guess["label"], f"{head}_{rank}_score": guess["score"]}
        rows.append(row)
    with open(file, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]) if rows else ["file", "prediction", "score"])
        writer.writeheader()
        writer.writerows(rows)


def write(predictions: list[dict], file: Path) -> None:
    """Writes them as CSV or JSON, as the file's name says, or leaves no file. Raises a `StorageError`."""
    try:
        with storing(file, "Make room, then run the same command again."):
            if file.suffix.lower() == ".csv":
                write_csv(predictions, file)
            else:
                file.write_text(json.dumps(predictions, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def run(options: argparse.Namespace) -> int:
    """Predicts, prints or writes the result, and returns the exit code. Raises a `UserError` or a `StorageError`."""
    output = options.output
    check_at_least(options, top_k=1, batch_size=1)
    if output is not None:
        if output.suffix.lower() not in (".csv", ".json"):
            raise UserError(f"--output {output}: the file name must end in .csv or .json.")
        if output.exists():
            raise UserError(f"--output {output} already exists: move it, or choose another file.")
        if not output.parent.is_dir():
            raise UserError(f"--output {output}: there is no folder {output.parent}.")
    files = find_images(options.images)
    model, image_processor = load_for_prediction(options.model, "MODEL", options.trust_remote_code, options.device)
    precision = chosen_precision(options.precision, model)
    predictions = predict(model, image_processor, files, options.top_k, options.batch_size, precision)
    if output is None:
        if predictions:
            print_table(predictions)
    else:
        write(predictions, output)
    if skipped := len(files) - len(predictions):
        print(f"predict.py: {skipped} of the images could not be read and were skipped.", file=sys.stderr)
    return 1 if skipped else 0


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return exit_code("predict.py", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

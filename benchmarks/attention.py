"""Measures whether models of the digits attend to the strokes: docs/attention.md and docs/attention.png.

    OMP_NUM_THREADS=1 python benchmarks/attention.py RUN...

Each RUN is the folder of a model of the digits, with a grid of patches that divides their 8x8 pixels evenly. The
picture shows all maps of the last one, and one of each other.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image

from benchmarks.report import render
from modeling_deit_ti.arguments import ImageArguments
from modeling_deit_ti.attention import attention_maps, learned_tokens, network_view, overlay
from modeling_deit_ti.card import RunRecord
from modeling_deit_ti.data import load_images
from modeling_deit_ti.data.decoding import read_image
from modeling_deit_ti.prediction import load_for_prediction


DOCS = Path(__file__).resolve().parents[1] / "docs"
SHOWN = 6  # digits in the picture
BLOCKS = {"all blocks": slice(None), "last block": slice(-1, None)}


def places(pictures: list[Image.Image]) -> dict[str, np.ndarray]:
    """Masks, (B, 8, 8), of the strokes (brighter than half), the border (outermost, without strokes) and the rest."""
    strokes = np.stack([np.asarray(picture.convert("L")) for picture in pictures]) > 127
    ring = np.ones(strokes.shape[1:], dtype=bool)
    ring[1:-1, 1:-1] = False
    return {"strokes": strokes, "border": ring & ~strokes, "rest": ~ring & ~strokes}


@torch.no_grad()
def look(model: torch.nn.Module, pixel_values: torch.Tensor) -> dict[tuple[str, str], np.ndarray]:
    """Attention as a multiple of an even share, (B, rows, columns), by blocks and token."""
    model.set_attn_implementation("eager")
    attentions = model.eval()(pixel_values=pixel_values, output_attentions=True).attentions
    maps = {}
    for name, blocks in BLOCKS.items():
        for token, shares in attention_maps(attentions[blocks], learned_tokens(model)).items():
            maps[name, token] = (shares * shares[0].numel()).numpy()
    return maps


def measure(maps: np.ndarray, where: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean attention to the pixels in each place, and the share of pictures whose strokes get more than the border."""
    scale = next(iter(where.values())).shape[-1] // maps.shape[-1]
    pixels = maps.repeat(scale, axis=1).repeat(scale, axis=2)
    means = {place: float(pixels[inside].mean()) for place, inside in where.items()}
    pairs = [
        picture[strokes].mean() > picture[border].mean()
        for picture, strokes, border in zip(pixels, where["strokes"], where["border"], strict=True)
        if strokes.any() and border.any()
    ]
    return {**means, "pictures": float(np.mean(pairs))}


def draw(pictures: list[Image.Image], rows: list[tuple[str, np.ndarray]], file: Path) -> None:
    """Draws the pictures, and below them one row of maps per title."""
    figure, axes = plt.subplots(len(rows) + 1, SHOWN, figsize=(SHOWN + 1.5, len(rows) + 1))
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for row, (title, maps) in enumerate([("", None), *rows]):
        axes[row, 0].set_ylabel(title, rotation=0, ha="right", va="center", labelpad=8)
        for column, picture in enumerate(pictures):
            if maps is not None:
                values = torch.from_numpy(maps[column])
                picture = overlay(picture, (values - values.min()) / (values.max() - values.min()), "viridis")
            axes[row, column].imshow(picture)
    figure.tight_layout(pad=0.3)
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", metavar="RUN", nargs="+")
    runs = parser.parse_args().runs
    matplotlib.use("Agg")
    split = load_images(ImageArguments(dataset_name="digits")).evaluation
    pictures = [read_image(split[row]) for row in range(len(split))]
    where, table, drawn, untrained = places(pictures), [], [], []
    for run in runs:
        model, processor = load_for_prediction(run, "RUN")
        pixel_values = processor(images=pictures, return_tensors="pt")["pixel_values"]
        record, patch = RunRecord.load(run), model.config.patch_size
        about = {"patch": patch, "mode": record.mode.name, "accuracy": record.metrics["eval_accuracy"]}
        for (blocks, token), maps in look(model, pixel_values).items():
            table.append({**about, "blocks": blocks, "token": token, **measure(maps, where)})
            if run == runs[-1] or (blocks == "all blocks" and token == model.config.tokens[0]):
                drawn.append((f"{record.mode.name}, {patch} pixels\n{token} token\n{blocks}", maps))
        torch.manual_seed(0)
        for maps in look(type(model)(model.config), pixel_values).values():
            untrained += [measure(maps, where)[place] for place in where]
    draw([network_view(picture, processor, 128) for picture in pictures[:SHOWN]], drawn, DOCS / "attention.png")
    noise = max(abs(share - 1) for share in untrained)
    text = render("attention.md", rows=table, num_images=len(pictures), noise=noise)
    (DOCS / "attention.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Peak memory and disk space of one training epoch on datasets of three sizes, with and without streaming.

    OMP_NUM_THREADS=1 python benchmarks/streaming_memory.py

Writes results/streaming_memory.json and .md. The images are noise. The student is tiny, since reading is the point.
Each case runs in its own process, which reads every image once.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image

from benchmarks.report import render
from benchmarks.setting import describe_machine, run_in_subprocess
from benchmarks.step_clock import host_bytes
from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.data import load_images
from modeling_deit_ti.data.inputs import make_image_processor
from modeling_deit_ti.parsing import parse_arguments
from modeling_deit_ti.runs import build_trainer


SIZES = (2_000, 8_000, 32_000)
BATCH_SIZE = 250
BUFFER_SIZE = 1_000
RESULTS = Path(__file__).resolve().parents[1] / "results"
FLAGS = f"""
    --shuffle_buffer_size {BUFFER_SIZE} --image_size 32 --patch_size 32 --per_device_train_batch_size {BATCH_SIZE}
    --crop none --horizontal_flip 0 --auto_augment none --random_erasing 0 --repeated_augmentation 1
    --num_train_epochs 1 --save_strategy no --eval_strategy no --report_to none --disable_tqdm True
"""


def write_images(folder: Path, num_images: int) -> None:
    """Training images in files of 10,000, and 100 to evaluate on."""
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    starts = range(0, num_images, 10_000)
    files = {f"train-{start:06}": range(start, min(start + 10_000, num_images)) for start in starts}
    for name, numbers in {**files, "test-000000": range(100)}.items():
        images = [np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8) for seed in numbers]
        rows = {"image": images, "label": [seed % 2 for seed in numbers]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet", batch_size=500)


class PeakAnonymousMemory(threading.Thread):
    """Peak of the memory that the system cannot reclaim."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.done = 0, threading.Event()

    def run(self):
        while not self.done.wait(0.05):
            self.peak = max(self.peak, host_bytes("RssAnon"))


def size_of(folder: str | Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob(pattern) if path.is_file())


def train(folder: str, streaming: bool) -> dict:
    """What one epoch used in this process."""
    imported = host_bytes("VmRSS")
    memory = PeakAnonymousMemory()
    memory.start()
    with tempfile.TemporaryDirectory() as output_dir:
        flags = [f"--dataset_name={folder}", f"--streaming={streaming}", f"--output_dir={output_dir}"]
        args = parse_arguments([*flags, *FLAGS.split()])
        data = load_images(args.images)
        config = DeiTTiConfig(image_size=32, patch_size=32, num_labels=2, num_hidden_layers=1)
        network = DeiTTiForImageClassification(config)
        trainer = build_trainer(args, data, network, make_image_processor(args.model, args.augmentation))
        seconds = trainer.train().metrics["train_runtime"]
    memory.done.set()
    return {
        "images_read": trainer.state.global_step * BATCH_SIZE,
        "imported_rss": imported,
        "peak_rss": host_bytes("VmHWM"),
        "peak_anonymous": memory.peak,
        "cache_on_disk": size_of(os.environ["HF_HOME"]),
        "train_seconds": seconds,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # --help
    rows = []
    for num_images in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), num_images)
            parquet_bytes = size_of(folder, "train-*")
            for streaming in (True, False):
                rows.append({"images": num_images, "parquet_bytes": parquet_bytes, "streaming": streaming})
                with tempfile.TemporaryDirectory() as cache:
                    environment = {"HF_HOME": cache, "HF_HUB_OFFLINE": "1"}
                    rows[-1] |= run_in_subprocess(train, folder, streaming, environment=environment)
                print(rows[-1], flush=True)
    settings = {"threads": torch.get_num_threads(), "shuffle_buffer_size": BUFFER_SIZE, "dataloader_num_workers": 0}
    result = {**describe_machine("cpu", "pyarrow"), **settings, "rows": rows}
    (RESULTS / "streaming_memory.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "streaming_memory.md").write_text(render("streaming_memory.md", result=result, batch_size=BATCH_SIZE))


if __name__ == "__main__":
    main()

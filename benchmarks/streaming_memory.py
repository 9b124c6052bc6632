"""Peak memory and disk of one training epoch at three sizes of dataset, streamed and not.

    OMP_NUM_THREADS=1 python benchmarks/streaming_memory.py

Writes results/streaming_memory.json and .md. The images are noise of 32x32 pixels as PNG, in Parquet files of 10,000
rows with row groups of 500. The student is as small as it gets, since reading is the point. Each case is a process of
its own, which reads every image once.
"""

import argparse
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
SIZES = (2_000, 8_000, 32_000)
BUFFER_SIZE = 1_000
MIB = 2**20


def write_images(folder: Path, num_images: int) -> None:
    import numpy as np
    from datasets import ClassLabel, Dataset, Features, Image
    from PIL import Image as PILImage

    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})

    def encoded(seed: int) -> dict:
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        PILImage.fromarray(pixels).save(file, "PNG", compress_level=0)
        return {"bytes": file.getvalue(), "path": None}

    def write(name: str, numbers: range) -> None:
        rows = {"image": [encoded(number) for number in numbers], "label": [number % 2 for number in numbers]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / name, batch_size=500)

    for start in range(0, num_images, 10_000):
        write(f"train-{start:06}.parquet", range(start, min(start + 10_000, num_images)))
    write("test-000000.parquet", range(100))


class PeakAnonymousMemory(threading.Thread):
    """Peak of the memory that the system cannot drop: without the pages of mapped files, which it can."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.done = 0, threading.Event()

    def run(self):
        while not self.done.wait(0.05):
            status = Path("/proc/self/status").read_text()
            self.peak = max(self.peak, 1024 * int(status.split("RssAnon:")[1].split()[0]))


def train(folder: str, streaming: bool) -> None:
    """Trains for one epoch in this process and prints what it took, as JSON."""
    sys.path.insert(0, str(REPOSITORY))
    from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
    from modeling_deit_ti.data import DataArguments, EvalImages, load_images, make_image_processor, make_train_images
    from modeling_deit_ti.streaming import load_streamed_images
    from modeling_deit_ti.trainer import DistillationTrainer, DistillationTrainingArguments

    memory = PeakAnonymousMemory()
    memory.start()
    imported = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data_args = DataArguments(
        dataset_name=folder,
        streaming=streaming,
        shuffle_buffer_size=BUFFER_SIZE,
        crop="none",
        horizontal_flip=0,
        auto_augment="none",
        random_erasing=0,
    )
    data = (load_streamed_images if streaming else load_images)(data_args)
    processor = make_image_processor(data_args, 32)
    train_images, augment = make_train_images(data.train, data_args, processor)
    with tempfile.TemporaryDirectory() as output_dir:
        args = DistillationTrainingArguments(
            output_dir=output_dir,
            per_device_train_batch_size=250,
            num_train_epochs=1,
            repeated_augmentation=1,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        config = DeiTTiConfig(image_size=32, patch_size=32, num_labels=2, num_hidden_layers=1, **args.mode.network)
        trainer = DistillationTrainer(
            model=DeiTTiForImageClassification(config),
            args=args,
            augment=augment,
            train_dataset=train_images,
            eval_dataset=EvalImages(data.evaluation, processor),
            processing_class=processor,
        )
        seconds = trainer.train().metrics["train_runtime"]
    memory.done.set()
    cache = Path(os.environ["HF_HOME"])
    print(
        json.dumps(
            {
                "images_read": trainer.state.global_step * 250,
                "imported_rss": imported,
                "peak_rss": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                "peak_anonymous": memory.peak,
                "cache_on_disk": sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()),
                "train_seconds": seconds,
            }
        )
    )


def main() -> None:
    import accelerate
    import datasets
    import pyarrow
    import torch
    import transformers

    rows = []
    for num_images in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            write_images(Path(folder), num_images)
            size = sum(path.stat().st_size for path in Path(folder).glob("train-*"))
            for streaming in (True, False):
                with tempfile.TemporaryDirectory() as cache:
                    result = subprocess.run(
                        [sys.executable, __file__, "--train", folder, *(["--streaming"] if streaming else [])],
                        env={**os.environ, "HF_HOME": cache, "HF_HUB_OFFLINE": "1"},
                        stdout=subprocess.PIPE,
                        text=True,
                        check=True,
                    )
                rows.append({"images": num_images, "parquet_bytes": size, "streaming": streaming})
                rows[-1] |= json.loads(result.stdout.splitlines()[-1])
                print(rows[-1], flush=True)
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets, accelerate, pyarrow)}
    facts = {
        "device": f"CPU, {cpu}, {torch.get_num_threads()} thread(s)",
        "python": platform.python_version(),
        "versions": versions,
        "shuffle_buffer_size": BUFFER_SIZE,
        "dataloader_num_workers": 0,
    }
    results = REPOSITORY / "results"
    results.mkdir(exist_ok=True)
    (results / "streaming_memory.json").write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")
    (results / "streaming_memory.md").write_text(markdown(facts, rows))


def markdown(facts: dict, rows: list[dict]) -> str:
    lines = [
        "# Memory of a streamed epoch",
        "",
        "One epoch that reads every image once, in a process of its own: noise of 32x32 pixels as PNG, in Parquet",
        "files of 10,000 rows with row groups of 500; batches of 250; `--shuffle_buffer_size "
        f"{facts['shuffle_buffer_size']}`; no workers.",
        "`peak RSS` is the whole process with the libraries; of it, `anonymous` is what the system cannot drop,",
        "without the pages of mapped files. `cache` is what lies in `HF_HOME` after it.",
        "",
        "| images | Parquet, MiB | `--streaming` | images read | RSS after imports, MiB | peak RSS, MiB "
        "| peak anonymous, MiB | cache, MiB | training, s |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['images']:,} | {row['parquet_bytes'] / MIB:,.0f} | {'yes' if row['streaming'] else 'no'} "
            f"| {row['images_read']:,} | {row['imported_rss'] / MIB:,.0f} | {row['peak_rss'] / MIB:,.0f} "
            f"| {row['peak_anonymous'] / MIB:,.0f} | {row['cache_on_disk'] / MIB:,.1f} | {row['train_seconds']:,.0f} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines += ["", f"Measured on: {facts['device']}; Python {facts['python']}, {versions}.", ""]
    return (
        "\n".join(lines) + "Made by `benchmarks/streaming_memory.py`. The seconds are of a machine with other work.\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", help="Internal: the folder to train on in this process.")
    parser.add_argument("--streaming", action="store_true", help="Internal: with --train.")
    options = parser.parse_args()
    if options.train:
        train(options.train, options.streaming)
    else:
        main()

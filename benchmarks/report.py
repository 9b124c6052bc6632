"""What the results of throughput.py and inference.py become: tables, files, and the verdict on each target.

Each result is a JSON file in the output folder, with a Markdown table next to it. The folder's `README.md` is
rewritten from all JSON files after every run; it also lists the settings that have not been measured yet.
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


NOT_MEASURED = "not measured"
BARE, TIMM, TRANSFORMERS, PUBLISHED_BASELINE = "bare step", "timm", "transformers", "published baseline's loop"
OURS = ("ours, augment on loader", "ours, augment on device")
# Of a step, in this order.
PARTS = ("data", "teacher", "student", "optimizer", "other")
GPU_INFERENCE = "python benchmarks/inference.py --image_size 224 --patch_size 16"


def spread(runs: list[float]) -> dict:
    """Median, smallest and largest of the repeats, and all of them in order."""
    return {"median": statistics.median(runs), "min": min(runs), "max": max(runs), "runs": runs}


# ---- Targets ----


def row_of(result: dict, name: str) -> dict | None:
    """That contender's row; `None` if it was not run or failed."""
    return next((row for row in result["rows"] if row["name"] == name and not row["failed"]), None)


def our_rows(result: dict) -> list[dict]:
    return [row for name in OURS if (row := row_of(result, name)) is not None]


def images_per_second(result: dict) -> float | None:
    """Our trainer's, with augmentation wherever it is faster."""
    return max((row["images_per_second"]["median"] for row in our_rows(result)), default=None)


def speed_over(name: str) -> Callable[[dict], float | None]:
    def ratio(result: dict) -> float | None:
        own, other = images_per_second(result), row_of(result, name)
        return own / other["images_per_second"]["median"] if own and other else None

    return ratio


def peak_device_gigabytes(result: dict) -> float | None:
    """The higher peak of the two ways to augment: both have to fit."""
    peaks = (row["peak_device_bytes"] for row in our_rows(result))
    return max((peak["max"] / 1e9 for peak in peaks if peak), default=None)


def host_memory_growth(result: dict) -> float | None:
    """
    The highest resident memory after an epoch of the second half, relative to that of the first. Allocators go up and
    down; only memory that keeps going up is growth.
    """
    epochs = result["host_bytes_by_epoch"] or []
    half = len(epochs) // 2
    return max(epochs[half:]) / max(epochs[:half]) - 1 if half else None


class Case(NamedTuple):
    """A setting that has targets: its name, and what a result's setting must say to belong to it."""

    name: str
    where: dict

    @property
    def command(self) -> str:
        flags = (f" --{name} {self.where[name]}" for name in ("image_size", "patch_size", "batch_size"))
        return "python benchmarks/throughput.py" + "".join(flags)


def sizes(image_size: int, patch_size: int, batch_size: int) -> dict:
    return {"image_size": image_size, "patch_size": patch_size, "batch_size": batch_size, "teacher": "regnetx_004"}


CPU_32 = Case(
    "2 CPU cores, 32/4, batch 128, RegNetX-400MF",
    {"device": "cpu", "threads": 2, "recipe": "paper", **sizes(32, 4, 128)},
)
GPU_224 = Case("one GPU, 224/16, batch 1024", {"device": "cuda", **sizes(224, 16, 1024)})
GPU_32 = Case("one GPU, 32/4, batch 1024", {"device": "cuda", **sizes(32, 4, 1024)})


class Target(NamedTuple):
    case: Case | None  # None: any setting
    text: str
    value: Callable[[dict], float | None]  # of a result
    limit: float
    shown: str  # format of the value
    at_most: bool = False

    def verdict(self, value: float) -> str:
        return "met" if (value <= self.limit if self.at_most else value >= self.limit) else "missed"


TARGETS = (
    Target(CPU_32, "at least 95% of the bare step", speed_over(BARE), 0.95, ".1%"),
    Target(CPU_32, "at least as fast as timm", speed_over(TIMM), 1.0, ".2f"),
    Target(CPU_32, "at least 1.1x plain transformers", speed_over(TRANSFORMERS), 1.1, ".2f"),
    Target(GPU_224, "at least 2x timm", speed_over(TIMM), 2.0, ".2f"),
    Target(GPU_224, f"at least 10x the {PUBLISHED_BASELINE}", speed_over(PUBLISHED_BASELINE), 10.0, ".1f"),
    Target(GPU_224, "at least 15,000 images/s with the teacher", images_per_second, 15_000, ",.0f"),
    Target(GPU_224, "at least 85% of the bare step", speed_over(BARE), 0.85, ".1%"),
    Target(GPU_224, "at most 40 GB on the device", peak_device_gigabytes, 40.0, ".1f", at_most=True),
    Target(GPU_32, "at least 40,000 images/s", images_per_second, 40_000, ",.0f"),
    Target(None, "host memory grows by at most 1% over the epochs", host_memory_growth, 0.01, "+.2%", at_most=True),
)


# ---- Tables ----


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are aligned right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(values: dict | None, shown: str = ",.1f", scale: float = 1.0) -> str:
    """`median (min to max)` of a [`spread`]."""
    if values is None:
        return NOT_MEASURED
    median, low, high = (format(values[key] * scale, shown) for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})" if len(values["runs"]) > 1 else median


def throughput_table(result: dict) -> str:
    header = ["contender", "images/s", "step, ms", *(f"{part}, ms" for part in PARTS)]
    header += ["start-up, s", "peak host, MB", "peak device, MB"]
    on_cpu = result["setting"]["device"] == "cpu"
    rows = []
    for row in result["rows"]:
        if row["failed"]:
            rows.append([row["name"], f"failed: {row['failed']}", *[NOT_MEASURED] * (len(header) - 2)])
            continue
        split = row["split_ms"]
        rows.append(
            [
                row["name"],
                number(row["images_per_second"]),
                number(row["step_ms"], ",.0f"),
                *(f"{split[part]:,.1f}" if split else NOT_MEASURED for part in PARTS),
                number(row["startup_seconds"]),
                number(row["peak_host_bytes"], ",.0f", 1e-6),
                "no device" if on_cpu else number(row["peak_device_bytes"], ",.0f", 1e-6),
            ]
        )
    return table(header, rows)


def inference_table(result: dict) -> str:
    header = ["model", "batch", "images/s", "median, ms", "p95, ms", "largest difference of a logit"]
    rows = []
    for row in result["rows"]:
        if row["failed"]:
            cells = [f"failed: {row['failed']}", *[NOT_MEASURED] * 3]
        else:
            latency = row["latency_ms"]
            cells = [number(row["images_per_second"]), f"{latency['median']:,.1f}", f"{latency['p95']:,.1f}"]
            cells.append(f"{row['max_abs_difference']:.1e}")
        rows.append([row["name"], str(row["batch_size"]), *cells])
    return table(header, rows)


def targets_table(results: dict[str, dict]) -> str:
    """Each target on each training result that it applies to; results by file name."""
    rows = []
    for target in TARGETS:
        case = target.case or CPU_32
        text = f"{case.name}: {target.text}" if target.case else target.text
        measured = [
            [text, format(value, target.shown), target.verdict(value), f"[{file}]({file}.md)"]
            for file, result in results.items()
            if (target.case is None or case.where.items() <= result["setting"].items())
            and (value := target.value(result)) is not None
        ]
        rows += measured or [[text, NOT_MEASURED, NOT_MEASURED, f"`{case.command}`"]]
    return table(["target", "value", "verdict", "where, or the command that measures it"], rows)


def results_table(results: dict[str, dict]) -> str:
    """A line for each training result, and for each setting with targets that has none."""
    names = (BARE, *OURS, TIMM, TRANSFORMERS, PUBLISHED_BASELINE)
    rows = []
    for file, result in results.items():
        found = [row_of(result, name) for name in names]
        cells = [number(row["images_per_second"]) if row else NOT_MEASURED for row in found]
        rows.append([f"[{describe_setting(result)}]({file}.md)", *cells])
    for case in (CPU_32, GPU_224, GPU_32):
        if not any(case.where.items() <= result["setting"].items() for result in results.values()):
            rows.append([case.name, *[NOT_MEASURED] * len(names)])
    return table(["training, images/s: median (min to max)", *names], rows)


def describe_setting(result: dict) -> str:
    setting = result["setting"]
    parts = [result["hardware"]] + [f"threads {setting['threads']}"] * (setting["device"] == "cpu")
    parts += [f"{setting['image_size']}/{setting['patch_size']}", setting["precision"]]
    if result["benchmark"] == "throughput":
        parts += [f"batch {setting['batch_size']}", setting["teacher"]]
        parts += [f"recipe {setting['recipe']}", setting["dataset_name"].rpartition("/")[2]]
        parts += ["compiled"] * setting["torch_compile"]
    return ", ".join(parts)


# ---- Files ----


def write_result(result: dict, folder: Path, remarks: list[str]) -> Path:
    """
    Writes a result as JSON and Markdown, then the index. An earlier run of the same setting is replaced, even if it
    had other contenders: a table never mixes two runs.

    Args:
        result (`dict`): of throughput.py or inference.py.
        folder (`Path`): of all results.
        remarks (`list[str]`): how it was measured, for the reader of the table.

    Returns:
        `Path`: the Markdown file.
    """
    is_training, setting = result["benchmark"] == "throughput", describe_setting(result)
    name = re.sub(r"[^a-z0-9_]+", "-", (setting if is_training else f"inference, {setting}").lower()).strip("-")
    sections = [
        f"# {'Training' if is_training else 'Inference'}: {setting}",
        f"{result['date']}; {describe_versions(result)}.",
        throughput_table(result) if is_training else inference_table(result),
        "\n".join(f"- {remark}" for remark in remarks),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{name}.md").write_text("\n\n".join(sections) + "\n")
    write_index(folder)
    return folder / f"{name}.md"


def describe_versions(result: dict) -> str:
    return ", ".join(f"{library} {number}" for library, number in result["versions"].items())


def write_index(folder: Path) -> None:
    """`README.md`: all results in the folder, and what they say about the targets."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    training = {file: result for file, result in results.items() if result["benchmark"] == "throughput"}
    inference = {file: result for file, result in results.items() if result["benchmark"] == "inference"}
    links = [f"- [{describe_setting(result)}]({file}.md)" for file, result in inference.items()]
    if not any(result["device"] == "cuda" for result in inference.values()):
        links.append(f"- one GPU: {NOT_MEASURED} (`{GPU_INFERENCE}`)")
    sections = [
        "# Speed",
        "Written by `benchmarks/throughput.py` and `benchmarks/inference.py` from the JSON files in this folder. "
        "Our trainer is rated with augmentation on the loader or on the device, whichever is faster.",
        "## Targets",
        targets_table(training),
        "## Training",
        results_table(training),
        "## Inference",
        "\n".join(links),
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n")

"""What both benchmarks share: the spread of repeats, where and with what they ran, the files and the table of targets.

Every result is a JSON file in the output folder with a Markdown table beside it. `README.md` there is made anew from
all JSON files after each run, so that a setting that nobody has run yet says so.
"""

import datetime
import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from modeling_deit_ti.card import describe_hardware, library_versions


NOT_MEASURED = "not measured"
BARE, TIMM, TRANSFORMERS, SEED = "bare step", "timm", "transformers", "seed's loop"
OURS = ("ours, augment on loader", "ours, augment on device")


def spread(runs: list[float]) -> dict:
    """Median, smallest and largest of the repeats, and all of them in order."""
    return {"median": statistics.median(runs), "min": min(runs), "max": max(runs), "runs": runs}


def describe_machine(training_args) -> dict:
    """Device and versions, as every result records them; `training_args` is a `TrainingArguments`."""
    versions = library_versions()
    for library in ("onnxruntime", "onnx"):
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return {
        "device": training_args.device.type,
        "hardware": describe_hardware(training_args),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------------------------------


def row_of(result: dict, name: str) -> dict | None:
    """That contender's row; `None` where it was not run or failed."""
    return next((row for row in result["rows"] if row["name"] == name and not row["failed"]), None)


def ours(result: dict) -> dict | None:
    """Our trainer's row, with augmentation wherever it is faster."""
    rows = [row for name in OURS if (row := row_of(result, name)) is not None]
    return max(rows, key=lambda row: row["images_per_second"]["median"], default=None)


def times_as_fast_as(name: str) -> Callable[[dict], float | None]:
    def ratio(result: dict) -> float | None:
        own, other = ours(result), row_of(result, name)
        if own is None or other is None:
            return None
        return own["images_per_second"]["median"] / other["images_per_second"]["median"]

    return ratio


def images_per_second(result: dict) -> float | None:
    own = ours(result)
    return own and own["images_per_second"]["median"]


def peak_device_gigabytes(result: dict) -> float | None:
    """The larger of both ways to augment: either has to fit."""
    peaks = [row["peak_device_bytes"] for name in OURS if (row := row_of(result, name)) is not None]
    return max((peak["max"] / 1e9 for peak in peaks if peak), default=None)


def host_memory_growth(result: dict) -> float | None:
    """
    The most resident memory after an epoch of the second half, over that of the first: a process that only goes up
    and down, as allocators do, does not grow.
    """
    epochs = result["host_bytes_by_epoch"]
    half = len(epochs or ()) // 2
    return max(epochs[half:]) / max(epochs[:half]) - 1 if half else None


@dataclass(frozen=True)
class Target:
    """
    Args:
        text (`str`): what is wanted.
        where (`dict`): what a result's setting has to say for the target to be about it.
        value (`Callable`): a result to its value, `None` where it has none.
        limit (`float`): at least this, or at most where `at_most` is set.
        shown (`str`): format of the value.
        command (`str`): what measures it.
    """

    text: str
    where: dict
    value: Callable[[dict], float | None]
    limit: float
    shown: str
    command: str
    at_most: bool = False

    def verdict(self, value: float | None) -> str:
        if value is None:
            return NOT_MEASURED
        return "met" if (value <= self.limit if self.at_most else value >= self.limit) else "missed"


CPU_32 = {
    "device": "cpu",
    "threads": 2,
    "image_size": 32,
    "patch_size": 4,
    "batch_size": 128,
    "teacher": "regnetx_004",
    "recipe": "paper",
}
GPU_224 = {"device": "cuda", "image_size": 224, "patch_size": 16, "batch_size": 1024, "teacher": "regnetx_004"}
GPU_32 = {"device": "cuda", "image_size": 32, "patch_size": 4, "batch_size": 1024, "teacher": "regnetx_004"}
CPU_COMMAND = "python benchmarks/throughput.py --image_size 32 --patch_size 4 --batch_size 128"
GPU_224_COMMAND = "python benchmarks/throughput.py --image_size 224 --patch_size 16 --batch_size 1024"
GPU_32_COMMAND = "python benchmarks/throughput.py --image_size 32 --patch_size 4 --batch_size 1024"
GPU_INFERENCE_COMMAND = "python benchmarks/inference.py --image_size 224 --patch_size 16"
CPU_NAME = "2 CPU cores, 32/4, batch 128, RegNetX-400MF"
GPU_224_NAME = "one GPU, 224/16, batch 1024"
GPU_32_NAME = "one GPU, 32/4, batch 1024"

TARGETS = (
    Target(f"{CPU_NAME}: at least 95 % of the bare step", CPU_32, times_as_fast_as(BARE), 0.95, ".1%", CPU_COMMAND),
    Target(f"{CPU_NAME}: at least level with timm", CPU_32, times_as_fast_as(TIMM), 1.0, ".2f", CPU_COMMAND),
    Target(
        f"{CPU_NAME}: at least 1.1 x plain transformers",
        CPU_32,
        times_as_fast_as(TRANSFORMERS),
        1.1,
        ".2f",
        CPU_COMMAND,
    ),
    Target(f"{GPU_224_NAME}: at least 2 x timm", GPU_224, times_as_fast_as(TIMM), 2.0, ".2f", GPU_224_COMMAND),
    Target(
        f"{GPU_224_NAME}: at least 10 x the seed's loop",
        GPU_224,
        times_as_fast_as(SEED),
        10.0,
        ".1f",
        GPU_224_COMMAND,
    ),
    Target(
        f"{GPU_224_NAME}: at least 15,000 images/s with the teacher",
        GPU_224,
        images_per_second,
        15_000,
        ",.0f",
        GPU_224_COMMAND,
    ),
    Target(
        f"{GPU_224_NAME}: at least 85 % of the bare step",
        GPU_224,
        times_as_fast_as(BARE),
        0.85,
        ".1%",
        GPU_224_COMMAND,
    ),
    Target(
        f"{GPU_224_NAME}: at most 40 GB on the device",
        GPU_224,
        peak_device_gigabytes,
        40.0,
        ".1f",
        GPU_224_COMMAND,
        at_most=True,
    ),
    Target(f"{GPU_32_NAME}: at least 40,000 images/s", GPU_32, images_per_second, 40_000, ",.0f", GPU_32_COMMAND),
    Target(
        "host memory does not grow with the epochs (at most 1 %)",
        {},
        host_memory_growth,
        0.01,
        "+.2%",
        CPU_COMMAND,
        at_most=True,
    ),
)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are aligned right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(values: dict | None, shown: str = ",.1f", scale: float = 1.0) -> str:
    """`median (min to max)` of a [`spread`]."""
    if values is None:
        return NOT_MEASURED
    median, low, high = (format(values[key] * scale, shown) for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})" if len(values["runs"]) > 1 else median


def throughput_table(result: dict) -> str:
    phases = ("data", "teacher", "student", "optimizer", "other")
    rows = []
    for row in result["rows"]:
        if row["failed"]:
            rows.append([row["name"], f"failed: {row['failed']}", *[NOT_MEASURED] * (len(phases) + 4)])
            continue
        split = row["split_ms"] or {}
        on_device = NOT_MEASURED if result["setting"]["device"] == "cuda" else "no device"
        rows.append(
            [
                row["name"],
                number(row["images_per_second"]),
                number(row["step_ms"], ",.0f"),
                *(f"{split[phase]:,.1f}" if phase in split else NOT_MEASURED for phase in phases),
                number(row["startup_seconds"]),
                number(row["peak_host_bytes"], ",.0f", 1e-6),
                number(row["peak_device_bytes"], ",.0f", 1e-6) if row["peak_device_bytes"] else on_device,
            ]
        )
    return table(
        [
            "contender",
            "images/s",
            "step, ms",
            *(f"{phase}, ms" for phase in phases),
            "start-up, s",
            "peak host, MB",
            "peak device, MB",
        ],
        rows,
    )


def inference_table(result: dict) -> str:
    return table(
        ["model", "batch", "images/s", "median, ms", "p95, ms", "largest difference of a logit"],
        [
            [row["name"], f"{row['batch_size']}", f"failed: {row['failed']}", *[NOT_MEASURED] * 3]
            if row["failed"]
            else [
                row["name"],
                f"{row['batch_size']}",
                number(row["images_per_second"]),
                f"{row['latency_ms']['median']:,.1f}",
                f"{row['latency_ms']['p95']:,.1f}",
                f"{row['max_abs_difference']:.1e}",
            ]
            for row in result["rows"]
        ],
    )


def targets_table(results: dict[str, dict]) -> str:
    """Each target on each result that it is about; results by file name."""
    rows = []
    for target in TARGETS:
        found = [
            (file, result)
            for file, result in results.items()
            if result["benchmark"] == "throughput" and target.where.items() <= result["setting"].items()
        ]
        measured = [(file, value) for file, result in found if (value := target.value(result)) is not None]
        for file, value in measured:
            shown = format(value, target.shown)
            rows.append([target.text, shown, target.verdict(value), f"[{file}]({file}.md)"])
        if not measured:
            rows.append([target.text, NOT_MEASURED, target.verdict(None), f"`{target.command}`"])
    return table(["target", "value", "verdict", "where, or the command that measures it"], rows)


def results_table(results: dict[str, dict]) -> str:
    """One line a training result, and one for each setting of the targets that has none."""
    names = (BARE, *OURS, TIMM, TRANSFORMERS, SEED)
    rows = []
    for file, result in results.items():
        if result["benchmark"] != "throughput":
            continue
        found = [row_of(result, name) for name in names]
        cells = [number(row["images_per_second"]) if row else NOT_MEASURED for row in found]
        rows.append([f"[{describe_setting(result)}]({file}.md)", *cells])
    for name, where in ((CPU_NAME, CPU_32), (GPU_224_NAME, GPU_224), (GPU_32_NAME, GPU_32)):
        if not any(where.items() <= result["setting"].items() for result in results.values()):
            rows.append([name, *[NOT_MEASURED] * len(names)])
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


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def file_name(result: dict) -> str:
    """`<device>-<setting>`, the same for every run of one setting on one kind of machine."""
    prefix = "" if result["benchmark"] == "throughput" else "inference, "
    return re.sub(r"[^a-z0-9_]+", "-", (prefix + describe_setting(result)).lower()).strip("-")


def write_result(result: dict, folder: Path, remarks: list[str]) -> Path:
    """
    Writes a result's JSON and Markdown, replacing those of an earlier run of the same setting whatever its contenders
    were (numbers from two runs do not stand in one table), and the index.

    Args:
        result (`dict`): of `throughput.py` or `inference.py`.
        folder (`Path`): of the results.
        remarks (`list[str]`): how it was measured, for the reader of the table.

    Returns:
        `Path`: the Markdown file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(result)
    make_table = throughput_table if result["benchmark"] == "throughput" else inference_table
    versions = ", ".join(f"{library} {number}" for library, number in result["versions"].items())
    lines = [
        f"# {'Training' if result['benchmark'] == 'throughput' else 'Inference'}: {describe_setting(result)}",
        f"{result['date']}; {versions}.",
        make_table(result).rstrip(),
        "\n".join(f"- {remark}" for remark in remarks),
    ]
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{name}.md").write_text("\n\n".join(lines) + "\n")
    write_index(folder)
    return folder / f"{name}.md"


def write_index(folder: Path) -> None:
    """`README.md`: all results of the folder and what they say of the targets."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    inference = [
        f"- [{describe_setting(result)}]({file}.md)"
        for file, result in results.items()
        if result["benchmark"] == "inference"
    ]
    if not any(result["benchmark"] == "inference" and result["device"] == "cuda" for result in results.values()):
        inference.append(
            f"- one GPU: {NOT_MEASURED} (`python benchmarks/inference.py --image_size 224 --patch_size 16`)"
        )
    lines = [
        "# Speed",
        "Written by `benchmarks/throughput.py` and `benchmarks/inference.py` from the JSON files here. "
        "Our trainer counts with its augmentation on the loader or the device, whichever is faster.",
        "## Targets",
        targets_table(results).rstrip(),
        "## Training",
        results_table(results).rstrip(),
        "## Inference",
        "\n".join(inference),
    ]
    (folder / "README.md").write_text("\n\n".join(lines) + "\n")

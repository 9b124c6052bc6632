"""Turns the results of the speed benchmarks into tables, files and a verdict on each target.

Each result is a JSON file in the output folder, with a Markdown table next to it. The folder's `README.md` is
rewritten from all JSON files after every run; it also lists the settings that have not been measured yet.
"""

import json
import math
import re
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jinja2
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from benchmarks.setting import BARE, BASELINE_SIZES, MEMORY_FLAGS, OURS, PUBLISHED_BASELINE, Setting, describe_machine
from benchmarks.step_clock import PARTS


NOT_MEASURED = "not measured"
ROWS = (BARE, *OURS, "timm", "timm, bf16", "transformers", "transformers, bf16", PUBLISHED_BASELINE)
TEMPLATES = Path(__file__).with_name("templates")


def spread(runs: list[float]) -> dict:
    """Median, smallest and largest of the repeats, and all of them in order."""
    return {"median": statistics.median(runs), "min": min(runs), "max": max(runs), "runs": runs}


# ---- Targets ----


class Case(NamedTuple):
    """A setting with targets: its name, and the values that a result's setting must have to belong to it."""

    name: str
    where: dict
    benchmark: str = "throughput"

    @property
    def command(self) -> str:
        names = [name for name in ("image_size", "patch_size", "batch_size") if name in self.where]
        flags = [f" --{name} {self.where[name]}" for name in names]
        flags += [" --teacher FOLDER"] * (self.benchmark == "time_to_accuracy")
        return f"python benchmarks/{self.benchmark}.py" + "".join(flags)

    def covers(self, result: dict) -> bool:
        return result["benchmark"] == self.benchmark and self.where.items() <= result["setting"].items()


# `automatic_precision`: what train_hf.py chooses by itself on such a machine.
CPU = {"device": "cpu", "image_size": 32, "batch_size": 128, "teacher": "regnetx_004", "recipe": "paper"}
BF16, FP32 = ({"precision": None, "automatic_precision": precision} for precision in ("bf16", "fp32"))
GPU = {"device": "cuda", "batch_size": 1024, "teacher": "regnetx_004"}
CASES = (
    Case("CPU with bfloat16 instructions, 32/4, batch 128, RegNetX-400MF", {**CPU, **BF16, "patch_size": 4}),
    Case("CPU with bfloat16 instructions, 32/8, batch 128, RegNetX-400MF", {**CPU, **BF16, "patch_size": 8}),
    Case("CPU without bfloat16 instructions, 32/4, batch 128, RegNetX-400MF", {**CPU, **FP32, "patch_size": 4}),
    Case("one GPU, 224/16, batch 1024", {**GPU, "image_size": 224, "patch_size": 16}),
    Case("one GPU, 32/4, batch 1024", {**GPU, "image_size": 32, "patch_size": 4}),
)
CPU_BF16_4, CPU_BF16_8, CPU_FP32_4, GPU_224, GPU_32 = CASES
CPU_INFERENCE = Case("inference on a CPU", {"device": "cpu"}, "inference")
CPU_TIME = Case(
    "time to accuracy on a CPU, CIFAR-10", {"device": "cpu", "recipe": "cifar10_quick.yaml"}, "time_to_accuracy"
)
# The case (`None`: any), the target in words, its figure (see `figures`), the relation, the limit and the format.
TARGETS = (
    *(
        (case, *target)
        for case in (CPU_BF16_4, CPU_BF16_8)
        for target in (
            ("at least 3x timm's defaults", "timm", ">=", 3.0, ".2f"),
            ("at least 3x transformers' defaults", "transformers", ">=", 3.0, ".2f"),
            ("at least 1.6x timm with bfloat16 on", "timm, bf16", ">=", 1.6, ".2f"),
            ("at least 1.6x transformers with bfloat16 on", "transformers, bf16", ">=", 1.6, ".2f"),
            ("at least 95% of the bare step", BARE, ">=", 0.95, ".1%"),
            ("bare step at least 60% of the matrix product's rate", "product", ">=", 0.6, ".1%"),
        )
    ),
    (CPU_FP32_4, "at least 1.08x timm", "timm", ">=", 1.08, ".2f"),
    (CPU_FP32_4, "at least 1.08x transformers", "transformers", ">=", 1.08, ".2f"),
    (GPU_224, "at least 2x timm with bfloat16 on", "timm, bf16", ">=", 2.0, ".2f"),
    (GPU_224, f"at least 10x the {PUBLISHED_BASELINE}", PUBLISHED_BASELINE, ">=", 10.0, ".1f"),
    (GPU_224, "at least 15,000 images/s with the teacher", "images/s", ">=", 15_000, ",.0f"),
    (GPU_224, "at least 85% of the bare step", BARE, ">=", 0.85, ".1%"),
    (GPU_224, "at most 40 GB on the device", "device GB", "<=", 40.0, ".1f"),
    (GPU_32, "at least 40,000 images/s", "images/s", ">=", 40_000, ",.0f"),
    (None, "host memory grows by at most 1% over the epochs", "growth", "<=", 0.01, "+.2%"),
    (CPU_INFERENCE, "batch 1, fastest exported form at least 2x native float32", "exported", ">=", 2.0, ".2f"),
    *(
        (CPU_TIME, f"{accuracy} in at most a third of {whose} minutes", f"{accuracy}, {peer}", "<=", 1 / 3, ".2f")
        for accuracy in ("60%", "70%")
        for peer, whose in (("timm", "timm's"), ("transformers", "transformers'"))
    ),
)


def figures(result: dict) -> dict[str, float]:
    """
    The figures that the targets are about, as far as they were measured: our trainer's `images/s`, with augmentation
    wherever it is faster, and under each contender's name that speed as a multiple of the contender's; the peak
    `device GB`; `product`, the bare step's share of the matrix product's rate; and `growth`, the highest host memory
    after an epoch in the second half, relative to the first half. For inference, `exported`: the fastest exported
    form, relative to the native model. For time to accuracy, [`time_shares`].
    """
    if result["benchmark"] == "time_to_accuracy":
        return time_shares(result)
    # For inference, one image per call.
    rows = {row["name"]: row for row in result["rows"] if not row["failed"] and row.get("batch_size", 1) == 1}
    speeds = {name: row["images_per_second"]["median"] for name, row in rows.items()}
    if result["benchmark"] == "inference":
        exported = [speed for name, speed in speeds.items() if not name.startswith(("native", "compiled"))]
        return {"exported": max(exported) / speeds["native"]} if exported else {}
    found = {}
    if ours := [name for name in OURS if name in rows]:
        found["images/s"] = max(speeds[name] for name in ours)
        found |= {name: found["images/s"] / speed for name, speed in speeds.items()}
        if result["device"] == "cuda":  # the higher of the two: both have to fit
            found["device GB"] = max(rows[name]["peak_device_bytes"]["max"] for name in ours) / 1e9
    if BARE in rows:
        found["product"] = share_of_product(rows[BARE])
    epochs = result["host_bytes_by_epoch"] or []
    if half := len(epochs) // 2:
        # Allocated memory goes up and down; only memory that keeps going up is growth.
        found["growth"] = max(epochs[half:]) / max(epochs[:half]) - 1
    return found


def time_shares(result: dict) -> dict[str, float]:
    """
    Our minutes to each target divided by a contender's, in the faster of its rows. A contender that did not reach the
    target counts with all the minutes that it had, which favours it.
    """
    shares, (ours, *others) = {}, result["rows"]
    if ours["failed"]:
        return shares
    others = [row for row in others if not row["failed"]]
    for position, target in enumerate(result["setting"]["targets"]):
        mine = ours["minutes_to_target"][position]
        for row in others:
            name = f"{target:.0%}, {row['name'].partition(',')[0]}"
            minutes = row["minutes_to_target"][position] or row["curve"][-1]["minutes"]
            shares[name] = math.inf if mine is None else max(shares.get(name, 0.0), mine / minutes)
    return shares


def share_of_product(bare: dict) -> float:
    """The rate of all the bare step's operations, as a share of that of the student's largest matrix product alone."""
    flops = bare["student_flops"] + bare["teacher_flops"]
    return bare["images_per_second"]["median"] * flops / bare["product_flops_per_second"]["median"]


def target_rows(results: dict[str, dict]) -> list[list[str]]:
    """Each target on each result that it applies to; `results` are by file name."""
    rows = []
    for case, target, figure, relation, limit, form in TARGETS:
        text = f"{case.name}: {target}" if case else target
        measured = []
        for file, result in results.items():
            value = figures(result).get(figure) if case is None or case.covers(result) else None
            if value is not None:
                is_met = value <= limit if relation == "<=" else value >= limit
                measured.append([text, format(value, form), "met" if is_met else "missed", f"[{file}]({file}.md)"])
        rows += measured or [[text, NOT_MEASURED, NOT_MEASURED, f"`{(case or CASES[0]).command}`"]]
    return rows


# ---- Files ----


def number(values: dict | None, shown: str = ",.1f", scale: float = 1.0) -> str:
    """`median (min to max)` of a [`spread`]."""
    if values is None:
        return NOT_MEASURED
    median, low, high = (format(values[key] * scale, shown) for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})" if len(values["runs"]) > 1 else median


def describe_versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{library} {version}" for library, version in versions.items())


def describe_setting(result: dict) -> str:
    setting = result["setting"]
    parts = [result["hardware"]]
    if setting["device"] == "cpu":  # machines with the same number of cores may differ in processor
        parts += [result["processor"].partition(",")[0]] if result["processor"] else []
        parts += [f"threads {setting['threads']}"]
    parts += [f"{setting['image_size']}/{setting['patch_size']}"]
    if result["benchmark"] == "inference":
        parts += [setting["model"] or "random weights"]
    elif result["benchmark"] == "time_to_accuracy":
        if setting["peers_patch_size"] != setting["patch_size"]:
            parts += [f"peers {setting['image_size']}/{setting['peers_patch_size']}"]
        parts += [setting["recipe"], setting["teacher"], setting["dataset_name"].rpartition("/")[2]]
    else:
        precision, automatic = setting["precision"], setting["automatic_precision"]
        parts += [automatic if precision is None else f"{precision} alone"]
        parts += [f"batch {setting['batch_size']}", setting["teacher"]]
        parts += [f"recipe {setting['recipe']}", setting["dataset_name"].rpartition("/")[2]]
        parts += ["compiled"] * setting["torch_compile"]
    return ", ".join(parts)


def style_axes(axes: Axes, title: str, xlabel: str) -> None:
    """Styles axes of accuracy (0 to 1) over time or epochs; the legend is beside them, where it covers no curve."""
    axes.set_title(title, loc="left")
    axes.set(xlabel=xlabel, xlim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, handlelength=3, loc="center left", bbox_to_anchor=(1.01, 0.5), alignment="left")


def render(template: str, **values) -> str:
    """A Markdown file, rendered from its template in templates/."""
    options = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), **options)
    environment.filters |= {"number": number, "shown": format}
    environment.filters |= {"setting": describe_setting, "versions": describe_versions, "product": share_of_product}
    return environment.get_template(template).render(values)


def make_result(setting: Setting, began: float, rows: list[dict], benchmark: str, *libraries: str, **more) -> dict:
    """What was measured since `began`, and on what."""
    facts = {"setting": asdict(setting), "seconds": round(time.monotonic() - began), "rows": rows}
    return {"benchmark": benchmark, **describe_machine(setting.device, *libraries), **facts, **more}


def finish(result: dict, folder: str) -> int:
    """Writes and prints the result; returns the exit code, 1 if a row has failed."""
    file = write_result(result, Path(folder))
    print(f"\n{file.read_text()}\nWritten to {file}; the index is beside it.")
    return int(any(row["failed"] for row in result["rows"]))


def write_result(result: dict, folder: Path) -> Path:
    """
    Writes a result as JSON and Markdown, then the index; returns the Markdown file. An earlier run of the same setting
    is replaced, even if it had other contenders: a table never mixes two runs.
    """
    name = file_name(result)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    constants = {"parts": PARTS, "baseline_sizes": BASELINE_SIZES, "memory": MEMORY_FLAGS, "file": name}
    (folder / f"{name}.md").write_text(render(f"{result['benchmark']}.md", result=result, **constants))
    write_index(folder)
    return folder / f"{name}.md"


def file_name(result: dict) -> str:
    """The name of a result's files, without their extensions."""
    title = "" if result["benchmark"] == "throughput" else f"{result['benchmark'].replace('_', ' ')}, "
    return re.sub(r"[^a-z0-9_]+", "-", (title + describe_setting(result)).lower()).strip("-")


def write_index(folder: Path) -> None:
    """Writes `README.md`: all results in the folder, and what they say about the targets."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    training = {file: result for file, result in results.items() if result["benchmark"] == "throughput"}
    contenders = dict.fromkeys([*ROWS, *(row["name"] for result in training.values() for row in result["rows"])])
    speeds = []
    for file, result in training.items():
        found = {row["name"]: number(row["images_per_second"]) for row in result["rows"] if not row["failed"]}
        cells = [found.get(name, NOT_MEASURED) for name in contenders]
        speeds.append([f"[{describe_setting(result)}]({file}.md)", *cells])
    for case in CASES:
        if not any(map(case.covers, training.values())):
            speeds.append([case.name, *[NOT_MEASURED] * len(contenders)])
    values = {"targets": target_rows(results), "contenders": contenders, "speeds": speeds, "results": results}
    (folder / "README.md").write_text(render("speed.md", **values))

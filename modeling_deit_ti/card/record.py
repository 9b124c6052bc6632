"""The record of a run: everything its card says, as plain data, without credentials or absolute paths."""

import json
import math
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from enum import Enum
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Literal

import torch
from transformers import TrainingArguments

from ..device import cpu_count, cpu_info
from ..distillation import DistillMode


RECORD_FILE = "run_record.json"
# The CPU instructions that decide how fast it multiplies matrices, under Linux's names.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "bf16")
CIFAR10_LABELS = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}


@dataclass
class DatasetRecord:
    """The dataset of a run."""

    name: str  # the value of --dataset_name; for a local folder, only the last part of its path
    source: Literal["hub", "local", "scikit-learn"]
    label_names: list[str]  # in the order of the label ids
    num_train_images: int  # after --max_train_samples
    num_eval_images: int  # after --max_eval_samples
    eval_split: str = "test"
    config_name: str | None = None

    def __post_init__(self):
        if self.source == "local":
            self.name = folder_name(self.name)

    @property
    def is_cifar10(self) -> bool:
        name = re.sub(r"[^a-z0-9]", "", self.name.lower().rpartition("/")[2])
        return name == "cifar10" and set(self.label_names) == CIFAR10_LABELS


@dataclass
class TeacherRecord:
    """The teacher of a run."""

    name: str  # a timm architecture, a Hub id, or the last part of a local folder's path
    source: Literal["timm", "hub", "local"]
    num_parameters: int
    image_size: int  # height and width of its input, in pixels
    accuracy: float | None = None  # top-1 on the evaluation split, from 0 to 1, once measured
    # How it was fitted to the dataset; None if it is used as is.
    fitted: Literal["scratch", "pretrained", "untrained"] | None = None
    hyperparameters: dict = field(default_factory=dict)  # of that fitting

    def __post_init__(self):
        if self.source == "local":
            self.name = folder_name(self.name)
        self.hyperparameters = shareable(self.hyperparameters)


def library_versions() -> dict[str, str]:
    """Versions of Python and of each library that affects what a run computes."""
    libraries = ("torch", "torchvision", "transformers", "accelerate", "datasets", "timm", "huggingface_hub")
    return {"Python": platform.python_version(), **{library: version(library) for library in libraries}}


def describe_hardware(args: TrainingArguments) -> str:
    """The devices that a run uses, in words: `2 x NVIDIA H100`, `8 CPU cores (x86_64, AMD EPYC, avx2, avx512f)`."""
    if args.device.type == "cpu":
        return describe_cores(*processor_facts())
    if args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    return f"{args.world_size} x {args.device.type.upper()}"


def describe_cores(*details: str) -> str:
    """`8 CPU cores (x86_64)`, with any details added in the brackets."""
    count = cpu_count()
    return f"{count} CPU core{'s' if count != 1 else ''} ({', '.join((platform.machine(), *details))})"


def processor_facts() -> list[str]:
    """The processor's name, and those of its instructions that matter here. Empty if the system does not list them."""
    name = re.search(r"^model name\s*: (.+)$", cpu_info(), re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", cpu_info(), re.MULTILINE)
    known = set(flags[1].split()) if flags else set()
    return [name[1]] * (name is not None) + [flag for flag in INSTRUCTIONS if flag in known]


@dataclass
class RunRecord:
    """Everything that a card says about a run. It is pushed, so it holds no credentials or absolute paths."""

    architecture: str  # "deit_ti", or the name of a timm architecture
    num_parameters: int  # of the student
    image_size: int  # height and width of the student's input, in pixels
    mode: DistillMode
    dataset: DatasetRecord
    metrics: dict[str, float]  # those of all_results.json; anything but a finite number is dropped
    hyperparameters: dict  # the arguments that matter, by flag name; None values are dropped
    hardware: str  # see `describe_hardware`
    teacher: TeacherRecord | None = None
    patch_size: int | None = None  # of a DeiT-Ti, in pixels
    drop_path_rate: float | None = None  # of a DeiT-Ti
    base_model: str | None = None  # the model whose weights the student starts from; None for random weights
    base_model_on_hub: bool = False  # whether that is a Hub id rather than a local folder
    hub_model_id: str | None = None  # owner/name, if the model is pushed
    license: str = "unknown"  # one of the Hub's license identifiers
    earlier_stages: list[dict] = field(default_factory=list)  # of a recipe with stages; see `as_stage`
    command: list[str] | None = None  # the full command line: ["accelerate", "launch", *sys.argv]
    example_label: str | None = None  # of the image saved as example.png, if there is one
    versions: dict[str, str] = field(default_factory=library_versions)
    date: str = field(default_factory=lambda: date.today().isoformat())

    def __post_init__(self):
        if self.base_model is not None and not self.base_model_on_hub:
            self.base_model = folder_name(self.base_model)
        self.metrics = {name: value for name, value in self.metrics.items() if is_finite(value)}
        self.hyperparameters = shareable(self.hyperparameters)
        self.command = None if self.command is None else shareable_command(self.command)

    @property
    def stages(self) -> list[dict]:
        """The earlier stages, if the recipe has any, followed by this run."""
        return [*self.earlier_stages, self.as_stage()]

    @property
    def epochs(self) -> float:
        """Epochs actually trained, over all stages: `max_steps` may end one before its `num_train_epochs`."""
        return sum(stage["epochs"] for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Training time over all stages, including the evaluations between epochs."""
        return sum(stage["seconds"] for stage in self.stages)

    @property
    def images_seen(self) -> int:
        """Images seen in training, over all stages; an image counts again in each epoch."""
        return sum(stage["images_seen"] for stage in self.stages)

    @property
    def images_per_second(self) -> float:
        """Average training throughput over all stages."""
        return self.images_seen / self.seconds

    def as_stage(self) -> dict:
        """What the card of a later stage says about this run."""
        return {
            "patch_size": self.patch_size,
            "patch_drop_rate": self.hyperparameters.get("patch_drop_rate", 0.0),
            "image_size": self.image_size,
            "epochs": self.metrics["epoch"],
            "learning_rate": self.hyperparameters["learning_rate"],
            "lr_scheduler_type": self.hyperparameters["lr_scheduler_type"],
            "seconds": self.metrics["train_runtime"],
            "images_seen": round(self.metrics["train_samples_per_second"] * self.metrics["train_runtime"]),
            "top1": self.metrics["eval_accuracy"],
        }

    def save(self, folder: str | os.PathLike) -> None:
        """Writes `run_record.json` to the folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        # A label read from a broken file name may contain a lone surrogate, which UTF-8 cannot encode.
        Path(folder, RECORD_FILE).write_text(text + "\n", encoding="utf-8", errors="replace")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "RunRecord":
        """Reads `run_record.json` from the folder."""
        values = json.loads(Path(folder, RECORD_FILE).read_text(encoding="utf-8"))
        values["mode"] = DistillMode(**{**values["mode"], "tokens": tuple(values["mode"]["tokens"])})
        values["dataset"] = DatasetRecord(**values["dataset"])
        if values["teacher"] is not None:
            values["teacher"] = TeacherRecord(**values["teacher"])
        return cls(**values)


def is_finite(value) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, Real) and math.isfinite(value)


# ---- What may be published ----

_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}")
_SECRET_FLAG = re.compile(r"(?:(?<!single[_-])token|secret|password|api_key)$", re.IGNORECASE)
# Not inside a word (224/16, and/or), a URL (https://...) or a relative path (../data).
_ABSOLUTE_PATH = re.compile(r"(?<![\w:/.\\-])(?:~|[A-Za-z]:)?[/\\][^\s'\",;]+")


def folder_name(path: str | os.PathLike) -> str:
    """The last part of a path, which reveals nothing about the machine it is on."""
    return re.split(r"[/\\]", str(Path(path).expanduser().resolve()))[-1]


def display_names(names: list[str]) -> list[str]:
    """Names for one or two models in reports and pages, which are shared: folders by the last part of their path."""
    shown = [folder_name(name) if os.path.isdir(os.path.expanduser(name)) else name for name in names]
    if len(set(shown)) < len(shown):  # outputs/a/best, outputs/b/best
        return [f"{name} ({order})" for name, order in zip(shown, ("first", "second"), strict=True)]
    return shown


def shareable(value):
    """The value as plain JSON data: enums as their values, absolute paths cut to their last part, no credentials."""
    if isinstance(value, dict):
        shown = {name: inner for name, inner in value.items() if inner is not None and not _SECRET_FLAG.search(name)}
        return {name: shareable(inner) for name, inner in shown.items()}
    if isinstance(value, list | tuple):
        return [shareable(inner) for inner in value]
    if isinstance(value, Enum):
        return shareable(value.value)
    if isinstance(value, bool | int | float | None):
        return value
    text = str(value)
    if _ABSOLUTE_PATH.match(text):  # the whole text is one path, which may contain spaces
        return folder_name(text)
    text = _ABSOLUTE_PATH.sub(lambda found: folder_name(found.group()), text)
    return _TOKEN.sub("(hidden)", text)


def shareable_command(command: Iterable[str]) -> list[str]:
    """The command line without the flags that carry credentials, and with only the last part of absolute paths."""
    words, is_secret = [], False
    for word in command:
        flag, equals, value = word.partition("=")
        is_flag = word.startswith("-")
        if is_flag:
            is_secret = _SECRET_FLAG.search(flag) is not None
        if not is_secret:  # the value of a secret flag may be a separate word: it is dropped, too
            words.append(f"{flag}={shareable(value)}" if is_flag and equals else shareable(word))
    return words

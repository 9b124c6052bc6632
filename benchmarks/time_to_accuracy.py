"""How many minutes of training a DeiT-Ti needs to reach an accuracy: with this project, timm and transformers.

    python benchmarks/time_to_accuracy.py --teacher outputs/teachers/FOLDER

The teacher is one that train_hf.py has fitted with the recipe and `--validation_from_train true`.

Ours has its own recipe; timm and transformers use the defaults of timm's train.py and of transformers' guide, in
float32 and, in a second row, with the machine's half precision switched on. All learn from the same images and the
same fitted teacher, and are evaluated on held-out images. Each trains in its own process. The results are written
after each; the same command resumes with those that are missing. Run nothing else on the machine meanwhile.
"""

import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml
from matplotlib.figure import Figure
from transformers import TimmWrapperForImageClassification, set_seed
from transformers.hf_argparser import HfArg

from benchmarks import contenders
from benchmarks.report import file_name, finish, make_result, style_axes, write_result
from benchmarks.setting import Precision, Rows, Setting, attempt, parse_setting, precision_of, run
from benchmarks.step_clock import Clock
from modeling_deit_ti.arguments import Arguments, check, check_at_least
from modeling_deit_ti.card.record import folder_name
from modeling_deit_ti.data import ImageData, load_images
from modeling_deit_ti.data.inputs import EvalImages, make_image_processor
from modeling_deit_ti.device import autocast
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.fitting import prepare_teacher
from modeling_deit_ti.parsing import parse_arguments


OURS = "ours"
# The defaults of timm's train.py, as far as train_hf.py has flags for them; see `train_timm` for the others.
TIMM_DEFAULTS = {
    "distill_mode": "both",
    "per_device_train_batch_size": 128,
    "learning_rate": 0.05,  # 0.1 x batch / 256
    "weight_decay": 2e-5,
    "max_grad_norm": 0,
    "num_train_epochs": 300,
    "label_smoothing_factor": 0.1,
    "drop_path_rate": 0,
    "crop": "resized",
    "auto_augment": "none",
    "random_erasing": 0,
    "mixup": 0,
    "cutmix": 0,
}
# How each trains, and the flags it adds to those that all share.
CONTENDERS: dict[str, tuple[contenders.Train, dict]] = {
    OURS: (contenders.train_ours, {}),
    "timm": (partial(contenders.train_timm, own_defaults=True), TIMM_DEFAULTS),
    "transformers": (contenders.train_as_the_guide, {"distill_mode": "soft", "crop": "none"}),
}


@dataclass
class TimeSetting(Setting):
    teacher: str | None = HfArg(
        default=None,
        help="Required: the folder of a teacher that train_hf.py has fitted, with --validation_from_train true.",
    )
    recipe: str = HfArg(default="recipes/cifar10_quick.yaml", help="Our recipe; its images and sizes apply to all.")
    dataset_name: str | None = HfArg(default=None, help="As in train_hf.py. Default: the recipe's.")
    targets: list[float] = HfArg(default_factory=lambda: [0.6, 0.7], help="Accuracies to reach, from 0 to 1.")
    peers_patch_size: int | None = HfArg(
        default=None,
        help="Patch size of the others, in pixels. Default: the recipe's. Their defaults drop no patches, so larger "
        "ones may be faster for them.",
    )
    limit: float = HfArg(default=3.0, help="The others stop after this many times our time to the highest target.")
    every_minutes: float = HfArg(default=2.0, help="Evaluate after each epoch, and this often within it.")
    contenders: list[str] = HfArg(
        default_factory=lambda: list(CONTENDERS),
        help="The contenders to run; ours always runs.",
        metadata={"choices": list(CONTENDERS)},
    )
    image_size: int = field(init=False)  # from the recipe
    patch_size: int = field(init=False)

    def __post_init__(self):
        super().__post_init__()
        if self.teacher is None or not Path(self.teacher).is_dir():
            raise UserError(f"--teacher {self.teacher}: name the folder of a teacher that train_hf.py has fitted.")
        check_at_least(self, limit=0)
        check(self, "every_minutes", lambda minutes: minutes > 0, "above 0")
        self.targets = sorted(self.targets)
        self.contenders = [name for name in CONTENDERS if name == OURS or name in self.contenders]
        ours = parse_arguments([f"--config={self.recipe}", f"--use_cpu={self.device == 'cpu'}"])
        self.dataset_name = self.dataset_name or ours.images.dataset_name
        self.image_size, self.patch_size = ours.model.image_size, ours.model.patch_size
        self.peers_patch_size = self.peers_patch_size or self.patch_size
        if self.image_size % self.peers_patch_size:
            raise UserError(f"--peers_patch_size {self.peers_patch_size} does not divide {self.image_size} pixels.")

    @property
    def rows(self) -> Rows:
        return self.rows_of(self.contenders)

    def shown(self) -> dict:
        """What decides the rows, for the results; paths are cut to their last part."""
        values = {name: value for name, value in asdict(self).items() if name not in ("contenders", "output_dir")}
        paths = [name for name in ("teacher", "recipe", "dataset_name") if Path(values[name]).exists()]
        return values | {name: folder_name(values[name]) for name in paths}


def make_arguments(
    setting: TimeSetting, work_dir: str, contender: str, precision: Precision | None = None
) -> Arguments:
    """[`contenders.make_arguments`] with the images of our recipe and the fitted teacher, which all share."""
    images = vars(parse_arguments([f"--config={setting.recipe}", f"--use_cpu={setting.device == 'cpu'}"]).images)
    flags = {name: value for name, value in images.items() if value is not None}
    flags |= {"dataset_name": setting.dataset_name, "validation_from_train": True}
    flags |= {"teacher_model_name_or_path": setting.teacher, "teacher_num_train_epochs": 0}  # it is already fitted
    if contender == OURS:
        flags["config"] = setting.recipe
    else:
        flags |= {"patch_size": setting.peers_patch_size} | CONTENDERS[contender][1]
    return contenders.make_arguments(setting, work_dir, precision, **flags)


# ---- Measurement ----


class AccuracyClock(Clock):
    """
    Records the watched student's accuracy over the minutes of its training, in `curve`. The clock stops while it
    evaluates: after each epoch, and every `every_minutes` within one. It is done at the accuracy `target` or after
    `limit_minutes`.
    """

    def __init__(self, args: Arguments, data: ImageData, target: float, every_minutes: float, limit_minutes: float):
        self.args, self.device, self.target = args, args.training.device.type, target
        self.every_minutes, self.limit_minutes = every_minutes, limit_minutes
        self.images = EvalImages(data.evaluation, make_image_processor(args.model, args.augmentation))
        self.images_per_epoch = len(data.train)
        self.images_seen = 0
        self.began: float | None = None  # moved forward by the time of all evaluations
        self.curve: list[dict] = []

    @property
    def minutes(self) -> float:
        return (self.now() - self.began) / 60

    def on_epoch_begin(self, *_, **__):
        if self.began is None:
            self.networks["student"].register_forward_pre_hook(self.count, with_kwargs=True)
            self.began = self.now()

    def count(self, student: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if student.training:
            self.images_seen += len(args[0] if args else kwargs["pixel_values"])

    def on_step_end(self, args, state, control, **_):
        last = self.curve[-1]["minutes"] if self.curve else 0.0
        if self.minutes >= min(last + self.every_minutes, self.limit_minutes):
            self.evaluate()
        control.should_training_stop |= self.is_done

    def on_epoch_end(self, args, state, control, **_):
        if not self.curve or self.curve[-1]["images"] < self.images_seen:  # unless the last step already did
            self.evaluate()
        control.should_training_stop |= self.is_done

    def evaluate(self) -> None:
        began, minutes = self.now(), self.minutes
        accuracy, epoch = self.accuracy(), self.images_seen / self.images_per_epoch
        self.curve.append({"minutes": minutes, "epoch": epoch, "images": self.images_seen, "accuracy": accuracy})
        print(f"{minutes:.1f} min, epoch {epoch:.2f}: {accuracy:.2%}", flush=True)
        self.is_done = accuracy >= self.target or minutes >= self.limit_minutes
        self.began += self.now() - began

    @torch.no_grad()
    def accuracy(self) -> float:
        """Top-1 of the student, in the precision of its training."""
        student, right = self.networks["student"].eval(), 0
        for batch in contenders.eval_batches(self.images, 250):
            with autocast(self.device, self.args.training.mixed_precision):
                output = student(batch["pixel_values"].to(self.device))
            logits = output if isinstance(output, torch.Tensor) else output.logits
            right += (logits.argmax(dim=-1).cpu() == batch["labels"]).sum().item()
        student.train()
        return right / len(self.images)


def measure(setting: TimeSetting, row: str, limit_minutes: float) -> dict:
    """A row's curve, and the minutes to each target, `None` where it was not reached."""
    torch.set_num_threads(setting.threads)
    set_seed(0)
    contender, precision = setting.rows[row]
    with tempfile.TemporaryDirectory(prefix="time-to-accuracy-") as work_dir:
        args = make_arguments(setting, work_dir, contender, precision)
        data = load_images(args.images)
        clock = AccuracyClock(args, data, setting.targets[-1], setting.every_minutes, limit_minutes)
        CONTENDERS[contender][0](args, data, clock)
    reached = [[point["minutes"] for point in clock.curve if point["accuracy"] >= goal] for goal in setting.targets]
    to_target = [minutes[0] if minutes else None for minutes in reached]
    return {"precision": precision_of(args), "curve": clock.curve, "minutes_to_target": to_target}


def plot(rows: list[dict], targets: list[float], file: Path) -> Figure:
    """Accuracy over minutes, 1500 x 900 pixels, one line per row."""
    figure = Figure(figsize=(10, 6), dpi=150, layout="constrained")
    axes = figure.subplots()
    # Okabe and Ito's colours can be told apart with any type of colour vision.
    colours = {OURS: "#D55E00", "timm": "#0072B2", "transformers": "#009E73"}
    for row in rows:
        if row["failed"]:
            continue
        minutes, accuracies = ([point[key] for point in row["curve"]] for key in ("minutes", "accuracy"))
        name, _, precision_by_flag = row["name"].partition(",")
        look = {"color": colours[name], "linestyle": "--" if precision_by_flag else "-"}
        marker = {"marker": "o" if len(minutes) <= 30 else None, "markersize": 3.5}
        axes.plot(minutes, accuracies, **look, **marker, label=f"{name} ({row['precision']})")
    for target in targets:
        axes.axhline(target, color="#777777", linestyle=":", linewidth=1.2)
    style_axes(axes, "top-1 on images held out from training", "minutes of training")
    figure.savefig(file)
    return figure


# ---- The command ----


def main(argv: list[str]) -> int:
    """The exit code: 1 if a contender failed."""
    setting = parse_setting(TimeSetting, argv, __doc__.splitlines()[0])
    began = time.monotonic()
    ours = make_arguments(setting, "", OURS)
    data = load_images(ours.images)  # also fills the cache that every process reads
    check_teacher(ours, data)
    facts = {"train_images": len(data.train), "held_out_images": len(data.evaluation)}
    facts |= {"recipe": yaml.safe_load(Path(setting.recipe).read_text()), "setting": setting.shown()}

    def result_of(rows: list[dict]) -> dict:
        return make_result(setting, began, rows, "time_to_accuracy") | facts

    folder = Path(setting.output_dir)
    file = folder / f"{file_name(result_of([]))}.json"
    rows = finished_rows(file, result_of([]))
    for row in setting.rows:
        if row in {finished["name"] for finished in rows}:
            print(f"{row}: already finished")
            continue
        limit = setting.limit * rows[0]["curve"][-1]["minutes"] if rows else math.inf
        print(f"{row}, at most {limit:.1f} minutes" if rows else row, flush=True)
        rows.append({"name": row, "failed": None} | attempt(measure, setting, row, limit))
        write_result(result_of(rows), folder)
        plot(rows, setting.targets, file.with_suffix(".png"))
        if rows[0]["failed"]:  # nothing says how long the others may take
            break
    return finish(result_of(rows), setting.output_dir)


def check_teacher(args: Arguments, data: ImageData) -> None:
    """Raises a `UserError` for a teacher that only our trainer could use."""
    teacher, _, name = prepare_teacher(args, data, make_image_processor(args.model, args.augmentation))
    is_timm = isinstance(teacher.model, TimmWrapperForImageClassification)
    if not (is_timm and teacher.same_normalisation and teacher.label_order is None):
        raise UserError(
            f"--teacher {name}: must be a timm architecture, fitted by train_hf.py to these labels, in this order, "
            "on images normalised like the student's: timm and transformers convert neither."
        )


def finished_rows(file: Path, result: dict) -> list[dict]:
    """The finished rows of an earlier run with the same settings on the same machine; ours must be among them."""
    if not file.is_file():
        return []
    earlier = json.loads(file.read_text())
    same = ("hardware", "processor", "versions", "setting", "recipe", "train_images", "held_out_images")
    is_same = all(earlier[key] == json.loads(json.dumps(result[key])) for key in same)
    rows = [row for row in earlier["rows"] if not row["failed"]]
    return rows if is_same and rows and rows[0]["name"] == OURS else []


if __name__ == "__main__":
    run(main)

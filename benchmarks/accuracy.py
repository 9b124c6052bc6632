"""Accuracy of finished runs: the table, curves and cards in results/ and model_cards/.

A `Run` is one training run of train_hf.py with one seed. A `Row` is a row of the published table: one read-out of a
run, averaged over its seeds. A `both` run has three read-outs, and so three rows.
"""

import json
import re
import shlex
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import RepoCard
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.report import render, style_axes
from modeling_deit_ti.arguments import Arguments
from modeling_deit_ti.card import CURVES_FILE, PUBLISHED_BASELINE, RunRecord, curve_series
from modeling_deit_ti.card.record import shareable
from modeling_deit_ti.checkpoints import last_complete


RESULTS, CARDS = Path("results"), Path("model_cards")
REPRODUCE_FILE = "reproduce.json"  # in a run's folder: what only reproduce.py knows about the run
CNNS = ("teacher", "cnn")  # the runs that train no student


@dataclass(frozen=True)
class Row:
    """A row of the table, what it is compared with, and its look in the plot."""

    name: str
    run: str
    readout: str | None = None  # None: the mode's own
    baseline: str | None = None  # the key in `PUBLISHED_BASELINE`
    paper: float | None = None  # top-1
    colour: str = "#777777"
    style: str | tuple = "-"

    @property
    def metric(self) -> str:
        return f"eval_accuracy_{self.readout}" if self.readout else "eval_accuracy"


# Okabe and Ito's colours can be told apart with any type of colour vision. Read-outs of one network share a colour.
ROWS = (
    Row("no distillation", "none", None, "none", 0.722, "#000000"),
    Row("usual (soft) distillation", "soft", None, "soft", 0.722, "#E69F00"),
    Row("hard distillation", "hard", None, "hard", 0.743, "#D55E00"),
    Row("token: distillation embedding only", "both", "distillation", None, 0.746, "#009E73", ":"),
    Row("token: class embedding only", "both", "class", None, 0.739, "#009E73", "--"),
    Row("token: class + distillation, soft teacher", "both-soft", None, "both, soft teacher", None, "#0072B2"),
    Row("token: class + distillation, standardised teacher", "both-standardized", None, None, None, "#0072B2", "--"),
    Row("token: class + distillation, hard teacher", "both", None, "both, hard teacher", 0.745, "#009E73"),
    Row("distillation token alone", "distill", None, "distillation", None, "#CC79A7", "-."),
    Row("class token alone", "class", None, "class", None, "#56B4E9", (0, (5, 3))),
    Row("CNN baseline", "cnn", None, "resnet18"),
    Row("teacher", "teacher"),
)


@dataclass
class Run:
    """One training run: its flags for train_hf.py, the arguments of each of its stages, and what its folder holds."""

    name: str
    seed: int
    flags: list[str]
    stages: list[Arguments]

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def args(self) -> Arguments:
        """The arguments of the last stage, whose folder is the run's."""
        return self.stages[-1]

    @property
    def folder(self) -> Path:
        return Path(self.args.training.output_dir)

    @property
    def epochs(self) -> float:
        return sum(stage.training.num_train_epochs for stage in self.stages)

    @property
    def is_finished(self) -> bool:
        return (self.folder / "all_results.json").is_file()

    @property
    def epochs_done(self) -> float:
        """Epochs up to the last complete checkpoint, or all of them."""
        return sum(map(stage_epochs_done, self.stages))

    @property
    def state(self) -> str:
        if self.is_finished:
            return "finished"
        done = self.epochs_done
        return f"interrupted after {done:.3g} of {self.epochs:g} epochs" if done else "not yet run"

    def epochs_reported(self, output: str) -> float:
        """Epochs over all stages, up to the last one in train_hf.py's output."""
        _, stage, text = ["", "1", *re.split(r"^Stage (\d+) of .*", output, flags=re.MULTILINE)][-3:]
        of_stage = re.findall(r"^Student: epoch ([\d.]+)/", text, re.MULTILINE)
        earlier = sum(done.training.num_train_epochs for done in self.stages[: int(stage) - 1])
        return earlier + (float(of_stage[-1]) if of_stage else 0.0)

    def load_record(self) -> dict:
        """`seconds`, summed over its processes, and the `commits` of the code that they ran."""
        file = self.folder / REPRODUCE_FILE
        return json.loads(file.read_text()) if file.is_file() else {"seconds": 0.0, "commits": []}

    def save_record(self, record: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / REPRODUCE_FILE).write_text(json.dumps(record, indent=2) + "\n")

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """Epochs, counted from the start of the first stage, and the accuracy after each."""
        epochs, accuracies, offset = [], [], 0.0
        for stage in self.stages:
            log = json.loads(Path(stage.training.output_dir, "trainer_state.json").read_text())["log_history"]
            of_stage = curve_series(log, metric)
            epochs += [offset + epoch for epoch in of_stage[0]]
            accuracies += of_stage[1]
            offset += stage.training.num_train_epochs
        return epochs, accuracies

    def accuracies(self) -> str:
        """Top-1 of each of its rows, as text."""
        results = json.loads((self.folder / "all_results.json").read_text())
        return "; ".join(f"{row.name} {results[row.metric]:.2%}" for row in ROWS if row.run == self.name)


def stage_epochs_done(stage: Arguments) -> float:
    folder = Path(stage.training.output_dir)
    if (folder / "all_results.json").is_file():
        return stage.training.num_train_epochs
    checkpoint = last_complete(folder)
    return json.loads(Path(checkpoint, "trainer_state.json").read_text())["epoch"] if checkpoint else 0.0


def write_results(budget: str, settings: dict, runs: list[Run]) -> None:
    """
    Writes `results/<budget>/` and the cards of the finished runs. `settings` is what all runs share, and `runs` has
    every run at least once, finished or not. A run that is already in the table stays there, with its curve, until it
    has finished again: a table takes hours, and may come from several machines. A table of another recipe is replaced
    once a run of this one has finished.
    """
    folder = RESULTS / budget
    folder.mkdir(parents=True, exist_ok=True)
    before, curves_before = (
        json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        for name in ("table.json", "curves.json")
    )
    if any(before.get(name) != value for name, value in shareable(settings).items()):
        if before and not any(run.is_finished for run in runs):
            return  # the table of another recipe stays until there is a figure to replace it
        before = curves_before = {}
    facts_before = {row["row"]: row["runs"] for row in before.get("rows", [])}
    table = make_table(budget, settings, runs, facts_before)
    curves = make_curves(runs)
    curves = curves_before | {name: curves_before.get(name, {}) | of_seeds for name, of_seeds in curves.items()}
    (folder / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    (folder / "table.md").write_text(render_table(table))
    (folder / "curves.json").write_text(json.dumps(curves, indent=2) + "\n")
    if curves:
        plot_curves(curves, table, folder / "curves.png")
    for run in runs:
        if run.is_finished:
            copy_card(budget, run)


# ---- The table ----


def make_table(budget: str, settings: dict, runs: list[Run], facts_before: dict[str, list[dict]]) -> dict:
    """
    `table.json`: what all rows share, and for each row its mean accuracies, their spread and every run. `facts_before`
    has each row's runs that finished earlier; a finished run in `runs` replaces the earlier one.
    """
    is_cifar10 = settings["dataset"].lower() == "cifar10"
    rows = []
    for row in ROWS:
        of_row = sorted((run for run in runs if run.name == row.run), key=lambda run: run.seed)
        training = of_row[0].args.training
        facts = {fact["seed"]: fact for fact in facts_before.get(row.name, [])}
        facts |= {run.seed: run_facts(run, row) for run in of_row if run.is_finished}
        facts = [fact for _, fact in sorted(facts.items())]
        entry = {
            "row": row.name,
            "run": row.run,
            "mode": training.mode.name + " (single token)" * training.single_token,
            "teacher_targets": training.mode.teacher_targets,
            "readout": row.readout or training.mode.readout,
            "architecture": facts[0]["architecture"] if facts else None,
            "state": "finished" if facts else of_row[0].state,
        }
        for name in ("top1", "top5"):
            values = [fact[name] for fact in facts]
            entry[name] = statistics.mean(values) if values else None
            entry[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        if is_cifar10:
            entry |= {"baseline_top1": PUBLISHED_BASELINE.get(row.baseline), "paper_top1": row.paper}
        rows.append({**entry, "runs": facts})
    return {"budget": budget, **shareable(settings), "rows": rows}


def run_facts(run: Run, row: Row) -> dict:
    """What the table says about one run."""
    record = RunRecord.load(run.folder)
    metrics = record.metrics
    return {
        "seed": run.seed,
        "architecture": record.architecture,
        "top1": metrics[row.metric],
        "top5": metrics[f"{row.metric}_top5"],
        "epochs": record.epochs,
        "train_images": record.dataset.num_train_images,
        "test_images": record.dataset.num_eval_images,
        "test_split": record.dataset.eval_split,
        "validation_images": record.hyperparameters.get("max_validation_samples", record.dataset.num_eval_images),
        "images_seen": record.images_seen,
        "seconds": record.seconds,
        "images_per_second": record.images_per_second,
        "device": record.hardware,
        "precision": record.hyperparameters["precision"],
        "teacher_top1": metrics.get("teacher_accuracy"),
        "date": record.date,
        "versions": record.versions,
        "commit": ", ".join(run.load_record()["commits"]),
    }


def render_table(table: dict) -> str:
    """`table.md`."""
    facts = [fact for row in table["rows"] for fact in row["runs"]]
    devices = defaultdict(dict)  # the names of the runs on each, as dict keys: in order, each once
    for row in table["rows"]:
        for fact in row["runs"]:
            devices[fact["device"]][row["run"]] = None
    flags = shlex.join(table["extra_flags"])
    return render("accuracy.md", **table, facts=facts, devices=devices, flags=flags, cnns=CNNS)


# ---- Curves ----


def make_curves(runs: list[Run]) -> dict:
    """`curves.json`: accuracy during training, by row and seed."""
    curves = {}
    for row in ROWS:
        for run in runs:
            if run.name == row.run and run.is_finished:
                epochs, accuracies = run.curve(row.metric)
                if epochs:
                    curves.setdefault(row.name, {})[str(run.seed)] = {"epochs": epochs, "accuracy": accuracies}
    return curves


def plot_curves(curves: dict, table: dict, file: Path) -> Figure:
    """
    Plots the accuracy of all rows over the epochs, 1500 x 900 pixels; for several seeds, the mean and the range. If
    the curves use only some of the test images, stars show the accuracy on all of them. `curves` is from
    [`make_curves`], `table` from [`make_table`].
    """
    figure = Figure(figsize=(10, 6), dpi=150, layout="constrained")
    axes = figure.subplots()
    top1 = {row["row"]: row["top1"] for row in table["rows"]}
    facts = next(fact for row in table["rows"] for fact in row["runs"])  # the images are the same for all
    is_subset = facts["validation_images"] < facts["test_images"]
    # Best final accuracy first.
    for row in sorted((row for row in ROWS if row.name in curves), key=lambda row: -top1[row.name]):
        label = f"{100 * top1[row.name]:.1f} %  {row.name}"
        if row.run == "teacher":
            # A line, not its curve: it was trained before its students, possibly for a different number of epochs.
            axes.axhline(top1[row.name], color="#000000", linestyle=":", linewidth=1.4, label=label)
            continue
        of_seeds = list(curves[row.name].values())
        points = min(len(curve["epochs"]) for curve in of_seeds)
        epochs = of_seeds[0]["epochs"][:points]
        accuracies = np.array([curve["accuracy"][:points] for curve in of_seeds])  # (seeds, points)
        marker = "o" if points <= 30 else None
        style = {"color": row.colour, "linestyle": row.style, "marker": marker, "markersize": 3.5}
        axes.plot(epochs, accuracies.mean(0), **style, label=label)
        if len(of_seeds) > 1:
            axes.fill_between(epochs, accuracies.min(0), accuracies.max(0), color=row.colour, alpha=0.15, linewidth=0)
        if is_subset:
            axes.plot(epochs[-1], top1[row.name], "*", color=row.colour, markersize=11, clip_on=False)
    images = f"{facts['validation_images']:,} images of the {facts['test_split']} split"
    style_axes(axes, f"{table['budget']}: accuracy during training, {images}", "epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(curves) <= 4:  # there is room below so few rising curves
        axes.legend(frameon=False, handlelength=3, loc="lower right", alignment="left")
    stars = f"\n(stars: on all {facts['test_images']:,} test images)" if is_subset else ""
    axes.get_legend().set_title("top-1 after the last epoch, as in the table" + stars)
    figure.savefig(file)
    return figure


# ---- Cards and state ----


def copy_card(budget: str, run: Run) -> None:
    """Copies the run's card, adapted to a folder without the model and its pictures."""
    card = RepoCard.load(run.folder / "README.md", ignore_metadata_errors=True)
    picture = f"![Accuracy of all rows over the epochs](../{RESULTS}/{budget}/curves.png)"
    text = re.sub(rf"^!\[[^\]]*\]\({re.escape(CURVES_FILE)}\)$", picture, card.content, flags=re.MULTILINE)
    text = re.sub(r"^!\[[^\]]*\]\([^/)]*\)\n\n", "", text, flags=re.MULTILINE)  # the report's, left behind
    note = (
        f"> Only the card of run `{run.name}` of [{budget}](../{RESULTS}/{budget}/table.md), seed {run.seed}: "
        "`reproduce.py` makes the model and the files that the card mentions.\n\n"
    )
    text = re.sub(r"^# ", f"{note}# ", text, count=1, flags=re.MULTILINE)
    seed = f"-seed{run.seed}" if run.seed else ""
    CARDS.mkdir(exist_ok=True)
    (CARDS / f"{budget}-{run.name}{seed}.md").write_text(text)


def write_state(budgets: list[str]) -> None:
    """Writes what has been run of these and any other budgets into `results/README.md`, between its two markers."""
    readme = RESULTS / "README.md"
    if not readme.is_file():
        return
    tables = {file.parent.name: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*/table.json"))}
    states = []
    for name in dict.fromkeys([*budgets, *tables]):
        is_finished = {row["run"]: bool(row["runs"]) for row in tables[name]["rows"]} if name in tables else {}
        finished = [run for run, done in is_finished.items() if done]
        states.append((name, finished, [run for run in is_finished if run not in finished]))
    head, mark, rest = readme.read_text().partition("<!-- state: reproduce.py writes the lines below -->\n")
    _, end, tail = rest.partition("<!-- end of state -->")
    if end:
        readme.write_text(head + mark + render("state.md", budgets=states) + end + tail)

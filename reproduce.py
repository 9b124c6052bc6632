"""Every row of the results' table, one command: trains what is missing, goes on where it stopped, writes the table.

    python reproduce.py --budget cpu --minutes 90
    python reproduce.py --budget native --accelerate_config accelerate_configs/one_gpu_fp16.yaml --seeds 0 1 2

A row is one run of train_hf.py with the budget's recipe, recipes/cifar10_<budget>.yaml, in a process of its own. So
what is finished, what can be resumed and what is never overwritten is as train_hf.py has it.
"""

import argparse
import fcntl
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from huggingface_hub import RepoCard
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

import train_hf
from modeling_deit_ti.card import CURVES_FILE, PUBLISHED_BASELINE, RunRecord, curve_series
from modeling_deit_ti.card.markdown import duration
from modeling_deit_ti.card.record import folder_name, shareable
from modeling_deit_ti.distillation import DistillMode
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.trainer import DistillationTrainingArguments


REPOSITORY = Path(__file__).resolve().parent
BUDGETS = ("seed", "native", "cpu", "long")
RESULTS, CARDS = Path("results"), Path("model_cards")
RECORD = "reproduce.json"  # in a run's folder: what this script knows of it and train_hf.py does not
# What an interrupted train_hf.py, and this script, ends with: started again, it goes on.
INTERRUPTED = train_hf.EXIT_INTERRUPTED
# Seconds that a run may take until it trains (imports, images, the teacher's accuracy), and to end when asked to.
START_SECONDS, STOP_SECONDS = 60, 60

# The rows to train, in this order, by the flags that make them. All else is the same for all.
ROWS = {
    "teacher": ["--distill_mode=none"],
    "cnn": ["--distill_mode=none"],
    "none": ["--distill_mode=none"],
    "soft": ["--distill_mode=soft"],
    "hard": ["--distill_mode=hard"],
    "both": ["--distill_mode=both"],
    "both-soft": ["--distill_mode=both", "--teacher_targets=soft"],
    "class": ["--distill_mode=class", "--single_token=true"],
    "distill": ["--distill_mode=distill", "--single_token=true"],
}
# A teacher is fitted as train_hf.py fits one: crops and flips alone.
TEACHER_FLAGS = [
    "--auto_augment=none",
    "--random_erasing=0",
    "--mixup=0",
    "--cutmix=0",
    "--repeated_augmentation=1",
]
# Flags that make the rows what they are, or that this script sets.
RESERVED = {
    *("config", "dataset_name", "disable_tqdm", "distill_mode", "hub_model_id", "max_steps", "model_name_or_path"),
    *("output_dir", "resume_from_checkpoint", "seed", "single_token", "teacher_pretrained", "teacher_targets"),
}


@dataclass(frozen=True)
class Line:
    """A line of the table: a read-out of a row, with top-1 of the published re-implementation and of the paper."""

    name: str
    row: str
    readout: str = ""  # the ending of the metrics' names
    seed: float | None = None
    paper: float | None = None
    colour: str = "#777777"
    style: str = "-"


# Colours of Okabe and Ito: told apart with any kind of colour vision. Read-outs of one network share theirs.
LINES = (
    Line("no distillation", "none", "", PUBLISHED_BASELINE["none"], 0.722, "#000000"),
    Line("usual (soft) distillation", "soft", "", PUBLISHED_BASELINE["soft"], 0.722, "#E69F00"),
    Line("hard distillation", "hard", "", PUBLISHED_BASELINE["hard"], 0.743, "#D55E00"),
    Line("token: distillation embedding only", "both", "_distillation", None, 0.746, "#009E73", ":"),
    Line("token: class embedding only", "both", "_class", None, 0.739, "#009E73", "--"),
    Line(
        "token: class + distillation, soft teacher",
        "both-soft",
        "",
        PUBLISHED_BASELINE["both, soft teacher"],
        None,
        "#0072B2",
    ),
    Line(
        "token: class + distillation, hard teacher",
        "both",
        "",
        PUBLISHED_BASELINE["both, hard teacher"],
        0.745,
        "#009E73",
    ),
    Line("distillation token alone", "distill", "", PUBLISHED_BASELINE["distillation"], None, "#CC79A7", "-."),
    Line("class token alone", "class", "", PUBLISHED_BASELINE["class"], None, "#56B4E9", (0, (5, 3))),
    Line("CNN baseline", "cnn", "", PUBLISHED_BASELINE["resnet18"], None, "#777777"),
    Line("teacher", "teacher"),
)


@dataclass
class Budget:
    """What all rows share."""

    name: str  # of the results: <dataset>-<budget>
    recipe: Path
    dataset_name: str
    cnn: str
    extra_flags: list[str]
    accelerate_config: str | None
    output_dir: Path
    seeds: list[int]

    @property
    def is_cifar10(self) -> bool:
        return folder_name(self.dataset_name).lower() == "cifar10"

    @property
    def settings(self) -> dict:
        """What rows that are compared have to have in common, as plain data."""
        return {
            "dataset": folder_name(self.dataset_name),
            "recipe": yaml.safe_load(self.recipe.read_text()),
            "extra_flags": self.extra_flags,
            "cnn": self.cnn,
            "accelerate_config": Path(self.accelerate_config).read_text() if self.accelerate_config else None,
        }


@dataclass
class Run:
    """One row with one seed: a run of train_hf.py, and what its folder says of it."""

    row: str
    seed: int
    flags: list[str]
    args: DistillationTrainingArguments  # what train_hf.py makes of the flags

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def mode(self) -> DistillMode:
        return self.args.mode

    @property
    def epochs(self) -> float:
        return self.args.num_train_epochs

    @property
    def is_student(self) -> bool:
        return self.row not in ("teacher", "cnn")

    @property
    def name(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def is_finished(self) -> bool:
        return (self.folder / "all_results.json").is_file()

    @property
    def epochs_done(self) -> float:
        """Epochs of the last complete checkpoint, or all of them."""
        if self.is_finished:
            return self.epochs
        checkpoint = train_hf.checkpoint_to_resume(self.args)
        return json.loads(Path(checkpoint, "trainer_state.json").read_text())["epoch"] if checkpoint else 0.0

    @property
    def state(self) -> str:
        if self.is_finished:
            return "finished"
        return (
            f"interrupted after {self.epochs_done:g} of {self.epochs:g} epochs" if self.epochs_done else "not yet run"
        )

    def load_record(self) -> dict:
        """`seconds` of all its processes together, and the `commits` of the code that they ran."""
        file = self.folder / RECORD
        return json.loads(file.read_text()) if file.is_file() else {"seconds": 0.0, "commits": []}

    def save_record(self, record: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    args, budget = parse_arguments(sys.argv[1:])
    runs = make_runs(budget)
    taught = {run.seed for run in runs if run.row in args.rows and run.mode.has_teacher}
    wanted = [run for run in runs if run.row in args.rows or (run.row == "teacher" and run.seed in taught)]
    if args.list:
        for run in wanted:
            print(f"{run.name:22}{run.state}")
        return
    check_settings(budget)

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    deadline = time.monotonic() + 60 * args.minutes if args.minutes is not None else None
    write_results(budget, runs)
    for position, run in enumerate(wanted, start=1):
        if run.is_finished:
            print(f"[{position}/{len(wanted)}] {run.name}: finished already", flush=True)
            continue
        out_of_time = deadline is not None and time.monotonic() > deadline - START_SECONDS - STOP_SECONDS
        if stop.is_set() or out_of_time:
            break
        progress = Progress(f"[{position}/{len(wanted)}] {run.name}", run, wanted)
        train(run, budget, progress, stop, deadline)
        write_results(budget, runs)
        if not run.is_finished:
            break
    left = [run for run in wanted if not run.is_finished]
    print(
        f"{len(wanted) - len(left)} of {len(wanted)} runs are finished; the table is {RESULTS / budget.name}/table.md"
    )
    if left:
        print(f"Left: {'; '.join(run.name for run in left)}. The same command goes on.", flush=True)
        sys.exit(INTERRUPTED)


# ---------------------------------------------------------------------------------------------------------------------
# What to run
# ---------------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, Budget]:
    """This script's flags, and after `--` those for every row."""
    parser = _Parser(
        description=__doc__.splitlines()[0],
        epilog="Flags of train_hf.py after `--` go to every row, and the table says so: reproduce.py -- --bf16",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--budget",
        default="cpu",
        help=f"How much is trained: {', '.join(BUDGETS)} (recipes/cifar10_<budget>.yaml), or a recipe of your own, a "
        "YAML file. Default: cpu, 90 minutes on two cores.",
    )
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="Which rows. Default: all.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Each row once with each. Default: 0.")
    parser.add_argument("--minutes", type=float, help="Stop after this time; the same command goes on later.")
    parser.add_argument("--dataset_name", help="As train_hf.py's. Default: the recipe's, or CIFAR-10 from the Hub.")
    parser.add_argument("--cnn_model_name_or_path", default="resnet18", help="The CNN baseline. Default: resnet18.")
    parser.add_argument(
        "--accelerate_config", help="Run the rows by `accelerate launch --config_file` with this file."
    )
    parser.add_argument("--output_dir", default="outputs/reproduce", help="Of the runs. Default: outputs/reproduce.")
    parser.add_argument("--list", action="store_true", help="Say what is finished, interrupted and not yet run.")
    own, extra_flags = argv, []
    if "--" in argv:
        own, extra_flags = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args = parser.parse_args(own)

    if args.minutes is not None and 60 * args.minutes < START_SECONDS + STOP_SECONDS:
        raise UserError(f"--minutes {args.minutes:g}: a row takes up to 2 minutes to start and to stop; give it more.")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise UserError(f"--seeds {' '.join(map(str, args.seeds))}: each is 0 or more, and there once.")
    if args.accelerate_config and not os.path.isfile(args.accelerate_config):
        raise UserError(f"--accelerate_config {args.accelerate_config}: there is no such file.")
    recipe = REPOSITORY / "recipes" / f"cifar10_{args.budget}.yaml" if args.budget in BUDGETS else Path(args.budget)
    if not recipe.is_file():
        raise UserError(f"--budget {args.budget}: it is one of {', '.join(BUDGETS)}, or a YAML file that is there.")
    for flag in extra_flags:
        if flag.startswith("--") and flag[2:].partition("=")[0].replace("-", "_") in RESERVED:
            raise UserError(f"{flag.partition('=')[0]} after `--`: every row has its own; it cannot be given to all.")

    dataset_name = args.dataset_name or train_hf.parse_arguments([f"--config={recipe}"])[1].dataset_name
    budget = args.budget if args.budget in BUDGETS else recipe.stem
    name = re.sub(r"[^\w.-]+", "-", f"{folder_name(dataset_name)}-{budget}")
    return args, Budget(
        name=name,
        recipe=recipe,
        dataset_name=dataset_name,
        cnn=args.cnn_model_name_or_path,
        extra_flags=extra_flags,
        accelerate_config=args.accelerate_config,
        output_dir=Path(args.output_dir) / name,
        seeds=args.seeds,
    )


def make_runs(budget: Budget) -> list[Run]:
    """
    All rows with all seeds, seed by seed. Each row's flags are checked here, before any of them runs.

    Raises:
        UserError: if train_hf.py would not take them, or the teacher is none that can be trained as a row.
    """
    shared = [f"--config={budget.recipe}", f"--dataset_name={budget.dataset_name}", *budget.extra_flags]
    _, _, teacher_args, training_args = train_hf.parse_arguments([*shared, "--distill_mode=none"])
    teacher = teacher_args.teacher_model_name_or_path
    if not train_hf.is_timm_architecture(teacher) or teacher_args.teacher_pretrained:
        raise UserError(
            f"{budget.recipe}: the teacher is a row of the table, so it has to be a timm architecture that starts "
            f"from scratch, not {teacher}{' with teacher_pretrained' * teacher_args.teacher_pretrained}."
        )
    if training_args.max_steps > 0:
        raise UserError(f"{budget.recipe}: max_steps would be other epochs for each row; use num_train_epochs.")
    runs = []
    for seed in budget.seeds:
        # The teacher's architecture is in the folder's name, which the cards of its students show.
        folders = {"teacher": f"teacher-{teacher}-seed{seed}", "cnn": f"cnn-{folder_name(budget.cnn)}-seed{seed}"}
        folders = {row: budget.output_dir / folders.get(row, f"{row}-seed{seed}") for row in ROWS}
        for row, own in ROWS.items():
            flags = [*shared, *own]
            if row == "teacher":
                flags += [f"--model_name_or_path={teacher}", *TEACHER_FLAGS]
                flags += [f"--num_train_epochs={teacher_args.teacher_num_train_epochs:g}"]
                flags += [f"--learning_rate={teacher_args.teacher_learning_rate:g}"]
                if teacher_args.teacher_image_size:
                    flags += [f"--image_size={teacher_args.teacher_image_size}"]
            elif row == "cnn":
                flags += [f"--model_name_or_path={budget.cnn}"]
            flags += [f"--seed={seed}", f"--output_dir={folders[row]}"]
            flags += ["--disable_tqdm=true", "--resume_from_checkpoint=True"]
            *_, args = train_hf.parse_arguments(flags)
            if args.mode.has_teacher:
                flags += [f"--teacher_model_name_or_path={folders['teacher']}"]
            runs.append(Run(row, seed, flags, args))
    return runs


def check_settings(budget: Budget) -> None:
    """
    Rows of different recipes in one table would be compared as if they were of one.

    Raises:
        UserError: if the rows that are there were run with other settings.
    """
    file = budget.output_dir / "settings.json"
    settings = json.loads(json.dumps(budget.settings))
    if file.is_file():
        before = json.loads(file.read_text())
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise UserError(
                f"--output_dir {budget.output_dir.parent}: the rows in {budget.output_dir} were run with another "
                f"{' and '.join(changed)} ({file}), and one table cannot hold both; name another folder, or delete "
                "this one."
            )
    budget.output_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Running a row
# ---------------------------------------------------------------------------------------------------------------------


class Progress:
    """One line on how far a run is and how long all will take: rewritten in a terminal, elsewhere now and then."""

    def __init__(self, title: str, run: Run, wanted: list[Run]):
        self.title, self.run, self.wanted = title, run, wanted
        self.started = self.marked = time.monotonic()
        self.first_epoch = self.epoch = run.epochs_done
        self.shown_at = self.shown_epoch = -1.0

    def reach(self, epoch: float) -> None:
        if epoch > self.epoch:
            self.epoch, self.marked = epoch, time.monotonic()

    def show(self) -> None:
        now = time.monotonic()
        is_terminal = sys.stdout.isatty()
        if not is_terminal and now - self.shown_at < (30 if self.epoch > self.shown_epoch else 300):
            return
        if is_terminal and now - self.shown_at < 1:
            return
        self.shown_at, self.shown_epoch = now, self.epoch
        left = self.seconds_left(now)
        line = f"{self.title}: epoch {self.epoch:.4g} of {self.run.epochs:g}, {duration(now - self.started)}; " + (
            "time left not known yet" if left is None else f"about {duration(left)} left for all"
        )
        print(f"\r{line:<100}" if is_terminal else line, end="" if is_terminal else "\n", flush=True)

    def end(self, text: str) -> None:
        """The last word on the run, in place of the line."""
        line = f"{self.title}: {text}"
        print(f"\r{line:<100}" if sys.stdout.isatty() else line, flush=True)

    def seconds_left(self, now: float) -> float | None:
        """Of this run and those after it; `None` while nothing says how long an epoch takes."""
        own = None
        if self.epoch > self.first_epoch:
            own = (self.marked - self.started) / (self.epoch - self.first_epoch)
        total = 0.0
        for run in self.wanted:
            if run.is_finished:
                continue
            is_this = run.name == self.run.name
            seconds = own if is_this and own is not None else seconds_per_epoch(run, self.wanted)
            seconds = seconds or own
            if seconds is None:
                return None
            total += seconds * (run.epochs - (self.epoch if is_this else run.epochs_done))
        return max(0.0, total - (now - self.marked))


def seconds_per_epoch(run: Run, runs: list[Run]) -> float | None:
    """By the finished runs that are likest it: its own row, its own kind of network, any. All see the same images."""
    finished = [other for other in runs if other.is_finished]
    for alike in (
        [other for other in finished if other.row == run.row],
        [other for other in finished if other.is_student == run.is_student],
        finished,
    ):
        if alike:
            return sum(other.load_record()["seconds"] for other in alike) / sum(other.epochs for other in alike)
    return None


def train(run: Run, budget: Budget, progress: Progress, stop: threading.Event, deadline: float | None) -> None:
    """
    Runs train_hf.py until it is finished, `stop` is set, or the time is nearly up.

    Raises:
        UserError: if another process trains this row, or train_hf.py says that the user made a mistake.
        SystemExit: with exit code 1 if it fails in another way.
    """
    launcher = [sys.executable]
    if budget.accelerate_config:
        launcher += ["-m", "accelerate.commands.launch", "--quiet", f"--config_file={budget.accelerate_config}"]
    command = [*launcher, str(REPOSITORY / "train_hf.py"), *run.flags]
    log_file = Path(f"{run.folder}.log")
    with open(log_file, "a") as log, open(log_file, errors="replace") as reader:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # inherited: held until the run itself has ended
        except OSError as error:
            raise UserError(f"{run.name}: another process trains it; its log is {log_file}.") from error
        reader.seek(0, os.SEEK_END)
        print(f"$ {shlex.join(command)}", file=log, flush=True)
        record = run.load_record()
        commit = commit_of(REPOSITORY)
        run.save_record({**record, "commits": list(dict.fromkeys([*record["commits"], commit]))})
        # A session of its own: Ctrl-C reaches this process alone, which then asks the run to stop.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        output = ""
        was_stopped = False
        while process.poll() is None:
            output += reader.read()
            for epoch in re.findall(r"'epoch': '?([\d.]+(?:e[+-]?\d+)?)", output):
                progress.reach(float(epoch))
            progress.show()
            if stop.is_set() or (deadline is not None and time.monotonic() > deadline - STOP_SECONDS):
                was_stopped = True
                progress.end("asked to stop")
                _end(process)
                break
            time.sleep(0.2)
        output += reader.read()
    record = run.load_record()
    run.save_record({**record, "seconds": round(record["seconds"] + time.monotonic() - progress.started, 1)})
    if run.is_finished:
        progress.end(describe_accuracy(run))
    elif was_stopped or process.returncode == INTERRUPTED:
        progress.end(run.state)
    else:
        raise failure(run, process.returncode, output, log_file)


def _end(process: subprocess.Popen) -> None:
    """Asks a run to write a checkpoint and stop; kills it, and what it has started, if it takes too long."""
    patience = time.monotonic() + STOP_SECONDS
    try:
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < patience:
            time.sleep(0.2)
            process.poll()  # takes the process itself off its group; a launcher ends before those that it launched
            os.killpg(process.pid, 0)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of them have ended
    process.wait()


def failure(run: Run, returncode: int, output: str, log_file: Path) -> Exception:
    """What to raise where train_hf.py failed: its own message is the one that helps."""
    lines = [line for line in output.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("train_hf.py: error: ")]
    reason = (own or lines or ["it said nothing"])[-1].removeprefix("train_hf.py: error: ")
    message = f"{run.name}: train_hf.py ended with exit code {returncode}: {reason} (its log: {log_file})"
    return UserError(message) if returncode == 2 else RowFailed(message)


class RowFailed(RuntimeError):
    """train_hf.py failed, and not because of what the user gave."""


def describe_accuracy(run: Run) -> str:
    results = json.loads((run.folder / "all_results.json").read_text())
    lines = [line for line in LINES if line.row == run.row]
    return "; ".join(f"{line.name} {100 * results[f'eval_accuracy{line.readout}']:.2f} %" for line in lines)


def commit_of(repository: Path) -> str:
    """The commit of the code that runs, and whether it was changed since."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=True
            ).stdout
            for arguments in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    # What this script itself writes is no change of the code.
    written = (f"{RESULTS}/", f"{CARDS}/")
    changed = [line for line in changes.splitlines() if not line[3:].startswith(written)]
    return commit.strip() + (" with changes" if changed else "")


# ---------------------------------------------------------------------------------------------------------------------
# What came out
# ---------------------------------------------------------------------------------------------------------------------


def write_results(budget: Budget, runs: list[Run]) -> None:
    """Table, curves and cards of what is finished, and the state of all budgets in results/README.md."""
    runs = [*runs, *_runs_of_other_seeds(budget)]
    folder = RESULTS / budget.name
    folder.mkdir(parents=True, exist_ok=True)
    table = make_table(budget, runs)
    (folder / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    (folder / "table.md").write_text(render_table(table))
    curves = make_curves(runs)
    (folder / "curves.json").write_text(json.dumps(curves, indent=2) + "\n")
    if curves:
        plot_curves(curves, table, folder / "curves.png")
    CARDS.mkdir(exist_ok=True)
    for run in runs:
        if run.is_finished:
            copy_card(budget, run)
    write_state()


def _runs_of_other_seeds(budget: Budget) -> list[Run]:
    """Finished runs with seeds that this command was not asked for: they belong to the table all the same."""
    found = {int(name.name.rpartition("seed")[2]) for name in budget.output_dir.glob("*-seed*") if name.is_dir()}
    seeds = sorted(found - set(budget.seeds))
    if not seeds:
        return []
    return [run for run in make_runs(replace(budget, seeds=seeds)) if run.is_finished]


def make_table(budget: Budget, runs: list[Run]) -> dict:
    """`table.json`: what all rows share, and for each line its mean accuracies, their spread and every run."""
    rows = []
    for line in LINES:
        of_row = sorted((run for run in runs if run.row == line.row), key=lambda run: run.seed)
        mode = of_row[0].mode
        facts = [run_facts(run, line) for run in of_row if run.is_finished]
        row = {
            "row": line.name,
            "run": line.row,
            "mode": mode.name + (" (single token)" if line.row in ("class", "distill") else ""),
            "teacher_targets": mode.teacher_targets,
            "readout": line.readout[1:] or mode.readout,
            "architecture": facts[0]["architecture"] if facts else None,
            "state": "finished" if facts else of_row[0].state,
        }
        for name in ("top1", "top5"):
            values = [fact[name] for fact in facts]
            row[name] = statistics.mean(values) if values else None
            row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
        row |= {"seed_top1": line.seed, "paper_top1": line.paper} if budget.is_cifar10 else {}
        rows.append({**row, "runs": facts})
    return {"budget": budget.name, **shareable(budget.settings), "rows": rows}


def run_facts(run: Run, line: Line) -> dict:
    """What the table says of one run. Accuracies are those after the last epoch, whatever came before."""
    record = RunRecord.load(run.folder)
    metrics = record.metrics
    return {
        "seed": run.seed,
        "architecture": record.architecture,
        "top1": metrics[f"eval_accuracy{line.readout}"],
        "top5": metrics[f"eval_accuracy{line.readout}_top5"],
        "epochs": metrics["epoch"],
        "train_images": record.dataset.num_train_images,
        "test_images": record.dataset.num_eval_images,
        "test_split": record.dataset.eval_split,
        "validation_images": record.hyperparameters.get("max_validation_samples", record.dataset.num_eval_images),
        "images_seen": round(metrics["train_samples_per_second"] * metrics["train_runtime"]),
        "seconds": metrics["train_runtime"],
        "images_per_second": metrics["train_samples_per_second"],
        "device": record.hardware,
        "precision": record.hyperparameters["precision"],
        "teacher_top1": metrics.get("teacher_accuracy"),
        "date": record.date,
        "versions": record.versions,
        "commit": ", ".join(run.load_record()["commits"]),
    }


def render_table(table: dict) -> str:
    """`table.md`."""
    header = ["row", "mode", "teacher's targets", "read-out", "top-1", "top-5", "seed's top-1", "paper's top-1"]
    header += ["epochs", "images seen", "seconds", "images/s", "seeds"]
    lines = [f"# {table['budget']}", ""]
    facts = [fact for row in table["rows"] for fact in row["runs"]]
    if not facts:
        lines += ["Not yet run.", ""]
    lines += [f"| {' | '.join(header)} |", f"|{'---|' * 4}{'---:|' * (len(header) - 4)}"]
    for row in table["rows"]:
        runs = row["runs"]
        is_student = row["run"] not in ("teacher", "cnn")
        cells = [
            row["row"] + ("" if is_student or not runs else f", {row['architecture']}"),
            row["mode"] if is_student else "-",
            row["teacher_targets"] or "-",
            row["readout"] if is_student else "-",
        ]
        if runs:
            cells += [_percent(row["top1"], row["top1_std"]), _percent(row["top5"], row["top5_std"])]
        else:
            cells += [row["state"], "-"]
        cells += [_percent(row.get("seed_top1")), _percent(row.get("paper_top1"))]
        for name, show in (
            ("epochs", "{:g}"),
            ("images_seen", "{:,.0f}"),
            ("seconds", "{:,.0f}"),
            ("images_per_second", "{:,.0f}"),
        ):
            cells.append(show.format(statistics.mean(run[name] for run in runs)) if runs else "-")
        cells.append(", ".join(str(run["seed"]) for run in runs) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    if facts:
        test = "; ".join(
            _distinct(f"{fact['test_images']:,} images of the split {fact['test_split']}" for fact in facts)
        )
        train = "; ".join(_distinct(f"{fact['train_images']:,}" for fact in facts))
        lines += [
            f"Top-1 and top-5 in per cent, after the last epoch, on {test}: no epoch was picked by them. All rows "
            f"were trained on the same {train} images. Where there is more than one seed: mean ± standard deviation "
            "of the seeds. The three read-outs of mode `both` with hard targets are one trained network. `seconds` is "
            "training, with the evaluations during it.",
            "",
        ]
    if any(row.get("seed_top1") for row in table["rows"]):
        lines += [
            "Beside them: the seed, a published student re-implementation (CIFAR-10, 224x224, 20 epochs, a T4 GPU), "
            "whose teacher's last layer had never been trained; and the paper (DeiT-Ti, ImageNet, 300 epochs). The "
            "seed's class and distillation rows are networks with that token alone. The class token alone learns from "
            "the labels as `none` does: the same computation, so the same accuracy is expected.",
            "",
        ]
    if table["extra_flags"]:
        lines += [f"Not the recipe as it is: run with the extra flags `{shlex.join(table['extra_flags'])}`.", ""]
    for name, show in (
        ("device", str),
        ("precision", lambda value: "float32" if value == "no" else value),
        ("versions", lambda value: ", ".join(f"{library} {number}" for library, number in value.items())),
        ("commit", str),
        ("date", str),
    ):
        values = _distinct(show(fact[name]) for fact in facts)
        lines += [f"- {name}: {'; '.join(values)}"] if values else []
    return "\n".join(lines).rstrip() + "\n"


def _percent(value: float | None, spread: float | None = None) -> str:
    if value is None:
        return "n/a"
    return f"{100 * value:.2f}" + (f" ± {100 * spread:.2f}" if spread is not None else "")


def _distinct(values) -> list[str]:
    return list(dict.fromkeys(values))


def make_curves(runs: list[Run]) -> dict:
    """`curves.json`: for each line that has any, its accuracy during training by seed."""
    curves = {}
    for line in LINES:
        for run in runs:
            if run.row == line.row and run.is_finished:
                log = json.loads((run.folder / "trainer_state.json").read_text())["log_history"]
                epochs, accuracies = curve_series(log, f"eval_accuracy{line.readout}")
                if epochs:
                    curves.setdefault(line.name, {})[str(run.seed)] = {"epochs": epochs, "accuracy": accuracies}
    return curves


def plot_curves(curves: dict, table: dict, file: Path) -> Figure:
    """
    Accuracy over the epochs, all rows in one picture of 1500 x 900 pixels; of several seeds their mean and range.

    Args:
        curves (`dict`): see `make_curves`.
        table (`dict`): see `make_table`.
        file (`Path`): where to.
    """
    figure = Figure(figsize=(10, 6), dpi=150, layout="constrained")
    axes = figure.subplots()
    top1 = {row["row"]: row["top1"] for row in table["rows"]}
    handles = []
    for line in LINES:
        if line.name not in curves:
            continue
        of_seeds = list(curves[line.name].values())
        points = min(len(curve["epochs"]) for curve in of_seeds)
        by_epoch = list(zip(*(curve["accuracy"][:points] for curve in of_seeds), strict=True))
        epochs, means = of_seeds[0]["epochs"][:points], [statistics.mean(values) for values in by_epoch]
        if line.row == "teacher":
            # Not its curve: it was trained before its students, maybe for other epochs.
            handle = axes.axhline(top1[line.name], color="#000000", linestyle=":", linewidth=1.4)
        else:
            marker = "o" if points <= 30 else None
            (handle,) = axes.plot(
                epochs, means, color=line.colour, linestyle=line.style, marker=marker, markersize=3.5
            )
            if len(of_seeds) > 1:
                low, high = [min(values) for values in by_epoch], [max(values) for values in by_epoch]
                axes.fill_between(epochs, low, high, color=line.colour, alpha=0.15, linewidth=0)
        handle.set_label(f"{100 * top1[line.name]:.1f} %  {line.name}")
        handles.append((top1[line.name], handle))
    facts = [fact for row in table["rows"] for fact in row["runs"]]
    images = " / ".join(_distinct(f"{fact['validation_images']:,}" for fact in facts))
    split = " / ".join(_distinct(fact["test_split"] for fact in facts))
    axes.set_title(f"{table['budget']}: accuracy during training, {images} images of the split {split}", loc="left")
    axes.set_xlabel("epoch")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0, symbol=" %"))
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Beside the axes, so that it covers no curve; sorted, so that it reads as the curves end.
    handles = [handle for _, handle in sorted(handles, key=lambda pair: -pair[0])]
    legend = axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=3)
    legend.set_title("top-1 after the last epoch, as in the table")
    legend.set_alignment("left")
    figure.savefig(file)
    return figure


def copy_card(budget: Budget, run: Run) -> None:
    """The run's card, without its weights and pictures beside it."""
    card = RepoCard.load(run.folder / "README.md", ignore_metadata_errors=True)
    picture = f"![Accuracy of all rows over the epochs](../{RESULTS}/{budget.name}/curves.png)"
    text = re.sub(rf"^!\[[^\]]*\]\({re.escape(CURVES_FILE)}\)$", picture, card.content, flags=re.MULTILINE)
    note = (
        f"> This is the card alone, of the row `{run.row}` of [{budget.name}](../{RESULTS}/{budget.name}/table.md), "
        f"seed {run.seed}. The model, with the files that the card speaks of, is made by `reproduce.py`.\n\n"
    )
    text = re.sub(r"^# ", f"{note}# ", text, count=1, flags=re.MULTILINE)
    seed = f"-seed{run.seed}" if run.seed else ""
    (CARDS / f"{budget.name}-{run.row}{seed}.md").write_text(text)


STATE = re.compile(
    r"(<!-- state: reproduce.py writes what is between these two lines -->\n).*(<!-- end of state -->)", re.S
)


def write_state() -> None:
    """The state of every budget into results/README.md, between its two marks."""
    readme = RESULTS / "README.md"
    if not readme.is_file():
        return
    lines = ["| budget | state | rows |", "|---|---|---|"]
    tables = {file.parent.name: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*/table.json"))}
    for name in dict.fromkeys([*(f"cifar10-{budget}" for budget in BUDGETS), *tables]):
        rows = {row["run"]: bool(row["runs"]) for row in tables[name]["rows"]} if name in tables else {}
        finished = [row for row in ROWS if rows.get(row)]
        missing = [row for row in ROWS if not rows.get(row)]
        if not finished:
            lines.append(f"| {name} | not yet run | |")
        else:
            left = f"; not yet run: {', '.join(missing)}" if missing else ""
            lines.append(
                f"| [{name}]({name}/table.md) | {len(finished)} of {len(ROWS)} rows | {', '.join(finished)}{left} |"
            )
    state = "\n".join(lines) + "\n"
    readme.write_text(STATE.sub(lambda found: found[1] + state + found[2], readme.read_text()))


if __name__ == "__main__":
    try:
        main()
    except (UserError, RowFailed) as error:
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)

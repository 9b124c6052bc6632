"""Trains every row of the results table, resumes what was interrupted, and writes the table, curves and cards.

    python reproduce.py --budget small --minutes 90
    python reproduce.py --budget native --accelerate_config accelerate_configs/one_gpu_fp16.yaml --seeds 0 1 2

Each run is train_hf.py with the budget's recipe, recipes/cifar10_<budget>.yaml, in its own process: train_hf.py
decides what is finished, what can be resumed and what is never overwritten.
"""

import fcntl
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from benchmarks.accuracy import CARDS, RESULTS, Run, write_results, write_state
from modeling_deit_ti.card.record import folder_name
from modeling_deit_ti.classifiers import is_timm_architecture, timm_hub_id
from modeling_deit_ti.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from modeling_deit_ti.fitting import FITTING_VERSION
from modeling_deit_ti.parsing import fitting_flags, parse_arguments, parse_stages


REPOSITORY = Path(__file__).resolve().parent
BUDGETS = ("baseline", "native", "cpu", "afternoon", "small", "long")
# How long a run may take to reach its first step (imports, images, the teacher's accuracy), and to stop when told to.
START_SECONDS, STOP_SECONDS = 60, 60

# The runs, in this order, and the flags that set them apart.
RUNS = {
    "teacher": [],  # see `fitting_flags`
    "cnn": ["--distill_mode=none"],
    "none": ["--distill_mode=none"],
    "soft": ["--distill_mode=soft"],
    "hard": ["--distill_mode=hard"],
    "both": ["--distill_mode=both"],
    "both-soft": ["--distill_mode=both", "--teacher_targets=soft"],
    "both-standardized": ["--distill_mode=both", "--teacher_targets=standardized"],
    "class": ["--distill_mode=class", "--single_token=true"],
    "distill": ["--distill_mode=distill", "--single_token=true"],
}
# Flags that differ between the runs, or that this script sets.
RESERVED = {
    *("config", "dataset_name", "disable_tqdm", "distill_mode", "hub_model_id", "max_steps", "model_name_or_path"),
    *("output_dir", "resume_from_checkpoint", "seed", "single_token", "teacher_pretrained", "teacher_targets"),
}


class RunFailed(RuntimeError):
    """train_hf.py failed for a reason other than a user's mistake."""


@dataclass
class ReproduceArguments:
    """What to train, and where. All rows of one table share everything but `rows`, `seeds` and `minutes`."""

    budget: str = HfArg(
        default="small",
        help=f"How much to train: {', '.join(BUDGETS)} (recipes/cifar10_<budget>.yaml), or a YAML recipe of your own.",
    )
    rows: list[str] = HfArg(
        default_factory=lambda: list(RUNS),
        help="The runs to train; each fills one or more rows of the table.",
        metadata={"choices": list(RUNS)},
    )
    seeds: list[int] = HfArg(default_factory=lambda: [0], help="Train each run once per seed.")
    minutes: float = HfArg(default=math.inf, help="Stop within this time; the same command resumes later.")
    dataset_name: str | None = HfArg(default=None, help="See train_hf.py. Default: the recipe's, or CIFAR-10.")
    cnn_model_name_or_path: str = HfArg(default="resnet18", help="The CNN baseline.")
    accelerate_config: str | None = HfArg(default=None, help="For `accelerate launch --config_file`.")
    output_dir: str = HfArg(default="outputs/reproduce", help="Where the runs go.")
    list: bool = HfArg(default=False, help="Only show what is finished, interrupted and not yet run.")
    extra_flags = ()  # for train_hf.py, after `--`
    teacher_config = None  # from the recipe or the extra flags

    def __post_init__(self):
        if 60 * self.minutes < START_SECONDS + STOP_SECONDS:
            raise UserError(f"--minutes {self.minutes:g}: must be at least 2: a run takes time to start and to stop.")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise UserError(f"--seeds {' '.join(map(str, self.seeds))}: must be at least 0 and all different.")
        if self.accelerate_config and not os.path.isfile(self.accelerate_config):
            raise UserError(f"--accelerate_config {self.accelerate_config}: there is no such file.")
        is_ours = self.budget in BUDGETS
        self.recipe = REPOSITORY / "recipes" / f"cifar10_{self.budget}.yaml" if is_ours else Path(self.budget)
        if not self.recipe.is_file():
            raise UserError(f"--budget {self.budget}: must be one of {', '.join(BUDGETS)}, or a YAML file.")

    @property
    def name(self) -> str:
        """The name of the results: <dataset>-<budget>."""
        return re.sub(r"[^\w.-]+", "-", f"{folder_name(self.dataset_name)}-{Path(self.budget).stem}")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir, self.name)

    def settings(self) -> dict:
        """What all rows of a table have in common, as plain data."""
        return {
            "dataset": folder_name(self.dataset_name),
            "recipe": yaml.safe_load(self.recipe.read_text()),
            "teacher_config": yaml.safe_load(Path(self.teacher_config).read_text()) if self.teacher_config else None,
            "extra_flags": self.extra_flags,
            "cnn": self.cnn_model_name_or_path,
            "fitting_version": FITTING_VERSION,
            "accelerate_config": Path(self.accelerate_config).read_text() if self.accelerate_config else None,
        }


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # so that messages reach a log file at once
    args = parse_command(sys.argv[1:])
    runs = make_runs(args, args.seeds)
    taught = {run.seed for run in runs if run.name in args.rows and run.args.training.mode.has_teacher}
    wanted = [run for run in runs if run.name in args.rows or (run.name == "teacher" and run.seed in taught)]
    if args.list:
        width = max(len(run.title) for run in wanted)
        for run in wanted:
            print(f"{run.title:{width}}  {run.state}")
        return
    check_settings(args)

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    deadline = time.monotonic() + 60 * args.minutes
    update_results(args, runs)
    with progress_bar(wanted) as bar:
        for position, run in enumerate(wanted, start=1):
            title = f"[{position}/{len(wanted)}] {run.title}"
            bar.set_description(title)
            if run.is_finished:
                bar.write(f"{title}: already finished")
                continue
            if stop.is_set() or time.monotonic() > deadline - START_SECONDS - STOP_SECONDS:
                break
            train(run, args, bar, stop, deadline)
            bar.write(f"{title}: {run.accuracies() if run.is_finished else run.state}")
            update_results(args, runs)
            if not run.is_finished:
                break
    left = [run.title for run in wanted if not run.is_finished]
    print(f"{len(wanted) - len(left)} of {len(wanted)} runs are finished: {RESULTS / args.name}/table.md")
    if left:
        print(f"Left: {'; '.join(left)}. Run the same command again to continue.")
        sys.exit(EXIT_INTERRUPTED)


# ---- What to run ----


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def parse_command(argv: list[str]) -> ReproduceArguments:
    """This script's flags, and after `--` those of train_hf.py."""
    parser = _Parser(
        ReproduceArguments,
        description=__doc__.splitlines()[0],
        epilog="Flags after `--` go to train_hf.py in every run and are shown in the table: reproduce.py -- --bf16. "
        "They also set the teacher's recipe, as in train_hf.py: --teacher_config and the like.",
        allow_abbrev=False,
    )
    split = argv.index("--") if "--" in argv else len(argv)
    args = ReproduceArguments(**vars(parser.parse_args(argv[:split])))
    args.extra_flags = argv[split + 1 :]
    for flag in args.extra_flags:
        if flag.startswith("--") and flag[2:].partition("=")[0].replace("-", "_") in RESERVED:
            raise UserError(f"{flag.partition('=')[0]} after `--`: each run sets its own.")
    recipe = parse_arguments([f"--config={args.recipe}", *args.extra_flags])
    if recipe.training.hub_token:
        raise UserError("--hub_token would appear in the results: set HF_TOKEN instead, or use `hf auth login`.")
    args.dataset_name = args.dataset_name or recipe.images.dataset_name
    args.teacher_config = recipe.teacher.teacher_config
    return args


def make_runs(args: ReproduceArguments, seeds: list[int]) -> list[Run]:
    """
    Every run with each seed.

    Raises:
        UserError: if train_hf.py would reject the flags of one of them, or the teacher is not trained.
    """
    shared = [f"--config={args.recipe}", f"--dataset_name={args.dataset_name}", *args.extra_flags]
    student = parse_arguments([*shared, "--distill_mode=hard"])
    teacher, is_pretrained = student.teacher.teacher_model_name_or_path, student.teacher.teacher_pretrained
    if student.teacher.teacher_num_train_epochs == 0:
        raise UserError(f"{args.recipe}: the teacher is a row of the table, so its number of epochs must be above 0.")
    start = teacher
    if is_timm_architecture(teacher):  # as in fitting.py: a tag alone does not ask for weights
        start = timm_hub_id(teacher) if is_pretrained else teacher.partition(".")[0]
    runs = []
    for seed, (name, own) in itertools.product(seeds, RUNS.items()):
        # A student's card names its teacher by its folder, so the folder names the architecture.
        teacher_folder = args.folder / f"teacher-{folder_name(teacher)}-seed{seed}"
        flags, folder = [*shared, *own], args.folder / f"{name}-seed{seed}"
        if name == "teacher":
            own = [flag for flag in fitting_flags(student) if not flag.startswith("--model_name_or_path=")]
            flags, folder = [*own, f"--model_name_or_path={start}"], teacher_folder
        elif name == "cnn":
            flags += [f"--model_name_or_path={args.cnn_model_name_or_path}"]
            folder = args.folder / f"cnn-{folder_name(args.cnn_model_name_or_path)}-seed{seed}"
        else:
            flags += [f"--teacher_model_name_or_path={teacher_folder}", "--teacher_pretrained=False"]
        flags += [f"--seed={seed}", f"--output_dir={folder}", "--disable_tqdm=true"]
        runs.append(Run(name, seed, flags, parse_stages(flags)))
    return runs


def check_settings(args: ReproduceArguments) -> None:
    """Raises a `UserError` if the runs in the output folder have other settings, since one table compares them."""
    file = args.folder / "settings.json"
    settings = json.loads(json.dumps(args.settings()))
    before = json.loads(file.read_text()) if file.is_file() else settings
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        raise UserError(
            f"--output_dir {args.output_dir}: the runs in {args.folder} have a different {' and '.join(changed)} "
            f"({file}) and cannot share a table with these; choose another folder, or delete this one."
        )
    args.folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n")


def update_results(args: ReproduceArguments, runs: list[Run]) -> None:
    """Writes the results of these runs, and of finished ones with other seeds, which belong to the same table."""
    names = (path.name for path in args.folder.glob("*-seed*") if path.is_dir())
    found = {int(match[1]) for match in map(re.compile(r".*-seed(\d+)").fullmatch, names) if match}
    others = make_runs(args, sorted(found - set(args.seeds)))
    write_results(args.name, args.settings(), runs + [run for run in others if run.is_finished])
    write_state([f"cifar10-{name}" for name in BUDGETS])


# ---- Running ----


def progress_bar(runs: list[Run]) -> tqdm:
    """Epochs of all runs: redrawn every second in a terminal, every minute in a log file."""
    return tqdm(
        total=sum(run.epochs for run in runs),
        initial=sum(run.epochs_done for run in runs),
        bar_format="{desc}{bar} {n:.4g} of {total:g} epochs [{elapsed}<{remaining}]",
        mininterval=1 if sys.stderr.isatty() else 60,
        miniters=0,
        smoothing=0,  # estimate from all epochs so far: there are few, and those of one run are alike
        dynamic_ncols=True,
    )


def train(run: Run, args: ReproduceArguments, bar: tqdm, stop: threading.Event, deadline: float) -> None:
    """
    Runs train_hf.py until it has finished, `stop` is set, or the time is nearly up.

    Raises a `UserError` if another process is training this run, or train_hf.py reports a user's mistake, and
    `RunFailed` if it fails in any other way.
    """
    launcher = [sys.executable]
    if args.accelerate_config:
        launcher += ["-m", "accelerate.commands.launch", "--quiet", f"--config_file={args.accelerate_config}"]
    command = [*launcher, str(REPOSITORY / "train_hf.py"), *run.flags]
    log_file = Path(f"{run.folder}.log")
    with open(log_file, "a") as log, open(log_file, errors="replace") as reader:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # inherited by the run, and held until it ends
        except OSError as error:
            raise UserError(f"{run.title}: another process is training it; its log is {log_file}.") from error
        reader.seek(0, os.SEEK_END)
        print(f"$ {shlex.join(command)}", file=log, flush=True)
        record, started = run.load_record(), time.monotonic()
        record["commits"] = list(dict.fromkeys([*record["commits"], current_commit()]))
        run.save_record(record)
        # In a session of its own, so that Ctrl-C only reaches this process, which then tells the run to stop.
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, **streams, env=unbuffered, start_new_session=True)
        output, was_stopped = "", False
        epochs_before = bar.n - run.epochs_done  # of the other runs
        while process.poll() is None:
            output += reader.read()
            bar.update(max(0, epochs_before + run.epochs_reported(output) - bar.n))
            if stop.is_set() or time.monotonic() > deadline - STOP_SECONDS:
                was_stopped = True
                bar.write(f"{run.title}: stopping")
                end(process)
            time.sleep(0.2)
        output += reader.read()
    bar.update(epochs_before + run.epochs_done - bar.n)
    run.save_record({**record, "seconds": round(record["seconds"] + time.monotonic() - started, 1)})
    if not (run.is_finished or was_stopped or process.returncode == EXIT_INTERRUPTED):
        errors = re.findall(r"^train_hf\.py: error: (.+)", output, re.MULTILINE)
        reason = (errors or output.strip().splitlines() or ["no output"])[-1]
        message = f"{run.title}: train_hf.py ended with exit code {process.returncode}: {reason} (see {log_file})"
        raise UserError(message) if process.returncode == EXIT_USER_ERROR else RunFailed(message)


def end(process: subprocess.Popen) -> None:
    """Tells a run to write a checkpoint and stop; kills its whole process group if that takes too long."""
    patience = time.monotonic() + STOP_SECONDS
    try:
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < patience:
            time.sleep(0.2)
            process.poll()  # reaps it, so that its group can empty; a launcher may end before the processes it started
            os.killpg(process.pid, 0)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all have ended
    process.wait()


def current_commit() -> str:
    """The commit of this code, and whether it has been changed since."""
    # What this script writes does not count as a change.
    status = ["status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS}", f":!{CARDS}"]
    try:
        commit = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], text=True, cwd=REPOSITORY).strip()
        return commit + " with changes" * bool(subprocess.check_output(["git", *status], cwd=REPOSITORY))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    try:
        main()
    except (UserError, RunFailed, OSError) as error:  # an `OSError`: the disk is full, for example
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR if isinstance(error, UserError) else 1)

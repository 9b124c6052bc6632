"""All rows by one command: real runs, interrupted and gone on with, and what is written of them."""

import fcntl
import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import reproduce
from modeling_deit_ti.card import DatasetRecord, RunRecord
from modeling_deit_ti.data import DataArguments
from modeling_deit_ti.distillation import resolve_mode
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.teacher import _fitting_arguments


REPOSITORY = Path(reproduce.__file__).parent
RECIPE = """
dataset_name: digits
image_size: 32
patch_size: 16
drop_path_rate: 0
crop: none
horizontal_flip: 0
auto_augment: none
random_erasing: 0
mixup: 0
cutmix: 0
repeated_augmentation: 1
max_train_samples: 128
max_validation_samples: 100
per_device_train_batch_size: 32
num_train_epochs: 3
learning_rate: 5e-4
teacher_model_name_or_path: test_resnet
teacher_num_train_epochs: 8
teacher_learning_rate: 2e-2
"""
FLAGS = ["--budget=tiny.yaml", "--cnn_model_name_or_path=test_resnet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "broken.yaml").write_text("- a list")
    (folder / "results").mkdir()
    shutil.copy(REPOSITORY / "results" / "README.md", folder / "results")
    return folder


@pytest.fixture
def call(monkeypatch, capsys, folder):
    """Runs the command in this process, in a folder of its own, and gives its exit code and what it printed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*flags: str) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *FLAGS, *flags])
        code = 0
        try:
            reproduce.main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def read(file: Path) -> dict:
    return json.loads(file.read_text())


# ---- Running ----


def test_an_interrupted_row_goes_on_where_it_was(folder, call):
    runs = folder / "outputs" / "reproduce" / "digits-tiny"
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "reproduce.py"), *FLAGS, "--rows", "none"],
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(runs.glob("none-seed0/checkpoint-*/trainer_state.json")):
        time.sleep(0.05)
    time.sleep(0.2)  # until the file is written
    process.send_signal(signal.SIGTERM)
    printed = process.communicate()[0]
    assert process.returncode == 75, printed
    assert "none, seed 0: asked to stop" in printed
    assert "none, seed 0: interrupted after " in printed and " of 3 epochs" in printed
    assert "0 of 1 runs are finished" in printed and "Left: none, seed 0. The same command goes on." in printed
    log = runs / "none-seed0.log"
    with open(log) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it was the run's own: the run has ended
    assert not (runs / "none-seed0" / "all_results.json").exists()
    assert call("--list", "--rows", "none")[1].startswith("none, seed 0          interrupted after ")

    first = log.stat().st_size
    code, printed = call("--rows", "none")
    assert code == 0 and "1 of 1 runs are finished" in printed
    gone_on = log.read_text()[first:]
    assert "'epoch': '3'" in gone_on and "'epoch': '1'" not in gone_on
    results = read(runs / "none-seed0" / "all_results.json")
    assert results["epoch"] == 3
    assert f"no distillation {100 * results['eval_accuracy']:.2f} %" in printed
    row = next(row for row in read(folder / "results/digits-tiny/table.json")["rows"] if row["run"] == "none")
    assert row["runs"][0]["images_seen"] == 3 * 128


def test_a_students_row_trains_the_teachers_row_first(folder, call):
    code, printed = call("--rows", "hard", "cnn")
    assert code == 0 and "3 of 3 runs are finished" in printed
    order = [printed.index(f"{name}, seed 0: ") for name in ("teacher", "cnn", "hard")]
    assert order == sorted(order)
    table = read(folder / "results" / "digits-tiny" / "table.json")
    rows = {row["run"]: row for row in table["rows"]}
    teacher, hard = rows["teacher"]["runs"][0], rows["hard"]["runs"][0]
    # The row and the teacher of the students are one model, measured on the same images.
    assert hard["teacher_top1"] == pytest.approx(teacher["top1"]) and teacher["top1"] > 0.5
    assert (teacher["epochs"], teacher["images_seen"], hard["epochs"]) == (8, 1024, 3)
    assert (teacher["architecture"], hard["architecture"]) == ("test_resnet", "deit_ti")
    assert (rows["hard"]["mode"], rows["hard"]["teacher_targets"], rows["hard"]["readout"]) == (
        "hard",
        "hard",
        "class",
    )
    for fact in (teacher, hard):
        assert fact["test_images"] == 359 and fact["train_images"] == 128 and fact["precision"] == "no"
        assert fact["top5"] > fact["top1"] and fact["seconds"] > 0 and fact["images_per_second"] > 0
        assert "torch" in fact["versions"] and "CPU core" in fact["device"] and fact["commit"]
    assert rows["soft"]["state"] == "not yet run" and rows["soft"]["top1"] is None and rows["soft"]["runs"] == []


def test_results_are_of_all_images_and_curves_of_the_validation_images(folder):
    """After the test above."""
    run = folder / "outputs" / "reproduce" / "digits-tiny" / "hard-seed0"
    log = [entry for entry in read(run / "trainer_state.json")["log_history"] if "eval_accuracy" in entry]
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 3]
    for entry in log[:-1]:
        assert entry["eval_accuracy"] * 100 == pytest.approx(round(entry["eval_accuracy"] * 100))
    assert log[-1]["eval_accuracy"] * 359 == pytest.approx(round(log[-1]["eval_accuracy"] * 359))
    assert read(run / "all_results.json")["eval_accuracy"] == log[-1]["eval_accuracy"]
    curve = read(folder / "results/digits-tiny/curves.json")["hard distillation"]["0"]
    assert curve == {"epochs": [1, 2, 3], "accuracy": [entry["eval_accuracy"] for entry in log[:-1]]}


def test_what_is_committed_names_every_finished_row(folder):
    """After the tests above."""
    text = (folder / "results" / "digits-tiny" / "table.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(reproduce.LINES) and len({line.count("|") for line in lines}) == 1
    assert sum("not yet run" in line for line in lines) == 7
    assert "on 359 images of the split test" in text and "the same 128 images" in text
    assert "- device: " in text and "- commit: " in text and "torch 2" in text
    assert Image.open(folder / "results" / "digits-tiny" / "curves.png").size == (1500, 900)
    cards = {path.name: path.read_text() for path in (folder / "model_cards").iterdir()}
    assert sorted(cards) == [f"digits-tiny-{row}.md" for row in ("cnn", "hard", "none", "teacher")]
    for card in cards.values():
        assert card.startswith("---\n") and "(training_curves.png)" not in card
        assert "../results/digits-tiny/curves.png" in card and "/table.md), seed 0." in card
    assert "`teacher-test_resnet-seed0`" in cards["digits-tiny-hard.md"]
    state = (folder / "results" / "README.md").read_text()
    assert "| cifar10-native | not yet run | |" in state
    assert (
        "| [digits-tiny](digits-tiny/table.md) | 4 of 9 rows | teacher, cnn, none, hard; not yet run: soft," in state
    )
    assert state.count("<!-- ") == 2 and "## What was tried" in state


def test_finished_rows_are_not_run_again(folder, call):
    """After the tests above."""
    runs = folder / "outputs" / "reproduce" / "digits-tiny"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.name != "settings.json"}
    code, printed = call("--rows", "none", "hard")
    assert code == 0 and printed.count("finished already") == 3 and "3 of 3 runs are finished" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_rows_of_another_recipe_do_not_come_into_the_same_table(call):
    """After the tests above."""
    with pytest.raises(UserError, match="were run with another extra_flags .*name another folder"):
        call("--rows", "soft", "--", "--learning_rate=1e-3")


def test_no_row_is_started_that_would_not_get_to_train(folder, call):
    code, printed = call("--output_dir=elsewhere", "--rows=soft", "--minutes=2")
    assert code == 75 and "0 of 2 runs are finished" in printed
    assert sorted(path.name for path in (folder / "elsewhere/digits-tiny").iterdir()) == ["settings.json"]


def test_a_row_is_stopped_in_time(call, monkeypatch):
    monkeypatch.setattr(reproduce, "START_SECONDS", 0)
    monkeypatch.setattr(reproduce, "STOP_SECONDS", 5)
    started = time.monotonic()
    code, printed = call("--output_dir=stopped", "--rows=cnn", "--minutes=0.1")
    assert code == 75 and "cnn, seed 0: asked to stop" in printed
    assert time.monotonic() - started > 1 and "Left: cnn, seed 0" in printed


def test_a_row_is_trained_by_one_process(folder, call):
    (folder / "locked" / "digits-tiny").mkdir(parents=True)
    with open(folder / "locked/digits-tiny/none-seed0.log", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="none, seed 0: another process trains it"):
            call("--output_dir=locked", "--rows=none")


def test_a_mistake_that_train_hf_finds_is_passed_on(call):
    with pytest.raises(UserError, match=r"cnn, seed 0: .* exit code 2: --dataset_name \./nowhere: there is no such"):
        call("--dataset_name=./nowhere", "--rows=cnn")


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget=huge"], "--budget huge: it is one of seed, native, cpu, long, or a YAML file"),
        (["--budget=broken.yaml"], "--config broken.yaml: it has to hold `flag: value` lines"),
        (["--rows", "medium"], "argument --rows: invalid choice: 'medium'"),
        (["--minutes=1"], "--minutes 1: a row takes up to 2 minutes"),
        (["--minutes=soon"], "argument --minutes: invalid float value: 'soon'"),
        (["--seeds", "1", "1"], "--seeds 1 1: each is 0 or more, and there once"),
        (["--accelerate_config=nowhere.yaml"], "--accelerate_config nowhere.yaml: there is no such file"),
        (["--learning_rate=1"], "unrecognized arguments: --learning_rate=1"),
        (["--", "--learning_rat=1"], "unknown flag --learning_rat=1; did you mean --learning_rate?"),
        (["--", "--output-dir=here"], "--output-dir after `--`: every row has its own"),
        (["--", "--teacher_model_name_or_path=nobody/nothing"], "the teacher is a row of the table"),
        (["--cnn_model_name_or_path=deit_ti", "--", "--image_size=30"], "--patch_size 16 does not divide"),
    ],
)
def test_a_mistake_ends_it_before_anything_runs(folder, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *FLAGS, "--output_dir=mistakes", *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / "reproduce.py"), run_name="__main__")
    assert end.value.code == 2 and not (folder / "mistakes").exists()
    error = capsys.readouterr().err
    assert error.startswith("reproduce.py: error: ") and message in error and error.count("\n") == 1


# ---- The recipes ----


@pytest.mark.parametrize("name", reproduce.BUDGETS)
def test_all_rows_of_a_budget_share_data_length_and_recipe(name):
    _, budget = reproduce.parse_arguments([f"--budget={name}"])
    assert budget.name == f"cifar10-{name}"
    runs = reproduce.make_runs(budget)
    assert [run.row for run in runs] == list(reproduce.ROWS)
    parsed = {run.row: reproduce.train_hf.parse_arguments(run.flags) for run in runs}
    differ = {"distill_mode", "teacher_targets", "single_token", "output_dir", "logging_dir", "mode", "run_name"}
    differ |= {"ddp_find_unused_parameters"}  # follows from the mode
    shared = []
    for row in reproduce.ROWS:
        _, data, _, training = parsed[row]
        if row != "teacher":
            settings = {key: str(value) for key, value in vars(training).items() if key not in differ}
            shared.append((data, {key: value for key, value in settings.items() if not key.startswith("_")}))
    assert all(other == shared[0] for other in shared)
    for row, mode in (
        ("none", resolve_mode("none")),
        ("both", resolve_mode("both")),
        ("both-soft", resolve_mode("both", teacher_targets="soft")),
        ("class", resolve_mode("class", single_token=True)),
        ("distill", resolve_mode("distill", single_token=True)),
    ):
        assert parsed[row][3].mode == mode


def test_the_teachers_row_is_the_teacher_that_train_hf_would_fit(tmp_path):
    _, budget = reproduce.parse_arguments(["--budget=cpu"])
    runs = {run.row: run for run in reproduce.make_runs(budget)}
    model, data, _, training = reproduce.train_hf.parse_arguments(runs["teacher"].flags)
    *_, teacher_args, students = reproduce.train_hf.parse_arguments(runs["hard"].flags)
    assert model.model_name_or_path == "regnetx_004"
    assert teacher_args.teacher_model_name_or_path == str(runs["teacher"].folder)
    fitted = _fitting_arguments(teacher_args, students, str(tmp_path))
    for name in (
        *("num_train_epochs", "learning_rate", "mixup", "cutmix", "repeated_augmentation", "weight_decay", "optim"),
        *("per_device_train_batch_size", "label_smoothing_factor", "lr_scheduler_type", "warmup_steps"),
    ):
        assert getattr(training, name) == getattr(fitted, name), name
    assert (data.auto_augment, data.random_erasing, data.crop) == ("none", 0, DataArguments().crop)


@pytest.mark.parametrize("name", ["native", "long"])
def test_a_teacher_that_sees_images_enlarged_is_trained_on_its_students_crops(name):
    _, budget = reproduce.parse_arguments([f"--budget={name}"])
    runs = {run.row: run for run in reproduce.make_runs(budget)}
    teacher, data, *_ = reproduce.train_hf.parse_arguments(runs["teacher"].flags)
    student, of_students, *_ = reproduce.train_hf.parse_arguments(runs["hard"].flags)
    assert (teacher.image_size, student.image_size) == (128, 32)
    assert data.crop_at(128) == of_students.crop_at(32) == "padded"


# ---- The table and the curves, of recorded results ----


@pytest.fixture(scope="module")
def all_recorded(tmp_path_factory) -> tuple[Path, reproduce.Budget, list[reproduce.Run]]:
    """All rows of CIFAR-10 with three seeds, as runs leave them: accuracies that rise, and end 0.01 a seed apart."""
    folder = tmp_path_factory.mktemp("recorded")
    _, budget = reproduce.parse_arguments(["--budget=cpu", "--seeds", "0", "1", "2", "--", "--weight_decay=0.1"])
    runs = reproduce.make_runs(budget)
    labels = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for run in runs:
        last = 0.3 + 0.03 * list(reproduce.ROWS).index(run.row) + 0.01 * run.seed
        readouts = {"": 0, "_both": 0, "_class": -0.02, "_distillation": 0.01} if "both" in run.row else {"": 0}
        metrics = {f"eval_accuracy{name}": last + plus for name, plus in readouts.items()}
        metrics |= {f"{name}_top5": 0.9 for name in metrics}
        metrics |= {"epoch": run.epochs, "train_runtime": 100.0, "train_samples_per_second": 300.0}
        log = [
            {
                "epoch": run.epochs * step / 8,
                **{key: value * step / 8 for key, value in metrics.items() if "eval" in key},
            }
            for step in range(1, 9)
        ]
        record = RunRecord(
            architecture="deit_ti" if run.is_student else "resnet18",
            num_parameters=1,
            image_size=32,
            mode=run.mode,
            dataset=DatasetRecord("uoft-cs/cifar10", "hub", labels, 10_000, 10_000),
            metrics=metrics,
            hyperparameters={"precision": "no", "max_validation_samples": 1000},
            hardware="2 CPU cores (x86_64)",
        )
        place = folder / run.folder
        place.mkdir(parents=True)
        record.save(place)
        (place / reproduce.RECORD).write_text(json.dumps({"seconds": 120.0, "commits": ["0123456789ab"]}))
        (place / "README.md").write_text("---\nlicense: unknown\n---\n# card\n\n![Curves](training_curves.png)\n")
        (place / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        (place / "all_results.json").write_text(json.dumps(metrics))
    return folder, budget, runs


@pytest.fixture
def recorded(all_recorded, tmp_path, monkeypatch) -> tuple[reproduce.Budget, list[reproduce.Run]]:
    folder, budget, runs = all_recorded
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return budget, runs


def test_the_table_has_mean_and_spread_of_the_seeds_beside_seed_and_paper(recorded):
    budget, runs = recorded
    reproduce.write_results(budget, runs)
    epochs = f"{runs[-1].epochs:g}"
    text = Path("results/cifar10-cpu/table.md").read_text()
    for line in (
        "| no distillation | none | - | class | 37.00 ± 1.00 | 90.00 ± 0.00 | 67.69 | 72.20 | "
        f"{epochs} | 30,000 | 100 | 300 ",
        "distillation embedding only | both | hard | distillation | 47.00 ± 1.00 | 90.00 ± 0.00 | n/a | 74.60 ",
        "| token: class embedding only | both | hard | class | 44.00 ± 1.00 |",
        "class + distillation, soft teacher | both | soft | both | 49.00 ± 1.00 | 90.00 ± 0.00 | 69.19 | n/a |",
        "class + distillation, hard teacher | both | hard | both | 46.00 ± 1.00 | 90.00 ± 0.00 | 46.11 | 74.50 |",
        "| distillation token alone | distill (single token) | hard | distillation | 55.00 ± 1.00 |",
        "| class token alone | class (single token) | - | class | 52.00 ± 1.00 |",
        "| CNN baseline, resnet18 | - | - | - | 34.00 ± 1.00 | 90.00 ± 0.00 | 88.46 | n/a |",
        "| 0, 1, 2 |",
        "on 10,000 images of the split test",
        "run with the extra flags `--weight_decay=0.1`",
        "- precision: float32",
        "- commit: 0123456789ab",
    ):
        assert line in text
    names = {path.name for path in Path("model_cards").iterdir()}
    assert len(names) == 27 and {"cifar10-cpu-both-soft.md", "cifar10-cpu-both-soft-seed2.md"} <= names


def test_a_table_of_one_seed_keeps_what_others_have_found(recorded):
    budget, _ = recorded
    _, one = reproduce.parse_arguments(["--budget=cpu", "--seeds", "1", "--", "--weight_decay=0.1"])
    reproduce.write_results(one, reproduce.make_runs(one))
    row = read(Path("results/cifar10-cpu/table.json"))["rows"][0]
    assert [run["seed"] for run in row["runs"]] == [0, 1, 2] and row["top1"] == pytest.approx(0.37)


def test_all_rows_are_in_the_picture_and_nothing_lies_on_the_curves(recorded):
    budget, runs = recorded
    curves, table = reproduce.make_curves(runs), reproduce.make_table(budget, runs)
    assert list(curves) == [line.name for line in reproduce.LINES]
    figure = reproduce.plot_curves(curves, table, Path("curves.png"))
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "cifar10-cpu: accuracy during training, 1,000 images of the split test"
    legend = axes.get_legend()
    shown = [text.get_text() for text in legend.get_texts()]
    assert len(shown) == len(reproduce.LINES) and shown[0] == "55.0 %  distillation token alone"
    values = [float(name.split()[0]) for name in shown]
    assert values == sorted(values, reverse=True)
    figure.draw_without_rendering()
    box, plot = legend.get_window_extent(), axes.get_window_extent()
    assert box.x0 >= plot.x1 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(looks) == len(reproduce.LINES)
    assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] < runs[-1].epochs + 1  # the teacher's are other epochs


def test_time_left_follows_from_finished_rows_alike(recorded, monkeypatch):
    _, runs = recorded
    runs = [run for run in runs if run.seed == 0]
    by_row = {run.row: run for run in runs}
    epochs = by_row["none"].epochs
    of_cnn = epochs * 120 / by_row["teacher"].epochs
    for row in ("soft", "hard", "both", "both-soft", "class", "distill", "cnn"):
        (by_row[row].folder / "all_results.json").unlink()
    assert reproduce.seconds_per_epoch(by_row["soft"], runs) == pytest.approx(120 / epochs)  # as `none`
    assert reproduce.seconds_per_epoch(by_row["cnn"], runs) == pytest.approx(of_cnn / epochs)  # as the teacher
    progress = reproduce.Progress("soft", by_row["soft"], runs)
    now = progress.started
    assert progress.seconds_left(now) == pytest.approx(6 * 120 + of_cnn)
    progress.epoch, progress.marked = 1.0, now + 60  # slower than thought
    assert progress.seconds_left(now + 70) == pytest.approx((epochs - 1) * 60 + 5 * 120 + of_cnn - 10)
    (by_row["none"].folder / "all_results.json").unlink()
    (by_row["teacher"].folder / "all_results.json").unlink()
    assert reproduce.Progress("none", by_row["none"], runs).seconds_left(now) is None

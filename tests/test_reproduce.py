"""All rows with one command: real runs, interrupted and resumed, and the results written from them."""

import fcntl
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from transformers import TrainingArguments

import reproduce
from benchmarks import accuracy
from modeling_deit_ti.card import PUBLISHED_BASELINE, DatasetRecord, RunRecord
from modeling_deit_ti.distillation import resolve_mode
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.parsing import parse_arguments


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


def make_project(folder: Path) -> Path:
    """A working directory with recipes and the README of the results."""
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "broken.yaml").write_text("- a list")
    (folder / "results").mkdir()
    shutil.copy(REPOSITORY / "results" / "README.md", folder / "results")
    return folder


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def start(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(REPOSITORY / "reproduce.py"), *FLAGS, *flags]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The folder and output of a command that trained a student, its teacher and the CNN."""
    folder = make_project(tmp_path_factory.mktemp("finished"))
    process = start(folder, "--rows", "hard", "cnn")
    printed = process.communicate()[0]
    assert process.returncode == 0, printed
    return folder, printed


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs the command in this process; returns its exit code and output."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*flags: str, folder: Path = tmp_path) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *FLAGS, *flags])
        code = 0
        try:
            reproduce.main()
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out

    make_project(tmp_path)
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---- Running ----


def test_an_interrupted_run_continues_where_it_stopped(tmp_path, call):
    runs = tmp_path / "outputs" / "reproduce" / "digits-tiny"
    process = start(tmp_path, "--rows", "none")
    while process.poll() is None and not list(runs.glob("none-seed0/checkpoint-*/checksums.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate()[0]
    assert process.returncode == 75, printed
    assert "none, seed 0: stopping" in printed
    assert "none, seed 0: interrupted after " in printed and " of 3 epochs" in printed
    assert "0 of 1 runs are finished" in printed and "Left: none, seed 0. Run the same command again" in printed
    log = runs / "none-seed0.log"
    with open(log) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the run held this lock, so it has ended
    assert not (runs / "none-seed0" / "all_results.json").exists()
    assert call("--list", "--rows", "none")[1].startswith("none, seed 0  interrupted after ")

    length, before = log.stat().st_size, read(runs / "none-seed0" / "reproduce.json")
    (runs / "none-seed0-copy").mkdir()
    code, printed = call("--rows", "none")
    assert code == 0 and "1 of 1 runs are finished" in printed
    continued = log.read_text()[length:]
    assert "\nStudent: epoch 3/3, " in continued and "Student: epoch 1/3" not in continued
    results = read(runs / "none-seed0" / "all_results.json")
    assert results["epoch"] == 3
    assert f"no distillation {results['eval_accuracy']:.2%}" in printed
    row = next(row for row in read(tmp_path / "results/digits-tiny/table.json")["rows"] if row["run"] == "none")
    assert row["runs"][0]["images_seen"] == 3 * 128
    record = read(runs / "none-seed0" / "reproduce.json")
    assert record["seconds"] > before["seconds"] > 0 and record["commits"] == before["commits"]


def test_a_student_is_trained_after_its_teacher(finished):
    folder, printed = finished
    assert "3 of 3 runs are finished" in printed
    order = [printed.index(f"{name}, seed 0: ") for name in ("teacher", "cnn", "hard")]
    assert order == sorted(order)
    rows = {row["run"]: row for row in read(folder / "results" / "digits-tiny" / "table.json")["rows"]}
    teacher, hard = rows["teacher"]["runs"][0], rows["hard"]["runs"][0]
    # The teacher's row and the students' teacher are one model, measured on the same images.
    assert hard["teacher_top1"] == pytest.approx(teacher["top1"]) and teacher["top1"] > 0.5
    assert (teacher["epochs"], teacher["images_seen"], hard["epochs"]) == (8, 1024, 3)
    assert (teacher["architecture"], hard["architecture"]) == ("test_resnet", "deit_ti")
    assert [rows["hard"][name] for name in ("mode", "teacher_targets", "readout")] == ["hard", "hard", "class"]
    for fact in (teacher, hard):
        assert fact["test_images"] == 359 and fact["train_images"] == 128 and fact["precision"] == "float32"
        assert fact["top5"] > fact["top1"] and fact["seconds"] > 0 and fact["images_per_second"] > 0
        assert "torch" in fact["versions"] and "CPU core" in fact["device"] and fact["commit"]
    assert rows["soft"]["state"] == "not yet run" and rows["soft"]["top1"] is None and rows["soft"]["runs"] == []


def test_results_use_all_test_images_and_curves_the_validation_images(finished):
    folder, _ = finished
    run = folder / "outputs" / "reproduce" / "digits-tiny" / "hard-seed0"
    log = [entry for entry in read(run / "trainer_state.json")["log_history"] if "eval_accuracy" in entry]
    assert [entry["epoch"] for entry in log] == [1, 2, 3, 3]
    for entry in log[:-1]:
        assert entry["eval_accuracy"] * 100 == pytest.approx(round(entry["eval_accuracy"] * 100))
    assert log[-1]["eval_accuracy"] * 359 == pytest.approx(round(log[-1]["eval_accuracy"] * 359))
    assert read(run / "all_results.json")["eval_accuracy"] == log[-1]["eval_accuracy"]
    curve = read(folder / "results/digits-tiny/curves.json")["hard distillation"]["0"]
    assert curve == {"epochs": [1, 2, 3], "accuracy": [entry["eval_accuracy"] for entry in log[:-1]]}


def test_table_picture_cards_and_state_cover_every_finished_run(finished):
    folder, _ = finished
    text = (folder / "results" / "digits-tiny" / "table.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(accuracy.ROWS) and len({line.count("|") for line in lines}) == 1
    assert sum("not yet run" in line for line in lines) == 9
    assert "on 359 images of the test split" in text and "the same 128 images" in text
    assert "- device: " in text and "- commit: " in text and "torch 2" in text
    assert Image.open(folder / "results" / "digits-tiny" / "curves.png").size == (1500, 900)
    cards = {path.name: path.read_text() for path in (folder / "model_cards").iterdir()}
    assert sorted(cards) == [f"digits-tiny-{name}.md" for name in ("cnn", "hard", "teacher")]
    for card in cards.values():
        assert card.startswith("---\n") and re.findall(r"\]\(\w+\.png\)", card) == []
        assert "### Calibration" in card
        assert "../results/digits-tiny/curves.png" in card and "/table.md), seed 0:" in card
    assert "`teacher-test_resnet-seed0`" in cards["digits-tiny-hard.md"]
    state = (folder / "results" / "README.md").read_text()
    assert "| cifar10-native | not yet run | |" in state
    assert (
        "| [digits-tiny](digits-tiny/table.md) | 3 of 10 runs | hard, cnn, teacher; not yet run: none, soft," in state
    )
    assert state.count("<!-- ") == 2 and "## Targets, met and missed" in state


def test_finished_runs_are_not_trained_again(finished, call):
    folder, _ = finished
    runs = folder / "outputs" / "reproduce" / "digits-tiny"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*") if path.name != "settings.json"}
    code, printed = call("--rows", "cnn", "hard", folder=folder)
    assert code == 0 and printed.count("already finished") == 3 and "3 of 3 runs are finished" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_runs_with_different_recipes_cannot_share_a_table(finished, call):
    folder, _ = finished
    with pytest.raises(UserError, match="have a different extra_flags .*choose another folder"):
        call("--rows", "soft", "--", "--learning_rate=1e-3", folder=folder)


def test_run_with_too_little_time_to_train_is_not_started(tmp_path, call):
    code, printed = call("--output_dir=elsewhere", "--rows=soft", "--minutes=2")
    assert code == 75 and "0 of 2 runs are finished" in printed
    assert [path.name for path in (tmp_path / "elsewhere/digits-tiny").iterdir()] == ["settings.json"]


def test_a_run_is_stopped_in_time(call, monkeypatch):
    monkeypatch.setattr(reproduce, "START_SECONDS", 0)
    monkeypatch.setattr(reproduce, "STOP_SECONDS", 5)
    started = time.monotonic()
    code, printed = call("--rows=cnn", "--minutes=0.1")
    assert code == 75 and "cnn, seed 0: stopping" in printed
    assert time.monotonic() - started > 1 and "Left: cnn, seed 0" in printed


def test_only_one_process_trains_a_run(tmp_path, call):
    folder = tmp_path / "locked" / "digits-tiny"
    folder.mkdir(parents=True)
    with open(folder / "none-seed0.log", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="none, seed 0: another process is training it"):
            call("--output_dir=locked", "--rows=none")


def test_stages_of_a_recipe_count_as_one_run(tmp_path, call):
    recipe = RECIPE.replace("num_train_epochs: 3\n", "").replace("patch_size: 16\n", "")
    stages = "stages:\n- {patch_size: 16, num_train_epochs: 2}\n- {patch_size: 8, num_train_epochs: 1}\n"
    (tmp_path / "staged.yaml").write_text(recipe + stages)
    code, printed = call("--budget=staged.yaml", "--rows=none")
    assert code == 0 and "1 of 1 runs are finished" in printed
    row = next(row for row in read(tmp_path / "results/digits-staged/table.json")["rows"] if row["run"] == "none")
    fact, records = (
        row["runs"][0],
        [
            RunRecord.load(tmp_path / place)
            for place in (
                "outputs/reproduce/digits-staged/none-seed0/stage-1",
                "outputs/reproduce/digits-staged/none-seed0",
            )
        ],
    )
    assert (fact["epochs"], fact["images_seen"]) == (3, 3 * 128)
    assert [record.patch_size for record in records] == [16, 8]
    assert fact["seconds"] == pytest.approx(sum(record.metrics["train_runtime"] for record in records))
    assert fact["top1"] == records[-1].metrics["eval_accuracy"]
    curve = read(tmp_path / "results/digits-staged/curves.json")["no distillation"]["0"]
    assert curve["epochs"] == [1, 2, 3] and curve["accuracy"][1] != curve["accuracy"][2]


def test_progress_of_a_run_includes_earlier_stages(tmp_path):
    recipe = tmp_path / "staged.yaml"
    recipe.write_text("stages:\n- {patch_size: 16, num_train_epochs: 2}\n- {patch_size: 8, num_train_epochs: 1}\n")
    run = runs_of(f"--budget={recipe}")["none"]
    first = "Stage 1 of 2: somewhere\nStudent: epoch 0.5/2, 10 s\nStudent: epoch 1.5/2, 10 s\n"
    assert run.epochs == 3 and run.epochs_done == 0
    assert [run.epochs_reported(text) for text in ("", first, first + "Stage 2 of 2: there\n")] == [0, 1.5, 2]
    assert run.epochs_reported(first + "Stage 2 of 2: there\nStudent: epoch 0.25/1, 3 s\n") == 2.25


def test_a_mistake_that_train_hf_finds_is_passed_on(call):
    with pytest.raises(UserError, match=r"cnn, seed 0: .* exit code 2: --dataset_name \./nowhere: there is no such"):
        call("--dataset_name=./nowhere", "--rows=cnn")


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--budget=huge"],
            "--budget huge: must be one of baseline, native, cpu, afternoon, small, long, or a YAML file",
        ),
        (["--budget=broken.yaml"], "--config broken.yaml: it must consist of `flag: value` lines"),
        (["--rows", "medium"], "argument --rows: invalid choice: 'medium'"),
        (["--minutes=1"], "--minutes 1: must be at least 2"),
        (["--minutes=soon"], "argument --minutes: invalid float value: 'soon'"),
        (["--seeds", "1", "1"], "--seeds 1 1: must be at least 0 and all different"),
        (["--accelerate_config=nowhere.yaml"], "--accelerate_config nowhere.yaml: there is no such file"),
        (["--learning_rate=1"], "unrecognized arguments: --learning_rate=1"),
        (["--", "--learning_rat=1"], "unknown flag --learning_rat=1; did you mean --learning_rate?"),
        (["--", "--output-dir=here"], "--output-dir after `--`: each run sets its own"),
        (["--", "--hub_token=hf_mine"], "--hub_token would appear in the results: set HF_TOKEN instead"),
        (["--", "--teacher_num_train_epochs=0"], "the teacher is a row of the table"),
        (["--cnn_model_name_or_path=deit_ti", "--", "--image_size=30"], "--patch_size 16 does not divide"),
    ],
)
def test_a_mistake_is_reported_before_anything_runs(tmp_path, monkeypatch, capsys, flags, message):
    folder = make_project(tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *FLAGS, "--output_dir=mistakes", *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / "reproduce.py"), run_name="__main__")
    assert end.value.code == 2 and not (folder / "mistakes").exists()
    error = capsys.readouterr().err
    assert error.startswith("reproduce.py: error: ") and message in error and error.count("\n") == 1


def test_the_runs_are_planned_where_one_process_would_see_several_gpus(monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    assert list(runs_of("--budget=native")) == list(reproduce.RUNS)


# ---- The recipes ----


def runs_of(*argv: str) -> dict[str, accuracy.Run]:
    args = reproduce.parse_command(list(argv))
    return {run.name: run for run in reproduce.make_runs(args, [0])}


def settings_of(group, *but: str) -> dict[str, str]:
    return {key: str(value) for key, value in vars(group).items() if key not in but and not key.startswith("_")}


@pytest.mark.parametrize("name", reproduce.BUDGETS)
def test_all_runs_of_a_budget_share_data_length_and_recipe(name):
    assert reproduce.parse_command([f"--budget={name}"]).name == f"cifar10-{name}"
    runs = runs_of(f"--budget={name}")
    assert list(runs) == list(reproduce.RUNS)
    assert all(run.args.images == runs["none"].args.images for run in runs.values())
    differ = ("distill_mode", "teacher_targets", "single_token", "output_dir", "logging_dir", "mode", "run_name")
    differ += ("ddp_find_unused_parameters",)  # follows from the mode
    shared = [
        (run.args.augmentation, settings_of(run.args.training, *differ))
        for run in runs.values()
        if run.name != "teacher"
    ]
    assert all(other == shared[0] for other in shared)
    for run, mode in (
        ("none", resolve_mode("none")),
        ("both", resolve_mode("both")),
        ("both-soft", resolve_mode("both", teacher_targets="soft")),
        ("class", resolve_mode("class", single_token=True)),
        ("distill", resolve_mode("distill", single_token=True)),
    ):
        assert runs[run].args.training.mode == mode


@pytest.mark.parametrize("teacher_config", ["", "optim: sgd\nlearning_rate: 1e-2\nmixup: 0.2\nimage_size: 64\n"])
def test_teacher_is_trained_as_train_hf_would_fit_it(tmp_path, teacher_config):
    recipe = tmp_path / "recipe.yaml"
    (tmp_path / "teacher.yaml").write_text(teacher_config or "{}")
    recipe.write_text(RECIPE.replace("teacher_learning_rate: 2e-2", f"teacher_config: {tmp_path / 'teacher.yaml'}"))
    runs = runs_of(f"--budget={recipe}", "--", "--weight_decay=0.1")
    teacher, student = runs["teacher"].args, runs["hard"].args
    assert student.teacher.teacher_model_name_or_path == str(runs["teacher"].folder)
    fitting = parse_arguments([f"--config={recipe}", "--distill_mode=hard"]).fitting
    differ = ("seed", "output_dir", "logging_dir", "run_name", "disable_tqdm")
    differ += ("has_default_output_dir",)
    assert teacher.images == fitting.images == student.images
    assert teacher.augmentation == fitting.augmentation and teacher.model == fitting.model
    assert settings_of(teacher.training, *differ) == settings_of(fitting.training, *differ)
    assert teacher.model.model_name_or_path == "test_resnet" and teacher.training.num_train_epochs == 8
    assert teacher.training.optim == ("sgd" if teacher_config else student.training.optim)
    assert (teacher.model.image_size, teacher.augmentation.mixup) == ((64, 0.2) if teacher_config else (32, 0))


@pytest.mark.parametrize(("name", "size"), [("cpu", 64), ("native", 128), ("long", 128)])
def test_teacher_with_enlarged_images_uses_its_students_crops(name, size):
    runs = runs_of(f"--budget={name}")
    teacher, student = runs["teacher"].args, runs["hard"].args
    assert (teacher.model.image_size, student.model.image_size) == (size, 32)
    assert teacher.augmentation.crop_at(size) == student.augmentation.crop_at(32) == "padded"


# ---- Table and curves of recorded results ----


@pytest.fixture(scope="module")
def all_recorded(tmp_path_factory) -> tuple[Path, reproduce.ReproduceArguments, list[accuracy.Run]]:
    """The folders of all CIFAR-10 runs with three seeds: accuracies rise, and end 0.01 apart between seeds."""
    folder = tmp_path_factory.mktemp("recorded")
    args = reproduce.parse_command(["--budget=small", "--seeds", "0", "1", "2", "--", "--weight_decay=0.1"])
    runs = reproduce.make_runs(args, args.seeds)
    labels = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for run in runs:
        last = 0.3 + 0.03 * list(reproduce.RUNS).index(run.name) + 0.01 * run.seed
        readouts = {"": 0, "_both": 0, "_class": -0.02, "_distillation": 0.01} if "both" in run.name else {"": 0}
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
            architecture="resnet18" if run.name in accuracy.CNNS else "deit_ti",
            num_parameters=1,
            image_size=32,
            mode=run.args.training.mode,
            dataset=DatasetRecord("uoft-cs/cifar10", "hub", labels, 10_000, 10_000),
            metrics=metrics,
            hyperparameters={
                "learning_rate": 1e-3,
                "lr_scheduler_type": "cosine",
                "precision": "no",
                "max_validation_samples": 1000,
            },
            hardware="2 CPU cores (x86_64)",
        )
        place = folder / run.folder
        place.mkdir(parents=True)
        record.save(place)
        (place / accuracy.REPRODUCE_FILE).write_text(json.dumps({"seconds": 120.0, "commits": ["0123456789ab"]}))
        (place / "README.md").write_text("---\nlicense: unknown\n---\n# card\n\n![Curves](training_curves.png)\n")
        (place / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        (place / "all_results.json").write_text(json.dumps(metrics))
    return folder, args, runs


@pytest.fixture
def recorded(all_recorded, tmp_path, monkeypatch) -> tuple[reproduce.ReproduceArguments, list[accuracy.Run]]:
    folder, args, runs = all_recorded
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return args, runs


def test_the_table_has_mean_and_spread_over_seeds_beside_baseline_and_paper(recorded):
    args, runs = recorded
    reproduce.update_results(args, runs)
    epochs = f"{runs[-1].epochs:g}"
    text = Path("results/cifar10-small/table.md").read_text()
    for line in (
        "| no distillation | none | - | class | 37.00 ± 1.00 | 90.00 ± 0.00 | 67.69 | 72.20 | "
        f"{epochs} | 30,000 | 100 | 300 ",
        "distillation embedding only | both | hard | distillation | 47.00 ± 1.00 | 90.00 ± 0.00 | n/a | 74.60 ",
        "| token: class embedding only | both | hard | class | 44.00 ± 1.00 |",
        "class + distillation, soft teacher | both | soft | both | 49.00 ± 1.00 | 90.00 ± 0.00 | 69.19 | n/a |",
        "class + distillation, standardised teacher | both | standardized | both | 52.00 ± 1.00 | 90.00",
        "class + distillation, hard teacher | both | hard | both | 46.00 ± 1.00 | 90.00 ± 0.00 | 46.11 | 74.50 |",
        "| distillation token alone | distill (single token) | hard | distillation | 58.00 ± 1.00 |",
        "| class token alone | class (single token) | - | class | 55.00 ± 1.00 |",
        "| CNN baseline, resnet18 | - | - | - | 34.00 ± 1.00 | 90.00 ± 0.00 | 88.46 | n/a |",
        "| 0, 1, 2 |",
        "on 10,000 images of the test split",
        "run with the extra flags `--weight_decay=0.1`",
        "- device: 2 CPU cores (x86_64)\n- precision: float32",
        "- commit: 0123456789ab",
    ):
        assert line in text
    names = {path.name for path in Path("model_cards").iterdir()}
    assert len(names) == 30 and {"cifar10-small-both-soft.md", "cifar10-small-both-soft-seed2.md"} <= names


def test_table_from_several_machines_says_which_runs_each_one_trained(recorded):
    args, runs = recorded
    for run in runs:
        if run.name in ("both", "teacher"):
            record = RunRecord.load(run.folder)
            record.hardware = "1 x Some GPU"
            record.save(run.folder)
    reproduce.update_results(args, runs)
    others = "none, soft, hard, both-soft, both-standardized, distill, class, cnn"
    devices = f"2 CPU cores (x86_64) for {others}; 1 x Some GPU for both, teacher"
    assert f"\n- device: {devices}\n" in Path("results/cifar10-small/table.md").read_text()


def test_a_command_for_one_seed_keeps_the_others_in_the_table(recorded):
    args = reproduce.parse_command(["--budget=small", "--seeds", "1", "--", "--weight_decay=0.1"])
    reproduce.update_results(args, reproduce.make_runs(args, args.seeds))
    row = read(Path("results/cifar10-small/table.json"))["rows"][0]
    assert [run["seed"] for run in row["runs"]] == [0, 1, 2] and row["top1"] == pytest.approx(0.37)
    assert (row["baseline_top1"], row["paper_top1"]) == (0.6769, 0.722)


def test_a_row_stays_in_the_table_when_its_outputs_are_gone(recorded):
    args, runs = recorded
    reproduce.update_results(args, runs)
    shutil.rmtree(args.output_dir)
    reproduce.update_results(args, runs)
    results = Path("results/cifar10-small")
    assert [len(row["runs"]) for row in read(results / "table.json")["rows"]] == [3] * len(accuracy.ROWS)
    assert set(read(results / "curves.json")) == {row.name for row in accuracy.ROWS}


def test_table_of_an_old_recipe_stays_until_a_run_of_the_new_one_finishes(recorded):
    args, runs = recorded
    reproduce.update_results(args, runs)
    results = {file: file.read_bytes() for file in Path("results/cifar10-small").iterdir()}
    args = reproduce.parse_command(["--budget=small", "--output_dir=elsewhere", "--", "--weight_decay=0.2"])
    runs = reproduce.make_runs(args, [0])
    reproduce.update_results(args, runs)
    assert {file: file.read_bytes() for file in results} == results
    shutil.copytree("outputs/reproduce/cifar10-small/none-seed0", runs[2].folder)
    reproduce.update_results(args, runs)
    rows = read(Path("results/cifar10-small/table.json"))["rows"]
    assert {row["run"]: len(row["runs"]) for row in rows if row["runs"]} == {"none": 1}
    assert set(read(Path("results/cifar10-small/curves.json"))) == {"no distillation"}


def test_the_plot_has_all_rows_and_nothing_covers_the_curves(recorded):
    args, runs = recorded
    curves, table = accuracy.make_curves(runs), accuracy.make_table(args.name, args.settings(), runs, {})
    assert list(curves) == [row.name for row in accuracy.ROWS]
    figure = accuracy.plot_curves(curves, table, Path("curves.png"))
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "cifar10-small: accuracy during training, 1,000 images of the test split"
    legend = axes.get_legend()
    shown = [text.get_text() for text in legend.get_texts()]
    assert len(shown) == len(accuracy.ROWS) and shown[0] == "58.0 %  distillation token alone"
    values = [float(name.split()[0]) for name in shown]
    assert values == sorted(values, reverse=True)
    figure.draw_without_rendering()
    box, plot = legend.get_window_extent(), axes.get_window_extent()
    assert box.x0 >= plot.x1 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
    stars = [line for line in axes.get_lines() if line.get_marker() == "*"]
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines() if line not in stars}
    assert len(looks) == len(accuracy.ROWS)
    top1 = [row["top1"] for row in table["rows"] if row["row"] != "teacher"]
    assert sorted(line.get_ydata()[0] for line in stars) == sorted(top1)
    assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] < runs[-1].epochs + 1  # the teacher's epochs are different


def test_few_curves_have_their_legend_below_them(recorded):
    args, runs = recorded
    curves, table = accuracy.make_curves(runs), accuracy.make_table(args.name, args.settings(), runs, {})
    figure = accuracy.plot_curves({"no distillation": curves["no distillation"]}, table, Path("curves.png"))
    (axes,) = figure.axes
    figure.draw_without_rendering()
    box, plot = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert plot.x0 <= box.x0 and box.x1 <= plot.x1 and plot.y0 <= box.y0
    (curve, _) = axes.get_lines()
    points = axes.transData.transform(curve.get_xydata())
    assert not any(box.contains(*point) for point in points)


def test_committed_table_matches_what_the_code_renders_from_its_numbers():
    folder = REPOSITORY / "results" / "cifar10-small"
    table = read(folder / "table.json")
    assert accuracy.render_table(table) == (folder / "table.md").read_text()
    assert {row["row"]: row["baseline_top1"] for row in table["rows"]} == {
        row.name: PUBLISHED_BASELINE.get(row.baseline) for row in accuracy.ROWS
    }

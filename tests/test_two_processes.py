"""Two processes on the CPU, by `accelerate launch` and the config for it, do what one does."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from real_command import REPOSITORY, run
from safetensors.torch import load_file

from modeling_deit_ti.checkpoints import flaw_of


FLAGS = (
    "--config=recipes/digits.yaml",
    "--max_train_samples=100",
    "--max_eval_samples=51",
    "--num_train_epochs=2",
    "--per_device_eval_batch_size=10",
    "--crop=padded",
    "--auto_augment=rand-m9-mstd0.5-inc1",
    "--mixup=0.8",
    "--drop_path_rate=0.2",
    "--distill_mode=both",
    "--teacher_num_train_epochs=12",
    "--teacher_learning_rate=2e-2",
    "--logging_strategy=steps",
    "--logging_steps=1",
    "--disable_tqdm=true",
    "--use_cpu",
)
STEP = "modeling_deit_ti.trainer.DistillationTrainer.training_step"


def launch(*flags, script: str = "train_hf.py", quiet: bool = True) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *(["--quiet"] if quiet else [])]
    config = "--config_file=accelerate_configs/cpu_two_processes.yaml"
    return subprocess.run(
        [*launcher, config, script, *map(str, flags)], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    ended = run(
        *FLAGS,
        f"--output_dir={folder / 'run'}",
        f"--teacher_output_dir={folder / 'teachers'}",
        "--per_device_train_batch_size=16",
    )
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="module")
def two(one, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """With the teacher of the other: a batch norm in two processes has other statistics."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(one / "teachers", folder / "teachers")
    ended = launch(
        *FLAGS,
        f"--output_dir={folder / 'run'}",
        f"--teacher_output_dir={folder / 'teachers'}",
        "--per_device_train_batch_size=8",
    )
    assert ended.returncode == 0, ended.stderr
    return folder, ended


def assert_same_losses(first: Path, second: Path) -> None:
    logs = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in (first, second)]
    logs = [[entry for entry in log if "loss" in entry] for log in logs]
    assert [entry["step"] for entry in logs[1]] == list(range(1, 13))
    for name in ("loss", "label_loss", "distillation_loss", "grad_norm", "learning_rate"):
        assert [entry[name] for entry in logs[1]] == pytest.approx([entry[name] for entry in logs[0]], rel=1e-5), name


def test_the_loss_of_every_step_is_that_of_one_process_at_the_same_global_batch(one, two):
    assert_same_losses(one / "run", two[0] / "run")
    first, second = (load_file(folder / "run" / "model.safetensors") for folder in (one, two[0]))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-4, msg=name)


def test_every_evaluation_image_counts_once(one, two):
    results = [json.loads((folder / "run" / "all_results.json").read_text()) for folder in (one, two[0])]
    for name in results[0]:
        if "accuracy" in name:
            assert results[1][name] == pytest.approx(results[0][name], abs=1e-12), name
            assert results[1][name] * 51 == pytest.approx(round(results[1][name] * 51), abs=1e-9), name
    reports = [json.loads((folder / "run" / "report.json").read_text()) for folder in (one, two[0])]
    for name in ("num_images", "classes", "confusion", "teacher"):
        assert reports[0][name] == reports[1][name], name
    mistakes = [{one["row"]: (one["label"], one["predicted"]) for one in report["mistakes"]} for report in reports]
    assert mistakes[0] == mistakes[1]


def test_every_file_is_written_and_everything_said_by_one_process(one, two):
    folder, ended = two
    assert ended.stdout.count("Trained in") == 1 and ended.stdout.count("is right on") == 1
    names = [{path.relative_to(root) for path in root.rglob("*")} for root in (one / "run", folder / "run")]
    assert {path.name for path in names[1] - names[0]} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert {path.name for path in names[0] - names[1]} == {"rng_state.pth"}


def test_the_teacher_is_neither_wrapped_nor_saved(two):
    saved = load_file(two[0] / "run" / "checkpoint-12" / "model.safetensors")
    assert not any(name.startswith(("teacher", "module")) for name in saved)


def test_a_run_that_is_killed_in_both_processes_goes_on_in_both_or_in_one(one, two, tmp_path):
    places = [f"--output_dir={tmp_path / 'run'}", f"--teacher_output_dir={two[0] / 'teachers'}"]
    flags = [*FLAGS, *places, "--per_device_train_batch_size=8", "--save_strategy=steps", "--save_steps=2"]
    fault = {"function": STEP, "call": 9, "rank": 1}
    killed = launch(json.dumps(fault), *flags, script="tests/real_command.py")
    assert killed.returncode != 0
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    alone = run(*flags, f"--output_dir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    assert "checkpoint-8; a step's 16 images are now 1 x 2 x 8 (processes x accumulation x batch)\n" in alone.stdout
    assert "do not match" not in alone.stderr  # transformers' warning of other batches
    assert_same_losses(one / "run", tmp_path / "alone")
    ended = launch(*flags)
    assert ended.returncode == 0, ended.stderr
    first, second = (load_file(folder / "run" / "model.safetensors") for folder in (two[0], tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_failure_of_one_process_ends_the_other_within_seconds_and_says_why_first(two, tmp_path):
    places = [f"--output_dir={tmp_path / 'run'}", f"--teacher_output_dir={two[0] / 'teachers'}"]
    fault = {"function": STEP, "call": 3, "rank": 1, "moment": "failing"}
    failed = launch(json.dumps(fault), *FLAGS, *places, script="tests/real_command.py")
    ended_at = time.time()
    assert failed.returncode == 1
    assert "failed" not in failed.stderr.partition("train_hf.py: ")[0] and "Traceback" in failed.stderr
    first = failed.stderr[failed.stderr.index("train_hf.py: ") :].splitlines()[0]
    assert first.startswith("train_hf.py: process 1 failed: RuntimeError: a fault of the test at ")
    assert failed.stderr.index(first) < failed.stderr.index("Traceback")
    assert ended_at - float(first.rpartition(" ")[2]) < 30
    assert not (tmp_path / "run" / "all_results.json").exists()


def test_the_teacher_is_fitted_once_and_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    places = [f"--output_dir={tmp_path / 'run'}", f"--teacher_output_dir={tmp_path / 'teachers'}"]
    flags = [*FLAGS, *places, "--per_device_train_batch_size=8", "--num_train_epochs=1"]
    fault = {"function": STEP, "call": 5, "rank": 1, "signum": signal.SIGTERM}
    stopped = launch(json.dumps(fault), *flags, script="tests/real_command.py")
    assert stopped.returncode == 1  # accelerate's, for whatever goes wrong
    assert "train_hf.py: stopped by SIGTERM after step 5 of 72" in stopped.stderr
    (checkpoint,) = (tmp_path / "teachers").glob("*/checkpoint-*")
    assert checkpoint.name == "checkpoint-5" and flaw_of(checkpoint) is None
    ended = launch(*flags)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("resuming from") == 1 and ended.stdout.count("Teacher: epoch 12/12, ") == 1
    assert not list((tmp_path / "teachers").glob("*/checkpoint-*"))
    assert len(list((tmp_path / "teachers").glob("*/model.safetensors"))) == 1

"""A checkpoint is only resumed by the run that wrote it: the same images, batches and recipe."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from building import arguments
from real_command import run

from modeling_deit_ti.arguments import ImageArguments
from modeling_deit_ti.checkpoints import changed_settings
from modeling_deit_ti.data import load_images
from modeling_deit_ti.runs import run_settings


FLAGS = (
    "--config=recipes/digits.yaml",
    "--distill_mode=none",
    "--max_train_samples=96",
    "--max_eval_samples=50",
    "--num_train_epochs=2",
    "--per_device_train_batch_size=16",
    "--disable_tqdm=true",
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was told to stop in its second epoch."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    fault = {
        "function": "modeling_deit_ti.trainer.DistillationTrainer.compute_loss",
        "call": 9,
        "signum": signal.SIGTERM,
    }
    ended = run(*FLAGS, f"--output_dir={folder}", fault=fault)
    assert ended.returncode == 75, ended.stderr
    return folder


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--per_device_train_batch_size=32"], "batch_size 16, not 32"),
        (["--gradient_accumulation_steps=2"], "batch_size 16, not 32"),
        (["--max_train_samples=48"], "train_images 96, not 48"),
        (["--seed=7"], "seed 42, not 7"),
        (["--mixup=0.8"], "mixup 0.0, not 0.8"),
        (["--learning_rate=1e-4"], "learning_rate 0.0005, not 0.0001"),
        (["--num_train_epochs=3"], "num_train_epochs 2.0, not 3.0"),
        (["--distill_mode=soft"], "distill_mode none, not soft"),
        (["--distill_mode=both"], "distill_mode none, not both"),
        (["--validation_from_train=true"], "images "),
        (["--model_name_or_path=resnet18"], "model_name_or_path deit_ti, not resnet18"),
        (["--patch_size=8"], "patch_size 16, not 8"),
        (["--class_weights=balanced"], "class_weights None, not balanced"),
        (["--early_stopping_patience=1"], "early_stopping_patience None, not 1"),
        (["--optim=muon"], "optim adamw_torch_fused, not muon"),
        (["--position_init=normal"], "position_init sincos, not normal"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_a_different_run_is_refused_in_one_line_that_names_the_difference(stopped, flags, difference):
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    ended = run(*FLAGS, *flags, f"--output_dir={stopped}")
    assert ended.returncode == 2
    message = ended.stderr.strip().splitlines()[-1]
    assert message.startswith(f"train_hf.py: error: {stopped / 'checkpoint-8'} belongs to another run, with ")
    assert "Traceback" not in ended.stderr and "resuming" not in ended.stdout
    assert difference in message
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*")} == before


@pytest.mark.parametrize(
    ("flag", "value"),
    [("teacher_image_size", 64), ("teacher_pretrained", True), ("metric_for_best_model", "loss")],
)
def test_whatever_chooses_the_teacher_or_the_best_model_belongs_to_the_run(flag, value):
    flags = {"distill_mode": "hard", "dataset_name": "digits", "early_stopping_patience": 1, "image_size": 32}
    images = load_images(ImageArguments("digits", max_train_samples=64, max_eval_samples=50))
    before, now = (run_settings(arguments(**flags | other), images) for other in ({}, {flag: value}))
    assert changed_settings(before, now) == {flag: (before.get(flag), value)}


def test_resume_from_checkpoint_false_leaves_an_unfinished_run_untouched(stopped):
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*")}
    ended = run(*FLAGS, f"--output_dir={stopped}", "--resume_from_checkpoint=False")
    assert ended.returncode == 2 and f"{stopped} holds an unfinished run: " in ended.stderr.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*")} == before


def test_settings_that_do_not_affect_the_result_may_differ(stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "run")
    flags = [
        "--per_device_eval_batch_size=10",
        "--save_total_limit=9",
        "--logging_strategy=steps",
        "--logging_steps=5",
        "--teacher_num_train_epochs=3",
    ]
    ended = run(*FLAGS, *flags, f"--output_dir={folder}")
    assert ended.returncode == 0, ended.stderr
    assert "Teacher: none; --distill_mode none does not use the --teacher_* flags\n" in ended.stdout
    assert ended.stdout.count(f"Student: resuming from {folder / 'checkpoint-8'}\n") == 1
    assert json.loads((folder / "all_results.json").read_text())["epoch"] == 2


@pytest.mark.parametrize(
    "flags", [["--optim=muon", "--optim_args=momentum=0.9", "--ema_decay=0.9"]], ids=["muon-averaged"]
)
def test_the_same_command_after_a_kill_ends_bit_for_bit_like_an_uninterrupted_run(flags, tmp_path):
    fault = {"function": "modeling_deit_ti.trainer.DistillationTrainer.compute_loss", "call": 9}
    endings = {"whole": None, "killed": fault}
    for name, fault in endings.items():
        ended = run(*FLAGS, *flags, f"--output_dir={tmp_path / name}", fault=fault)
        assert ended.returncode == (0 if fault is None else -signal.SIGKILL), ended.stderr
    ended = run(*FLAGS, *flags, f"--output_dir={tmp_path / 'killed'}")
    assert ended.returncode == 0, ended.stderr
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (whole, killed)]
    losses = [[(entry.get("loss"), entry.get("eval_loss")) for entry in log] for log in logs]
    assert losses[0] == losses[1]

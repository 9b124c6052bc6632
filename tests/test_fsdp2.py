"""FSDP2 in two processes that fit a teacher with batch norms and distil a student. On the CPU: see fsdp2_on_cpu.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from real_command import REPOSITORY, run

from modeling_deit_ti import DeiTTiForImageClassification


FLAGS = (
    "--config=recipes/digits.yaml",
    "--max_train_samples=64",
    "--max_eval_samples=50",
    "--num_train_epochs=2",
    "--per_device_eval_batch_size=50",
    "--distill_mode=both",
    "--teacher_num_train_epochs=16",
    "--teacher_learning_rate=2e-2",
    "--logging_strategy=steps",
    "--logging_steps=1",
    "--disable_tqdm=true",
    "--use_cpu",
)
LOADING = """
import sys, torch
from transformers import AutoModelForImageClassification
for folder in sys.argv[1:]:
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    torch.save(model(torch.randn(4, 3, 32, 32)).logits.detach(), f"{folder}/logits.pt")
"""


def launch(folder: Path, config: str, *flags: str) -> Path:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    config_file = f"--config_file=accelerate_configs/{config}.yaml"
    places = [f"--output_dir={folder / 'run'}", f"--teacher_output_dir={folder / 'teachers'}"]
    command = [*launcher, config_file, "tests/fsdp2_on_cpu.py", *FLAGS, *places, "--per_device_train_batch_size=16"]
    ended = subprocess.run([*command, *flags], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """The folder of a run with the config for FSDP2."""
    return launch(tmp_path_factory.mktemp("sharded"), "fsdp2_bf16")


def losses_of(run: Path) -> list[float]:
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def is_sharded(run: Path) -> bool:
    return all((checkpoint / "pytorch_model_fsdp.bin").exists() for checkpoint in run.glob("checkpoint-*"))


def test_a_cnn_with_batch_norms_learns_in_bf16(sharded):
    (teacher,) = (sharded / "teachers").glob("test_resnet-*")
    losses = losses_of(teacher)
    assert losses[0] == pytest.approx(2.3, abs=0.3) and losses[-1] < 0.7


def test_the_student_has_the_losses_of_one_process_in_bf16(sharded, tmp_path):
    places = [f"--output_dir={tmp_path / 'run'}", f"--teacher_output_dir={tmp_path / 'teachers'}"]
    (teacher,) = (sharded / "teachers").glob("test_resnet-*")
    flags = ["--per_device_train_batch_size=32", "--bf16", f"--teacher_model_name_or_path={teacher}"]
    ended = run(*FLAGS, *places, *flags)
    assert ended.returncode == 0, ended.stderr
    assert is_sharded(sharded / "run")
    assert losses_of(sharded / "run") == pytest.approx(losses_of(tmp_path / "run"), rel=2e-3)


def test_what_is_saved_loads_in_another_process_with_the_code_that_comes_with_it(sharded, tmp_path):
    run = sharded / "run"
    folders = [run / "checkpoint-4", run, run / "transformers", *(sharded / "teachers").glob("test_resnet-*")]
    command = [sys.executable, "-c", LOADING, *map(str, folders)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    torch.manual_seed(0)
    pixel_values = torch.randn(4, 3, 32, 32)
    logits = DeiTTiForImageClassification.from_pretrained(run).eval()(pixel_values).logits.detach()
    for folder in folders[:3]:
        torch.testing.assert_close(torch.load(folder / "logits.pt"), logits)
    assert {path.name for path in run.glob("*.py")} == {"configuration_deit_ti.py", "modeling_deit_ti.py"}


def test_the_fsdp_flag_shards_the_student_though_a_teacher_was_fitted_without_it(tmp_path):
    launch(tmp_path, "cpu_two_processes", "--fsdp", "--num_train_epochs=1")
    assert is_sharded(tmp_path / "run")


def test_muon_takes_the_steps_of_one_process_and_resumes_from_its_sharded_state(tmp_path):
    flags = ["--distill_mode=none", "--optim=muon", "--optim_args=adamw_lr_scale=2", "--learning_rate=2e-3"]
    whole = launch(tmp_path / "whole", "fsdp2_bf16", *flags) / "run"
    alone = [*FLAGS, *flags, "--per_device_train_batch_size=32", "--bf16", f"--output_dir={tmp_path / 'alone'}"]
    ended = run(*alone)
    assert ended.returncode == 0, ended.stderr
    assert is_sharded(whole)
    assert losses_of(whole) == pytest.approx(losses_of(tmp_path / "alone"), rel=2e-3)
    resumed = launch(tmp_path / "resumed", "fsdp2_bf16", *flags, f"--resume_from_checkpoint={whole / 'checkpoint-2'}")
    assert losses_of(resumed / "run") == losses_of(whole)
    assert (resumed / "run" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

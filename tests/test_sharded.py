"""FSDP2 and DeepSpeed: two processes fit a teacher with batch norms, distil a student, are killed and resume.

They run on the CPU: see sharded_on_cpu.py.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from real_command import REPOSITORY, run, start_together
from sharded_on_cpu import patch_accelerate

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


# Per config: the `accelerate launch` flags that override it, the flags that one process then needs, and the relative
# tolerance of the losses. DeepSpeed's half precision also rounds the weights, and fp16 needs a GPU.
SETTINGS = {"fsdp2_bf16": ([], ["--bf16"], 2e-3), "deepspeed_zero2": (["--mixed_precision=no"], [], 1e-5)}
FOURTH_STEP_OF_THE_STUDENT = {
    "function": "modeling_deit_ti.trainer.DistillationTrainer.training_step",
    "call": 16 * 2 + 4,  # after the teacher's steps
    "rank": 1,
}


def launch(folder: Path, config: str, *flags: str, fault: dict | None = None) -> Path:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    changes, *_ = SETTINGS.get(config, ([],))
    config_file = f"--config_file=accelerate_configs/{config}.yaml"
    script = ["tests/sharded_on_cpu.py", json.dumps(fault)]
    places = [f"--output_dir={folder / 'run'}", f"--teacher_output_dir={folder / 'teachers'}"]
    command = [*launcher, config_file, *changes, *script, *FLAGS, *places, "--per_device_train_batch_size=16", *flags]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert (ended.returncode == 0) == (fault is None), ended.stderr
    assert fault is None or "SIGKILL" in ended.stderr, ended.stderr
    return folder


def start(folder: Path, config: str, *flags: str) -> Path:
    """Like `launch`, but in forks of one process, with the environment variables that `accelerate launch` sets."""
    command = [f"--config_file=accelerate_configs/{config}.yaml", "train_hf.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
    places = [f"--output_dir={folder / 'run'}", f"--teacher_output_dir={folder / 'teachers'}"]
    flags = [*FLAGS, *places, "--per_device_train_batch_size=16", *flags]
    for process in start_together(2, *flags, env=prepare_multi_gpu_env(args), patch=patch_accelerate):
        ended = process.wait()
        assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="module", params=SETTINGS)
def sharded(request, tmp_path_factory) -> Path:
    """The folder of a run that was killed in the student's last step and then resumed by the same command."""
    if request.param == "deepspeed_zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: DS_BUILD_OPS=0 pip install deepspeed --no-build-isolation")
    folder = tmp_path_factory.mktemp(request.param)
    every_step = ["--save_strategy=steps", "--save_steps=1"]
    launch(folder, request.param, *every_step, fault=FOURTH_STEP_OF_THE_STUDENT)
    assert sorted(path.name for path in (folder / "run").glob("checkpoint-*"))[-1] == "checkpoint-3"
    return launch(folder, request.param, *every_step)


def log_of(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def losses_of(run: Path) -> list[float]:
    return [entry["loss"] for entry in log_of(run) if "loss" in entry]


def is_sharded(run: Path) -> bool:
    """Whether every checkpoint has FSDP2's file, or each process's part of ZeRO's optimizer."""
    return all(
        (checkpoint / "pytorch_model_fsdp.bin").exists()
        or len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt"))) == 2
        for checkpoint in run.glob("checkpoint-*")
    )


def test_a_cnn_with_batch_norms_learns(sharded):
    (teacher,) = (sharded / "teachers").glob("test_resnet-*")
    losses = losses_of(teacher)
    assert losses[0] == pytest.approx(2.3, abs=0.3) and losses[-1] < 0.7


def test_the_students_losses_and_accuracy_match_one_process(sharded, tmp_path, request):
    _, flags, difference = SETTINGS[request.node.callspec.params["sharded"]]
    places = [f"--output_dir={tmp_path / 'run'}", f"--teacher_output_dir={tmp_path / 'teachers'}"]
    (teacher,) = (sharded / "teachers").glob("test_resnet-*")
    ended = run(*FLAGS, *places, *flags, "--per_device_train_batch_size=32", f"--teacher_model_name_or_path={teacher}")
    assert ended.returncode == 0, ended.stderr
    assert is_sharded(sharded / "run")
    assert losses_of(sharded / "run") == pytest.approx(losses_of(tmp_path / "run"), rel=difference)
    results = [json.loads((folder / "run" / "all_results.json").read_text()) for folder in (sharded, tmp_path)]
    for name in ("eval_accuracy", "teacher_accuracy"):
        assert results[0][name] == results[1][name], name


def test_saved_models_load_in_another_process_with_the_code_saved_beside_them(sharded, tmp_path):
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


def test_the_fsdp_flag_shards_the_student_after_a_teacher_was_fitted_without_it(tmp_path):
    start(tmp_path, "cpu_two_processes", "--fsdp", "--num_train_epochs=1")
    assert is_sharded(tmp_path / "run")


def test_muon_matches_one_process_and_resumes_from_its_sharded_state(tmp_path):
    flags = ["--distill_mode=none", "--optim=muon", "--optim_args=adamw_lr_scale=2", "--learning_rate=2e-3"]
    whole = start(tmp_path / "whole", "fsdp2_bf16", *flags) / "run"
    alone = [*FLAGS, *flags, "--per_device_train_batch_size=32", "--bf16", f"--output_dir={tmp_path / 'alone'}"]
    ended = run(*alone)
    assert ended.returncode == 0, ended.stderr
    assert is_sharded(whole)
    assert losses_of(whole) == pytest.approx(losses_of(tmp_path / "alone"), rel=2e-3)
    resumed = start(tmp_path / "resumed", "fsdp2_bf16", *flags, f"--resume_from_checkpoint={whole / 'checkpoint-2'}")
    assert losses_of(resumed / "run") == losses_of(whole)
    assert (resumed / "run" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

"""A run goes on with other numbers of processes, and its losses are those of one that was never changed."""

import json
import shutil
import signal
import socket
from pathlib import Path

import pytest
from real_command import Run
from test_streaming import parquet  # noqa: F401  (a fixture)


# All that is random in an image, in its company and in the network.
FLAGS = (
    "--config=recipes/digits.yaml",
    "--crop=padded",
    "--horizontal_flip=0.5",
    "--auto_augment=rand-m9-mstd0.5-inc1",
    "--random_erasing=0.5",
    "--mixup=0.8",
    "--cutmix=1.0",
    "--repeated_augmentation=3",
    "--drop_path_rate=0.3",
    "--num_train_epochs=2",
    "--eval_strategy=no",
    "--logging_strategy=steps",
    "--logging_steps=1",
    "--disable_tqdm=true",
    "--use_cpu",
)
DISTILLED = (
    "--max_train_samples=100",
    "--max_eval_samples=50",
    "--distill_mode=soft",
    "--teacher_num_train_epochs=12",
    "--teacher_learning_rate=2e-2",
)
STEP = "modeling_deit_ti.trainer.DistillationTrainer.training_step"


def run(*flags, processes: int = 1, stop_at: int | None = None, code: int | None = None) -> list:
    """The command in each process, as a launcher starts them; one of them is told to stop at a batch of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    code = code or (0 if stop_at is None else 75)
    fault = None if stop_at is None else {"function": STEP, "call": stop_at, "signum": signal.SIGTERM}
    places = [
        {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)
    ]
    started = [Run(*flags, env=place, fault=fault) for place in places]
    ended = [process.wait() for process in started]
    for process in ended:
        assert process.returncode == code, process.stderr
    return ended


def log_of(folder: Path) -> list[dict]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


def assert_same_losses(changed: Path, whole: Path) -> None:
    logs = [log_of(folder) for folder in (changed, whole)]
    assert [entry["step"] for entry in logs[0]] == [entry["step"] for entry in logs[1]] == list(range(1, 13))
    for name in {"loss", "label_loss", "distillation_loss", "grad_norm"} & logs[1][0].keys():
        assert [entry[name] for entry in logs[0]] == pytest.approx([entry[name] for entry in logs[1]], rel=1e-5), name


def results_of(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run in one process, and of its teacher: six steps of 16 images an epoch."""
    folder = tmp_path_factory.mktemp("whole")
    places = [f"--output_dir={folder / 'run'}", f"--teacher_output_dir={folder / 'teachers'}"]
    run(*FLAGS, *DISTILLED, *places, "--per_device_train_batch_size=16")
    return folder


def test_from_one_process_to_two_and_back(whole, tmp_path):
    (teacher,) = (whole / "teachers").glob("test_resnet-*")
    flags = [*FLAGS, *DISTILLED, f"--output_dir={tmp_path / 'run'}", f"--teacher_output_dir={tmp_path / 'teachers'}"]
    flags += [f"--teacher_model_name_or_path={teacher}", "--per_device_train_batch_size=16"]
    run(*flags, stop_at=4)
    (first, _) = run(*flags, processes=2, stop_at=5)
    assert "checkpoint-4; 2 processes take 1 x 8 images each, so that a step has as many as before" in first.stdout
    run(*flags)
    assert_same_losses(tmp_path / "run", whole / "run")
    assert results_of(tmp_path / "run")["teacher_cached"] == 0  # by this last process, of the steps it took


def test_from_two_processes_to_four_to_one_with_the_teacher_and_its_logits_that_one_has_stored(whole, tmp_path):
    flags = [*FLAGS, *DISTILLED, f"--output_dir={tmp_path / 'run'}", f"--teacher_output_dir={whole / 'teachers'}"]
    flags += ["--per_device_train_batch_size=8"]
    run(*flags, processes=2, stop_at=3)
    run(*flags, processes=4, stop_at=5)
    run(*flags)
    assert_same_losses(tmp_path / "run", whole / "run")
    assert results_of(tmp_path / "run")["teacher_cached"] == 1
    assert len(list((whole / "teachers").glob("test_resnet-*/model.safetensors"))) == 1


def test_a_stream_goes_on_in_four_processes_and_in_two(parquet, tmp_path):  # noqa: F811
    flags = [*FLAGS, "--distill_mode=none", f"--dataset_name={parquet}", "--streaming=true"]
    flags += ["--per_device_train_batch_size=80", "--dataloader_num_workers=2"]
    run(*flags, f"--output_dir={tmp_path / 'whole'}")
    flags += [f"--output_dir={tmp_path / 'run'}"]
    run(*flags, stop_at=4)
    run(*flags, processes=4, stop_at=5)
    run(*flags, processes=2)
    assert_same_losses(tmp_path / "run", tmp_path / "whole")


def test_processes_that_cannot_share_a_step_are_told_which_can(whole, tmp_path):
    shutil.copytree(whole / "run" / "checkpoint-6", tmp_path / "checkpoint-6")
    flags = [*FLAGS, *DISTILLED, f"--output_dir={tmp_path}", "--per_device_train_batch_size=16"]
    for ended in run(*flags, processes=3, code=2):
        assert ended.stderr.splitlines()[-1] == (
            "train_hf.py: error: 3 processes cannot share the 16 images that this run takes in a step, 2 of them "
            "together: go on with another --num_processes, one of 1, 2, 4, 8."
        )

"""Two processes on the CPU do what one does, under `accelerate launch` with its config or as two machines."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from filelock import FileLock
from real_command import REPOSITORY, Run, environments, free_port, run, start_together
from safetensors.torch import load_file

from modeling_deit_ti.checkpoints import why_unusable


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
    "--teacher_learning_rate=2e-3",
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
    """Uses the teacher of `one`: over many steps of fitting, rounding may change a teacher's decisions."""
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


def log_of(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def assert_same_losses(first: Path, second: Path) -> None:
    logs = [[entry for entry in log_of(run) if "loss" in entry] for run in (first, second)]
    assert [entry["step"] for entry in logs[1]] == list(range(1, 13))
    for name in ("loss", "label_loss", "distillation_loss", "grad_norm", "learning_rate"):
        assert [entry[name] for entry in logs[1]] == pytest.approx([entry[name] for entry in logs[0]], rel=1e-5), name


def test_every_steps_loss_is_that_of_one_process_at_the_same_global_batch_size(one, two):
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


def test_one_process_writes_every_file_and_prints_every_message(one, two):
    folder, ended = two
    assert ended.stdout.count("Trained in") == 1 and ended.stdout.count("split correctly") == 1
    names = [{path.relative_to(root) for path in root.rglob("*")} for root in (one / "run", folder / "run")]
    assert {path.name for path in names[1] - names[0]} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert {path.name for path in names[0] - names[1]} == {"rng_state.pth"}


def test_the_teacher_is_neither_wrapped_nor_saved(two):
    saved = load_file(two[0] / "run" / "checkpoint-12" / "model.safetensors")
    assert not any(name.startswith(("teacher", "module")) for name in saved)


def test_a_run_killed_in_both_processes_resumes_in_both_or_in_one(one, two, tmp_path):
    places = [f"--output_dir={tmp_path / 'run'}", f"--teacher_output_dir={two[0] / 'teachers'}"]
    flags = [*FLAGS, *places, "--per_device_train_batch_size=8", "--save_strategy=steps", "--save_steps=2"]
    fault = {"function": STEP, "call": 9, "rank": 1}
    killed = [process.wait().returncode for process in start_together(2, *flags, fault=fault)]
    assert killed == [1, -signal.SIGKILL]  # the first has lost its connection
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    alone = run(*flags, f"--output_dir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    assert "checkpoint-8; the global batch of 16 is now 1 x 2 x 8 (processes x accumulation x batch)\n" in alone.stdout
    assert "do not match" not in alone.stderr  # transformers' warning about a different batch size
    assert_same_losses(one / "run", tmp_path / "alone")
    for process in start_together(2, *flags):
        ended = process.wait()
        assert ended.returncode == 0, ended.stderr
    first, second = (load_file(folder / "run" / "model.safetensors") for folder in (two[0], tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_failing_process_ends_the_other_within_seconds_and_reports_the_reason_first(two, tmp_path):
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


def test_the_teacher_is_fitted_once_by_two_processes_then_one_then_two_and_a_signal_to_one_stops_both(one, tmp_path):
    places = [f"--output_dir={tmp_path / 'run'}", f"--teacher_output_dir={tmp_path / 'teachers'}"]
    flags = [*FLAGS, *places, "--per_device_train_batch_size=8", "--num_train_epochs=1"]
    fault = {"function": STEP, "call": 5, "rank": 1, "signum": signal.SIGTERM}
    stopped = [process.wait() for process in start_together(2, *flags, fault=fault)]
    for process in stopped:
        assert process.returncode == 75
        assert "train_hf.py: stopped by SIGTERM after step 5 of 72" in process.stderr
    (checkpoint,) = (tmp_path / "teachers").glob("*/checkpoint-*")
    assert checkpoint.name == "checkpoint-5" and why_unusable(checkpoint) is None
    alone = run(*flags, fault={"function": STEP, "call": 7, "signum": signal.SIGTERM})
    assert "Student: starting over; the global batch of 16 is now 1 x 2 x 8" in alone.stdout
    assert alone.returncode == 75 and "train_hf.py: stopped by SIGTERM after step 12 of 72" in alone.stderr
    ended, other = (process.wait() for process in start_together(2, *flags))
    assert ended.returncode == other.returncode == 0, ended.stderr
    assert ended.stdout.count("resuming from") == 1 and ended.stdout.count("Teacher: epoch 12/12, ") == 1
    assert not list((tmp_path / "teachers").glob("*/checkpoint-*"))
    assert len(list((tmp_path / "teachers").glob("*/model.safetensors"))) == 1
    # Its batch norms saw all 16 images of each step. Rounding differences grow with the number of steps.
    teachers = [next((folder / "teachers").glob("test_resnet-*")) for folder in (one, tmp_path)]
    assert teachers[0].name == teachers[1].name
    (first_epoch, *epochs), (five_steps, sixth, *others) = (
        [entry["loss"] for entry in log_of(teacher) if "loss" in entry] for teacher in teachers
    )
    assert (5 * five_steps + sixth) / 6 == pytest.approx(first_epoch, rel=1e-5)
    assert others == pytest.approx(epochs, rel=0.1)
    accuracies = [json.loads((teacher / "all_results.json").read_text())["eval_accuracy"] for teacher in teachers]
    assert accuracies[1] == pytest.approx(accuracies[0], abs=5 / 51)


@pytest.mark.parametrize(
    "network",
    [["--ema_decay=0.9"], ["--model_name_or_path=test_resnet", "--learning_rate=2e-2"]],
    ids=["averaged weights", "CNN"],
)
def test_all_machines_end_with_the_best_model_even_without_shared_storage(tmp_path, network):
    # Here the highest loss is the best, which is not that of the last epoch.
    best = ["--load_best_model_at_end", "--metric_for_best_model=loss", "--greater_is_better=true"]
    flags = [*FLAGS, "--distill_mode=none", "--num_train_epochs=3", "--per_device_train_batch_size=8", *best, *network]
    machines = [Run(*flags, f"--output_dir={tmp_path / env['RANK']}", env=env) for env in environments(2)]
    for ended in [machine.wait() for machine in machines]:
        assert ended.returncode == 0, ended.stderr
    *epochs, final = [entry["eval_loss"] for entry in log_of(tmp_path / "0") if "eval_loss" in entry]
    assert len(epochs) == 3 and max(epochs) > 1.01 * epochs[-1]
    assert final == pytest.approx(max(epochs), rel=1e-6)


def test_both_processes_wait_for_another_run_that_fits_their_teacher(one, two, tmp_path):
    (fitted,) = (one / "teachers").glob("test_resnet-*")
    teacher = two[0] / "teachers" / fitted.name  # others may have been left beside it by other tests
    flags = [*FLAGS, f"--output_dir={tmp_path / 'run'}", f"--teacher_output_dir={teacher.parent}"]
    with FileLock(f"{teacher}.lock"):
        main, other = started = start_together(2, *flags, "--per_device_train_batch_size=8")
        try:
            for _ in range(600):
                if "Teacher: waiting for another run that is fitting it" in main.said():
                    break
                time.sleep(0.1)
            os.kill(other.pid, signal.SIGTERM)  # which a process that is stuck in one wait would not notice
            assert other.wait(30).returncode == 75
        finally:
            for process in started:
                process.kill()


class Machine(NamedTuple):
    enter: list[str]  # the prefix that runs a command on it
    address: str
    interface: str


@pytest.fixture
def machines(tmp_path):
    """Two network namespaces joined by a virtual cable, or two loopback addresses where these are not permitted."""
    names = [f"deit-ti-{os.getpid()}-{number}" for number in (0, 1)]

    def ip(*words: str) -> bool:
        return subprocess.run(["ip", *words], capture_output=True).returncode == 0

    if shutil.which("ip") is None or not all(ip("netns", "add", name) for name in names):
        yield [Machine([], f"127.0.0.{number}", "lo") for number in (1, 2)]
        return
    try:
        assert ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            assert ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            assert ip("-n", name, "link", "set", "eth0", "up") and ip("-n", name, "link", "set", "lo", "up")
        yield [
            Machine(["ip", "netns", "exec", name], f"10.77.0.{number}", "eth0") for number, name in enumerate(names, 1)
        ]
    finally:
        for name in names:
            ip("netns", "delete", name)


def kill_machine(launcher: subprocess.Popen) -> None:
    for process in (*psutil.Process(launcher.pid).children(recursive=True), launcher):
        process.kill()
    launcher.wait()


@pytest.mark.slow
def test_a_lost_machine_is_waited_for_and_the_run_resumes_from_its_checkpoint(two, machines, tmp_path):
    places = [f"--output_dir={tmp_path / 'run'}", f"--teacher_output_dir={two[0] / 'teachers'}"]
    flags = [*FLAGS, *places, "--per_device_train_batch_size=8", "--save_strategy=steps", "--save_steps=2"]
    meeting_point = f"{machines[0].address}:{free_port()}"

    def start(number: int, name: str, *command: str) -> subprocess.Popen:
        machine = machines[number]
        # Host names cannot tell which machine hosts the meeting point: both have this computer's.
        options = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d"]
        options += [f"--rdzv-endpoint={meeting_point}", f"--local-addr={machine.address}"]
        options += [f"--rdzv-conf=is_host={1 - number},keep_alive_interval=1"]
        launcher = [*machine.enter, sys.executable, "-m", "torch.distributed.run", *options, *command, *flags]
        # Otherwise torch hands its store to a restarted machine under a key that only the first round wrote.
        environment = os.environ | {"GLOO_SOCKET_IFNAME": machine.interface, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        output = (tmp_path / name).open("w")
        return subprocess.Popen(launcher, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)

    fault = {"function": STEP, "call": 5, "rank": 1, "signum": signal.SIGSTOP}
    stays = start(0, "stays", "train_hf.py")
    lost = start(1, "lost", "tests/real_command.py", json.dumps(fault))
    started = [stays, lost]
    try:
        for _ in range(600):
            processes = psutil.Process(lost.pid).children(recursive=True)
            if any(process.status() == psutil.STATUS_STOPPED for process in processes):
                break
            time.sleep(0.5)
        kill_machine(lost)
        started.append(start(1, "back", "train_hf.py"))
        codes = [process.wait(300) for process in (started[-1], stays)]
    finally:
        for process in started:
            if process.poll() is None:
                kill_machine(process)
    said = (tmp_path / "stays").read_text()
    assert codes == [0, 0], said
    assert f"{tmp_path / 'run' / 'checkpoint-4'}" in said
    first, second = (load_file(folder / "run" / "model.safetensors") for folder in (two[0], tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)

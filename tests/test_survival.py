"""A run killed or told to stop at any moment ends like an uninterrupted one: the real command, real signals."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from real_command import Run, run, start_together

from modeling_deit_ti.checkpoints import SETTINGS_FILE, checkpoints_of, delete_older, last_complete, seal, why_unusable


# Everything random is on, and checkpoints are written within the epochs (of six steps) as well as at their ends.
FLAGS = (
    "--config=recipes/digits.yaml",
    "--max_train_samples=96",
    "--max_eval_samples=50",
    "--num_train_epochs=2",
    "--per_device_train_batch_size=16",
    "--per_device_eval_batch_size=25",
    "--crop=padded",
    "--auto_augment=rand-m9-mstd0.5-inc1",
    "--random_erasing=0.25",
    "--mixup=0.8",
    "--cutmix=1.0",
    "--repeated_augmentation=3",
    "--drop_path_rate=0.1",
    "--distill_mode=both",
    "--teacher_num_train_epochs=8",
    "--teacher_learning_rate=2e-2",
    "--save_strategy=steps",
    "--save_steps=3",
    "--logging_strategy=steps",
    "--logging_steps=2",
    "--disable_tqdm=true",
    "--report_to=none",
)
# Parts of the names of metrics that differ from process to process.
OWN = ("runtime", "per_second", "seconds", "teacher_path", "teacher_cached")


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """The run that is never interrupted, and its teacher beside it."""
    folder = tmp_path_factory.mktemp("reference")
    ended = run(*FLAGS, *places(folder))
    assert ended.returncode == 0, ended.stderr
    return folder


def places(folder: Path) -> list[str]:
    return [f"--output_dir={folder / 'run'}", f"--teacher_output_dir={folder / 'teachers'}"]


def resume(folder: Path):
    return run(*FLAGS, *places(folder))


def with_teacher(reference: Path, folder: Path) -> Path:
    shutil.copytree(reference / "teachers", folder / "teachers")
    return folder


def shared(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if not any(own in name for own in OWN)}


def assert_same_end(reference: Path, folder: Path, logged_alike: bool = True) -> None:
    """
    Compares weights, results and the whole log of student and teacher, bit for bit. A run that was told to stop logged
    early, so its means are over different steps (`logged_alike=False`); its evaluations are the same.
    """
    for runs in zip(runs_of(reference), runs_of(folder), strict=True):
        first, second = ((run / "model.safetensors").read_bytes() for run in runs)
        assert first == second
        for file in ("all_results.json", "eval_results.json"):
            first, second = (shared(json.loads((run / file).read_text())) for run in runs)
            if not logged_alike and "train_loss" in first:
                assert first.pop("train_loss") == pytest.approx(second.pop("train_loss"), rel=1e-6)
            assert first == second
        logs = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in runs]
        first, second = ([shared(entry) for entry in log if logged_alike or "eval_loss" in entry] for log in logs)
        assert first == second


def runs_of(folder: Path) -> list[Path]:
    """The student's run and the one that fitted its teacher."""
    return [folder / "run", *(weights.parent for weights in (folder / "teachers").glob("*/model.safetensors"))]


# ---- Killed ----

STEP = "modeling_deit_ti.trainer.DistillationTrainer.training_step"
EVALUATION = "transformers.Trainer.prediction_step"
WRITE_WEIGHTS = "transformers.modeling_utils.safe_save_file"
SEAL = "modeling_deit_ti.trainer.seal"
# Runs that are killed again and again, each time a little later; every process counts its own calls. A checkpoint
# calls torch.save for arguments, optimizer, schedule, random states, and the arguments again.
FITTING = {
    "in a step": (STEP, 20, "after"),
    "while a checkpoint's weights are written": (WRITE_WEIGHTS, 2, "half"),
    "before a checkpoint is sealed": (SEAL, 1, "before"),
    "in the evaluation after an epoch": (EVALUATION, 3, "after"),
    "after its last checkpoint": ("transformers.Trainer.save_state", 1, "before"),
    "resumed at its last step, in the final evaluation": (EVALUATION, 1, "after"),
    "while the finished model is written": (WRITE_WEIGHTS, 1, "half"),
    "while its card is written": ("modeling_deit_ti.outcome.write_model_card", 1, "before"),
    "before all_results.json": ("transformers.Trainer.save_metrics", 3, "before"),
    "when it is finished, before its checkpoints are deleted": (
        "modeling_deit_ti.fitting.checkpoints_of",
        1,
        "before",
    ),
    "before it is measured": ("modeling_deit_ti.trainer.DistillationTrainer.measure_teacher", 1, "before"),
}
TRAINING = [
    {
        "in the first step, before any checkpoint": (STEP, 1, "after"),
        "while a checkpoint's weights are written": (WRITE_WEIGHTS, 2, "half"),
        "in the evaluation after the first epoch": (EVALUATION, 2, "after"),
        "before a checkpoint is sealed": (SEAL, 3, "before"),
        "in the last evaluation of training": (EVALUATION, 1, "after"),
        "while the finished model is exported": ("modeling_deit_ti.outcome.save_transformers", 1, "before"),
    },
    {
        "while a checkpoint's optimizer is written": ("torch.save", 7, "half"),
        "while a checkpoint's random states are written": ("torch.save", 4, "half"),
        "while a checkpoint's state is written": (
            "transformers.trainer_callback.TrainerState.save_to_json",
            2,
            "half",
        ),
        "while a checkpoint is sealed": ("modeling_deit_ti.checkpoints.os.replace", 1, "before"),
        "before an older checkpoint is deleted": ("modeling_deit_ti.trainer.delete_older", 1, "before"),
        "while the card is written": ("modeling_deit_ti.outcome.write_model_card", 1, "before"),
    },
]


def kill_and_resume(folder: Path, moments: dict) -> list[str]:
    """Kills a run at one moment after another, lets it finish, and returns the output of every process."""
    said = []
    for moment, (function, call, when) in moments.items():
        fault = {"function": function, "call": call, "moment": when}
        killed = run(*FLAGS, *places(folder), fault=fault)
        assert killed.returncode == -signal.SIGKILL, f"{moment}: {killed.stderr}"
        incomplete = [path for path in checkpoints_of(folder / "run") if why_unusable(path) is not None]
        assert incomplete or moments is FITTING or "a checkpoint" not in moment, moment
        said.append(killed.stdout)
    ended = resume(folder)
    assert ended.returncode == 0, ended.stderr
    return [*said, ended.stdout]


def test_a_run_killed_repeatedly_while_its_teacher_is_fitted_ends_the_same(reference, tmp_path):
    said = kill_and_resume(tmp_path, FITTING)
    assert ["resuming from" in output for output in said] == [False, *[True] * 9, False, False]
    assert not list((tmp_path / "teachers").glob("*/checkpoint-*"))
    assert_same_end(reference, tmp_path)


@pytest.mark.parametrize("moments", TRAINING, ids=["first", "second"])
def test_a_run_killed_repeatedly_while_its_student_is_trained_ends_the_same(reference, tmp_path, moments):
    kill_and_resume(with_teacher(reference, tmp_path), moments)
    assert_same_end(reference, tmp_path)


def test_a_killed_run_that_keeps_one_checkpoint_always_has_a_complete_one(reference, tmp_path):
    """Even if killed between writing the new checkpoint and deleting the old one."""
    with_teacher(reference, tmp_path)
    for function, call in ((SEAL, 2), ("modeling_deit_ti.trainer.delete_older", 2)):
        flags = [*FLAGS, *places(tmp_path), "--save_total_limit=1"]
        killed = run(*flags, fault={"function": function, "call": call})
        assert killed.returncode == -signal.SIGKILL
        assert last_complete(tmp_path / "run") is not None


@pytest.mark.slow
def test_a_run_killed_repeatedly_at_random_moments_ends_the_same(reference, tmp_path):
    """At least thirty kills, each at a random moment of the rest of a run; prints a summary."""
    chance = random.Random(0)
    started = time.monotonic()
    whole = run(*FLAGS, *places(tmp_path / "timed"))
    assert whole.returncode == 0
    seconds = time.monotonic() - started
    kills, runs, late = 0, 0, 0
    while kills < 30:
        folder = tmp_path / str(runs)
        for _ in range(chance.randint(1, 4)):
            command = Run(*FLAGS, *places(folder))
            time.sleep(chance.uniform(0, seconds))
            if command.kill():
                kills += 1
            else:
                late += 1
                break
        if not (folder / "run" / "all_results.json").exists():
            ended = resume(folder)
            assert ended.returncode == 0, ended.stderr
        assert_same_end(reference, folder)
        shutil.rmtree(folder)
        runs += 1
    print(f"{kills} kills in {runs} runs of {seconds:.0f} s, all ended the same; {late} runs ended before their kill")


def start(folder: Path, processes: int) -> list[Run]:
    """The command in this many processes, which share the images of a step."""
    flags = [*FLAGS, *places(folder), f"--per_device_train_batch_size={16 // processes}", "--use_cpu"]
    return start_together(processes, *flags)


@pytest.mark.slow
def test_a_run_killed_while_the_number_of_processes_changes_ends_the_same(reference, tmp_path):
    """A hundred kills, each at a random moment of the rest of a run in one or two processes."""
    chance = random.Random(0)
    seconds = {}
    for processes in (1, 2):
        started = time.monotonic()
        whole = [
            process.wait() for process in start(with_teacher(reference, tmp_path / f"timed-{processes}"), processes)
        ]
        assert [ended.returncode for ended in whole] == [0] * processes, whole[0].stderr
        seconds[processes] = time.monotonic() - started
    kills, runs, late, changes = 0, 0, 0, 0
    while kills < 100:
        folder = with_teacher(reference, tmp_path / str(runs))
        before = None
        for _ in range(chance.randint(1, 8)):
            processes = chance.choice((1, 2))
            changes += before not in (None, processes)
            before = processes
            started = start(folder, processes)
            time.sleep(chance.uniform(0, seconds[processes]))
            killed = [process.kill() for process in started]
            if any(killed):
                kills += 1
            else:
                late += 1
                break
        if not (folder / "run" / "all_results.json").exists():
            processes = chance.choice((1, 2))
            changes += before != processes
            ended = [process.wait() for process in start(folder, processes)]
            assert [one.returncode for one in ended] == [0] * processes, ended[0].stderr
        logs = [json.loads((one / "run/trainer_state.json").read_text())["log_history"] for one in (reference, folder)]
        for first, second in zip(*logs, strict=True):
            for name in shared(first):
                assert second[name] == pytest.approx(first[name], rel=1e-5), (name, first["step"])
        shutil.rmtree(folder)
        runs += 1
    print(f"{kills} kills in {runs} runs, {changes} changes of process count; {late} runs ended before their kill")


# ---- Told to stop ----


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_run_told_to_stop_finishes_its_step_and_writes_a_checkpoint(reference, tmp_path, signum):
    with_teacher(reference, tmp_path)
    stopped = run(*FLAGS, *places(tmp_path), fault={"function": STEP, "call": 9, "signum": signum})
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[signum]
    checkpoint = tmp_path / "run" / "checkpoint-9"
    assert stopped.returncode == 75
    assert f"{name}: finishing the step, then writing a checkpoint." in stopped.stderr
    assert stopped.stderr.splitlines()[-1] == (
        f"train_hf.py: stopped by {name} after step 9 of 12; {checkpoint} has been written. "
        "Run the same command again to resume."
    )
    assert "Traceback" not in stopped.stderr
    assert last_complete(tmp_path / "run") == str(checkpoint)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["log_history"][-1]["step"] == 9  # nothing unlogged is left behind


def test_a_stopped_run_resumes_and_ends_the_same(reference, tmp_path):
    with_teacher(reference, tmp_path)
    for call in (4, 1, 2):  # in steps 4, 5 and 7
        fault = {"function": STEP, "call": call, "signum": signal.SIGTERM}
        assert run(*FLAGS, *places(tmp_path), fault=fault).returncode == 75
    assert resume(tmp_path).returncode == 0
    assert_same_end(reference, tmp_path, logged_alike=False)


@pytest.mark.parametrize(
    ("function", "call", "step"),
    [(STEP, 6, 6), (EVALUATION, 3, 12)],
    ids=["last step of an epoch", "evaluation of the last epoch"],
)
def test_a_run_told_to_stop_at_the_end_of_an_epoch_is_evaluated_first(reference, tmp_path, function, call, step):
    with_teacher(reference, tmp_path)
    stopped = run(*FLAGS, *places(tmp_path), fault={"function": function, "call": call, "signum": signal.SIGTERM})
    assert stopped.returncode == 75 and f"after step {step} of 12" in stopped.stderr
    log = json.loads((tmp_path / f"run/checkpoint-{step}/trainer_state.json").read_text())["log_history"]
    assert log[-1]["step"] == step and "eval_accuracy" in log[-1]
    assert resume(tmp_path).returncode == 0
    assert_same_end(reference, tmp_path)


def test_a_run_told_to_stop_while_fitting_its_teacher_writes_a_checkpoint(reference, tmp_path):
    stopped = run(*FLAGS, *places(tmp_path), fault={"function": STEP, "call": 20, "signum": signal.SIGTERM})
    assert stopped.returncode == 75 and "stopped by SIGTERM after step 20 of 48" in stopped.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == [SETTINGS_FILE]
    (checkpoint,) = (tmp_path / "teachers").glob("*/checkpoint-20")
    assert why_unusable(checkpoint) is None


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_run_told_to_stop_outside_training_ends_at_once(reference, tmp_path, signum):
    with_teacher(reference, tmp_path)
    measuring = "modeling_deit_ti.trainer.DistillationTrainer.measure_teacher"
    stopped = run(*FLAGS, *places(tmp_path), fault={"function": measuring, "signum": signum})
    assert stopped.returncode == 75 and "Traceback" not in stopped.stderr
    assert stopped.stderr.splitlines()[-1].startswith("train_hf.py: stopped by ")


def test_a_run_told_to_stop_while_writing_its_outputs_resumes_and_ends_the_same(reference, tmp_path):
    """During the export of the trained model, and while its card is written."""
    with_teacher(reference, tmp_path)
    for function in ("modeling_deit_ti.outcome.save_transformers", "modeling_deit_ti.outcome.write_model_card"):
        stopped = run(*FLAGS, *places(tmp_path), fault={"function": function, "signum": signal.SIGTERM})
        assert stopped.returncode == 75 and "Traceback" not in stopped.stderr
        last = stopped.stderr.splitlines()[-1]
        assert last == "train_hf.py: stopped by SIGTERM. Run the same command again to resume."
        assert not (tmp_path / "run" / "all_results.json").exists()  # so it is not taken for finished
    assert resume(tmp_path).returncode == 0
    assert_same_end(reference, tmp_path)


@pytest.mark.parametrize(
    ("flags", "num_workers"),
    [
        (FLAGS, 0),
        ([*FLAGS, "--distill_mode=none", "--augment_on=loader"], 2),
        ([*FLAGS[:1], *FLAGS[2:], "--distill_mode=none", "--streaming=true"], 2),  # without --max_train_samples
    ],
    ids=["no workers needed", "loader", "streaming"],
)
def test_a_run_signalled_together_with_its_workers_still_finishes_the_step(reference, tmp_path, flags, num_workers):
    """SLURM and terminals signal the whole process group, including the loader's workers."""
    with_teacher(reference, tmp_path)
    workers_stay = ["--dataloader_num_workers=2", "--dataloader_persistent_workers=true"]
    command = Run(*flags, *places(tmp_path), "--num_train_epochs=50", *workers_stay)
    wait_for(lambda: last_complete(tmp_path / "run"))
    workers = [child.pid for child in psutil.Process(command.pid).children()]
    assert len(workers) == num_workers
    command.signal_group(signal.SIGTERM)
    stopped = command.wait()
    assert stopped.returncode == 75 and "Traceback" not in stopped.stderr, stopped.stderr
    step = int(stopped.stderr.split("after step ")[1].split()[0])
    assert last_complete(tmp_path / "run").endswith(f"checkpoint-{step}")
    wait_for(lambda: not any(psutil.pid_exists(worker) for worker in workers))


def wait_for(condition, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


# ---- Checkpoints ----


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint-4"
    (folder / "global_step4").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "global_step4" / "shard.pt").write_bytes(b"shard")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_a_sealed_checkpoint_is_usable(checkpoint):
    assert "was being written" in why_unusable(checkpoint)
    seal(checkpoint)
    assert why_unusable(checkpoint) is None
    seal(checkpoint)  # written again under the same name
    assert why_unusable(checkpoint) is None


@pytest.mark.parametrize("file", ["model.safetensors", "global_step4/shard.pt", "trainer_state.json"])
def test_a_flipped_bit_a_truncated_file_and_a_missing_file_are_found(checkpoint, file):
    seal(checkpoint)
    whole = (checkpoint / file).read_bytes()
    (checkpoint / file).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert why_unusable(checkpoint) == f"its {file} is damaged"
    (checkpoint / file).write_bytes(whole[:-1])
    assert why_unusable(checkpoint) == f"its {file} is damaged"
    (checkpoint / file).unlink()
    assert why_unusable(checkpoint) == f"its {file} is missing or cannot be read"


def test_damaged_checksums_make_a_checkpoint_unusable(checkpoint):
    for content in ("", "[]", '{"model', "3"):
        (checkpoint / "checksums.json").write_text(content)
        assert why_unusable(checkpoint) == "its checksums.json is damaged"


@pytest.mark.parametrize(
    ("latest", "limit", "best", "left"),
    [
        (12, 2, None, [12, 8]),
        (12, 1, None, [12]),
        (12, 2, 4, [12, 4]),
        (12, 1, 4, [12, 4]),  # as transformers does
        (8, 2, None, [8, 4]),  # 12 is from before the run was resumed from 4
        (8, 1, None, [8]),
        (12, 3, None, [12, 8, 4]),
    ],
)
def test_older_checkpoints_are_deleted_by_step_whatever_the_clock_said(tmp_path, latest, limit, best, left):
    for hours, step in enumerate((12, 8, 4)):  # a clock that jumped back before each
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (hours * 3600, hours * 3600))
    delete_older(tmp_path / f"checkpoint-{latest}", limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert [path.name for path in checkpoints_of(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_the_last_complete_checkpoint_is_found_by_its_step(tmp_path, checkpoint):
    seal(checkpoint)
    for step in (8, 12, 100):
        shutil.copytree(checkpoint, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-100" / "model.safetensors").write_bytes(b"")
    assert [path.name for path in checkpoints_of(tmp_path)] == [f"checkpoint-{step}" for step in (100, 12, 8, 4)]
    assert last_complete(tmp_path) == str(tmp_path / "checkpoint-12")
    assert last_complete(tmp_path / "nowhere") is None

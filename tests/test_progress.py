"""What a run shows as it progresses, in a terminal and in a log file."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest
from building import NOTHING_RANDOM, arguments, image_processor, tiny_student
from real_command import REPOSITORY
from transformers import AutoModelForImageClassification, TrainerCallback
from transformers.utils.logging import set_tqdm_hook

from modeling_deit_ti.arguments import ImageArguments
from modeling_deit_ti.data import load_images
from modeling_deit_ti.progress import quiet_libraries
from modeling_deit_ti.runs import build_trainer


BAR = re.compile(r"Student, epoch (\d\.\d)/2: +(\d+)%\|.*\| (\?|[\d:]+)( left)?(, .*?)? *$")


class Terminal:
    """A pseudo-terminal in place of stderr: `lines` holds the lines written, each as a list of its redrawn frames."""

    def __init__(self, columns: int):
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.file, self.written = os.fdopen(theirs, "w"), b""
        self.reader = threading.Thread(target=self._read)  # otherwise its buffer fills up, and writes block

    def _read(self) -> None:
        try:
            while block := os.read(self.ours, 4096):
                self.written += block
        except OSError:  # the other end is closed
            os.close(self.ours)

    def __enter__(self) -> "Terminal":
        self.reader.start()
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()
        self.reader.join()

    @property
    def lines(self) -> list[list[str]]:
        lines = self.written.decode().replace("\r\n", "\n").split("\n")
        return [[frame for frame in line.split("\r") if frame.strip()] for line in lines]


@pytest.fixture(scope="module")
def digits():
    return load_images(ImageArguments("digits", max_train_samples=64, max_eval_samples=50))


def make_trainer(data, folder, **flags):
    """Eight steps in two epochs."""
    defaults = {
        "output_dir": folder,
        "image_size": 32,
        "patch_size": 16,
        **NOTHING_RANDOM,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 25,
        "num_train_epochs": 2,
        "save_strategy": "no",
    }
    args = arguments(**{**defaults, **flags})
    return build_trainer(args, data, tiny_student(args), image_processor(32))


def shown_in_terminal(monkeypatch, columns: int, *actions) -> list[list[str]]:
    with Terminal(columns) as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal.file)
        for action in actions:
            action()
    return terminal.lines


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_terminal_shows_the_whole_run_in_one_bar_with_loss_accuracy_and_time_left(
    digits, tmp_path, monkeypatch, capsys, columns
):
    trainer = make_trainer(digits, tmp_path, disable_tqdm="false")
    evaluated = []

    class Watcher(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            evaluated.append(str(trainer.progress.bar))

    trainer.add_callback(Watcher())
    (frames, *rest) = shown_in_terminal(monkeypatch, columns, trainer.train)
    assert rest == [[]]  # only the bar, followed by a newline
    assert all(len(frame) < columns for frame in frames)
    first, last = BAR.match(frames[0]), BAR.match(frames[-1])
    assert first.groups() == ("0.0", "0", "?", " left", None)
    assert last[1] == "2.0" and last[2] == "100" and last[4] is None
    accuracy = trainer.state.log_history[-2]["eval_accuracy"]
    result = f", loss {trainer.recent_loss:.3g}, accuracy {accuracy:.1%}"
    assert last[5] == (result if columns > 60 else result[: len(last[5])])
    assert [re.search(r"evaluating \d/\d", bar)[0] for bar in evaluated] == ["evaluating 1/2", "evaluating 2/2"] * 2
    assert capsys.readouterr().out == ""


def test_bar_of_a_resumed_run_starts_at_its_checkpoint(digits, tmp_path, monkeypatch):
    recipe = {"disable_tqdm": "false", "save_strategy": "steps", "save_steps": 6}
    make_trainer(digits, tmp_path, **recipe).train()
    resumed = make_trainer(digits, tmp_path, **recipe)
    checkpoint = str(tmp_path / "checkpoint-6")
    lines = shown_in_terminal(monkeypatch, 80, lambda: resumed.train(resume_from_checkpoint=checkpoint))
    frames = sum(lines, [])  # transformers may warn in between, about checkpoints from the same second
    first = BAR.match(frames[0])
    assert first[1] == "1.5" and first[2] == "75"
    accuracies = [entry["eval_accuracy"] for entry in resumed.state.log_history if "eval_accuracy" in entry]
    assert f"accuracy {accuracies[-1]:.1%}" in frames[-1]


def test_error_leaves_the_bar_on_its_own_line(digits, tmp_path, monkeypatch):
    trainer = make_trainer(digits, tmp_path, disable_tqdm="false", learning_rate=1e30, warmup_steps=0, max_grad_norm=0)

    def fail():
        with pytest.raises(FloatingPointError):
            trainer.train()
        print("error", file=sys.stderr)

    bar, error, _ = shown_in_terminal(monkeypatch, 80, fail)
    assert bar[-1].startswith("Student, epoch ") and error == ["error"]


def test_evaluation_after_training_has_a_bar_that_disappears(digits, tmp_path, monkeypatch):
    trainer = make_trainer(digits, tmp_path, disable_tqdm="false")
    (frames,) = shown_in_terminal(monkeypatch, 80, trainer.evaluate)
    assert frames[0].startswith("Student, evaluating:   0%|") and trainer.progress.bar is None


def test_log_file_gets_one_line_per_epoch(digits, tmp_path, capsys):
    trainer = make_trainer(digits, tmp_path)  # pytest captures the output, so there is no terminal
    trainer.train()
    printed = capsys.readouterr()
    log = trainer.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    accuracies = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]
    lines = printed.out.splitlines()
    for line, epoch, loss, accuracy in zip(lines, (1, 2), losses, accuracies, strict=True):
        start = f"Student: epoch {epoch}/2, loss {loss:.4g}, accuracy {accuracy:.2%}, "
        ending = " s left" if epoch == 1 else ""
        assert line.startswith(start) and re.fullmatch(rf"[\d,]+ images/s(, \d+{ending})?", line.removeprefix(start))
    assert printed.err == ""


def test_run_limited_by_steps_gets_a_line_per_log_and_evaluation(digits, tmp_path, capsys):
    steps = {"logging_strategy": "steps", "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    make_trainer(digits, tmp_path, max_steps=6, **steps).train()
    facts = [
        re.match(r"Student: step (\d)/6(?:, (loss) [\d.]+)?(?:, (accuracy) [\d.]+%)?", line).groups()
        for line in capsys.readouterr().out.splitlines()
    ]
    both = ("6", "loss", "accuracy")
    assert facts == [("2", "loss", None), ("3", None, "accuracy"), ("4", "loss", None), both]


def test_transformers_bars_are_hidden_but_download_bars_are_not(digits, tmp_path, capsys):
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import tqdm as download_bar

    enable_progress_bars()  # which another test may have turned off

    trainer = make_trainer(digits, tmp_path)
    quiet_libraries()
    try:
        trainer.save_model(tmp_path / "saved")
        AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
        assert capsys.readouterr().err == ""
        with download_bar(total=1, desc="model.safetensors") as bar:
            bar.update()
        assert "model.safetensors: 100%" in capsys.readouterr().err
    finally:
        set_tqdm_hook(None)


def test_piped_output_has_no_bars_dictionaries_or_library_messages(tmp_path):
    flags = ["--config=recipes/digits.yaml", "--distill_mode=none", "--max_train_samples=64", "--max_eval_samples=50"]
    command = [sys.executable, "train_hf.py", *flags, "--num_train_epochs=2", f"--output_dir={tmp_path / 'run'}"]
    ended = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ended.returncode == 0, ended.stdout
    lines = [line for line in ended.stdout.splitlines() if line]
    assert [line[:18] for line in lines[:2]] == ["Student: epoch 1/2", "Student: epoch 2/2"]
    assert lines[2].split() == ["top-1", "top-5"]
    assert not re.search(r"\r|%\||\{|\[transformers\]", ended.stdout)

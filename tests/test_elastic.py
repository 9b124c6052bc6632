# ruff: noqa: F811  (a fixture from another file)
"""A run resumes with a different number of processes, with the losses of a run that never changed it."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from building import arguments, tiny_student, tiny_teacher
from real_command import FORKS, environments
from test_streaming import parquet  # noqa: F401
from transformers import TrainerCallback

from modeling_deit_ti.arguments import Division
from modeling_deit_ti.checkpoints import last_complete, save_settings, settings_of
from modeling_deit_ti.data import load_images
from modeling_deit_ti.data.inputs import make_image_processor
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.interruption import Interrupted
from modeling_deit_ti.runs import (
    build_network,
    build_trainer,
    resume_steps,
    resume_steps_without_checkpoint,
    run_settings,
)
from modeling_deit_ti.teacher_cache import make_teacher_cache


# DeiT's recipe, with everything random: augmentation, patches, mixing partners and the branches of the network.
FLAGS = {
    "image_size": 32,
    "drop_path_rate": 0.5,
    "patch_drop_rate": 0.5,
    "num_train_epochs": 2,
    "eval_strategy": "no",
    "logging_strategy": "steps",
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}
DISTILLED = {"dataset_name": "digits", "max_train_samples": 70, "max_eval_samples": 50, "distill_mode": "soft"}


class Stop(TrainerCallback):
    """Tells this process to stop after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def train(rank: int, environment: dict[str, str], folder: Path, teachers: Path, flags: dict, stop_at: int) -> None:
    """One process of a run that trains a CNN or a one-block student, from its latest checkpoint to a given step."""
    os.environ |= environment
    args = arguments(output_dir=folder, teacher_output_dir=teachers, **FLAGS, **flags)
    checkpoint = last_complete(folder)
    if checkpoint is not None:
        resume_steps(args, settings_of(checkpoint))
    data, processor = load_images(args.images), make_image_processor(args.model, args.augmentation)
    teacher = cache = None
    if args.training.mode.has_teacher:
        teacher = tiny_teacher()
        cache = make_teacher_cache(args, teacher, data, processor)
    if args.model.is_new_deit_ti:
        student = tiny_student(args, num_hidden_layers=1, num_labels=len(data.label_names))
    else:
        student, *_ = build_network(args, data)
    trainer = build_trainer(args, data, student, processor, teacher, cache)
    if rank == 0:
        trainer.add_callback(Stop(stop_at))
    with contextlib.suppress(Interrupted):
        trainer.train(resume_from_checkpoint=checkpoint)
    if rank == 0:
        (folder / "share_read.json").write_text(json.dumps(cache and cache.share_read))


def run(folder: Path, *parts: tuple[int, int], teachers: Path | None = None, **flags) -> list[dict]:
    """The logged steps of a run in parts, each given by its number of processes and its last step."""
    for processes, stop_at in parts:
        started = [
            FORKS.Process(target=train, args=(rank, environment, folder, teachers or folder, flags, stop_at))
            for rank, environment in enumerate(environments(processes))
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(400)
            assert process.exitcode == 0, (processes, stop_at)
    log = json.loads((folder / f"checkpoint-{stop_at}" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


def share_read(folder: Path) -> float:
    return json.loads((folder / "share_read.json").read_text())


def assert_same_losses(changed: list[dict], whole: list[dict]) -> None:
    assert [entry["step"] for entry in changed] == [entry["step"] for entry in whole]
    for name in {"loss", "label_loss", "distillation_loss", "grad_norm", "learning_rate"} & whole[0].keys():
        assert [entry[name] for entry in changed] == pytest.approx([entry[name] for entry in whole], rel=1e-5), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A run of two epochs of four steps in one process, and its log."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, (1, 8), per_device_train_batch_size=16, **DISTILLED)


def test_one_process_resumes_as_two_and_then_as_one(whole, tmp_path):
    changed = run(tmp_path, (1, 2), (2, 5), (1, 8), per_device_train_batch_size=16, **DISTILLED)
    assert_same_losses(changed, whole[1])


def test_two_processes_resume_as_four_then_one_with_logits_stored_by_another_run(whole, tmp_path):
    parts = (2, 3), (4, 6), (1, 8)
    changed = run(tmp_path, *parts, teachers=whole[0], per_device_train_batch_size=8, **DISTILLED)
    assert_same_losses(changed, whole[1])
    assert (share_read(whole[0]), share_read(tmp_path)) == (0, 1)


def test_batch_norms_see_as_many_images_when_two_processes_resume_as_one_and_four(tmp_path):
    # A network without ReLU: rounding may flip the sign of a ReLU's input, and the gradient then jumps.
    network = {"model_name_or_path": "test_efficientnet", "distill_mode": "none"}
    flags = {**DISTILLED, **network, "per_device_train_batch_size": 8}
    whole = run(tmp_path / "whole", (2, 8), **flags)
    changed = run(tmp_path / "changed", (2, 2), (1, 4), (4, 6), (1, 8), **flags)
    assert_same_losses(changed, whole)


def test_a_stream_resumes_in_four_processes_and_then_in_two(parquet, tmp_path):
    flags = {"dataset_name": parquet, "streaming": True, "per_device_train_batch_size": 80, "patch_size": 32}
    whole = run(tmp_path / "whole", (1, 8), dataloader_num_workers=1, **flags)
    changed = run(tmp_path / "changed", (1, 2), (4, 5), dataloader_num_workers=1, **flags)
    changed = run(tmp_path / "changed", (2, 8), **flags)
    assert_same_losses(changed, whole)


@pytest.mark.parametrize(("learning_rate", "batch"), [("5e-4", 4), ("1e-3", 8)], ids=["same run", "another run"])
def test_before_its_first_checkpoint_the_same_run_keeps_its_global_batch_size(
    tmp_path, monkeypatch, learning_rate, batch
):
    flags = {"output_dir": tmp_path, **FLAGS, **DISTILLED, "per_device_train_batch_size": 8}
    begun = arguments(**flags, learning_rate="5e-4")
    data = load_images(begun.images)
    save_settings(tmp_path, run_settings(begun, data))
    now = arguments(**flags, learning_rate=learning_rate)
    monkeypatch.setattr(type(now.training), "world_size", 2)
    note = resume_steps_without_checkpoint(now, data)
    for run in (now, now.fitting):
        assert run.training.per_device_train_batch_size == batch
    assert bool(note) == (batch == 4)


@pytest.mark.parametrize(
    ("processes", "flags", "together", "shares"),
    [
        (1, (16, 1), 1, (16, 1)),
        (2, (16, 1), 1, (8, 1)),
        (1, (8, 1), 1, (8, 2)),
        (2, (8, 4), 2, (8, 1)),
        (1, (5, 2), 2, (4, 4)),
        (8, (16, 1), 4, None),
        (3, (16, 1), 1, None),
    ],
)
def test_a_process_splits_its_share_of_a_step_into_the_largest_batches_allowed(
    tmp_path, monkeypatch, processes, flags, together, shares
):
    training = arguments(output_dir=tmp_path, per_device_train_batch_size=flags[0], use_cpu=True).training
    monkeypatch.setattr(type(training), "world_size", processes)
    if shares is None:
        with pytest.raises(UserError, match=f"^{processes} processes cannot share the 16 images .* one of 1, 2, 4"):
            training.divide_steps(16, Division(1, together))
        return
    training.divide_steps(16, Division(1, together))
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == shares

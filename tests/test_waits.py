# ruff: noqa: F401, F811  (fixtures of other files)
"""Between two logs, training never waits for the GPU. Waits are counted on a pretended one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from building import NOTHING_RANDOM
from pretended_gpu import PretendedGPU
from test_streaming import load, number_of, parquet
from test_teacher_cache import Epoch, assert_same, digits, epoch, make_trainer, result
from transformers import TrainerControl

from modeling_deit_ti.arguments import Division
from modeling_deit_ti.data.streaming import StreamedImages
from modeling_deit_ti.device import HostCopy
from modeling_deit_ti.distillation import LossParts
from modeling_deit_ti.teacher_cache import TeacherCache


@pytest.fixture
def gpu(monkeypatch) -> PretendedGPU:
    return PretendedGPU(monkeypatch)


@pytest.fixture
def late(monkeypatch) -> None:
    """No copy arrives until something waits for it."""
    monkeypatch.setattr(HostCopy, "is_there", property(lambda self: False))


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory().to("cuda", non_blocking=True)


def test_the_pretended_gpu_counts_waits_and_nothing_else(gpu):
    with gpu:
        pinned = torch.tensor([1.0, -2.0]).pin_memory()
        tensor = pinned.to("cuda", non_blocking=True)
        assert tensor.is_cuda and gpu.waits == []
        copy = HostCopy(tensor * 2)
        assert not copy.is_there and gpu.waits == []
        gpu.catch_up()
        assert copy.is_there and copy.read().tolist() == [2, -4] and gpu.waits == []
        for wait in (
            lambda: tensor.sum().item(),
            lambda: bool(tensor.isfinite().all()),
            lambda: tensor[tensor > 0],
            lambda: tensor.nonzero(),
            lambda: tensor.cpu(),
            lambda: pinned.to("cuda"),
            lambda: torch.ones(2).to("cuda", non_blocking=True),
            lambda: HostCopy(tensor).read(),
        ):
            before = len(gpu.waits)
            wait()
            assert len(gpu.waits) == before + 1


# ---- A step ----


@pytest.mark.parametrize(
    "flags",
    [NOTHING_RANDOM, {**NOTHING_RANDOM, "mixup": 0.8, "cutmix": 1, "drop_path_rate": 0.5, "patch_drop_rate": 0.5}],
    ids=["static", "mixed"],
)
def test_no_step_waits_whether_the_teachers_logits_are_computed_or_read(digits, tmp_path, gpu, flags):
    flags = {**flags, "augment_on": "loader", "num_train_epochs": 1, "distill_mode": "soft"}
    make_trainer(digits, tmp_path / "cpu", **flags).train()
    (expected,) = (tmp_path / "cpu").rglob("*.bin")
    losses = []
    for is_cached in (False, True):
        trainer = make_trainer(digits, tmp_path / "gpu", **flags)
        losses.append(losses_on(gpu, trainer))
        assert gpu.waits == []
        assert len(trainer.teacher.calls) == (0 if is_cached else 4) and trainer.teacher_cache.share_read == is_cached
        (stored,) = (tmp_path / "gpu").rglob("*.bin")
        assert is_cached or not any(stored.read_bytes())
        with gpu:
            gpu.catch_up()
            trainer.check_losses()
            trainer.teacher_cache.flush()
        assert gpu.waits == [] and stored.read_bytes() == expected.read_bytes()
    assert losses[0] == losses[1]


def losses_on(gpu: PretendedGPU, trainer) -> list[float]:
    """The losses of an epoch without backward passes, on a GPU that has copied nothing when the CPU is done."""
    batches = list(trainer.get_train_dataloader())
    trainer.create_optimizer_and_scheduler(4)
    trainer.args._setup_devices = torch.device("cuda")
    losses = []
    with gpu, torch.no_grad():
        trainer.teacher.to("cuda")
        model = trainer.model.to("cuda").train()
        gpu.waits.clear()
        for batch in batches:
            for name in ("pixel_values", "labels"):
                batch[name] = on_gpu(batch[name])
            losses.append(trainer.compute_loss(model, batch).values.item())
            trainer.state.global_step += 1
            trainer.state.epoch = trainer.state.global_step / 8  # before the end of the epoch, which logs
            trainer.run_callback.on_step_end(trainer.args, trainer.state, TrainerControl())
    return losses


def record(gpu: PretendedGPU, trainer, label_loss: float) -> None:
    """Records a step whose two loss terms are `label_loss` and 1."""
    label_loss, distillation_loss = (on_gpu(torch.tensor(value)) for value in (label_loss, 1.0))
    logits = torch.zeros(2, 10, device="cuda")
    parts = LossParts(label_loss + distillation_loss, label_loss, distillation_loss)
    trainer._record_step(parts, logits, logits)
    trainer.state.global_step += 1


def end_step(trainer, **flags) -> None:
    trainer.run_callback.on_step_end(trainer.args, trainer.state, TrainerControl(**flags))


def trainer_at_its_start(data, folder):  # of an epoch that does not end in the next steps
    trainer = make_trainer(data, folder)
    trainer.create_optimizer_and_scheduler(8)
    trainer.state.epoch, trainer.state.max_steps = 0.1, 8
    return trainer


def test_a_loss_is_checked_once_the_gpu_has_copied_it(digits, tmp_path, gpu):
    trainer = trainer_at_its_start(digits, tmp_path)
    with gpu:
        for label_loss in (0.5, torch.inf, torch.nan):
            record(gpu, trainer, label_loss)
            end_step(trainer)
        gpu.catch_up()
        with pytest.raises(FloatingPointError, match=r"is inf at step 2 \(label_loss inf, distillation_loss 1, "):
            end_step(trainer)
    assert gpu.waits == []


@pytest.mark.parametrize("flag", ["should_log", "should_save", "should_evaluate"])
def test_all_losses_are_checked_before_a_log_a_checkpoint_or_an_evaluation(digits, tmp_path, gpu, flag):
    trainer = trainer_at_its_start(digits, tmp_path)
    with gpu:
        record(gpu, trainer, torch.nan)
        end_step(trainer)
        assert gpu.waits == []
        with pytest.raises(FloatingPointError, match="The loss is nan at step 1 "):
            end_step(trainer, **{flag: True})


@pytest.mark.parametrize("save_strategy", ["epoch", "steps"])
def test_no_checkpoint_is_saved_after_a_non_finite_loss_even_if_it_arrives_late(digits, tmp_path, late, save_strategy):
    flags = {"learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": 0, "save_strategy": save_strategy}
    said = []
    for schedule in ({}, {"logging_strategy": "steps", "logging_steps": 1}):  # a log waits
        trainer = make_trainer(digits, tmp_path, **flags, **schedule, save_steps=3)
        with pytest.raises(FloatingPointError) as error:
            trainer.train()
        said.append(str(error.value))
        assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert said[0] == said[1]


# ---- The teacher's cache ----


def ask(gpu: PretendedGPU, epoch: Epoch, cache: TeacherCache, batch: list[tuple[int, int]], teacher=None):
    """The logits of a batch, which are not read from the file before the GPU has copied them."""
    images = on_gpu(epoch.images[[index for index, _ in batch]])
    seeds = np.array([seed for _, seed in batch])
    logits = cache(teacher or epoch.teacher, images, seeds, epoch.sampler)
    assert logits.is_cuda and logits.dtype == torch.float32
    return logits.values


def expected(epoch: Epoch, batch: list[tuple[int, int]]) -> torch.Tensor:
    return epoch.teacher(epoch.images[[index for index, _ in batch]]).half().float()


def test_rows_are_written_once_the_gpu_has_copied_them_and_before_the_next_epoch(epoch, gpu):
    cache = epoch.cache(is_static=True)

    def stored() -> int:
        rows = np.frombuffer((epoch.folder / "images.bin").read_bytes(), np.uint32).reshape(32, 8)
        return int(rows.any(axis=1).sum())

    with gpu:
        for batch, stored_before in zip(epoch.batches, (0, 0, 16, 16), strict=True):
            assert torch.equal(ask(gpu, epoch, cache, batch), expected(epoch, batch))
            assert stored() == stored_before
            if batch is epoch.batches[1]:
                gpu.catch_up()
        assert gpu.waits == []
        epoch.sampler.set_epoch(1)
        keys = list(epoch.sampler)
        assert torch.equal(ask(gpu, epoch, cache, keys[:8]), expected(epoch, keys[:8]))
    assert stored() == 32
    assert (cache.num_computed, cache.num_read) == (32, 8)


def test_a_partly_stored_batch_does_not_wait_and_keeps_its_stored_rows(epoch, gpu):
    first, second = epoch.batches[:2]
    with gpu:
        cache = epoch.cache(is_static=True)
        ask(gpu, epoch, cache, first)
        gpu.catch_up()
        cache.flush()
        both = first[:5] + second[:3]
        cache = epoch.cache(is_static=True)
        other = ask(gpu, epoch, cache, both, teacher=lambda images: epoch.teacher(images) + 1)
        assert torch.equal(other[:5], expected(epoch, both)[:5])
        assert torch.equal(other[5:], (epoch.teacher(epoch.images[[i for i, _ in both]]) + 1).half().float()[5:])
        gpu.catch_up()
        cache.flush()
        assert torch.equal(ask(gpu, epoch, epoch.cache(is_static=True), both), other)
    assert gpu.waits == [] and (cache.num_read, cache.num_computed) == (5, 3)


@pytest.mark.parametrize("value", [7e4, float("inf"), float("nan")])
def test_logits_outside_half_precision_are_not_rounded_stored_or_waited_for(epoch, gpu, value):
    exact = torch.full((8, 10), 1 / 3).index_fill(1, torch.tensor([2]), value)
    with gpu:
        answer, cache = on_gpu(exact), epoch.cache()
        for _ in range(2):
            logits = ask(gpu, epoch, cache, epoch.batches[0], teacher=lambda images: answer)
            torch.testing.assert_close(logits, exact, atol=0, rtol=0, equal_nan=True)
            gpu.catch_up()
        cache.flush()
    assert gpu.waits == [] and not any((epoch.folder / "epoch-0000.bin").read_bytes())


@pytest.mark.parametrize("interrupted", [False, True])
def test_late_logits_are_stored_when_training_ends_even_with_an_error(digits, tmp_path, late, interrupted):
    first = make_trainer(digits, tmp_path)

    def stop(teacher, args, output):
        if interrupted and len(teacher.calls) == 7:
            raise InterruptedError

    first.teacher.register_forward_hook(stop)
    if interrupted:
        with pytest.raises(InterruptedError):
            first.train()
    else:
        first.train()
    second = make_trainer(digits, tmp_path)
    second.train()
    assert len(second.teacher.calls) == (2 if interrupted else 0)
    if not interrupted:
        assert_same(result(first), result(second))


# ---- Batches ----


def test_a_streams_batches_are_pinned_and_copied_without_waiting(parquet, gpu, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    args = SimpleNamespace(
        device=torch.device("cuda"),
        process_index=0,
        world_size=1,
        train_batch_size=8,
        total_train_batch_size=8,
        division=Division(processes=1, together=4, lanes=2, lane_buffer_size=100),
        order_seed=0,
        dataloader_num_workers=0,
        dataloader_pin_memory=True,
        dataloader_persistent_workers=False,
        dataloader_prefetch_factor=None,
        accelerator_config=SimpleNamespace(non_blocking=True),
    )
    loader = StreamedImages(load(parquet).train, number_of).order(args).loader(args)
    with gpu:
        batches = [next(batches) for batches in [iter(loader)] for _ in range(3)]
    assert all(batch["pixel_values"].is_cuda and batch["labels"].is_cuda for batch in batches)
    assert gpu.waits == [] and gpu.pinned

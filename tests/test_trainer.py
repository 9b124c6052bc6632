"""The trainer: the teacher is in the loss and nowhere else, and everything logged and measured is correct."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from building import NOTHING_RANDOM, TINY_CNN, arguments, image_processor, tiny_student, tiny_teacher
from real_command import REPOSITORY
from safetensors.torch import load_file
from sklearn.utils.class_weight import compute_class_weight
from torch._dynamo.utils import counters
from transformers import TrainerCallback, TrainingArguments

from modeling_deit_ti import DeiTTiForImageClassification
from modeling_deit_ti.arguments import ImageArguments
from modeling_deit_ti.checkpoints import why_unusable
from modeling_deit_ti.data import inputs, load_images
from modeling_deit_ti.data.decoding import read_image
from modeling_deit_ti.device import is_faster_in_eager_attention
from modeling_deit_ti.distillation import distillation_loss
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.interruption import Interrupted
from modeling_deit_ti.preflight import check_one_gpu
from modeling_deit_ti.runs import balanced_class_weights, build_network, build_trainer
from modeling_deit_ti.teacher import Teacher
from modeling_deit_ti.trainer import AVERAGE_FILE, DistillationTrainer


DEITS_AUGMENTATION = {
    "crop": "auto",
    "horizontal_flip": 0.5,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
}
TIMINGS = (
    "train_seconds",
    "train_runtime",
    "train_samples_per",
    "train_steps_per",
    "eval_runtime",
    "eval_samples_per",
    "eval_steps_per",
)


@pytest.fixture(scope="module")
def digits():
    return load_images(ImageArguments("digits", max_train_samples=64, max_eval_samples=50))


def make_trainer(data, folder, teacher=True, **flags) -> DistillationTrainer:
    """Four steps of sixteen images with a two-block student and nothing random, unless a flag says otherwise."""
    defaults = {
        "output_dir": folder,
        "distill_mode": "both",
        "image_size": 32,
        "patch_size": 8,
        "drop_path_rate": 0,
        **NOTHING_RANDOM,
        "augment_on": "loader",  # so batches hold what the networks see
        "per_device_train_batch_size": 16,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "save_strategy": "no",
        "save_total_limit": 100,
        "eval_strategy": "no",
        "disable_tqdm": True,
    }
    args = arguments(**{**defaults, **flags})
    teacher = tiny_teacher() if teacher and args.training.mode.has_teacher else None
    return build_trainer(args, data, tiny_student(args), image_processor(32), teacher)


def weights(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same(first: dict, second: dict, **tolerance) -> None:
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(tolerance or {"atol": 0, "rtol": 0}), msg=name)


def without_timings(trainer: DistillationTrainer) -> list[dict]:
    """The log."""
    return [
        {name: value for name, value in entry.items() if not name.startswith(TIMINGS)}
        for entry in trainer.state.log_history
    ]


# ---- Averaged weights ----


def test_averaged_weights_follow_their_recursion_and_are_evaluated_and_saved_but_not_trained(digits, tmp_path):
    flags = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "ema_decay": 0.6}
    trainer, plain = (make_trainer(digits, tmp_path / name, **own) for name, own in (("a", flags), ("b", {})))
    steps = []

    class Recorder(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            steps.append(weights(plain))

    plain.add_callback(Recorder())
    plain.train()
    trainer.train()
    average = steps[0]
    for step, latest in enumerate(steps[1:], start=2):
        decay = min(0.6, 1 - step ** (-2 / 3))  # it warms up
        average = {name: decay * average[name] + (1 - decay) * value for name, value in latest.items()}
    assert_same(weights(trainer), average, atol=1e-6, rtol=1e-5)
    assert_same(load_file(tmp_path / "a" / "checkpoint-4" / "model.safetensors"), steps[-1])
    assert_same(load_file(tmp_path / "a" / "checkpoint-4" / AVERAGE_FILE), weights(trainer))
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations[-1] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    assert evaluations[-1] != pytest.approx(plain.evaluate()["eval_loss"], abs=1e-4)


def test_averaged_weights_cannot_be_combined_with_sharded_ones(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="--ema_decay needs whole weights"):
        arguments(output_dir=tmp_path, ema_decay=0.9)


# ---- The loss ----


def test_a_steps_loss_is_the_modes_loss_on_the_teachers_logits(digits, tmp_path):
    trainer = make_trainer(digits, tmp_path, label_smoothing_factor=0.1)
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    loss = trainer.compute_loss(model, batch)
    outputs, teacher_logits = model(batch["pixel_values"]), trainer.teacher(batch["pixel_values"])
    expected = distillation_loss(
        trainer.mode, outputs.class_logits, outputs.distillation_logits, batch["labels"], teacher_logits, 0.1
    )
    torch.testing.assert_close(loss, expected.loss)


def test_accumulated_batches_give_the_gradient_of_one_large_batch(digits, tmp_path):
    results = []
    for size, steps in ((32, 1), (8, 4)):
        trainer = make_trainer(
            digits, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, optim="sgd"
        )
        output = trainer.train()
        results.append((weights(trainer), output.training_loss, trainer.state.global_step))
    assert results[0][2] == results[1][2] == 2
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    assert_same(results[0][0], results[1][0], atol=1e-6, rtol=1e-5)


def test_student_and_teacher_see_the_same_mixed_images(digits, tmp_path):
    trainer = make_trainer(digits, tmp_path, mixup=0.8, cutmix=1.0)
    seen = {}
    trainer.teacher.register_forward_hook(lambda module, args, output: seen.update(teacher=args[0]))
    trainer.model.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(student=kwargs["pixel_values"]), with_kwargs=True
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model.train(), batch)
    assert torch.equal(seen["teacher"], seen["student"])
    assert not torch.equal(seen["student"], batch["pixel_values"])


def test_without_labels_the_single_distillation_token_learns_from_the_teacher(digits, tmp_path):
    unlabelled = type(digits)(**{**vars(digits), "train": digits.train.remove_columns("label")})
    trainer = make_trainer(
        unlabelled, tmp_path, distill_mode="distill", single_token=True, mixup=0.8, num_train_epochs=2
    )
    before = weights(trainer)
    trainer.train()
    assert not torch.equal(before["distillation_head.weight"], trainer.model.distillation_head.weight)
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert "label_loss" not in log and log["distillation_loss"] == pytest.approx(log["loss"], rel=1e-5)


# ---- The teacher ----


def test_the_teacher_is_in_the_loss_and_nowhere_else(digits, tmp_path):
    trainer = make_trainer(digits, tmp_path, save_strategy="epoch")
    before = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    trainer.train()
    assert not any(module.training for module in trainer.teacher.modules())
    assert_same(before, trainer.teacher.state_dict())  # running statistics too
    optimised = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert optimised == trainer.model.num_parameters()
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert set(saved) == set(trainer.model.state_dict())


def test_the_teachers_accuracy_is_measured_on_every_evaluation_image(digits, tmp_path):
    trainer = make_trainer(digits, tmp_path, per_device_eval_batch_size=7)
    samples = trainer.eval_dataset.__getitems__(list(range(50)))
    predicted, labels = trainer.teacher(samples["pixel_values"]).argmax(-1), samples["labels"]
    assert trainer.measure_teacher() == pytest.approx((predicted == labels).float().mean().item())


def test_evaluation_pixels_are_normalised_on_the_models_device(digits, tmp_path):
    trainer = make_trainer(digits, tmp_path, per_device_eval_batch_size=16)
    assert all(batch["pixel_values"].dtype == torch.uint8 for batch in trainer.get_eval_dataloader())
    seen = {"student": [], "teacher": []}
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen["student"].append(kwargs["pixel_values"]), with_kwargs=True
    )
    trainer.teacher.register_forward_pre_hook(lambda module, args: seen["teacher"].append(args[0]))
    trainer.measure_teacher()
    trainer.evaluate()
    trainer.evaluate()
    images = [read_image(row) for row in digits.evaluation]
    expected = trainer.processing_class(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.cat(seen["teacher"]), expected)
    assert torch.equal(torch.cat(seen["student"]), torch.cat([expected, expected]))


def test_in_bf16_the_teacher_runs_in_bf16_as_well(digits, tmp_path):
    trainer = make_trainer(digits, tmp_path, bf16=True, use_cpu=True)
    assert next(trainer.teacher.parameters()).dtype == torch.bfloat16
    assert np.isfinite(trainer.train().training_loss)
    assert next(trainer.model.parameters()).dtype == torch.float32


def test_in_bf16_the_mean_of_both_heads_is_the_prediction(digits, tmp_path):
    trainer = make_trainer(digits, tmp_path, distill_mode="both", bf16=True, use_cpu=True)
    for head in (trainer.model.class_head, trainer.model.distillation_head):
        torch.nn.init.constant_(head.bias, 20)  # near 20, bfloat16 has steps of 1/8, so means are rounded
    kept = trainer.predict(trainer.eval_dataset).predictions[0]
    assert (kept[:, 0] == kept[:, trainer.readouts.index("_both")]).all()


# ---- Training ----


@pytest.mark.parametrize("augment_on", ["loader", "device"])
def test_the_same_seed_gives_the_same_weights_and_another_seed_different_ones(digits, tmp_path, augment_on):
    recipe = {**DEITS_AUGMENTATION, "augment_on": augment_on}
    runs = []
    for seed in (1, 1, 2):
        trainer = make_trainer(digits, tmp_path, seed=seed, drop_path_rate=0.3, patch_drop_rate=0.5, **recipe)
        trainer.train()
        runs.append(weights(trainer))
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0]["class_head.weight"], runs[2]["class_head.weight"])


@pytest.mark.parametrize("step", [2, 4, 5], ids=["mid-epoch", "end of an epoch", "second epoch"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(digits, tmp_path, step):
    recipe = {
        **DEITS_AUGMENTATION,
        "augment_on": "auto",
        "drop_path_rate": 0.3,
        "patch_drop_rate": 0.5,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": step,
    }
    whole = make_trainer(digits, tmp_path, **recipe)
    whole.train()
    resumed = make_trainer(digits, tmp_path, **recipe)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.state.global_step == whole.state.global_step == 8
    assert_same(weights(whole), weights(resumed))
    assert without_timings(whole) == without_timings(resumed)


def test_runtime_and_throughput_of_a_resumed_run_cover_the_whole_run(digits, tmp_path):
    recipe = {"num_train_epochs": 2, "save_strategy": "epoch", "logging_strategy": "steps", "logging_steps": 3}
    make_trainer(digits, tmp_path, **recipe).train()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    state["log_history"][-1]["train_seconds"] = 1000.0  # as if the first process had taken this long
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
    metrics = make_trainer(digits, tmp_path, **recipe).train(resume_from_checkpoint=tmp_path / "checkpoint-4").metrics
    assert 1000 < metrics["train_runtime"] < 1100
    assert metrics["train_samples_per_second"] == pytest.approx(8 * 16 / metrics["train_runtime"], rel=1e-12)


@pytest.mark.parametrize(
    ("augment_on", "kept_bytes", "workers"),
    [("device", 2**20, (0, 0)), ("loader", 2**20, (2, 0)), ("device", 0, (0, 2))],
)
def test_only_images_that_need_work_get_workers(digits, tmp_path, monkeypatch, augment_on, kept_bytes, workers):
    monkeypatch.setattr(inputs, "MAX_KEPT_BYTES", kept_bytes)
    options = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True}
    trainer = make_trainer(digits, tmp_path, augment_on=augment_on, **options)
    train, evaluation = trainer.get_train_dataloader(), trainer.get_eval_dataloader()
    assert (train.num_workers, evaluation.num_workers) == workers
    assert [len(loader) for loader in (train, evaluation)] == [4, 1]
    assert trainer.args.dataloader_num_workers == 2  # recorded as it was given


def test_tokens_positions_norms_and_biases_do_not_decay(digits, tmp_path):
    trainer = make_trainer(digits, tmp_path)
    decays = trainer.get_decay_parameter_names(trainer.model)
    assert {name.rsplit(".", 1)[-1] for name in decays} == {"weight"}
    assert not any("norm" in name for name in decays)
    assert len(decays) == 2 * 4 + 3  # qkv, projection, fc1 and fc2 of each block; patches and two heads


def test_a_compiled_run_compiles_once_and_ends_like_uncompiled_and_resumed_ones(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments sets it for later tests too
    recipe = {
        "mixup": 0.8,
        "num_train_epochs": 2,
        "eval_strategy": "epoch",
        "per_device_eval_batch_size": 16,  # the last batch of the 50 images has two
        "save_strategy": "epoch",
    }
    uncompiled = make_trainer(digits, tmp_path / "uncompiled", **recipe)
    uncompiled.train()

    torch._dynamo.reset()
    counters.clear()

    class Compiler(TrainerCallback):
        """Counts graphs after each epoch and each evaluation."""

        graphs = []

        def on_log(self, args, state, control, **kwargs):
            self.graphs.append(counters["stats"]["unique_graphs"])

    recipe |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = make_trainer(digits, tmp_path / "compiled", **recipe)
    compiled.add_callback(Compiler)
    assert 0 <= compiled.measure_teacher() <= 1
    compiled.train()
    compiled.evaluate()
    assert Compiler.graphs == [2] * 6  # one graph for the student and one for the teacher, ever
    assert_same(weights(uncompiled), weights(compiled), atol=1e-5, rtol=1e-4)

    checkpoint = tmp_path / "compiled" / "checkpoint-4"
    assert set(load_file(checkpoint / "model.safetensors")) == set(uncompiled.model.state_dict())
    resumed = make_trainer(digits, tmp_path / "compiled", **recipe)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(compiled), weights(resumed), atol=1e-6, rtol=1e-5)
    resumed.save_model()
    saved = DeiTTiForImageClassification.from_pretrained(tmp_path / "compiled")
    assert_same(weights(resumed), saved.state_dict())


def test_a_compiled_teachers_logits_survive_the_reuse_of_their_memory(digits, tmp_path, monkeypatch):
    """As with CUDA graphs, the teacher's output is overwritten as soon as the student runs."""
    uncompiled = make_trainer(digits, tmp_path / "uncompiled", distill_mode="soft")
    uncompiled.train()
    events, returned = [], []

    def compile_(network, **options):
        if not isinstance(network, Teacher):
            return network

        def teacher(pixel_values):
            events.append("teacher")
            returned[:] = [network(pixel_values)]
            return returned[0]

        return teacher

    def overwrite(network, args, kwargs):
        events.append("student")
        returned[0].fill_(torch.nan)

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: events.append("step"))
    compiled = make_trainer(
        digits, tmp_path / "compiled", distill_mode="soft", torch_compile=True, torch_compile_backend="aot_eager"
    )
    compiled.model.register_forward_pre_hook(overwrite, with_kwargs=True)
    compiled.train()
    assert events == ["step", "teacher", "student"] * 4
    assert_same(weights(uncompiled), weights(compiled))


@pytest.mark.parametrize(("tf32", "precision"), [(True, "tf32"), (False, "ieee")])
def test_tf32_is_set_through_both_of_torchs_apis(tmp_path, tf32, precision):
    """Code that reads one that was not set fails, as max-autotune does. (torch keeps the flags without a GPU, too.)"""
    code = f"""
import torch
from transformers import training_args
from modeling_deit_ti import arguments
training_args.is_torch_tf32_available = arguments.is_torch_tf32_available = lambda: True
arguments.DistillationTrainingArguments(output_dir={str(tmp_path)!r}, use_cpu=True, tf32={tf32})
flags = torch.backends.cuda.matmul, torch.backends.cudnn
print(torch.get_float32_matmul_precision(), *(f.allow_tf32 for f in flags), *(f.fp32_precision for f in flags))
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    legacy = "high" if tf32 else "highest"
    assert ended.stdout.split() == [legacy, str(tf32), str(tf32), precision, precision], ended.stderr


def test_deepspeed_saves_its_float32_weights(digits, tmp_path, monkeypatch):
    """Not the half-precision ones it trains. (A function that has the originals stands in for DeepSpeed.)"""
    trainer = make_trainer(digits, tmp_path)
    kept = {parameter: parameter.detach().clone() for parameter in trainer.model.parameters()}
    expected = weights(trainer)
    trainer.model.half()
    for name in ("deepspeed", "deepspeed.utils"):
        monkeypatch.setitem(sys.modules, name, module_from_spec(ModuleSpec(name, None)))
    sys.modules["deepspeed.utils"].safe_get_full_fp32_param = kept.get
    trainer.is_deepspeed_enabled = True
    trainer._save(str(tmp_path / "saved"), trainer.model.state_dict())
    saved = DeiTTiForImageClassification.from_pretrained(tmp_path / "saved")
    assert saved.dtype == torch.float32
    assert_same(saved.state_dict(), expected)


def test_the_optimizer_is_fused_adamw_and_attention_the_faster_of_the_two(digits, tmp_path):
    trainer = make_trainer(digits, tmp_path)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.AdamW and all(group["fused"] for group in optimizer.param_groups)
    batch = trainer.eval_dataset.__getitems__([0])
    with torch.profiler.profile() as profile:
        trainer.model(batch["pixel_values"])
    is_fused = "aten::scaled_dot_product_attention" in {event.key for event in profile.key_averages()}
    num_tokens = trainer.model.base_model.embeddings.position_embeddings.shape[1]
    assert is_fused != is_faster_in_eager_attention("cpu", "no", num_tokens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_copies_do_not_block_and_tf32_is_on_by_default(tmp_path):
    args = arguments(output_dir=tmp_path).training
    assert args.accelerator_config.non_blocking and args.dataloader_pin_memory
    if torch.cuda.get_device_capability() >= (8, 0):
        assert args.tf32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        arguments(output_dir=tmp_path, tf32=False)
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_gradient_checkpointing_gives_the_same_weights(digits, tmp_path):
    runs = []
    for checkpointing in (False, True):
        trainer = make_trainer(digits, tmp_path, gradient_checkpointing=checkpointing)
        trainer.train()
        runs.append(weights(trainer))
    assert_same(*runs, atol=1e-6, rtol=1e-5)


# ---- Logs and metrics ----


def test_logged_loss_parts_are_means_and_add_up_to_the_loss(digits, tmp_path):
    trainer = make_trainer(digits, tmp_path, logging_strategy="steps", logging_steps=2)
    students, teachers = [], []
    trainer.model.register_forward_hook(lambda module, args, output: students.append(output.logits.argmax(-1)))
    trainer.teacher.register_forward_hook(lambda module, args, output: teachers.append(output.argmax(-1)))
    trainer.train()
    agreements = [(ours == its).float().mean().item() for ours, its in zip(students, teachers, strict=True)]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for log in logs:
        assert 0.5 * log["label_loss"] + 0.5 * log["distillation_loss"] == pytest.approx(log["loss"], rel=1e-5)
    assert [log["teacher_agreement"] for log in logs] == pytest.approx(
        [np.mean(agreements[:2]), np.mean(agreements[2:])]
    )


@pytest.mark.parametrize("mode", ["none", "distill", "both"])
def test_evaluation_reports_top_1_and_top_5_of_every_read_out(digits, tmp_path, mode):
    trainer = make_trainer(digits, tmp_path, distill_mode=mode, teacher=False, per_device_eval_batch_size=16)
    metrics = trainer.evaluate()
    samples = trainer.eval_dataset.__getitems__(list(range(50)))
    labels = samples["labels"]
    with torch.no_grad():
        output = trainer.model.eval()(samples["pixel_values"])
    readouts = {"": output.logits}
    if mode != "none":
        readouts["_class"], readouts["_distillation"] = output.class_logits, output.distillation_logits
        readouts["_both"] = (output.class_logits + output.distillation_logits) / 2
    for name, logits in readouts.items():
        ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
        assert metrics[f"eval_accuracy{name}"] == pytest.approx((ranks < 1).float().mean().item())
        assert metrics[f"eval_accuracy{name}_top5"] == pytest.approx((ranks < 5).float().mean().item())
    assert len([key for key in metrics if "accuracy" in key]) == 2 * len(readouts)
    loss = torch.nn.functional.cross_entropy(output.logits, labels)
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)


# ---- Arguments ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": -1}, "--mixup"),
        ({"cutmix": -0.1}, "--cutmix"),
        ({"repeated_augmentation": 0}, "--repeated_augmentation"),
        ({"label_smoothing_factor": 1.0}, "--label_smoothing_factor"),
    ],
)
def test_out_of_range_arguments_are_refused_naming_the_flag(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        arguments(output_dir=tmp_path, **options)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    """The Trainer would use nn.DataParallel, which trains in float32 whatever the model card says."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", 4)
    training = arguments(output_dir=tmp_path, bf16=True, use_cpu=True).training
    with pytest.raises(UserError, match="4 GPUs.*accelerate launch --num_processes 4 .*CUDA_VISIBLE_DEVICES"):
        check_one_gpu(training)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_without_a_gpu_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="fp16 was requested.*no GPU"):
        arguments(output_dir=tmp_path, fp16=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="fp16 was requested.*no GPU"):
        arguments(output_dir=tmp_path)


def test_the_hub_token_is_not_pickled_with_the_arguments(tmp_path):
    args = arguments(output_dir=tmp_path, hub_token="hf_secret").training
    torch.save(args, tmp_path / "training_args.bin")
    assert b"hf_secret" not in (tmp_path / "training_args.bin").read_bytes()
    assert args.hub_token == "hf_secret"
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).learning_rate == args.learning_rate


def test_a_non_finite_loss_ends_the_run_at_its_step_and_reaches_no_checkpoint(digits, tmp_path):
    trainer = make_trainer(
        digits, tmp_path, learning_rate=1e30, save_strategy="steps", save_steps=1, max_grad_norm=0, num_train_epochs=2
    )
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    found = re.match(
        r"The loss is (?:nan|inf) at step (\d+) \(label_loss (\S+), .*learning rate (\S+)\)", str(error.value)
    )
    assert float(found[3]) == pytest.approx(1e30 * 0.5 * (1 + np.cos(np.pi * (int(found[1]) - 1) / 8)), rel=1e-3)
    steps = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert steps == list(range(1, int(found[1])))
    for step in steps:
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert all(np.isfinite(entry["loss"]) for entry in state["log_history"] if "loss" in entry)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "muon"])
def test_steps_that_overflow_in_fp16_are_skipped_and_counted(digits, tmp_path, optimizer):
    logging = {"logging_strategy": "steps", "logging_steps": 2}
    trainer = make_trainer(digits, tmp_path, optim=optimizer, num_train_epochs=2, **logging)
    trainer.args.mixed_precision = "fp16"  # as chosen automatically on older GPUs
    # A scale at which the first gradients overflow; it is halved until they do not.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    metrics = trainer.train().metrics
    counted = [entry["fp16_overflows"] for entry in trainer.state.log_history if "loss" in entry]
    halvings = 127 - np.log2(trainer.accelerator.scaler.get_scale())
    assert sum(counted) == metrics["fp16_overflows"] == halvings
    assert 0 < halvings < 8 and counted[-1] == 0
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())


def test_a_run_without_checkpoints_writes_one_if_stopped_in_its_last_evaluation(digits, tmp_path):
    class Scheduler(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps:
                os.kill(os.getpid(), signal.SIGTERM)

    recipe = {"save_strategy": "no", "eval_strategy": "epoch"}
    trainer = make_trainer(digits, tmp_path, **recipe)
    trainer.add_callback(Scheduler())
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step 4 of 4; .*checkpoint-4 has been written"):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) == before
    assert why_unusable(tmp_path / "checkpoint-4") is None
    resumed = make_trainer(digits, tmp_path, **recipe)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(weights(trainer), weights(resumed))
    assert without_timings(resumed)[:-1] == without_timings(trainer)  # the last entry is the final summary


@pytest.mark.parametrize("step", [3, 6], ids=["mid-epoch", "the last step"])
def test_a_resumed_run_ends_at_max_steps(digits, tmp_path, step):
    recipe = {
        "num_train_epochs": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "epoch",
    }
    whole = make_trainer(digits, tmp_path, **recipe)
    whole.train()
    resumed = make_trainer(digits, tmp_path, **recipe)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.state.global_step == 6
    assert_same(weights(whole), weights(resumed))
    assert without_timings(whole) == without_timings(resumed)
    assert sum("eval_loss" in entry for entry in resumed.state.log_history) == 2


# ---- Early stopping ----

# Of eight evaluations; the best within the patience of two is the third.
ACCURACIES = (0.3, 0.4, 0.6, 0.6, 0.5, 0.7, 0.8, 0.75)


def make_stopping_trainer(data, folder) -> DistillationTrainer:
    """Evaluates after every step, with `ACCURACIES` as the results, and has a patience of two."""
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(data, folder, distill_mode="none", num_train_epochs=2, early_stopping_patience=2, **steps)
    trainer.compute_metrics = lambda prediction: {"accuracy": ACCURACIES[trainer.state.global_step - 1]}
    return trainer


def test_a_run_ends_when_its_accuracy_stops_improving_and_keeps_the_best_model(digits, tmp_path):
    trainer = make_stopping_trainer(digits, tmp_path)
    trainer.train()
    assert trainer.state.global_step == 5 and trainer.has_stopped_early
    best = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert_same(best, weights(trainer))


@pytest.mark.parametrize("step", [4, 5], ids=["with one evaluation left", "with none left"])
def test_a_resumed_run_has_the_remaining_patience(digits, tmp_path, step):
    make_stopping_trainer(digits, tmp_path).train()
    resumed = make_stopping_trainer(digits, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.state.global_step == 5
    assert_same(load_file(tmp_path / "checkpoint-3" / "model.safetensors"), weights(resumed))


def test_a_run_resumed_without_its_best_checkpoint_chooses_among_later_models(digits, tmp_path, caplog):
    make_stopping_trainer(digits, tmp_path).train()
    shutil.rmtree(tmp_path / "checkpoint-3")  # the best
    caplog.set_level("INFO", "modeling_deit_ti")
    resumed = make_stopping_trainer(digits, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    state = resumed.state
    assert (state.global_step, state.best_global_step, state.best_metric) == (8, 7, ACCURACIES[6])
    assert_same(load_file(tmp_path / "checkpoint-7" / "model.safetensors"), weights(resumed))
    assert "The best model so far, of step 3, is lost with its checkpoint: choosing anew from here" in caplog.text


@pytest.mark.parametrize("limit", [1, 2])
def test_a_run_stopped_after_its_best_evaluation_resumes_from_its_latest_weights(digits, tmp_path, limit):
    class Scheduler(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    make_stopping_trainer(digits, tmp_path / "whole").train()
    stopped = make_stopping_trainer(digits, tmp_path / "stopped")
    stopped.args.save_total_limit = limit
    stopped.add_callback(Scheduler())
    with pytest.raises(Interrupted, match="after step 4"):
        stopped.train()
    latest = [tmp_path / name / "checkpoint-4" for name in ("whole", "stopped")]
    assert_same(*(load_file(checkpoint / "model.safetensors") for checkpoint in latest))
    state = json.loads((latest[1] / "trainer_state.json").read_text())
    assert state["best_global_step"] == 3 and Path(state["best_model_checkpoint"]).name == "checkpoint-3"
    assert why_unusable(state["best_model_checkpoint"]) is None


@pytest.mark.parametrize(
    "flags",
    [
        {"eval_strategy": "no"},
        {"eval_strategy": "steps"},
        {"save_strategy": "no"},
        {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 50},
    ],
)
def test_early_stopping_without_evaluations_and_checkpoints_is_refused(tmp_path, flags):
    with pytest.raises(UserError, match="^--early_stopping_patience needs .*: use --eval_strategy epoch"):
        arguments(output_dir=tmp_path, early_stopping_patience=3, **flags)


# ---- Class weights ----


def test_balanced_class_weights_are_scikit_learns_and_zero_for_unseen_labels():
    labels = [0] * 10 + [2] * 5 + [3]
    weights = balanced_class_weights(np.bincount(labels, minlength=5))
    seen = compute_class_weight("balanced", classes=np.array([0, 2, 3]), y=labels)
    assert weights.tolist() == pytest.approx([seen[0], 0, seen[1], seen[2], 0])


@pytest.mark.parametrize("mode", ["none", "both"])
def test_class_weights_apply_only_to_the_label_term_of_the_loss(digits, tmp_path, mode):
    trainer = make_trainer(digits, tmp_path, distill_mode=mode, class_weights="balanced", mixup=0.8)
    expected = balanced_class_weights(np.bincount(digits.train["label"], minlength=10))
    assert torch.equal(trainer.class_weights, expected)
    unweighted = make_trainer(digits, tmp_path, distill_mode=mode, mixup=0.8)
    batch = next(iter(trainer.get_train_dataloader()))
    losses = [one.compute_loss(one.model.train(), batch).item() for one in (trainer, unweighted)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
    assert trainer._step_sums.get("distillation_loss") == unweighted._step_sums.get("distillation_loss")


def test_balanced_class_weights_improve_recall_of_rare_classes_in_unbalanced_digits(tmp_path):
    data = load_images(ImageArguments("digits", max_eval_samples=300))
    labels, seen = data.train["label"][:], Counter()
    kept = []
    for row, label in enumerate(labels):
        seen[label] += 1
        if seen[label] <= (100 if label < 5 else 5):
            kept.append(row)
    data = dataclasses.replace(data, train=data.train.select(kept))
    truth = torch.tensor(data.evaluation["label"][:])
    recalls = []
    for weights in ({}, {"class_weights": "balanced"}):
        recipe = {"model_name_or_path": TINY_CNN, "learning_rate": 1e-2, "num_train_epochs": 3, "save_strategy": "no"}
        recipe |= {**NOTHING_RANDOM, "image_size": 32, "per_device_train_batch_size": 32, "eval_strategy": "no"}
        args = arguments(output_dir=tmp_path, **recipe, **weights)
        network, processor, _ = build_network(args, data)
        trainer = build_trainer(args, data, network, processor)
        trainer.train()
        trainer.evaluate()
        predicted = torch.from_numpy(trainer.predictions.predicted)
        rare = truth >= 5
        recalls.append((predicted == truth)[rare].float().mean().item())
    assert recalls[1] > recalls[0] + 0.1


def test_class_weights_without_a_label_loss_are_refused(tmp_path):
    with pytest.raises(UserError, match="^--class_weights balanced applies to the label loss"):
        arguments(output_dir=tmp_path, distill_mode="distill", single_token="true", class_weights="balanced")


@pytest.mark.parametrize(
    "option",
    [{"remove_unused_columns": True}, {"do_train": False}, {"do_predict": True}, {"enable_jit_checkpoint": True}],
)
def test_trainer_flags_without_meaning_here_are_refused(tmp_path, option):
    with pytest.raises(UserError, match=f"--{next(iter(option))}"):
        arguments(output_dir=tmp_path, **option)

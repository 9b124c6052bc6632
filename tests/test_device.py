"""What a run chooses by itself to suit its device: precision, attention, memory layout, memory."""

import json
import os
import platform
import signal
import subprocess
import sys

import pytest
import torch
from building import DIGITS, FOUR_STEPS, TINY_CNN, arguments, image_processor, tiny_student
from real_command import run

from modeling_deit_ti import DeiTTiForImageClassification, device
from modeling_deit_ti.checkpoints import SETTINGS_FILE
from modeling_deit_ti.classifiers import new_timm_classifier
from modeling_deit_ti.data import load_images
from modeling_deit_ti.device import automatic_precision, is_faster_in_eager_attention
from modeling_deit_ti.parsing import fitting_flags
from modeling_deit_ti.runs import build_network, build_trainer, resume_precision
from modeling_deit_ti.teacher import Teacher


DIGITS_FLAGS = {
    "config": "recipes/digits.yaml",
    "max_train_samples": 64,
    "max_eval_samples": 64,
    "max_steps": 2,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.fixture
def cpu(monkeypatch):
    """Changes the instruction sets and the vendor that the CPU appears to have."""

    def has(*instructions: str, vendor: str = "GenuineIntel") -> None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in instructions)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512_bf16" in instructions)
        monkeypatch.setattr(device, "_is_amd", lambda: vendor == "AuthenticAMD")

    return has


@pytest.mark.parametrize(
    ("instructions", "vendor", "expected"),
    [
        ((), "GenuineIntel", "no"),
        ((), "AuthenticAMD", "no"),
        (("avx512_bf16", "amx"), "GenuineIntel", "bf16"),
        (("avx512_bf16",), "AuthenticAMD", "bf16"),
        (("avx512_bf16",), "GenuineIntel", "no"),  # slower in bfloat16 than in float32
    ],
)
def test_a_cpu_uses_bfloat16_if_its_matrix_products_are_faster_in_it(cpu, instructions, vendor, expected):
    cpu(*instructions, vendor=vendor)
    assert automatic_precision("cpu") == arguments().training.mixed_precision == expected


def test_a_limit_on_onednns_instruction_set_is_respected(cpu, monkeypatch):
    cpu("avx512_bf16", "amx")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert automatic_precision("cpu") == "no"


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_gpu_uses_bfloat16_from_compute_capability_8_and_float16_below(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert automatic_precision("cuda:0") == expected


@pytest.mark.parametrize(
    ("launcher", "flags", "expected"),
    [
        (None, {}, "bf16"),
        ("no", {}, "bf16"),  # accelerate's default
        ("bf16", {}, "bf16"),
        (None, {"bf16": False}, "no"),
        (None, {"fp16": False}, "no"),
        ("bf16", {"bf16": False}, "no"),
        (None, {"bf16": True}, "bf16"),
    ],
)
def test_flags_override_the_launcher_and_both_override_the_device(cpu, monkeypatch, launcher, flags, expected):
    cpu("avx512_bf16", "amx")
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    use_cpu = flags.get("bf16") or launcher == "bf16"
    training = arguments(**flags, use_cpu=use_cpu).training
    assert training.mixed_precision == expected
    assert training.has_automatic_precision == (not flags and launcher != "bf16")


def test_a_teacher_inherits_an_explicit_precision_and_otherwise_chooses_its_own():
    said = arguments(distill_mode="hard", bf16=False, full_determinism=True)
    assert "--bf16=False" in fitting_flags(said) and said.fitting.training.bf16 is False
    assert said.fitting.training.full_determinism
    unsaid = arguments(distill_mode="hard")
    assert not [flag for flag in fitting_flags(unsaid) if "16" in flag.partition("=")[0]]
    assert unsaid.fitting.training.has_automatic_precision


def cnn(name: str) -> torch.nn.Module:
    return new_timm_classifier(name, DIGITS, 32, image_processor(32))


def test_a_network_with_depthwise_convolutions_trains_in_float32_on_a_cpu(cpu, monkeypatch):
    cpu("avx512_bf16", "amx")
    depthwise, plain = cnn("efficientnet_lite0"), cnn("regnetx_002")  # the latter has grouped convolutions
    assert (automatic_precision("cpu", depthwise), automatic_precision("cpu", plain)) == ("no", "bf16")


def test_a_float32_teacher_stays_in_float32_beside_a_bfloat16_student():
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    teacher = Teacher(cnn(TINY_CNN), 32, [0.5] * 3, [0.5] * 3, [0.5] * 3, [0.5] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        beside = teacher(images)
    torch.testing.assert_close(beside, teacher(images), rtol=0, atol=0)


def test_a_resumed_run_keeps_and_reports_the_precision_it_started_with(tmp_path):
    """It resumes in bfloat16 although the CPU would use float32; a conflicting flag is refused."""
    flags = [*FOUR_STEPS, "--distill_mode=none", "--report_to=none", f"--output_dir={tmp_path}/run"]
    step = "modeling_deit_ti.trainer.DistillationTrainer.compute_loss"
    stopped = run(*flags, "--bf16=true", "--use_cpu", fault={"function": step, "call": 2, "signum": signal.SIGTERM})
    assert stopped.returncode == 75, stopped.stderr
    refused = run(*flags, "--bf16=false")
    assert refused.returncode == 2 and "precision bf16, not no" in refused.stderr
    resumed = run(*flags)
    assert resumed.returncode == 0, resumed.stderr
    assert "images/s in bfloat16" in resumed.stdout
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["precision"] == "bfloat16"
    assert "bfloat16" in (tmp_path / "run" / "README.md").read_text()


def test_a_cpu_does_not_adopt_the_precision_of_a_float16_checkpoint(tmp_path):
    training = arguments(output_dir=tmp_path).training
    (tmp_path / SETTINGS_FILE).write_text('{"precision": "fp16"}')
    resume_precision(training, str(tmp_path))
    assert training.mixed_precision == "no" and training.has_automatic_precision


@pytest.mark.parametrize("distill_mode", ["none", "both"])
def test_evaluation_in_bfloat16_nearly_equals_that_in_float32(cpu, tmp_path, distill_mode):
    """With the same weights, the loss is nearly the same, but not equal: the arithmetic differs."""
    losses = {}
    for instructions in ((), ("amx",)):
        cpu(*instructions)
        args = arguments(**DIGITS_FLAGS, distill_mode=distill_mode, output_dir=tmp_path / "run")
        data = load_images(args.images)
        trainer = build_trainer(args, data, tiny_student(args), image_processor(32))
        losses[trainer.args.mixed_precision] = trainer.evaluate()["eval_loss"]
    assert set(losses) == {"no", "bf16"}
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.01) and losses["bf16"] != losses["no"]


@pytest.mark.parametrize(
    ("where", "vendor", "expected"),
    [
        (("cpu", "bf16", 18), "GenuineIntel", True),
        (("cpu", "bf16", 258), "GenuineIntel", True),
        (("cpu", "bf16", 578), "GenuineIntel", False),
        (("cpu", "no", 18), "GenuineIntel", False),
        (("cpu", "no", 18), "AuthenticAMD", True),
        (("cuda", "bf16", 18), "AuthenticAMD", False),
    ],
)
def test_attention_is_eager_where_that_trains_faster(cpu, where, vendor, expected):
    cpu(vendor=vendor)
    assert is_faster_in_eager_attention(*where) == expected


def test_the_attention_implementation_used_in_training_is_not_saved(cpu, tmp_path):
    cpu("amx")
    args = arguments(**DIGITS_FLAGS, distill_mode="none", output_dir=tmp_path / "run")
    trainer = build_trainer(args, load_images(args.images), tiny_student(args), image_processor(32))
    assert trainer.model.config._attn_implementation == "eager"
    trainer.save_model()
    assert "eager" not in (tmp_path / "run" / "config.json").read_text()
    loaded = DeiTTiForImageClassification.from_pretrained(tmp_path / "run")
    assert loaded.config._attn_implementation == "sdpa"


def test_a_cnn_trains_in_channels_last_and_is_saved_as_usual(tmp_path):
    args = arguments(**DIGITS_FLAGS, distill_mode="none", model_name_or_path=TINY_CNN, output_dir=tmp_path / "run")
    trainer = build_trainer(args, load_images(args.images), cnn(TINY_CNN), image_processor(32))
    trainer.train()
    kernels = [weight for weight in trainer.model.parameters() if weight.dim() == 4 and weight.shape[-1] > 1]
    assert kernels and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    trainer.save_model()
    loaded = type(trainer.model).from_pretrained(tmp_path / "run")
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, trainer.model.state_dict()[name], rtol=0, atol=0)


def test_a_cnn_students_precision_is_settled_before_the_teacher_caches_key(cpu, tmp_path):
    cpu("amx")
    flags = DIGITS_FLAGS | {"distill_mode": "soft", "output_dir": tmp_path}
    taken = {}
    for name in ("efficientnet_lite0", TINY_CNN):
        args = arguments(**flags, model_name_or_path=name)
        build_network(args, load_images(args.images))
        taken[name] = args.training.mixed_precision
    assert taken == {"efficientnet_lite0": "no", TINY_CNN: "bf16"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
def test_freed_memory_is_reused_without_asking_the_system():
    program = """
import resource, torch
from modeling_deit_ti.device import keep_freed_memory

def faults():  # pages that the system has to provide
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
keep_freed_memory()
for _ in range(10):  # the heap grows until a block of this size fits between the small ones
    faults()
print(given_back, faults())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    given_back, kept = map(int, ended.stdout.split())
    assert given_back > 10_000 and kept < 100


def test_all_cores_are_counted_if_the_system_does_not_report_which_are_allowed(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on a Mac
    assert device.cpu_count() == os.cpu_count()

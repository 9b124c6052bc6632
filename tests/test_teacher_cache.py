"""The teacher's cache: no logits are computed twice, no result changes, and no wrong row is trusted."""

import gc
import json
import os
import shutil
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from building import NOTHING_RANDOM, TINY_CNN, arguments, file_size_limit, tiny_student, tiny_teacher
from real_command import run

from modeling_deit_ti import teacher_cache as module
from modeling_deit_ti.arguments import Arguments, ImageArguments
from modeling_deit_ti.data import load_images
from modeling_deit_ti.data.inputs import make_image_processor
from modeling_deit_ti.data.sampling import TrainSampler
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.runs import build_trainer
from modeling_deit_ti.teacher import Teacher
from modeling_deit_ti.teacher_cache import TeacherCache, make_teacher_cache
from modeling_deit_ti.trainer import DistillationTrainer


UNMIXED = {"mixup": 0, "cutmix": 0, "repeated_augmentation": 1}
TIMINGS = ("train_seconds", "train_runtime", "train_samples_per", "train_steps_per")


@pytest.fixture(scope="module")
def digits():
    return load_images(ImageArguments("digits", max_train_samples=64, max_eval_samples=50))


@pytest.fixture(autouse=True)
def log(caplog):
    PartialState()  # accelerate's logger asks it which process this is
    caplog.set_level("INFO", "modeling_deit_ti")
    return caplog


def run_arguments(folder: Path, **flags) -> Arguments:
    """Two epochs of four steps with DeiT's augmentation, unless a flag says otherwise."""
    defaults = {
        "output_dir": folder / "run",
        "distill_mode": "both",
        "image_size": 32,
        "drop_path_rate": 0,
        "per_device_train_batch_size": 16,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "teacher_model_name_or_path": TINY_CNN,
        "teacher_output_dir": folder,
    }
    return arguments(**{**defaults, **flags})


def make_cache(data, folder, teacher=None, **flags) -> TeacherCache | None:
    args = run_arguments(folder, **flags)
    image_processor = make_image_processor(args.model, args.augmentation)
    return make_teacher_cache(args, teacher or tiny_teacher(), data, image_processor)


class CountingTeacher(Teacher):
    """A teacher with `calls`, the sizes of the batches that its network has seen."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def forward(self, pixel_values):
        self.calls.append(len(pixel_values))
        return super().forward(pixel_values)


def make_trainer(data, folder, **flags) -> DistillationTrainer:
    args = run_arguments(folder, **flags)
    teacher, processor = tiny_teacher(CountingTeacher), make_image_processor(args.model, args.augmentation)
    cache = make_teacher_cache(args, teacher, data, processor)
    return build_trainer(args, data, tiny_student(args, num_hidden_layers=1), processor, teacher, cache)


def result(trainer: DistillationTrainer) -> tuple[dict[str, torch.Tensor], list[dict]]:
    log = [
        {name: value for name, value in entry.items() if not name.startswith(TIMINGS)}
        for entry in trainer.state.log_history
    ]
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}, log


def assert_same(first: tuple, second: tuple) -> None:
    for name, value in first[0].items():
        torch.testing.assert_close(value, second[0][name], atol=0, rtol=0, msg=name)
    assert first[1] == second[1]


# ---- No logits are computed twice ----


def test_with_nothing_random_every_image_is_computed_once_for_all_epochs_and_runs(digits, tmp_path):
    first = make_trainer(digits, tmp_path, **NOTHING_RANDOM, num_train_epochs=3)
    first.train()
    assert first.teacher.calls == [16] * 4  # the first epoch's four steps
    assert first.teacher_cache.share_read == pytest.approx(2 / 3)
    other = {"seed": 7, "distill_mode": "soft", "num_train_epochs": 1, "per_device_train_batch_size": 32}
    second = make_trainer(digits, tmp_path, **NOTHING_RANDOM, **other)
    second.train()
    assert second.teacher.calls == [] and second.teacher_cache.share_read == 1
    assert any("teacher_agreement" in entry for entry in second.state.log_history)


@pytest.mark.parametrize(
    "flags",
    [
        NOTHING_RANDOM,
        UNMIXED,
        {"augment_on": "loader"},
        {"augment_on": "device", "cutmix": 0, "repeated_augmentation": 1, "gradient_accumulation_steps": 2},
    ],
    ids=["static", "augmented", "the paper's recipe, in the loader", "on the device"],
)
def test_a_run_from_the_cache_equals_the_run_that_filled_it(digits, tmp_path, flags):
    runs = [make_trainer(digits, tmp_path, **flags) for _ in range(2)]
    for trainer in runs:
        trainer.train()
    assert len(runs[0].teacher.calls) == (4 if flags is NOTHING_RANDOM else 8) and runs[1].teacher.calls == []
    assert_same(*map(result, runs))
    soft = make_trainer(digits, tmp_path, **{**flags, "distill_mode": "soft", "learning_rate": 1e-4})
    soft.train()
    assert soft.teacher.calls == []


def test_logits_are_the_teachers_rounded_and_identical_whether_read_or_computed(digits, tmp_path):
    cache, again = (make_cache(digits, tmp_path, **NOTHING_RANDOM) for _ in range(2))
    teacher, sampler = tiny_teacher(), TrainSampler(64, 16, seed=42)
    images, seeds = torch.randn(16, 3, 32, 32), np.array([seed for _, seed in sampler][:16])
    computed = cache(teacher, images, seeds, sampler)
    assert computed.dtype == torch.float32
    assert torch.equal(computed, teacher(images).half().float())
    read = again(None, images, seeds, sampler)
    assert torch.equal(read, computed) and torch.equal(read.argmax(-1), computed.argmax(-1))


def test_a_longer_run_reads_the_epochs_of_a_shorter_one(digits, tmp_path):
    make_trainer(digits, tmp_path, num_train_epochs=1).train()
    longer = make_trainer(digits, tmp_path, num_train_epochs=2)
    longer.train()
    assert len(longer.teacher.calls) == 4 and longer.teacher_cache.share_read == 0.5


@pytest.mark.parametrize("flags", [NOTHING_RANDOM, {"repeated_augmentation": 1}], ids=["static", "augmented"])
def test_a_run_resumed_mid_epoch_ends_like_an_uninterrupted_one(digits, tmp_path, flags):
    flags = {**flags, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 100}
    whole = make_trainer(digits, tmp_path / "whole", **flags)
    whole.train()
    stopped = make_trainer(digits, tmp_path / "stopped", **flags)

    def stop(teacher, args, output):
        if len(teacher.calls) == 4:
            raise InterruptedError

    stopped.teacher.register_forward_hook(stop)
    with pytest.raises(InterruptedError):
        stopped.train()
    resumed = make_trainer(digits, tmp_path / "stopped", **flags)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "run" / "checkpoint-2"))
    # The third step had been stored; the fourth had not, nor had the second epoch.
    assert len(resumed.teacher.calls) == (5 if whole.teacher_cache.mixes else 1)
    assert_same(result(whole), result(resumed))


# ---- No wrong row is trusted ----


class Epoch:
    """Four batches of eight images, a made-up teacher's answers to them, and caches in one folder."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, 0
        self.sampler = TrainSampler(32, 8, seed=1)
        keys = list(self.sampler)
        self.images = torch.randn(32, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        self.batches = [keys[start : start + 8] for start in range(0, 32, 8)]

    def teacher(self, pixel_values):
        self.calls += 1
        return pixel_values.flatten(1)[:, :10] * 3

    def cache(self, key="a", is_static=False, mixes=True) -> TeacherCache:
        return TeacherCache(self.folder, {"key": key}, 10, is_static, mixes)

    def read(self, cache: TeacherCache, batches=None) -> None:
        """Reads all batches and checks their logits."""
        self.calls = 0
        for keys in batches or self.batches:
            images = self.images[[index for index, _ in keys]]
            logits = cache(self.teacher, images, np.array([seed for _, seed in keys]), self.sampler)
            assert torch.equal(logits, (images.flatten(1)[:, :10] * 3).half().float())


@pytest.fixture
def epoch(tmp_path) -> Epoch:
    return Epoch(tmp_path / "logits")


@pytest.mark.parametrize("is_static", [True, False])
@pytest.mark.parametrize("offset", [0, 4, 11, 12, 31], ids=["checksum", "tag", "tag's end", "logits", "logits' end"])
def test_a_flipped_byte_costs_its_row_and_is_repaired(epoch, is_static, offset):
    epoch.read(epoch.cache(is_static=is_static))
    (file,) = epoch.folder.glob("*.bin")
    content = bytearray(file.read_bytes())
    assert len(content) == 32 * 32  # 4 + 8 + 2 x 10 bytes a row
    content[5 * 32 + offset] ^= 0x10
    file.write_bytes(content)
    epoch.read(epoch.cache(is_static=is_static))
    assert epoch.calls == 1
    epoch.read(epoch.cache(is_static=is_static))
    assert epoch.calls == 0


@pytest.mark.parametrize("kept", [0, 1, 8 * 32, 9 * 32 + 17, 32 * 32 - 1])
def test_complete_rows_of_a_truncated_file_are_used(epoch, kept):
    epoch.read(epoch.cache())
    (file,) = epoch.folder.glob("*.bin")
    os.truncate(file, kept)
    epoch.read(epoch.cache())
    assert epoch.calls == 4 - kept // (8 * 32)


@pytest.mark.parametrize("garbage", [b"\0", b"\xff", bytes(range(256))])
def test_a_file_of_garbage_is_not_used(epoch, garbage):
    epoch.folder.mkdir()
    (epoch.folder / "epoch-0000.bin").write_bytes(garbage * 5000)
    epoch.read(epoch.cache())
    assert epoch.calls == 4


def test_rows_from_another_key_seed_epoch_or_batch_are_not_used(epoch):
    epoch.read(epoch.cache())
    epoch.read(epoch.cache(key="another"))
    assert epoch.calls == 4
    epoch.read(epoch.cache())  # overwritten by those of the other key
    assert epoch.calls == 4
    halves = [batch[start : start + 4] for batch in epoch.batches for start in (0, 4)]
    epoch.read(epoch.cache(), halves)  # each image keeps its partner
    assert epoch.calls == 0
    epoch.read(epoch.cache(), [batch[::-1] for batch in halves])
    assert epoch.calls == 0
    epoch.read(epoch.cache(), [batch[1:] + batch[:1] for batch in epoch.batches])  # another partner, another image
    assert epoch.calls == 4
    (epoch.folder / "epoch-0000.bin").rename(epoch.folder / "epoch-0001.bin")
    epoch.sampler.set_epoch(1)
    keys = list(epoch.sampler)
    epoch.read(epoch.cache(), [keys[start : start + 8] for start in range(0, 32, 8)])
    assert epoch.calls == 4


def test_a_row_with_the_same_seed_but_another_image_is_not_used(epoch):
    cache = epoch.cache(mixes=False)
    epoch.read(cache)
    shifted = [(31 - index, seed) for index, seed in epoch.sampler]
    epoch.sampler = type("Sampler", (), {"epoch": 0, "num_samples": 32, "__iter__": lambda self: iter(shifted)})()
    epoch.read(epoch.cache(mixes=False), [shifted[:8]])
    assert epoch.calls == 1


def test_a_batch_from_another_epoch_turns_the_cache_off(epoch, log):
    cache = epoch.cache()
    epoch.read(cache)
    later = TrainSampler(32, 8, seed=1)
    later.set_epoch(1)
    epoch.read(cache, [list(later)[:8]])
    assert epoch.calls == 1 and "seeds that are not from its epoch" in log.text


def test_two_processes_each_fill_their_own_rows_of_one_file(epoch):
    parts = [[batch[start : start + 4] for batch in epoch.batches] for start in (0, 4)]
    first, second = epoch.cache(), epoch.cache()
    for step in range(4):
        epoch.read(first, parts[0][step : step + 1])
        epoch.read(second, parts[1][step : step + 1])
        assert epoch.calls == 1
    for part in parts:
        epoch.read(epoch.cache(), part)
        assert epoch.calls == 0


def test_no_file_is_left_open(epoch, recwarn):
    warnings.simplefilter("always", ResourceWarning)
    for _ in range(2):
        epoch.read(epoch.cache())
    gc.collect()
    assert not recwarn.list


def test_rows_left_by_a_killed_process_are_correct_or_not_used(epoch):
    child = os.fork()
    if child == 0:
        while True:  # over and over, so that the kill comes in the middle of something
            (epoch.folder / "epoch-0000.bin").unlink(missing_ok=True)
            epoch.read(epoch.cache())
    while not list(epoch.folder.glob("*.bin")):
        time.sleep(0.001)
    time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    epoch.read(epoch.cache())  # compares every logit
    epoch.read(epoch.cache())
    assert epoch.calls == 0


# ---- Logits that cannot be stored ----


@pytest.mark.parametrize("value", [7e4, float("inf"), float("nan")])
def test_logits_beyond_half_precision_are_used_as_they_are_and_not_stored(epoch, value):
    def teacher(pixel_values):
        return torch.full((8, 10), 1 / 3).index_fill(1, torch.tensor([2]), value)

    seeds = np.array([seed for _, seed in epoch.batches[0]])
    for _ in range(2):
        logits = epoch.cache()(teacher, epoch.images[:8], seeds, epoch.sampler)
        torch.testing.assert_close(logits, teacher(None), atol=0, rtol=0, equal_nan=True)
    assert not any((epoch.folder / "epoch-0000.bin").read_bytes())


@pytest.mark.parametrize("rows", [0, 10, 20])
def test_on_a_full_disk_the_run_continues_and_reports_it(epoch, log, rows):
    """The file cannot be created, or cannot be filled."""
    cache = epoch.cache()
    if rows:
        epoch.folder.mkdir()
        (epoch.folder / "epoch-0000.bin").write_bytes(bytes(32 * 32))
    with file_size_limit(rows * 32 + 3):
        epoch.read(cache)
        calls = epoch.calls
        epoch.read(cache)  # off, and rounded as before
    assert calls == epoch.calls == 4
    (message,) = log.messages
    assert f"cannot store its logits in {epoch.folder}" in message
    epoch.read(epoch.cache())  # there is room again, and complete rows are used
    assert epoch.calls == 4 - rows // 8


def test_a_folder_that_cannot_be_created_turns_the_cache_off(epoch, log):
    epoch.folder.write_text("a file")
    epoch.read(epoch.cache())
    assert epoch.calls == 4 and "cannot store its logits in" in log.text


# ---- Keys and limits ----


def changed_weights() -> Teacher:
    teacher = tiny_teacher()
    next(teacher.model.parameters()).data.view(-1)[0] += 1e-3
    return teacher


STATIC_CHANGES = {
    "weights": {"teacher": changed_weights},
    "teacher's input size": {"teacher": lambda: tiny_teacher(image_size=64)},
    "teacher's normalisation": {"teacher": lambda: tiny_teacher(image_mean=[0.5, 0.5, 0.5])},
    "label order": {"teacher": lambda: tiny_teacher(label_order=[1, 0, *range(2, 10)])},
    "image size": {"image_size": 48},
    "precision": {"bf16": True, "use_cpu": True},
    "where images are prepared": {"augment_on": "device"},
    "compilation": {"torch_compile": True},
    "compilation mode": {"torch_compile_mode": "max-autotune"},
    "compilation backend": {"torch_compile_backend": "aot_eager"},
}
REPLAY_CHANGES = {
    "crop": {"crop": "none"},
    "flip": {"horizontal_flip": 0.4},
    "policy": {"auto_augment": "rand-m8-mstd0.5-inc1"},
    "erasing": {"random_erasing": 0.1},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 0.5},
    "repeats": {"repeated_augmentation": 2},
    "seed": {"seed": 3},
    "data seed": {"data_seed": 3},
    "batch size": {"per_device_train_batch_size": 8},
}


@pytest.mark.parametrize(
    ("base", "change"),
    [(NOTHING_RANDOM, change) for change in STATIC_CHANGES.values()]
    + [({}, change) for change in (STATIC_CHANGES | REPLAY_CHANGES).values()],
    ids=[*STATIC_CHANGES, *(f"augmented, {name}" for name in STATIC_CHANGES | REPLAY_CHANGES)],
)
def test_anything_that_changes_the_logits_changes_the_key(digits, tmp_path, base, change):
    changed = {**base, **change}
    teacher = changed.pop("teacher", tiny_teacher)()
    folder = make_cache(digits, tmp_path, **base).folder
    assert make_cache(digits, tmp_path, teacher, **changed).folder != folder


def test_other_images_and_library_versions_change_the_key(digits, tmp_path, monkeypatch):
    folders = {make_cache(digits, tmp_path).folder, make_cache(replace(digits, fingerprint="f"), tmp_path).folder}
    for library in module.LIBRARIES:
        with monkeypatch.context() as patch:
            real = module.importlib.metadata.version
            patch.setattr(
                module.importlib.metadata,
                "version",
                lambda name, library=library, real=real: "0" if name == library else real(name),
            )
            folders.add(make_cache(digits, tmp_path).folder)
    assert len(folders) == 2 + len(module.LIBRARIES)


def test_only_code_that_computes_pixels_or_logits_changes_the_key(digits, tmp_path, monkeypatch):
    package = tmp_path / "package"
    shutil.copytree(Path(module.__file__).parent, package)
    monkeypatch.setattr(module, "__file__", str(package / "teacher_cache.py"))
    folder = make_cache(digits, tmp_path).folder
    makes_pixels_or_logits = {
        *("data/augmentation.py", "data/decoding.py", "data/inputs.py", "data/randomness.py", "data/sampling.py"),
        *("teacher.py", "modeling_deit_ti.py", "configuration_deit_ti.py"),
    }
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".md")):
        code = path.read_text()
        path.write_text(code + "\n# another line\n")
        name = path.relative_to(package).as_posix()
        assert (make_cache(digits, tmp_path).folder != folder) == (name in makes_pixels_or_logits), name
        path.write_text(code)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (
            NOTHING_RANDOM,
            {"seed": 3, "per_device_train_batch_size": 8, "num_train_epochs": 9, "distill_mode": "soft"},
        ),
        (
            {},
            {
                "num_train_epochs": 9,
                "distill_mode": "distill",
                "single_token": True,
                "learning_rate": 1,
                "bf16": False,
            },
        ),
    ],
    ids=["static", "augmented"],
)
def test_settings_that_do_not_change_the_logits_do_not_change_the_key(digits, tmp_path, base, changes):
    folder = make_cache(digits, tmp_path, **base).folder
    assert make_cache(digits, tmp_path, **{**base, **changes}).folder == folder
    make_trainer(digits, tmp_path, **base, max_steps=1).train()
    assert json.loads((folder / "recipe.json").read_text())["images"] == digits.fingerprint


@pytest.mark.parametrize(
    ("flags", "is_static"),
    [
        ({}, True),
        ({"augment_on": "device"}, True),
        ({"crop": "auto"}, False),
        ({"horizontal_flip": 0.5}, False),
        ({"auto_augment": "rand-m1"}, False),
        ({"random_erasing": 0.1}, False),
        ({"mixup": 0.1}, False),
        ({"cutmix": 0.1}, False),
        ({"repeated_augmentation": 2}, False),
    ],
)
def test_logits_are_shared_by_all_epochs_only_if_nothing_is_random(digits, tmp_path, flags, is_static):
    assert make_cache(digits, tmp_path, **{**NOTHING_RANDOM, **flags}).is_static == is_static


def test_auto_stores_nothing_above_its_limit_but_on_stores_anyway(digits, tmp_path, monkeypatch, log):
    monkeypatch.setattr(module, "MAX_AUTO_BYTES", 2 * 64 * 32)
    assert make_cache(digits, tmp_path) is not None  # two epochs of 64 rows of 32 bytes
    log.clear()
    assert make_cache(digits, tmp_path, num_train_epochs=2.5) is None
    assert "--teacher_cache on" in log.text
    assert make_cache(digits, tmp_path, max_steps=9) is None
    assert make_cache(digits, tmp_path, **NOTHING_RANDOM, num_train_epochs=100) is not None  # always one file
    assert make_cache(digits, tmp_path, num_train_epochs=3, teacher_cache="on") is not None


def test_off_and_streaming_mean_no_cache(digits, tmp_path, log):
    assert make_cache(digits, tmp_path, teacher_cache="off") is None
    stream = replace(digits, train=digits.train.to_iterable_dataset())
    assert make_cache(stream, tmp_path) is None
    assert log.messages == []
    with pytest.raises(UserError, match="--teacher_cache on"):
        make_cache(stream, tmp_path, teacher_cache="on")


# ---- The command ----


def test_the_second_run_of_the_command_reads_the_logits_that_the_first_stored(tmp_path):
    flags = [
        "--config=recipes/digits.yaml",
        "--max_train_samples=128",
        "--max_eval_samples=100",
        "--num_train_epochs=1",
        "--teacher_num_train_epochs=12",
        "--teacher_learning_rate=2e-2",
        "--disable_tqdm=true",
        "--save_strategy=no",
        "--mixup=0.2",
        f"--teacher_output_dir={tmp_path / 'teachers'}",
    ]
    shares, outputs = [], []
    for name, more in {"first": [], "second": ["--distill_mode=soft"]}.items():
        outputs.append(run(*flags, f"--output_dir={tmp_path / name}", *more).stdout)
        shares.append(json.loads((tmp_path / name / "all_results.json").read_text())["teacher_cached"])
    assert shares == [0, 1]
    folder = str(tmp_path / "teachers" / "logits" / "test_resnet-digits-")
    assert f"storing its logits for later runs in {folder}" in outputs[0]
    assert f"reading its logits from {folder}" in outputs[1] and "(epochs: 1)" in outputs[1]
    assert "100% of the teacher's logits read from its cache" in outputs[1]

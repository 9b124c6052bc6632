"""Recipes with `stages`: each is a run from the model of the stage before it, and all resume as one."""

import json
import re
import signal

import pytest
import yaml
from building import FOUR_STEPS
from real_command import run
from safetensors.torch import load_file

from modeling_deit_ti.card import RunRecord
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.parsing import parse_arguments, parse_stages


STAGES = [
    {"patch_size": 16, "learning_rate": 1e-3, "patch_drop_rate": 0.5, "lr_scheduler_type": "constant_with_warmup"},
    {"patch_size": 8, "learning_rate": 5e-4},
]


def write_recipe(folder, stages, **flags) -> str:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"image_size": 32, "position_init": "normal", "stages": stages, **flags}))
    return f"--config={file}"


def test_each_stage_starts_from_the_one_before_it(tmp_path):
    config = write_recipe(tmp_path, [*STAGES, {"patch_size": 4}], export=["timm"])
    flags = ["--warmup_steps=5", "--temperature_scaling"]
    first, second, last = stages = parse_stages([config, f"--output_dir={tmp_path}", *flags])
    assert [stage.training.output_dir for stage in stages] == [
        str(tmp_path / "stage-1"), str(tmp_path / "stage-2"), str(tmp_path)
    ]  # fmt: skip
    assert [stage.model.model_name_or_path for stage in stages] == [
        "deit_ti", str(tmp_path / "stage-1"), str(tmp_path / "stage-2")
    ]  # fmt: skip
    assert [stage.model.patch_size for stage in stages] == [16, 8, 4]
    assert [stage.training.learning_rate for stage in stages] == [1e-3, 5e-4, 5e-4]
    assert {stage.training.warmup_steps for stage in stages} == {5}
    assert [stage.model.export for stage in stages] == [[], [], ["timm"]]
    assert [stage.training.temperature_scaling for stage in stages] == [False, False, True]
    names = [f"{tmp_path.name}-stage-1", f"{tmp_path.name}-stage-2", None]
    assert [stage.training.run_name for stage in stages] == names
    assert last.earlier_stages == (first.training.output_dir, second.training.output_dir)
    assert parse_arguments([config, f"--output_dir={tmp_path}"]).model.patch_size == 4


def test_a_recipe_without_stages_is_one_run():
    (only,) = parse_stages(["--config=recipes/digits.yaml"])
    assert only.earlier_stages == () and only.model.model_name_or_path == "deit_ti"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages must be a list"),
        ("patch_size: 8", "stages must be a list"),
        ([{"patchsize": 8}], "unknown key 'patchsize'; did you mean --patch_size"),
        ([{"dataset_name": "digits"}, {}], "dataset_name must be the same for all stages"),
        ([{"patch_size": 7}, {}], "--patch_size 7 does not divide"),
    ],
)
def test_invalid_stages_are_a_user_error(tmp_path, stages, message):
    with pytest.raises(UserError, match=message):
        parse_stages([write_recipe(tmp_path, stages)])


def test_stages_find_their_own_checkpoint(tmp_path):
    config = write_recipe(tmp_path, STAGES)
    assert parse_stages([config, "--resume_from_checkpoint=True"])[1].training.resume_from_checkpoint == "auto"
    with pytest.raises(UserError, match="--resume_from_checkpoint a/folder: a recipe with stages finds its own"):
        parse_stages([config, "--resume_from_checkpoint=a/folder"])


def test_access_to_the_hub_is_checked_before_the_first_stage(tmp_path):
    flags = [*FOUR_STEPS[1:], "--dataset_name=digits", "--distill_mode=none", write_recipe(tmp_path, STAGES)]
    ended = run(*flags, f"--output_dir={tmp_path / 'run'}", "--push_to_hub")
    assert ended.returncode == 2 and "--push_to_hub: cannot write to the repository" in ended.stderr
    assert not ended.stdout


def test_a_run_killed_in_its_second_stage_resumes_there_and_ends_the_same(tmp_path):
    flags = [*FOUR_STEPS[1:], "--dataset_name=digits", "--distill_mode=none", write_recipe(tmp_path, STAGES)]
    fault = {"function": "modeling_deit_ti.trainer.DistillationTrainer.compute_loss", "call": 6}
    ended = run(*flags, f"--output_dir={tmp_path / 'whole'}")
    assert ended.returncode == 0, ended.stderr
    times = re.findall(r"^Trained in .+? s(.*), \d+ images/s in ", ended.stdout, re.MULTILINE)
    assert times == ["", " for all stages together"]
    ended = run(*flags, f"--output_dir={tmp_path / 'killed'}", fault=fault)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    finished = tmp_path / "killed" / "stage-1" / "all_results.json"
    before = finished.stat().st_mtime_ns
    ended = run(*flags, f"--output_dir={tmp_path / 'killed'}", "--learning_rate=1")
    assert ended.returncode == 2 and "stage-1 belongs to another run, with learning_rate 0.001" in ended.stderr
    ended = run(*flags, f"--output_dir={tmp_path / 'killed'}")
    assert ended.returncode == 0, ended.stderr
    assert "Student: finished by an earlier run" in ended.stdout
    ended = run(*flags, f"--output_dir={tmp_path / 'killed'}")
    assert ended.returncode == 2 and "already holds a finished run" in ended.stderr
    assert not ended.stdout  # before any stage
    assert finished.stat().st_mtime_ns == before
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    weights = [load_file(folder / "model.safetensors") for folder in (whole / "stage-1", whole)]
    shapes = [state["deit_ti.embeddings.patch_projection.weight"].shape for state in weights]
    assert [tuple(shape) for shape in shapes] == [(192, 3, 16, 16), (192, 3, 8, 8)]
    record = RunRecord.load(whole)
    assert record.base_model is None
    first = json.loads((whole / "stage-1" / "all_results.json").read_text())
    assert [(stage["patch_size"], stage["top1"]) for stage in record.earlier_stages] == [(16, first["eval_accuracy"])]
    card = (whole / "README.md").read_text()
    assert "| 1 | 32x32 | 16x16 | 50 % | 1 | 0.001 | constant_with_warmup |" in card
    assert "| 2 | 32x32 | 8x8 | 0 % | 1 | 0.0005 | cosine |" in card
    assert "| Initial weights | random |" in card
    assert "| position_init | `normal` |" in card
    assert " for all stages together (" in card
    last = json.loads((whole / "all_results.json").read_text())
    assert record.seconds == first["train_runtime"] + last["train_runtime"]
    assert (record.epochs, record.images_seen) == (2, 2 * 128)

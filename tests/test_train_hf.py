"""The command, as a user runs it: what it leaves, what it says, and how it ends when the user is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

import train_hf
from modeling_deit_ti.data import UserError


REPOSITORY = Path(train_hf.__file__).parent
# A student of two blocks is not among the flags, so the real one runs, for a few steps.
QUICK = [
    "--config=recipes/digits.yaml",
    "--max_train_samples=128",
    "--max_eval_samples=100",
    "--num_train_epochs=1",
    "--per_device_train_batch_size=32",
    "--teacher_model_name_or_path=test_resnet",
    "--teacher_num_train_epochs=12",
    "--teacher_learning_rate=2e-2",
    "--disable_tqdm=true",
]


def run(*flags: str, launcher: tuple[str, ...] = (sys.executable,), **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*launcher, "train_hf.py", *flags],
        cwd=REPOSITORY,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def in_process(monkeypatch, *flags: str) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["train_hf.py", *flags])
    train_hf.main()


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> str:
    return f"--teacher_output_dir={tmp_path_factory.mktemp('teachers')}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teachers) -> tuple[Path, subprocess.CompletedProcess]:
    """A run in mode distill, by `accelerate launch` and the CPU config, as the README has it."""
    folder = tmp_path_factory.mktemp("runs") / "distill"
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--config_file=accelerate_configs/cpu.yaml")
    result = run(*QUICK, teachers, "--distill_mode=distill", f"--output_dir={folder}", launcher=launcher)
    assert result.returncode == 0, result.stderr
    return folder, result


# ---- What a run leaves ----


def test_a_run_leaves_the_files_that_the_design_names(finished):
    folder, _ = finished
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert names >= {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "configuration_deit_ti.py",
        "modeling_deit_ti.py",
        "README.md",
        "all_results.json",
        "train_results.json",
        "eval_results.json",
        "trainer_state.json",
        "training_args.bin",
        "training_curves.png",
        "transformers/model.safetensors",
        "transformers/config.json",
        "checkpoint-4/optimizer.pt",
    }
    assert Image.open(folder / "training_curves.png").size == (1650, 660)


def test_results_hold_every_accuracy_as_a_fraction(finished):
    folder, _ = finished
    results = json.loads((folder / "all_results.json").read_text())
    for readout in ("", "_class", "_distillation", "_both"):
        for ending in ("", "_top5"):
            assert 0 <= results[f"eval_accuracy{readout}{ending}"] <= 1
    assert results["eval_accuracy"] == results["eval_accuracy_distillation"]
    assert results["teacher_accuracy"] > 0.5 and Path(results["teacher_path"], "model.safetensors").is_file()
    assert results["train_runtime"] > 0 and results["train_samples_per_second"] > 0 and results["train_loss"] > 0
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert any({"loss", "label_loss", "distillation_loss", "teacher_agreement"} <= set(entry) for entry in log)


def test_a_run_tells_the_person_what_came_out(finished):
    folder, result = finished
    results = json.loads((folder / "all_results.json").read_text())
    for line in (
        "Teacher: test_resnet, fitting for 12 epochs",
        f"{results['teacher_accuracy']:.2%}",
        f"{results['eval_accuracy']:.2%}",
    ):
        assert line in result.stdout
    assert f'pipeline("image-classification", "{folder}", trust_remote_code=True)' in result.stdout
    for unwanted in ("Traceback", "Warning", "warning"):
        assert unwanted not in result.stderr + result.stdout, result.stderr


def test_the_saved_model_predicts_with_the_head_of_its_mode(finished):
    folder, _ = finished
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    image = Image.open(folder / "example.png")
    with torch.no_grad():
        output = model(**processor(image, return_tensors="pt"))
    assert torch.equal(output.logits, output.distillation_logits)
    assert not torch.equal(output.logits, output.class_logits)
    best = pipeline("image-classification", str(folder), trust_remote_code=True)(image)[0]
    assert best["label"] == model.config.id2label[output.logits.argmax().item()]
    assert best["score"] == pytest.approx(output.logits.softmax(-1).max().item(), rel=1e-4)


def test_the_reported_accuracy_is_that_of_the_saved_model(finished):
    from modeling_deit_ti.data import DataArguments, EvalImages, load_images

    folder, _ = finished
    data = load_images(DataArguments(dataset_name="digits", max_train_samples=128, max_eval_samples=100))
    images = EvalImages(data.evaluation, AutoImageProcessor.from_pretrained(folder)).__getitems__(list(range(100)))
    model = AutoModelForImageClassification.from_pretrained(folder, subfolder="transformers").eval()
    with torch.no_grad():
        predicted = model(images["pixel_values"]).logits.argmax(-1)
    accuracy = (predicted == images["labels"]).float().mean().item()
    assert accuracy == pytest.approx(json.loads((folder / "all_results.json").read_text())["eval_accuracy"])


def test_the_same_command_with_one_seed_gives_the_same_numbers(finished, teachers, tmp_path):
    folder, _ = finished
    result = run(*QUICK, teachers, "--distill_mode=distill", f"--output_dir={tmp_path / 'again'}", "--use_cpu")
    assert result.returncode == 0, result.stderr
    assert "fitted by an earlier run" in result.stdout
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    numbers = [json.loads((path / "all_results.json").read_text()) for path in (folder, tmp_path / "again")]
    timings = {name for name in numbers[0] if "runtime" in name or "per_second" in name or "seconds" in name}
    assert {k: v for k, v in numbers[0].items() if k not in timings} == {
        k: v for k, v in numbers[1].items() if k not in timings
    }


def test_the_cnn_baseline_goes_through_the_same_code(monkeypatch, tmp_path):
    flags = [*QUICK, "--distill_mode=none", "--model_name_or_path=test_resnet", f"--output_dir={tmp_path / 'cnn'}"]
    in_process(monkeypatch, *flags, "--num_train_epochs=8", "--learning_rate=2e-2")
    results = json.loads((tmp_path / "cnn" / "all_results.json").read_text())
    assert results["eval_accuracy"] > 0.5 and "teacher_accuracy" not in results
    classify = pipeline("image-classification", str(tmp_path / "cnn"))
    assert len(classify(Image.open(tmp_path / "cnn" / "example.png"), top_k=10)) == 10


def test_training_goes_on_from_a_finished_model(finished, teachers, monkeypatch, tmp_path, capsys):
    folder, _ = finished
    flags = [*QUICK, teachers, "--distill_mode=both", f"--output_dir={tmp_path / 'more'}"]
    in_process(monkeypatch, *flags, f"--model_name_or_path={folder}", "--learning_rate=1e-12")
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "more"))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    config = json.loads((tmp_path / "more" / "config.json").read_text())
    assert (config["distill_mode"], config["readout"]) == ("both", "both")


# ---- Flags and recipes ----


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as ending:
        train_hf.parse_arguments(["--help"])
    assert ending.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--distill_mode", "--teacher_model_name_or_path", "--dataset_name", "--num_train_epochs"):
        assert f"{flag} " in shown


def test_a_recipe_sets_flags_and_the_command_line_wins(tmp_path):
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1e-3\nimage_size: 64\nuse_cpu: true\nmixup: 0\n")
    model, data, _, training = train_hf.parse_arguments([f"--config={tmp_path / 'recipe.yaml'}", "--image_size", "32"])
    assert (model.image_size, training.learning_rate, training.mixup, training.use_cpu) == (32, 1e-3, 0.0, True)
    assert training.output_dir == "outputs/deit_ti-cifar10-none"


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(recipe):
    train_hf.parse_arguments(["--config", str(recipe)])
    assert "distill_mode" in yaml.safe_load(recipe.read_text())


def test_nothing_given_is_the_papers_recipe_on_cifar10():
    model, data, teacher, training = train_hf.parse_arguments([])
    assert (model.model_name_or_path, model.image_size, model.patch_size) == ("deit_ti", 224, 16)
    assert (data.dataset_name, teacher.teacher_model_name_or_path) == ("uoft-cs/cifar10", "regnetx_004")
    assert (
        data.auto_augment,
        data.random_erasing,
        training.mixup,
        training.cutmix,
        training.repeated_augmentation,
    ) == (
        "rand-m9-mstd0.5-inc1",
        0.25,
        0.8,
        1.0,
        3,
    )
    assert (training.num_train_epochs, training.weight_decay, training.label_smoothing_factor) == (20, 0.05, 0.1)


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distil_mode=hard"], "unknown flag --distil_mode=hard; did you mean --distill_mode?"),
        (["--distill_mode=medium"], "invalid choice: 'medium' (choose from 'none', 'soft'"),
        (["--learning_rate=fast"], "--learning-rate: invalid float value: 'fast'"),
        (["--distill_mode=none", "--distillation_alpha=0.5"], "distillation_alpha has no meaning in mode none"),
        (["--image_size=30", "--patch_size=8"], "--patch_size 8 does not divide --image_size 30"),
        (["--fp16"], "fp16 is asked for"),
        (["--config=nowhere.yaml"], "--config nowhere.yaml: the file cannot be read"),
        (["--distill_mode=both", "--model_name_or_path=resnet18"], "has one head"),
        (["--warmup_steps=-1"], "warmup_steps"),
        (["--dataset_name=./nowhere"], "--dataset_name ./nowhere: there is no such folder"),
        (["--dataset_name=digits", "--label_column_name=kind"], "no such column; there are image, label"),
        (
            ["--dataset_name=digits", "--resume_from_checkpoint=nowhere"],
            "--resume_from_checkpoint nowhere: there is no",
        ),
        (["--dataset_name=digits", "--auto_augment=rnd-m9"], "--auto_augment rnd-m9: timm does not know this policy"),
        (["--dataset_name=digits", "--model_name_or_path=nowhere"], "--model_name_or_path nowhere"),
        (["--dataset_name=digits", "--push_to_hub"], "--push_to_hub: cannot write to the repository"),
    ],
)
def test_a_mistake_ends_the_run_before_it_starts(monkeypatch, tmp_path, flags, message):
    with pytest.raises(UserError) as error:
        in_process(monkeypatch, f"--output_dir={tmp_path / 'run'}", *flags)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("learning_rat: 1e-3", "unknown key 'learning_rat'; did you mean --learning_rate?"),
        ("learning_rate: fast", "invalid float value: 'fast'"),
        ("- a list", "it has to hold `flag: value` lines"),
        ("a: b: c", "cannot be read as YAML"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(tmp_path, recipe, message):
    (tmp_path / "recipe.yaml").write_text(recipe)
    with pytest.raises(UserError) as error:
        train_hf.parse_arguments([f"--config={tmp_path / 'recipe.yaml'}"])
    assert message in str(error.value)


def test_a_bare_no_in_a_recipe_is_a_word(tmp_path):
    (tmp_path / "recipe.yaml").write_text("save_strategy: no\n")
    *_, training = train_hf.parse_arguments([f"--config={tmp_path / 'recipe.yaml'}"])
    assert training.save_strategy == "no"


def test_only_complete_checkpoints_are_resumed_from(finished, tmp_path):
    whole = finished[0] / "checkpoint-4"
    for step in (4, 8, 12, 16):
        shutil.copytree(whole, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-8" / "optimizer.pt").unlink()
    weights = tmp_path / "checkpoint-12" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "checkpoint-16" / "trainer_state.json").write_text('{"epoch": 1.')

    def resume(value: str):
        *_, training = train_hf.parse_arguments([f"--output_dir={tmp_path}", f"--resume_from_checkpoint={value}"])
        return train_hf.checkpoint_to_resume(training)

    assert resume("True") == str(tmp_path / "checkpoint-4")
    for step, missing in ((8, "no optimizer.pt"), (12, "damaged"), (16, "cut off")):
        with pytest.raises(UserError, match=f"no complete checkpoint; .*{missing}"):
            resume(str(tmp_path / f"checkpoint-{step}"))
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert resume("True") is None  # nothing complete yet: from the beginning


def test_somebody_elses_files_are_not_overwritten(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    *_, training = train_hf.parse_arguments([f"--output_dir={tmp_path}"])
    with pytest.raises(UserError, match="its README.md would be overwritten"):
        train_hf.checkpoint_to_resume(training)


def test_a_finished_or_unfinished_run_is_not_overwritten(finished, teachers, monkeypatch, tmp_path):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match="already holds a finished run"):
        in_process(monkeypatch, *QUICK, teachers, f"--output_dir={folder}")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (tmp_path / "run" / "checkpoint-10").mkdir(parents=True)
    with pytest.raises(UserError, match="holds an unfinished run: go on with --resume_from_checkpoint True"):
        in_process(monkeypatch, *QUICK, teachers, f"--output_dir={tmp_path / 'run'}")


def test_an_untrained_teacher_is_refused_with_its_accuracy_by_one_message_and_exit_code_2(tmp_path):
    from modeling_deit_ti.data import DataArguments, make_image_processor
    from modeling_deit_ti.teacher import new_timm_classifier

    processor = make_image_processor(DataArguments(), 32)
    labels = [str(digit) for digit in range(10)]
    new_timm_classifier("test_resnet", labels, 32, processor).save_pretrained(tmp_path / "untrained")
    result = run(
        *QUICK,
        f"--teacher_model_name_or_path={tmp_path / 'untrained'}",
        f"--output_dir={tmp_path / 'run'}",
        f"--teacher_output_dir={tmp_path / 'teachers'}",
    )
    assert result.returncode == 2
    message = result.stderr.strip().splitlines()[-1]
    assert (
        message.startswith("train_hf.py: error: The teacher") and "is no better than chance: its accuracy" in message
    )
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("run/*")) and not (tmp_path / "teachers").exists()

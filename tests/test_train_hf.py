"""The command as a user runs it: what it writes and what it prints. Mistakes are covered in test_bad_input.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from building import FOUR_STEPS, arguments
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, pipeline

import evaluate_hf
import train_hf
from modeling_deit_ti.arguments import ImageArguments
from modeling_deit_ti.data import load_images
from modeling_deit_ti.data.inputs import EvalImages
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.parsing import parse_arguments
from modeling_deit_ti.preflight import checkpoint_to_resume, is_finished


REPOSITORY = Path(train_hf.__file__).parent
QUICK = [
    *FOUR_STEPS,
    "--patch_init=normal",  # of the two, the one that is better than chance, and underconfident, after four steps
    "--teacher_model_name_or_path=test_resnet",
    "--teacher_num_train_epochs=12",
    "--teacher_learning_rate=2e-2",
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
    """A run in mode distill with `accelerate launch` and the CPU config, as in the README."""
    folder = tmp_path_factory.mktemp("runs") / "distill"
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--config_file=accelerate_configs/cpu.yaml")
    flags = [teachers, "--distill_mode=distill", "--temperature_scaling", f"--output_dir={folder}"]
    result = run(*QUICK, *flags, launcher=launcher)
    assert result.returncode == 0, result.stderr
    return folder, result


# ---- What a run leaves ----


def test_run_leaves_the_files_the_design_specifies(finished):
    folder, _ = finished
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert names >= {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "example_8.png",  # one image for each of the first classes
        "configuration_deit_ti.py",
        "modeling_deit_ti.py",
        "README.md",
        "all_results.json",
        "train_results.json",
        "eval_results.json",
        "trainer_state.json",
        "training_args.bin",
        "training_curves.png",
        "report.json",
        "confusion_matrix.png",
        "reliability.png",
        "mistakes.png",
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


def test_report_covers_the_final_evaluation_and_matches_evaluate_hf(finished, tmp_path):
    folder, _ = finished
    results = json.loads((folder / "all_results.json").read_text())
    report = json.loads((folder / "report.json").read_text())
    assert report["accuracy"] == results["eval_accuracy"]
    counts = report["teacher"]
    assert sum(counts[key] for key in counts if key != "same_wrong_label") == report["num_images"] == 100
    assert counts["both_right"] + counts["only_student_right"] == round(100 * results["eval_accuracy"])
    assert counts["both_right"] + counts["only_teacher_right"] == round(100 * results["teacher_accuracy"])

    flags = ["--dataset_name=digits", "--max_eval_samples=100", "--temperature_scaling", "--precision=float32"]
    assert evaluate_hf.main([str(folder), results["teacher_path"], *flags, f"--output_dir={tmp_path / 'two'}"]) == 0
    again = json.loads((tmp_path / "two" / "first" / "report.json").read_text())
    for key in ("accuracy", "classes", "confusion", "split"):
        assert again[key] == report[key], key
    for key in ("expected_calibration_error", "mean_confidence"):
        assert again["calibration"][key] == pytest.approx(report["calibration"][key], abs=1e-5)
    comparison = json.loads((tmp_path / "two" / "comparison.json").read_text())
    assert comparison["only_first_right"] == counts["only_student_right"]
    assert comparison["same_wrong_label"] == counts["same_wrong_label"]


def test_saved_model_has_the_temperature_folded_into_its_heads(finished):
    folder, _ = finished
    scaling = json.loads((folder / "report.json").read_text())["temperature_scaling"]
    assert (scaling["num_fitted"], scaling["num_measured"], scaling["is_applied"]) == (50, 50, True)
    assert scaling["temperature"] != 1
    trained, saved = (load_file(path / "model.safetensors") for path in (folder / "checkpoint-4", folder))
    for name, weight in trained.items():
        expected = weight / scaling["temperature"] if "_head." in name else weight
        assert torch.equal(saved[name], expected), name
    assert "it is folded into the weights of the heads" in (folder / "README.md").read_text()


def test_run_prints_its_results_without_warnings(finished):
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


def test_summary_stays_aligned_whatever_the_teachers_name(finished, monkeypatch, tmp_path, capsys):
    fitted = json.loads((finished[0] / "all_results.json").read_text())["teacher_path"]
    teacher = shutil.copytree(fitted, tmp_path / "a-teacher-in-a-folder-with-a-long-name")
    flags = ["--distill_mode=both", f"--teacher_model_name_or_path={teacher}", f"--output_dir={tmp_path / 'run'}"]
    in_process(monkeypatch, *QUICK, *flags)
    lines = capsys.readouterr().out.splitlines()
    header = next(number for number, line in enumerate(lines) if line.split() == ["top-1", "top-5"])
    end = lines[header].index("top-1") + len("top-1")
    # The teacher, the student, its two heads and their mean.
    assert [line[:end][-1] for line in lines[header + 1 : header + 6]] == ["%"] * 5


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


def test_reported_accuracy_matches_the_saved_model(finished):
    folder, _ = finished
    data = load_images(ImageArguments(dataset_name="digits", max_train_samples=128, max_eval_samples=100))
    images = EvalImages(data.evaluation, AutoImageProcessor.from_pretrained(folder)).__getitems__(list(range(100)))
    model = AutoModelForImageClassification.from_pretrained(folder, subfolder="transformers").eval()
    with torch.no_grad():
        predicted = model(images["pixel_values"]).logits.argmax(-1)
    accuracy = (predicted == images["labels"]).float().mean().item()
    assert accuracy == pytest.approx(json.loads((folder / "all_results.json").read_text())["eval_accuracy"])


def test_same_command_and_seed_give_the_same_numbers(finished, teachers, tmp_path):
    folder, _ = finished
    flags = [teachers, "--distill_mode=distill", "--temperature_scaling", f"--output_dir={tmp_path / 'again'}"]
    result = run(*QUICK, *flags, "--use_cpu")
    assert result.returncode == 0, result.stderr
    assert "fitted by an earlier run" in result.stdout
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    numbers = [json.loads((path / "all_results.json").read_text()) for path in (folder, tmp_path / "again")]
    # The second run reused the teacher's logits from the first.
    assert [metrics.pop("teacher_cached") for metrics in numbers] == [0, 1]
    timings = {name for name in numbers[0] if "runtime" in name or "per_second" in name or "seconds" in name}
    assert {k: v for k, v in numbers[0].items() if k not in timings} == {
        k: v for k, v in numbers[1].items() if k not in timings
    }


def test_cnn_baseline_is_trained_by_the_same_code(monkeypatch, tmp_path):
    flags = [*QUICK, "--distill_mode=none", "--model_name_or_path=test_resnet", f"--output_dir={tmp_path / 'cnn'}"]
    in_process(monkeypatch, *flags, "--num_train_epochs=8", "--learning_rate=2e-2")
    results = json.loads((tmp_path / "cnn" / "all_results.json").read_text())
    assert results["eval_accuracy"] > 0.5 and "teacher_accuracy" not in results
    assert json.loads((tmp_path / "cnn" / "report.json").read_text())["teacher"] is None
    classify = pipeline("image-classification", str(tmp_path / "cnn"))
    assert len(classify(Image.open(tmp_path / "cnn" / "example.png"), top_k=10)) == 10


@pytest.mark.parametrize(
    ("flags", "evaluations"),
    [
        (["--eval_strategy=epoch"], 2),  # two epochs of four steps each
        (["--eval_strategy=no"], 1),
        (["--eval_strategy=steps", "--eval_steps=3"], 3),  # after steps 3, 6 and 8
        (["--eval_strategy=steps", "--eval_steps=4"], 2),
        (["--max_validation_samples=50"], 3),
        (["--max_validation_samples=100"], 2),
        (["--load_best_model_at_end"], 3),
        (["--bf16_full_eval", "--use_cpu"], 3),
    ],
)
def test_final_evaluation_runs_only_if_training_has_not_already_done_it(monkeypatch, tmp_path, flags, evaluations):
    counted, evaluation_loop = [], Trainer.evaluation_loop

    def count(self, *args, **kwargs):
        counted.append(self.state.global_step)
        return evaluation_loop(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "evaluation_loop", count)
    command = [*FOUR_STEPS, "--distill_mode=none", "--model_name_or_path=test_resnet", f"--output_dir={tmp_path}"]
    command += ["--num_train_epochs=2", "--learning_rate=2e-2", *flags]
    in_process(monkeypatch, *command)
    assert len(counted) == evaluations and counted[-1] == 8
    results = json.loads((tmp_path / "eval_results.json").read_text())
    assert set(results) == {
        *("eval_loss", "eval_accuracy", "eval_accuracy_top5", "epoch"),
        *("eval_runtime", "eval_samples_per_second", "eval_steps_per_second"),
    }
    images = results["eval_runtime"] * results["eval_samples_per_second"]
    assert images == pytest.approx(100, rel=0.02) and results["epoch"] == 2
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert log[-1] == {**results, "step": 8} and "train_runtime" in log[-2]

    # Stopped before its results were written, then resumed at its last step: nothing is evaluated in this process yet.
    (tmp_path / "all_results.json").unlink()
    counted.clear()
    in_process(monkeypatch, *command)
    assert counted == [8]
    again = json.loads((tmp_path / "eval_results.json").read_text())
    assert [again[name] for name in ("eval_loss", "eval_accuracy")] == [
        results[name] for name in ("eval_loss", "eval_accuracy")
    ]
    resumed = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [set(entry) for entry in resumed] == [set(entry) for entry in log]


def test_training_continues_from_a_finished_model(finished, teachers, monkeypatch, tmp_path):
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
        parse_arguments(["--help"])
    assert ending.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--distill_mode", "--teacher_model_name_or_path", "--dataset_name", "--num_train_epochs"):
        assert f"{flag} " in shown


def test_a_recipe_sets_flags_and_the_command_line_wins(tmp_path):
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1e-3\nimage_size: 64\nuse_cpu: true\nmixup: 0\n")
    args = parse_arguments([f"--config={tmp_path / 'recipe.yaml'}", "--image_size", "32"])
    assert (args.model.image_size, args.augmentation.mixup) == (32, 0)
    assert (args.training.learning_rate, args.training.use_cpu) == (1e-3, True)
    assert args.training.output_dir == "outputs/deit_ti-cifar10-none"


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(recipe):
    arguments(config=recipe)
    assert "distill_mode" in yaml.safe_load(recipe.read_text())


def test_defaults_are_the_papers_recipe_on_cifar10():
    args = arguments()
    assert (args.images.dataset_name, args.model.model_name_or_path) == ("uoft-cs/cifar10", "deit_ti")
    assert (args.model.image_size, args.model.patch_size) == (224, 16)
    recipe = args.hyperparameters()
    assert (recipe["num_train_epochs"], recipe["weight_decay"], recipe["label_smoothing_factor"]) == (20, 0.05, 0.1)
    assert (recipe["auto_augment"], recipe["random_erasing"]) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (recipe["mixup"], recipe["cutmix"], recipe["repeated_augmentation"]) == (0.8, 1.0, 3)
    assert arguments(distill_mode="hard").teacher.teacher_model_name_or_path == "regnetx_004"


def test_bare_no_in_a_recipe_is_a_string(tmp_path):
    (tmp_path / "recipe.yaml").write_text("save_strategy: no\n")
    assert arguments(config=tmp_path / "recipe.yaml").training.save_strategy == "no"


# ---- Earlier runs ----


def test_only_complete_checkpoints_are_resumed_from(finished, tmp_path):
    whole = finished[0] / "checkpoint-4"
    for step in (4, 8, 12):
        shutil.copytree(whole, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-8" / "checksums.json").unlink()
    weights = bytearray((tmp_path / "checkpoint-12" / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (tmp_path / "checkpoint-12" / "model.safetensors").write_bytes(weights)

    def resume(value: str):
        return checkpoint_to_resume(arguments(output_dir=tmp_path, resume_from_checkpoint=value).training)

    for value in ("auto", "True", "yes"):
        assert resume(value) == str(tmp_path / "checkpoint-4")
    for value in ("False", "no"):  # as a recipe's `false` arrives
        with pytest.raises(UserError, match="holds an unfinished run"):
            resume(value)
    for step, flaw in ((8, "was being written when the run ended"), (12, "its model.safetensors is damaged")):
        with pytest.raises(UserError, match=f"not a complete checkpoint; .*{flaw}"):
            resume(str(tmp_path / f"checkpoint-{step}"))
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert resume("auto") is None  # nothing complete yet: start from the beginning
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="its model.safetensors would be overwritten"):
        resume("auto")


def test_a_finished_run_is_not_overwritten(finished, teachers, monkeypatch):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match="already holds a finished run"):
        in_process(monkeypatch, *QUICK, teachers, f"--output_dir={folder}")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("resume", "push", "is_last", "is_skipped"),
    [
        *((resume, True, True, True) for resume in ("auto", "false", "last-checkpoint", "a/folder")),
        *((resume, False, True, False) for resume in ("auto", "false")),
        ("auto", False, False, True),
        ("false", False, False, False),
    ],
)
def test_a_finished_run_is_only_pushed_however_it_was_resumed(tmp_path, resume, push, is_last, is_skipped):
    args = arguments(output_dir=tmp_path, resume_from_checkpoint=resume, push_to_hub=push).training
    assert not is_finished(args, is_last)
    (tmp_path / "all_results.json").touch()
    assert is_finished(args, is_last) == is_skipped

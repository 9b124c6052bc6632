"""The benchmarks measure what they claim to, and their tables report what was measured."""

import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from transformers import AutoImageProcessor

from benchmarks import contenders, inference, report, step_clock, throughput, time_to_accuracy
from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.arguments import ImageArguments
from modeling_deit_ti.classifiers import label_maps, new_timm_classifier
from modeling_deit_ti.data import load_images
from modeling_deit_ti.data.inputs import EvalImages, make_image_processor
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.parsing import parse_arguments


@pytest.fixture(scope="module")
def setting() -> throughput.ThroughputSetting:
    return throughput.ThroughputSetting(
        dataset_name="digits",
        image_size=32,
        patch_size=16,
        batch_size=4,
        teacher="test_resnet",
        device="cpu",
        steps=1,
        warmup_steps=1,
        threads=1,
    )


@pytest.fixture(scope="module")
def work_dir(setting, tmp_path_factory) -> str:
    """The folder of all runs, including their teacher."""
    folder = str(tmp_path_factory.mktemp("runs"))
    args = throughput.make_arguments(setting, folder)
    throughput.save_teacher(setting.teacher, args, load_images(args.images))
    return folder


def test_peers_have_a_row_in_float32_and_one_in_half_precision(setting):
    names = ["timm", "timm, bf16", "transformers", "transformers, bf16"]
    assert list(setting.rows) == ["bare step", *report.OURS, *names, "published baseline's loop"]
    assert [setting.rows[name] for name in names[:2]] == [("timm", "fp32"), ("timm", "bf16")]
    # Ours and the bare step choose their own; the notebook's loop has only float32.
    assert [setting.rows[name][1] for name in ("bare step", *report.OURS)] == [None] * 3
    assert setting.rows["published baseline's loop"][1] == "fp32"
    restricted = replace(setting, precision="bf16").rows
    assert [name for name in restricted if name in names] == ["timm, bf16", "transformers, bf16"]
    assert restricted["bare step"] == ("bare step", "bf16")


ROWS = (
    *("bare step", *report.OURS, "timm", "timm, bf16", "transformers", "transformers, bf16"),
    "published baseline's loop",
)


@pytest.mark.parametrize("row", ROWS)
def test_contender_trains_and_reports_each_part_of_a_step(row, setting, work_dir):
    backward = torch.Tensor.backward
    found = throughput.measure(setting, work_dir, row, time.time())
    assert found["precision"] == {"bf16": "bf16"}.get(row[-4:], setting.rows[row][1] or setting.automatic_precision)
    assert found["images_per_second"] == pytest.approx(4 / (found["step_ms"] / 1000))
    assert found["startup_seconds"] > 0
    assert found["peak_host_bytes"] > 1e8 and found["peak_device_bytes"] is None
    assert list(found["split_ms"]) == ["data", "teacher", "student", "optimizer", "other"]
    assert all(milliseconds > 0 for milliseconds in found["split_ms"].values())
    # A forward and a backward pass through 5.5 million parameters, against a forward pass through 0.4 million.
    assert found["split_ms"]["student"] > found["split_ms"]["teacher"]
    assert torch.Tensor.backward is backward  # the hooks are gone


def test_parts_of_a_step_are_not_timed_when_turned_off(setting, work_dir):
    setting = replace(setting, split_steps=0)  # as --torch_compile does
    found = throughput.measure(setting, work_dir, report.BARE, time.time())
    assert found["split_ms"] is None and found["images_per_second"] > 0


def test_bare_step_counts_its_operations(setting, work_dir):
    args = throughput.make_arguments(setting, work_dir, "fp32", max_steps=1)
    clock = step_clock.StepClock("cpu", 4, time.time(), 1, 0, 0)
    contenders.train_bare(args, load_images(args.images), clock)
    flops = throughput.step_flops(**clock.networks, args=args)
    # 6 tokens through 11 layers whose matrices have 12 x 192^2 weights, and the products of 3 heads of 64 channels; in
    # the last layer all become keys and values, but only 2 continue; 4 patches through the projection; 2 tokens
    # through their heads. Twice for multiply and add; the backward pass is twice that, without the pixels' gradient.
    layers = 11 * (6 * 12 * 192**2 + 2 * 6 * 6 * 192) + (6 * 3 + 2 * 9) * 192**2 + 2 * 2 * 6 * 192
    forward = 2 * (layers + 4 * 192 * 768 + 2 * 192 * 10)
    assert flops["student_flops"] == 3 * forward - 2 * 4 * 192 * 768
    assert 0 < flops["teacher_flops"] < flops["student_flops"]


def test_ours_stores_its_teachers_logits_in_an_empty_folder(setting, work_dir):
    args = throughput.make_arguments(setting, work_dir, max_steps=2)
    clock = step_clock.StepClock("cpu", 4, time.time(), 1, 1, 0)
    contenders.train_ours(args, load_images(args.images), clock)
    files = list(Path(args.teacher.teacher_output_dir, "logits").glob("*/epoch-0000.bin"))
    assert len(files) == 1 and files[0].stat().st_size > 0


def test_memory_is_read_after_every_epoch(setting, work_dir, monkeypatch):
    few = {"num_train_epochs": 2, "max_train_samples": 16, "max_eval_samples": 8, "per_device_train_batch_size": 8}
    monkeypatch.setattr(throughput, "MEMORY_FLAGS", throughput.MEMORY_FLAGS | few)
    epochs = throughput.measure_memory(setting, work_dir)["host_bytes_by_epoch"]
    assert len(epochs) == 2 and min(epochs) > 1e8


def run_out_of_memory(setting):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 40 GB")


def be_killed(setting):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "measure, reason",
    [
        (run_out_of_memory, "OutOfMemoryError: CUDA out of memory"),
        (be_killed, "BrokenProcessPool: A process in the process pool was terminated abruptly"),
    ],
)
def test_failed_or_killed_measurement_reports_the_reason(setting, measure, reason):
    assert throughput.attempt(measure, setting)["failed"].startswith(reason)


def test_throughput_command_measures_in_subprocesses_and_writes_the_tables(tmp_path):
    flags = "--dataset_name digits --image_size 32 --patch_size 16 --batch_size 4 --teacher test_resnet --device cpu"
    flags += " --steps 1 --repeats 1 --threads 1 --no_measure_memory --recipe light"
    code = throughput.main([*flags.split(), "--contenders", "bare step", "--output_dir", str(tmp_path)])
    assert code == 0
    name = next(tmp_path.glob("*.json")).stem
    result = json.loads((tmp_path / f"{name}.json").read_text())
    precision = result["setting"]["automatic_precision"]
    assert name.endswith(f"threads-1-32-16-{precision}-batch-4-test_resnet-recipe-light-digits")
    assert result["rows"][0]["precision"] == precision
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert result["hardware"] and result["setting"]["warmup_steps"] == 1
    assert result["processor"] is None or f"; {result['processor']}; " in (tmp_path / f"{name}.md").read_text()
    (header, row) = table_in((tmp_path / f"{name}.md").read_text())
    assert dict(zip(header, row, strict=True))["contender"] == "bare step"
    assert float(row[header.index("images/s")].replace(",", "")) == pytest.approx(
        result["rows"][0]["images_per_second"]["median"], abs=0.06
    )
    assert float(row[header.index("peak host, MB")].replace(",", "")) > 100
    assert "(" + name + ".md)" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--image_size 30 --patch_size 4", "--patch_size 4 does not divide --image_size 30."),
        ("--teacher no_such_net", "--teacher no_such_net: timm has no such architecture."),
        ("--device cpu --precision fp16", "--precision fp16 needs a GPU: use fp32 or bf16."),
        ("--repeats 0", "--repeats 0: must be at least 1."),
    ],
)
def test_mistakes_are_reported_before_anything_is_measured(flags, message):
    with pytest.raises(UserError) as error:
        throughput.main(flags.split())
    assert str(error.value) == message


def test_inference_compares_models_that_agree_on_the_logits(tmp_path):
    flags = "--patch_size 16 --device cpu --batch_sizes 1 3 --repeats 1 --seconds 0 --threads 1"
    models = [name for name in inference.MAKERS if name != "compiled"]  # compiling takes a minute
    assert inference.main([*flags.split(), "--models", *models, "--output_dir", str(tmp_path)]) == 0
    result = json.loads(next(tmp_path.glob("inference-*.json")).read_text())
    assert [(row["name"], row["batch_size"]) for row in result["rows"]] == [
        (name, size) for size in (1, 3) for name in models
    ]
    for row in result["rows"]:
        is_exact = "bfloat16" not in row["name"] and "int8" not in row["name"]
        assert row["max_abs_difference"] < 1e-4 if is_exact else 1e-4 < row["max_abs_difference"] < 0.1
        assert row["accuracy"] is None  # the weights are random
        assert row["latency_ms"]["calls"] == 2
        assert row["latency_ms"]["p95"] >= row["latency_ms"]["median"] > 0
    header, *rows = table_in(next(tmp_path.glob("inference-*.md")).read_text())
    assert header[0] == "model" and [row[0] for row in rows] == models * 2


def test_inference_reports_a_trained_models_accuracy_at_each_precision(tmp_path):
    labels = [str(digit) for digit in range(10)]
    model = DeiTTiForImageClassification(DeiTTiConfig(image_size=32, patch_size=16, **label_maps(labels)))
    model.save_pretrained(tmp_path / "model")
    args = parse_arguments(["--image_size=32", "--patch_size=16", "--use_cpu=true"])
    make_image_processor(args.model, args.augmentation).save_pretrained(tmp_path / "model")
    flags = f"--model {tmp_path / 'model'} --dataset_name digits --max_eval_samples 50 --device cpu --batch_sizes 1 20"
    models = ["ONNX Runtime", "ONNX Runtime, dynamic int8"]
    flags += f" --repeats 1 --seconds 0 --threads 1 --output_dir {tmp_path / 'results'} --models"
    inference.main([*flags.split(), *models])
    result = json.loads(next((tmp_path / "results").glob("inference-*.json")).read_text())
    assert result["labelled_images"] == 50
    assert (result["setting"]["model"], result["setting"]["image_size"]) == ("model", 32)
    assert [row["name"] for row in result["rows"]] == ["native", *models] * 2
    data = load_images(ImageArguments("digits", max_eval_samples=50))
    batch = EvalImages(data.evaluation, AutoImageProcessor.from_pretrained(tmp_path / "model")).__getitems__(range(50))
    expected = (model.eval()(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).float().mean().item()
    assert [row["accuracy"] for row in result["rows"] if "int8" not in row["name"]] == [pytest.approx(expected)] * 4


@pytest.mark.parametrize("right, failed", [(100, False), (99, False), (98, True)])
def test_lower_precision_may_cost_one_point_of_accuracy(right, failed):
    images, logits = torch.zeros(1, 3, 4, 4), torch.ones(1, 10)
    row = {"name": "ONNX Runtime, dynamic int8", "accuracy": right / 100, "largest_logit": 1.0}
    found = inference.compare(row, lambda images: 2 * logits, images, logits, native_accuracy=1.0)
    assert (found["failed"] is not None) == failed and found["max_abs_difference"] == 1


def test_inference_does_not_time_models_that_fail_or_predict_differently(monkeypatch):
    models = ["native", "transformers", "timm", "ONNX Runtime"]
    setting = inference.InferenceSetting(
        device="cpu", batch_sizes=[2], repeats=1, seconds=0.0, image_size=4, models=models
    )

    def no_provider(model, setting):
        raise UserError("no such provider")

    makers = {
        "native": lambda *_: lambda images: images.flatten(1)[:, :3],
        "timm": lambda *_: lambda images: images.flatten(1)[:, :3] + 0.1,
        "transformers": lambda *_: lambda images: images.flatten(1) @ torch.zeros(1, 1),
        "ONNX Runtime": no_provider,
    }
    monkeypatch.setattr(inference, "MAKERS", makers)
    native, broken, other, missing = inference.measure(setting, None, torch.randn(2, 3, 4, 4), None)
    assert native["failed"] is None and native["max_abs_difference"] == 0
    assert other["failed"].startswith("its logits differ by 1.0e-01 from")
    assert broken["failed"].startswith("RuntimeError: mat1 and mat2 shapes")
    assert missing["failed"] == "UserError: no such provider"
    assert ["latency_ms" in row for row in (native, broken, other, missing)] == [True, False, False, False]


# ---- Time to accuracy ----


TINY_RECIPE = """
dataset_name: digits
distill_mode: both
image_size: 32
patch_size: 16
auto_augment: none
random_erasing: 0
mixup: 0
cutmix: 0
repeated_augmentation: 1
per_device_train_batch_size: 32
num_train_epochs: 2
max_train_samples: 160
max_eval_samples: 40
"""


@pytest.fixture
def time_flags(tmp_path, work_dir) -> list[str]:
    (tmp_path / "tiny.yaml").write_text(TINY_RECIPE)
    flags = f"--teacher {work_dir}/teacher --recipe {tmp_path}/tiny.yaml --device cpu --threads 1"
    return f"{flags} --output_dir {tmp_path}/results --targets 1.0 0.01".split()


def test_time_to_accuracy_resumes_with_the_missing_contenders(time_flags, tmp_path, monkeypatch):
    time_flags += ["--limit", "0.01", "--contenders", "timm", "--peers_patch_size", "32"]
    assert time_to_accuracy.main(time_flags) == 0
    (file,) = (tmp_path / "results").glob("time-to-accuracy-*.json")
    result = json.loads(file.read_text())
    ours, *timm = result["rows"]
    assert [row["name"] for row in result["rows"]] == ["ours", "timm", "timm, bf16"]
    assert [row["precision"] for row in timm] == ["fp32", "bf16"]
    assert result["train_images"] == 160 and result["held_out_images"] == 40
    assert [point["epoch"] for point in ours["curve"]] == [1.0, 2.0]  # to the end of its recipe
    # The others get a hundredth of our time, less than one of their steps takes (128 images by default).
    assert all(len(row["curve"]) == 1 and row["curve"][0]["images"] == 128 for row in timm)
    text = file.with_suffix(".md").read_text()
    assert "(ours in patches of 16 pixels, the others in patches of 32)" in text
    header, *rows = table_in(text)
    assert header[2:4] == ["1 %, minutes", "100 %, minutes"]
    assert [row[3] for row in rows] == ["not reached"] * 3
    assert file.with_suffix(".png").stat().st_size > 10_000
    assert file.stem in (tmp_path / "results" / "README.md").read_text()

    monkeypatch.setattr(time_to_accuracy, "attempt", lambda *args: pytest.fail("all of these are finished"))
    assert time_to_accuracy.main(time_flags) == 0
    assert json.loads(file.read_text())["rows"] == result["rows"]


@pytest.mark.parametrize("row", ["transformers", "transformers, bf16"])
def test_the_guides_trainer_is_stopped_at_the_target(row, time_flags):
    setting = time_to_accuracy.parse_setting(time_to_accuracy.TimeSetting, time_flags, "")
    setting.targets, setting.every_minutes = [0.0], 1e-9
    found = time_to_accuracy.measure(setting, row, limit_minutes=60)
    assert [point["images"] for point in found["curve"]] == [8]  # its first batch, of the default size
    assert found["precision"] == setting.rows[row][1]
    assert found["minutes_to_target"] == [found["curve"][0]["minutes"]]


def test_clock_is_paused_during_evaluation(time_flags):
    setting = time_to_accuracy.parse_setting(time_to_accuracy.TimeSetting, time_flags, "")
    args = time_to_accuracy.make_arguments(setting, "", "timm", "fp32")
    clock = time_to_accuracy.AccuracyClock(args, load_images(args.images), 2.0, math.inf, math.inf)
    student, seconds = torch.nn.Linear(1, 1), [0.0]
    clock.now = lambda: seconds[0]

    def accuracy() -> float:
        seconds[0] += 600
        return 0.5

    clock.accuracy = accuracy
    clock.watch(student, student)
    for _ in range(2):
        for batch in clock.batches([torch.ones(4, 1)] * 2):
            student(batch)
            seconds[0] += 60
    points = [(point["images"], point["minutes"], point["accuracy"]) for point in clock.curve]
    assert points == [(8, 2.0, 0.5), (16, 4.0, 0.5)] and not clock.is_done


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--teacher": "no_such_folder"}, "--teacher no_such_folder: name the folder of a teacher"),
        ({"--every_minutes": "0"}, "--every_minutes 0.0: must be above 0."),
        ({"--peers_patch_size": "5"}, "--peers_patch_size 5 does not divide 32 pixels."),
    ],
)
def test_time_to_accuracy_reports_mistakes_before_training(changes, message, time_flags):
    flags = [*time_flags, *(word for pair in changes.items() for word in pair)]
    with pytest.raises(UserError, match=message):
        time_to_accuracy.main(flags)


def save_teacher(folder: Path, label_names: list[str], image_size: int = 32, **normalisation) -> None:
    args = parse_arguments([f"--image_size={image_size}", "--patch_size=16", "--use_cpu=true"])
    image_processor = make_image_processor(args.model, args.augmentation, **normalisation)
    new_timm_classifier("test_resnet", label_names, image_size, image_processor).save_pretrained(folder)


DIGITS = [str(digit) for digit in range(10)]


def test_teacher_with_its_own_image_size_answers_all_contenders_alike(time_flags, work_dir, tmp_path):
    save_teacher(tmp_path / "teacher", DIGITS, image_size=64)
    changes = {"teacher": str(tmp_path / "teacher"), "targets": [0.0], "every_minutes": 1e-9}
    setting = replace(time_to_accuracy.parse_setting(time_to_accuracy.TimeSetting, time_flags, ""), **changes)
    args = time_to_accuracy.make_arguments(setting, str(tmp_path), "ours", "fp32")
    data = load_images(args.images)
    time_to_accuracy.check_teacher(args, data)
    images = torch.randn(2, 3, 32, 32)
    expected = contenders.make_our_trainer(args, data, with_cache=False).teacher(images)
    with torch.no_grad():
        as_timm_model = contenders.load_peers_teacher(args, as_timm_model=True)(images)
        of_transformers = contenders.load_peers_teacher(args)(pixel_values=images).logits
        at_the_wrong_size = contenders.load_teacher(args)(images).logits
    assert torch.allclose(as_timm_model, expected, atol=1e-5) and torch.allclose(of_transformers, expected, atol=1e-5)
    assert not torch.allclose(at_the_wrong_size, expected, atol=1e-2)
    for row in ("timm", "transformers"):
        assert len(time_to_accuracy.measure(setting, row, limit_minutes=60)["curve"]) == 1
    # A teacher with the student's image size is used as it is.
    args.teacher.teacher_model_name_or_path = f"{work_dir}/teacher"
    assert type(contenders.load_peers_teacher(args)) is type(contenders.load_teacher(args))


@pytest.mark.parametrize(
    "label_names, normalisation", [(DIGITS[::-1], {}), (DIGITS, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})]
)
def test_a_teacher_that_only_ours_could_use_is_refused(label_names, normalisation, time_flags, tmp_path):
    save_teacher(tmp_path / "teacher", label_names, **normalisation)
    with pytest.raises(UserError, match="must be a timm architecture, fitted .* in this order, .* normalised like"):
        time_to_accuracy.main([*time_flags, "--teacher", str(tmp_path / "teacher")])


# ---- Tables, from made-up results ----


def table_in(markdown: str, index: int = 0) -> list[list[str]]:
    """The cells of a table in a Markdown text, as a reader sees them; every row must be as long as the first."""
    tables: list[list[list[str]]] = []
    inside = False
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "table_open":
            tables.append([])
        inside = (inside or token.type == "table_open") and token.type != "table_close"
        if inside and token.type == "tr_open":
            tables[-1].append([])
        elif inside and token.type == "inline":
            tables[-1][-1].append(token.content)
    assert all(len(row) == len(tables[index][0]) for row in tables[index])
    return tables[index]


def made_up_result(where: dict, speeds: dict[str, float], **changes) -> dict:
    setting = {"precision": None, "automatic_precision": "bf16", "recipe": "paper", "threads": 2}
    setting |= {"torch_compile": False, "dataset_name": "digits"}
    rows = [
        {
            "name": name,
            "failed": None,
            "images_per_second": report.spread([speed - 1, speed, speed + 1]),
            "step_ms": report.spread([100.0]),
            "startup_seconds": report.spread([10.0]),
            "peak_host_bytes": report.spread([10**9]),
            "peak_device_bytes": report.spread([39 * 10**9]) if where["device"] == "cuda" else None,
            "split_ms": None,
            "precision": "bf16",
            # For the bare step: 60 GFLOP/s at 100 images/s; the matrix product alone reaches 100.
            **({"student_flops": 500 * 10**6, "teacher_flops": 100 * 10**6} if name == "bare step" else {}),
            **({"product_flops_per_second": report.spread([1e11])} if name == "bare step" else {}),
        }
        for name, speed in speeds.items()
    ]
    return {
        "benchmark": "throughput",
        "device": where["device"],
        "hardware": "1 x Some GPU" if where["device"] == "cuda" else "2 CPU cores (x86_64)",
        "processor": "Some CPU, avx2, avx512f",
        "versions": {"torch": "2.0"},
        "date": "2026-01-01",
        "setting": setting | where,
        "rows": rows,
        "host_bytes_by_epoch": None,
        **changes,
    }


def verdicts(folder) -> dict[str, tuple[str, str]]:
    header, *rows = table_in((folder / "README.md").read_text(), 0)
    assert header[:3] == ["target", "value", "verdict"]
    return {row[0]: (row[1], row[2]) for row in rows}


def test_targets_without_results_are_not_measured_and_name_their_commands(tmp_path):
    report.write_index(tmp_path)
    assert set(verdicts(tmp_path).values()) == {("not measured", "not measured")}
    commands = [row[-1] for row in table_in((tmp_path / "README.md").read_text())[1:]]
    *throughput, inference_command = commands[:-4]
    assert all(command.startswith("`python benchmarks/throughput.py --image_size") for command in throughput)
    assert inference_command == "`python benchmarks/inference.py`"
    assert set(commands[-4:]) == {"`python benchmarks/time_to_accuracy.py --teacher FOLDER`"}
    header, *rows = table_in((tmp_path / "README.md").read_text(), 1)
    assert [row[0] for row in rows] == [case.name for case in report.CASES]
    assert all(set(row[1:]) == {"not measured"} for row in rows)


def test_targets_are_judged_by_the_faster_of_our_two_ways(tmp_path):
    speeds = {"bare step": 100.0, report.OURS[0]: 90.0, report.OURS[1]: 96.0, "timm": 32.0, "timm, bf16": 62.0}
    speeds |= {"transformers": 33.0, "transformers, bf16": 60.0}
    memory = [200, 190, 195, 201]
    case = report.CPU_BF16_8
    report.write_result(made_up_result(case.where, speeds, host_bytes_by_epoch=memory), tmp_path)
    found = verdicts(tmp_path)
    assert found[f"{case.name}: at least 3x timm's defaults"] == ("3.00", "met")
    assert found[f"{case.name}: at least 3x transformers' defaults"] == ("2.91", "missed")
    assert found[f"{case.name}: at least 1.6x timm with bfloat16 on"] == ("1.55", "missed")
    assert found[f"{case.name}: at least 1.6x transformers with bfloat16 on"] == ("1.60", "met")
    assert found[f"{case.name}: at least 95% of the bare step"] == ("96.0%", "met")
    assert found[f"{case.name}: bare step at least 60% of the matrix product's rate"] == ("60.0%", "met")
    assert found["host memory grows by at most 1% over the epochs"] == ("+0.50%", "met")
    for other in (report.CPU_BF16_4, report.CPU_FP32_4, report.GPU_224):
        of_other = [verdict for name, verdict in found.items() if name.startswith(other.name)]
        assert set(of_other) == {("not measured", "not measured")}
    _, row, *others = table_in((tmp_path / "README.md").read_text(), 1)
    assert row[1:] == [
        *("100.0 (99.0 to 101.0)", "90.0 (89.0 to 91.0)", "96.0 (95.0 to 97.0)", "32.0 (31.0 to 33.0)"),
        *("62.0 (61.0 to 63.0)", "33.0 (32.0 to 34.0)", "60.0 (59.0 to 61.0)", "not measured"),
    ]
    assert [other[0] for other in others] == [case.name for case in report.CASES if case != report.CPU_BF16_8]


def test_results_of_one_cpu_do_not_replace_those_of_another(tmp_path):
    result = made_up_result(report.CPU_BF16_8.where, {report.OURS[0]: 90.0})
    for processor in ("Some CPU, avx2", "Another CPU, avx2", None):
        report.write_result(result | {"processor": processor}, tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 3
    text = (tmp_path / "README.md").read_text()
    assert "2 CPU cores (x86_64), Another CPU, threads " in text and "2 CPU cores (x86_64), threads " in text


def test_cpu_without_bfloat16_instructions_has_its_own_targets(tmp_path):
    where = report.CPU_FP32_4.where
    speeds = {"bare step": 100.0, report.OURS[1]: 97.2, "timm": 90.0, "transformers": 91.0}
    report.write_result(made_up_result(where, speeds), tmp_path)
    # In float32 on a CPU that would have used bfloat16: no target is about this.
    report.write_result(made_up_result(where | {"automatic_precision": "bf16", "precision": "fp32"}, speeds), tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2
    found = verdicts(tmp_path)
    assert found[f"{report.CPU_FP32_4.name}: at least 1.08x timm"] == ("1.08", "met")
    assert found[f"{report.CPU_FP32_4.name}: at least 1.08x transformers"] == ("1.07", "missed")
    assert found[f"{report.CPU_BF16_4.name}: at least 3x timm's defaults"] == ("not measured",) * 2


def test_inference_target_is_about_the_fastest_exported_form_at_batch_1(tmp_path):
    speeds = {("native", 1): 100.0, ("ONNX Runtime", 1): 190.0, ("ONNX Runtime, dynamic int8", 1): 310.0}
    speeds |= {("compiled", 1): 900.0, ("native", 256): 1000.0, ("ONNX Runtime", 256): 9000.0}
    rows = [
        {
            "name": name,
            "batch_size": batch_size,
            "failed": None,
            "largest_logit": 1.0,
            "accuracy": None,
            "max_abs_difference": 0.0,
            "images_per_second": report.spread([speed]),
            "latency_ms": {"median": 1.0, "p95": 2.0, "calls": 3},
        }
        for (name, batch_size), speed in speeds.items()
    ]
    setting = {"image_size": 32, "patch_size": 4, "model": None, "repeats": 3, "seconds": 3.0}
    changes = {"benchmark": "inference", "rows": rows, "processor": None, "seconds": 1}
    report.write_result(made_up_result({"device": "cpu", **setting}, {}, **changes), tmp_path)
    name = f"{report.CPU_INFERENCE.name}: batch 1, fastest exported form at least 2x native float32"
    assert verdicts(tmp_path)[name] == ("3.10", "met")


def row_to_targets(name: str, minutes_to_target: list[float | None], minutes: float) -> dict:
    curve = [{"minutes": minutes, "epoch": 2.0, "images": 1000, "accuracy": 0.65}]
    facts = {"name": name, "failed": None, "precision": "fp32"}
    return facts | {"curve": curve, "minutes_to_target": minutes_to_target}


def test_time_targets_use_the_faster_rows_and_count_minutes_that_fell_short(tmp_path):
    rows = [
        row_to_targets("ours", [4.0, 10.0], 10.0),
        row_to_targets("timm", [16.0, 29.0], 29.0),
        row_to_targets("timm, bf16", [11.0, None], 30.5),
        row_to_targets("transformers", [None, None], 30.0),
        {"name": "transformers, bf16", "failed": "OutOfMemoryError: 40 GB"},
    ]
    setting = {"recipe": "cifar10_quick.yaml", "image_size": 32, "patch_size": 4, "peers_patch_size": 8, "limit": 3.0}
    setting |= {"targets": [0.6, 0.7], "every_minutes": 1.0, "teacher": "a_teacher"}
    changes = {"benchmark": "time_to_accuracy", "train_images": 100, "held_out_images": 10, "recipe": {"epochs": 4}}

    def verdicts_with(*rows) -> list[tuple[str, str]]:
        report.write_result(made_up_result({"device": "cpu"} | setting, {}, rows=rows, **changes), tmp_path)
        return [verdict for name, verdict in verdicts(tmp_path).items() if name.startswith(report.CPU_TIME.name)]

    assert verdicts_with(*rows) == [("0.36", "missed"), ("0.13", "met"), ("0.34", "missed"), ("0.33", "met")]
    too_slow = row_to_targets("ours", [4.0, None], 12.0)
    assert verdicts_with(too_slow, rows[1])[2] == ("inf", "missed")
    assert set(verdicts_with({"name": "ours", "failed": "it did"})) == {("not measured", "not measured")}


def test_memory_that_creeps_up_is_reported(tmp_path):
    result = made_up_result(report.CPU_BF16_4.where, {"bare step": 100.0}, host_bytes_by_epoch=[200, 202, 204, 206])
    report.write_result(result, tmp_path)
    assert verdicts(tmp_path)["host memory grows by at most 1% over the epochs"] == ("+1.98%", "missed")


def test_gpu_targets_are_met_or_missed(tmp_path):
    speeds = {
        "bare step": 20_000.0,
        report.OURS[0]: 3_000.0,
        report.OURS[1]: 16_000.0,
        "timm, bf16": 8_000.0,
        report.PUBLISHED_BASELINE: 1_700.0,
    }
    result = made_up_result(report.GPU_224.where, speeds)
    report.write_result(result, tmp_path)
    found = verdicts(tmp_path)
    assert found[f"{report.GPU_224.name}: at least 2x timm with bfloat16 on"] == ("2.00", "met")
    assert found[f"{report.GPU_224.name}: at least 10x the published baseline's loop"] == ("9.4", "missed")
    assert found[f"{report.GPU_224.name}: at least 15,000 images/s with the teacher"] == ("16,000", "met")
    assert found[f"{report.GPU_224.name}: at least 85% of the bare step"] == ("80.0%", "missed")
    assert found[f"{report.GPU_224.name}: at most 40 GB on the device"] == ("39.0", "met")
    assert found[f"{report.GPU_32.name}: at least 40,000 images/s"] == ("not measured", "not measured")


def test_failed_contender_is_reported_and_its_targets_are_not_measured(tmp_path):
    result = made_up_result(report.CPU_BF16_4.where, {"bare step": 100.0, report.OURS[0]: 99.0})
    result["rows"].append({"name": "timm", "failed": "OutOfMemoryError: 40 GB"})
    file = report.write_result(result, tmp_path)
    assert table_in(file.read_text())[-1][:3] == ["timm", "", "failed: OutOfMemoryError: 40 GB"]
    assert verdicts(tmp_path)[f"{report.CPU_BF16_4.name}: at least 3x timm's defaults"] == (
        "not measured",
        "not measured",
    )


def test_targets_ignore_results_with_other_settings(tmp_path):
    speeds = {"bare step": 100.0, report.OURS[0]: 99.0}
    for change in ({"precision": "bf16"}, {"recipe": "light"}, {"teacher": "test_resnet"}, {"batch_size": 64}):
        report.write_result(made_up_result(report.CPU_BF16_4.where | change, speeds), tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 4  # none replaced another
    assert verdicts(tmp_path)[f"{report.CPU_BF16_4.name}: at least 95% of the bare step"] == ("not measured",) * 2

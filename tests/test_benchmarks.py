"""The benchmarks measure what they say, and their tables say what was measured."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from markdown_it import MarkdownIt

from benchmarks import contenders, inference, report, throughput
from modeling_deit_ti.data import load_images
from modeling_deit_ti.errors import UserError


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
    """The folder of all runs, with their teacher in it."""
    folder = str(tmp_path_factory.mktemp("runs"))
    args = throughput.make_arguments(setting, folder)
    throughput.save_teacher(setting.teacher, args, load_images(args.images))
    return folder


@pytest.mark.parametrize("contender", contenders.CONTENDERS)
def test_contender_trains_and_reports_each_part_of_a_step(contender, setting, work_dir):
    backward = torch.Tensor.backward
    found = throughput.measure(setting, work_dir, contender, time.time())
    assert found["images_per_second"] == pytest.approx(4 / (found["step_ms"] / 1000))
    assert found["startup_seconds"] > 0
    assert found["peak_host_bytes"] > 1e8 and found["peak_device_bytes"] is None
    assert list(found["split_ms"]) == ["data", "teacher", "student", "optimizer", "other"]
    assert all(milliseconds > 0 for milliseconds in found["split_ms"].values())
    # Forward and backward through 5.5 million parameters, against a forward of 0.4 million.
    assert found["split_ms"]["student"] > found["split_ms"]["teacher"]
    assert torch.Tensor.backward is backward  # the hooks are gone


def test_parts_of_a_step_are_not_timed_when_turned_off(setting, work_dir):
    setting = replace(setting, split_steps=0)  # as --torch_compile does
    found = throughput.measure(setting, work_dir, report.BARE, time.time())
    assert found["split_ms"] is None and found["images_per_second"] > 0


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
def test_a_measurement_that_fails_or_is_killed_says_why(setting, measure, reason):
    assert throughput.attempt(measure, setting)["failed"].startswith(reason)


def test_throughput_command_measures_in_processes_of_their_own_and_writes_the_tables(tmp_path):
    flags = "--dataset_name digits --image_size 32 --patch_size 16 --batch_size 4 --teacher test_resnet --device cpu"
    flags += " --steps 1 --repeats 1 --threads 1 --no_measure_memory --recipe light"
    code = throughput.main([*flags.split(), "--contenders", "bare step", "--output_dir", str(tmp_path)])
    assert code == 0
    name = next(tmp_path.glob("*.json")).stem
    assert name.endswith("threads-1-32-16-fp32-batch-4-test_resnet-recipe-light-digits")
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert result["hardware"] and result["setting"]["warmup_steps"] == 1
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
def test_mistakes_are_named_before_anything_is_measured(flags, message):
    with pytest.raises(UserError) as error:
        throughput.main(flags.split())
    assert str(error.value) == message


def test_inference_compares_models_that_agree_on_the_logits(tmp_path):
    flags = "--patch_size 16 --device cpu --batch_sizes 1 3 --repeats 1 --seconds 0 --threads 1"
    models = ["native", "transformers", "timm", "ONNX Runtime"]  # compiling takes a minute
    assert inference.main([*flags.split(), "--models", *models, "--output_dir", str(tmp_path)]) == 0
    result = json.loads(next(tmp_path.glob("inference-*.json")).read_text())
    assert [(row["name"], row["batch_size"]) for row in result["rows"]] == [
        (name, size) for size in (1, 3) for name in models
    ]
    for row in result["rows"]:
        assert row["max_abs_difference"] < 1e-4
        assert row["latency_ms"]["calls"] == 2
        assert row["latency_ms"]["p95"] >= row["latency_ms"]["median"] > 0
    header, *rows = table_in(next(tmp_path.glob("inference-*.md")).read_text())
    assert header[0] == "model" and [row[0] for row in rows] == models * 2


def test_inference_does_not_time_a_model_that_predicts_something_else():
    setting = inference.InferenceSetting(device="cpu", batch_sizes=[2], repeats=1, seconds=0.0, image_size=4)
    models = {
        "native": lambda images: images.flatten(1)[:, :3],
        "timm": lambda images: images.flatten(1)[:, :3] + 0.1,
        "ONNX Runtime": "UserError: no such provider",
    }
    native, other, missing = inference.measure(setting, models)
    assert native["failed"] is None and native["max_abs_difference"] == 0
    assert other["failed"].startswith("its logits are 1.0e-01 from") and "latency_ms" not in other
    assert missing["failed"] == "UserError: no such provider"


# ---- Tables, from made-up results ----


def table_in(markdown: str, index: int = 0) -> list[list[str]]:
    """The cells of a Markdown text's table, as a reader of Markdown sees them; every row as long as the first."""
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
    setting = {"precision": "fp32", "recipe": "paper", "threads": 2, "torch_compile": False, "dataset_name": "digits"}
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
        }
        for name, speed in speeds.items()
    ]
    return {
        "benchmark": "throughput",
        "device": where["device"],
        "hardware": "1 x Some GPU" if where["device"] == "cuda" else "2 CPU cores (x86_64)",
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


def test_without_results_every_target_is_not_measured_and_names_its_command(tmp_path):
    report.write_index(tmp_path)
    assert set(verdicts(tmp_path).values()) == {("not measured", "not measured")}
    assert all(
        "`python benchmarks/throughput.py" in row[-1] for row in table_in((tmp_path / "README.md").read_text())[1:]
    )
    header, *rows = table_in((tmp_path / "README.md").read_text(), 1)
    assert [row[0] for row in rows] == [report.CPU_32.name, report.GPU_224.name, report.GPU_32.name]
    assert all(set(row[1:]) == {"not measured"} for row in rows)


def test_targets_are_met_or_missed_by_the_faster_of_our_two_ways(tmp_path):
    speeds = {"bare step": 100.0, report.OURS[0]: 90.0, report.OURS[1]: 96.0, "timm": 97.0, "transformers": 80.0}
    memory = [200, 190, 195, 201]
    report.write_result(made_up_result(report.CPU_32.where, speeds, host_bytes_by_epoch=memory), tmp_path)
    found = verdicts(tmp_path)
    assert found[f"{report.CPU_32.name}: at least 95% of the bare step"] == ("96.0%", "met")
    assert found[f"{report.CPU_32.name}: at least as fast as timm"] == ("0.99", "missed")
    assert found[f"{report.CPU_32.name}: at least 1.1x plain transformers"] == ("1.20", "met")
    assert found["host memory grows by at most 1% over the epochs"] == ("+0.50%", "met")
    assert found[f"{report.GPU_224.name}: at least 2x timm"] == ("not measured", "not measured")
    _, row, *others = table_in((tmp_path / "README.md").read_text(), 1)
    assert row[1:] == [
        "100.0 (99.0 to 101.0)",
        "90.0 (89.0 to 91.0)",
        "96.0 (95.0 to 97.0)",
        "97.0 (96.0 to 98.0)",
        "80.0 (79.0 to 81.0)",
        "not measured",
    ]
    assert [other[0] for other in others] == [report.GPU_224.name, report.GPU_32.name]


def test_memory_that_creeps_up_is_told(tmp_path):
    result = made_up_result(report.CPU_32.where, {"bare step": 100.0}, host_bytes_by_epoch=[200, 202, 204, 206])
    report.write_result(result, tmp_path)
    assert verdicts(tmp_path)["host memory grows by at most 1% over the epochs"] == ("+1.98%", "missed")


def test_targets_of_a_gpu(tmp_path):
    speeds = {
        "bare step": 20_000.0,
        report.OURS[0]: 3_000.0,
        report.OURS[1]: 16_000.0,
        "timm": 8_000.0,
        report.PUBLISHED_BASELINE: 1_700.0,
    }
    result = made_up_result(report.GPU_224.where, speeds)
    report.write_result(result, tmp_path)
    found = verdicts(tmp_path)
    assert found[f"{report.GPU_224.name}: at least 2x timm"] == ("2.00", "met")
    assert found[f"{report.GPU_224.name}: at least 10x the published baseline's loop"] == ("9.4", "missed")
    assert found[f"{report.GPU_224.name}: at least 15,000 images/s with the teacher"] == ("16,000", "met")
    assert found[f"{report.GPU_224.name}: at least 85% of the bare step"] == ("80.0%", "missed")
    assert found[f"{report.GPU_224.name}: at most 40 GB on the device"] == ("39.0", "met")
    assert found[f"{report.GPU_32.name}: at least 40,000 images/s"] == ("not measured", "not measured")


def test_a_contender_that_failed_says_so_and_leaves_its_targets_not_measured(tmp_path):
    result = made_up_result(report.CPU_32.where, {"bare step": 100.0, report.OURS[0]: 99.0})
    result["rows"].append({"name": "timm", "failed": "OutOfMemoryError: 40 GB"})
    file = report.write_result(result, tmp_path)
    assert table_in(file.read_text())[-1][:2] == ["timm", "failed: OutOfMemoryError: 40 GB"]
    assert verdicts(tmp_path)[f"{report.CPU_32.name}: at least as fast as timm"] == ("not measured", "not measured")


def test_the_targets_of_two_cores_are_not_for_other_settings(tmp_path):
    speeds = {"bare step": 100.0, report.OURS[0]: 99.0}
    for change in ({"threads": 8}, {"recipe": "light"}, {"teacher": "test_resnet"}, {"batch_size": 64}):
        report.write_result(made_up_result(report.CPU_32.where | change, speeds), tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 4  # none has replaced another
    assert verdicts(tmp_path)[f"{report.CPU_32.name}: at least 95% of the bare step"] == ("not measured",) * 2

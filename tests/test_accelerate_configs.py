"""The files in accelerate_configs/, checked against accelerate itself.

Every file goes through accelerate's own config class and launch command, up to the launcher that starts processes.
The files for GPUs stop there: their FSDP and DeepSpeed plugins are built from the environment that `accelerate launch`
would hand to train_hf.py, which needs neither GPUs nor DeepSpeed. The files for CPUs are really launched.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, StateDictType


CONFIGS = Path(__file__).resolve().parents[1] / "accelerate_configs"

# file: (distributed_type, mixed_precision, num_machines, num_processes, the launcher that `accelerate launch` picks)
EXPECTED = {
    "cpu": (DistributedType.NO, "no", 1, 1, "simple_launcher"),
    "cpu_two_processes": (DistributedType.MULTI_GPU, "no", 1, 2, "multi_gpu_launcher"),
    "one_gpu_fp16": (DistributedType.NO, "fp16", 1, 1, "simple_launcher"),
    "multi_gpu_fp16": (DistributedType.MULTI_GPU, "fp16", 1, 2, "multi_gpu_launcher"),
    "fsdp2_bf16": (DistributedType.FSDP, "bf16", 1, 2, "multi_gpu_launcher"),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, "fp16", 1, 2, "deepspeed_launcher"),
    "multi_machine_fp16": (DistributedType.MULTI_GPU, "fp16", 2, 16, "multi_gpu_launcher"),
}


@pytest.fixture
def launched(monkeypatch):
    """Runs `accelerate launch` up to the launcher that it picks; returns the launcher's name and arguments."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def run(config: str, *flags: str):
        calls = []
        for name in ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher"):
            monkeypatch.setattr(launch, name, lambda args, name=name: calls.append((name, args)))
        command = ["--config_file", str(CONFIGS / f"{config}.yaml"), *flags, "train_hf.py", "--distill_mode", "hard"]
        launch.launch_command(launch.launch_command_parser().parse_args(command))
        (call,) = calls
        return call

    return run


@pytest.fixture
def enter(monkeypatch):
    """Gives this process an environment prepared by `accelerate launch`."""

    def set_all(environment: dict[str, str]):
        for name, value in environment.items():
            if name.startswith(("ACCELERATE_", "FSDP_")):
                monkeypatch.setenv(name, value)

    return set_all


def test_every_file_is_covered_here():
    assert {path.stem for path in CONFIGS.iterdir()} == set(EXPECTED)


@pytest.mark.parametrize("config", EXPECTED)
def test_first_line_says_what_the_file_is_for_and_shows_its_command(config):
    first_line = (CONFIGS / f"{config}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first_line.startswith("# ")
    assert f": accelerate launch --config_file accelerate_configs/{config}.yaml train_hf.py" in first_line


@pytest.mark.parametrize("config", EXPECTED)
def test_accelerate_reads_the_file(config):
    distributed_type, mixed_precision, num_machines, num_processes, _ = EXPECTED[config]
    cluster = load_config_from_file(str(CONFIGS / f"{config}.yaml"))
    assert isinstance(cluster, ClusterConfig)
    assert cluster.distributed_type == distributed_type
    assert cluster.mixed_precision == mixed_precision
    assert cluster.num_machines == num_machines
    assert cluster.num_processes == num_processes
    assert cluster.use_cpu == config.startswith("cpu")
    assert bool(cluster.fsdp_config) == (config == "fsdp2_bf16")
    assert bool(cluster.deepspeed_config) == (config == "deepspeed_zero2")


@pytest.mark.parametrize("config", EXPECTED)
def test_an_unknown_key_fails(config, tmp_path):
    path = tmp_path / f"{config}.yaml"
    path.write_text((CONFIGS / f"{config}.yaml").read_text(encoding="utf-8") + "num_procesess: 4\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"unknown keys \(\['num_procesess'\]\)"):
        load_config_from_file(str(path))


@pytest.mark.parametrize("config", EXPECTED)
def test_every_nested_key_is_a_flag_of_accelerate_launch(config):
    """accelerate checks only a file's outer keys; it would silently drop a mistyped inner one."""
    flags = vars(launch.launch_command_parser().parse_args(["train_hf.py"]))
    values = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text(encoding="utf-8"))
    nested = [key for value in values.values() if isinstance(value, dict) for key in value]
    assert [key for key in nested if key not in flags] == []


@pytest.mark.parametrize("config", EXPECTED)
def test_accelerate_launch_accepts_the_file_and_picks_its_launcher(config, launched):
    _, mixed_precision, num_machines, num_processes, launcher = EXPECTED[config]
    name, args = launched(config)
    assert name == launcher
    assert args.mixed_precision == mixed_precision
    assert (args.num_machines, args.num_processes) == (num_machines, num_processes)
    assert args.training_script_args == ["--distill_mode", "hard"]


@pytest.mark.parametrize("config", EXPECTED)
def test_accelerate_launch_warns_of_no_missing_value(config, launched, caplog):
    """Except the number of CPU threads, which only `--num_cpu_threads_per_process` or OMP_NUM_THREADS can set."""
    launched(config, "--num_cpu_threads_per_process", "1")
    assert caplog.text == ""


def test_command_line_overrides_the_file(launched):
    _, args = launched("multi_gpu_fp16", "--num_processes", "8", "--mixed_precision", "no")
    assert (args.num_processes, args.mixed_precision) == (8, "no")


def test_one_gpu_config_uses_one_gpu_even_if_there_are_more(launched):
    _, args = launched("one_gpu_fp16")
    _, environment = prepare_simple_launcher_cmd_env(args)
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "fp16"
    assert environment["ACCELERATE_USE_CPU"] == "False"


@pytest.mark.parametrize("config", ["cpu_two_processes", "multi_gpu_fp16", "fsdp2_bf16"])
def test_one_machine_uses_any_free_port(config, launched):
    _, args = launched(config)
    prepare_multi_gpu_env(args)
    assert args.nproc_per_node == "2"
    assert int(args.master_port) > 0
    assert "rdzv_endpoint" not in args


@pytest.mark.parametrize("rank", [0, 1])
def test_several_machines_meet_at_machine_0(rank, launched):
    flags = ["--machine_rank", str(rank), "--main_process_ip", "192.168.7.1", "--main_process_port", "29607"]
    _, args = launched("multi_machine_fp16", *flags)
    environment = prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", rank)
    assert args.rdzv_endpoint == "192.168.7.1:29607"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "fp16"


def test_fsdp2_plugin_shards_weights_and_saves_a_full_model(launched, enter, caplog):
    _, args = launched("fsdp2_bf16")
    enter(prepare_multi_gpu_env(args))
    with caplog.at_level(logging.WARNING):
        plugin = FullyShardedDataParallelPlugin()
    assert caplog.text == ""  # version 2 warns about each version 1 option that it drops
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT  # or Trainer.save_model would write no weights
    assert plugin.cpu_ram_efficient_loading is False  # or the teacher would have no weights on most GPUs
    assert type(plugin.cpu_offload) is OffloadPolicy  # the policy that offloads nothing
    assert plugin.activation_checkpointing is False
    plugin.set_mixed_precision(os.environ["ACCELERATE_MIXED_PRECISION"])
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16
    )


@pytest.mark.parametrize("student", ["deit_ti", "resnet18"])
def test_fsdp2_accepts_both_the_student_and_a_cnn(launched, enter, student):
    from building import image_processor

    from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
    from modeling_deit_ti.classifiers import new_timm_classifier

    _, args = launched("fsdp2_bf16")
    enter(prepare_multi_gpu_env(args))
    if student == "deit_ti":
        model = DeiTTiForImageClassification(DeiTTiConfig())
    else:
        model = new_timm_classifier(student, ["a", "b"], 32, image_processor(32))
    assert fsdp2_prepare_auto_wrap_policy(FullyShardedDataParallelPlugin(), model) is None


def test_deepspeed_plugin_is_zero_2_in_fp16_and_leaves_the_rest_to_trainer(launched, enter):
    _, args = launched("deepspeed_zero2")
    _, environment = prepare_deepspeed_cmd_env(args)
    enter(environment)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert "ACCELERATE_DEEPSPEED_CONFIG_FILE" not in environment
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(environment["ACCELERATE_MIXED_PRECISION"])
    assert plugin.zero_stage == 2
    assert (plugin.offload_optimizer_device, plugin.offload_param_device) == ("none", "none")
    assert plugin.zero3_init_flag is False
    assert plugin.deepspeed_config["fp16"]["enabled"] is True
    assert plugin.deepspeed_config["bf16"]["enabled"] is False
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert plugin.deepspeed_config[key] == "auto"


# What train_hf.py would see: TrainingArguments come first, as they do there, then Trainer's Accelerator.
SCRIPT = """
import json, sys
import torch
from accelerate import Accelerator
from transformers import HfArgumentParser, TrainingArguments

folder = sys.argv.pop(1)
(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
accelerator = Accelerator()
tensor = torch.tensor([accelerator.process_index + 1.0], device=accelerator.device)
seen = {
    "world_size": args.world_size,
    "device": args.device.type,
    "distributed_type": str(accelerator.distributed_type.value),
    "backend": accelerator.state.backend,
    "mixed_precision": accelerator.mixed_precision,
    "threads": torch.get_num_threads(),
    "sum": accelerator.reduce(tensor).item(),
}
with open(f"{folder}/{accelerator.process_index}.json", "w") as file:
    json.dump(seen, file)
accelerator.end_training()
"""


def launch_script(config: str, folder: Path, *flags: str) -> list[dict]:
    """Runs SCRIPT with `accelerate launch`, one CPU thread per process; returns what each process saw, by rank."""
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_cpu_threads_per_process", "1"]
    command += [str(folder / "script.py"), str(folder), "--output_dir", str(folder / "out"), *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_cpu_config_is_one_process_without_a_gpu(tmp_path):
    assert launch_script("cpu", tmp_path) == [
        {
            "world_size": 1,
            "device": "cpu",
            "distributed_type": "NO",
            "backend": None,
            "mixed_precision": "no",
            "threads": 1,
            "sum": 1.0,
        }
    ]


def test_cpu_two_processes_talk_over_gloo(tmp_path):
    both = {
        "world_size": 2,
        "device": "cpu",
        "distributed_type": "MULTI_CPU",
        "backend": "gloo",
        "mixed_precision": "no",
        "threads": 1,
        "sum": 3.0,
    }
    assert launch_script("cpu_two_processes", tmp_path, "--use_cpu") == [both, both]

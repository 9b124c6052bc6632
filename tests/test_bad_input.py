"""Every mistake we could think of, made with the real command: exit code, message, and what it must not touch."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from building import DIGITS, image_processor
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from real_command import REPOSITORY, Run, run
from safetensors.torch import load_file
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from modeling_deit_ti.checkpoints import last_complete, seal
from modeling_deit_ti.classifiers import new_timm_classifier


QUICK = [
    "--dataset_name=digits",
    "--max_train_samples=64",
    "--max_eval_samples=32",
    "--image_size=32",
    "--model_name_or_path=test_resnet",
    "--num_train_epochs=1",
    "--per_device_train_batch_size=32",
    "--teacher_model_name_or_path=test_resnet",
    "--teacher_num_train_epochs=1",
    "--disable_tqdm=true",
    "--save_strategy=no",
    "--output_dir=run",
]
HARD = "--distill_mode=hard"


def fresh(*flags: str, cwd: Path, launcher: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess:
    """Runs the command in a process that is not forked."""
    return subprocess.run(
        [sys.executable, *launcher, str(REPOSITORY / "train_hf.py"), *flags],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """The bytes of every file, and `None` for every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def message_of(result: subprocess.CompletedProcess) -> str:
    """The command's message, which must be a single line, and the last."""
    assert "Traceback" not in result.stderr, result.stderr
    lines = result.stderr.strip().splitlines()
    assert [line for line in lines if "train_hf.py: error:" in line] == lines[-1:], result.stderr
    return lines[-1].removeprefix("train_hf.py: error: ")


# ---- What is in the folder where the command runs ----


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """A PNG; `size` is its rows and columns."""
    file = io.BytesIO()
    PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def parquet(labels=(0, 1) * 8, kind=None, names=("cat", "dog"), images=None, splits=("train", "test")) -> Callable:
    """`data/` with one Parquet file per split."""

    def write(folder: Path) -> None:
        (folder / "data").mkdir(exist_ok=True)
        features = Features({"image": Image(decode=False), "label": kind or ClassLabel(names=list(names))})
        encoded = images if images is not None else [picture(index) for index in range(len(labels))]
        encoded = [image if image is None else {"bytes": image, "path": None} for image in encoded]
        rows = Dataset.from_dict({"image": encoded, "label": list(labels)}, features=features)
        for split in splits:
            rows.cast_column("image", Image()).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")

    return write


def files(**contents: bytes) -> Callable:
    """Writes these files. `__` in a name means `/`; a trailing one makes an empty folder."""

    def write(folder: Path) -> None:
        for name, content in contents.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if name.endswith("__") else path.write_bytes(content)

    return write


def one_then(image: bytes | None) -> Callable:
    return parquet(images=[picture(0), image] * 8)


def cut_parquet(folder: Path) -> None:
    parquet()(folder)
    path = folder / "data" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-200])


def different_labels(folder: Path) -> None:
    parquet(splits=["train"])(folder)
    parquet(names=["cat", "emu"], splits=["test"])(folder)


def decompression_bomb() -> bytes:
    """A PNG with 40,000 x 40,000 pixels in one megabyte."""
    file = io.BytesIO()
    PILImage.new("1", (40_000, 40_000)).save(file, "PNG")
    return file.getvalue()


def teacher(**changes) -> Callable:
    """`teacher/`: an untrained classifier of the digits, with changes to its config."""

    def write(folder: Path) -> None:
        new_timm_classifier("test_resnet", DIGITS, 32, image_processor(32)).save_pretrained(folder / "teacher")
        path = folder / "teacher" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return write


class Bomb:
    """Leaves a file behind when unpickled."""

    def __reduce__(self):
        return open, ("exploded", "w")


def pickled_teacher(folder: Path) -> None:
    teacher()(folder)
    (folder / "teacher" / "model.safetensors").unlink()
    torch.save(Bomb(), folder / "teacher" / "pytorch_model.bin")


def cut_teacher(folder: Path) -> None:
    teacher()(folder)
    path = folder / "teacher" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def remote_code_teacher(folder: Path, labels: list[str] = DIGITS) -> None:
    """`teacher/`: a ResNet that brings its own classes. Their code leaves `ran` behind."""
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
    )
    ResNetForImageClassification(config).save_pretrained(folder / "teacher")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "teacher")
    path = folder / "teacher" / "config.json"
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForImageClassification": "own.OwnModel"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "own", "auto_map": auto_map}))
    (folder / "teacher" / "own.py").write_text(
        "from transformers import ResNetConfig, ResNetForImageClassification\n\n"
        f"open({str(folder / 'ran')!r}, 'w').close()\n\n\n"
        "class OwnConfig(ResNetConfig):\n    model_type = 'own'\n\n\n"
        "class OwnModel(ResNetForImageClassification):\n    config_class = OwnConfig\n"
    )


def transformers_vit(folder: Path) -> None:
    """`vit/`: transformers' ViT in the size of a DeiT-Ti, with its own epsilon."""
    size = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3, "image_size": 32}
    ViTForImageClassification(ViTConfig(**size, id2label=dict(enumerate(DIGITS)))).save_pretrained(folder / "vit")


def billions_in_yaml() -> bytes:
    """Ten lines, each a list of nine references to the line before."""
    lines = [
        b"a0: &a0 [1, 2]",
        *(b"a%d: &a%d [%s]" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 10)),
    ]
    return b"\n".join(lines)


def flipped_checkpoint(folder: Path) -> None:
    files(**{"run__checkpoint-10__model.safetensors": b"weights", "run__checkpoint-10__optimizer.pt": b"state"})(
        folder
    )
    seal(folder / "run" / "checkpoint-10")
    (folder / "run" / "checkpoint-10" / "optimizer.pt").write_bytes(b"stbte")


def nothing(folder: Path) -> None:
    pass


# ---- The mistakes ----

DATA = "--dataset_name=data"
TEACHER = "--teacher_model_name_or_path=teacher"
BEST = ["--load_best_model_at_end", "--save_strategy=epoch"]

# What is in the folder, the flags on top of QUICK, and what the message must contain.
MISTAKES = {
    # The dataset
    "dataset missing": (nothing, ["--dataset_name=./nowhere"], ["--dataset_name ./nowhere", "no such folder"]),
    "dataset unreachable": (nothing, ["--dataset_name=nobody/nothing"], ["nobody/nothing", "To run offline"]),
    "dataset name empty": (nothing, ["--dataset_name="], ["--dataset_name"]),
    "dataset is a file": (files(data=b"x"), [DATA], ["--dataset_name data", "is a file"]),
    "dataset folder empty": (files(data__=b""), [DATA], ["--dataset_name data", "doesn't contain any data files"]),
    "unsupported dataset files": (files(data__a=b"x"), [DATA], ["--dataset_name data", "No (supported) data files"]),
    "dataset of text files": (
        files(**{"data__cat__a.txt": b"x", "data__dog__b.txt": b"y"}),
        [DATA],
        ["no image column", "text (string)"],
    ),
    "dataset with a script": (
        files(**{"data__data.py": b"open('exploded', 'w')"}),
        [DATA],
        ["--dataset_name data", "scripts are no longer supported"],
    ),
    "Parquet file cut off": (cut_parquet, [DATA], ["--dataset_name data", "Parquet magic bytes not found"]),
    "Parquet file empty": (
        files(**{"data__train-0.parquet": b""}),
        [DATA],
        ["--dataset_name data", "file size is 0 bytes"],
    ),
    "split without rows": (parquet(labels=[]), [DATA], ["--dataset_name data", "no data"]),
    "one image to split": (parquet(labels=[0], splits=["train"]), [DATA], ["1 images", "too few to hold some out"]),
    "no training split": (parquet(splits=["test"]), [DATA], ["no split `train`", "test"]),
    "no such image column": (
        nothing,
        ["--image_column_name=photo"],
        ["--image_column_name photo", "the columns are image, label"],
    ),
    "image column holds labels": (
        nothing,
        ["--image_column_name=label"],
        ["holds ClassLabel, not images", "images are in image"],
    ),
    "no such label column": (
        nothing,
        ["--label_column_name=kind"],
        ["--label_column_name kind", "the columns are image, label"],
    ),
    "held-out share out of range": (nothing, ["--train_val_split=1"], ["--train_val_split 1.0"]),
    "no samples": (nothing, ["--max_train_samples=0"], ["--max_train_samples 0"]),
    # Its labels
    "labels differ between splits": (different_labels, [DATA], ["labels differ: 'dog', 'emu'"]),
    "label missing": (parquet(labels=[0, 1, None]), [DATA], ["Split `train`, row 2", "missing"]),
    "all labels missing": (parquet(labels=[None] * 4), [DATA], ["Split `train`, row 0", "missing"]),
    "negative label": (parquet(labels=[0, -1]), [DATA], ["Split `train`, row 1", "label is -1"]),
    "labels are floats": (
        parquet(labels=[0.5, 1], kind=Value("float32")),
        [DATA],
        ["--label_column_name label", "float32"],
    ),
    "labels are booleans": (
        parquet(labels=[True, False], kind=Value("bool")),
        [DATA],
        ["--label_column_name label", "bool"],
    ),
    "only one label": (
        parquet(labels=["cat"] * 4, kind=Value("string")),
        [DATA],
        ["has only the labels ['cat']", "a classifier needs at least two"],
    ),
    # Its images
    "image missing": (one_then(None), [DATA], ["Split `train`, row 1", "it is missing"]),
    "image empty": (one_then(b""), [DATA], ["Split `train`, row 1", "cannot identify image"]),
    "image cut off": (one_then(picture(1)[:100]), [DATA], ["Split `train`, row 1", "cannot be decoded"]),
    "not an image": (
        files(**{"data__cat__0.png": picture(0), "data__dog__1.png": b"not an image"}),
        [DATA],
        ["cannot identify image", "1.png"],
    ),
    "decompression bomb": (one_then(decompression_bomb()), [DATA], ["Split `train`, row 1", "decompression bomb"]),
    "image far too wide": (one_then(picture(1, (1, 201))), [DATA], ["Split `train`, row 1", "201x1 pixels"]),
    "images of different sizes on the device": (
        parquet(images=[picture(0), picture(1, (5, 5))] * 8),
        [DATA, "--augment_on=device"],
        ["--augment_on device", "not all of one size"],
    ),
    # The student
    "patch does not divide the image": (
        nothing,
        ["--model_name_or_path=deit_ti", "--image_size=30", "--patch_size=8"],
        ["--patch_size 8 does not divide --image_size 30"],
    ),
    "image size 0": (nothing, ["--image_size=0"], ["--image_size 0"]),
    "image size below 0": (nothing, ["--image_size=-1"], ["--image_size -1"]),
    "image size 1": (nothing, ["--image_size=1"], ["--image_size 1"]),
    "image size enormous": (
        nothing,
        ["--model_name_or_path=deit_ti", "--image_size=100000000", "--patch_size=1"],
        ["--image_size 100000000", "do not fit into memory"],
    ),
    "drop path nan": (nothing, ["--drop_path_rate=nan"], ["--drop_path_rate", "nan is not a finite number"]),
    "all patches dropped": (nothing, ["--patch_drop_rate=1"], ["--patch_drop_rate", "at least 0 and below 1"]),
    "model missing": (nothing, ["--model_name_or_path=nowhere"], ["--model_name_or_path nowhere"]),
    "model with one head for two tokens": (nothing, ["--distill_mode=both"], ["test_resnet has one head"]),
    "model is not a DeiT": (
        teacher(),
        ["--distill_mode=both", "--model_name_or_path=teacher"],
        ["test_resnet is not a DeiT"],
    ),
    "export of another classifier": (
        teacher(),
        ["--model_name_or_path=teacher", "--export=timm"],
        ["--export is for a DeiT-Ti, and --model_name_or_path teacher is not one"],
    ),
    "timm export with another epsilon": (
        transformers_vit,
        ["--model_name_or_path=vit", "--export=timm"],
        ["timm's DeiT has layer_norm_eps 1e-06, but the model has 1e-12"],
    ),
    "patch of other weights does not divide the image": (
        transformers_vit,
        ["--model_name_or_path=vit", "--image_size=30", "--patch_size=16"],
        ["--patch_size 16 does not divide --image_size 30"],
    ),
    "batch norm over one image": (nothing, ["--max_train_samples=1"], ["test_resnet", "batches of 1 images"]),
    # The teacher
    "teacher missing": (nothing, [HARD, "--teacher_model_name_or_path=nowhere"], ["nowhere", "no such folder"]),
    "teacher folder empty": (files(teacher__=b""), [HARD, TEACHER], ["--teacher_model_name_or_path teacher"]),
    "teacher untrained": (
        teacher(),
        [HARD, TEACHER],
        ["The teacher teacher", "no better than chance: its accuracy", "--teacher_num_train_epochs"],
    ),
    "teacher with only some of the labels": (
        teacher(label_names=[*DIGITS[:9], "nine"]),
        [HARD, TEACHER],
        ["cannot be matched to the dataset's", "9 of 10", "'9'", "'nine'"],
    ),
    "teacher must not be fitted": (
        teacher(label_names=list("abcdefghij")),
        [HARD, TEACHER, "--teacher_num_train_epochs=0"],
        ["--teacher_num_train_epochs 0 forbids"],
    ),
    "untrained teacher without pretrained weights": (
        nothing,
        [HARD, "--allow_untrained_teacher", "--teacher_num_train_epochs=0"],
        ["--teacher_num_train_epochs 0 forbids", "add --teacher_pretrained"],
    ),
    "standardized targets for two labels": (
        parquet(),
        [DATA, HARD.replace("hard", "soft"), "--teacher_targets=standardized"],
        ["--teacher_targets standardized", "two standardised logits"],
    ),
    "teacher cut off": (cut_teacher, [HARD, TEACHER], ["--teacher_model_name_or_path teacher", "SafetensorError"]),
    "teacher pickled": (
        pickled_teacher,
        [HARD, TEACHER],
        ["--teacher_model_name_or_path teacher", "no file named model.safetensors"],
    ),
    "teacher with remote code": (
        remote_code_teacher,
        [HARD, TEACHER],
        ["--teacher_model_name_or_path teacher", "--trust_remote_code"],
    ),
    "teacher config of wrong type": (teacher(id2label=7), [HARD, TEACHER], ["--teacher_model_name_or_path teacher"]),
    "teacher config nonsensical": (
        teacher(pretrained_cfg={"input_size": "large"}),
        [HARD, TEACHER],
        ["The teacher teacher"],
    ),
    "teacher config is not JSON": (
        files(**{"teacher__config.json": b"{"}),
        [HARD, TEACHER],
        ["--teacher_model_name_or_path teacher", "not a valid JSON"],
    ),
    "teacher learning rate below 0": (nothing, [HARD, "--teacher_learning_rate=-1"], ["--teacher_learning_rate -1.0"]),
    "teacher learning rate nan": (nothing, [HARD, "--teacher_learning_rate=nan"], ["--teacher_learning_rate", "nan"]),
    "teacher epochs below 0": (nothing, [HARD, "--teacher_num_train_epochs=-1"], ["--teacher_num_train_epochs -1.0"]),
    "teacher image size 0": (nothing, [HARD, "--teacher_image_size=0"], ["--teacher_image_size 0"]),
    # The flags
    "unknown flag": (nothing, ["--distil_mode=hard"], ["unknown flag --distil_mode=hard", "--distill_mode?"]),
    "unknown mode": (nothing, ["--distill_mode=medium"], ["invalid choice: 'medium'", "'none', 'soft'"]),
    "option for another mode": (nothing, ["--distillation_alpha=0.5"], ["distillation_alpha does not apply to mode"]),
    "alpha above 1": (
        nothing,
        [HARD, "--distillation_alpha=2"],
        ["distillation_alpha must be between 0 and 1, not 2.0"],
    ),
    "temperature 0": (
        nothing,
        ["--distill_mode=soft", "--distillation_temperature=0"],
        ["distillation_temperature must be above 0"],
    ),
    "temperature inf": (
        nothing,
        ["--distill_mode=soft", "--distillation_temperature=inf"],
        ["--distillation_temperature", "inf is not a finite number"],
    ),
    "word as a number": (nothing, ["--learning_rate=fast"], ["--learning-rate", "invalid number value: 'fast'"]),
    "learning rate nan": (nothing, ["--learning_rate=nan"], ["--learning_rate", "nan is not a finite number"]),
    "learning rate below 0": (nothing, ["--learning_rate=-1"], ["--learning_rate -1.0"]),
    "mixup nan": (nothing, ["--mixup=nan"], ["--mixup", "nan is not a finite number"]),
    "mixup below 0": (nothing, ["--mixup=-1"], ["--mixup -1.0"]),
    "weight decay below 0": (nothing, ["--weight_decay=-1"], ["--weight_decay", "Invalid weight_decay value: -1"]),
    "beta above 1": (nothing, ["--adam_beta1=2"], ["--adam_*", "Invalid beta parameter"]),
    "warm-up below 0": (nothing, ["--warmup_steps=-1"], ["warmup_steps"]),
    "epochs 0": (nothing, ["--num_train_epochs=0"], ["--num_train_epochs 0.0"]),
    "epochs below 0": (nothing, ["--num_train_epochs=-1"], ["--num_train_epochs -1.0"]),
    "epochs nan": (nothing, ["--num_train_epochs=nan"], ["--num_train_epochs", "nan is not a finite number"]),
    "batch size 0": (nothing, ["--per_device_train_batch_size=0"], ["--per_device_train_batch_size 0"]),
    "evaluation batch size 0": (nothing, ["--per_device_eval_batch_size=0"], ["--per_device_eval_batch_size 0"]),
    "gradient accumulation 0": (nothing, ["--gradient_accumulation_steps=0"], ["--gradient_accumulation_steps 0"]),
    "workers below 0": (nothing, ["--dataloader_num_workers=-1"], ["--dataloader_num_workers -1"]),
    "persistent workers without workers": (nothing, ["--dataloader_persistent_workers"], ["--dataloader_num_workers"]),
    "seed below 0": (nothing, ["--seed=-1"], ["--seed -1"]),
    "seed too large": (nothing, [f"--seed={2**32}"], ["--seed 4294967296"]),
    "data seed below 0": (nothing, ["--data_seed=-5"], ["--data_seed -5"]),
    "unknown optimizer": (nothing, ["--optim=adams"], ["--optim", "invalid choice: 'adams'"]),
    "optimizer not installed": (nothing, ["--optim=adamw_bnb_8bit"], ["--optim adamw_bnb_8bit", "bitsandbytes"]),
    "bad optimizer arguments": (nothing, ["--optim_args=x"], ["--optim_args"]),
    "bad Muon arguments": (nothing, ["--optim=muon", "--optim_args=beta=1"], ["--optim_args beta=1", "ns_steps=5"]),
    "Muon beta above 1": (nothing, ["--optim=muon", "--adam_beta1=2"], ["--optim muon", "Invalid beta parameter"]),
    "unknown schedule": (nothing, ["--lr_scheduler_type=square"], ["square is not a valid SchedulerType"]),
    "schedule without its argument": (
        nothing,
        ["--lr_scheduler_type=cosine_with_min_lr"],
        ["--lr_scheduler_type cosine_with_min_lr", "min_lr"],
    ),
    "unknown reporter": (nothing, ["--report_to=nobody"], ["--report_to nobody", "tensorboard, trackio, wandb"]),
    "unknown policy": (nothing, ["--auto_augment=rnd-m9"], ["--auto_augment rnd-m9", "does not know this policy"]),
    "unknown metric": (
        nothing,
        [*BEST, "--metric_for_best_model=beauty"],
        ["--metric_for_best_model beauty", "loss, accuracy"],
    ),
    "metric for another mode": (
        nothing,
        [*BEST, "--metric_for_best_model=accuracy_both"],
        ["--metric_for_best_model accuracy_both"],
    ),
    "best model without evaluation": (
        nothing,
        [*BEST, "--eval_strategy=no"],
        ["--load_best_model_at_end", "save and eval strategy"],
    ),
    "best model without a metric": (nothing, ["--save_strategy=best"], ["--metric_for_best_model"]),
    "Trainer flag that is not offered": (
        nothing,
        ["--prediction_loss_only"],
        ["unknown flag --prediction_loss_only"],
    ),
    "unknown compile mode": (nothing, ["--torch_compile_mode=fastest"], ["--torch_compile_mode fastest"]),
    "DeepSpeed file missing": (nothing, ["--deepspeed=nowhere.json"], ["flags cannot be used"]),
    "accelerator file missing": (nothing, ["--accelerator_config=nowhere.json"], ["nowhere.json"]),
    "push without a token": (nothing, ["--push_to_hub"], ["--push_to_hub: cannot write to the repository"]),
    # The recipe
    "recipe missing": (nothing, ["--config=nowhere.yaml"], ["--config nowhere.yaml", "No such file"]),
    "recipe is a folder": (files(a__=b""), ["--config=a"], ["--config a", "Is a directory"]),
    "recipe is an image": (files(a=picture(0)), ["--config=a"], ["--config a", "cannot be read as YAML"]),
    "recipe is broken YAML": (files(a=b"a: b: c"), ["--config=a"], ["--config a", "cannot be read as YAML"]),
    "recipe with a NUL byte": (files(a=b"seed: \0"), ["--config=a"], ["--config a", "cannot be read as YAML"]),
    "recipe is a list": (files(a=b"- seed"), ["--config=a"], ["--config a", "`flag: value` lines"]),
    "recipe that expands to billions of values": (
        files(a=billions_in_yaml()),
        ["--config=a"],
        ["--config a", "cannot be read as YAML", "more than 10,000 values"],
    ),
    "recipe of deeply nested lists": (files(a=b"seed: " + b"[" * 9999), ["--config=a"], ["--config a", "recursion"]),
    "recipe that builds objects": (
        files(a=b"seed: !!python/object/apply:os.system ['touch exploded']"),
        ["--config=a"],
        ["--config a", "cannot be read as YAML", "could not determine a constructor"],
    ),
    "recipe empty": (files(a=b""), ["--config=a"], ["--config a", "`flag: value` lines"]),
    "recipe with an unknown key": (
        files(a=b"learning_rat: 1"),
        ["--config=a"],
        ["--config a", "unknown key 'learning_rat'", "--learning_rate?"],
    ),
    "recipe with a key that is not text": (files(a=b"2026-01-01: 1"), ["--config=a"], ["--config a", "unknown key"]),
    "recipe with a word as a number": (files(a=b"mixup: a lot"), ["--config=a"], ["--mixup", "'a lot'"]),
    "recipe with a list as a number": (files(a=b"mixup: [1, 2]"), ["--config=a"], ["2"]),
    "recipe with a mapping as a number": (files(a=b"mixup: {a: 1}"), ["--config=a"], ["--mixup"]),
    "recipe with nan": (files(a=b"mixup: .nan"), ["--config=a"], ["--mixup", "nan is not a finite number"]),
    "recipe that trusts remote code": (
        files(a=b"trust-remote-code: true"),
        ["--config=a"],
        ["--config a: trust-remote-code can only be set on the command line"],
    ),
    "teacher recipe missing": (
        nothing,
        [HARD, "--teacher_config=nowhere.yaml"],
        ["--teacher_config nowhere.yaml", "No such file"],
    ),
    "teacher recipe with a student-only key": (
        files(a=b"dataset_name: other"),
        [HARD, "--teacher_config=a"],
        ["--teacher_config a", "dataset_name cannot be set here"],
    ),
    "teacher recipe with an unknown optimizer": (
        files(a=b"optim: adams"),
        [HARD, "--teacher_config=a"],
        ["--teacher_config a", "--optim", "invalid choice: 'adams'"],
    ),
    # The output folder
    "output name empty": (nothing, ["--output_dir="], ["--output_dir"]),
    "output is a file": (files(run=b"mine"), [], ["--output_dir run", "this is a file"]),
    "output below a file": (
        files(a=b"mine"),
        ["--output_dir=a/run"],
        ["--output_dir a/run", "nothing can be written"],
    ),
    "teachers below a file": (
        files(a=b"mine"),
        [HARD, "--teacher_output_dir=a/teachers"],
        ["--teacher_output_dir a/teachers", "nothing can be written"],
    ),
    "output of a finished run": (files(**{"run__all_results.json": b"{}"}), [], ["already holds a finished run"]),
    "output of an unfinished run": (
        files(**{"run__checkpoint-10__": b""}),
        ["--resume_from_checkpoint=false"],
        ["--output_dir run", "unfinished run: choose another folder, or leave out --resume_from_checkpoint"],
    ),
    "output with someone else's card": (
        files(**{"run__README.md": b"mine"}),
        [],
        ["--output_dir run", "README.md would be overwritten"],
    ),
    "checkpoint missing": (nothing, ["--resume_from_checkpoint=nowhere"], ["--resume_from_checkpoint nowhere"]),
    "checkpoint incomplete": (
        files(**{"run__checkpoint-10__trainer_state.json": b'{"epoch": 1.'}),
        ["--resume_from_checkpoint=run/checkpoint-10"],
        ["--resume_from_checkpoint run/checkpoint-10", "not a complete checkpoint", "was being written"],
    ),
    "checkpoint with a flipped bit": (
        flipped_checkpoint,
        ["--resume_from_checkpoint=run/checkpoint-10"],
        ["--resume_from_checkpoint run/checkpoint-10", "not a complete checkpoint", "its optimizer.pt is damaged"],
    ),
}
if not torch.cuda.is_available():
    MISTAKES["fp16 without a GPU"] = (nothing, ["--fp16"], ["fp16", "no GPU"])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_message_and_touches_nothing(mistake, tmp_path):
    prepare, flags, named = MISTAKES[mistake]
    prepare(tmp_path)
    before = snapshot(tmp_path)
    result = run(*QUICK, *flags, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    message = message_of(result)
    for part in named:
        assert part in message
    after = snapshot(tmp_path)
    if mistake == "teacher untrained":  # only found after the Trainer has made its folder
        assert after.pop("run") is None
    assert after == before


@pytest.mark.parametrize("mistake", ["image cut off", "teacher pickled", "seed below 0", "recipe with nan"])
def test_a_forked_command_ends_like_a_fresh_one(mistake, tmp_path):
    prepare, flags, _ = MISTAKES[mistake]
    prepare(tmp_path)
    before = snapshot(tmp_path)
    results = [start(*QUICK, *flags, cwd=tmp_path) for start in (fresh, run)]
    assert [result.returncode for result in results] == [2, 2]
    assert message_of(results[0]) == message_of(results[1])
    assert snapshot(tmp_path) == before


def test_accelerate_launch_passes_the_message_on_and_exits_with_code_1(tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "-q", "--cpu", "--num_processes=1")
    result = fresh(*QUICK, "--seed=-1", cwd=tmp_path, launcher=launcher)
    assert result.returncode == 1
    assert message_of(result).startswith("--seed -1: ")
    assert not snapshot(tmp_path)


# ---- Full and read-only disks ----


@pytest.fixture
def disk(tmp_path):
    """Mounts a separate disk at `tmp_path/disk`, with `mount`'s options for tmpfs."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"needs root to mount a disk: {done.stderr.strip()}")
        return folder

    yield mount
    while os.path.ismount(folder):
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(not shutil.which("mount"), reason="needs mount")
class TestDisk:
    def test_read_only_folders_are_detected_before_training(self, disk, tmp_path):
        disk("ro")
        for flags in (["--output_dir=disk/run"], [HARD, "--teacher_output_dir=disk/teachers"]):
            result = run(*QUICK, *flags, cwd=tmp_path)
            assert result.returncode == 2
            message = message_of(result)
            assert message.startswith(flags[-1].replace("=", " ") + ": nothing can be written there")
            assert "Read-only file system" in message
        assert not (tmp_path / "run").exists()

    def test_a_full_disk_is_detected_before_training(self, disk, tmp_path):
        disk("size=64k")
        (tmp_path / "disk" / "mine").write_bytes(bytes(64 * 1024))
        result = run(*QUICK, "--output_dir=disk/run", cwd=tmp_path)
        assert result.returncode == 2
        assert "--output_dir disk/run: nothing can be written there" in message_of(result)
        assert os.listdir(tmp_path / "disk") == ["mine"]

    def test_a_disk_that_fills_up_leaves_the_last_checkpoint_to_resume_from(self, disk, tmp_path):
        disk("size=8m")  # room for one checkpoint, not for two
        flags = [*QUICK, "--output_dir=disk/run", "--save_strategy=epoch", "--num_train_epochs=3"]
        result = run(*flags, cwd=tmp_path)
        assert result.returncode == 1, result.stderr
        message = message_of(result)
        assert message.startswith("disk/run cannot be written to (") and "run the same command again" in message
        before = snapshot(tmp_path / "disk" / "run" / "checkpoint-2")
        assert load_file(tmp_path / "disk" / "run" / "checkpoint-2" / "model.safetensors")

        disk("remount,size=64m")
        result = run(*flags, "--save_total_limit=9", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert snapshot(tmp_path / "disk" / "run" / "checkpoint-2") == before
        assert json.loads((tmp_path / "disk" / "run" / "all_results.json").read_text())["epoch"] == 3

    def test_a_disk_that_turns_read_only_leaves_the_last_checkpoint_to_resume_from(self, disk, tmp_path):
        """As happens when the kernel remounts a disk with errors."""
        disk("size=64m")
        flags = [*QUICK, "--output_dir=disk/run", "--save_strategy=epoch", "--num_train_epochs=3"]
        step = "modeling_deit_ti.trainer.DistillationTrainer.training_step"
        command = Run(*flags, cwd=tmp_path, fault={"function": step, "call": 3, "signum": signal.SIGSTOP})
        command.wait_until_stopped()
        disk("remount,ro")
        command.signal_group(signal.SIGCONT)
        result = command.wait()
        assert result.returncode == 1, result.stderr
        message = message_of(result)
        assert message.startswith("disk/run cannot be written to (Read-only file system)")
        assert last_complete(tmp_path / "disk" / "run").endswith("checkpoint-2")
        disk("remount,rw")
        result = run(*flags, cwd=tmp_path)
        assert result.returncode == 0 and "resuming from disk/run/checkpoint-2" in result.stdout, result.stderr

    def test_a_teacher_that_runs_out_of_disk_space_is_fitted_once_there_is_room(self, disk, tmp_path):
        disk("size=1m")
        flags = [*QUICK, HARD, "--teacher_output_dir=disk/teachers"]
        result = run(*flags, cwd=tmp_path)
        assert result.returncode == 1, result.stderr
        message = message_of(result)
        assert message.startswith("disk/teachers cannot be written to (") and "No space left on device" in message
        assert not list((tmp_path / "disk").glob("teachers/*/all_results.json"))
        disk("remount,size=64m")
        result = run(*flags, cwd=tmp_path)
        assert "is no better than chance" in message_of(result)  # after such a short fit
        assert len(list((tmp_path / "disk").glob("teachers/*/all_results.json"))) == 1

    def test_a_dataset_in_a_read_only_folder_can_be_trained_on(self, disk, tmp_path):
        features = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})
        images = [{"bytes": picture(index), "path": None} for index in range(16)]
        rows = Dataset.from_dict({"image": images, "label": [0, 1] * 8}, features=features)
        DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
        shutil.copytree(tmp_path / "saved", disk("size=8m"), dirs_exist_ok=True)
        disk("remount,ro")
        result = run(*QUICK, "--dataset_name=disk", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        before = snapshot(tmp_path / "saved")
        assert run(*QUICK, "--dataset_name=saved", "--output_dir=again", cwd=tmp_path).returncode == 0
        assert snapshot(tmp_path / "saved") == before

    @pytest.mark.parametrize("options", ["ro", "size=64k"])
    def test_an_unwritable_cache_is_named_in_the_message(self, options, disk, tmp_path):
        parquet(images=[picture(index, (100, 100)) for index in range(16)])(tmp_path)
        before = snapshot(tmp_path / "data")
        disk(options)
        result = fresh(*QUICK, DATA, cwd=tmp_path, HF_DATASETS_CACHE=str(tmp_path / "disk"))
        assert result.returncode == 2, result.stderr
        message = message_of(result)
        assert str(tmp_path / "disk") in message and "HF_DATASETS_CACHE" in message
        assert snapshot(tmp_path / "data") == before and not (tmp_path / "run").exists()


def test_a_file_size_limit_is_reported_like_a_full_disk(tmp_path):
    script = 'ulimit -f 1024; exec "$0" "$@"'  # the weights alone take 1.6 MB
    result = subprocess.run(
        ["bash", "-c", script, sys.executable, str(REPOSITORY / "train_hf.py"), *QUICK],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1, result.stderr
    assert message_of(result).startswith("run cannot be written to (")
    assert not (tmp_path / "run" / "all_results.json").exists()


def test_too_little_memory_ends_in_a_message_that_names_the_batch_size(tmp_path):
    flags = [*QUICK, "--model_name_or_path=deit_ti", "--image_size=224", "--patch_size=16"]
    result = run(*flags, "--per_device_train_batch_size=64", cwd=tmp_path, memory=2**30)
    assert result.returncode == 1, result.stderr
    message = message_of(result)
    assert message.startswith("out of memory (") and "--per_device_train_batch_size" in message


# ---- Checkpoints that hold more than data ----


def test_a_checkpoint_is_not_unpickled(tmp_path):
    """Whoever can write a checkpoint can also seal it: checksums detect accidents, not malice."""
    flags = [*QUICK, "--save_strategy=epoch", "--num_train_epochs=2"]
    assert run(*flags, cwd=tmp_path).returncode == 0
    shutil.move(tmp_path / "run" / "checkpoint-2", tmp_path / "checkpoint-2")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
        torch.save(Bomb(), tmp_path / "run" / "checkpoint-2" / name)
        seal(tmp_path / "run" / "checkpoint-2")
        result = run(*flags, cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        assert message_of(result).startswith("the checkpoint holds more than data and was not unpickled")
        assert not (tmp_path / "exploded").exists(), name
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    torch.save(Bomb(), tmp_path / "run" / "checkpoint-2" / "training_args.bin")  # written, but never read
    seal(tmp_path / "run" / "checkpoint-2")
    assert run(*flags, cwd=tmp_path).returncode == 0
    assert not (tmp_path / "exploded").exists()


# ---- Odd input that is not a mistake ----


def test_unseen_labels_are_reported_and_markup_in_names_does_not_break_the_card(tmp_path):
    names = ["<b>|`cat`\n---\n", "key: [value] # \u202e{{ x }}", "emu | <script>"]
    parquet(names=names)(tmp_path)
    result = run(*QUICK, DATA, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"Images: no training image is labelled {names[2]!r}\n" in result.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["label_names"] == names
    front_matter = (tmp_path / "run" / "README.md").read_text().split("\n---\n")[0]
    assert yaml.safe_load(front_matter)["pipeline_tag"] == "image-classification"


def test_training_works_with_thousands_of_labels_on_one_pixel_images(tmp_path):
    names = [f"species {index}" for index in range(3000)]
    parquet(labels=range(3000), names=names, images=[picture(i, (1, 1)) for i in range(3000)])(tmp_path)
    result = run(*QUICK, DATA, "--max_train_samples=5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "and 2985 more" in result.stdout
    assert load_file(tmp_path / "run" / "model.safetensors")["timm_model.fc.weight"].shape[0] == 3000


def test_training_works_with_one_image_in_batches_of_one(tmp_path):
    flags = ["--model_name_or_path=deit_ti", "--patch_size=16", "--per_device_train_batch_size=1"]
    result = run(*QUICK, *flags, "--max_train_samples=1", "--max_steps=1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 1


def test_a_label_whose_only_image_is_held_out_is_not_a_mistake(tmp_path):
    parquet(labels=list("abcdefgh"), kind=Value("string"), splits=["train"])(tmp_path)
    result = run(*QUICK, DATA, "--train_val_split=0.25", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("no training image is labelled") == 1
    assert len(json.loads((tmp_path / "run" / "config.json").read_text())["label_names"]) == 8
    # A user's own images are never shown.
    assert json.loads((tmp_path / "run" / "report.json").read_text())["mistakes"]
    assert not [name for name in ("mistakes.png", "example.png") if (tmp_path / "run" / name).exists()]


def test_remote_code_of_a_teacher_runs_if_trusted(tmp_path):
    remote_code_teacher(tmp_path, labels=["a", "b", "c"])
    fitting = ["--max_train_samples=1000", "--teacher_num_train_epochs=4", "--teacher_learning_rate=2e-2"]
    result = run(*QUICK, HARD, TEACHER, *fitting, "--trust_remote_code", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "ran").is_file()
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["teacher_accuracy"] > 0.3
    assert json.loads(Path(tmp_path, results["teacher_path"], "config.json").read_text())["model_type"] == "own"

"""Exports predict what the model predicts, in every mode, and load without this project; imports start a student."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from building import file_size_limit
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import resample_patch_embed
from transformers import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.classifiers import timm_hub_id
from modeling_deit_ti.distillation import resolve_mode
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.interop import load_student, save_timm, save_transformers, to_timm, to_transformers
from modeling_deit_ti.interop.__main__ import main
from modeling_deit_ti.interop.exports import timm_arguments, timm_preprocessing
from modeling_deit_ti.modeling_deit_ti import interpolate_position_embeddings


# Every mode, and its class in transformers.
MODES = {
    "none": (resolve_mode("none").network, ViTForImageClassification),
    "soft": (resolve_mode("soft").network, ViTForImageClassification),
    "hard": (resolve_mode("hard").network, ViTForImageClassification),
    "class": (resolve_mode("class").network, DeiTForImageClassification),
    "distill": (resolve_mode("distill").network, DeiTForImageClassification),
    "both": (resolve_mode("both").network, DeiTForImageClassificationWithTeacher),
    "class_alone": (resolve_mode("class", single_token=True).network, ViTForImageClassification),
    "distill_alone": (resolve_mode("distill", single_token=True).network, ViTForImageClassification),
}
LABELS = ["cat", "dog", "emu", "fox", "gnu"]


def make_config(mode: str, labels: list[str] = LABELS, **changes) -> DeiTTiConfig:
    small = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    return DeiTTiConfig(
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        **MODES[mode][0] | small | changes,
    )


def make_model(mode: str, labels: list[str] = LABELS, **changes) -> DeiTTiForImageClassification:
    """A model with no parameter at a value that could hide an error."""
    torch.manual_seed(0)
    model = DeiTTiForImageClassification(make_config(mode, labels, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_image_processor(image_size: int = 32) -> DeiTImageProcessor:
    return DeiTImageProcessor(
        size={"shortest_edge": round(image_size / 0.875)},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def make_images(size: int = 32) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model, images: torch.Tensor, **kwargs) -> torch.Tensor:
    output = model(images, **kwargs)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_same(logits: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    assert expected.std() > 0.1  # the logits vary
    torch.testing.assert_close(logits, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_transformers_class_predicts_the_same(mode):
    model = make_model(mode)
    exported = to_transformers(model)
    assert type(exported) is MODES[mode][1]
    assert_same(logits_of(exported, make_images()), logits_of(model, make_images()))
    for field in ("id2label", "label2id", "image_size", "patch_size", "layer_norm_eps", "hidden_size", "num_labels"):
        assert getattr(exported.config, field) == getattr(model.config, field), field


@pytest.mark.parametrize("mode", MODES)
def test_timm_model_predicts_the_same(mode):
    model = make_model(mode)
    assert_same(logits_of(to_timm(model), make_images()), logits_of(model, make_images()))


def test_transformers_with_teacher_has_the_logits_of_both_heads():
    model = make_model("both")
    with torch.no_grad():
        ours, theirs = model(make_images()), to_transformers(model)(make_images())
    assert_same(theirs.cls_logits, ours.class_logits)
    assert_same(theirs.distillation_logits, ours.distillation_logits)


def test_exports_of_one_head_do_not_depend_on_the_other():
    model = make_model("distill")
    before = logits_of(to_transformers(model), make_images())
    with torch.no_grad():
        model.class_head.weight.add_(1)
    torch.testing.assert_close(logits_of(to_transformers(model), make_images()), before)


def test_export_leaves_the_model_unchanged():
    model = make_model("distill").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exported = to_transformers(model)
    with torch.no_grad():
        for parameter in exported.parameters():
            parameter.zero_()
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("changes", [{"qkv_bias": False}, {"layer_norm_eps": 1e-3, "hidden_act": "relu"}], ids=str)
def test_transformers_export_follows_unusual_configs(changes):
    model = make_model("both", **changes)
    assert_same(logits_of(to_transformers(model), make_images()), logits_of(model, make_images()))


def test_timm_export_names_what_timm_does_not_support():
    with pytest.raises(UserError, match="layer_norm_eps 1e-06, but the model has 0.001"):
        to_timm(make_model("none", layer_norm_eps=1e-3))
    model = make_model("none", qkv_bias=False, intermediate_size=82)  # 48 * (82 / 48) is below 82 in floating point
    assert_same(logits_of(to_timm(model), make_images()), logits_of(model, make_images()))


def test_full_size_model_is_timms_and_transformers_own_architecture():
    full_size = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "image_size": 224}
    config = make_config("both", **full_size, patch_size=16)
    arguments = {"num_classes": 5, "img_size": 224, "patch_size": 16}
    assert timm_arguments(config) == {"model_name": "deit_tiny_distilled_patch16_224", **arguments}
    model = DeiTTiForImageClassification(config).eval()
    images = make_images(224)[:1]
    expected = logits_of(model, images)
    torch.testing.assert_close(logits_of(to_transformers(model), images), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits_of(to_timm(model), images), expected, atol=1e-5, rtol=0)
    one_head = make_config("distill", **full_size, patch_size=16)
    assert timm_arguments(one_head) == {"model_name": "deit_tiny_patch16_224", **arguments, "reg_tokens": 1}


# What a user without this project runs. Saves the logits of each mode and way of loading.
LOAD_ANYWHERE = """
import importlib.util, json, sys
import timm, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

assert importlib.util.find_spec("modeling_deit_ti") is None
root = Path(sys.argv[1])
images = load_file(root / "images.safetensors")["images"]
logits = {}
with torch.no_grad():
    for run in sorted(path for path in root.iterdir() if path.is_dir()):
        model = AutoModelForImageClassification.from_pretrained(run, subfolder="transformers")
        assert model.config.label2id == {"cat": 0, "dog": 1, "emu": 2, "fox": 3, "gnu": 4}
        assert AutoImageProcessor.from_pretrained(run, subfolder="transformers").size["shortest_edge"] == 37
        logits[f"{run.name}/transformers"] = model(images).logits

        config = json.loads((run / "timm" / "config.json").read_text())
        model = timm.create_model(
            config["architecture"],
            num_classes=config["num_classes"],
            checkpoint_path=run / "timm" / "model.safetensors",
            **config["model_args"],
        )
        logits[f"{run.name}/timm checkpoint"] = model.eval()(images)

        model = timm.create_model(f"local-dir:{run / 'timm'}", pretrained=True)
        assert list(timm.data.resolve_model_data_config(model)["mean"]) == [0.485, 0.456, 0.406]
        logits[f"{run.name}/timm folder"] = model.eval()(images)

        model = AutoModelForImageClassification.from_pretrained(run / "timm")
        assert model.config.label2id == {"cat": 0, "dog": 1, "emu": 2, "fox": 3, "gnu": 4}
        AutoImageProcessor.from_pretrained(run / "timm")
        logits[f"{run.name}/transformers from timm"] = model(images).logits
save_file(logits, root / "logits.safetensors")
"""


def test_saved_exports_of_every_mode_load_in_a_process_without_this_project(tmp_path):
    expected = {}
    for mode in MODES:
        model = make_model(mode)
        save_transformers(model, make_image_processor(), tmp_path / mode / "transformers")
        save_timm(model, make_image_processor(), tmp_path / mode / "timm")
        expected[mode] = logits_of(model, make_images())
    save_file({"images": make_images()}, tmp_path / "images.safetensors")
    command = [sys.executable, "-I", "-c", LOAD_ANYWHERE, str(tmp_path)]  # -I: neither PYTHONPATH nor this folder
    process = subprocess.run(command, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True)
    assert process.returncode == 0, process.stderr.decode()[-2000:]
    logits = load_file(tmp_path / "logits.safetensors")
    assert len(logits) == 4 * len(MODES)
    for name, found in logits.items():
        assert_same(found, expected[name.split("/")[0]])


@pytest.mark.parametrize("resize", [37, 256])
def test_timm_preprocesses_like_the_image_processor(resize):
    image_size = {37: 32, 256: 224}[resize]
    image_processor = make_image_processor(image_size)
    assert image_processor.size["shortest_edge"] == resize
    ramp = torch.linspace(0, 255, 320)[None].expand(240, -1).byte().numpy()
    image = Image.merge("RGB", [Image.fromarray(ramp), Image.fromarray(255 - ramp), Image.fromarray(ramp // 2)])
    preprocessing = timm_preprocessing(image_processor, image_size)
    transform = timm.data.create_transform((3, image_size, image_size), **preprocessing)
    expected = image_processor(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(transform(image), expected, atol=0.04, rtol=0)  # two grey levels


# ---- Starting a student ----


@pytest.mark.parametrize("kind", ["native", "transformers", "timm"])
@pytest.mark.parametrize("mode", MODES)
def test_exports_load_back_as_the_same_model(mode, kind, tmp_path):
    model = make_model(mode)
    if kind == "native":
        model.save_pretrained(tmp_path)
    elif kind == "transformers":
        save_transformers(model, make_image_processor(), tmp_path)
    else:
        save_timm(model, make_image_processor(), tmp_path)
    student, report = load_student(tmp_path, make_config(mode))
    assert_same(logits_of(student.eval(), make_images()), logits_of(model, make_images()))
    other_head = {"class": "distillation", "distill": "class"}.get(mode) if kind != "native" else None
    assert report == ([f"The {other_head} head is newly initialised: the source has none."] if other_head else [])


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_position_embeddings_are_interpolated_to_another_grid(kind, tmp_path):
    model = make_model("both")
    if kind == "native":
        model.save_pretrained(tmp_path)
    else:
        save_transformers(model, make_image_processor(), tmp_path)
    student, report = load_student(tmp_path, make_config("both", image_size=64))
    assert report == ["The position embeddings are interpolated from 4x4 to 8x8 patches."]
    positions = model.deit_ti.embeddings.position_embeddings
    assert torch.equal(
        student.deit_ti.embeddings.position_embeddings, interpolate_position_embeddings(positions, 2, (8, 8))
    )
    source = model if kind == "native" else DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path).eval()
    expected = logits_of(source, make_images(64), interpolate_pos_encoding=True)
    assert_same(logits_of(student.eval(), make_images(64)), expected)


def test_patch_projection_is_resampled_to_another_patch_size(tmp_path):
    model = make_model("none")
    model.save_pretrained(tmp_path)
    student, report = load_student(tmp_path, make_config("none", image_size=64, patch_size=16))
    assert report == ["The patch projection is resampled from 8x8 to 16x16 pixels."]
    weight = model.deit_ti.embeddings.patch_projection.weight
    resampled = student.deit_ti.embeddings.patch_projection.weight
    torch.testing.assert_close(resampled, resample_patch_embed(weight, (16, 16)))
    # Plain images look the same at any size, so the model sees the same.
    plain = torch.randn(3, 3, 1, 1, generator=torch.Generator().manual_seed(2))
    expected = logits_of(model, plain.expand(3, 3, 32, 32))
    assert_same(logits_of(student.eval(), plain.expand(3, 3, 64, 64)), expected, atol=1e-4)


def test_heads_are_reordered_to_the_students_labels(tmp_path):
    model = make_model("both")
    model.save_pretrained(tmp_path)
    student, report = load_student(tmp_path, make_config("both", labels=["gnu", "cat", "emu", "dog", "fox"]))
    assert len(report) == 2 and all("reordered to the dataset's labels" in sentence for sentence in report)
    expected = logits_of(model, make_images())[:, [4, 0, 2, 1, 3]]
    assert_same(logits_of(student.eval(), make_images()), expected)


def test_heads_are_new_where_labels_differ_and_the_rest_is_kept(tmp_path):
    model = make_model("both")
    save_transformers(model, make_image_processor(), tmp_path)
    student, report = load_student(tmp_path, make_config("both", labels=["cat", "dog", "yak"]))
    assert report == [
        "The class head is newly initialised: the source has different labels (5 of them).",
        "The distillation head is newly initialised: the source has different labels (5 of them).",
    ]
    assert student.class_head.weight.shape == (3, 48)
    assert student.class_head.weight.abs().max() < 0.1 and student.class_head.bias.abs().max() == 0
    ours = student.deit_ti.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in model.deit_ti.state_dict().items())
    assert student.config.id2label == {0: "cat", 1: "dog", 2: "yak"}


def test_distillation_token_is_new_where_the_source_has_none(tmp_path):
    model = make_model("none")
    save_transformers(model, make_image_processor(), tmp_path)
    student, report = load_student(tmp_path, make_config("distill"))
    assert report == [
        "The distillation token and its position are newly initialised: the source has none.",
        "The distillation head is newly initialised: the source has none.",
    ]
    theirs, ours = model.deit_ti.embeddings, student.deit_ti.embeddings
    assert torch.equal(ours.class_token, theirs.class_token)
    assert torch.equal(ours.position_embeddings[:, 0], theirs.position_embeddings[:, 0])
    assert torch.equal(ours.position_embeddings[:, 2:], theirs.position_embeddings[:, 1:])
    assert 0 < ours.distillation_token.abs().max() < 0.1 and 0 < ours.position_embeddings[:, 1].abs().max() < 0.1
    assert torch.equal(student.class_head.weight, model.class_head.weight)
    assert student.config.readout == "distillation" and student.config.distill_mode == "distill"


def test_token_that_the_student_lacks_is_dropped(tmp_path):
    model = make_model("both")
    model.save_pretrained(tmp_path)
    student, report = load_student(tmp_path, make_config("distill_alone"))
    assert report == ["The source's class token and its head are not used."]
    theirs, ours = model.deit_ti.embeddings, student.deit_ti.embeddings
    assert torch.equal(ours.distillation_token, theirs.distillation_token)
    assert torch.equal(ours.position_embeddings, theirs.position_embeddings[:, 1:])
    assert torch.equal(student.distillation_head.weight, model.distillation_head.weight)


def test_one_token_starts_from_another(tmp_path):
    model = make_model("none")
    model.save_pretrained(tmp_path)
    student, report = load_student(tmp_path, make_config("distill_alone"))
    assert report == ["The distillation token and its head start from the source's class token."]
    assert_same(logits_of(student.eval(), make_images()), logits_of(model, make_images()))


def test_student_inherits_the_sources_layer_norm_eps(tmp_path):
    fields = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = ViTConfig(**fields, image_size=32, patch_size=8, num_labels=5, layer_norm_eps=0.5)
    source = ViTForImageClassification(config).eval()
    source.save_pretrained(tmp_path)
    ours = make_config("none", labels=[f"LABEL_{index}" for index in range(5)])
    student, report = load_student(tmp_path, ours)
    assert report == [] and student.config.layer_norm_eps == 0.5 and ours.layer_norm_eps == 1e-6
    images = make_images()
    torch.testing.assert_close(logits_of(student.eval(), images), logits_of(source, images), atol=1e-5, rtol=0)


def test_timm_architecture_starts_from_its_pretrained_weights_on_the_hub(monkeypatch, tmp_path):
    """As timm/deit_tiny_distilled_patch16_224.fb_in1k is laid out in the Hub's cache, but with random weights."""
    name = "deit_tiny_distilled_patch16_224.fb_in1k"
    assert timm_hub_id(name) == timm_hub_id("deit_tiny_distilled_patch16_224") == f"timm/{name}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / f"models--timm--{name}"
    snapshot = repo / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    source = timm.create_model("deit_tiny_distilled_patch16_224").eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_file(source.state_dict(), snapshot / "model.safetensors", metadata={"format": "pt"})
    pretrained_cfg = {"tag": "fb_in1k", "input_size": [3, 224, 224], "num_classes": 1000, "classifier": ["head"]}
    document = {"architecture": "deit_tiny_distilled_patch16_224", "num_classes": 1000, "num_features": 192}
    (snapshot / "config.json").write_text(json.dumps(document | {"pretrained_cfg": pretrained_cfg}))

    config = DeiTTiConfig(id2label=dict(enumerate(LABELS)), **MODES["both"][0])
    student, report = load_student(name, config)
    assert report == [
        "The class head is newly initialised: the source has different labels (1000 of them).",
        "The distillation head is newly initialised: the source has different labels (1000 of them).",
    ]
    with torch.no_grad():
        tokens = student.eval().deit_ti(make_images(224)).last_hidden_state
        torch.testing.assert_close(tokens, source.forward_features(make_images(224)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["none", "both"])
def test_student_starts_from_a_network_saved_by_timm(mode, tmp_path):
    """timm writes `num_classes` into `model_args` too, which transformers' wrapper does not expect."""
    source = to_timm(make_model(mode))
    names = {"model_args": {"num_classes": 5}, "model_config": {"label_names": LABELS}}
    timm.models.save_for_hf(source, tmp_path, **names, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["num_classes"] == 5
    student, report = load_student(tmp_path, make_config(mode))
    assert report == []
    assert_same(logits_of(student.eval(), make_images()), logits_of(source, make_images()))


def test_sources_that_do_not_fit_are_refused_with_the_reason(tmp_path):
    make_model("none", hidden_size=96).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match="--model_name_or_path .*wide: its hidden_size is 96, but the student's is 48"):
        load_student(tmp_path / "wide", make_config("none"))
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetForImageClassification(resnet).save_pretrained(tmp_path / "resnet")
    with pytest.raises(UserError, match="it is a resnet"):
        load_student(tmp_path / "resnet", make_config("none"))
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "init_values": 1e-5}
    scaled = TimmWrapperConfig(architecture="deit_tiny_patch16_224", model_args=arguments, num_labels=5)
    TimmWrapperForImageClassification(scaled).save_pretrained(tmp_path / "scaled")
    with pytest.raises(UserError, match=r"a DeiT-Ti has no blocks.0.ls1.gamma"):
        load_student(tmp_path / "scaled", make_config("none"))


def test_sources_that_cannot_be_loaded_are_refused_with_the_reason(tmp_path):
    config = make_config("none")
    with pytest.raises(UserError, match="--model_name_or_path .*nowhere: there is no such folder"):
        load_student(tmp_path / "nowhere", config)
    with pytest.raises(UserError, match="someone/nothing: .* Offline, name a folder"):
        load_student("someone/nothing", config)
    with pytest.raises(UserError, match="no pretrained weights for deit_tiny_patch16_224.none_such"):
        load_student("deit_tiny_patch16_224.none_such", config)


@pytest.mark.parametrize("kind", ["native", "transformers"])
def test_incomplete_checkpoints_are_refused(kind, tmp_path):
    model = make_model("none")
    (to_transformers(model) if kind == "transformers" else model).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state[next(key for key in state if "key.weight" in key or "qkv.weight" in key)]
    save_file(state, file, metadata={"format": "pt"})
    ours, theirs = "deit_ti.layers.0.attention.qkv.weight", "vit.layers.0.attention.k_proj.weight"
    with pytest.raises(UserError, match=f"incomplete and lacks {ours if kind == 'native' else theirs}"):
        load_student(tmp_path, make_config("none"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="--model_name_or_path .*: the folder holds no .*SafetensorError"):
        load_student(tmp_path, make_config("none"))


def test_pickled_weights_and_remote_code_are_refused(tmp_path):
    model = make_model("none")
    model.save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match="model.safetensors"):
        load_student(tmp_path / "pickled", make_config("none"))
    (tmp_path / "remote").mkdir()
    auto_map = {"AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Model"}
    document = {"model_type": "elsewhere", "auto_map": auto_map}
    (tmp_path / "remote" / "config.json").write_text(json.dumps(document))
    (tmp_path / "remote" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="it has custom code"):
        load_student(tmp_path / "remote", make_config("none"))
    assert not (tmp_path / "ran").exists()


# ---- The command ----


def run_command(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as exit:  # raised by argparse
        return exit.code


@pytest.fixture
def finished_run(tmp_path) -> Path:
    make_model("distill").save_pretrained(tmp_path)
    make_image_processor().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("to", ["transformers", "timm"])
def test_command_converts_a_finished_run_and_says_how_to_load_it(to, finished_run, capsys):
    assert run_command(str(finished_run), "--to", to) == 0
    assert str(finished_run / to) in capsys.readouterr().out
    student, _ = load_student(finished_run / to, make_config("distill"))
    assert_same(logits_of(student.eval(), make_images()), logits_of(make_model("distill"), make_images()))


@pytest.mark.parametrize("to", ["transformers", "timm"])
def test_command_leaves_no_half_of_an_export_on_a_full_disk(to, finished_run, capsys):
    with file_size_limit(1000):
        assert run_command(str(finished_run), "--to", to) == 1
    assert f"{finished_run / to} cannot be written to" in capsys.readouterr().err
    assert not (finished_run / to).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--to", "timm"], "nowhere is not a folder"),
        (["someone/nothing", "--to", "timm", "--output", "{run}/new"], "there is no such folder"),
        (["{run}", "--to", "timm", "--output", "{run}"], "already exists"),
        (["{run}/transformers", "--to", "timm"], "it is a deit, not a deit_ti"),
        (["{run}", "--to", "elsewhere"], "invalid choice"),
    ],
)
def test_command_ends_with_code_2_and_one_message_on_mistakes(arguments, message, finished_run, capsys):
    save_transformers(make_model("distill"), make_image_processor(), finished_run / "transformers")
    capsys.readouterr()
    before = sorted(finished_run.rglob("*"))
    assert run_command(*(argument.format(run=finished_run) for argument in arguments)) == 2
    output = capsys.readouterr()
    assert message in output.err and "Traceback" not in output.err and output.out == ""
    assert sorted(finished_run.rglob("*")) == before

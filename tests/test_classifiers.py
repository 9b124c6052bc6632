"""Any image classifier loads by name, from safetensors, or one message says why not."""

import json
from pathlib import Path

import pytest
import timm
import torch
from building import image_processor
from transformers import (
    AutoModelForImageClassification,
    MobileViTImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from modeling_deit_ti.classifiers import (
    check_accepts_images,
    input_format,
    label_maps,
    label_names,
    load_classifier,
    load_image_processor,
    new_timm_classifier,
)
from modeling_deit_ti.errors import UserError


DIGITS = [str(digit) for digit in range(10)]


def tiny_vit() -> ViTForImageClassification:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=8, id2label={0: "cat", 1: "dog"}))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A classifier and its image processor."""
    tiny_vit().save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


# ---- Loading ----


def test_a_complete_classifier_loads_in_eval_mode_with_its_image_processor(folder):
    model, missing = load_classifier(str(folder), "--model")
    assert isinstance(model, ViTForImageClassification) and not model.training and missing == []
    assert label_names(model.config) == ["cat", "dog"]
    assert load_image_processor(str(folder), "--model").size["height"] == 16
    assert input_format(model.config, str(folder), "--flag") == (
        16,
        pytest.approx([0.5] * 3),
        pytest.approx([0.5] * 3),
    )


def test_weights_that_a_checkpoint_lacks_are_named(folder):
    tiny_vit().vit.save_pretrained(folder)
    assert load_classifier(str(folder), "--model")[1] == ["classifier.bias", "classifier.weight"]


def damage(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tiny_vit().state_dict(), folder / "pytorch_model.bin")


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (damage, "SafetensorError"),
        (pickle, "no file named model.safetensors"),
        (empty, "Unrecognized model"),
    ],
)
def test_a_folder_without_a_complete_classifier_is_refused(spoil, reason, folder):
    spoil(folder)
    with pytest.raises(UserError, match=f"^--model {folder}: the folder holds no image classifier .*{reason}"):
        load_classifier(str(folder), "--model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"there is no such folder or timm architecture, and .* from the Hub \(.* Offline, name a folder"),
        ("someone/nothing", r"there is no such folder or timm architecture, and .* Offline, name a folder"),
        ("resnet18", r"no image classifier .* could be loaded from the Hub \(.* Offline, name a folder"),
        ("resnet18.none_such", "timm has no pretrained weights for resnet18.none_such"),
    ],
)
def test_a_name_that_cannot_be_loaded_is_refused(name, message):
    with pytest.raises(UserError, match=f"^--model {name}: {message}"):
        load_classifier(name, "--model")


def test_a_models_own_code_only_runs_if_it_is_trusted(folder):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "elsewhere"}
    auto_map = {"AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    (folder / "code.py").write_text(
        "from transformers import ViTConfig, ViTForImageClassification\n\n"
        f"open({str(folder / 'ran')!r}, 'w').close()\n\n\n"
        "class Config(ViTConfig):\n    model_type = 'elsewhere'\n\n\n"
        "class Model(ViTForImageClassification):\n    config_class = Config\n"
    )
    with pytest.raises(UserError, match=f"^--model {folder}: it has custom code.* add --trust_remote_code"):
        load_classifier(str(folder), "--model")
    assert not (folder / "ran").exists()
    model, missing = load_classifier(str(folder), "--model", trust_remote_code=True)
    assert type(model).__name__ == "Model" and missing == [] and (folder / "ran").exists()


def test_a_folder_without_an_image_processor_is_refused(folder):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=f"^--model {folder}: the folder holds no image processor"):
        load_image_processor(str(folder), "--model")


def test_an_image_processor_that_swaps_colours_is_refused(tmp_path):
    MobileViTImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match="swaps or mixes the colours"):
        input_format(tiny_vit().config, str(tmp_path), "--flag")


# ---- timm networks ----


@pytest.fixture
def saved_by_timm(tmp_path) -> tuple[torch.nn.Module, str]:
    """A network, and the folder that timm saved it to. timm writes `num_classes` into `model_args` as well."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=2).eval()
    labels = {"model_args": {"num_classes": 2}, "model_config": {"label_names": ["cat", "dog"]}}
    timm.models.save_for_hf(network, tmp_path, **labels, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["num_classes"] == 2
    return network, str(tmp_path)


@torch.no_grad()
def test_a_network_saved_by_timm_loads(saved_by_timm, tmp_path):
    network, folder = saved_by_timm
    model, missing = load_classifier(folder, "--model")
    assert missing == [] and label_names(model.config) == ["cat", "dog"]
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images).logits, network(images))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(again(images).logits, network(images))


def test_a_network_saved_by_timm_gets_a_new_head_for_other_labels(saved_by_timm):
    network, folder = saved_by_timm
    model, _ = load_classifier(
        folder, "--model", ignore_mismatched_sizes=True, num_labels=10, **label_maps(DIGITS), dtype=torch.float32
    )
    assert label_names(model.config) == DIGITS
    state = network.state_dict()
    assert model.timm_model.fc.weight.shape == (10, state["fc.weight"].shape[1])
    body = {key: value for key, value in model.timm_model.state_dict().items() if not key.startswith("fc.")}
    assert all(torch.equal(value, state[key]) for key, value in body.items())


def test_a_timm_network_keeps_timms_initialisation(tmp_path):
    torch.manual_seed(0)
    model = new_timm_classifier("resnet18", DIGITS, 32, image_processor(32))
    weights = timm.create_model("resnet18", num_classes=10).state_dict()
    for name, parameter in model.timm_model.named_parameters():
        if weights[name].numel() > 1000:
            assert parameter.std().item() == pytest.approx(weights[name].std().item(), rel=0.2), name
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images).logits, model.eval()(images).logits)
    assert label_names(loaded.config) == DIGITS


def test_a_timm_transformer_is_built_for_the_image_size():
    model = new_timm_classifier("test_vit", DIGITS, 64, image_processor(64))
    assert model(torch.randn(1, 3, 64, 64)).logits.shape == (1, 10)


def test_batches_that_a_network_cannot_be_trained_on_are_refused():
    model = new_timm_classifier("test_resnet", DIGITS, 32, image_processor(32))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_accepts_images(model, "test_resnet", 32, 64)
    with pytest.raises(UserError, match="^test_resnet cannot be trained on batches of 1 images of 8x8 pixels"):
        check_accepts_images(model, "test_resnet", 8, 1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

"""`--optim muon`: which parameters Muon updates, and that its steps match timm's Muon."""

import functools
import json
from pathlib import Path

import pytest
import torch
from building import DIGITS, FOUR_STEPS, TINY_CNN, arguments, image_processor, tiny_student
from real_command import run
from timm.optim import muon as timm_muon
from torch import nn
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, TrainingArguments

from modeling_deit_ti.checkpoints import SETTINGS_FILE
from modeling_deit_ti.classifiers import new_timm_classifier
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.muon import hidden_matrices, make_muon, muon_options, orthogonalize
from modeling_deit_ti.trainer import DistillationTrainer


MATRICES = ("attention.qkv", "attention.projection", "mlp.fc1", "mlp.fc2")


def decaying(model) -> list[str]:
    return DistillationTrainer.get_decay_parameter_names(object.__new__(DistillationTrainer), model)


def muon_arguments(tmp_path, **flags):
    defaults = {"output_dir": tmp_path, "image_size": 32, "patch_size": 8, "distill_mode": "both", "optim": "muon"}
    return arguments(**defaults | flags)


def set_gradients(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


# ---- Which parameters ----


def test_muon_updates_the_blocks_matrices_and_adamw_the_rest_with_the_usual_decay(tmp_path):
    args = muon_arguments(tmp_path, learning_rate=1e-3, weight_decay=0.1, optim_args="adamw_lr_scale=2")
    model = tiny_student(args)
    names = {parameter: name for name, parameter in model.named_parameters()}
    matrices, others, undecayed = make_muon(model, decaying(model), args.training).param_groups
    assert [names[parameter] for parameter in matrices["params"]] == [
        f"deit_ti.layers.{layer}.{name}.weight" for layer in (0, 1) for name in MATRICES
    ]
    assert {names[parameter] for parameter in others["params"]} == {
        "deit_ti.embeddings.patch_projection.weight",
        "class_head.weight",
        "distillation_head.weight",
    }
    assert {*matrices["params"], *others["params"], *undecayed["params"]} == {*model.parameters()}
    assert all(
        parameter.ndim == 1 or names[parameter].endswith(("_token", "position_embeddings"))
        for parameter in undecayed["params"]
    )
    assert [group["weight_decay"] for group in (matrices, others, undecayed)] == [0.1, 0.1, 0]
    assert [group["lr"] for group in (matrices, others, undecayed)] == [1e-3, 2e-3, 2e-3]


@pytest.mark.parametrize(
    ("architecture", "first", "head"),
    [
        ("resnet18", "conv1.weight", "fc.weight"),
        ("regnetx_004", "stem.conv.weight", "head.fc.weight"),
        ("mobilenetv3_small_050", "conv_stem.weight", "classifier.weight"),
        ("deit_tiny_distilled_patch16_224", "patch_embed.proj.weight", "head.weight head_dist.weight"),
    ],
)
def test_adamw_updates_timms_first_layers_heads_and_depthwise_convolutions(architecture, first, head):
    model = new_timm_classifier(architecture, DIGITS, 224, image_processor(224))
    layers = {
        name.removeprefix("timm_model."): parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not name.endswith(("_token", "pos_embed"))
    }
    depthwise = {name for name, parameter in layers.items() if parameter.shape[1] == 1}
    assert bool(depthwise) == architecture.startswith("mobilenet")
    found = {name.removeprefix("timm_model.") for name in hidden_matrices(model, decaying(model))}
    assert found == layers.keys() - {first, *head.split()} - depthwise


def test_adamw_updates_the_heads_of_transformers_networks():
    config = DeiTConfig(num_hidden_layers=1, hidden_size=48, intermediate_size=96, num_attention_heads=3)
    model = DeiTForImageClassificationWithTeacher(config)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {*hidden_matrices(model, decaying(model))} == {name for name in linear if "classifier" not in name}


# ---- Its steps ----


def test_singular_values_come_close_to_one():
    torch.manual_seed(0)
    for shape in ((2, 30, 10), (2, 10, 30), (3, 16, 16)):
        matrices = torch.randn(shape)
        result = orthogonalize(matrices, 5, torch.float32)
        assert result.shape == matrices.shape
        assert ((torch.linalg.svdvals(result) - 1).abs() < 0.35).all()
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        torch.testing.assert_close(result, left @ right, atol=0.25, rtol=0)


@pytest.mark.parametrize("steps", [1, 5, 7])
@pytest.mark.parametrize("shape", [(3, 576, 192), (3, 192, 192), (3, 192, 768)])
def test_orthogonalised_matrices_match_timms(shape, steps):
    torch.manual_seed(0)
    coefficients = timm_muon.resolve_ns_coefficients("quintic", timm_muon._COEFFICIENTS)
    few_directions = torch.randn(3, shape[1], 4) @ torch.randn(3, 4, shape[2])  # like gradients
    for matrices in (torch.randn(shape), few_directions + 1e-3 * torch.randn(shape), few_directions):
        expected = timm_muon.zeropower_via_newtonschulz(matrices, steps, coefficients, dtype=torch.float32)
        result = orthogonalize(matrices, steps, torch.float32)
        assert (result - expected).norm() < 1e-3 * expected.norm()
    assert orthogonalize(torch.zeros(shape), steps, torch.float32).count_nonzero() == 0
    matrices = torch.randn(shape)
    expected = timm_muon.zeropower_via_newtonschulz(matrices, steps, coefficients).float()  # in bfloat16
    for dtype, tolerance in ((torch.bfloat16, 0.02), (torch.float32, 0.04)):
        result = orthogonalize(matrices, steps, dtype)
        assert result.dtype == torch.float32 and (result - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("network", ["deit_ti", TINY_CNN])
def test_steps_match_timms_muon(network, tmp_path, monkeypatch):
    in_float32 = functools.partial(timm_muon.zeropower_via_newtonschulz, dtype=torch.float32)
    monkeypatch.setattr(timm_muon, "zeropower_via_newtonschulz", in_float32)  # timm's optimizer has no option for it
    monkeypatch.setattr("modeling_deit_ti.muon.cpu_is_fast_in_bfloat16", lambda: False)
    args = muon_arguments(tmp_path, learning_rate=1e-2, weight_decay=0.3, optim_args="momentum=0.8,adamw_lr_scale=2")

    def build():
        torch.manual_seed(1)
        is_cnn = network == TINY_CNN
        return new_timm_classifier(network, DIGITS, 32, image_processor(32)) if is_cnn else tiny_student(args)

    ours, theirs = build(), build()
    optimizer = make_muon(ours, decaying(ours), args.training)
    parameters = dict(zip(ours.parameters(), theirs.parameters(), strict=True))
    groups = [
        {
            "params": [parameters[parameter] for parameter in group["params"]],
            "weight_decay": group["weight_decay"],
            "lr": group["lr"],
            "eps": 1e-7 if "momentum" in group else args.training.adam_epsilon,
            "use_fallback": "momentum" not in group,
        }
        for group in optimizer.param_groups
    ]
    timms = timm_muon.Muon(groups, momentum=0.8, betas=(0.9, 0.999))
    for step in range(3):
        for model, its in ((ours, optimizer), (theirs, timms)):
            set_gradients(model, step)
            its.step()
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=2e-6, rtol=1e-5, msg=name)


def test_step_without_gradients_changes_nothing(tmp_path):
    args = muon_arguments(tmp_path)
    model = tiny_student(args)
    optimizer = make_muon(model, decaying(model), args.training)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_optimizer_state_resumes_where_it_was_saved(tmp_path):
    args = muon_arguments(tmp_path)
    model, resumed = tiny_student(args), tiny_student(args)
    optimizer = make_muon(model, decaying(model), args.training)
    for step in range(2):
        set_gradients(model, step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed.load_state_dict(model.state_dict())
    again = make_muon(resumed, decaying(resumed), args.training)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for network, its in ((model, optimizer), (resumed, again)):
        set_gradients(network, 7)
        its.step()
    for parameter, expected in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, expected)


# ---- Options ----


def test_options_have_defaults_and_types():
    assert muon_options(None) == muon_options("") == {"momentum": 0.95, "ns_steps": 5, "adamw_lr_scale": 1.0}
    assert muon_options("momentum=0.9, ns_steps=3") == {"momentum": 0.9, "ns_steps": 3, "adamw_lr_scale": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("momentum", "'momentum' is not a valid muon option"),
        ("nesterov=1", "the options and their defaults are momentum=0.95,ns_steps=5,adamw_lr_scale=1.0"),
        ("ns_steps=2.5", "'ns_steps=2.5'"),
        ("ns_steps=0", "between 1 and 100"),
        ("momentum=1", "at least 0 and below 1"),
        ("momentum=nan", "at least 0 and below 1"),
        ("adamw_lr_scale=inf", "finite and at least 0"),
    ],
)
def test_a_wrong_option_ends_in_one_message(text, message, tmp_path):
    with pytest.raises(UserError, match="--optim_args") as raised:
        muon_arguments(tmp_path, optim_args=text)
    assert message in str(raised.value)
    recipe = tmp_path / "teacher.yaml"
    recipe.write_text(f"optim: muon\noptim_args: {text}\n")
    with pytest.raises(UserError, match="--teacher_config .*--optim_args") as raised:
        arguments(output_dir=tmp_path, distill_mode="hard", teacher_config=recipe)
    assert message in str(raised.value)


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: setattr(self, "deepspeed_plugin", object()))
    with pytest.raises(UserError, match="DeepSpeed"):
        muon_arguments(tmp_path)


# ---- The command ----


@pytest.fixture(scope="module")
def distilled(tmp_path_factory) -> Path:
    """A student and its teacher, both trained with Muon."""
    folder = tmp_path_factory.mktemp("muon")
    recipe = "model_name_or_path: test_resnet\noptim: muon\noptim_args: ns_steps=3\nlearning_rate: 2e-2\n"
    (folder / "teacher.yaml").write_text(f"{recipe}num_train_epochs: 6\n")
    muon = ["--optim=muon", "--optim_args=adamw_lr_scale=2,momentum=0.9", "--learning_rate=1e-3"]
    places = [f"--output_dir={folder / 'run'}", f"--teacher_output_dir={folder / 'teachers'}"]
    teacher = ["--teacher_num_train_epochs=12", f"--teacher_config={folder / 'teacher.yaml'}"]
    ended = run(*FOUR_STEPS, *muon, *places, *teacher, "--distill_mode=both", "--teacher_targets=standardized")
    assert ended.returncode == 0, ended.stderr
    return folder


def test_card_checkpoint_and_teacher_recipe_name_muon(distilled):
    card = (distilled / "run" / "README.md").read_text()
    for row in (
        "| optim | `muon` |",
        "| optim_args | `adamw_lr_scale=2,momentum=0.9` |",
        "| position_init | `sincos` |",
    ):
        assert row in card
    assert "optim `muon`" in card and "4 KL" not in card
    assert "0.5 2^2 KL(softmax(z(teacher) / 2) || softmax(z(distillation) / 2))" in card
    settings = json.loads((distilled / "run" / "checkpoint-4" / SETTINGS_FILE).read_text())
    assert (settings["optim"], settings["teacher_optim"]) == ("muon", "muon")
    assert (settings["patch_init"], settings["position_init"]) == ("whitening", "sincos")
    assert settings["teacher_targets"] == "standardized" and "teacher_position_init" not in settings
    (recipe,) = (distilled / "teachers").glob("test_resnet-*/teacher_recipe.json")
    recipe = json.loads(recipe.read_text())
    assert (recipe["optim"], recipe["optim_args"]) == ("muon", "ns_steps=3") and "position_init" not in recipe


def test_saved_model_does_not_record_its_initialisation(distilled):
    config = json.loads((distilled / "run" / "config.json").read_text())
    assert not [key for key in config if key.endswith("_init")]

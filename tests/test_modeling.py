"""The network: its size, its outputs, and that it matches timm's and transformers' DeiT-Ti to the last digit."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    DeiTConfig,
    ViTConfig,
    ViTForImageClassification,
)
from transformers import DeiTForImageClassificationWithTeacher as TransformersDeiT

from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification, DeiTTiModel
from modeling_deit_ti.distillation import MODES, resolve_mode
from modeling_deit_ti.modeling_deit_ti import drop_path, interpolate_position_embeddings, keep_patches


def small_config(mode=MODES["both"], **overrides) -> DeiTTiConfig:
    return DeiTTiConfig(
        **{"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_labels": 5, **mode.network, **overrides}
    )


def small_model(mode=MODES["both"], **overrides) -> DeiTTiForImageClassification:
    torch.manual_seed(0)
    return DeiTTiForImageClassification(small_config(mode, **overrides)).eval()


def perturb(model: torch.nn.Module) -> torch.nn.Module:
    """Moves every parameter off its initial value, so that no zero bias or unit norm hides a mistake."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def load_renamed(model: DeiTTiForImageClassification, weights: dict, names: dict[str, str], layer_names: dict) -> None:
    """Copies in another network's weights, and fails if any are left over or missing."""
    renamed = {names[name]: weights.pop(name) for name in names}
    for index in range(model.config.num_hidden_layers):
        for name, fused in layer_names.items():
            sources = [weights.pop(source.format(index)) for source in fused]
            renamed[f"deit_ti.layers.{index}.{name}"] = torch.cat(sources)
    assert not weights
    model.load_state_dict(renamed)


def test_parameter_count_equals_timms():
    ours = DeiTTiForImageClassification(DeiTTiConfig(num_labels=1000, **MODES["both"].network))
    timms = timm.create_model("deit_tiny_distilled_patch16_224")
    assert ours.num_parameters() == sum(p.numel() for p in timms.parameters()) == 5_910_800


def test_logits_equal_timms():
    timms = perturb(timm.create_model("deit_tiny_distilled_patch16_224"))
    ours = DeiTTiForImageClassification(DeiTTiConfig(num_labels=1000, **MODES["both"].network)).eval()
    kinds = ("weight", "bias")
    load_renamed(
        ours,
        dict(timms.state_dict()),
        {
            "cls_token": "deit_ti.embeddings.class_token",
            "dist_token": "deit_ti.embeddings.distillation_token",
            "pos_embed": "deit_ti.embeddings.position_embeddings",
            **{f"patch_embed.proj.{kind}": f"deit_ti.embeddings.patch_projection.{kind}" for kind in kinds},
            **{f"norm.{kind}": f"deit_ti.norm.{kind}" for kind in kinds},
            **{f"head.{kind}": f"class_head.{kind}" for kind in kinds},
            **{f"head_dist.{kind}": f"distillation_head.{kind}" for kind in kinds},
        },
        {
            f"{our}.{kind}": [f"blocks.{{}}.{their}.{kind}"]
            for our, their in {
                "attention_norm": "norm1",
                "attention.qkv": "attn.qkv",
                "attention.projection": "attn.proj",
                "mlp_norm": "norm2",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }.items()
            for kind in kinds
        },
    )
    images = torch.randn(2, 3, 224, 224)
    timms.set_distilled_training(True)
    timms.train()  # the only way timm returns both heads; its drop rates are 0
    class_logits, distillation_logits = timms(images)
    output = ours(images)
    torch.testing.assert_close(output.class_logits, class_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.distillation_logits, distillation_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.logits, timms.eval()(images), atol=1e-5, rtol=0)


def test_logits_equal_transformers():
    config = DeiTConfig(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, layer_norm_eps=1e-6, num_labels=1000
    )
    theirs = perturb(TransformersDeiT(config))
    ours = DeiTTiForImageClassification(DeiTTiConfig(num_labels=1000, **MODES["both"].network)).eval()
    kinds = ("weight", "bias")
    load_renamed(
        ours,
        dict(theirs.state_dict()),
        {
            "deit.embeddings.cls_token": "deit_ti.embeddings.class_token",
            "deit.embeddings.distillation_token": "deit_ti.embeddings.distillation_token",
            "deit.embeddings.position_embeddings": "deit_ti.embeddings.position_embeddings",
            **{
                f"deit.embeddings.patch_embeddings.projection.{kind}": f"deit_ti.embeddings.patch_projection.{kind}"
                for kind in kinds
            },
            **{f"deit.layernorm.{kind}": f"deit_ti.norm.{kind}" for kind in kinds},
            **{f"cls_classifier.{kind}": f"class_head.{kind}" for kind in kinds},
            **{f"distillation_classifier.{kind}": f"distillation_head.{kind}" for kind in kinds},
        },
        {
            f"{our}.{kind}": [f"deit.layers.{{}}.{their}.{kind}" for their in theirs_fused]
            for our, theirs_fused in {
                "attention_norm": ["layernorm_before"],
                "attention.qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
                "attention.projection": ["attention.o_proj"],
                "mlp_norm": ["layernorm_after"],
                "mlp.fc1": ["mlp.fc1"],
                "mlp.fc2": ["mlp.fc2"],
            }.items()
            for kind in kinds
        },
    )
    images = torch.randn(2, 3, 224, 224)
    expected, output = theirs(images), ours(images)
    torch.testing.assert_close(output.class_logits, expected.cls_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.distillation_logits, expected.distillation_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODES)
def test_logits_come_from_the_modes_read_out(name):
    output = small_model(MODES[name])(torch.randn(3, 3, 32, 32))
    expected = {
        "class": lambda: output.class_logits,
        "distillation": lambda: output.distillation_logits,
        "both": lambda: (output.class_logits + output.distillation_logits) / 2,
    }[MODES[name].readout]()
    torch.testing.assert_close(output.logits, expected, atol=0, rtol=0)
    assert ("distillation_logits" in output) == (name in ("class", "distill", "both"))


@pytest.mark.parametrize(
    ("name", "present", "absent"), [("class", "class", "distillation"), ("distill", "distillation", "class")]
)
def test_a_single_token_model_only_has_that_token_and_its_head(name, present, absent):
    model = small_model(resolve_mode(name, single_token=True))
    output = model(torch.randn(2, 3, 32, 32))
    assert f"{present}_logits" in output and f"{absent}_logits" not in output
    assert model.deit_ti.embeddings.position_embeddings.shape == (1, 1 + 16, 192)
    assert not any(absent in parameter for parameter, _ in model.named_parameters())


def test_each_head_reads_its_own_token():
    model = small_model()
    hidden = model.deit_ti(images := torch.randn(2, 3, 32, 32)).last_hidden_state
    output = model(images)
    torch.testing.assert_close(output.class_logits, model.class_head(hidden[:, 0]))
    torch.testing.assert_close(output.distillation_logits, model.distillation_head(hidden[:, 1]))


@pytest.mark.parametrize("mode", ["none", "both"])
def test_the_last_layer_skips_the_patches_and_nothing_else_changes(mode):
    """Logits and gradients equal those with all tokens (as when hidden states are requested), also in training."""
    model = perturb(small_model(resolve_mode(mode), drop_path_rate=0.5, patch_drop_rate=0.25)).train()
    noise = {"drop_path_noise": torch.rand(4, 2, 2), "patch_drop_noise": torch.rand(4, 16)}
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 1])
    lengths = []
    model.deit_ti.norm.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    logits, gradients = [], []
    for is_captured in (False, True):
        output = model(images, labels=labels, output_hidden_states=is_captured, **noise)
        output.loss.backward()
        logits.append(output.logits.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad(set_to_none=True)
    num_tokens = len(model.config.tokens)
    assert lengths == [num_tokens, num_tokens + 12]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    assert all((gradient != 0).any() for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_initialisation_is_a_truncated_normal_with_standard_deviation_0_02():
    model = DeiTTiForImageClassification(DeiTTiConfig(**MODES["both"].network))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == float(name.endswith("weight"))).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert abs(parameter.std().item() - 0.02) < 0.005, name


def test_sdpa_and_eager_attention_agree_and_eager_returns_its_probabilities():
    model, images = perturb(small_model()), torch.randn(2, 3, 32, 32)
    assert model.config._attn_implementation == "sdpa"
    expected = model(images).logits
    # As in transformers' own ViT, which warns.
    assert model(images, output_attentions=True).attentions == ()
    model.set_attn_implementation("eager")
    output = model(images, output_attentions=True)
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=0)
    assert [attention.shape for attention in output.attentions] == [(2, 3, 18, 18)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 3, 18))


def test_hidden_states_are_the_embeddings_and_each_blocks_output():
    model, images = small_model(), torch.randn(2, 3, 32, 32)
    output = model(images, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(output.hidden_states[0], model.deit_ti.embeddings(images))
    torch.testing.assert_close(
        output.class_logits, model.class_head(model.deit_ti.norm(output.hidden_states[-1])[:, 0])
    )


def test_return_dict_false_gives_a_tuple():
    model, images = small_model(), torch.randn(2, 3, 32, 32)
    assert [tuple(part.shape) for part in model(images, return_dict=False)] == [(2, 5)] * 3


def test_gradient_checkpointing_gives_the_same_gradients():
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    gradients = []
    for checkpointing in (False, True):
        model = perturb(small_model(drop_path_rate=0.0)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in model.deit_ti.layers)
        model(images, labels=labels).loss.backward()
        gradients.append(model.deit_ti.embeddings.patch_projection.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("labels", "loss", "problem_type"),
    [
        (torch.tensor([1, 4]), F.cross_entropy, "single_label_classification"),
        (
            torch.tensor([[0.0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]),
            F.binary_cross_entropy_with_logits,
            "multi_label_classification",
        ),
    ],
    ids=["one label per image", "several labels per image"],
)
def test_the_loss_equals_that_of_transformers_own_vit(labels, loss, problem_type):
    model, vit = small_model(), ViTForImageClassification(ViTConfig(num_labels=5, num_hidden_layers=1))
    output = model(torch.randn(2, 3, 32, 32), labels=labels)
    torch.testing.assert_close(output.loss, vit.loss_function(labels, output.logits, vit.config))
    torch.testing.assert_close(output.loss, loss(output.logits, labels))
    assert model.config.problem_type == vit.config.problem_type == problem_type


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_accepts_float32_images(dtype):
    model, images = small_model(), torch.randn(2, 3, 32, 32)
    expected = model(images).logits
    logits = model.to(dtype)(images).logits
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), expected, atol=0.05, rtol=0.05)


def test_drop_path_drops_whole_images_and_keeps_the_expectation():
    torch.manual_seed(0)
    noise = torch.rand(20_000)
    dropped = drop_path(torch.ones(20_000, 3, 2), noise, rate=0.25)
    kept = noise >= 0.25
    assert (dropped[kept] == 1 / 0.75).all() and (dropped[~kept] == 0).all()
    assert abs(kept.float().mean().item() - 0.75) < 0.01
    assert (drop_path(torch.ones(4, 3, 2), None, rate=0.25) == 1).all()


def test_drop_path_uses_given_or_drawn_noise_only_in_training():
    model, images = small_model(drop_path_rate=0.5).train(), torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    drawn = model(images).logits
    torch.manual_seed(1)
    noise = torch.rand(4, model.config.num_hidden_layers, 2)
    given = model(images, drop_path_noise=noise).logits
    assert torch.equal(given, drawn)
    alone = torch.cat([model(images[i : i + 1], drop_path_noise=noise[i : i + 1]).logits for i in range(4)])
    torch.testing.assert_close(alone, given)
    assert not torch.equal(model(images, drop_path_noise=noise.flip(0)).logits, given)
    assert torch.equal(model.eval()(images, drop_path_noise=noise).logits, model(images).logits)


def test_patch_dropout_keeps_the_patches_with_the_lowest_noise():
    patches = torch.arange(2 * 5 * 3.0).view(2, 5, 3)
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.2, 0.8], [0.0, 0.7, 0.6, 0.3, 0.9]])
    for rate, expected in ((0.6, ([1, 3], [0, 3])), (0.79, ([1], [0])), (0.95, ([1], [0]))):
        kept = torch.stack([patches[image, list(places)] for image, places in enumerate(expected)])
        assert torch.equal(keep_patches(patches, noise, rate), kept)


def test_a_network_with_patch_dropout_only_sees_the_patches_that_the_noise_keeps():
    model, images = perturb(small_model(patch_drop_rate=0.75, drop_path_rate=0.0)).train(), torch.randn(3, 3, 32, 32)
    hidden_states = model(images, output_hidden_states=True).hidden_states
    assert {states.shape for states in hidden_states} == {(3, 2 + 4, 192)}
    torch.manual_seed(1)
    drawn = model(images)
    torch.manual_seed(1)
    noise = torch.rand(3, 16)
    given = model(images, patch_drop_noise=noise)
    assert torch.equal(given.logits, drawn.logits)
    alone = torch.cat([model(images[i : i + 1], patch_drop_noise=noise[i : i + 1]).logits for i in range(3)])
    torch.testing.assert_close(alone, given.logits)
    # The content of the dropped patches makes no difference; that of the others does.
    is_kept = noise.argsort(dim=1).argsort(dim=1) < 4
    pixels = is_kept.view(3, 1, 4, 4).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    assert torch.equal(model(images * pixels, patch_drop_noise=noise).logits, given.logits)
    assert not torch.equal(model(images * ~pixels, patch_drop_noise=noise).logits, given.logits)


def test_patch_dropout_only_applies_in_training():
    model, plain = (perturb(small_model(patch_drop_rate=rate)) for rate in (0.5, 0.0))
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    assert torch.equal(model(images, patch_drop_noise=noise).logits, plain(images).logits)


def test_drop_path_rate_grows_linearly_with_depth():
    model = DeiTTiModel(DeiTTiConfig(drop_path_rate=0.11))
    assert [round(layer.drop_path_rate, 6) for layer in model.layers] == [round(0.01 * i, 6) for i in range(12)]


def test_interpolated_positions_keep_the_tokens_rows_and_resample_the_grid():
    positions = torch.randn(1, 2 + 16, 8)
    resized = interpolate_position_embeddings(positions, num_tokens=2, size=(6, 8))
    assert resized.shape == (1, 2 + 48, 8)
    torch.testing.assert_close(resized[:, :2], positions[:, :2])
    grid = positions[:, 2:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(6, 8), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 48, 8)
    torch.testing.assert_close(resized[:, 2:], expected)


def test_another_image_size_is_refused_unless_positions_are_interpolated():
    model = small_model()
    with pytest.raises(ValueError, match="48x40 pixels, but the model expects 32x32"):
        model(torch.randn(1, 3, 48, 40))
    assert model(torch.randn(1, 3, 48, 40), interpolate_pos_encoding=True).logits.shape == (1, 5)


def test_auto_classes_know_the_model(tmp_path):
    assert isinstance(AutoConfig.for_model("deit_ti"), DeiTTiConfig)
    assert isinstance(AutoModel.from_config(small_config()), DeiTTiModel)
    model = perturb(small_model())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, DeiTTiForImageClassification)
    assert (loaded.config.distill_mode, loaded.config.tokens, loaded.config.readout) == (
        "both",
        ["class", "distillation"],
        "both",
    )
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(images).logits, model(images).logits)


def test_a_saved_model_loads_in_a_fresh_process_that_has_only_its_folder(tmp_path):
    model, images = perturb(small_model(MODES["distill"])), torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path / "model")
    torch.save(images, tmp_path / "images.pt")
    program = (
        "import json, torch; from transformers import AutoModelForImageClassification as Auto;"
        "model = Auto.from_pretrained('model', trust_remote_code=True);"
        "output = model.eval()(torch.load('images.pt'));"
        "print(json.dumps([type(model).__module__, output.logits.tolist(), output.distillation_logits.tolist()]))"
    )
    env = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    module, logits, distillation_logits = json.loads(result.stdout.splitlines()[-1])
    assert module.startswith("transformers_modules.")
    assert logits == distillation_logits
    torch.testing.assert_close(torch.tensor(logits), model(images).distillation_logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 30, "patch_size": 8}, "does not divide image_size"),
        ({"num_attention_heads": 5}, "does not divide hidden_size"),
        ({"tokens": ["register"]}, "tokens must be"),
        ({"tokens": []}, "tokens must be"),
        ({"tokens": ["class"], "readout": "both"}, "does not fit tokens"),
        ({"tokens": ["distillation"], "readout": "class"}, "does not fit tokens"),
    ],
)
def test_invalid_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DeiTTiConfig(**options)

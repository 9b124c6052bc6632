"""The names and layout of our tensors in transformers and timm."""

import re

import torch

from ..configuration_deit_ti import DeiTTiConfig
from ..errors import UserError
from ..modeling_deit_ti import DeiTTiForImageClassification


StateDict = dict[str, torch.Tensor]

POSITIONS = "deit_ti.embeddings.position_embeddings"
# The names of the modules here, in transformers and in timm; {} is the index of a block.
MODULES = (
    ("deit_ti.embeddings.patch_projection", "embeddings.patch_embeddings.projection", "patch_embed.proj"),
    (POSITIONS, "embeddings.position_embeddings", "pos_embed"),
    ("deit_ti.layers.{}.attention_norm", "layers.{}.layernorm_before", "blocks.{}.norm1"),
    ("deit_ti.layers.{}.attention.qkv", "layers.{}.attention.qkv", "blocks.{}.attn.qkv"),  # see split_qkv
    ("deit_ti.layers.{}.attention.projection", "layers.{}.attention.o_proj", "blocks.{}.attn.proj"),
    ("deit_ti.layers.{}.mlp_norm", "layers.{}.layernorm_after", "blocks.{}.norm2"),
    ("deit_ti.layers.{}.mlp", "layers.{}.mlp", "blocks.{}.mlp"),
    ("deit_ti.norm", "layernorm", "norm"),
)
QKV = ("q_proj", "k_proj", "v_proj")
# The fields that DeiTTiConfig shares with ViTConfig and DeiTConfig.
SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")
SHARED_FIELDS = (
    *(*SIZE_FIELDS, "image_size", "patch_size", "qkv_bias", "hidden_act", "layer_norm_eps", "initializer_range"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
)
# Extra fields in an export's config.json, about the model it came from.
RECORD_FIELDS = ("distill_mode", "tokens", "readout")


def token_order(config: DeiTTiConfig) -> list[str]:
    """The model's tokens; if only one is read out, that one comes first."""
    return sorted(config.tokens, key=lambda token: config.readout not in ("both", token))


def transformers_names(config: DeiTTiConfig) -> dict[str, str]:
    """Maps our module and parameter names to those in transformers' class for such a model."""
    base = "vit" if len(config.tokens) == 1 else "deit"
    modules = {ours: f"{base}.{theirs}" for ours, theirs, _ in MODULES}
    tokens = (f"{base}.embeddings.cls_token", f"{base}.embeddings.distillation_token")
    heads = ("cls_classifier", "distillation_classifier") if config.readout == "both" else ("classifier",)
    return _all_names(config, modules, tokens, heads)


def timm_names(config: DeiTTiConfig) -> dict[str, str]:
    """Maps our module and parameter names to timm's."""
    modules = {ours: theirs for ours, _, theirs in MODULES}
    second, heads = ("dist_token", ("head", "head_dist")) if config.readout == "both" else ("reg_token", ("head",))
    return _all_names(config, modules, ("cls_token", second), heads)


def _all_names(config: DeiTTiConfig, modules: dict[str, str], tokens: tuple, heads: tuple) -> dict[str, str]:
    layers, order = range(config.num_hidden_layers), token_order(config)
    names = {ours.format(layer): theirs.format(layer) for ours, theirs in modules.items() for layer in layers}
    # Not strict: there may be only one token, or no head for the second.
    names |= zip([f"deit_ti.embeddings.{token}_token" for token in order], tokens, strict=False)
    names |= zip([f"{token}_head" for token in order], heads, strict=False)
    return names


def _rename(state: StateDict, names: dict[str, str]) -> StateDict:
    """Renames the tensors; `names` may name modules or single parameters."""
    renamed = {}
    for key, tensor in state.items():
        known = next((name for name in names if f"{key}.".startswith(f"{name}.")), None)
        if known is None:
            raise UserError(f"a DeiT-Ti has no {key}.")
        renamed[names[known] + key[len(known) :]] = tensor
    return renamed


def split_qkv(state: StateDict) -> StateDict:
    """Splits each (3 D, D) projection to queries, keys and values into the three (D, D) that transformers has."""
    split = {}
    for key, tensor in state.items():
        parts = zip(QKV, tensor.chunk(3), strict=True) if ".qkv." in key else [("qkv", tensor)]
        split |= {key.replace("qkv", projection): part for projection, part in parts}
    return split


def fuse_qkv(state: StateDict) -> StateDict:
    """The inverse of [`split_qkv`]."""
    fused = {key: tensor for key, tensor in state.items() if not re.search(r"\.[qkv]_proj\.", key)}
    for key in state:
        if ".q_proj." in key:
            parts = [state[key.replace("q_proj", projection)] for projection in QKV]
            fused[key.replace("q_proj", "qkv")] = torch.cat(parts)
    return fused


def _reorder_positions(positions: torch.Tensor, old: list[str], new: list[str]) -> torch.Tensor:
    """Reorders the learned tokens' rows of (1, N, D) position embeddings from one order of the tokens to another."""
    rows = [old.index(token) for token in new]
    return torch.cat((positions[:, rows], positions[:, len(rows) :]), dim=1)


def export_state(model: DeiTTiForImageClassification, names: dict[str, str]) -> StateDict:
    """The model's tensors, renamed, with positions in [`token_order`] and without a head that is not read out."""
    config, state = model.config, model.state_dict()
    state[POSITIONS] = _reorder_positions(state[POSITIONS], config.tokens, token_order(config))
    if config.readout != "both":
        state = {key: value for key, value in state.items() if "_head." not in key or key.startswith(config.readout)}
    return _rename(state, names)


def import_state(state: StateDict, names: dict[str, str], config: DeiTTiConfig) -> StateDict:
    """The inverse of [`export_state`]. Raises a `UserError` if a DeiT-Ti with that config has no such tensors."""
    state = _rename(state, {theirs: ours for ours, theirs in names.items()})
    found, expected = state[POSITIONS].shape[1], len(config.tokens) + (config.image_size // config.patch_size) ** 2
    if found != expected:
        raise UserError(f"it has {found} position embeddings, but a DeiT-Ti has {expected}.")
    state[POSITIONS] = _reorder_positions(state[POSITIONS], token_order(config), config.tokens)
    return state

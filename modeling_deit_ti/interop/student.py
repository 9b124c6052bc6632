"""A student that starts from another model's weights."""

import copy
import os

import timm
import torch
from timm.layers import resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from transformers import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTForImageClassification,
)

from ..classifiers import check_complete, label_names, load_classifier
from ..configuration_deit_ti import CLASS_TOKEN, TOKENS, DeiTTiConfig
from ..errors import UserError
from ..modeling_deit_ti import DeiTTiForImageClassification, interpolate_position_embeddings
from .names import (
    POSITIONS,
    RECORD_FIELDS,
    SHARED_FIELDS,
    SIZE_FIELDS,
    StateDict,
    fuse_qkv,
    import_state,
    timm_names,
    transformers_names,
)


PATCH_WEIGHT = "deit_ti.embeddings.patch_projection.weight"
FLAG = "--model_name_or_path"
# Of transformers' classes, under our names.
TOKENS_AND_READOUT = {
    ViTForImageClassification: ((CLASS_TOKEN,), CLASS_TOKEN),
    DeiTForImageClassification: (TOKENS, CLASS_TOKEN),
    DeiTForImageClassificationWithTeacher: (TOKENS, "both"),
}


def is_vit(config: PreTrainedConfig) -> bool:
    """Whether a model with this config is of a kind that a student can start from."""
    if isinstance(config, TimmWrapperConfig):
        return timm.model_entrypoint(config.architecture).__module__.endswith((".vision_transformer", ".deit"))
    return config.model_type in ("deit_ti", "deit", "vit")


def load_student(
    name_or_path: str | os.PathLike, config: DeiTTiConfig
) -> tuple[DeiTTiForImageClassification, list[str]]:
    """
    A student that starts from the weights of this project's DeiT-Ti, transformers' ViT or DeiT, or timm's DeiT. Only
    safetensors are read, and no remote code runs. This package's exports are turned back into the original model.

    What source and student have in common is copied. Position embeddings are interpolated to the student's grid, and
    the patch projection is resampled to its patch size (FlexiViT, Beyer et al., 2023). A head is copied if both have
    the same label names, with its rows in the student's order. The rest is newly initialised.

    Args:
        name_or_path (`str` or `os.PathLike`): folder, Hub id, or timm architecture with or without a tag.
        config (`DeiTTiConfig`): the student's, except for `layer_norm_eps` and `hidden_act`, which are the source's.

    Returns:
        The student, in float32, and one sentence for each part that is new, changed or not used.

    Raises:
        UserError: if the source cannot be read, is incomplete, is not a DeiT or ViT, or has a different width, depth
            or number of channels.
    """
    name = str(name_or_path)
    model, missing = load_classifier(name, FLAG, dtype=torch.float32)
    # A backbone has no head.
    check_complete([key for key in missing if "head" not in key and "classifier" not in key], name, FLAG)
    state = {key: value for key, value in model.state_dict().items() if key not in missing}
    try:
        source, state = _as_deit_ti(model, state)
        for field in (*SIZE_FIELDS, "qkv_bias"):
            ours, theirs = getattr(config, field), getattr(source, field)
            if ours != theirs:
                raise UserError(f"its {field} is {theirs}, but the student's is {ours}: the weights do not fit.")
    except UserError as error:
        raise UserError(f"{FLAG} {name}: {error}") from error
    config = copy.deepcopy(config)
    config.layer_norm_eps, config.hidden_act = source.layer_norm_eps, source.hidden_act
    student = DeiTTiForImageClassification(config)
    fresh, report = student.state_dict(), []
    # With one token each, the student's starts from the source's, whatever that one learned from.
    if len(source.tokens) == len(config.tokens) == 1 and source.tokens != config.tokens:
        report.append(f"The {config.tokens[0]} token and its head start from the source's {source.tokens[0]} token.")
        state = {key.replace(f"{source.tokens[0]}_", f"{config.tokens[0]}_"): value for key, value in state.items()}
        source.tokens = config.tokens
    for token in source.tokens:
        if token not in config.tokens:
            report.append(f"The source's {token} token and its head are not used.")
            state = {key: value for key, value in state.items() if f"{token}_" not in key}
    old, new = source.patch_size, config.patch_size
    if old != new:
        report.append(f"The patch projection is resampled from {old}x{old} to {new}x{new} pixels.")
        state[PATCH_WEIGHT] = resample_patch_embed(state[PATCH_WEIGHT], (new, new))
    state[POSITIONS] = _fit_positions(state[POSITIONS], fresh[POSITIONS], source, config, report)
    for token in config.tokens:
        if token not in source.tokens:
            report.append(f"The {token} token and its position are newly initialised: the source has none.")
        _fit_head(state, f"{token}_head", source, config, report)
    student.load_state_dict(fresh | state)
    return student, report


def _as_deit_ti(model: PreTrainedModel, state: StateDict) -> tuple[DeiTTiConfig, StateDict]:
    """A model's config as a [`DeiTTiConfig`], and its tensors under our names."""
    if isinstance(model, DeiTTiForImageClassification):
        return model.config, state
    if isinstance(model, TimmWrapperForImageClassification):
        source = _config_of_timm(model)
        state = {key.removeprefix("timm_model."): value for key, value in state.items()}
        return source, import_state(state, timm_names(source), source)
    if type(model) in TOKENS_AND_READOUT:
        fields = {field: getattr(model.config, field) for field in SHARED_FIELDS}
        source = _make_config(model.config, *TOKENS_AND_READOUT[type(model)], fields)
        return source, import_state(fuse_qkv(state), transformers_names(source), source)
    kind = model.config.model_type
    raise UserError(f"it is a {kind}, not a deit_ti, transformers' deit or vit, or timm's DeiT.")


def _config_of_timm(model: TimmWrapperForImageClassification) -> DeiTTiConfig:
    network = model.timm_model
    if not isinstance(network, VisionTransformer) or network.global_pool != "token":
        raise UserError(f"timm's {model.config.architecture} is not a DeiT.")
    block = network.blocks[0]
    fields = {
        "hidden_size": network.embed_dim,
        "num_hidden_layers": len(network.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "layer_norm_eps": block.norm1.eps,
        "image_size": network.patch_embed.img_size,
        "patch_size": network.patch_embed.patch_size,
        "num_channels": network.patch_embed.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
    }
    is_distilled = network.num_prefix_tokens == 2 and network.num_reg_tokens == 0
    tokens, readout = (TOKENS, "both") if is_distilled else ((CLASS_TOKEN,), CLASS_TOKEN)
    return _make_config(model.config, tokens, readout, fields)


def _make_config(config: PreTrainedConfig, tokens: tuple[str, ...], readout: str, fields: dict) -> DeiTTiConfig:
    """A source's config as a [`DeiTTiConfig`]. An export of ours has its tokens and read-out recorded in it."""
    for field in ("image_size", "patch_size"):
        size = fields[field]
        sides = {size} if isinstance(size, int) else set(size)
        if len(sides) != 1:
            raise UserError(f"its {field} is {size}, but a DeiT-Ti only accepts squares.")
        fields[field] = sides.pop()
    fields |= {"tokens": tokens, "readout": readout, "id2label": dict(enumerate(label_names(config)))}
    return DeiTTiConfig(
        **fields | {field: getattr(config, field) for field in RECORD_FIELDS if hasattr(config, field)}
    )


def _fit_positions(
    positions: torch.Tensor, fresh: torch.Tensor, source: DeiTTiConfig, config: DeiTTiConfig, report: list[str]
) -> torch.Tensor:
    """The source's (1, N, D) position embeddings for the student's tokens and grid; adds to the report."""
    rows = [
        positions[:, source.tokens.index(token)] if token in source.tokens else fresh[:, config.tokens.index(token)]
        for token in config.tokens
    ]
    positions = torch.cat((torch.stack(rows, dim=1), positions[:, len(source.tokens) :]), dim=1)
    old, new = source.image_size // source.patch_size, config.image_size // config.patch_size
    if old != new:
        report.append(f"The position embeddings are interpolated from {old}x{old} to {new}x{new} patches.")
    return interpolate_position_embeddings(positions, len(rows), (new, new))


def _fit_head(state: StateDict, head: str, source: DeiTTiConfig, config: DeiTTiConfig, report: list[str]) -> None:
    """Reorders the head's rows to the student's labels, or removes it from the state; adds to the report."""
    title, keys = head.replace("_", " "), (f"{head}.weight", f"{head}.bias")
    theirs, ours = label_names(source), label_names(config)
    if keys[0] not in state:
        report.append(f"The {title} is newly initialised: the source has none.")
    elif sorted(theirs) != sorted(ours):
        report.append(f"The {title} is newly initialised: the source has different labels ({len(theirs)} of them).")
        for key in keys:
            del state[key]
    elif theirs != ours:
        report.append(f"The {title} is reordered to the dataset's labels: the source has them in a different order.")
        state |= {key: state[key][[theirs.index(label) for label in ours]] for key in keys}

"""DeiT-Ti to and from transformers' own classes and timm, and to ONNX.

Every export predicts what the model predicts, to float32 rounding. One-token models are plain ViTs. Two-token models
that read out both heads are transformers' `DeiTForImageClassificationWithTeacher` and timm's
`VisionTransformerDistilled`, which average them. Those that read out one head put its token first, where both
libraries' single head sits, with its position; the other token stays in the sequence without a head (timm calls such
a token a register).

    python -m modeling_deit_ti.interop RUN --to transformers
"""

import argparse
import contextlib
import copy
import json
import logging
import math
import os
import sys
import warnings
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_patch_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.utils import logging as transformers_logging

from .classifiers import check_complete, label_names, load_classifier, load_image_processor
from .configuration_deit_ti import CLASS_TOKEN, TOKENS, DeiTTiConfig
from .errors import UserError
from .modeling_deit_ti import DeiTTiForImageClassification, interpolate_position_embeddings


StateDict = dict[str, torch.Tensor]

FLAG = "--model_name_or_path"
TRANSFORMERS_CLASSES = (
    ViTForImageClassification,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
)

POSITIONS = "deit_ti.embeddings.position_embeddings"
PATCH_WEIGHT = "deit_ti.embeddings.patch_projection.weight"
# The fields that DeiTTiConfig shares with ViTConfig and DeiTConfig.
SHARED_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
)
# What an export's config.json says about the model it came from, beside its own fields.
RECORD_FIELDS = ("distill_mode", "tokens", "readout")
# What a checkpoint has to have in common with the student for its weights to fit.
FITTING_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_channels",
    "qkv_bias",
)


def token_order(config: DeiTTiConfig) -> list[str]:
    """The model's tokens with the one that a single head reads first."""
    if config.readout == "both":
        return list(TOKENS)
    return sorted(config.tokens, key=lambda token: token != config.readout)


def transformers_names(architecture: type[PreTrainedModel], order: list[str], num_layers: int) -> dict[str, str]:
    """Our modules and parameters, and what they are called in a transformers class; `order` as in [`token_order`]."""
    prefix = architecture.base_model_prefix
    names = {
        "deit_ti.embeddings.patch_projection": f"{prefix}.embeddings.patch_embeddings.projection",
        POSITIONS: f"{prefix}.embeddings.position_embeddings",
        "deit_ti.norm": f"{prefix}.layernorm",
    }
    heads = ("classifier",)
    if architecture is DeiTForImageClassificationWithTeacher:
        heads = ("cls_classifier", "distillation_classifier")
    names |= token_names(order, (f"{prefix}.embeddings.cls_token", f"{prefix}.embeddings.distillation_token"), heads)
    for layer in range(num_layers):
        ours, theirs = f"deit_ti.layers.{layer}", f"{prefix}.layers.{layer}"
        names |= {
            f"{ours}.attention_norm": f"{theirs}.layernorm_before",
            f"{ours}.attention.qkv": f"{theirs}.attention.qkv",  # which split_qkv takes apart
            f"{ours}.attention.projection": f"{theirs}.attention.o_proj",
            f"{ours}.mlp_norm": f"{theirs}.layernorm_after",
            f"{ours}.mlp": f"{theirs}.mlp",
        }
    return names


def timm_names(distilled: bool, order: list[str], num_layers: int) -> dict[str, str]:
    """Our modules and parameters, and what they are called in timm."""
    names = {
        "deit_ti.embeddings.patch_projection": "patch_embed.proj",
        POSITIONS: "pos_embed",
        "deit_ti.norm": "norm",
    }
    if distilled:
        names |= token_names(order, ("cls_token", "dist_token"), ("head", "head_dist"))
    else:
        names |= token_names(order, ("cls_token", "reg_token"), ("head",))
    for layer in range(num_layers):
        ours, theirs = f"deit_ti.layers.{layer}", f"blocks.{layer}"
        names |= {
            f"{ours}.attention_norm": f"{theirs}.norm1",
            f"{ours}.attention.qkv": f"{theirs}.attn.qkv",
            f"{ours}.attention.projection": f"{theirs}.attn.proj",
            f"{ours}.mlp_norm": f"{theirs}.norm2",
            f"{ours}.mlp": f"{theirs}.mlp",
        }
    return names


def token_names(order: list[str], tokens: tuple[str, ...], heads: tuple[str, ...]) -> dict[str, str]:
    """Our tokens and heads, in the order of the sequence, and what they are called there."""
    ours = [f"deit_ti.embeddings.{token}_token" for token in order]
    return dict(zip(ours, tokens, strict=False)) | dict(zip([f"{token}_head" for token in order], heads, strict=False))


def rename(state: StateDict, names: dict[str, str]) -> tuple[StateDict, list[str]]:
    """The tensors under their other names (`names` has modules and parameters), and the keys that have none."""
    renamed, left_over = {}, []
    for key, tensor in state.items():
        parts = key.split(".")
        prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        known = next((prefix for prefix in prefixes if prefix in names), None)
        if known is None:
            left_over.append(key)
        else:
            renamed[names[known] + key[len(known) :]] = tensor
    return renamed, left_over


def split_qkv(state: StateDict) -> StateDict:
    """One (3 D, D) product of queries, keys and values into the three (D, D) that transformers has."""
    split = {}
    for key, tensor in state.items():
        if ".qkv." in key:
            for projection, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                split[key.replace("qkv", projection)] = part
        else:
            split[key] = tensor
    return split


def fuse_qkv(state: StateDict) -> StateDict:
    """The inverse of [`split_qkv`]; where one of the three is missing, so is the result."""
    fused = {key: tensor for key, tensor in state.items() if not {"q_proj", "k_proj", "v_proj"} & set(key.split("."))}
    for key in state:
        parts = [state.get(key.replace("q_proj", projection)) for projection in ("q_proj", "k_proj", "v_proj")]
        if ".q_proj." in key and all(part is not None for part in parts):
            fused[key.replace("q_proj", "qkv")] = torch.cat(parts)
    return fused


def reorder_positions(positions: torch.Tensor, old: list[str], new: list[str]) -> torch.Tensor:
    """Moves the learned tokens' rows of (1, N, D) position embeddings from one order of the tokens to another."""
    rows = [old.index(token) for token in new]
    return torch.cat((positions[:, rows], positions[:, len(rows) :]), dim=1)


def export_state(model: DeiTTiForImageClassification) -> StateDict:
    """The model's tensors with the positions in [`token_order`], without the head that is not read out."""
    config = model.config
    state = dict(model.state_dict())
    state[POSITIONS] = reorder_positions(state[POSITIONS], config.tokens, token_order(config))
    if config.readout != "both":
        state = {key: value for key, value in state.items() if "_head." not in key or key.startswith(config.readout)}
    return state


# To transformers


def to_transformers(model: DeiTTiForImageClassification) -> PreTrainedModel:
    """
    The same network as one of transformers' own classes, which loads without remote code.

    Returns:
        `ViTForImageClassification` for a one-token model, `DeiTForImageClassificationWithTeacher` for one that reads
        out both heads, `DeiTForImageClassification` for a two-token model that reads out one. The last has that one
        head; where it is the distillation head, the distillation token and its position come first and transformers
        calls it class token. The copy is on the model's device, in its dtype, in `eval()`.
    """
    config = model.config
    if len(config.tokens) == 1:
        config_class, architecture = ViTConfig, ViTForImageClassification
    elif config.readout == "both":
        config_class, architecture = DeiTConfig, DeiTForImageClassificationWithTeacher
    else:
        config_class, architecture = DeiTConfig, DeiTForImageClassification
    exported_config = config_class(
        **{field: getattr(config, field) for field in (*SHARED_FIELDS, *RECORD_FIELDS)},
        id2label=config.id2label,
        label2id=config.label2id,
    )
    with torch.random.fork_rng(devices=[]):  # a training run's random numbers stay untouched
        exported = architecture(exported_config)
    names = transformers_names(architecture, token_order(config), config.num_hidden_layers)
    state, _ = rename(export_state(model), names)
    exported.load_state_dict(split_qkv(state))
    return exported.to(model.device, model.dtype).eval()


def save_transformers(model: DeiTTiForImageClassification, image_processor, folder: str | os.PathLike) -> None:
    """
    Saves the model as one of transformers' own classes, with its image processor.

    Args:
        model (`DeiTTiForImageClassification`)
        image_processor (`BaseImageProcessor`): the model's.
        folder (`str` or `os.PathLike`): where to; a run has it in its subfolder `transformers`.
    """
    to_transformers(model).save_pretrained(folder)
    image_processor.save_pretrained(folder)


# To timm


def timm_arguments(config: DeiTTiConfig) -> dict:
    """
    The arguments of `timm.create_model` for the same network; with `checkpoint_path` it is the model.

    Raises:
        UserError: if timm has no such network.
    """
    # timm fixes both where its architectures are defined.
    for field, value in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)):
        if getattr(config, field) != value:
            raise UserError(f"timm's DeiT has {field} {value}, the model has {getattr(config, field)}.")
    mlp_ratio = config.intermediate_size / config.hidden_size
    if int(config.hidden_size * mlp_ratio) < config.intermediate_size:  # timm rounds their product down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    arguments = {
        "model_name": "deit_tiny_distilled_patch16_224" if config.readout == "both" else "deit_tiny_patch16_224",
        "num_classes": config.num_labels,
        "img_size": config.image_size,
        "patch_size": config.patch_size,
    }
    if len(config.tokens) == 2 and config.readout != "both":
        arguments["reg_tokens"] = 1
    for argument, value, default in (
        ("embed_dim", config.hidden_size, 192),
        ("depth", config.num_hidden_layers, 12),
        ("num_heads", config.num_attention_heads, 3),
        ("mlp_ratio", mlp_ratio, 4.0),
        ("qkv_bias", config.qkv_bias, True),
        ("in_chans", config.num_channels, 3),
    ):
        if value != default:
            arguments[argument] = value
    return arguments


def to_timm(model: DeiTTiForImageClassification) -> VisionTransformer:
    """
    The same network as timm's: `deit_tiny_distilled_patch16_224` where both heads are read out, otherwise
    `deit_tiny_patch16_224`, with the token that is not read out as a register. On the model's device, in its dtype,
    in `eval()`; `model(pixel_values)` gives the logits.

    Raises:
        UserError: if timm has no such network.
    """
    config = model.config
    with torch.random.fork_rng(devices=[]):  # a training run's random numbers stay untouched
        exported = timm.create_model(**timm_arguments(config))
    names = timm_names(config.readout == "both", token_order(config), config.num_hidden_layers)
    state, _ = rename(export_state(model), names)
    exported.load_state_dict(state)
    return exported.to(model.device, model.dtype).eval()


def save_timm(model: DeiTTiForImageClassification, image_processor, folder: str | os.PathLike) -> dict:
    """
    Saves the model in timm's own format: `model.safetensors` and `config.json`, which records the architecture, its
    arguments, the labels and the preprocessing. `timm.create_model("local-dir:FOLDER", pretrained=True)` loads it,
    and so do transformers' `AutoModelForImageClassification` and `AutoImageProcessor`.

    Args:
        model (`DeiTTiForImageClassification`)
        image_processor (`BaseImageProcessor`): the model's.
        folder (`str` or `os.PathLike`): where to.

    Returns:
        `dict`: the arguments of `timm.create_model` that, with `checkpoint_path=FOLDER/model.safetensors`, load it.

    Raises:
        UserError: if timm has no such network.
    """
    config = model.config
    exported = to_timm(model)
    arguments = timm_arguments(config)
    model_args = {key: value for key, value in arguments.items() if key not in ("model_name", "num_classes")}
    document = {
        "architecture": arguments["model_name"],
        "num_classes": config.num_labels,
        "num_features": config.hidden_size,
        "global_pool": "token",
        "label_names": label_names(config),
        "model_args": model_args,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [config.num_channels, config.image_size, config.image_size],
            "fixed_input_size": True,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if config.readout == "both" else "head",
            "num_classes": config.num_labels,
            **timm_preprocessing(image_processor, config.image_size),
        },
        **{field: getattr(config, field) for field in RECORD_FIELDS},
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.contiguous() for key, tensor in exported.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return arguments


def timm_preprocessing(image_processor, image_size: int) -> dict:
    """What an image processor does, in the words of timm's `pretrained_cfg`."""
    steps = image_processor.to_dict()
    preprocessing = {"crop_pct": 1.0, "crop_mode": "squash", "mean": [0.0] * 3, "std": [1.0] * 3}
    if steps.get("resample") is not None:
        names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
        preprocessing["interpolation"] = names[int(steps["resample"])]
    if steps.get("do_normalize"):
        preprocessing |= {"mean": list(steps["image_mean"]), "std": list(steps["image_std"])}
    # Resized to the size itself, or by the shorter side and then cropped.
    shortest_edge = (steps.get("size") or {}).get("shortest_edge")
    if shortest_edge:
        crop_pct = image_size / shortest_edge
        if int(image_size / crop_pct) < shortest_edge:  # timm rounds the quotient down
            crop_pct = math.nextafter(crop_pct, 0)
        preprocessing |= {"crop_pct": crop_pct, "crop_mode": "center"}
    return preprocessing


# From transformers and timm


def load_student(
    name_or_path: str | os.PathLike, config: DeiTTiConfig
) -> tuple[DeiTTiForImageClassification, list[str]]:
    """
    A student that starts from another model's weights, for fine-tuning.

    The source is a DeiT-Ti of this project, transformers' `ViTForImageClassification`, `DeiTForImageClassification`
    or `DeiTForImageClassificationWithTeacher`, or timm's DeiT-Ti; in a folder or on the Hub, or a timm architecture
    that has pretrained weights. Only safetensors are read, and no remote code runs. The exports of this module come
    back as what they were exported from.

    What the two have in common is taken over. Position embeddings are interpolated where the grid of patches differs,
    the patch projection is resampled where the patch size does (FlexiViT, Beyer et al., 2023). A head is taken over
    where source and student have the same label names, its rows in the student's order. The rest is new.

    Args:
        name_or_path (`str` or `os.PathLike`): folder, Hub id or timm architecture, with or without its tag.
        config (`DeiTTiConfig`): the student's, which stays as it is. The student's own config has the source's
            `layer_norm_eps` and `hidden_act`, since its weights were made for them.

    Returns:
        `tuple[DeiTTiForImageClassification, list[str]]`: the student, in float32, and one sentence for each part that
        is new, was changed on the way, or was left behind.

    Raises:
        UserError: if the source cannot be read, is incomplete, is no DeiT or ViT, or has another width, depth or
            number of channels.
    """
    name = str(name_or_path)
    model, missing = load_classifier(name, FLAG, dtype=torch.float32)
    state = {key: value for key, value in model.state_dict().items() if key not in missing}
    if isinstance(model, DeiTTiForImageClassification):
        source = model.config
    elif isinstance(model, TRANSFORMERS_CLASSES):
        source, state = _from_transformers(name, model, state)
    elif isinstance(model, TimmWrapperForImageClassification):
        source, state = _from_timm(name, model, state)
    else:
        kind = model.config.model_type
        raise UserError(f"{FLAG} {name}: it is a {kind}, not a deit_ti, a deit or vit of transformers, or timm's.")
    for field in FITTING_FIELDS:
        ours, theirs = getattr(config, field), getattr(source, field)
        if ours != theirs:
            raise UserError(f"{FLAG} {name}: its {field} is {theirs}, the student's {ours}: the weights do not fit.")
    config = copy.deepcopy(config)
    config.layer_norm_eps, config.hidden_act = source.layer_norm_eps, source.hidden_act
    student = DeiTTiForImageClassification(config)
    fresh = student.state_dict()
    report = []

    # The token of a one-token model is the token of another, whatever it learned from.
    if len(source.tokens) == len(config.tokens) == 1 and source.tokens != config.tokens:
        report.append(f"The {config.tokens[0]} token and its head start from the source's {source.tokens[0]} token.")
        state = {key.replace(f"{source.tokens[0]}_", f"{config.tokens[0]}_"): value for key, value in state.items()}
        source.tokens = config.tokens
    for token in source.tokens:
        if token not in config.tokens:
            report.append(f"The source's {token} token and its head are left behind.")
            state = {key: value for key, value in state.items() if f"{token}_" not in key}

    if config.patch_size != source.patch_size and PATCH_WEIGHT in state:
        state[PATCH_WEIGHT] = resample_patch_embed(state[PATCH_WEIGHT], (config.patch_size, config.patch_size))
        sizes = f"from {_square(source.patch_size)} to {_square(config.patch_size)} pixels"
        report.append(f"The patch projection is resampled {sizes}.")
    if POSITIONS in state:
        state[POSITIONS] = _fit_positions(state[POSITIONS], fresh[POSITIONS], source, config, report)
    for token in config.tokens:
        if token not in source.tokens:
            state[f"deit_ti.embeddings.{token}_token"] = fresh[f"deit_ti.embeddings.{token}_token"]
            report.append(f"The {token} token and its position are newly initialised: the source has none.")
        state = _fit_head(state, f"{token}_head", source, config, report)

    check_complete([key for key in fresh if key not in state and "_head." not in key], name, FLAG)
    student.load_state_dict(fresh | state)
    return student, report


def _from_transformers(name: str, model: PreTrainedModel, state: StateDict) -> tuple[DeiTTiConfig, StateDict]:
    config = model.config
    fields = {field: getattr(config, field) for field in SHARED_FIELDS}
    fields |= {field: _side(name, field, fields[field]) for field in ("image_size", "patch_size")}
    if isinstance(model, ViTForImageClassification):
        source = _source_config(config, [CLASS_TOKEN], CLASS_TOKEN, fields)
    elif isinstance(model, DeiTForImageClassification):
        source = _source_config(config, list(TOKENS), CLASS_TOKEN, fields)
    else:
        source = _source_config(config, list(TOKENS), "both", fields)
    names = transformers_names(type(model), token_order(source), source.num_hidden_layers)
    return source, _import_state(name, fuse_qkv(state), names, source)


def _from_timm(name: str, model: PreTrainedModel, state: StateDict) -> tuple[DeiTTiConfig, StateDict]:
    network = model.timm_model
    if not isinstance(network, VisionTransformer) or network.global_pool != "token":
        raise UserError(f"{FLAG} {name}: timm's {model.config.architecture} is no DeiT.")
    block = network.blocks[0]
    fields = {
        "hidden_size": network.embed_dim,
        "num_hidden_layers": len(network.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "layer_norm_eps": block.norm1.eps,
        "image_size": _side(name, "image_size", network.patch_embed.img_size),
        "patch_size": _side(name, "patch_size", network.patch_embed.patch_size),
        "num_channels": network.patch_embed.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None,
    }
    distilled = network.num_prefix_tokens == 2 and network.num_reg_tokens == 0
    if distilled:
        source = _source_config(model.config, list(TOKENS), "both", fields)
    else:
        source = _source_config(model.config, [CLASS_TOKEN], CLASS_TOKEN, fields)
    names = timm_names(distilled, token_order(source), source.num_hidden_layers)
    state = {key.removeprefix("timm_model."): value for key, value in state.items()}
    return source, _import_state(name, state, names, source)


def _source_config(config, tokens: list[str], readout: str, fields: dict) -> DeiTTiConfig:
    """The source's config in our terms; what it records about the model it was exported from comes first."""
    record = {field: getattr(config, field) for field in RECORD_FIELDS if hasattr(config, field)}
    labels = {"id2label": dict(enumerate(label_names(config))), "num_labels": config.num_labels}
    return DeiTTiConfig(**{"tokens": tokens, "readout": readout} | record | fields | labels)


def _import_state(name: str, state: StateDict, names: dict[str, str], source: DeiTTiConfig) -> StateDict:
    """A source's tensors under our names, positions in our order of the tokens."""
    state, left_over = rename(state, {theirs: ours for ours, theirs in names.items()})
    if left_over:
        raise UserError(f"{FLAG} {name}: a DeiT-Ti has no {', '.join(left_over[:3])}.")
    if POSITIONS in state:
        rows = len(source.tokens) + (source.image_size // source.patch_size) ** 2
        if state[POSITIONS].shape[1] != rows:
            found = state[POSITIONS].shape[1]
            raise UserError(f"{FLAG} {name}: it has {found} position embeddings, a DeiT-Ti has {rows}.")
        state[POSITIONS] = reorder_positions(state[POSITIONS], token_order(source), source.tokens)
    return state


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
        report.append(f"The position embeddings are interpolated from {_square(old)} to {_square(new)} patches.")
    return interpolate_position_embeddings(positions, len(rows), (new, new))


def _fit_head(state: StateDict, head: str, source: DeiTTiConfig, config: DeiTTiConfig, report: list[str]) -> StateDict:
    """The tensors with that head in the student's order of labels, or without it; adds to the report."""
    title, weight, bias = head.replace("_", " "), f"{head}.weight", f"{head}.bias"
    rest = {key: value for key, value in state.items() if key not in (weight, bias)}
    if weight not in state or bias not in state:
        report.append(f"The {title} is newly initialised: the source has none.")
        return rest
    theirs, ours = label_names(source), label_names(config)
    if theirs == ours:
        return state
    if sorted(theirs) == sorted(ours) and len(set(ours)) == len(ours):
        rows = [theirs.index(label) for label in ours]
        report.append(f"The {title} is put into the dataset's order of labels: the source has them in another.")
        return rest | {weight: state[weight][rows], bias: state[bias][rows]}
    report.append(f"The {title} is newly initialised: the source has other labels ({len(theirs)} of them).")
    return rest


def _side(name: str, field: str, size: int | tuple[int, int]) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"{FLAG} {name}: its {field} is {size}, a DeiT-Ti takes squares only.")
    return sides.pop()


def _square(side: int) -> str:
    return f"{side}x{side}"


# To ONNX


class _LogitsOnly(nn.Module):
    """The model with a tuple of named tensors as its output, since ONNX has no `ModelOutput`."""

    def __init__(self, model: DeiTTiForImageClassification, names: list[str]):
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(pixel_values, interpolate_pos_encoding=True)
        return tuple(output[name] for name in self.names)


def export_onnx(
    model: DeiTTiForImageClassification, file: str | os.PathLike, image_size: int | None = None
) -> list[str]:
    """
    Writes the model as one ONNX file. Its input `pixel_values` is (batch, C, image_size, image_size), normalised
    float32 images, any number of them; its outputs are (batch, num_labels). The metadata has the labels (`id2label`,
    JSON).

    Args:
        model (`DeiTTiForImageClassification`)
        file (`str` or `os.PathLike`): where to.
        image_size (`int`, *optional*, defaults to the model's): height and width of the images; another size
            interpolates the position embeddings.

    Returns:
        `list[str]`: the names of the outputs: `logits`, and where there are two heads `class_logits` and
        `distillation_logits`.

    Raises:
        UserError: if the model's patches do not divide `image_size`.
        ImportError: if `onnx` or `onnxscript` is not installed.
    """
    config = model.config
    image_size = image_size or config.image_size
    if image_size % config.patch_size:
        raise UserError(f"The patch size {config.patch_size} does not divide the image size {image_size}.")
    names = ["logits", "class_logits", "distillation_logits"] if len(config.tokens) == 2 else ["logits"]
    network = _LogitsOnly(copy.deepcopy(model).to("cpu", torch.float32), names).eval()
    network.model.set_attn_implementation("sdpa")
    # Two images: torch.export takes a batch of one for a constant.
    images = torch.zeros(2, config.num_channels, image_size, image_size)
    with quiet():
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["pixel_values"],
            output_names=names,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    program.model.metadata_props["id2label"] = json.dumps(config.id2label)
    program.save(file)
    return names


@contextlib.contextmanager
def quiet():
    """Keeps the exporter's remarks about its own internals from the user."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


# The command


def convert(folder: str, to: str, output: Path | None = None) -> str:
    """
    Converts a finished run.

    Args:
        folder (`str`): the run's folder, or a Hub id.
        to (`str`): `"transformers"`, `"timm"` or `"onnx"`.
        output (`Path`, *optional*, defaults to `FOLDER/transformers`, `FOLDER/timm` or `FOLDER/model.onnx`):
            folder, or file for ONNX; it must not exist.

    Returns:
        `str`: how to load what was written.

    Raises:
        UserError: if the run cannot be loaded or converted, or the output exists.
    """
    if output is None:
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder on this machine: name an --output.")
        output = Path(folder) / {"onnx": "model.onnx"}.get(to, to)
    if output.exists():
        raise UserError(f"{output} exists already: move it away, or name another --output.")
    if to == "onnx" and not output.parent.is_dir():
        raise UserError(f"There is no folder {output.parent} to write {output.name} into.")
    model, missing = load_classifier(folder, "FOLDER")
    if not isinstance(model, DeiTTiForImageClassification):
        raise UserError(f"FOLDER {folder}: it is a {model.config.model_type}, not a deit_ti.")
    check_complete(missing, folder, "FOLDER")
    image_processor = load_image_processor(folder, "FOLDER")
    if to == "transformers":
        save_transformers(model, image_processor, output)
        return f'AutoModelForImageClassification.from_pretrained("{output}")'
    if to == "timm":
        arguments = save_timm(model, image_processor, output)
        arguments["checkpoint_path"] = f"{output / 'model.safetensors'}"
        return f"timm.create_model({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    try:
        export_onnx(model, output)
    except ImportError as error:
        raise UserError(f"ONNX needs packages that are missing ({error}): pip install onnx onnxscript.") from error
    return f'onnxruntime.InferenceSession("{output}")'


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_deit_ti.interop",
        description="Converts a trained DeiT-Ti for transformers without remote code, for timm, or to ONNX.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of a finished run, or a Hub id")
    parser.add_argument("--to", required=True, choices=("transformers", "timm", "onnx"))
    parser.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="where to: folder, or file for onnx; FOLDER/transformers, FOLDER/timm or FOLDER/model.onnx by default",
    )
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        print(f"Written. To load it: {convert(options.folder, options.to, options.output)}")
    except (UserError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

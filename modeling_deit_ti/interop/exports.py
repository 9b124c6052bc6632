"""Exports a DeiT-Ti to transformers' own classes, timm and ONNX."""

import copy
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import (
    BaseImageProcessor,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    ViTForImageClassification,
)

from ..classifiers import check_complete, label_names, load_classifier, load_image_processor
from ..configuration_deit_ti import DeiTTiConfig
from ..errors import UserError
from ..modeling_deit_ti import DeiTTiForImageClassification
from .names import RECORD_FIELDS, SHARED_FIELDS, export_state, split_qkv, timm_names, transformers_names


def load_run(name: str, flag: str) -> tuple[DeiTTiForImageClassification, BaseImageProcessor]:
    """
    The model and image processor of a finished run; the arguments are those of [`load_classifier`].

    Raises:
        UserError: if they cannot be loaded, or the model is not a DeiT-Ti.
    """
    model, missing = load_classifier(name, flag)
    if not isinstance(model, DeiTTiForImageClassification):
        raise UserError(f"{flag} {name}: it is a {model.config.model_type}, not a deit_ti.")
    check_complete(missing, name, flag)
    return model, load_image_processor(name, flag)


# ---- To transformers ----


def to_transformers(model: DeiTTiForImageClassification) -> PreTrainedModel:
    """
    The same network as one of transformers' own classes, which loads without remote code.

    Returns:
        `ViTForImageClassification` for a one-token model, `DeiTForImageClassificationWithTeacher` for one that reads
        out both heads, `DeiTForImageClassification` for a two-token model that reads out one, whose token then comes
        first, as transformers' class token. On the model's device, in its dtype, in `eval()` mode.
    """
    config = model.config
    architecture = DeiTForImageClassificationWithTeacher if config.readout == "both" else DeiTForImageClassification
    if len(config.tokens) == 1:
        architecture = ViTForImageClassification
    fields = {field: getattr(config, field) for field in (*SHARED_FIELDS, *RECORD_FIELDS, "id2label", "label2id")}
    with torch.random.fork_rng(devices=[]):  # a training run's random numbers must not change
        exported = architecture(architecture.config_class(**fields))
    exported.load_state_dict(split_qkv(export_state(model, transformers_names(config))))
    return exported.to(model.device, model.dtype).eval()


def save_transformers(
    model: DeiTTiForImageClassification, image_processor: BaseImageProcessor, folder: str | os.PathLike
) -> None:
    """Saves the model as one of transformers' own classes, with its image processor."""
    to_transformers(model).save_pretrained(folder)
    image_processor.save_pretrained(folder)


# ---- To timm ----


def timm_arguments(config: DeiTTiConfig) -> dict:
    """
    The arguments of `timm.create_model` for the same network; `checkpoint_path` adds its weights.

    Raises:
        UserError: if timm has no such network.
    """
    for field, value in (("hidden_act", "gelu"), ("layer_norm_eps", 1e-6)):  # fixed in timm's own definition
        if getattr(config, field) != value:
            raise UserError(f"timm's DeiT has {field} {value}, but the model has {getattr(config, field)}.")
    mlp_ratio = config.intermediate_size / config.hidden_size
    if int(config.hidden_size * mlp_ratio) < config.intermediate_size:  # timm rounds their product down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    both = config.readout == "both"
    arguments = {
        "model_name": "deit_tiny_distilled_patch16_224" if both else "deit_tiny_patch16_224",
        "num_classes": config.num_labels,
        "img_size": config.image_size,
        "patch_size": config.patch_size,
    }
    others = (
        ("reg_tokens", 0 if both else len(config.tokens) - 1, 0),
        ("embed_dim", config.hidden_size, 192),
        ("depth", config.num_hidden_layers, 12),
        ("num_heads", config.num_attention_heads, 3),
        ("mlp_ratio", mlp_ratio, 4.0),
        ("qkv_bias", config.qkv_bias, True),
        ("in_chans", config.num_channels, 3),
    )
    return arguments | {argument: value for argument, value, default in others if value != default}


def to_timm(model: DeiTTiForImageClassification) -> VisionTransformer:
    """
    The same network in timm, on the model's device, in its dtype, in `eval()` mode: `deit_tiny_distilled_patch16_224`
    if both heads are read out, otherwise `deit_tiny_patch16_224`, where a token that is not read out is a register.

    Raises:
        UserError: if timm has no such network.
    """
    with torch.random.fork_rng(devices=[]):  # a training run's random numbers must not change
        exported = timm.create_model(**timm_arguments(model.config))
    exported.load_state_dict(export_state(model, timm_names(model.config)))
    return exported.to(model.device, model.dtype).eval()


def save_timm(
    model: DeiTTiForImageClassification, image_processor: BaseImageProcessor, folder: str | os.PathLike
) -> dict:
    """
    Saves `model.safetensors` and `config.json` as timm does. `timm.create_model("local-dir:FOLDER", pretrained=True)`
    loads them, and so do transformers' `AutoModelForImageClassification` and `AutoImageProcessor`.

    Returns:
        `dict`: the arguments of `timm.create_model` that, with `checkpoint_path=FOLDER/model.safetensors`, load it.

    Raises:
        UserError: if timm has no such network.
    """
    config = model.config
    arguments = timm_arguments(config)
    document = {
        "architecture": arguments["model_name"],
        "num_classes": config.num_labels,
        "num_features": config.hidden_size,
        "global_pool": "token",
        "label_names": label_names(config),
        "model_args": {key: value for key, value in arguments.items() if key not in ("model_name", "num_classes")},
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
    state = {key: tensor.contiguous() for key, tensor in to_timm(model).state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return arguments


def timm_preprocessing(image_processor: BaseImageProcessor, image_size: int) -> dict:
    """What a run's image processor does, in the terms of timm's `pretrained_cfg`."""
    shortest_edge = image_processor.size["shortest_edge"]
    crop_pct = image_size / shortest_edge
    if int(image_size / crop_pct) < shortest_edge:  # timm rounds the quotient down
        crop_pct = math.nextafter(crop_pct, 0)
    mean, std = list(image_processor.image_mean), list(image_processor.image_std)
    return {"interpolation": "bicubic", "crop_pct": crop_pct, "crop_mode": "center", "mean": mean, "std": std}


# ---- To ONNX ----

ONNX_FILE, QUANTIZED_FILE = "model.onnx", "model_quantized.onnx"  # transformers.js's names


class _NamedLogits(nn.Module):
    """Returns the model's named logits as a tuple, since ONNX has no `ModelOutput`."""

    def __init__(self, model: DeiTTiForImageClassification, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(pixel_values, interpolate_pos_encoding=True)
        return tuple(output[name] for name in self.names)


def export_onnx(
    model: DeiTTiForImageClassification, file: str | os.PathLike, image_size: int | None = None
) -> list[str]:
    """
    Writes the model as one ONNX file. Its input `pixel_values` is (B, C, image_size, image_size), normalised float32
    images; its outputs are (B, num_labels). Its metadata holds the labels (`id2label`, as JSON).

    Args:
        image_size (`int`, *optional*, defaults to the model's): height and width of the images, in pixels.

    Returns:
        `list[str]`: the outputs: `logits` and, with two heads, `class_logits` and `distillation_logits`.

    Raises:
        UserError: if the model's patch size does not divide `image_size`.
        ImportError: if `onnx` or `onnxscript` is not installed.
    """
    config = model.config
    image_size = image_size or config.image_size
    if image_size % config.patch_size:
        raise UserError(f"The patch size {config.patch_size} does not divide the image size {image_size}.")
    names = ["logits", "class_logits", "distillation_logits"] if len(config.tokens) == 2 else ["logits"]
    network = _NamedLogits(copy.deepcopy(model).to("cpu", torch.float32), names).eval()
    network.model.set_attn_implementation("sdpa")
    # Two images: torch.export would treat a batch size of one as a constant.
    images = torch.zeros(2, config.num_channels, image_size, image_size)
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


def quantize_onnx(file: str | os.PathLike, quantized: str | os.PathLike) -> None:
    """
    Writes a copy of an ONNX file with int8 weights in its matrix products; what they are multiplied with is rounded
    to 8 bits at run time.

    Raises:
        ImportError: if `onnxruntime` is not installed.
    """
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "model.onnx")
        quant_pre_process(str(file), str(prepared))  # adds the shapes that quantization needs
        # The products inside attention have no weights: rounding them loses accuracy and saves no time.
        only_weights = {"op_types_to_quantize": ["MatMul", "Gemm"], "extra_options": {"MatMulConstBOnly": True}}
        quantize_dynamic(prepared, quantized, **only_weights)


def save_onnx(model: DeiTTiForImageClassification, folder: str | os.PathLike) -> None:
    """
    Saves what transformers.js looks for in the folder `onnx` beside the files of [`save_transformers`]: `model.onnx`
    in float32 and `model_quantized.onnx` in int8. `preprocessing.js` is for images of any size but the model's.

    Raises:
        UserError: if `onnx`, `onnxruntime` or `onnxscript` is not installed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        unfinished = Path(temporary, "onnx")  # with the usual permissions, which the temporary folder does not have
        unfinished.mkdir()
        file = unfinished / ONNX_FILE
        try:
            export_onnx(model, file)
            quantize_onnx(file, file.with_name(QUANTIZED_FILE))
        except ImportError as error:
            raise UserError(
                f"ONNX needs packages that are not installed ({error}): pip install onnx onnxruntime onnxscript."
            ) from error
        shutil.copytree(unfinished, folder, dirs_exist_ok=True)
    shutil.copy(Path(__file__).parent / "page" / "preprocessing.js", folder)

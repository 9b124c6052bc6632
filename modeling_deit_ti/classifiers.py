"""Any image classifier by name: a timm architecture, a folder, or a Hub id."""

import contextlib
import copy
import os
import re
from collections.abc import Iterator

import timm
import torch
from PIL import Image as PILImage
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    DeiTImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from .errors import UserError, first_line
from .hub import retrying


# The largest numbers allowed in a config, by key. Anything larger would take all memory, or forever, to build.
MAX_NUMBER = 1_000_000
MAX_NUMBERS = {
    re.compile(r"layers$|^depths?$|blocks$"): 10_000,
    re.compile(r"^size$|^(image|img|input|crop)_size$|^(height|width|shortest_edge|longest_edge)$"): 8_192,
}
# Arguments of timm's create_model that make it read other files, which older versions of timm unpickle.
FILE_READING_ARGS = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


def label_maps(label_names: list[str]) -> dict:
    """`id2label` and `label2id` of a transformers config."""
    return {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}


def label_names(config: PreTrainedConfig) -> list[str]:
    """The names of a model's labels, by label id."""
    return [config.id2label[label] for label in range(config.num_labels)]


def is_timm_architecture(name: str) -> bool:
    """Whether timm can build `name`, given with or without a tag. A folder of that name takes precedence."""
    return not os.path.isdir(name) and timm.is_model(name)


def timm_hub_id(name: str) -> str:
    """
    The Hub id of the pretrained weights of an architecture, given with or without a tag. timm itself would fall back
    to pickled ones.

    Raises:
        UserError: if timm has no such weights.
    """
    try:
        pretrained_cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(f"timm has no pretrained weights for {name}: {error}") from error
    if pretrained_cfg is None or not pretrained_cfg.hf_hub_id:
        raise UserError(f"timm has no pretrained weights for {name}.")
    hub_id = pretrained_cfg.hf_hub_id
    return f"{hub_id}{pretrained_cfg.architecture}.{pretrained_cfg.tag}" if hub_id.endswith("/") else hub_id


def load_classifier(
    name: str, flag: str, trust_remote_code: bool = False, **kwargs
) -> tuple[PreTrainedModel, list[str]]:
    """
    An image classifier with its pretrained weights. Only safetensors are read: a pickle could run anything.

    Args:
        name (`str`): a folder, a Hub id, or a timm architecture with or without a tag.
        flag (`str`): where the user gave the name, for error messages.
        kwargs: passed on to `AutoModelForImageClassification.from_pretrained`, like `num_labels` or `dtype`.

    Returns:
        The model in `eval()`, and the sorted names of the weights that are random because the checkpoint lacks them.

    Raises:
        UserError: if it cannot be loaded.
    """
    with _explaining_errors(
        name, flag, "image classifier that AutoModelForImageClassification can load from safetensors"
    ):
        source = _source(name)
        config = _load_config(source, trust_remote_code)
        if isinstance(config, TimmWrapperConfig) and config.model_args:
            # timm's save_for_hf writes `num_classes` here too, and the wrapper would pass it to create_model twice.
            model_args = {key: value for key, value in config.model_args.items() if key != "num_classes"}
            kwargs = {"model_args": model_args, **kwargs}
        kwargs |= {"trust_remote_code": trust_remote_code, "use_safetensors": True, "output_loading_info": True}
        model, info = _load(AutoModelForImageClassification, source, **kwargs)
    return model.eval(), sorted(info["missing_keys"])


def load_config(name: str, flag: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a classifier; arguments and errors as in [`load_classifier`]."""
    with _explaining_errors(name, flag, "config that AutoConfig can load"):
        return _load_config(_source(name), trust_remote_code)


def load_image_processor(name: str, flag: str, trust_remote_code: bool = False) -> BaseImageProcessor:
    """The image processor of a classifier, tried on a picture; arguments and errors as in [`load_classifier`]."""
    with _explaining_errors(name, flag, "image processor that AutoImageProcessor can load"):
        processor = _load(AutoImageProcessor, _source(name), trust_remote_code=trust_remote_code)
        _check_numbers(processor.to_dict())
        pixel_values = processor(PILImage.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"]
        if not torch.as_tensor(pixel_values).isfinite().all():
            raise UserError("its image processor returns values that are not finite.")
    return processor


def check_complete(missing: list[str], name: str, flag: str) -> None:
    """Raises a `UserError` if a checkpoint lacks weights; the arguments are as in [`load_classifier`]."""
    if missing:
        raise UserError(f"{flag} {name}: it is incomplete and lacks {', '.join(missing[:3])}.")


def _load(kind: type, source: str, **kwargs):
    return retrying(lambda: kind.from_pretrained(source, **kwargs))


def _load_config(source: str, trust_remote_code: bool) -> PreTrainedConfig:
    raw, _ = retrying(lambda: PreTrainedConfig.get_config_dict(source))
    _check_numbers(raw)  # before anything is built from them, such as a name for each label
    config = _load(AutoConfig, source, trust_remote_code=trust_remote_code)
    if isinstance(config, TimmWrapperConfig):
        if not timm.is_model(config.architecture):
            raise UserError(f"its config names an architecture, {config.architecture!r}, that timm does not have.")
        for key in FILE_READING_ARGS:
            if key in (config.model_args or {}):
                raise UserError(f"its config has model_args with {key}, which names files to read: remove it.")
    return config


def _check_numbers(value, key: str = "") -> None:
    if isinstance(value, dict):
        for name, part in value.items():
            _check_numbers(part, str(name))
    elif isinstance(value, list):
        for part in value:
            _check_numbers(part, key)
    elif isinstance(value, int):
        limit = next((limit for pattern, limit in MAX_NUMBERS.items() if pattern.search(key)), MAX_NUMBER)
        if value > limit:
            raise UserError(f"its {key} is {value}, and no image classifier needs more than {limit:,}.")


def _source(name: str) -> str:
    return timm_hub_id(name) if is_timm_architecture(name) else name


@contextlib.contextmanager
def _explaining_errors(name: str, flag: str, what: str) -> Iterator[None]:
    """Turns any error inside into a `UserError` that says what was looked for, where, and what to do instead."""
    try:
        yield
    except Exception as error:  # transformers, timm and a model's own code can raise anything
        reason = first_line(error)
        if isinstance(error, UserError):
            message = str(error)
        elif "trust_remote_code" in str(error):
            message = "it has custom code. If you trust its author, add --trust_remote_code (not for students)."
        elif os.path.isdir(name):
            message = f"the folder holds no {what} ({reason}). Name one that save_pretrained wrote."
        else:
            where = "" if is_timm_architecture(name) else "there is no such folder or timm architecture, and "
            message = (
                f"{where}no {what} could be loaded from the Hub ({reason}). Offline, name a folder or a model in the "
                "Hub's cache."
            )
        raise UserError(f"{flag} {name}: {message}") from error


def input_format(
    config: PreTrainedConfig, path: str, flag: str, trust_remote_code: bool = False
) -> tuple[int, list[float], list[float]]:
    """
    A classifier's input format, from its timm config or the image processor at `path`: height and width in pixels (one
    number), and mean and standard deviation of each channel for values from 0 to 1.

    Raises:
        UserError: if there is no image processor, or it swaps or mixes the channels.
    """
    pretrained_cfg = getattr(config, "pretrained_cfg", None)
    if pretrained_cfg:
        data_config = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg, verbose=False)
        return data_config["input_size"][-1], list(data_config["mean"]), list(data_config["std"])
    processor = load_image_processor(path, flag, trust_remote_code)
    # Measured, not read: processors differ in what their fields mean, and some normalise twice, or not at all.
    size = getattr(config, "image_size", None)
    size = size if isinstance(size, int) else 224
    colours = [PILImage.new("RGB", (size, size), colour) for colour in ("black", "white", "red")]
    pixel_values = torch.as_tensor(processor(colours, return_tensors="pt")["pixel_values"]).float()
    own_size = pixel_values.shape[-1]
    black, white, red = pixel_values[:, :, own_size // 2, own_size // 2]
    if not torch.allclose(red, torch.stack((white[0], black[1], black[2])), atol=1e-3):
        raise UserError(f"{flag} {path}: its image processor swaps or mixes the colours, which is not supported.")
    std = 1 / (white - black)
    return own_size, (-black * std).tolist(), std.tolist()


def timm_input_format(image_processor: DeiTImageProcessor) -> dict:
    """The part of a timm config that describes the network's input, for images from this processor."""
    image_size = image_processor.crop_size["height"]
    return {
        "input_size": [3, image_size, image_size],
        "mean": list(image_processor.image_mean),
        "std": list(image_processor.image_std),
        "crop_pct": image_size / image_processor.size["shortest_edge"],
        "interpolation": "bicubic",
    }


def new_timm_classifier(
    architecture: str, label_names: list[str], image_size: int, image_processor: DeiTImageProcessor
) -> TimmWrapperForImageClassification:
    """
    A timm network with timm's own random initialisation, as a transformers model for images of `image_size` pixels.
    Its config records the image processor's normalisation and crop.
    """
    pretrained_cfg = timm.get_pretrained_cfg(architecture)
    model_args = {"img_size": image_size} if pretrained_cfg is not None and pretrained_cfg.fixed_input_size else None
    config = TimmWrapperConfig(
        architecture=architecture,
        model_args=model_args,
        **label_maps(label_names),
        pretrained_cfg=timm_input_format(image_processor),
    )
    model = TimmWrapperForImageClassification(config)
    # The wrapper draws all convolutions from a normal distribution with standard deviation 0.02, unsuitable for CNNs.
    initialised = timm.create_model(architecture, num_classes=len(label_names), **(model_args or {}))
    model.timm_model.load_state_dict(initialised.state_dict())
    return model


def pretrained_with_new_head(
    name: str, flag: str, label_names: list[str], image_processor: DeiTImageProcessor, trust_remote_code: bool = False
) -> PreTrainedModel:
    """
    A pretrained classifier with a new head for these labels; a timm config records the image processor's normalisation
    and crop. Arguments and errors as in [`load_classifier`].
    """
    options = {"ignore_mismatched_sizes": True, "num_labels": len(label_names), **label_maps(label_names)}
    model, _ = load_classifier(name, flag, trust_remote_code, **options)
    if isinstance(model.config, TimmWrapperConfig):
        model.config.pretrained_cfg |= timm_input_format(image_processor)
        model.config.label_names = list(label_names)  # a saved config has the source's, which would win
    return model


def freeze_backbone(model: PreTrainedModel) -> None:
    """Freezes everything but the heads."""
    model.requires_grad_(False)
    if isinstance(model.config, TimmWrapperConfig):
        heads = model.timm_model.get_classifier()
        for head in heads if isinstance(heads, tuple) else (heads,):
            head.requires_grad_(True)
        return
    backbone = set(model.base_model.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter not in backbone)


def check_accepts_images(model: PreTrainedModel, name: str, image_size: int, batch_size: int) -> None:
    """
    Tries a copy, in training mode, on zeros: timm does not say which sizes a network accepts, and batch norm may
    reject a batch of one.

    Raises:
        UserError: if the classifier, which the user calls `name`, cannot be trained on such batches.
    """
    trial = copy.deepcopy(model).train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial(pixel_values=torch.zeros(min(batch_size, 2), 3, image_size, image_size))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"{name} cannot be trained on batches of {batch_size} images of {image_size}x{image_size} pixels "
            f"({first_line(error)}). Use larger images (--image_size, --teacher_image_size) or larger batches "
            "(--per_device_train_batch_size)."
        ) from error

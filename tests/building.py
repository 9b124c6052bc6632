"""What the command builds from its flags, in sizes small enough for tests."""

import contextlib
import resource
from collections.abc import Iterator

import numpy as np
import torch

from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.arguments import Arguments, AugmentationArguments, ModelArguments
from modeling_deit_ti.card import Predictions, Report, make_report
from modeling_deit_ti.classifiers import new_timm_classifier
from modeling_deit_ti.data.inputs import make_image_processor
from modeling_deit_ti.parsing import parse_arguments
from modeling_deit_ti.teacher import Teacher


# A CNN from timm's own tests: 16 to 64 channels, a real architecture, fitted in seconds.
TINY_CNN = "test_resnet"
DIGITS = [str(digit) for digit in range(10)]
# Four steps of the real student, which has no flag for fewer blocks.
FOUR_STEPS = (
    "--config=recipes/digits.yaml",
    "--max_train_samples=128",
    "--max_eval_samples=100",
    "--num_train_epochs=1",
    "--per_device_train_batch_size=32",
    "--disable_tqdm=true",
)
# Names that Markdown, YAML, HTML, tables, formulas and templates would take for their own syntax.
NASTY_LABELS = [
    "a|b",
    "*bold* __init__",
    "<script>alert(1)</script>",
    "`tick` ``` fence",
    "line\nbreak\r\n\u2028---\n",
    "\"double\" 'single'",
    "🦓 zèbre 👩‍🚀",
    "key: value # comment",
    "- [link](x) ![image](y)",
    "back\\slash\\",
    "{{ name }} {% raw %} $x$ &amp; ~~gone~~",
    " ",
    "null",
]
NOTHING_RANDOM = {
    "crop": "none",
    "horizontal_flip": 0,
    "auto_augment": "none",
    "random_erasing": 0,
    "mixup": 0,
    "cutmix": 0,
    "repeated_augmentation": 1,
}


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Inside, no file can grow beyond this many bytes. It fails like a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def arguments(**flags) -> Arguments:
    """The arguments of `train_hf.py --flag=value ...`."""
    return parse_arguments([f"--{name}={value}" for name, value in flags.items()])


def image_processor(image_size: int):
    """The image processor of a model for images of this size, without cropping."""
    return make_image_processor(ModelArguments(image_size=image_size), AugmentationArguments(crop="none"))


def tiny_student(args: Arguments, num_hidden_layers: int = 2, num_labels: int = 10) -> DeiTTiForImageClassification:
    """A DeiT-Ti with few blocks, always with the same weights."""
    model = args.model
    config = DeiTTiConfig(
        image_size=model.image_size,
        patch_size=model.patch_size,
        drop_path_rate=model.drop_path_rate,
        patch_drop_rate=model.patch_drop_rate,
        num_labels=num_labels,
        num_hidden_layers=num_hidden_layers,
        **args.training.mode.network,
    )
    torch.manual_seed(3)
    return DeiTTiForImageClassification(config)


def tiny_teacher(kind: type[Teacher] = Teacher, **changes) -> Teacher:
    """An untrained teacher of the ten digits, always with the same weights."""
    torch.manual_seed(5)
    processor = image_processor(32)
    model = new_timm_classifier(TINY_CNN, DIGITS, 32, processor)
    mean, std = list(processor.image_mean), list(processor.image_std)
    settings = {"image_size": 32, "image_mean": mean, "image_std": std, "student_mean": mean, "student_std": std}
    return kind(model, **{**settings, **changes})


def report_of(labels, predicted, names, confidence=None, **options) -> Report:
    confidence = np.full(len(labels), 0.9) if confidence is None else np.array(confidence)
    predictions = Predictions(np.array(labels), np.array(predicted), confidence)
    return make_report(predictions, names, "model", "data", "test", **options)

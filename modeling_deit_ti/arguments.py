"""Every flag of the command: one dataclass per group, with its checks. parsing.py fills them in."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_tf32_available

from .classifiers import is_timm_architecture
from .configuration_deit_ti import READOUTS
from .device import HALF_DTYPES, automatic_precision
from .distillation import MODES, resolve_mode
from .errors import UserError, list_some
from .muon import muon_options


DEFAULT_TEACHER = "regnetx_004"
# A teacher's recipe, unless --teacher_config or the --teacher_* flags override it. Only crops and flips: anything more
# slows down a CNN that has few epochs to learn in. A fixed seed, so that one teacher serves runs with any seed.
TEACHER_RECIPE = {
    "auto_augment": "none",
    "random_erasing": 0,
    "mixup": 0,
    "cutmix": 0,
    "repeated_augmentation": 1,
    "num_train_epochs": 20,
    "learning_rate": 1e-3,
    "save_total_limit": 1,
    "seed": 42,
}
# What --resume_from_checkpoint accepts besides a folder. A bare `true` or `false` in a recipe arrives as yes or no.
RESUME = {"auto": "auto", "true": "auto", "yes": "auto", "false": "false", "no": "false"}
# The fields of `TrainingArguments` that determine what a run learns.
HYPERPARAMETERS = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "weight_decay", "max_grad_norm", "label_smoothing_factor", "load_best_model_at_end"),
    *("seed", "data_seed"),
)
# As above, but only recorded if set, so that what was fitted before these flags existed still matches.
OPTIONAL_HYPERPARAMETERS = ("class_weights", "early_stopping_patience", "ema_decay")
# How a deit_ti from scratch is initialised.
INITIALIZATION = ("patch_init", "position_init")


def check(group, name: str, is_valid: Callable[[float], bool], requirement: str) -> None:
    """Raises a `UserError` if a field of the group is set but not valid."""
    value = getattr(group, name)
    if value is not None and not is_valid(value):
        raise UserError(f"--{name} {value}: must be {requirement}.")


def check_at_least(group, **limits: float) -> None:
    """Raises a `UserError` if a field of the group is set and below its limit."""
    for name, least in limits.items():
        check(group, name, lambda value, least=least: value >= least, f"at least {least}")


MAX_PROCESS_GROWTH = 8  # a streamed run can resume with up to this many times the processes it started with


@dataclass(frozen=True)
class Division:
    """
    How a step's images are divided among processes: what a run has to keep when their number changes.

    Args:
        processes (`int`):
            number of processes that `--per_device_train_batch_size` and `--gradient_accumulation_steps` refer to.
        together (`int`): number of images that stay together: every batch of a process is a multiple of it.
        lanes (`int`, *optional*): number of lanes that a stream is read in (see `StreamedBatches`).
        lane_buffer_size (`int`, *optional*): number of encoded images in each lane's shuffle buffer.
    """

    processes: int
    together: int
    lanes: int | None = None
    lane_buffer_size: int | None = None


@dataclass
class ImageArguments:
    """Which images to train and evaluate on."""

    dataset_name: str = HfArg(
        default="uoft-cs/cifar10",
        help="A Hub id; a local folder with Parquet files, with one subfolder of images per class, or written by "
        "`save_to_disk`; or `digits`, the handwritten digits that ship with scikit-learn.",
    )
    dataset_config_name: str | None = HfArg(default=None, help="The dataset's configuration.")
    image_column_name: str | None = HfArg(default=None, help="Image column. Default: the first that holds images.")
    label_column_name: str | None = HfArg(
        default=None, help="Label column. Default: the first that holds class labels, or `label`."
    )
    train_val_split: float = HfArg(
        default=0.1, help="Share of the training images to evaluate on if the dataset has no split for it."
    )
    validation_from_train: bool = HfArg(
        default=False,
        help="Evaluate on --train_val_split of the training images even if the dataset has another split, to choose a "
        "recipe without looking at the test images.",
    )
    max_train_samples: int | None = HfArg(default=None, help="Train on a random subset of this size.")
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on a random subset of this size.")
    max_validation_samples: int | None = HfArg(
        default=None,
        help="During training, evaluate on a random subset of this size; at the end on all evaluation images.",
    )
    streaming: bool = HfArg(
        default=False,
        help="Read the training images during training, and keep none of them on disk or in memory: for Parquet "
        "files (local or on the Hub) and image folders larger than both.",
    )
    shuffle_buffer_size: int = HfArg(
        default=10_000, help="With --streaming: how many encoded images each process holds to draw its batches from."
    )

    def __post_init__(self):
        check_at_least(self, max_train_samples=1, max_eval_samples=1, max_validation_samples=1, shuffle_buffer_size=1)
        check(self, "train_val_split", lambda share: 0 < share < 1, "above 0 and below 1")
        if self.streaming and self.max_train_samples is not None:
            raise UserError("--max_train_samples draws a random subset, which --streaming cannot do: leave one out.")


@dataclass
class AugmentationArguments:
    """How training images are augmented: every setting that affects it, and nothing else."""

    crop: Literal["auto", "resized", "padded", "none"] = HfArg(
        default="auto",
        help="Training crops. `resized`: a random part of the image, 8 to 100 %% of its area, resized. "
        "`padded`: the image, padded with zeros and shifted. `none`: the whole image, resized. `auto`: as in DeiT's "
        "code, `padded` up to 32 pixels and `resized` above.",
    )
    horizontal_flip: float = HfArg(default=0.5, help="Probability of a horizontal flip.")
    auto_augment: str = HfArg(
        default="rand-m9-mstd0.5-inc1", help="timm's AutoAugment or RandAugment policy, or `none`."
    )
    random_erasing: float = HfArg(default=0.25, help="Probability of random erasing.")
    mixup: float = HfArg(default=0.8, help="Mixup's alpha; 0 turns it off.")
    cutmix: float = HfArg(default=1.0, help="CutMix's alpha; 0 turns it off.")
    repeated_augmentation: int = HfArg(
        default=3, help="How often each image appears in a batch, augmented differently; 1 turns it off."
    )
    augment_on: Literal["auto", "loader", "device"] = HfArg(
        default="auto",
        help="`loader`: timm's transforms, image by image, in the loader's workers. `device`: the same recipe "
        "on whole batches, on the model's device; needs images of one size. `auto`: `device` where possible; without "
        "a GPU, only if the images and the model's input have at most 64 pixels per side.",
    )

    def __post_init__(self):
        for name in ("horizontal_flip", "random_erasing"):
            check(self, name, lambda probability: 0 <= probability <= 1, "between 0 and 1")
        check_at_least(self, mixup=0, cutmix=0, repeated_augmentation=1)

    def crop_at(self, image_size: int) -> str:
        """The training crop at that size: `crop`, with `auto` resolved."""
        by_size = "resized" if image_size > 32 else "padded"
        return by_size if self.crop == "auto" else self.crop

    @property
    def is_random(self) -> bool:
        """Whether an image looks different each time it is seen."""
        draws = self.horizontal_flip or self.random_erasing or self.mixup or self.cutmix
        return bool(draws) or self.crop != "none" or self.auto_augment != "none" or self.repeated_augmentation > 1


@dataclass
class ModelArguments:
    """The network to train."""

    model_name_or_path: str = HfArg(
        default="deit_ti",
        help="`deit_ti`; a timm architecture, such as resnet18 (in mode none); or a folder or Hub id to start from.",
    )
    image_size: int = HfArg(default=224, help="Height and width of the network's input, in pixels.")
    patch_size: int = HfArg(default=16, help="Height and width of a patch, in pixels.")
    drop_path_rate: float = HfArg(default=0.1, help="Stochastic depth rate of the last block (DeiT-Ti only).")
    patch_drop_rate: float = HfArg(
        default=0.0,
        help="Share of an image's patches that each training step drops (PatchDropout; DeiT-Ti only).",
    )
    position_init: Literal["sincos", "normal"] = HfArg(
        default="sincos",
        help="How the position embeddings of a deit_ti from scratch are initialised: as sines and cosines of rows and "
        "columns, or with small normal noise, as in DeiT.",
    )
    patch_init: Literal["normal", "whitening"] = HfArg(
        default="normal",
        help="How the patch projection of a deit_ti from scratch is initialised: `whitening` scales the principal "
        "components of the training images' patches to the same size.",
    )
    freeze_backbone: bool = HfArg(
        default=False, help="Train only the heads (a linear probe); the rest of the network stays as it is."
    )
    eval_crop_ratio: float | None = HfArg(
        default=None,
        help="Evaluation resizes the shorter edge to image_size / ratio and crops the centre. Default: as in "
        "DeiT's code, 0.875 if training uses resized crops, else 1.",
    )
    export: list[str] = HfArg(
        default_factory=list,
        help="What else to save and push: `timm` (a checkpoint for timm.create_model), `onnx` (in float32 "
        "and int8, for ONNX Runtime and for browsers).",
        metadata={"choices": ["timm", "onnx"]},
    )
    license: str = HfArg(default="unknown", help="License of the trained weights, for the card, such as apache-2.0.")

    def __post_init__(self):
        check_at_least(self, image_size=2, patch_size=1)  # torch cannot resize to a single pixel
        for name in ("drop_path_rate", "patch_drop_rate"):
            check(self, name, lambda rate: 0 <= rate < 1, "at least 0 and below 1")
        check(self, "eval_crop_ratio", lambda ratio: 0 < ratio <= 1, "above 0 and at most 1")

    @property
    def is_new_deit_ti(self) -> bool:
        """Whether to train a DeiT-Ti from scratch."""
        return self.model_name_or_path == "deit_ti"

    @property
    def is_timm_architecture(self) -> bool:
        """Whether to train from scratch. A name with a tag, such as `.fb_in1k`, means weights to start from."""
        return "." not in self.model_name_or_path and is_timm_architecture(self.model_name_or_path)

    def check_patch_size(self) -> None:
        """Raises a `UserError` if a DeiT-Ti's patches do not fill its input."""
        if self.image_size % self.patch_size:
            raise UserError(
                f"--patch_size {self.patch_size} does not divide --image_size {self.image_size}: use a multiple, such "
                f"as --image_size {max(1, round(self.image_size / self.patch_size)) * self.patch_size}."
            )


@dataclass
class TeacherArguments:
    """Which teacher, and how it is fitted if its labels are not the dataset's."""

    teacher_model_name_or_path: str | None = HfArg(
        default=None,
        help="A timm architecture, or a folder or Hub id that AutoModelForImageClassification loads. Default: "
        f"--teacher_config's, or {DEFAULT_TEACHER}.",
    )
    teacher_config: str | None = HfArg(
        default=None,
        help="A YAML file with flags for the teacher's own run, as for --config. The --teacher_* flags override it.",
    )
    teacher_output_dir: str = HfArg(default="outputs/teachers", help="Where fitted teachers are kept for later runs.")
    teacher_pretrained: bool = HfArg(
        default=False, help="Start a timm architecture from timm's weights on the Hub, not from scratch."
    )
    teacher_image_size: int | None = HfArg(
        default=None, help="The teacher's input size. Default: its own, or the student's if it starts from scratch."
    )
    teacher_num_train_epochs: float | None = HfArg(
        default=None,
        help="Epochs of fitting; 0: use the teacher as it is or not at all. Default: --teacher_config's, or "
        f"{TEACHER_RECIPE['num_train_epochs']}.",
    )
    teacher_learning_rate: float | None = HfArg(
        default=None,
        help=f"Peak learning rate for fitting. Default: --teacher_config's, or {TEACHER_RECIPE['learning_rate']}.",
    )
    allow_untrained_teacher: bool = HfArg(
        default=False,
        help="With --teacher_num_train_epochs 0, teach with a pretrained network whose head was never trained, as the "
        "published baseline did; and do not stop if the teacher is no better than chance.",
    )
    teacher_cache: Literal["auto", "on", "off"] = HfArg(
        default="auto",
        help="Store the teacher's logits under --teacher_output_dir, in half precision, for later epochs and "
        "runs that show it the same images. `auto`: if they take no more than 1 GiB.",
    )
    trust_remote_code: bool = HfArg(default=False, help="Run the code that comes with another project's teacher.")

    def __post_init__(self):
        if not self.teacher_output_dir:
            raise UserError("--teacher_output_dir: must be the name of a folder.")
        check_at_least(self, teacher_learning_rate=0, teacher_num_train_epochs=0, teacher_image_size=2)


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """`TrainingArguments` with DeiT's recipe as defaults (paper, table 9), plus the options for distillation."""

    output_dir: str | None = HfArg(default=None, help="The run's folder. Default: outputs/<model>-<dataset>-<mode>.")
    resume_from_checkpoint: str = HfArg(
        default="auto",
        help="`auto`: resume an unfinished run with the same arguments in --output_dir. `false`: refuse to. Or a "
        "checkpoint's folder; `last-checkpoint` is the one that --hub_strategy checkpoint has pushed.",
    )
    distill_mode: str = HfArg(
        default="none", help="What teaches which head; see the README's table.", metadata={"choices": list(MODES)}
    )
    teacher_targets: Literal["hard", "soft", "standardized"] | None = HfArg(
        default=None,
        help="What the student learns from the teacher: its decision, its distribution, or its distribution after the "
        "logits of both are standardised to mean 0 and standard deviation 1. Default: the mode's.",
    )
    single_token: bool = HfArg(
        default=False,
        help="For modes class and distill: a network with only that token, taught by the labels or the teacher.",
    )
    distillation_alpha: float | None = HfArg(default=None, help="The teacher's weight, 0 to 1. Default: the mode's.")
    distillation_temperature: float | None = HfArg(
        default=None, help="Temperature of soft or standardized targets. Default: 3 or 2."
    )

    class_weights: Literal["balanced"] | None = HfArg(
        default=None,
        help="`balanced`: all classes count the same in the label loss, however many images they have.",
    )
    early_stopping_patience: int | None = HfArg(
        default=None,
        help="Stop once the accuracy (or --metric_for_best_model) has not improved in this many evaluations, and keep "
        "the best model.",
    )

    per_device_train_batch_size: int = HfArg(default=128, help="Training batch size per device.")
    per_device_eval_batch_size: int = HfArg(default=256, help="Evaluation batch size per device.")
    num_train_epochs: float = HfArg(default=20.0, help="Number of training epochs.")
    learning_rate: float = HfArg(
        default=5e-4, help="Peak learning rate. (The paper's rule is 5e-4 x batch / 512, for 300 epochs.)"
    )
    optim: str = HfArg(
        default=TrainingArguments.default_optim,
        help="`muon`: Muon for the hidden weight matrices and AdamW for everything else, with learning rates on "
        "AdamW's scale; or any of transformers' optimizers.",
        metadata={"choices": [*(optimizer.value for optimizer in OptimizerNames), "muon"]},
    )
    optim_args: str | None = HfArg(
        default=None,
        help="Options of the optimizer, as name=value,name=value. For muon: momentum, ns_steps, and adamw_lr_scale, "
        "which multiplies --learning_rate for the parameters on AdamW.",
    )
    ema_decay: float | None = HfArg(
        default=None,
        help="Average the weights over the steps with this decay, such as 0.999. The average is what is evaluated and "
        "saved.",
    )
    weight_decay: float = HfArg(default=0.05, help="For all weights except biases, norms, tokens and positions.")
    lr_scheduler_type: str = HfArg(default="cosine", help="Learning rate schedule.")
    warmup_steps: float = HfArg(default=0.1, help="Steps of linear warm-up; below 1, a share of all steps.")
    label_smoothing_factor: float = HfArg(default=0.1, help="Smoothing of the true labels.")
    logging_strategy: str = HfArg(default="epoch", help="When to log: no, steps or epoch.")
    eval_strategy: str = HfArg(default="epoch", help="When to evaluate: no, steps or epoch.")
    save_strategy: str = HfArg(default="epoch", help="When to save a checkpoint: no, steps or epoch.")
    save_total_limit: int | None = HfArg(default=2, help="How many checkpoints to keep.")
    disable_tqdm: bool | None = HfArg(
        default=None, help="One line per log instead of bars. Default: a bar in a terminal, lines in a file or a pipe."
    )
    report_to: list[str] = HfArg(
        default_factory=lambda: ["none"],
        help="Also log to these tools, such as trackio, tensorboard, wandb or mlflow; `all`: all that are installed.",
    )
    # With the filter, the Trainer logs the mean of earlier losses in place of one that is not finite, and carries on.
    logging_nan_inf_filter: bool = HfArg(default=False, help="Hide losses that are not finite instead of stopping.")
    bf16: bool | None = HfArg(
        default=None,
        help="bfloat16 mixed precision; false: float32. Default, unless --fp16 or the accelerate config sets a "
        "precision: on GPUs that support it (older ones use float16) and on CPUs that are faster in it.",
    )
    fp16: bool | None = HfArg(default=None, help="float16 mixed precision, on a GPU. Default: see --bf16.")
    temperature_scaling: bool = HfArg(
        default=False,
        help="Fit a temperature on half of the evaluation images, and if it improves the calibration on the other "
        "half, divide the logits of the saved DeiT-Ti by it.",
    )
    tf32: bool | None = HfArg(default=None, help="TF32 for float32 products. Default: on where the GPU supports it.")
    # Fields of `TrainingArguments` that are not flags here.
    remove_unused_columns: bool = field(default=False, init=False)  # the augmentation needs the images' seeds
    enable_jit_checkpoint: bool = field(default=False, init=False)  # it saves in mid-step, and not on Ctrl-C
    save_only_model: bool = field(default=False, init=False)  # a run would resume without its optimizer
    # Every evaluation image counts towards every read-out's accuracy.
    label_names: list[str] | None = field(default=None, init=False)
    batch_eval_metrics: bool = field(default=False, init=False)
    prediction_loss_only: bool = field(default=False, init=False)
    dataloader_drop_last: bool = field(default=False, init=False)
    do_train: bool = field(default=True, init=False)
    do_predict: bool = field(default=False, init=False)  # predict.py does
    neftune_noise_alpha: float | None = field(default=None, init=False)  # for language models
    use_liger_kernel: bool = field(default=False, init=False)  # for language models

    def __post_init__(self):
        if self.output_dir == "":
            raise UserError("--output_dir: must be the name of a folder.")
        self.has_default_output_dir = self.output_dir is None
        self.output_dir = self.output_dir or "outputs"
        self.resume_from_checkpoint = RESUME.get(self.resume_from_checkpoint.lower(), self.resume_from_checkpoint)
        self.mode = resolve_mode(
            self.distill_mode,
            single_token=self.single_token,
            teacher_targets=self.teacher_targets,
            alpha=self.distillation_alpha,
            temperature=self.distillation_temperature,
        )
        check_at_least(self, per_device_train_batch_size=1, per_device_eval_batch_size=1, eval_accumulation_steps=1)
        check_at_least(self, gradient_accumulation_steps=1, dataloader_num_workers=0, learning_rate=0, max_grad_norm=0)
        self.requested_accumulation = self.gradient_accumulation_steps
        check_at_least(self, seed=0, data_seed=0, early_stopping_patience=1)
        check(self, "seed", lambda seed: seed < 2**32, "below 2**32, as NumPy requires")
        check(self, "ema_decay", lambda decay: 0 < decay < 1, "above 0 and below 1")
        check(self, "label_smoothing_factor", lambda share: 0 <= share < 1, "at least 0 and below 1")
        if self.class_weights is not None and not self.mode.needs_labels:
            raise UserError(
                f"--class_weights {self.class_weights} applies to the label loss, which this mode does not have: it "
                "learns from the teacher alone."
            )
        if self.early_stopping_patience is not None:
            is_together = self.save_strategy != "steps" or self.save_steps == (self.eval_steps or self.logging_steps)
            is_saved = self.save_strategy in (self.eval_strategy, "best") and is_together
            if self.eval_strategy == "no" or not is_saved:
                raise UserError(
                    "--early_stopping_patience needs evaluations during training and a checkpoint with each: use "
                    "--eval_strategy epoch --save_strategy epoch, or steps for both, with the same --eval_steps and "
                    "--save_steps."
                )
            self.load_best_model_at_end = True
            self.metric_for_best_model = self.metric_for_best_model or "accuracy"
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise UserError(f"--num_train_epochs {self.num_train_epochs}: must be above 0, unless --max_steps is.")
        if self.dataloader_persistent_workers and self.dataloader_num_workers == 0:
            raise UserError("--dataloader_persistent_workers needs --dataloader_num_workers to be at least 1.")
        precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # the launcher always sets it, if only to "no"
        is_precision_unset = self.fp16 is None and self.bf16 is None
        if is_precision_unset and precision in HALF_DTYPES:  # DeepSpeed's config must agree with these
            self.fp16, self.bf16 = precision == "fp16", precision == "bf16"
        if self.ddp_find_unused_parameters is None:
            # A head that no term of the loss reaches gets no gradient. Otherwise, looking for one only costs time.
            self.ddp_find_unused_parameters = len(self.mode.tokens) == 2 and self.mode.alpha in (0.0, 1.0)
        if self.tf32 is None and is_torch_tf32_available():
            self.tf32 = True
        has_default_accelerator_config = self.accelerator_config is None
        if self.disable_tqdm is None and not (sys.stdout.isatty() and sys.stderr.isatty()):
            self.disable_tqdm = True  # a bar would fill a log file with copies of itself
        is_muon = self.optim == "muon"
        if is_muon:
            muon_options(self.optim_args)
            self.optim = self.default_optim  # transformers only accepts its own
        super().__post_init__()
        self.has_automatic_precision = is_precision_unset and precision == "no" and self.deepspeed_plugin is None
        if self.has_automatic_precision:
            self.mixed_precision = automatic_precision(self.device)
        elif not (is_precision_unset or self.fp16 or self.bf16):  # turned off, whatever the launcher says
            self.mixed_precision = "no"
        if is_muon:
            self.optim = "muon"
            if self.deepspeed_plugin is not None:
                raise UserError("--optim muon needs whole matrices, which DeepSpeed shards: use another --optim.")
        if self.ema_decay is not None and self.sharded_by is not None:
            raise UserError("--ema_decay needs whole weights, which FSDP and DeepSpeed shard: leave it out.")
        if self.fsdp and "auto_wrap_policy" not in self.fsdp_config:
            # As in accelerate_configs/fsdp2_bf16.yaml. Wrapping layer by layer, accelerate would shard DeiT-Ti's patch
            # projection twice, which torch refuses.
            self.fsdp_plugin_args["auto_wrap_policy"] = "NO_WRAP"
        if self.tf32 is not None and is_torch_tf32_available():
            # transformers only sets torch's newer flags; torch then refuses to read the older ones, as max-autotune
            # does.
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        if has_default_accelerator_config and self.device.type == "cuda":
            # Batches are then copied while the device computes, which requires the loader to pin them.
            self.accelerator_config.non_blocking = self.dataloader_pin_memory
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is no device to copy to; torch would warn
            if self.fp16:
                raise UserError(
                    "fp16 was requested, by --fp16 or the accelerate config, but there is no GPU: leave it out, or "
                    "use --bf16 --use_cpu."
                )
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and self.world_size == 1:
            raise UserError(
                f"{os.environ['WORLD_SIZE']} processes were launched, but each would train on its own: without a GPU "
                "for each of them, add --use_cpu."
            )
        # The Trainer would only notice after an epoch.
        metrics = ["loss", *(f"accuracy{readout}{ending}" for readout in self.readouts for ending in ("", "_top5"))]
        chooses = self.load_best_model_at_end or self.save_strategy == "best"
        if chooses and str(self.metric_for_best_model).removeprefix("eval_") not in metrics:
            raise UserError(
                f"--metric_for_best_model {self.metric_for_best_model}: must be one of {', '.join(metrics)}."
            )

    def __getstate__(self) -> dict:
        """Without the token: these arguments are pickled into every checkpoint and pushed with the model."""
        return {**self.__dict__, "hub_token": None}

    @property
    def sharded_by(self) -> str | None:
        """What shards the weights: `"FSDP"` or `"DeepSpeed"`, if anything."""
        if self.deepspeed_plugin is not None:
            return "DeepSpeed"
        return "FSDP" if self.fsdp or "ACCELERATE_USE_FSDP" in os.environ else None

    @property
    def readouts(self) -> list[str]:
        """Suffixes of the accuracies' names: empty for what the model predicts with, then one for each read-out."""
        return ["", *(f"_{name}" for name in READOUTS)] if len(self.mode.tokens) == 2 else [""]

    @property
    def images_per_process(self) -> int:
        """Images per process in one optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps

    @property
    def total_train_batch_size(self) -> int:
        """Images in one optimizer step over all processes: the global batch size."""
        return self.images_per_process * self.world_size

    def divide_steps(self, batch_size: int, division: Division) -> None:
        """
        Divides a step of `batch_size` images equally among the processes there are now, in batches of at most
        `--per_device_train_batch_size`.

        Raises:
            UserError: if the shares cannot be equal.
        """
        share, together = batch_size // self.world_size, division.together
        if batch_size % self.world_size or share % together:
            able = [number for number in range(1, batch_size + 1) if batch_size % (number * together) == 0]
            raise UserError(
                f"{self.world_size} processes cannot share the {batch_size} images of each step equally"
                f"{f', {together} of them together' * (together > 1)}: resume with another --num_processes, one of "
                f"{list_some(able)}."
            )
        sizes = range(together, max(together, self.per_device_train_batch_size) + 1, together)
        self.per_device_train_batch_size = max(size for size in sizes if share % size == 0)
        self.gradient_accumulation_steps = share // self.per_device_train_batch_size
        self.division = division

    def restore_accumulation(self) -> None:
        """
        After `divide_steps`, restores the gradient accumulation that was asked for, if it divides the share of a
        process, however large the batches get. A batch norm, which sees the batches of all processes at once, then
        sees the same number of images with any number of processes.
        """
        share = self.images_per_process
        if share % (self.requested_accumulation * self.division.together) == 0:
            self.per_device_train_batch_size = share // self.requested_accumulation
            self.gradient_accumulation_steps = self.requested_accumulation

    @property
    def order_seed(self) -> int:
        """Seed of the images' order and augmentation."""
        return self.data_seed if self.data_seed is not None else self.seed


class Arguments(NamedTuple):
    """
    A whole run: its groups of arguments; its command line, `flags`; the run that fits its teacher, if any, in
    `fitting`; and, if its recipe has stages, the folders of those before it in `earlier_stages`.
    """

    images: ImageArguments
    augmentation: AugmentationArguments
    model: ModelArguments
    teacher: TeacherArguments
    training: DistillationTrainingArguments
    flags: list[str]
    fitting: "Arguments | None" = None
    earlier_stages: tuple[str, ...] = ()

    def hyperparameters(self) -> dict:
        """The settings that determine what the network learns from its images, by flag."""
        shown = {name: getattr(self.training, name) for name in HYPERPARAMETERS}
        if self.training.max_steps < 0:
            del shown["max_steps"]  # epochs decide
        if self.training.load_best_model_at_end:
            shown["metric_for_best_model"] = self.training.metric_for_best_model
        if self.model.freeze_backbone:
            shown["freeze_backbone"] = True
        if self.model.patch_drop_rate > 0:
            shown["patch_drop_rate"] = self.model.patch_drop_rate
        options = {name: getattr(self.training, name) for name in OPTIONAL_HYPERPARAMETERS}
        shown |= {name: value for name, value in options.items() if value is not None}
        if self.model.is_new_deit_ti:
            shown |= {name: getattr(self.model, name) for name in INITIALIZATION}
        return shown | vars(self.augmentation) | {"crop": self.augmentation.crop_at(self.model.image_size)}

    def division(self, processes: int) -> Division:
        """The division of a new run with these arguments and this many processes."""
        training, augmentation = self.training, self.augmentation
        batch_size = training.train_batch_size
        if not self.images.streaming:
            is_mixed = augmentation.mixup > 0 or augmentation.cutmix > 0
            return Division(processes, 1 if not is_mixed else 2 if batch_size % 2 == 0 else batch_size)
        parts = 1  # of a batch, each from its own lane
        while parts * training.gradient_accumulation_steps < MAX_PROCESS_GROWTH and batch_size % (4 * parts) == 0:
            parts *= 2
        lanes = parts * training.gradient_accumulation_steps * max(1, training.dataloader_num_workers)
        return Division(
            processes, batch_size // parts, processes * lanes, max(1, self.images.shuffle_buffer_size // lanes)
        )

"""`DistillationTrainer`: transformers' `Trainer` with a teacher in its loss, and its arguments."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DynamoBackend, broadcast_object_list
from torch import distributed
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalPrediction, rotate_checkpoints
from transformers.utils import is_torch_tf32_available

from .checkpoints import seal
from .configuration_deit_ti import READOUTS
from .data import TrainSampler, collate_images, mix_images
from .distillation import MODES, DistillMode, distillation_loss, label_loss, resolve_mode
from .errors import UserError
from .interruption import Interrupted, StopRequest, name_of
from .modeling_deit_ti import DeiTTiForImageClassification
from .streaming import StreamedBatches, StreamedImages, UnreadableRow, as_it_is


# The least that each may be: TrainingArguments takes anything, and training would stumble over it later.
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "max_grad_norm": 0,
    "seed": 0,
    "data_seed": 0,
    "mixup": 0,
    "cutmix": 0,
    "repeated_augmentation": 1,
}
# Every image of the evaluation split counts, by its label, towards the accuracies of the read-outs.
WITHOUT_USE = (
    "label_names",
    "batch_eval_metrics",
    "prediction_loss_only",
    "dataloader_drop_last",
    "neftune_noise_alpha",  # this and the next are for language models
    "use_liger_kernel",
)
METRIC = Path(__file__).parent / "metrics" / "top_k_accuracy.py"


@dataclass
class DistillationTrainingArguments(TrainingArguments):
    """`TrainingArguments` with DeiT's recipe as defaults (paper, table 9) and the options of distillation."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Where the run goes. Default: outputs/<model>-<dataset>-<mode>."}
    )
    distill_mode: str = field(
        default="none", metadata={"help": "What teaches which head; see the README's table.", "choices": list(MODES)}
    )
    teacher_targets: str | None = field(
        default=None,
        metadata={
            "help": "What the token modes learn from the teacher: its decision or its distribution.",
            "choices": ["hard", "soft"],
        },
    )
    single_token: bool = field(
        default=False,
        metadata={
            "help": "Modes class and distill: a network with that token alone, taught by the labels or the teacher."
        },
    )
    distillation_alpha: float | None = field(
        default=None, metadata={"help": "Weight of the teacher's term, 0 to 1. Default: the mode's."}
    )
    distillation_temperature: float | None = field(
        default=None, metadata={"help": "Temperature of soft targets. Default: 3."}
    )
    mixup: float = field(default=0.8, metadata={"help": "Mixup's alpha; 0 turns it off."})
    cutmix: float = field(default=1.0, metadata={"help": "CutMix's alpha; 0 turns it off."})
    repeated_augmentation: int = field(
        default=3, metadata={"help": "How often each image comes in a batch, differently augmented; 1 turns it off."}
    )

    per_device_train_batch_size: int = field(default=128, metadata={"help": "Training batch size of each device."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Evaluation batch size of each device."})
    num_train_epochs: float = field(default=20.0, metadata={"help": "Number of training epochs."})
    learning_rate: float = field(
        default=5e-4,
        metadata={"help": "Peak learning rate. (The paper's rule is 5e-4 x batch / 512, for 300 epochs.)"},
    )
    weight_decay: float = field(
        default=0.05, metadata={"help": "Of all weights but biases, norms, tokens and positions."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of linear warm-up; below 1, a share of all steps."}
    )
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Smoothing of the true labels."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log: no, steps or epoch."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    save_total_limit: int | None = field(default=2, metadata={"help": "How many checkpoints are kept."})
    # Else the Trainer logs the mean of earlier losses in place of one that is not a number, and goes on.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite. By default they end the run."}
    )
    tf32: bool | None = field(
        default=None,
        metadata={
            "help": "TF32 in float32 products and convolutions. Default: on where the GPU has it (Ampere and newer)."
        },
    )
    # The model takes fewer columns than the loader's batches have: the seeds go to the augmentation.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has to be false here."})
    do_train: bool = field(default=True, metadata={"help": "Has to be true here: this command trains."})
    do_predict: bool = field(default=False, metadata={"help": "Has to be false here: predict.py predicts."})
    # The Trainer's saves without finishing the step, each process at its own one, and knows no Ctrl-C.
    enable_jit_checkpoint: bool = field(
        default=False, metadata={"help": "Has to be false here: SIGTERM and Ctrl-C write a checkpoint anyway."}
    )

    def __post_init__(self):
        self.has_default_output_dir = self.output_dir is None
        if self.output_dir is None:
            self.output_dir = "outputs"
        for name, needed in (
            ("remove_unused_columns", False),
            ("do_train", True),
            ("do_predict", False),
            ("enable_jit_checkpoint", False),
        ):
            if getattr(self, name) != needed:
                raise UserError(
                    f"--{name} {getattr(self, name)}: {type(self).__dataclass_fields__[name].metadata['help']}"
                )
        self.mode = resolve_mode(
            self.distill_mode,
            single_token=self.single_token,
            teacher_targets=self.teacher_targets,
            alpha=self.distillation_alpha,
            temperature=self.distillation_temperature,
        )
        if self.output_dir == "":
            raise UserError("--output_dir: the name of a folder is missing.")
        for name, least in AT_LEAST.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: it is {least} or more.")
        if self.seed >= 2**32:
            raise UserError(f"--seed {self.seed}: it is below 2**32, as NumPy wants it.")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise UserError(f"--num_train_epochs {self.num_train_epochs}: it is above 0, unless --max_steps is.")
        for name in WITHOUT_USE:
            if getattr(self, name):
                raise UserError(f"--{name} {getattr(self, name)}: it has no use here; leave it out.")
        if self.dataloader_persistent_workers and self.dataloader_num_workers == 0:
            raise UserError("--dataloader_persistent_workers: there are no workers without --dataloader_num_workers.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise UserError(f"--label_smoothing_factor {self.label_smoothing_factor}: it is 0 or more and below 1.")
        if not (self.fp16 or self.bf16):  # of the accelerate config; DeepSpeed wants both to say the same
            precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
            self.fp16, self.bf16 = precision == "fp16", precision == "bf16"
        if self.ddp_find_unused_parameters is None:
            # A head that no term of the loss reaches has no gradient; elsewhere looking for it costs time for nothing.
            self.ddp_find_unused_parameters = len(self.mode.tokens) == 2 and self.mode.alpha in (0.0, 1.0)
        if self.tf32 is None and is_torch_tf32_available():
            self.tf32 = True
        has_default_accelerator_config = self.accelerator_config is None
        super().__post_init__()
        if has_default_accelerator_config and self.device.type == "cuda":
            # Batches then travel while the device still computes; the loader pins them, as this needs.
            self.accelerator_config.non_blocking = self.dataloader_pin_memory
        self._check_metric_for_best_model()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is no device to copy to; torch would warn
        if self.device.type == "cpu" and self.fp16:
            raise UserError(
                "fp16 is asked for, by --fp16 or the accelerate config, and there is no GPU here: leave it out, or "
                "use --bf16 --use_cpu."
            )
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and self.world_size == 1:
            raise UserError(
                f"{os.environ['WORLD_SIZE']} processes were launched, and they do not know of each other: without a "
                "GPU each, they need --use_cpu."
            )

    def _check_metric_for_best_model(self) -> None:
        """Raises a `UserError` where no evaluation will have that metric: the Trainer would tell after an epoch."""
        if not self.load_best_model_at_end and self.save_strategy != "best":
            return
        readouts = ["", *(f"_{name}" for name in READOUTS)] if len(self.mode.tokens) == 2 else [""]
        metrics = ["loss", *(f"accuracy{readout}{ending}" for readout in readouts for ending in ("", "_top5"))]
        if str(self.metric_for_best_model).removeprefix("eval_") not in metrics:
            raise UserError(
                f"--metric_for_best_model {self.metric_for_best_model}: there is no such metric; there are "
                f"{', '.join(metrics)}."
            )

    def __getstate__(self) -> dict:
        """Without the token: these arguments are pickled into every checkpoint and pushed with the model."""
        return {**self.__dict__, "hub_token": None}

    @property
    def total_train_batch_size(self) -> int:
        """Images in one step of the optimizer, all processes together."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def order_seed(self) -> int:
        """Of the images' order and augmentation."""
        return self.data_seed if self.data_seed is not None else self.seed


class _RunCallback(TrainerCallback):
    """
    What a run needs beyond the Trainer's own flow: to stop where it is told to, to go on as if it had never stopped,
    and to end where its loss is not finite.
    """

    def __init__(self, trainer: "DistillationTrainer", sampler: TrainSampler | StreamedBatches):
        self.trainer = trainer
        self.sampler = sampler
        self.seconds_before = 0.0
        self.started = time.monotonic()
        self.save_at_epoch_end = False
        self.stopped_by = 0
        self.stopped_within_epoch = False
        self.signal_group = None

    @property
    def seconds(self) -> float:
        """Time spent in training, those of earlier processes included, up to their last checkpoints."""
        return self.seconds_before + time.monotonic() - self.started

    def on_train_begin(self, args, state, control, **kwargs):
        seconds = [entry["train_seconds"] for entry in state.log_history if "train_seconds" in entry]
        self.seconds_before = seconds[-1] if seconds else 0.0
        self.started = time.monotonic()
        if isinstance(self.sampler, StreamedBatches) and not args.ignore_data_skip:
            # accelerate throws away the batches that the epoch has had; so they need not be made.
            steps_per_epoch = -(-len(self.sampler) // args.gradient_accumulation_steps)
            epoch, step = divmod(state.global_step, steps_per_epoch)
            self.sampler.skip(epoch, step * args.gradient_accumulation_steps)
        if self.trainer.accelerator.scaler is not None:
            self.trainer.loss_scale = self.trainer.accelerator.scaler.get_scale()
        if args.world_size > 1:
            # On the CPU, whatever the gradients take: looking for a signal does not wait for the device.
            self.signal_group = distributed.new_group(backend="gloo")

    def on_epoch_begin(self, args, state, control, **kwargs):
        # The loaders that accelerate wraps around the sampler do not tell it, where one skips the first batches of a
        # resumed epoch in several processes.
        self.sampler.set_epoch(int(state.epoch or 0))
        if state.global_step >= state.max_steps:
            # Resumed at its last step, in the middle of an epoch: the Trainer would take another one.
            control.should_training_stop = self.stopped_within_epoch = True

    def on_step_end(self, args, state, control, **kwargs):
        at_epoch_end = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if self._is_told_to_stop():
            control.should_training_stop = control.should_save = True
            self.stopped_within_epoch = not at_epoch_end
        if control.should_save and at_epoch_end:
            # A run resumed from here would not evaluate and log any more what comes at the end of an epoch.
            control.should_save, self.save_at_epoch_end = False, True
        # A checkpoint has no sums of what is not logged yet, so nothing is left unlogged when one is written.
        control.should_log = control.should_log or control.should_save
        # A device computes behind: its latest loss would be waited for, the one before is there.
        is_behind = args.device.type != "cpu" and not control.should_log
        self.trainer.check_losses(state.global_step - 1 if is_behind else state.global_step)
        self.trainer.count_overflow()

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped_within_epoch:  # all is written already
            control.should_log = control.should_evaluate = control.should_save = False
            return
        if self._is_told_to_stop():
            control.should_training_stop = control.should_save = True
        control.should_save = control.should_save or self.save_at_epoch_end
        self.save_at_epoch_end = False
        control.should_log = control.should_log or control.should_save
        self.trainer.check_losses(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self._is_told_to_stop()  # in the last evaluation, after which there is no step to stop at

    def _is_told_to_stop(self) -> bool:
        """Whether any process has received a signal; all processes hear of it in the same step."""
        signum = self.trainer.stop_request.signum
        if self.signal_group is not None:
            highest = torch.tensor(signum)
            distributed.all_reduce(highest, distributed.ReduceOp.MAX, group=self.signal_group)
            signum = int(highest)
        self.stopped_by = signum
        return signum > 0


class DistillationTrainer(Trainer):
    """
    A `Trainer` whose loss is that of a [`DistillMode`].

    The teacher is an attribute, not a part of the model: it gets no gradient, is in no optimizer and no checkpoint,
    and no wrapper (DDP, FSDP, DeepSpeed) sees it.

    Args:
        args ([`DistillationTrainingArguments`])
        teacher (`Callable`, *optional*): maps `pixel_values` as the student sees them to logits `(B, num_labels)` in
            the student's order of labels; `teacher.Teacher` is one. Needed where `args.mode` has a teacher.
        teacher_cache (`teacher_cache.TeacherCache`, *optional*): answers for the teacher in training.
        augment (`Callable`, *optional*): maps a training batch's `pixel_values` and seeds to augmented
            `pixel_values`; `augmentation.BatchAugmentation` is one. Where it is missing, the images come augmented.

    The others are those of `Trainer`. `train_dataset` takes the keys of [`TrainSampler`], as `TrainImages` does, or is
    a `streaming.StreamedImages`.
    """

    # The loss is a mean over each batch, so the Trainer has to divide it by the number of accumulated batches.
    loss_is_scaled_for_ga = False

    def __init__(self, *args, teacher=None, teacher_cache=None, augment=None, **kwargs):
        super().__init__(
            *args,
            data_collator=collate_images,
            compute_metrics=self._accuracies,
            preprocess_logits_for_metrics=self._ranked_labels,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False  # whatever the model's signature: the loss is ours, see above
        self.mode: DistillMode = self.args.mode
        self.num_labels: int = self.model.config.num_labels
        self.teacher = self.training_teacher = teacher
        self.teacher_cache = teacher_cache
        self.augment = augment
        if teacher is not None:
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.args.mixed_precision, torch.float32)
            teacher.to(self.args.device, dtype, memory_format=torch.channels_last)
            # As accelerate compiles the student: for training, whose batches all have one shape. Evaluation, whose
            # last batch is smaller, goes uncompiled for both.
            compile_options = self.accelerator.state.dynamo_plugin
            if compile_options.backend != DynamoBackend.NO:
                self.training_teacher = torch.compile(teacher, **compile_options.to_kwargs())
        # Another model has one head to train, whatever else it returns.
        self.is_deit_ti = isinstance(self.model, DeiTTiForImageClassification)
        two_heads = self.is_deit_ti and len(self.model.config.tokens) == 2
        # Endings of the metrics' names: none for what the model predicts with, then every read-out it has.
        self.readouts = ["", *(f"_{name}" for name in READOUTS)] if two_heads else [""]
        self.teacher_accuracy: float | None = None
        self.metric = evaluate.load(str(METRIC), keep_in_memory=True)
        self._step_sums: dict[str, torch.Tensor] = {}
        self._steps_summed = 0
        self._unchecked_losses: list[tuple[int, float, dict[str, torch.Tensor]]] = []
        self.loss_scale: torch.Tensor | float = 1.0  # of fp16, after the last step
        self._overflows: torch.Tensor | int = 0

    # ---- Training ----

    def train(self, *args, **kwargs):
        """
        As `Trainer.train`.

        Raises:
            FloatingPointError: if a loss is not finite: before the step's checkpoint, and with its step, parts and
                learning rate.
            Interrupted: after a SIGTERM or Ctrl-C: the step is finished and a checkpoint written.
        """
        self.stop_request = StopRequest(announce=self.is_local_process_zero())
        with self.stop_request:
            output = super().train(*args, **kwargs)
        if self.run_callback.stopped_by:
            step, steps = self.state.global_step, self.state.max_steps
            checkpoint = os.path.join(self.args.output_dir, f"checkpoint-{step}")
            (is_saved,) = broadcast_object_list([os.path.isdir(checkpoint)])
            if not is_saved:  # told in the last evaluation of a run that saves no checkpoints by itself
                self.state.log_history.pop()  # the sum of a run that is done, which the resumed one writes
                self._save_checkpoint(self.model, trial=None)
            raise Interrupted(
                f"stopped by {name_of(self.run_callback.stopped_by)} after step {step} of {steps}; {checkpoint} is "
                "written."
            )
        return output

    def _get_train_sampler(self, train_dataset=None) -> TrainSampler:
        return self._resumable(
            TrainSampler(
                len(train_dataset if train_dataset is not None else self.train_dataset),
                self.args.train_batch_size * self.args.world_size,
                self.args.order_seed,
                self.args.repeated_augmentation,
            )
        )

    def _resumable(self, sampler: TrainSampler | StreamedBatches) -> TrainSampler | StreamedBatches:
        self.remove_callback(_RunCallback)
        self.run_callback = _RunCallback(self, sampler)
        self.add_callback(self.run_callback)
        return sampler

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer`'s. Streamed images come in this process's own batches, which nobody has to deal out."""
        if not isinstance(self.train_dataset, StreamedImages):
            return super().get_train_dataloader()
        args = self.args
        batches = StreamedBatches(
            self.train_dataset,
            args.train_batch_size,
            self.args.order_seed,
            args.repeated_augmentation,
            args.dataloader_num_workers,
            args.process_index,
            args.world_size,
        )
        loader = DataLoader(
            self._resumable(batches),
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        # One process, so that accelerate neither reads all images in each nor reads in the first for the others.
        return prepare_data_loader(
            loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
        )

    def num_examples(self, dataloader: DataLoader) -> int:
        """As `Trainer`'s, which would count the batches of a stream."""
        streamed = isinstance(dataloader.dataset, StreamedBatches)
        return len(dataloader.dataset.images) if streamed else super().num_examples(dataloader)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As `Trainer`'s. Raises `UnreadableRow` where a streamed row cannot be trained on."""
        if self.control.should_training_stop:  # before the first step already, see `on_epoch_begin`
            return [], None
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            if "error" in batch:
                raise UnreadableRow(
                    f"{batch['error']} The run stopped at step {self.state.global_step}; its checkpoints are in "
                    f"{self.args.output_dir}. Mend that row and go on with --resume_from_checkpoint True."
                )
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mode's loss in training; in evaluation the plain cross-entropy of `logits`, which all modes share."""
        pixel_values, labels = inputs["pixel_values"], inputs.get("labels")
        if not model.training:
            outputs = model(pixel_values=pixel_values)
            loss = label_loss(outputs["logits"], labels)
            return (loss, outputs) if return_outputs else loss

        if self.augment is not None:
            pixel_values = self.augment(pixel_values, torch.from_numpy(inputs["seeds"]))
        pixel_values, labels = mix_images(
            pixel_values, labels, int(inputs["seeds"][0]), self.num_labels, self.args.mixup, self.args.cutmix
        )
        pixel_values = self._prepare_input(pixel_values)  # DeepSpeed wants its own precision
        teacher_logits = self._teacher_logits(pixel_values, inputs["seeds"]) if self.mode.has_teacher else None
        outputs = model(pixel_values=pixel_values)
        parts = distillation_loss(
            self.mode,
            class_logits=outputs.get("class_logits") if self.is_deit_ti else outputs["logits"],
            distillation_logits=outputs.get("distillation_logits") if self.is_deit_ti else None,
            labels=labels,
            teacher_logits=teacher_logits,
            label_smoothing=self.args.label_smoothing_factor,
        )
        logged = {"label_loss": parts.label_loss, "distillation_loss": parts.distillation_loss}
        if self.optimizer is not None and not self.args.logging_nan_inf_filter:
            shown = {"loss": parts.loss, **logged}
            shown = {name: value.detach() for name, value in shown.items() if value is not None}
            self._unchecked_losses.append((self.state.global_step + 1, self._get_learning_rate(), shown))
        if teacher_logits is not None:
            agree = outputs["logits"].argmax(dim=-1) == teacher_logits.argmax(dim=-1)
            logged["teacher_agreement"] = agree.float().mean()
        for name, value in logged.items():
            if value is not None:
                self._step_sums[name] = self._step_sums.get(name, 0) + value.detach()
        self._steps_summed += 1
        return (parts.loss, outputs) if return_outputs else parts.loss

    def _teacher_logits(self, pixel_values, seeds) -> torch.Tensor:
        if self.teacher_cache is None:
            return self.training_teacher(pixel_values)
        return self.teacher_cache(self.training_teacher, pixel_values, seeds, self.run_callback.sampler)

    def get_decay_parameter_names(self, model) -> list[str]:
        """As DeiT's `no_weight_decay`: tokens and positions do not decay either."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith(("_token", "position_embeddings", "pos_embed"))]

    def check_losses(self, last_step: int) -> None:
        """
        Raises:
            FloatingPointError: if a loss of the steps up to this one, counted from 1, is not finite.
        """
        due = [entry for entry in self._unchecked_losses if entry[0] <= last_step]
        self._unchecked_losses = [entry for entry in self._unchecked_losses if entry[0] > last_step]
        if not due or torch.stack([parts["loss"] for _, _, parts in due]).isfinite().all():
            return
        step, learning_rate, parts = next(entry for entry in due if not entry[2]["loss"].isfinite())
        facts = ", ".join(f"{name} {value.item():.4g}" for name, value in parts.items() if name != "loss")
        raise FloatingPointError(
            f"The loss is {parts['loss'].item()} at step {step} ({facts}, learning rate {learning_rate:.4g}). The "
            f"checkpoints in {self.args.output_dir} are from before. Try a lower --learning_rate, a longer "
            "--warmup_steps, or --bf16 instead of --fp16."
        )

    def count_overflow(self) -> None:
        """
        Counts the steps that fp16's scaler leaves out because a gradient overflowed: it lowers its scale then.

        (`accelerator.optimizer_step_was_skipped` does not see them where the optimizer is fused, as AdamW is here: the
        step is called, and leaves itself out on the device.)
        """
        scaler = self.accelerator.scaler
        if scaler is not None:
            scale = scaler._get_scale_async()  # get_scale would wait for the device
            self._overflows = self._overflows + (scale < self.loss_scale)
            self.loss_scale = scale.clone()

    def _save_checkpoint(self, model, trial) -> None:
        """As `Trainer`'s, sealed; older checkpoints are deleted, and this one is pushed, only after that."""
        args = self.args
        limit, push_to_hub = args.save_total_limit, args.push_to_hub
        args.save_total_limit, args.push_to_hub = None, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit, args.push_to_hub = limit, push_to_hub
        self.accelerator.wait_for_everyone()  # each process has files of its own in it
        folder = self._get_output_dir(trial=trial)
        checkpoint = os.path.join(folder, f"checkpoint-{self.state.global_step}")
        if args.should_save:
            torch.save(args, os.path.join(checkpoint, "training_args.bin"))  # without what was just changed in them
            seal(checkpoint)
        if push_to_hub:
            self._push_from_checkpoint(checkpoint)
        if args.should_save:
            rotate_checkpoints(folder, limit, self.state.best_model_checkpoint, use_mtime=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Adds the means since the last log of the loss's parts and of how often teacher and student agree, the steps
        that fp16 left out, and makes the closing numbers those of the whole run, also where it was resumed.
        """
        if "loss" in logs and self._steps_summed:
            for name, total in self._step_sums.items():
                mean = self.accelerator.reduce(total / self._steps_summed, reduction="mean")
                logs[name] = mean.item()
            self._step_sums, self._steps_summed = {}, 0
            if self.teacher_accuracy is not None:
                logs["teacher_accuracy"] = self.teacher_accuracy
            if self.accelerator.scaler is not None:
                logs["fp16_overflows"], self._overflows = int(self._overflows), 0
            logs["train_seconds"] = round(self.run_callback.seconds, 3)
        if "train_runtime" in logs:
            seconds, steps = self.run_callback.seconds, self.state.global_step
            logs["train_runtime"] = round(seconds, 3)
            logs["train_steps_per_second"] = round(steps / seconds, 3)
            logs["train_samples_per_second"] = round(steps * self.args.total_train_batch_size / seconds, 3)
            logs["train_loss"] = self._mean_logged_loss()
            if self.accelerator.scaler is not None:
                logs["fp16_overflows"] = sum(entry.get("fp16_overflows", 0) for entry in self.state.log_history)
        super().log(logs, start_time)

    def _mean_logged_loss(self) -> float:
        """The mean loss of all steps: each log has that of the steps since the one before."""
        total, last_step = 0.0, 0
        for entry in self.state.log_history:
            if "loss" in entry:
                total += entry["loss"] * (entry["step"] - last_step)
                last_step = entry["step"]
        return total / max(1, last_step)

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: the run writes its own card (card/), which Trainer's pushes would overwrite."""

    # ---- Evaluation ----

    def _ranked_labels(self, logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
        """The five likeliest labels of each read-out, (B, read-outs, 5): all that is kept of an evaluated batch."""
        readouts = [logits if isinstance(logits, torch.Tensor) else logits[0]]
        if len(self.readouts) > 1:
            _, class_logits, distillation_logits = logits
            readouts += [class_logits, distillation_logits, (class_logits + distillation_logits) / 2]
        return torch.stack(readouts, dim=1).topk(min(5, self.num_labels), dim=-1).indices

    def _accuracies(self, prediction: EvalPrediction) -> dict[str, float]:
        metrics = {}
        for index, name in enumerate(self.readouts):
            ranked = prediction.predictions[:, index]
            for k, ending in ((1, ""), (5, "_top5")):
                result = self.metric.compute(predictions=ranked, references=prediction.label_ids, k=k)
                metrics[f"accuracy{name}{ending}"] = result["accuracy"]
        return metrics

    @torch.no_grad()
    def measure_teacher(self, images: Dataset | None = None) -> float:
        """Top-1 accuracy of the teacher on `images` (default: `eval_dataset`), as the student sees them."""
        hits = []
        for inputs in self.get_eval_dataloader(images):
            predicted = self.teacher(inputs["pixel_values"].to(self.args.device)).argmax(dim=-1)
            hits.append(self.accelerator.gather_for_metrics(predicted == inputs["labels"].to(self.args.device)))
        self.teacher_accuracy = torch.cat(hits).double().mean().item()
        return self.teacher_accuracy


__all__ = ["DistillationTrainer", "DistillationTrainingArguments"]

"""`DistillationTrainer`: transformers' `Trainer` with a teacher in its loss, and its arguments."""

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from .configuration_deit_ti import READOUTS
from .data import TrainSampler, UserError, collate_images, mix_images
from .distillation import MODES, DistillMode, distillation_loss, label_loss, resolve_mode
from .modeling_deit_ti import DeiTTiForImageClassification
from .streaming import StreamedBatches, StreamedImages, UnreadableRow, as_it_is


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
    # The model takes fewer columns than the loader's batches have: the seeds go to the augmentation.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has to be false here."})
    do_train: bool = field(default=True, metadata={"help": "Has to be true here: this command trains."})
    do_predict: bool = field(default=False, metadata={"help": "Has to be false here: predict.py predicts."})

    def __post_init__(self):
        self.has_default_output_dir = self.output_dir is None
        if self.output_dir is None:
            self.output_dir = "outputs"
        for name, needed in (("remove_unused_columns", False), ("do_train", True), ("do_predict", False)):
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
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: an alpha is 0 or more.")
        if self.repeated_augmentation < 1:
            raise UserError(f"--repeated_augmentation {self.repeated_augmentation}: it is 1 or more.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise UserError(f"--label_smoothing_factor {self.label_smoothing_factor}: it is 0 or more and below 1.")
        if not (self.fp16 or self.bf16):  # of the accelerate config; DeepSpeed wants both to say the same
            precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
            self.fp16, self.bf16 = precision == "fp16", precision == "bf16"
        if self.ddp_find_unused_parameters is None:
            # A head that no term of the loss reaches has no gradient; elsewhere looking for it costs time for nothing.
            self.ddp_find_unused_parameters = len(self.mode.tokens) == 2 and self.mode.alpha in (0.0, 1.0)
        super().__post_init__()
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

    def __getstate__(self) -> dict:
        """Without the token: these arguments are pickled into every checkpoint and pushed with the model."""
        return {**self.__dict__, "hub_token": None}

    @property
    def total_train_batch_size(self) -> int:
        """Images in one step of the optimizer, all processes together."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


class _ResumableRun(TrainerCallback):
    """What a resumed run needs, beyond what the Trainer does, to go on as if it had never stopped."""

    def __init__(self, sampler: TrainSampler | StreamedBatches):
        self.sampler = sampler
        self.seconds_before = 0.0
        self.started = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        seconds = [entry["train_seconds"] for entry in state.log_history if "train_seconds" in entry]
        self.seconds_before = seconds[-1] if seconds else 0.0
        self.started = time.monotonic()
        if isinstance(self.sampler, StreamedBatches) and not args.ignore_data_skip:
            # accelerate throws away the batches that the epoch has had; so they need not be made.
            steps_per_epoch = -(-len(self.sampler) // args.gradient_accumulation_steps)
            epoch, step = divmod(state.global_step, steps_per_epoch)
            self.sampler.skip(epoch, step * args.gradient_accumulation_steps)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # The loaders that accelerate wraps around the sampler do not tell it, where one skips the first batches of a
        # resumed epoch in several processes.
        self.sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs):
        # A checkpoint has no sums of what is not logged yet, so nothing is left unlogged when one is written. This
        # also keeps one from being written when the loss is not finite.
        control.should_log = control.should_log or control.should_save

    on_epoch_end = on_step_end

    @property
    def seconds(self) -> float:
        """Time spent in training, those of earlier processes included, up to their last checkpoints."""
        return self.seconds_before + time.monotonic() - self.started


class DistillationTrainer(Trainer):
    """
    A `Trainer` whose loss is that of a [`DistillMode`].

    The teacher is an attribute, not a part of the model: it gets no gradient, is in no optimizer and no checkpoint,
    and no wrapper (DDP, FSDP, DeepSpeed) sees it.

    Args:
        args ([`DistillationTrainingArguments`])
        teacher (`Callable`, *optional*): maps `pixel_values` as the student sees them to logits `(B, num_labels)` in
            the student's order of labels; `teacher.Teacher` is one. Needed where `args.mode` has a teacher.
        augment (`Callable`, *optional*): maps a training batch's `pixel_values` and seeds to augmented
            `pixel_values`; `augmentation.BatchAugmentation` is one. Where it is missing, the images come augmented.

    The others are those of `Trainer`. `train_dataset` takes the keys of [`TrainSampler`], as `TrainImages` does, or is
    a `streaming.StreamedImages`.
    """

    # The loss is a mean over each batch, so the Trainer has to divide it by the number of accumulated batches.
    loss_is_scaled_for_ga = False

    def __init__(self, *args, teacher=None, augment=None, **kwargs):
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
        self.teacher = teacher
        self.augment = augment
        if teacher is not None:
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.args.mixed_precision, torch.float32)
            teacher.to(self.args.device, dtype)
        # Another model has one head to train, whatever else it returns.
        self.is_deit_ti = isinstance(self.model, DeiTTiForImageClassification)
        two_heads = self.is_deit_ti and len(self.model.config.tokens) == 2
        # Endings of the metrics' names: none for what the model predicts with, then every read-out it has.
        self.readouts = ["", *(f"_{name}" for name in READOUTS)] if two_heads else [""]
        self.teacher_accuracy: float | None = None
        self.metric = evaluate.load(str(METRIC), keep_in_memory=True)
        self._step_sums: dict[str, torch.Tensor] = {}
        self._steps_summed = 0

    # ---- Training ----

    def _get_train_sampler(self, train_dataset=None) -> TrainSampler:
        return self._resumable(
            TrainSampler(
                len(train_dataset if train_dataset is not None else self.train_dataset),
                self.args.train_batch_size * self.args.world_size,
                self._data_seed,
                self.args.repeated_augmentation,
            )
        )

    @property
    def _data_seed(self) -> int:
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    def _resumable(self, sampler: TrainSampler | StreamedBatches) -> TrainSampler | StreamedBatches:
        self.remove_callback(_ResumableRun)
        self.resumable_run = _ResumableRun(sampler)
        self.add_callback(self.resumable_run)
        return sampler

    def get_train_dataloader(self) -> DataLoader:
        """As `Trainer`'s. Streamed images come in this process's own batches, which nobody has to deal out."""
        if not isinstance(self.train_dataset, StreamedImages):
            return super().get_train_dataloader()
        args = self.args
        batches = StreamedBatches(
            self.train_dataset,
            args.train_batch_size,
            self._data_seed,
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
        teacher_logits = self.teacher(pixel_values) if self.mode.has_teacher else None
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
        if teacher_logits is not None:
            agree = outputs["logits"].argmax(dim=-1) == teacher_logits.argmax(dim=-1)
            logged["teacher_agreement"] = agree.float().mean()
        for name, value in logged.items():
            if value is not None:
                self._step_sums[name] = self._step_sums.get(name, 0) + value.detach()
        self._steps_summed += 1
        return (parts.loss, outputs) if return_outputs else parts.loss

    def get_decay_parameter_names(self, model) -> list[str]:
        """As DeiT's `no_weight_decay`: tokens and positions do not decay either."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith(("_token", "position_embeddings", "pos_embed"))]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Adds the means since the last log of the loss's parts and of how often teacher and student agree, and makes the
        closing numbers those of the whole run, also where it was resumed.

        Raises:
            FloatingPointError: if the loss is not finite.
        """
        if "loss" in logs and self._steps_summed:
            for name, total in self._step_sums.items():
                mean = self.accelerator.reduce(total / self._steps_summed, reduction="mean")
                logs[name] = mean.item()
            self._step_sums, self._steps_summed = {}, 0
            if self.teacher_accuracy is not None:
                logs["teacher_accuracy"] = self.teacher_accuracy
            logs["train_seconds"] = round(self.resumable_run.seconds, 3)
        if "train_runtime" in logs:
            seconds, steps = self.resumable_run.seconds, self.state.global_step
            logs["train_runtime"] = round(seconds, 3)
            logs["train_steps_per_second"] = round(steps / seconds, 3)
            logs["train_samples_per_second"] = round(steps * self.args.total_train_batch_size / seconds, 3)
            logs["train_loss"] = self._mean_logged_loss()
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)) and not self.args.logging_nan_inf_filter:
            shown = ("label_loss", "distillation_loss", "learning_rate", "grad_norm")
            facts = ", ".join(f"{name} {logs[name]:.4g}" for name in shown if name in logs)
            raise FloatingPointError(
                f"The loss is {logs['loss']} at step {self.state.global_step} ({facts}). The checkpoints in "
                f"{self.args.output_dir} are from before. Try a lower --learning_rate, a longer --warmup_steps, or "
                "--bf16 instead of --fp16."
            )

    def _mean_logged_loss(self) -> float:
        """The mean loss of all steps: each log has that of the steps since the one before."""
        total, last_step = 0.0, 0
        for entry in self.state.log_history:
            if "loss" in entry:
                total += entry["loss"] * (entry["step"] - last_step)
                last_step = entry["step"]
        return total / max(1, last_step)

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: the run writes its own card (model_card.py), which Trainer's pushes would overwrite."""

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
    def measure_teacher(self) -> float:
        """Top-1 accuracy of the teacher on the evaluation split, on the images as the student sees them."""
        hits = []
        for inputs in self.get_eval_dataloader():
            predicted = self.teacher(inputs["pixel_values"].to(self.args.device)).argmax(dim=-1)
            hits.append(self.accelerator.gather_for_metrics(predicted == inputs["labels"].to(self.args.device)))
        self.teacher_accuracy = torch.cat(hits).double().mean().item()
        return self.teacher_accuracy


__all__ = ["DistillationTrainer", "DistillationTrainingArguments"]

"""`DistillationTrainer`: transformers' `Trainer` with a teacher in its loss."""

import contextlib
import functools
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import evaluate
import numpy as np
import torch
from accelerate.utils import DynamoBackend, broadcast_object_list
from huggingface_hub import HfApi
from safetensors.torch import load_model, save_model
from timm.utils import ModelEmaV3
from torch import distributed
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.utils.data import DataLoader, Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import EvalPrediction, HubStrategy
from transformers.utils import PushInProgress

from .card import Predictions
from .checkpoints import delete_older, save_settings, seal
from .data.inputs import normalised
from .data.randomness import DROP_PATH_STREAM, PATCH_DROP_STREAM, random_uniform, start_generator
from .data.sampling import TrainSampler, collate_images
from .data.streaming import UnreadableRow
from .device import HostCopy, teacher_dtype, to_device
from .distillation import DistillMode, LossParts, distillation_loss, label_loss
from .errors import first_line
from .hub import NOT_PUSHED, retrying
from .interruption import Interrupted, StopRequest, ignore_signals, name_of
from .modeling_deit_ti import DeiTTiForImageClassification
from .muon import make_muon
from .progress import RunProgress
from .reporting import use_reports


logger = logging.getLogger(__name__)

AVERAGE_FILE = "averaged_weights.safetensors"  # in a checkpoint
METRIC = Path(__file__).parent / "metrics" / "top_k_accuracy.py"


class _EarlyStopping(EarlyStoppingCallback):
    """Like transformers', but a resumed run keeps the patience that its checkpoint has left."""

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__, self.state())
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]

    @property
    def has_stopped(self) -> bool:
        return self.early_stopping_patience_counter >= self.early_stopping_patience


class _RunCallback(TrainerCallback):
    """Stops a run when told to or when its loss is not finite, and resumes it as if it had never stopped."""

    def __init__(self, trainer: "DistillationTrainer"):
        self.trainer = trainer
        self.seconds_before, self.started = 0.0, time.monotonic()
        self.stopped_by, self.signal_group = 0, None

    @property
    def seconds(self) -> float:
        """Time spent training, including earlier processes up to their last checkpoints."""
        return self.seconds_before + time.monotonic() - self.started

    def on_train_begin(self, args, state, control, **kwargs):
        seconds = [entry["train_seconds"] for entry in state.log_history if "train_seconds" in entry]
        self.seconds_before = seconds[-1] if seconds else 0.0
        self.started = time.monotonic()
        self.save_at_epoch_end = self.stopped_within_epoch = False
        if args.load_best_model_at_end and state.best_global_step is not None:
            # One process decides for all, which have to choose alike: another machine may have another folder.
            (is_lost,) = broadcast_object_list([state.best_model_checkpoint is None])
            if is_lost:
                logger.info(
                    f"The best model so far, of step {state.best_global_step}, is lost with its checkpoint: choosing "
                    "anew from here"
                )
                state.best_metric = state.best_global_step = None
        if self.trainer.train_dataset.is_streamed and not args.ignore_data_skip:
            # accelerate discards the batches that the epoch has already seen, so they need not be built.
            steps_per_epoch = -(-len(self.trainer.train_order) // args.gradient_accumulation_steps)
            epoch, step = divmod(state.global_step, steps_per_epoch)
            self.trainer.train_order.skip(epoch, step * args.gradient_accumulation_steps)
        if self.trainer.accelerator.scaler is not None:
            self.trainer.loss_scale = self.trainer.accelerator.scaler.get_scale()
        if args.world_size > 1:
            # On the CPU, whatever the gradients use: checking for a signal must not wait for the device.
            self.signal_group = distributed.new_group(backend="gloo")

    def on_epoch_begin(self, args, state, control, **kwargs):
        # accelerate's loaders do not pass on the epoch when several processes resume in the middle of one.
        self.trainer.train_order.set_epoch(int(state.epoch or 0))
        if state.global_step >= state.max_steps or self.trainer.has_stopped_early:
            # Resumed at the last step: the Trainer would run one more.
            control.should_training_stop = self.stopped_within_epoch = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.update(self.trainer.unwrapped_model, state.global_step)
        at_epoch_end = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if self._is_told_to_stop():
            control.should_training_stop = control.should_save = True
            self.stopped_within_epoch = not at_epoch_end
        if control.should_save and at_epoch_end:
            # A run resumed from here would skip the evaluation and log at the end of the epoch.
            control.should_save, self.save_at_epoch_end = False, True
        # A checkpoint does not keep sums that have not been logged yet.
        control.should_log = control.should_log or control.should_save
        # Logging and evaluation wait for a GPU anyway, and an evaluation may save a checkpoint too: of the best step.
        self.trainer.check_losses(wait=control.should_log or control.should_evaluate)
        self.trainer.count_overflow()

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped_within_epoch:  # everything has been written
            control.should_log = control.should_evaluate = control.should_save = False
            return
        if self._is_told_to_stop():
            control.should_training_stop = control.should_save = True
        control.should_save = control.should_save or self.save_at_epoch_end
        self.save_at_epoch_end = False
        control.should_log = control.should_log or control.should_save
        self.trainer.check_losses()

    def on_train_end(self, args, state, control, **kwargs):
        self._is_told_to_stop()  # during the last evaluation, after which there is no step to stop at

    def _is_told_to_stop(self) -> bool:
        """Whether any process has received a signal; all processes learn of it in the same step."""
        signum = self.trainer.stop_request.signum
        if self.signal_group is not None:
            highest = torch.tensor(signum)
            distributed.all_reduce(highest, distributed.ReduceOp.MAX, group=self.signal_group)
            signum = int(highest)
        self.stopped_by = signum
        return signum > 0


def _float32_weights(model: PreTrainedModel, state_dict: dict) -> dict:
    """The state dict, with the float32 weights that DeepSpeed's optimizer shards across processes."""
    from deepspeed.utils import safe_get_full_fp32_param  # an optional dependency

    kept = {name: safe_get_full_fp32_param(parameter) for name, parameter in model.named_parameters()}
    kept = {name: weight.cpu() for name, weight in kept.items() if weight is not None}
    return {name: value.float() if value.is_floating_point() else value for name, value in state_dict.items()} | kept


class DistillationTrainer(Trainer):
    """
    A `Trainer` with the loss of a [`DistillMode`].

    The teacher is not part of the model: no optimizer, checkpoint or wrapper (DDP, FSDP, DeepSpeed) sees it.

    Args:
        args ([`DistillationTrainingArguments`])
        train_dataset (`inputs.TrainImages` or `streaming.StreamedImages`), eval_dataset (`inputs.EvalImages`)
        augment (`Callable`): maps a batch's `pixel_values`, labels and seeds to augmented `pixel_values` and labels,
            like `inputs.DeviceAugmentation`.
        teacher (`Callable`, *optional*): maps `pixel_values` as the student sees them to logits `(B, num_labels)`,
            like `teacher.Teacher`. Required if `args.mode` has a teacher.
        teacher_cache (`teacher_cache.TeacherCache`, *optional*): answers in place of the teacher during training.
        class_weights (`torch.Tensor` of shape `(num_labels,)`, *optional*): as in `distillation_loss`.
        settings (`dict`, *optional*): everything that determines what the run learns, saved in its checkpoints.
        name (`str`, *optional*, defaults to `"Student"`): what the run is called on the terminal.
        kwargs: passed on to `Trainer`.
    """

    # The loss is a mean over each batch, so the Trainer has to divide it by the number of accumulated batches.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *,
        train_dataset,
        augment,
        teacher=None,
        teacher_cache=None,
        class_weights=None,
        settings=None,
        name="Student",
        **kwargs,
    ):
        super().__init__(
            train_dataset=train_dataset,
            data_collator=collate_images,
            compute_metrics=self._accuracies,
            preprocess_logits_for_metrics=self._kept_predictions,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False  # whatever the model's signature: the loss is ours, see above
        if self.accelerator.is_fsdp2:
            # Mixed precision through autocast, as everywhere else. FSDP's own would cast the weights of a batch norm,
            # which would then no longer match its float32 running statistics.
            policy = MixedPrecisionPolicy(output_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        elif self.is_deepspeed_enabled and self.args.mixed_precision != "no":
            # Newer versions of DeepSpeed also cast only the weights, so the statistics have to follow them.
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config.setdefault("data_types", {}).setdefault("buffer_dtype", self.args.mixed_precision)
        self.mode: DistillMode = self.args.mode
        self.num_labels: int = self.model.config.num_labels
        self.train_order = train_dataset.order(self.args)
        self.augment = augment
        self.teacher = self.training_teacher = teacher
        self.teacher_cache = teacher_cache
        self.class_weights = None if class_weights is None else class_weights.to(self.args.device)
        self.settings = settings
        if teacher is not None:
            dtype = teacher_dtype(self.args.mixed_precision)
            teacher.to(self.args.device, dtype, memory_format=torch.channels_last)
            # As accelerate compiles the student, but only for training: the last batch of an evaluation is smaller.
            compile_options = self.accelerator.state.dynamo_plugin
            if compile_options.backend != DynamoBackend.NO:
                compiled = torch.compile(teacher, **compile_options.to_kwargs())
                # A CUDA graph (mode reduce-overhead) keeps its output where the next graph, the student's, may write.
                self.training_teacher = lambda pixel_values: compiled(pixel_values).clone()
        # Any other model has one head to train, whatever else it returns.
        self.is_deit_ti = isinstance(self.model, DeiTTiForImageClassification)
        # FSDP and DeepSpeed only accept contiguous weights.
        if not (self.is_deit_ti or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.model.to(memory_format=torch.channels_last)
        self.readouts = self.args.readouts
        self.teacher_accuracy: float | None = None
        # The weights averaged over the steps. The decay warms up: early on, the average spans fewer steps.
        self.average: ModelEmaV3 | None = None
        if self.args.ema_decay is not None:
            self.average = ModelEmaV3(self.model, decay=self.args.ema_decay, use_warmup=True)
        # Frozen modules stay in eval mode, so that a frozen batch norm keeps its statistics.
        self._frozen = [
            module
            for module in self.model.modules()
            if any(True for _ in module.parameters()) and not any(p.requires_grad for p in module.parameters())
        ]
        self.predictions: Predictions | None = None  # of the latest evaluation
        self.teacher_predictions: np.ndarray | None = None  # label ids, of the latest measurement
        self.metric = evaluate.load(str(METRIC), keep_in_memory=True)
        self._hub = HfApi(token=self.args.hub_token)  # its pushes in the background run one after another
        self.stop_request = StopRequest(announce=self.is_local_process_zero())
        self.run_callback = _RunCallback(self)
        self.add_callback(self.run_callback)
        use_reports(self)
        self.pop_callback(PrinterCallback if self.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK)
        self.recent_loss: float | None = None  # of the latest steps, for the progress bar
        self.progress = RunProgress(name, lambda: self.recent_loss)
        self.add_callback(self.progress)
        self.early_stopping = None
        if self.args.early_stopping_patience is not None:
            self.early_stopping = _EarlyStopping(self.args.early_stopping_patience)
            self.add_callback(self.early_stopping)
        self._step_sums: dict[str, torch.Tensor] = {}
        self._steps_summed = 0
        # Step, learning rate, names of the loss's terms, the values of the loss and its terms.
        self._unchecked_losses: list[tuple[int, float, list[str], HostCopy]] = []
        self.loss_scale: torch.Tensor | float = 1.0  # of fp16, after the last step
        self._overflows: torch.Tensor | int = 0

    # ---- Training ----

    def train(self, *args, **kwargs):
        """
        Like `Trainer.train`. With `args.ema_decay` the model ends up with the averaged weights.

        Raises:
            FloatingPointError: if a loss is not finite, before that step's checkpoint is written.
            Interrupted: after a SIGTERM or Ctrl-C, once the step is finished and a checkpoint written.
        """
        with self.stop_request:
            try:
                output = super().train(*args, **kwargs)
            finally:
                self.progress.close()
                if self.teacher_cache is not None:
                    self.teacher_cache.flush()
        if self.run_callback.stopped_by:
            step = self.state.global_step
            checkpoint = os.path.join(self.args.output_dir, f"checkpoint-{step}")
            (is_saved,) = broadcast_object_list([os.path.isdir(checkpoint)])
            if not is_saved:  # the signal came during the last evaluation of a run that saves no checkpoints
                self.state.log_history.pop()  # the closing log, which the resumed run will write
                self._save_checkpoint(self.model, trial=None)
            raise Interrupted(
                f"stopped by {name_of(self.run_callback.stopped_by)} after step {step} of {self.state.max_steps}; "
                f"{checkpoint} has been written."
            )
        if self.average is not None:
            self.unwrapped_model.load_state_dict(self.average.module.state_dict())
        return output

    @property
    def unwrapped_model(self) -> PreTrainedModel:
        """The model without the wrappers of accelerate and torch."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Lends the model its averaged weights, if there are any."""
        if self.average is None:
            yield
            return
        latest = {name: value.clone() for name, value in self.unwrapped_model.state_dict().items()}
        self.unwrapped_model.load_state_dict(self.average.module.state_dict())
        try:
            yield
        finally:
            self.unwrapped_model.load_state_dict(latest)

    def _finalize_training(self, *args, **kwargs):
        """
        Like `Trainer`'s, but a stopped run, which will resume, keeps its latest weights and their checkpoint, and all
        other processes take the best model from the first.
        """
        best, is_stopped = self.state.best_model_checkpoint, self.run_callback.stopped_by > 0
        if is_stopped:
            self.state.best_model_checkpoint = None
        output = super()._finalize_training(*args, **kwargs)
        self.state.best_model_checkpoint = best
        is_whole = self.args.world_size > 1 and self.args.sharded_by is None
        if self.args.load_best_model_at_end and is_whole and not is_stopped:
            # Without shared storage, the other machines do not have its checkpoint.
            for model in filter(None, (self.unwrapped_model, self.average and self.average.module)):
                for tensor in model.state_dict().values():
                    distributed.broadcast(tensor, src=0)
        return output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_average(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if os.path.isfile(os.path.join(self.state.best_model_checkpoint, AVERAGE_FILE)):  # not on other machines
            self._load_average(self.state.best_model_checkpoint)

    def _load_average(self, checkpoint: str) -> None:
        if self.average is not None:
            load_model(self.average.module, os.path.join(checkpoint, AVERAGE_FILE))

    @property
    def has_stopped_early(self) -> bool:
        """Whether the patience of `--early_stopping_patience` has run out."""
        return self.early_stopping is not None and self.early_stopping.has_stopped

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> TrainSampler:
        return self.train_order

    def get_train_dataloader(self) -> DataLoader:
        """Like `Trainer`'s; a stream already yields only this process's batches."""
        if self.train_dataset.is_streamed:
            return self.train_order.loader(self.args)
        if self.train_dataset.batches is None:
            return super().get_train_dataloader()
        return self._loader_without_workers(self.train_dataset, self._train_batch_size, self.train_order)

    def _get_dataloader(self, *args, **kwargs) -> DataLoader:
        """Like `Trainer`'s, for training and evaluation, but its workers ignore signals."""
        loader = super()._get_dataloader(*args, **kwargs)
        inner = loader.base_dataloader  # accelerate's only passes on what it yields
        inner.worker_init_fn = functools.partial(ignore_signals, then=inner.worker_init_fn)
        return loader

    def _loader_without_workers(
        self, images: Dataset, batch_size: int, sampler: TrainSampler | None = None
    ) -> DataLoader:
        """For images that only need copying: receiving a worker's copy costs as much, and starting a worker more."""
        pin_memory = self.args.dataloader_pin_memory
        loader = DataLoader(images, batch_size, sampler=sampler, collate_fn=collate_images, pin_memory=pin_memory)
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Like `Trainer`'s. Raises `UnreadableRow` if a streamed row cannot be trained on."""
        if self.control.should_training_stop:  # before the first step, see `on_epoch_begin`
            return [], None
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            if "error" in batch:
                raise UnreadableRow(
                    f"{batch['error']} The run stopped at step {self.state.global_step}; its checkpoints are in "
                    f"{self.args.output_dir}. Repair that row, then run the same command again."
                )
        return batches, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mode's loss in training; in evaluation, for all modes, the plain cross-entropy of `logits`."""
        if not model.training:
            with self.accelerator.autocast():  # FSDP2 has none of its own
                outputs = model(pixel_values=inputs["pixel_values"])
            loss = label_loss(outputs["logits"], inputs.get("labels"))
            return (loss, outputs) if return_outputs else loss

        for module in self._frozen:
            module.eval()
        pixel_values, labels = self.augment(inputs["pixel_values"], inputs.get("labels"), inputs["seeds"])
        pixel_values = self._prepare_input(pixel_values)  # in DeepSpeed's own precision
        teacher_logits = None
        if self.training_teacher is not self.teacher:
            torch.compiler.cudagraph_mark_step_begin()  # teacher and student share one step of CUDA graphs
        if self.mode.has_teacher and self.teacher_cache is None:
            teacher_logits = self.training_teacher(pixel_values)
        elif self.mode.has_teacher:
            teacher_logits = self.teacher_cache(self.training_teacher, pixel_values, inputs["seeds"], self.train_order)
        randomness = self._randomness(inputs["seeds"])
        with self.accelerator.autocast():
            outputs = model(pixel_values=pixel_values, **randomness)
        parts = distillation_loss(
            self.mode,
            class_logits=outputs.get("class_logits") if self.is_deit_ti else outputs["logits"],
            distillation_logits=outputs.get("distillation_logits") if self.is_deit_ti else None,
            labels=labels,
            teacher_logits=teacher_logits,
            label_smoothing=self.args.label_smoothing_factor,
            class_weights=self.class_weights,
        )
        self._record_step(parts, outputs["logits"], teacher_logits)
        return (parts.loss, outputs) if return_outputs else parts.loss

    def _randomness(self, seeds: np.ndarray) -> dict[str, torch.Tensor]:
        """Derives all randomness in the student's forward pass from the seeds `(B,)` of its images."""
        if not self.is_deit_ti:
            start_generator(int(seeds[0]), self.args.device)  # for a network that draws its own random numbers
            return {}
        config, seeds = self.model.config, torch.from_numpy(seeds)
        noise = {"drop_path_noise": random_uniform(seeds, DROP_PATH_STREAM, config.num_hidden_layers, 2)}
        if config.patch_drop_rate > 0:
            patches = (config.image_size // config.patch_size) ** 2
            noise["patch_drop_noise"] = random_uniform(seeds, PATCH_DROP_STREAM, patches)
        return {name: to_device(values.float(), self.args.device) for name, values in noise.items()}

    def _record_step(self, parts: LossParts, logits: torch.Tensor, teacher_logits: torch.Tensor | None) -> None:
        """Records what the next log and the next check for non-finite losses need."""
        terms = {"label_loss": parts.label_loss, "distillation_loss": parts.distillation_loss}
        terms = {name: value.detach() for name, value in terms.items() if value is not None}
        if self.optimizer is not None and not self.args.logging_nan_inf_filter:
            losses = HostCopy(torch.stack([parts.loss.detach(), *terms.values()]))
            self._unchecked_losses.append((self.state.global_step + 1, self._get_learning_rate(), [*terms], losses))
        if teacher_logits is not None:
            terms["teacher_agreement"] = (logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)).float().mean()
        for name, value in terms.items():
            self._step_sums[name] = self._step_sums.get(name, 0) + value
        self._steps_summed += 1

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        """Like `Trainer`'s, plus Muon."""
        if self.args.optim == "muon" and self.optimizer is None:
            self.optimizer = make_muon(self.model, self.get_decay_parameter_names(self.model), self.args)
        return super().create_optimizer(*args, **kwargs)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Like `Trainer`'s, but tokens and positions do not decay either, as in DeiT's `no_weight_decay`."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith(("_token", "position_embeddings", "pos_embed"))]

    def check_losses(self, wait: bool = True) -> None:
        """
        Raises a `FloatingPointError` if a loss so far is not finite. Unless told to `wait` for a GPU, leaves the
        losses that it has not copied yet to a later call.
        """
        while self._unchecked_losses and (wait or self._unchecked_losses[0][-1].is_there):
            step, learning_rate, names, losses = self._unchecked_losses.pop(0)
            loss, *terms = losses.read().tolist()
            if math.isfinite(loss):
                # Smoothed, since batches differ.
                self.recent_loss = loss if self.recent_loss is None else 0.9 * self.recent_loss + 0.1 * loss
                continue
            facts = ", ".join(f"{name} {value:.4g}" for name, value in zip(names, terms, strict=True))
            raise FloatingPointError(
                f"The loss is {loss} at step {step} ({facts}, learning rate {learning_rate:.4g}). The checkpoints in "
                f"{self.args.output_dir} are from earlier steps. Try a lower --learning_rate, a higher "
                "--warmup_steps, or --bf16 instead of --fp16."
            )

    def count_overflow(self) -> None:
        """Counts the steps that fp16's scaler skips because a gradient overflowed; it lowers its scale each time."""
        # accelerator.optimizer_step_was_skipped misses them with a fused optimizer, which skips them on the device.
        scaler = self.accelerator.scaler
        if scaler is not None:
            scale = scaler._get_scale_async()  # get_scale would wait for the device
            self._overflows = self._overflows + (scale < self.loss_scale)
            self.loss_scale = scale.clone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Like `Trainer`'s, but in float32 and under the model's own class. Called by all processes."""
        output_dir = output_dir or self.args.output_dir
        model = self.unwrapped_model
        if self.is_deepspeed_enabled:
            state_dict = _float32_weights(model, state_dict)
        its_class = type(model)
        if isinstance(model, FSDPModule):
            # FSDP2 has changed the class to one of torch's (FSDPDeiTTi...), whose code would be saved with the model.
            _, model.__class__ = its_class.__bases__
        try:
            super()._save(output_dir, state_dict)
        finally:
            model.__class__ = its_class
        if self.is_deepspeed_enabled and self.args.should_save:
            model.config.dtype = "float32"  # not the training dtype, to which from_pretrained would round
            model.config.save_pretrained(output_dir)

    def _save_checkpoint(self, model, trial) -> None:
        """Like `Trainer`'s, but sealed; only then is it pushed, and older ones deleted."""
        args = self.args
        limit, push_to_hub = args.save_total_limit, args.push_to_hub
        args.save_total_limit, args.push_to_hub = None, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            args.save_total_limit, args.push_to_hub = limit, push_to_hub
        self.accelerator.wait_for_everyone()  # each process writes files of its own
        folder = self._get_output_dir(trial=trial)
        checkpoint = os.path.join(folder, f"checkpoint-{self.state.global_step}")
        if args.should_save:
            if self.average is not None:
                save_model(self.average.module, os.path.join(checkpoint, AVERAGE_FILE))
            torch.save(args, os.path.join(checkpoint, "training_args.bin"))  # without the two changes above
            if self.settings is not None:
                save_settings(checkpoint, self.settings)
            seal(checkpoint)
        if push_to_hub:
            self._push_from_checkpoint(checkpoint)
        if args.should_save and limit:
            delete_older(checkpoint, limit, self.state.best_model_checkpoint)

    def init_hf_repo(self, *args, **kwargs) -> None:
        """Like `Trainer`'s, but retried if the Hub fails for a moment."""
        retrying(lambda: super(DistillationTrainer, self).init_hf_repo(*args, **kwargs))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """
        Like `Trainer`'s, but with the model's code, without which nobody could load it, and without earlier stages;
        warns if the push in the background fails.
        """
        args, checkpoint, earlier = self.args, Path(checkpoint_folder), self.push_in_progress
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if earlier is not None and not earlier.is_done() and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        for pattern in ("config.json", "*.py", "model*.safetensors*"):  # large models are saved in parts
            for file in checkpoint.glob(pattern):
                shutil.copy(file, args.output_dir)
        self.processing_class.save_pretrained(args.output_dir)
        torch.save(args, os.path.join(args.output_dir, "training_args.bin"))
        message = f"Training in progress, step {self.state.global_step}"
        folders = [(args.output_dir, {"commit_message": message, "ignore_patterns": [*NOT_PUSHED]})]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            path = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            folders.append((checkpoint, {"commit_message": f"{message}, checkpoint", "path_in_repo": path}))
        where = {"repo_id": args.hub_model_id, "revision": args.hub_revision}
        jobs = [
            self._hub.upload_folder(folder_path=folder, run_as_future=True, **where, **options)
            for folder, options in folders
        ]
        self.push_in_progress = PushInProgress([*(earlier.jobs if earlier is not None else []), *jobs])

        def tell(_) -> None:
            errors = [job.exception() for job in jobs if job.exception() is not None]
            if errors:
                logger.warning(
                    f"Hub: {checkpoint.name} was not pushed ({first_line(errors[0])}); training "
                    "continues, and the next push will try again"
                )

        jobs[-1].add_done_callback(tell)  # they run one after another, so the others are done too

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was recorded since the last log; the closing figures cover the whole run, even if resumed."""
        has_scaler = self.accelerator.scaler is not None
        if "loss" in logs and self._steps_summed:
            for name, total in self._step_sums.items():
                logs[name] = self.accelerator.reduce(total / self._steps_summed, reduction="mean").item()
            self._step_sums, self._steps_summed = {}, 0
            if self.teacher_accuracy is not None:
                logs["teacher_accuracy"] = self.teacher_accuracy
            if has_scaler:
                logs["fp16_overflows"], self._overflows = int(self._overflows), 0
            logs["train_seconds"] = round(self.run_callback.seconds, 3)
        if "train_runtime" in logs:
            seconds, steps = round(self.run_callback.seconds, 3), self.state.global_step
            logs["train_runtime"] = seconds
            logs["train_steps_per_second"] = round(steps / seconds, 3)
            # Not rounded: times the seconds, it is the exact number of images.
            logs["train_samples_per_second"] = steps * self.args.total_train_batch_size / seconds
            total, last_step = 0.0, 0
            for entry in self.state.log_history:
                if "loss" in entry:  # the mean over the steps since the previous log
                    total += entry["loss"] * (entry["step"] - last_step)
                    last_step = entry["step"]
            logs["train_loss"] = total / max(1, last_step)
            if has_scaler:
                logs["fp16_overflows"] = sum(entry.get("fp16_overflows", 0) for entry in self.state.log_history)
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """Does nothing: the run writes its own card, which Trainer's pushes would overwrite."""

    # ---- Evaluation ----

    def evaluation_loop(self, *args, **kwargs):
        """Like `Trainer`'s, but with the averaged weights if there are any."""
        with self._averaged():
            return super().evaluation_loop(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Like `Trainer`'s, but images stay uint8, a quarter of the bytes, until `_prepare_inputs` normalises them."""
        images = (self.eval_dataset if eval_dataset is None else eval_dataset).cropped
        if not images.are_kept:
            return super().get_eval_dataloader(images)
        return self._loader_without_workers(images, self.args.eval_batch_size)

    def _prepare_inputs(self, inputs: dict) -> dict:
        """Like `Trainer`'s, but normalises evaluation images on the model's device."""
        pixel_values = inputs["pixel_values"]
        if pixel_values.dtype == torch.uint8 and "seeds" not in inputs:  # with seeds: training images, for `augment`
            inputs = inputs | {"pixel_values": normalised(pixel_values, self.processing_class)}
        return super()._prepare_inputs(inputs)

    def _kept_predictions(
        self, logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """
        What is kept of an evaluated batch: the five most likely labels of each read-out, `(B, read-outs, 5)`; the
        probability `(B,)` of the label that the first read-out, the model's own, predicts; and if a temperature is to
        be fitted, that read-out's logits `(B, K)`.
        """
        readouts = [logits if isinstance(logits, torch.Tensor) else logits[0]]
        if len(self.readouts) > 1:
            _, class_logits, distillation_logits = logits
            # In half precision the model's own mean is rounded: recomputing it could change the prediction.
            both = readouts[0] if self.mode.readout == "both" else (class_logits + distillation_logits) / 2
            readouts += [class_logits, distillation_logits, both]
        ranked = torch.stack(readouts, dim=1).topk(min(5, self.num_labels), dim=-1).indices
        predicting = readouts[0].float()
        kept = ranked, predicting.softmax(dim=-1).amax(dim=-1)
        return (*kept, predicting) if self.args.temperature_scaling else kept

    def _accuracies(self, prediction: EvalPrediction) -> dict[str, float]:
        ranked, confidence, *logits = prediction.predictions
        self.predictions = Predictions(prediction.label_ids, ranked[:, 0, 0], confidence, *logits)
        metrics = {}
        for index, name in enumerate(self.readouts):
            for k, ending in ((1, ""), (5, "_top5")):
                scores = self.metric.compute(predictions=ranked[:, index], references=prediction.label_ids, k=k)
                metrics[f"accuracy{name}{ending}"] = scores["accuracy"]
        return metrics

    @torch.no_grad()
    def measure_teacher(self, images: Dataset | None = None) -> float:
        """Top-1 accuracy of the teacher on `images` (default: `eval_dataset`), as the student sees them."""
        predicted, labels = [], []
        for inputs in self.get_eval_dataloader(images):
            inputs = self._prepare_inputs(inputs)
            batch = self.teacher(inputs["pixel_values"]).argmax(dim=-1), inputs["labels"]
            for values, gathered in zip((predicted, labels), self.accelerator.gather_for_metrics(batch), strict=True):
                values.append(gathered)
        predicted, labels = torch.cat(predicted), torch.cat(labels)
        self.teacher_predictions = predicted.cpu().numpy()
        self.teacher_accuracy = (predicted == labels).double().mean().item()
        return self.teacher_accuracy

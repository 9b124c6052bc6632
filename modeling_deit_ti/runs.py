"""A run from its arguments, a student's or a teacher's alike: the network, its trainer, its training."""

import contextlib
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list
from transformers import DeiTImageProcessor, PreTrainedModel, TrainerCallback, set_seed

from .arguments import Arguments, DistillationTrainingArguments, Division
from .batch_norm import has_batch_norms, synchronise_batch_norms
from .card import TeacherRecord
from .checkpoints import changed_settings, save_settings, settings_of
from .classifiers import (
    check_accepts_images,
    freeze_backbone,
    input_format,
    label_maps,
    load_config,
    new_timm_classifier,
    pretrained_with_new_head,
)
from .configuration_deit_ti import DeiTTiConfig
from .data import ImageData
from .data.inputs import EvalImages, make_image_processor, make_train_images, sample_images
from .device import PRECISION_NAMES, automatic_precision, is_faster_in_eager_attention, keep_freed_memory
from .errors import UserError, first_line
from .initialization import start_from_sincos_positions, start_from_whitened_patches
from .interop import is_vit, load_student, timm_arguments
from .modeling_deit_ti import DeiTTiForImageClassification
from .outcome import calibrate, save_exports, write_reports
from .reporting import finish_reports
from .teacher import Teacher
from .teacher_cache import TeacherCache
from .trainer import DistillationTrainer


FLAG = "--model_name_or_path"
WHITENING_PATCHES = 50_000  # a new network starts with their principal components


def build_network(args: Arguments, data: ImageData) -> tuple[PreTrainedModel, DeiTImageProcessor, list[str]]:
    """
    The network to train, its preprocessing, and a note on each part of `--model_name_or_path` that was not used as it
    is. With only a class head, any pretrained classifier can be trained as it is; other heads need a DeiT-Ti.

    Raises:
        UserError: if it cannot be loaded, does not accept the images, or cannot be exported as asked.
    """
    model, training = args.model, args.training
    name, image_processor = model.model_name_or_path, make_image_processor(model, args.augmentation)
    set_seed(training.seed)
    is_classifier = model.is_timm_architecture
    if model.is_timm_architecture:
        network = new_timm_classifier(name, data.label_names, model.image_size, image_processor)
    elif not model.is_new_deit_ti and training.mode.tokens == ("class",):
        source = load_config(name, FLAG)
        if is_classifier := not is_vit(source):
            _, mean, std = input_format(source, name, FLAG)
            image_processor = make_image_processor(model, args.augmentation, mean, std)
            network = pretrained_with_new_head(name, FLAG, data.label_names, image_processor)
    if is_classifier:
        if model.export:
            raise UserError(f"--export is for a DeiT-Ti, and {FLAG} {name} is not one.")
        check_classifier(args, data, network, name)
        return network, image_processor, []
    model.check_patch_size()
    config = DeiTTiConfig(
        image_size=model.image_size,
        patch_size=model.patch_size,
        drop_path_rate=model.drop_path_rate,
        patch_drop_rate=model.patch_drop_rate,
        **label_maps(data.label_names),
        **training.mode.network,
    )
    if not model.is_new_deit_ti:
        network, notes = load_student(name, config)
        if "timm" in model.export:
            timm_arguments(network.config)  # fail now, not after training
        return network, image_processor, notes
    try:
        network = DeiTTiForImageClassification(config)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise UserError(
            f"--image_size {model.image_size} --patch_size {model.patch_size}: the patches do not fit into memory "
            f"({first_line(error)})."
        ) from error
    if model.patch_init == "whitening":
        patches_per_image = (model.image_size // model.patch_size) ** 2
        images = sample_images(data, image_processor, -(-WHITENING_PATCHES // patches_per_image))
        start_from_whitened_patches(network, images)
    if model.position_init == "sincos":
        start_from_sincos_positions(network)
    return network, image_processor, []


def run_settings(args: Arguments, data: ImageData) -> dict:
    """Everything that determines what a run learns, as plain data: only a run with the same resumes a checkpoint."""
    training, mode, model = args.training, args.training.mode, args.model
    settings = {
        "train_images": len(data.train),
        "images": data.fingerprint[:12],
        "distill_mode": mode.name,
        "tokens": list(mode.tokens),
        "teacher_targets": mode.teacher_targets,
        "distillation_alpha": mode.alpha,
        "distillation_temperature": mode.temperature,
        "teacher": args.teacher.teacher_model_name_or_path if mode.has_teacher else None,
        "model_name_or_path": model.model_name_or_path,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "drop_path_rate": model.drop_path_rate,
        "precision": training.mixed_precision,
        **_shared_recipe(args),
    }
    if mode.has_teacher:
        # Only if set, so that runs from before they were recorded still match.
        for name in ("teacher_image_size", "teacher_pretrained", "allow_untrained_teacher"):
            if getattr(args.teacher, name):
                settings[name] = getattr(args.teacher, name)
    if args.fitting is not None:
        settings |= {f"teacher_{name}": value for name, value in _shared_recipe(args.fitting).items()}
    if data.is_streamed:
        settings["shuffle_buffer_size"] = args.images.shuffle_buffer_size
    if training.sharded_by is not None and training.world_size > 1:
        settings["sharded_by"] = training.sharded_by
    fills_steps = len(data.train) >= training.total_train_batch_size  # else several processes repeat some images
    if training.sharded_by == "DeepSpeed" or not fills_steps:
        settings["world_size"] = training.world_size
    return settings


def _shared_recipe(args: Arguments) -> dict:
    """The hyperparameters, with the global batch size in place of the batch size per device and the accumulation."""
    division = {name: value for name, value in vars(args.training.division).items() if value is not None}
    recipe = {"batch_size": args.training.total_train_batch_size, **division, **args.hyperparameters()}
    del recipe["per_device_train_batch_size"], recipe["gradient_accumulation_steps"]
    return recipe


def resume_steps_without_checkpoint(args: Arguments, data: ImageData) -> str | None:
    """
    [`resume_steps`] for a run that ended before its first checkpoint, for example while its teacher was fitted. Any
    other run starts as its flags say.
    """
    # One process decides for all: another machine may see a different folder.
    (before,) = broadcast_object_list([settings_of(args.training.output_dir)])
    changed = changed_settings(before, run_settings(args, data)).keys() - {"batch_size", "teacher_batch_size"}
    if args.training.has_automatic_precision:
        changed -= {"precision"}  # which also depends on the network
    return resume_steps(args, before) if before and not changed else None


def resume_steps(args: Arguments, before: dict) -> str | None:
    """
    Keeps the images of each step as they were under the settings `before`, however many processes there are now, for
    the run and for the one that fits its teacher. Returns a note if the flags alone give another global batch size.

    Raises:
        UserError: if the processes cannot take equal shares of a step.
    """
    training = args.training
    given = training.total_train_batch_size
    for run, prefix in ((args, ""), (args.fitting, "teacher_")):
        if run is None or f"{prefix}processes" not in before:
            continue
        known = {entry.name: before.get(f"{prefix}{entry.name}") for entry in fields(Division)}
        batch_size, share = before[f"{prefix}batch_size"], run.training.images_per_process
        if batch_size in (share * training.world_size, share * known["processes"]):  # else it is a different run
            run.training.divide_steps(batch_size, Division(**known | {"processes": batch_size // share}))
    if training.total_train_batch_size == given:
        return None
    factors = training.world_size, training.gradient_accumulation_steps, training.per_device_train_batch_size
    sizes = " x ".join(map(str, factors))
    return f"the global batch of {training.total_train_batch_size} is now {sizes} (processes x accumulation x batch)"


def continue_steps(args: Arguments, earlier_stage: str) -> None:
    """
    Gives a stage the global batch size that it would have in as many processes as the previous stage started with,
    however many there are now.

    Raises:
        UserError: if the processes cannot take equal shares of a step.
    """
    processes = settings_of(earlier_stage).get("processes", args.training.world_size)
    for run in filter(None, (args, args.fitting)):
        run.training.divide_steps(run.training.images_per_process * processes, run.division(processes))


def check_classifier(args: Arguments, data: ImageData, network: PreTrainedModel, name: str) -> None:
    """
    Checks that the classifier, which the user calls `name`, accepts the images. Unless the user chose a precision,
    also picks the one that suits the network as well as the device.
    """
    training = args.training
    batch_size = min(training.train_batch_size * training.world_size, len(data.train))
    check_accepts_images(network, name, args.model.image_size, batch_size)
    if training.has_automatic_precision:
        training.mixed_precision = automatic_precision(training.device, network)


def resume_precision(training: DistillationTrainingArguments, checkpoint: str | None) -> None:
    """Unless the user chose a precision, a resumed run keeps that of its checkpoint, whatever suits this device."""
    if checkpoint is None or not training.has_automatic_precision:
        return
    precision = settings_of(checkpoint).get("precision")
    if precision is not None and (precision != "fp16" or training.device.type == "cuda"):
        training.mixed_precision, training.has_automatic_precision = precision, False


@contextlib.contextmanager
def isolated_accelerator_state() -> Iterator[None]:
    """For one of several runs in a process: otherwise accelerate would keep the settings of the first Trainer."""
    distributed_type = PartialState().distributed_type  # not yet FSDP or DeepSpeed, which a Trainer sets
    yield
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = distributed_type


def balanced_class_weights(label_counts: np.ndarray) -> torch.Tensor:
    """
    Weights that let all classes count the same, float32, one per label: n / (K n_k) for n images, n_k of them with
    label k, as in scikit-learn's `compute_class_weight`. K counts the classes that have images; the others get 0.
    """
    (seen,) = label_counts.nonzero()
    weights = torch.zeros(len(label_counts))
    weights[seen] = torch.tensor(label_counts.sum() / (len(seen) * label_counts[seen]), dtype=torch.float32)
    return weights


def build_trainer(
    args: Arguments,
    data: ImageData,
    network: PreTrainedModel,
    image_processor,
    teacher: Teacher | None = None,
    teacher_cache: TeacherCache | None = None,
    name: str = "Student",
) -> DistillationTrainer:
    """
    Args:
        args ([`Arguments`])
        data ([`ImageData`])
        network (`PreTrainedModel`): the classifier to train.
        image_processor (`DeiTImageProcessor`): its preprocessing.
        teacher ([`Teacher`], *optional*), teacher_cache ([`TeacherCache`], *optional*): as in `DistillationTrainer`.
        name (`str`, *optional*, defaults to `"Student"`): what the run is called on the terminal.

    Raises:
        UserError: if the images cannot be augmented as asked, or the Trainer rejects a flag.
    """
    training = args.training
    if args.model.freeze_backbone:
        freeze_backbone(network)
    if has_batch_norms(network):
        training.restore_accumulation()
    if training.world_size > 1:
        synchronise_batch_norms(network, training.device)
    if training.device.type == "cpu":
        keep_freed_memory()
    if isinstance(network, DeiTTiForImageClassification):
        num_tokens = network.deit_ti.embeddings.position_embeddings.shape[1]
        if is_faster_in_eager_attention(training.device, training.mixed_precision, num_tokens):
            network.set_attn_implementation("eager")
    train_images, augment = make_train_images(data, args.augmentation, image_processor, training.device.type)
    try:
        return DistillationTrainer(
            model=network,
            args=training,
            teacher=teacher,
            teacher_cache=teacher_cache,
            class_weights=balanced_class_weights(data.label_counts()) if training.class_weights else None,
            settings=run_settings(args, data),
            name=name,
            augment=augment,
            train_dataset=train_images,
            eval_dataset=EvalImages(data.validation, image_processor),
            processing_class=image_processor,
        )
    except (ValueError, ImportError) as error:  # for flags that only the Trainer checks
        raise UserError(str(error)) from error


def evaluation_images(trainer: DistillationTrainer, data: ImageData) -> EvalImages:
    """All images to evaluate on: the trainer's, which are already prepared, unless those are a subset."""
    is_all = len(trainer.eval_dataset) == len(data.evaluation)
    return trainer.eval_dataset if is_all else EvalImages(data.evaluation, trainer.processing_class)


class _LatestEvaluation(TrainerCallback):
    """Remembers the latest evaluation of this process."""

    metrics: dict | None = None
    step: int | None = None

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.metrics, self.step = metrics, state.global_step

    def is_valid_for(self, trainer: DistillationTrainer) -> bool:
        """Whether another evaluation, after training, would measure the same weights in the same precision."""
        args = trainer.args
        is_changed = args.load_best_model_at_end or args.fp16_full_eval or args.bf16_full_eval
        return self.step == trainer.state.global_step and not is_changed


def train_and_save(
    trainer: DistillationTrainer,
    args: Arguments,
    data: ImageData,
    checkpoint: str | None = None,
    teacher: TeacherRecord | None = None,
    teacher_path: str | None = None,
) -> dict:
    """Trains, evaluates and writes everything a run leaves; returns the metrics of `all_results.json`."""
    if trainer.is_world_process_zero():
        save_settings(trainer.args.output_dir, trainer.settings)  # for a run that ends before its first checkpoint
    latest = _LatestEvaluation()
    trainer.add_callback(latest)
    train = trainer.train(resume_from_checkpoint=checkpoint).metrics
    images = evaluation_images(trainer, data)
    if images is trainer.eval_dataset and latest.is_valid_for(trainer):
        evaluation = latest.metrics
        trainer.log(evaluation)  # the log ends with the results, whether or not they were measured in training
    else:
        evaluation = trainer.evaluate(images)
    metrics = train | evaluation | {"precision": PRECISION_NAMES[trainer.args.mixed_precision]}
    if teacher is not None:
        metrics |= {"teacher_accuracy": teacher.accuracy, "teacher_path": teacher_path}
    state = trainer.state
    if trainer.early_stopping is not None:
        metrics["stopped_early"] = state.global_step < state.max_steps
        best = (entry["epoch"] for entry in state.log_history if entry["step"] == state.best_global_step)
        metrics["best_epoch"] = next(best, None)  # None: lost with its checkpoint
    if trainer.teacher_cache is not None:
        metrics["teacher_cached"] = trainer.teacher_cache.share_read

    trainer.save_model(_internal_call=True)  # otherwise it pushes an incomplete run, and fails if it cannot
    trainer.save_state()
    if trainer.is_world_process_zero():
        scaling = calibrate(trainer)
        metrics |= save_exports(trainer, args.model.export, images)
        write_reports(trainer, args, data, teacher, {"train": train, "eval": evaluation, "all": metrics}, scaling)
        finish_reports(trainer)
    return metrics

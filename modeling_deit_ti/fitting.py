"""A run's teacher: loaded by name, and fitted first if its labels are not the dataset's.

Fitting is a run of its own, in a folder named after its recipe, where later runs find it.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from transformers import PreTrainedModel, set_seed

from .arguments import Arguments, TeacherArguments
from .card import TeacherRecord
from .checkpoints import checkpoints_of, last_complete, save_settings, settings_of
from .classifiers import (
    input_format,
    is_timm_architecture,
    label_maps,
    label_names,
    load_classifier,
    pretrained_with_new_head,
    timm_hub_id,
)
from .configuration_deit_ti import DeiTTiConfig
from .data import ImageData
from .data.inputs import make_image_processor
from .errors import UserError, first_line
from .interop import load_student
from .runs import (
    build_network,
    build_trainer,
    check_classifier,
    isolated_accelerator_state,
    resume_precision,
    run_settings,
    train_and_save,
)
from .teacher import Teacher, match_labels, teacher_folder_name


logger = logging.getLogger(__name__)

# Bump when the code fits teachers in a different way: those fitted the old way are then not reused.
FITTING_VERSION = 4
RECIPE_FILE = "teacher_recipe.json"
FLAG = "--teacher_model_name_or_path"
RECIPE_IN_CARD = (
    "num_train_epochs",
    "optim",
    "learning_rate",
    "batch_size",
    "crop",
    "horizontal_flip",
    "class_weights",
    "precision",
)


def prepare_teacher(args: Arguments, data: ImageData, image_processor) -> tuple[Teacher, TeacherRecord, str]:
    """
    Loads the teacher. If its labels are not the dataset's, fits it first, or reuses the one that an earlier run
    fitted. `args` and `image_processor` are the student's.

    Returns:
        The teacher; its record for the card, with its accuracy still to be measured; and its model's folder or Hub id.

    Raises:
        UserError: if there is no such model, its labels cannot be matched, it has to be fitted and cannot be, or it
            does not accept images of `--teacher_image_size`.
    """
    options, name = args.teacher, args.teacher.teacher_model_name_or_path
    is_timm = is_timm_architecture(name)
    path = timm_hub_id(name) if is_timm and options.teacher_pretrained else name
    model = label_order = fitted = None
    if not is_timm or options.teacher_pretrained:
        model, missing = load_classifier(path, FLAG, options.trust_remote_code)
        if not missing:
            label_order = match_labels(label_names(model.config), data.label_names)
    is_untrained = options.allow_untrained_teacher and options.teacher_num_train_epochs == 0
    if label_order is None and is_untrained and model is not None:
        fitted, label_order = "untrained", list(range(len(data.label_names)))
        set_seed(args.fitting.training.seed)
        model = _with_new_head(model, path, data.label_names, image_processor, options).eval()
    if label_order is None:
        fitted = "scratch" if model is None else "pretrained"
        path = str(_fit(args, model, path, data, image_processor))
        model, _ = load_classifier(path, FLAG, options.trust_remote_code)
    own_size, mean, std = input_format(model.config, path, FLAG, options.trust_remote_code)
    image_size = options.teacher_image_size or own_size
    student_mean, student_std = list(image_processor.image_mean), list(image_processor.image_std)
    try:
        teacher = Teacher(model, image_size, mean, std, student_mean, student_std, label_order)
        teacher(torch.zeros(1, 3, image_size, image_size))
    except Exception as error:  # any architecture, with whatever size, mean and standard deviation its config has
        raise UserError(
            f"The teacher {name} does not accept images of {image_size}x{image_size} pixels ({first_line(error)})."
        ) from error
    # The results come after the recipe: they have the precision that was actually used.
    files = (RECIPE_FILE, "all_results.json") if fitted in ("scratch", "pretrained") else ()
    facts = {name: value for file in files for name, value in json.loads(Path(path, file).read_text()).items()}
    record = TeacherRecord(
        name=name,
        source="timm" if is_timm else "local" if os.path.isdir(name) else "hub",
        fitted=fitted,
        image_size=image_size,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        hyperparameters={key: facts[key] for key in RECIPE_IN_CARD if key in facts},
    )
    return teacher, record, path


def _fit(args: Arguments, pretrained: PreTrainedModel | None, source: str, data: ImageData, student_processor) -> Path:
    """The folder of the teacher fitted with this recipe; fits it if no earlier run has."""
    name = args.teacher.teacher_model_name_or_path
    if args.teacher.teacher_num_train_epochs == 0:
        advice = " An untrained head needs a pretrained network: add --teacher_pretrained."
        raise UserError(
            f"The teacher {name} does not know the dataset's labels, and --teacher_num_train_epochs 0 forbids fitting."
            + advice * args.teacher.allow_untrained_teacher
        )
    if not data.has_train_labels:
        raise UserError(
            f"The teacher {name} has to be fitted, but the training images have no labels. Name one that is fitted."
        )
    run, mean, std = args.fitting, student_processor.image_mean, student_processor.image_std
    is_main = run.training.process_index == 0
    if pretrained is None:
        model = replace(run.model, model_name_or_path=name.partition(".")[0])  # a tag names pretrained weights
    else:
        image_size, mean, std = input_format(pretrained.config, source, FLAG, args.teacher.trust_remote_code)
        image_size = args.teacher.teacher_image_size or image_size
        model = replace(run.model, model_name_or_path=source, image_size=image_size)
    run = run._replace(model=model)
    image_processor = make_image_processor(run.model, run.augmentation, mean, std)
    # Everything that determines a fitted teacher.
    settings = run_settings(run, data)
    recipe = settings | {"teacher": name, "pretrained": pretrained is not None}
    recipe = {key: value for key, value in recipe.items() if key not in ("processes", "sharded_by")}
    recipe["version"] = FITTING_VERSION
    if run.training.has_automatic_precision:
        recipe["precision"] = "automatic"  # so that other machines can reuse it
    folder = Path(args.teacher.teacher_output_dir) / teacher_folder_name(name, data.name, recipe)
    run.training.output_dir = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, is_main):
        # One process decides for all: another machine may see a different folder.
        (is_fitted,) = broadcast_object_list([_is_fitted(folder, recipe)])
        if is_fitted:
            logger.info(f"Teacher: {name}, fitted by an earlier run, from {folder}")
        else:
            logger.info(f"Teacher: {name}, fitting for {run.training.num_train_epochs:g} epochs, into {folder}")
            if pretrained is None:
                network, *_ = build_network(run, data)
            else:
                set_seed(run.training.seed)
                network = _with_new_head(pretrained, source, data.label_names, image_processor, args.teacher)
                check_classifier(run, data, network, name)
            if is_main:
                # For `runs.resume_steps_without_checkpoint`.
                save_settings(args.training.output_dir, run_settings(args, data))
                (folder / "all_results.json").unlink(missing_ok=True)  # from another recipe, or none
            checkpoint = last_complete(folder)
            before = settings_of(checkpoint).get("sharded_by") if checkpoint is not None else None
            checkpoint, before = broadcast_object_list([checkpoint, before])
            now = settings.get("sharded_by")
            if checkpoint is not None and before != now:
                raise UserError(
                    f"{checkpoint} belongs to an unfinished fitting with sharded_by {before}, not {now}. Resume it as "
                    f"it was started, or delete {folder} to fit the teacher anew."
                )
            if checkpoint is not None:
                logger.info(f"Teacher: an earlier run was interrupted while fitting it; resuming from {checkpoint}")
            resume_precision(run.training, checkpoint)
            with isolated_accelerator_state():
                trainer = build_trainer(run, data, network, image_processor, name="Teacher")
                if is_main:
                    (folder / RECIPE_FILE).write_text(json.dumps(recipe, indent=2, default=str) + "\n")
                train_and_save(trainer, run, data, checkpoint)
                trainer.accelerator.wait_for_everyone()
        if not _is_fitted(folder, recipe):
            raise UserError(
                f"--teacher_output_dir {args.teacher.teacher_output_dir}: the fitted teacher is there on the first "
                "machine, but not on this one. Choose a folder on storage that all machines share."
            )
        if is_main:
            for checkpoint in checkpoints_of(folder):
                shutil.rmtree(checkpoint)
    return folder


@contextlib.contextmanager
def _locked(folder: Path, is_main: bool) -> Iterator[None]:
    """One run at a time, until it ends or is killed. Its main process takes the lock."""
    lock = FileLock(f"{folder}.lock")
    for attempt in count():
        if is_main:
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=1)
        # In the loop, since the other processes would only wait for --ddp_timeout seconds.
        (is_locked,) = broadcast_object_list([lock.is_locked])
        if is_locked:
            break
        if attempt == 0:
            logger.info(f"Teacher: waiting for another run that is fitting it, into {folder}")
    try:
        yield
    finally:
        lock.release()
    if is_main:
        Path(lock.lock_file).unlink(missing_ok=True)  # processes that waited find the teacher fitted


def _is_fitted(folder: Path, recipe: dict) -> bool:
    """Whether the folder holds a finished run with this recipe."""
    try:
        fitted = json.loads((folder / RECIPE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return (folder / "all_results.json").is_file() and fitted == json.loads(json.dumps(recipe, default=str))


def _with_new_head(
    pretrained: PreTrainedModel, source: str, label_names: list[str], image_processor, options: TeacherArguments
) -> PreTrainedModel:
    """The classifier with a new head for these labels."""
    if isinstance(pretrained.config, DeiTTiConfig):
        # With only a class token, whatever it had: it is fitted without a teacher, so no other head would learn.
        size = {name: getattr(pretrained.config, name) for name in ("image_size", "patch_size")}
        return load_student(source, DeiTTiConfig(**size, **label_maps(label_names)))[0]
    return pretrained_with_new_head(source, FLAG, label_names, image_processor, options.trust_remote_code)

"""What a finished run leaves: exports, curves, report, card and results; its closing summary; and the push."""

import os
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers.utils import SAFE_WEIGHTS_NAME

from .arguments import INITIALIZATION, Arguments, DistillationTrainingArguments
from .card import (
    CURVES_FILE,
    EXAMPLE_FILE,
    DatasetRecord,
    Predictions,
    RunRecord,
    TeacherRecord,
    TemperatureScaling,
    describe_hardware,
    draw_report,
    folder_name,
    make_model_card,
    make_report,
    plot_training_curves,
    scale_temperature,
    write_model_card,
)
from .card.markdown import duration
from .data import ImageData
from .data.decoding import read_image
from .data.inputs import EvalImages
from .device import PRECISION_NAMES
from .errors import StorageError, UserError, first_line
from .hub import NOT_PUSHED, retrying
from .interop import QUANTIZED_FILE, save_onnx, save_timm, save_transformers
from .modeling_deit_ti import DeiTTiForImageClassification
from .trainer import DistillationTrainer


MAX_EXAMPLES = 8
MAX_QUANTIZED_IMAGES = 1000  # one at a time takes 10 to 20 seconds at 224x224


def calibrate(trainer: DistillationTrainer) -> TemperatureScaling | None:
    """
    Fits a temperature to the evaluation's predictions, if `--temperature_scaling` has kept their logits. If it
    improves the calibration on other images, it is folded into the weights of the saved DeiT-Ti's heads, so that
    whatever loads the model need not know about it.
    """
    scaling = scale_temperature(trainer.predictions)
    if scaling is None or not trainer.is_deit_ti:
        return scaling
    if scaling.after.expected_calibration_error >= scaling.before.expected_calibration_error:
        return scaling
    file = Path(trainer.args.output_dir, SAFE_WEIGHTS_NAME)
    weights = {
        name: weight / scaling.temperature if name.startswith(("class_head.", "distillation_head.")) else weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, new := file.with_suffix(".new"), metadata={"format": "pt"})
    os.replace(new, file)  # not written in place: the weights that were read are still mapped from it
    trainer.predictions = trainer.predictions.divided_by(scaling.temperature)
    return replace(scaling, is_applied=True)


def save_exports(trainer: DistillationTrainer, formats: list[str], images: EvalImages) -> dict[str, float]:
    """
    Saves the model for those who do not run this project's code. `formats` are those of `--export`. Returns the
    accuracy of the int8 model, if there is one.
    """
    if not trainer.is_deit_ti:
        return {}
    folder = Path(trainer.args.output_dir)
    # From the file: a wrapped or sharded model keeps its weights elsewhere.
    saved = DeiTTiForImageClassification.from_pretrained(folder, use_safetensors=True)
    save_transformers(saved, trainer.processing_class, folder / "transformers")
    if "timm" in formats:
        save_timm(saved, trainer.processing_class, folder / "timm")
    if "onnx" in formats:
        save_onnx(saved, folder / "transformers" / "onnx")
        return quantized_accuracy(folder / "transformers" / "onnx" / QUANTIZED_FILE, images, trainer.predictions)
    return {}


def quantized_accuracy(file: Path, images: EvalImages, predictions: Predictions) -> dict[str, float]:
    """
    Top-1 in ONNX Runtime on a CPU, on at most `MAX_QUANTIZED_IMAGES` of the images, and that of the unquantised
    model's predictions for the same images. One image at a time, as in a browser: int8 rounding depends on the batch.
    """
    from onnxruntime import InferenceSession  # only --export onnx needs it

    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    count = min(len(images), MAX_QUANTIZED_IMAGES)
    rows = np.random.default_rng(0).permutation(len(images))[:count]
    is_right = predictions.predicted[rows] == predictions.labels[rows]
    hits = 0
    for row in rows.tolist():
        image = images[row]
        (logits,) = session.run(["logits"], {"pixel_values": image["pixel_values"][None].numpy()})
        hits += int(logits.argmax() == image["labels"])
    return {
        "eval_accuracy_quantized": hits / count,
        "eval_accuracy_unquantized": float(is_right.mean()),
        "eval_samples_quantized": count,
    }


def write_reports(
    trainer: DistillationTrainer,
    args: Arguments,
    data: ImageData,
    teacher: TeacherRecord | None,
    results: dict[str, dict],
    scaling: TemperatureScaling | None,
) -> None:
    """Curves, report, card and results. `all_results.json` comes last: where it exists, the run is finished."""
    folder = Path(trainer.args.output_dir)
    is_private = data.source == "local"  # a user's own images are not shown
    plot_training_curves(trainer.state.log_history, folder / CURVES_FILE, teacher.accuracy if teacher else None)
    record = describe_run(trainer, args, data, teacher, results["all"])
    report = make_report(
        trainer.predictions,
        data.label_names,
        model=folder_name(folder),
        dataset=record.dataset.name,
        split=data.eval_split,
        teacher=trainer.teacher_predictions,
        temperature_scaling=scaling,
    )
    report.save(folder)
    draw_report(report, folder, None if is_private else lambda row: read_image(data.evaluation[row]))
    if not is_private:
        record.example_label = save_examples(data, folder)
    record.save(folder)
    write_model_card(record, folder)
    for name, metrics in results.items():
        trainer.save_metrics(name, metrics, combined=False)


def save_examples(data: ImageData, folder: Path) -> str:
    """Saves the first evaluated image of some classes, to try the model on; returns the label of `example.png`."""
    labels = np.asarray(data.evaluation["label"][:])
    _, firsts = np.unique(labels, return_index=True)
    rows = sorted(firsts.tolist())[:MAX_EXAMPLES]
    names = [EXAMPLE_FILE, *(f"example_{number}.png" for number in range(2, MAX_EXAMPLES + 1))]
    for row, name in zip(rows, names, strict=False):
        read_image(data.evaluation[row]).save(folder / name)
    return data.label_names[labels[rows[0]]]


def describe_run(
    trainer: DistillationTrainer, args: Arguments, data: ImageData, teacher: TeacherRecord | None, metrics: dict
) -> RunRecord:
    """The record from which the card is written."""
    model, images, training = args.model, args.images, args.training
    is_new = model.is_timm_architecture or model.is_new_deit_ti
    started_from = None if is_new else model.model_name_or_path
    earlier = [RunRecord.load(folder) for folder in args.earlier_stages]
    first = earlier[0] if earlier else None
    hyperparameters = args.hyperparameters() | {
        "augment_on": "loader" if trainer.augment.augment is None else "device",
        "eval_crop_ratio": model.eval_crop_ratio,
        "max_train_samples": images.max_train_samples,
        "max_eval_samples": images.max_eval_samples,
        "max_validation_samples": images.max_validation_samples,
    }
    if first:  # the network was initialised in the first stage
        hyperparameters |= {name: value for name, value in first.hyperparameters.items() if name in INITIALIZATION}
    if not trainer.is_deit_ti:  # which takes no notice of it
        hyperparameters.pop("patch_drop_rate", None)
    if images.streaming:
        hyperparameters |= {"streaming": True, "shuffle_buffer_size": images.shuffle_buffer_size}
    hyperparameters |= {"precision": PRECISION_NAMES[training.mixed_precision], "num_processes": training.world_size}
    # `accelerate launch` leaves its settings in the environment.
    launcher = ["accelerate", "launch"] if "ACCELERATE_MIXED_PRECISION" in os.environ else ["python"]
    return RunRecord(
        architecture=getattr(trainer.model.config, "architecture", trainer.model.config.model_type),  # timm's, ours
        num_parameters=trainer.model.num_parameters(),
        image_size=model.image_size,
        patch_size=model.patch_size if trainer.is_deit_ti else None,
        drop_path_rate=model.drop_path_rate if trainer.is_deit_ti else None,
        mode=training.mode,
        teacher=teacher,
        dataset=DatasetRecord(
            name=data.name,
            source=data.source,
            config_name=images.dataset_config_name,
            label_names=data.label_names,
            num_train_images=len(data.train),
            num_eval_images=len(data.evaluation),
            eval_split=data.eval_split,
        ),
        metrics=metrics,
        hyperparameters=hyperparameters,
        hardware=describe_hardware(training),
        base_model=first.base_model if first else started_from,
        base_model_on_hub=first.base_model_on_hub if first else bool(started_from) and not os.path.isdir(started_from),
        earlier_stages=[stage.as_stage() for stage in earlier],
        hub_model_id=training.hub_model_id if training.push_to_hub else None,
        license=model.license,
        command=[*launcher, "train_hf.py", *args.flags],
    )


def summary(trainer: DistillationTrainer, teacher: TeacherRecord | None, metrics: dict) -> str:
    """The summary at the end of a run. `metrics` are those of `all_results.json`."""
    folder = trainer.args.output_dir
    record = RunRecord.load(folder)
    rows = [] if teacher is None else [(f"teacher, {teacher.name}", teacher.accuracy, None)]
    for readout in trainer.readouts:
        name = {"": "student", "_both": "  mean of both heads"}.get(readout, f"  {readout[1:]} head")
        rows.append((name, metrics[f"eval_accuracy{readout}"], metrics[f"eval_accuracy{readout}_top5"]))
    width, has_top5 = max(34, *(len(name) for name, *_ in rows)), trainer.num_labels > 5
    lines = ["", f"{'':{width}}{'top-1':>8}" + f"{'top-5':>9}" * has_top5]
    for name, top1, top5 in rows:
        lines.append(f"{name:{width}}{top1:8.2%}" + (f"{top5:9.2%}" if has_top5 and top5 is not None else ""))
    together, in_last = (" for all stages together", " in the last stage") if record.earlier_stages else ("", "")
    share = metrics.get("teacher_cached", 0)
    cached = f", {share:.0%} of the teacher's logits read from its cache{in_last}" if share else ""
    remote_code = ", trust_remote_code=True" if trainer.is_deit_ti else ""
    if metrics.get("stopped_early"):
        args, best = trainer.args, metrics["best_epoch"]
        lines += [
            "",
            f"Stopped early, after {metrics['epoch']:g} epochs: {args.metric_for_best_model} had not improved in "
            f"{args.early_stopping_patience} evaluations."
            + (f" The model is from epoch {best:g}." if best is not None else ""),
        ]
    lines += [
        "",
        f"Trained in {duration(record.seconds)}{together}, {record.images_per_second:.0f} images/s in "
        f"{metrics['precision']}{cached}.",
        f"The model, its card (README.md) and its curves are in {folder}",
        *([f"The teacher is in {metrics['teacher_path']}"] if teacher is not None else []),
        "",
        "    from transformers import pipeline",
        f'    print(pipeline("image-classification", "{folder}"{remote_code})("image.png"))',
        "",
    ]
    return "\n".join(lines)


def address_card(args: Arguments) -> None:
    """
    Names the repository and the license in the card of a finished run that was not meant for the Hub, unless the card
    has been edited since.

    Raises:
        UserError: if the run lacks what `--export` asks for.
    """
    folder = Path(args.training.output_dir)
    for name, exported in (("timm", "timm"), ("onnx", "transformers/onnx")):
        if name in args.model.export and not (folder / exported).is_dir():
            raise UserError(
                f"--export {name}: this run is finished, without it. To add it: python -m modeling_deit_ti.interop "
                f"{shlex.quote(str(folder))} --to {name}"
            )
    record, card = RunRecord.load(folder), folder / "README.md"
    if record.hub_model_id is None and card.read_text(encoding="utf-8") == str(make_model_card(record, folder)):
        record.hub_model_id, record.license = args.training.hub_model_id, args.model.license
        record.save(folder)
        write_model_card(record, folder)


def push(args: DistillationTrainingArguments) -> None:
    """
    Uploads the finished run in the output folder, without checkpoints and earlier stages.

    Raises:
        StorageError: if the push fails; the run is complete on disk, and the message says how to push it.
    """
    repo, folder = args.hub_model_id, args.output_dir
    try:
        retrying(
            lambda: HfApi(token=args.hub_token).upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message="End of training",
                ignore_patterns=[*NOT_PUSHED],  # a copy, since upload_folder adds to it
                revision=args.hub_revision,
            )
        )
    except Exception as error:  # whatever the network or the Hub did, nothing is lost
        revision = f" --revision {args.hub_revision}" if args.hub_revision else ""
        excluded = " ".join(f'--exclude "{pattern}"' for pattern in NOT_PUSHED)
        raise StorageError(
            f"the run is finished and saved in {folder}, but the push failed ({first_line(error)}). Run the same "
            "command again to push it, or, logged in with `hf auth login` or HF_TOKEN: "
            f"hf upload {repo} {shlex.quote(folder)} .{revision} {excluded}"
        ) from error

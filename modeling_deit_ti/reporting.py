"""What experiment trackers get (`--report_to`): transformers' callbacks, plus groups of metrics, and pictures."""

import os
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import Trainer
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

from .card import CURVES_FILE
from .card.report_pictures import CONFUSION_FILE


PICTURES = (CURVES_FILE, CONFUSION_FILE)


def grouped(logs: dict) -> dict:
    """`eval_accuracy` as eval/accuracy, `teacher_agreement` as teacher/agreement, and everything else as train/..."""
    return {
        name.replace("_", "/", 1) if name.startswith(("eval_", "teacher_")) else f"train/{name}": value
        for name, value in logs.items()
    }


class _Report:
    """
    What the reports below have in common. A run is named after its folder, so that a resumed run continues the same
    one if the tool can. It stays open until `finish`: the final evaluation and the pictures come after training.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        args.run_name = args.run_name or Path(args.output_dir).name
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs, **kwargs):
        if state.is_world_process_zero:
            self.log_metrics(grouped(logs), state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self._end = partial(super().on_train_end, args, state, control, **kwargs)

    def finish(self, folder: str, step: int) -> None:
        """Adds the pictures from the folder of the finished run, and closes the report."""
        for file in PICTURES:
            if os.path.isfile(os.path.join(folder, file)):
                self.log_picture(Path(folder, file), step)
        self._end()


class TensorBoardReport(_Report, TensorBoardCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        # With one folder per start, TensorBoard would show a resumed run as two.
        self.logging_dir = self.logging_dir or os.path.join(args.output_dir, "runs")
        super().on_train_begin(args, state, control, **kwargs)

    def log_metrics(self, metrics: dict, step: int) -> None:
        for name, value in metrics.items():
            self.tb_writer.add_scalar(name, value, step)
        self.tb_writer.flush()

    def log_picture(self, file: Path, step: int) -> None:
        pixels = np.asarray(Image.open(file).convert("RGB"))
        self.tb_writer.add_image(f"pictures/{file.stem}", pixels, step, dataformats="HWC")


class TrackioReport(_Report, TrackioCallback):
    def log_metrics(self, metrics: dict, step: int) -> None:
        self._trackio.log(metrics, step=step)

    def log_picture(self, file: Path, step: int) -> None:
        self._trackio.log({f"pictures/{file.stem}": self._trackio.Image(str(file))}, step=step)


class WandbReport(_Report, WandbCallback):
    def log_metrics(self, metrics: dict, step: int) -> None:
        self._wandb.log({**metrics, "train/global_step": step})  # the axis that transformers defines

    def log_picture(self, file: Path, step: int) -> None:
        self._wandb.log({f"pictures/{file.stem}": self._wandb.Image(str(file)), "train/global_step": step})

    def finish(self, folder: str, step: int) -> None:
        super().finish(folder, step)
        self._wandb.finish()  # otherwise a student's run would continue its teacher's


class MLflowReport(_Report, MLflowCallback):
    def log_metrics(self, metrics: dict, step: int) -> None:
        self._ml_flow.log_metrics(metrics, step=step)

    def log_picture(self, file: Path, step: int) -> None:
        self._ml_flow.log_artifact(str(file), artifact_path="pictures")


REPORTS = {
    TensorBoardCallback: TensorBoardReport,
    TrackioCallback: TrackioReport,
    WandbCallback: WandbReport,
    MLflowCallback: MLflowReport,
}


def use_reports(trainer: Trainer) -> None:
    """Replaces transformers' own callbacks with these, where `--report_to` has asked for them."""
    for kind, report in REPORTS.items():
        if trainer.pop_callback(kind):
            trainer.add_callback(report)


def finish_reports(trainer: Trainer) -> None:
    """Adds the pictures, once they are drawn, and closes the reports."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, _Report):
            callback.finish(trainer.args.output_dir, trainer.state.global_step)

"""What a run shows while it is running: one bar in a terminal, one line per log elsewhere."""

import logging
import time
from collections.abc import Callable

import datasets
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.utils.logging import set_tqdm_hook

from .card.markdown import duration


BAR = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left{postfix}"
ENDED_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"


# Warnings from transformers about what is intended here: a run that is resumed at its end, or with other batches; a
# pretrained network that gets a new head.
FALSE_ALARMS = ("There seems not to be a single sample", "The following arguments do not match", "LOAD REPORT")


def quiet_libraries(all_bars: bool = False) -> None:
    """
    Hides transformers' bars for each file that it reads or writes (`Loading weights`, `Writing model shards`), and
    with `all_bars` those of datasets as well. Downloads from the Hub keep theirs.
    """
    set_tqdm_hook(lambda bar, args, options: bar(*args, **options | {"disable": True}))
    if all_bars:
        datasets.disable_progress_bars()
    for name in ("transformers.trainer", "transformers.trainer_utils", "transformers.modeling_utils"):
        logging.getLogger(name).addFilter(lambda record: not any(alarm in str(record.msg) for alarm in FALSE_ALARMS))


class RunProgress(TrainerCallback):
    """
    Shows a run in place of transformers' bars and printed dictionaries: as one bar for its steps, epochs and
    evaluations, also when resumed; or, with `--disable_tqdm`, as one line per log. Only the main process shows it.

    Args:
        name (`str`): what is trained, at the start of the bar and of each line.
        recent_loss (`Callable`): the loss of the latest steps, or `None` if there is none yet.
    """

    def __init__(self, name: str, recent_loss: Callable[[], float | None]):
        self.name = name
        self.recent_loss = recent_loss
        self.bar: tqdm | None = None
        self.is_training = False
        self.accuracy: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_training, self._evaluated, self._facts = True, 0, []
        self._started = self._last_logged = state.global_step, time.monotonic()
        logged = [entry["eval_accuracy"] for entry in state.log_history if "eval_accuracy" in entry]
        self.accuracy = logged[-1] if logged else None
        if _has_bar(args, state):
            self.bar = _new_bar(
                total=state.max_steps,
                initial=state.global_step,
                desc=self._description(args, state),
                bar_format=BAR,
                smoothing=0,  # the time left is estimated from all steps so far, evaluations included
            )

    def on_step_end(self, args, state, control, **kwargs):
        self._update_bar(args, state)

    def on_prediction_step(self, args, state, control, eval_dataloader, **kwargs):
        if not _has_bar(args, state):
            return
        if self.is_training:
            self._evaluated += 1
            self._update_bar(args, state, f"evaluating {self._evaluated}/{len(eval_dataloader)}")
        else:
            if self.bar is None:
                self.bar = _new_bar(total=len(eval_dataloader), desc=f"{self.name}, evaluating", leave=False)
            self.bar.update()

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" not in logs:
            return
        (step, since), now = self._last_logged, time.monotonic()
        images = (state.global_step - step) * args.total_train_batch_size
        self._facts = [f"loss {logs['loss']:.4g}", f"{images / (now - since):,.0f} images/s"]
        if not control.should_evaluate:
            self._print_line(args, state)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if not self.is_training:
            self.close()
            return
        self._evaluated, self.accuracy = 0, metrics["eval_accuracy"]
        self._facts.insert(1, f"accuracy {self.accuracy:.2%}")
        self._print_line(args, state)
        self._update_bar(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Ends the bar, if there is one. That of training stays, with the time that it took."""
        self.is_training = False
        if self.bar is not None:
            if self.bar.leave:
                self.bar.bar_format = ENDED_BAR
            self.bar.close()
            self.bar = None

    def _update_bar(self, args: TrainingArguments, state: TrainerState, doing: str | None = None) -> None:
        if self.bar is None:
            return
        loss = self.recent_loss()
        facts = [f"loss {loss:.3g}"] if loss is not None else []
        facts += [f"accuracy {self.accuracy:.1%}"] if self.accuracy is not None else []
        self.bar.set_description_str(self._description(args, state), refresh=False)
        self.bar.set_postfix_str(doing or ", ".join(facts), refresh=False)
        self.bar.update(state.global_step - self.bar.n)

    def _description(self, args: TrainingArguments, state: TrainerState) -> str:
        return f"{self.name}, {_place(args, state, f'{state.epoch or 0:.1f}')}"

    def _print_line(self, args: TrainingArguments, state: TrainerState) -> None:
        (step, since), now = self._started, time.monotonic()
        if step < state.global_step < state.max_steps:
            seconds_left = (now - since) / (state.global_step - step) * (state.max_steps - state.global_step)
            self._facts.append(f"{duration(seconds_left)} left")
        if state.is_world_process_zero and args.disable_tqdm:
            place = _place(args, state, f"{round(state.epoch, 2):g}")
            print(f"{self.name}: {', '.join([place, *self._facts])}", flush=True)
        self._facts, self._last_logged = [], (state.global_step, now)


def _has_bar(args: TrainingArguments, state: TrainerState) -> bool:
    return state.is_world_process_zero and not args.disable_tqdm


def _new_bar(**options) -> tqdm:
    return tqdm(miniters=0, dynamic_ncols=True, **options)  # redrawn by time only, also between steps


def _place(args: TrainingArguments, state: TrainerState, epoch: str) -> str:
    return (
        f"step {state.global_step}/{state.max_steps}"
        if args.max_steps > 0
        else f"epoch {epoch}/{args.num_train_epochs:g}"
    )

"""Checks before training of what would otherwise only fail hours later."""

import os
from pathlib import Path

import datasets
import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from transformers import PreTrainedModel, Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from .arguments import Arguments, DistillationTrainingArguments
from .checkpoints import changed_settings, checkpoints_of, last_complete, settings_of, why_unusable
from .errors import UserError, check_writable, first_line
from .hub import retrying
from .muon import make_muon


def checkpoint_to_resume(args: DistillationTrainingArguments) -> str | None:
    """
    The checkpoint to resume from, if any. `auto` means the last complete one; if there is none, the run starts anew.

    Raises:
        UserError: if something would be overwritten; or if the checkpoint does not exist, or is incomplete or damaged.
    """
    folder, resume = Path(args.output_dir), args.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: this is a file, not a folder.")
    if (folder / "all_results.json").is_file():
        raise UserError(f"--output_dir {folder} already holds a finished run: choose another, or delete this one.")
    if resume == "false" and checkpoints_of(folder):
        raise UserError(
            f"--output_dir {folder} holds an unfinished run: choose another folder, or leave out "
            "--resume_from_checkpoint to resume it."
        )
    if resume in ("auto", "false"):
        # One process decides for all: another machine may see another folder.
        (checkpoint,) = broadcast_object_list([last_complete(folder)])
        for name in ("model.safetensors", "config.json", "README.md"):
            if checkpoint is None and (folder / name).exists():
                raise UserError(f"--output_dir {folder}: its {name} would be overwritten; choose another folder.")
        return checkpoint
    if resume == "last-checkpoint" and not os.path.isdir(resume):
        resume = _pushed_checkpoint(args)
    if not os.path.isdir(resume):
        raise UserError(f"--resume_from_checkpoint {resume}: there is no such folder.")
    flaw = why_unusable(resume) if args.process_index == 0 else None
    if flaw is not None:
        raise UserError(f"--resume_from_checkpoint {resume}: this is not a complete checkpoint; {flaw}.")
    return resume


def is_finished(args: DistillationTrainingArguments, is_last: bool) -> bool:
    """Whether there is nothing to train: an earlier stage is finished, or a finished run only has to be pushed."""
    is_skipped = not is_last and args.resume_from_checkpoint == "auto"
    is_finished = (Path(args.output_dir) / "all_results.json").is_file()
    return broadcast_object_list([is_finished and (args.push_to_hub or is_skipped)])[0]


def check_same_run(checkpoint: str, settings: dict) -> None:
    """Raises a `UserError` if the checkpoint is from a run with other settings: the result would match neither run."""
    changed = changed_settings(settings_of(checkpoint), settings)
    if changed:
        phrases = (f"{name} {before}, not {now}" for name, (before, now) in changed.items())
        raise UserError(
            f"{checkpoint} belongs to another run, with {'; '.join(phrases)}. Resume with the same flags and images, "
            "or start a new run in another --output_dir."
        )


def _pushed_checkpoint(args: DistillationTrainingArguments) -> str:
    """The checkpoint that `--hub_strategy checkpoint` keeps on the Hub, from the output folder or downloaded."""
    local = os.path.join(args.output_dir, "last-checkpoint")
    if os.path.isdir(local) or not (args.hub_model_id or args.push_to_hub):
        return local
    api, name = HfApi(token=args.hub_token), hub_repository(args)
    try:
        if "/" not in name:  # a push adds the user, a download does not
            name = f"{retrying(api.whoami)['name']}/{name}"
        patterns = "last-checkpoint/*"
        pushed = retrying(lambda: api.snapshot_download(name, revision=args.hub_revision, allow_patterns=patterns))
    except Exception as error:  # from the network or the Hub
        raise UserError(
            f"--resume_from_checkpoint last-checkpoint: cannot be downloaded from {name} ({first_line(error)})."
        ) from error
    pushed = os.path.join(pushed, "last-checkpoint")
    if not os.path.isdir(pushed):
        raise UserError(f"--resume_from_checkpoint last-checkpoint: the repository {name} has no such folder.")
    for file in Path(pushed).rglob("*"):
        if file.name == ".metadata" or file.name.endswith("_states.pt"):  # those of torch's shards and of DeepSpeed
            raise UserError(
                f"--resume_from_checkpoint last-checkpoint: its {file.name} would be unpickled, which can run code. "
                f"If you trust everyone who can write to {name}, download the folder and pass its path instead."
            )
    return pushed


def hub_repository(args: DistillationTrainingArguments) -> str:
    """The name of the repository to push to, with or without its owner. Default: the output folder's name."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def check_hub_access(args: DistillationTrainingArguments) -> None:
    """
    Creates the repository to push to, before training, and sets `args.hub_model_id` to its full name.

    Raises:
        UserError: if the Hub is not reachable, the token is missing, invalid or may not write there, or the finished
            run in the output folder has already been pushed.
    """
    name = hub_repository(args)
    try:
        retrying(lambda: _prepare_repository(HfApi(token=args.hub_token), name, args))
    except UserError:
        raise
    except Exception as error:  # from the network, the Hub or the token's file: a push would fail
        raise UserError(
            f"--push_to_hub: cannot write to the repository {name} ({first_line(error)}). Log in with `hf auth "
            "login`, or set HF_TOKEN to a token with write access; or train without --push_to_hub and use `hf upload` "
            "later."
        ) from error


def _prepare_repository(api: HfApi, name: str, args: DistillationTrainingArguments) -> None:
    if api.whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError("--push_to_hub: the token is read-only; create one with write access.")
    args.hub_model_id = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
    api.auth_check(args.hub_model_id, write=True)
    if args.hub_revision and not api.revision_exists(args.hub_model_id, args.hub_revision):
        api.create_branch(args.hub_model_id, branch=args.hub_revision)
    results = Path(args.output_dir, "all_results.json")
    if not results.is_file() or not api.file_exists(args.hub_model_id, results.name, revision=args.hub_revision):
        return
    pushed = api.hf_hub_download(args.hub_model_id, results.name, revision=args.hub_revision)
    if Path(pushed).read_bytes() == results.read_bytes():
        raise UserError(
            f"--output_dir {args.output_dir} already holds a finished run, which was pushed to {args.hub_model_id}: "
            "choose another, or delete this one."
        )


def check_one_gpu(args: DistillationTrainingArguments) -> None:
    """
    Raises a `UserError` if the process sees several GPUs: the Trainer would use nn.DataParallel, which trains in
    float32 whatever the precision.
    """
    if args.n_gpu > 1:
        raise UserError(
            f"one process sees {args.n_gpu} GPUs: start one process per GPU with `accelerate launch "
            f"--num_processes {args.n_gpu} train_hf.py ...`, or hide all but one with CUDA_VISIBLE_DEVICES=0."
        )


def check_folders(args: Arguments) -> None:
    """Raises a `UserError` if a run could not write to a folder that it needs."""
    if args.training.local_process_index == 0:  # each machine has its own datasets cache
        check_writable("HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE)
    if args.training.process_index == 0:
        check_writable("--output_dir", args.training.output_dir)
        if args.training.mode.has_teacher:
            check_writable("--teacher_output_dir", args.teacher.teacher_output_dir)


def check_training(args: DistillationTrainingArguments, student: PreTrainedModel) -> None:
    """Raises a `UserError` for flags that would only fail, or teach nothing, after the teacher is fitted."""
    if args.mode.teacher_targets == "standardized" and student.config.num_labels == 2:
        raise UserError(
            "--teacher_targets standardized: two standardised logits are always 1 and -1, so they teach nothing. Use "
            "soft or hard targets."
        )
    number = [torch.nn.Parameter(torch.zeros(1))]
    name = "muon" if args.optim == "muon" else args.optim.value
    flags = f"--optim {name}, with --learning_rate, --weight_decay, --adam_* and --optim_args"
    try:
        if name == "muon":
            make_muon(student, [], args)
        else:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args, student)
            if kind in vars(torch.optim).values():
                kind(number, weight_decay=args.weight_decay, **options)
        flags = f"--lr_scheduler_type {args.lr_scheduler_type.value}, with --lr_scheduler_kwargs"
        optimizer = torch.optim.SGD(number, args.learning_rate)
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, args.lr_scheduler_kwargs)
        flags = f"--torch_compile_backend {args.torch_compile_backend} --torch_compile_mode {args.torch_compile_mode}"
        if args.torch_compile:
            torch.compile(student, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        flags = f"--report_to {' '.join(args.report_to)}"
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except Exception as error:  # many libraries, each with errors of its own
        raise UserError(f"{flags}: {first_line(error)}.") from error

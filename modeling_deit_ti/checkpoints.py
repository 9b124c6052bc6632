"""Checkpoints of a run: sealed with checksums when complete, and verified before a run resumes from them."""

import hashlib
import json
import os
import shutil
from pathlib import Path


CHECKSUMS_FILE = "checksums.json"
SETTINGS_FILE = "_run_settings.json"  # it names local folders; thanks to the underscore, Trainer does not push it
# The settings of `arguments.Division`. A resumed run keeps them.
DIVISION = ("processes", "together", "lanes", "lane_buffer_size")


def seal(checkpoint: str | Path) -> None:
    """Completes a checkpoint: writes the checksums of all its files beside them."""
    checkpoint = Path(checkpoint)
    checksums = {
        path.relative_to(checkpoint).as_posix(): _digest(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and not path.name.startswith(CHECKSUMS_FILE)
    }
    unfinished = checkpoint / (CHECKSUMS_FILE + ".unfinished")
    unfinished.write_text(json.dumps(checksums, indent=2) + "\n")
    os.replace(unfinished, checkpoint / CHECKSUMS_FILE)


def why_unusable(checkpoint: str | Path) -> str | None:
    """
    Why a run cannot resume from this checkpoint, or `None` if it is as it was when sealed.

    A checkpoint that was being written when the run was killed has no checksums, or those of an older checkpoint of
    the same name. Files that were changed, truncated or lost later do not match theirs.
    """
    checkpoint = Path(checkpoint)
    try:
        checksums = json.loads((checkpoint / CHECKSUMS_FILE).read_text()).items()
    except FileNotFoundError:
        return f"it has no {CHECKSUMS_FILE}, so it was being written when the run ended"
    except (OSError, ValueError, AttributeError):
        return f"its {CHECKSUMS_FILE} is damaged"
    for name, digest in checksums:
        try:
            if _digest(checkpoint / name) != digest:
                return f"its {name} is damaged"
        except OSError:
            return f"its {name} is missing or cannot be read"
    return None


def save_settings(folder: str | Path, settings: dict) -> None:
    """Records in a run's folder, or in a checkpoint, the settings that determine the run (`runs.run_settings`)."""
    file = Path(folder, SETTINGS_FILE)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(unfinished, file)


def settings_of(folder: str | Path) -> dict:
    """The settings of the run that a folder or checkpoint belongs to; empty if there are none of this version."""
    file = Path(folder, SETTINGS_FILE)
    return json.loads(file.read_text()) if file.is_file() else {}


def changed_settings(before: dict, settings: dict) -> dict[str, tuple]:
    """
    What differs between the settings of a run and these: both values, by name. How processes share a step does not
    count.
    """
    now = json.loads(json.dumps(settings))
    names = [name for name in before | now if before and before.get(name) != now.get(name)]
    return {name: (before.get(name), now.get(name)) for name in names if name.removeprefix("teacher_") not in DIVISION}


def checkpoints_of(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, complete or not, the latest step first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def delete_older(latest: str | Path, limit: int, best: str | None) -> None:
    """
    Keeps `limit` checkpoints of a run: the latest, the best if there is one, and then those closest before the latest.
    They are ordered by step, as when resuming, since a clock may jump back. Checkpoints of later steps, left by an
    earlier attempt and maybe damaged, are deleted first.
    """
    latest = Path(latest)
    checkpoints = checkpoints_of(latest.parent)
    kept = [path for path in checkpoints if path in (latest, Path(best or latest))]
    others = [path for path in checkpoints if path not in kept]
    others.sort(key=lambda path: _step_of(path) > _step_of(latest))
    for path in others[max(0, limit - len(kept)) :]:
        shutil.rmtree(path, ignore_errors=True)


def last_complete(folder: str | Path) -> str | None:
    """The last complete and undamaged checkpoint of a run, or `None`."""
    return next((str(path) for path in checkpoints_of(folder) if why_unusable(path) is None), None)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()

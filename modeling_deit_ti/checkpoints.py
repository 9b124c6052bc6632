"""Checkpoints to rely on: sealed with checksums once they are whole, verified before a run resumes from them."""

import hashlib
import json
import os
from pathlib import Path


CHECKSUMS_FILE = "checksums.json"
SETTINGS_FILE = "run_settings.json"


def seal(checkpoint: str | Path) -> None:
    """Writes the checksums of all files of a checkpoint beside them, as the last thing that makes it complete."""
    checkpoint = Path(checkpoint)
    checksums = {
        path.relative_to(checkpoint).as_posix(): _digest(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and not path.name.startswith(CHECKSUMS_FILE)
    }
    unfinished = checkpoint / (CHECKSUMS_FILE + ".unfinished")
    unfinished.write_text(json.dumps(checksums, indent=2) + "\n")
    os.replace(unfinished, checkpoint / CHECKSUMS_FILE)


def flaw_of(checkpoint: str | Path) -> str | None:
    """
    Why a checkpoint is not to be resumed from, or `None` where it is as it was sealed.

    One that was being written when the run was killed has no checksums yet, or those of an older checkpoint of its
    name; one whose files were changed, cut off or lost later differs from them.
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


def save_settings(checkpoint: str | Path, settings: dict) -> None:
    """Keeps what decides the run in its checkpoint."""
    Path(checkpoint, SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def changed_settings(checkpoint: str | Path, settings: dict) -> list[str]:
    """What differs between the run that wrote a checkpoint and a run with these settings, in words."""
    file = Path(checkpoint, SETTINGS_FILE)
    if not file.is_file():  # written by an older version
        return []
    before, now = json.loads(file.read_text()), json.loads(json.dumps(settings))
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return [f"{name} {before.get(name)}, not {now.get(name)}" for name in names]


def checkpoints_of(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, complete or not, the one with the most steps first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def last_complete(folder: str | Path) -> str | None:
    """The checkpoint of a run to go on from: the last one without a flaw."""
    return next((str(path) for path in checkpoints_of(folder) if flaw_of(path) is None), None)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()

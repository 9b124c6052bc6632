"""Converts a finished run: `python -m modeling_deit_ti.interop RUN --to timm`."""

import argparse
import os
import shutil
import sys
from pathlib import Path

from transformers import BaseImageProcessor

from ..errors import UserError, exit_code, storing
from ..modeling_deit_ti import DeiTTiForImageClassification
from . import ONNX_FILE, load_run, save_onnx, save_timm, save_transformers


def convert(folder: str, to: str, output: Path | None = None) -> str:
    """Converts a finished run; returns how to load it. Raises a `UserError` or a `StorageError`."""
    if output is None:
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder on this machine: set --output.")
        output = Path(folder, "transformers/onnx" if to == "onnx" else to)
    if output.exists():
        raise UserError(f"{output} already exists: move it, or choose another --output.")
    model, image_processor = load_run(folder, "FOLDER")
    try:
        with storing(output, "Make room, then run the same command again."):
            return save(model, image_processor, to, output)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)  # half an export would block the next attempt
        raise


def save(model: DeiTTiForImageClassification, image_processor: BaseImageProcessor, to: str, output: Path) -> str:
    """Saves the model in a new folder; returns how to load it."""
    if to == "transformers":
        save_transformers(model, image_processor, output)
        return f'AutoModelForImageClassification.from_pretrained("{output}")'
    if to == "timm":
        arguments = save_timm(model, image_processor, output) | {"checkpoint_path": f"{output / 'model.safetensors'}"}
        return f"timm.create_model({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    save_onnx(model, output)
    return f'onnxruntime.InferenceSession("{output / ONNX_FILE}")'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_deit_ti.interop",
        description="Converts a trained DeiT-Ti to transformers' own classes (no remote code), to timm or to ONNX.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of a finished run, or a Hub id")
    parser.add_argument("--to", required=True, choices=("transformers", "timm", "onnx"))
    parser.add_argument(
        "--output",
        type=Path,
        help="a new folder (default: transformers, timm or transformers/onnx in FOLDER)",
    )
    options = parser.parse_args(arguments)
    return exit_code(
        parser.prog, lambda: print(f"Written. To load it: {convert(options.folder, options.to, options.output)}")
    )


if __name__ == "__main__":
    sys.exit(main())

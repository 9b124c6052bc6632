"""Converts a finished run: `python -m modeling_deit_ti.interop RUN --to timm`."""

import argparse
import os
import sys
from pathlib import Path

from ..errors import UserError, exit_code
from . import ONNX_FILE, load_run, save_onnx, save_timm, save_transformers


def convert(folder: str, to: str, output: Path | None = None) -> str:
    """Converts a finished run; returns how to load it. Raises a `UserError`."""
    if output is None:
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder on this machine: set --output.")
        output = Path(folder, "transformers/onnx" if to == "onnx" else to)
    if output.exists():
        raise UserError(f"{output} already exists: move it, or choose another --output.")
    model, image_processor = load_run(folder, "FOLDER")
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

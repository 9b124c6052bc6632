"""The command that converts a finished run: `python -m modeling_deit_ti.interop RUN --to timm`."""

import argparse
import os
import sys
from pathlib import Path

from transformers.utils import logging as transformers_logging

from ..classifiers import check_complete, load_classifier, load_image_processor
from ..errors import UserError
from ..modeling_deit_ti import DeiTTiForImageClassification
from . import export_onnx, save_timm, save_transformers


def convert(folder: str, to: str, output: Path | None = None) -> str:
    """Converts a finished run; returns how to load it. Raises a `UserError`."""
    if output is None:
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder on this machine: name an --output.")
        output = Path(folder, "model.onnx" if to == "onnx" else to)
    if output.exists():
        raise UserError(f"{output} exists already: move it away, or name another --output.")
    if to == "onnx" and not output.parent.is_dir():
        raise UserError(f"There is no folder {output.parent} to write {output.name} into.")
    model, missing = load_classifier(folder, "FOLDER")
    if not isinstance(model, DeiTTiForImageClassification):
        raise UserError(f"FOLDER {folder}: it is a {model.config.model_type}, not a deit_ti.")
    check_complete(missing, folder, "FOLDER")
    image_processor = load_image_processor(folder, "FOLDER")
    if to == "transformers":
        save_transformers(model, image_processor, output)
        return f'AutoModelForImageClassification.from_pretrained("{output}")'
    if to == "timm":
        arguments = save_timm(model, image_processor, output) | {"checkpoint_path": f"{output / 'model.safetensors'}"}
        return f"timm.create_model({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
    try:
        export_onnx(model, output)
    except ImportError as error:
        raise UserError(f"ONNX needs packages that are missing ({error}): pip install onnx onnxscript.") from error
    return f'onnxruntime.InferenceSession("{output}")'


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_deit_ti.interop",
        description="Converts a trained DeiT-Ti for transformers without remote code, for timm, or to ONNX.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of a finished run, or a Hub id")
    parser.add_argument("--to", required=True, choices=("transformers", "timm", "onnx"))
    parser.add_argument("--output", type=Path, help="default: FOLDER/transformers, FOLDER/timm or FOLDER/model.onnx")
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        print(f"Written. To load it: {convert(options.folder, options.to, options.output)}")
    except (UserError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

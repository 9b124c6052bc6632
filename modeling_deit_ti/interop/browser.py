"""A page that runs the model in the browser: a static Space, or a folder on any web server."""

import json
import os
import shutil
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape

from ..card import RunRecord, example_files
from ..card.markdown import percent, text
from ..card.record import RECORD_FILE
from ..classifiers import label_names
from ..errors import UserError
from .exports import ONNX_FILE, QUANTIZED_FILE, load_run, save_onnx, to_transformers
from .space import space_metadata


TEMPLATES = Path(__file__).with_name("page")
TRANSFORMERS_JS = "4.3.2"
ONNXRUNTIME_WEB = "1.31.0-dev.20260914-8d85527a0"  # the version that transformers.js was built with
# Where the page's script finds the two packages: on a CDN, or beside it.
CDN = "https://cdn.jsdelivr.net/npm"
ON_CDN = {
    "@huggingface/transformers": f"{CDN}/@huggingface/transformers@{TRANSFORMERS_JS}/dist/transformers.min.js",
    "onnxruntime-web/": f"{CDN}/onnxruntime-web@{ONNXRUNTIME_WEB}/dist/",
}
VENDORED = {"@huggingface/transformers": "./vendor/transformers.min.js", "onnxruntime-web/": "./vendor/"}
VENDORED_FILES = (
    "@huggingface/transformers/dist/transformers.min.js",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
)


def write_static_space(
    model_folder: str | os.PathLike,
    folder: str | os.PathLike,
    title: str,
    node_modules: str | os.PathLike | None = None,
) -> None:
    """
    Writes a static Space: a page that labels pictures, which never leave the browser.

    Args:
        model_folder (`str` or `os.PathLike`): a finished run. If it has no ONNX files, they are made for the page.
        folder (`str` or `os.PathLike`): a new or empty folder.
        title (`str`): the page's title.
        node_modules (`str` or `os.PathLike`, *optional*): where npm has installed `@huggingface/transformers`, which
            is copied so that the page needs no server but its own. By default, browsers fetch it from a CDN.

    Raises:
        UserError: if there is no DeiT-Ti in `model_folder` or no transformers.js in `node_modules`, if `folder` is not
            empty, or if ONNX files have to be made and packages for that are missing.
    """
    model_folder, folder = Path(model_folder), Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: choose another folder.")
    vendored = [] if node_modules is None else [Path(node_modules, file) for file in VENDORED_FILES]
    for file in vendored:
        if not file.is_file():
            raise UserError(
                f"There is no {file}: --node_modules must be the folder that `npm install --ignore-scripts "
                f"@huggingface/transformers@{TRANSFORMERS_JS}` makes."
            )
    model, image_processor = load_run(str(model_folder), "MODEL")

    onnx, exported = folder / "model" / "onnx", model_folder / "transformers" / "onnx"
    if exported.is_dir():
        shutil.copytree(exported, onnx)
    else:
        save_onnx(model, onnx)
    to_transformers(model).config.save_pretrained(folder / "model")
    image_processor.save_pretrained(folder / "model")
    for file in vendored:
        (folder / "vendor").mkdir(exist_ok=True)
        shutil.copy(file, folder / "vendor")
    examples = example_files(model_folder)
    for file in (TEMPLATES / "page.js", TEMPLATES / "page.css", *examples):
        shutil.copy(file, folder)

    megabytes = {file: (onnx / file).stat().st_size / 1e6 for file in (QUANTIZED_FILE, ONNX_FILE)}
    record = RunRecord.load(model_folder) if (model_folder / RECORD_FILE).is_file() else None
    facts = (run_facts(record) if record else {}) | {
        "title": title,
        "metadata": space_metadata(title, [record] if record else [], sdk="static").to_yaml(),
        "labels": label_names(model.config),
        "examples": [file.name for file in examples],
        "precisions": {  # under transformers.js's names
            "q8": f"8-bit weights, {megabytes[QUANTIZED_FILE]:.0f} MB",
            "fp32": f"float32, {megabytes[ONNX_FILE]:.0f} MB",
        },
        "import_map": json.dumps({"imports": VENDORED if vendored else ON_CDN}),
    }
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape(["html"]), keep_trailing_newline=True
    )
    for file in ("index.html", "README.md"):
        (folder / file).write_text(templates.get_template(file).render(facts, text=text), encoding="utf-8")


def run_facts(record: RunRecord) -> dict:
    """What the page and its README say about the run: where its model is, and how accurate it is."""
    metrics = {key: percent(value) for key, value in record.metrics.items() if key.startswith("eval_accuracy")}
    return {
        "hub_model_id": record.hub_model_id,
        "num_images": record.dataset.num_eval_images,
        "accuracy": metrics.get("eval_accuracy"),
        "quantized": metrics.get("eval_accuracy_quantized"),
        "num_quantized": record.metrics.get("eval_samples_quantized"),
    }

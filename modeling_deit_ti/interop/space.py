"""A Space: a folder with the page, its code and its models, for the Hub or any machine."""

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard, SpaceCardData

from ..card.facts import facts
from ..card.markdown import clean, text
from ..card.record import RECORD_FILE, RunRecord
from ..errors import UserError, first_line
from ..hub import retrying


PACKAGE = Path(__file__).resolve().parents[1]
MODELS_FOLDER = "models"
# What the package and the page import, other than the standard library and the dependencies of these.
REQUIREMENTS = (
    *("accelerate", "datasets", "evaluate", "gradio", "huggingface_hub", "jinja2", "matplotlib", "numpy", "pillow"),
    *("pyyaml", "safetensors", "scikit-learn", "scipy", "timm", "torch", "torchvision", "tqdm", "transformers"),
)
# Copied from a model's folder: no checkpoints, no training arguments and no code, which is in the package.
MODEL_FILES = (
    *("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"),
    *(RECORD_FILE, "example*.png"),
)


def write_space(models: dict[str, str], folder: Path, app_file: Path, title: str) -> None:
    """
    Writes a Gradio Space for the models. `python app.py` in the folder runs it, on any machine that has the packages
    in its `requirements.txt`.

    Args:
        models (`dict`): folders of the models, by their names on the page.
        folder (`Path`): a new folder.
        app_file (`Path`): the page, which finds the models in `models/`.

    Raises:
        UserError: if a model is not in a folder on this machine.
    """
    for path in models.values():
        if not os.path.isdir(path):
            raise UserError(f"--to_space copies models from local folders, and {path} is not one: download it first.")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(app_file, folder / "app.py")
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, path in models.items():
        target = folder / MODELS_FOLDER / name.strip("./").replace("/", "-")
        target.mkdir(parents=True)
        for pattern in MODEL_FILES:
            for file in Path(path).glob(pattern):
                shutil.copy(file, target / file.name)
    pinned = [f"{name}=={_public_version(name)}\n" for name in REQUIREMENTS]
    (folder / "requirements.txt").write_text("".join(pinned), encoding="utf-8")
    _card(models, title).save(folder / "README.md")


def _public_version(package: str) -> str:
    """The version without its build (2.14.1, not 2.14.1+cpu), which package indexes do not have."""
    return importlib.metadata.version(package).partition("+")[0]


def _card(models: dict[str, str], title: str) -> SpaceCard:
    """The Space's README.md, with the front matter that the Hub expects."""
    records = {name: RunRecord.load(path) for name, path in models.items() if Path(path, RECORD_FILE).is_file()}
    data = space_metadata(
        title,
        records.values(),
        sdk="gradio",
        sdk_version=_public_version("gradio"),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        short_description="Labels your pictures and shows where the model looks",
    )
    parts = [f"## {text(name)}\n\n{facts(record)}\n" for name, record in records.items()]
    text_parts = "\n".join(["# " + text(title), "Try the model on pictures of your own.\n", *parts])
    return SpaceCard(f"---\n{data.to_yaml()}\n---\n\n{text_parts}")


def space_metadata(title: str, records: Collection[RunRecord], **kind) -> SpaceCardData:
    """The front matter of a Space for the models of some runs; `kind` holds the fields that only some Spaces have."""
    licenses = {record.license for record in records} - {"unknown"}
    return SpaceCardData(
        title=clean(title),
        emoji="🔎",
        colorFrom="indigo",
        colorTo="yellow",
        license=licenses.pop() if len(licenses) == 1 else None,
        models=[record.hub_model_id for record in records if record.hub_model_id] or None,
        datasets=sorted({record.dataset.name for record in records if record.dataset.source == "hub"}) or None,
        tags=["vision", "image-classification", "distillation"],
        **kind,
    )


def push_space(folder: Path, repo_id: str) -> str:
    """
    Pushes a folder as a Space of the kind that its card names; returns its URL.

    Raises:
        UserError: if the Hub cannot be reached, or refuses the push or the card.
    """
    api, card = HfApi(), SpaceCard.load(folder / "README.md")

    def push() -> str:
        card.validate(repo_type="space")
        url = api.create_repo(repo_id, repo_type="space", space_sdk=card.data.sdk, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, repo_type="space", folder_path=folder, commit_message="Upload the page")
        return str(url)

    try:
        return retrying(push)
    except Exception as error:  # of the network, the Hub or the token's file
        raise UserError(
            f"--to_space {repo_id}: the push failed ({first_line(error)}). Log in with `hf auth login`, or set "
            "HF_TOKEN to a token with write access; --dry_run FOLDER only writes the folder."
        ) from error

"""The installed package is all that a run needs."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from building import FOUR_STEPS


REPOSITORY = Path(__file__).resolve().parents[1]


def test_an_installed_package_trains_and_writes_its_card_from_another_folder(tmp_path):
    build = ["wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"  # a copy, since setuptools builds next to its sources
    shutil.copytree(REPOSITORY / "modeling_deit_ti", source / "modeling_deit_ti")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    subprocess.run([sys.executable, "-m", "pip", *build, "--wheel-dir", tmp_path, source], check=True)
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(tmp_path / "site")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in ("train_hf.py", "recipes/digits.yaml"):
        (elsewhere / Path(file).name).write_text((REPOSITORY / file).read_text())
    flags = [*FOUR_STEPS[1:], "--config=digits.yaml", "--distill_mode=none", "--output_dir=run"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "train_hf.py", *flags], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "# run" in (elsewhere / "run" / "README.md").read_text()
    assert json.loads((elsewhere / "run" / "all_results.json").read_text())["epoch"] == 1

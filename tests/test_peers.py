"""Other projects' tests; `pytest -m peers` fetches them from the package index and runs them."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parents[1]
# Tests of other kinds of models, which ModelTesterMixin imports but the source distribution lacks.
MISSING = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


@pytest.mark.peers
def test_network_passes_transformers_own_model_tests(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    release = f"transformers=={version('transformers')}"
    fetch = [
        "download",
        "--no-deps",
        "--no-binary",
        "transformers",
        "--no-build-isolation",
        "--dest",
        tmp_path,
        release,
    ]
    subprocess.run([*pip, *fetch], check=True)
    subprocess.run([*pip, "install", "--target", tmp_path / "site", "parameterized"], check=True)
    with tarfile.open(next(tmp_path.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    tests = next(tmp_path.glob("transformers-*/tests"))
    for file, name in MISSING.items():
        for package in (tests, (tests / file).parent):
            package.mkdir(exist_ok=True)
            (package / "__init__.py").touch()
        (tests / file).write_text(f"class {name}:\n    pass\n")
    shutil.copy(REPOSITORY / "tests" / "peers_of_transformers.py", tests / "test_deit_ti.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_deit_ti.py"],
        cwd=tests.parent,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path / 'site'}"},
        capture_output=True,
        text=True,
    )
    summary = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", summary)[1]) > 90

"""All tests run offline, with a Hugging Face cache of their own that is deleted after the session."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver


# huggingface_hub, datasets and transformers read these once, when they are imported, so they are set before that. The
# user's own HF_* settings (a token, another cache) must not decide whether a test passes.
_HF_HOME = tempfile.TemporaryDirectory(prefix="deit-ti-tests-", ignore_cleanup_errors=True)
for name in [name for name in os.environ if name.startswith("HF_") or name == "TRANSFORMERS_CACHE"]:
    del os.environ[name]
os.environ["HF_HOME"] = _HF_HOME.name
os.environ["HF_DATASETS_CACHE"] = str(Path(_HF_HOME.name, "datasets"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

# The same arithmetic on every CPU: float32, unless a test asks for something else.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"

import torch  # noqa: E402  (after the settings above)


# The models under test are tiny, and every core runs its own test: more threads would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_finish() -> None:
    """Imports are never freed: scanning them at each collection would take a third of the time of a small run."""
    gc.freeze()


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """The real CIFAR-10 as Parquet, in the layout of the Hub's `uoft-cs/cifar10`, if there is a copy."""
    return folder_of("CIFAR10_DIR", "data/cifar10", "the real CIFAR-10", "its Parquet files")


@pytest.fixture(scope="session")
def efficientnet_lite0() -> Path:
    """A real CNN with ImageNet weights, if there is a copy."""
    return folder_of("EFFICIENTNET_DIR", "models/efficientnet_lite0", "a pretrained CNN", "a transformers model")


@pytest.fixture(scope="session")
def chromium(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    """A real headless browser whose camera shows a test picture and needs no permission."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"),
        *("use-fake-device-for-media-stream", "use-fake-ui-for-media-stream"),
    ):
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chromium:
        yield chromium


def folder_of(variable: str, default: str, what: str, content: str) -> Path:
    """A folder that is too large for the repository; skips the test if it is missing."""
    path = Path(os.environ.get(variable) or REPOSITORY.parent / "shared" / default)
    if not path.is_dir():
        pytest.skip(f"needs {what}: no folder {path} (set {variable} to one with {content})")
    return path


@pytest.fixture(scope="session")
def transformers_js() -> Path:
    """The `node_modules` folder with transformers.js, if it is installed."""
    folder = REPOSITORY / "tests" / "node_modules"
    if shutil.which("node") is None:
        pytest.skip("needs Node 20.19 or newer")
    if not (folder / "@huggingface" / "transformers").is_dir():
        pytest.skip("needs transformers.js: npm install --prefix tests --ignore-scripts")
    return folder

"""The model predicts the same in JavaScript as in Python: in Node, and on the page in a real browser."""

import functools
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from browsing import copy_picture, press_ctrl_v
from huggingface_hub import RepoCard
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from sklearn.datasets import load_digits, load_sample_image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.arguments import AugmentationArguments, ModelArguments
from modeling_deit_ti.classifiers import label_maps
from modeling_deit_ti.data.inputs import make_image_processor
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.interop import browser, save_onnx, save_transformers
from modeling_deit_ti.interop.browser import write_static_space


for package in ("onnxruntime", "onnxscript"):
    pytest.importorskip(package)

LABELS = ["cat", "<b>dog</b>", "emu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's model, with weights that tell pictures apart; it resizes to 37 pixels and crops the central 32."""
    folder = tmp_path_factory.mktemp("run") / "emu-or-not"
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    tokens = {"tokens": ("class", "distillation"), "readout": "both"}
    model = DeiTTiForImageClassification(DeiTTiConfig(**sizes, **tokens, **label_maps(LABELS))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    image_processor = make_image_processor(ModelArguments(image_size=32), AugmentationArguments(crop="resized"))
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    save_transformers(model, image_processor, folder / "transformers")
    save_onnx(model, folder / "transformers" / "onnx")
    for row, name in enumerate(("example.png", "example_2.png")):
        Image.fromarray(np.uint8(load_digits().images[row] * 15)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Photos and digits, far larger and far smaller than the model's input; the first needs no resizing."""
    folder = tmp_path_factory.mktemp("pictures")
    photos = {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    digit = Image.fromarray(np.uint8(load_digits().images[0] * 15))
    images = {
        "resized": photos["flower"].resize((38, 37)),
        "upright": photos["china"].rotate(90, expand=True),
        "digit": digit,
        "large_digit": digit.resize((500, 500), Image.Resampling.BICUBIC),
        "rgba": photos["flower"].convert("RGBA"),
        **photos,
    }
    files = [folder / f"{name}.png" for name in images]
    for image, file in zip(images.values(), files, strict=True):
        image.save(file)
    return files


@pytest.fixture(scope="module")
@torch.no_grad()
def expected(run, pictures) -> np.ndarray:
    """Python's logits, (pictures, labels)."""
    image_processor = AutoImageProcessor.from_pretrained(run / "transformers")
    model = AutoModelForImageClassification.from_pretrained(run / "transformers").eval()
    images = [Image.open(file).convert("RGB") for file in pictures]
    logits = np.stack([model(**image_processor(image, return_tensors="pt")).logits[0].numpy() for image in images])
    assert len(set(logits.argmax(-1))) > 1 and logits.std(axis=0).min() > 0.1  # they tell pictures apart
    return logits


# ---- In Node ----


@pytest.fixture(scope="module")
def answers(run, pictures, transformers_js) -> list[dict]:
    command = ["node", "classify.js", run / "transformers", *pictures]
    done = subprocess.run(command, cwd=transformers_js.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.02), ("q8", 0.2)])
def test_transformers_js_has_pythons_logits_for_pictures_of_any_size(precision, tolerance, answers, expected):
    found = [answer for answer in answers if (answer["precision"], answer["preprocessing"]) == (precision, "ours")]
    np.testing.assert_allclose([answer["logits"] for answer in found], expected, atol=tolerance, rtol=0)
    assert [answer["label"] for answer in found] == [LABELS[label] for label in expected.argmax(-1)]


def test_a_picture_that_needs_no_resizing_does_not_need_our_preprocessing(answers, expected):
    found = next(answer for answer in answers if (answer["precision"], answer["preprocessing"]) == ("fp32", "theirs"))
    np.testing.assert_allclose(found["logits"], expected[0], atol=1e-4, rtol=0)


def test_the_page_names_the_tested_versions(transformers_js):
    versions = {
        name: json.loads((transformers_js / name / "package.json").read_text())["version"]
        for name in ("@huggingface/transformers", "onnxruntime-web")
    }
    assert versions == {
        "@huggingface/transformers": browser.TRANSFORMERS_JS,
        "onnxruntime-web": browser.ONNXRUNTIME_WEB,
    }


# ---- The page ----


def test_a_static_space_is_complete_and_loads_pinned_scripts(run, tmp_path):
    write_static_space(run, tmp_path / "space", "Emu or not")
    card = RepoCard.load(tmp_path / "space" / "README.md")
    assert (card.data.title, card.data.sdk) == ("Emu or not", "static")
    page = (tmp_path / "space" / "index.html").read_text()
    assert "&lt;b&gt;dog&lt;/b&gt;" in page and "<b>" not in page
    (import_map,) = re.findall(r'<script type="importmap">(.*?)</script>', page)
    transformers_js, onnxruntime = json.loads(import_map)["imports"].values()
    assert f"/transformers@{browser.TRANSFORMERS_JS}/dist/" in transformers_js
    assert f"/onnxruntime-web@{browser.ONNXRUNTIME_WEB}/dist/" in onnxruntime
    files = {
        path.relative_to(tmp_path / "space").as_posix() for path in (tmp_path / "space").rglob("*") if path.is_file()
    }
    onnx = {f"model/onnx/{name}" for name in ("model.onnx", "model_quantized.onnx", "preprocessing.js")}
    config = {"model/config.json", "model/preprocessor_config.json"}
    examples = {"example.png", "example_2.png"}
    assert files == {"README.md", "index.html", "page.css", "page.js", *examples, *onnx, *config}


def test_a_page_that_cannot_be_written_ends_in_one_message(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        write_static_space(run, tmp_path, "title")
    with pytest.raises(UserError, match="it is a deit, not a deit_ti"):
        write_static_space(run / "transformers", tmp_path / "space", "title")
    with pytest.raises(UserError, match="npm install"):
        write_static_space(run, tmp_path / "space", "title", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture(scope="module")
def page(run, transformers_js, tmp_path_factory) -> Iterator[str]:
    """The address of the page, served by this machine with its own copy of transformers.js."""
    folder = tmp_path_factory.mktemp("page")
    write_static_space(run, folder, "title", transformers_js)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def wait_for_text(chromium: webdriver.Chrome, selector: str) -> str:
    return WebDriverWait(chromium, 60).until(lambda _: chromium.find_element(By.CSS_SELECTOR, selector).text)


@pytest.mark.parametrize("width", [380, 1100], ids=["narrow", "wide"])
def test_the_page_labels_pictures_as_python_does(width, chromium, page, pictures, expected):
    chromium.set_window_size(width, 800)
    chromium.get(page)
    for picture, logits in zip(pictures, expected, strict=True):
        chromium.find_element(By.ID, "file").send_keys(str(picture))
        answers = wait_for_text(chromium, "#answers").split("\n")
        scores = np.exp(logits) / np.exp(logits).sum()
        best_first = scores.argsort()[::-1]
        assert answers[0::2] == [LABELS[label] for label in best_first], picture.name
        found = [float(score.removesuffix(" %")) / 100 for score in answers[1::2]]
        np.testing.assert_allclose(found, scores[best_first], atol=0.02, err_msg=picture.name)
    assert chromium.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_a_picture_can_be_pasted_taken_with_the_camera_or_chosen_from_the_examples(chromium, page, pictures, expected):
    def first_answer() -> str:
        return wait_for_text(chromium, "#answers li span")

    chromium.get(page)
    copy_picture(chromium, pictures[0])
    press_ctrl_v(chromium)
    assert first_answer() == LABELS[expected[0].argmax()]
    camera, video = chromium.find_element(By.ID, "camera"), chromium.find_element(By.ID, "video")
    camera.click()
    WebDriverWait(chromium, 60).until(lambda _: video.is_displayed())
    camera.click()
    assert first_answer() in LABELS
    assert camera.text == "Use the camera" and not video.is_displayed()
    example, _ = chromium.find_elements(By.CLASS_NAME, "example")
    example.click()
    WebDriverWait(chromium, 60).until(lambda _: chromium.execute_script("return picture.width") == 8)
    assert first_answer() == LABELS[expected[2].argmax()]


def test_the_page_refuses_a_text_file_with_one_message_and_labels_the_next_picture(chromium, page, pictures, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    chromium.get(page)
    chromium.find_element(By.ID, "file").send_keys(str(tmp_path / "notes.txt"))
    assert wait_for_text(chromium, "#status.error").startswith(
        "notes.txt is not a picture that this browser can read."
    )
    chromium.find_element(By.ID, "file").send_keys(str(pictures[0]))
    assert wait_for_text(chromium, "#answers")
    assert "not a picture" not in chromium.find_element(By.TAG_NAME, "body").text

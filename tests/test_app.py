"""`app.py`: its page, as used by Gradio's client and by a real browser, and the Space that it becomes."""

import ast
import contextlib
import importlib.metadata
import io
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from browsing import copy_picture, press_ctrl_v
from building import TINY_CNN, image_processor
from gradio_client import Client, handle_file
from hub_stand_in import hub_fixture  # noqa: F401
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from real_command import free_port
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from sklearn.datasets import load_digits
from test_card import make_record

import app
from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.card import DatasetRecord, TeacherRecord
from modeling_deit_ti.classifiers import new_timm_classifier
from modeling_deit_ti.distillation import resolve_mode


REPOSITORY = Path(__file__).resolve().parents[1]
LABELS = ["nought", "one", "two", "<b>three</b>", "*four*", "five", "six", "seven", "eight", "nine"]
ROLLOUT, LAST_BLOCK = app.BLOCKS


def digit_image(row: int) -> Image.Image:
    return Image.fromarray(np.uint8(load_digits().images[row] * 255 / 16)).resize((64, 64), Image.Resampling.BICUBIC)


def train_on_digits(folder: Path) -> None:
    """A small two-token model trained on all digits but the last hundred, with a run record."""
    torch.manual_seed(0)
    size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    size |= {"drop_path_rate": 0.0}
    mode, processor = resolve_mode("both"), image_processor(32)
    model = DeiTTiForImageClassification(DeiTTiConfig(id2label=dict(enumerate(LABELS)), **size, **mode.network))
    digits = load_digits()
    images = [Image.fromarray(np.uint8(pixels * 255 / 16)).convert("RGB") for pixels in digits.images[:-100]]
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    labels = torch.from_numpy(digits.target[:-100])
    optimizer = torch.optim.AdamW(model.parameters(), 8e-3)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 8e-3 * min(1, (step + 1) / 60, (300 - step) / 120)
        batch = torch.randint(len(labels), (64,))
        output = model(pixel_values=pixel_values[batch])
        heads = torch.cat((output.class_logits, output.distillation_logits))
        torch.nn.functional.cross_entropy(heads, labels[batch].repeat(2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    digit_image(0).save(folder / "example.png")
    digit_image(1).save(folder / "example_2.png")
    make_record(
        mode,
        num_parameters=model.num_parameters(),
        patch_size=8,
        dataset=DatasetRecord("digits", "scikit-learn", LABELS, 1697, 100),
        teacher=TeacherRecord("test_resnet", "timm", 373_658, 32, 0.9312, "scratch"),
    ).save(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a two-headed model, an untrained CNN, and a model without weights."""
    folder = tmp_path_factory.mktemp("page") / "runs"
    train_on_digits(folder / "both")
    torch.manual_seed(0)
    processor = image_processor(32)
    new_timm_classifier(TINY_CNN, LABELS, 32, processor).save_pretrained(folder / "more" / "cnn")
    processor.save_pretrained(folder / "more" / "cnn")
    shutil.copytree(folder / "both", folder / "broken", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "both" / "checkpoint-1").mkdir()
    shutil.copy(folder / "both" / "config.json", folder / "both" / "checkpoint-1")
    return folder


# Runs the page as `python app.py` does, except that only this machine can be reached; other attempts are logged.
WITHOUT_NETWORK = """
import runpy, socket, sys
connect, resolve = socket.socket.connect, socket.getaddrinfo
def note(host):
    if host not in ("127.0.0.1", "localhost", "::1", "0.0.0.0", None):
        open(sys.argv[1], "a").write(f"{host}\\n")
        raise OSError("there is no network")
def connect_here(self, address):
    note(address[0] if isinstance(address, tuple) else None)
    return connect(self, address)
def resolve_here(host, *more, **options):
    note(host.decode() if isinstance(host, bytes) else host)
    return resolve(host, *more, **options)
socket.socket.connect, socket.getaddrinfo = connect_here, resolve_here
sys.argv[1:] = sys.argv[2:]
sys.argv[0] = "app.py"
sys.path[0] = "."
runpy.run_path("app.py", run_name="__main__")
"""


@contextlib.contextmanager
def serve(*arguments, cwd: Path, log: Path) -> Iterator[str]:
    """Serves the page in a subprocess and yields its address; other hosts it tries to reach are noted beside `log`."""
    port = free_port()
    command = [sys.executable, "-c", WITHOUT_NETWORK, log.with_suffix(".hosts"), *map(str, arguments)]
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--no_browser"],
            cwd=cwd,
            env=os.environ | {"GRADIO_TEMP_DIR": str(log.with_suffix(".uploads"))},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 180
        while "The page is at" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def log(runs) -> Path:
    return runs.parent / "page.log"


@pytest.fixture(scope="module")
def page(runs, log) -> Iterator[str]:
    with serve(runs, cwd=REPOSITORY, log=log) as address:
        yield address


@pytest.fixture(scope="module")
def client(page, tmp_path_factory) -> Client:
    return Client(page, verbose=False, download_files=tmp_path_factory.mktemp("maps"))


def ask(client: Client, file: Path, model: str = "both", threshold: float = 0.0, blocks: str = ROLLOUT, **options):
    """The verdict, the visible heads and the visible maps, both by title, and the text about the maps."""
    picture = None if file is None else handle_file(file)
    said, *parts, words = client.predict(picture, model, threshold, blocks, **{"api_name": "/classify", **options})
    shown = {part["label"]: part["value"] for part in parts if part["visible"]}
    heads = {
        title: {guess["label"]: guess["confidence"] for guess in value["confidences"]}
        for title, value in shown.items()
        if isinstance(value, dict) and "confidences" in value
    }
    return said, heads, {title: value for title, value in shown.items() if title not in heads}, words


@pytest.fixture(scope="module")
def digit(tmp_path_factory) -> Path:
    """A picture of a 4 that the model was not trained on."""
    row = next(row for row in range(1700, 1797) if load_digits().target[row] == 4)
    file = tmp_path_factory.mktemp("digit") / "four.png"
    digit_image(row).save(file)
    return file


# ---- What the page shows ----


def test_each_head_shows_the_models_probabilities(client, digit, runs):
    said, heads, _, _ = ask(client, digit)
    assert re.match(r"## &#42;four&#42;\n\n\d\d% probable", said)
    assert list(heads) == ["class head", "distillation head", "mean of both (predicts)"]
    model = DeiTTiForImageClassification.from_pretrained(runs / "both").eval()
    with torch.no_grad():
        output = model(**image_processor(32)(Image.open(digit).convert("RGB"), return_tensors="pt"))
    for probabilities, logits in zip(
        heads.values(), (output.class_logits, output.distillation_logits, output.logits), strict=True
    ):
        assert list(probabilities)[0] == "*four*"
        assert len(probabilities) == 5
        expected = logits[0].softmax(-1)
        for label, probability in probabilities.items():
            assert probability == pytest.approx(expected[LABELS.index(label)].item(), abs=1e-4)


def test_each_token_and_their_difference_have_a_map(client, digit):
    _, _, maps, words = ask(client, digit)
    _, _, last_block, _ = ask(client, digit, blocks=LAST_BLOCK)
    assert list(maps) == list(last_block) == ["class token", "distillation token", "difference"]
    assert re.search(r"from 0\.\d\d \(violet\) to [1-9]\.\d\d \(yellow\) times an even share", words)
    pixels = {title: np.asarray(Image.open(file)) for title, file in maps.items()}
    assert {image.shape for image in pixels.values()} == {(384, 384, 3)}
    assert (np.asarray(Image.open(last_block["class token"])) != pixels["class token"]).any()


def test_no_label_fits_below_the_minimum_probability(client, digit):
    said, heads, maps, _ = ask(client, digit, threshold=1)
    assert re.match(r"## No label fits\n\nThe most probable is &#42;four&#42;, with \d\d%\.", said)
    assert heads and maps


def test_a_network_without_attention_has_one_head_and_no_map(client, digit):
    said, heads, maps, words = ask(client, digit, "more/cnn")
    assert list(heads) == ["class head"]
    assert (maps, words) == ({}, "")


def test_the_page_offers_the_models_in_the_folder_but_not_their_checkpoints(client):
    (model,) = (
        parameter
        for parameter in client.view_api(return_format="dict")["named_endpoints"]["/classify"]["parameters"]
        if parameter["label"] == "Model"
    )
    assert model["type"]["enum"] == ["both", "broken", "more/cnn"]


def test_facts_about_a_model_come_from_its_record(runs):
    models = app.Models(app.find_models(str(runs)))
    known = models.facts("both")
    for fact in ("1,697 images of digits", "69.19 %", "on 100 images", "test_resnet", "93.12 %", "&#60;b&#62;three"):
        assert fact in known
    assert "without a run record" in models.facts("more/cnn")
    assert len(models.examples()) == 2  # another folder holds the same pictures


# ---- Bad input ----


def huge_png() -> bytes:
    """The beginning of a PNG of 400 million pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0), b"IDAT"
    whole = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(whole)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    image.save(buffer := io.BytesIO(), format, **options)
    return buffer.getvalue()


BAD_PICTURES = {
    "text.png": (lambda: b"not a picture", "This file is not a picture"),
    "long.png": (lambda: encoded(Image.new("1", (15_000, 50)), "PNG"), "one side more than 200 times the other"),
    "wide.png": (lambda: encoded(Image.new("1", (40_000, 2_000)), "PNG"), "40,000x2,000 pixels"),
    "huge.png": (huge_png, "too many pixels: make it smaller"),
    "cut.jpg": (lambda: encoded(Image.effect_noise((300, 300), 50), "JPEG")[:2000], "truncated"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_gets_one_message_and_the_server_keeps_running(name, client, digit, tmp_path):
    content, message = BAD_PICTURES[name]
    (tmp_path / name).write_bytes(content())
    said, heads, maps, words = ask(client, tmp_path / name)
    assert said.startswith("### This ")
    assert message in said
    assert "/" not in said  # the file's location is nobody's business
    assert (heads, maps, words) == ({}, {}, "")
    assert ask(client, digit)[0].startswith("## &#42;four&#42;")


def test_animations_use_the_first_frame_and_the_page_says_so(client, digit, tmp_path):
    four, other = Image.open(digit), digit_image(0)
    four.save(tmp_path / "digits.gif", save_all=True, append_images=[other], duration=100)
    said, heads, _, _ = ask(client, tmp_path / "digits.gif")
    assert said.startswith("## &#42;four&#42;")
    assert said.endswith("This is an animation of 2 frames; the model only sees the first.")
    assert heads


def test_a_model_without_weights_gets_one_message_and_the_server_keeps_running(client, digit):
    said, heads, maps, _ = ask(client, digit, "broken")
    assert re.match(r"### MODEL \S+broken: the folder holds no image classifier .*safetensors", said)
    assert "\n" not in said
    assert (heads, maps) == ({}, {})
    assert ask(client, digit)[0].startswith("## &#42;four&#42;")


MISTAKES = {
    "no model": ([], "name a MODEL"),
    "a model and a comparison": (["runs", "--compare", "a", "b"], "cannot be combined"),
    "a folder without a model": (["empty"], "neither the folder nor any inside it holds a model"),
    "a nonexistent model": (["nowhere/nothing"], "there is no such folder or timm architecture"),
    "a model without weights": (["runs/broken"], "safetensors"),
    "a probability above 1": (["runs/both", "--min_probability=50"], "between 0 and 1"),
    "a dry run without a Space": (["runs/both", "--dry_run=space"], "--to_space"),
    "unused node_modules": (["runs/both", "--to_space=me/it", "--node_modules=."], "--node_modules needs --static"),
    "a port for a Space": (["runs/both", "--to_space=me/it", "--port=80"], "--port does not apply to a Space"),
    "a dry run into an existing folder": (["runs/both", "--to_space=me/it", "--dry_run=."], "already exists"),
    "a Space from a Hub id": (["me/it", "--to_space=me/it", "--dry_run=space"], "download it first"),
    "a push without the Hub": (["runs/both", "--to_space=me/it"], "--dry_run FOLDER only writes the folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_message_and_exit_code_2(mistake, runs, tmp_path, monkeypatch, capsys):
    arguments, message = MISTAKES[mistake]
    (tmp_path / "runs").symlink_to(runs)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert app.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("app.py: ")
    assert message in line
    assert not (tmp_path / "space").exists()


def test_port_in_use_ends_in_one_message(runs, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert app.main([str(runs / "both"), "--no_browser", f"--port={port}"]) == 2
    message = f"app.py: --port {port}: the port is in use. Choose another one, or leave it out.\n"
    assert capsys.readouterr().err == message


def test_without_gradio_one_message_says_what_to_install():
    code = "import runpy, sys; sys.modules['gradio'] = None; runpy.run_path('app.py', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2
    assert re.fullmatch(r"app\.py: .*pip install 'gradio>=6\.24,<7'\n", result.stderr)


# ---- Two models ----


def test_two_models_are_compared_on_the_same_picture(runs, digit, monkeypatch, tmp_path):
    pages, models = [], [str(runs / "both"), str(runs / "more" / "cnn")]
    monkeypatch.setattr(app, "launch", lambda page, options: pages.append(page))
    assert app.main(["--compare", *models]) == 0
    (page,) = pages
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
    try:
        client = Client(address, verbose=False, download_files=tmp_path)
        answers = {}
        for name in ("classify", "compare"):  # with the models that the page starts with
            answers[name] = client.predict(handle_file(digit), min_probability=0, api_name=f"/{name}")
    finally:
        page.close()
    assert answers["classify"][0].startswith("## &#42;four&#42;")
    assert [part["visible"] for part in answers["classify"][1:4]] == [True, True, True]
    assert [part["visible"] for part in answers["compare"][1:4]] == [True, False, False]


# ---- In a browser ----


def wait(chromium: webdriver.Chrome, condition):
    return WebDriverWait(chromium, 60).until(condition)


def verdict(chromium: webdriver.Chrome, panel: str = "classify") -> str:
    return chromium.find_element(By.ID, f"{panel}-verdict").text


@pytest.mark.parametrize("width", [420, 1400], ids=["narrow", "wide"])
def test_a_picture_uploaded_in_a_browser_gets_its_label_and_maps(width, chromium, page, digit):
    chromium.set_window_size(width, 1000)
    chromium.get(page)
    upload = wait(chromium, lambda _: chromium.find_element(By.CSS_SELECTOR, "#picture input[type=file]"))
    upload.send_keys(str(digit))
    assert re.match(r"\*four\*\n\d\d% probable", wait(chromium, lambda _: verdict(chromium)))
    maps = wait(chromium, lambda _: chromium.find_elements(By.CSS_SELECTOR, "#classify-maps img"))
    wait(chromium, lambda _: all(chromium.execute_script("return arguments[0].naturalWidth", map) for map in maps))
    assert [chromium.execute_script("return arguments[0].naturalWidth", map) for map in maps] == [384] * 3
    assert all(map.is_displayed() and map.size["width"] > 90 for map in maps)
    body = chromium.find_element(By.TAG_NAME, "body")
    assert body.text.count("<b>three</b>") >= 1  # a label is text, whatever it looks like
    # Nothing sticks out to the right.
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_text_file_in_a_browser_gets_a_message_and_the_next_picture_a_label(chromium, page, digit, tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    chromium.get(page)
    upload = wait(chromium, lambda _: chromium.find_element(By.CSS_SELECTOR, "#picture input[type=file]"))
    upload.send_keys(str(tmp_path / "notes.png"))
    assert "This file is not a picture" in wait(chromium, lambda _: verdict(chromium))
    upload = wait(chromium, lambda _: chromium.find_element(By.CSS_SELECTOR, "#picture input[type=file]"))
    upload.send_keys(str(digit))
    wait(chromium, lambda _: verdict(chromium).startswith("*four*"))


def test_an_example_of_the_run_can_be_chosen_in_a_browser(chromium, page):
    chromium.set_window_size(1400, 1000)
    chromium.get(page)
    examples = wait(chromium, lambda _: chromium.find_elements(By.CSS_SELECTOR, "#examples button"))
    assert len(examples) == 2
    for example, label in zip(examples, ("nought", "one"), strict=True):
        example.click()
        wait(chromium, lambda _, label=label: verdict(chromium).startswith(f"{label}\n"))


@pytest.mark.parametrize("how", ["Ctrl-V", "Paste from clipboard"])
def test_a_picture_can_be_pasted_in_a_browser(how, chromium, page, digit):
    chromium.get(page)
    wait(chromium, lambda _: chromium.find_element(By.CSS_SELECTOR, "#picture input[type=file]"))
    copy_picture(chromium, digit)
    if how == "Ctrl-V":
        press_ctrl_v(chromium)
    else:
        chromium.find_element(By.CSS_SELECTOR, f"#picture button[aria-label='{how}']").click()
    wait(chromium, lambda _: verdict(chromium).startswith("*four*\n"))


def test_a_picture_can_be_taken_with_the_camera_in_a_browser(chromium, page):
    chromium.get(page)
    for button in ("//*[@aria-label='Capture from camera']", "//button[contains(., 'Access Webcam')]"):
        wait(chromium, lambda _, button=button: chromium.find_elements(By.XPATH, button))[0].click()
    wait(chromium, lambda _: chromium.execute_script("return document.querySelector('#picture video')?.videoWidth"))
    chromium.find_element(By.XPATH, "//*[@aria-label='capture photo']").click()
    wait(chromium, lambda _: verdict(chromium))
    assert chromium.find_element(By.CSS_SELECTOR, "#classify-maps img").is_displayed()


def test_the_page_needs_no_network(client, digit, log):
    ask(client, digit)
    assert not log.with_suffix(".hosts").exists()


# ---- The Space ----


@pytest.fixture(scope="module")
def space(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("space") / "clean"
    models = [str(runs / "both"), str(runs / "more" / "cnn")]
    assert app.main(["--compare", *models, "--to_space=tester/digits", f"--dry_run={folder}"]) == 0
    return folder


def test_a_space_runs_by_itself_in_a_clean_folder(space, digit, tmp_path):
    with serve(cwd=space, log=tmp_path / "space.log") as address:
        said, heads, maps, _ = ask(Client(address, verbose=False, download_files=tmp_path), digit)
    assert said.startswith("## &#42;four&#42;")
    assert (len(heads), len(maps)) == (3, 3)
    assert not (tmp_path / "space.hosts").exists()


def test_a_space_holds_the_models_and_the_code_but_nothing_private(space):
    held = {file.relative_to(space).as_posix() for file in space.rglob("*") if file.is_file()}
    code = {file.relative_to(REPOSITORY).as_posix() for file in (REPOSITORY / "modeling_deit_ti").rglob("*.*")}
    code = {file for file in code if file.endswith((".py", ".md", ".html", ".css", ".js"))}
    model = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {file for file in held if "__pycache__" not in file} == {
        *("README.md", "app.py", "requirements.txt"),
        *code,
        *(f"models/both/{file}" for file in {*model, "example.png", "example_2.png", "run_record.json"}),
        *(f"models/cnn/{file}" for file in model),
    }
    assert (space / "app.py").read_bytes() == (REPOSITORY / "app.py").read_bytes()


def test_a_spaces_front_matter_is_what_the_hub_expects(space, runs):
    card = SpaceCard.load(space / "README.md")
    assert (card.data.title, card.data.sdk, card.data.app_file) == ("digits", "gradio", "app.py")
    assert card.data.sdk_version == importlib.metadata.version("gradio")
    assert card.data.python_version == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert card.data.license == "apache-2.0"
    assert card.data.models == ["someone/deit-ti-cifar10"]
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card.data.colorFrom, card.data.colorTo} < colours
    assert len(card.data.short_description) <= 60
    assert "69.19 %" in card.text
    assert str(runs.parent) not in card.content


def test_a_spaces_requirements_cover_all_that_its_code_imports(space):
    imported = set()
    for file in space.rglob("*.py"):
        for line in ast.parse(file.read_text()).body:
            names = [alias.name for alias in line.names] if isinstance(line, ast.Import) else []
            names += [line.module] if isinstance(line, ast.ImportFrom) and line.level == 0 else []
            imported |= {name.partition(".")[0] for name in names}
    owners = importlib.metadata.packages_distributions()
    needed = {owners[name][0] for name in imported - sys.stdlib_module_names - {"modeling_deit_ti"}}
    pinned = dict(line.split("==") for line in (space / "requirements.txt").read_text().splitlines())
    assert {name: importlib.metadata.version(name).partition("+")[0] for name in pinned} == pinned
    brought = {Requirement(line).name for line in importlib.metadata.requires("datasets")}
    assert set(map(canonicalize_name, needed)) <= set(map(canonicalize_name, {*pinned, *brought}))


def test_a_static_space_is_a_page_that_needs_no_server(runs, tmp_path, capsys):
    folder = tmp_path / "static"
    assert app.main([str(runs / "both"), "--to_space=tester/digits", "--static", f"--dry_run={folder}"]) == 0
    assert f"python -m http.server --directory {folder}" in capsys.readouterr().out
    card = SpaceCard.load(folder / "README.md").data
    assert (card.title, card.sdk) == ("digits", "static")
    assert (folder / "index.html").is_file() and list(folder.rglob("model_quantized.onnx"))


def test_a_space_is_pushed_and_a_refused_push_ends_in_one_message(hub, space, runs, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert app.main([str(runs / "both"), "--to_space", "tester/digits"]) == 0
    assert re.fullmatch(r"Pushed to http://\S+/spaces/tester/digits\n", capsys.readouterr().out)
    files = hub.files("tester/digits", repo_type="space")
    assert files["app.py"] == (space / "app.py").read_bytes()
    assert files["models/both/model.safetensors"] == (runs / "both" / "model.safetensors").read_bytes()
    assert "validate-yaml" in [request.operation for request in hub.requests]

    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    assert app.main([str(runs / "both"), "--to_space", "tester/refused"]) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"app\.py: --to_space tester/refused: the push failed .*HF_TOKEN.*\n", message)
    with pytest.raises(KeyError):
        hub.files("tester/refused", repo_type="space")

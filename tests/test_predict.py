"""`predict.py` labels images, and its exit code tells whether all of them could be read."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from building import file_size_limit
from PIL import Image
from transformers import DeiTImageProcessor, ResNetConfig, ResNetForImageClassification

from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.distillation import resolve_mode
from modeling_deit_ti.interop import save_timm, save_transformers
from predict import main


LABELS = {0: "cat", 1: "dog", 2: "emu", 3: "fox"}


def make_image_processor() -> DeiTImageProcessor:
    return DeiTImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def make_model(mode: str, **options) -> DeiTTiForImageClassification:
    torch.manual_seed(0)
    small = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    config = DeiTTiConfig(id2label=LABELS, **small, **resolve_mode(mode, **options).network)
    model = DeiTTiForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save_run(mode: str, folder: Path, **options) -> DeiTTiForImageClassification:
    model = make_model(mode, **options)
    model.save_pretrained(folder)
    make_image_processor().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run in mode `both`."""
    folder = tmp_path_factory.mktemp("run")
    save_run("both", folder)
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with three images, one of them in a subfolder, and a file that is not an image."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b.jpg", "more/c.PNG")):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def predict(*arguments, output: Path) -> list[dict]:
    """The contents of the JSON file; every image must be readable."""
    assert main([*map(str, arguments), "--output", str(output)]) == 0
    return json.loads(output.read_text())


def expected_scores(model: DeiTTiForImageClassification, file: Path) -> dict[str, dict[str, float]]:
    """Each head's score for each label, computed with the model itself."""
    inputs = make_image_processor()(Image.open(file).convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    heads = {"class": output.class_logits, "distillation": output.distillation_logits, "prediction": output.logits}
    return {
        head: dict(zip(LABELS.values(), logits[0].softmax(-1).tolist(), strict=True))
        for head, logits in heads.items()
        if logits is not None
    }


def test_each_heads_best_labels_are_listed_in_order_with_their_scores(run, images, tmp_path):
    model = make_model("both")
    predictions = predict(run, images, "--top_k", 3, output=tmp_path / "out.json")
    assert [Path(prediction["file"]) for prediction in predictions] == [
        images / name for name in ("a.png", "b.jpg", "more/c.PNG")
    ]
    for prediction in predictions:
        scores = expected_scores(model, Path(prediction["file"]))
        scores["both"] = scores["prediction"]
        assert list(prediction["heads"]) == ["class", "distillation", "both"]
        for head, guesses in prediction["heads"].items():
            best = sorted(scores[head].items(), key=lambda item: -item[1])[:3]
            assert [guess["label"] for guess in guesses] == [label for label, _ in best]
            assert [guess["score"] for guess in guesses] == pytest.approx([score for _, score in best], abs=1e-4)
        assert prediction["prediction"] == prediction["heads"]["both"][0]["label"]


@pytest.mark.parametrize("mode", ["class", "distill"])
def test_prediction_comes_from_the_modes_own_head(mode, images, tmp_path):
    model = save_run(mode, tmp_path / "run")
    head = {"class": "class", "distill": "distillation"}[mode]
    for prediction in predict(tmp_path / "run", images, output=tmp_path / "out.json"):
        scores = expected_scores(model, Path(prediction["file"]))[head]
        assert prediction["prediction"] == max(scores, key=scores.get) == prediction["heads"][head][0]["label"]
        assert prediction["score"] == pytest.approx(max(scores.values()), abs=1e-4)
        assert list(prediction["heads"]) == ["class", "distillation", "both"]


def test_single_token_models_exports_and_other_classifiers_have_one_head(images, tmp_path):
    model = save_run("distill", tmp_path / "run", single_token=True)
    save_transformers(model, make_image_processor(), tmp_path / "transformers")
    save_timm(model, make_image_processor(), tmp_path / "timm")
    native = predict(tmp_path / "run", images, output=tmp_path / "native.json")
    assert list(native[0]["heads"]) == ["distillation"]
    assert predict(tmp_path / "transformers", images, output=tmp_path / "transformers.json") == native
    for theirs, ours in zip(predict(tmp_path / "timm", images, output=tmp_path / "t.json"), native, strict=True):
        assert theirs["score"] == pytest.approx(ours["score"], abs=0.05)  # timm resizes differently
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", id2label=LABELS)
    ResNetForImageClassification(resnet).save_pretrained(tmp_path / "resnet")
    make_image_processor().save_pretrained(tmp_path / "resnet")
    assert list(predict(tmp_path / "resnet", images, output=tmp_path / "r.json")[0]["heads"]) == ["class"]


def test_models_saved_by_timm_itself_can_predict(images, tmp_path):
    """timm writes `num_classes` into `model_args` too, which transformers' wrapper does not expect."""
    network = timm.create_model("test_resnet", num_classes=4).eval()
    saved = {"model_args": {"num_classes": 4}, "model_config": {"label_names": list(LABELS.values())}}
    timm.models.save_for_hf(network, tmp_path / "timm", **saved, safe_serialization=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    for prediction in predict(tmp_path / "timm", images, "--top_k", 4, output=tmp_path / "out.json"):
        with torch.no_grad():
            scores = network(transform(Image.open(prediction["file"]).convert("RGB"))[None])[0].softmax(-1)
        expected = sorted(zip(LABELS.values(), scores.tolist(), strict=True), key=lambda pair: -pair[1])
        assert [guess["label"] for guess in prediction["heads"]["class"]] == [label for label, _ in expected]
        assert prediction["score"] == pytest.approx(expected[0][1], abs=1e-4)


def test_a_transformers_model_with_two_heads_keeps_both(images, tmp_path):
    model = save_run("both", tmp_path / "run")
    save_transformers(model, make_image_processor(), tmp_path / "transformers")
    native = predict(tmp_path / "run", images, output=tmp_path / "native.json")
    assert predict(tmp_path / "transformers", images, output=tmp_path / "transformers.json") == native


def test_batch_size_does_not_change_the_predictions(run, images, tmp_path):
    one = predict(run, images, "--batch_size", 1, output=tmp_path / "one.json")
    two = predict(run, images, "--batch_size", 2, output=tmp_path / "two.json")
    assert [prediction["file"] for prediction in one] == [prediction["file"] for prediction in two]
    assert [prediction["score"] for prediction in one] == pytest.approx([p["score"] for p in two], abs=1e-5)


def test_a_file_name_that_is_not_utf_8_is_escaped(run, images, tmp_path):
    strange = tmp_path / os.fsdecode(b"caf\xe9.png")
    shutil.copy(images / "a.png", strange)
    assert predict(run, strange, output=tmp_path / "out.json")[0]["file"] == str(tmp_path / "caf\\xe9.png")
    assert main([str(run), str(strange), "--output", str(tmp_path / "out.csv")]) == 0


def test_table_has_a_line_for_each_image(run, images, capsys):
    assert main([str(run), str(images), "--top_k", "2"]) == 0
    output = capsys.readouterr()
    heading, rule, *lines = output.out.splitlines()
    assert heading.split() == ["file", "prediction", "class", "distillation", "both"]
    assert set(rule) == {"-", " "}
    assert [line.split()[0] for line in lines] == [str(images / name) for name in ("a.png", "b.jpg", "more/c.PNG")]
    assert lines[0].count("%") == 6
    assert output.err == ""  # no progress bar outside a terminal


def test_csv_has_a_row_for_each_image_and_columns_for_each_head(run, images, tmp_path):
    predictions = predict(run, images, "--top_k", 2, output=tmp_path / "out.json")
    assert main([str(run), str(images), "--top_k", "2", "--output", str(tmp_path / "out.csv")]) == 0
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 3
    for row, prediction in zip(rows, predictions, strict=True):
        assert row["file"] == prediction["file"] and row["prediction"] == prediction["prediction"]
        for head in ("class", "distillation", "both"):
            for rank in (1, 2):
                guess = prediction["heads"][head][rank - 1]
                assert row[f"{head}_{rank}"] == guess["label"]
                assert float(row[f"{head}_{rank}_score"]) == guess["score"]


def test_images_of_any_mode_become_rgb_and_upright(run, tmp_path):
    """All files show the same picture and get the same prediction."""
    ramp = np.linspace(0, 255, 32).astype(np.uint8)
    grey = Image.fromarray(np.broadcast_to(ramp, (32, 32)).copy())
    folder = tmp_path / "images"
    folder.mkdir()
    for mode in ("L", "RGB", "RGBA", "P", "CMYK", "LA"):
        grey.convert(mode).save(folder / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: to be rotated by 270 degrees for display
    grey.rotate(90).save(folder / "turned.png", exif=exif)
    predictions = predict(run, folder, output=tmp_path / "out.json")
    assert len(predictions) == 8
    for prediction in predictions:
        assert prediction["score"] == pytest.approx(predictions[0]["score"], abs=0.02), prediction["file"]


def test_unreadable_files_are_named_and_skipped_and_the_exit_code_says_so(run, images, tmp_path, capsys):
    whole = (images / "a.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "empty.jpg").write_bytes(b"")
    Image.new("1", (20_000, 20_000)).save(images / "bomb.png")  # 400 million pixels in 50 kB
    output = tmp_path / "out.json"
    assert main([str(run), str(images), str(images / "notes.txt"), "--output", str(output)]) == 1
    errors = capsys.readouterr().err
    for name in ("bomb.png", "cut.png", "empty.jpg", "notes.txt"):
        assert f"skipped {images / name}: " in errors
    assert "4 of the images could not be read" in errors and "Traceback" not in errors
    assert [Path(prediction["file"]).name for prediction in json.loads(output.read_text())] == [
        "a.png",
        "b.jpg",
        "c.PNG",
    ]


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_without_readable_images_the_result_is_empty(suffix, run, images, tmp_path):
    output = tmp_path / f"out.{suffix}"
    assert main([str(run), str(images / "notes.txt"), "--output", str(output)]) == 1
    assert output.read_text().split() == (["[]"] if suffix == "json" else ["file,prediction,score"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none", "{images}"], "{tmp}/none: there is no such folder"),
        (["someone/nothing", "{images}"], "someone/nothing: there is no such folder"),
        (["{images}", "{images}"], "MODEL {images}: the folder holds no image classifier"),
        (["{run}", "{tmp}/none.png"], "There is no file or folder {tmp}/none.png"),
        (["{run}", "{images}/nothing"], "There are no images in the folder {images}/nothing"),
        (["{run}", "{images}", "--output", "{images}/notes.txt"], "must end in .csv or .json"),
        (["{run}", "{images}", "--output", "{tmp}/old.csv"], "old.csv already exists"),
        (["{run}", "{images}", "--output", "{tmp}/none/new.csv"], "there is no folder {tmp}/none"),
        (["{run}", "{images}", "--top_k", "0"], "--top_k 0: must be at least 1"),
        (["{run}", "{images}", "--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["{run}", "{images}", "--device", "abacus"], "--device abacus"),
        (["{tmp}/incomplete", "{images}"], "it is incomplete and lacks class_head.bias"),
        (["{tmp}/remote", "{images}"], "add --trust_remote_code"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(arguments, message, run, images, tmp_path, capsys):
    (images / "nothing").mkdir()
    (tmp_path / "old.csv").write_text("precious")
    model = make_model("both")
    state = {key: value for key, value in model.state_dict().items() if "class_head" not in key}
    model.save_pretrained(tmp_path / "incomplete", state_dict=state)
    make_image_processor().save_pretrained(tmp_path / "incomplete")
    (tmp_path / "remote").mkdir()
    auto_map = {"AutoConfig": "code.Config", "AutoModelForImageClassification": "code.Model"}
    (tmp_path / "remote" / "config.json").write_text(json.dumps({"model_type": "elsewhere", "auto_map": auto_map}))
    capsys.readouterr()
    places = {"run": run, "images": images, "tmp": tmp_path}
    assert main([argument.format(**places) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert message.format(**places) in output.err and "Traceback" not in output.err and output.out == ""
    assert (tmp_path / "old.csv").read_text() == "precious"


@pytest.mark.parametrize("name", ["new.csv", "new.json"])
def test_a_full_disk_leaves_no_part_of_the_output(name, run, images, tmp_path, capsys):
    with file_size_limit(30):
        assert main([str(run), str(images / "a.png"), "--output", str(tmp_path / name)]) == 1
    assert f"{tmp_path / name} cannot be written to" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_runs_as_a_program(run, images):
    script = Path(__file__).resolve().parents[1] / "predict.py"
    command = [sys.executable, str(script), str(run), str(images / "a.png"), str(images / "notes.txt")]
    process = subprocess.run(command, cwd=images, capture_output=True, text=True)
    assert process.returncode == 1 and str(images / "a.png") in process.stdout

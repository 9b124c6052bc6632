"""The ONNX file gives the model's logits, for any number of images, in every mode."""

import contextlib
import io
import json
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import DeiTImageProcessor

from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.distillation import resolve_mode
from modeling_deit_ti.errors import UserError
from modeling_deit_ti.interop import export_onnx, save_onnx
from modeling_deit_ti.interop.__main__ import main


onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

NETWORKS = {name: resolve_mode(name).network for name in ("none", "soft", "hard", "class", "distill", "both")} | {
    "class alone": resolve_mode("class", single_token=True).network,
    "distill alone": resolve_mode("distill", single_token=True).network,
}
LABELS = {0: "cat", 1: "dog", 2: "emu"}


@cache
def make_model(tokens: tuple[str, ...], readout: str) -> DeiTTiForImageClassification:
    torch.manual_seed(0)
    config = DeiTTiConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        image_size=32,
        patch_size=8,
        id2label=LABELS,
        label2id={label: index for index, label in LABELS.items()},
        tokens=tokens,
        readout=readout,
    )
    model = DeiTTiForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


class Export(NamedTuple):
    file: Path
    output: str  # what the command printed
    errors: str


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Converts a run with the command, each network only once, since that takes seconds; modes can share one."""

    @cache
    def export(tokens: tuple[str, ...], readout: str) -> Export:
        folder = tmp_path_factory.mktemp("run")
        make_model(tokens, readout).save_pretrained(folder)
        DeiTImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            main([str(folder), "--to", "onnx"])
        return Export(folder / "transformers" / "onnx" / "model.onnx", output.getvalue(), errors.getvalue())

    return export


@torch.no_grad()
def assert_same(file: Path, model: DeiTTiForImageClassification, images: torch.Tensor) -> None:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    expected = model(images, interpolate_pos_encoding=True)
    for name, found in zip(names, session.run(None, {"pixel_values": images.numpy()}), strict=True):
        assert expected[name].std() > 0.1  # the logits vary
        np.testing.assert_allclose(found, expected[name].numpy(), atol=1e-4, rtol=0, err_msg=name)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("mode", NETWORKS)
def test_onnxruntime_has_pytorchs_logits(mode, batch_size, exported):
    tokens, readout = tuple(NETWORKS[mode]["tokens"]), NETWORKS[mode]["readout"]
    assert_same(exported(tokens, readout).file, make_model(tokens, readout), torch.randn(batch_size, 3, 32, 32))


@pytest.mark.parametrize("mode", ["none", "both"])
def test_file_names_its_inputs_outputs_and_labels(mode, exported):
    file = exported(tuple(NETWORKS[mode]["tokens"]), NETWORKS[mode]["readout"]).file
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [(put.name, put.shape) for put in session.get_inputs()] == [("pixel_values", ["batch", 3, 32, 32])]
    names = ["logits", "class_logits", "distillation_logits"] if mode == "both" else ["logits"]
    assert [(put.name, put.shape) for put in session.get_outputs()] == [(name, ["batch", 3]) for name in names]
    assert json.loads(session.get_modelmeta().custom_metadata_map["id2label"]) == {"0": "cat", "1": "dog", "2": "emu"}
    assert not list(file.parent.glob("*.data"))  # the weights are inside
    assert file.parent.stat().st_mode == file.parent.parent.stat().st_mode  # as open to others as any folder


@pytest.mark.parametrize("mode", ["none", "both"])
def test_int8_file_is_smaller_and_has_nearly_the_same_logits(mode, exported):
    network = tuple(NETWORKS[mode]["tokens"]), NETWORKS[mode]["readout"]
    file = exported(*network).file
    quantized = file.with_name("model_quantized.onnx")
    assert quantized.stat().st_size < 0.7 * file.stat().st_size  # its layers are small; what surrounds them stays
    images = {"pixel_values": torch.randn(3, 3, 32, 32).numpy()}
    logits, rounded = (onnxruntime.InferenceSession(path).run(["logits"], images)[0] for path in (file, quantized))
    assert 0 < np.abs(rounded - logits).max() < 0.2 * np.abs(logits).max()


def test_command_prints_where_the_file_is_and_nothing_else(exported):
    export = exported(("class",), "class")
    assert export.output == f'Written. To load it: onnxruntime.InferenceSession("{export.file}")\n'
    assert export.errors == ""


def test_an_export_that_lacks_a_package_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)  # importing it fails
    with pytest.raises(UserError, match="pip install onnx onnxruntime onnxscript"):
        save_onnx(make_model(("class",), "class"), tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_images_of_another_size_get_interpolated_positions(tmp_path):
    model = make_model(("class", "distillation"), "both")
    model.train()
    export_onnx(model, tmp_path / "model.onnx", image_size=48)
    assert model.training
    assert_same(tmp_path / "model.onnx", model.eval(), torch.randn(3, 3, 48, 48))
    with pytest.raises(UserError, match="patch size 8 does not divide the image size 50"):
        export_onnx(model, tmp_path / "other.onnx", image_size=50)

"""transformers' own model tests, for this project's model; test_peers.py puts this file among them and runs it."""

import unittest

import torch
from transformers.testing_utils import torch_device

from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification, DeiTTiModel

from .test_modeling_common import ModelTesterMixin, floats_tensor


class DeiTTiModelTester:
    """What the mixin needs: a small config and inputs for it."""

    batch_size, num_labels = 13, 10
    image_size, patch_size, num_channels = 30, 2, 3
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size = 32, 2, 4, 37
    seq_length = encoder_seq_length = 2 + (30 // 2) ** 2
    is_training = True

    def __init__(self, parent):
        self.parent = parent

    def get_config(self) -> DeiTTiConfig:
        names = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers")
        names += ("num_attention_heads", "intermediate_size", "num_labels")
        values = {name: getattr(self, name) for name in names}
        return DeiTTiConfig(**values, tokens=["class", "distillation"], readout="both", drop_path_rate=0.0)

    def prepare_config_and_inputs_for_common(self):
        images = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": images}


class DeiTTiModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (DeiTTiModel, DeiTTiForImageClassification)
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = DeiTTiModelTester(self)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is DeiTTiForImageClassification:
            inputs["labels"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long, device=torch_device)
        return inputs

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        self.all_model_classes = (DeiTTiForImageClassification,)  # the other has no loss
        super().check_training_gradient_checkpointing(*args, **kwargs)

    def test_model_get_set_embeddings(self):
        model = DeiTTiModel(self.model_tester.get_config())
        layer = torch.nn.Conv2d(3, 32, 2, 2)
        model.set_input_embeddings(layer)
        assert model.get_input_embeddings() is layer is model.embeddings.patch_projection

    def test_training(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = DeiTTiForImageClassification(config).to(torch_device).train()
        model(**self._prepare_for_class(inputs, type(model), return_labels=True)).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_problem_types(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for problem_type, num_labels, dtype in (
            ("multi_label_classification", 2, torch.float),
            ("single_label_classification", 1, torch.long),
            ("regression", 1, torch.float),
        ):
            config.problem_type, config.num_labels = problem_type, num_labels
            model = DeiTTiForImageClassification(config).to(torch_device).train()
            labels = torch.zeros(self.model_tester.batch_size, *[num_labels] * (num_labels > 1), dtype=dtype)
            assert model(**inputs, labels=labels.to(torch_device)).loss.isfinite()

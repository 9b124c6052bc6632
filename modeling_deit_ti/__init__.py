"""Distil a DeiT-Ti from any image classifier, inside the Hugging Face ecosystem."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_deit_ti import DeiTTiConfig
from .modeling_deit_ti import DeiTTiForImageClassification, DeiTTiImageClassifierOutput, DeiTTiModel


AutoConfig.register(DeiTTiConfig.model_type, DeiTTiConfig)
AutoModel.register(DeiTTiConfig, DeiTTiModel)
AutoModelForImageClassification.register(DeiTTiConfig, DeiTTiForImageClassification)
# Saved models carry their own code (auto_map in config.json), so they load without this package.
DeiTTiConfig.register_for_auto_class()
DeiTTiModel.register_for_auto_class("AutoModel")
DeiTTiForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = ["DeiTTiConfig", "DeiTTiForImageClassification", "DeiTTiImageClassifierOutput", "DeiTTiModel"]

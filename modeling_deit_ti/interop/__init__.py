"""Converts DeiT-Ti to and from transformers' own classes and timm, and to ONNX; makes Spaces and a page for browsers.

Float32 exports predict the same as the model, up to rounding. One-token models become plain ViTs. Two-token models
that read out both heads become transformers' `DeiTForImageClassificationWithTeacher` and timm's
`VisionTransformerDistilled`, which average them. Those that read out one head put its token first, where both
libraries' single head reads; the other token stays in the sequence without a head (timm calls that a register).

    python -m modeling_deit_ti.interop RUN --to transformers
"""

from .exports import (
    ONNX_FILE,
    QUANTIZED_FILE,
    export_onnx,
    load_run,
    quantize_onnx,
    save_onnx,
    save_timm,
    save_transformers,
    timm_arguments,
    to_timm,
    to_transformers,
)
from .student import is_vit, load_student


__all__ = [
    "ONNX_FILE",
    "QUANTIZED_FILE",
    "export_onnx",
    "is_vit",
    "load_run",
    "load_student",
    "quantize_onnx",
    "save_onnx",
    "save_timm",
    "save_transformers",
    "timm_arguments",
    "to_timm",
    "to_transformers",
]

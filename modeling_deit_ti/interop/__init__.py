"""DeiT-Ti to and from transformers' own classes and timm, and to ONNX; and a page that runs it.

Every export predicts what the model predicts, to float32 rounding. One-token models are plain ViTs. Two-token models
that read out both heads are transformers' `DeiTForImageClassificationWithTeacher` and timm's
`VisionTransformerDistilled`, which average them. Those that read out one head put its token first, where both
libraries' single head sits; the other token stays in the sequence without a head (timm calls that a register).

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
    "to_timm",
    "to_transformers",
]

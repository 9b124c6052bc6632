"""What a finished run says about itself: its record, its training curves and its model card.

`RunRecord` (record.py) is plain data that the run fills in. `plot_training_curves` (curves.py) draws its log.
`write_model_card` (card.py) renders the record through template.md, with the help of markdown.py.
"""

from .card import EXAMPLE_FILE, PUBLISHED_BASELINE, write_model_card
from .curves import CURVES_FILE, curve_series, plot_training_curves
from .record import DatasetRecord, RunRecord, TeacherRecord, describe_hardware, library_versions


__all__ = [
    "CURVES_FILE",
    "EXAMPLE_FILE",
    "PUBLISHED_BASELINE",
    "DatasetRecord",
    "RunRecord",
    "TeacherRecord",
    "curve_series",
    "describe_hardware",
    "library_versions",
    "plot_training_curves",
    "write_model_card",
]

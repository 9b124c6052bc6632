"""What a finished run leaves for readers: its record, training curves, report and model card.

`RunRecord` (record.py) is plain data that the run fills in. `plot_training_curves` (curves.py) plots the run's log.
`Report` (report.py) evaluates its predictions, and `draw_report` (report_pictures.py) draws the figures.
`write_model_card` (card.py) renders record and report with their templates; markdown.py formats the values.
"""

from .card import EXAMPLE_FILE, PUBLISHED_BASELINE, example_files, make_model_card, report_section, write_model_card
from .curves import CURVES_FILE, curve_series, plot_training_curves
from .record import (
    DatasetRecord,
    RunRecord,
    TeacherRecord,
    describe_cores,
    describe_hardware,
    display_names,
    folder_name,
    library_versions,
    processor_facts,
)
from .report import (
    REPORT_FILE,
    Predictions,
    Report,
    TemperatureScaling,
    compare,
    confidence_interval,
    make_report,
    scale_temperature,
    verdict,
)
from .report_pictures import draw_report


__all__ = [
    "CURVES_FILE",
    "EXAMPLE_FILE",
    "PUBLISHED_BASELINE",
    "REPORT_FILE",
    "DatasetRecord",
    "Predictions",
    "Report",
    "RunRecord",
    "TeacherRecord",
    "TemperatureScaling",
    "compare",
    "confidence_interval",
    "curve_series",
    "describe_cores",
    "describe_hardware",
    "draw_report",
    "example_files",
    "folder_name",
    "library_versions",
    "make_model_card",
    "make_report",
    "plot_training_curves",
    "processor_facts",
    "report_section",
    "scale_temperature",
    "display_names",
    "verdict",
    "write_model_card",
]

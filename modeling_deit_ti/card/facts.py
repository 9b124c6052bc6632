"""A summary of the card: what to know before trusting the model's answers."""

from .card import results
from .markdown import code, percent, text
from .record import RunRecord


def facts(record: RunRecord) -> str:
    """Network, data, accuracy, teacher and limits of a run, as Markdown."""
    data, teacher = record.dataset, record.teacher
    network = code(record.architecture)
    if record.architecture == "deit_ti":
        tokens = " and ".join(record.mode.tokens) + " token" + "s" * (len(record.mode.tokens) - 1)
        network = f"DeiT-Ti with {tokens}, patches of {record.patch_size}x{record.patch_size} pixels"
    shown = ", ".join(map(text, data.label_names[:20]))
    more = f" and {len(data.label_names) - 20:,} more" if len(data.label_names) > 20 else ""
    lines = [
        f"- **Network**: {network}, {record.num_parameters / 1e6:.1f} million parameters; its input is "
        f"{record.image_size}x{record.image_size} pixels.",
        f"- **Data**: {data.num_train_images:,} images of {text(data.name)}.",
        f"- **Labels**: {shown}{more}.",
    ]
    if rows := results(record):
        accuracies = ", ".join(f"{percent(row.accuracy)} ({text(row.name)})" for row in rows)
        lines.append(f"- **Accuracy**: {accuracies} on {data.num_eval_images:,} images it was not trained on.")
    if record.mode.has_teacher:
        lines.append(f"- **Teacher**: {code(teacher.name)}, accuracy {percent(teacher.accuracy)}.")
    lines.append(
        f"- **What it does not know**: anything but these {len(data.label_names):,} labels. Every picture gets one of "
        "them; on a picture of something else, the model may be confident and wrong."
    )
    return "\n".join(lines)

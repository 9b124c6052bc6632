"""What `--report_to` writes to TensorBoard and trackio, read back with their own readers."""

import importlib.util
import io
import json

import pytest
from building import FOUR_STEPS, arguments
from PIL import Image
from real_command import run

from modeling_deit_ti.errors import UserError


TEACHER = ("--teacher_model_name_or_path=test_resnet", "--teacher_num_train_epochs=12", "--teacher_learning_rate=2e-2")
GROUPED = {"train/loss", "train/learning_rate", "teacher/agreement", "teacher/accuracy", "eval/loss", "eval/accuracy"}


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The folders of a distilled run, of its teacher and of trackio."""
    folder = tmp_path_factory.mktemp("reports")
    places = [f"--output_dir={folder / 'student'}", f"--teacher_output_dir={folder / 'teachers'}"]
    flags = [*FOUR_STEPS, *TEACHER, "--distill_mode=hard", "--report_to", "tensorboard", "trackio"]
    ended = run(*flags, *places, env={"TRACKIO_DIR": str(folder / "trackio")})
    assert ended.returncode == 0, ended.stderr
    (teacher,) = (path.parent for path in (folder / "teachers").glob("*/all_results.json"))
    return folder / "student", teacher, folder / "trackio"


def results(folder) -> dict:
    return json.loads((folder / "all_results.json").read_text())


def test_tensorboard_has_each_runs_grouped_metrics_and_curves_in_its_folder(reported):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for folder, steps in zip(reported, (4, 48), strict=False):
        events = event_accumulator.EventAccumulator(str(folder / "runs"))
        events.Reload()
        names = set(events.Tags()["scalars"])
        assert names >= (GROUPED if steps == 4 else {name for name in GROUPED if "teacher" not in name})
        assert all(name.startswith(("train/", "eval/", "teacher/")) for name in names)
        last = events.Scalars("eval/accuracy")[-1]
        assert last.step == steps and last.value == pytest.approx(results(folder)["eval_accuracy"])
        assert [event.step for event in events.Scalars("train/loss")] == list(range(4, steps + 1, 4))
        (picture,) = events.Images("pictures/training_curves")
        drawn, curves = (
            Image.open(io.BytesIO(picture.encoded_image_string)),
            Image.open(folder / "training_curves.png"),
        )
        assert drawn.tobytes() == curves.convert("RGB").tobytes()


def test_trackio_has_the_same_in_separate_runs_for_student_and_teacher(reported, monkeypatch):
    student, teacher, kept = reported
    monkeypatch.setenv("TRACKIO_DIR", str(kept))  # read at import, so no other test in this process may set it
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    assert set(storage.get_runs("huggingface")) == {student.name, teacher.name}
    logs = storage.get_logs("huggingface", student.name)
    assert set().union(*logs) >= GROUPED and {log["step"] for log in logs} == {4}
    accuracies = [log["eval/accuracy"] for log in logs if "eval/accuracy" in log]
    assert accuracies[-1] == pytest.approx(results(student)["eval_accuracy"])
    (picture,) = [log["pictures/training_curves"] for log in logs if "pictures/training_curves" in log]
    assert (kept / "media" / picture["file_path"]).read_bytes() == (student / "training_curves.png").read_bytes()


@pytest.mark.parametrize("tool", ["wandb", "mlflow"])
def test_missing_tool_is_named_with_the_package_to_install(tool, tmp_path):
    if importlib.util.find_spec(tool):
        pytest.skip(f"{tool} is installed")
    with pytest.raises(UserError, match=rf"^--report_to {tool} is not installed: pip install {tool}\.$"):
        arguments(output_dir=tmp_path, report_to=tool)

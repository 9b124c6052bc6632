"""Sharing, end to end: the real command pushes to a stand-in for the Hub, and strangers load what arrived.

The processes here are real, and each takes seconds to import torch and transformers, so there are few of them, and
many tests inspect what each one left.
"""

import contextlib
import inspect
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from building import FOUR_STEPS, image_processor
from datasets import load_dataset
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor

from modeling_deit_ti import DeiTTiConfig, DeiTTiForImageClassification
from modeling_deit_ti.checkpoints import SETTINGS_FILE
from modeling_deit_ti.distillation import resolve_mode
from modeling_deit_ti.interop import export_onnx, save_timm, save_transformers


REPOSITORY = Path(__file__).resolve().parents[1]
QUICK = [*FOUR_STEPS, "--push_to_hub"]
# In the format of a real one, so that whatever looks for tokens on the way finds it.
TOKEN = "hf_" + "Stranger" * 4
SHARED = "tester/deit-ti.digits-distill"  # a name with everything that a module's name must not have
RESUMED = "tester/deit-ti-resumed"

MODES = {
    "none": resolve_mode("none"),
    "soft": resolve_mode("soft"),
    "hard": resolve_mode("hard"),
    "class": resolve_mode("class"),
    "distill": resolve_mode("distill"),
    "both": resolve_mode("both"),
    "class-alone": resolve_mode("class", single_token=True),
    "distill-alone": resolve_mode("distill", single_token=True),
}
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubStandIn(tmp_path_factory.mktemp("hub")) as hub:
        hub.tokens[TOKEN] = "write"
        yield hub


def train(*flags: str, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "train_hf.py", *QUICK, *flags]
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)


def run_alone(function, *arguments, env: dict[str, str], cwd: Path, isolated: bool = True) -> str:
    """What a function of this file prints in a subprocess, which knows neither this file nor the project."""
    code = f"{inspect.getsource(function)}\n{function.__name__}(*{arguments!r})"
    command = [sys.executable, *["-I"] * isolated, "-c", code]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without(files: dict[str, bytes], *folders: str) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if not path.startswith(folders)}


# ---- What is pushed ----


class Run(NamedTuple):
    folder: Path
    repo: str
    output: subprocess.CompletedProcess
    home: Path  # its HF_HOME


@pytest.fixture(scope="module")
def shared(hub, tmp_path_factory) -> Run:
    """A run pushed to a public repository, with all exports."""
    folder, env = tmp_path_factory.mktemp("shared") / "run", hub.env()
    output = train(
        *("--distill_mode=distill", "--num_train_epochs=4", "--learning_rate=1e-3"),
        "--teacher_model_name_or_path=test_resnet",
        "--teacher_num_train_epochs=12",
        "--teacher_learning_rate=2e-2",
        f"--teacher_output_dir={folder.parent / 'teachers'}",
        f"--output_dir={folder}",
        f"--hub_model_id={SHARED}",
        f"--hub_token={TOKEN}",
        *("--export", "timm", "onnx"),
        env=env,
    )
    assert output.returncode == 0, output.stderr
    return Run(folder, SHARED, output, Path(env["HF_HOME"]))


def test_a_pushed_repository_is_complete_and_equals_the_output_folder(hub, shared):
    stored = hub.files(shared.repo)
    assert stored.keys() == {
        ".gitattributes",
        "README.md",
        "all_results.json",
        "config.json",
        "confusion_matrix.png",
        "configuration_deit_ti.py",
        "eval_results.json",
        "example.png",
        *(f"example_{number}.png" for number in range(2, 9)),
        "mistakes.png",
        "model.safetensors",
        "modeling_deit_ti.py",
        "preprocessor_config.json",
        "reliability.png",
        "report.json",
        "run_record.json",
        "timm/config.json",
        "timm/model.safetensors",
        "train_results.json",
        "trainer_state.json",
        "training_args.bin",
        "training_curves.png",
        "transformers/config.json",
        "transformers/model.safetensors",
        "transformers/onnx/model.onnx",
        "transformers/onnx/model_quantized.onnx",
        "transformers/onnx/preprocessing.js",
        "transformers/preprocessor_config.json",
    }
    stored.pop(".gitattributes")
    assert stored == without(contents(shared.folder), "checkpoint-", SETTINGS_FILE)


def test_the_token_appears_nowhere(hub, shared):
    places = {"repository": hub.files(shared.repo), "folder": contents(shared.folder), "home": contents(shared.home)}
    for place, files in places.items():
        for path, content in files.items():
            assert TOKEN.encode() not in content, f"{place}: {path}"
    assert TOKEN not in shared.output.stdout + shared.output.stderr
    arguments = torch.load(shared.folder / "training_args.bin", weights_only=False)
    assert (arguments.hub_model_id, arguments.hub_token) == (SHARED, None)


def test_the_pushed_card_gives_the_hub_and_the_reader_the_runs_results(hub, shared):
    stored = hub.files(shared.repo)
    results = json.loads(stored["all_results.json"])
    card = ModelCard(stored["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-classification")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["Accuracy"] == pytest.approx(results["eval_accuracy"], abs=1e-6)
    assert values["Accuracy, class head"] == pytest.approx(results["eval_accuracy_class"], abs=1e-6)
    for key in ("eval_accuracy", "eval_accuracy_class", "eval_accuracy_both", "teacher_accuracy"):
        assert f"{100 * results[key]:.2f} %" in card.text
    assert abs(results["eval_accuracy_quantized"] - results["eval_accuracy"]) <= 0.02
    assert results["eval_accuracy_unquantized"] == results["eval_accuracy"]
    quantized, own = (f"{100 * results[f'eval_accuracy_{name}']:.2f} %" for name in ("quantized", "unquantized"))
    said = f"its top-1 accuracy on 100 evaluation images is {quantized}; the model's own is {own}."
    assert said in " ".join(card.text.split())
    assert str(shared.folder.parent) not in card.content


# ---- What a stranger gets ----


def load_everywhere(repos: dict[str, str], answers: str, card_of: str) -> None:
    """
    Loads each repository in every way that its files allow, and saves its logits for the images in the `.npy` file
    that `repos` gives for it, (N, 32, 32, 3), as `answers/<owner>/<name>.npz`. Runs the Python code of one card.
    """
    import contextlib
    import importlib.util
    import io
    import json
    import re
    import sys
    from pathlib import Path

    import numpy as np
    import onnxruntime
    import timm
    import torch
    from huggingface_hub import ModelCard, snapshot_download
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    assert importlib.util.find_spec("modeling_deit_ti") is None

    @torch.inference_mode()
    def logits_of(model, pixel_values) -> np.ndarray:
        outputs = [model(batch) for batch in pixel_values.split(125)]
        return torch.cat([output if isinstance(output, torch.Tensor) else output.logits for output in outputs]).numpy()

    for repo, file in repos.items():
        images = [Image.fromarray(pixels) for pixels in np.load(file)]
        logits = {}

        processor = AutoImageProcessor.from_pretrained(repo, subfolder="transformers")
        model = AutoModelForImageClassification.from_pretrained(repo, subfolder="transformers")
        assert type(model).__module__.startswith("transformers.models.")
        logits["transformers"] = logits_of(model, processor(images, return_tensors="pt")["pixel_values"])

        processor = AutoImageProcessor.from_pretrained(repo)
        model = AutoModelForImageClassification.from_pretrained(repo, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules.")
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        logits["native"] = logits_of(model, pixel_values)

        folder = Path(snapshot_download(repo, allow_patterns=["timm/*", "transformers/onnx/model.onnx"]))
        config = json.loads((folder / "timm" / "config.json").read_text())
        transform = timm.data.create_transform(
            **timm.data.resolve_data_config(pretrained_cfg=config["pretrained_cfg"])
        )
        model = timm.create_model(
            config["architecture"],
            num_classes=config["num_classes"],
            checkpoint_path=folder / "timm" / "model.safetensors",
            **config["model_args"],
        )
        logits["timm"] = logits_of(model.eval(), torch.stack([transform(image) for image in images]))

        session = onnxruntime.InferenceSession(
            folder / "transformers/onnx/model.onnx", providers=["CPUExecutionProvider"]
        )
        logits["onnx"] = session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0]

        some = images[:8]
        classifier = pipeline("image-classification", repo, trust_remote_code=True)
        said = [answer[0]["label"] for answer in classifier(some)]
        names = classifier.model.config.id2label
        assert said == [names[row.argmax()] for row in logits["native"][: len(some)]]
        assert [names[label] for label in range(len(names))] == config["label_names"]

        target = Path(answers, f"{repo}.npz")
        target.parent.mkdir(parents=True, exist_ok=True)
        np.savez(target, **logits)

    card = ModelCard.load(card_of)
    card.validate()
    printed = []
    for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(block, {"__name__": "__main__"})
        printed.append(output.getvalue())
    json.dump(printed, sys.stdout)


@pytest.fixture(scope="module")
def cifar10_images(cifar10_dir) -> np.ndarray:
    """The first 1,000 test images, (1000, 32, 32, 3)."""
    test = load_dataset("parquet", data_files=str(cifar10_dir / "plain_text" / "test-*.parquet"), split="train[:1000]")
    return np.stack([np.asarray(image.convert("RGB")) for image in test["img"]])


def digits() -> np.ndarray:
    """The first 100 handwritten digits at the model's size, so that nothing has to be resized: uint8 RGB."""
    grey = load_digits().images[:100].repeat(4, axis=1).repeat(4, axis=2) * 255 / 16
    return grey[..., None].repeat(3, axis=3).astype(np.uint8)


def upload(folders: dict[str, str]) -> None:
    """Pushes each folder to its repository."""
    from huggingface_hub import HfApi

    for repo, folder in folders.items():
        HfApi().create_repo(repo)
        HfApi().upload_folder(repo_id=repo, folder_path=folder)


@pytest.fixture(scope="module")
def modes_on_the_hub(hub, tmp_path_factory) -> dict[str, str]:
    """
    An untrained model of every mode, pushed as a run leaves it: mode to repository. It only has one block, since all
    modes have the same blocks: the trained model has all twelve, and exporting them to ONNX takes a while.
    """
    root = tmp_path_factory.mktemp("modes")
    processor = image_processor(32)
    labels = {"id2label": dict(enumerate(CIFAR10)), "label2id": {label: index for index, label in enumerate(CIFAR10)}}
    exported = {}  # by network: some modes share one
    for name, mode in MODES.items():
        torch.manual_seed(0)
        config = DeiTTiConfig(image_size=32, patch_size=16, num_hidden_layers=1, **labels, **mode.network)
        model = DeiTTiForImageClassification(config).eval()
        with torch.no_grad():  # leave no parameter at a value that could hide an error
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        folder = root / name
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        save_transformers(model, processor, folder / "transformers")
        save_timm(model, processor, folder / "timm")
        network = (mode.tokens, mode.readout)
        onnx = folder / "transformers" / "onnx"
        if network in exported:
            shutil.copytree(exported[network], onnx)
        else:
            exported[network] = onnx
            onnx.mkdir()
            export_onnx(model, onnx / "model.onnx")
    repos = {name: f"{hub.user}/{name}" for name in MODES}
    run_alone(upload, {repos[name]: str(root / name) for name in MODES}, env=hub.env(TOKEN), cwd=root)
    return repos


class Answers(NamedTuple):
    logits: dict[str, dict[str, np.ndarray]]  # by repository and way of loading
    printed: list[str]  # by each block of the card


@pytest.fixture(scope="module")
def strangers(hub, shared, request, tmp_path_factory) -> Answers:
    """A fresh process, without a token, cache or this project, that loads every repository in every way."""
    folder = tmp_path_factory.mktemp("stranger")
    np.save(folder / "digits.npy", digits())
    repos = {shared.repo: str(folder / "digits.npy")}
    with contextlib.suppress(pytest.skip.Exception):  # without CIFAR-10, only its tests are skipped
        np.save(folder / "cifar10.npy", request.getfixturevalue("cifar10_images"))
        modes = request.getfixturevalue("modes_on_the_hub")
        repos |= dict.fromkeys(modes.values(), str(folder / "cifar10.npy"))
    output = run_alone(load_everywhere, repos, str(folder), shared.repo, env=hub.env(), cwd=folder)
    return Answers({repo: dict(np.load(folder / f"{repo}.npz")) for repo in repos}, json.loads(output))


@torch.no_grad()
def test_every_way_of_loading_gives_a_stranger_the_trained_models_logits(shared, strangers):
    model = DeiTTiForImageClassification.from_pretrained(shared.folder).eval()
    processor = AutoImageProcessor.from_pretrained(shared.folder)
    expected = model(**processor(list(digits()), return_tensors="pt")).logits.numpy()
    assert len(np.unique(expected.argmax(-1))) > 1  # the predictions vary
    for way, tolerance in {"native": 1e-5, "transformers": 1e-5, "timm": 1e-5, "onnx": 1e-4}.items():
        logits = strangers.logits[shared.repo][way]
        np.testing.assert_allclose(logits, expected, atol=tolerance, rtol=0, err_msg=way)
        np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1), err_msg=way)


def test_every_code_block_of_the_pushed_card_runs_for_a_stranger(hub, shared, strangers):
    card = hub.files(shared.repo)["README.md"].decode()
    assert len(strangers.printed) == card.count("```python\n")
    one_line, steps, without_remote_code, with_timm, with_onnx = strangers.printed
    best = re.match(r"\[{'label': '(\d)'", one_line)[1]
    assert re.fullmatch(rf"prediction: {best}\nclass head: \d\ndistillation head: {best}\n", steps)
    assert re.match(r"\[{'label': '(\d)'", without_remote_code)[1] == best
    assert (with_timm, with_onnx) == (f"{best}\n", f"{best}\n")


@torch.no_grad()
def test_transformers_js_loads_a_pushed_model_from_the_hub_and_from_its_folder(hub, shared, transformers_js, tmp_path):
    def node(*command: str, cwd: Path) -> str:
        done = subprocess.run(["node", *command], cwd=cwd, env=hub.env(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    answers = json.loads(node("classify.js", shared.repo, shared.folder / "example.png", cwd=transformers_js.parent))
    model = DeiTTiForImageClassification.from_pretrained(shared.folder).eval()
    image = Image.open(shared.folder / "example.png").convert("RGB")
    expected = model(**AutoImageProcessor.from_pretrained(shared.folder)(image, return_tensors="pt")).logits[0]
    found = next(answer for answer in answers if answer["preprocessing"] == "ours")
    np.testing.assert_allclose(found["logits"], expected.numpy(), atol=1e-2, rtol=0)

    (block,) = re.findall(r"```js\n(.*?)```", (shared.folder / "README.md").read_text(), re.DOTALL)
    shutil.copytree(shared.folder / "transformers", tmp_path / "transformers")
    shutil.copy(shared.folder / "example.png", tmp_path)
    (tmp_path / "node_modules").symlink_to(transformers_js)
    (tmp_path / "card.mjs").write_text(block)
    assert re.search(r"label: '(\d)'", node("card.mjs", cwd=tmp_path))[1] == found["label"]


@pytest.mark.parametrize("mode", MODES)
def test_every_way_of_loading_predicts_the_same_on_1000_cifar10_images(
    mode, cifar10_images, modes_on_the_hub, strangers
):
    logits = strangers.logits[modes_on_the_hub[mode]]
    assert logits.keys() == {"native", "transformers", "timm", "onnx"}
    assert len(np.unique(logits["native"].argmax(-1))) > 3  # the predictions vary
    for way in logits:
        assert logits[way].shape == (1000, 10)
        np.testing.assert_allclose(logits[way], logits["native"], atol=1e-4, rtol=0, err_msg=way)
        np.testing.assert_array_equal(logits[way].argmax(-1), logits["native"].argmax(-1), err_msg=way)


# ---- Forbidden pushes ----


REFUSED = {
    "without a token": ({}, "tester/refused"),
    "with an unknown token": ({"HF_TOKEN": TOKEN[::-1]}, "tester/refused"),
    "with a read-only token": ({"HF_TOKEN": "hf_stand_in_read"}, "tester/refused"),
    "to somebody else's repository": ({"HF_TOKEN": "hf_stand_in_write"}, "somebody/refused"),
}


def run_command_several_times(calls: list[tuple[list[str], dict[str, str]]]) -> None:
    """Runs `train_hf.py` with each call's flags and variables, in one process, since importing takes seconds."""
    import contextlib
    import io
    import json
    import os
    import runpy
    import sys

    answers = []
    for flags, variables in calls:
        os.environ |= variables
        sys.argv = ["train_hf.py", *flags]
        output, errors, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                runpy.run_path("train_hf.py", run_name="__main__")
            except SystemExit as exit:
                code = exit.code
        answers.append({"code": code, "output": output.getvalue(), "errors": errors.getvalue()})
    json.dump(answers, sys.stdout)


@pytest.fixture(scope="module")
def refused(hub, tmp_path_factory) -> dict[str, dict]:
    folder, seen = tmp_path_factory.mktemp("refused"), len(hub.requests)
    flags = [*QUICK, "--distill_mode=none", f"--output_dir={folder / 'run'}"]
    calls = [([*flags, f"--hub_model_id={repo}"], variables) for variables, repo in REFUSED.values()]
    answers = json.loads(run_alone(run_command_several_times, calls, env=hub.env(), cwd=REPOSITORY, isolated=False))
    assert not list(folder.iterdir())
    assert not [request for request in hub.requests[seen:] if request.operation in ("preupload", "commit")]
    return dict(zip(REFUSED, answers, strict=True))


@pytest.mark.parametrize("push", REFUSED)
def test_a_forbidden_push_is_refused_before_training_with_one_message_and_code_2(push, hub, refused):
    answer, repo = refused[push], REFUSED[push][1]
    assert answer["code"] == 2
    (message,) = answer["errors"].splitlines()
    assert message.startswith("train_hf.py: error: --push_to_hub: ")
    assert "hf auth login" in message or "token is read-only" in message
    assert not answer["output"]
    with pytest.raises(KeyError):
        hub.files(repo)


# ---- A Hub that fails, and a run that moves to another machine ----


INTERRUPTED_FLAGS = [
    *("--distill_mode=none", "--num_train_epochs=2", "--mixup=0.8", "--drop_path_rate=0.1"),
    *("--hub_private_repo=true", "--hub_strategy=checkpoint"),
]


class Interrupted(NamedTuple):
    first: Path
    first_output: subprocess.CompletedProcess
    second: Path
    second_output: subprocess.CompletedProcess
    resumed_from: dict[str, bytes]  # what the repository held


@pytest.fixture(scope="module")
def interrupted(hub, tmp_path_factory) -> Interrupted:
    """
    A run of two epochs whose Hub refuses commits after the first epoch, so that the repository is as if the machine
    had died there; and the same run, resumed on another machine, whose Hub then fails to store large files.
    """
    root = tmp_path_factory.mktemp("interrupted")
    folders = root / "first machine", root / "second machine"
    for folder in folders:  # the last stage of a recipe trains beside those before it
        (folder / "stage-1" / "checkpoint-8").mkdir(parents=True)
        for place in ("", "checkpoint-8"):
            (folder / "stage-1" / place / SETTINGS_FILE).write_text("{}")
    flags = [*INTERRUPTED_FLAGS, f"--hub_model_id={RESUMED.partition('/')[2]}"]
    hub.fail_next("commit", status=403, after=2, times=1000)  # the model and the checkpoint of the first epoch
    first = train(*flags, f"--output_dir={folders[0]}", env=hub.env(TOKEN))
    hub.recover()
    repository = hub.files(RESUMED)
    hub.fail_next("lfs-upload", status=507, times=1000)
    resume = "--resume_from_checkpoint=last-checkpoint"
    second = train(*flags, f"--output_dir={folders[1]}", resume, env=hub.env(TOKEN))
    hub.recover()
    return Interrupted(folders[0], first, folders[1], second, repository)


@pytest.mark.parametrize("machine", ["first", "second"])
def test_a_failed_push_leaves_a_complete_run_and_the_command_to_push_it_later(hub, interrupted, machine):
    folder, output = getattr(interrupted, machine), getattr(interrupted, f"{machine}_output")
    assert output.returncode == 1, output.stderr
    assert "Traceback" not in output.stderr
    for file in ("model.safetensors", "README.md", "all_results.json", "transformers/model.safetensors"):
        assert (folder / file).is_file()
    assert "the run is finished and saved" in output.stderr

    *_, line = output.stderr.splitlines()
    (command,) = re.findall(r"^train_hf\.py: error: the run is finished .* hf (upload .+)$", line)
    hf = [str(Path(sys.executable).with_name("hf")), *shlex.split(command)]
    result = subprocess.run(hf, cwd=REPOSITORY, env=hub.env(TOKEN), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    stored = hub.files(RESUMED)
    stored.pop(".gitattributes")
    assert without(stored, "last-checkpoint/") == without(contents(folder), "checkpoint-", "stage-", SETTINGS_FILE)


def test_a_failed_checkpoint_push_is_reported_in_one_line_and_training_continues(interrupted):
    for output, epoch_ends in ((interrupted.first_output, ["8"]), (interrupted.second_output, ["8"])):
        told = re.findall(
            r"^Hub: checkpoint-(\d+) was not pushed \(.+\); training continues", output.stdout, re.MULTILINE
        )
        assert told == epoch_ends


def test_a_run_stopped_during_its_push_is_pushed_by_the_same_command(hub, interrupted, tmp_path):
    repo = "tester/deit-ti-late"
    shutil.copytree(interrupted.second, tmp_path / "run")
    before = contents(tmp_path / "run")
    flags = [*QUICK, *INTERRUPTED_FLAGS, f"--hub_model_id={repo}", f"--output_dir={tmp_path / 'run'}"]
    flags.append("--resume_from_checkpoint=last-checkpoint")
    fault = json.dumps({"function": "huggingface_hub.HfApi.upload_folder", "signum": signal.SIGTERM})
    command = [sys.executable, "tests/real_command.py", fault, *flags]
    stopped = subprocess.run(command, cwd=REPOSITORY, env=hub.env(TOKEN), capture_output=True, text=True)
    assert stopped.returncode == 75, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == "train_hf.py: stopped by SIGTERM. Run the same command again to resume."
    assert hub.files(repo).keys() == {".gitattributes"}
    again = train(*flags[len(QUICK) :], env=hub.env(TOKEN))
    assert again.returncode == 0 and "Student: finished by an earlier run" in again.stdout, again.stderr
    assert hub.files(repo)["model.safetensors"] == before["model.safetensors"]
    assert contents(tmp_path / "run") == before


def test_resuming_elsewhere_from_the_hubs_last_checkpoint_gives_the_same_weights(interrupted):
    assert json.loads(interrupted.resumed_from["last-checkpoint/trainer_state.json"])["epoch"] == 1
    states = [
        json.loads((folder / "trainer_state.json").read_text()) for folder in (interrupted.first, interrupted.second)
    ]
    assert [state["epoch"] for state in states] == [2, 2]
    uninterrupted, resumed = (
        load_file(folder / "model.safetensors") for folder in (interrupted.first, interrupted.second)
    )
    assert uninterrupted.keys() == resumed.keys()
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in resumed)


def classify(folder: str, image: str) -> None:
    from transformers import pipeline

    print(pipeline("image-classification", folder, trust_remote_code=True)(image, top_k=10))


def test_what_was_pushed_during_training_can_be_loaded(hub, interrupted, tmp_path):
    pushed = without(interrupted.resumed_from, "last-checkpoint/")
    assert pushed.keys() == {
        *(".gitattributes", "config.json", "configuration_deit_ti.py", "model.safetensors", "modeling_deit_ti.py"),
        *("preprocessor_config.json", "training_args.bin"),
    }
    for path, content in pushed.items():
        (tmp_path / path).write_bytes(content)
    image = str(interrupted.first / "example.png")
    assert run_alone(classify, str(tmp_path), image, env=hub.env(), cwd=tmp_path).count("'label'") == 10


def test_a_private_repository_is_only_visible_to_its_owner(hub, interrupted):
    def info(**headers: str) -> dict:
        request = urllib.request.Request(f"{hub.endpoint}/api/models/{RESUMED}", headers=headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    assert info(Authorization=f"Bearer {TOKEN}")["private"] is True
    with pytest.raises(urllib.error.HTTPError, match="401"):
        info()


def test_a_token_in_the_environment_appears_nowhere_either(hub, interrupted):
    for files in (interrupted.resumed_from, contents(interrupted.first), contents(interrupted.second)):
        assert not [path for path, content in files.items() if TOKEN.encode() in content]
    for output in (interrupted.first_output, interrupted.second_output):
        assert TOKEN not in output.stdout + output.stderr

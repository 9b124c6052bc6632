"""A Hub that fails briefly or for good: what is retried, what is reported, and what is left behind."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_stand_in import HubStandIn, hub_fixture  # noqa: F401
from huggingface_hub import HfApi
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from modeling_deit_ti import hub as hub_calls
from modeling_deit_ti.checkpoints import seal, why_unusable
from modeling_deit_ti.classifiers import load_classifier, load_image_processor
from modeling_deit_ti.errors import StorageError, UserError, first_line
from modeling_deit_ti.outcome import push
from modeling_deit_ti.preflight import check_hub_access, checkpoint_to_resume


REPO = "tester/tiny"
TOKEN = "hf_" + "Stranger" * 4
# Transient failures: the Hub is busy, broken, hangs up without a response, or in the middle of one (or of an upload).
PASSING = {"429": {"status": 429}, "500": {"status": 500}, "dropped": {"drop": True}, "cut": {"cut": True}}


@pytest.fixture
def online(hub: HubStandIn, monkeypatch, tmp_path) -> HubStandIn:
    """The stand-in as this process's Hub, and no waiting between retries."""
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return hub


@pytest.fixture
def finished(tmp_path) -> Path:
    """A run's folder, as far as it matters to a push."""
    folder = tmp_path / "run"
    (folder / "checkpoint-4").mkdir(parents=True)
    shutil.copytree(folder / "checkpoint-4", folder / "stage-1" / "checkpoint-4")
    for place in ("checkpoint-4", "stage-1", "stage-1/checkpoint-4"):
        (folder / place / "model.safetensors").write_bytes(b"not pushed")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# tiny\n")
    (folder / "all_results.json").write_text('{"eval_accuracy": 0.9}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 300)
    return folder


def arguments(folder: Path, hub: HubStandIn, **changes) -> SimpleNamespace:
    """The arguments of a run that concern the Hub."""
    own = {"output_dir": str(folder), "hub_model_id": REPO, "hub_token": hub.token, "hub_revision": None}
    return SimpleNamespace(**own, hub_private_repo=None, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- Pushes ----


@pytest.mark.parametrize("failure", PASSING)
@pytest.mark.parametrize("operation", ["validate-yaml", "preupload", "lfs-batch", "lfs-upload", "commit"])
def test_a_push_recovers_from_transient_failures(operation, failure, online, finished, caplog):
    HfApi(token=online.token).create_repo(REPO)
    before = contents(finished)
    online.fail_next(operation, **PASSING[failure])
    push(arguments(finished, online))
    stored = online.files(REPO)
    stored.pop(".gitattributes")
    local = "checkpoint-", "stage-"
    assert stored == {path: content for path, content in before.items() if not path.startswith(local)}
    assert contents(finished) == before
    assert [request.status for request in online.requests if request.operation == "lfs-upload"][-1] == 200
    told = [record.getMessage() for record in caplog.records if record.name == hub_calls.__name__]
    # Reported once, unless huggingface_hub itself has retried the request.
    assert len(told) == (operation in ("validate-yaml", "commit"))
    assert all(re.fullmatch(r"Hub: .*; retrying in 1 s", line) for line in told)


LASTING = {
    "a full quota": ("commit", {"status": 403}, 1),
    "no room for large files": ("lfs-upload", {"status": 507}, 1),
    "an expired token": ("commit", {"status": 401}, 1),
    "a Hub that stays down": ("commit", {"status": 503}, 4),
    "a Hub that keeps hanging up": ("commit", {"drop": True}, 4),
}


@pytest.mark.parametrize("failure", LASTING)
def test_a_failed_push_leaves_the_run_intact_and_gives_the_command_in_one_line(failure, online, finished):
    operation, fault, tries = LASTING[failure]
    HfApi(token=online.token).create_repo(REPO)
    before = contents(finished)
    online.fail_next(operation, times=1000, **fault)
    with pytest.raises(StorageError) as refusal:
        push(arguments(finished, online))
    message = str(refusal.value)
    assert "\n" not in message
    assert message.startswith(f"the run is finished and saved in {finished}, but the push failed (")
    assert f"hf upload {REPO} {finished} . --exclude" in message
    assert len([request for request in online.requests if request.operation == operation]) == tries
    assert contents(finished) == before and set(online.files(REPO)) == {".gitattributes"}
    online.recover()
    push(arguments(finished, online))
    assert "all_results.json" in online.files(REPO)


@pytest.mark.parametrize("failure", ["429", "500", "dropped"])
@pytest.mark.parametrize("operation", ["whoami", "create-repo", "auth-check"])
def test_access_is_checked_even_if_the_hub_fails_once(operation, failure, online, tmp_path):
    online.fail_next(operation, **PASSING[failure])
    args = arguments(tmp_path / "new", online)
    args.hub_model_id = "tiny"
    check_hub_access(args)
    assert args.hub_model_id == REPO and set(online.files(REPO)) == {".gitattributes"}


def test_a_finished_run_is_only_pushed_once(online, finished):
    args = arguments(finished, online)
    check_hub_access(args)
    push(args)
    with pytest.raises(UserError, match=f"already holds a finished run, which was pushed to {REPO}:"):
        check_hub_access(args)
    (finished / "all_results.json").write_text('{"eval_accuracy": 0.95}')  # another run, for the same repository
    check_hub_access(args)


# ---- Downloads ----


@pytest.fixture
def classifier(online, tmp_path) -> tuple[str, torch.Tensor]:
    """A classifier on the Hub: its repository, new to the client in this process, and its head's weights."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=8, num_labels=3))
    model.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    api = HfApi(token=online.token)
    repo = api.create_repo(f"tester/{tmp_path.name}").repo_id
    api.upload_folder(repo_id=repo, folder_path=tmp_path / "vit")
    return repo, model.classifier.weight


@pytest.mark.parametrize("failure", PASSING)
@pytest.mark.parametrize("operation", ["resolve", "lfs-download"])
def test_a_download_recovers_from_transient_failures(operation, failure, online, classifier):
    repo, weight = classifier
    online.fail_next(operation, **PASSING[failure], times=2)
    model, missing = load_classifier(repo, "--model")
    assert torch.equal(model.classifier.weight, weight) and missing == []


def test_a_download_that_keeps_failing_ends_in_one_message(online, classifier):
    repo, weight = classifier
    online.fail_next("lfs-download", times=1000)
    with pytest.raises(UserError, match=rf"^--model {repo}: .* could be loaded from the Hub \(OSError: .*\)"):
        load_classifier(repo, "--model")
    online.recover()
    model, _ = load_classifier(repo, "--model")  # a partial file is not taken for a whole one
    assert torch.equal(model.classifier.weight, weight)
    load_image_processor(repo, "--model")


@pytest.mark.parametrize("operation", ["info", "lfs-download"])
def test_a_pushed_checkpoint_is_fetched_even_if_the_hub_fails_once(operation, online, tmp_path):
    api = HfApi(token=online.token)
    api.create_repo(REPO)
    (tmp_path / "pushed").mkdir()
    (tmp_path / "pushed" / "optimizer.pt").write_bytes(b"state")
    seal(tmp_path / "pushed")
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "pushed", path_in_repo="last-checkpoint")
    online.fail_next(operation)
    args = arguments(tmp_path / "run", online, resume_from_checkpoint="last-checkpoint", process_index=0)
    assert why_unusable(checkpoint_to_resume(args)) is None


@pytest.mark.parametrize("file", ["optimizer_0/.metadata", "global_step4/mp_rank_00_model_states.pt"])
def test_a_pushed_checkpoint_that_would_be_unpickled_is_refused(file, online, tmp_path):
    api = HfApi(token=online.token)
    api.create_repo(REPO)
    api.upload_file(repo_id=REPO, path_or_fileobj=b"pickle", path_in_repo=f"last-checkpoint/{file}")
    args = arguments(tmp_path / "run", online, resume_from_checkpoint="last-checkpoint", process_index=0)
    with pytest.raises(UserError, match=rf"last-checkpoint: its {Path(file).name} would be unpickled, which can run"):
        checkpoint_to_resume(args)


# ---- Error messages ----


@pytest.mark.parametrize("token", [TOKEN + "\n", TOKEN + "\0"])
def test_a_token_that_is_not_a_valid_header_is_not_shown(token, online):
    with pytest.raises(Exception) as refusal:  # noqa: B017 (the HTTP library's own)
        HfApi(token=token).whoami()
    assert TOKEN in str(refusal.value)
    assert TOKEN[:12] not in first_line(refusal.value)


def test_neither_tokens_nor_signatures_are_shown():
    address = "https://host/file?X-Amz-Algorithm=AWS4&X-Amz-Signature=5ecre7 (Request ID: 1)"
    error = ValueError(f"{TOKEN} is refused by {address}")
    assert first_line(error) == "ValueError: *** is refused by https://host/file?*** (Request ID: 1)"

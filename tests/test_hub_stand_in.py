"""The stand-in for the Hub, as seen by the real `huggingface_hub` and `transformers` over real HTTP."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_stand_in import LFS_PATTERNS, HubStandIn, hub_fixture  # noqa: F401
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx


REPO = "tester/tiny"
CARD = """---
library_name: transformers
pipeline_tag: image-classification
tags:
- vision
---

# tiny
"""
WEIGHTS = bytes(range(256)) * 300


@pytest.fixture
def api(hub: HubStandIn) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=hub.token)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run leaves: small text files, weights, a checkpoint in a subfolder, and a text file too large for git."""
    folder = tmp_path / "run"
    (folder / "last-checkpoint").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text('{"model_type": "deit_ti"}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "last-checkpoint" / "trainer_state.json").write_text('{"global_step": 3}')
    (folder / "log.txt").write_text("a line\n" * 1_600_000)
    return folder


def contents(folder: str | Path) -> dict[str, bytes]:
    files = (path for path in Path(folder).rglob("*") if path.is_file() and ".cache" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def operations(hub: HubStandIn) -> list[str]:
    return [request.operation for request in hub.requests]


def test_a_pushed_folder_is_stored_as_on_the_hub(hub: HubStandIn, api: HfApi, folder: Path) -> None:
    url = api.create_repo("tiny")
    assert (url.repo_id, url.url) == (REPO, f"{hub.endpoint}/{REPO}")
    commit = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="First push")

    stored = hub.files(REPO)
    assert stored.pop(".gitattributes").count(b"filter=lfs") == len(LFS_PATTERNS)
    assert stored == contents(folder)
    entries = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True) if hasattr(entry, "size")}
    large = {path for path, entry in entries.items() if entry.lfs}
    assert large == {"model.safetensors", "log.txt"}
    assert entries["model.safetensors"].lfs.size == len(WEIGHTS)
    assert [record.title for record in api.list_repo_commits(REPO)] == ["First push", "initial commit"]
    assert api.list_repo_commits(REPO)[0].commit_id == commit.oid


def test_the_token_is_sent_to_the_api_but_not_to_the_storage(hub: HubStandIn, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO, private=True)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    hf_hub_download(REPO, "model.safetensors", endpoint=hub.endpoint, token=hub.token, cache_dir=folder / "cache")
    assert "unknown" not in operations(hub)
    for request in hub.requests:
        assert request.authorized == (request.operation not in ("lfs-upload", "lfs-download")), request


def test_downloads_into_an_empty_cache_give_the_same_bytes(
    hub: HubStandIn, api: HfApi, folder: Path, tmp_path: Path
) -> None:
    api.create_repo(REPO)
    commit = api.upload_folder(repo_id=REPO, folder_path=folder)
    snapshot = snapshot_download(REPO, endpoint=hub.endpoint, cache_dir=tmp_path / "cache1")
    assert Path(snapshot).name == commit.oid
    assert contents(snapshot) == hub.files(REPO)
    for name in ("model.safetensors", "config.json", "last-checkpoint/trainer_state.json"):
        file = hf_hub_download(REPO, name, endpoint=hub.endpoint, cache_dir=tmp_path / "cache2")
        assert Path(file).read_bytes() == (folder / name).read_bytes()

    asked = len(hub.requests)
    assert snapshot_download(REPO, endpoint=hub.endpoint, cache_dir=tmp_path / "cache1") == snapshot
    assert operations(hub)[asked:] == ["info"]


def test_a_range_of_bytes_can_be_requested(hub: HubStandIn, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    for path, content in (("model.safetensors", WEIGHTS), ("README.md", CARD.encode())):
        url = f"{hub.endpoint}/{REPO}/resolve/main/{path}"
        answer = httpx.get(url, headers={"Range": "bytes=10-19"}, follow_redirects=True)
        assert (answer.status_code, answer.content) == (206, content[10:20])
        assert answer.headers["Content-Range"] == f"bytes 10-19/{len(content)}"
        answer = httpx.get(url, headers={"Range": "bytes=20-"}, follow_redirects=True)
        assert answer.content == content[20:]


def test_model_info_comes_from_the_card_and_the_files(hub: HubStandIn, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO, private=True)
    first = api.model_info(REPO).sha
    commit = api.upload_folder(repo_id=REPO, folder_path=folder)
    info = api.model_info(REPO, files_metadata=True)
    assert (info.id, info.author, info.sha, info.private) == (REPO, "tester", commit.oid, True)
    assert (info.library_name, info.pipeline_tag, info.tags) == ("transformers", "image-classification", ["vision"])
    assert info.config == {"model_type": "deit_ti"}
    assert {sibling.rfilename for sibling in info.siblings} == set(hub.files(REPO))
    weights = next(sibling for sibling in info.siblings if sibling.rfilename == "model.safetensors")
    assert weights.size == weights.lfs.size == len(WEIGHTS)
    assert [sibling.rfilename for sibling in api.model_info(REPO, revision=first).siblings] == [".gitattributes"]


def test_whoami_reports_the_role_of_a_token(hub: HubStandIn) -> None:
    hub.tokens["hf_fine"] = "fineGrained"
    for token, role in ((hub.token, "write"), (hub.read_token, "read"), ("hf_fine", "fineGrained")):
        user = HfApi(endpoint=hub.endpoint, token=token).whoami()
        assert (user["name"], user["auth"]["accessToken"]["role"]) == ("tester", role)


def test_an_invalid_token_has_its_own_error(hub: HubStandIn, api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO)
    stranger = HfApi(endpoint=hub.endpoint, token="hf_nobody")
    with pytest.raises(HfHubHTTPError, match="Invalid user token") as refusal:
        stranger.whoami()
    assert refusal.value.response.status_code == 401
    # Even for the public repository: the Hub reports the invalid token, not a missing repository.
    for call in (
        lambda: stranger.model_info(REPO),
        lambda: stranger.create_repo(REPO, exist_ok=True),
        lambda: stranger.hf_hub_download(REPO, ".gitattributes", cache_dir=tmp_path / "cache"),
    ):
        with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as refusal:
            call()
        assert refusal.value.response.status_code == 401
        assert not isinstance(refusal.value, RepositoryNotFoundError)


def test_a_read_only_token_can_read_but_not_write(hub: HubStandIn, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO, private=True)
    reader = HfApi(endpoint=hub.endpoint, token=hub.read_token)
    assert reader.model_info(REPO).private
    reader.auth_check(REPO)
    for call in (
        lambda: reader.auth_check(REPO, write=True),
        lambda: reader.create_repo("tester/other", exist_ok=True),
        lambda: reader.upload_folder(repo_id=REPO, folder_path=folder),
        lambda: reader.delete_repo(REPO),
    ):
        with pytest.raises(HfHubHTTPError) as refusal:
            call()
        assert refusal.value.response.status_code == 403
    answer = httpx.post(
        f"{hub.endpoint}/api/models/{REPO}/commit/main",
        content=b'{"key": "header", "value": {"summary": "sneaky"}}',
        headers={"Authorization": f"Bearer {hub.read_token}"},
    )
    assert answer.status_code == 403
    assert set(hub.files(REPO)) == {".gitattributes"}


def test_somebody_elses_namespace_cannot_be_written_to(api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError, match="under the namespace 'google'") as refusal:
        api.create_repo("google/vit", exist_ok=True)
    assert refusal.value.response.status_code == 403


def test_a_repository_can_only_be_created_once(api: HfApi) -> None:
    api.create_repo(REPO)
    with pytest.raises(HfHubHTTPError, match="already created this model repo") as refusal:
        api.create_repo(REPO)
    assert refusal.value.response.status_code == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_a_private_repository_is_not_found_without_a_token(hub: HubStandIn, api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO, private=True)
    anyone = HfApi(endpoint=hub.endpoint, token=False)
    with pytest.raises(RepositoryNotFoundError):
        anyone.model_info(REPO)
    with pytest.raises(RepositoryNotFoundError):
        anyone.hf_hub_download(REPO, ".gitattributes", cache_dir=tmp_path / "cache")
    with pytest.raises(RepositoryNotFoundError):
        anyone.snapshot_download(REPO, cache_dir=tmp_path / "cache")
    assert api.hf_hub_download(REPO, ".gitattributes", cache_dir=tmp_path / "cache")


def test_missing_repositories_files_and_revisions_raise_their_own_errors(
    hub: HubStandIn, api: HfApi, tmp_path: Path
) -> None:
    api.create_repo(REPO)
    for token in (hub.token, False):
        client = HfApi(endpoint=hub.endpoint, token=token)
        with pytest.raises(RepositoryNotFoundError):
            client.model_info("tester/nothing")
        with pytest.raises(RepositoryNotFoundError):
            client.hf_hub_download("nothing", "config.json", cache_dir=tmp_path / "cache")
        with pytest.raises(EntryNotFoundError):
            client.hf_hub_download(REPO, "config.json", cache_dir=tmp_path / "cache")
        with pytest.raises(RevisionNotFoundError):
            client.hf_hub_download(REPO, ".gitattributes", revision="v9", cache_dir=tmp_path / "cache")
        assert not client.file_exists(REPO, "config.json")
    with pytest.raises(RepositoryNotFoundError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="tester/nothing")
    with pytest.raises(KeyError, match="tester/nothing"):
        hub.files("tester/nothing")


def test_every_commit_branch_and_tag_stays_readable(hub: HubStandIn, api: HfApi, tmp_path: Path) -> None:
    def pushed(content: bytes, **where: str) -> str:
        return api.upload_file(path_or_fileobj=content, path_in_repo="a/b.txt", repo_id=REPO, **where).oid

    def read(revision: str) -> bytes:
        file = api.hf_hub_download(REPO, "a/b.txt", revision=revision, cache_dir=tmp_path / "cache")
        return Path(file).read_bytes()

    api.create_repo(REPO)
    first = pushed(b"first")
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="try/this")
    second = pushed(b"second")
    pushed(b"third", revision="try/this")
    assert [read(revision) for revision in (first, "v1", second, "main", "try/this")] == [
        b"first",
        b"first",
        b"second",
        b"second",
        b"third",
    ]
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
    assert {ref.name for ref in refs.branches} == {"main", "try/this"}
    with pytest.raises(HfHubHTTPError) as refusal:
        pushed(b"late", parent_commit=first)
    assert refusal.value.response.status_code == 412

    api.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v1")
    api.delete_folder("a", repo_id=REPO)
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert hub.files(REPO, revision=second)["a/b.txt"] == b"second"


def test_folders_can_be_listed(api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder, allow_patterns=["*.json"])
    top = {entry.path for entry in api.list_repo_tree(REPO)}
    assert top == {".gitattributes", "config.json", "last-checkpoint"}
    inside = api.list_repo_tree(REPO, "last-checkpoint", expand=True)
    assert [entry.path for entry in inside] == ["last-checkpoint/trainer_state.json"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "chat_templates"))
    asked = api.get_paths_info(REPO, ["config.json", "last-checkpoint", "nothing"])
    assert {entry.path for entry in asked} == {"config.json", "last-checkpoint"}


def test_a_push_that_fails_at_the_commit_leaves_nothing_and_the_next_one_completes(
    hub: HubStandIn, api: HfApi, folder: Path
) -> None:
    api.create_repo(REPO)
    for fault in ({"status": 500}, {"drop": True}):
        hub.fail_next("commit", **fault)
        with pytest.raises((HfHubHTTPError, httpx.RemoteProtocolError)):
            api.upload_folder(repo_id=REPO, folder_path=folder)
        assert set(hub.files(REPO)) == {".gitattributes"}
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert contents(folder).items() <= hub.files(REPO).items()
    # The large files had arrived the first time, and were not sent again.
    assert operations(hub).count("lfs-upload") == 2
    assert [request.status for request in hub.requests if request.operation == "commit"] == [500, None, 200]


def test_a_push_that_fails_at_a_large_file_completes_when_repeated(hub: HubStandIn, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    hub.fail_next("lfs-upload", status=507, after=1)
    with pytest.raises(RuntimeError, match="Error while uploading") as failure:
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert failure.value.__cause__.response.status_code == 507
    assert "commit" not in operations(hub)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert contents(folder).items() <= hub.files(REPO).items()
    assert operations(hub).count("lfs-upload") == 3


def test_the_client_recovers_from_a_brief_failure_by_itself(hub: HubStandIn, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    hub.fail_next("lfs-upload", status=503)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert contents(folder).items() <= hub.files(REPO).items()
    assert sorted(str(r.status) for r in hub.requests if r.operation == "lfs-upload") == ["200", "200", "503"]


def test_failures_can_be_cancelled_and_must_name_a_known_operation(hub: HubStandIn, api: HfApi) -> None:
    hub.fail_next(after=1, times=100)
    assert api.whoami()["name"] == "tester"
    with pytest.raises(HfHubHTTPError, match="told to fail"):
        api.whoami()
    hub.recover()
    assert api.whoami()["name"] == "tester"
    with pytest.raises(ValueError, match="'any' or one of whoami,"):
        hub.fail_next("comit")


def test_an_unchanged_folder_makes_no_second_commit(hub: HubStandIn, api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid
    assert operations(hub).count("commit") == 1


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ("tags: [vision", "YAML metadata error"),
        (
            "model-index:\n- name: tiny\n  results:\n  - task: {type: x}\n    metrics: []",
            r"dataset\.type.* is required",
        ),
    ],
)
def test_a_card_that_the_hub_would_refuse_is_refused_before_the_upload(
    hub: HubStandIn, api: HfApi, folder: Path, metadata: str, complaint: str
) -> None:
    api.create_repo(REPO)
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(ValueError, match=f"(?s)Invalid metadata in README.md.*{complaint}"):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert operations(hub) == ["create-repo", "validate-yaml"]


def test_repositories_outlive_the_server(tmp_path: Path, hub: HubStandIn) -> None:
    # `hub` is only here to set up the client in this process.
    with HubStandIn(tmp_path / "kept") as first:
        api = HfApi(endpoint=first.endpoint, token=first.token)
        api.create_repo(REPO, private=True)
        api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.safetensors", repo_id=REPO)
    with HubStandIn(tmp_path / "kept") as second:
        assert second.files(REPO)["model.safetensors"] == WEIGHTS
        assert HfApi(endpoint=second.endpoint, token=second.token).model_info(REPO).private


def test_datasets_are_kept_apart_from_models(hub: HubStandIn, api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO, repo_type="dataset")
    where = {"repo_id": REPO, "repo_type": "dataset"}
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="train.parquet", **where)
    file = api.hf_hub_download(filename="train.parquet", cache_dir=tmp_path / "cache", **where)
    assert Path(file).read_bytes() == hub.files(REPO, repo_type="dataset")["train.parquet"] == WEIGHTS
    assert not api.repo_exists(REPO)


PUSH_AND_LOAD = """
import json
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

torch.manual_seed(0)
config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
                   patch_size=4, num_labels=3)
model = ViTForImageClassification(config).eval()
model.save_pretrained("vit", push_to_hub=True, repo_id="vit", private=True)
ViTImageProcessor(size={"height": 8, "width": 8}).push_to_hub("vit")

loaded = AutoModelForImageClassification.from_pretrained("tester/vit")
processor = AutoImageProcessor.from_pretrained("tester/vit")
images = torch.rand(2, 3, 8, 8)
print(json.dumps({
    "class": type(loaded).__name__,
    "same": torch.equal(model(images).logits, loaded(images).logits),
    "size": [processor.size["height"], processor.size["width"]],
    "parameters": sum(parameter.numel() for parameter in loaded.parameters()),
}))
"""


def test_transformers_pushes_and_loads_a_model_in_a_subprocess(hub: HubStandIn, tmp_path: Path) -> None:
    environment = hub.env(token=hub.token)
    assert list(Path(environment["HF_HOME"]).iterdir()) == []
    run = subprocess.run(
        [sys.executable, "-c", PUSH_AND_LOAD],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert seen == {"class": "ViTForImageClassification", "same": True, "size": [8, 8], "parameters": 1083}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(hub.files("tester/vit"))
    assert json.loads(hub.files("tester/vit")["config.json"])["hidden_size"] == 8
    downloaded = [r.path.rsplit("/", 1)[1] for r in hub.requests if r.operation == "resolve" and r.method == "GET"]
    assert {"config.json", "preprocessor_config.json"} <= set(downloaded)
    assert "lfs-download" in operations(hub)
    assert "unknown" not in operations(hub)

"""A local stand-in for the Hugging Face Hub, for tests.

It speaks the part of the Hub's HTTP protocol that `huggingface_hub` 2.4 uses to create, fill, list and download
repositories, and keeps them on disk. The real client, `transformers` and `Trainer` talk to it over real HTTP: nothing
is mocked on their side. It is a stand-in, not the Hub: no pull requests, no organisations, no Xet storage, no
`.gitignore` rules, no pagination.

In a subprocess, which reads `HF_ENDPOINT` when it imports `huggingface_hub`:

    with HubStandIn(tmp_path) as hub:
        subprocess.run([sys.executable, "train_hf.py", "--push_to_hub"], env=hub.env(token=hub.token), check=True)
        assert "model.safetensors" in hub.files(f"{hub.user}/my-model")

In the test's own process, with the `hub` fixture, pass `endpoint=hub.endpoint` and `token=...` explicitly:

    HfApi(endpoint=hub.endpoint, token=hub.token).model_info(f"{hub.user}/my-model")
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml  # a dependency of huggingface_hub itself, so it is always there


# A new repository on the Hub starts with a `.gitattributes` that lists what git LFS stores: these patterns and more,
# all of them binary files, which `preupload` also recognises.
LFS_PATTERNS = ("*.bin", "*.ckpt", "*.h5", "*.npz", "*.onnx", "*.parquet", "*.pt", "*.pth", "*.safetensors", "*.zip")
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
REGULAR_FILE_LIMIT = 10 * 1024 * 1024  # bytes; the Hub stores anything larger with git LFS

# Variables that a subprocess does not inherit: a developer's own token, cache or offline switch must not decide what a
# test sees.
CLEARED_PREFIXES = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE")

WRITING_ROLES = ("write", "fineGrained")

_REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # no leading dot: an id must not lead out of the folder
_YAML_BLOCK = re.compile(r"^\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)


@dataclass
class Request:
    """A request that reached the stand-in; `HubStandIn.requests` has them in order of arrival."""

    operation: str
    """Name of the route (a key of `OPERATIONS`), or `"unknown"` for a path the stand-in does not know."""
    method: str
    path: str
    authorized: bool
    """Whether there was an `Authorization` header, valid or not."""
    status: int | None = None
    """HTTP status of the response; `None` if the connection was dropped instead."""


@dataclass
class Reply:
    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    operation: str
    status: int
    times: int
    after: int
    drop: bool
    cut: bool


class Refused(Exception):
    """A refusal. The client turns `code` into one of its error types."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.reply = Reply({"error": message}, status, {"X-Error-Message": message, **(headers or {})})
        if code is not None:
            self.reply.headers["X-Error-Code"] = code


@dataclass
class Call:
    """A request on its way to its route: the path's named parts, unquoted, and the body."""

    role: str | None
    """Role of the token (`"read"`, `"write"`, `"fineGrained"`), `None` without one."""
    parts: dict[str, str]
    query: dict[str, list[str]]
    headers: Any
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


class Repo:
    """A repository on disk: one JSON file of refs and commits. A commit maps each path to its object."""

    def __init__(self, file: Path, state: dict[str, Any] | None = None):
        self.file = file
        self.state = json.loads(file.read_text()) if state is None else state

    def save(self) -> None:
        # Written to another file and renamed: a test that kills the stand-in never leaves half a file.
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_suffix(".tmp")
        beside.write_text(json.dumps(self.state, indent=1))
        beside.replace(self.file)

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag, a full ref or a (possibly shortened) commit hash stands for."""
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        for refs in (self.state["branches"], self.state["tags"]):
            if name in refs:
                return refs[name]
        if len(revision) >= 7:
            for commit in self.state["commits"]:
                if commit.startswith(revision):
                    return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, commit: str) -> dict[str, dict[str, Any]]:
        return self.state["commits"][commit]["files"]

    def commit(self, branch: str, title: str, description: str, files: dict[str, dict[str, Any]]) -> str:
        parent = self.state["branches"].get(branch)
        record = {"parent": parent, "title": title, "message": description, "date": _now(), "files": files}
        # The number of commits so far tells apart two equal commits in the same millisecond.
        seed = json.dumps([record, len(self.state["commits"])], sort_keys=True)
        commit = hashlib.sha1(seed.encode()).hexdigest()
        self.state["commits"][commit] = record
        self.state["branches"][branch] = commit
        self.save()
        return commit


class HubStandIn:
    """The stand-in's server, which runs inside a `with` block. A second one on the same folder finds the repositories
    of the first.

    Args:
        folder (`Path`):
            Where repositories, and the empty `HF_HOME`s that `env` hands out, are kept.
        user (`str`, *optional*, defaults to `"tester"`):
            The account that both tokens belong to, the only one with a namespace.
    """

    def __init__(self, folder: str | Path, user: str = "tester"):
        self.folder = Path(folder) / "hub-stand-in"
        self.user = user
        self.token = "hf_stand_in_write"
        self.read_token = "hf_stand_in_read"
        self.tokens = {self.token: "write", self.read_token: "read"}
        """Every valid token and its role; a test may add more, including `"fineGrained"` ones."""
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        (self.folder / "objects").mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "HubStandIn":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True  # a client's kept-alive connection must not hold up the end of a test
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # ------------------------------------------------------------------------------------------- what a test uses

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def _storage(self) -> str:
        # The Hub keeps large files on another host, to which the client must not send its token. To the client,
        # another name for this machine is another origin, so the stand-in has that boundary too.
        return f"http://localhost:{self._server.server_port}/storage"

    def env(self, token: str | None = None, **extra: str) -> dict[str, str]:
        """A complete environment for a subprocess, with a fresh `HF_HOME`."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(CLEARED_PREFIXES)}
        ours = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": tempfile.mkdtemp(prefix="hf-home-", dir=self.folder),
            # With `hf_xet` installed, the client uploads every large file through Xet without asking whether the
            # repository is Xet-enabled: no server response can make it choose plain LFS. Only this variable can.
            "HF_HUB_DISABLE_XET": "1",
            # Otherwise, the client requests a list of coding agents before its first real request.
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return {**inherited, **ours, **({"HF_TOKEN": token} if token else {}), **extra}

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """The repository's files: path to content, including `.gitattributes`, as on the Hub."""
        with self._lock:
            repo = self._find(f"{repo_type}s", repo_id)
            if repo is None:
                raise KeyError(f"no {repo_type} {repo_id!r} on the stand-in")
            return {path: self._content(entry) for path, entry in repo.files(repo.resolve(revision)).items()}

    def fail_next(
        self,
        operation: str = "any",
        *,
        status: int = 500,
        times: int = 1,
        after: int = 0,
        drop: bool = False,
        cut: bool = False,
    ) -> None:
        """Make upcoming requests fail before they have any effect.

        The client itself retries some requests, up to five times, if the connection is dropped or the status is 408,
        429, 500, 502, 503 or 504: `preupload`, `lfs-batch`, `lfs-upload`, `lfs-verify`, `tree`, `commits` and the HEAD
        of `resolve`. A push that must fail there needs a status like 507, or `times=6`. Everything else, notably
        `commit`, is sent once.

        Args:
            operation (`str`, *optional*, defaults to `"any"`):
                A key of `OPERATIONS`, such as `"commit"` or `"lfs-upload"`, or `"any"`.
            status (`int`, *optional*, defaults to `500`):
                The HTTP status of the failure.
            times (`int`, *optional*, defaults to `1`):
                How many requests fail.
            after (`int`, *optional*, defaults to `0`):
                How many matching requests pass first.
            drop (`bool`, *optional*, defaults to `False`):
                Close the connection without a response instead of sending `status`.
            cut (`bool`, *optional*, defaults to `False`):
                Close it half-way through the upload instead, or, if the request has no body, through the response.
        """
        if operation != "any" and operation not in OPERATIONS:
            raise ValueError(f"unknown operation {operation!r}: use 'any' or one of {', '.join(OPERATIONS)}")
        with self._lock:
            self._faults.append(Fault(operation, status, times, after, drop, cut))

    def recover(self) -> None:
        """Cancel the failures that are still to come."""
        with self._lock:
            self._faults.clear()

    # ---------------------------------------------------------------------------------------------------- objects

    def _content(self, entry: dict[str, Any]) -> bytes:
        return (self.folder / "objects" / (entry["lfs"] or entry["oid"])).read_bytes()

    def _store(self, name: str, content: bytes) -> None:
        beside = self.folder / "objects" / f"{name}.tmp"
        beside.write_bytes(content)
        beside.replace(self.folder / "objects" / name)

    def _regular_entry(self, content: bytes) -> dict[str, Any]:
        oid = _git_sha1(content)
        self._store(oid, content)
        return {"oid": oid, "size": len(content), "lfs": None}

    def _lfs_entry(self, sha256: str) -> dict[str, Any]:
        stored = self.folder / "objects" / sha256
        if not stored.exists():
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = stored.stat().st_size
        return {"oid": _git_sha1(_lfs_pointer(sha256, size)), "size": size, "lfs": sha256}

    # ----------------------------------------------------------------------------------------------- repositories

    def _find(self, kind: str, repo_id: str) -> Repo | None:
        if not _REPO_ID.fullmatch(repo_id):
            return None
        file = self.folder / kind / f"{repo_id}.json"
        return Repo(file) if file.exists() else None

    def _repo(self, call: Call, write: bool = False) -> Repo:
        """The repository of a call, if the call's token may read it (or, with `write`, write to it)."""
        kind, repo_id = call.parts.get("kind") or "models", call.parts["repo"]
        repo = self._find(kind, repo_id)
        if call.role is None and (repo is None or repo.state["private"] or write):
            # Without a token, the Hub answers all of these with 401, which its client takes for "repository not found"
            # if the URL is https. This one is not, so the code has to say so.
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        if repo is None:
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write and (call.role not in WRITING_ROLES or not repo_id.startswith(f"{self.user}/")):
            raise Refused(403, "You don't have the required permissions to write to this repository")
        return repo

    def whoami(self, call: Call) -> Reply:
        if call.role is None:
            raise Refused(401, "Invalid username or password.")
        access: dict[str, Any] = {"displayName": f"{call.role} token", "role": call.role, "createdAt": _now()}
        if call.role == "fineGrained":
            entity = {"type": "user", "name": self.user}
            permissions = ["repo.content.read", "repo.write"]
            access["fineGrained"] = {"global": [], "scoped": [{"entity": entity, "permissions": permissions}]}
        return Reply(
            {
                "type": "user",
                "id": _git_sha1(self.user.encode())[:24],
                "name": self.user,
                "fullname": self.user.title(),
                "isPro": False,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": access},
            }
        )

    def create_repo(self, call: Call) -> Reply:
        wanted = call.json()
        kind = f"{wanted.get('type') or 'model'}s"
        namespace = wanted.get("organization") or self.user
        repo_id = f"{namespace}/{wanted['name']}"
        if call.role is None:
            raise Refused(401, "Invalid username or password.")
        if call.role not in WRITING_ROLES or namespace != self.user:
            raise Refused(403, f"You don't have the rights to create a {kind[:-1]} under the namespace {namespace!r}")
        if not _REPO_ID.fullmatch(repo_id):
            raise Refused(400, f"Invalid repository name: {repo_id}")
        url = f"{self.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if self._find(kind, repo_id) is not None:
            # The client reads `url` from this refusal too, if the caller passed `exist_ok=True`.
            return Reply({"error": f"You already created this {kind[:-1]} repo: {repo_id}", "url": url}, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        state = {"id": repo_id, "private": private, "created": _now(), "branches": {}, "tags": {}, "commits": {}}
        repo = Repo(self.folder / kind / f"{repo_id}.json", state)
        repo.commit("main", "initial commit", "", {".gitattributes": self._regular_entry(GITATTRIBUTES)})
        return Reply({"url": url, "name": repo_id, "id": _git_sha1(repo_id.encode())[:24], "private": private})

    def delete_repo(self, call: Call) -> Reply:
        wanted = call.json()
        call.parts["kind"] = f"{wanted.get('type') or 'model'}s"
        call.parts["repo"] = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        self._repo(call, write=True).file.unlink()
        return Reply({})

    def auth_check(self, call: Call) -> Reply:
        self._repo(call, write="write" in call.parts["check"])
        return Reply({})

    def info(self, call: Call) -> Reply:
        repo = self._repo(call)
        commit = repo.resolve(call.parts.get("revision") or "main")
        files = repo.files(commit)
        card = _card_metadata(self._content(files["README.md"]).decode()) if "README.md" in files else None
        card = card if isinstance(card, dict) else {}
        siblings = []
        for path, entry in sorted(files.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if "blobs" in call.query:
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if entry["lfs"]:
                    pointer_size = len(_lfs_pointer(entry["lfs"], entry["size"]))
                    sibling["lfs"] = {"sha256": entry["lfs"], "size": entry["size"], "pointerSize": pointer_size}
            siblings.append(sibling)
        answer = {
            "_id": _git_sha1(repo.state["id"].encode())[:24],
            "id": repo.state["id"],
            "author": repo.state["id"].split("/")[0],
            "sha": commit,
            "createdAt": repo.state["created"],
            "lastModified": repo.state["commits"][commit]["date"],
            "private": repo.state["private"],
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags") or [],
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "cardData": card,
            "siblings": siblings,
        }
        if "config.json" in files:
            config = json.loads(self._content(files["config.json"]))
            answer["config"] = {key: config[key] for key in ("architectures", "model_type") if key in config}
        return Reply(_jsonable(answer))

    def refs(self, call: Call) -> Reply:
        state = self._repo(call).state

        def listed(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": prefix + name, "targetCommit": commit} for name, commit in refs.items()]

        branches, tags = listed(state["branches"], "refs/heads/"), listed(state["tags"], "refs/tags/")
        return Reply({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    def commits(self, call: Call) -> Reply:
        repo = self._repo(call)
        history, commit = [], repo.resolve(call.parts["revision"])
        while commit is not None:
            record = repo.state["commits"][commit]
            about = {key: record[key] for key in ("title", "message", "date")}
            history.append({"id": commit, "authors": [{"user": self.user}], **about})
            commit = record["parent"]
        return Reply(history)

    def create_branch(self, call: Call) -> Reply:
        repo = self._repo(call, write=True)
        if call.parts["name"] in repo.state["branches"]:
            raise Refused(409, f"Reference already exists: {call.parts['name']}")
        repo.state["branches"][call.parts["name"]] = repo.resolve(call.json().get("startingPoint") or "main")
        repo.save()
        return Reply({})

    def create_tag(self, call: Call) -> Reply:
        repo, tag = self._repo(call, write=True), call.json()["tag"]
        if tag in repo.state["tags"]:
            raise Refused(409, f"Reference already exists: {tag}")
        repo.state["tags"][tag] = repo.resolve(call.parts["name"])
        repo.save()
        return Reply({})

    def delete_ref(self, call: Call) -> Reply:
        repo = self._repo(call, write=True)
        refs = repo.state["branches" if call.parts["ref"] == "branch" else "tags"]
        if call.parts["name"] not in refs:
            raise Refused(404, f"Invalid rev id: {call.parts['name']}", "RevisionNotFound")
        if refs is repo.state["branches"] and call.parts["name"] == "main":
            raise Refused(403, "The default branch cannot be deleted")
        del refs[call.parts["name"]]
        repo.save()
        return Reply({})

    # ---------------------------------------------------------------------------------------------------- a push

    def validate_yaml(self, call: Call) -> Reply:
        """The part of the Hub's card validation that a training script can fail: YAML and `model-index`."""
        try:
            metadata = _card_metadata(call.json()["content"])
        except yaml.YAMLError as error:
            return Reply({"errors": [{"message": f"YAML metadata error: {error}"}], "warnings": []}, 400)
        if metadata is None:
            warning = {"message": "empty or missing yaml metadata in repo card"}
            return Reply({"errors": [], "warnings": [warning]})
        errors = [{"message": message} for message in _model_index_errors(metadata)]
        return Reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, call: Call) -> Reply:
        """Tells for each file whether it goes into the commit itself or to LFS, and what is already there."""
        repo = self._repo(call, write=True)
        present = repo.files(repo.resolve(call.parts["revision"]))
        answer = []
        for file in call.json()["files"]:
            large = file["size"] > REGULAR_FILE_LIMIT or b"\0" in base64.b64decode(file["sample"])
            large |= any(fnmatch.fnmatch(file["path"].split("/")[-1], pattern) for pattern in LFS_PATTERNS)
            entry = present.get(file["path"])
            # The client leaves a file out of the commit if this is the hash of its own copy.
            oid = (entry["lfs"] or entry["oid"]) if entry else None
            mode = "lfs" if large else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Reply({"files": answer})

    def lfs_batch(self, call: Call) -> Reply:
        self._repo(call, write=True)
        objects = []
        for wanted in call.json()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if not (self.folder / "objects" / wanted["oid"]).exists():
                upload = {"href": f"{self._storage}/{wanted['oid']}"}
                kind = f"{call.parts['kind']}/" if call.parts.get("kind") else ""
                verify = {"href": f"{self.endpoint}/{kind}{call.parts['repo']}.git/info/lfs/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        # No "chunk_size" in the actions: the client then sends each file in one plain PUT.
        return Reply({"transfer": "basic", "objects": objects})

    def lfs_upload(self, call: Call) -> Reply:
        # No token is required, here or in `lfs_download`: the client sends none, the Hub signs these URLs instead.
        if hashlib.sha256(call.body).hexdigest() != call.parts["oid"]:
            raise Refused(400, "The content does not match the sha256 in the URL")
        self._store(call.parts["oid"], call.body)
        return Reply(b"")

    def lfs_verify(self, call: Call) -> Reply:
        self._repo(call, write=True)
        self._lfs_entry(call.json()["oid"])
        return Reply({})

    def commit(self, call: Call) -> Reply:
        """Applies all of a commit or, if any line of it is refused, none of it."""
        repo = self._repo(call, write=True)
        branch = call.parts["revision"].removeprefix("refs/heads/")
        if "create_pr" in call.query:
            raise Refused(501, "The stand-in has no pull requests")
        if branch not in repo.state["branches"]:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = repo.state["branches"][branch]
        files = dict(repo.files(head))
        title, description = "", ""
        for line in call.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            path = value.get("path")
            if key == "header":
                title, description = value["summary"], value.get("description", "")
                parent = value.get("parentCommit")
                if parent and not head.startswith(parent):
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[path] = self._regular_entry(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                files[path] = self._lfs_entry(value["oid"])
            elif key == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                kept = {name: entry for name, entry in files.items() if not name.startswith(path.rstrip("/") + "/")}
                if len(kept) == len(files):
                    raise Refused(404, "A folder with this name doesn't exist", "EntryNotFound")
                files = kept
            else:
                raise Refused(400, f"Unknown key in commit: {key}")
        commit = repo.commit(branch, title, description, files)
        kind = f"{call.parts['kind']}/" if call.parts["kind"] != "models" else ""
        url = f"{self.endpoint}/{kind}{repo.state['id']}/commit/{commit}"
        return Reply({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    # ------------------------------------------------------------------------------------------------- a download

    def _described(self, repo: Repo, commit: str, path: str, expand: bool) -> dict[str, Any] | None:
        """The Hub's description of the file or folder at `path`, if there is one."""
        files = repo.files(commit)
        if path in files:
            entry = files[path]
            answer = {"type": "file", "oid": entry["oid"], "size": entry["size"], "path": path}
            if entry["lfs"]:
                pointer_size = len(_lfs_pointer(entry["lfs"], entry["size"]))
                answer["lfs"] = {"oid": entry["lfs"], "size": entry["size"], "pointerSize": pointer_size}
        elif any(name.startswith(f"{path}/") for name in files):
            answer = {"type": "directory", "oid": _git_sha1(f"{commit}:{path}".encode()), "size": 0, "path": path}
        else:
            return None
        if expand:
            # The requested commit; the Hub names the last one that changed this path.
            record = repo.state["commits"][commit]
            answer["lastCommit"] = {"id": commit, "title": record["title"], "date": record["date"]}
        return answer

    def tree(self, call: Call) -> Reply:
        repo = self._repo(call)
        commit = repo.resolve(call.parts["revision"])
        folder = (call.parts.get("path") or "").strip("/")
        inside = f"{folder}/" if folder else ""
        paths = set()
        for name in repo.files(commit):
            if name.startswith(inside):
                steps = name.removeprefix(inside).split("/")
                paths |= {inside + "/".join(steps[: depth + 1]) for depth in range(len(steps))}
        if folder and not paths:
            raise Refused(404, f"{folder} does not exist on {call.parts['revision']}", "EntryNotFound")
        if not _is_true(call.query.get("recursive")):
            paths = {path for path in paths if "/" not in path.removeprefix(inside)}
        expand = _is_true(call.query.get("expand"))
        return Reply([self._described(repo, commit, path, expand) for path in sorted(paths)])

    def paths_info(self, call: Call) -> Reply:
        repo = self._repo(call)
        commit = repo.resolve(call.parts["revision"])
        asked = parse_qs(call.body.decode())
        described = [
            self._described(repo, commit, path.strip("/"), _is_true(asked.get("expand")))
            for path in asked.get("paths", [])
        ]
        return Reply([answer for answer in described if answer is not None])

    def resolve(self, call: Call) -> Reply:
        repo = self._repo(call)
        commit = repo.resolve(call.parts["revision"])
        headers = {"X-Repo-Commit": commit}
        entry = repo.files(commit).get(call.parts["path"])
        if entry is None:
            # Given the commit, the client caches that this file does not exist in it.
            raise Refused(404, "Entry not found", "EntryNotFound", headers)
        if entry["lfs"]:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]}"', "X-Linked-Size": str(entry["size"])}
            return Reply(b"", 302, {**headers, "Location": f"{self._storage}/{entry['lfs']}"})
        headers |= {"ETag": f'"{entry["oid"]}"'}
        return _ranged(self._content(entry), call.headers.get("Range"), headers)

    def lfs_download(self, call: Call) -> Reply:
        stored = self.folder / "objects" / call.parts["oid"]
        if not stored.exists():
            raise Refused(404, "Entry not found", "EntryNotFound")
        return _ranged(stored.read_bytes(), call.headers.get("Range"), {"ETag": f'"{call.parts["oid"]}"'})


# An id is one or two segments of a path ("resnet18", "tester/my-model"); a revision is one, as the client quotes it.
_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+(?:/[^/]+)?)"
_GIT = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+(?:/[^/]+)?)"

# Operation: methods, path, handler. The first match handles the request, so the bare `info` comes last.
OPERATIONS: dict[str, tuple[str, re.Pattern[str], Callable[[HubStandIn, Call], Reply]]] = {
    operation: (methods, re.compile(pattern), answer)
    for operation, methods, pattern, answer in (
        ("whoami", "GET", r"/api/whoami-v2", HubStandIn.whoami),
        ("validate-yaml", "POST", r"/api/validate-yaml", HubStandIn.validate_yaml),
        ("create-repo", "POST", r"/api/repos/create", HubStandIn.create_repo),
        ("delete-repo", "DELETE", r"/api/repos/delete", HubStandIn.delete_repo),
        ("auth-check", "GET", _API + r"/(?P<check>auth-check(?:/write)?)", HubStandIn.auth_check),
        ("preupload", "POST", _API + r"/preupload/(?P<revision>[^/]+)", HubStandIn.preupload),
        ("lfs-batch", "POST", _GIT + r"\.git/info/lfs/objects/batch", HubStandIn.lfs_batch),
        ("lfs-upload", "PUT", r"/storage/(?P<oid>[0-9a-f]{64})", HubStandIn.lfs_upload),
        ("lfs-verify", "POST", _GIT + r"\.git/info/lfs/verify", HubStandIn.lfs_verify),
        ("commit", "POST", _API + r"/commit/(?P<revision>[^/]+)", HubStandIn.commit),
        ("refs", "GET", _API + r"/refs", HubStandIn.refs),
        ("commits", "GET", _API + r"/commits/(?P<revision>[^/]+)", HubStandIn.commits),
        ("create-branch", "POST", _API + r"/branch/(?P<name>[^/]+)", HubStandIn.create_branch),
        ("create-tag", "POST", _API + r"/tag/(?P<name>[^/]+)", HubStandIn.create_tag),
        ("delete-ref", "DELETE", _API + r"/(?P<ref>branch|tag)/(?P<name>[^/]+)", HubStandIn.delete_ref),
        ("tree", "GET", _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", HubStandIn.tree),
        ("paths-info", "POST", _API + r"/paths-info/(?P<revision>[^/]+)", HubStandIn.paths_info),
        ("resolve", "GET HEAD", _GIT + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", HubStandIn.resolve),
        ("lfs-download", "GET HEAD", r"/storage/(?P<oid>[0-9a-f]{64})", HubStandIn.lfs_download),
        ("info", "GET", _API + r"(?:/revision/(?P<revision>[^/]+))?", HubStandIn.info),
    )
}


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, has `HubStandIn` answer it, and writes the response."""

    protocol_version = "HTTP/1.1"  # connections are kept alive, as the client expects
    # Headers and body leave in one packet: two would wait 40 ms for the peer's delayed acknowledgement every time.
    wbufsize = -1
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        hub: HubStandIn = self.server.hub
        url = urlsplit(self.path)
        operation, match, answer = "unknown", None, None
        for name, (methods, pattern, function) in OPERATIONS.items():
            if self.command in methods.split() and (match := pattern.fullmatch(url.path)):
                operation, answer = name, function
                break
        authorization = self.headers.get("Authorization")
        request = Request(operation, self.command, self.path, authorization is not None)
        with hub._lock:
            fault = self._due_fault(hub, operation)
        is_cut = fault is not None and fault.cut
        length = int(self.headers.get("Content-Length", 0))
        if is_cut and length:
            self.rfile.read(length // 2)
        else:
            # Read to the end even if the request is refused: the rest would be taken for the next request.
            body = self._read_body()
        with hub._lock:
            hub.requests.append(request)
            if fault is not None and (fault.drop or is_cut and length):
                self.close_connection = True
                return
            try:
                if fault is not None and not is_cut:
                    # Without the header, the client's five retries take 1 + 2 + 4 + 8 + 8 seconds; with it, one each.
                    raise Refused(fault.status, "The stand-in was told to fail", headers={"Retry-After": "0"})
                if answer is None:
                    raise Refused(404, f"The stand-in does not speak {self.command} {url.path}")
                role = None
                if authorization is not None:
                    role = hub.tokens.get(authorization.removeprefix("Bearer "))
                    if role is None:
                        # These words tell the client that the token, not the repository, is at fault.
                        raise Refused(401, "Invalid credentials in Authorization header")
                parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                reply = answer(hub, Call(role, parts, parse_qs(url.query), self.headers, body))
            except Refused as refused:
                reply = refused.reply
            except Exception as error:  # a bug in the stand-in: let the client's error name it
                reply = Refused(500, f"The stand-in failed: {type(error).__name__}: {error}").reply
            request.status = None if is_cut else reply.status
        self._send(reply, is_cut)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _due_fault(self, hub: HubStandIn, operation: str) -> Fault | None:
        for fault in hub._faults:
            if fault.operation in ("any", operation) and fault.times > 0:
                if fault.after > 0:
                    fault.after -= 1
                else:
                    fault.times -= 1
                    return fault
        return None

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, reply: Reply, is_cut: bool = False) -> None:
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        kind = "application/octet-stream" if isinstance(reply.body, bytes) else "application/json"
        self.send_response(reply.status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
        self.close_connection = self.close_connection or is_cut

    def log_message(self, *_: object) -> None:
        """Prints nothing: `HubStandIn.requests` is the log."""


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _git_sha1(content: bytes) -> str:
    """The hash by which git, and so the client, identifies a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _lfs_pointer(sha256: str, size: int) -> bytes:
    """What git itself stores in place of a file that is in LFS."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _is_true(values: list[str] | None) -> bool:
    return bool(values) and values[0].lower() in ("1", "true")


def _jsonable(value: Any) -> Any:
    """YAML parses a bare date as a date, which JSON does not have."""
    return json.loads(json.dumps(value, default=str))


def _ranged(content: bytes, asked: str | None, headers: dict[str, str]) -> Reply:
    """`content`, or the single range of it that a `Range` header asks for."""
    headers = {"Accept-Ranges": "bytes", **headers}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if match is None or match.groups() == ("", ""):
        return Reply(content, 200, headers)
    first, last = match.groups()
    start = int(first) if first else max(len(content) - int(last), 0)
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= stop:
        return Reply(b"", 416, {**headers, "Content-Range": f"bytes */{len(content)}"})
    return Reply(content[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


def _card_metadata(card: str) -> Any:
    block = _YAML_BLOCK.search(card)
    return yaml.safe_load(block.group(1)) if block else None


def _model_index_errors(metadata: Any) -> list[str]:
    """Violations of what the Hub requires of the results in a model card."""
    if not isinstance(metadata, dict):
        return ["metadata must be of type object"]
    errors = []

    def require(where: str, value: Any, *keys: str) -> None:
        for key in keys:
            if not isinstance(value, dict) or value.get(key) is None:
                errors.append(f'"{where}.{key}" is required')

    for i, model in enumerate(metadata.get("model-index") or []):
        require(f"model-index[{i}]", model, "name", "results")
        for j, result in enumerate(model.get("results") or []):
            where = f"model-index[{i}].results[{j}]"
            require(f"{where}.task", result.get("task"), "type")
            require(f"{where}.dataset", result.get("dataset"), "type", "name")
            require(where, result, "metrics")
            for k, metric in enumerate(result.get("metrics") or []):
                require(f"{where}.metrics[{k}]", metric, "type", "value")
    return errors


@pytest.fixture(name="hub")
def hub_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A running `HubStandIn`, and the client in this process set up to talk to it: plain LFS, online, and no token but
    the one passed to a call. Import it with `from hub_stand_in import hub_fixture`."""
    # Constants, not variables: the client reads its environment once, on import, which may be long past.
    for name, value in {
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    with HubStandIn(tmp_path) as hub:
        yield hub

"""A Hub in memory on 127.0.0.1, for tests that publish and load: repositories, branches, pull requests, LFS, tokens.

Clients find it through HF_ENDPOINT, which huggingface_hub reads when it is imported: they are processes of their own.
"""

import base64
import json
import re
from collections import defaultdict
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".png")


class Repository:
    """Branches as path -> content, each with the number of its last commit."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.branches: dict[str, dict[str, bytes]] = {"main": {}}
        self.commits: dict[str, int] = {"main": 0}
        self.messages: list[str] = []

    def sha(self, revision: str) -> str:
        return sha1(f"{revision} {self.commits[revision]}".encode()).hexdigest()

    def find(self, revision: str) -> str | None:
        """The branch that a name or a commit stands for."""
        names = {self.sha(name): name for name in self.branches} | {name: name for name in self.branches}
        return names.get(revision)


class HubStandIn:
    """
    The server, started and stopped as a context.

    Args:
        tokens: token -> namespaces in which it may write. Tokens that are not here are refused.
    """

    def __init__(self, tokens: dict[str, tuple[str, ...]]) -> None:
        self.tokens = tokens
        self.repositories: dict[str, Repository] = {}
        # LFS contents by SHA-256, and how often each was sent
        self.stored: dict[str, bytes] = {}
        self.sent: dict[str, int] = defaultdict(int)
        # From this number of LFS files on, sending blocks until `released`; `blocked` says that it does.
        self.most_files: int | None = None
        self.blocked, self.released, self.storing = Event(), Event(), Lock()
        # What paths begin with -> status with which they are answered
        self.failures: dict[str, int] = {}
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubStandIn":
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, private: bool = False, **files: bytes) -> Repository:
        """A repository that is there already."""
        self.repositories[name] = Repository(private)
        self.repositories[name].branches["main"].update(files)
        return self.repositories[name]


class Handler(BaseHTTPRequestHandler):
    """Answers one request after the other; `ROUTES` has pattern -> method."""

    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Keeps the tests' output clean."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        path = urlsplit(self.path).path
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.read_chunks()
        else:
            body = self.rfile.read(length)
        for part, status in self.hub.failures.items():
            if path.startswith(part):
                return self.reply(status, {"error": f"status {status} was asked for"})
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                groups = {name: unquote(value) for name, value in match.groupdict().items()}
                return method(self, body, **groups)
        return self.reply(404, {"error": f"no such address: {path}"})

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, status: int, content: Any = None, **headers: str) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def namespaces(self) -> tuple[str, ...] | None:
        """Those in which the request may write; None without a token that is known."""
        return self.hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def repository(self, name: str, write: bool = False) -> Repository | None:
        """The repository, or None after an answer that says why not."""
        repository = self.hub.repositories.get(name)
        mine = self.namespaces()
        known = mine is not None or self.headers.get("Authorization") is None
        owner = mine is not None and name.split("/")[0] in mine
        if not known or repository is None or (repository.private and not owner):
            self.reply(401 if not known else 404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        if write and not owner:
            self.reply(403 if mine is not None else 401, {"error": "no write access"})
            return None
        return repository

    # --- the Hub's own interface -------------------------------------------------------------------------------------

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        mine = self.namespaces()
        if mine is None:
            return self.reply(401, {"error": "Invalid username or password."})
        if wanted["organization"] not in mine:
            return self.reply(403, {"error": f"You don't have the rights to create a model under {name}"})
        address = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            return self.reply(409, address | {"error": "You already created this model repo"})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repositories[name] = Repository(private)
        return self.reply(200, address)

    def validate(self, body: bytes) -> None:
        self.reply(200, {"errors": [], "warnings": []})

    def branch(self, body: bytes, name: str, revision: str) -> None:
        if (repository := self.repository(name, write=True)) is None:
            return
        if revision in repository.branches:
            return self.reply(409, {"error": "Reference already exists"})
        repository.branches[revision] = dict(repository.branches["main"])
        repository.commits[revision] = 0
        self.reply(200, {})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        # A pull request may come from who cannot write.
        pull = "create_pr=1" in self.path
        if (repository := self.repository(name, write=not pull)) is None:
            return
        files = []
        for file in json.loads(body)["files"]:
            content = repository.branches[revision].get(file["path"])
            lfs = file["path"].endswith(LFS_SUFFIXES)
            files.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": None if content is None else object_id(content, lfs),
                }
            )
        self.reply(200, {"files": files})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        pull = "create_pr=1" in self.path
        if (repository := self.repository(name, write=not pull)) is None:
            return
        files = dict(repository.branches[revision])
        message = ""
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            else:
                del files[value["path"]]
        target, extra = revision, {}
        if pull:
            number = sum(branch.startswith("refs/pr/") for branch in repository.branches) + 1
            target = f"refs/pr/{number}"
            repository.commits[target] = 0
            extra = {"pullRequestUrl": f"{self.hub.endpoint}/{name}/discussions/{number}"}
        repository.branches[target] = files
        repository.commits[target] += 1
        repository.messages.append(message)
        sha = repository.sha(target)
        address = f"{self.hub.endpoint}/{name}/commit/{sha}"
        self.reply(200, {"commitUrl": address, "commitOid": sha, "hookOutput": ""} | extra)

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        if (repository := self.repository(name)) is None:
            return
        branch = repository.find(revision)
        if branch is None:
            return self.reply(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        files = repository.branches[branch]
        card = files.get("README.md", b"").decode().split("---\n")
        data = yaml.safe_load(card[1]) if len(card) > 2 else {}
        self.reply(
            200,
            {
                "id": name,
                "sha": repository.sha(branch),
                "private": repository.private,
                "tags": data.get("tags", []),
                "siblings": [{"rfilename": path} for path in files],
                "cardData": data,
                **{key: data[key] for key in ("pipeline_tag", "library_name") if key in data},
            },
        )

    def tree(self, body: bytes, name: str, revision: str, folder: str = "") -> None:
        if (repository := self.repository(name)) is None:
            return
        branch = repository.find(revision)
        if branch is None or folder:
            code = "EntryNotFound" if branch else "RevisionNotFound"
            return self.reply(404, {"error": "not found"}, X_Error_Code=code)
        self.reply(
            200,
            [
                {"type": "file", "path": path, "size": len(content), "oid": object_id(content, False)}
                for path, content in repository.branches[branch].items()
            ],
        )

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        if (repository := self.repository(name)) is None:
            return
        branch = repository.find(revision)
        if branch is None:
            return self.reply(404, {"error": "not found"}, X_Error_Code="RevisionNotFound")
        sha = repository.sha(branch)
        content = repository.branches[branch].get(path)
        if content is None:
            return self.reply(404, {"error": "not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        self.reply(200, content, ETag=f'"{object_id(content, True)}"', X_Repo_Commit=sha)

    # --- large files -------------------------------------------------------------------------------------------------

    def batch(self, body: bytes, name: str) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            wanted = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.stored:
                wanted["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}
            objects.append(wanted)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        hub = self.hub
        if sha256(body).hexdigest() != oid:
            return self.reply(400, {"error": "the content is another"})
        # files come side by side: counting and storing are one step
        with hub.storing:
            full = hub.most_files is not None and len(hub.stored) >= hub.most_files
            if not full:
                hub.stored[oid] = body
                hub.sent[oid] += 1
        if full:
            hub.blocked.set()
            hub.released.wait()
            return
        self.reply(200, {})


def object_id(content: bytes, lfs: bool) -> str:
    """How git, or LFS, names a content."""
    return sha256(content).hexdigest() if lfs else sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = {
    "/api/repos/create": Handler.create,
    "/api/validate-yaml": Handler.validate,
    rf"/api/models/{NAME}/branch/{REVISION}": Handler.branch,
    rf"/api/models/{NAME}/preupload/{REVISION}": Handler.preupload,
    rf"/api/models/{NAME}/commit/{REVISION}": Handler.commit,
    rf"/api/models/{NAME}/tree/{REVISION}": Handler.tree,
    rf"/api/models/{NAME}/tree/{REVISION}/(?P<folder>.+)": Handler.tree,
    rf"/api/models/{NAME}/revision/{REVISION}": Handler.info,
    rf"/api/models/{NAME}": Handler.info,
    rf"/{NAME}\.git/info/lfs/objects/batch": Handler.batch,
    "/lfs/(?P<oid>[0-9a-f]+)": Handler.store,
    rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)": Handler.resolve,
}

__all__ = ["HubStandIn", "Repository"]

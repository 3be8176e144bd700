"""A server with the endpoints of the hub that its client calls for a push and for a download.

It keeps the files of each commit and the list of all requests, so that the client's own code runs in tests. It stands
in for the hub and is no proof of how the hub itself behaves.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".onnx", ".onnx_data")
TOKEN = "hf_a_token_that_must_never_be_printed"


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    """Branches by name, each the name of its last commit, and the files of each commit."""

    private: bool
    gated: Any = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a branch, without the one that the hub writes."""
        return {name: data for name, data in self.at(revision)[1].items() if name != ".gitattributes"}

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        name = self.branches.get(revision, revision)
        return name, self.commits[name]


class Hub(ThreadingHTTPServer):
    """``requests`` are "METHOD path" in their order; ``failing`` maps a pattern of them to the status of the answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failing: dict[str, int] = {}
        self.takes_settings = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any = None, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def handle_request(self) -> None:
        data, path = self.body(), urlsplit(self.path).path
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        for pattern, status in self.server.failing.items():
            if re.search(pattern, request):
                return self.answer({"error": "not today"}, status, X_Error_Message="not today")
        if path.startswith("/large/"):
            self.server.stored[path.removeprefix("/large/")] = data
            return self.answer()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "who are you?"}, 401, X_Error_Message="who are you?")
        content = json.loads(data) if data[:1] == b"{" and not path.startswith("/large") and b"\n" not in data else {}
        if request == "POST /api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if request == "POST /api/repos/create":
            name = f"{content['organization']}/{content['name']}"
            made = Repository(content.get("visibility") == "private")
            made.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.server.repositories.setdefault(name, made)
            return self.answer({"url": f"{self.server.url}/{name}"})
        match = re.match(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?(?:/(.*))?$", path)
        if match is None or (repository := self.server.repositories.get(match[1])) is None:
            return self.answer({"error": "none"}, 404, X_Error_Code="RepoNotFound", X_Error_Message="none")
        return self.of_repository(match[1], repository, unquote(match[2] or ""), content, data)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def of_repository(self, name: str, repository: Repository, path: str, content: Any, data: bytes) -> None:
        what, _, rest = path.partition("/")
        if path == "settings":
            if self.server.takes_settings:
                repository.gated = content["gated"]
            return self.answer()
        if what == "branch":
            if rest in repository.branches:
                return self.answer({"error": "exists"}, 409)
            repository.branches[rest] = repository.branches["main"]
            return self.answer()
        if what == "preupload":
            files = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for item in content["files"]
            ]
            return self.answer({"files": files})
        if path == "info/lfs/objects/batch":
            objects: list[dict[str, Any]] = [{"oid": item["oid"], "size": item["size"]} for item in content["objects"]]
            for item in objects:
                if item["oid"] not in self.server.stored:
                    item["actions"] = {"upload": {"href": f"{self.server.url}/large/{item['oid']}"}}
            return self.answer({"objects": objects, "transfer": "basic"})
        if what == "commit":
            return self.commit(name, repository, rest, [json.loads(line) for line in data.splitlines()])
        if what == "resolve":
            revision, _, file = rest.partition("/")
            commit, files = repository.at(revision)
            return self.answer(files[file], ETag=f'"{git_hash(files[file])}"', X_Repo_Commit=commit)
        if what in ("", "revision", "tree"):
            return self.describe(name, repository, what, rest or "main")
        return self.answer({"error": path}, 404)

    def describe(self, name: str, repository: Repository, what: str, revision: str) -> None:
        try:
            commit, files = repository.at(revision)
        except KeyError:
            return self.answer({"error": "no revision"}, 404, X_Error_Code="RevisionNotFound")
        siblings = []
        for path, data in files.items():
            item: dict[str, Any] = {"rfilename": path, "path": path, "type": "file", "oid": git_hash(data)}
            item |= {"blobId": git_hash(data), "size": len(data)}
            if path.endswith(LARGE):
                sha256 = hashlib.sha256(data).hexdigest()
                item["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(item)
        if what == "tree":
            return self.answer(siblings)
        described = {"id": name, "sha": commit, "private": repository.private, "gated": repository.gated}
        return self.answer({**described, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def commit(self, name: str, repository: Repository, branch: str, lines: list[dict[str, Any]]) -> None:
        head, files = repository.at(branch)
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", head) != head:
                return self.answer({"error": "the branch has moved"}, 412, X_Error_Message="the branch has moved")
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            if line["key"] == "deletedFile":
                del files[value["path"]]
        made = repository.commit(branch, files)
        return self.answer({"commitOid": made, "commitUrl": f"{self.server.url}/{name}/commit/{made}"})


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that listens on this machine until the end of the block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()

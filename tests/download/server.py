"""A small hub on the loopback: the APIs of Hugging Face and ModelScope, as far as clients ask, and faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE_SIZE = 3
HTML = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>" + b" " * 700


def pointer_to(content: bytes) -> bytes:
    """What git keeps instead of a large file."""
    sha256 = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """What the hub has under a name; files of more than `lfs_from` bytes count as LFS."""

    files: dict[str, bytes]
    kind: str = "model"
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    gated_files: frozenset[str] = frozenset()
    lfs_from: int = 1000
    has_tree: bool = True

    @property
    def commit(self) -> str:
        listed = sorted((path, git_sha1(content)) for path, content in self.files.items())
        return hashlib.sha1(repr(listed).encode()).hexdigest()


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Hub:
    """The state of the server. `faults[path]` is a list of faults, one taken by each request of that file's bytes."""

    url: str = ""
    cdn: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    plain: dict[str, bytes] = field(default_factory=dict)
    """Files by address, `/NAME`."""
    validators: dict[str, str] = field(default_factory=dict)
    """ETag of a plain file, if not of its content; empty: none is sent."""
    ranges: bool = True
    conditions: bool = True
    """Whether If-Range is heeded."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    token: str | None = None

    def asked(self, part: str) -> list[Request]:
        """The GET requests whose path holds `part`."""
        return [each for each in self.requests if part in each.path and each.method == "GET"]

    def bytes_asked(self, path: str) -> list[str]:
        """The Range (or "all") of each request of a file's bytes."""
        return [
            each.headers.get("range", "all")
            for each in self.asked(path)
            if "/api/v1/" in each.path or self._is_bytes(each)
        ]

    def _is_bytes(self, request: Request) -> bool:
        path = urlsplit(request.path).path
        return path.startswith("/cdn/") or path in self.plain or "/resolve/" in path


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append(Request(self.command, self.path, headers))
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {name: values[0] for name, values in parse_qs(parts.query).items()}
        if path in self.hub.plain:
            self._plain(path)
        elif found := re.fullmatch(r"/cdn/(.+)", path):
            content = next(c for r in self.hub.repositories.values() for c in r.files.values() if _sha(c) == found[1])
            name = query["name"]
            self._content(content, name, etag=f'"{found[1]}"')
        elif found := re.fullmatch(r"/api/v1/(model|dataset)s/([^/]+/[^/]+)/(repo/files|repo/tree|repo)", path):
            self._modelscope(found[1], found[2], found[3], query)
        elif found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree|refs)(?:/(.+))?)?", path):
            self._api(found[1], found[2], found[3], found[4], query)
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve("dataset" if found[1] else "model", found[2], found[3], found[4])
        else:
            self._send(404, b"nothing here")

    # Hugging Face

    def _repository(self, kind: str, name: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or repository.kind != kind:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _api(self, kind: str, name: str, what: str | None, revision: str | None, query: dict[str, str]) -> None:
        repository = self._repository(kind, name)
        if repository is None:
            return
        if repository.gated and not self._has_token():
            self._json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        elif what == "refs":
            branches = [
                {"name": b, "ref": f"refs/heads/{b}", "targetCommit": repository.commit} for b in repository.branches
            ]
            self._json({"branches": branches, "tags": [], "converts": []})
        elif revision not in (None, repository.commit, *repository.branches):
            self._json({"error": "no revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif what == "tree":
            self._tree(repository, int(query.get("cursor", "0")))
        else:
            siblings = [{"rfilename": path} for path in repository.files]
            if "blobs" in query:
                siblings = [_sibling(repository, path) for path in repository.files]
            self._json({"id": name, "sha": repository.commit, "siblings": siblings, "tags": [], "private": False})

    def _tree(self, repository: Repository, cursor: int) -> None:
        if not repository.has_tree:
            self._json({"error": "Not Found"}, 404)
            return
        folders = {path.rpartition("/")[0] for path in repository.files if "/" in path}
        entries: list[dict[str, Any]] = [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
        for path, content in repository.files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
            if len(content) > repository.lfs_from:
                pointer = pointer_to(content)
                entry["oid"] = git_sha1(pointer)
                entry["lfs"] = {"oid": _sha(content), "size": len(content), "pointerSize": len(pointer)}
            entries.append(entry)
        links = {}
        if cursor + PAGE_SIZE < len(entries):
            following = f"{self.hub.url}{urlsplit(self.path).path}?recursive=True&cursor={cursor + PAGE_SIZE}"
            links = {"Link": f'<{following}>; rel="next"'}
        self._json(entries[cursor : cursor + PAGE_SIZE], 200, links)

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self._repository(kind, name)
        if repository is None:
            return
        content = repository.files.get(path)
        if content is None:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        if path in repository.gated_files and not self._has_token():
            self._json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
            return
        headers = {"X-Repo-Commit": repository.commit}
        if len(content) <= repository.lfs_from:
            self._content(content, path, f'"{git_sha1(content)}"', headers)
            return
        sha256 = _sha(content)
        headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content)), "ETag": f'"{sha256}"'}
        # Signed, and on another host, as the hub's own are.
        self._send(302, b"", {**headers, "Location": f"{self.hub.cdn}/cdn/{sha256}?name={path}&Signature=secret"})

    # ModelScope

    def _modelscope(self, kind: str, name: str, what: str, query: dict[str, str]) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or repository.kind != kind:
            self._json({"Code": 10010205001, "Message": "record not found", "Success": False}, 404)
            return
        if repository.gated and not self._has_token():
            self._json({"Code": 10010205002, "Message": "denied", "Success": False}, 403)
            return
        if query.get("Revision") not in ("master", *repository.branches):
            self._json({"Code": 10010205003, "Message": "the revision is not found", "Success": False}, 404)
            return
        if what == "repo":
            content = repository.files.get(query["FilePath"])
            if content is None:
                self._json({"Code": 404, "Message": "no such file"}, 404)
            else:
                self._content(content, query["FilePath"], None)
            return
        root = query.get("Root", "").strip("/")
        prefix = root + "/" if root else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, content in repository.files.items():
            if not path.startswith(prefix):
                continue
            inner = path.removeprefix(prefix)
            if "/" in inner:
                folder = prefix + inner.split("/")[0]
                entries[folder] = {"Path": folder, "Type": "tree", "Size": 0}
                if query.get("Recursive") != "True":
                    continue
            entries[path] = {"Path": path, "Type": "blob", "Size": len(content), "Sha256": _sha(content)}
        listed = [entries[path] for path in sorted(entries)]
        if what == "repo/tree":
            size, number = int(query["PageSize"]), int(query["PageNumber"])
            listed = listed[(number - 1) * size : number * size]
        self._json({"Code": 200, "Data": {"Files": listed}, "Success": True})

    # Bytes

    def _plain(self, path: str) -> None:
        content = self.hub.plain[path]
        etag: str | None = self.hub.validators.get(path, f'"{_sha(content)[:16]}"') or None
        self._content(content, path.lstrip("/"), etag)

    def _content(self, content: bytes, name: str, etag: str | None, headers: dict[str, str] | None = None) -> None:
        waiting = self.hub.faults.get(name, [])
        # HEAD is no request of the bytes.
        fault, _, amount = (waiting.pop(0) if waiting and self.command == "GET" else "").partition(":")
        headers = {**(headers or {}), "Accept-Ranges": "bytes" if self.hub.ranges else "none"}
        if etag is not None:
            headers["ETag"] = etag
        if fault == "status":
            self._send(int(amount), b"a fault")
            return
        if fault == "html":
            self._send(200, HTML, {"Content-Type": "text/html"})
            return
        if fault == "pointer":
            self._send(200, pointer_to(content))
            return
        if fault == "corrupt":
            content = content[:5] + bytes([content[5] ^ 1]) + content[6:]
        if fault == "other":
            content = content + b"more"
        begin = 0
        condition = self.headers.get("If-Range")
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        end = len(content)
        if found and self.hub.ranges and (condition in (None, etag) or not self.hub.conditions):
            begin, end = int(found[1]), min(int(found[2] or len(content)) + 1, len(content))
            if begin >= len(content):
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        body = content[begin:end]
        self._send(206 if "Content-Range" in headers else 200, body, headers, fault, int(amount or 0))

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: str = "", amount: int = 0
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if fault == "unsized":
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "disconnect":
            self.wfile.write(body[:amount])
            self.close_connection = True
        elif fault == "stall":
            self.wfile.write(body[:amount])
            self.wfile.flush()
            # Until the client hangs up, however slow the machine.
            select.select([self.connection], [], [], 110)
        else:
            self.wfile.write(body)


def _sibling(repository: Repository, path: str) -> dict[str, Any]:
    content = repository.files[path]
    entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
    if len(content) > repository.lfs_from:
        pointer = pointer_to(content)
        entry["blobId"] = git_sha1(pointer)
        entry["lfs"] = {"sha256": _sha(content), "size": len(content), "pointerSize": len(pointer)}
    return entry


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle is what some tests are about."""


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of the loopback, for the time of the block."""
    hub = Hub()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    port = server.server_address[1]
    # The same server under another name stands for the CDN: another host to every client.
    hub.url, hub.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""What ModelScope has of a repository, by its HTTP API (no package of theirs is needed).

GET /api/v1/models/OWNER/NAME/repo/files?Revision=R&Recursive=True[&Root=FOLDER]
GET /api/v1/datasets/OWNER/NAME/repo/tree?Revision=R&Recursive=True&PageNumber=N&PageSize=M
    -> {"Code": 200, "Data": {"Files": [{"Path", "Type": "blob"|"tree", "Size", "Sha256"}]}}
GET /api/v1/models/OWNER/NAME/repo?Revision=R&FilePath=PATH -> the file (datasets likewise)
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tessel.download.http import Broken, Refused, ask
from tessel.download.remote import Expected, Listing, RemoteFile, inside
from tessel.errors import TesselError, UsageError

DEFAULT_ENDPOINT = "https://www.modelscope.cn"
DEFAULT_REVISION = "master"
# A list of a model's files ends here without a word, and has no pages.
_MOST_LISTED = 3000
_PAGE_SIZE = 200
_MAX_LIST_BYTES = 512 * 2**20
_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def list_repository(repo: str, repo_type: str, revision: str | None) -> Listing:
    """The files of a repository, with ModelScope's hashes of them.

    Raises:
        TesselError: it is not there, may not be read, has no such revision, or ModelScope cannot be reached.
    """
    if not _REPO.fullmatch(repo):
        raise UsageError(f"{repo!r} is no name of a repository on ModelScope, which is OWNER/NAME.")
    asked = _Repository(repo, repo_type, revision or DEFAULT_REVISION)
    entries = asked.pages() if repo_type == "dataset" else asked.folder("")
    files = {}
    for entry in entries:
        if entry.get("Type") == "tree":
            continue
        file = asked.file(entry)
        files[file.path] = file
    title = f"{repo} ({asked.revision}) from {asked.endpoint}"
    listed = tuple(files[path] for path in sorted(files))
    return Listing(title, listed, asked.headers, lambda status: asked.denied() if status in (401, 403) else None)


def endpoint_of_environment() -> str:
    """ModelScope's address, without a slash at its end."""
    domain = os.environ.get("MODELSCOPE_DOMAIN", "").strip()
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT", "").strip() or domain or DEFAULT_ENDPOINT
    return (endpoint if "://" in endpoint else f"https://{endpoint}").rstrip("/")


class _Repository:
    """One repository at one revision, asked about over HTTP."""

    def __init__(self, repo: str, repo_type: str, revision: str) -> None:
        self.repo, self.repo_type, self.revision = repo, repo_type, revision
        self.endpoint = endpoint_of_environment()
        self._base = f"{self.endpoint}/api/v1/{repo_type}s/{repo}"
        token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
        # Older parts of the API know the cookie alone.
        self.headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}

    def file(self, entry: dict[str, Any]) -> RemoteFile:
        """The file that an entry of a listing tells of."""
        path, size, sha256 = entry.get("Path"), entry.get("Size"), str(entry.get("Sha256") or "").lower()
        if not isinstance(path, str) or not isinstance(size, int):
            raise self._strange(f"an entry {str(entry)[:80]} without a path and a size")
        inside(Path(), path, self.repo)
        expected = Expected(size, sha256 if _SHA256.fullmatch(sha256) else None, says="ModelScope")
        query = urlencode({"Revision": self.revision, "FilePath": path})
        return RemoteFile(path, f"{self._base}/repo?{query}", expected, f"modelscope:{self.repo}@{self.revision}")

    def folder(self, root: str) -> list[dict[str, Any]]:
        """Everything below a folder of a model's repository."""
        scope = {"Root": root} if root else {}
        entries = self._ask("repo/files", {"Recursive": "True", **scope})
        if len(entries) < _MOST_LISTED:
            return entries
        shallow = self._ask("repo/files", {"Recursive": "False", **scope})
        if len(shallow) >= _MOST_LISTED:
            raise TesselError(
                f"{self.repo} has {_MOST_LISTED} files or more in {root or 'its first folder'}, and ModelScope lists "
                "no more of them. Take it with --source hf."
            )
        folders = [str(entry["Path"]) for entry in shallow if entry.get("Type") == "tree" and entry.get("Path")]
        return shallow + [entry for each in folders for entry in self.folder(each)]

    def pages(self) -> list[dict[str, Any]]:
        """Everything of a dataset's repository."""
        entries: list[dict[str, Any]] = []
        number = 1
        while True:
            page = self._ask("repo/tree", {"Recursive": "True", "PageNumber": number, "PageSize": _PAGE_SIZE})
            entries += page
            if len(page) < _PAGE_SIZE:
                return entries
            number += 1

    def _ask(self, what: str, query: dict[str, Any]) -> list[dict[str, Any]]:
        url = f"{self._base}/{what}?{urlencode({'Revision': self.revision, **query})}"
        try:
            answer = ask(url, self.headers)
            with answer.response:
                body = answer.response.read(_MAX_LIST_BYTES)
        except (Broken, OSError) as broken:
            raise TesselError(
                f"{self.endpoint} cannot be reached: {broken}. Check the network (HTTPS_PROXY if there is a proxy), "
                "or MODELSCOPE_ENDPOINT."
            ) from broken
        except Refused as refused:
            raise TesselError(self._refusal(refused)) from refused
        try:
            content = json.loads(body)
            files = content["Data"]["Files"] if content["Data"] else []
            if content.get("Code", 200) not in (200, "200") or not all(isinstance(each, dict) for each in files or []):
                raise ValueError(content.get("Message"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._strange(str(error)) from error
        return files or []

    def _refusal(self, refused: Refused) -> str:
        try:
            message = str(json.loads(refused.body)["Message"])
        except (ValueError, KeyError, TypeError, RecursionError):
            message = ""
        if refused.status in (401, 403):
            return self.denied()
        if refused.status == 404 and "revision" in message.lower():
            return (
                f"{self.repo} has no revision {self.revision} on ModelScope, whose main branch is {DEFAULT_REVISION}. "
                "Give --revision a branch or a tag of it."
            )
        if refused.status == 404:
            return (
                f"{self.endpoint} has no {self.repo_type} {self.repo} with a revision {self.revision}, or hides it. "
                "Check the spelling (names differ from Hugging Face's), --repo-type and --revision."
            )
        said = f", {message[:200]}" if message else ""
        return f"{self.endpoint} fails for {self.repo} (HTTP status {refused.status}{said}). Try again later."

    def denied(self) -> str:
        """What to do where ModelScope wants to know who asks."""
        return (
            f"{self.repo} is private, or wants its terms accepted on {self.endpoint}: do so, and set "
            "MODELSCOPE_API_TOKEN to the token of that account."
        )

    def _strange(self, why: str) -> TesselError:
        return TesselError(
            f"{self.endpoint} does not answer as ModelScope does ({why[:200]}). Check MODELSCOPE_ENDPOINT, or whether "
            "a proxy wants a login first."
        )

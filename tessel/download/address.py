"""The address of one file."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from tessel.download import hub, modelscope
from tessel.download.remote import Expected, Listing, RemoteFile, inside
from tessel.download.transfer import shown
from tessel.errors import UsageError

_HUGGING_FACE = ("huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com")
_MODELSCOPE = ("modelscope.cn", "www.modelscope.cn", "modelscope.ai", "www.modelscope.ai")
_PAGE = re.compile(
    r"/(?:(?P<kind>models|datasets)/)?(?P<repo>[\w.-]+/[\w.-]+?)"
    r"(?:\.git|/(?:files|summary)|/(?:tree|blob|file/view)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?/?"
)


def list_address(url: str, sha256: str | None) -> Listing:
    """The one file of an address.

    Raises:
        UsageError: the address is of a page of a hub, or has no file's name.
    """
    try:
        # As browsers do with what is not ASCII or a space.
        url = quote(url.strip(), safe="%/:=&?~#+!$,;'@()*[]")
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{url!r} is no web address ({error}).") from error
    if not host:
        raise UsageError(f"{url!r} is no web address: it names no host.")
    _refuse_page(url)
    name = unquote(parts.path.rsplit("/", 1)[-1])
    if not name:
        raise UsageError(f"{shown(url)} ends with no file's name. Give the address of a file.")
    inside(Path(), name, shown(url))
    expected = Expected(sha256=None if sha256 is None else sha256.lower(), says="--sha256")
    return Listing(shown(url), (RemoteFile(name, url, expected, f"url:{shown(url)}"),))


def _refuse_page(url: str) -> None:
    """Today's guides hand out addresses of pages; what lies there is HTML, whatever its name."""
    parts = urlsplit(url)
    host = parts.hostname
    ours = host in (*_HUGGING_FACE, urlsplit(hub.endpoint_of_environment()).hostname)
    theirs = host in (*_MODELSCOPE, urlsplit(modelscope.endpoint_of_environment()).hostname)
    found = _PAGE.fullmatch(unquote(parts.path))
    if not (ours or theirs) or found is None or (found["repo"] or "").startswith("api/"):
        return
    flags = ""
    if not ours:
        flags += " --source modelscope"
    if found["kind"] == "datasets":
        flags += " --repo-type dataset"
    if found["revision"] and found["revision"] not in ("main", "master"):
        flags += f" --revision {found['revision']}"
    if found["path"]:
        flags += f" --include '{found['path']}'"
    raise UsageError(
        f"{shown(url)} is a page of the hub, not a file. What it shows comes with: "
        f"tessel download {found['repo']}{flags}"
    )

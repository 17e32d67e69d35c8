"""What the Hugging Face hub, or a mirror of it (HF_ENDPOINT), has of a repository."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from tessel import __version__
from tessel.config.nearest import nearest
from tessel.download.remote import Expected, Listing, RemoteFile, inside, named
from tessel.errors import TesselError, UsageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DEFAULT_ENDPOINT = "https://huggingface.co"
_TIMEOUT_S = 30.0


def endpoint_of_environment() -> str:
    """The hub's address, without a slash at its end.

    Raises:
        UsageError: HF_ENDPOINT is no address.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or DEFAULT_ENDPOINT
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"HF_ENDPOINT is {endpoint!r}: it must begin with https://, as https://HOST.")
    return endpoint


def list_repository(repo: str, repo_type: str, revision: str | None) -> Listing:
    """The files of a repository at one commit, with the hub's hashes of them.

    Raises:
        TesselError: it is not there, may not be read, has no such revision, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import build_hf_headers

    endpoint = endpoint_of_environment()
    api = HfApi(endpoint=endpoint, library_name="tessel", library_version=__version__)
    with _in_words(api, repo, repo_type, revision):
        info = api.repo_info(repo, repo_type=repo_type, revision=revision, timeout=_TIMEOUT_S)
        commit = info.sha
        if not isinstance(commit, str) or not commit:
            raise ValueError("no commit in its answer")
        found = _tree(api, repo, repo_type, commit)
    prefix = f"{endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo}"
    files = tuple(
        RemoteFile(path, f"{prefix}/resolve/{commit}/{quote(path)}", expected, f"hf:{repo}@{commit}")
        for path, expected in sorted(found.items())
    )
    for file in files:
        inside(Path(), file.path, repo)
    headers = build_hf_headers(library_name="tessel", library_version=__version__)
    kept = {name.title(): value for name, value in headers.items() if name.lower() == "authorization"}
    title = f"{repo} at {commit[:7]} ({revision or 'main'}) from {endpoint}"
    return Listing(title, files, kept, lambda status: _gated(repo, prefix) if status in (401, 403) else None)


def _tree(api: HfApi, repo: str, repo_type: str, commit: str) -> dict[str, Expected]:
    """Path -> what the hub says of it."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile

    try:
        entries = list(api.list_repo_tree(repo, recursive=True, revision=commit, repo_type=repo_type))
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in (404, 405, 501):
            raise
        return _siblings(api, repo, repo_type, commit)
    return {each.path: _expected(each.size, each.lfs, each.blob_id) for each in entries if isinstance(each, RepoFile)}


def _siblings(api: HfApi, repo: str, repo_type: str, commit: str) -> dict[str, Expected]:
    """The same from a mirror that has no tree: its list of names, and each file's own headers where that is all."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    info = api.repo_info(repo, repo_type=repo_type, revision=commit, files_metadata=True, timeout=_TIMEOUT_S)
    found = {}
    for each in getattr(info, "siblings", None) or []:
        expected = _expected(each.size, each.lfs, each.blob_id)
        if expected.sha256 is None and expected.git_sha1 is None:
            url = hf_hub_url(repo, each.rfilename, repo_type=repo_type, revision=commit, endpoint=api.endpoint)
            metadata = get_hf_file_metadata(url)
            etag = metadata.etag or ""
            expected = Expected(metadata.size, _hexadecimal(etag, 64), _hexadecimal(etag, 40))
        found[each.rfilename] = expected
    return found


def _expected(size: int | None, lfs: Any, blob_id: str | None) -> Expected:
    if lfs is not None:
        return Expected(lfs["size"], _hexadecimal(lfs["sha256"], 64))
    return Expected(size, git_sha1=_hexadecimal(blob_id or "", 40))


def _hexadecimal(text: str, length: int) -> str | None:
    """A hash of so many digits in lower case; None for anything else."""
    text = text.lower()
    return text if len(text) == length and not set(text) - set("0123456789abcdef") else None


@contextmanager
def _in_words(api: HfApi, repo: str, repo_type: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's library raises into one sentence with the remedy."""
    from huggingface_hub import errors

    endpoint = str(api.endpoint)
    # requests, httpx or its successor, as the library's version has it; each derives its failures from this class.
    transport: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except errors.GatedRepoError as error:
        raise TesselError(_gated(repo, f"{endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo}")) from error
    except errors.RepositoryNotFoundError as error:
        raise TesselError(_not_found(endpoint, repo, repo_type)) from error
    except errors.RevisionNotFoundError as error:
        raise TesselError(_no_revision(api, repo, repo_type, revision or "main", transport)) from error
    except errors.HFValidationError as error:
        raise UsageError(f"{repo!r} is no name of a repository, which is OWNER/NAME.{_if_a_path(repo)}") from error
    except errors.OfflineModeIsEnabled as error:
        raise TesselError(
            "The Hugging Face hub is switched off by HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) in the environment: "
            "unset it for this command."
        ) from error
    except errors.HfHubHTTPError as error:
        raise TesselError(_refusal(endpoint, repo, error)) from error
    except (OSError, transport) as error:
        raise TesselError(
            f"{endpoint} cannot be reached ({_first_line(error)}). Check the network (HTTPS_PROXY if there is a "
            "proxy), or set HF_ENDPOINT to a mirror."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TesselError(
            f"{endpoint} does not answer as the hub does ({type(error).__name__}: {_first_line(error)}). "
            "Check HF_ENDPOINT, or whether a proxy wants a login first."
        ) from error


def _refusal(endpoint: str, repo: str, error: Any) -> str:
    status = error.response.status_code if error.response is not None else None
    if status == 401:
        return (
            f"{endpoint} does not accept the token. Set HF_TOKEN to a valid one, or unset it for a public repository."
        )
    if status == 403:
        return f"{endpoint} denies {repo} to this token. Give HF_TOKEN of an account that may read it."
    if status == 429:
        return f"{endpoint} has had too many requests from here. Wait some minutes, or set HF_TOKEN."
    return f"{endpoint} fails for {repo} ({_first_line(error)}). Try again later, or set HF_ENDPOINT to a mirror."


def _gated(repo: str, page: str) -> str:
    return f"{repo} is gated or private: accept its terms at {page}, and set HF_TOKEN to a token of that account."


def _not_found(endpoint: str, repo: str, repo_type: str) -> str:
    other = "model" if repo_type == "dataset" else "dataset"
    login = "" if os.environ.get("HF_TOKEN") else ", and for a private one set HF_TOKEN"
    return (
        f"{endpoint} has no {repo_type} {repo}, or hides it. Check the spelling; for a {other} give "
        f"--repo-type {other}{login}.{_if_a_path(repo)}"
    )


def _if_a_path(repo: str) -> str:
    """What is there on this machine, if REPO was meant as a path."""
    folder = Path(repo).parent
    try:
        near = nearest(Path(repo).name, [entry.name for entry in folder.iterdir()], similarity=0.5)
    except OSError:
        return ""
    return f" On this machine {folder.absolute()} holds {named(near)}." if near else ""


def _no_revision(api: HfApi, repo: str, repo_type: str, revision: str, transport: type[Exception]) -> str:
    try:
        refs = api.list_repo_refs(repo, repo_type=repo_type)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
    except (OSError, transport, ValueError, KeyError, TypeError):
        names = []
    near = nearest(revision, names)
    there = f" It has {named(near or names)}." if names else ""
    return f"{repo} has no revision {revision}.{there} Give --revision a branch, a tag or a commit of it."


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""`tessel download`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tessel.config.download_rules import is_address
from tessel.config.verbs import DownloadConfig
from tessel.download import hub, modelscope
from tessel.download.address import list_address
from tessel.download.archive import SUFFIXES, unpack
from tessel.download.checksums import SUMS_NAME, difference, digest_of, read_sums
from tessel.download.pool import fetch_all
from tessel.download.record import RECORD_NAME, Record, alone
from tessel.download.remote import Expected, Listing, RemoteFile, in_words, inside, named, select
from tessel.download.transfer import INCOMPLETE, Retries, is_out_of_place
from tessel.download.verify import verify
from tessel.errors import TesselError, UsageError
from tessel.runtime.files import require_free, require_path, require_writable
from tessel.runtime.impostor import SNIFFED_BYTES, impostor
from tessel.runtime.log import log, progress

RETRIES = Retries()


def download(cfg: DownloadConfig) -> None:
    """Do what `tessel download` was asked for.

    Raises:
        TesselError: something could not be had or is not what it should be.
    """
    if cfg.verify is not None:
        verify(cfg.verify, cfg.sha256sums, cfg.workers)
        return
    assert cfg.repo is not None
    sums_file = None if cfg.sha256sums is None else require_path(cfg.sha256sums, "--sha256sums")
    if is_address(cfg.repo):
        listing = list_address(cfg.repo, cfg.sha256)
        folder = Path(cfg.local_dir or ".")
        if cfg.unpack and not listing.files[0].path.lower().endswith(SUFFIXES):
            raise UsageError(f"--unpack: {listing.files[0].path} is none of {', '.join(SUFFIXES)}. Leave it out.")
    else:
        _refuse_path(cfg.repo)
        folder = Path(cfg.local_dir or cfg.repo.rsplit("/", 1)[-1])
        listed = modelscope.list_repository if cfg.source == "modelscope" else hub.list_repository
        listing = listed(cfg.repo, cfg.repo_type, cfg.revision)
    files = select(listing.files, cfg.include, cfg.exclude)
    require_writable(folder, "--local-dir")
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        _bring(cfg, listing, files, folder, sums_file)


def _bring(
    cfg: DownloadConfig, listing: Listing, files: Sequence[RemoteFile], folder: Path, sums_file: Path | None
) -> None:
    record = Record.read(folder)
    files = [_with_sums(file, _sums_for(folder, sums_file)) for file in files]
    missing = [file for file in files if not _is_here(file, folder, record)]
    missing_bytes = sum(_missing_bytes(file, folder) for file in missing)
    all_bytes = sum(file.expected.size or 0 for file in files)
    size = f", {in_words(all_bytes)}" if all_bytes else ""
    here = f"; {len(files) - len(missing)} of them are here" if len(missing) < len(files) else ""
    log(f"{listing.title}: {len(files)} {'file' if len(files) == 1 else 'files'}{size}{here}")
    require_free(folder, missing_bytes, listing.title)
    begin_s = time.monotonic()
    if missing:
        fetch_all(listing, missing, folder, record, cfg.workers, RETRIES)
        log(f"{in_words(missing_bytes)} came in {time.monotonic() - begin_s:.1f} s" if missing_bytes else "it came")
    record.save()
    _check_sums(folder, sums_file, record, [file.path for file in files])
    if cfg.unpack:
        _unpack(files[0], folder, record)
    log(f"{folder}: {_checks(record, files)}")


def _refuse_path(repo: str) -> None:
    """A path of this machine where a repository is meant."""
    if repo.startswith((".", "/", "~")) or repo.count("/") > 1 or "\\" in repo:
        path = require_path(Path(repo).expanduser(), "REPO")
        raise UsageError(
            f"REPO is {path}, which is on this machine: there is nothing to fetch. Give OWNER/NAME or an http(s) "
            f"address; to check what was downloaded, --verify {path}."
        )


def _sums_for(folder: Path, sums_file: Path | None) -> tuple[dict[str, str], str]:
    """What SHA256SUMS says, and its name for messages."""
    path = sums_file if sums_file is not None else folder / SUMS_NAME
    return (read_sums(path), str(path)) if path.is_file() else ({}, str(path))


def _with_sums(file: RemoteFile, sums: tuple[dict[str, str], str]) -> RemoteFile:
    """`file` with what SHA256SUMS says of it, so that a wrong one never gets its name."""
    listed, says = sums
    sha256 = listed.get(file.path)
    if sha256 is None or file.path == SUMS_NAME:
        return file
    known = file.expected
    if known.sha256 not in (None, sha256):
        raise TesselError(
            f"{file.path}: {says} says sha256 {sha256} and {known.says} says {known.sha256}. They speak of different "
            "versions: give the --revision that the list was made for, or do without the list."
        )
    return replace(file, expected=replace(known, sha256=sha256, sha256_says=says))


def _is_here(file: RemoteFile, folder: Path, record: Record) -> bool:
    """Whether the file lies there, whole and right; puts one on record that another tool has fetched."""
    if record.is_finished(file.path, file.expected):
        entry = record.get(file.path)
        if file.expected != Expected(says=file.expected.says) or (entry is not None and entry.source == file.source):
            return True
    path = inside(folder, file.path, file.source)
    if not path.exists():
        return False
    if not path.is_file():
        raise TesselError(f"{path} is a folder, and a file of that name is to be fetched. Move it away.")
    is_known = file.expected.sha256 is not None or file.expected.git_sha1 is not None
    if not is_known:
        if record.get(file.path) is not None:
            return False
        raise TesselError(
            f"{path} is there already, and nothing tells whether it is the right one. Move it away, or give "
            "--sha256 or --sha256sums."
        )
    if file.expected.size not in (None, path.stat().st_size):
        return False
    with progress(f"checking {file.path} (MB)", path.stat().st_size / 1e6) as display:
        digest = digest_of(path, lambda count: display.advance(count / 1e6), file.expected.git_sha1 is not None)
    with open(path, "rb") as opened:
        found = impostor(opened.read(SNIFFED_BYTES))
    if difference(digest, file.expected) is not None or is_out_of_place(found, file):
        return False
    record.finish(file.path, digest, file.source, "what was there")
    return True


def _missing_bytes(file: RemoteFile, folder: Path) -> int:
    half = folder / (file.path + INCOMPLETE)
    return max(0, (file.expected.size or 0) - (half.stat().st_size if half.is_file() else 0))


def _check_sums(folder: Path, sums_file: Path | None, record: Record, paths: Sequence[str]) -> None:
    """A list that came with the files is only known now."""
    listed, says = _sums_for(folder, sums_file)
    wrong = []
    for path in paths:
        entry = record.get(path)
        if path != SUMS_NAME and path in listed and entry is not None and entry.sha256 != listed[path]:
            wrong.append(f"{path}: its sha256 is {entry.sha256} and {says} says {listed[path]}")
    if wrong:
        more = f"\n... and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise TesselError("\n".join(wrong[:10]) + more + "\nThe files agree with the hub, so the list is of others.")
    agreed = [path for path in paths if path in listed and path != SUMS_NAME]
    if agreed:
        unlisted = [path for path in paths if path not in listed and path != SUMS_NAME]
        rest = f"; it does not list {named(unlisted)}" if unlisted else ""
        log(f"{len(agreed)} files agree with {says}{rest}")


def _unpack(file: RemoteFile, folder: Path, record: Record) -> None:
    archive = folder / file.path
    source = f"archive:{file.path}"
    earlier = [path for path, entry in record.items() if entry.source == source]
    if earlier and all((folder / path).is_file() for path in earlier):
        log(f"{archive} was unpacked before: {len(earlier)} files")
        return
    digests = unpack(archive, folder)
    for path, digest in digests.items():
        record.finish(path, digest, source, f"what {file.path} holds")
    record.save()
    log(f"{archive} unpacked: {len(digests)} files, {in_words(sum(digest.size for digest in digests.values()))}")


def _checks(record: Record, files: Sequence[RemoteFile]) -> str:
    """Against what the files were checked, in words."""
    counts: dict[str, int] = {}
    for file in files:
        entry = record.get(file.path)
        checked = entry.checked if entry is not None else None
        counts[checked or "nothing"] = counts.get(checked or "nothing", 0) + 1
    parts = [
        f"{count} by the {how}" for how, count in sorted(counts.items()) if how not in ("nothing", "what was there")
    ]
    if counts.get("what was there"):
        parts.append(f"{counts['what was there']} that lay there are right")
    if counts.get("nothing"):
        parts.append("not checked, since nothing says what it should be (--sha256)")
    return f"checked: {', '.join(parts)}; on record in {RECORD_NAME}"

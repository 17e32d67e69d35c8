"""Archives from strangers: nothing leaves the folder, whatever their members are called or are."""

from __future__ import annotations

import gzip
import io
import random
import stat
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tessel.download import archive
from tessel.download.archive import unpack
from tessel.errors import TesselError

Change = Callable[[tarfile.TarInfo], None]


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A folder to unpack into; what lies beside it must stay as it is."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "precious").write_text("precious")
    folder = tmp_path / "beside" / "box"
    folder.mkdir()
    return folder


def everything(folder: Path) -> dict[str, bytes | None]:
    """Path -> content, or None for a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("A.TAR.XZ", "w:xz"), ("a.tbz2", "w:bz2")],
)
def test_a_tar_unpacks(name: str, mode: str, box: Path, tmp_path: Path) -> None:
    long = "d" * 90 + "/" + "f" * 150
    path = write_tar(
        tmp_path / name,
        member("./", type=tarfile.DIRTYPE),
        member("./sub/run.sh", b"#!", mode=0o755),
        member(long, b"long"),
        member("sub/empty"),
        mode=mode,
    )
    digests = unpack(path, box)
    assert {each: content for each, content in everything(box).items() if content is not None} == {
        "sub/run.sh": b"#!",
        long: b"long",
        "sub/empty": b"",
    }
    assert digests.keys() == {"sub/run.sh", long, "sub/empty"}
    assert (box / "sub" / "run.sh").stat().st_mode & stat.S_IXUSR


def test_a_zip_unpacks(box: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("sub/a.txt", "a" * 1000)
        zipped.writestr("b.txt", "b")
        zipped.mkdir("empty")
    digests = unpack(path, box)
    assert digests["sub/a.txt"].size == 1000
    assert everything(box) == {"sub": None, "sub/a.txt": b"a" * 1000, "b.txt": b"b", "empty": None}


def test_links_inside_become_copies(box: Path, tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tgz",
        member("a/first", type=tarfile.SYMTYPE, linkname="../b/second"),
        member("b/second", type=tarfile.SYMTYPE, linkname="real"),
        member("b/real", b"real"),
        member("hard", type=tarfile.LNKTYPE, linkname="b/real"),
    )
    digests = unpack(path, box)
    for name in ("a/first", "b/second", "b/real", "hard"):
        assert (box / name).read_bytes() == b"real"
        assert not (box / name).is_symlink()
    assert len({digest.sha256 for digest in digests.values()}) == 1


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([member("../evil", b"x")], "would leave the folder"),
        ([member("a/../../evil", b"x")], "would leave the folder"),
        ([member("/tmp/evil", b"x")], "would leave the folder"),
        ([member("..", type=tarfile.DIRTYPE)], "would leave the folder"),
        ([member("a\\..\\..\\evil", b"x")], "would leave the folder"),
        ([member("C:/evil", b"x")], "would leave the folder"),
        ([member("out", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "is a link to '/etc/passwd'"),
        ([member("out", type=tarfile.SYMTYPE, linkname="../precious")], "is a link to '../precious'"),
        ([member("out", type=tarfile.LNKTYPE, linkname="../precious")], "is a link to '../precious'"),
        ([member("out", type=tarfile.SYMTYPE, linkname=".."), member("out/evil", b"x")], "is a link to '..'"),
        (
            [member("a", type=tarfile.SYMTYPE, linkname="b"), member("b", type=tarfile.SYMTYPE, linkname="a")],
            "is a link",
        ),
        ([member("d/e", b"x"), member("l", type=tarfile.SYMTYPE, linkname="d")], "is a link to 'd', which is no file"),
        ([member("disk", type=tarfile.BLKTYPE)], "disk is a device"),
        ([member("tty", type=tarfile.CHRTYPE)], "tty is a device"),
        ([member("pipe", type=tarfile.FIFOTYPE)], "pipe is a device"),
        ([member("same", b"1"), member("./same", b"2")], "holds same twice"),
        ([member("both", b"1"), member("both/file", b"2")], "as a file and as a folder"),
    ],
)
def test_a_tar_that_reaches_out_is_refused_whole(
    members: list[tuple[tarfile.TarInfo, bytes]], words: str, box: Path, tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "a.tgz", member("good", b"good"), *members)
    before = everything(tmp_path / "beside")
    with pytest.raises(TesselError, match=None) as caught:
        unpack(path, box)
    assert words in str(caught.value)
    assert everything(tmp_path / "beside") == before


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil"])
def test_a_zip_that_reaches_out_is_refused_whole(name: str, box: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("good", "good")
        zipped.writestr(zipfile.ZipInfo(name), "evil")
    with pytest.raises(TesselError, match="would leave the folder"):
        unpack(path, box)
    assert everything(box) == {}


def test_a_link_in_a_zip(box: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    link = zipfile.ZipInfo("link")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(link, "../precious")
    with pytest.raises(TesselError, match="is a link to '../precious'"):
        unpack(path, box)
    assert everything(box) == {}


def test_a_bomb_is_refused(box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_SMALL_BYTES", 2**20)
    for size, is_refused in ((2**20, False), (2**20 + 1, True)):
        path = write_tar(tmp_path / f"{size}.tgz", member(f"zeros{size}", bytes(size)))
        if is_refused:
            with pytest.raises(TesselError, match="unpacks to more than 1.0 MB"):
                unpack(path, box)
        else:
            unpack(path, box)
    assert everything(box) == {"zeros1048576": bytes(2**20)}


def test_too_many_members(box: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_MEMBERS", 3)
    path = write_tar(tmp_path / "a.tgz", *(member(str(number)) for number in range(4)))
    with pytest.raises(TesselError, match="holds more than 3 files"):
        unpack(path, box)
    assert everything(box) == {}


def test_a_header_of_gigabytes_takes_no_memory(box: Path, tmp_path: Path) -> None:
    """tarfile reads an extended header whole, so that its size must be refused before."""
    header = tarfile.TarInfo("huge")
    header.type, header.size = tarfile.XHDTYPE, 2**32
    path = tmp_path / "a.tgz"
    path.write_bytes(gzip.compress(header.tobuf() + bytes(2**26), 1))
    tracemalloc.start()
    try:
        with pytest.raises(TesselError, match="no whole archive"):
            unpack(path, box)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_what_is_there_is_not_replaced(box: Path, tmp_path: Path) -> None:
    (box / "sub").mkdir()
    path = write_tar(tmp_path / "a.tgz", member("sub/file", b"x"), member("other", b"y"))
    with pytest.raises(TesselError, match="holds sub, which .* has already"):
        unpack(path, box)
    assert everything(box) == {"sub": None}


def test_an_unknown_kind(box: Path, tmp_path: Path) -> None:
    (tmp_path / "a.rar").write_bytes(b"Rar!")
    with pytest.raises(TesselError, match="known are .zip, .tar, "):
        unpack(tmp_path / "a.rar", box)


@pytest.mark.parametrize("kind", ["tar", "tgz", "txz", "tbz2", "zip"])
def test_damaged_archives_give_an_error_in_words(kind: str, box: Path, tmp_path: Path) -> None:
    """Cut, flipped and overwritten: it unpacks, or is refused with a sentence, and nothing leaves the folder."""
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
            zipped.writestr("a/b.txt", "text " * 300)
            zipped.writestr("c.txt", "c")
    else:
        mode = {"tar": "w", "tgz": "w:gz", "txz": "w:xz", "tbz2": "w:bz2"}[kind]
        write_tar(path, member("a/b.txt", b"text " * 300), member("c.txt", b"c"), mode=mode)
    whole, draw, refused = path.read_bytes(), random.Random(3), 0
    for number in range(120):
        damaged = bytearray(whole)
        if number % 3 == 0:
            del damaged[draw.randrange(len(damaged)) :]
        elif number % 3 == 1:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        else:
            at = draw.randrange(len(damaged))
            damaged[at : at + 8] = draw.randbytes(8)
        path.write_bytes(damaged)
        folder = box / str(number)
        folder.mkdir()
        try:
            unpack(path, folder)
        except TesselError:
            refused += 1
            assert everything(folder) == {}
    # A tar has no hash of its contents, only of its headers.
    assert refused > 10
    assert sorted(each.name for each in box.parent.iterdir()) == ["box", "precious"]

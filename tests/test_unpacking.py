"""Archives of the true formats, and those that were made to do harm."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from smpconv_zoo import unpacking
from smpconv_zoo.unpacking import ArchiveError, Limits, Unpacked, sync_tree, unpack

FILES = {"top/a.txt": b"alpha" * 1000, "top/deep/er/b.bin": bytes(range(256)), "top/empty": b""}
LIMITS = Limits(files=20, bytes=100_000)


def tar_of(path: Path, members: Sequence[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return path


def plain(name: str, data: bytes = b"data") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), data


def special(name: str, kind: bytes, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


def zip_of(path: Path, members: Sequence[tuple[str | zipfile.ZipInfo, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data, zipfile.ZIP_DEFLATED)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


MAKERS: dict[str, Callable[[Path], Path]] = {
    "tar": lambda path: tar_of(path, [plain(*item) for item in FILES.items()]),
    "tar.gz": lambda path: tar_of(path, [plain(*item) for item in FILES.items()], "w:gz"),
    "zip": lambda path: zip_of(path, list(FILES.items())),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_archives_are_unpacked_byte_for_byte(tmp_path: Path, out: Path, kind: str) -> None:
    # A plain tar that is called .tar.gz, as that of ImageNet-V2 is: what it holds counts, not its name.
    archive = MAKERS[kind](tmp_path / "a.tar.gz")
    seen: list[tuple[int, int]] = []
    done = unpack(archive, out, LIMITS, progress=lambda *at: seen.append(at))
    assert tree(out) == FILES and done == Unpacked(3, 5256)
    assert seen == sorted(seen) and len(seen) == 3 and all(total == archive.stat().st_size for _, total in seen)
    sync_tree(out)


@pytest.mark.parametrize("kind", MAKERS)
def test_members_are_renamed_and_left_out(tmp_path: Path, out: Path, kind: str) -> None:
    archive = MAKERS[kind](tmp_path / "a")
    done = unpack(archive, out, LIMITS, lambda name: name.rpartition("/")[2] if name.endswith("b.bin") else None)
    assert tree(out) == {"b.bin": FILES["top/deep/er/b.bin"]} and done.files == 1
    with pytest.raises(ArchiveError, match="none of the files that are looked for"):
        unpack(archive, out, LIMITS, lambda name: None)


def test_a_single_file_of_gzip(tmp_path: Path, out: Path) -> None:
    archive = tmp_path / "digits-idx1-ubyte.gz"
    archive.write_bytes(gzip.compress(b"\0\0\x08\x01" + bytes(996)))
    assert unpack(archive, out, Limits(1, 1000)) == Unpacked(1, 1000)
    assert tree(out) == {"digits-idx1-ubyte": b"\0\0\x08\x01" + bytes(996)}


def test_folders_dots_and_permissions(tmp_path: Path, out: Path) -> None:
    info, data = plain("./yes/./a.wav")
    info.mode, info.uid = 0o4777, 12345
    archive = tar_of(
        tmp_path / "a.tar", [special("./", tarfile.DIRTYPE), special("yes", tarfile.DIRTYPE), (info, data)]
    )
    names: list[str] = []
    unpack(archive, out, LIMITS, lambda name: names.append(name) or name)  # type: ignore[func-returns-value]
    assert names == ["", "yes", "yes/a.wav"] and tree(out) == {"yes/a.wav": b"data"}
    assert not (out / "yes/a.wav").stat().st_mode & (stat.S_ISUID | stat.S_IXUSR)


@pytest.mark.parametrize(
    "name", ["../out.txt", "a/../../out.txt", "/etc/out.txt", "..\\out.txt", "a\\..\\..\\out", "C:\\out.txt", "\\out"]
)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_lead_out(tmp_path: Path, out: Path, kind: str, name: str) -> None:
    archive = tmp_path / "a"
    if kind == "tar":
        tar_of(archive, [plain("good"), plain(name)])
    else:
        zip_of(archive, [("good", b"data"), (name, b"data")])
    with pytest.raises(ArchiveError, match="leads out of the folder"):
        unpack(archive, out, LIMITS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"] and set(tree(out)) <= {"good"}
    # Not by way of the new name either.
    with pytest.raises(ArchiveError, match="leads out of the folder"):
        unpack(MAKERS["tar"](tmp_path / "b"), out, LIMITS, lambda _: name)


@pytest.mark.parametrize(
    "member",
    [
        special("link", tarfile.SYMTYPE, "/etc/passwd"),
        special("link", tarfile.SYMTYPE, "good"),
        special("link", tarfile.LNKTYPE, "../../secret"),
        special("link", tarfile.LNKTYPE, "good"),
        special("device", tarfile.CHRTYPE),
        special("device", tarfile.BLKTYPE),
        special("pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda member: f"{member[0].type!r}-{member[0].linkname}",
)
def test_links_and_devices(tmp_path: Path, out: Path, member: tuple[tarfile.TarInfo, bytes]) -> None:
    archive = tar_of(tmp_path / "a.tar", [plain("good"), member, plain(f"{member[0].name}/x")])
    with pytest.raises(ArchiveError, match="neither a plain file nor a folder"):
        unpack(archive, out, LIMITS)
    assert set(tree(out)) == {"good"}


def test_a_file_of_holes(tmp_path: Path, out: Path) -> None:
    info = tarfile.TarInfo("holes")
    info.pax_headers = {"GNU.sparse.map": "0,4", "GNU.sparse.size": str(2**40)}
    with pytest.raises(ArchiveError, match="neither a plain file nor a folder"):
        unpack(tar_of(tmp_path / "a.tar", [(info, b"data")]), out, LIMITS)
    assert tree(out) == {}


def test_a_link_in_a_zip(tmp_path: Path, out: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(ArchiveError, match="neither a plain file nor a folder"):
        unpack(zip_of(tmp_path / "a.zip", [(info, b"/etc/passwd")]), out, LIMITS)
    assert tree(out) == {}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("a", "a"), ("a", "A"), ("a", "./a"), ("a", "a/b"), ("a/b", "a")])
def test_names_that_come_twice(tmp_path: Path, out: Path, names: tuple[str, str]) -> None:
    for archive in (
        tar_of(tmp_path / "a.tar", [plain(name) for name in names]),
        zip_of(tmp_path / "a.zip", [(name, b"data") for name in names]),
    ):
        folder = out / archive.suffix
        folder.mkdir()
        with pytest.raises(ArchiveError, match=r"twice|of one name"):
            unpack(archive, folder, LIMITS)


def test_too_many_members(tmp_path: Path, out: Path) -> None:
    for archive in (
        tar_of(tmp_path / "a.tar", [plain(f"{i}") for i in range(21)]),
        zip_of(tmp_path / "a.zip", [(f"{i}", b"") for i in range(21)]),
    ):
        with pytest.raises(ArchiveError, match=r"more than 20 members|21 members, 20 at most"):
            unpack(archive, out, LIMITS, lambda name: None)


def test_bombs(tmp_path: Path, out: Path) -> None:
    zeros = b"0" * 1_000_000
    gz = tmp_path / "a.gz"
    gz.write_bytes(gzip.compress(zeros))
    assert gz.stat().st_size < 2000
    bombs = [
        gz,
        tar_of(tmp_path / "a.tar.gz", [plain("a", zeros)], "w:gz"),
        # What is left out is decompressed all the same.
        tar_of(tmp_path / "b.tar.gz", [plain("left out", bytes(9_000_000)), plain("z")], "w:gz"),
        zip_of(tmp_path / "a.zip", [("a", zeros)]),
        zip_of(tmp_path / "b.zip", [(str(i), zeros[:50_000]) for i in range(3)]),
    ]
    for bomb in bombs:
        with pytest.raises(ArchiveError, match="beyond the bytes that it may hold"):
            unpack(bomb, out, LIMITS, lambda name: None if name == "left out" else name)
        assert sum(len(data) for data in tree(out).values()) <= LIMITS.bytes
        for path in out.iterdir():
            path.unlink()


def test_a_zip_that_lies_about_its_sizes(tmp_path: Path, out: Path) -> None:
    archive = zip_of(tmp_path / "a.zip", [("a", bytes(1_000_000))])
    raw = archive.read_bytes()
    archive.write_bytes(raw.replace((1_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(ArchiveError, match="damaged"):
        unpack(archive, out, LIMITS)
    assert all(len(data) <= LIMITS.bytes for data in tree(out).values())


def test_a_header_as_large_as_memory(tmp_path: Path, out: Path) -> None:
    # The long name of a member is a member of its own, which tarfile would read whole.
    info = tarfile.TarInfo("a")
    info.pax_headers = {"comment": "x" * 5_000_000}
    archive = tar_of(tmp_path / "a.tar.gz", [plain("good"), (info, b"data")], "w:gz")
    with pytest.raises(ArchiveError, match="a header of 5,0"):
        unpack(archive, out, Limits(20, 10**9))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("share", [0, 0.3, 0.6, 0.9])
def test_what_is_cut_off(tmp_path: Path, out: Path, kind: str, share: float) -> None:
    archive = tmp_path / "a"
    if kind == "tar":
        tar_of(archive, [plain("a", bytes(50_000)), plain("b", b"data" * 9000)])
    else:
        MAKERS[kind](archive)
    raw = archive.read_bytes()
    archive.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(ArchiveError):
        unpack(archive, out, LIMITS)


@pytest.mark.parametrize(
    "content", [b"<!doctype html><title>quota</title>" * 50, b"", b"PK\x05\x06" + bytes(18), bytes(999)]
)
def test_what_is_no_archive(tmp_path: Path, out: Path, content: bytes) -> None:
    archive = tmp_path / "a.zip"
    archive.write_bytes(content)
    with pytest.raises(ArchiveError, match=r"damaged, or no archive|none of the files"):
        unpack(archive, out, LIMITS)


def test_a_flipped_byte(tmp_path: Path, out: Path) -> None:
    archive = MAKERS["zip"](tmp_path / "a.zip")
    raw = bytearray(archive.read_bytes())
    raw[60] ^= 1
    archive.write_bytes(bytes(raw))
    with pytest.raises(ArchiveError, match="damaged"):
        unpack(archive, out, LIMITS)


def test_many_files_reach_the_disk_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(unpacking.os, "sync", lambda: called.append(1))
    monkeypatch.setattr(unpacking, "SYNCED_ONE_BY_ONE", 2)
    for i in range(3):
        (tmp_path / str(i)).write_bytes(b"")
        sync_tree(tmp_path)
    assert called == [1]

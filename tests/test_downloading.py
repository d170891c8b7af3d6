"""Downloads from a server that breaks off, forgets, changes its mind, or lies."""

from __future__ import annotations

import email.message
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import FileServer, file_server
from golden_files import ROOT
from small_disk import mounted

from smpconv_zoo import downloading
from smpconv_zoo.downloading import Downloaded, DownloadError, Patience, check_space, download, part_of
from smpconv_zoo.pace import Pace

DATA = random.Random(1).randbytes(3_000_000)
OTHER = random.Random(2).randbytes(3_000_000)
QUICK = Patience(attempts=3, first_wait=0.01, longest_wait=0.02, timeout=5)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as running:
        yield running


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "a.bin"


def fetched(urls: str | list[str], target: Path, **options: object) -> Downloaded:
    options = {"patience": QUICK, "sha256": sha256(DATA), **options}
    return download([urls] if isinstance(urls, str) else urls, target, **options)  # type: ignore[arg-type]


def assert_clean(target: Path, data: bytes = DATA) -> None:
    assert target.read_bytes() == data
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_file_is_fetched_once(server: FileServer, target: Path) -> None:
    seen: list[tuple[int, int]] = []
    url = server.put("a.bin", DATA)
    done = fetched(url, target, size=len(DATA), progress=lambda *at: seen.append(at))
    assert done == Downloaded(target, url, sha256(DATA), len(DATA))
    assert seen[-1] == (len(DATA), len(DATA)) and sorted(seen) == seen
    assert_clean(target)
    assert fetched(url, target) == Downloaded(target, None, sha256(DATA), len(DATA))
    assert len(server.log) == 1
    target.write_bytes(b"other bytes under its name")
    assert fetched(url, target).url == url
    assert_clean(target)


@pytest.mark.parametrize("validator", ["etag", "date", "weak", None])
@pytest.mark.parametrize("known", [True, False])
def test_what_is_cut_off_is_gone_on_with(server: FileServer, target: Path, validator: str | None, known: bool) -> None:
    url = server.put("a.bin", DATA, validator=validator, cut=[1_000_000, 1_500_000])
    done = fetched(url, target, sha256=sha256(DATA) if known else None)
    assert done.sha256 == sha256(DATA)
    assert_clean(target)
    asked = [(request.range, request.status) for request in server.log]
    if known or validator in ("etag", "date"):
        assert asked == [(None, 200), ("bytes=1000000-", 206), ("bytes=2500000-", 206)]
        assert sum(request.sent for request in server.log) == len(DATA)
    else:
        # Nothing would tell a piece of another version: all of it, every time.
        assert asked == [(None, 200)] * 3
    if validator in ("etag", "date"):
        assert all(request.if_range for request in server.log[1:])
    else:
        assert not any(request.if_range for request in server.log)


def test_a_later_call_goes_on(server: FileServer, target: Path) -> None:
    url = server.put("a.bin", DATA, cut=[2_000_000] + [0] * 9)
    with pytest.raises(
        DownloadError, match=r"the connection ends after 2,000,000 of 3,000,000 bytes, after \d attempts"
    ):
        fetched(url, target)
    assert not target.exists() and part_of(target).stat().st_size == 2_000_000
    server.files["a.bin"].cut.clear()
    server.log.clear()
    fetched(url, target)
    assert [request.sent for request in server.log] == [1_000_000]
    assert_clean(target)


@pytest.mark.parametrize("validator", ["etag", "date", None])
@pytest.mark.parametrize("if_range", [True, False])
def test_a_file_that_changes_between_two_pieces(
    server: FileServer, target: Path, validator: str | None, if_range: bool
) -> None:
    url = server.put("a.bin", OTHER, validator=validator, cut=[2_000_000] + [0] * 9)
    with pytest.raises(DownloadError):
        fetched(url, target)
    server.put("a.bin", DATA, validator=validator, if_range=if_range)
    assert fetched(url, target).sha256 == sha256(DATA)
    assert_clean(target)


def test_without_a_digest_pieces_of_two_versions_are_never_joined(server: FileServer, target: Path) -> None:
    for how, version in (({"if_range": False}, DATA[:-5]), ({"if_range": False}, DATA), ({}, DATA)):
        url = server.put("a.bin", OTHER, cut=[2_000_000] + [0] * 9)
        with pytest.raises(DownloadError):
            fetched(url, target, sha256=None)
        server.put("a.bin", version, **how)
        assert fetched(url, target, sha256=None).sha256 == sha256(version)
        assert_clean(target, version)
        target.unlink()


def test_a_server_that_knows_no_ranges(server: FileServer, target: Path) -> None:
    url = server.put("a.bin", DATA, ranges=False, cut=[1_000_000])
    fetched(url, target)
    assert [request.status for request in server.log] == [200, 200]
    assert_clean(target)


def test_a_piece_that_the_disk_did_not_keep(server: FileServer, target: Path) -> None:
    url = server.put("a.bin", DATA, cut=[2_000_000] + [0] * 9)
    with pytest.raises(DownloadError):
        fetched(url, target)
    part = part_of(target)
    part.write_bytes(bytes(1000) + part.read_bytes()[1000:])
    server.put("a.bin", DATA)
    server.log.clear()
    fetched(url, target)
    assert [request.status for request in server.log] == [206, 200]
    assert_clean(target)


def test_all_was_here_but_the_name(server: FileServer, target: Path) -> None:
    """Killed between the last byte and the name: the server says 416, as there is nothing more to send."""
    url = server.put("a.bin", DATA)
    part_of(target).write_bytes(DATA)
    fetched(url, target)
    assert [request.status for request in server.log] == [416]
    assert_clean(target)
    target.unlink()
    part_of(target).write_bytes(DATA + b"more than there is")
    fetched(url, target)
    assert_clean(target)


def test_damaged_notes_are_no_obstacle(server: FileServer, target: Path) -> None:
    url = server.put("a.bin", DATA)
    for notes in (b"", b"[]", b"\xff{", b'{"url": 3}'):
        part_of(target).write_bytes(DATA[:1000])
        part_of(target).with_name("a.bin.part.json").write_bytes(notes)
        fetched(url, target)
        assert_clean(target)
        target.unlink()


@pytest.mark.parametrize("status", [404, 403, 410, 401])
def test_a_server_that_has_it_not_is_asked_once(server: FileServer, target: Path, status: int) -> None:
    gone, there = server.put("gone", DATA, statuses=[status] * 9), server.put("a.bin", DATA)
    assert fetched([gone, there], target).url == there
    assert len(server.asked("gone")) == 1
    target.unlink()
    with pytest.raises(DownloadError, match=rf"a\.bin could not be fetched\. .*/gone: HTTP {status}"):
        fetched(gone, target)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_a_server_that_is_busy_is_asked_again(server: FileServer, target: Path, status: int) -> None:
    url = server.put("a.bin", DATA, statuses=[status] * 2)
    fetched(url, target)
    assert [request.status for request in server.log] == [status, status, 200]
    server.files["a.bin"].statuses = [status] * 9
    target.unlink()
    with pytest.raises(DownloadError, match=rf"HTTP {status} .*after 3 attempts"):
        fetched(url, target)


def test_waits_are_bounded_whatever_a_server_asks_for(server: FileServer, target: Path, monkeypatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    url = server.put("a.bin", DATA, statuses=[503] * 4, headers={"Retry-After": "86400"})
    fetched(url, target, patience=Patience())
    server.put("b.bin", DATA, statuses=[503] * 4, headers={"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"})
    fetched(server.url("b.bin"), target.with_name("b.bin"), patience=Patience())
    server.put("c.bin", DATA, statuses=[503] * 4, headers={"Retry-After": "soon"})
    fetched(server.url("c.bin"), target.with_name("c.bin"), patience=Patience())
    assert waits == [30.0] * 8 + [1, 2, 4, 8]


def test_a_server_that_drips_is_not_listened_to_for_ever(server: FileServer, target: Path) -> None:
    url = server.put("a.bin", DATA, cut=[1] * 1000)
    with pytest.raises(DownloadError, match="after 7 attempts"):
        fetched(url, target, patience=Patience(attempts=3, all_attempts=7, first_wait=0, timeout=5))


def test_a_body_that_drips_is_given_up_and_gone_on_with(server: FileServer, target: Path) -> None:
    """A byte now and then, which no timeout from byte to byte ends."""
    url = server.put("a.bin", DATA, block=1000, pause=0.02)
    slow = Patience(attempts=2, first_wait=0, timeout=5, pace=Pace(500_000, 0.4))
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"less than 500,000 bytes came within 0\.4 s, after 2 attempts"):
        fetched(url, target, patience=slow)
    assert time.monotonic() - start < 4
    here = part_of(target).stat().st_size
    server.put("a.bin", DATA, block=100_000, pause=0.02)
    fetched(url, target, patience=slow)
    assert here > 0 and server.asked("a.bin")[-1].range == f"bytes={here}-"
    assert_clean(target)


def test_a_server_that_says_nothing(target: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/a.bin"
        with pytest.raises(DownloadError, match="timed out"):
            fetched(url, target, patience=Patience(attempts=2, first_wait=0, timeout=0.1))
    with pytest.raises(DownloadError, match="cannot be reached"):
        fetched(url, target)


def test_other_bytes_than_the_published_ones(server: FileServer, target: Path) -> None:
    wrong, right = server.put("wrong", OTHER), server.put("right", DATA)
    with pytest.raises(DownloadError, match=f"sha256 {sha256(OTHER)}, which is not the published file of sha256"):
        fetched(wrong, target)
    assert list(target.parent.iterdir()) == [] and len(server.log) == 1
    assert fetched([wrong, right], target).url == right
    assert_clean(target)


def test_a_file_of_another_size_is_not_even_read(server: FileServer, target: Path) -> None:
    url = server.put("a.bin", DATA)
    for options, message in (
        ({"size": 7}, "a file of 3,000,000 bytes, the published one has 7"),
        ({"most": 1000}, "3,000,000 bytes, 1,000 at most are taken"),
    ):
        with pytest.raises(DownloadError, match=message):
            fetched(url, target, **options)
    server.put("a.bin", DATA, length=False)
    with pytest.raises(DownloadError, match="sends more than 2,000,000 bytes"):
        fetched(url, target, most=2_000_000)
    assert not target.exists()
    assert fetched(url, target).bytes == len(DATA)


def test_an_archive_that_is_labelled_as_encoded_is_taken_as_it_is(server: FileServer, target: Path) -> None:
    # As some servers do with every .gz: the bytes are those of the file.
    fetched(server.put("a.bin", DATA, headers={"Content-Encoding": "x-gzip"}), target)
    assert_clean(target)


def test_redirections(server: FileServer, target: Path) -> None:
    there = server.put("a.bin", DATA, cut=[1_000_000])
    fetched(server.put("moved", DATA, moved=there), target)
    assert [request.range for request in server.asked("a.bin")] == [None, "bytes=1000000-"]
    assert_clean(target)
    target.unlink()
    for elsewhere in ("file:///etc/passwd", "ftp://127.0.0.1/a"):
        with pytest.raises(DownloadError, match=r"not allowed|not trusted"):
            fetched(server.put("moved", DATA, moved=elsewhere), target)
    with pytest.raises(DownloadError):
        fetched(server.put("moved", DATA, moved=server.url("moved")), target)
    for url in ("file:///etc/passwd", "ftp://127.0.0.1/a", "no address"):
        with pytest.raises(DownloadError, match="only http and https"):
            fetched(url, target)
    with pytest.raises(DownloadError, match="No address"):
        fetched([], target)


@pytest.mark.parametrize("checked", [True, False])
def test_a_redirection_from_https_to_http_needs_a_digest(checked: bool) -> None:
    handler = downloading._Redirections(checked)
    request = urllib.request.Request("https://127.0.0.1/a")
    headers = email.message.Message()

    def follow(url: str) -> object:
        return handler.redirect_request(request, io.BytesIO(), 302, "Found", headers, url)

    assert follow("https://127.0.0.1/b") is not None
    if checked:
        assert follow("http://127.0.0.1/b") is not None
        return
    with pytest.raises(urllib.error.HTTPError, match="not trusted") as refused:
        follow("http://127.0.0.1/b")
    refused.value.close()


def test_room_is_asked_for_first(server: FileServer, target: Path) -> None:
    url = server.put("a.bin", DATA)
    with pytest.raises(OSError, match=r"a\.bin needs 1,000,000,003,000,000 bytes and .* are free"):
        fetched(url, target, reserve=10**15)
    assert list(target.parent.iterdir()) == []
    check_space(target.parent, 1, "a byte")


def test_a_disk_that_is_full_keeps_what_fits(server: FileServer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("smpconv_zoo.downloading.SPARE_BYTES", -(2**40))
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=2m", "tmpfs"):
        target = tmp_path / "disk" / "a.bin"
        url = server.put("a.bin", DATA)
        with pytest.raises(OSError, match="No space left on device") as full:
            fetched(url, target)
        assert full.value.filename == str(part_of(target)) and not target.exists()
        kept = part_of(target).stat().st_size
        assert kept > 0
        subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path / "disk")], check=True)
        fetched(url, target)
        assert server.log[-1].range == f"bytes={kept}-"
        assert target.read_bytes() == DATA


def test_a_process_that_is_killed_leaves_what_the_next_goes_on_with(server: FileServer, target: Path) -> None:
    url = server.put("a.bin", DATA, block=50_000, pause=0.02)
    script = (
        "import sys; from pathlib import Path; from smpconv_zoo.downloading import download; "
        "download([sys.argv[1]], Path(sys.argv[2]), sha256=sys.argv[3])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, url, str(target), sha256(DATA)], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 120
    while not (part_of(target).exists() and part_of(target).stat().st_size > 0):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not target.exists()
    kept = part_of(target).stat().st_size
    assert json.loads(part_of(target).with_name("a.bin.part.json").read_text())["total"] == len(DATA)
    server.files["a.bin"].pause = 0
    fetched(url, target)
    assert server.log[-1].range == f"bytes={kept}-" and server.log[-1].sent == len(DATA) - kept
    assert_clean(target)

"""Import of the authors' files: by hand, and from a server that stands in for Google Drive."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from golden_files import golden
from zoo_checkout import ZooHost, copy_package, zoo_host

import smpconv_zoo
from smpconv_zoo import importing
from smpconv_zoo.checkpoints import convert_checkpoint
from smpconv_zoo.importing import import_checkpoint
from smpconv_zoo.pretrained.cards import checkpoint_card, weights_dir
from smpconv_zoo.pretrained.home import card_in_use, imported_file
from smpconv_zoo.pretrained.store import CheckpointError, read_safetensors

ID = "smpconv_tcn_mnist.smnist"


@pytest.fixture(scope="module")
def published() -> Path:
    """The file that stands for the authors' upload."""
    return golden("seq_smnist.pth")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMPCONV_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    return tmp_path / "store"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZooHost]:
    root = tmp_path_factory.mktemp("import")
    with zoo_host(copy_package(root / "checkout"), root / "scratch", os.environ) as running:
        yield running


def other_weights(published: Path, folder: Path, by: float = 1.0) -> Path:
    """The same network with other weights, in a file of the same name."""
    content = torch.load(published, weights_only=True)
    name = "out_layer.bias" if "out_layer.bias" in content["model"] else sorted(content["model"])[0]
    content["model"][name] = content["model"][name] + by
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / published.name)
    return folder / published.name


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --------------------------------------------------------------------------------------------------------- from a file


def test_the_file_is_converted_and_recorded(store: Path, tmp_path: Path, published: Path) -> None:
    done = import_checkpoint(ID, published)
    card, shipped = card_in_use(ID), checkpoint_card(ID)
    assert (card.status, shipped.status) == ("imported", "importable")
    for name in ("network", "arguments", "tensors", "parameters", "data", "paper", "license", "origin"):
        assert getattr(card, name) == getattr(shipped, name), name
    assert card.source == done.source and done.changed and done.trusted == "first use"
    assert (done.source.name, done.source.url) == (published.name, None)
    assert (done.source.sha256, done.source.bytes) == (sha256(published), published.stat().st_size)
    assert (done.source.entry, done.source.averaged) == ("model", False)
    path = imported_file(card)
    assert done.path == str(path) and done.sha256 == sha256(path) == card.files[0].sha256
    # The stored card names no folder of this machine.
    assert str(tmp_path) not in path.with_name("card.json").read_text()
    assert str(published.parent) not in path.with_name("card.json").read_text()

    tensors, _ = read_safetensors(path, card.files[0].sha256)
    expected = convert_checkpoint(published, "smpconv_tcn_mnist")
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[n], expected[n]) for n in expected)
    smpconv_zoo.create_model("smpconv_tcn_mnist").load_state_dict(tensors)
    assert smpconv_zoo.checkpoint_card(ID) == card
    assert list((tmp_path / "scratch").iterdir()) == []


def test_averaged_weights_are_recorded_as_such(store: Path, tmp_path: Path, published: Path) -> None:
    content = torch.load(published, weights_only=True)
    averaged = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in content["model"].items()}
    torch.save({"state_dict": content["model"], "state_dict_ema": averaged}, tmp_path / "both.pth.tar")
    done = import_checkpoint(ID, tmp_path / "both.pth.tar")
    assert (done.source.entry, done.source.averaged) == ("state_dict_ema", True)


def test_the_same_file_again_does_nothing(store: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_checkpoint(ID, published)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    done = import_checkpoint(ID, published)
    assert (done.changed, done.trusted) == (False, "known")
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_a_damaged_store_is_repaired_from_the_same_file(store: Path, published: Path) -> None:
    path = Path(import_checkpoint(ID, published).path)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert import_checkpoint(ID, published).changed
    assert path.read_bytes() == good


def test_another_file_is_refused_unless_it_is_accepted(store: Path, tmp_path: Path, published: Path) -> None:
    first = import_checkpoint(ID, published)
    before = files_in(store)
    other = other_weights(published, tmp_path / "other")
    with pytest.raises(CheckpointError, match="--accept-new") as refused:
        import_checkpoint(ID, other)
    assert sha256(other) in str(refused.value) and first.source.sha256 in str(refused.value)
    assert files_in(store) == before

    done = import_checkpoint(ID, other, accept_new=True)
    assert done.trusted == "accepted" and card_in_use(ID).files[0].sha256 == done.sha256 != first.sha256
    assert Path(first.path).is_file(), "the version before stays"
    with pytest.raises(CheckpointError, match="--accept-new"):
        import_checkpoint(ID, published)


def test_a_stored_card_that_cannot_be_read_says_how_to_replace_it(store: Path, published: Path) -> None:
    done = import_checkpoint(ID, published)
    Path(done.path).with_name("card.json").write_text("{}")
    for attempt in (lambda: card_in_use(ID), lambda: import_checkpoint(ID, published)):
        with pytest.raises(ValueError, match="--accept-new"):
            attempt()
    assert import_checkpoint(ID, published, accept_new=True).changed
    assert card_in_use(ID).status == "imported"


def test_a_declared_file_is_taken_by_hand_and_no_other(store: Path, tmp_path: Path, published: Path) -> None:
    """The way for a machine that cannot reach the Hub."""
    name = "smpconv_tcn_mnist.smnist5k"
    card = checkpoint_card(name)
    with pytest.raises(CheckpointError, match="--file"):
        import_checkpoint(name)
    copy = shutil.copy(weights_dir() / card.files[0].name, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not the file that the card") as refused:
        import_checkpoint(name, published)
    assert sha256(published) in str(refused.value) and card.files[0].sha256 in str(refused.value)
    assert not store.exists()
    done = import_checkpoint(name, copy)
    assert (done.trusted, done.changed, done.sha256) == ("declared", True, card.files[0].sha256)
    assert Path(done.path).read_bytes() == copy.read_bytes()
    assert import_checkpoint(name, copy).changed is False
    assert card_in_use(name) == card, "the package's own comes first"


class Foreign:
    """A pickle that would create a folder if it were executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_files_that_are_not_this_checkpoint(store: Path, tmp_path: Path, published: Path) -> None:
    whole = published.read_bytes()
    padding = b"\0" * len(whole)
    bad = {
        "page.pth": (b"<!DOCTYPE html><html><body>Quota exceeded</body></html>" + padding, "is a web page"),
        "upper.pth": (b"\n <HTML>" + padding, "is a web page"),
        "small.pth": (whole[:1000], "has 1,000 bytes, which cannot be the 370,960 parameters"),
        "empty.pth": (b"", "has 0 bytes"),
        "truncated.pth": (whole[: len(whole) - 9999], "truncated or damaged"),
        "zeros.pth": (padding, "not a file of weights"),
        "foreign.pth": (pickle.dumps([Foreign(tmp_path / "executed"), padding], protocol=2), "it asks for posix.mkdir"),
    }
    for name, (data, message) in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(ID, tmp_path / name)
    with open(tmp_path / "huge.pth", "wb") as file:
        file.truncate(10**9)
    for name, message in (
        ("huge.pth", "has 1,000,000,000 bytes"),
        ("absent.pth", "does not exist"),
        (".", "directory"),
    ):
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(ID, tmp_path / name)
    with pytest.raises(CheckpointError, match="missing keys"):
        import_checkpoint("smpconv_tcn_cifar.scifar10", published)
    with pytest.raises(ValueError, match="did you mean"):
        import_checkpoint("smpconv_tcn_mnist.smnst", published)
    assert not (tmp_path / "executed").exists() and not store.exists()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_file_that_changes_while_it_is_read(
    store: Path, tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copy(published, tmp_path / "copy.pth")
    convert = importing.convert_file

    def convert_then_change(*arguments: Any) -> Any:
        done = convert(*arguments)
        with open(copy, "ab") as file:
            file.write(b"more")
        return done

    monkeypatch.setattr(importing, "convert_file", convert_then_change)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        import_checkpoint(ID, copy)
    assert not store.exists()


# ------------------------------------------------------------------------------------------------------------ downloads


class Drive:
    """Google Drive on loopback: first the page that warns of large files, then the file.

    ``ranges``: whether a part can be asked for. ``after``: bytes of a body that come at once; then one every
    ``drip`` seconds, or none if that is None.
    """

    def __init__(self) -> None:
        self.content, self.name, self.announced, self.page, self.paths = b"", "SMPConv.pth", None, None, []
        self.ranges: list[str | None] | None = None
        self.after: int | None = None
        self.drip: float | None = None
        self.over = threading.Event()
        drive: Any = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                drive.paths.append(self.path)
                if drive.page is not None or "confirm=t" not in self.path:
                    form = (
                        f'<html><form id="download-form" action="{drive.url}/download">'
                        '<input type="hidden" name="confirm" value="t"></form></html>'
                    )
                    data, kind, extra = (drive.page or form).encode(), "text/html; charset=utf-8", {}
                else:
                    data, kind = drive.content, "application/octet-stream"
                    extra = {"Content-Disposition": f'attachment; filename="{drive.name}"'}
                asked = self.headers.get("Range") if extra else None
                if extra and drive.ranges is not None:
                    drive.ranges.append(asked)
                if asked and drive.ranges is not None:
                    start, total = int(asked.removeprefix("bytes=").rstrip("-")), len(data)
                    data = data[start:]
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
                else:
                    self.send_response(200)
                self.send_header("Content-Type", kind)
                for name, value in extra.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(drive.announced or len(data)))
                self.end_headers()
                after = len(data) if drive.after is None or not extra else drive.after
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(data[:after])
                    for place in range(after, len(data)):
                        drive.over.wait(drive.drip)
                        if drive.over.is_set():
                            return
                        self.wfile.write(data[place : place + 1])

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Drive]:
    """gdown, and Google Drive in reach of it."""
    pytest.importorskip("gdown", reason="downloads are gdown's: pip install 'smpconv-zoo[import]'")
    import requests

    drive = Drive()
    get = requests.Session.get

    def redirected(self: Any, url: str, **options: Any) -> Any:
        return get(self, url.replace("https://drive.google.com", drive.url), **options)

    monkeypatch.setattr(requests.Session, "get", redirected)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield drive
    drive.over.set()
    drive.server.shutdown()
    drive.server.server_close()


def test_the_published_file_is_downloaded(
    store: Path, tmp_path: Path, published: Path, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    drive.content = published.read_bytes()
    done = import_checkpoint(ID)
    assert done.source.sha256 == sha256(published) and done.source.name == "SMPConv.pth"
    assert done.source.url == checkpoint_card(ID).origin
    file_id = checkpoint_card(ID).origin.split("/")[5]
    assert f"id={file_id}" in drive.paths[0] and "confirm=t" in drive.paths[-1]
    assert import_checkpoint(ID, published).changed is False, "by hand or by download, the file is the same"
    assert list((tmp_path / "scratch").iterdir()) == [] and not (tmp_path / "home").exists()


@pytest.mark.parametrize("name", ["../../escaped.pth", "a.safetensors", ""])
def test_the_server_does_not_choose_where_a_file_goes(
    store: Path, tmp_path: Path, published: Path, drive: Drive, name: str
) -> None:
    drive.content, drive.name = published.read_bytes(), name
    try:
        done = import_checkpoint(ID)
        assert "/" not in done.source.name
    except CheckpointError as error:
        # A pickle under the name of a safetensors file is no safetensors file.
        assert "safetensors" in str(error)
    assert not list(tmp_path.rglob("escaped.pth"))


def test_downloads_that_fail(store: Path, tmp_path: Path, published: Path, drive: Drive) -> None:
    quota = '<html><p class="uc-error-subcaption">Too many users have viewed this file recently.</p></html>'
    whole = published.read_bytes()
    for page, content, announced, message in (
        (quota, b"", None, "Too many users"),
        ("<html>sign in</html>", b"", None, "could not be downloaded"),
        (None, whole[:-5000], len(whole), "could not be downloaded"),
        (None, whole[:-5000], None, "truncated or damaged"),
        (None, b"<!doctype html>" + whole, None, "is a web page"),
        (None, b"tiny", None, "has 4 bytes"),
    ):
        drive.page, drive.content, drive.announced = page, content, announced
        with pytest.raises(CheckpointError, match=message) as failed:
            import_checkpoint(ID)
        assert "\n" not in str(failed.value)
    drive.server.shutdown()
    drive.server.server_close()
    with pytest.raises(CheckpointError, match="--file"):
        import_checkpoint(ID)
    assert not (store / "checkpoints").exists() and list((tmp_path / "scratch").iterdir()) == []
    assert [path for path in (store / "downloads").rglob("*") if path.suffix != ".lock"] == []


@pytest.mark.parametrize("drip", [None, 0.05])
def test_a_download_that_stalls_is_given_up_and_gone_on_with(
    store: Path, tmp_path: Path, published: Path, drive: Drive, drip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMPCONV_STALL_SECONDS", "1")
    # More than one of the pieces that gdown tells of.
    drive.content, drive.ranges, drive.drip = published.read_bytes(), [], drip
    drive.after = 2**20 + 1000
    assert len(drive.content) > drive.after
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="less than 524,288 bytes came within 1 s") as given_up:
        import_checkpoint(ID)
    message = str(given_up.value)
    assert time.monotonic() - start < 5 and "\n" not in message
    assert "what has come (1,048,576 bytes) is gone on with next time" in message and "--file" in message
    assert not (store / "checkpoints").exists() and list((tmp_path / "scratch").iterdir()) == []
    drive.after = None
    assert import_checkpoint(ID).source.sha256 == sha256(published)
    assert drive.ranges == [None, None, "bytes=1048576-"]
    assert [path.name for path in (store / "downloads").rglob("*")] == [f"{ID}.lock"]


def test_what_cannot_be_gone_on_with_is_fetched_anew(
    store: Path, published: Path, drive: Drive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server knows no ranges, or has less than is here by now."""
    drive.content = published.read_bytes()
    folder = store / "downloads" / ID
    for size in (2**20, 10**7):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{drive.name}abcdefgh.part").write_bytes(bytes(size))
        assert import_checkpoint(ID, accept_new=True).source.sha256 == sha256(published)
        drive.ranges = []
    assert drive.ranges == [] and not folder.exists()


def test_two_downloads_at_once_do_not_write_into_one_file(store: Path, published: Path, drive: Drive) -> None:
    drive.content, drive.ranges = published.read_bytes(), []
    folder = store / "downloads" / ID
    folder.mkdir(parents=True)
    part = folder / f"{drive.name}abcdefgh.part"
    part.write_bytes(bytes(1000))
    with filelock.FileLock(folder.with_name(f"{ID}.lock")):
        assert import_checkpoint(ID).source.sha256 == sha256(published)
    assert part.read_bytes() == bytes(1000) and drive.ranges == [None]


def test_without_gdown_a_sentence_says_how_to_get_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(ImportError, match=r'pip install "smpconv-zoo\[import\]"'):
        import_checkpoint(ID)
    assert not store.exists()


def test_another_downloader_can_be_given(store: Path, published: Path) -> None:
    def download(origin: str, folder: Path) -> Path:
        return Path(shutil.copy(published, folder / "theirs.pth"))

    assert import_checkpoint(ID, download=download).source.name == "theirs.pth"


# --------------------------------------------------------------------------------------------------------- command line


def test_the_command_says_what_was_trusted_and_how_to_check(host: ZooHost, tmp_path: Path, published: Path) -> None:
    home = str(tmp_path / "store")
    shown = (host("list", SMPCONV_HOME=home).out, host("info", ID, SMPCONV_HOME=home).out)
    assert "importable" in shown[1]
    done = host("import", ID, "--file", str(published), SMPCONV_HOME=home)
    assert (done.code, done.err) == (0, "")
    converted = next(Path(home).rglob("*.safetensors"))
    for part in (
        "Trusted on first use",
        sha256(published),
        sha256(converted),
        f"smpconv-zoo eval {ID} --data-dir PATH",
    ):
        assert part in done.out
    line = next(line for line in host("list", SMPCONV_HOME=home).out.splitlines() if line.startswith(f"{ID} "))
    assert "imported" in line
    info = json.loads(host("info", ID, "--json", SMPCONV_HOME=home).out)
    assert info["source"]["sha256"] == sha256(published)
    assert f"imported from {published.name}" in host("info", ID, SMPCONV_HOME=home).out

    again = host("import", ID, "--file", str(published), SMPCONV_HOME=home)
    assert again.code == 0 and "nothing was done" in again.out and "Trusted on first use" not in again.out
    other = other_weights(published, tmp_path / "other")
    refused = host("import", ID, "--file", str(other), SMPCONV_HOME=home)
    refused.assert_one_sentence(sha256(other), sha256(published), "--accept-new")
    answer = json.loads(host("import", ID, "--file", str(other), "--accept-new", "--json", SMPCONV_HOME=home).out)
    assert answer["trusted"] == "accepted" and answer["source"]["sha256"] == sha256(other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smpconv_tcn_mnist.smnst",), "did you mean smpconv_tcn_mnist.smnist"),
        (("smpconv_tcn_mnist.smnist5k",), "is embedded"),
        ((ID, "--file", "absent.pth"), "absent.pth does not exist"),
        ((ID, "--file", "weights"), "is a directory"),
    ],
)
def test_bad_input_is_one_sentence(host: ZooHost, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    host("import", *arguments, SMPCONV_HOME=str(tmp_path / "store")).assert_one_sentence(message)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("step", [1, 2, 3])
def test_killed_on_the_way_the_old_version_stays_in_use(
    host: ZooHost, tmp_path: Path, published: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the weights, before the card, and before the name of the version in use is written."""
    monkeypatch.setenv("SMPCONV_HOME", str(tmp_path / "store"))
    first = import_checkpoint(ID, published)
    kill = (
        "import os, signal\n"
        "from smpconv_zoo.pretrained import home\n"
        "write, calls = home.write_whole, []\n"
        "def killed(path, data):\n"
        "    calls.append(path)\n"
        f"    if len(calls) == {step}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(path, data)\n"
        "home.write_whole = killed"
    )
    other = str(other_weights(published, tmp_path / "other"))
    wanted = ("import", ID, "--file", other, "--accept-new")
    environment = {"SMPCONV_HOME": str(tmp_path / "store"), "TMPDIR": str(tmp_path / "other")}
    assert host(*wanted, before=kill, **environment).code == -9
    card = card_in_use(ID)
    assert card.source == first.source
    read_safetensors(imported_file(card), card.files[0].sha256)
    assert host(*wanted, **environment).code == 0
    assert card_in_use(ID).source != first.source
    read_safetensors(imported_file(card_in_use(ID)), card_in_use(ID).files[0].sha256)


def test_a_full_disk_leaves_the_old_version(
    host: ZooHost, tmp_path: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMPCONV_HOME", str(tmp_path / "store"))
    first = import_checkpoint(ID, published)
    before = files_in(tmp_path / "store")
    other = str(other_weights(published, tmp_path / "other"))
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))"
    # In the folder for what is converted, and then in the store itself.
    late = (
        "from smpconv_zoo import importing\n"
        "add = importing.add_to_store\n"
        "def late(*arguments):\n"
        f"    {full}\n"
        "    return add(*arguments)\n"
        "importing.add_to_store = late"
    )
    for before_it in (full, late):
        done = host(
            "import", ID, "--file", other, "--accept-new", before=before_it, SMPCONV_HOME=str(tmp_path / "store")
        )
        done.assert_one_sentence("File too large")
        assert files_in(tmp_path / "store") == before
    assert card_in_use(ID).source == first.source


def test_the_address_of_every_importable_card_is_one_that_is_understood() -> None:
    origins = [checkpoint_card(n).origin for n in smpconv_zoo.list_checkpoints()]
    drive = [origin for origin in origins if origin.startswith("http")]
    assert len(drive) == 9 and all(importing.DRIVE_FILE.match(origin) for origin in drive)

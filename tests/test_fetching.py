"""Data sets in their true formats, small, fetched from a server on loopback: whole, or not at all."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from data_on_disk import idx, photo, strokes, ts_text, write_cifar10, write_speech
from file_server import FileServer, file_server
from golden_files import ROOT
from small_disk import mounted

from smpconv_zoo.data import fetching, protocol
from smpconv_zoo.data.fetching import BOOKS, Fetched, fetch
from smpconv_zoo.data.sources import SOURCES, RemoteFile, data_source
from smpconv_zoo.downloading import DownloadError, Patience
from smpconv_zoo.evaluation.test_sets import open_test_set
from smpconv_zoo.pretrained.cards import checkpoint_card
from smpconv_zoo.training.arrays import load_parts
from smpconv_zoo.training.recipe import SequenceRecipe, load_recipe
from smpconv_zoo.unpacking import ArchiveError

Call = Callable[..., tuple[int, str, str]]

QUICK = Patience(attempts=3, first_wait=0.01, longest_wait=0.02, timeout=5)
WITH_LOGIN = "imagenet-1k"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("SMPCONV_DATA", raising=False)
    with file_server() as running:
        yield running


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


def tar_gz(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def files_below(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@dataclasses.dataclass
class Small:
    """A small data set under the name of a large one: its archives, and the files that should come of them."""

    name: str
    archives: dict[str, bytes]
    expected: dict[str, bytes]
    samples: int


def mnist(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    draw = np.random.RandomState(0)
    files = {}
    for part, n in (("train", 40), ("t10k", 12)):
        files[f"{part}-images-idx3-ubyte"] = idx(draw.randint(0, 256, (n, 28, 28)))
        files[f"{part}-labels-idx1-ubyte"] = idx(np.arange(n) % 10)
    return Small("mnist", {f"{name}.gz": gzip.compress(data) for name, data in files.items()}, files, 52)


def cifar10(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    write_cifar10(scratch, 10, monkeypatch)
    files = files_below(scratch / "cifar-10-batches-py")
    members = {f"cifar-10-batches-py/{name}": data for name, data in files.items()}
    return Small("cifar10", {"cifar-10-python.tar.gz": tar_gz(members)}, files, 60)


def trajectories(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    series, labels = strokes(3, 20, 30)
    texts = {"TRAIN": ts_text(series[:25], labels[:25]), "TEST": ts_text(series[25:], labels[25:])}
    files = {f"CharacterTrajectories_{part}.ts": text.encode() for part, text in texts.items()}
    members = {f"Multivariate_ts/CharacterTrajectories/{name}": data for name, data in files.items()}
    members |= {"Multivariate_ts/Other/Other_TRAIN.ts": b"@data\n1:a\n", "Multivariate_ts/Descriptions.txt": b"30 sets"}
    return Small("character-trajectories", {"Multivariate2018_ts.zip": zipped(members)}, files, 60)


def speech(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    list(write_speech(scratch, 7))
    files = files_below(scratch) | {"LICENSE": b"CC BY 4.0", "testing_list.txt": b"yes/0.wav"}
    members = {f"./{name}": data for name, data in files.items()} | {"./_background_noise_/a.wav": b"noise"}
    expected = {name: data for name, data in files.items() if not name.startswith("bird")}
    return Small("speech-commands", {"speech_commands_v0.02.tar.gz": tar_gz(members)}, expected, 70)


def imagenet_a(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    picture = photo("china.jpg").read_bytes()
    files = {f"n0149804{i}/0.{i}.jpg": picture for i in range(3)} | {"README.txt": b"200 classes"}
    members = {f"imagenet-a/{name}": data for name, data in files.items()}
    return Small("imagenet-a", {"imagenet-a.tar": tar_gz(members, "w")}, files, 3)


def imagenet_v2(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    files = {f"{i}/a.jpeg": photo("china.jpg").read_bytes() for i in range(2)}
    members = {f"imagenetv2-matched-frequency-format-val/{name}": data for name, data in files.items()}
    # Not compressed in spite of its name, as the real one.
    return Small("imagenet-v2", {"imagenetv2-matched-frequency.tar.gz": tar_gz(members, "w")}, files, 2)


def sketch(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    files = {"n01440764/sketch_1.JPEG": photo("china.jpg").read_bytes()}
    return Small(
        "imagenet-sketch",
        {"ImageNet-Sketch.zip": zipped({f"sketch/{name}": data for name, data in files.items()})},
        files,
        1,
    )


def real(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    data = json.dumps([[1], [], [2, 3]]).encode()
    return Small("imagenet-real", {"real.json": data}, {"real.json": data}, 3)


KINDS = (mnist, cifar10, trajectories, speech, imagenet_a, imagenet_v2, sketch, real)


def serve(small: Small, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> Small:
    """Put it behind the server, and have the declaration of the large set fit."""
    source = SOURCES[small.name]
    files = []
    for file in source.files:
        data = small.archives[file.name]
        url = server.put(f"{small.name}/{file.name}", data)
        declared = (hashlib.sha256(data).hexdigest(), len(data)) if file.sha256 else (None, None)
        files.append(RemoteFile(file.name, (url,), *declared))
    replaced = dataclasses.replace(source, files=tuple(files), unpacked=10_000, samples=small.samples)
    monkeypatch.setitem(SOURCES, small.name, replaced)
    return small


@pytest.fixture
def make(tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Small]:
    def made(kind: Callable[[Path, pytest.MonkeyPatch], Small]) -> Small:
        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        return serve(kind(scratch, monkeypatch), server, monkeypatch)

    return made


def get(name: str, root: Path, **options: Any) -> Fetched:
    return fetch(name, root, **{"patience": QUICK, **options})


def assert_whole(small: Small, root: Path) -> None:
    """The data are there, byte for byte, and of the work nothing but the record."""
    assert files_below(root / SOURCES[small.name].folder) == small.expected
    assert sorted(path.name for path in (root / BOOKS).iterdir()) == [f"{small.name}.json", f"{small.name}.lock"]


def assert_nothing(small: Small, root: Path) -> None:
    assert not (root / SOURCES[small.name].folder).exists()
    assert not (root / BOOKS / f"{small.name}.unpacking").exists()


# -------------------------------------------------------------------------------------------------------- it is fetched


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_set_is_fetched_unpacked_and_then_left_alone(
    server: FileServer, root: Path, make: Callable[..., Small], kind: Any
) -> None:
    small = make(kind)
    source, notes, seen = SOURCES[small.name], [], []
    done = get(small.name, root, on_note=notes.append, progress=lambda *at: seen.append(at))
    assert_whole(small, root)
    published = source.files[0].sha256 is not None
    assert done == Fetched(
        small.name,
        str(root / source.folder),
        len(small.expected),
        sum(map(len, small.expected.values())),
        True,
        done.sources,
        done.date,
    )
    for file, data in zip(done.sources, small.archives.values(), strict=True):
        assert (file.sha256, file.bytes) == (hashlib.sha256(data).hexdigest(), len(data))
        assert file.url == server.url(f"{small.name}/{file.name}")
        assert file.trusted == ("published" if published else "first use")
    assert [note for note in notes if "trusted on first use" in note] == ([] if published else notes)
    assert any(what.startswith("fetching") and at == total for what, at, total in seen)
    asked = len(server.log)
    again = get(small.name, root)
    assert again == dataclasses.replace(done, changed=False) and len(server.log) == asked


@pytest.mark.parametrize(
    ("kind", "ids", "samples"),
    [
        (mnist, ("smpconv_tcn_mnist.smnist", "smpconv_tcn_mnist.pmnist"), 12),
        (cifar10, ("smpconv_resnet_cifar.cifar10", "smpconv_tcn_cifar.scifar10"), 10),
        (trajectories, ("smpconv_tcn_chartraj.ct",), 9),
        (speech, ("smpconv_tcn_speech_mfcc.sc10", "smpconv_tcn_speech_raw.sc10"), 11),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_evaluation_finds_what_was_fetched_and_fetches_when_asked(
    root: Path, make: Callable[..., Small], kind: Any, ids: tuple[str, ...], samples: int
) -> None:
    small = make(kind)
    for name in ids:
        card = checkpoint_card(name)
        with pytest.raises(FileNotFoundError, match=f"smpconv-zoo data fetch {small.name}"):
            open_test_set(card, root / "none")
        assert not (root / "none").exists()
        with pytest.raises(FileNotFoundError, match="no folder was given"):
            open_test_set(card, None, download=True)
        assert len(open_test_set(card, root, download=True)) == samples
        assert len(open_test_set(card, root)) == samples
    assert_whole(small, root)


def test_training_fetches_when_asked_and_says_what_is_trusted(root: Path, make: Callable[..., Small]) -> None:
    small, notes = make(trajectories), []
    recipe = load_recipe("smpconv_tcn_chartraj.ct")
    assert isinstance(recipe, SequenceRecipe)
    with pytest.raises(FileNotFoundError, match="smpconv-zoo data fetch character-trajectories"):
        load_parts(recipe, root)
    parts = load_parts(recipe, root, download=True, on_note=notes.append)
    assert (len(parts.train[1]), len(parts.classes)) == (42, 3) and "trusted on first use" in notes[0]
    assert_whole(small, root)


def test_trajectories_that_were_fetched_are_the_protocols(root: Path, make: Callable[..., Small]) -> None:
    make(trajectories)
    get("character-trajectories", root)
    series, labels = strokes(3, 20, 30)
    expected = protocol.character_trajectories(series, labels)["test"]
    found = open_test_set(checkpoint_card("smpconv_tcn_chartraj.ct"), root).samples[:]
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_what_the_user_has_already_is_looked_at_and_kept(
    server: FileServer, root: Path, make: Callable[..., Small]
) -> None:
    small = make(mnist)
    place = root / "MNIST" / "raw"
    place.mkdir(parents=True)
    for name, data in small.expected.items():
        (place / name).write_bytes(data)
    done = get("mnist", root)
    assert (done.changed, done.sources, done.date, done.files) == (False, (), None, 4)
    assert server.log == []
    (place / "t10k-labels-idx1-ubyte").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is not what MNIST should be \(t10k-labels.*--force"):
        get("mnist", root)
    assert (place / "t10k-labels-idx1-ubyte").read_bytes() == b"" and server.log == []
    assert get("mnist", root, force=True).changed
    assert_whole(small, root)


def test_data_that_were_damaged_or_removed_since(server: FileServer, root: Path, make: Callable[..., Small]) -> None:
    small = make(cifar10)
    get("cifar10", root)
    path = root / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"test_batch: CIFAR10 in .* not as published"):
        get("cifar10", root)
    assert get("cifar10", root, force=True).changed
    assert_whole(small, root)
    for file in (root / "cifar-10-batches-py").iterdir():
        file.unlink()
    assert get("cifar10", root).changed
    assert_whole(small, root)


# -------------------------------------------------------------------------------------------------------- it is trusted


def test_the_first_archive_is_the_one_that_counts(server: FileServer, root: Path, make: Callable[..., Small]) -> None:
    small = make(trajectories)
    first = get("character-trajectories", root)
    record = json.loads((root / BOOKS / "character-trajectories.json").read_text())
    assert record["sources"] == [dataclasses.asdict(first.sources[0])] and first.sources[0].trusted == "first use"
    place = root / "CharacterTrajectories"

    def remove() -> None:
        for path in place.iterdir():
            path.unlink()
        place.rmdir()

    remove()
    assert get("character-trajectories", root).sources[0].trusted == "known"
    remove()
    members = {f"Multivariate_ts/CharacterTrajectories/{name}": data for name, data in small.expected.items()}
    server.put("character-trajectories/Multivariate2018_ts.zip", zipped(members))
    for _ in range(2):
        with pytest.raises(DownloadError, match=f"recorded is {first.sources[0].sha256}; pass --accept-new"):
            get("character-trajectories", root)
        assert_nothing(small, root)
    # Once the server has the true one again, it is taken.
    other = server.files["character-trajectories/Multivariate2018_ts.zip"].data
    server.put("character-trajectories/Multivariate2018_ts.zip", small.archives["Multivariate2018_ts.zip"])
    assert get("character-trajectories", root).sources[0].trusted == "known"
    remove()
    server.put("character-trajectories/Multivariate2018_ts.zip", other)
    assert get("character-trajectories", root, accept_new=True).sources[0].trusted == "accepted"
    remove()
    assert get("character-trajectories", root).sources[0].trusted == "known"
    assert_whole(small, root)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sources": []}', '{"sources": [{"name": "a"}]}'])
def test_a_damaged_record_is_not_taken_for_none(root: Path, make: Callable[..., Small], text: str) -> None:
    small = make(trajectories)
    (root / BOOKS).mkdir(parents=True)
    (root / BOOKS / "character-trajectories.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged"):
        get("character-trajectories", root)
    assert_nothing(small, root)


def test_another_address_and_a_file_that_is_here(
    server: FileServer, root: Path, tmp_path: Path, make: Callable[..., Small]
) -> None:
    small = make(mnist)
    for name in small.archives:
        server.files[f"elsewhere/{name}"] = server.files.pop(f"mnist/{name}")
    with pytest.raises(DownloadError, match="HTTP 404"):
        get("mnist", root)
    done = get("mnist", root, url=server.url("elsewhere/"))
    assert done.sources[0].url == server.url("elsewhere/train-images-idx3-ubyte.gz")
    assert_whole(small, root)

    small = make(cifar10)
    archive = tmp_path / "mine.tar.gz"
    with pytest.raises(FileNotFoundError, match=r"mine\.tar\.gz: there is no such file"):
        get("cifar10", root, url=str(archive))
    archive.write_bytes(b"other")
    with pytest.raises(DownloadError, match=r"the published cifar-10-python\.tar\.gz has"):
        get("cifar10", root, url=str(archive))
    archive.write_bytes(small.archives["cifar-10-python.tar.gz"])
    assert get("cifar10", root, url=str(archive)).sources[0].url == str(archive)
    assert archive.is_file() and files_below(root / "cifar-10-batches-py") == small.expected


def test_a_second_mirror(server: FileServer, root: Path, make: Callable[..., Small], monkeypatch: Any) -> None:
    small = make(cifar10)
    (file,) = SOURCES["cifar10"].files
    urls = (server.put("gone", b"", statuses=[404]), server.put("forged", b"x" * (file.bytes or 0)), *file.urls)
    source = dataclasses.replace(SOURCES["cifar10"], files=(dataclasses.replace(file, urls=urls),))
    monkeypatch.setitem(SOURCES, "cifar10", source)
    assert get("cifar10", root).sources[0].url == file.urls[0]
    assert_whole(small, root)


# -------------------------------------------------------------------------------------------------------- it goes wrong


@pytest.mark.parametrize("kind", [mnist, cifar10, trajectories, speech], ids=lambda kind: kind.__name__)
def test_archives_that_are_cut_off_changed_or_web_pages(
    server: FileServer, root: Path, make: Callable[..., Small], kind: Any
) -> None:
    small = make(kind)
    *_, name = small.archives
    good = small.archives[name]
    for bad in (good[: len(good) // 2], good[:-100] + b"!" + good[-99:], b"<!doctype html>quota", b""):
        server.put(f"{small.name}/{name}", bad)
        with pytest.raises((DownloadError, ArchiveError)):
            get(small.name, root)
        assert_nothing(small, root)
        assert not (root / BOOKS / name).exists()
    server.put(f"{small.name}/{name}", good)
    get(small.name, root)
    assert_whole(small, root)


def test_an_archive_that_holds_other_data(server: FileServer, root: Path, make: Callable[..., Small]) -> None:
    """Nobody publishes its digest: what is in it has to tell."""
    small = make(trajectories)
    name = "character-trajectories/Multivariate2018_ts.zip"
    series, labels = strokes(3, 9, 30)
    two = {f"CharacterTrajectories/CharacterTrajectories_{part}.ts" for part in ("TRAIN", "TEST")}
    for members, message in (
        ({"CharacterTrajectories/other.ts": b"@data\n1:a\n"}, "none of the files"),
        ({min(two): b"@data\n1:a\n"}, "CharacterTrajectories_TRAIN.ts: No such file"),
        (dict.fromkeys(two, b"@data\n1,x:a\n"), "could not convert"),
        (dict.fromkeys(two, ts_text(series, labels).encode()), "it holds 54 series, not 60"),
    ):
        server.put(name, zipped(members))
        with pytest.raises(ArchiveError, match=message):
            get(small.name, root)
        assert_nothing(small, root)
        # It is not recorded either: the true one is still the first.
        assert list((root / BOOKS).glob("*.json")) == [] and list((root / BOOKS).glob("*.zip")) == []


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (("../../evil", tarfile.REGTYPE, ""), "leads out of the folder"),
        (("/evil", tarfile.REGTYPE, ""), "leads out of the folder"),
        (("cifar-10-batches-py/link", tarfile.SYMTYPE, "/etc"), "neither a plain file"),
        (("cifar-10-batches-py/link", tarfile.LNKTYPE, "../../../x"), "neither a plain file"),
        (("cifar-10-batches-py/null", tarfile.CHRTYPE, ""), "neither a plain file"),
    ],
)
def test_an_archive_that_means_harm(
    server: FileServer,
    root: Path,
    make: Callable[..., Small],
    monkeypatch: pytest.MonkeyPatch,
    member: tuple[str, bytes, str],
    message: str,
) -> None:
    small = make(cifar10)
    info = tarfile.TarInfo(member[0])
    info.type, info.linkname = member[1:]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        tar.addfile(info)
    small.archives["cifar-10-python.tar.gz"] = out.getvalue()
    serve(small, server, monkeypatch)
    with pytest.raises(ArchiveError, match=message):
        get("cifar10", root)
    assert_nothing(small, root)
    assert sorted(path.name for path in root.iterdir()) == [BOOKS]


def test_a_bomb(server: FileServer, root: Path, make: Callable[..., Small], monkeypatch: pytest.MonkeyPatch) -> None:
    small = make(mnist)
    small.archives["t10k-labels-idx1-ubyte.gz"] = gzip.compress(b"1" * 50_000_000)
    serve(small, server, monkeypatch)
    with pytest.raises(ArchiveError, match="beyond the bytes that it may hold"):
        get("mnist", root)
    assert_nothing(small, root)


def test_room_is_asked_for_before_the_first_byte(
    server: FileServer, root: Path, make: Callable[..., Small], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make(mnist)
    monkeypatch.setitem(SOURCES, "mnist", dataclasses.replace(SOURCES["mnist"], unpacked=10**15))
    with pytest.raises(OSError, match="MNIST needs 1,000,000,000,"):
        get("mnist", root)
    assert server.log == []
    assert_nothing(small, root)


def test_a_disk_that_is_full_while_it_is_unpacked(
    server: FileServer, tmp_path: Path, make: Callable[..., Small], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make(speech)
    monkeypatch.setattr("smpconv_zoo.downloading.SPARE_BYTES", -(2**40))
    size = len(small.archives["speech_commands_v0.02.tar.gz"]) + 500_000
    disk = tmp_path / "disk"
    with mounted(disk, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        with pytest.raises(OSError, match="No space left on device"):
            get("speech-commands", disk)
        assert_nothing(small, disk)
        assert (disk / BOOKS / "speech_commands_v0.02.tar.gz").is_file()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        asked = len(server.log)
        get("speech-commands", disk)
        # What was downloaded was kept.
        assert len(server.log) == asked
        assert_whole(small, disk)


def test_a_folder_that_cannot_be_written(tmp_path: Path, make: Callable[..., Small]) -> None:
    make(mnist)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "ro", "tmpfs"), pytest.raises(OSError, match="Read-only"):
        get("mnist", tmp_path / "disk")


# ---------------------------------------------------------------------------------------- several, and killed processes

# One interpreter, from which a process is forked for every line that it reads: importing takes longer than fetching.
SCRIPT = """
import dataclasses, os, sys
from pathlib import Path
from smpconv_zoo.data.fetching import fetch
from smpconv_zoo.data.sources import SOURCES, RemoteFile
name, root, url, sha256, samples = sys.argv[1:]
source = SOURCES[name]
(file,) = source.files
files = (RemoteFile(file.name, (url,), sha256),)
SOURCES[name] = dataclasses.replace(source, files=files, unpacked=1000, samples=int(samples))

def say(*words):
    os.write(1, (" ".join(map(str, words)) + chr(10)).encode())

children = []
while sys.stdin.readline():
    children.append(os.fork())
    if not children[-1]:
        done = fetch(name, Path(root), on_note=lambda note: say(os.getpid(), note))
        say(os.getpid(), done.changed)
        os._exit(0)
    say(children[-1])
for child in children:
    os.waitpid(child, 0)
"""


def test_two_processes_take_turns_and_one_that_is_killed_is_gone_on_with(
    server: FileServer, root: Path, make: Callable[..., Small]
) -> None:
    small = make(imagenet_a)
    (file,) = SOURCES["imagenet-a"].files
    served = server.files[f"imagenet-a/{file.name}"]
    served.block, served.pause = len(served.data) // 20, 0.05
    arguments = ("imagenet-a", str(root), file.urls[0], str(file.sha256), str(small.samples))
    part = root / BOOKS / f"{file.name}.part"
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as forks:
        assert forks.stdin is not None and forks.stdout is not None

        forks.stdin.write("\n")
        forks.stdin.flush()
        killed = int(forks.stdout.readline())
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > served.block):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(killed, signal.SIGKILL)
        # It is gone when another process gets its lock, and only then is its file as long as it stays.
        with filelock.FileLock(root / BOOKS / "imagenet-a.lock", timeout=60):
            kept = part.stat().st_size
            assert_nothing(small, root)
            forks.stdin.write("\n\n")
            forks.stdin.flush()
            # The pids of both, and what both say.
            lines = [forks.stdout.readline().split(maxsplit=1) for _ in range(4)]
            two = {words[0] for words in lines if len(words) == 1}
            waiting = [words for words in lines if len(words) == 2]
            assert {words[0] for words in waiting} == two
            assert all("another process fetches these data" in words[1] for words in waiting)
        answers = [forks.stdout.readline().split() for _ in range(2)]
        forks.stdin.close()
    assert {answer[0] for answer in answers} == two
    assert sorted(answer[1] for answer in answers) == ["False", "True"]
    assert [request.range for request in server.log] == [None, f"bytes={kept}-"]
    assert_whole(small, root)


def test_what_a_killed_process_left_of_its_unpacking_is_removed(root: Path, make: Callable[..., Small]) -> None:
    small = make(imagenet_a)
    for left in ("imagenet-a.unpacking", "imagenet-a.old"):
        (root / BOOKS / left / "n01498040").mkdir(parents=True)
        (root / BOOKS / left / "n01498040" / "half.jpg").write_bytes(b"half")
    get("imagenet-a", root)
    assert_whole(small, root)


@pytest.mark.parametrize("where", ["unpack", "sync_tree", "_take_place"])
def test_an_interrupt_leaves_nothing_half(
    root: Path, make: Callable[..., Small], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    small = make(imagenet_a)

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fetching, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            get("imagenet-a", root)
    assert_nothing(small, root)
    assert get("imagenet-a", root).changed
    assert_whole(small, root)


def test_two_threads_of_one_process(server: FileServer, root: Path, make: Callable[..., Small]) -> None:
    small = make(imagenet_a)
    done: list[Fetched] = []
    threads = [threading.Thread(target=lambda: done.append(get("imagenet-a", root))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.changed for one in done) == [False, False, True] and len(server.log) == 1
    assert_whole(small, root)


# ----------------------------------------------------------------------------------------------------- the command line


def test_the_command_line(call: Call, server: FileServer, root: Path, make: Callable[..., Small]) -> None:
    small = make(trajectories)
    code, out, err = call("data", "fetch", small.name, "--data-dir", str(root))
    assert code == 0 and "trusted on first use" in err
    sha256 = hashlib.sha256(small.archives["Multivariate2018_ts.zip"]).hexdigest()
    lines = out.splitlines()
    assert lines[0].startswith("read    http://127.0.0.1") and lines[1].startswith(
        f"sha256  {sha256}, trusted on first"
    )
    assert lines[2].startswith(f"wrote   {root / 'CharacterTrajectories'}: 2 files")
    code, out, err = call("data", "fetch", small.name, "--data-dir", str(root))
    assert (code, err) == (0, "") and out.startswith("kept ") and "nothing was done" in out
    code, out, err = call("data", "fetch", small.name, "--data-dir", str(root), "--json")
    (facts,) = json.loads(out)
    assert (code, err, facts["changed"], facts["sources"][0]["sha256"]) == (0, "", False, sha256)


def test_the_environment_names_the_folder_and_archives_are_kept_when_asked(
    call: Call, root: Path, make: Callable[..., Small], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make(imagenet_a)
    monkeypatch.setenv("SMPCONV_DATA", str(root))
    code, _, err = call("data", "fetch", "imagenet-a", "--keep")
    assert (code, err) == (0, "")
    assert (root / BOOKS / "imagenet-a.tar").read_bytes() == small.archives["imagenet-a.tar"]


def test_all_is_all_that_needs_no_login(call: Call, server: FileServer, root: Path, make: Callable[..., Small]) -> None:
    for kind in KINDS:
        make(kind)
    for name in set(SOURCES) - {"mnist", "imagenet-real", "imagenet-a"} - {WITH_LOGIN}:
        SOURCES.pop(name)
    try:
        code, out, err = call("data", "fetch", "all", "--data-dir", str(root))
        assert (code, err) == (0, "") and out.count("wrote") == 3
    finally:
        SOURCES.clear()


@pytest.fixture(autouse=True)
def all_sources() -> Iterator[None]:
    before = dict(SOURCES)
    yield
    SOURCES.clear()
    SOURCES.update(before)


def test_what_a_login_is_needed_for_is_said_with_the_commands(call: Call, root: Path) -> None:
    code, out, err = call("data", "fetch", WITH_LOGIN, "--data-dir", str(root))
    assert (code, out) == (1, "") and err.count("\n") == 1 and not root.exists()
    for part in (
        "https://image-net.org/download-images",
        "torchvision.datasets",
        "hf auth login",
        "ILSVRC/imagenet-1k",
    ):
        assert part in err


def test_wrong_usage(call: Call, root: Path) -> None:
    for arguments in (
        ("data", "fetch"),
        ("data", "fetch", "mnist"),
        ("data", "fetch", "mnist", "cifar10", "--data-dir", str(root), "--url", "http://127.0.0.1/a"),
    ):
        assert call(*arguments)[0] == 2
    code, out, err = call("data", "fetch", "minst", "--data-dir", str(root))
    assert (code, out) == (1, "") and "there is no data set 'minst' to fetch; there are mnist, cifar10" in err


def test_what_there_is_is_listed(call: Call) -> None:
    code, out, err = call("data", "fetch", "--list")
    assert (code, err) == (0, "") and len(out.strip().splitlines()) == 1 + len(SOURCES)
    for name in SOURCES:
        assert name in out
    facts = json.loads(call("data", "fetch", "--list", "--json")[1])
    assert [entry["name"] for entry in facts] == list(SOURCES)


def test_every_source_is_declared_in_full() -> None:
    for source in SOURCES.values():
        assert source.homepage.startswith("http") and source.licence and source.checksums and source.samples
        if source.name == WITH_LOGIN:
            with pytest.raises(DownloadError, match="login"):
                data_source(source.name)
            continue
        for file in source.files:
            assert file.urls and all(url.startswith("https://") for url in file.urls)
            assert (file.sha256 is None) == (file.bytes is None)
            assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
    assert [name for name, source in SOURCES.items() if None in [f.sha256 for f in source.files]] == [
        "character-trajectories"
    ]

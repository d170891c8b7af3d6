"""`data check` on the files of the tasks: counts, splits by either protocol, and every file that cannot be read."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_on_disk import (
    idx,
    strokes,
    ts_text,
    write_cifar10,
    write_speech,
    write_trajectories,
    write_wav,
)
from torchvision.datasets import CIFAR10

from smpconv_zoo.data import checking
from smpconv_zoo.data.checking import CheckedData, check_data
from smpconv_zoo.data.cifar_files import read_batch
from smpconv_zoo.data.pictures import cifar10_test
from smpconv_zoo.training.arrays import load_parts
from smpconv_zoo.training.recipe import SequenceRecipe, load_recipe

Call = Callable[..., tuple[int, str, str]]


def found(place: Path, **options: Any) -> CheckedData:
    checked = check_data(place, **options)
    assert checked is not None
    return checked


def faults(checked: CheckedData) -> dict[str, str]:
    return {Path(name).name: reason for name, reason in checked.unreadable}


def write_digits(folder: Path, train: int = 40, test: int = 12) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.RandomState(0)
    for part, n in (("train", train), ("t10k", test)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(draw.randint(0, 256, (n, 28, 28))))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(n) % 10))


def assert_as_training_splits(checked: CheckedData, recipe_id: str, place: Path) -> None:
    """The counts it announces are those that training gets."""
    for name, announced in checked.protocols.items():
        recipe = load_recipe(recipe_id, protocol=name)
        assert isinstance(recipe, SequenceRecipe)
        parts = load_parts(recipe, place)
        assert parts.validation is not None
        assert (len(parts.train[1]), len(parts.validation[1])) == (announced["train"], announced["chosen_by"])


# ---------------------------------------------------------------------------------------------------------------- MNIST


def test_mnist(tmp_path: Path) -> None:
    write_digits(tmp_path / "MNIST" / "raw")
    for place in (tmp_path, tmp_path / "MNIST", tmp_path / "MNIST" / "raw"):
        checked = found(place)
        assert (checked.kind, checked.name, checked.place) == ("mnist", "MNIST", tmp_path / "MNIST" / "raw")
        assert checked.files == {"train": 40, "test": 12} and checked.unreadable == () and checked.samples == 52
    assert checked.protocols["reference"] | {"split": ""} == {"train": 40, "chosen_by": 12, "test": 12, "split": ""}
    # Of four digits of a class a tenth is none: one of each is set aside.
    assert checked.protocols["sound"] | {"split": ""} == {"train": 30, "chosen_by": 10, "test": 12, "split": ""}
    assert_as_training_splits(checked, "smpconv_tcn_mnist.smnist", tmp_path)
    assert load_recipe("smpconv_tcn_mnist.smnist").held_out == checking.HELD_OUT


def test_packed_digits_are_read_where_they_lie(tmp_path: Path) -> None:
    write_digits(tmp_path)
    for path in list(tmp_path.iterdir()):
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    checked = found(tmp_path)
    assert checked.samples == 52 and checked.unreadable == () and "to be unpacked" in checked.notes[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-1], "31,376 bytes, and has 31,375"),
        (lambda data: data + b"!", "has 31,377"),
        (lambda data: b"", "does not begin"),
        (lambda data: b"<html>" + data, "does not begin"),
        (lambda data: data[:8] + (27).to_bytes(4, "big") + data[12:], "40 x 27 x 28 values"),
        (lambda data: data[:4] + (2**32 - 1).to_bytes(4, "big") + data[8:], "4294967295 x 28 x 28"),
        (None, "No such file"),
    ],
)
def test_broken_digits_are_named(tmp_path: Path, change: Any, reason: str) -> None:
    write_digits(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    data = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(data))
    checked = found(tmp_path)
    assert reason in next(iter(faults(checked).values())) and len(checked.unreadable) == 1
    assert checked.files == {"test": 12} and checked.protocols == {}
    if change is not None:
        Path(f"{path}.gz").write_bytes(gzip.compress(data)[:-50])
        path.unlink()
        assert "no complete gzip file" in faults(found(tmp_path))["train-images-idx3-ubyte.gz"]


def test_digits_and_labels_that_do_not_fit(tmp_path: Path) -> None:
    write_digits(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(11) % 10))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.full(40, 10)))
    reasons = [reason for _, reason in found(tmp_path).unreadable]
    assert reasons == ["40 pictures and 40 labels of train do not fit", "12 pictures and 11 labels of test do not fit"]


# ------------------------------------------------------------------------------------------------------------- CIFAR-10


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, 20, monkeypatch)
    for place in (tmp_path, tmp_path / "cifar-10-batches-py"):
        checked = found(place)
        assert checked.files == {"train": 100, "test": 20} and checked.unreadable == () and checked.classes == 10
    assert checked.protocols["sound"]["train"] == 90
    assert_as_training_splits(checked, "smpconv_resnet_cifar.cifar10", tmp_path)


def test_broken_batches_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, 10, monkeypatch)
    folder = tmp_path / "cifar-10-batches-py"
    path = folder / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    (folder / "data_batch_4").unlink()
    (folder / "batches.meta").unlink()
    checked = found(tmp_path)
    assert set(faults(checked)) == {"data_batch_3", "data_batch_4", "batches.meta"}
    assert "not as published" in faults(checked)["data_batch_3"] and "missing" in faults(checked)["data_batch_4"]
    assert checked.files == {"train": 30, "test": 10} and checked.protocols == {}


class Harm:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call[0], self.call[1:]


def test_the_pickles_of_python_2_are_read_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = write_cifar10(tmp_path, 12, monkeypatch)
    x, y = read_batch(tmp_path / "cifar-10-batches-py" / "test_batch")
    assert np.array_equal(x, images) and np.array_equal(y, labels) and x.flags.c_contiguous
    theirs = CIFAR10(str(tmp_path), train=False)
    assert np.array_equal(theirs.data, x) and theirs.targets == y.tolist()
    # As Python 3 and numpy write them, whatever numpy's version.
    planes = images.transpose(0, 3, 1, 2).reshape(12, 3072)
    for protocol in (3, 4):
        (tmp_path / "a").write_bytes(pickle.dumps({"data": planes, "labels": labels.tolist()}, protocol=protocol))
        assert np.array_equal(read_batch(tmp_path / "a")[0], images)


@pytest.mark.parametrize(
    "content",
    [
        Harm(os.system, "touch harmed"),
        {"data": Harm(eval, "1"), "labels": []},
        {"data": Harm(np.load, "x"), "labels": []},
        {"data": Harm(getattr, 1, "real"), "labels": []},
        {"data": np.zeros((1, 3072), dtype=object), "labels": [0]},
        {"data": np.zeros((1, 3072), dtype=np.float32), "labels": [0]},
        {"data": np.zeros((1, 3072), dtype=np.int8), "labels": [0]},
        {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [0]},
        {"data": np.zeros((1, 3071), dtype=np.uint8), "labels": [0]},
        {"data": np.zeros((1, 3072), dtype=np.uint8), "labels": [10]},
        {"data": np.zeros((1, 3072), dtype=np.uint8), "labels": [True]},
        {"data": np.zeros((1, 3072), dtype=np.uint8), "labels": "0"},
        {"data": [0] * 3072, "labels": [0]},
        {"labels": [0]},
        [1, 2],
        None,
    ],
    ids=str,
)
def test_pickles_of_anything_else_are_refused_unexecuted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(ValueError, match="is no batch of CIFAR-10"):
        read_batch(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["test_batch"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"not a pickle",
        # An instruction that changes what an array is made of: attributes of a placeholder, and of its class.
        b"cnumpy.core.multiarray\n_reconstruct\n(dS'a'\nS'b'\nsb.",
        b"cnumpy\nndarray\n(dS'numbers'\nNsb.",
        b"cnumpy\nndarray\n(N(dS'numbers'\nNstb.",
        b"cos\nsystem\n(S'touch harmed'\ntR.",
        b"c__builtin__\neval\n(S'1'\ntR.",
        b"(S'x'\ni__builtin__\neval\n.",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"X\xff\xff\xff\x7f",
    ],
)
def test_bytes_that_are_no_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    images, _ = write_cifar10(tmp_path, 10, monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match="is no batch of CIFAR-10"):
        read_batch(tmp_path / "a")
    assert not (tmp_path / "harmed").exists()
    # The next file is read as ever.
    assert np.array_equal(read_batch(tmp_path / "cifar-10-batches-py" / "test_batch")[0], images)


def test_a_batch_that_is_too_large(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(ValueError, match="more than 67,108,864 bytes"):
        read_batch(tmp_path / "a")


def test_a_forged_batch_of_the_right_md5_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, 10, monkeypatch)
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(Harm(os.system, "touch harmed"), protocol=2)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(data)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", hashlib.md5(data).hexdigest()]])
    with pytest.raises(ValueError, match="which data do not need"):
        cifar10_test(tmp_path)
    assert not (tmp_path / "harmed").exists()


# -------------------------------------------------------------------------------------------------- series in .ts files


def test_trajectories(tmp_path: Path) -> None:
    series, labels = strokes(4, 20, 60)
    folder = tmp_path / "Multivariate_ts" / "CharacterTrajectories"
    write_trajectories(folder, series, labels, 30)
    checked = found(tmp_path)
    assert (checked.kind, checked.name, checked.place) == ("ts", "CharacterTrajectories", folder)
    assert checked.files == {"train": 30, "test": 50} and checked.classes == 4 and checked.unreadable == ()
    assert checked.protocols["reference"] | {"split": ""} == {"train": 56, "chosen_by": 12, "test": 12, "split": ""}
    assert any(note.startswith("3 channels, ") and note.endswith(" to 60 steps") for note in checked.notes)
    assert_as_training_splits(checked, "smpconv_tcn_chartraj.ct", tmp_path)


def test_another_set_of_series_has_its_own_split(tmp_path: Path) -> None:
    series, labels = strokes(2, 4, 20)
    for part, chosen in (("TRAIN", slice(0, 3)), ("TEST", slice(3, None))):
        (tmp_path / f"GunPoint_{part}.ts").write_text(ts_text(series[chosen], labels[chosen]))
    checked = found(tmp_path)
    assert (checked.name, checked.files, checked.protocols) == ("GunPoint", {"train": 3, "test": 5}, {})
    assert any("own split" in note for note in checked.notes)


def test_broken_series_are_named(tmp_path: Path) -> None:
    series, labels = strokes(4, 20, 60)
    write_trajectories(tmp_path, series, labels, 30)
    path = tmp_path / "CharacterTrajectories_TEST.ts"
    path.write_text(path.read_text()[:-200].rsplit("\n", 1)[0] + "\n1,2,x:1,2,3:1,2,3:4\n")
    checked = found(tmp_path)
    assert "could not convert" in faults(checked)[path.name] and checked.files == {"train": 30}
    path.write_text("@data\n1,2:4\n")
    assert "channels in one set" in next(iter(faults(found(tmp_path)).values()))
    path.unlink()
    assert faults(found(tmp_path)) == {path.name: "No such file or directory"}


# ------------------------------------------------------------------------------------------------------ Speech Commands


def test_speech(tmp_path: Path) -> None:
    list(write_speech(tmp_path / "speech_commands_v0.02", 7))
    seen: list[tuple[int, int]] = []
    for full in (False, True):
        checked = found(tmp_path, full=full, progress=lambda *at: seen.append(at))
        assert (checked.kind, checked.files, checked.classes) == ("speech-commands", {"clips": 70}, 10)
        assert checked.unreadable == () and seen[-1] == (80, 80)
    assert checked.protocols["sound"] | {"split": ""} == {"train": 49, "chosen_by": 10, "test": 11, "split": ""}
    assert checked.notes == ("10 recordings of other lengths than one second are left out",)
    assert_as_training_splits(checked, "smpconv_tcn_speech_mfcc.sc10", tmp_path)


def test_broken_recordings_are_named(tmp_path: Path) -> None:
    list(write_speech(tmp_path, 7))
    for path in (tmp_path / "stop").iterdir():
        path.unlink()
    cut = tmp_path / "yes" / "00000000_nohash_0.wav"
    cut.write_bytes(cut.read_bytes()[:-1000])
    write_wav(tmp_path / "no" / "slow.wav", np.zeros(8000), rate=8000)
    (tmp_path / "go" / "page.wav").write_bytes(b"<html>")
    checked = found(tmp_path)
    assert set(faults(checked)) == {"stop", cut.name, "slow.wav", "page.wav"} and checked.protocols == {}
    assert "ends before its 16000 samples" in faults(checked)[cut.name]


def test_too_few_to_split(tmp_path: Path) -> None:
    list(write_speech(tmp_path, 1))
    checked = found(tmp_path)
    assert checked.unreadable == () and checked.protocols == {}
    assert any("cannot be split 70 / 15 / 15" in note for note in checked.notes)


# ----------------------------------------------------------------------------------------------------- the command line


def test_the_command_line(call: Call, tmp_path: Path) -> None:
    write_digits(tmp_path / "MNIST" / "raw")
    code, out, err = call("data", "check", str(tmp_path))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].endswith("MNIST, 10 classes, 40 train, 12 test")
    assert lines[1].startswith("protocol reference: learns from 40, chooses by 12, is tested on 12 (chosen by the test")
    assert lines[2].startswith("protocol sound: learns from 30, chooses by 10, is tested on 12")
    code, out, err = call("data", "check", str(tmp_path), "--json")
    facts = json.loads(out)
    assert (code, err, facts["kind"], facts["samples"], facts["unreadable"]) == (0, "", "mnist", 52, [])
    assert facts["protocols"]["sound"]["train"] == 30

    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(b"")
    code, out, err = call("data", "check", str(tmp_path))
    assert code == 1 and "t10k-labels-idx1-ubyte: it does not begin" in out and "1 files cannot be used" in err
    code, out, err = call("data", "check", str(tmp_path), "--json")
    assert code == 1 and json.loads(out)["unreadable"][0]["file"].endswith("t10k-labels-idx1-ubyte")


def test_of_several_the_first_is_looked_at_and_the_others_are_named(tmp_path: Path) -> None:
    write_digits(tmp_path / "MNIST" / "raw")
    list(write_speech(tmp_path / "speech_commands_v0.02", 1))
    checked = found(tmp_path)
    assert checked.kind == "mnist" and len(checked.notes) == 1
    assert checked.notes[0].startswith(f"{tmp_path / 'speech_commands_v0.02'} holds other data")


def test_what_is_none_of_these_is_taken_for_pictures(call: Call, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    assert check_data(tmp_path) is None and check_data(tmp_path / "absent") is None
    code, out, err = call("data", "check", str(tmp_path))
    assert (code, out) == (1, "") and "picture" in err
    code, out, err = call("data", "check", str(tmp_path / "absent"))
    assert (code, out) == (1, "") and "no such file or folder" in err

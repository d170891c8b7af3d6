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
    return ImageData(recipe(**changes), pictures, model, World(CPU), workers=0)


# ------------------------------------------------------------------------------------------------- the same as elsewhere


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

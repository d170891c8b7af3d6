"""Pictures that are streamed, through timm's readers: shards behind an address, Hugging Face and TensorFlow datasets.

They are named as timm names them:

- ``wds/PLACE``: WebDataset shards, by a pattern with the number of pictures (``wds/https://host/x-{000..009}.tar|9000``),
  or by the place of timm's ``_info.json``, which names the shards of every split. ``http`` and ``https`` are read by
  curl; a path with a pattern, a command (``pipe:``) and other addresses as webdataset does.
- ``hfids/NAME``: a Hugging Face dataset of the Hub or of a folder, read as it arrives.
- ``tfds/NAME``: a dataset that TensorFlow Datasets has prepared in ``TFDS_DATA_DIR``.

What comes in which order is timm's: which process reads which shard, in which buffer pictures are mixed, and that it
begins again where a share has run out. Broken shards, which timm leaves out with a line in the log, are errors here.
What becomes of a picture is as in :class:`~smpconv_zoo.training.images.ImageData`.

A stream cannot be entered in its middle. An epoch that goes on is read from its beginning, and what was seen is passed
over. The order hangs on the seed, the epoch, and the number of processes that train and of those that read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import logging
import os
import posixpath
import re
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.datasets.folder import IMG_EXTENSIONS

from smpconv_zoo.data.folders import class_number, decode_picture, find_split, picture_columns
from smpconv_zoo.training.images import ImageData, transformed
from smpconv_zoo.training.recipe import ImageRecipe
from smpconv_zoo.training.world import World

__all__ = ["StreamData", "is_stream"]

# What a seed is drawn for; what images.py draws for has the numbers below.
_STREAM = 5
# A server is given up after 20 seconds without a connection, or two minutes without a byte.
_CURL = (
    *("curl", "--fail", "--silent", "--show-error", "--location"),
    *("--connect-timeout", "20", "--retry", "5", "--speed-limit", "1", "--speed-time", "120"),
)
# How commands end to which nobody listens any more: curl, a shell, others.
_UNHEARD = (0, 23, 128 + 13, -13)
_FAULTS = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error)
_INFO = ("_info.json", "info.json")
# Broken shards that a message names before it counts the rest.
_NAMED = 5
_PACKAGES = {
    "wds": ("webdataset", 'pip install "smpconv-zoo[wds]"'),
    "hfids": ("datasets", 'pip install "smpconv-zoo[hf]"'),
    "tfds": ("tensorflow_datasets", "pip install tensorflow tensorflow-datasets"),
}


def is_stream(where: str | os.PathLike[str]) -> bool:
    """Whether a name is one of a stream, and not of pictures for :func:`~smpconv_zoo.data.folders.open_pictures`.

    Shards in a folder are read picture by picture, wherever in an epoch; to name a pattern is to ask for a stream.
    """
    prefix, _, rest = os.fspath(where).partition("/")
    asked = _is_address(rest) or re.search(r"[{|]|::", rest) is not None
    return prefix.lower() in ("hfids", "tfds") or (prefix.lower() == "wds" and asked)


class StreamData(ImageData):
    """Batches of pictures that are streamed; see :class:`~smpconv_zoo.training.batches.TrainingData`.

    Inputs and targets are those of :class:`~smpconv_zoo.training.images.ImageData`. An epoch has as many pictures as
    the stream is said to have. Each process that reads has a share of the shards; where it runs out before the others'
    do, it begins again.

    Nothing is held out of a stream. What is chosen by is the recipe's ``val_split``; without one the validation part
    that the stream names, but for ImageNet under the protocol ``sound``.

    Args:
        recipe: The run; some of its fields are for streams alone.
        where: Name of the stream; see the top of this file.
        model: The network: input size, normalisation, classes.
        world: This process among those that train together.
        workers: Processes that read, at most one for each CPU and for each shard; with 0 it is this process that reads.

    Attributes:
        classes: Names, in the order of the labels; numbers where the stream has none.
        note: After :meth:`load_state_dict`: what a user should know of an epoch that goes on, if it is another one.

    Raises:
        ImportError: The package that reads it is not there.
        ValueError: There is no such stream, or it cannot be said how many pictures it has; it does not fit the network,
            the batch or the number of processes.
    """

    def __init__(self, recipe: ImageRecipe, where: str, model: nn.Module, world: World, *, workers: int = 4) -> None:
        kind, _, name = where.partition("/")
        self.where, self.kind = where, kind.lower()
        package, install = _PACKAGES[self.kind]
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"to stream {where} a package is needed: {install}")
        self._prepare(recipe, model, world, workers, 0)
        open_parts = {"wds": _shards, "hfids": _hugging_face, "tfds": _tensorflow}[self.kind]
        options = {"batch_size": self.share, "seed": _number(self._seed) % 2**31}
        self._learned, self._chosen = open_parts(name, recipe, options)
        samples = self._learned.samples or 0
        if samples < recipe.batch_size:
            raise ValueError(f"{samples:,} training pictures fill no step of {recipe.batch_size}: lower batch_size")
        self.batches = samples // recipe.batch_size * recipe.micro_batches
        names = self._learned.classes
        self._outputs = int(getattr(model, "num_classes", len(names)))
        if names and len(names) != self._outputs:
            raise ValueError(
                f"{where} has {len(names):,} classes, the network {self._outputs:,}: give it as many, "
                f"arguments={{num_classes: {len(names)}}}, or take the data that it was made for"
            )
        self.classes = names or tuple(map(str, range(self._outputs)))
        self.workers = self._learned.readers(self.workers, world.size)
        self.note: str | None = None
        self._entered = (0, 0)
        self._under_way: Any = None

    def check(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read the first picture of every shard, each process that of some; of every part, where shards have no names.

        Args:
            progress: Called with the shards looked at and those in all, of this process.

        Raises:
            ValueError: What cannot be read, by name.
        """
        parts = {"train": self._learned} | ({} if self._chosen is None else {"validation": self._chosen})
        urls = list(dict.fromkeys(url for part in parts.values() for url in part.urls))
        if not urls:
            for done, (name, part) in enumerate(parts.items(), 1):
                if not list(self._read(f"first of {name}")):
                    raise ValueError(f"{part.name} has no picture")
                if progress is not None:
                    progress(done, len(parts))
            return
        look = partial(_fault, recipe=self.recipe, form=self._form, outputs=self._outputs)
        mine, found = urls[self.world.rank :: self.world.size], []
        with ThreadPoolExecutor(8) as pool:
            for done, fault in enumerate(pool.map(look, mine), 1):
                found += [] if fault is None else [fault]
                if progress is not None:
                    progress(done, len(mine))
        faults = sorted(fault for some in self.world.gathered(found) for fault in some)
        if faults:
            more = f"; and {len(faults) - _NAMED:,} more" if len(faults) > _NAMED else ""
            raise ValueError(f"{len(faults):,} of {len(urls):,} shards are no good: {'; '.join(faults[:_NAMED])}{more}")

    def close(self) -> None:
        """End the processes that read; the next epoch starts others."""
        if self._under_way is not None:
            self._under_way.close()
        self._under_way = None
        super().close()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches of an epoch, from number ``start`` on; those before are read, too, and passed over.

        Raises:
            ValueError: A shard or a picture that cannot be read, by name; nothing is left out silently.
            ChildProcessError: A process that reads died.
        """
        if not 0 <= start <= self.batches:
            raise ValueError(f"an epoch has batches 0 to {self.batches}, got {start}")
        if start == self.batches:
            return
        self.close()
        self._entered = epoch, start
        self._under_way = reading = self._read("train")
        # Readers take turns, from the first on. Whole rounds are passed over by them, what is left of one is here.
        for number in range(start - start % max(1, self.workers), self.batches):
            batch = next(reading, None)
            if batch is None:
                raise ValueError(
                    f"{self._learned.name} ended after {number} of {self.batches} batches: there was no picture in the "
                    "share of a process that reads; use fewer workers"
                )
            if number < start:
                continue
            if number + 1 == self.batches:
                self.close()
            x, y = batch
            keys = ((epoch, self.world.rank, number, place) for place in range(len(x)))
            yield x, self._finish(x, y, keys, epoch, number)

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The pictures to choose by, this process's share of the shards, at the centre of each.

        Raises:
            ValueError: A shard or a picture that cannot be read, by name.
            ChildProcessError: A process that reads died.
        """
        if self._chosen is not None:
            yield from self._read("validation")

    def describe(self) -> dict[str, Any]:
        """Where the stream comes from, what is known of it, and what is chosen by."""
        learned, chosen = self._learned, self._chosen
        return {
            "where": self.where,
            "kind": self.kind,
            "classes": len(learned.classes) or f"unknown; the network has {self._outputs}",
            "training": learned.samples,
            "shards": learned.shards or "unknown",
            "smallest class": "unknown",
            "largest class": "unknown",
            "validation": 0 if chosen is None else chosen.samples or "unknown",
            "chosen by": "nothing; val_split would name a part" if chosen is None else f"the part {chosen.split}",
            "input": list(self.input_size),
            "workers": self.workers,
        }

    def state_dict(self) -> dict[str, Any]:
        """What tells this stream from others, and by how many processes it is read."""
        recipe, learned = self.recipe, self._learned
        # The same shards may lie elsewhere.
        names = [posixpath.basename(url.partition("?")[0]) for url in learned.urls] or [self.where, learned.split]
        what = [names, learned.samples, recipe.input_key, recipe.target_key, recipe.shuffle_size]
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        return {"pictures": digest, "read by": [self.world.size, self.workers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the stream is that of :meth:`state_dict`, and note if it is read by others.

        Raises:
            ValueError: It is another one.
        """
        if not state:
            return
        ours = self.state_dict()
        if state["pictures"] != ours["pictures"]:
            raise ValueError(
                f"{self.where} is not the stream that this run began with: go on with that one, or start another run"
            )
        self.note = None
        if state["read by"] != ours["read by"]:
            then, now = ("{} x {}".format(*read_by["read by"]) for read_by in (state, ours))
            self.note = (
                f"this epoch was begun by {then} readers, and goes on with {now}: of what is left of it, some pictures "
                "were seen already, and others are not seen"
            )

    def _loader(self, part: str) -> DataLoader[Any]:
        source = self._chosen if part.endswith("validation") else self._learned
        assert source is not None
        world, fixed = self.world, (self._form, self._outputs)
        if part.startswith("first of"):
            # Without the buffer that is filled first for training. By another process, if there may be one: threads
            # that a reader starts do not go well with processes that are started later.
            unmixed = dataclasses.replace(source, reader=source.make(False))
            samples = _Samples(unmixed, self._centre, *fixed, 0, 1, most=1)
            return self._batched(samples, min(1, self.workers), batch_size=1)
        if part == "validation":
            samples = _Samples(source, self._centre, *fixed, world.rank, world.size)
            return self._batched(samples, source.readers(self.workers, world.size), batch_size=self.share)
        epoch, start = self._entered
        span = (start // max(1, self.workers), self.batches, self.share)
        samples = _Samples(source, self._augment, *fixed, world.rank, world.size, key=(self._seed, epoch), span=span)
        return self._batched(samples, self.workers, samples.seed, batch_size=self.share)


# ------------------------------------------------------------------------------------------------------------- pictures


class _Record(NamedTuple):
    """A picture that was not decoded, or that its reader decoded already; its name for messages, and its label."""

    name: str
    picture: bytes | dict[str, Any] | Image.Image | None
    label: Any


@dataclasses.dataclass(frozen=True)
class _Part:
    """A split of a stream.

    Args:
        name: As a message calls it.
        split: As its reader calls it.
        reader: timm's.
        make: Makes another one, that mixes pictures or does not.
        records: Goes through the records of a reader.
        samples: Pictures; None where that is not known.
        shards: Where they are counted.
        urls: Of shards that have some.
        classes: Names of the labels; none where that is not known.
    """

    name: str
    split: str
    reader: Any
    make: Callable[[bool], Any]
    records: Callable[[Any], Iterator[_Record]]
    samples: int | None
    shards: int | None = None
    urls: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def readers(self, workers: int, processes: int) -> int:
        """How many of so many readers for each process have a shard to read.

        Raises:
            ValueError: There is none for each process that trains.
        """
        if self.shards is None:
            # TensorFlow Datasets divides shards. Without a reader, every process would be given the same pictures.
            return max(1, workers)
        each = self.shards // processes
        if self.urls and self.reader.is_training and not each:
            raise ValueError(
                f"{self.name} has {self.shards} shards, of which {processes} processes cannot have one each: use at "
                "most as many processes"
            )
        if not self.urls and self.shards % processes:
            # Every process reads all of them then, and leaves out the pictures of the others.
            each = self.shards
        return min(workers, max(1, each))


class _Samples(IterableDataset[Any]):
    """The pictures of one process that reads: uint8 ``(C, H, W)`` and label.

    Args:
        part: What to read.
        transform: timm's.
        form: Mode of the pictures, and whether they are turned upright.
        outputs: Of the network: more than any label.
        rank: Of the process that trains.
        size: Number of these.
        key: Seed and epoch, for augmentation; None for none.
        span: Rounds of batches to pass over, batches of all readers, and pictures in each; None for all that there is.
        most: Pictures at most.
    """

    def __init__(
        self,
        part: _Part,
        transform: Any,
        form: tuple[str, bool],
        outputs: int,
        rank: int,
        size: int,
        *,
        key: tuple[int, int] | None = None,
        span: tuple[int, int, int] | None = None,
        most: int | None = None,
    ) -> None:
        self.part = part
        self.transform = transform
        self.form = form
        self.outputs = outputs
        self.rank = rank
        self.size = size
        self.key = key
        self.span = span
        self.most = most
        self.seed = 0 if key is None else _number(*key, rank)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader = self.part.reader
        # As if it were new: what was drawn in epochs before does not matter.
        reader.ds = None
        reader.dist_rank, reader.dist_num_replicas = self.rank, self.size
        reader.set_loader_cfg(workers)
        reader.set_epoch(0 if self.key is None else self.key[1])
        # For a process of its own it is replaced by one that torch makes of the same number.
        reader.worker_seed = self.seed
        first, last = 0, self.most
        if self.span is not None:
            passed, batches, share = self.span
            first, last = passed * share, len(range(worker, batches, workers)) * share
        for number, record in enumerate(islice(self.part.records(reader), first, last), first):
            label = _label(record, self.outputs)
            key = None if self.key is None else (*self.key, self.rank, worker, number)
            yield transformed(_decoded(record, *self.form), self.transform, key), label


def _decoded(record: _Record, mode: str, upright: bool) -> Image.Image:
    if isinstance(record.picture, Image.Image):
        return record.picture.convert(mode)
    return decode_picture(partial(_opened, record.picture), lambda: record.name, mode, upright)


def _opened(picture: Any) -> Any:
    """The file of a picture: bytes, or what a Hugging Face dataset has of it."""
    if isinstance(picture, bytes):
        return io.BytesIO(picture)
    if picture is None:
        raise ValueError("the row has no picture")
    if picture["bytes"] is not None:
        return io.BytesIO(picture["bytes"])
    import fsspec

    return fsspec.open(picture["path"], "rb").open()


def _label(record: _Record, outputs: int) -> int:
    try:
        label = int(record.label)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{record.name} has no number of a class: {_line(error)}") from error
    if not 0 <= label < outputs:
        raise ValueError(f"{record.name} is of class {label}, the network has {outputs}, from 0 on")
    return label


# --------------------------------------------------------------------------------------------------------------- shards


def _shards(name: str, recipe: ImageRecipe, options: dict[str, Any]) -> tuple[_Part, _Part | None]:
    place = name if _is_address(name) else str(Path(name).expanduser())
    root, pattern = _cut(place) if _is_pattern(place) else (place.rstrip("/"), None)
    learned, chosen = recipe.train_split or pattern, recipe.val_split
    named: list[str] = []
    if any(split is None or not _is_pattern(split) for split in (learned, chosen or learned)):
        named = _splits(f"wds/{name}", root)
        learned = learned or find_split(named, training=True)
        if learned is None:
            raise ValueError(f"wds/{name} has no split train to learn from, only {', '.join(named)}")
        if chosen is None and not _published(recipe):
            chosen = find_split(named, training=False)
    assert learned is not None
    parts = []
    for split, training in ((learned, True), (chosen, False)):
        if split is None:
            continue
        if not _is_pattern(split) and split not in named:
            raise ValueError(f"wds/{name} has no split {split}, only {', '.join(named)}")
        # A pattern may say itself where it lies.
        at, shards = _cut(split) if _is_address(split) or os.path.isabs(split) else (root, split)
        parts.append(_shard_part(f"wds/{name}", at, shards, recipe, options, training))
    return parts[0], parts[1] if len(parts) == 2 else None


def _shard_part(
    where: str, root: str, split: str, recipe: ImageRecipe, options: dict[str, Any], training: bool
) -> _Part:
    from webdataset.shardlists import expand_urls

    if _is_pattern(split) and _is_address(os.path.join(root, split)):
        # Of a server that does not answer we hear here; timm would ask it for minutes before it said something else.
        first = expand_urls(split.partition("|")[0])[0]
        with contextlib.closing(_samples_of(os.path.join(root, first))) as samples:
            next(samples, None)
    given = {
        "root": root,
        "split": split,
        "num_samples": recipe.num_samples if training else None,
        "input_img_mode": "",
        "sample_shuffle_size": recipe.shuffle_size,
    }
    make = partial(_reader, "wds/", {**given, **options})
    try:
        reader = make(training)
    except KeyError as error:
        raise ValueError(f"{where}: {root}/{_INFO[0]} does not say {error} of the split {split}") from error
    except RuntimeError as error:
        raise ValueError(_unknown(where, f"{split}|NUMBER, or ")) from error
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {split} is no pattern of shards: {_line(error)}") from error
    urls = tuple(os.path.join(root, name) for name in reader.split_info.filenames)
    records = partial(_shard_records, input_key=recipe.input_key, target_key=recipe.target_key)
    name = f"{where}, {split}"
    return _Part(name, split, reader, make, records, reader.num_samples or None, len(urls), urls)


def _shard_records(reader: Any, input_key: str | None, target_key: str | None) -> Iterator[_Record]:
    import webdataset
    from webdataset.tariterators import tarfile_samples

    reader._lazy_init()
    # Which shards, and in which buffer their pictures are mixed, stays; how shards and pictures are read is ours.
    stages = reader.ds.pipeline
    place = next(i for i, stage in enumerate(stages) if getattr(stage, "f", None) is tarfile_samples)
    fields = partial(_fields, input_key=input_key, target_key=target_key)
    reader.ds = webdataset.DataPipeline(*stages[:place], _samples_of_all, *stages[place + 1 : -2], fields)
    if not reader.is_training:
        # Otherwise it would repeat pictures until all processes have as many.
        reader.dist_num_replicas = 1
    for (name, picture), label in reader:
        yield _Record(name, picture, label)


def _samples_of_all(shards: Iterable[dict[str, Any]]) -> Generator[dict[str, Any], None, None]:
    for shard in shards:
        yield from _samples_of(shard["url"])


def _samples_of(url: str) -> Generator[dict[str, Any], None, None]:
    """The files of a shard, those of one key together, undecoded.

    Raises:
        ValueError: It cannot be read to its end.
    """
    from webdataset.tariterators import group_by_keys

    with _reading(url) as stream:
        yield from group_by_keys(_files_of(stream, url))


@contextlib.contextmanager
def _reading(url: str) -> Iterator[Any]:
    """A file, local or elsewhere. What goes wrong with it or with what it holds becomes one sentence."""
    from webdataset.gopen import Pipe, gopen

    stream: Any = None
    try:
        if re.match("https?:", url):
            if shutil.which(_CURL[0]) is None:
                raise ValueError("curl, by which addresses are read, is not installed")
            # Ctrl-C is for the run, which ends its readers after it has saved.
            stream = Pipe([*_CURL, url], mode="rb", stderr=subprocess.PIPE, start_new_session=True)
        else:
            stream = gopen(url, "rb")
        yield stream
    except _FAULTS as error:
        reason = None if stream is None else _shut(stream)
        raise ValueError(f"{url} cannot be read: {reason or _line(error)}") from error
    finally:
        if stream is not None:
            _shut(stream)


def _files_of(stream: Any, url: str) -> Generator[dict[str, Any], None, None]:
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as tar:
        while (member := tar.next()) is not None:
            # Otherwise it keeps the headers of all, a kilobyte each.
            tar.members.clear()  # type: ignore[attr-defined]
            hidden = any(part.startswith(".") and part != "." for part in member.name.split("/"))
            file = None if hidden else tar.extractfile(member)
            if file is not None:
                yield {"fname": member.name, "data": file.read(), "__url__": url}


class _Header(tarfile.TarInfo):
    """A header; what is none ends no shard. Of a stream that breaks off between two files, tarfile says nothing."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Any:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if bytes(buf) == bytes(tarfile.BLOCKSIZE):
                raise
            raise tarfile.ReadError(f"it breaks off, or is no tar ({error})") from error


def _shut(stream: Any) -> str | None:
    """Close what was opened; what the command says that it came from, if it failed."""
    process = getattr(stream, "proc", None)
    if process is None:
        stream.close()
        return None
    if stream.stream.closed:
        return None
    stream.stream.close()
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None
    finally:
        said = b""
        if process.stderr is not None:
            said = process.stderr.read()
            process.stderr.close()
    if process.returncode in _UNHEARD:
        return None
    return " ".join(said.decode(errors="replace").split()) or f"its command ended with status {process.returncode}"


def _fields(
    samples: Iterable[dict[str, Any]], input_key: str | None, target_key: str | None
) -> Generator[dict[str, Any], None, None]:
    """Picture and label of each; what has no picture is left out.

    Raises:
        ValueError: A picture without a label.
    """
    keys = [suffix[1:] for suffix in IMG_EXTENSIONS] if input_key is None else input_key.split(";")
    for sample in samples:
        key = next((key for key in keys if key in sample), None)
        if key is None:
            continue
        name = f"{sample['__url__']}:{sample['__key__']}"
        field = target_key or (None if "cls" in sample else "label")
        labels = sample.get("cls" if field is None else "json")
        if labels is None:
            raise ValueError(f"{name}.{key} has no label, {'KEY.cls' if target_key is None else 'KEY.json'} beside it")
        label = class_number(labels, f"{name}.{'cls' if field is None else 'json'}", field)
        yield {"image": (f"{name}.{key}", sample[key]), "target": label}


def _fault(url: str, recipe: ImageRecipe, form: tuple[str, bool], outputs: int) -> str | None:
    """What is wrong with a shard, by its first picture."""
    try:
        with contextlib.closing(_samples_of(url)) as samples:
            found = next(_fields(samples, recipe.input_key, recipe.target_key), None)
        if found is None:
            return f"{url} holds no picture"
        (name, picture), label = found["image"], found["target"]
        record = _Record(name, picture, label)
        _label(record, outputs)
        _decoded(record, *form)
    except ValueError as error:
        return str(error)
    return None


def _splits(where: str, root: str) -> list[str]:
    """The splits that timm's file beside the shards names."""
    reasons = []
    for name in _INFO:
        try:
            with _reading(f"{root}/{name}") as file:
                return list(json.loads(file.read())["splits"])
        except (ValueError, KeyError, TypeError) as error:
            reasons.append(_line(error))
    raise ValueError(
        f"{where} does not say what shards there are ({reasons[0]}): name them, {where}/NAME-{{000..009}}.tar|NUMBER, "
        "with the number of pictures"
    )


def _cut(place: str) -> tuple[str, str]:
    """Folder or address, and what timm calls a split of it: a pattern of the shards in it."""
    if place.startswith("pipe:") or "::" in place:
        return "", place
    head = re.split(r"[{?|]", place, maxsplit=1)[0]
    root, slash, _ = head.rpartition("/")
    return (root or slash), place[len(root) + len(slash) :]


def _is_address(place: str) -> bool:
    # One letter and a colon are a drive.
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", place) is not None


def _is_pattern(place: str) -> bool:
    return ".tar" in place or ".." in place


# ------------------------------------------------------------------------- Hugging Face and TensorFlow datasets, splits


def _hugging_face(name: str, recipe: ImageRecipe, options: dict[str, Any]) -> tuple[_Part, _Part | None]:
    import datasets

    where = f"hfids/{name}"
    try:
        builder = datasets.load_dataset_builder(name)
        streams = builder.as_streaming_dataset()
    except Exception as error:  # of the Hub, of file formats: whatever the name brings about
        raise ValueError(f"{where} cannot be opened as a Hugging Face dataset: {_line(error)}") from error

    def part(split: str, training: bool) -> _Part:
        stream = streams[split]
        picture, label = ("image", "label") if stream.features is None else picture_columns(where, stream.features)
        picture, label = recipe.input_key or picture, recipe.target_key or label
        known = getattr((builder.info.splits or {}).get(split), "num_examples", None) or None
        samples = (recipe.num_samples if training else None) or known
        if training and samples is None:
            raise ValueError(_unknown(where))
        given = {
            "split": split,
            # Of a part to choose by it does not use it, but wants to know.
            "num_samples": samples or 1,
            "input_img_mode": "",
            "input_key": picture,
            "target_key": label,
            "shuffle_size": recipe.shuffle_size,
        }
        make = partial(_reader, where, {**given, **options})
        records = partial(_rows, name=f"{where}, {split}", input_key=picture)
        names = getattr((stream.features or {}).get(label), "names", None) or ()
        name = f"{where}, {split}"
        return _Part(name, split, make(training), make, records, samples, stream.num_shards, classes=tuple(names))

    return _both(where, list(streams), recipe, part)


def _tensorflow(name: str, recipe: ImageRecipe, options: dict[str, Any]) -> tuple[_Part, _Part | None]:
    where = f"tfds/{name}"
    if recipe.num_samples is not None:
        raise ValueError(f"{where} says itself how many pictures it has: leave num_samples out")

    def part(split: str, training: bool) -> _Part:
        given = {
            "split": split,
            "input_key": recipe.input_key,
            "target_key": recipe.target_key,
            "shuffle_size": recipe.shuffle_size,
        }
        make = partial(_reader, where, {**given, **options})
        try:
            reader = make(training)
        except Exception as error:  # of TensorFlow, of the Hub of its datasets: whatever the name brings about
            # Of a name that it does not know, it goes on to name all that it knows.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{where}, {split} cannot be opened by TensorFlow Datasets: {reason}") from error
        records = partial(_rows, name=f"{where}, {split}")
        return _Part(
            f"{where}, {split}", split, reader, make, records, reader.num_samples, classes=tuple(reader.class_to_idx)
        )

    learned = part(recipe.train_split or "train", True)
    return _both(where, list(learned.reader.builder.info.splits), recipe, part)


def _both(
    where: str, splits: list[str], recipe: ImageRecipe, part: Callable[[str, bool], _Part]
) -> tuple[_Part, _Part | None]:
    learned = recipe.train_split or find_split(splits, training=True)
    if learned is None:
        raise ValueError(f"{where} has no split train to learn from, only {', '.join(splits)}")
    chosen = recipe.val_split or (None if _published(recipe) else find_split(splits, training=False))
    for split in (learned, chosen):
        # TensorFlow takes parts of a split, by brackets behind its name.
        if split is not None and re.split(r"[\[+]", split)[0] not in splits:
            raise ValueError(f"{where} has no split {split}, only {', '.join(splits)}")
    return part(learned, True), None if chosen is None else part(chosen, False)


def _rows(reader: Any, name: str, input_key: str | None = None) -> Iterator[_Record]:
    # The package names a broken file in its log alone.
    log, heard = logging.getLogger("datasets"), _Heard()
    log.addHandler(heard)
    try:
        reader._lazy_init()
        if input_key is not None:
            import datasets

            # What is passed over need not be decoded.
            reader.ds = reader.ds.cast_column(input_key, datasets.Image(decode=False))
        if not reader.is_training:
            # Otherwise pictures may be repeated until all processes have as many.
            reader.dist_num_replicas = 1
        for picture, label in reader:
            path = picture.get("path") if isinstance(picture, dict) else None
            yield _Record(f"{name} ({path})" if path else name, picture, label)
    except Exception as error:  # of the network, of file formats: whatever the data bring about
        raise ValueError(f"{name} cannot be read any further: {heard.last or _line(error)}") from error
    finally:
        log.removeHandler(heard)


class _Heard(logging.Handler):
    """The last error that was logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = " ".join(record.getMessage().split())


def _reader(name: str, options: dict[str, Any], training: bool) -> Any:
    """timm's reader of a stream."""
    # Of shards it warns where there is no file beside them that names the splits; a pattern needs none.
    logger = logging.getLogger("timm.data.readers.reader_wds")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return create_dataset(name, is_training=training, **options).reader
    finally:
        logger.setLevel(level)


def _published(recipe: ImageRecipe) -> bool:
    """Whether results are published on the validation part, so that nothing may be chosen by it."""
    return recipe.data == "imagenet" and recipe.protocol == "sound"


def _unknown(where: str, how: str = "") -> str:
    return f"{where} does not say how many pictures it has: give it, by {how}--set num_samples=NUMBER"


def _number(*key: int) -> int:
    """A seed of 63 bits for what hangs on a key."""
    return int(np.random.SeedSequence((key[0], _STREAM, *key[1:])).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

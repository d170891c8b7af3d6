"""Cards: one JSON file per checkpoint, the single place where it is declared.

Everything said about a checkpoint elsewhere (timm's registry, the README table, the demo's report) is read from its
card. Unknown and missing fields are refused, so a card cannot silently say less than it should.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any

__all__ = [
    "CardError",
    "CheckpointCard",
    "card_bytes",
    "checkpoint_card",
    "list_checkpoints",
    "load_card",
    "parse",
    "weights_dir",
]

STATUSES = ("embedded", "published", "imported", "importable")

# Ids and file names become paths on the reader's disk.
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")

# What `timm.create_model` takes for itself. A card says how a network is built, not what else is loaded into it.
NOT_OF_THE_NETWORK = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "device",
}


class CardError(ValueError):
    """A card is malformed, or there is none of that name."""


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A file of a checkpoint: its name, full sha256 (hex) and size in bytes."""

    name: str
    sha256: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Data:
    """What the network was trained and measured on: data set, form of the input, split."""

    name: str
    input: str
    split: str


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What samples were brought to before the network saw them: ``(x - mean) / std``, a number for every channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class PaperResult:
    """A published figure: top-1 in percent, and where it stands."""

    top1: float
    source: str


@dataclasses.dataclass(frozen=True)
class MeasuredResult:
    """Our figure on the test part: ``correct`` of ``total``, the command that prints it and the log that holds it."""

    top1: float
    correct: int
    total: int
    command: str
    log: str
    hardware: str
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Training:
    """How the weights came to be: command, seed, how it was chosen, log, hardware, versions."""

    command: str
    seed: int
    chosen_by: str
    log: str
    hardware: str
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Hub:
    """Where a checkpoint is published: repository ``organisation/name`` and the commit, 40 hex digits, that is used."""

    repo: str
    revision: str


@dataclasses.dataclass(frozen=True)
class Source:
    """The file of other authors that the weights were converted from, as it was when it was imported.

    ``name`` is its plain name, without folders; ``url`` is None where the file was handed over. ``date`` is the day of
    the import, UTC. ``entry`` is the key of the file that the state dict was under, ``averaged`` whether that is the
    running average of the weights.
    """

    name: str
    sha256: str
    bytes: int
    url: str | None
    date: str
    entry: str | None
    averaged: bool


@dataclasses.dataclass(frozen=True)
class Golden:
    """Logits that the weights give, float32 on a CPU, for an input that anyone can draw again.

    The input is ``numpy.random.RandomState(seed).standard_normal(shape)``, cast to float32.
    """

    seed: int
    shape: tuple[int, ...]
    logits: tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class CheckpointCard:
    """Card of one checkpoint.

    ``id`` is ``network.tag``, ``arguments`` those that build the network. ``status`` says where the weights are:
    ``"embedded"`` (they ship with the package), ``"published"`` (on the Hub, see ``hub``), ``"imported"`` (in the local
    store of one machine), or ``"importable"`` (published by others, see ``origin``). ``tensors`` counts the entries of
    the state dict, ``macs`` the multiply-accumulates of one input. ``scaling`` is that of the data where it is another
    than the network's own, which timm's cfg has. ``paper`` is what the authors publish for this task, ``measured`` what
    we measured with these very weights; either may be None. ``source`` is the file that imported weights were converted
    from.
    """

    id: str
    network: str
    arguments: dict[str, Any]
    status: str
    files: tuple[WeightFile, ...]
    tensors: int
    parameters: int
    macs: int
    data: Data
    scaling: Scaling | None
    paper: PaperResult | None
    measured: MeasuredResult | None
    training: Training | None
    golden: Golden | None
    hub: Hub | None
    source: Source | None
    license: str
    origin: str

    @property
    def tag(self) -> str:
        """The part of the id behind the network's name."""
        return self.id.removeprefix(self.network + ".")


def weights_dir() -> Path:
    """Folder with the cards and embedded weights: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "weights"
    return installed if installed.is_dir() else package.parent / "weights"


def list_checkpoints() -> list[str]:
    """Ids of all checkpoints that have a card, sorted; see :func:`checkpoint_card` for what a card says."""
    return sorted(path.name.removesuffix(".json") for path in weights_dir().glob("*.json"))


def checkpoint_card(checkpoint_id: str) -> CheckpointCard:
    """The card of a checkpoint.

    Args:
        checkpoint_id: ``network.tag``, one of :func:`list_checkpoints`.

    Raises:
        CardError: No such checkpoint (near names are listed), or a malformed card.
    """
    ids = list_checkpoints()
    if checkpoint_id not in ids:
        near = difflib.get_close_matches(checkpoint_id, ids, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(ids) or 'none'}"
        raise CardError(f"no checkpoint is called {checkpoint_id!r}; {hint}")
    return load_card(weights_dir() / f"{checkpoint_id}.json")


def load_card(path: Path) -> CheckpointCard:
    """Read and validate a card file.

    Raises:
        CardError: Not JSON, a field that is unknown, missing or of the wrong type, or an id that does not fit.
    """
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=without_duplicates,
            parse_float=_finite,
            parse_constant=_finite,
        )
        card = parse(CheckpointCard, content, path.name)
        # Half a surrogate pair, or nesting deeper than Python recurses, would fail where the card is written again.
        json.dumps(dataclasses.asdict(card), ensure_ascii=False).encode()
    except CardError:
        raise
    except (ValueError, RecursionError) as error:
        raise CardError(f"{path.name} is not a JSON card: {error}") from error
    assert isinstance(card, CheckpointCard)
    for name in (card.id, *(file.name for file in card.files)):
        if not PLAIN_NAME.fullmatch(name):
            raise CardError(f"{path.name}: {name[:200]!r} is not a plain name of letters, digits and any of _.+-")
    if taken := sorted(card.arguments.keys() & NOT_OF_THE_NETWORK):
        raise CardError(f"{path.name}: {', '.join(taken)} are no arguments of a network")
    if min(card.tensors, card.parameters, card.macs, *(file.bytes for file in card.files)) < 0:
        raise CardError(f"{path.name}: tensors, parameters, macs and bytes are counts, none is negative")
    if card.scaling is not None and (
        len(card.scaling.mean) != len(card.scaling.std) or not card.scaling.std or min(card.scaling.std) <= 0
    ):
        raise CardError(f"{path.name}: scaling is a mean and a positive deviation for every channel")
    if path.name not in (f"{card.id}.json", "card.json") or card.id != f"{card.network}.{card.tag}" or not card.tag:
        raise CardError(f"{path.name} declares id {card.id!r} and network {card.network!r}, which do not fit its name")
    if card.status not in STATUSES:
        raise CardError(f"{path.name}: status must be one of {STATUSES}, got {card.status!r}")
    if (card.status == "importable") == bool(card.files):
        raise CardError(f"{path.name}: a checkpoint has files unless it is importable, this one is {card.status}")
    if card.status == "published" and card.hub is None:
        raise CardError(f"{path.name}: a published checkpoint names its hub repository and revision")
    if card.hub is not None and (len(card.hub.revision) != 40 or set(card.hub.revision) - set("0123456789abcdef")):
        raise CardError(f"{path.name}: the hub revision must be a full commit hash, got {card.hub.revision!r}")
    named: list[WeightFile | Source] = [*card.files]
    if card.source is not None:
        if Path(card.source.name).name != card.source.name:
            raise CardError(f"{path.name}: {card.source.name!r} is not a plain file name")
        named.append(card.source)
    for file in named:
        if len(file.sha256) != 64 or set(file.sha256) - set("0123456789abcdef"):
            raise CardError(f"{path.name}: {file.name} needs a full sha256, got {file.sha256!r}")
    return card


def card_bytes(card: CheckpointCard) -> bytes:
    """The card as the file that :func:`load_card` reads."""
    return (json.dumps(dataclasses.asdict(card), indent=1) + "\n").encode()


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are unique: of repeated ones, two readers may not take the same."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a field is given twice")
    return entries


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def parse(kind: Any, value: Any, where: str) -> Any:
    """Build ``kind`` (a dataclass, union, tuple, dict or plain type) from parsed JSON, refusing anything else.

    Args:
        kind: What to build.
        value: The parsed JSON.
        where: What it is the JSON of, as a refusal names it.

    Raises:
        CardError: Unknown or missing fields, or a value of another type.
    """
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        return parse(next(option for option in options if option is not type(None)), value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise CardError(f"{where} must be an object, got {type(value).__name__}")
        hints = typing.get_type_hints(kind)
        unknown, missing = sorted(value.keys() - hints.keys()), sorted(hints.keys() - value.keys())
        if unknown or missing:
            raise CardError(f"{where}: unknown fields {unknown}, missing fields {missing}")
        return kind(**{name: parse(hint, value[name], f"{where}: {name}") for name, hint in hints.items()})
    if origin is tuple:
        if not isinstance(value, list):
            raise CardError(f"{where} must be a list, got {type(value).__name__}")
        return tuple(parse(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise CardError(f"{where} must be an object, got {type(value).__name__}")
        return {key: parse(typing.get_args(kind)[1], item, f"{where}: {key}") for key, item in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 1 << 1000:
            raise CardError(f"{where} is too long a number")
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise CardError(f"{where} must be {kind.__name__}, got {type(value).__name__}")
    return value

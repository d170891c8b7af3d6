"""Networks to measure: checkpoints by id or wildcard, other networks of timm, a file of weights."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

from smpconv_zoo.checkpoints import check_network_name, convert_checkpoint, create_model, network_names
from smpconv_zoo.evaluation.classification import load_pretrained
from smpconv_zoo.pretrained.cards import CardError, CheckpointCard, checkpoint_card, list_checkpoints
from smpconv_zoo.pretrained.home import card_in_use
from smpconv_zoo.pretrained.store import CheckpointError, how_to_get

__all__ = ["Candidate", "find_candidates", "is_sequence", "network_from_file"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A network to measure.

    Args:
        name: As it was asked for.
        weights: Which weights these are, in a few words.
        build: Makes the network, in float32, on the CPU.
        card: Of a checkpoint of the zoo; None for others.
        changes: In what its pictures are prepared otherwise than its ``pretrained_cfg`` says, by timm's names.
        protocol: How these weights were chosen, ``"reference"`` (on the test part, as the authors do) or ``"sound"``;
            None where that is not known.
    """

    name: str
    weights: str
    build: Callable[[], nn.Module]
    card: CheckpointCard | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    protocol: str | None = None


def find_candidates(
    patterns: Sequence[str], wanted: Callable[[CheckpointCard], bool]
) -> tuple[list[Candidate], list[str]]:
    """Networks by name, in the order of the patterns, each once. No weights are read.

    Args:
        patterns: Ids of checkpoints, other names that timm knows, ``hf-hub:`` and ``local-dir:`` places, or wildcards.
            A wildcard stands for those checkpoints of the zoo that are ``wanted`` and whose weights are at hand; where
            it matches none of the zoo at all, for timm's networks with weights.
        wanted: Whether a checkpoint can be measured on the data at hand.

    Returns:
        The networks, and a sentence about every checkpoint that a wildcard matches and whose weights are missing.

    Raises:
        CardError: A name that nothing bears, or a wildcard that matches nothing that could be measured.
        CheckpointError: The weights of a checkpoint that is named are missing; the message says how to get them.
    """
    found: dict[str, Candidate] = {}
    missing: dict[str, str] = {}
    for pattern in patterns:
        if not set(pattern) & set("*?["):
            found.setdefault(pattern, _named(pattern))
            continue
        ids = [name for name in fnmatch.filter(list_checkpoints(), pattern) if wanted(card_in_use(name))]
        others = [] if fnmatch.filter(list_checkpoints(), pattern) else timm.list_pretrained(pattern)
        if not ids and not others:
            raise CardError(f"no checkpoint for these data matches {pattern!r}; `smpconv-zoo list` shows what there is")
        for name in ids:
            card = card_in_use(name)
            if card.status == "importable":
                missing[name] = f"left out: {how_to_get(card)}"
            else:
                found.setdefault(name, _named(name))
        for name in others:
            found.setdefault(name, _named(name))
    return list(found.values()), list(missing.values())


def network_from_file(path: Path, network: str, arguments: Mapping[str, Any]) -> Candidate:
    """A file of weights: ``.safetensors`` of ours, ``.pth`` or ``.pth.tar`` of the authors' code or of timm's script.

    Averaged weights are preferred, no pickle is executed.

    Args:
        path: The file.
        network: Entrypoint of this package that it belongs to.
        arguments: Arguments of the entrypoint, where they differ.

    Raises:
        ValueError: No such network.
        FileNotFoundError: No such file.
    """
    name = check_network_name(network)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")

    def build() -> nn.Module:
        model = timm.create_model(name, pretrained=False, **arguments)
        model.load_state_dict(convert_checkpoint(path, name, **arguments))
        return model

    return Candidate(f"{network} {path.name}", f"{path.name}, averaged weights where it has some", build)


def is_sequence(card: CheckpointCard) -> bool:
    """Whether a checkpoint is of a sequence task, small images in memory among them; not of pictures in files."""
    return card.data.name != "ImageNet-1k"


def _named(name: str) -> Candidate:
    if name in list_checkpoints():
        card = card_in_use(name)
        if card.status == "importable":
            raise CheckpointError(f"the weights of {name} are not on this machine: {how_to_get(card)}")
        weights = f"{card.status}, sha256 {card.files[0].sha256[:12]}"
        return Candidate(name, weights, lambda: load_pretrained(card), card)
    if name.startswith("local-dir:"):
        return Candidate(name, "verified folder", lambda: create_model(name, pretrained=True).float())
    if name in network_names():
        # A network's name alone stands for its default checkpoint, as with timm.
        default = f"{name}.{getattr(timm.get_pretrained_cfg(name), 'tag', None)}"
        if default in list_checkpoints():
            return _named(default)
        raise CardError(f"{name} has no checkpoint: give --checkpoint FILE")
    if ":" not in name and not timm.is_model_pretrained(name):
        if name.startswith(("smpconv", "test_smpconv")):
            checkpoint_card(name)
        raise CardError(f"timm has no weights for {name!r}")
    return Candidate(name, "timm's", lambda: timm.create_model(name, pretrained=True).float())

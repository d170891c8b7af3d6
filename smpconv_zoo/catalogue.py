"""What the zoo holds, as plain data: networks and checkpoints by name, for the command line and the reports."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

from smpconv_zoo.checkpoints import network_names
from smpconv_zoo.models.build import create_on_meta, sample_shape
from smpconv_zoo.pretrained.cards import CardError, CheckpointCard, checkpoint_card, list_checkpoints
from smpconv_zoo.pretrained.home import card_in_use, imported_file
from smpconv_zoo.pretrained.store import how_to_get

__all__ = ["NetworkFacts", "list_networks", "look_up", "match_checkpoints", "network_facts", "where_weights_come_from"]


@dataclasses.dataclass(frozen=True)
class NetworkFacts:
    """A network as its entrypoint builds it. ``input_shape`` is that of one sample: ``(C, L)`` or ``(C, H, W)``."""

    name: str
    family: str
    parameters: int
    input_shape: tuple[int, ...]
    num_classes: int
    checkpoints: tuple[str, ...]


def list_networks() -> list[NetworkFacts]:
    """Every network of the package, by name; the tiny ones for tests are left out."""
    return [network_facts(name) for name in network_names() if not name.startswith("test_")]


def network_facts(name: str) -> NetworkFacts:
    """Size and shape of the network that the entrypoint ``name`` builds; no memory is taken for its weights."""
    model: Any = create_on_meta(name)
    return NetworkFacts(
        name=name,
        family=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        input_shape=sample_shape(model),
        num_classes=model.num_classes,
        checkpoints=tuple(name_ for name_ in list_checkpoints() if checkpoint_card(name_).network == name),
    )


def look_up(name: str) -> CheckpointCard | NetworkFacts:
    """The card of the checkpoint, or else the facts about the network, that is called ``name``.

    Raises:
        CardError: Nothing is called so (near names are listed), or a malformed card.
    """
    if name in list_checkpoints():
        return card_in_use(name)
    networks = network_names()
    if name in networks:
        return network_facts(name)
    near = difflib.get_close_matches(name, [*list_checkpoints(), *networks], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`smpconv-zoo list` shows what there is"
    raise CardError(f"no checkpoint or network is called {name!r}; {hint}")


def match_checkpoints(patterns: Sequence[str]) -> list[str]:
    """Ids of the checkpoints that ``patterns`` name, in their order, each once.

    Args:
        patterns: Ids, or shell-style wildcards (``*``, ``?``, ``[...]``), which stand for embedded checkpoints only.

    Raises:
        CardError: A name that no checkpoint bears, or a wildcard that no embedded checkpoint matches.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if not set(pattern) & set("*?["):
            found[checkpoint_card(pattern).id] = None
            continue
        embedded = [name for name in list_checkpoints() if checkpoint_card(name).status == "embedded"]
        matches = fnmatch.filter(embedded, pattern)
        if not matches:
            there = ", ".join(embedded) or "none"
            raise CardError(f"no embedded checkpoint matches {pattern!r}; there are: {there}")
        found.update(dict.fromkeys(matches))
    return list(found)


def where_weights_come_from(card: CheckpointCard) -> str:
    """One sentence: shipped with the package, imported from which file, on the Hub, or how to get them."""
    if card.status == "imported" and card.source is not None:
        file, source = card.files[0], card.source
        return (
            f"imported from {source.url or source.name} (sha256 {source.sha256}) as {imported_file(card)} "
            f"({file.bytes:,} bytes, sha256 {file.sha256})"
        )
    if card.status == "embedded":
        files = ", ".join(f"{file.name} ({file.bytes:,} bytes, sha256 {file.sha256})" for file in card.files)
        return f"ships with this package, verified on every load: {files}"
    if card.hub is not None:
        return f"downloaded when first used, verified on every load: {card.hub.repo} at {card.hub.revision} on the Hub"
    return how_to_get(card)

"""``hf-hub:`` names in timm's own ``create_model``: a Hub that cannot be reached is known within seconds.

timm reads a repository's ``config.json`` before any of this package's code is called. Where nobody answers, the client
repeats itself, for minutes if it has to, and then says to check the connection. Importing this package therefore puts
one short look-up in front of timm's: see :func:`look_before_timm`.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub.errors import LocalEntryNotFoundError
from timm.models import _factory

from smpconv_zoo.pretrained import hub
from smpconv_zoo.pretrained.cards import checkpoint_card, list_checkpoints
from smpconv_zoo.pretrained.errors import CheckpointError

__all__ = ["HubUnreachableError", "look_before_timm", "without_the_hub"]

MARK = "_smpconv_zoo_looks"


class HubUnreachableError(CheckpointError, LocalEntryNotFoundError):
    """Nobody answers; also what the client raises then, for code that catches that."""


def without_the_hub(repo: str) -> str:
    """What the reader of an error can do without the Hub, as the end of a sentence."""
    by_id = ""
    for card in map(checkpoint_card, list_checkpoints()):
        if card.hub is not None and card.hub.repo == repo:
            by_id = (
                f", or run `smpconv-zoo import {card.id} --file FILE` with its {hub.WEIGHTS_NAME} and load {card.id}"
            )
    return f"fetch the repository on another machine and load the folder as 'local-dir:PATH'{by_id}"


def look_before_timm() -> None:
    """Let timm ask the Hub for a repository's configuration only after one short question has been answered.

    That question is one HEAD request for ``config.json``, asked twice at most and for 8 s at most, and only where
    nothing is cached and HF_HUB_OFFLINE is not set. Any answer, also that there is no such repository or that the
    server fails, leaves everything to timm. Names of other people's networks are treated alike: they load as before, at
    the price of that request when they are first downloaded, and fail sooner where nobody answers, by an error of the
    class that the client raises.

    Where the cached configuration is of a network of this package and of a branch, the question is asked once, for 4 s
    at most: without an answer the cached commit is used, as the client does after its own, longer wait.

    Nothing else of timm is changed; of a timm without this function, nothing at all.
    """
    timms: Any = getattr(_factory, "load_model_config_from_hf", None)
    # A second copy of this package in the process finds the first one's.
    if timms is None or hasattr(timms, MARK):
        return

    @functools.wraps(timms)
    def load_model_config_from_hf(
        model_id: str, cache_dir: str | os.PathLike[str] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        return timms(_answered(model_id, cache_dir), cache_dir, *args, **kwargs)

    setattr(load_model_config_from_hf, MARK, True)
    setattr(_factory, "load_model_config_from_hf", load_model_config_from_hf)  # noqa: B010 (mypy: the module's name)


def _answered(model_id: str, cache_dir: str | os.PathLike[str] | None) -> str:
    """What timm can ask for without waiting for nobody: the name as it is, or at the commit that is cached.

    Raises:
        HubUnreachableError: Nobody answers and nothing is cached.
    """
    repo, _, revision = model_id.partition("@")
    revision = revision or "main"
    try:
        path = hub.cached(repo, revision, hub.CONFIG_NAME, cache_dir)
    except ValueError:  # no name of a repository: the client says so
        return model_id
    # The client asks nobody for a commit that it has.
    if hub.is_offline() or (path is not None and (path.parent.name == revision or not _is_ours(path))):
        return model_id
    try:
        hub.look_for_config(repo, revision, without_the_hub(repo), cache_dir, patient=path is None)
    except CheckpointError as error:
        if path is None:
            raise HubUnreachableError(str(error)) from error
        return f"{repo}@{path.parent.name}"
    return model_id


def _is_ours(config: Path) -> bool:
    try:
        network = json.loads(config.read_text(encoding="utf-8"))["architecture"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(network, str) and network.startswith(("smpconv_", "test_smpconv"))

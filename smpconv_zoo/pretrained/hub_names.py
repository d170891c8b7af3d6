"""``hf-hub:`` names in timm's own ``create_model``: a Hub that cannot be reached is known within seconds.

timm reads a repository's ``config.json`` before any of this package's code is called, and where nobody answers, the
client repeats itself for 23 s and then says to check the connection. Importing this package therefore puts one short
look-up in front of timm's: see :func:`look_before_timm`.
"""

from __future__ import annotations

import functools
import os
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
    class that the client raises. Nothing else of timm is changed; of a timm without this function, nothing at all.
    """
    timms: Any = getattr(_factory, "load_model_config_from_hf", None)
    # A second copy of this package in the process finds the first one's.
    if timms is None or hasattr(timms, MARK):
        return

    @functools.wraps(timms)
    def load_model_config_from_hf(
        model_id: str, cache_dir: str | os.PathLike[str] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        repo, _, revision = model_id.partition("@")
        try:
            hub.look_for_config(repo, revision or "main", without_the_hub(repo), cache_dir)
        except CheckpointError as error:
            raise HubUnreachableError(str(error)) from error
        return timms(model_id, cache_dir, *args, **kwargs)

    setattr(load_model_config_from_hf, MARK, True)
    setattr(_factory, "load_model_config_from_hf", load_model_config_from_hf)  # noqa: B010 (mypy: the module's name)

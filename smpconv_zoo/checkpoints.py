"""Networks by name, and the authors' checkpoints under our names."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from torch import Tensor, nn

import smpconv_zoo.models  # noqa: F401  (registers the networks)
from smpconv_zoo.files import write_whole
from smpconv_zoo.models.build import create_on_meta, match_state_dict
from smpconv_zoo.pretrained.store import CheckpointError, read_checkpoint, sha256_of

__all__ = ["convert_checkpoint", "create_model", "network_names", "write_safetensors"]


def network_names() -> list[str]:
    """Names of the networks that this package registers with timm."""
    return [name for pattern in ("smpconv_*", "test_smpconv*") for name in timm.list_models(pattern)]


def check_network_name(name: str) -> str:
    """``name`` without its tag, if it is a network of this package.

    Raises:
        ValueError: It is not; near names are listed.
    """
    network = name.partition(".")[0]
    names = network_names()
    if network not in names:
        near = difflib.get_close_matches(network, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names)}"
        raise ValueError(f"no network is called {network!r}; {hint}")
    return network


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` for the networks of this package, with near names listed for a wrong one.

    Args:
        name: Network, or ``network.tag``.
        pretrained: Load the checkpoint's weights, verified.
        **kwargs: As for ``timm.create_model``.

    Raises:
        ValueError: No such network.
    """
    check_network_name(name)
    return timm.create_model(name, pretrained=pretrained, **kwargs)


def convert_checkpoint(path: str | os.PathLike[str], model_name: str, **kwargs: Any) -> dict[str, Tensor]:
    """Read a checkpoint of the authors' code as a state dict of our network.

    Both of their formats are taken, and ours. No pickle is executed, averaged weights are preferred, and every key is
    compared with the network.

    Args:
        path: The ``.pth``, ``.pth.tar`` or ``.safetensors`` file.
        model_name: Network it belongs to, such as ``"smpconv_t"``.
        **kwargs: Arguments of the network, where they differ from the entrypoint's.

    Returns:
        Tensors under our names, in the order of the network's state dict.

    Raises:
        ValueError: No such network.
        CheckpointError: A file that cannot be read safely, or keys that are missing, unexpected or mis-shaped.
    """
    model = create_on_meta(check_network_name(model_name), **kwargs)
    # The classifier, too, has to fit: a conversion changes names, never sizes.
    model.pretrained_cfg = {**model.pretrained_cfg, "num_classes": model.num_classes, "first_conv": None}
    converted = match_state_dict(read_checkpoint(Path(path)), model)
    return {name: converted[name] for name in model.state_dict()}


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write tensors under ``path``, whole or not at all, and return the sha256 of the file.

    Raises:
        CheckpointError: The folder does not exist or cannot be written.
    """
    data = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()}, metadata=metadata)
    try:
        write_whole(path, data)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
    return sha256_of(data)

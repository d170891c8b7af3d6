"""Networks by name, and the authors' checkpoints under our names."""

from __future__ import annotations

import dataclasses
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
from smpconv_zoo.pretrained.hub import CONFIG_NAME, fetch
from smpconv_zoo.pretrained.hub_names import without_the_hub
from smpconv_zoo.pretrained.store import CheckpointError, StoredWeights, read_weights, sha256_of

__all__ = [
    "Conversion",
    "convert_checkpoint",
    "convert_file",
    "create_model",
    "network_names",
    "write_safetensors",
]


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What :func:`convert_file` read and wrote.

    ``format``, ``entry`` and ``averaged`` say which weights of the source were read, see
    :class:`~smpconv_zoo.pretrained.store.StoredWeights`; ``tensors`` and ``parameters`` count what was written (buffers
    are tensors, not parameters); ``sha256`` is the hex digest of the file written.
    """

    source: str
    format: str
    entry: str | None
    averaged: bool
    network: str
    tensors: int
    parameters: int
    out: str
    sha256: str


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
        name: Network, ``network.tag``, ``hf-hub:ORG/NAME`` or ``local-dir:PATH``.
        pretrained: Load the checkpoint's weights, verified.
        **kwargs: As for ``timm.create_model``.

    Raises:
        ValueError: No such network.
        CheckpointError: Weights that cannot be had or are not those declared, or a Hub out of reach.
    """
    source, _, place = name.partition(":")
    if source == "hf-hub":
        # timm asks for the repository's configuration itself; what it says of one that cannot be had helps nobody.
        repo, _, revision = place.partition("@")
        fetch(repo, revision or "main", CONFIG_NAME, without_the_hub(repo), kwargs.get("cache_dir"))
    elif source != "local-dir":
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
    return _convert(Path(path), model_name, kwargs)[1]


def convert_file(
    path: str | os.PathLike[str],
    model_name: str,
    out: str | os.PathLike[str],
    arguments: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Convert a checkpoint of the authors' code to a safetensors file of ours.

    The same weights always give the same bytes.

    Args:
        path: The ``.pth``, ``.pth.tar`` or ``.safetensors`` file.
        model_name: Network it belongs to.
        out: The ``.safetensors`` file to write.
        arguments: Arguments of the network, where they differ from the entrypoint's.
        overwrite: Whether ``out`` may exist.

    Raises:
        ValueError: No such network, arguments that it does not take, or another suffix than ``.safetensors``.
        FileExistsError: ``out`` exists.
        CheckpointError: A file that cannot be read safely, does not fit the network, or cannot be written.
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"the output has to end in .safetensors, got {out}")
    if os.path.lexists(out) and not overwrite:
        raise FileExistsError(f"{out} exists and was left as it is; pass --force (overwrite=True) to replace it")
    stored, tensors, parameters = _convert(Path(path), model_name, arguments or {})
    return Conversion(
        source=str(path),
        format=stored.format,
        entry=stored.entry,
        averaged=stored.averaged,
        network=model_name,
        tensors=len(tensors),
        parameters=parameters,
        out=str(out),
        sha256=write_safetensors(out, tensors),
    )


def _convert(path: Path, model_name: str, arguments: dict[str, Any]) -> tuple[StoredWeights, dict[str, Tensor], int]:
    """What was read, the tensors under our names in the network's order, and the network's number of parameters."""
    network = check_network_name(model_name)
    try:
        model: Any = create_on_meta(network, **arguments)
    except TypeError as error:
        raise ValueError(f"{network} cannot be built from the arguments {arguments}: {error}") from error
    # The classifier, too, has to fit: a conversion changes names, never sizes.
    model.pretrained_cfg = {**model.pretrained_cfg, "num_classes": model.num_classes, "first_conv": None}
    stored = read_weights(path)
    converted = match_state_dict(stored.tensors, model)
    tensors = {name: converted[name] for name in model.state_dict()}
    return stored, tensors, sum(p.numel() for p in model.parameters())


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

"""A trained network as a folder that everything else takes: verified weights, their card, timm's configuration.

``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads it, and so do ``predict``, ``export`` and ``verify``.
The folder is written aside, read back, and takes its name when all of it is right.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import nn

from smpconv_zoo.checkpoints import check_network_name, write_safetensors
from smpconv_zoo.evaluation.complexity import count_macs
from smpconv_zoo.evaluation.golden import golden_logits
from smpconv_zoo.files import write_whole
from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.models.sizes import size_arguments
from smpconv_zoo.pretrained.cards import (
    NOT_OF_THE_NETWORK,
    PLAIN_NAME,
    CheckpointCard,
    Data,
    MeasuredResult,
    Scaling,
    Training,
    WeightFile,
    card_bytes,
)
from smpconv_zoo.pretrained.hub import CARD_NAME, WEIGHTS_NAME
from smpconv_zoo.pretrained.store import CheckpointError

__all__ = ["CONFIG_NAME", "check_place", "plain_tag", "save_network"]

CONFIG_NAME = "config.json"

# Entries of timm's cfg that a user's data decide.
ENTRIES = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "label_names", "num_classes")


def save_network(
    folder: Path,
    checkpoint_id: str,
    model: nn.Module,
    *,
    arguments: Mapping[str, Any],
    data: Data,
    entries: Mapping[str, Any] | None = None,
    training: Training | None = None,
    measured: MeasuredResult | None = None,
    license: str = "not stated",
    origin: str = "trained by smpconv_zoo",
) -> CheckpointCard:
    """Write a network as ``model.safetensors``, ``card.json`` and ``config.json`` into a folder that is new.

    Args:
        folder: Must not exist; its parent must.
        checkpoint_id: ``network.tag``.
        model: A network made by its entrypoint, on any device and in any mode; it stays as it is.
        arguments: Arguments of the entrypoint that build it again, with those for the size of its input.
        data: What it learned from, for the card.
        entries: Entries of timm's ``pretrained_cfg`` by which files are read as in training, where they differ from
            the network's own: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``, and
            ``label_names``, the names of the classes in the order of the logits.
        training: How the weights came to be.
        measured: What was measured on a test part.
        license: Of the weights.
        origin: Where they come from, in a sentence.

    Raises:
        FileExistsError: ``folder`` exists; it was left as it was.
        ValueError: An id of another network, an unknown entry, names for another number of classes, arguments that
            build another network, or weights in another type than float32.
        CheckpointError: NaN or Inf among the weights, or a folder that cannot be written.
    """
    entries = dict(entries or {})
    network = check_network_name(checkpoint_id)
    _check(checkpoint_id, network, model, arguments, entries)
    check_place(folder)
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} holds NaN or Inf: the network was not saved")
    again = _built_again(network, arguments, tensors)
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        aside.mkdir()
        digest = write_safetensors(aside / WEIGHTS_NAME, tensors, {"id": checkpoint_id})
        card = CheckpointCard(
            id=checkpoint_id,
            network=network,
            arguments=json.loads(json.dumps(dict(arguments))),
            status="imported",
            files=(WeightFile(WEIGHTS_NAME, digest, (aside / WEIGHTS_NAME).stat().st_size),),
            tensors=len(tensors),
            parameters=sum(parameter.numel() for parameter in again.parameters()),
            macs=count_macs(again, (1, *sample_shape(again)))["total"],
            data=data,
            scaling=_scaling(entries),
            paper=None,
            measured=measured,
            training=training,
            golden=golden_logits(again),
            hub=None,
            source=None,
            license=license,
            origin=origin,
        )
        write_whole(aside / CARD_NAME, card_bytes(card))
        write_whole(aside / CONFIG_NAME, _config(again, network, arguments, entries))
        _read_back(aside, again, entries)
        check_place(folder)
        os.replace(aside, folder)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, FileExistsError):
            raise CheckpointError(f"{folder} cannot be written: {error.strerror}") from error
        raise
    _sync(folder.parent)
    return card


def check_place(folder: Path) -> None:
    """Whether :func:`save_network` may write ``folder``.

    Raises:
        FileExistsError: It exists.
        FileNotFoundError: It has no parent.
    """
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists and was left as it is; choose another folder")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder.parent} is no folder: make it first")


def plain_tag(name: str) -> str:
    """``name`` as the tag of an id: runs of other characters than letters, digits and any of _+- become ``_``.

    A dot would end the tag for timm.
    """
    return re.sub(r"[^A-Za-z0-9_+-]+", "_", name).strip("_")[:100] or "own"


def _check(
    checkpoint_id: str, network: str, model: Any, arguments: Mapping[str, Any], entries: Mapping[str, Any]
) -> None:
    own = getattr(model, "pretrained_cfg", {}).get("architecture")
    if own != network or not checkpoint_id.removeprefix(network + ".") or "." not in checkpoint_id:
        raise ValueError(f"{checkpoint_id!r} is no id of a {own or type(model).__name__}: expected {own}.TAG")
    if not PLAIN_NAME.fullmatch(checkpoint_id):
        raise ValueError(f"{checkpoint_id!r} is not a plain name of letters, digits and any of _.+-")
    if taken := sorted(arguments.keys() & NOT_OF_THE_NETWORK):
        raise ValueError(f"{', '.join(taken)} are no arguments of a network")
    if unknown := sorted(entries.keys() - set(ENTRIES)):
        raise ValueError(f"{', '.join(unknown)}: no entries that data decide; there are {', '.join(ENTRIES)}")
    names = entries.get("label_names")
    for number in (len(names) if names else None, entries.get("num_classes")):
        if number is not None and number != model.num_classes:
            raise ValueError(f"the data have {number} classes, the network has {model.num_classes}")


def _scaling(entries: Mapping[str, Any]) -> Scaling | None:
    if "mean" not in entries or "std" not in entries:
        return None
    return Scaling(tuple(map(float, entries["mean"])), tuple(map(float, entries["std"])))


def _built_again(network: str, arguments: Mapping[str, Any], tensors: dict[str, Any]) -> nn.Module:
    """The network as its arguments make it, with these weights, in eval mode on the CPU."""
    model = timm.create_model(network, pretrained=False, **arguments)
    own = model.state_dict()
    other = [
        name
        for name in [*own, *(name for name in tensors if name not in own)]
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape
    ]
    if half := [name for name, tensor in tensors.items() if name in own and tensor.dtype != own[name].dtype]:
        raise ValueError(f"{half[0]} is {tensors[half[0]].dtype}: a network is saved as it trained, in float32")
    if other:
        raise ValueError(
            f"the arguments {dict(arguments)} do not build this network: {', '.join(other[:3])} "
            f"{'differs' if len(other) == 1 else 'differ'}"
        )
    model.load_state_dict(tensors)
    return model.eval()


def _config(model: nn.Module, network: str, arguments: Mapping[str, Any], entries: Mapping[str, Any]) -> bytes:
    """timm's configuration of the network and its input."""
    net: Any = model
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / CONFIG_NAME
        save_config_for_hf(model, str(path), model_args=dict(arguments))
        config = json.loads(path.read_text(encoding="utf-8"))
    cfg: dict[str, Any] = {**config["pretrained_cfg"], **entries, "num_classes": net.num_classes}
    if any(name in arguments for name in size_arguments(type(model))):
        # These arguments say by how much the kernels are read off more densely than for the network's own input.
        native = timm.get_pretrained_cfg(network)
        assert native is not None
        cfg["input_size"] = [net.in_chans, *native.input_size[1:]]
        cfg["pool_size"] = native.pool_size
    for name in ("tag", "description", "license"):
        # Of a checkpoint of the zoo, which this is not.
        cfg.pop(name, None)
    names = cfg.pop("label_names", None)
    if names:
        config["label_names"] = list(names)
    config["pretrained_cfg"] = cfg
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _read_back(folder: Path, expected: nn.Module, entries: Mapping[str, Any]) -> None:
    """Load the folder as its user will, and compare."""
    loaded: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    state = loaded.state_dict()
    for name, tensor in expected.state_dict().items():
        if name not in state or not torch.equal(state[name], tensor):
            raise CheckpointError(f"{name} was read back as something else: the network was not saved")
    for name, value in entries.items():
        found = loaded.pretrained_cfg.get(name)
        if json.dumps(found) != json.dumps(value):
            raise CheckpointError(f"{name} was read back as {found!r}, not {value!r}: the network was not saved")


def _sync(folder: Path) -> None:
    """Let the new name reach the disk, where folders can be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

"""Exported files: their formats, the description inside, and running them. None needs the network's own code.

==============  ======  ==========================================  =====================================
format          suffix  holds                                       the description is
==============  ======  ==========================================  =====================================
onnx            .onnx   an ONNX graph                               metadata ``smpconv_zoo``
torch-export    .pt2    what ``torch.export.save`` writes           extra file ``smpconv_zoo.json``
torchscript     .pt     what ``torch.jit.save`` writes              extra file ``smpconv_zoo.json``
aot-inductor    .pt2    machine code for one kind of processor      metadata ``smpconv_zoo``
==============  ======  ==========================================  =====================================

Opening a file can run code in it (an AOTInductor package is nothing else): open only what you trust.
"""

from __future__ import annotations

import importlib
import json
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from smpconv_zoo.description import Description
from smpconv_zoo.environment import usable_device

__all__ = ["EXTRA_FILE", "FORMATS", "METADATA", "ExportedFileError", "Network", "format_of", "open_exported", "require"]

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt", "aot-inductor": ".pt2"}

METADATA = "smpconv_zoo"
EXTRA_FILE = "smpconv_zoo.json"

# From a batch of inputs (N, ...) to logits (N, classes) on the CPU.
Network = Callable[[Tensor], Tensor]


class ExportedFileError(ValueError):
    """A file is no exported network of this package, or cannot be run here."""


def require(packages: Sequence[str]) -> None:
    """Ask for optional packages before anything is computed.

    Raises:
        ImportError: One is missing; the message says what to install.
    """
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f'{name} is needed and cannot be imported: pip install "smpconv-zoo[export]"') from error


def format_of(path: Path) -> str:
    """Which of :data:`FORMATS` a file is of, by its content.

    Raises:
        ExportedFileError: Of none.
        OSError: It cannot be read.
    """
    if path.suffix == FORMATS["onnx"]:
        path.open("rb").close()
        return "onnx"
    try:
        with zipfile.ZipFile(path) as archive:
            # Every entry is in a folder that bears the name that the file had when it was written.
            names = [name.partition("/")[2] for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise ExportedFileError(f"{path} is no exported network, or it is damaged: {error}") from error
    if any(name.startswith("data/aotinductor/") for name in names):
        return "aot-inductor"
    if any(name.startswith("models/") for name in names):
        return "torch-export"
    if any(name.startswith("code/") for name in names):
        return "torchscript"
    raise ExportedFileError(f"{path} is no exported network: it is an archive of something else")


def open_exported(path: Path, device: str = "cpu") -> tuple[Network, Description]:
    """An exported file, ready to run, and the description inside.

    Args:
        path: The file.
        device: Where to compute.

    Returns:
        A function from a batch of inputs, float32 and on the CPU, to logits on the CPU; and the description.

    Raises:
        ExportedFileError: It is no exported network, holds no description, or cannot be run here.
        ImportError: onnxruntime is needed and not installed.
        ValueError: A device that is not there.
        OSError: It cannot be read.
    """
    kind = format_of(path)
    if kind == "onnx":
        require(["onnxruntime"])
    target = usable_device(device)
    opened, description = _OPENERS[kind](path, target)
    if kind == "onnx":
        return opened, description

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return opened(x.to(target)).cpu()

    return run, description


def _open_onnx(path: Path, device: torch.device) -> tuple[Network, Description]:
    import onnxruntime

    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device.type)
    if provider not in onnxruntime.get_available_providers():
        raise ExportedFileError(f"{path}: the onnxruntime that is installed does not compute on {device}")
    options = [{"device_id": str(device.index or 0)}] if device.type == "cuda" else None
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=[provider], provider_options=options)
    except OSError:
        raise
    except Exception as error:  # onnxruntime's errors have no public base
        raise ExportedFileError(f"{path} cannot be run by onnxruntime: {_line(error)}") from error
    description = _described(path, session.get_modelmeta().custom_metadata_map.get(METADATA))
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    return run, description


def _open_torch_export(path: Path, device: torch.device) -> tuple[Network, Description]:
    description = _described(path, _entry(path, f"extra/{EXTRA_FILE}"))
    from torch.export.passes import move_to_device_pass

    try:
        program = torch.export.load(path)
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise ExportedFileError(f"{path} cannot be loaded by torch.export: {_line(error)}") from error
    module = program.module() if device.type == "cpu" else move_to_device_pass(program, device).module()
    return module, description


def _open_torchscript(path: Path, device: torch.device) -> tuple[Network, Description]:
    description = _described(path, _entry(path, f"extra/{EXTRA_FILE}"))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            module = torch.jit.load(path, map_location=device)
    except (RuntimeError, ValueError) as error:
        raise ExportedFileError(f"{path} cannot be loaded by torch.jit: {_line(error)}") from error
    return module, description


def _open_aot_inductor(path: Path, device: torch.device) -> tuple[Network, Description]:
    metadata = json.loads(_entry(path, ".wrapper_metadata.json") or b"{}")
    description = _described(path, metadata.get(METADATA))
    compiled_for = metadata.get("AOTI_DEVICE_KEY", "cpu")
    if compiled_for != device.type:
        raise ExportedFileError(f"{path} was compiled for {compiled_for} and does not run on {device}")
    try:
        return torch._inductor.aoti_load_package(str(path), device_index=device.index or -1), description
    except RuntimeError as error:
        raise ExportedFileError(f"{path} cannot be run on this machine: {_line(error)}") from error


_OPENERS: dict[str, Callable[[Path, torch.device], tuple[Network, Description]]] = {
    "onnx": _open_onnx,
    "torch-export": _open_torch_export,
    "torchscript": _open_torchscript,
    "aot-inductor": _open_aot_inductor,
}


def _entry(path: Path, ending: str) -> bytes | None:
    """The first entry of an archive whose name ends so."""
    with zipfile.ZipFile(path) as archive:
        try:
            return next((archive.read(name) for name in archive.namelist() if name.endswith(ending)), None)
        except (zipfile.BadZipFile, RuntimeError) as error:
            raise ExportedFileError(f"{path} is damaged: {error}") from error


def _described(path: Path, text: str | bytes | None) -> Description:
    if text is None:
        raise ExportedFileError(f"{path} holds no description of its input and classes: it was not exported from here")
    try:
        return Description.from_json(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ExportedFileError(f"{path}: its description cannot be used: {error}") from error


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__

"""Networks as files that run without this package: ONNX, torch.export, TorchScript, AOTInductor.

What is exported is the merged network in PyTorch's own convolutions. The fast convolutions here choose by the size of
their input and cut kernels that are larger than the map; a padded convolution with the whole kernel is exact at any
size, and every runtime has it. A file is checked against the network before it takes its name.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smpconv_zoo.baselines import SineConv1d
from smpconv_zoo.description import Description, load_described
from smpconv_zoo.environment import usable_device
from smpconv_zoo.exported import EXTRA_FILE, FORMATS, METADATA, open_exported, require
from smpconv_zoo.files import sha256_of_file, whole_file
from smpconv_zoo.layers import CausalConv1d, MergedConv1d, MergedConv2d, SMPConv1d, SMPConv2d

__all__ = ["TOLERANCE", "Check", "ExportError", "Exported", "export_model", "export_network", "plain_network"]

# Largest difference from the network's logits, over the largest logit: float32 rounding of another runtime, in other
# orders of summation, of weights into which the norms were multiplied.
TOLERANCE = 1e-4

# Since 2022 in every runtime; nothing newer is needed.
OPSET = 18

Progress = Callable[[int, int], None]


class ExportError(ValueError):
    """A network cannot be exported, or the file did not give its answers."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: the shape of the input, and ``max |file - network| / max |network|`` of the logits."""

    shape: tuple[int, ...]
    error: float


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written. ``dynamic`` names the axes of the input whose size is free."""

    path: str
    format: str
    bytes: int
    sha256: str
    dynamic: tuple[str, ...]
    checks: tuple[Check, ...]
    description: Description


def export_network(
    name: str,
    out: str | os.PathLike[str],
    format: str,
    *,
    untrained: bool = False,
    arguments: dict[str, Any] | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a network by its name as a file that runs without this package.

    Args:
        name: A checkpoint as ``network.tag``, ``hf-hub:ORG/NAME`` or ``local-dir:PATH``; with ``untrained`` a network.
        out: The file to write; its suffix is that of the format.
        format: ``"onnx"``, ``"torch-export"``, ``"torchscript"`` or ``"aot-inductor"``.
        untrained: Take random weights.
        arguments: Arguments of the network, where they differ from the entrypoint's or the card's.
        device: For AOTInductor, what to compile for; every other format runs anywhere.
        overwrite: Whether ``out`` may exist.
        progress: Called with the steps done and in all.

    Raises:
        ExportError: The file did not give the network's answers; nothing is left under its name.
        ValueError: No such network, checkpoint, format or device, or another suffix than the format's.
        FileExistsError: ``out`` exists.
        ImportError: A package that the format needs is not installed.
        CheckpointError: The weights are not at hand, or not those declared.
        OSError: The file cannot be written, or the format needs a compiler that is not there.
    """
    _refuse_early(Path(out), format, device, overwrite)
    model, description = load_described(name, untrained, arguments)
    return export_model(model, description, out, format, device=device, overwrite=overwrite, progress=progress)


def export_model(
    model: nn.Module,
    description: Description,
    out: str | os.PathLike[str],
    format: str,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """:func:`export_network` for a network that is at hand, which stays as it is.

    Args:
        model: The network.
        description: What it is, see :func:`smpconv_zoo.description.describe`; it goes into the file.
        out: See :func:`export_network`.
        format: See :func:`export_network`.
        device: See :func:`export_network`.
        overwrite: See :func:`export_network`.
        progress: See :func:`export_network`.
    """
    out = Path(out)
    _refuse_early(out, format, device, overwrite)
    target = torch.device(device)
    eager = copy.deepcopy(model).float().eval()
    size = description.preprocessing.input_size
    smallest = _smallest(eager)
    other = (size[0], *(max(smallest, length * part // 8) for length, part in zip(size[1:], (6, 7), strict=False)))
    with whole_file(out) as aside, torch.no_grad(), _full_precision(target):
        _step(progress, 0)
        example = _random((2, *size), seed=0).to(target)
        dynamic = _WRITERS[format](plain_network(eager).to(target), example, smallest, description.to_json(), aside)
        _step(progress, 1)
        # Read back from the disk, as whoever gets it will.
        run, read_back = open_exported(aside, device)
        if read_back != description:
            raise ExportError(f"{out} was not written: the description that was read back is another one")
        eager.to(target)
        shapes = [(1, *size), (3, *(other if len(dynamic) > 1 else size))]
        checks = []
        for i, shape in enumerate(shapes):
            checks.append(_check(eager, run, _random(shape, seed=1 + i), target))
            _step(progress, 2 + i)
        worst = max(checks, key=lambda check: check.error if check.error == check.error else float("inf"))
        if not worst.error <= TOLERANCE:
            raise ExportError(
                f"{out} was not written: on an input of shape {worst.shape} the file's logits differ from the "
                f"network's by {worst.error:.1e} of the largest, {TOLERANCE:.0e} are allowed"
            )
        sha256, length = sha256_of_file(aside), aside.stat().st_size
    return Exported(str(out), format, length, sha256, dynamic, tuple(checks), description)


def plain_network(model: nn.Module) -> nn.Module:
    """A merged copy of a network of this package, in PyTorch's own convolutions with padding.

    Its answers are those of ``model`` up to rounding, at any size of the input. Nothing in it is an operator of this
    package.
    """
    plain: Any = copy.deepcopy(model).eval()
    plain.reparameterize()
    for module in list(plain.modules()):
        for name, child in module.named_children():
            replacement = _plain(child)
            if replacement is not None:
                setattr(module, name, replacement)
    return plain.requires_grad_(False)


def _plain(module: nn.Module) -> nn.Module | None:
    """PyTorch's own convolution in place of one of this package; None for any other module."""
    if isinstance(
        module, SMPConv1d | SMPConv2d | SineConv1d
    ):  # beside a norm of another kind than those that can be folded
        module = module.fuse()
    if isinstance(module, MergedConv2d):
        return _plain_2d(module.weight, module.bias, module.weight.size(0) if module.depthwise else 1)
    if isinstance(module, MergedConv1d | CausalConv1d):
        return _plain_1d(module.weight, module.bias)
    return None


def _plain_2d(kernel: Tensor, bias: Tensor | None, groups: int) -> nn.Module:
    out_channels, in_per_group, *size = kernel.shape
    conv = nn.Conv2d(
        in_per_group * groups,
        out_channels,
        (size[0], size[1]),
        padding=(size[0] // 2, size[1] // 2),
        groups=groups,
        bias=bias is not None,
    )
    return _with_weights(conv, kernel, bias)


def _plain_1d(kernel: Tensor, bias: Tensor | None) -> nn.Module:
    conv = nn.Conv1d(kernel.size(1), kernel.size(0), kernel.size(2), bias=bias is not None)
    return nn.Sequential(nn.ConstantPad1d((kernel.size(2) - 1, 0), 0.0), _with_weights(conv, kernel, bias))


def _with_weights(conv: nn.Conv1d | nn.Conv2d, kernel: Tensor, bias: Tensor | None) -> nn.Module:
    conv = conv.requires_grad_(False).to(kernel.device, kernel.dtype).eval()
    conv.weight.copy_(kernel)
    if conv.bias is not None and bias is not None:
        conv.bias.copy_(bias)
    return conv


# ----------------------------------------------------------------------- one writer a format, which gives the free axes


def _write_onnx(model: nn.Module, example: Tensor, smallest: int, description: str, path: Path) -> tuple[str, ...]:
    program, dynamic = _trace(model, example, smallest)
    converted: Any = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=["input"],
        output_names=["logits"],
        verbose=False,
    )
    graph = converted.model.graph
    names = {str(size): axis for size, axis in zip(_free_sizes(graph.inputs[0]), dynamic, strict=True)}
    for node in graph:
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # files of this machine
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        for i, size in enumerate(value.shape or ()):
            if not isinstance(size, int):
                value.shape[i] = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(size))
    converted.model.metadata_props[METADATA] = description
    converted.save(path)
    return dynamic


def _free_sizes(value: Any) -> list[Any]:
    return [size for size in value.shape if not isinstance(size, int)]


def _write_torch_export(
    model: nn.Module, example: Tensor, smallest: int, description: str, path: Path
) -> tuple[str, ...]:
    program, dynamic = _trace(model, example, smallest)
    torch.export.save(program, path, extra_files={EXTRA_FILE: description})
    return dynamic


def _write_torchscript(
    model: nn.Module, example: Tensor, smallest: int, description: str, path: Path
) -> tuple[str, ...]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        torch.jit.save(torch.jit.script(model), path, _extra_files={EXTRA_FILE: description})
    return _axes(example)


def _write_aot_inductor(
    model: nn.Module, example: Tensor, smallest: int, description: str, path: Path
) -> tuple[str, ...]:
    from torch._inductor.exc import CppCompileError, InductorError

    program, dynamic = _trace(model, example, smallest)
    metadata = {"aot_inductor.metadata": {METADATA: description}}
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=metadata)
    except (CppCompileError, InductorError) as error:
        raise ExportError(
            f"aot-inductor could not compile the network: {' '.join(str(error).split())[:300]}"
        ) from error
    return dynamic


_WRITERS: dict[str, Callable[[nn.Module, Tensor, int, str, Path], tuple[str, ...]]] = {
    "onnx": _write_onnx,
    "torch-export": _write_torch_export,
    "torchscript": _write_torchscript,
    "aot-inductor": _write_aot_inductor,
}


def _axes(x: Tensor) -> tuple[str, ...]:
    return ("batch", "height", "width") if x.dim() == 4 else ("batch", "length")


def _smallest(model: Any) -> int:
    """Smallest height and width, or length, that a traced graph is for.

    A size of 1 is special to tracing (it may be broadcast), wherever in the network it comes up: no map may have it.
    """
    reduction = int(model.feature_info[-1]["reduction"])
    return reduction + 1 if reduction > 1 else 1


def _trace(model: nn.Module, example: Tensor, smallest: int) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """The network's graph, and its free axes: all of them, or the batch alone where the input is too small."""
    axes = _axes(example) if min(example.shape[2:]) >= smallest else ("batch",)
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    free |= {2 + i: torch.export.Dim(axis, min=smallest) for i, axis in enumerate(axes[1:])}
    program = torch.export.export(model, (example,), dynamic_shapes=(free,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # files of this machine
    own = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("smpconv_zoo.")}
    if own:
        raise ExportError(f"the network still calls operators of this package: {', '.join(sorted(own))}")
    return program, axes


# ------------------------------------------------------------------------------------------------------------- checks


def _refuse_early(out: Path, format: str, device: str, overwrite: bool) -> None:
    """Whatever can be known to fail before a network is loaded."""
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if out.suffix != FORMATS[format]:
        raise ValueError(f"a file of format {format} has to end in {FORMATS[format]}, got {out}")
    if device != "cpu" and format != "aot-inductor":
        raise ValueError(f"a file of format {format} runs on any device: there is none to choose, got {device!r}")
    usable_device(device)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is no folder: make it first")
    if os.path.lexists(out) and not overwrite:
        raise FileExistsError(f"{out} exists and was left as it is; pass --force (overwrite=True) to replace it")
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder")
    if format == "onnx":
        require(["onnx", "onnxscript", "onnxruntime"])
    if format == "aot-inductor" and not any(map(shutil.which, _compilers())):
        raise ExportError(f"aot-inductor needs a C++ compiler, and {' and '.join(_compilers())} is not there: set CXX")


def _compilers() -> list[str]:
    """The C++ compilers that AOTInductor asks, from CXX or its default."""
    from torch._inductor import config

    return [name for name in config.cpp.cxx if name]


def _random(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def _check(eager: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, device: torch.device) -> Check:
    expected, found = eager(x.to(device)).cpu().double(), run(x).double()
    if found.shape != expected.shape:
        raise ExportError(f"the file gives {tuple(found.shape)} for {tuple(x.shape)}, not {tuple(expected.shape)}")
    scale = expected.abs().max().item()
    error = (found - expected).abs().max().item()
    return Check(tuple(x.shape), error / scale if scale else error)


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Convolutions on a GPU in float32: by default cuDNN rounds their inputs to 10 bits, and no check would tell."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _step(progress: Progress | None, done: int) -> None:
    if progress is not None:
        progress(done, 3)

"""What size of input a network is for: at which grid its kernels are read off when it is built, and later."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from smpconv_zoo.layers import SMPConv1d, SMPConv2d
from smpconv_zoo.resolution import image_size, resample_

__all__ = ["input_at", "maker", "per_stage", "set_image_size", "set_sampling", "size_arguments"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def size_arguments(model_cls: type[nn.Module]) -> tuple[str, ...]:
    """The arguments by which an entrypoint is asked for another input than the network's own."""
    return ("length", "sample_rate") if "conv_bias" in inspect.signature(model_cls).parameters else ("img_size",)


def input_at(
    cfg: dict[str, Any], img_size: Any = None, length: Any = None, sample_rate: Any = None
) -> tuple[tuple[float, ...], dict[str, Any]]:
    """New samples for one of those that timm's ``cfg`` is of, along each axis, and the entries of it that change.

    Raises:
        ValueError: A size or rate that is none, or two that say the same.
    """
    channels, height, width = cfg["input_size"]
    if img_size is not None:
        rows, columns = image_size(img_size)
        entries: dict[str, Any] = {"input_size": (channels, rows, columns)}
        if cfg.get("pool_size") is not None:
            # A map is as large as the image over the stride, rounded up.
            strides = [round(size / pool) for size, pool in zip((height, width), cfg["pool_size"], strict=True)]
            pools = [math.ceil(size / max(1, stride)) for size, stride in zip((rows, columns), strides, strict=True)]
            entries["pool_size"] = tuple(pools)
        return (rows / height, columns / width), entries
    if length is not None and sample_rate is not None:
        raise ValueError(f"give length or sample_rate, not both; got {length!r} and {sample_rate!r}")
    if length is not None:
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ValueError(f"length must be a positive integer, got {length!r}")
        return (length / width,), {"input_size": (channels, 1, length)}
    rate = _check_rate(sample_rate)
    return (rate,), {"input_size": (channels, 1, max(1, round(width * rate)))}


def _check_rate(rate: Any) -> float:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"sample_rate must be a positive number, the new rate over the training's, got {rate!r}")
    return float(rate)


def maker(
    model_cls: type[ModelT], ratio: tuple[float, ...] | None = None, weights: dict[str, Tensor] | None = None
) -> Callable[..., ModelT]:
    """What builds a network in the place of its class, for ``weights`` to be loaded into.

    Where the arguments ask for kernels of other sizes than the weights have, the network is built as the weights are,
    so that their points fit, and read off by so many taps from -1 to +1. Weights whose small kernels are not those of
    the arguments were read off at another grid themselves; what they were before is what the arguments say.

    Args:
        model_cls: The network.
        ratio: New samples for one of the network's own; see :func:`smpconv_zoo.resolution.resample_`.
        weights: A state dict, under our names.
    """
    if ratio is None and weights is None:
        return model_cls

    def make(**arguments: Any) -> ModelT:
        argument = _kernel_argument(model_cls)
        asked, stored = _asked_kernels(model_cls, arguments), _other_kernels(model_cls, arguments, weights or {})
        if stored is None:
            model = model_cls(**arguments)
        else:
            model = model_cls(**{**arguments, argument: stored if argument == "kernel_sizes" else stored[0]})
            stages: Any = model.stages if argument == "kernel_sizes" else [model]
            for stage, old, new in zip(stages, stored, asked, strict=True):
                _read_off_by(stage, old, new)
        if ratio is not None:
            resample_(model, ratio)
            if len(ratio) == 1:
                model.sample_rate = ratio[0]  # type: ignore[assignment]
        return model

    return make


def _kernel_argument(model_cls: type[nn.Module]) -> str:
    return "kernel_sizes" if "kernel_sizes" in inspect.signature(model_cls).parameters else "kernel_size"


def _argument(model_cls: type[nn.Module], arguments: dict[str, Any], name: str) -> Any:
    return arguments.get(name, inspect.signature(model_cls).parameters[name].default)


def _asked_kernels(model_cls: type[nn.Module], arguments: dict[str, Any]) -> tuple[int, ...]:
    """Size of the continuous kernels of each stage, or of the one stage that there is."""
    name = _kernel_argument(model_cls)
    sizes = _argument(model_cls, arguments, name)
    return per_stage(name, sizes, len(_argument(model_cls, arguments, "dims"))) if name == "kernel_sizes" else (sizes,)


def _other_kernels(
    model_cls: type[nn.Module], arguments: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[int, ...] | None:
    """Kernel sizes of weights whose network was built with other ones than the arguments say; None if it was not."""
    taps: dict[int, int] = {}
    for name, grid in weights.items():
        found = re.fullmatch(r"(?:stages\.(\d+)\.)?.*\bgrid", name)
        if found is None or grid.dim() < 2:
            continue
        stage = int(found[1] or 0)
        if stage in taps:
            continue
        taps[stage] = grid.size(-1)
        coords, small = (
            weights.get(f"{name[:-4]}coords"),
            weights.get(name.replace("large.conv.grid", "small.conv.weight")),
        )
        if small is None or small.size(-1) != _argument(model_cls, arguments, "small_kernel_size"):
            return None
        if "points_divisor" in inspect.signature(model_cls).parameters:
            points = grid[0].numel() // _argument(model_cls, arguments, "points_divisor")
            if coords is None or coords.size(-2) != points:
                return None
    asked = _asked_kernels(model_cls, arguments)
    stored = tuple(taps[stage] for stage in sorted(taps))
    return stored if len(stored) == len(asked) and stored != asked else None


def _read_off_by(stage: nn.Module, old: int, new: int) -> None:
    """The kernels of a stage, from -1 to +1, by ``new`` taps along each axis instead of ``old``."""
    layers = {name: layer for name, layer in stage.named_modules() if isinstance(layer, SMPConv1d | SMPConv2d)}
    axes = {len(layer.kernel_size) for layer in layers.values()}
    resample_(stage, ((new - 1) / (old - 1),) * axes.pop(), dict.fromkeys(layers, new))


def set_image_size(model: nn.Module, img_size: Any) -> None:
    """Read off the kernels of an image network for images of another size; ``pretrained_cfg`` follows."""
    cfg = _own_cfg(model)
    ratio, entries = input_at(cfg, img_size=img_size)
    resample_(model, ratio)
    cfg.update(entries)


def set_sampling(model: Any, length: Any = None, sample_rate: Any = None) -> None:
    """Read off the kernels of a sequence network for another length, or at another rate; ``pretrained_cfg`` follows."""
    if length is not None:
        cfg = _own_cfg(model)
        (ratio,), entries = input_at(cfg, length=length)
        rate = model.sample_rate * ratio
    else:
        rate = _check_rate(sample_rate)
        ratio = rate / model.sample_rate
        cfg = getattr(model, "pretrained_cfg", None) or {}
        entries = input_at(cfg, sample_rate=ratio)[1] if cfg else {}
    resample_(model, (ratio,))
    model.sample_rate = rate
    cfg.update(entries)


def _own_cfg(model: Any) -> dict[str, Any]:
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if not cfg:
        raise ValueError(
            f"this {type(model).__name__} was not made by timm.create_model, and nothing says what size its kernels "
            "are for; smpconv_zoo.resolution.resample_ takes the ratio of the two sizes instead"
        )
    return cfg


def per_stage(name: str, values: int | Sequence[int], stages: int) -> tuple[int, ...]:
    """One value for each stage, from one for all or a list of the right length."""
    values = (values,) * stages if isinstance(values, int) else tuple(values)
    if len(values) != stages:
        raise ValueError(f"{name} has {len(values)} entries for {stages} stages: {values}")
    return values

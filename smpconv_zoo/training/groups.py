"""Parameter groups for the optimizer, by role and, for fine-tuning, by depth.

Points are not ordinary weights: decay would pull their positions to the centre and shrink their radii, and radii move a
tenth as fast. A layer says which of its parameters are positions and radii; nothing is read out of names. How deep a
parameter lies says the network's ``group_matcher``, timm's interface for that.
"""

from __future__ import annotations

from typing import Any

from timm.models import group_parameters
from torch import nn

from smpconv_zoo.layers import parameter_roles

__all__ = ["RADIUS_RATE", "image_parameter_groups", "layer_factors", "sequence_parameter_groups"]

RADIUS_RATE = 0.1


def image_parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Groups of the authors' ImageNet recipe, in the order of their optimizer.

    Weights (``decay``) come first, then norms and biases (``no_decay``), positions (``coords``) and radii (``radius``).
    With a layer decay there are as many for every layer, the first layer's in front.

    Args:
        model: An image network; frozen parameters are left out.
        weight_decay: Of the ``decay`` group; zero elsewhere.
        layer_decay: See :func:`layer_factors`; None for the same rate in all layers.

    Returns:
        Dicts for a torch optimizer with ``name``, ``params``, ``weight_decay`` and ``lr_scale``, by which a schedule
        multiplies the rate.

    Raises:
        ValueError: See :func:`layer_factors`.
    """
    kinds = {kind: {"weight_decay": 0.0, "lr_scale": 1.0} for kind in ("decay", "no_decay", "coords", "radius")}
    kinds["decay"]["weight_decay"] = weight_decay
    kinds["radius"]["lr_scale"] = RADIUS_RATE
    roles = parameter_roles(model)

    def kind_of(name: str, parameter: nn.Parameter) -> str:
        return roles.get(name) or ("no_decay" if parameter.dim() <= 1 else "decay")

    named = {name: (kind_of(name, parameter), parameter) for name, parameter in model.named_parameters()}
    return [group for group in _groups(model, named, kinds, layer_decay) if group["params"]]


def sequence_parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Groups of the authors' sequence recipes, in the order of their optimizer: others, no_decay, radius.

    Args:
        model: A network; frozen parameters are left out.
        lr: Base rate; radii get a tenth of it.
        weight_decay: Of the ``others`` group; zero elsewhere.
        layer_decay: See :func:`layer_factors`; None for the same rate in all layers. With it, groups without
            parameters are left out.

    Returns:
        Dicts for a torch optimizer with ``name``, ``params``, ``lr``, ``weight_decay`` and ``lr_scale``.

    Raises:
        ValueError: See :func:`layer_factors`.
    """
    kinds = {kind: {"weight_decay": 0.0, "lr_scale": 1.0} for kind in ("others", "no_decay", "radius")}
    kinds["others"]["weight_decay"] = weight_decay
    kinds["radius"]["lr_scale"] = RADIUS_RATE
    roles = parameter_roles(model)

    def kind_of(name: str, parameter: nn.Parameter) -> str:
        role = roles.get(name)
        return "radius" if role == "radius" else "no_decay" if role or parameter.dim() <= 1 else "others"

    named = {name: (kind_of(name, parameter), parameter) for name, parameter in model.named_parameters()}
    groups = _groups(model, named, kinds, layer_decay)
    return [{**group, "lr": lr * group["lr_scale"]} for group in groups if group["params"] or layer_decay is None]


def layer_factors(model: nn.Module, layer_decay: float) -> dict[str, tuple[int, float]]:
    """Which layer every parameter belongs to, from 0, and the factor of its rate.

    The head has the factor 1, each layer below it ``layer_decay`` times that of the one above. What a layer is, the
    network's ``group_matcher`` says: of an image network the stem and every block, the step down to a stage with its
    first block and the last norm with the last block; of a sequence network every block.

    Args:
        model: A network with timm's ``group_matcher``.
        layer_decay: In (0, 1].

    Raises:
        ValueError: A decay out of range, or a network that does not say what its layers are.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}")
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is None:
        raise ValueError(f"{type(model).__name__} has no group_matcher that says what its layers are: no layer_decay")
    layers: dict[str, int] = group_parameters(model, matcher(coarse=False), reverse=True)
    top = max(layers.values())
    return {name: (layer, layer_decay ** (top - layer)) for name, layer in layers.items()}


def _groups(
    model: nn.Module,
    named: dict[str, tuple[str, nn.Parameter]],
    kinds: dict[str, dict[str, float]],
    layer_decay: float | None,
) -> list[dict[str, Any]]:
    """A group for every layer and kind, empty ones included, without what is frozen."""
    factors = {} if layer_decay is None else layer_factors(model, layer_decay)
    groups: dict[tuple[int, str], dict[str, Any]] = {}
    for layer, factor in sorted(set(factors.values())) or [(0, 1.0)]:
        for kind, settings in kinds.items():
            name = kind if layer_decay is None else f"layer {layer}, {kind}"
            scale = settings["lr_scale"] * factor
            groups[layer, kind] = {"name": name, "params": [], **settings, "lr_scale": scale}
    for name, (kind, parameter) in named.items():
        if parameter.requires_grad:
            groups[factors[name][0] if factors else 0, kind]["params"].append(parameter)
    return list(groups.values())

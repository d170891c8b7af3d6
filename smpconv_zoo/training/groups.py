"""Parameter groups for the optimizer, by role.

Points are not ordinary weights: decay would pull their positions to the centre and shrink their radii, and radii move a
tenth as fast. A layer says which of its parameters are positions and radii; nothing is read out of names.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from smpconv_zoo.layers import parameter_roles

__all__ = ["RADIUS_RATE", "image_parameter_groups", "sequence_parameter_groups"]

RADIUS_RATE = 0.1


def image_parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of the authors' ImageNet recipe, in the order of their optimizer.

    Norms and biases first (``no_decay``), then positions (``coords``), radii (``radius``) and the rest (``decay``) are
    told apart; groups stand in the order in which their first parameter appears.

    Args:
        model: An image network; frozen parameters are left out.
        weight_decay: Of the ``decay`` group; zero elsewhere.

    Returns:
        Dicts for a torch optimizer with ``name``, ``params``, ``weight_decay`` and ``lr_scale``, by which a schedule
        multiplies the rate.
    """
    groups: dict[str, dict[str, Any]] = {}
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = roles.get(name)
        kind = role or ("no_decay" if parameter.dim() <= 1 else "decay")
        decay = weight_decay if kind == "decay" else 0.0
        scale = RADIUS_RATE if kind == "radius" else 1.0
        group = groups.setdefault(kind, {"name": kind, "params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    order = ("decay", "no_decay", "coords", "radius")
    return [groups[kind] for kind in order if kind in groups]


def sequence_parameter_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of the authors' sequence recipes, in the order of their optimizer: others, no_decay, radius.

    Args:
        model: A network; frozen parameters are left out.
        lr: Base rate; radii get a tenth of it.
        weight_decay: Of the ``others`` group; zero elsewhere.

    Returns:
        Dicts for a torch optimizer with ``name``, ``params``, ``lr``, ``weight_decay`` and ``lr_scale``.
    """
    groups: dict[str, dict[str, Any]] = {
        "others": {"params": [], "lr": lr, "weight_decay": weight_decay, "lr_scale": 1.0},
        "no_decay": {"params": [], "lr": lr, "weight_decay": 0.0, "lr_scale": 1.0},
        "radius": {"params": [], "lr": lr * RADIUS_RATE, "weight_decay": 0.0, "lr_scale": RADIUS_RATE},
    }
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = roles.get(name)
        kind = "radius" if role == "radius" else "no_decay" if role or parameter.dim() <= 1 else "others"
        groups[kind]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items()]

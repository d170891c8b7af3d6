"""The reference's state dicts, gradients and module names under ours, for the equality tests.

Everything goes through the package's own `remap_reference_state_dict`: a second table of names here could hide a
mistake in the first.
"""

import json
from typing import Any

import torch
from golden_files import golden
from torch import Tensor, nn

from smpconv_zoo.pretrained.remap import remap_reference_state_dict


def stored_json(name: str) -> Any:
    return json.loads(golden(name).read_text())


def below(values: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def our_names(reference: dict[str, Tensor]) -> dict[str, str]:
    """Name of every entry of a whole reference state dict to ours; remapping keeps their order."""
    converted = remap_reference_state_dict(reference)
    assert len(converted) == len(reference), "two entries of the reference have become one"
    return dict(zip(reference, converted, strict=True))


def remap_without_grids(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients, masks or statistics, under our names and in our shapes.

    A state dict of the image network is known by its grids. These have none, so that a grid is lent to them.
    """
    image = any(".large_kernel." in name for name in tensors)
    lent = {"stages.0.blocks.0.large_kernel.smp.conv.kernel_coord": torch.zeros(1, 2, 3, 3)} if image else {}
    converted = remap_reference_state_dict({**tensors, **lent})
    return {name: tensor for name, tensor in converted.items() if not (lent and name.endswith(".grid"))}


def our_module(reference_module: str) -> str:
    """Name of our SMPConv layer for the name of the reference's."""
    if ".large_kernel.smp." in reference_module:
        (name,) = remap_reference_state_dict({f"{reference_module}.kernel_coord": torch.zeros(1, 2, 3, 3)})
        return name.removesuffix(".grid")
    (name,) = remap_reference_state_dict({f"{reference_module}.Kernel.weight_coord": torch.zeros(1)})
    return name.removesuffix(".coords")


def group_names(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Names of the parameters in each group of an optimizer."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[parameter] for parameter in group["params"]] for group in groups}


def outputs_of(model: nn.Module, modules: list[str], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of the network, and of each of the named modules, without gradients."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: kept.__setitem__(name, output)

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in modules]
    try:
        with torch.no_grad():
            return model(x), kept
    finally:
        for hook in hooks:
            hook.remove()

"""From the names of the authors' state dicts to ours: a pure function, one to one on every tensor that is kept.

What changes besides names: points lose axes of size one, the tap grid is stored in the orientation of the kernel
(:func:`smpconv_zoo.points.tap_grid`) instead of being turned after rendering, the ResNet's 1x1 output convolution
becomes a linear layer, and the sequence networks' ``train_length`` becomes the grid it stands for.
"""

from __future__ import annotations

import re

from torch import Tensor

from smpconv_zoo.points import tap_grid
from smpconv_zoo.pretrained.errors import CheckpointError

__all__ = ["remap_reference_state_dict"]

# Taps of the longest kernel that a checkpoint may ask for; the authors' longest has 16,000.
MOST_TAPS = 1 << 22

# Leaf names of an SMPConv layer: the reference's, ours.
_POINTS = {"weight_coord": "coords", "radius": "radius", "weights": "weight", "kernel_coord": "grid"}


def remap_reference_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of the authors' networks; one that is ours already comes back unchanged.

    Args:
        state_dict: Weights of SMPConvNet, SeqData_TCN or Img_ResNet, or of our networks.

    Returns:
        The same tensors under our names. A name of neither kind is kept, for the check against the network to refuse.

    Raises:
        CheckpointError: A tensor that has not the axes that its name promises, or two names that become one.
    """
    if any(name.endswith(".coords") for name in state_dict):
        return state_dict
    image = any(name.endswith(".kernel_coord") for name in state_dict)
    out: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        try:
            ours, converted = _image_entry(name, tensor) if image else _sequence_entry(name, state_dict)
        except (ValueError, LookupError, RuntimeError, OverflowError) as error:
            raise CheckpointError(
                f"{name} of shape {tuple(tensor.shape)} is not what its name says: {error}"
            ) from error
        if ours in out:
            raise CheckpointError(f"{name} and another tensor would both become {ours}")
        out[ours] = converted
    return out


def _image_entry(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    return _image_name(name), _image_tensor(name, tensor)


def _sequence_entry(name: str, state_dict: dict[str, Tensor]) -> tuple[str, Tensor]:
    tensor = state_dict[name]
    if not name.endswith(".train_length"):
        return _sequence_name(name), _sequence_tensor(name, tensor)
    kernel = name.removesuffix("train_length") + "Kernel."
    length = int(tensor.reshape(-1)[0])
    return _sequence_name(kernel + "kernel_coord"), _sequence_grid(length, state_dict[kernel + "weight_coord"])


def _image_name(name: str) -> str:
    name = re.sub(r"^transitions\.(\d+)\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", name)
    name = re.sub(r"^head\.", "head.fc.", name)
    match = re.match(r"^(stages\.\d+\.blocks)\.(\d+)\.(.*)$", name)
    if match is None:
        return name
    prefix, index, rest = match[1], int(match[2]), match[3]
    half = "spatial" if index % 2 == 0 else "channel"
    rest = re.sub(r"^(prelkb_bn|preffn_bn)\.", "norm.", rest)
    rest = re.sub(r"^large_kernel\.(smp|small_conv)\.", lambda m: f"conv_dw.{_pair(m[1])}.", rest)
    rest = re.sub(r"^(conv_dw\.\w+)\.bn\.", r"\1.norm.", rest)
    stem, _, leaf = rest.rpartition(".")
    return f"{prefix}.{index // 2}.{half}.{stem}.{_POINTS.get(leaf, leaf)}"


def _pair(branch: str) -> str:
    return "large" if branch == "smp" else "small"


def _image_tensor(name: str, tensor: Tensor) -> Tensor:
    leaf = name.rpartition(".")[2]
    if leaf == "weight_coord":
        return tensor.squeeze(0)
    if leaf == "radius":
        return tensor.reshape(-1)
    if leaf == "weights":
        return tensor.transpose(0, 1).contiguous()
    if leaf == "kernel_coord":
        # Stored (1, 2, rows, columns) with coordinate 0 along the rows; the reference transposes the kernel and flips
        # its rows. Doing the same to the grid, once, leaves nothing to do at every rendering.
        return tensor.squeeze(0).transpose(1, 2).flip(1).contiguous()
    return tensor


def _sequence_name(name: str) -> str:
    name = re.sub(r"^backbone\.", "blocks.", name)
    name = re.sub(r"^(finallyr|out_layer)\.", "head.fc.", name)
    name = re.sub(r"\bshortcut\.0\.", "shortcut.", name)
    match = re.match(r"^((?:blocks\.\d+\.)?)(cconv|norm)([12])(s?)\.(.*)$", name)
    if match is None:
        return name
    block, kind, index, small, rest = match.groups()
    prefix = f"{block}conv{index}" if block else "stem.0"
    stem, _, leaf = rest.removeprefix("Kernel.").rpartition(".")
    leaf = _POINTS.get(leaf, leaf)
    return f"{prefix}.{'small' if small else 'large'}.{'conv' if kind == 'cconv' else 'norm'}.{stem}{leaf}"


def _sequence_tensor(name: str, tensor: Tensor) -> Tensor:
    if name.endswith(".Kernel.radius"):
        return tensor.flatten(1)
    if name == "out_layer.weight":
        return tensor.flatten(1)
    return tensor


def _sequence_grid(length: int, coords: Tensor) -> Tensor:
    if length < 2:
        # The reference stores 0 until its first forward. No network has such a grid: the check of shapes refuses it.
        return coords.new_zeros((coords.size(-1),) + (max(length, 0),) * coords.size(-1))
    if length ** coords.size(-1) > MOST_TAPS:
        raise ValueError(f"a grid of {length} taps in each of {coords.size(-1)} directions")
    return tap_grid((length,) * coords.size(-1), dtype=coords.dtype)

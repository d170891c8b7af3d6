"""Parameter groups by role and depth, the clip of the radii as a hook, and what happens where it is forgotten."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import Lookahead, create_optimizer_v2
from torch import Tensor, nn

from smpconv_zoo import SMPConv1d, SMPConv2d, attach_radius_clip, clip_radius_
from smpconv_zoo.kernels import render_kernel
from smpconv_zoo.layers import parameter_roles
from smpconv_zoo.points import tap_grid, tents
from smpconv_zoo.training.groups import (
    RADIUS_RATE,
    image_parameter_groups,
    layer_factors,
    sequence_parameter_groups,
)

SMALL: dict[str, dict[str, Any]] = {
    "test_smpconv": {},
    "test_smpconv_tcn": {},
    "smpconv_resnet_mnist": {"kernel_size": 9, "dims": (4, 6)},
}
INPUTS = {"test_smpconv": (4, 3, 32, 32), "test_smpconv_tcn": (4, 1, 20), "smpconv_resnet_mnist": (4, 1, 9, 9)}


def small(name: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **SMALL[name])


def example(name: str) -> Tensor:
    return torch.randn(*INPUTS[name], generator=torch.Generator().manual_seed(1))


def groups_of(model: nn.Module, name: str, layer_decay: float | None = None) -> list[dict[str, Any]]:
    if name == "test_smpconv_tcn":
        return sequence_parameter_groups(model, 0.02, 0.05, layer_decay)
    return image_parameter_groups(model, 0.05, layer_decay)


def settings_of(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name of every parameter to its group; each is in one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(parameter)], group) for group in groups for parameter in group["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


# --- layers


def test_layers_of_an_image_network() -> None:
    layers = {name: layer for name, (layer, _) in layer_factors(small("test_smpconv"), 0.5).items()}
    by_layer = [sorted({".".join(n.split(".")[:4]) for n, at in layers.items() if at == i}) for i in range(7)]
    assert max(layers.values()) == 6
    assert {name.split(".")[0] for name in by_layer[0]} == {"stem"}
    assert by_layer[1] == ["stages.0.blocks.0"]
    # The step down to a stage goes with its first block, and the last norm with the last block.
    assert by_layer[2] == ["stages.1.blocks.0", "stages.1.downsample.0", "stages.1.downsample.1"]
    assert by_layer[4] == ["stages.2.blocks.1"]
    assert {"norm.weight", "norm.bias", "stages.3.blocks.0"} <= set(by_layer[5])
    assert by_layer[6] == ["head.fc.bias", "head.fc.weight"]


@pytest.mark.parametrize(("name", "stem"), [("test_smpconv_tcn", False), ("smpconv_resnet_mnist", True)])
def test_layers_of_a_network_of_blocks(name: str, stem: bool) -> None:
    layers = {key: layer for key, (layer, _) in layer_factors(small(name), 0.5).items()}
    assert {key for key, layer in layers.items() if layer == 0} == {
        key for key in layers if key.startswith("stem" if stem else "blocks.0.")
    }
    assert {key for key, layer in layers.items() if layer == 1 + stem} == {
        key for key in layers if key.startswith("blocks.1.")
    }
    assert {key for key, layer in layers.items() if layer == 2 + stem} == {"head.fc.weight", "head.fc.bias"}


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns_at_the_rate_of_its_role_and_layer(name: str) -> None:
    model = small(name)
    layers, roles = layer_factors(model, 0.5), parameter_roles(model)
    found = settings_of(model, groups_of(model, name, 0.5))
    assert found.keys() == layers.keys() == dict(model.named_parameters()).keys()
    top = max(layer for layer, _ in layers.values())
    for key, group in found.items():
        layer, factor = layers[key]
        assert factor == 0.5 ** (top - layer)
        radius, decays = roles.get(key) == "radius", key not in roles and model.get_parameter(key).dim() > 1
        assert group["lr_scale"] == pytest.approx(factor * (RADIUS_RATE if radius else 1), rel=1e-12), key
        assert group["weight_decay"] == (0.05 if decays else 0), key
        assert group["name"].startswith(f"layer {layer}, ")
        assert "lr" not in group or group["lr"] == pytest.approx(0.02 * group["lr_scale"], rel=1e-12)
    assert found["head.fc.weight"]["lr_scale"] == 1


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("name", SMALL)
def test_what_is_frozen_is_left_out_and_changes_no_other_rate(name: str, layer_decay: float | None) -> None:
    model = small(name)
    before = {key: group["lr_scale"] for key, group in settings_of(model, groups_of(model, name, layer_decay)).items()}
    frozen = [key for key, _ in model.named_parameters() if "head" in key or "conv1" in key or "stem" in key]
    for key in frozen:
        model.get_parameter(key).requires_grad_(False)
    after = {key: group["lr_scale"] for key, group in settings_of(model, groups_of(model, name, layer_decay)).items()}
    assert after == {key: scale for key, scale in before.items() if key not in frozen}


@pytest.mark.parametrize("name", SMALL)
def test_a_layer_decay_of_one_changes_no_step(name: str) -> None:
    results = []
    for layer_decay in (None, 1.0):
        model = small(name)
        groups = [{**group, "lr": 0.01 * group["lr_scale"]} for group in groups_of(model, name, layer_decay)]
        optimizer = torch.optim.AdamW(groups)
        F.cross_entropy(model(example(name)), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        results.append(model.state_dict())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_layers_have_to_be_known() -> None:
    with pytest.raises(ValueError, match="Linear has no group_matcher"):
        image_parameter_groups(nn.Linear(2, 2), 0.05, 0.5)
    with pytest.raises(ValueError, match=r"layer_decay must be in \(0, 1\], got 1.5"):
        layer_factors(small("test_smpconv_tcn"), 1.5)


@pytest.mark.parametrize("name", SMALL)
def test_timm_makes_the_same_layers_and_decays_the_same(name: str) -> None:
    # Other than here, timm's script moves radii as fast as the rest.
    model = small(name)
    optimizer = create_optimizer_v2(model, "adamw", lr=0.02, weight_decay=0.05, layer_decay=0.5)
    theirs, ours = settings_of(model, optimizer.param_groups), settings_of(model, groups_of(model, name, 0.5))
    roles = parameter_roles(model)
    for key in theirs:
        share = RADIUS_RATE if roles.get(key) == "radius" else 1
        assert ours[key]["lr_scale"] == pytest.approx(theirs[key]["lr_scale"] * share, rel=1e-12)
        assert ours[key]["weight_decay"] == theirs[key]["weight_decay"]


# --- the clip as a hook


def out_of_bounds(model: nn.Module) -> float:
    """How far radii are from their bounds."""
    layers = [module for module in model.modules() if isinstance(module, SMPConv1d | SMPConv2d)]
    assert layers
    radii = [(layer.radius.detach(), *layer.radius_bounds) for layer in layers]
    return max(max(float((low - radius).max()), float((radius - high).max())) for radius, low, high in radii)


def train(model: nn.Module, optimizer: Any, x: Tensor, steps: int) -> list[float]:
    labels = torch.arange(len(x))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), key
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "lookahead_adamw"])
def test_the_hook_clips_after_every_step(name: str, optimizer: str) -> None:
    model, x = small(name), example(name)
    twin = copy.deepcopy(model)
    made = create_optimizer_v2(model, optimizer, lr=0.5)
    handle = attach_radius_clip(made, model)
    by_hand = create_optimizer_v2(twin, optimizer, lr=0.5)
    for step in range(4):
        train(model, made, x, 1)
        train(twin, by_hand, x, 1)
        if step == 0:
            assert out_of_bounds(twin) > 0, "nothing to clip"
        clip_radius_(twin)
        assert out_of_bounds(model) <= 0
        if not isinstance(made, Lookahead):
            torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    handle.remove()
    train(model, made, x, 8)
    assert out_of_bounds(model) > 0


def test_the_hook_finds_the_layers_in_what_wraps_a_network() -> None:
    model = small("test_smpconv_tcn")
    wrapped = nn.DataParallel(nn.Sequential(model))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=3.0)
    attach_radius_clip(optimizer, wrapped)
    train(model, optimizer, example("test_smpconv_tcn"), 2)
    assert out_of_bounds(model) <= 0


# --- where the clip is forgotten


@pytest.mark.parametrize("name", SMALL)
def test_a_forgotten_clip_is_harmless(name: str) -> None:
    model, x = small(name), example(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = train(model, optimizer, x, 60)
    radii = torch.cat([module.radius.flatten() for module in model.modules() if hasattr(module, "radius_bounds")])
    assert (radii <= 0).any(), "no radius was driven below zero"
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    with torch.no_grad():
        assert torch.isfinite(model.eval()(x)).all()


@pytest.mark.parametrize("normalization", ["sum", "count"])
@pytest.mark.parametrize("renderer", ["dense", "scatter"])
@pytest.mark.parametrize("size", [(9,), (5, 7)])
@pytest.mark.parametrize("radius", [0.0, -0.0, -0.3, 1e-13, 1e-30, 1e-45, -1e-45, -math.inf])
def test_a_point_without_radius_touches_nothing(
    radius: float, size: tuple[int, ...], renderer: str, normalization: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    grid = tap_grid(size)
    coords = torch.rand(2, 4, len(size), generator=generator) * 2 - 1
    # On a tap, where the tent of a narrow point would be highest.
    coords[:, 0] = grid.flatten(1)[:, 2]
    radii, weight = torch.full((2, 4), 0.7), torch.randn(2, 3, 4, generator=generator)
    radii[:, 0] = radius
    leaves = [tensor.clone().requires_grad_() for tensor in (coords, radii, weight)]
    kernel = render_kernel(*leaves, grid, normalization, renderer)
    without = render_kernel(coords[:, 1:], radii[:, 1:], weight[..., 1:], grid, normalization, renderer)
    torch.testing.assert_close(kernel, without)
    upstream = torch.randn(kernel.shape, generator=generator)
    to_coords, to_radius, to_weight = torch.autograd.grad(kernel, leaves, upstream)
    assert not to_coords[:, 0].any() and not to_radius[:, 0].any() and not to_weight[..., 0].any()
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in (to_coords, to_radius, to_weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_narrow_point_has_a_steep_but_finite_slope(dtype: torch.dtype) -> None:
    grid = tap_grid((9,), dtype=dtype)
    coords = torch.zeros(1, 1, dtype=dtype, requires_grad=True)
    radius = torch.full((1,), 1e-11, dtype=dtype, requires_grad=True)
    tent = tents(coords, radius, grid)
    assert tent.tolist() == [[0, 0, 0, 0, 1, 0, 0, 0, 0]]
    tent.square().sum().backward()
    assert coords.grad is not None and radius.grad is not None
    assert torch.isfinite(coords.grad).all() and torch.isfinite(radius.grad).all()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("radius", [0.0, -0.2])
def test_layers_with_points_without_radius_in_every_mode(radius: float) -> None:
    layers: list[tuple[Any, Tensor]] = [
        (SMPConv1d(2, 3, 12, n_points=4), torch.randn(2, 2, 12)),
        (SMPConv2d(3, 3, 7, groups=3, n_points=5), torch.randn(2, 3, 9, 9)),
        (SMPConv2d(3, 2, 5, n_points=5), torch.randn(2, 3, 9, 9)),
    ]
    for layer, x in layers:
        with torch.no_grad():
            layer.radius[..., ::2] = radius
        y = layer(x)
        assert torch.isfinite(y).all() and y.any()
        torch.testing.assert_close(torch.jit.script(layer)(x), y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.fuse()(x), y, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            layer.radius.fill_(radius)
        y = layer(x)
        assert not y.any()
        y.sum().backward()
        assert all(not parameter.grad.any() for parameter in layer.parameters() if parameter.grad is not None)

"""Kernels that SMPConv is compared with: of an MLP, and a value for every tap, in the same network."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from tolerances import relative_error
from torch import Tensor, nn

from smpconv_zoo.baselines import SineConv1d
from smpconv_zoo.evaluation.complexity import count_macs
from smpconv_zoo.layers import CausalConv1d, SMPConv1d
from smpconv_zoo.streaming import CausalStream
from smpconv_zoo.training.groups import sequence_parameter_groups

# Sums of a few hundred float32 products in another order.
ROUNDING = 2e-6


def network(kernel: str, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    chosen = {"in_chans": 2, "num_classes": 3, "kernel_size": 24, "dims": (5, 6), "n_points": 4, **arguments}
    return timm.create_model("smpconv_tcn", kernel=kernel, **chosen)


def trained(kernel: str, **arguments: object) -> nn.Module:
    """With statistics that are not those of the start."""
    model = network(kernel, **arguments).train()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        model(torch.randn(6, 2, 24, generator=generator))
    return model.eval()


def signal(length: int) -> Tensor:
    return torch.randn(4, 2, length, generator=torch.Generator().manual_seed(2))


def test_the_kernel_is_the_mlp_at_every_position() -> None:
    torch.manual_seed(0)
    layer = SineConv1d(2, 3, 5, hidden=4, omega=7.0).double()
    kernel = layer.kernel()
    assert kernel.shape == (3, 2, 5)
    for tap, position in enumerate([-1.0, -0.5, 0.0, 0.5, 1.0]):
        weights, biases = layer.first.weight.detach()[:, 0].tolist(), layer.first.bias.detach().tolist()
        first = [math.sin(7 * (w * position + b)) for w, b in zip(weights, biases, strict=True)]
        hidden = torch.tensor(first, dtype=torch.double)
        second = torch.sin(7 * (layer.second.weight @ hidden + layer.second.bias))
        values = (layer.last.weight @ second + layer.last.bias).view(3, 2)
        torch.testing.assert_close(kernel[:, :, tap], values)


@pytest.mark.parametrize("length", [1, 3, 5, 12])
def test_the_last_tap_meets_the_current_sample(length: int) -> None:
    torch.manual_seed(0)
    layer = SineConv1d(2, 3, 5)
    nn.init.normal_(layer.bias)
    x = signal(length)
    expected = F.conv1d(F.pad(x, (4, 0)), layer.kernel(), layer.bias)
    assert relative_error(layer(x), expected) < ROUNDING
    assert relative_error(layer.fuse()(x), expected) < ROUNDING


def test_first_kernels_have_the_spread_of_their_channels_and_waves_of_omega() -> None:
    torch.manual_seed(0)
    slow, fast = (SineConv1d(16, 16, 400, omega=omega).kernel().detach() for omega in (2.0, 40.0))
    assert float(slow.diff().abs().mean() / slow.abs().mean()) < 0.05
    assert float(fast.diff().abs().mean() / fast.abs().mean()) > 0.1


@pytest.mark.parametrize("kernel", ["fixed", "mlp"])
def test_every_parameter_learns(kernel: str) -> None:
    model = network(kernel).train()
    F.cross_entropy(model(signal(24)), torch.tensor([0, 1, 2, 0])).backward()
    # The last bias of an MLP shifts a kernel; a bias before a batch norm alone has no say.
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    groups = {group["name"]: group["params"] for group in sequence_parameter_groups(model, 1e-3, 1e-5)}
    assert not groups["radius"] and groups["others"]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


@pytest.mark.parametrize("kernel", ["fixed", "mlp"])
@pytest.mark.parametrize("pool", ["last", "avg"])
def test_merged_scripted_and_streamed_they_answer_the_same(kernel: str, pool: str) -> None:
    model = trained(kernel, global_pool=pool)
    x = signal(40)
    y = model(x)
    merged = copy.deepcopy(model).reparameterize()
    assert not [m for m in merged.modules() if isinstance(m, SineConv1d | CausalConv1d | nn.BatchNorm1d)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(copy.deepcopy(model))
    for other in (merged, scripted):
        assert relative_error(other(x), y) < ROUNDING
        assert relative_error(other(x[:, :, :7]), model(x[:, :, :7])) < ROUNDING
    for streamed in (model, merged):
        stream = CausalStream(streamed)
        for piece in x.split([13, 1, 26], dim=2):
            answer = stream(piece)
        assert relative_error(answer, y) < ROUNDING


def test_what_the_kernels_cost() -> None:
    sizes = {"in_chans": 1, "num_classes": 10, "kernel_size": 784, "dims": (30,) * 6, "n_points": 30}
    parameters = {kernel: sum(p.numel() for p in network(kernel, **sizes).parameters()) for kernel in ("points", "mlp")}
    assert parameters["mlp"] == pytest.approx(parameters["points"], rel=0.06)
    # 32 taps have as many values as 30 points have values, positions and radii.
    short = sum(p.numel() for p in network("fixed", **{**sizes, "kernel_size": 32}).parameters())
    assert short == pytest.approx(parameters["points"], rel=0.01)
    counts = {kernel: count_macs(network(kernel), (1, 2, 24)) for kernel in ("points", "fixed", "mlp")}
    assert len({count["total"] for count in counts.values()}) == 1
    assert counts["fixed"]["rendering"] == 0
    layers = ((2, 5), (5, 5), (5, 6), (6, 6))
    assert counts["mlp"]["rendering"] == sum(24 * (32 + 32 * 32 + 32 * i * o) for i, o in layers)


def test_points_are_what_they_were_and_other_names_are_refused() -> None:
    torch.manual_seed(0)
    named = network("points")
    torch.manual_seed(0)
    plain = timm.create_model("smpconv_tcn", in_chans=2, num_classes=3, kernel_size=24, dims=(5, 6), n_points=4)
    for (name, a), (other, b) in zip(named.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    assert any(isinstance(m, SMPConv1d) for m in named.modules())
    with pytest.raises(ValueError, match=r"kernel must be one of \('points', 'fixed', 'mlp'\), got 'dense'"):
        network("dense")
    with pytest.raises(ValueError, match="no SMPConv1d layers to read off at another grid"):
        network("mlp", length=48)
    for wrong in ({"kernel_size": 0}, {"omega": 0.0}, {"hidden": 0}):
        with pytest.raises(ValueError, match="at least 1 and omega positive"):
            SineConv1d(**{"in_channels": 1, "out_channels": 1, "kernel_size": 3, **wrong})

"""Merging for inference: the answers stay, the parts go, and what PyTorch and timm do with networks still works."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from test_models import FACTS, IMAGES, KINDS, NETWORKS, SCRIPT_IS_DEPRECATED, SEQUENCES, example, small
from timm.utils import reparameterize_model
from timm.utils.model import freeze_batch_norm_2d
from tolerances import assert_equal_to_reference
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import smpconv_zoo
from smpconv_zoo.layers import (
    ActivatedPair,
    CausalConv1d,
    ConvNorm,
    ConvNormAct,
    LargeSmallConv,
    MergedConv1d,
    MergedConv2d,
    SMPConv1d,
    SMPConv2d,
    clip_radius_,
    parameter_roles,
)
from smpconv_zoo.merged import ChannelAffine, fold_conv2d

POINTS = SMPConv1d | SMPConv2d


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def randomized(module: Any, seed: int = 0) -> Any:
    """Everything that folding touches away from its first value, with factors of both signs; in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return std * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(like.shape, generator=generator, dtype=torch.float64)).to(like)

    for part in module.modules():
        if isinstance(part, POINTS):
            part.coords.copy_(
                uniform(part.coords, -1, 1) if part.coords.size(-1) == 2 else 1 - normal(part.coords, 0.1).abs()
            )
            part.radius.copy_(part.radius * uniform(part.radius, 0.5, 2.5))
            # As large as keeps the output as large as the input, whatever the size.
            part.weight.copy_(normal(part.weight, 3 * part.kernel()[0].numel() ** -0.5))
            if part.bias is not None:
                part.bias.copy_(normal(part.bias, 0.3))
        elif isinstance(part, _BatchNorm):
            part.running_mean.copy_(normal(part.running_mean, 0.5))
            part.running_var.copy_(uniform(part.running_var, 0.3, 3))
            part.weight.copy_(normal(part.weight, 1))
            part.bias.copy_(normal(part.bias, 0.5))
        elif isinstance(part, nn.Conv1d | nn.Conv2d | nn.Linear):
            part.weight.copy_(normal(part.weight, part.weight[0].numel() ** -0.5))
            if part.bias is not None:
                part.bias.copy_(normal(part.bias, 0.3))
    return module.eval()


@torch.no_grad()
def check(module: Any, *inputs: Tensor) -> Any:
    """The merged module answers as the module did, in single and in double precision; returns the merged one."""
    for dtype, kind in ((torch.float32, "merged"), (torch.float64, "merged, float64")):
        ours = copy.deepcopy(module).to(dtype)
        merged = reparameterize_model(nn.Sequential(ours))[0]
        for x in inputs:
            assert_equal_to_reference(merged(x.to(dtype)), ours(x.to(dtype)), kind, str(tuple(x.shape)))
    return reparameterize_model(nn.Sequential(module))[0]


def kinds_of(model: nn.Module) -> set[type[nn.Module]]:
    return {type(part) for part in model.modules()}


# --- the answers stay


@pytest.mark.parametrize("name", NETWORKS)
def test_every_entrypoint_answers_as_before(name: str) -> None:
    """At its full size, on a small input."""
    torch.manual_seed(0)
    model = randomized(timm.create_model(name))
    x = torch.randn(1, FACTS[name][0], *((65, 32) if name in IMAGES else (300,)))
    with torch.no_grad():
        before = model(x)
        assert model.reparameterize() is model
        assert_equal_to_reference(model(x), before, "merged", name)
    assert not [
        part for part in model.modules() if isinstance(part, _BatchNorm | POINTS | LargeSmallConv | ActivatedPair)
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_of_every_size(name: str) -> None:
    model = randomized(small(name))
    sizes: list[tuple[int, ...]] = [(37, 50), (5, 9), (1, 1)] if name in IMAGES else [(50,), (7,), (1,), (133,)]
    inputs = [example(name), *(example(name, batch=3, size=size) for size in sizes)]
    if name in IMAGES:
        inputs.append(inputs[1].to(memory_format=torch.channels_last))
    check(model, *inputs)


@pytest.mark.parametrize("name", KINDS)
def test_features_and_other_poolings(name: str) -> None:
    model, x = randomized(small(name)), example(name)
    merged = reparameterize_model(model)
    pools = ["max", "avg"] if name in SEQUENCES else ["max", "catavgmax", "avg"]
    with torch.no_grad():
        assert_equal_to_reference(merged.forward_features(x), model.forward_features(x), "merged")
        for ours, before in zip(
            merged.forward_intermediates(x, norm=True)[1], model.forward_intermediates(x, norm=True)[1], strict=True
        ):
            assert_equal_to_reference(ours, before, "merged")
        for pool in pools:
            for network in (merged, model):
                torch.manual_seed(0)
                network.reset_classifier(7, pool)
            assert merged.get_classifier().out_features == 7 and not merged.training
            assert_equal_to_reference(merged(x), model(x), "merged", pool)
    assert merged.get_classifier().weight.requires_grad


@pytest.mark.parametrize("name", KINDS)
def test_features_only(name: str) -> None:
    backbone: Any = randomized(small(name, features_only=True, out_indices=(0, 1)))
    merged, x = reparameterize_model(backbone), example(name)
    with torch.no_grad():
        for ours, before in zip(merged(x), backbone(x), strict=True):
            assert_equal_to_reference(ours, before, "merged")
    assert not [part for part in merged.modules() if isinstance(part, _BatchNorm | POINTS)]


def test_the_shipped_checkpoint() -> None:
    model = timm.create_model("smpconv_tcn_mnist", pretrained=True).eval()
    x = torch.randn(4, 1, 784, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x)
        assert_equal_to_reference(model.reparameterize()(x), before, "merged")


def pair(large: nn.Module, small: nn.Module, out: int = 4) -> LargeSmallConv:
    norm = nn.BatchNorm1d if isinstance(large, SMPConv1d) else nn.BatchNorm2d
    return randomized(LargeSmallConv(ConvNorm(large, norm(out)), ConvNorm(small, norm(out))))


@pytest.mark.parametrize(
    ("module", "shape", "kind"),
    [
        (pair(SMPConv2d(4, 4, 7, groups=4), nn.Conv2d(4, 4, 5, padding=2, groups=4)), (4, 9, 6), MergedConv2d),
        (pair(SMPConv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 5, padding=2, groups=4)), (4, 9, 6), MergedConv2d),
        (
            pair(SMPConv2d(4, 4, (3, 9), groups=4), nn.Conv2d(4, 4, (7, 1), padding=(3, 0), groups=4)),
            (4, 9, 6),
            MergedConv2d,
        ),
        (pair(SMPConv2d(3, 4, 7, bias=True), nn.Conv2d(3, 4, 3, padding=1)), (3, 9, 6), MergedConv2d),
        (pair(SMPConv1d(3, 4, 20, bias=True), CausalConv1d(3, 4, 5)), (3, 30), MergedConv1d),
        (pair(SMPConv1d(3, 4, 4), CausalConv1d(3, 4, 9, bias=False)), (3, 30), MergedConv1d),
        (randomized(SMPConv2d(4, 4, 7, groups=4, bias=True)), (4, 9, 6), MergedConv2d),
        (randomized(SMPConv2d(4, 5, 7)), (4, 9, 6), MergedConv2d),
        (randomized(SMPConv1d(4, 5, 7)), (4, 9), MergedConv1d),
        (randomized(ConvNorm(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))), (4, 9, 6), MergedConv2d),
    ],
)
def test_layers(module: nn.Module, shape: tuple[int, ...], kind: type[nn.Module]) -> None:
    assert type(check(module, torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))) is kind


def test_small_kernels_meet_the_centre_and_the_newest_taps() -> None:
    images = pair(SMPConv2d(4, 4, 7, groups=4), nn.Conv2d(4, 4, 3, padding=1, groups=4))
    sequences = pair(SMPConv1d(3, 4, 20), CausalConv1d(3, 4, 5))
    for module in (images, sequences):
        nn.init.zeros_(module.large.conv.weight)
        norm: Any = module.small.norm
        with torch.no_grad():
            norm.running_var.fill_(1 - norm.eps)
            norm.weight.fill_(1)
    assert torch.equal(images.fuse().weight, F.pad(images.small.conv.weight, (2, 2, 2, 2)))
    sequences.large.conv.coords.data.fill_(-1)  # the oldest tap, so that none is left out
    assert torch.equal(sequences.fuse().weight, F.pad(sequences.small.conv.weight, (15, 0)))


def test_old_taps_that_no_point_touches_are_left_out() -> None:
    module = pair(SMPConv1d(3, 4, 5000), CausalConv1d(3, 4, 5))
    module.large.conv.coords.data.fill_(0.9)
    merged: Any = check(module, torch.randn(2, 3, 600, generator=torch.Generator().manual_seed(0)))
    assert merged.weight.size(2) == module.large.conv.reach() < 260


def test_a_norm_in_front_of_padding_stays() -> None:
    norm, conv = randomized(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3, padding=1)
    assert fold_conv2d(conv, norm, None) is None
    wide = ConvNormAct(4, 6, 3, padding=1)
    assert wide.absorb(norm) is norm and type(wide.bn) is nn.ReLU
    x = torch.randn(2, 4, 7, 7)
    for plain in (
        nn.Conv2d(4, 6, 3, groups=2, stride=2),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Conv2d(4, 6, 3, padding="valid"),
    ):
        folded = fold_conv2d(plain, norm, None)
        assert folded is not None
        torch.testing.assert_close(folded(x), plain(norm(x)), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_folded_stays() -> None:
    x = torch.randn(2, 4, 9, 6, generator=torch.Generator().manual_seed(0))
    module = pair(SMPConv2d(4, 4, 7, groups=4), nn.Conv2d(4, 4, 5, padding=2, groups=4))
    module.small.norm = nn.GroupNorm(2, 4)
    merged: Any = check(module, x)
    assert type(merged.large) is MergedConv2d and type(merged.small.norm) is nn.GroupNorm
    module.large.norm = nn.BatchNorm2d(4, track_running_stats=False)
    assert type(check(module, x).large.conv) is MergedConv2d
    dilated = pair(SMPConv2d(4, 4, 7, groups=4), nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4))
    assert type(check(dilated, x)) is LargeSmallConv

    model = randomized(small("smpconv_t"))
    model.stages[0].blocks[0].channel.norm = nn.GroupNorm(1, 8)
    model.stages[1].blocks[0].spatial.pw1.bn = nn.BatchNorm2d(12, track_running_stats=False)
    model.norm = nn.GroupNorm(1, 20)
    merged = check(model, example("smpconv_t"))
    assert type(merged.stages[0].blocks[0].channel.norm) is nn.GroupNorm and type(merged.norm) is nn.GroupNorm
    assert type(merged.stages[1].blocks[0].spatial.norm) is nn.BatchNorm2d


def test_activated_pairs_of_which_one_norm_stays() -> None:
    model = randomized(small("smpconv_resnet"))
    model.blocks[0].conv1.small.norm = nn.GroupNorm(2, 6)
    merged = check(model, example("smpconv_resnet"))
    assert type(merged.blocks[0].conv1) is ActivatedPair


@pytest.mark.parametrize("convert", [freeze_batch_norm_2d, timm.layers.convert_sync_batchnorm])
def test_norms_of_other_kinds_are_folded(convert: Any) -> None:
    model, x = randomized(small("smpconv_t")), example("smpconv_t")
    with torch.no_grad():
        before = model(x)
        merged = convert(model).eval().reparameterize()
        assert_equal_to_reference(merged(x), before, "merged")
    assert not [name for name, _ in merged.named_buffers() if "running" in name and not name.startswith("norm.")]


def test_layers_in_another_network() -> None:
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=10, depths=(1, 1, 1, 1)).eval()
    for stage in model.stages:
        for block in stage.blocks:
            dim = block.conv_dw.in_channels
            block.conv_dw = randomized(smpconv_zoo.SMPConv2d(dim, dim, 13, groups=dim, bias=True))
    merged, x = reparameterize_model(model), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_equal_to_reference(merged(x), model(x), "merged")
    assert MergedConv2d in kinds_of(merged) and SMPConv2d not in kinds_of(merged)
    with pytest.raises(RuntimeError, match="MergedConv2d has been merged for inference"):
        merged.train()


# --- what merging is


@pytest.mark.parametrize("name", KINDS)
def test_in_place_and_on_a_copy(name: str) -> None:
    model, x = randomized(small(name)), example(name)
    before = copy.deepcopy(model.state_dict())
    merged = reparameterize_model(model)
    assert merged is not model and {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in before.items()
    }
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and model.train().training and not merged.training
    inplace = copy.deepcopy(model).eval()
    assert reparameterize_model(inplace, inplace=True) is inplace
    own = model.eval().reparameterize()
    assert own is model
    for other in (inplace, own):
        assert list(other.state_dict()) == list(merged.state_dict())
        assert torch.equal(other(x), merged(x))


@pytest.mark.parametrize("name", KINDS)
def test_merging_again_does_nothing(name: str) -> None:
    merged = randomized(small(name)).reparameterize()
    parts = dict(merged.named_modules())
    parameters = dict(merged.named_parameters())
    assert merged.reparameterize() is merged and reparameterize_model(merged, inplace=True) is merged
    assert {key: id(value) for key, value in merged.named_modules()} == {key: id(value) for key, value in parts.items()}
    assert all(value is parameters[key] for key, value in merged.named_parameters())


@pytest.mark.parametrize("name", KINDS)
def test_a_network_in_training_mode(name: str) -> None:
    """Running statistics, no dropout, no drop path."""
    model = randomized(small(name, drop_rate=0.5, drop_path_rate=0.5))
    x = example(name)
    with torch.no_grad():
        expected = model(x)
        through_timm = reparameterize_model(model.train())
        assert_equal_to_reference(through_timm(x), expected, "merged")
        model.reparameterize()
        assert not [key for key, part in model.named_modules() if part.training]
        assert_equal_to_reference(model(x), expected, "merged")


@pytest.mark.parametrize("name", KINDS)
def test_it_cannot_be_trained_any_more(name: str) -> None:
    merged = small(name).reparameterize()
    sentence = f"^{type(merged).__name__} has been merged for inference; create the network anew to train it$"
    for train in (merged.train, lambda: merged.train(True)):
        with pytest.raises(RuntimeError, match=sentence):
            train()
    assert not [key for key, part in merged.named_modules() if part.training]
    assert merged.eval() is merged and merged.train(False) is merged
    with pytest.raises(RuntimeError, match="merged for inference"):
        nn.Sequential(merged).train()
    assert parameter_roles(merged) == {} and merged.no_weight_decay() == set()
    clip_radius_(merged)
    assert [key for key, p in merged.named_parameters() if p.requires_grad] == ["head.fc.weight", "head.fc.bias"]


def test_no_random_numbers_are_drawn() -> None:
    model = small("smpconv_t")
    state = torch.random.get_rng_state()
    model.reparameterize()
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_network_without_numbers() -> None:
    for name in KINDS:
        merged: Any = timm.create_model(name, device=torch.device("meta")).reparameterize()
        assert merged(torch.zeros(2, FACTS[name][0], *FACTS[name][1], device="meta")).shape == (2, FACTS[name][2])


# --- what PyTorch and timm do with networks


@pytest.mark.parametrize("name", KINDS)
def test_copies_and_files(name: str) -> None:
    merged, x = randomized(small(name)).reparameterize(), example(name)
    y = merged(x)
    for twin in (copy.deepcopy(merged), pickle.loads(pickle.dumps(merged))):
        assert torch.equal(twin(x), y)
        with pytest.raises(RuntimeError, match="merged for inference"):
            twin.train()
    file = io.BytesIO()
    torch.save(merged.state_dict(), file)
    file.seek(0)
    # Other points, which reach back over other numbers of taps.
    other = randomized(small(name), seed=1).reparameterize()
    assert not torch.equal(other(x), y)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(x), y)
    assert not [p for key, p in other.named_parameters() if p.requires_grad and not key.startswith("head")]
    with pytest.raises(RuntimeError, match="Missing key"):
        small(name).load_state_dict(merged.state_dict())


@pytest.mark.parametrize("name", KINDS)
def test_precision(name: str) -> None:
    merged, x = small(name).reparameterize(), example(name)
    y = merged(x).detach()
    assert copy.deepcopy(merged).double()(x.double()).dtype == torch.float64
    half = copy.deepcopy(merged).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = merged(x)
    direct = small(name).bfloat16().reparameterize()
    assert {p.dtype for p in direct.parameters()} == {torch.bfloat16}
    for rounded in (half, mixed):
        torch.testing.assert_close(rounded.float(), y, rtol=0, atol=0.1 * float(y.abs().max()))


def test_gradients_to_the_input_stay() -> None:
    for name in KINDS:
        model, x = randomized(small(name)).double(), example(name).double().requires_grad_()
        (before,) = torch.autograd.grad(model(x).square().sum(), x)
        (after,) = torch.autograd.grad(model.reparameterize()(x).square().sum(), x)
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9 * float(before.abs().max()))


@pytest.mark.filterwarnings(SCRIPT_IS_DEPRECATED)
@pytest.mark.parametrize("name", KINDS)
def test_script(name: str) -> None:
    merged = randomized(small(name)).reparameterize()
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(merged), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for x in (example(name, batch=3), example(name, size=(37, 70) if name in IMAGES else (33,))):
        torch.testing.assert_close(loaded(x), merged(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_compile_and_export(name: str) -> None:
    torch.compiler.reset()
    merged, x = randomized(small(name)).reparameterize(), example(name)
    compiled = torch.compile(merged, fullgraph=True, backend="aot_eager")
    program = torch.export.export(merged, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), merged(x), rtol=1e-4, atol=1e-5)
        other = example(name, batch=5)
        torch.testing.assert_close(program.module()(other), merged(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_pruning_after_merging(name: str) -> None:
    model, x = randomized(small(name)), example(name)
    merged = reparameterize_model(model)
    for network in (model, merged):
        network.prune_intermediate_layers([1])
    with torch.no_grad():
        assert_equal_to_reference(merged.forward_features(x), model.forward_features(x), "merged")


@pytest.mark.parametrize("pool", ["last", "avg"])
def test_a_merged_network_is_streamed(pool: str) -> None:
    model = randomized(small("smpconv_tcn", global_pool=pool)).reparameterize()
    x = example("smpconv_tcn", size=(90,))
    stream = smpconv_zoo.CausalStream(model)
    for piece in x.split(17, dim=2):
        y = stream(piece)
    with torch.no_grad():
        assert_equal_to_reference(y, model(x), "streamed")
        # The stream has weights of its own.
        model.blocks[0].conv1.conv.weight.zero_()
        stream.reset()
        assert_equal_to_reference(stream(x), y, "streamed")


def test_what_merged_modules_say_of_themselves() -> None:
    text = repr(randomized(small("smpconv_t")).reparameterize())
    assert "MergedConv2d(8, 8, kernel_size=(15, 15), depthwise=True, bias=True)" in text
    assert "ChannelAffine(20)" in text
    assert ChannelAffine.__doc__

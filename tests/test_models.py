"""What timm and PyTorch ask of a network, asked of every entrypoint.

Full-size networks are built on the meta device, where they cost nothing; what computes runs on small builds of the same
entrypoints. tests/run_timm_suite.py runs timm's own tests of the image networks at full size.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import timm.data
import timm.optim
import torch
from timm.models import create_feature_extractor, group_parameters
from torch import Tensor, nn

import smpconv_zoo
from smpconv_zoo.checkpoints import network_names
from smpconv_zoo.layers import SMPConv1d, SMPConv2d, parameter_roles

PARAMETERS = {
    "smpconv_t": 26_705_248,
    "smpconv_b": 79_546_520,
    "smpconv_tcn_mnist": 370_960,
    "smpconv_tcn_cifar": 373_480,
    "smpconv_tcn_chartraj": 373_790,
    "smpconv_tcn_speech_mfcc": 391_840,
    "smpconv_tcn_speech_raw": 370_960,
    "smpconv_resnet_cifar": 489_646,
    "smpconv_resnet_mnist": 88_626,
}
# Entrypoint -> input channels, input size, classes, kernel sizes.
FACTS: dict[str, tuple[int, tuple[int, ...], int, tuple[int, ...]]] = {
    "smpconv_t": (3, (224, 224), 1000, (31, 29, 27, 13)),
    "smpconv_b": (3, (224, 224), 1000, (31, 29, 27, 13)),
    "smpconv_tcn": (1, (256,), 10, (256,)),
    "smpconv_tcn_mnist": (1, (784,), 10, (784,)),
    "smpconv_tcn_cifar": (3, (1024,), 10, (1024,)),
    "smpconv_tcn_chartraj": (3, (182,), 20, (182,)),
    "smpconv_tcn_speech_mfcc": (20, (161,), 10, (161,)),
    "smpconv_tcn_speech_raw": (1, (16000,), 10, (16000,)),
    "smpconv_resnet": (3, (32, 32), 10, (33,)),
    "smpconv_resnet_cifar": (3, (32, 32), 10, (33,)),
    "smpconv_resnet_mnist": (1, (28, 28), 10, (29,)),
    "test_smpconv": (3, (64, 64), 10, (13, 11, 9, 7)),
    "test_smpconv_tcn": (1, (32,), 10, (32,)),
}
NETWORKS = sorted(FACTS)
SEQUENCES = [name for name in NETWORKS if "tcn" in name]
IMAGES = [name for name in NETWORKS if "tcn" not in name]
STAGED = ["smpconv_b", "smpconv_t", "test_smpconv"]
# One of each family and kind of block, for what is slow and depends on nothing else.
KINDS = ["smpconv_t", "smpconv_resnet_cifar", "smpconv_tcn_mnist", "smpconv_tcn_speech_mfcc"]

FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
SCRIPT_IS_DEPRECATED = "ignore:.torch.jit.*deprecated"
NODES_DIFFER = "ignore:NOTE. The nodes obtained by tracing:UserWarning"  # torchvision's advice about its return nodes


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and on a busy machine threads that wait for each other cost tenfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_arguments(name: str) -> dict[str, Any]:
    if name in STAGED:
        return {"kernel_sizes": (15, 11, 9, 7), "depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20)}
    if name in IMAGES:
        return {"dims": (6, 6, 8), "kernel_size": 21, "n_points": 6}
    # The published radii are those of hundreds of taps: at 40, few points touch a tap and none touches two.
    return {"dims": (6, 6, 8), "kernel_size": 40, "n_points": 6, "init_radius": 0.12}


def small(name: str, **kwargs: Any) -> Any:
    """The entrypoint at a size that computes in milliseconds, in eval mode, with weights that let every branch show."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**small_arguments(name), **kwargs}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SMPConv1d | SMPConv2d):
                module.weight.copy_(0.3 * torch.randn(module.weight.shape, generator=generator))
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
                module.weight.copy_(1 + 0.1 * torch.randn(module.weight.shape, generator=generator))
    return model


def no_dropout(name: str) -> dict[str, float]:
    return {} if name in STAGED else {"block_drop_rate": 0.0}


def example(name: str, batch: int = 2, size: tuple[int, ...] | None = None, channels: int | None = None) -> Tensor:
    """Random input of a small build: 64 x 64 for the staged networks, 14 x 14 for the others, 50 samples."""
    if size is None:
        size = (64, 64) if name in STAGED else (14, 14) if name in IMAGES else (50,)
    channels = FACTS[name][0] if channels is None else channels
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(2))


def on_meta(name: str, **kwargs: Any) -> Any:
    return timm.create_model(name, device=torch.device("meta"), **kwargs)


def groups_of(name: str) -> str:
    return "stages" if name in STAGED else "blocks"


# --- what the entrypoints build


def test_every_entrypoint_is_listed() -> None:
    assert sorted(network_names()) == NETWORKS
    assert timm.list_models("smpconv*") == [name for name in NETWORKS if name.startswith("smpconv")]
    tagged = timm.list_models("smpconv*", include_tags=True)
    assert {"smpconv_t.in1k", "smpconv_tcn_mnist.smnist5k", "smpconv_tcn"} <= set(tagged)
    for name in NETWORKS:
        assert timm.is_model(name)
        entrypoint: Any = timm.model_entrypoint(name)
        assert entrypoint.__doc__


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    assert sum(p.numel() for p in on_meta(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_of_the_full_network(name: str) -> None:
    channels, size, classes, kernels = FACTS[name]
    model = on_meta(name).eval()
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert model.in_chans == channels and model.num_classes == classes
    large = [m.kernel_size[0] for m in model.modules() if isinstance(m, SMPConv1d | SMPConv2d)]
    assert tuple(dict.fromkeys(large)) == kernels
    x = torch.zeros(2, channels, *size, device="meta")
    assert model(x).shape == (2, classes)
    features = model.forward_features(x)
    assert features.shape[:2] == (2, model.num_features)
    if name in IMAGES:
        assert features.shape[2:] == model.pretrained_cfg["pool_size"]
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    intermediates = model.forward_intermediates(x, intermediates_only=True)
    for info, feature in zip(model.feature_info, intermediates, strict=True):
        assert feature.shape[1] == info["num_chs"]
        assert feature.shape[2:] == tuple(n // info["reduction"] for n in size)
        assert isinstance(model.get_submodule(info["module"]), nn.Module)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smpconv_t", "smpconv_tcn_mnist", "smpconv_resnet_cifar"])
def test_the_full_network_computes(name: str) -> None:
    channels, size, classes, _ = FACTS[name]
    model = timm.create_model(name).eval()
    with torch.inference_mode():
        y = model(torch.randn(1, channels, *size))
    assert y.shape == (1, classes) and torch.isfinite(y).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_unknown_arguments_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'kernel_sise'"):
        on_meta(name, kernel_sise=3)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_arguments_of_every_network_take_effect(name: str) -> None:
    x = example(name)
    assert small(name, num_classes=7)(x).shape == (2, 7)
    headless = small(name, num_classes=0)
    assert headless(x).shape == (2, headless.num_features) and headless.num_classes == 0
    unpooled = small(name, num_classes=0, global_pool="")
    assert torch.equal(unpooled(x), unpooled.forward_features(x))
    assert small(name, in_chans=5)(example(name, channels=5)).shape == (2, FACTS[name][2])
    largest = small(name, global_pool="max", num_classes=0)
    torch.testing.assert_close(largest(x), largest.forward_features(x).flatten(2).amax(2))
    mean = small(name, global_pool="avg", num_classes=0)
    torch.testing.assert_close(mean(x), mean.forward_features(x).flatten(2).mean(2))
    assert small(name, drop_rate=0.3).head.drop.p == 0.3
    rates = [m.drop_prob for m in small(name, drop_path_rate=0.4).modules() if isinstance(m, timm.layers.DropPath)]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.4) and len(set(rates)) > 1
    assert not [m for m in small(name, drop_path_rate=0.0).modules() if isinstance(m, timm.layers.DropPath)]


@pytest.mark.parametrize("name", STAGED)
def test_the_arguments_of_staged_networks_take_effect(name: str) -> None:
    changed = {"kernel_sizes": (9, 7, 5), "depths": (2, 1, 3), "dims": (4, 6, 10), "mlp_ratio": 2.0}
    model = small(name, **changed, points_divisor=3, small_kernel_size=3)
    assert [len(stage.blocks) for stage in model.stages] == [2, 1, 3]
    for stage, dim, size in zip(model.stages, changed["dims"], changed["kernel_sizes"], strict=True):
        block = stage.blocks[0]
        large = block.spatial.conv_dw.large.conv
        assert large.kernel_size == (size, size) and large.n_points == size * size // 3 and large.in_channels == dim
        assert block.spatial.conv_dw.small.conv.kernel_size == (3, 3)
        assert block.channel.pw1.conv.out_channels == 2 * dim
    assert model(example(name)).shape == (2, FACTS[name][2]) and model.num_features == 10
    one = small(name, kernel_sizes=5)
    assert {m.kernel_size for m in one.modules() if isinstance(m, SMPConv2d)} == {(5, 5)}


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in STAGED])
def test_the_arguments_of_block_networks_take_effect(name: str) -> None:
    model = small(
        name, kernel_size=9, dims=(4, 5), n_points=3, init_radius=0.7, small_kernel_size=3, block_drop_rate=0.2
    )
    large = [m for m in model.modules() if isinstance(m, SMPConv1d | SMPConv2d)]
    assert {m.kernel_size[0] for m in large} == {9} and {m.n_points for m in large} == {3}
    assert {m.init_radius for m in large} == {0.7}
    assert [block.conv1.drop.p for block in model.blocks] == [0.2, 0.2] and model.num_features == 5
    assert model.blocks[0].conv1.small.conv.kernel_size[0] == 3
    assert model(example(name)).shape == (2, FACTS[name][2])
    near, far = (small(name, coord_std=std).blocks[0].conv1.large.conv.coords for std in (0.01, 0.3))
    assert near.std() < far.std() / 5
    if name in SEQUENCES:
        assert small(name, conv_bias=True).blocks[0].conv1.large.conv.bias is not None
        assert small(name, conv_bias=False).blocks[0].conv1.large.conv.bias is None


@pytest.mark.parametrize("name", NETWORKS)
def test_a_seed_determines_a_network(name: str) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return timm.create_model(name, **small_arguments(name)).state_dict()

    first, again, other = weights(3), weights(3), weights(4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(("old", "new"), [("SMPConv_T", "smpconv_t"), ("SMPConv_B", "smpconv_b")])
def test_the_names_of_the_authors_still_work(old: str, new: str) -> None:
    with pytest.warns(UserWarning, match=f"{old}.*{new}"):
        model = on_meta(old)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[new]
    assert old not in timm.list_models("*SMPConv*")


@pytest.mark.parametrize("name", NETWORKS)
def test_default_cfg(name: str) -> None:
    channels, size, classes, _ = FACTS[name]
    cfg = on_meta(name).pretrained_cfg
    assert cfg["architecture"] == name
    assert cfg["num_classes"] == classes
    assert cfg["input_size"] == ((channels, *size) if name in IMAGES else (channels, 1, *size))
    assert len(cfg["mean"]) == len(cfg["std"]) == channels
    assert cfg["license"] == "mit" and cfg["paper_ids"] == "arXiv:2304.02330"
    assert cfg["origin_url"] == "https://github.com/sangnekim/SMPConv"
    state = on_meta(name).state_dict()
    first = (cfg["first_conv"],) if isinstance(cfg["first_conv"], str) else cfg["first_conv"]
    assert all(f"{module}.weight" in state for module in (*first, cfg["classifier"]))
    if name in IMAGES:
        grey = ((0.1307,), (0.3081,))
        imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert (cfg["mean"], cfg["std"]) == (grey if channels == 1 else imagenet)
        assert cfg["interpolation"] == "bicubic" and cfg["crop_pct"] == (0.875 if name in STAGED else 1.0)


@pytest.mark.parametrize("name", [name for name in IMAGES if FACTS[name][0] == 3])
def test_timm_prepares_images_for_it(name: str) -> None:
    config = timm.data.resolve_model_data_config(on_meta(name))
    assert config["input_size"] == (3, *FACTS[name][1])
    transform: Any = timm.data.create_transform(**config)
    picture: Any = pytest.importorskip("PIL.Image").new("RGB", (300, 200), "red")
    x = transform(picture)
    assert x.shape == (3, *FACTS[name][1])
    red = (1 - 0.485) / 0.229
    assert x[0].mean().item() == pytest.approx(red, rel=1e-3)


# --- what they compute


@pytest.mark.parametrize("name", NETWORKS)
def test_samples_of_a_batch_do_not_meet_in_eval_mode(name: str) -> None:
    model, x = small(name), example(name, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat([model(x[i : i + 1]) for i in range(3)]), **FLOAT32)
        assert model(x[:0]).shape == (0, FACTS[name][2])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_batch_of_one_trains(name: str) -> None:
    model = small(name, drop_path_rate=0.0).train()
    model(example(name, batch=1)).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_of_any_length(name: str) -> None:
    model = small(name)
    with torch.no_grad():
        for length in (1, 2, 3, 39, 40, 41, 97):
            y = model(example(name, size=(length,)))
            assert y.shape == (2, FACTS[name][2]) and torch.isfinite(y).all()
        # The read-out at the last step of a longer sequence is that of the shorter one with nothing before it.
        x = example(name, size=(97,))
        features = model.forward_features(x)
        torch.testing.assert_close(model.forward_features(x[..., :33]), features[..., :33], **FLOAT32)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("size", [(1, 1), (7, 33), (32, 32), (45, 29)])
def test_images_of_any_size(name: str, size: tuple[int, int]) -> None:
    model = small(name)
    with torch.no_grad():
        y, features = model(example(name, size=size)), model.forward_features(example(name, size=size))
    assert y.shape == (2, FACTS[name][2]) and torch.isfinite(y).all()
    reduction = model.feature_info[-1]["reduction"]
    assert features.shape[2:] == tuple(math.ceil(n / reduction) for n in size)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_parts_make_up_the_whole(name: str) -> None:
    model, x = small(name), example(name)
    with torch.no_grad():
        features = model.forward_features(x)
        y = model(x)
        assert torch.equal(model.forward_head(features), y)
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(model.get_classifier()(pooled), y)
        final, intermediates = model.forward_intermediates(x)
        assert torch.equal(final, features) and len(intermediates) == len(model.feature_info)
        last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
        assert len(last_two) == 2 and torch.equal(last_two[-1], intermediates[-1])
        early, (first,) = model.forward_intermediates(x, indices=[0], stop_early=True)
        assert torch.equal(first, intermediates[0]) and torch.equal(early, first)
        if name in STAGED:
            normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
            assert torch.equal(normed[-1], features) and torch.equal(normed[0], intermediates[0])
    with pytest.raises(ValueError, match=r"output_fmt must be '.*', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", NETWORKS)
def test_the_classifier_can_be_replaced(name: str) -> None:
    model, x = small(name).double(), example(name).double()
    assert model.get_classifier() is model.head.fc and model.get_classifier().out_features == FACTS[name][2]
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(3)
    assert model.num_classes == 3 and model(x).shape == (2, 3) and model(x).dtype == torch.float64
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), pooled)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert torch.equal(model(x), model.forward_features(x))
    model.reset_classifier(4, "max")
    assert model(x).shape == (2, 4) and not model.training and not model.head.training
    with pytest.raises(ValueError, match=r"num_classes must be 0 .* or more, got -1"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match="a classifier needs pooling"):
        model.reset_classifier(4, "")
    with pytest.raises(ValueError, match=r"global_pool must be one of .*, got 'median'"):
        model.reset_classifier(4, "median")
    assert model(x).shape == (2, 4) and model.num_classes == 4


@pytest.mark.parametrize("name", KINDS)
def test_layers_that_features_do_not_need_are_pruned(name: str) -> None:
    x = example(name)
    for index in range(len(small(name).feature_info)):
        model = small(name)
        expected = model.forward_intermediates(x, intermediates_only=True)[index]
        before = sum(p.numel() for p in model.parameters())
        assert model.prune_intermediate_layers([index]) == [index]
        assert sum(p.numel() for p in model.parameters()) < before
        assert torch.equal(model.forward_intermediates(x, intermediates_only=True)[index], expected)
        assert model.num_features == expected.shape[1]
        model.reset_classifier(5, "avg")
        assert model(x).shape == (2, 5)


# --- training


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_of_parameters(name: str) -> None:
    model = small(name)
    names = {key for key, _ in model.named_parameters()}
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert set(groups) == names
        # Deeper is later: the stem (where there is one) first, the head last.
        head = groups["head.fc.weight"]
        assert head == max(groups.values())
        depth = [groups[key] for key in model.state_dict() if key in names and key.startswith(groups_of(name))]
        assert depth == sorted(depth)
        assert all(group < head for key, group in groups.items() if key.startswith((groups_of(name), "stem")))


@pytest.mark.parametrize("name", NETWORKS)
def test_coordinates_and_radii_do_not_decay(name: str) -> None:
    model = small(name)
    listed = model.no_weight_decay()
    assert listed == {key for key, _ in model.named_parameters() if key.rpartition(".")[2] in ("coords", "radius")}
    assert listed == set(parameter_roles(model)) and listed
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7)
    keys = {id(parameter): key for key, parameter in model.named_parameters()}
    settings = {keys[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert set(settings) == set(keys.values())
    assert all(settings[key]["weight_decay"] == 0 for key in listed)
    assert settings["head.fc.weight"]["weight_decay"] == 0.05 and settings["head.fc.weight"]["lr_scale"] == 1
    first = next(key for key in settings if key.endswith("large.conv.weight"))
    assert settings[first]["weight_decay"] == 0.05 and settings[first]["lr_scale"] < 0.7


@pytest.mark.parametrize("way", ["forward", "forward_intermediates"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_of_gradients_changes_nothing(name: str, momentum: float | None, way: str) -> None:
    x, results = example(name), []
    for enable in (False, True):
        model = small(name).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.momentum = momentum
        model.set_grad_checkpointing(enable)
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        block = model.stages[0].blocks[0] if name in STAGED else model.blocks[0]
        block.register_forward_pre_hook(count)
        # Dropout and drop path draw the same again.
        torch.manual_seed(1)
        y = model(x) if way == "forward" else model.forward_intermediates(x)[0]
        y.square().sum().backward()
        assert calls == 1 + enable
        # Running statistics among them: the batch was there once.
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        results.append((y, gradients, model.state_dict()))
        assert all(module.momentum == momentum for module in model.modules() if hasattr(module, "running_mean"))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_of_gradients_compiles(name: str) -> None:
    torch.compiler.reset()
    x, results = example(name), []
    for enable in (False, True):
        model = small(name, drop_path_rate=0.0, **no_dropout(name)).train()
        model.set_grad_checkpointing(enable)
        torch.compile(model, backend="aot_eager")(x).square().sum().backward()
        results.append(({key: p.grad for key, p in model.named_parameters()}, model.state_dict()))
    torch.testing.assert_close(results[0], results[1], **FLOAT32)


@pytest.mark.parametrize("name", KINDS)
def test_batch_norms_can_be_synchronised(name: str) -> None:
    model, x = small(name), example(name)
    y = model(x)
    # timm's own: PyTorch's would drop the activations that timm fuses into its norms.
    synchronised = timm.layers.convert_sync_batchnorm(copy.deepcopy(model)).eval()
    assert not [m for m in synchronised.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert [m for m in synchronised.modules() if isinstance(m, nn.SyncBatchNorm)]
    torch.testing.assert_close(synchronised(x), y, **FLOAT32)
    assert list(synchronised.state_dict()) == list(model.state_dict())


# --- features


@pytest.mark.parametrize("name", NETWORKS)
def test_features_only(name: str) -> None:
    whole = small(name)
    x = example(name, size=(61, 47) if name in STAGED else (13, 9) if name in IMAGES else (51,))
    expected = whole.forward_intermediates(x, intermediates_only=True)
    for indices in ((0,), (0, 2), (-1,)):
        model = small(name, features_only=True, out_indices=indices)
        features = model(x)
        wanted = [index % len(expected) for index in indices]
        assert model.feature_info.channels() == [whole.feature_info[i]["num_chs"] for i in wanted]
        assert model.feature_info.reduction() == [whole.feature_info[i]["reduction"] for i in wanted]
        for feature, index, channels in zip(features, wanted, model.feature_info.channels(), strict=True):
            assert feature.shape == expected[index].shape and feature.shape[1] == channels
            torch.testing.assert_close(feature, expected[index], **FLOAT32)
    every = on_meta(name, features_only=True)
    features = every(torch.zeros(1, *x.shape[1:], device="meta"))
    assert [f.shape[1] for f in features] == [info["num_chs"] for info in on_meta(name).feature_info]


@pytest.mark.filterwarnings(NODES_DIFFER)
@pytest.mark.parametrize("name", KINDS)
def test_features_by_tracing(name: str) -> None:
    from torchvision.models.feature_extraction import get_graph_node_names

    model, x = small(name), example(name)
    node = f"{groups_of(name)}.0"
    extractor: Any = create_feature_extractor(model, {node: "first", "head": "logits"})
    traced = extractor(x)
    torch.testing.assert_close(traced["first"], model.forward_intermediates(x, intermediates_only=True)[0], **FLOAT32)
    torch.testing.assert_close(traced["logits"], model(x), **FLOAT32)
    tracing = {
        "leaf_modules": timm.models.get_notrace_modules(),
        "autowrap_functions": timm.models.get_notrace_functions(),
    }
    nodes, _ = get_graph_node_names(model, tracer_kwargs=tracing)
    # In a block of the sequence networks a pair and what follows it are one node.
    assert any(key.endswith("conv1" if name in (*SEQUENCES, "smpconv_resnet_cifar") else "large.conv") for key in nodes)


# --- what PyTorch does with modules


@pytest.mark.filterwarnings(SCRIPT_IS_DEPRECATED)
@pytest.mark.parametrize("name", KINDS)
def test_script(name: str) -> None:
    model = small(name)
    scripted = torch.jit.script(model)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for x in (example(name), example(name, size=(37, 70) if name in IMAGES else (33,))):
        torch.testing.assert_close(loaded(x), model(x), **FLOAT32)


@pytest.mark.parametrize("name", ["smpconv_t", "smpconv_tcn_mnist"])
def test_compile(name: str) -> None:
    torch.compiler.reset()
    model, x = small(name, drop_path_rate=0.0, **no_dropout(name)).train(), example(name)
    start = copy.deepcopy(model.state_dict())
    y = model(x)
    gradients = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    model.load_state_dict(start)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, y, **FLOAT32)
    for traced, eager in zip(
        torch.autograd.grad(compiled.square().sum(), list(model.parameters())), gradients, strict=True
    ):
        torch.testing.assert_close(traced, eager, rtol=1e-3, atol=1e-4 * float(eager.abs().max()))


@pytest.mark.parametrize("name", ["smpconv_t", "smpconv_tcn_mnist", "smpconv_resnet"])
def test_export(name: str) -> None:
    model, x = small(name), example(name)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (x,), dynamic_shapes=(batch,))
    for inputs in (x, example(name, batch=5)):
        torch.testing.assert_close(program.module()(inputs), model(inputs), **FLOAT32)


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_compute_the_same(name: str) -> None:
    model, x = small(name), example(name)
    y = model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = timm.create_model(name, **small_arguments(name)).eval()
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for twin in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
    with pytest.raises(RuntimeError, match="Missing key"):
        loaded.load_state_dict({key: value for key, value in model.state_dict().items() if "radius" not in key})


@pytest.mark.parametrize("name", KINDS)
def test_precision(name: str) -> None:
    model, x = small(name), example(name)
    y = model(x).detach()
    double = copy.deepcopy(model).double()(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), y, **FLOAT32)
    half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    # Positions are rounded too, which moves points by up to half a tap: only the type and the order of size are asked.
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()
    created: Any = timm.create_model(name, dtype=torch.float64, **small_arguments(name))
    assert {p.dtype for p in created.parameters()} == {torch.float64}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x)
    torch.testing.assert_close(mixed.float(), y, rtol=0, atol=0.1 * float(y.abs().max()))


# --- bad input


def test_a_wrong_name_lists_near_ones() -> None:
    with pytest.raises(ValueError, match="no network is called 'smpconv_tcn_mnits'; did you mean smpconv_tcn_mnist or"):
        smpconv_zoo.create_model("smpconv_tcn_mnits")
    with pytest.raises(ValueError, match=r"no network is called 'qwertz'; there are: smpconv_b, .*test_smpconv_tcn$"):
        smpconv_zoo.create_model("qwertz")


@pytest.mark.parametrize("create", [timm.create_model, smpconv_zoo.create_model])
@pytest.mark.parametrize("pretrained", [False, True])
def test_a_wrong_tag_lists_the_tags(create: Callable[..., nn.Module], pretrained: bool) -> None:
    sentence = "smpconv_tcn_mnist has no checkpoint tag 'foo'; its tags are: .*pmnist.*smnist5k"
    with pytest.raises(RuntimeError, match=sentence):
        create("smpconv_tcn_mnist.foo", pretrained=pretrained)
    with pytest.raises(RuntimeError, match="smpconv_resnet has no checkpoint tag 'foo'; its tags are: none"):
        create("smpconv_resnet.foo", pretrained=pretrained)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"in_chans": 0}, "in_chans must be at least 1, got 0"),
        ({"num_classes": -1}, r"num_classes must be 0 \(no classifier\) or more, got -1"),
        ({"global_pool": "median"}, r"global_pool must be one of \(.*'avg'.*\), got 'median'"),
        ({"global_pool": ""}, "a classifier needs pooling: global_pool='' goes with num_classes=0"),
        ({"drop_rate": 1.0}, r"drop_rate must be in \[0, 1\), got 1.0"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate must be in \[0, 1\), got -0.1"),
    ],
)
def test_impossible_arguments(name: str, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        on_meta(name, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("smpconv_t", {"kernel_sizes": (31, 29, 28, 13)}, r"kernel sizes must be odd .* got kernel_sizes=\(31, 29, 28"),
        ("smpconv_t", {"kernel_sizes": 1}, r"kernel sizes must be odd and at least 3"),
        ("smpconv_t", {"small_kernel_size": 4}, "kernel sizes must be odd .*, small_kernel_size=4"),
        ("smpconv_t", {"kernel_sizes": (31, 29)}, r"kernel_sizes has 2 entries for 4 stages: \(31, 29\)"),
        ("smpconv_t", {"depths": (2, 2, 8)}, r"depths has 3 entries for 4 stages: \(2, 2, 8\)"),
        ("smpconv_t", {"dims": (96, 192)}, "kernel_sizes has 4 entries for 2 stages"),
        ("smpconv_t", {"dims": (96, 192, 0, 768)}, "dims must be at least 1 throughout"),
        ("smpconv_t", {"depths": (2, 2, 0, 2)}, "depths must be at least 1 throughout"),
        ("smpconv_t", {"points_divisor": 0}, "points_divisor must be at least 1"),
        ("smpconv_t", {"mlp_ratio": 0.0}, "mlp_ratio must leave a hidden channel of 96, got 0.0"),
        ("smpconv_resnet", {"kernel_size": 32}, "kernel_size must be odd and at least 3 along both axes, got 32"),
        ("smpconv_resnet", {"small_kernel_size": 4}, "small_kernel_size must be odd, got 4"),
        ("smpconv_resnet", {"dims": ()}, "dims must be at least 1 throughout"),
        ("smpconv_tcn", {"kernel_size": 1}, "kernel_size must be at least 2, got 1"),
        ("smpconv_tcn", {"n_points": 0}, "n_points must be at least 1"),
        ("smpconv_tcn", {"dims": (30, -1)}, "dims must be at least 1 throughout"),
        ("smpconv_tcn", {"small_kernel_size": 0}, "small_kernel_size must be at least 1"),
    ],
)
def test_impossible_sizes(name: str, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        on_meta(name, **arguments)


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_of_another_form(name: str) -> None:
    model = small(name)
    channels, layout = FACTS[name][0], "N, C, H, W" if name in IMAGES else "N, C, L"
    other = (2, channels, 20) if name in IMAGES else (2, channels, 20, 20)
    wrong = [other, example(name).shape[1:], (2, channels + 1, *example(name).shape[2:]), (*other[:2], 0)]
    for shape in wrong:
        sentence = re.escape(f"expected an input ({layout}) with C = {channels} channels, got shape {tuple(shape)}")
        with pytest.raises(ValueError, match=sentence):
            model(torch.zeros(shape))
        with pytest.raises(ValueError, match=sentence):
            model.forward_intermediates(torch.zeros(shape))

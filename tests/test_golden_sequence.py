"""The sequence networks and the small-image network against the reference's stored values.

What is stored in each file, and which comparisons mean something, is said in tests/golden/README.md.
"""

import functools
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from golden_files import golden
from reference_state import (
    below,
    group_names,
    our_module,
    our_names,
    outputs_of,
    remap_without_grids,
    stored_json,
)
from tolerances import assert_equal_to_reference, load
from torch import Tensor, nn

from smpconv_zoo.checkpoints import convert_checkpoint
from smpconv_zoo.layers import CausalConv1d, SMPConv1d, SMPConv2d, clip_radius_
from smpconv_zoo.models import SMPConvResNet, SMPConvTCN
from smpconv_zoo.models.build import create_on_meta, match_state_dict
from smpconv_zoo.pretrained.remap import remap_reference_state_dict
from smpconv_zoo.pretrained.store import CheckpointError, read_weights
from smpconv_zoo.training.groups import sequence_parameter_groups
from smpconv_zoo.training.schedules import sequence_schedule

NETWORKS = {
    "smnist": "smpconv_tcn_mnist",
    "pmnist": "smpconv_tcn_mnist",
    "scifar10": "smpconv_tcn_cifar",
    "chartrajectories": "smpconv_tcn_chartraj",
    "speechcommands_mfcc": "smpconv_tcn_speech_mfcc",
    "speechcommands_raw": "smpconv_tcn_speech_raw",
    "cifar10": "smpconv_resnet_cifar",
}
TASKS = list(NETWORKS)
THROUGH_FFT = ("smnist", "pmnist", "scifar10", "speechcommands_raw")
SAFETENSORS = ("smnist", "speechcommands_mfcc", "cifar10")
TRAINED = ("tcn", "tcn_fft", "resnet")


def facts(task: str) -> dict[str, Any]:
    return stored_json(f"seq_{task}.json")


@functools.cache
def values_of(task: str) -> dict[str, Tensor]:
    return load(golden(f"seq_{task}_io.safetensors"))


def listed_state_dict(task: str) -> dict[str, Tensor]:
    """The reference's state dict: its shapes, zeros for values, and the length that its kernels were used with."""
    (length,) = facts(task)["io"]["train_length_saved"]
    return {
        entry["name"]: torch.full(
            entry["shape"],
            length if entry["name"].endswith(".train_length") else 0,
            dtype=getattr(torch, entry["dtype"]),
        )
        for entry in facts(task)["state_dict"]
    }


@functools.cache
def converted_network(task: str) -> nn.Module:
    """In eval mode; shared by the tests, which leave it as it is."""
    network = timm.create_model(NETWORKS[task])
    network.load_state_dict(convert_checkpoint(golden(f"seq_{task}.pth"), NETWORKS[task]))
    return network.eval()


def point_layers(network: nn.Module) -> dict[str, nn.Module]:
    return {n: module for n, module in network.named_modules() if isinstance(module, SMPConv1d | SMPConv2d)}


def forward_kind(task: str) -> str:
    return "forward, through the FFT" if task in THROUGH_FFT else "forward"


# Names, shapes, counts, groups


@pytest.mark.parametrize("task", TASKS)
def test_names_and_shapes_are_the_references_one_to_one(task: str) -> None:
    reference = listed_state_dict(task)
    converted = remap_reference_state_dict(reference)
    network = create_on_meta(NETWORKS[task])
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in network.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in converted.items()} == expected
    names = our_names(reference)
    parameters = {name for name, _ in network.named_parameters()}
    kinds = {names[entry["name"]]: entry["kind"] for entry in facts(task)["state_dict"]}
    assert {name for name, kind in kinds.items() if kind == "parameter"} == parameters
    assert {name for name, kind in kinds.items() if kind == "buffer"} == expected.keys() - parameters


@pytest.mark.parametrize("task", TASKS)
def test_parameters_are_counted_as_in_the_reference(task: str) -> None:
    stored, network = facts(task), create_on_meta(NETWORKS[task])
    total = sum(p.numel() for p in network.parameters())
    assert total == stored["parameters"]
    assert round(total / 1000) == stored["documented_parameters_k"]
    counts: dict[str, int] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = type(module).__name__
            if isinstance(module, SMPConv1d | SMPConv2d):
                # The reference keeps the points in a module of their own, the bias in the convolution around it.
                kind = "CKConv" if name == "bias" else "SMPKernel"
            elif isinstance(module, nn.Linear) and task == "cifar10":
                kind = "Conv2d"  # the reference classifies by a 1x1 convolution
            counts[kind] = counts.get(kind, 0) + parameter.numel()
    assert counts == stored["parameters_by_module_type"]


@pytest.mark.parametrize("task", TASKS)
def test_arguments_are_the_references_settings(task: str) -> None:
    stored = facts(task)
    overrides, summary = stored["overrides"], stored["constructor_summary"]
    network = timm.create_model(NETWORKS[task])
    assert (network.in_chans, network.num_classes) == (summary["in_channels"], summary["out_channels"])
    width = int(overrides["net.no_hidden"])
    assert len(network.blocks) == int(overrides["net.no_blocks"])
    assert network.feature_info[0]["num_chs"] == width
    rates = {module.p for name, module in network.blocks.named_modules() if isinstance(module, nn.Dropout)}
    assert rates == {float(overrides["net.dropout"])}
    (length,) = stored["io"]["train_length_saved"]
    for layer in point_layers(network).values():
        assert set(layer.kernel_size) == {length}
        assert layer.n_points == int(overrides["kernel.n_points"])
        assert layer.init_radius == float(overrides["kernel.radius"])
        assert layer.coord_std == float(overrides["kernel.coord_std"])
        assert (layer.bias is not None) == (overrides.get("conv.bias") == "True")
        assert (layer.normalization, layer.radius_bounds, layer.shared_points) == ("count", (1e-4, 1.0), False)
    small = int(overrides["conv.small_kernel_size"])
    sizes = {module.kernel_size for name, module in network.named_modules() if name.endswith(".small.conv")}
    assert sizes == {(small, small) if task == "cifar10" else (small,)}
    assert any(isinstance(module, CausalConv1d) for module in network.modules()) == (task != "cifar10")


@pytest.mark.parametrize("task", TASKS)
def test_parameter_groups_are_the_references(task: str) -> None:
    stored = facts(task)
    overrides = stored["overrides"]
    names = our_names(listed_state_dict(task))
    network = create_on_meta(NETWORKS[task])
    lr, weight_decay = float(overrides["train.lr"]), float(overrides["train.weight_decay"])
    groups = sequence_parameter_groups(network, lr, weight_decay)
    ours = group_names(network, groups)
    assert list(ours) == [group["name"] for group in stored["optimizer_groups"]] == ["others", "no_decay", "radius"]
    for group, expected in zip(groups, stored["optimizer_groups"], strict=True):
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(expected["lr"]), expected["weight_decay"])
        assert group["lr"] == pytest.approx(lr * group["lr_scale"])
        # Inside a group ours stand in the order of our modules, which changes no update; no optimizer state is loaded.
        assert sorted(ours[group["name"]]) == sorted(names[name] for name in expected["parameters"])


# Checkpoints and answers


@pytest.mark.parametrize("task", SAFETENSORS)
def test_both_formats_hold_and_convert_to_the_same_weights(task: str) -> None:
    pickled, plain = golden(f"seq_{task}.pth"), golden(f"seq_{task}.safetensors")
    assert (read_weights(pickled).entry, read_weights(plain).entry) == ("model", None)
    first, second = (convert_checkpoint(path, NETWORKS[task]) for path in (pickled, plain))
    assert list(first) == list(second) == list(create_on_meta(NETWORKS[task]).state_dict())
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("task", TASKS)
def test_converted_network_gives_the_references_outputs(task: str) -> None:
    values = values_of(task)
    network = converted_network(task)
    blocks = [f"blocks.{i}" for i in range(len(network.blocks))]
    assert {name for name in values if name.startswith("block.")} == {f"block.{i}/last" for i in range(len(blocks))}
    logits, kept = outputs_of(network, blocks, values["input"])
    kind = forward_kind(task)
    assert_equal_to_reference(logits, values["logits"], kind, "logits")
    if "logits_direct" in values:
        assert_equal_to_reference(logits, values["logits_direct"], kind, "logits, direct path")
    for i, name in enumerate(blocks):
        output = kept[name]
        output = output[:, :, -1] if output.dim() == 3 else output.mean((2, 3))
        assert_equal_to_reference(output, values[f"block.{i}/last"], kind, name)


@pytest.mark.parametrize("task", TASKS)
def test_converted_network_renders_the_references_kernels(task: str) -> None:
    values, ends = values_of(task), facts(task)["io"]
    network = converted_network(task)
    layers = point_layers(network)
    names = {our_module(name): name for name in below(values, "train_length/")}
    assert names.keys() == layers.keys()
    sums, absolute_sums = below(values, "kernel_sum/"), below(values, "kernel_abssum/")
    assert sums.keys() == absolute_sums.keys() == set(names.values())
    for ours, name in names.items():
        (length,) = values[f"train_length/{name}"].tolist()
        assert set(layers[ours].kernel_size) == {length}
        with torch.no_grad():
            kernel = layers[ours].kernel()
        for key in ("first", "last"):
            if name == ends[f"{key}_kernel"]:
                # Of large kernels the file holds the first output (and input) channels only.
                reference = values[f"kernel_{key}"]
                assert_equal_to_reference(kernel[: len(reference), : reference.size(1)], reference, "kernel", name)
        taps = tuple(range(2, kernel.dim()))
        assert_equal_to_reference(kernel.sum(taps), sums[name], "kernel, summed", f"{name}, sum")
        assert_equal_to_reference(
            kernel.abs().sum(taps), absolute_sums[name], "kernel, summed", f"{name}, absolute sum"
        )


def test_permuted_digits_are_the_images_permuted() -> None:
    values = values_of("pmnist")
    stored = stored_json("pmnist_permutation_seed0.json")
    permutation = np.random.RandomState(0).permutation(784)
    assert permutation.tolist() == stored["first_draw"]
    images = values["input_image"]
    assert torch.equal(images.flatten(2)[:, :, torch.from_numpy(permutation)], values["input"])
    assert not torch.equal(images.flatten(2), values["input"])


def test_a_batch_of_one_keeps_its_axis() -> None:
    """The reference squeezes it away: ten numbers in place of a row of them."""
    assert facts("cifar10")["io"]["batch_one_output_shape"] == [10]
    values = values_of("cifar10")
    with torch.no_grad():
        logits = converted_network("cifar10")(values["input"][:1])
    assert_equal_to_reference(logits, values["logits"][:1], "forward", "logits of one image")


def test_weights_of_a_network_that_never_ran_are_refused() -> None:
    """The reference stores 0 for the length of its kernels until its first forward."""
    initial = below(load(golden("seq_train_tcn.safetensors")), "initial/")
    assert {int(tensor) for name, tensor in initial.items() if name.endswith(".train_length")} == {0}
    network = SMPConvTCN(in_chans=3, kernel_size=40, dims=(6, 6), n_points=7)
    with pytest.raises(CheckpointError, match=r"conv1\.large\.conv\.grid has shape \(1, 0\), .* \(1, 40\)"):
        match_state_dict(initial, network)


# Training


def trained_network(run: dict[str, Any], inputs: Tensor) -> nn.Module:
    """The tiny network of a stored training run."""
    net, kernel, conv = run["net"], run["kernel"], run["conv"]
    common = {
        "in_chans": run["in_channels"],
        "num_classes": run["out_channels"],
        "n_points": kernel["n_points"],
        "init_radius": kernel["radius"],
        "coord_std": kernel["coord_std"],
        "small_kernel_size": conv["small_kernel_size"],
        "block_drop_rate": float(net["dropout"]),
    }
    if net["type"] == "TCN":
        dims = (net["no_hidden"],) * net["no_blocks"]
        return SMPConvTCN(kernel_size=inputs.size(-1), dims=dims, conv_bias=conv["bias"], **common)
    # Pairs of a factor of the width and the number of blocks that have it.
    pairs = zip(net["block_width_factors"][::2], net["block_width_factors"][1::2], strict=True)
    dims = tuple(int(net["no_hidden"] * factor) for factor, count in pairs for _ in range(int(count)))
    assert len(dims) == net["no_blocks"]
    return SMPConvResNet(kernel_size=conv["horizon"], dims=dims, **common)


@pytest.mark.parametrize("name", TRAINED)
def test_training_follows_the_reference(name: str) -> None:
    run, values = stored_json("seq_train.json")[name], load(golden(f"seq_train_{name}.safetensors"))
    train = run["train"]
    inputs, targets = values["inputs"], values["targets"]
    network = trained_network(run, inputs).train()
    # The reference learns the length of its kernels from the first input; before, it stores 0.
    lengths = {n: tensor for n, tensor in below(values, "after_step_2/").items() if n.endswith(".train_length")}
    initial = remap_reference_state_dict({**below(values, "initial/"), **lengths})
    assert {n: t.shape for n, t in initial.items()} == {n: t.shape for n, t in network.state_dict().items()}
    network.load_state_dict(initial)

    groups = sequence_parameter_groups(network, train["lr"], train["weight_decay"])
    optimizer = torch.optim.Adam(groups)
    steps = len(run["loss"])
    per_epoch = train["dataset_size"] // train["batch_size"]
    assert steps == train["epochs"] * per_epoch == 9
    schedules = [sequence_schedule(group["lr"], steps, train["warmup_epochs"] * per_epoch) for group in groups]
    np.testing.assert_allclose(np.stack(schedules, axis=1), run["lr_used_at_step"], rtol=1e-9)

    gradients = remap_without_grids(below(values, "grad/"))
    reliable = {n: mask.bool() for n, mask in remap_without_grids(below(values, "grad_reliable/")).items()}
    parameters = dict(network.named_parameters())
    assert gradients.keys() == reliable.keys() == parameters.keys()
    assert sum(int(m.sum()) for m in reliable.values()) > 0.8 * sum(m.numel() for m in reliable.values())

    for step, batch in enumerate(run["batch_order"]):
        for group, schedule in zip(optimizer.param_groups, schedules, strict=True):
            group["lr"] = schedule[step]
        optimizer.zero_grad()
        loss = F.cross_entropy(network(inputs[batch]), targets[batch])
        loss.backward()
        assert_equal_to_reference(loss, torch.tensor(run["loss"][step]), "trajectory", f"loss of step {step}")
        if step == 0:
            for parameter_name, reference in gradients.items():
                mask, gradient = reliable[parameter_name], parameters[parameter_name].grad
                assert_equal_to_reference(gradient[mask], reference[mask], "gradient", f"gradient {parameter_name}")
        optimizer.step()
        clip_radius_(network)
        if step == 1:
            # The first step has rate 0: the weights have moved once.
            after = remap_reference_state_dict(below(values, "after_step_2/"))
            for parameter_name, mask in reliable.items():
                ours, reference = parameters[parameter_name][mask], after[parameter_name][mask]
                assert_equal_to_reference(ours, reference, "optimizer step", f"after step 2: {parameter_name}")
    with torch.no_grad():
        logits = network(inputs[0])
    assert_equal_to_reference(logits, values["final_train_logits"], "trajectory", "final logits")

    # The stored state after all steps is for orientation (biases in front of a batch norm follow noise): names, shapes,
    # and radii inside the bounds.
    final = remap_reference_state_dict(below(values, "final/"))
    assert {n: t.shape for n, t in final.items()} == {n: t.shape for n, t in network.state_dict().items()}
    low, high = train["clip_radius"]
    for state in (final, network.state_dict()):
        radii = torch.cat([tensor.flatten() for n, tensor in state.items() if n.endswith(".radius")])
        assert radii.min() >= low - 1e-9 and radii.max() <= high

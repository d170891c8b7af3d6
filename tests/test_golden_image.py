"""The image networks against the reference's stored values: names, answers, gradients, an optimizer step, a trajectory.

What is stored in each file, and which comparisons mean something, is said in tests/golden/README.md.
"""

import functools
import warnings

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
from timm.layers import DropPath
from timm.utils import ModelEma
from tolerances import assert_equal_to_reference, load, numpy_uniform, relative_error
from torch import Tensor, nn

from smpconv_zoo.checkpoints import convert_checkpoint
from smpconv_zoo.evaluation.complexity import count_macs
from smpconv_zoo.layers import SMPConv2d, clip_radius_
from smpconv_zoo.models import SMPConvNet
from smpconv_zoo.models.build import create_on_meta
from smpconv_zoo.points import tap_grid
from smpconv_zoo.pretrained.remap import remap_reference_state_dict
from smpconv_zoo.pretrained.store import _reference_globals, read_weights
from smpconv_zoo.training.groups import image_parameter_groups
from smpconv_zoo.training.schedules import cosine_schedule

LISTS = {"smpconv_t": "smpconvnet_T.json", "smpconv_b": "smpconvnet_B.json"}
FULL = {"smpconv_t": "full_T_io.safetensors", "smpconv_b": "full_B_io.safetensors"}
WEIGHTS = {"model": "state_dict", "ema": "state_dict_ema"}


def listed_state_dict(network: str) -> dict[str, Tensor]:
    """The reference's state dict of a full-size network, shapes only."""
    return {
        entry["name"]: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for entry in stored_json(LISTS[network])["state_dict"]
    }


@functools.cache
def tiny_checkpoint() -> dict[str, dict[str, Tensor]]:
    """Both sets of weights in the tiny checkpoint, under the reference's names."""
    path = golden("tiny_checkpoint.pth")
    with torch.serialization.safe_globals(_reference_globals()), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch did not write this pickle, and says so
        content = torch.load(path, weights_only=True)
    return {which: dict(content[key]) for which, key in WEIGHTS.items()}


def tiny_network(which: str = "model") -> SMPConvNet:
    network = timm.create_model("test_smpconv")
    network.load_state_dict(remap_reference_state_dict(tiny_checkpoint()[which]))
    return network


# Names, shapes, counts


@pytest.mark.parametrize("network", LISTS)
def test_names_and_shapes_are_the_references_one_to_one(network: str) -> None:
    reference = listed_state_dict(network)
    converted = remap_reference_state_dict(reference)
    assert len(converted) == len(reference) == stored_json(LISTS[network])["state_dict_entries"]
    model = create_on_meta(network)
    ours = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in converted.items()} == ours
    names = our_names(reference)
    kinds = {names[entry["name"]]: entry["kind"] for entry in stored_json(LISTS[network])["state_dict"]}
    parameters = {name for name, _ in model.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == "parameter"} == parameters
    assert {name for name, kind in kinds.items() if kind == "buffer"} == ours.keys() - parameters


@pytest.mark.parametrize("network", LISTS)
def test_elements_are_counted_as_in_the_reference(network: str) -> None:
    stored, model = stored_json(LISTS[network]), create_on_meta(network)
    assert sum(p.numel() for p in model.parameters()) == stored["parameters"]
    assert sum(b.numel() for b in model.buffers()) == stored["buffers"]

    def elements(*types: type[nn.Module]) -> int:
        modules = [module for module in model.modules() if isinstance(module, types)]
        return sum(p.numel() for module in modules for p in module.parameters(recurse=False))

    by_type = stored["parameters_by_module_type"]
    assert elements(nn.Conv2d) == by_type["Conv2d"]
    assert elements(nn.BatchNorm2d) == by_type["BatchNorm"]
    assert elements(SMPConv2d) == by_type["SMPConv"]
    assert elements(nn.Linear) == by_type["Linear"]
    assert sum(by_type.values()) == stored["parameters"]

    by_leaf = stored["parameters_by_leaf_name"]
    layers = [module for module in model.modules() if isinstance(module, SMPConv2d)]
    assert sum(layer.coords.numel() for layer in layers) == by_leaf["weight_coord"]
    assert sum(layer.radius.numel() for layer in layers) == by_leaf["radius"]
    assert sum(layer.weight.numel() for layer in layers) == by_leaf["weights"]
    assert sum(layer.grid.numel() for layer in layers) == stored["buffers_by_leaf_name"]["kernel_coord"]

    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    small = [module for name, module in convs.items() if ".small." in name]
    pointwise = [m for name, m in convs.items() if ".blocks." in name and m.kernel_size == (1, 1)]
    assert sum(module.weight.numel() for module in small) == stored["parameters_small_kernel"]
    assert sum(module.weight.numel() for module in pointwise) == stored["parameters_pointwise_in_blocks"]


@pytest.mark.parametrize("network", LISTS)
def test_drop_path_rates_grow_over_the_blocks_as_in_the_reference(network: str) -> None:
    expected = {}
    for name, rate in stored_json(LISTS[network])["drop_path"]:
        stage, block = int(name.split(".")[1]), int(name.split(".")[3])
        half = "channel" if block % 2 else "spatial"
        expected[f"stages.{stage}.blocks.{block // 2}.{half}.drop_path"] = rate
    modules = create_on_meta(network).named_modules()
    assert {name: module.drop_prob for name, module in modules if isinstance(module, DropPath)} == expected


def test_parameter_groups_are_the_references() -> None:
    stored = stored_json("param_groups_T.json")
    names = our_names(listed_state_dict("smpconv_t"))
    model = create_on_meta("smpconv_t")
    groups = image_parameter_groups(model, stored["base_weight_decay"])
    assert [group["name"] for group in groups] == ["decay", "no_decay", "coords", "radius"]
    assert [group["name"] for group in stored["groups"]] == ["decay", "no_decay", "skip", "radius"]
    ours = group_names(model, groups)
    for group, expected in zip(groups, stored["groups"], strict=True):
        assert (group["weight_decay"], group["lr_scale"]) == (expected["weight_decay"], expected["lr_scale"])
        # Inside a group ours stand in the order of our modules, which changes no update; no optimizer state is loaded.
        assert sorted(ours[group["name"]]) == sorted(names[name] for name in expected["parameters"])


@pytest.mark.parametrize(("network", "key"), [("smpconv_t", "T"), ("smpconv_b", "B")])
def test_multiply_accumulates_are_the_published_ones(network: str, key: str) -> None:
    stored = stored_json("flops.json")
    expected, parts = stored[key], stored[key]["parts"]
    macs = count_macs(create_on_meta(network), stored["input"])
    assert macs == {
        "total": expected["published_convention_total"],
        "conv": parts["conv_other"],
        "pointwise": parts["conv_pointwise"],
        "depthwise": parts["conv_depthwise_small"],
        "smpconv": parts["smp_depthwise"],
        "linear": parts["linear"],
        "rendering": parts["smp_kernel_synthesis"],
        "norm": parts["bn"],
    }
    assert macs["total"] + macs["rendering"] == expected["with_kernel_synthesis_total"]
    assert f"{macs['total'] / 1e9:.1f}G" == stored["published"][key]


def test_counting_leaves_the_network_as_it_was() -> None:
    network = tiny_network().train()
    network.head.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    macs = count_macs(network, (1, 3, 64, 64))
    assert count_macs(network, (3, 3, 64, 64))["total"] == 3 * macs["total"]
    assert count_macs(network, (3, 3, 64, 64))["rendering"] == macs["rendering"]
    assert network.training and network.stem.training and not network.head.training
    assert not any(module._forward_hooks for module in network.modules())
    for name, tensor in network.state_dict().items():
        assert tensor.device.type == "cpu" and torch.equal(tensor, before[name]), name


# The tiny network in eval mode


def test_tiny_network_is_the_references() -> None:
    stored = stored_json("tiny_config.json")
    constructor = stored["constructor"]
    network = SMPConvNet(
        kernel_sizes=constructor["large_kernel_sizes"],
        depths=constructor["layers"],
        dims=constructor["channels"],
        drop_path_rate=constructor["drop_path_rate"],
        mlp_ratio=constructor["ffn_ratio"],
        in_chans=constructor["in_channels"],
        num_classes=constructor["num_classes"],
        points_divisor=constructor["n_points_divide"],
    )
    tiny = timm.create_model("test_smpconv").state_dict()
    assert {n: t.shape for n, t in network.state_dict().items()} == {n: t.shape for n, t in tiny.items()}
    assert not any(isinstance(module, DropPath) for module in network.modules())
    values = load(golden("tiny_io.safetensors"))
    assert {which: list(values[f"input_{which}"].shape) for which in "ab"} == {w: stored["inputs"][w] for w in "ab"}


def test_conversion_takes_the_averaged_weights() -> None:
    path = golden("tiny_checkpoint.pth")
    assert read_weights(path).entry == "state_dict_ema"
    converted = convert_checkpoint(path, "test_smpconv")
    averaged, last = (remap_reference_state_dict(tiny_checkpoint()[which]) for which in ("ema", "model"))
    assert converted.keys() == averaged.keys() == last.keys()
    for name, tensor in converted.items():
        assert torch.equal(tensor, averaged[name]), name
    assert any(not torch.equal(tensor, last[name]) for name, tensor in converted.items())


def our_output(reference_module: str) -> str:
    """Name of our module that gives what a module of the reference gives."""
    parts = reference_module.split(".")
    if parts[0] == "transitions":
        return f"stages.{int(parts[1]) + 1}.downsample"
    if reference_module.endswith(".large_kernel.smp.conv"):
        return our_module(reference_module)
    if "blocks" in parts:
        block = int(parts[3])
        return f"stages.{parts[1]}.blocks.{block // 2}.{'channel' if block % 2 else 'spatial'}"
    return reference_module


@pytest.mark.parametrize(("which", "image", "outputs"), [("model", "a", 17), ("model", "b", 9), ("ema", "a", 9)])
def test_tiny_network_gives_the_references_outputs(which: str, image: str, outputs: int) -> None:
    values = load(golden("tiny_io.safetensors"))
    expected = below(values, f"{which}/{image}/")
    assert len(expected) == outputs
    logits = expected.pop("logits")
    modules = {name: our_output(name) for name in expected}
    ours, kept = outputs_of(tiny_network(which).eval(), list(modules.values()), values[f"input_{image}"])
    assert_equal_to_reference(ours, logits, "forward", f"{which} {image} logits")
    for name, reference in expected.items():
        assert_equal_to_reference(kept[modules[name]], reference, "forward", f"{which} {image} {name}")


@pytest.mark.parametrize("which", WEIGHTS)
def test_tiny_network_renders_the_references_kernels(which: str) -> None:
    expected = below(load(golden("tiny_io.safetensors")), f"{which}/kernel/")
    network = tiny_network(which)
    layers = {name for name, module in network.named_modules() if isinstance(module, SMPConv2d)}
    assert {our_module(name) for name in expected} == layers
    for name, reference in expected.items():
        kernel = network.get_submodule(our_module(name)).kernel()
        assert kernel.size(1) == 1
        assert_equal_to_reference(kernel.squeeze(1), reference, "kernel", f"{which} {name}")


def test_averaged_weights_keep_their_drifted_grid() -> None:
    stored = tiny_checkpoint()["ema"]
    network = timm.create_model(
        "test_smpconv", pretrained=True, pretrained_cfg_overlay={"file": str(golden("tiny_checkpoint.pth"))}
    ).eval()
    grids = {name: tensor for name, tensor in stored.items() if name.endswith(".kernel_coord")}
    regenerated, drifts = {}, []
    for name, reference in grids.items():
        layer = network.get_submodule(our_module(name.removesuffix(".kernel_coord")))
        # As the reference turns its kernel, (rows, columns) -> (columns, rows) with the rows upside down.
        assert torch.equal(layer.grid, reference.squeeze(0).transpose(1, 2).flip(1)), name
        regenerated[layer] = tap_grid(layer.kernel_size)
        drifts.append((layer.grid - regenerated[layer]).abs().max().item())
    # Which grids drift depends on how their coordinates round: those of 11 taps do not.
    assert max(drifts) > 1e-5 and max(drifts) < 2e-4

    # Were the grid made anew, answers would change by far more than rounding.
    values = load(golden("tiny_io.safetensors"))
    with torch.no_grad():
        for layer, grid in regenerated.items():
            layer.grid.copy_(grid)
        changed = relative_error(network(values["input_a"]), values["ema/a/logits"])
    assert changed > 1e-3


def test_feature_extractor_takes_the_classifiers_weights() -> None:
    """The reference's extractor norms every stage's output by itself; ours gives the outputs and has no such norms.

    So the reference misses four norms when it loads a classifier (they stay untrained) and cannot place the final norm
    and the classifier. Ours misses nothing, and what it leaves out are the same entries.
    """
    stored = stored_json("tiny_backbone_keys.json")
    assert {name.rpartition(".")[0] for name in stored["missing"]} == {f"stages.{i}.norm" for i in range(4)}
    classifier = our_names(tiny_checkpoint()["ema"])
    extractor = timm.create_model(
        "test_smpconv",
        features_only=True,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(golden("tiny_checkpoint.pth"))},
    ).eval()
    own = {name.removeprefix("model."): tensor for name, tensor in extractor.state_dict().items()}
    converted = remap_reference_state_dict(tiny_checkpoint()["ema"])
    assert own.keys() <= converted.keys()
    assert not any(name in classifier for name in stored["missing"])
    left_out = {classifier[name] for name in stored["unexpected"]}
    assert converted.keys() - own.keys() == left_out
    for name, tensor in own.items():
        assert torch.equal(tensor, converted[name]), name

    values = load(golden("tiny_io.safetensors"))
    with torch.no_grad():
        features = extractor(values["input_a"])
    assert len(features) == 4
    for i, feature in enumerate(features):
        assert_equal_to_reference(feature, values[f"ema/a/stages.{i}"], "forward", f"feature {i}")


# The tiny network in training


def reliable_values(ours: Tensor, reference: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return ours[mask.bool()], reference[mask.bool()]


def test_first_training_step_is_the_references() -> None:
    values, settings = load(golden("tiny_train.safetensors")), stored_json("tiny_train.json")
    network = tiny_network().train()
    average = ModelEma(network, decay=settings["ema_decay"])
    groups = image_parameter_groups(network, settings["weight_decay"])
    for group, stored in zip(groups, settings["groups"], strict=True):
        group["lr"] = settings["lr"] * group["lr_scale"]
        assert len(group["params"]) == stored["n_tensors"]
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(stored["lr"]), stored["weight_decay"])
    optimizer = torch.optim.AdamW(groups, betas=tuple(settings["betas"]), eps=settings["eps"])

    logits = network(values["input"])
    loss = F.cross_entropy(logits, values["target"])
    assert_equal_to_reference(logits, values["logits"], "forward", "logits, train mode")
    assert_equal_to_reference(loss.view(1), values["loss"], "loss", "loss")
    after_forward = remap_without_grids(below(values, "buffer_after_forward/"))
    buffers = {name: buffer for name, buffer in network.named_buffers() if not name.endswith(".grid")}
    assert after_forward.keys() == buffers.keys()
    for name, reference in after_forward.items():
        assert_equal_to_reference(buffers[name], reference, "batch norm statistics", f"buffer {name}")

    loss.backward()
    gradients = remap_without_grids(below(values, "grad/"))
    reliable = remap_without_grids(below(values, "grad_reliable/"))
    parameters = dict(network.named_parameters())
    assert gradients.keys() == reliable.keys() == parameters.keys()
    # Were little reliable, little would be compared; see the README for what is not.
    assert sum(int(mask.sum()) for mask in reliable.values()) > 0.9 * sum(m.numel() for m in reliable.values())
    for name, reference in gradients.items():
        ours = reliable_values(parameters[name].grad, reference, reliable[name])
        assert_equal_to_reference(*ours, "gradient", f"gradient {name}")

    optimizer.step()
    average.update(network)  # before the clip: the average may hold radii outside the bounds
    unclipped = {name: p.detach().clone() for name, p in parameters.items() if name.endswith(".radius")}
    clip_radius_(network)
    assert any(not torch.equal(parameters[name], radius) for name, radius in unclipped.items())

    stepped, averaged = network.state_dict(), average.ema.state_dict()
    for prefix, state, parameter_kind in (
        ("after_step/", stepped, "optimizer step"),
        ("ema_after_step/", averaged, "averaged weights"),
    ):
        expected = remap_reference_state_dict(below(values, prefix))
        assert expected.keys() == state.keys()
        for name, reference in expected.items():
            ours = state[name], reference
            kind = "batch norm statistics"
            if name in reliable:
                # Elsewhere the sign of rounding noise decides: one step up or down, and no more.
                assert (state[name] - reference).abs().max() <= 2.001 * settings["lr"], name
                kind, ours = parameter_kind, reliable_values(*ours, reliable[name])
            assert_equal_to_reference(*ours, kind, prefix + name)


def test_training_follows_the_references_trajectory() -> None:
    values, settings = load(golden("tiny_trajectory.safetensors")), stored_json("tiny_trajectory.json")
    epochs, steps_per_epoch, accumulate = settings["epochs"], settings["steps_per_epoch"], settings["update_freq"]
    schedule = cosine_schedule(
        base=max(settings["schedule"]),
        final=1e-6,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=1,
    )
    np.testing.assert_allclose(schedule, settings["schedule"], rtol=1e-12)

    network = tiny_network().train()
    average = ModelEma(network, decay=settings["ema_decay"])
    groups = image_parameter_groups(network, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    losses = []
    for epoch in range(epochs):
        # Micro-batches that fill no step are left out, without a forward.
        for i, batch in enumerate(settings["batch_order"][: steps_per_epoch * accumulate]):
            step = epoch * steps_per_epoch + i // accumulate
            for group in optimizer.param_groups:
                group["lr"] = schedule[step] * group["lr_scale"]
            loss = F.cross_entropy(network(values["micro_inputs"][batch]), values["micro_targets"][batch])
            losses.append(loss.item())
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                average.update(network)
            # The reference clips after every micro-batch, those without a step included.
            clip_radius_(network)
        rates = [group["lr"] for group in optimizer.param_groups]
        np.testing.assert_allclose(rates, settings["last_lr_per_group_per_epoch"][epoch], rtol=1e-12)
    assert len(losses) == len(settings["microbatch_loss"]) == 12
    for i, (ours, reference) in enumerate(zip(losses, settings["microbatch_loss"], strict=True)):
        assert_equal_to_reference(torch.tensor(ours), torch.tensor(reference), "trajectory", f"loss of micro-batch {i}")


# The full-size networks


def name_keyed(name: str, shape: torch.Size) -> Tensor:
    """The rule of the goldens' README for one entry of the reference's state dict."""
    leaf = name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.tensor(0)
    if leaf == "kernel_coord":
        axes = [torch.linspace(-1, 1, size) for size in shape[2:]]
        return torch.stack(torch.meshgrid(*axes, indexing="ij")).unsqueeze(0)
    u = numpy_uniform(name, shape)
    rules = {
        "running_var": lambda: 0.5 + u,
        "running_mean": lambda: 0.4 * (u - 0.5),
        "radius": lambda: 0.02 + 0.3 * u,
        "weight_coord": lambda: 2.4 * (u - 0.5),
        "weights": lambda: 0.02 * (u - 0.5),
        "bias": lambda: 0.4 * (u - 0.5),
    }
    if leaf in rules:
        value = rules[leaf]()
    elif name.endswith("pw2.bn.weight"):
        value = 0.2 * (0.5 + u)
    elif len(shape) == 1:
        value = 0.5 + u
    else:
        value = (u - 0.5) * (12 / shape[1:].numel()) ** 0.5
    return value.float()


@pytest.mark.slow
@pytest.mark.parametrize("network", FULL)
def test_full_size_network_gives_the_references_outputs(network: str) -> None:
    expected = load(golden(FULL[network]))
    state_dict = {name: name_keyed(name, tensor.shape) for name, tensor in listed_state_dict(network).items()}
    model = create_on_meta(network)
    model.load_state_dict(remap_reference_state_dict(state_dict), assign=True)
    model.eval()
    x = torch.from_numpy(np.random.RandomState(5).standard_normal((1, 3, 224, 224))).float()
    logits, stages = outputs_of(model, [f"stages.{i}" for i in range(4)], x)
    assert_equal_to_reference(logits, expected["logits"], "forward, full size", "logits")
    for i in range(4):
        output = stages[f"stages.{i}"]
        for key, ours in (("mean", output.mean((0, 2, 3))), ("mean_abs", output.abs().mean((0, 2, 3)))):
            stored = expected[f"stage{i}_{key}_per_channel"]
            assert_equal_to_reference(ours, stored, "forward, full size", f"stage {i} {key}")
    kernels = below(expected, "kernel/")
    assert len(kernels) == 2
    for name, reference in kernels.items():
        layer = model.get_submodule(our_module(name.removesuffix("/first4")))
        assert_equal_to_reference(layer.kernel()[:4, 0], reference, "kernel", name)

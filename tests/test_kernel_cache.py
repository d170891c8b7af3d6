"""In eval mode a kernel is rendered once, and never used after a change of what it was rendered from."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from test_models import SCRIPT_IS_DEPRECATED
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from smpconv_zoo import layers
from smpconv_zoo.layers import SMPConv1d, SMPConv2d

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "depthwise": (lambda: SMPConv2d(4, 4, 7, groups=4, bias=True), (2, 4, 9, 8)),
    "dense": (lambda: SMPConv2d(3, 5, 7, normalization="count"), (2, 3, 9, 8)),
    "causal": (lambda: SMPConv1d(3, 5, 12, bias=True), (2, 3, 20)),
}
KINDS = list(LAYERS)


def layer_and_input(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        layer.weight.normal_()
        layer.radius.mul_(1.5)
    return layer.to(dtype).eval(), torch.randn(shape, dtype=dtype)


def fresh(layer: Any, x: Tensor) -> Tensor:
    """What the layer as it is now answers, by way of the mode in which nothing is kept."""
    twin = copy.deepcopy(layer).train()
    with torch.no_grad():
        return twin(x)


def check(layer: Any, x: Tensor) -> Tensor:
    """The layer answers as it is now; returns the answer."""
    with torch.no_grad():
        y: Tensor = layer(x)
        torch.testing.assert_close(y, fresh(layer, x), rtol=1e-6, atol=1e-6)
    return y


@pytest.fixture
def renderings(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry for every kernel rendered since."""
    calls: list[None] = []
    render = layers.render_kernel

    def count(*args: Any) -> Tensor:
        calls.append(None)
        return render(*args)

    monkeypatch.setattr(layers, "render_kernel", count)
    return calls


# --- once


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_is_rendered_once(kind: str, without: Callable[[], Any], renderings: list[None]) -> None:
    layer, x = layer_and_input(kind)
    with without():
        y = layer(x)
        for _ in range(3):
            assert torch.equal(layer(x), y)
        layer(x[..., :3])
        layer(torch.cat((x, x), dim=-1))
    assert len(renderings) == 1
    check(layer, x)


def test_sequences_of_any_length_share_a_kernel(renderings: list[None]) -> None:
    layer, x = layer_and_input("causal")
    with torch.no_grad():
        for length in (1, 20, 2, 12, 13):
            torch.testing.assert_close(layer(x[:, :, :length]), layer(x)[:, :, :length])
        assert len(renderings) == 1
        assert layer.kernel_for(x[:, :, :4]).shape == (5, 3, 4)


def test_every_network_renders_each_kernel_once(renderings: list[None]) -> None:
    for name, shape in (("test_smpconv", (1, 3, 64, 64)), ("test_smpconv_tcn", (1, 1, 32))):
        model: Any = timm.create_model(name).eval()
        renderings.clear()
        with torch.no_grad():
            y = model(torch.ones(shape))
            assert torch.equal(model(torch.ones(shape)), y)
        kernels = [part for part in model.modules() if isinstance(part, SMPConv1d | SMPConv2d)]
        assert len(renderings) == len(kernels)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_in_training(kind: str, renderings: list[None]) -> None:
    layer, x = layer_and_input(kind)
    layer.train()
    with torch.no_grad():
        layer(x)
        layer(x)
    assert len(renderings) == 2 and layer._rendered is None


# --- never stale


def step(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Any], object]:
    def change(layer: Any) -> None:
        optimizer = make(layer.parameters())
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return change


def in_numpy(layer: Any) -> None:
    layer.weight.detach().numpy()[...] *= 2


def load(layer: Any, **kwargs: Any) -> None:
    layer.load_state_dict({key: 0.9 * value for key, value in layer.state_dict().items()}, **kwargs)


def swap(layer: Any) -> None:
    torch.utils.swap_tensors(layer.weight, nn.Parameter(2 * layer.weight.detach()))


def without_grad(change: Callable[[Any], object]) -> Callable[[Any], object]:
    return torch.no_grad()(change)


def assign(name: str, value: Callable[[Tensor], object]) -> Callable[[Any], object]:
    return lambda layer: setattr(layer, name, value(getattr(layer, name).detach()))


def to_data(name: str) -> Callable[[Any], object]:
    return lambda layer: setattr(getattr(layer, name), "data", 0.9 * getattr(layer, name).data)


# Counted by the tensors, or of other tensors; seen on every device.
TOLD: dict[str, Callable[[Any], object]] = {
    "load_state_dict": load,
    "load_state_dict, assign": lambda layer: load(layer, assign=True),
    "SGD": step(lambda parameters: torch.optim.SGD(parameters, lr=0.01)),
    "SGD, foreach": step(lambda parameters: torch.optim.SGD(parameters, lr=0.01, foreach=True)),
    "AdamW": step(lambda parameters: torch.optim.AdamW(parameters, lr=0.01)),
    "in place, coords": without_grad(lambda layer: layer.coords.mul_(0.9)),
    "in place, radius": without_grad(lambda layer: layer.radius.mul_(0.9)),
    "in place, weight": without_grad(lambda layer: layer.weight[0].mul_(2)),
    "in place, grid": without_grad(lambda layer: layer.grid.mul_(0.9)),
    "in place, detached": lambda layer: layer.weight.detach().mul_(2),
    "initialised anew": lambda layer: nn.init.normal_(layer.weight),
    "clip_radius_": without_grad(lambda layer: (layer.radius.fill_(2), layer.clip_radius_())),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "another parameter": assign("weight", lambda weight: nn.Parameter(2 * weight)),
    "another buffer": assign("grid", lambda grid: 0.9 * grid),
    "data of another tensor, weight": to_data("weight"),
    "data of another tensor, coords": to_data("coords"),
    "swapped": swap,
}
# Writes that no tensor counts.
UNTOLD: dict[str, Callable[[Any], object]] = {
    "data, in place": lambda layer: layer.weight.data.mul_(2),
    "data, in place, coords": lambda layer: layer.coords.data.mul_(0.9),
    "data, in place, grid": lambda layer: layer.grid.data.mul_(0.9),
    "numpy": in_numpy,
    "AdamW, fused": step(lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True)),
}


@pytest.mark.parametrize("change", [*TOLD.values(), *UNTOLD.values()], ids=[*TOLD, *UNTOLD])
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_noticed(kind: str, change: Callable[[Any], object]) -> None:
    layer, x = layer_and_input(kind)
    before = check(layer, x)
    change(layer)
    after = check(layer, x)
    assert not torch.allclose(after, before, rtol=1e-4, atol=1e-4)
    change(layer)
    check(layer, x)


@pytest.mark.parametrize("change", TOLD.values(), ids=TOLD)
def test_a_change_is_noticed_without_a_look_at_the_numbers(change: Callable[[Any], object]) -> None:
    """As on a GPU."""
    layer, x = layer_and_input("depthwise")
    check(layer, x)
    # Loads and moves drop the kernel before anything is compared; compare all the same.
    rendered = dataclasses.replace(layer._rendered, values=())
    assert rendered.is_of((layer.coords, layer.radius, layer.weight, layer.grid))
    change(layer)
    assert not rendered.is_of((layer.coords, layer.radius, layer.weight, layer.grid))


@pytest.mark.parametrize(
    "drop",
    [
        lambda layer: layer.train(),
        lambda layer: layer.eval(),
        lambda layer: nn.Sequential(layer).eval(),
        lambda layer: layer.to(torch.float64),
        lambda layer: layer.to("cpu"),
        lambda layer: nn.Sequential(layer).float(),
        lambda layer: layer.load_state_dict(layer.state_dict()),
        lambda layer: layer.share_memory(),
    ],
)
def test_modes_moves_and_loads_drop_the_kernel(drop: Callable[[Any], object]) -> None:
    layer, x = layer_and_input("causal")
    check(layer, x)
    assert layer._rendered is not None
    drop(layer)
    assert layer._rendered is None


@pytest.mark.parametrize("kind", KINDS)
def test_another_precision_and_back(kind: str) -> None:
    layer, x = layer_and_input(kind)
    y = check(layer, x)
    torch.testing.assert_close(check(layer.double(), x.double()).float(), y, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bfloat16()
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    check(layer.float(), x)


def test_another_device_and_back() -> None:
    layer, x = layer_and_input("depthwise")
    y = check(layer, x)
    state = copy.deepcopy(layer.state_dict())
    layer.to("meta")
    with torch.no_grad():
        assert layer(x.to("meta")).device.type == "meta" and layer._rendered is None
    layer.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(check(layer, x), y)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), copy.copy])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_have_kernels_of_their_own(kind: str, duplicate: Callable[[Any], Any]) -> None:
    layer, x = layer_and_input(kind)
    y = check(layer, x)
    twin = duplicate(layer)
    assert twin._rendered is None
    assert torch.equal(check(twin, x), y)
    twin.weight = nn.Parameter(2 * twin.weight.detach())
    assert not torch.equal(check(twin, x), y)
    nn.init.normal_(layer.weight)
    assert not torch.equal(check(layer, x), y)


def test_files_do_not_grow() -> None:
    layer, x = layer_and_input("causal")

    def bytes_of(thing: object) -> int:
        file = io.BytesIO()
        torch.save(thing, file)
        return file.tell()

    names, before = list(layer.state_dict()), (bytes_of(layer.state_dict()), bytes_of(layer))
    check(layer, x)
    assert list(layer.state_dict()) == names and (bytes_of(layer.state_dict()), bytes_of(layer)) == before


def test_who_writes_to_a_kernel_spoils_nothing() -> None:
    for kind in KINDS:
        layer, x = layer_and_input(kind)
        y = check(layer, x)
        with torch.no_grad():
            layer.kernel().zero_()
            layer.kernel_for(x).zero_()
        assert torch.equal(check(layer, x), y)


# --- gradients


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_in_eval_mode(kind: str, without: Callable[[], Any]) -> None:
    layer, x = layer_and_input(kind)
    with without():
        layer(x)
    gradients = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    expected = torch.autograd.grad(layer.train()(x).square().sum(), list(layer.parameters()))
    for ours, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, reference)
        assert reference.abs().max() > 0
    with torch.no_grad():
        layer.eval()(x)
    assert layer(x).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_points_keep_their_kernel_while_inputs_learn(kind: str, renderings: list[None]) -> None:
    layer, x = layer_and_input(kind)
    for parameter in (layer.coords, layer.radius, layer.weight):
        parameter.requires_grad_(False)
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    (again,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert len(renderings) == 1 and torch.equal(gradient, again)
    layer.weight.requires_grad_()
    torch.autograd.grad(layer(x).square().sum(), layer.weight)
    assert len(renderings) == 2


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer, x = layer_and_input("dense")
        y = layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), 2 * y)
    assert layer._rendered is None


@pytest.mark.filterwarnings(SCRIPT_IS_DEPRECATED)
def test_derivatives_in_forward_mode_are_not_lost() -> None:
    layer, x = layer_and_input("dense", torch.float64)
    with torch.no_grad():
        layer(x)
    tangent = torch.randn_like(layer.weight)

    def answer(weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    weight = layer.weight.detach()
    _, derivative = torch.func.jvp(answer, (weight,), (tangent,))
    torch.testing.assert_close(derivative, (answer(weight + tangent) - answer(weight)).detach())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, tangent)
        # The rendering has no derivative of this kind: to say so is right, to answer without one is not.
        with pytest.raises(RuntimeError):
            layer.requires_grad_(False)
            answer(dual)


# --- threads


def in_threads(work: Callable[[int], None], number: int = 4) -> None:
    failures: list[BaseException] = []
    start = threading.Barrier(number)

    def run(i: int) -> None:
        try:
            start.wait()
            work(i)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("kind", KINDS)
def test_threads_get_right_answers(kind: str) -> None:
    for _ in range(5):
        layer, x = layer_and_input(kind)
        expected = fresh(layer, x)

        def work(i: int, layer: Any = layer, x: Tensor = x, expected: Tensor = expected) -> None:
            for _ in range(20):
                with torch.inference_mode() if i % 2 else torch.no_grad():
                    torch.testing.assert_close(layer(x), expected)

        in_threads(work)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_with_weights_of_their_own(kind: str) -> None:
    """The slot changes hands all the time."""
    layer, x = layer_and_input(kind)
    layer.bias = None
    y = fresh(layer, x)
    weights = [(1 + i) * layer.weight.detach() for i in range(4)]
    twins = [copy.copy(layer) for _ in weights]
    for twin, weight in zip(twins, weights, strict=True):
        # Copies of the module that share one slot by turns.
        twin._parameters = {**layer._parameters, "weight": nn.Parameter(weight)}

    def work(i: int) -> None:
        for _ in range(50):
            with torch.no_grad():
                twins[i]._rendered = layer._rendered
                torch.testing.assert_close(twins[i](x), (1 + i) * y, rtol=1e-4, atol=1e-4)
                layer._rendered = twins[i]._rendered

    in_threads(work)


def test_a_thread_that_changes_points_while_another_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_and_input("dense")
    render = layers.render_kernel

    def meanwhile(*args: Any) -> Tensor:
        kernel = render(*args)
        layer.weight.detach().mul_(2)
        monkeypatch.setattr(layers, "render_kernel", render)
        return kernel

    monkeypatch.setattr(layers, "render_kernel", meanwhile)
    with torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(check(layer, x), 2 * y)


# --- who records, records the rendering


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_others(kind: str) -> None:
    layer, x = layer_and_input(kind)
    layer.bias = None
    with torch.no_grad():
        y = layer(x)
        for factor in (2.0, 1.0, 3.0):
            swapped = torch.func.functional_call(layer, {"weight": factor * layer.weight}, (x,))
            torch.testing.assert_close(swapped, factor * y, rtol=1e-4, atol=1e-4)
            assert torch.equal(layer(x), y)
        each = torch.func.vmap(lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)))(
            torch.stack((layer.weight, 2 * layer.weight))
        )
        torch.testing.assert_close(each[1], 2 * y, rtol=1e-4, atol=1e-4)
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    layer, x = layer_and_input(kind)
    expected = fresh(layer, x)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = layer(x)
        assert mixed.dtype == torch.bfloat16
        torch.testing.assert_close(mixed.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
        assert layer._rendered is not None and layer._rendered.kernel.dtype == torch.float32
        assert torch.equal(layer(x), check(layer, x))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_follow_their_points(kind: str) -> None:
    torch.compiler.reset()
    layer, x = layer_and_input(kind)
    check(layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), fresh(layer, x), rtol=1e-5, atol=1e-5)
            layer.weight.data.mul_(2)
            torch.testing.assert_close(compiled(x), fresh(layer, x), rtol=1e-5, atol=1e-5)
            layer(x)


@pytest.mark.filterwarnings(SCRIPT_IS_DEPRECATED, "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("kind", "record"),
    # PyTorch cannot trace the transforms of the dense one.
    [
        (kind, record)
        for kind in KINDS
        for record in ("script", "trace", "export")
        if (kind, record) != ("dense", "trace")
    ],
)
def test_recordings_hold_points_not_kernels(kind: str, record: str) -> None:
    layer, x = layer_and_input(kind)
    layer.bias = None
    with torch.no_grad():
        y = layer(x)
        if record == "script":
            recording = torch.jit.script(layer)
        elif record == "trace":
            recording = torch.jit.trace(layer, (x,))
        else:
            recording = torch.export.export(layer, (x,)).module()
        torch.testing.assert_close(recording(x), y, rtol=1e-5, atol=1e-5)
        recording.load_state_dict({**layer.state_dict(), "weight": 2 * layer.weight})
        torch.testing.assert_close(recording(x), 2 * y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dispatch_modes_see_the_rendering_and_leave_nothing_behind(kind: str) -> None:
    layer, x = layer_and_input(kind)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True):
            layer(torch.empty(x.shape))
        assert layer._rendered is None
        y = check(layer, x)
        graph: Any = make_fx(lambda x, w: torch.func.functional_call(layer, {"weight": w}, (x,)))(x, layer.weight)
        torch.testing.assert_close(graph(x, layer.weight), y)
        assert not torch.allclose(graph(x, 2 * layer.weight), y)
        assert torch.equal(check(layer, x), y)


# --- on a GPU


def on_gpu(kind: str) -> tuple[Any, Tensor]:
    layer, x = layer_and_input(kind)
    return layer.cuda(), x.cuda()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_notices_changes_moves_and_streams(kind: str, renderings: list[None]) -> None:
    layer, x = on_gpu(kind)
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(layer(x), y) and len(renderings) == 1
        for name, change in {**TOLD, "AdamW, fused": UNTOLD["AdamW, fused"]}.items():
            layer.zero_grad()
            layer(x)
            change(layer)
            torch.testing.assert_close(layer(x), fresh(layer, x), msg=name)
        layer.zero_grad()
        layer(x)
        layer.weight.data.mul_(2)
        layer.eval()
        torch.testing.assert_close(layer(x), fresh(layer, x))
        torch.testing.assert_close(layer.cpu()(x.cpu()), fresh(layer, x.cpu()))
        layer.cuda()
        expected = layer(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        renderings.clear()
        with torch.cuda.stream(stream):
            torch.testing.assert_close(layer(x), expected)
        torch.cuda.synchronize()
        assert len(renderings) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_cuda_graph_renders_at_every_replay(kind: str) -> None:
    layer, x = on_gpu(kind)
    layer.bias = None
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        y = layer(x).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        graph.replay()
        torch.testing.assert_close(out, y)
        layer.weight.mul_(2)
        graph.replay()
        torch.testing.assert_close(out, 2 * y)
        torch.testing.assert_close(layer(x), 2 * y)

"""What only a GPU can show. Run with `pytest -m gpu`; elsewhere every test here says that it was skipped."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from tolerances import RELATIVE_ERROR, relative_error

import smpconv_zoo
from smpconv_zoo import layers, ops
from smpconv_zoo.kernels import render_kernel
from smpconv_zoo.layers import SMPConv1d
from smpconv_zoo.models.build import sample_shape
from smpconv_zoo.points import tap_grid
from smpconv_zoo.training.groups import sequence_parameter_groups
from smpconv_zoo.training.step import TrainingStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none"),
]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("shape", [(2, 6, 56, 56, 31), (1, 5, 14, 13, 27), (3, 4, 7, 7, 13)])
def test_depthwise_fft_equals_the_slow_twin(shape, dtype, tolerance):
    n, c, h, w, k = shape
    torch.manual_seed(0)
    x = torch.randn(n, c, h, w, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(c, 1, k, k, device="cuda", dtype=dtype, requires_grad=True)
    upstream = torch.randn_like(x)
    ours = ops.depthwise_conv2d(x, weight, backend="fft")
    exact_x, exact_weight = (t.detach().double().cpu().requires_grad_() for t in (x, weight))
    exact = ops.depthwise_conv2d_reference(exact_x, exact_weight)
    assert ours.dtype == dtype
    assert relative_error(ours.cpu(), exact) < tolerance
    gradients = torch.autograd.grad(ours, (x, weight), upstream)
    expected = torch.autograd.grad(exact, (exact_x, exact_weight), upstream.double().cpu())
    for gradient, reference in zip(gradients, expected, strict=True):
        assert relative_error(gradient.cpu(), reference) < tolerance


@pytest.mark.parametrize("length", [784, 161])
def test_causal_fft_equals_the_slow_twin(length):
    torch.manual_seed(0)
    x = torch.randn(2, 3, length, device="cuda")
    weight = torch.randn(4, 3, length, device="cuda")
    exact = ops.causal_conv1d_reference(x.double().cpu(), weight.double().cpu())
    # float32 rounding of sums over 3 * 784 products
    assert relative_error(ops.causal_conv1d(x, weight, backend="fft").cpu(), exact) < 2e-6


@pytest.mark.parametrize("name", ["test_smpconv", "test_smpconv_tcn", "smpconv_resnet_cifar"])
def test_a_network_gives_the_same_on_gpu_and_cpu(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    channels, height, width = model.pretrained_cfg["input_size"]
    x = torch.randn(2, channels, width) if "tcn" in name else torch.randn(2, channels, height, width)
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        on_cpu = model(x)
        on_gpu = model.cuda()(x.cuda()).cpu()
    # float32 through a dozen layers of untrained weights
    assert relative_error(on_gpu, on_cpu) < 1e-4


DEVICE = torch.device("cuda")
NETWORKS = (
    "test_smpconv_tcn",
    "smpconv_tcn_mnist",
    "smpconv_tcn_cifar",
    "smpconv_tcn_chartraj",
    "smpconv_tcn_speech_mfcc",
    "smpconv_tcn_speech_raw",
    "smpconv_resnet_cifar",
)


def network_and_batch(name, batch=4, seed=1):
    """Without dropout, on the CPU: a network, inputs and labels."""
    torch.manual_seed(0)
    model = timm.create_model(name, block_drop_rate=0.0)
    data = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *sample_shape(model), generator=data)
    y = torch.randint(0, model.num_classes, (batch,), generator=data)
    return model, x, y


def loss_and_gradients(model, x, y):
    loss = F.cross_entropy(model(x), y)
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def norm_error(ours, exact):
    """Relative error of all tensors together, in the norm."""
    ours, exact = (torch.cat([t.detach().double().cpu().flatten() for t in tensors]) for tensors in (ours, exact))
    return float((ours - exact).norm() / exact.norm())


class Exact:
    """A network in double precision on the CPU that takes two decisions as float32 does, or says that it cannot know.

    Whether a point touches a tap is float32's to say, and changes the count of that tap: kernels are rendered in it.
    Whether a ReLU lets a value next to zero through is rounding: ``unsure`` is the share of such values, summed over
    all ReLUs. One flip among N values changes a gradient by some 1 / sqrt(N).
    """

    def __init__(self, model, monkeypatch):
        self.model = copy.deepcopy(model).double().train()
        self.monkeypatch = monkeypatch
        self.unsure = 0.0

    def loss_and_gradients(self, x, y):
        relu, self.unsure = torch.relu, 0.0

        def watched(z):
            if z.shape[0] == len(x) and z.dtype == torch.float64:
                size = z.detach().abs()
                # Zero is the sum of two zeros, at any precision.
                near = (size > 0) & (size < 1e-6 * size.square().mean().sqrt())
                self.unsure += float(near.double().mean())
            return relu(z)

        def render(coords, radius, weight, grid, normalization):
            singles = (tensor.float() for tensor in (coords, radius, weight, grid))
            return render_kernel(*singles, normalization, renderer="scatter").double()

        with self.monkeypatch.context() as patch:
            patch.setattr(torch, "relu", watched)
            patch.setattr(layers, "render_kernel", render)
            return loss_and_gradients(self.model, x.double(), y)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_trains_on_the_gpu_as_in_double_precision(name, monkeypatch):
    exact = None
    # Of a few batches the one with the fewest undecided values; most networks meet one with none.
    for seed in range(1 if name == "smpconv_tcn_speech_raw" else 12):
        model, *batch = network_and_batch(name, seed=seed)
        candidate = Exact(model, monkeypatch)
        results = candidate.loss_and_gradients(*batch)
        if exact is None or candidate.unsure < exact.unsure:
            exact, (x, y), (expected, exact_gradients) = candidate, batch, results
        if exact.unsure == 0:
            break
    ours = copy.deepcopy(model).to(DEVICE)
    with torch.backends.cudnn.flags(allow_tf32=False):
        loss, gradients = loss_and_gradients(ours.train(), x.to(DEVICE), y.to(DEVICE))
    assert loss.item() == pytest.approx(expected.item(), rel=RELATIVE_ERROR["loss"])
    assert norm_error(gradients, exact_gradients) < RELATIVE_ERROR["gradient"] + exact.unsure**0.5
    for (buffer, value), other in zip(ours.named_buffers(), exact.model.buffers(), strict=True):
        # A mean over 3,000 values is next to zero, a fiftieth of their deviation; its rounding is that of the values.
        allowed = RELATIVE_ERROR["batch norm statistics"] * (5 if "mean" in buffer else 1)
        assert relative_error(value.cpu(), other) < allowed, buffer
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        logits, exact_logits = ours.eval()(x.to(DEVICE)), exact.model.eval()(x.double())
    # Double precision may see edges of points elsewhere.
    assert relative_error(logits.cpu(), exact_logits) < RELATIVE_ERROR["gradient"]


@pytest.mark.parametrize(("taps", "count"), [((784,), True), ((3000,), True), ((33, 33), True), ((31, 31), False)])
@pytest.mark.parametrize("radius", [1e-4, 0.02, 1.0])
def test_rendering_equals_the_slow_twin(taps, count, radius):
    torch.manual_seed(0)
    grid = tap_grid(taps, device="cuda")
    shared = not count
    sets, rows = ((), 40) if shared else ((7,), 7)
    coords = (torch.rand(*sets, 30, len(taps), device="cuda") * 2.4 - 1.2).requires_grad_()
    radii = torch.full((*sets, 30), radius, device="cuda").requires_grad_()
    weight = torch.randn(rows, 1 if shared else 5, 30, device="cuda").requires_grad_()
    normalization = "count" if count else "sum"
    ours = render_kernel(coords, radii, weight, grid, normalization, "scatter")
    slow = render_kernel(coords, radii, weight, grid, normalization, "dense")
    assert torch.equal(ours != 0, slow != 0)
    upstream = torch.randn_like(ours)
    found = torch.autograd.grad(ours, (coords, radii, weight), upstream)
    expected = torch.autograd.grad(slow, (coords, radii, weight), upstream)
    if slow.abs().max() > 0:
        assert relative_error(ours.detach().cpu(), slow.detach().cpu()) < 1e-6
        for gradient, reference in zip(found, expected, strict=True):
            # The slow twin's own float32 sums, over up to 3,000 taps of both signs, are no better.
            assert relative_error(gradient.cpu(), reference.cpu()) < 1e-5


def training_step(model, shape, graph):
    # Adam's first updates are +-lr whatever the size of a gradient, so that rounding alone decides the signs of those
    # of points that touch no tap. With a large eps updates follow the gradient.
    groups = [group | {"eps": 0.1} for group in sequence_parameter_groups(model, 1e-3, 0.0)]
    return TrainingStep(model, groups, DEVICE, graph=graph)


def trained(name, steps, graph):
    """Weights and losses after some steps on the GPU."""
    model, x, y = network_and_batch(name)
    model, x, y = model.cuda().train(), x.cuda(), y.cuda()
    step = training_step(model, x.shape, graph)
    with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        losses = [step(x.roll(i, -1), y).item() for i in range(steps)]
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, losses


def side_by_side(name, steps, move=None, change=None):
    """Check captured steps against plain ones, each from where the captured step before it has led.

    Left alone they part: an edge of a point that rounding puts on the other side of a tap changes the count there by
    one. ``change`` is called with the network before the step that ``move`` names. Returns the captured step.
    """
    model, x, y = network_and_batch(name)
    captured, x, y = model.cuda().train(), x.cuda(), y.cuda()
    plain = copy.deepcopy(captured)
    step, plain_step = training_step(captured, x.shape, graph=True), training_step(plain, x.shape, graph=False)
    for i in range(steps):
        if i == move:
            change(captured)
        plain.load_state_dict(captured.state_dict())
        for ours, other in zip(captured.parameters(), plain.parameters(), strict=True):
            state = step.optimizer.state.get(ours, {})
            plain_step.optimizer.state[other] = {key: value.clone() for key, value in state.items()}
        before = [parameter.detach().clone() for parameter in captured.parameters()]
        with torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
            loss, expected = (each(x.roll(i, -1), y).item() for each in (step, plain_step))
        assert loss == pytest.approx(expected, rel=RELATIVE_ERROR["loss"])
        updates, others = (
            [after.detach() - start for after, start in zip(each.parameters(), before, strict=True)]
            for each in (captured, plain)
        )
        # A ReLU whose input is next to zero may let through what the other one does not: 1 / sqrt(values) of it.
        assert norm_error(updates, others) < 2e-2
        for (key, value), other in zip(captured.named_buffers(), plain.buffers(), strict=True):
            if value.is_floating_point():
                assert (value - other).abs().max() <= 1e-4 * (1 + other.abs().max()), key
            else:
                assert torch.equal(value, other), key
    return step


@pytest.mark.slow
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_repeated_training_is_equal_to_the_last_bit(name, graph):
    first, losses = trained(name, 3, graph)
    second, others = trained(name, 3, graph)
    assert losses == others
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_captured_step_trains_as_plain_steps_do(name):
    assert side_by_side(name, 5).captures == 1


def move_a_point_back(model):
    layer = next(module for module in model.modules() if isinstance(module, SMPConv1d))
    with torch.no_grad():
        # The oldest tap: far behind whatever the first points reached.
        layer.coords[0, 0] = -1.0


@pytest.mark.parametrize("name", ["smpconv_tcn_mnist", "smpconv_tcn_speech_raw"])
def test_a_step_is_captured_again_when_a_point_leaves_its_room(name):
    assert side_by_side(name, 5, move=3, change=move_a_point_back).captures == 2


def test_autocast_gives_half_precision():
    model = timm.create_model("test_smpconv").cuda().eval()
    with torch.autocast("cuda", torch.bfloat16), torch.inference_mode():
        assert model(torch.randn(1, 3, 64, 64, device="cuda")).dtype == torch.bfloat16


def test_a_layer_keeps_its_device_and_dtype():
    layer = smpconv_zoo.SMPConv2d(4, 4, 7, groups=4, device="cuda", dtype=torch.float16)
    y = layer(torch.randn(1, 4, 9, 9, device="cuda", dtype=torch.float16))
    assert y.is_cuda
    assert y.dtype == torch.float16

"""What only a GPU can show. Run with `pytest -m gpu`; elsewhere every test here says that it was skipped."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from tolerances import relative_error

import smpconv_zoo
from smpconv_zoo import ops
from smpconv_zoo.kernels import render_kernel
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


TRAINED = ["smpconv_tcn_mnist", "smpconv_tcn_chartraj", "smpconv_tcn_speech_mfcc", "smpconv_resnet_cifar"]


def gradients(model, x, y):
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    flat = torch.cat([parameter.grad.double().cpu().flatten() for parameter in model.parameters()])
    return loss.detach().double().cpu(), flat


@pytest.mark.parametrize("name", TRAINED)
def test_training_equals_double_precision_on_the_cpu(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, block_drop_rate=0.0).train()
    x = torch.randn(4, *sample_shape(model))
    y = torch.arange(4)
    exact = copy.deepcopy(model).double()
    exact_loss, exact_gradients = gradients(exact, x.double(), y)
    on_gpu = copy.deepcopy(model).cuda()
    loss, ours = gradients(on_gpu, x.cuda(), y.cuda())
    assert abs(loss - exact_loss) < 1e-5
    # One ReLU at its edge, open here and closed there, moves all gradients before it by as much as one place in 3,000.
    assert relative_error(ours, exact_gradients) < 1e-3
    for ours_buffer, buffer in zip(on_gpu.buffers(), exact.buffers(), strict=True):
        assert relative_error(ours_buffer.double().cpu(), buffer.double()) < 1e-5
    with torch.inference_mode():
        logits = on_gpu.eval()(x.cuda()).cpu()
        assert relative_error(logits, exact.eval()(x.double())) < 1e-5


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_is_the_same_bit_for_bit(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, block_drop_rate=0.0).cuda().train()
    x = torch.randn(4, *sample_shape(model), device="cuda")
    y = torch.arange(4, device="cuda")
    first, second = (gradients(copy.deepcopy(model), x, y)[1] for _ in range(2))
    assert torch.equal(first, second)


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


def test_a_captured_step_trains_as_plain_steps_do():
    weights, losses = [], []
    for captured in (True, False):
        torch.manual_seed(0)
        model = timm.create_model("smpconv_tcn_chartraj", num_classes=10).cuda().train()
        step = TrainingStep(model, groups_of(model), (8, 3, 182), torch.device("cuda"), graph=captured)
        data = torch.Generator("cuda").manual_seed(1)
        x = torch.randn(5, 8, 3, 182, device="cuda", generator=data)
        y = torch.randint(0, 10, (5, 8), device="cuda", generator=data)
        losses.append([step(a, b).item() for a, b in zip(x, y, strict=True)])
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]).cpu())
        assert step.captures == (1 if captured else 0)
    # five Adam steps; the first updates are +-lr whatever the gradient, so rounding may move a loss in its 5th digit
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert relative_error(weights[0], weights[1]) < 1e-3


def test_a_point_that_leaves_the_room_of_a_captured_step_is_followed():
    torch.manual_seed(0)
    model = timm.create_model("smpconv_tcn_mnist").cuda().train()
    step = TrainingStep(model, groups_of(model), (4, 1, 784), torch.device("cuda"))
    x, y = torch.randn(4, 1, 784, device="cuda"), torch.arange(4, device="cuda")
    step(x, y)
    assert step.captures == 1
    with torch.no_grad():
        # The oldest tap: further back than the room that the first step left.
        model.blocks[2].conv1.large.conv.coords[3, 5] = -0.999
    step(x, y)
    captures = step.captures
    plain = copy.deepcopy(model)
    expected, _ = gradients(plain, x, y)
    assert abs(step(x, y).double().cpu() - expected) < 1e-5
    assert captures == 1 and step.captures == 2


def groups_of(model):
    return sequence_parameter_groups(model, 1e-3, 0.0)


def test_autocast_gives_half_precision():
    model = timm.create_model("test_smpconv").cuda().eval()
    with torch.autocast("cuda", torch.bfloat16), torch.inference_mode():
        assert model(torch.randn(1, 3, 64, 64, device="cuda")).dtype == torch.bfloat16


def test_a_layer_keeps_its_device_and_dtype():
    layer = smpconv_zoo.SMPConv2d(4, 4, 7, groups=4, device="cuda", dtype=torch.float16)
    y = layer(torch.randn(1, 4, 9, 9, device="cuda", dtype=torch.float16))
    assert y.is_cuda
    assert y.dtype == torch.float16

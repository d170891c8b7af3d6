"""What only a GPU can show. Run with `pytest -m gpu`; elsewhere every test here says that it was skipped."""

from __future__ import annotations

import pytest
import timm
import torch
from tolerances import relative_error

import smpconv_zoo
from smpconv_zoo import ops
from smpconv_zoo.training.recipe import load_recipe
from smpconv_zoo.training.sequence import _Step

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


def test_a_captured_step_trains_as_plain_steps_do():
    recipe = load_recipe("smpconv_tcn_mnist.smnist5k", batch_size=8, input_drop_rate=0.0)
    losses = []
    for captured in (True, False):
        torch.manual_seed(0)
        model = timm.create_model("test_smpconv_tcn").cuda().train()
        step = _Step(model, recipe, 32, torch.device("cuda"))
        data = torch.Generator("cuda").manual_seed(1)
        x = torch.randn(5, 8, 1, 32, device="cuda", generator=data)
        y = torch.randint(0, 10, (5, 8), device="cuda", generator=data)
        run = step if captured else _plain(step)
        losses.append([run(a, b).item() for a, b in zip(x, y, strict=True)])
    # five Adam steps; the first updates are +-lr whatever the gradient, so rounding may move a loss in its 5th digit
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def _plain(step):
    def run(x, y):
        step.x.copy_(x)
        step.y.copy_(y)
        step._run()
        return step.loss

    return run


def test_autocast_gives_half_precision():
    model = timm.create_model("test_smpconv").cuda().eval()
    with torch.autocast("cuda", torch.bfloat16), torch.inference_mode():
        assert model(torch.randn(1, 3, 64, 64, device="cuda")).dtype == torch.bfloat16


def test_a_layer_keeps_its_device_and_dtype():
    layer = smpconv_zoo.SMPConv2d(4, 4, 7, groups=4, device="cuda", dtype=torch.float16)
    y = layer(torch.randn(1, 4, 9, 9, device="cuda", dtype=torch.float16))
    assert y.is_cuda
    assert y.dtype == torch.float16

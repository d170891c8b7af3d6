"""On a CPU, outside training, image networks choose their layout and cut their work. No answer changes."""

from __future__ import annotations

import pytest
import timm
import torch
from tolerances import RELATIVE_ERROR, relative_error
from torch import Tensor, nn

from smpconv_zoo.models import image
from smpconv_zoo.ops import onednn

needs_avx512 = pytest.mark.skipif(onednn._why_no_kernel() is not None, reason="needs a CPU with AVX-512")


@pytest.fixture(params=["as created", "merged"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    network = timm.create_model("test_smpconv", kernel_sizes=(31, 15, 13, 9)).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
    if request.param == "merged":
        network.reparameterize()
    return network


def plain_answer(model: nn.Module, x: Tensor) -> Tensor:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(image, "_may_arrange", lambda x: False)
        answer: Tensor = model(x)
    return answer


@pytest.mark.parametrize("size", [(64, 64), (75, 101), (33, 200), (1, 1), (7, 31)])
@pytest.mark.parametrize("hidden_bytes", [1, 2**15, 2**30])
def test_answers_stay(
    model: nn.Module, size: tuple[int, int], hidden_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 3, *size)
    expected = plain_answer(model, x)
    monkeypatch.setattr(image, "_HIDDEN_BYTES", hidden_bytes)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.flip(3).contiguous().flip(3)):
        with torch.inference_mode():
            assert relative_error(model(given), expected) < RELATIVE_ERROR["forward"]


def test_features_come_in_the_layout_of_the_images(model: nn.Module) -> None:
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        features, intermediates = model.forward_intermediates(x)
        assert features.is_contiguous()
        assert all(feature.is_contiguous() for feature in intermediates)
        assert model.forward_features(x).view(2, -1).shape == (2, features[0].numel())
        last = model.forward_features(x.contiguous(memory_format=torch.channels_last))
    assert relative_error(last, features) < RELATIVE_ERROR["forward"]


@needs_avx512
def test_maps_have_their_channels_innermost(model: nn.Module) -> None:
    seen = []
    model.stages[0].register_forward_hook(lambda module, arguments, y: seen.append(arguments[0]))
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    assert onednn.is_channels_last(seen[0])


def test_who_listens_to_a_layer_hears_of_the_whole_batch(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "_HIDDEN_BYTES", 1)
    seen = []
    model.stages[0].blocks[0].channel.pw1.register_forward_hook(lambda module, arguments, y: seen.append(len(y)))
    with torch.no_grad():
        model(torch.randn(3, 3, 64, 64))
    assert seen == [3]


def test_gradients_in_eval_mode_are_those_of_the_plain_network(model: nn.Module) -> None:
    x = torch.randn(2, 3, 48, 48, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image, "_may_arrange", lambda x: False)
        (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    assert relative_error(gradient, expected) < RELATIVE_ERROR["forward"]

"""Feature maps at any input size, and a detector of torchvision's on top of them."""

from __future__ import annotations

import importlib.util
import math
import sys
from typing import Any

import pytest
import timm
import torch
from golden_files import ROOT

import smpconv_zoo  # noqa: F401  (registers the networks)


def maps(name: str, height: int, width: int, **arguments: Any) -> tuple[Any, list[torch.Tensor]]:
    body: Any = timm.create_model(name, features_only=True, **arguments).eval()
    with torch.inference_mode():
        return body, body(torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("size", [(75, 101), (64, 64), (97, 33), (1, 1), (31, 200)])
@pytest.mark.parametrize("out_indices", [None, (0, 2), (1, 2, 3), (-2, -1)])
def test_maps_are_as_large_as_the_image_over_their_stride_rounded_up(
    size: tuple[int, int], out_indices: tuple[int, ...] | None
) -> None:
    asked = {} if out_indices is None else {"out_indices": out_indices}
    body, found = maps("test_smpconv", *size, **asked)
    strides, channels = body.feature_info.reduction(), body.feature_info.channels()
    assert strides == [4 * 2**i for i in (range(4) if out_indices is None else (i % 4 for i in out_indices))]
    assert len(found) == len(strides)
    for one, stride, width in zip(found, strides, channels, strict=True):
        assert one.shape == (2, width, *(math.ceil(n / stride) for n in size))
        assert torch.isfinite(one).all()


def test_a_map_is_at_its_stride_and_not_shifted() -> None:
    """Moving the picture by one stride moves the map by one place, away from the borders."""
    torch.manual_seed(0)
    body: Any = timm.create_model("test_smpconv", features_only=True, out_indices=(0,), kernel_sizes=3).eval()
    stride = body.feature_info.reduction()[0]
    x = torch.randn(1, 3, 101, 75)
    with torch.inference_mode():
        one, moved = body(x)[0], body(x.roll((stride, 2 * stride), (2, 3)))[0]
    torch.testing.assert_close(moved[:, :, 9:-8, 10:-8], one[:, :, 8:-9, 8:-10], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_large_network_at_an_odd_size() -> None:
    body, found = maps("smpconv_t", 75, 101)
    for one, stride, width in zip(found, (4, 8, 16, 32), (96, 192, 384, 768), strict=True):
        assert one.shape == (2, width, math.ceil(75 / stride), math.ceil(101 / stride))
    assert body.feature_info.reduction() == [4, 8, 16, 32]


def test_networks_of_one_resolution_keep_the_size() -> None:
    body: Any = timm.create_model("smpconv_resnet", features_only=True, dims=(4, 6), kernel_size=5).eval()
    with torch.inference_mode():
        assert [tuple(one.shape) for one in body(torch.zeros(1, 3, 13, 9))] == [(1, 4, 13, 9), (1, 6, 13, 9)]


def test_a_detector_learns() -> None:
    spec = importlib.util.spec_from_file_location("retinanet_example", ROOT / "examples" / "retinanet.py")
    assert spec is not None and spec.loader is not None
    example: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    torch.manual_seed(0)
    detector = example.build_detector("test_smpconv", num_classes=2)
    with torch.no_grad():
        pyramid = detector.backbone(torch.zeros(1, 3, 75, 101))
    expected = [tuple(math.ceil(n / stride) for n in (75, 101)) for stride in example.STRIDES]
    assert [tuple(one.shape[2:]) for one in pyramid.values()] == expected
    losses = example.train(detector, steps=24)
    assert sum(losses[-3:]) / 3 < 0.75 * losses[0]
    for name, parameter in detector.backbone.body.named_parameters():
        # The last stage's classifier is gone; all else has to have been reached by the loss.
        assert parameter.grad is not None, name

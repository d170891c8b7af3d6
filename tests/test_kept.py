"""What is kept of a kernel is never taken for another one's."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from tolerances import relative_error
from torch import Tensor, nn

from smpconv_zoo.ops import (
    causal_conv1d,
    causal_conv1d_with,
    conv2d,
    conv2d_with,
    depthwise_conv2d_with,
    kept,
)
from smpconv_zoo.ops.kept import KernelCache


def convolve(x: Tensor, weight: Tensor, cache: KernelCache | None) -> Tensor:
    return depthwise_conv2d_with(cache, x, weight, "fft")


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every spectrum that is computed rather than found."""
    computed: list[int] = []
    real = KernelCache.get

    def spy(self: KernelCache, kernel: Tensor, key: object, compute: Callable[[], Tensor]) -> Tensor:
        return real(self, kernel, key, lambda: (computed.append(1), compute())[1])

    monkeypatch.setattr(KernelCache, "get", spy)
    return computed


@torch.no_grad()
def test_the_same_kernel_is_transformed_once(counts: list[int]) -> None:
    cache, weight = KernelCache(), nn.Parameter(torch.randn(3, 1, 5, 5))
    for _ in range(3):
        x = torch.randn(2, 3, 9, 8)
        assert torch.equal(convolve(x, weight, cache), convolve(x, weight, None))
    assert len(counts) == 1
    # Another size has another spectrum; a few of them are kept.
    for size in (10, 12, 10, 12):
        x = torch.randn(1, 3, size, size)
        assert torch.equal(convolve(x, weight, cache), convolve(x, weight, None))
    assert len(counts) == 3


def edits() -> dict[str, Callable[[nn.Module], object]]:
    def optimize(module: nn.Module) -> None:
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    def half_and_back(module: nn.Module) -> None:
        # The new tensor must not be taken for the old one should it come to lie where that was.
        module.half().float()

    def replace(module: nn.Module) -> None:
        module.weight = nn.Parameter(torch.randn_like(module.weight))  # type: ignore[arg-type]

    return {
        "in place": lambda module: module.weight.mul_(2),  # type: ignore[operator]
        "load_state_dict": lambda module: module.load_state_dict({"weight": torch.randn(3, 1, 5, 5)}),
        "optimizer": optimize,
        "half and back": half_and_back,
        "double": lambda module: module.double(),
        "another parameter": replace,
    }


@pytest.mark.parametrize("edit", edits())
def test_a_changed_kernel_is_transformed_again(edit: str) -> None:
    cache, module = KernelCache(), nn.Conv2d(3, 3, 5, groups=3, bias=False)
    x = torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        for _ in range(3):
            convolve(x, module.weight, cache)
            edits()[edit](module)
            x = x.to(module.weight.dtype)
            assert torch.equal(convolve(x, module.weight, cache), convolve(x, module.weight, None))


def test_gradients_flow_and_nothing_of_inference_mode_stays() -> None:
    cache, weight, x = KernelCache(), nn.Parameter(torch.randn(3, 1, 5, 5)), torch.randn(2, 3, 9, 8)
    with torch.inference_mode():
        convolve(x, weight, cache)
    convolve(x, weight, cache).sum().backward()
    assert weight.grad is not None
    frozen = weight.detach()
    x.requires_grad_()
    convolve(x, frozen, cache).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert torch.equal(convolve(x, weight, cache), convolve(x, weight, None))
    with torch.inference_mode():
        made_here = torch.randn(3, 1, 5, 5)
        for _ in range(2):
            assert torch.equal(convolve(x, made_here, cache), convolve(x, made_here, None))
            made_here.mul_(2)


def test_copies_and_pickles_start_empty() -> None:
    cache = KernelCache()
    with torch.no_grad():
        convolve(torch.randn(1, 3, 9, 8), torch.randn(3, 1, 5, 5), cache)
    assert cache._kept is not None
    assert copy.deepcopy(cache)._kept is None
    assert pickle.loads(pickle.dumps(cache))._kept is None
    cache.clear()
    assert cache._kept is None


@torch.no_grad()
def test_large_spectra_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_KEPT_BYTES", 100)
    cache = KernelCache()
    convolve(torch.randn(1, 3, 9, 8), torch.randn(3, 1, 5, 5), cache)
    assert cache._kept is None


@torch.no_grad()
def test_of_large_spectra_the_last_one_is_kept(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_SMALL_BYTES", 3000)
    cache, weight = KernelCache(), nn.Parameter(torch.randn(3, 1, 5, 5))
    for size, computed in ((9, 1), (30, 2), (30, 2), (9, 2), (40, 3), (40, 3), (9, 3), (30, 4)):
        x = torch.randn(1, 3, size, size)
        assert torch.equal(convolve(x, weight, cache), convolve(x, weight, None))
        assert len(counts) == computed, size


@torch.no_grad()
def test_threads_share_a_cache() -> None:
    cache, weight = KernelCache(), nn.Parameter(torch.randn(3, 1, 5, 5))
    inputs = [torch.randn(1, 3, 6 + i % 3, 7) for i in range(24)]
    expected = [convolve(x, weight, None) for x in inputs]
    wrong: list[int] = []

    def work(first: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                for i in range(first, len(inputs), 4):
                    if not torch.equal(convolve(inputs[i], weight, cache), expected[i]):
                        wrong.append(i)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_dense_and_causal_convolutions_keep_spectra_too(counts: list[int]) -> None:
    maps, kernel, bias = torch.randn(2, 3, 9, 8), torch.randn(4, 3, 5, 5), torch.randn(4)
    sequences, taps = torch.randn(2, 3, 40), torch.randn(4, 3, 30)
    for cache in (KernelCache(), KernelCache()):
        for _ in range(2):
            of_maps = conv2d_with(cache, maps, kernel, bias, "fft")
            assert relative_error(of_maps, conv2d(maps, kernel, bias, "reference")) < 1e-6
    for cache in (KernelCache(), KernelCache()):
        for _ in range(2):
            of_sequences = causal_conv1d_with(cache, sequences, taps, bias, "fft")
            assert relative_error(of_sequences, causal_conv1d(sequences, taps, bias, "reference")) < 1e-6
    assert len(counts) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none")
@torch.no_grad()
def test_graphs_and_other_streams_keep_to_themselves(counts: list[int]) -> None:
    cache, weight = KernelCache(), torch.randn(3, 1, 5, 5, device="cuda")
    x = torch.randn(2, 3, 9, 8, device="cuda")
    expected = convolve(x, weight, None)
    assert torch.equal(convolve(x, weight, cache), expected)
    kept_before = cache._kept
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = convolve(x, weight, cache)
    assert cache._kept is kept_before
    cache.clear()
    weight.mul_(2)
    graph.replay()
    assert torch.equal(y, convolve(x, weight, None))
    convolve(x, weight, cache)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    before = len(counts)
    with torch.cuda.stream(other):
        convolve(x, weight, cache)
    assert len(counts) == before + 1

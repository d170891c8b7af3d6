"""Time every backend of the convolutions, and what `auto` takes, side by side in one run.

    python eval/bench_convolution.py --device cpu > eval/results/convolution_cpu.txt

Medians over repeated calls after a warm-up; `train` is forward and both gradients. On a CPU only the ratios mean
anything to another machine. The thresholds in smpconv_zoo/ops/dispatch.py were read off these tables.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from smpconv_zoo import ops
from smpconv_zoo.environment import hardware, versions
from smpconv_zoo.ops.dispatch import _choose
from smpconv_zoo.ops.fft import Depthwise
from smpconv_zoo.ops.onednn import _direct_pays, _weight_directly, _why_no_kernel

# (channels, map, kernel): the four stages of SMPConvNet-T at 224 pixels, then smaller kernels around the crossover.
DEPTHWISE = [
    (96, 56, 31), (192, 28, 29), (384, 14, 27), (768, 7, 13),
    (96, 56, 17), (96, 56, 15), (96, 56, 13), (96, 56, 7), (384, 14, 15), (384, 14, 13), (384, 14, 7),
    (96, 56, 5), (192, 28, 5), (384, 14, 5), (768, 7, 5),
]  # fmt: skip
# The gradient to the kernel alone, also where maps are of another size.
TO_WEIGHT = [*DEPTHWISE, (96, 48, 31), (192, 24, 29), (384, 12, 23), (384, 10, 19), (384, 8, 15), (96, 112, 3)]
# (in, out, length, taps): the sequence networks' own, then short kernels.
CAUSAL = [
    (30, 30, 784, 784), (1, 30, 784, 784), (30, 30, 1024, 1024), (30, 30, 182, 182), (30, 30, 161, 161),
    (30, 30, 784, 128), (30, 30, 784, 64), (30, 30, 784, 32), (30, 30, 784, 5),
]  # fmt: skip
# (in, out, map, kernel): the CIFAR network's own, then smaller.
DENSE = [(24, 24, 32, 33), (48, 48, 32, 33), (3, 24, 32, 33), (24, 24, 32, 17), (24, 24, 32, 9), (24, 24, 32, 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    write(f"command: {' '.join(sys.argv)}")
    write(f"hardware: {hardware(device)}; versions: {versions()}; float32, batch {args.batch_size}, milliseconds")
    write(f"TF32 allowed: matmul {torch.backends.cuda.matmul.allow_tf32}, cudnn {torch.backends.cudnn.allow_tf32}")
    for title, function, layout, shapes in (
        ("depthwise_conv2d (C, H = W, K)", ops.depthwise_conv2d, torch.contiguous_format, DEPTHWISE),
        ("the same, channels last", ops.depthwise_conv2d, torch.channels_last, DEPTHWISE),
        ("causal_conv1d (I, O, L, K)", ops.causal_conv1d, torch.contiguous_format, CAUSAL),
        ("conv2d (I, O, H = W, K)", ops.conv2d, torch.contiguous_format, DENSE),
    ):
        half = "".join(f"{name:>10}" for name in BACKENDS) + f"{'auto':>10}"
        write(f"\n{title:32}{half}   training:{half}")
        for shape in shapes:
            x, weight = tensors(function, shape, args.batch_size, device)
            x = x.contiguous(memory_format=layout)
            forward = row(function, function, x, weight, args.repeats)
            x.requires_grad_()
            weight.requires_grad_()
            train = row(partial(step, function), function, x, weight, args.repeats)
            write(f"{shape!s:32}{forward}            {train}")
    if _why_no_kernel() is None and device.type == "cpu":
        write_gradients_to_weight(args.batch_size, args.repeats)


def write_gradients_to_weight(batch: int, repeats: int) -> None:
    """Of a depthwise convolution: PyTorch's own, through the FFT, directly by forward convolutions, the one taken."""
    head = f"{'PyTorch':>10}{'fft':>10}{'directly':>10}{'taken':>10}"
    write(f"\n{'gradient to a depthwise kernel':32}{head}   channels last:{head}")
    for shape in TO_WEIGHT:
        line = f"{shape!s:32}"
        for layout in (torch.contiguous_format, torch.channels_last):
            x, weight = tensors(ops.depthwise_conv2d, shape, batch, torch.device("cpu"))
            x = x.contiguous(memory_format=layout)
            grad = torch.randn_like(x)
            taps = list(weight.shape[2:])
            places = [t // 2 for t in taps]
            ways = (
                partial(torch.nn.grad.conv2d_weight, x, weight.shape, grad, padding=places, groups=x.shape[1]),
                partial(Depthwise(x.shape[2:], taps, places).weight_gradient, grad, x),
                partial(_weight_directly, grad, x, taps),
            )
            line += "".join(f"{timed(way, repeats, x.device):10.3f}" for way in ways)
            line += f"{'directly' if _direct_pays(x, taps) else 'fft':>10}" + " " * 17
        write(line.rstrip())


BACKENDS = ("reference", "fft", "onednn")


def row(work: Callable, function: Callable, x: Tensor, weight: Tensor, repeats: int) -> str:
    """Milliseconds of every backend that can run, and the one that `auto` takes."""
    depthwise = function is ops.depthwise_conv2d
    cells = []
    for backend in BACKENDS:
        runs = ops.why_not(x, weight)[backend] is None and (depthwise or backend != "onednn")
        cells.append(
            f"{timed(partial(work, x, weight, backend=backend), repeats, x.device):10.3f}" if runs else f"{'':10}"
        )
    return "".join(cells) + f"{_choose(x, weight, 'auto', depthwise=depthwise):>10}"


def tensors(function: Callable, shape: tuple[int, ...], batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    if function is ops.depthwise_conv2d:
        channels, size, taps = shape
        return torch.randn(batch, channels, size, size, device=device), torch.randn(
            channels, 1, taps, taps, device=device
        )
    inputs, outputs, size, taps = shape
    dims = 1 if function is ops.causal_conv1d else 2
    x = torch.randn(batch, inputs, *[size] * dims, device=device)
    return x, torch.randn(outputs, inputs, *[taps] * dims, device=device)


def step(function: Callable, x: Tensor, weight: Tensor, backend: str) -> None:
    y = function(x, weight, backend=backend)
    torch.autograd.grad(y, (x, weight), torch.ones_like(y))


def timed(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

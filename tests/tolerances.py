"""Every tolerance of the equality tests against the reference, in one table.

The error of a tensor is ``max |ours - reference| / max |reference|``. The reference computed in float32 on another
machine, through other sums: what is asked for is float32 rounding at the depth of the network, no more.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_ERROR = {
    "kernel": 1e-6,
    # Every way to render against the dense one in the same precision, in the norm, where no terms cancel.
    "rendered": 1e-6,
    "rendered, gradient": 1e-5,
    # Sums over up to 16,000 taps in float32, in which signs cancel.
    "kernel, summed": 1e-6,
    # Every kernel against double precision, in the norm: float32 rounding of sums over up to thousands of terms, and
    # of cuDNN's Winograd transforms (2.1e-6 seen) where few taps on maps go through it.
    "GPU kernel": 3e-6,
    # Inputs of 100 with a deviation of 1: a hundred times the rounding of the inputs themselves, which is shared.
    "GPU kernel, normalised": 2e-5,
    "forward": 1e-5,
    # 48 and 96 blocks deep, with weights of no training; the golden's README gives per-channel means only.
    "forward, full size": 1e-5,
    # The golden's own FFT and direct paths differ by up to 1.2e-4 at logits of standard deviation 10 to 21.
    "forward, through the FFT": 1e-5,
    # Twelve convolutions in float32, a large and a small one summed before they are applied, not after.
    "streamed": 1e-5,
    # Other runtimes, norms multiplied into the weights in double precision; what the exporter itself allows is more.
    "exported": 1e-5,
    # Kernels, norms and 1x1 convolutions multiplied out before they are applied, in float32; and in double precision.
    "merged": 1e-5,
    "merged, float64": 1e-12,
    "loss": 1e-5,
    # Gradients of a tiny network in train mode: sums over few values, through batch norms with batches of 4.
    "gradient": 1e-4,
    "batch norm statistics": 1e-5,
    # AdamW divides by the root of a squared gradient: relative errors of the gradient come through one to one.
    "optimizer step": 1e-5,
    # An average with a decay of 0.9999 moves by a ten-thousandth of a step or a clip: at 1e-5, none of it would show.
    # One float32 rounding is 6e-8.
    "averaged weights": 2e-7,
    # Six to nine optimizer steps amplify rounding; the golden's own reordered batches move losses by 2e-5.
    "trajectory": 1e-4,
}

# Of the compiled CUDA operator, in the norm: float32 sums, of which only the result is rounded, to 8 or 11 bits.
CUDA_OPERATOR = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """``max |ours - reference| / max |reference|`` in float64; 0 for two empty or two zero tensors."""
    assert ours.shape == reference.shape, f"shape {tuple(ours.shape)}, reference {tuple(reference.shape)}"
    if reference.numel() == 0:
        return 0.0
    ours, reference = ours.detach().double(), reference.detach().double()
    scale = reference.abs().max().item()
    error = (ours - reference).abs().max().item()
    return error / scale if scale else error


def assert_equal_to_reference(ours: Tensor, reference: Tensor, kind: str, what: str = "") -> None:
    error = relative_error(ours, reference)
    assert error <= RELATIVE_ERROR[kind], (
        f"{what}: relative error {error:.2e}, allowed {RELATIVE_ERROR[kind]:.0e} ({kind})"
    )


def load(path: object) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(str(path))


def numpy_uniform(name: str, shape: torch.Size) -> Tensor:
    """The name-keyed draw of the goldens' README."""
    import zlib

    import numpy as np

    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).random_sample(tuple(shape)))

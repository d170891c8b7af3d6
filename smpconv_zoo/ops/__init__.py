"""The only doors to convolution. Slow twins in :mod:`.reference`, the choice of backend in :mod:`.dispatch`."""

from smpconv_zoo.ops.dispatch import (
    BACKENDS,
    causal_conv1d,
    causal_conv1d_with,
    conv2d,
    conv2d_with,
    depthwise_conv2d,
    depthwise_conv2d_with,
    reachable_same,
    why_not,
)
from smpconv_zoo.ops.kept import KernelCache
from smpconv_zoo.ops.norm import norm_sum, unheard, why_not_fused
from smpconv_zoo.ops.onednn import prefers_channels_last
from smpconv_zoo.ops.pair import can_run_pair, convolve_pair
from smpconv_zoo.ops.reference import causal_conv1d_reference, conv2d_reference, depthwise_conv2d_reference

__all__ = [
    "BACKENDS",
    "KernelCache",
    "can_run_pair",
    "causal_conv1d",
    "causal_conv1d_reference",
    "causal_conv1d_with",
    "conv2d",
    "conv2d_reference",
    "conv2d_with",
    "convolve_pair",
    "depthwise_conv2d",
    "depthwise_conv2d_reference",
    "depthwise_conv2d_with",
    "norm_sum",
    "prefers_channels_last",
    "reachable_same",
    "unheard",
    "why_not",
    "why_not_fused",
]

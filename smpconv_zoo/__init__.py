"""SMPConv networks for timm: continuous convolution kernels made of points that move.

Importing this package registers every network with timm, and lets timm's ``hf-hub:`` names fail within seconds where
the Hub is out of reach (:mod:`smpconv_zoo.pretrained.hub_names`); nothing else happens.
"""

from smpconv_zoo import ops
from smpconv_zoo._version import __version__
from smpconv_zoo.checkpoints import convert_checkpoint, create_model
from smpconv_zoo.kernels import render_kernel
from smpconv_zoo.layers import SMPConv1d, SMPConv2d, attach_radius_clip, clip_radius_
from smpconv_zoo.pretrained.cards import list_checkpoints
from smpconv_zoo.pretrained.home import card_in_use as checkpoint_card
from smpconv_zoo.streaming import CausalStream

__all__ = [
    "CausalStream",
    "SMPConv1d",
    "SMPConv2d",
    "__version__",
    "attach_radius_clip",
    "checkpoint_card",
    "clip_radius_",
    "convert_checkpoint",
    "create_model",
    "list_checkpoints",
    "ops",
    "render_kernel",
]

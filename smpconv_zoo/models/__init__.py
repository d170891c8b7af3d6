"""The networks; importing this package registers them with timm, and quickens its ``hf-hub:`` names' failures."""

from smpconv_zoo.models.image import SMPConvNet
from smpconv_zoo.models.sequence import SMPConvResNet, SMPConvTCN
from smpconv_zoo.pretrained.hub_names import look_before_timm

__all__ = ["SMPConvNet", "SMPConvResNet", "SMPConvTCN"]

look_before_timm()

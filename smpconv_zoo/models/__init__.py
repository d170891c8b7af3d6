"""The networks; importing this package registers them with timm."""

from smpconv_zoo.models.image import SMPConvNet
from smpconv_zoo.models.sequence import SMPConvResNet, SMPConvTCN

__all__ = ["SMPConvNet", "SMPConvResNet", "SMPConvTCN"]

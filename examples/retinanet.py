"""Object detection with an SMPConvNet backbone: torchvision's FPN and RetinaNet over timm's feature maps.

Trains a few steps on synthetic pictures, bright rectangles on noise, to show how the parts go together; it runs on a
CPU in seconds. For a detector worth the name, take `--backbone smpconv_t`, pretrained weights and your own pictures.

    python examples/retinanet.py --steps 24
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import smpconv_zoo

# The strides of the pyramid: those of the last three stages, and of two coarser maps that the FPN adds.
STRIDES = (8, 16, 32, 64, 128)


class PyramidBackbone(nn.Module):
    """The stages of a timm network at strides 8, 16 and 32, through an FPN; what torchvision's detectors ask for."""

    def __init__(self, name: str, out_channels: int, pretrained: bool = False) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=(1, 2, 3), pretrained=pretrained)
        channels = self.body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(channels, out_channels, LastLevelP6P7(out_channels, out_channels))
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``(N, 3, H, W)`` -> maps ``(N, out_channels, ceil(H / stride), ceil(W / stride))``, fine to coarse."""
        maps = self.body(images)
        return self.fpn(OrderedDict((str(level), one) for level, one in enumerate(maps)))


def build_detector(backbone: str, num_classes: int, pretrained: bool = False, size: int = 96) -> RetinaNet:
    """RetinaNet for pictures of ``size`` pixels, with three shapes of anchors in three sizes at each place."""
    sizes = tuple(tuple(round(2 * stride * 2 ** (third / 3)) for third in range(3)) for stride in STRIDES)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(STRIDES))
    body = PyramidBackbone(backbone, out_channels=64, pretrained=pretrained)
    return RetinaNet(body, num_classes, anchor_generator=anchors, min_size=size, max_size=2 * size)


def pictures(count: int, generator: torch.Generator) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Noise with one bright rectangle each, of sizes that are no multiples of 32, and where the rectangles are."""
    images, targets = [], []
    for _ in range(count):
        height, width = (int(n) for n in torch.randint(75, 110, (2,), generator=generator))
        image = 0.2 * torch.rand(3, height, width, generator=generator)
        high, wide = (int(n) for n in torch.randint(20, 40, (2,), generator=generator))
        top = int(torch.randint(0, height - high, (1,), generator=generator))
        left = int(torch.randint(0, width - wide, (1,), generator=generator))
        label = int(torch.randint(0, 2, (1,), generator=generator))
        image[label, top : top + high, left : left + wide] += 0.8
        images.append(image)
        box = torch.tensor([[left, top, left + wide, top + high]], dtype=torch.float32)
        targets.append({"boxes": box, "labels": torch.tensor([label])})
    return images, targets


def train(detector: RetinaNet, steps: int, lr: float = 2e-4, seed: int = 0) -> list[float]:
    """Steps on the same four pictures; the loss before each."""
    images, targets = pictures(4, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(detector.parameters(), lr=lr)
    detector.train()
    losses = []
    for _ in range(steps):
        loss = sum(detector(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        smpconv_zoo.clip_radius_(detector)
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="test_smpconv")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    torch.manual_seed(0)
    detector = build_detector(args.backbone, num_classes=2, pretrained=args.pretrained)
    for step, loss in enumerate(train(detector, args.steps), start=1):
        sys.stdout.write(f"step {step:3}  loss {loss:.4f}\n")


if __name__ == "__main__":
    main()

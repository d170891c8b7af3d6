"""Run timm's own train.py with the networks of this package, radii clipped after every step.

`train.py` is in timm's repository (https://github.com/huggingface/pytorch-image-models), not in its wheel; its options
follow as ever:

    python examples/timm_train.py PATH/TO/train.py --model smpconv_t --data-dir my_images --num-classes 7 \
        --opt adamw --lr 5e-4 --layer-decay 0.75 --weight-decay 0.05 --epochs 30

Under torchrun, put `torchrun --nproc-per-node 4` in the place of `python`.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import timm.optim
from torch import nn
from torch.optim import Optimizer

import smpconv_zoo

make_optimizer = timm.optim.create_optimizer_v2


def make_clipping_optimizer(model: Any, *args: Any, **kwargs: Any) -> Optimizer:
    """timm's optimizer, with :func:`smpconv_zoo.attach_radius_clip`."""
    optimizer = make_optimizer(model, *args, **kwargs)
    if isinstance(model, nn.Module):
        smpconv_zoo.attach_radius_clip(optimizer, model)
    return optimizer


def main() -> None:
    if len(sys.argv) < 2 or not sys.argv[1].endswith(".py"):
        sys.exit("usage: python examples/timm_train.py PATH/TO/train.py [options of train.py]")
    timm.optim.create_optimizer_v2 = make_clipping_optimizer
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

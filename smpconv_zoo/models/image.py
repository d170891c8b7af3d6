"""SMPConvNet: an image network of large continuous kernels.

Paper: Kim & Park, "SMPConv: Self-moving Point Representations for Continuous Convolution", CVPR 2023, arXiv 2304.02330,
section 4.3. Origin: https://github.com/sangnekim/SMPConv (MIT licence, code and weights), whose networks these equal
weight for weight and number for number; the body follows RepLKNet (arXiv 2203.06717) with the fixed large kernels
replaced by points.

A stage halves the map and widens it, then repeats a block of two residual halves: mixing in space (1x1, large + small
depthwise kernel, 1x1) and mixing of channels (1x1, GELU, 1x1). Every convolution has its batch norm, every half another
in front.
"""

# Annotations are not postponed in this file: torch.fx would copy their text into its graphs, where TorchScript cannot
# resolve it.

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, get_device_dtype, trunc_normal_
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from smpconv_zoo.layers import ConvNorm, ConvNormAct, FinalNorm, LargeSmallConv, SMPConv2d, parameter_roles
from smpconv_zoo.merged import MergingNet
from smpconv_zoo.models.build import (
    IMAGE_POOLS,
    PAPER,
    ImageHead,
    build_smpconv,
    check_arguments,
    check_head,
    check_input,
    checkpoint_cfgs,
    per_stage,
    recompute,
)
from smpconv_zoo.models.sizes import set_image_size
from smpconv_zoo.operators import recorded
from smpconv_zoo.ops import prefers_channels_last, unheard

__all__ = ["SMPConvNet"]


# Hidden maps of more bytes than this are computed a few images at a time, outside training on a CPU.
_HIDDEN_BYTES = 8 * 2**20


def _may_arrange(x: Tensor) -> bool:
    """Whether it is ours to say how work is laid out and cut: on a CPU, without gradients, nobody recording.

    With gradients the layout stays as it is: PyTorch's batch norm in training mode is an order of magnitude less exact
    where channels are innermost.
    """
    if torch.jit.is_scripting():
        return False
    else:
        # torch.fx passes something else than a tensor.
        return isinstance(x, Tensor) and not recorded((x,)) and not torch.is_grad_enabled() and x.device.type == "cpu"


class SpatialMixer(nn.Module):
    """Residual half that mixes positions: norm, 1x1, ReLU, large + small depthwise kernel, ReLU, 1x1."""

    def __init__(
        self, dim: int, kernel_size: int, small_kernel_size: int, points_divisor: int, drop_path: float, **dd: Any
    ) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm2d(dim, **dd)
        self.pw1 = ConvNormAct(dim, dim, 1, **dd)
        large = SMPConv2d(dim, dim, kernel_size, groups=dim, points_divisor=points_divisor, **dd)
        small = nn.Conv2d(dim, dim, small_kernel_size, padding=small_kernel_size // 2, groups=dim, bias=False, **dd)
        self.conv_dw: Any = LargeSmallConv(
            ConvNorm(large, nn.BatchNorm2d(dim, **dd)), ConvNorm(small, nn.BatchNorm2d(dim, **dd))
        )
        self.act = nn.ReLU()
        self.pw2 = ConvNormAct(dim, dim, 1, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.pw1(self.norm(x))
        y = self.act(self.conv_dw(y))
        return x + self.drop_path(self.pw2(y))

    def reparameterize(self) -> None:
        """Fold points and norms for inference, in place."""
        self.norm = self.pw1.absorb(self.norm)
        self.pw2.reparameterize()
        self.conv_dw = self.conv_dw.fuse()
        self.requires_grad_(False).eval()


class ChannelMixer(nn.Module):
    """Residual half that mixes channels: norm, 1x1, GELU, 1x1."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, **dd: Any) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm: nn.Module = nn.BatchNorm2d(dim, **dd)
        self.pw1 = ConvNormAct(dim, hidden, 1, act_layer=nn.GELU, **dd)
        self.pw2 = ConvNormAct(hidden, dim, 1, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.training or not _may_arrange(x):
            return x + self.drop_path(self.pw2(self.pw1(self.norm(x))))
        return self._in_shares(x)

    @torch.jit.unused
    def _in_shares(self, x: Tensor) -> Tensor:
        """A few images at a time: the hidden map, four times as large, stays in a cache and in memory used before."""
        hidden: Any = self.pw1.conv.out_channels
        at_once = max(1, _HIDDEN_BYTES // (hidden * x.element_size() * x.shape[2] * x.shape[3]))
        if at_once >= len(x) or not (unheard(self.pw1) and unheard(self.pw2)):
            return x + self.drop_path(self.pw2(self.pw1(self.norm(x))))
        y = torch.empty_like(x)
        for first in range(0, len(x), at_once):
            share = x[first : first + at_once]
            torch.add(share, self.pw2(self.pw1(self.norm(share))), out=y[first : first + at_once])
        return y

    def reparameterize(self) -> None:
        """Fold the norms for inference, in place."""
        self.norm = self.pw1.absorb(self.norm)
        self.pw2.reparameterize()
        self.requires_grad_(False).eval()


class SMPConvBlock(nn.Module):
    """Both halves, with one drop-path rate."""

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        small_kernel_size: int,
        points_divisor: int,
        mlp_ratio: float,
        drop_path: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.spatial = SpatialMixer(dim, kernel_size, small_kernel_size, points_divisor, drop_path, **dd)
        self.channel = ChannelMixer(dim, mlp_ratio, drop_path, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.channel(self.spatial(x))


class SMPConvStage(nn.Module):
    """Downsampling (except in the first stage), then blocks."""

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int,
        small_kernel_size: int,
        points_divisor: int,
        mlp_ratio: float,
        drop_paths: Sequence[float],
        downsample: bool,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample: nn.Module = nn.Identity()
        if downsample:
            self.downsample = nn.Sequential(
                ConvNormAct(in_dim, dim, 1, **dd),
                ConvNormAct(dim, dim, 3, stride=2, padding=1, groups=dim, **dd),
            )
        self.blocks = nn.Sequential(
            *(
                SMPConvBlock(dim, kernel_size, small_kernel_size, points_divisor, mlp_ratio, drop_path, **dd)
                for drop_path in drop_paths
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self.blocks:
                x = recompute(block, x)
            return x
        return self.blocks(x)


class SMPConvNet(MergingNet):
    """SMPConvNet for images of any size.

    Args:
        in_chans: Channels of the input image.
        num_classes: Classes of the head; 0 for none.
        global_pool: Pooling before the head, as in timm ("avg", "max", ...); "" for none.
        kernel_sizes: Odd size of the continuous kernels of each stage, or one for all.
        depths: Blocks of each stage.
        dims: Channels of each stage.
        points_divisor: A kernel of k x k taps has ``k * k // points_divisor`` points.
        small_kernel_size: Odd size of the ordinary depthwise kernel beside each continuous one.
        mlp_ratio: Hidden over outer channels of the channel mixers.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth: rate of the last block, growing linearly from 0.

    Shape: ``(N, in_chans, H, W)`` -> ``(N, num_classes)``; the stages see the map at strides 4, 8, 16, 32.

    Raises:
        ValueError: A non-positive size, an even kernel, or lists of different lengths.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        kernel_sizes: int | Sequence[int] = (31, 29, 27, 13),
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        points_divisor: int = 4,
        small_kernel_size: int = 5,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        kernel_sizes = per_stage("kernel_sizes", kernel_sizes, len(dims))
        depths = per_stage("depths", depths, len(dims))
        check_arguments(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            drop_path_rate,
            IMAGE_POOLS,
            dims=dims,
            depths=depths,
            points_divisor=points_divisor,
        )
        if any(k % 2 == 0 or k < 3 for k in (*kernel_sizes, small_kernel_size)):
            raise ValueError(
                f"kernel sizes must be odd and at least 3, got kernel_sizes={tuple(kernel_sizes)}, "
                f"small_kernel_size={small_kernel_size}"
            )
        if mlp_ratio * min(dims) < 1:
            raise ValueError(f"mlp_ratio must leave a hidden channel of {min(dims)}, got {mlp_ratio}")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate

        width = dims[0]
        self.stem = nn.Sequential(
            ConvNormAct(in_chans, width, 3, stride=2, padding=1, **dd),
            ConvNormAct(width, width, 3, padding=1, groups=width, **dd),
            ConvNormAct(width, width, 1, **dd),
            ConvNormAct(width, width, 3, stride=2, padding=1, groups=width, **dd),
        )
        drop_paths = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        stages = []
        feature_info: list[dict[str, Any]] = []
        for i, (dim, depth, kernel_size) in enumerate(zip(dims, depths, kernel_sizes, strict=True)):
            stages.append(
                SMPConvStage(
                    width,
                    dim,
                    kernel_size,
                    small_kernel_size,
                    points_divisor,
                    mlp_ratio,
                    drop_paths[:depth],
                    downsample=i > 0,
                    **dd,
                )
            )
            drop_paths = drop_paths[depth:]
            width = dim
            feature_info.append({"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.feature_info = feature_info
        self.num_features = width
        self.norm: nn.Module = FinalNorm(width, **dd)
        self.head = ImageHead(width, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Positions and radii: decay would pull points to the centre and shrink them."""
        return set(parameter_roles(self))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into groups by depth, for layer-wise rates."""
        blocks: Any = r"^stages\.(\d+)"
        if not coarse:
            blocks = [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ]
        return {"stem": r"^stem", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: recompute each block in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Read off the kernels for images of another size than now, in place; see :mod:`smpconv_zoo.resolution`.

        The strided convolutions of the stem and between the stages stay as they are.
        """
        set_image_size(self, img_size)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; the pooling stays unless ``global_pool`` names another."""
        # timm's contract allows a classifier on a head whose pooling was taken away before, but none asked for at once.
        check_head(num_classes, "avg" if global_pool is None else global_pool, IMAGE_POOLS)
        self.num_classes = num_classes
        # The head itself may have no parameter left to take the device from.
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs, and the final features unless ``intermediates_only``.

        Args:
            x: Images, ``(N, in_chans, H, W)``.
            indices: Stages to return: the last n, a list, or all if None.
            norm: Apply the final norm to the last stage's output.
            stop_early: Do not compute stages behind the last one asked for.
            output_fmt: Only "NCHW".
            intermediates_only: Return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates = []
        given = check_input(x, "NCHW", self.in_chans)
        x = self.stem(given if self.training else _arranged(given))
        stages = self.stages[: max_index + 1] if stop_early else self.stages
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(_laid_out_as(given, self.norm(x) if norm and i == last else x))
        if intermediates_only:
            return intermediates
        return _laid_out_as(given, self.norm(x) if len(stages) == len(self.stages) else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the given stages do not need; returns the indices kept."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """``(N, in_chans, H, W)`` -> normalised features ``(N, num_features, H / 32, W / 32)``."""
        x = check_input(x, "NCHW", self.in_chans)
        return _laid_out_as(x, self.norm(self.stages(self.stem(x if self.training else _arranged(x)))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify; with ``pre_logits`` only pool."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _arranged(x: Tensor) -> Tensor:
    """``x`` in the layout in which this device convolves fastest, where it is ours to say."""
    if torch.jit.is_scripting():
        return x
    else:
        pays = _may_arrange(x) and prefers_channels_last(x)
        return x.contiguous(memory_format=torch.channels_last) if pays else x


def _laid_out_as(given: Tensor, y: Tensor) -> Tensor:
    """``y`` in the plain layout again if that was the layout of ``given``: views of it are taken."""
    return y.contiguous() if _may_arrange(y) and given.is_contiguous() else y


def _init_weights(module: nn.Module) -> None:
    """The reference's initialisation of what is not made of points."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0.conv",
        "classifier": "head.fc",
        **PAPER,
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        **checkpoint_cfgs("smpconv_t", _cfg()),
        **checkpoint_cfgs("smpconv_b", _cfg()),
        "test_smpconv": _cfg(num_classes=10, input_size=(3, 64, 64), pool_size=(2, 2)),
    }
)


@register_model
def smpconv_t(pretrained: bool = False, **kwargs: Any) -> SMPConvNet:
    """SMPConvNet-T: 26.7 M parameters, 5.7 G multiply-accumulates at 224 x 224."""
    model_args = {"depths": (2, 2, 8, 2), "dims": (96, 192, 384, 768), "drop_path_rate": 0.1}
    return build_smpconv(SMPConvNet, "smpconv_t", pretrained, **{**model_args, **kwargs})


@register_model
def smpconv_b(pretrained: bool = False, **kwargs: Any) -> SMPConvNet:
    """SMPConvNet-B: 79.5 M parameters, 16.6 G multiply-accumulates at 224 x 224."""
    model_args = {"depths": (2, 2, 20, 2), "dims": (128, 256, 512, 1024), "drop_path_rate": 0.5}
    return build_smpconv(SMPConvNet, "smpconv_b", pretrained, **{**model_args, **kwargs})


@register_model
def test_smpconv(pretrained: bool = False, **kwargs: Any) -> SMPConvNet:
    """A tiny SMPConvNet for tests."""
    model_args = {"kernel_sizes": (13, 11, 9, 7), "depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "num_classes": 10}
    return build_smpconv(SMPConvNet, "test_smpconv", pretrained, **{**model_args, **kwargs})


register_model_deprecations(__name__, {"SMPConv_T": "smpconv_t.in1k", "SMPConv_B": "smpconv_b.in1k"})

"""SMPConvTCN and SMPConvResNet: sequence and small-image networks of dense continuous kernels.

Paper: Kim & Park, "SMPConv: Self-moving Point Representations for Continuous Convolution", CVPR 2023, arXiv 2304.02330,
sections 4.1 and 4.2. Origin: https://github.com/sangnekim/SMPConv (MIT licence, code and weights), whose networks these
equal weight for weight and number for number. The TCN's kernels reach back over the whole sequence; the ResNet's cover
the whole image.

A block is two large + small convolutions with ReLUs and a shortcut. Here every output channel has points of its own,
and kernels are normalised by the number of points that touch a tap.
"""

# Annotations are not postponed in this file: torch.fx would copy their text into its graphs, where TorchScript cannot
# resolve it.

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, get_device_dtype, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from smpconv_zoo.baselines import SineConv1d
from smpconv_zoo.layers import ActivatedPair, CausalConv1d, ConvNorm, SMPConv1d, SMPConv2d, parameter_roles
from smpconv_zoo.merged import MergingNet
from smpconv_zoo.models.build import (
    IMAGE_POOLS,
    PAPER,
    ImageHead,
    build_smpconv,
    check_arguments,
    check_head,
    check_input,
    checkpoint_arguments,
    checkpoint_cfgs,
    recompute,
)
from smpconv_zoo.models.sizes import set_image_size, set_sampling

__all__ = ["SMPConvResNet", "SMPConvTCN"]

SEQUENCE_POOLS = ("last", "avg", "max", "")
# Where the large kernels of a TCN come from.
SEQUENCE_KERNELS = ("points", "fixed", "mlp")


class SequenceHead(nn.Module):
    """Read-out of a sequence, ``(N, C, L)`` -> ``(N, num_classes)``: pool over time, dropout, linear.

    Args:
        in_features: Channels.
        num_classes: Classes; 0 leaves the pooled features.
        pool_type: "last" time step, "avg", "max", or "" for none.
        drop_rate: Dropout before the linear layer.
    """

    def __init__(self, in_features: int, num_classes: int, pool_type: str, drop_rate: float, **dd: Any) -> None:
        super().__init__()
        self.in_features = in_features
        self.pool_type = pool_type
        self.drop = nn.Dropout(drop_rate)
        self.fc: nn.Module = self._classifier(num_classes, **dd)

    def _classifier(self, num_classes: int, **dd: Any) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        fc = nn.Linear(self.in_features, num_classes, **dd)
        nn.init.normal_(fc.weight, std=0.01)
        nn.init.zeros_(fc.bias)
        return fc

    @torch.jit.ignore
    def reset(self, num_classes: int, pool_type: str | None, **dd: Any) -> None:
        """New classifier, and new pooling unless None."""
        if pool_type is not None:
            self.pool_type = pool_type
        self.fc = self._classifier(num_classes, **dd).train(self.training)

    def reparameterize(self) -> None:
        """Nothing to fold; into eval mode."""
        self.eval()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.pool_type == "last":
            x = x[:, :, -1]
        elif self.pool_type == "avg":
            x = x.mean(dim=2)
        elif self.pool_type == "max":
            x = x.amax(dim=2)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class TCNBlock(nn.Module):
    """Causal residual block: ReLU(large + small), dropout, twice, then shortcut and ReLU.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        kernel_size: Taps of the continuous kernels.
        n_points: Points per output channel.
        init_radius: First radius of the points; one tap spacing if None.
        coord_std: Spread of the first positions.
        small_kernel_size: Taps of the ordinary kernels.
        conv_bias: Bias of the continuous convolutions.
        drop_rate: Dropout after both activations.
        drop_path: Stochastic depth.
        kernel: Where the large kernels come from; see :class:`SMPConvTCN`.
        omega: Of kernels that an MLP gives.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int,
        n_points: int,
        init_radius: float | None,
        coord_std: float,
        small_kernel_size: int,
        conv_bias: bool,
        drop_rate: float,
        drop_path: float,
        kernel: str = "points",
        omega: float = 30.0,
        **dd: Any,
    ) -> None:
        super().__init__()

        def large_kernel(channels: int) -> nn.Module:
            if kernel == "fixed":
                return CausalConv1d(channels, dim, kernel_size, bias=conv_bias, **dd)
            if kernel == "mlp":
                return SineConv1d(channels, dim, kernel_size, bias=conv_bias, omega=omega, **dd)
            return SMPConv1d(
                channels,
                dim,
                kernel_size,
                bias=conv_bias,
                n_points=n_points,
                init_radius=init_radius,
                coord_std=coord_std,
                **dd,
            )

        def pair(channels: int) -> ActivatedPair:
            large = large_kernel(channels)
            small = CausalConv1d(channels, dim, small_kernel_size, bias=False, **dd)
            trunc_normal_(small.weight, std=0.02)
            return ActivatedPair(
                ConvNorm(large, nn.BatchNorm1d(dim, **dd)),
                ConvNorm(small, nn.BatchNorm1d(dim, **dd)),
                relu=True,
                drop_rate=drop_rate,
            )

        self.conv1: Any = pair(in_dim)
        self.conv2: Any = pair(dim)
        self.drop_path: nn.Module | None = DropPath(drop_path) if drop_path > 0 else None
        self.shortcut = nn.Identity() if in_dim == dim else nn.Conv1d(in_dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        if self.drop_path is None:
            return self.conv2(y, self.shortcut(x))
        return torch.relu(self.drop_path(self.conv2(y)) + self.shortcut(x))

    def reparameterize(self) -> None:
        """Fold points and norms for inference, in place."""
        self.conv1, self.conv2 = self.conv1.fuse(), self.conv2.fuse()
        self.requires_grad_(False).eval()


class ResNetBlock(nn.Module):
    """Residual block on images: ReLU(large + small), dropout, large + small, then shortcut and ReLU.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        conv: Builds a large + small pair from (in, out) channels.
        drop_rate: Dropout after the first activation.
        drop_path: Stochastic depth.
    """

    def __init__(
        self, in_dim: int, dim: int, conv: dict[str, Any], drop_rate: float, drop_path: float, **dd: Any
    ) -> None:
        super().__init__()
        self.conv1: Any = _image_pair(in_dim, dim, small_bias=False, relu=True, drop_rate=drop_rate, **conv, **dd)
        self.conv2: Any = _image_pair(dim, dim, small_bias=False, **conv, **dd)
        self.drop_path: nn.Module | None = DropPath(drop_path) if drop_path > 0 else None
        self.shortcut: nn.Module = nn.Identity()
        if in_dim != dim:
            shortcut = nn.Conv2d(in_dim, dim, 1, **dd)
            trunc_normal_(shortcut.weight, std=0.02)
            assert shortcut.bias is not None
            nn.init.zeros_(shortcut.bias)
            self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        if self.drop_path is None:
            return self.conv2(y, self.shortcut(x))
        return torch.relu(self.drop_path(self.conv2(y)) + self.shortcut(x))

    def reparameterize(self) -> None:
        """Fold points and norms for inference, in place."""
        self.conv1, self.conv2 = self.conv1.fuse(), self.conv2.fuse()
        self.requires_grad_(False).eval()


def _image_pair(
    in_dim: int,
    dim: int,
    kernel_size: int,
    n_points: int,
    init_radius: float | None,
    coord_std: float,
    small_kernel_size: int,
    small_bias: bool,
    relu: bool = False,
    drop_rate: float | None = None,
    **dd: Any,
) -> ActivatedPair:
    large = SMPConv2d(
        in_dim,
        dim,
        kernel_size,
        n_points=n_points,
        shared_points=False,
        normalization="count",
        init_radius=init_radius,
        coord_std=coord_std,
        radius_bounds=(1e-4, 1.0),
        **dd,
    )
    small = nn.Conv2d(in_dim, dim, small_kernel_size, padding=small_kernel_size // 2, bias=small_bias, **dd)
    trunc_normal_(small.weight, std=0.02)
    if small.bias is not None:
        nn.init.zeros_(small.bias)
    return ActivatedPair(
        ConvNorm(large, nn.BatchNorm2d(dim, **dd)), ConvNorm(small, nn.BatchNorm2d(dim, **dd)), relu, drop_rate
    )


class _BlockNet(MergingNet):
    """What both networks share: a stem (or none), blocks at one resolution, a head, and timm's contract."""

    if TYPE_CHECKING:
        # At run time TorchScript would take these for its own types, and knows of no nn.Module.
        stem: nn.Module
        blocks: nn.Sequential
        head: Any
        feature_info: list[dict[str, Any]]
        num_features: int
        head_hidden_size: int
        in_chans: int
        num_classes: int
        grad_checkpointing: bool
        output_fmt: str

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Positions and radii: decay would pull points together and shrink them."""
        return set(parameter_roles(self))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into groups by depth, for layer-wise rates."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: recompute each block in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Block outputs, and the final features unless ``intermediates_only``.

        Args:
            x: Input of the network.
            indices: Blocks to return: the last n, a list, or all if None.
            norm: Accepted for timm's interface; there is no final norm.
            stop_early: Do not compute blocks behind the last one asked for.
            output_fmt: The network's own layout (``output_fmt`` attribute), or timm's default "NCHW" for it.
            intermediates_only: Return the list alone.
        """
        if output_fmt not in ("", "NCHW", self.output_fmt):
            raise ValueError(f"output_fmt must be {self.output_fmt!r}, got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        intermediates = []
        x = self.stem(check_input(x, self.output_fmt, self.in_chans))
        for i, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = recompute(block, x) if self.grad_checkpointing else block(x)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the given blocks do not need; returns the indices kept."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        shortened = max_index < len(self.blocks) - 1
        self.blocks = self.blocks[: max_index + 1]
        if shortened:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; the pooling stays unless ``global_pool`` names another."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Features at the resolution of the input: ``(N, num_features, ...)``."""
        x = self.stem(check_input(x, self.output_fmt, self.in_chans))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self.blocks:
                x = recompute(block, x)
            return x
        return self.blocks(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify; with ``pre_logits`` only pool."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class SMPConvTCN(_BlockNet):
    """Temporal convolutional network whose causal kernels reach over the whole sequence.

    Args:
        in_chans: Channels of the input.
        num_classes: Classes of the head; 0 for none.
        global_pool: Read-out: "last" time step, "avg", "max", or "" for none.
        kernel_size: Taps of the continuous kernels; the authors take the length of the sequence. Shorter sequences meet
            the newest taps, longer ones are seen through a finite kernel.
        dims: Channels of each block.
        n_points: Points per output channel.
        init_radius: First radius of the points in units of the kernel's half-width; one tap spacing if None.
        coord_std: Spread of the first positions before the current sample.
        small_kernel_size: Taps of the ordinary causal kernel beside each continuous one.
        conv_bias: Bias of the continuous convolutions.
        drop_rate: Dropout before the classifier.
        block_drop_rate: Dropout inside the blocks (the authors' ``dropout``).
        drop_path_rate: Stochastic depth: rate of the last block, growing linearly from 0.
        kernel: "points" for SMPConv. To compare it with: "fixed" for a learned value at every tap, "mlp" for an MLP of
            sines (:class:`~smpconv_zoo.baselines.SineConv1d`). These cannot be read off at another rate or length, and
            of the arguments of points they take none.
        omega: For "mlp": how fast its kernels vary at first.

    Shape: ``(N, in_chans, L)`` -> ``(N, num_classes)``, for any L >= 1.

    Raises:
        ValueError: A non-positive size, or an unknown pooling or kernel.
    """

    def __init__(
        self,
        in_chans: int = 1,
        num_classes: int = 10,
        global_pool: str = "last",
        kernel_size: int = 256,
        dims: Sequence[int] = (30,) * 6,
        n_points: int = 30,
        init_radius: float | None = None,
        coord_std: float = 0.1,
        small_kernel_size: int = 5,
        conv_bias: bool = True,
        drop_rate: float = 0.0,
        block_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        kernel: str = "points",
        omega: float = 30.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if kernel not in SEQUENCE_KERNELS:
            raise ValueError(f"kernel must be one of {SEQUENCE_KERNELS}, got {kernel!r}")
        check_arguments(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            drop_path_rate,
            SEQUENCE_POOLS,
            dims=dims,
            n_points=n_points,
            small_kernel_size=small_kernel_size,
        )
        self.output_fmt = "NCL"
        # Of the sequences that the kernels are read off for, over that of the training.
        self.sample_rate = 1.0
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.stem = nn.Identity()
        blocks = []
        self.feature_info = []
        width = in_chans
        drop_paths = torch.linspace(0, drop_path_rate, len(dims), device="cpu").tolist()
        for i, (dim, drop_path) in enumerate(zip(dims, drop_paths, strict=True)):
            blocks.append(
                TCNBlock(
                    width,
                    dim,
                    kernel_size,
                    n_points,
                    init_radius,
                    coord_std,
                    small_kernel_size,
                    conv_bias,
                    block_drop_rate,
                    drop_path,
                    kernel,
                    omega,
                    **dd,
                )
            )
            width = dim
            self.feature_info.append({"num_chs": dim, "reduction": 1, "module": f"blocks.{i}"})
        self.blocks = nn.Sequential(*blocks)
        self.num_features = self.head_hidden_size = width
        self.head = SequenceHead(width, num_classes, global_pool, drop_rate, **dd)

    @torch.jit.ignore
    def set_input_size(self, length: int) -> None:
        """Read off the kernels for sequences of ``length`` samples where there are as many as the network's input now.

        The current sample stays at +1; see :mod:`smpconv_zoo.resolution`.
        """
        set_sampling(self, length=length)

    @torch.jit.ignore
    def set_sample_rate(self, sample_rate: float) -> None:
        """Read off the kernels for signals at ``sample_rate`` times the rate of the training, in place."""
        set_sampling(self, sample_rate=sample_rate)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        check_head(num_classes, self.head.pool_type if global_pool is None else global_pool, SEQUENCE_POOLS)
        self.num_classes = num_classes
        self.head.in_features = self.head_hidden_size = self.num_features
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))


class SMPConvResNet(_BlockNet):
    """Residual network on small images whose kernels cover the image, at one resolution throughout.

    Args:
        in_chans: Channels of the input.
        num_classes: Classes of the head; 0 for none.
        global_pool: Pooling before the head, as in timm ("avg", "max", ...); "" for none.
        kernel_size: Odd size of the continuous kernels; the authors take the smallest that covers the image.
        dims: Channels of each block; the stem has as many as the first.
        n_points: Points per output channel.
        init_radius: First radius of the points in units of the kernel's half-width; ``4 / kernel_size`` if None.
        coord_std: Spread of the first positions around the centre.
        small_kernel_size: Odd size of the ordinary kernel beside each continuous one.
        drop_rate: Dropout before the classifier.
        block_drop_rate: Dropout inside the blocks (the authors' ``dropout``).
        drop_path_rate: Stochastic depth: rate of the last block, growing linearly from 0.

    Shape: ``(N, in_chans, H, W)`` -> ``(N, num_classes)``.

    Raises:
        ValueError: A non-positive size or an even kernel.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 10,
        global_pool: str = "avg",
        kernel_size: int = 33,
        dims: Sequence[int] = (24, 24, 36, 36, 36, 48, 48),
        n_points: int = 16,
        init_radius: float | None = None,
        coord_std: float = 0.05,
        small_kernel_size: int = 3,
        drop_rate: float = 0.0,
        block_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_arguments(
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            drop_path_rate,
            IMAGE_POOLS,
            dims=dims,
            n_points=n_points,
            small_kernel_size=small_kernel_size,
        )
        if small_kernel_size % 2 == 0:
            raise ValueError(f"small_kernel_size must be odd, got {small_kernel_size}")
        self.output_fmt = "NCHW"
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        conv: dict[str, Any] = {
            "kernel_size": kernel_size,
            "n_points": n_points,
            "init_radius": init_radius,
            "coord_std": coord_std,
            "small_kernel_size": small_kernel_size,
        }
        width = dims[0]
        self.stem = nn.Sequential(_image_pair(in_chans, width, small_bias=True, relu=True, **conv, **dd))
        blocks = []
        self.feature_info = []
        drop_paths = torch.linspace(0, drop_path_rate, len(dims), device="cpu").tolist()
        for i, (dim, drop_path) in enumerate(zip(dims, drop_paths, strict=True)):
            blocks.append(ResNetBlock(width, dim, conv, block_drop_rate, drop_path, **dd))
            width = dim
            self.feature_info.append({"num_chs": dim, "reduction": 1, "module": f"blocks.{i}"})
        self.blocks = nn.Sequential(*blocks)
        self.num_features = width
        self.head = ImageHead(width, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        if num_classes > 0:
            nn.init.kaiming_normal_(self.head.fc.weight)
            nn.init.zeros_(self.head.fc.bias)
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Read off the kernels for images of another size than now, in place; see :mod:`smpconv_zoo.resolution`."""
        set_image_size(self, img_size)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        # timm's contract allows a classifier on a head whose pooling was taken away before, but none asked for at once.
        check_head(num_classes, "avg" if global_pool is None else global_pool, IMAGE_POOLS)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features


def _sequence_cfg(in_chans: int, length: int, num_classes: int = 10, **kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": num_classes,
        # timm's cfg has images in mind, (channels, height, width); the networks take (N, channels, length).
        "input_size": (in_chans, 1, length),
        "mean": (0.0,) * in_chans,
        "std": (1.0,) * in_chans,
        "first_conv": ("blocks.0.conv1.large.conv", "blocks.0.conv1.small.conv", "blocks.0.shortcut"),
        "classifier": "head.fc",
        **PAPER,
        **kwargs,
    }


def _image_cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (32, 32),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        # ImageNet's statistics, on CIFAR too: the authors' loader has them so.
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": ("stem.0.large.conv", "stem.0.small.conv"),
        "classifier": "head.fc",
        **PAPER,
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        **checkpoint_cfgs("smpconv_tcn_mnist", _sequence_cfg(1, 784, mean=(0.1307,), std=(0.3081,)), "smnist5k"),
        # ImageNet's statistics, as for the images below.
        **checkpoint_cfgs(
            "smpconv_tcn_cifar", _sequence_cfg(3, 1024, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
        ),
        **checkpoint_cfgs("smpconv_tcn_chartraj", _sequence_cfg(3, 182, num_classes=20)),
        **checkpoint_cfgs("smpconv_tcn_speech_mfcc", _sequence_cfg(20, 161)),
        **checkpoint_cfgs("smpconv_tcn_speech_raw", _sequence_cfg(1, 16000)),
        **checkpoint_cfgs("smpconv_resnet_cifar", _image_cfg()),
        **checkpoint_cfgs(
            "smpconv_resnet_mnist",
            _image_cfg(input_size=(1, 28, 28), pool_size=(28, 28), mean=(0.1307,), std=(0.3081,)),
        ),
        **checkpoint_cfgs("smpconv_tcn", _sequence_cfg(1, 256), None),
        "smpconv_resnet": _image_cfg(),
        "test_smpconv_tcn": _sequence_cfg(1, 32),
    }
)


@register_model
def smpconv_tcn(pretrained: bool = False, **kwargs: Any) -> SMPConvTCN:
    """SMPConvTCN for your own sequences: pass ``in_chans``, ``num_classes`` and ``kernel_size`` (their length).

    A checkpoint, such as ``smpconv_tcn.gunpoint``, brings those of its data.
    """
    return build_smpconv(SMPConvTCN, "smpconv_tcn", pretrained, **checkpoint_arguments("smpconv_tcn", kwargs))


@register_model
def smpconv_tcn_mnist(pretrained: bool = False, **kwargs: Any) -> SMPConvTCN:
    """SMPConvTCN for digits as sequences of 784 pixels (sMNIST, pMNIST): 371 k parameters."""
    model_args = {"in_chans": 1, "kernel_size": 784, "init_radius": 0.002, "conv_bias": False}
    return build_smpconv(SMPConvTCN, "smpconv_tcn_mnist", pretrained, **{**model_args, **kwargs})


@register_model
def smpconv_tcn_cifar(pretrained: bool = False, **kwargs: Any) -> SMPConvTCN:
    """SMPConvTCN for images as sequences of 1024 RGB pixels (sCIFAR10): 373 k parameters."""
    model_args = {"in_chans": 3, "kernel_size": 1024, "init_radius": 0.002}
    return build_smpconv(SMPConvTCN, "smpconv_tcn_cifar", pretrained, **{**model_args, **kwargs})


@register_model
def smpconv_tcn_chartraj(pretrained: bool = False, **kwargs: Any) -> SMPConvTCN:
    """SMPConvTCN for pen trajectories of 182 steps (CharacterTrajectories): 374 k parameters."""
    model_args = {"in_chans": 3, "num_classes": 20, "kernel_size": 182, "init_radius": 0.012}
    return build_smpconv(SMPConvTCN, "smpconv_tcn_chartraj", pretrained, **{**model_args, **kwargs})


@register_model
def smpconv_tcn_speech_mfcc(pretrained: bool = False, **kwargs: Any) -> SMPConvTCN:
    """SMPConvTCN for 161 frames of 20 MFCCs (Speech Commands, 10 words): 392 k parameters."""
    model_args = {"in_chans": 20, "kernel_size": 161, "init_radius": 0.012, "block_drop_rate": 0.2}
    return build_smpconv(SMPConvTCN, "smpconv_tcn_speech_mfcc", pretrained, **{**model_args, **kwargs})


@register_model
def smpconv_tcn_speech_raw(pretrained: bool = False, **kwargs: Any) -> SMPConvTCN:
    """SMPConvTCN for one second of raw speech at 16 kHz (Speech Commands, 10 words): 371 k parameters."""
    model_args = {
        "in_chans": 1,
        "kernel_size": 16000,
        "init_radius": 0.0002,
        "conv_bias": False,
        "block_drop_rate": 0.1,
    }
    return build_smpconv(SMPConvTCN, "smpconv_tcn_speech_raw", pretrained, **{**model_args, **kwargs})


@register_model
def smpconv_resnet(pretrained: bool = False, **kwargs: Any) -> SMPConvResNet:
    """SMPConvResNet for your own small images: pass ``in_chans``, ``num_classes`` and an odd ``kernel_size``."""
    return build_smpconv(SMPConvResNet, "smpconv_resnet", pretrained, **kwargs)


@register_model
def smpconv_resnet_cifar(pretrained: bool = False, **kwargs: Any) -> SMPConvResNet:
    """SMPConvResNet for 32 x 32 images (CIFAR10): 490 k parameters."""
    model_args = {"kernel_size": 33, "init_radius": 0.12, "block_drop_rate": 0.1}
    return build_smpconv(SMPConvResNet, "smpconv_resnet_cifar", pretrained, **{**model_args, **kwargs})


@register_model
def smpconv_resnet_mnist(pretrained: bool = False, **kwargs: Any) -> SMPConvResNet:
    """SMPConvResNet for digits, 28 x 28 and grey: a small one of ours, not of the paper."""
    model_args = {"in_chans": 1, "kernel_size": 29, "dims": (16, 16, 24, 24), "n_points": 16, "init_radius": 0.14}
    return build_smpconv(SMPConvResNet, "smpconv_resnet_mnist", pretrained, **{**model_args, **kwargs})


@register_model
def test_smpconv_tcn(pretrained: bool = False, **kwargs: Any) -> SMPConvTCN:
    """A tiny SMPConvTCN for tests."""
    model_args = {"kernel_size": 32, "dims": (6, 6), "n_points": 7}
    return build_smpconv(SMPConvTCN, "test_smpconv_tcn", pretrained, **{**model_args, **kwargs})

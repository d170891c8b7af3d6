"""Layers made of points: drop-in convolutions, and the large + small pair that every SMPConv network is built from.

SMPConv: Kim & Park, "SMPConv: Self-moving Point Representations for Continuous Convolution", CVPR 2023,
arXiv 2304.02330. The kernel of a layer is rendered from its points (:mod:`smpconv_zoo.kernels`); positions, radii and
values are parameters, so the points move while the layer learns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import timm.layers
import torch
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.utils.hooks import RemovableHandle

from smpconv_zoo.baselines import SineConv1d
from smpconv_zoo.kernels import NORMALIZATIONS, render_kernel
from smpconv_zoo.merged import (
    ChannelAffine,
    Merged,
    MergedConv1d,
    MergedConv2d,
    centred_sum,
    fold_conv2d,
    newest_sum,
    norm_affine,
    through_norm,
    wide,
)
from smpconv_zoo.operators import recorded
from smpconv_zoo.ops import (
    KernelCache,
    can_run_pair,
    causal_conv1d,
    causal_conv1d_with,
    conv2d,
    conv2d_with,
    convolve_pair,
    depthwise_conv2d,
    depthwise_conv2d_with,
    norm_sum,
    reachable_same,
    unheard,
    why_not_fused,
)
from smpconv_zoo.points import tap_grid, tap_spacing, without_radius

__all__ = [
    "ActivatedPair",
    "CausalConv1d",
    "ConvNorm",
    "ConvNormAct",
    "FinalNorm",
    "LargeSmallConv",
    "MergedConv1d",
    "MergedConv2d",
    "MergedPair",
    "SMPConv1d",
    "SMPConv2d",
    "attach_radius_clip",
    "clip_radius_",
    "parameter_roles",
]

# Kernels of fewer taps are convolved whole on a GPU: to ask for the positions of their points would take longer.
_MEASURED_TAPS_CUDA = 4096

PointKernelT = TypeVar("PointKernelT", bound="_PointKernel")


@dataclasses.dataclass(frozen=True)
class _Rendered:
    """A kernel, and the tensors it was rendered from as they were then."""

    kernel: Tensor
    sources: tuple[Tensor, ...]
    stamp: tuple[object, ...]
    values: tuple[Tensor, ...]
    # What convolutions compute from the kernel alone.
    cache: KernelCache = dataclasses.field(default_factory=KernelCache)

    @classmethod
    def now(cls, render: Callable[[], Tensor], sources: tuple[Tensor, ...]) -> _Rendered:
        # A tensor made in inference mode could never take part in a gradient again.
        with torch.inference_mode(False), torch.no_grad():
            # Read before rendering: what another thread changes meanwhile shows as a change.
            stamp = _stamp(sources)
            values = tuple(source.clone() for source in sources if source.device.type == "cpu")
            kernel = render()
        return cls(kernel, sources, (stamp, kernel._version), values)

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        """Whether nothing has changed since: other tensors, counted writes and, on the CPU, the numbers themselves."""
        return (
            all(then is now for then, now in zip(self.sources, sources, strict=True))
            and self.stamp == (_stamp(sources), self.kernel._version)
            and all(torch.equal(then, now) for then, now in zip(self.values, sources, strict=False))
        )


def _stamp(tensors: tuple[Tensor, ...]) -> tuple[object, ...]:
    """What tells writes to tensors, or other memory in their place; on a GPU also the stream that orders the work."""
    device = tensors[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    return (stream, *((t._version, t.data_ptr(), t.dtype, t.device, t.shape, t.stride()) for t in tensors))


class _PointKernel(nn.Module):
    """Points and the grid on which their kernel is read off; the common half of the layers below.

    In eval mode the kernel is rendered once and kept until one of the four tensors changes. Writes are told by their
    versions, other tensors or memory in their place by identity and address; on the CPU the numbers themselves are
    compared, too, so that no write escapes, be it through ``.data``, NumPy or a fused optimizer, which no version
    counts. A GPU would have to be waited for: there, such a write is noticed only after ``train()``, ``eval()``, a
    move, a load or a forward pass with gradients, which drop the kernel, and nothing is kept while points hold
    gradients. Where gradients flow to the points, or where somebody records (compilers, tracers, transforms, dispatch
    modes, CUDA graphs), nothing is kept and nothing kept is used. The kept kernel is no part of state dicts, copies and
    pickles.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        in_per_group: int,
        kernel_size: Sequence[int],
        n_points: int,
        shared_points: bool,
        normalization: str,
        init_radius: float,
        coord_std: float,
        radius_bounds: tuple[float, float],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        _check_positive(in_channels=in_channels, out_channels=out_channels, n_points=n_points)
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
        if not (init_radius > 0 and coord_std > 0):
            raise ValueError(f"init_radius and coord_std must be positive, got {init_radius} and {coord_std}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = tuple(kernel_size)
        self.n_points = n_points
        self.shared_points = shared_points
        self.normalization = normalization
        self.init_radius = init_radius
        self.coord_std = coord_std
        self.radius_bounds = radius_bounds
        # Taps for one of those that the layer was built with, along each axis, once read off at another grid.
        self.density = (1.0,) * len(self.kernel_size)
        dims = len(self.kernel_size)
        sets = () if shared_points else (out_channels,)
        self.coords = nn.Parameter(torch.empty(*sets, n_points, dims, device=device, dtype=dtype))
        self.radius = nn.Parameter(torch.empty(*sets, n_points, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(out_channels, in_per_group, n_points, device=device, dtype=dtype))
        self.grid: Tensor
        self.register_buffer("grid", tap_grid(self.kernel_size, device=device, dtype=dtype))
        self._rendered: _Rendered | None = None

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draw the points anew, as the authors do: positions around the centre, or around the current sample in 1-D."""
        with torch.no_grad():
            if len(self.kernel_size) == 1:
                # Positions crowd at +1, the current sample: a normal around 0, cut to [-1, 0], stretched to [-1, 1].
                nn.init.trunc_normal_(self.coords, std=self.coord_std, a=-1.0, b=0.0)
                self.coords.mul_(2).add_(1)
            else:
                nn.init.trunc_normal_(self.coords, std=self.coord_std, a=-1.0, b=1.0)
            self.radius.fill_(self.init_radius)
            nn.init.trunc_normal_(self.weight, std=0.02)

    def kernel(self) -> Tensor:
        """The rendered kernel, ``(out, in per group, *kernel_size)``."""
        return render_kernel(self.coords, self.radius, self.weight, self.grid, self.normalization)

    def _kept(self, render: Callable[[], Tensor]) -> _Rendered | None:
        """What ``render`` gives, kept from an earlier call if nothing has changed; None where it must not be kept."""
        sources = (self.coords, self.radius, self.weight, self.grid)
        if self.training or recorded(sources) or torch._C._len_torch_dispatch_stack() > 0:
            return None
        if torch.is_grad_enabled() and any(t.requires_grad or unpack_dual(t).tangent is not None for t in sources):
            # A step of an optimizer may follow.
            self._rendered = None
            return None
        # Tensors made in inference mode do not count writes.
        if any(t.is_inference() for t in sources):
            return None
        # Steps of PyTorch's fused optimizers and replayed steps are not counted, and on a GPU no numbers are compared.
        if self.weight.is_cuda and any(t.is_leaf and t.grad is not None for t in sources):
            return None
        if self.weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        # Read once and replaced whole: other threads may do the same.
        rendered = self._rendered
        if rendered is None or not rendered.is_of(sources):
            self._rendered = rendered = _Rendered.now(render, sources)
        return rendered

    def train(self: PointKernelT, mode: bool = True) -> PointKernelT:
        self._rendered = None
        return super().train(mode)

    def _apply(self: PointKernelT, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PointKernelT:
        self._rendered = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._rendered = None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rendered": None}

    @torch.no_grad()
    def _widest_kernel(self, grid: Tensor) -> Tensor:
        """The kernel on ``grid`` for folding, rendered in the precision in which the layer itself renders it.

        In more of it, a tap at the very edge of a tent could count one point more or less.
        """
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        coords, radius, weight, grid = (each.to(dtype) for each in (self.coords, self.radius, self.weight, grid))
        return wide(render_kernel(coords, radius, weight, grid, self.normalization))

    @torch.jit.ignore
    @torch.no_grad()
    def clip_radius_(self) -> None:
        """Clamp the radii into ``radius_bounds``, in place; training calls it after every optimizer step."""
        self.radius.clamp_(*self.radius_bounds)

    @torch.jit.ignore
    def parameter_roles(self) -> dict[str, str]:
        """Role of each parameter that the optimizer treats in its own way: no decay on both, a slower rate on radii."""
        return {"coords": "coords", "radius": "radius"}

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, n_points={self.n_points}, "
            f"shared_points={self.shared_points}, normalization={self.normalization!r}"
        )


@register_notrace_module
class SMPConv2d(_PointKernel):
    """Continuous 2-D convolution, stride 1, output as large as the input: a drop-in for a depthwise ``nn.Conv2d``.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd size, or (height, width); may be larger than the map.
        groups: ``in_channels`` (= ``out_channels``) for a depthwise convolution, 1 for a dense one.
        bias: Whether to add a learned bias.
        n_points: Points per kernel; taps over ``points_divisor`` if None.
        points_divisor: See ``n_points``.
        shared_points: One set of positions and radii for all channels, or one per output channel; shared if None and
            the convolution is depthwise.
        normalization: ``"sum"`` or ``"count"``; see :mod:`smpconv_zoo.kernels`.
        init_radius: First radius of every point, in units of the kernel's half-width; ``4 / kernel_size`` (about two
            tap spacings) if None.
        coord_std: Spread of the first positions around the centre.
        radius_bounds: Limits that :meth:`clip_radius_` enforces.

    Shape: ``(N, in_channels, H, W)`` -> ``(N, out_channels, H, W)``.

    Raises:
        ValueError: An even kernel, ``groups`` other than the two, or a non-positive size.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        groups: int = 1,
        bias: bool = False,
        n_points: int | None = None,
        points_divisor: int = 4,
        shared_points: bool | None = None,
        normalization: str = "sum",
        init_radius: float | None = None,
        coord_std: float = 0.2,
        radius_bounds: tuple[float, float] = (1e-3, 1.0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(size) != 2 or min(size) < 3 or any(k % 2 == 0 for k in size):
            raise ValueError(f"kernel_size must be odd and at least 3 along both axes, got {kernel_size}")
        _check_positive(in_channels=in_channels, out_channels=out_channels, points_divisor=points_divisor)
        depthwise = groups == in_channels == out_channels
        if not depthwise and groups != 1:
            raise ValueError(
                f"groups must be 1, or in_channels = out_channels for a depthwise convolution; got groups={groups}, "
                f"in_channels={in_channels}, out_channels={out_channels}"
            )
        super().__init__(
            in_channels,
            out_channels,
            in_per_group=in_channels // groups,
            kernel_size=size,
            n_points=max(1, size[0] * size[1] // points_divisor) if n_points is None else n_points,
            shared_points=depthwise if shared_points is None else shared_points,
            normalization=normalization,
            init_radius=4.0 / min(size) if init_radius is None else init_radius,
            coord_std=coord_std,
            radius_bounds=radius_bounds,
            device=device,
            dtype=dtype,
        )
        self.groups = groups
        self.depthwise = depthwise
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.jit.ignore
    def kernel_for(self, x: Tensor) -> Tensor:
        """The rendered kernel without the taps that only ever see padding beside a map as small as that of ``x``."""
        kept = self._kept(self.kernel)
        return reachable_same(self.kernel() if kept is None else kept.kernel, x.shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            kernel = self.kernel()
            y = depthwise_conv2d(x, kernel) if self.depthwise else conv2d(x, kernel, self.bias)
        else:
            y = self._convolve(x)
        if not self.depthwise or self.bias is None:
            return y
        return y + self.bias.to(y.dtype).view(-1, 1, 1)

    @torch.jit.unused
    def _convolve(self, x: Tensor) -> Tensor:
        kept = self._kept(self.kernel)
        kernel, cache = (self.kernel(), None) if kept is None else (kept.kernel, kept.cache)
        if self.depthwise:
            return depthwise_conv2d_with(cache, x, kernel)
        return conv2d_with(cache, x, kernel, self.bias)

    def fuse(self) -> MergedConv2d:
        """The same as an ordinary convolution, for inference; :func:`timm.utils.reparameterize_model` calls this."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return MergedConv2d(self._widest_kernel(self.grid).to(self.weight), bias, self.depthwise)


@register_notrace_module
class SMPConv1d(_PointKernel):
    """Continuous causal 1-D convolution: the output at a time sees that sample and ``kernel_size - 1`` before it.

    Sequences shorter than the kernel meet its newest taps; longer ones are seen through a finite kernel.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Taps, of any parity, at least 2.
        bias: Whether to add a learned bias.
        n_points: Points per kernel.
        shared_points: One set of positions and radii for all output channels, or one per output channel.
        normalization: ``"sum"`` or ``"count"``; see :mod:`smpconv_zoo.kernels`.
        init_radius: First radius of every point, in units of the kernel's half-width; one tap spacing if None.
        coord_std: Spread of the first positions before the current sample.
        radius_bounds: Limits that :meth:`clip_radius_` enforces.

    Shape: ``(N, in_channels, L)`` -> ``(N, out_channels, L)``.

    Raises:
        ValueError: A non-positive size, or fewer than 2 taps.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        bias: bool = False,
        n_points: int = 30,
        shared_points: bool = False,
        normalization: str = "count",
        init_radius: float | None = None,
        coord_std: float = 0.1,
        radius_bounds: tuple[float, float] = (1e-4, 1.0),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size < 2:
            raise ValueError(f"kernel_size must be at least 2, got {kernel_size}")
        super().__init__(
            in_channels,
            out_channels,
            in_per_group=in_channels,
            kernel_size=(kernel_size,),
            n_points=n_points,
            shared_points=shared_points,
            normalization=normalization,
            init_radius=min(1.0, tap_spacing((kernel_size,))) if init_radius is None else init_radius,
            coord_std=coord_std,
            radius_bounds=radius_bounds,
            device=device,
            dtype=dtype,
        )
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None
        self.promised_reach: int | None = None
        self.reset_parameters()

    @torch.jit.ignore
    def reach(self) -> int:
        """How many of the newest taps hold everything: no point touches an older one. Waits for the GPU, if on one."""
        with torch.no_grad():
            # What is not a number may reach anywhere, a point without radius reaches nothing.
            oldest = (self.coords[..., 0] - self.radius).nan_to_num(-torch.inf, torch.inf, -torch.inf)
            oldest = torch.where(without_radius(self.radius), torch.inf, oldest).min()
            taps = self.kernel_size[0]
            # One tap more: whether the tap at the very edge is touched is for the rendering to decide.
            first = int(torch.searchsorted(self.grid[0].contiguous(), oldest)) - 1
        return taps - min(max(first, 0), taps - 1)

    @torch.jit.ignore
    def kernel_for(self, x: Tensor) -> Tensor:
        """The newest taps of the rendered kernel: as many as points reach and ``x`` (N, in, L) can feel."""
        return self._kernel_and_cache(x)[0]

    def _kernel_and_cache(self, x: Tensor) -> tuple[Tensor, KernelCache | None]:
        taps = min(x.size(-1), self.kernel_size[0])
        kept = self._kept(lambda: self._newest(self.kernel_size[0]))
        if kept is None:
            return self._newest(taps), None
        return kept.kernel[:, :, max(kept.kernel.size(2) - taps, 0) :], kept.cache

    def _newest(self, taps: int) -> Tensor:
        """At most ``taps`` of the newest taps of the rendered kernel, as far as points reach."""
        if self.promised_reach is not None:
            taps = min(taps, self.promised_reach)
        elif taps > 1 and self._may_measure():
            taps = min(taps, self.reach())
        grid = self.grid[:, self.kernel_size[0] - taps :]
        return render_kernel(self.coords, self.radius, self.weight, grid, self.normalization)

    def _may_measure(self) -> bool:
        """Whether a look at the positions is possible, and worth it: on a GPU it takes as long as a short kernel."""
        if recorded((self.coords, self.grid)) or torch._C._len_torch_dispatch_stack() > 0:
            return False
        if self.coords.is_cuda:
            return self.kernel_size[0] >= _MEASURED_TAPS_CUDA and not torch.cuda.is_current_stream_capturing()
        return self.coords.device.type == "cpu"

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return causal_conv1d(x, self.kernel(), self.bias)
        else:
            kernel, cache = self._kernel_and_cache(x)
            return causal_conv1d_with(cache, x, kernel, self.bias)

    def fuse(self) -> MergedConv1d:
        """The same as an ordinary convolution, for inference; :func:`timm.utils.reparameterize_model` calls this."""
        bias = None if self.bias is None else self.bias.detach().clone()
        return MergedConv1d(self._newest_taps().to(self.weight), bias)

    def _newest_taps(self) -> Tensor:
        """The kernel in double precision, without the old taps that no point touches."""
        taps = self.kernel_size[0]
        plain = not recorded((self.coords, self.grid)) and self.coords.device.type in ("cpu", "cuda")
        return self._widest_kernel(self.grid[:, taps - (self.reach() if plain else taps) :])


@register_notrace_module
class CausalConv1d(nn.Conv1d):
    """``nn.Conv1d`` of stride 1 that sees no future: padded on the left only. ``(N, in, L)`` -> ``(N, out, L)``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return causal_conv1d(x, self.weight, self.bias)


class ConvNorm(nn.Module):
    """A convolution and the norm behind it."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def fuse(self) -> nn.Module:
        """Both as one convolution with bias, for inference; the module itself if they cannot be folded."""
        return _one_convolution((self,)) or self


class ConvNormAct(timm.layers.ConvNormAct):
    """timm's convolution with norm and activation, which can be merged for inference."""

    def reparameterize(self) -> None:
        """Fold the norm into the convolution, in place; the activation takes the place of the norm."""
        self._fold(None)
        self.eval()

    def absorb(self, norm: nn.Module) -> nn.Module:
        """The same, with the norm in front as well; returns what has to stay in front."""
        if self._fold(norm):
            norm = nn.Identity()
        self.reparameterize()
        return norm

    def _fold(self, before: nn.Module | None) -> bool:
        parts: Any = self
        merged = fold_conv2d(parts.conv, before, parts.bn)
        if merged is None or not isinstance(parts.bn.drop, nn.Identity):
            return False
        parts.conv, parts.bn = merged, parts.bn.act
        return True


@register_notrace_module
class FinalNorm(nn.BatchNorm2d):
    """A batch norm with no convolution behind it; merged, it is a factor and a shift."""

    def fuse(self) -> nn.Module:
        """The same for inference; the norm itself if it has no running statistics."""
        affine = norm_affine(self)
        if affine is None:
            return self
        scale, shift = affine
        like = self.running_mean
        assert like is not None
        return ChannelAffine(scale.to(like), shift.to(like))


class LargeSmallConv(nn.Module):
    """A continuous kernel and a small ordinary one side by side, each with its norm, summed."""

    def __init__(self, large: ConvNorm, small: ConvNorm) -> None:
        super().__init__()
        self.large = large
        self.small = small

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.large(x) + self.small(x)
        else:
            return self.large(x) + self._of_small(x)

    @torch.jit.unused
    def _of_small(self, x: Tensor) -> Tensor:
        # PyTorch's gradient to a depthwise kernel takes long on a CPU; the dispatcher knows better ones.
        # torch.fx passes something else than a tensor.
        if self.training and isinstance(x, Tensor) and x.device.type == "cpu" and type(self.small) is ConvNorm:
            conv: Any = self.small.conv
            known = _keeps_size(conv) and _is_depthwise(conv) and conv.bias is None
            if known and unheard(self.small) and unheard(conv):
                y: Tensor = self.small.norm(depthwise_conv2d(x, conv.weight))
                return y
        return self.small(x)

    def fuse(self) -> nn.Module:
        """Kernels and norms as one convolution with bias, for inference; the module itself if they cannot be folded."""
        return _one_convolution((self.large, self.small)) or self


@register_notrace_module
class ActivatedPair(nn.Module):
    """A :class:`LargeSmallConv` and what follows it in a block, as few operators as can be.

    Args:
        large: The continuous kernel and its norm.
        small: The ordinary one and its norm.
        relu: Whether the sum goes through a ReLU.
        drop_rate: Dropout after that; None where there is none, at whatever rate.

    Shape: ``(N, in, *)`` -> ``(N, out, *)``. A ``residual`` of the output's shape, if given, is added at the end, and
    the result goes through a ReLU.
    """

    def __init__(self, large: ConvNorm, small: ConvNorm, relu: bool, drop_rate: float | None = None) -> None:
        super().__init__()
        self.large = large
        self.small = small
        self.relu = relu
        self.drop: nn.Module = nn.Identity() if drop_rate is None else nn.Dropout(drop_rate)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not torch.jit.is_scripting():
            y = self._fused(x, residual)
            if y is not None:
                return y
        return self._plain(self.large(x) + self.small(x), residual)

    def _plain(self, y: Tensor, residual: Tensor | None) -> Tensor:
        if self.relu:
            y = torch.relu(y)
        y = self.drop(y)
        if residual is not None:
            y = torch.relu(y + residual)
        return y

    def fuse(self) -> nn.Module:
        """The same with one convolution, for inference; the module itself if the two cannot be folded."""
        conv = _one_convolution((self.large, self.small))
        return self if conv is None else MergedPair(conv, self.relu)

    @torch.jit.unused
    def _convolve_both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        large: Any = self.large.conv
        small: Any = self.small.conv
        generated = isinstance(large, SMPConv1d | SMPConv2d | SineConv1d)
        if not (generated or type(large) is CausalConv1d) or not unheard(large) or not _is_plain(small):
            return large(x), small(x)
        kernel = large.kernel_for(x) if generated else large.weight[:, :, -x.size(2) :]
        if can_run_pair(x, kernel, small.weight):
            return convolve_pair(x, kernel, small.weight, large.bias, small.bias)
        convolve = causal_conv1d if x.dim() == 3 else conv2d
        return convolve(x, kernel, large.bias), convolve(x, small.weight, small.bias)

    @torch.jit.unused
    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """The same with the tail in one operator, or None where that cannot run."""
        if not (x.is_cuda and unheard(self.large) and unheard(self.small)):
            return None
        if not (isinstance(self.large, ConvNorm) and isinstance(self.small, ConvNorm)):
            # One of them has been merged, and the other could not be.
            return None
        a, b = self._convolve_both(x)
        if why_not_fused(a, b, self.large.norm, self.small.norm) is not None:
            return self._plain(self.large.norm(a) + self.small.norm(b), residual)
        drop_rate = self.drop.p if isinstance(self.drop, nn.Dropout) and self.drop.training else 0.0
        return norm_sum(a, b, self.large.norm, self.small.norm, self.relu, drop_rate, residual)


@register_notrace_module
class MergedPair(Merged):
    """An :class:`ActivatedPair` for inference: one convolution, and what follows it.

    Args:
        conv: The convolution that both have become.
        relu: Whether its output goes through a ReLU.

    Shape: as of :class:`ActivatedPair`.
    """

    def __init__(self, conv: MergedConv1d | MergedConv2d, relu: bool) -> None:
        super().__init__()
        self.conv = conv
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        if self.relu:
            y = torch.relu(y)
        return y if residual is None else torch.relu(y + residual)


def _one_convolution(branches: Sequence[nn.Module]) -> MergedConv1d | MergedConv2d | None:
    """Parallel convolutions with their norms as one with bias; None if there is anything that cannot be folded."""
    kernels: list[Tensor] = []
    biases: list[Tensor] = []
    depthwise: bool | None = None
    for branch in branches:
        if not isinstance(branch, ConvNorm):
            return None
        conv: Any = branch.conv
        if isinstance(conv, SMPConv1d):
            kernel, each = conv._newest_taps(), None
        elif isinstance(conv, SineConv1d):
            kernel, each = conv.kernel().detach(), None
        elif isinstance(conv, SMPConv2d):
            kernel, each = conv._widest_kernel(conv.grid), conv.depthwise
        elif _keeps_size(conv):
            kernel, each = conv.weight, None if conv.weight.dim() == 3 else _is_depthwise(conv)
        else:
            return None
        folded = through_norm(kernel, conv.bias, branch.norm)
        if folded is None or (kernels and (each != depthwise or folded[0].dim() != kernels[0].dim())):
            return None
        depthwise = each
        kernels.append(folded[0])
        biases.append(folded[1])
    weight: Any = next(conv.parameters())
    bias = torch.stack(biases).sum(0).to(weight)
    if depthwise is None:
        return MergedConv1d(newest_sum(kernels).to(weight).contiguous(), bias)
    return MergedConv2d(centred_sum(kernels).to(weight).contiguous(), bias, depthwise)


def _is_plain(conv: nn.Module) -> bool:
    """Whether a convolution is one that the dispatcher knows: stride 1, output as large as the input."""
    return unheard(conv) and _keeps_size(conv) and bool(isinstance(conv, CausalConv1d) or conv.groups == 1)


def _keeps_size(conv: Any) -> bool:
    """Whether a convolution is an ordinary one of stride 1 with an output as large as the input, dense or depthwise."""
    if type(conv) is CausalConv1d:
        return True
    return (
        type(conv) is nn.Conv2d
        and conv.stride == conv.dilation == (1, 1)
        and (conv.groups == 1 or _is_depthwise(conv))
        and conv.kernel_size[0] % 2 == conv.kernel_size[1] % 2 == 1
        and conv.padding == (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
        and conv.padding_mode == "zeros"
    )


def _is_depthwise(conv: Any) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels


def clip_radius_(model: nn.Module) -> None:
    """Clamp the radii of every SMPConv layer of ``model`` into its bounds, in place.

    Training calls this after every optimizer step, or lets :func:`attach_radius_clip` do so. A point whose radius
    reaches zero touches nothing, and learns no more.
    """
    for module in model.modules():
        if isinstance(module, _PointKernel):
            module.clip_radius_()


def attach_radius_clip(optimizer: torch.optim.Optimizer, model: nn.Module) -> RemovableHandle:
    """Let every step of ``optimizer`` end with :func:`clip_radius_`, so that a training loop need not think of it.

    A step that is not taken, because a gradient scaler met an overflow, is followed by no clip.

    Args:
        optimizer: Whatever moves the radii.
        model: The network, or what it is wrapped in.

    Returns:
        A handle; its ``remove()`` ends it.
    """

    def clip(*_: object) -> None:
        clip_radius_(model)

    # timm's Lookahead never calls its own hooks. What it mixes with clipped radii are radii clipped before.
    inner: torch.optim.Optimizer = getattr(optimizer, "_base_optimizer", optimizer)
    return inner.register_step_post_hook(clip)


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Name of every parameter of ``model`` with a role of its own, ``"coords"`` or ``"radius"``, to that role."""
    return {
        f"{prefix}.{name}" if prefix else name: role
        for prefix, module in model.named_modules()
        if isinstance(module, _PointKernel)
        for name, role in module.parameter_roles().items()
    }


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


for _function in (causal_conv1d, conv2d, depthwise_conv2d, render_kernel):
    register_notrace_function(_function)

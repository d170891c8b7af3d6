"""Pictures of what a network learned: its kernels, the points they are made of, and its confusions.

matplotlib is imported when a picture is drawn, never before, and used through its object interface: no window opens and
no setting of the caller's changes.
"""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from smpconv_zoo.layers import SMPConv1d, SMPConv2d

__all__ = ["confusion_figure", "kernel_figure", "require_matplotlib", "resolution_figure"]

STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
}
LEARNED, INITIAL = "#3b6ea5", "#d1495b"


def kernel_figure(model: nn.Module, title: str) -> bytes | None:
    """The first continuous convolution of ``model`` and its last: kernels, and the points that make them.

    Args:
        model: A network with SMPConv layers; one without gives None.
        title: Heading of the picture.

    Returns:
        A PNG file.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (SMPConv1d, SMPConv2d))]
    if not layers:
        return None
    chosen = layers[:1] if len(layers) == 1 else [layers[0], layers[-1]]
    sequence = isinstance(layers[0][1], SMPConv1d)
    draw: Callable[[Any, Any], None] = _draw_sequence if sequence else _draw_image
    with require_matplotlib().rc_context(STYLE), torch.inference_mode():
        figure = _new_figure((6.6 * len(chosen), 9.0 if sequence else 7.6), title)
        for part, (name, layer) in zip(figure.subfigures(1, len(chosen), squeeze=False)[0], chosen, strict=True):
            # The pair's own place says enough: blocks.0.conv1.large.conv is the large kernel of blocks.0.conv1.
            place = name.removesuffix(".large.conv")
            part.suptitle(f"{place}: {layer.in_channels} to {layer.out_channels} channels", fontsize=12)
            draw(part, layer)
        return _png(figure)


def confusion_figure(confusion: Sequence[Sequence[int]], title: str) -> bytes:
    """Confusion matrix: true classes down, predicted ones across, every count written where it is not zero.

    Mistakes alone are coloured: beside them the diagonal would drown everything.

    Returns:
        A PNG file.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
    """
    counts = torch.tensor(confusion)
    mistakes = counts.clone().fill_diagonal_(0).numpy()
    size = len(confusion)
    most = max(1, int(mistakes.max()))
    with require_matplotlib().rc_context(STYLE):
        figure = _new_figure((6.2, 5.6), title)
        axes = figure.subplots()
        image = axes.imshow(mistakes, cmap="Reds", vmin=0, vmax=most)
        for true, predicted in counts.nonzero().tolist():
            right = true == predicted
            strong = int(mistakes[true, predicted]) > 0.6 * most
            axes.text(
                predicted,
                true,
                str(int(counts[true, predicted])),
                ha="center",
                va="center",
                color="white" if strong else LEARNED if right else "black",
                fontweight="bold" if right else "normal",
            )
        axes.set(xlabel="predicted class", ylabel="true class", xticks=range(size), yticks=range(size))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        integers = require_matplotlib("ticker").MaxNLocator(integer=True)
        figure.colorbar(image, ax=axes, label="mistakes (samples)", shrink=0.85, ticks=integers)
        return _png(figure)


def resolution_figure(curves: Sequence[tuple[str, int, dict[str, list[tuple[int, float]]]]]) -> bytes:
    """Accuracy against the size of the input, a picture each checkpoint side by side.

    Args:
        curves: Of each checkpoint its id, the size that it was trained at, and of each way of meeting another size the
            points (size, top-1 in percent).

    Returns:
        A PNG file.

    Raises:
        ImportError: matplotlib is not installed; the message says how to get it.
    """
    with require_matplotlib().rc_context(STYLE):
        figure = _new_figure((4.6 * len(curves), 4.2), "Trained at one size, tested at others")
        for axes, (title, trained, ways) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
            for (way, points), marker in zip(ways.items(), "osDv^", strict=False):
                sizes, values = zip(*sorted(points), strict=True)
                axes.plot(sizes, values, marker=marker, markersize=6, linewidth=1.6, label=way, clip_on=False)
            axes.axvline(trained, color="#999999", linewidth=0.8, linestyle="--", zorder=0)
            ticks = sorted({size for points in ways.values() for size, _ in points})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [str(size) for size in ticks])
            axes.set_xticks([], minor=True)
            axes.set(ylim=(0, 100), ylabel="top-1 (%)", xlabel="size of the input; dashed: as trained")
            axes.set_title(title, fontsize=10)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(ways), frameon=False)
        return _png(figure)


def _draw_sequence(part: Any, layer: SMPConv1d) -> None:
    """Kernel, points and histogram of positions over one axis of time, the current sample at the right."""
    kernel = layer.kernel().cpu()
    last = layer.kernel_size[0] - 1
    # Coordinate +1 is the current sample, -1 the oldest: a lag of `last` samples.
    lag = ((1 - layer.coords[..., 0]) / 2 * last).expand(layer.out_channels, layer.n_points).cpu()
    inside = lag[(lag >= 0) & (lag <= last)]
    reach = min(last, _round_up(float(inside.quantile(0.995)) if len(inside) else last))
    hidden = int(((lag < -0.5) | (lag > reach + 0.5)).sum())
    heat, points, histogram = part.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 3, 1.6]})

    strongest = int(kernel.square().sum(dim=(0, 2)).argmax())
    values = kernel[:, strongest].flip(-1)[:, : reach + 1]
    limit = float(values.abs().quantile(0.998)) or float(values.abs().max()) or 1.0
    extent = (-0.5, reach + 0.5, -0.5, layer.out_channels - 0.5)
    image = heat.imshow(
        values.numpy(),
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        extent=extent,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
    )
    heat.set_title("Kernel" if layer.in_channels == 1 else f"Kernel seen by input channel {strongest}, the strongest")
    heat.set_ylabel("output channel")
    part.colorbar(image, ax=heat, label="weight", pad=0.02, extend="both")

    norm = layer.weight.norm(dim=1).cpu()
    order = norm.flatten().argsort()
    channel = torch.arange(layer.out_channels)[:, None].expand_as(lag)
    x, y, strength = (values.flatten()[order].numpy() for values in (lag, channel, norm))
    scatter = points.scatter(x, y, c=strength, s=16, cmap=_visible_blues(), linewidths=0)
    outside = f" ({hidden} of {lag.numel()} lie outside the picture)" if hidden else ""
    points.set_title(f"Points{outside}")
    points.set(ylabel="output channel", ylim=(-0.5, layer.out_channels - 0.5))
    part.colorbar(scatter, ax=points, label="norm of value", pad=0.02)

    histogram.hist(inside.numpy(), bins=60, range=(0, reach), color=LEARNED, label="learned")
    _add_initial_density(histogram, layer, reach, lag.numel() * reach / 60)
    histogram.set(ylabel="points", xlabel="samples before the current one", xlim=(reach + 0.5, -0.5))
    histogram.legend(frameon=False, loc="upper left")


def _add_initial_density(axes: Any, layer: SMPConv1d, reach: int, scale: float) -> None:
    """Where the points began: half a normal distribution, by construction (``reset_parameters``)."""
    spread = layer.coord_std * (layer.kernel_size[0] - 1)
    lags = np.linspace(0, reach, 200)
    density = math.sqrt(2 / math.pi) / spread * np.exp(-0.5 * (lags / spread) ** 2)
    axes.plot(lags, density * scale, color=INITIAL, linewidth=1.8, label="before training")


def _draw_image(part: Any, layer: SMPConv2d) -> None:
    """The nine strongest kernels of a 2-D layer, each with its points, as far as any of them reaches."""
    kernel = layer.kernel().flatten(0, 1).cpu()
    strongest = kernel.square().sum(dim=(1, 2)).argsort(descending=True)[:9]
    rows, columns = (size // 2 for size in layer.kernel_size)
    touched = (kernel[strongest] != 0).any(dim=0).nonzero() - torch.tensor([rows, columns])
    reach = min(max(rows, columns), int(touched.abs().max()) + 1) if len(touched) else max(rows, columns)
    coords = layer.coords.expand(layer.out_channels, layer.n_points, 2).cpu().numpy()
    limit = float(kernel[strongest].abs().max()) or 1.0
    grid = part.subplots(3, 3, sharex=True, sharey=True)
    for axes, index in zip(grid.flat, strongest.tolist(), strict=False):
        out, within = divmod(index, layer.weight.shape[1])
        extent = (-columns - 0.5, columns + 0.5, -rows - 0.5, rows + 0.5)
        image = axes.imshow(kernel[index].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent)
        axes.scatter(coords[out, :, 0] * columns, coords[out, :, 1] * rows, s=7, color="black", linewidths=0, alpha=0.6)
        axes.set(xlim=(-reach - 0.5, reach + 0.5), ylim=(-reach - 0.5, reach + 0.5))
        axes.set_title(f"channel {out}" if layer.depthwise else f"from channel {within} to {out}", fontsize=10)
    grid[0, 0].xaxis.set_major_locator(require_matplotlib("ticker").MaxNLocator(4, integer=True))
    grid[0, 0].yaxis.set_major_locator(require_matplotlib("ticker").MaxNLocator(4, integer=True))
    for axes in grid.flat[len(strongest) :]:
        axes.set_axis_off()
    part.colorbar(image, ax=grid, label="weight; the dots are the points", shrink=0.7, pad=0.02)
    part.supxlabel("taps to the right of the centre", fontsize=10)
    part.supylabel("taps above the centre", fontsize=10)


def _round_up(value: float) -> int:
    """The next round number of samples."""
    step = 10 if value > 50 else 5
    return max(step, math.ceil(value / step) * step)


def require_matplotlib(module: str = "") -> Any:
    """matplotlib, or a module of it.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(f"matplotlib.{module}" if module else "matplotlib")
    except ModuleNotFoundError as error:
        raise ImportError('The pictures of the report need matplotlib: pip install "smpconv-zoo[report]"') from error


def _visible_blues() -> Any:
    """A colour map from light to dark whose light end can still be seen on white."""
    colours = require_matplotlib().colormaps["YlGnBu"](np.linspace(0.3, 1, 256))
    return require_matplotlib("colors").ListedColormap(colours)


def _new_figure(size: tuple[float, float], title: str) -> Any:
    figure = require_matplotlib("figure").Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()

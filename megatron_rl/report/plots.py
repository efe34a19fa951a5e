"""How the report's plots are drawn, on a light or a dark page."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rl.report.plot_list import Plot
from megatron_rl.report.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Colormap

_SIZE_INCHES = (6.4, 3.1)
_DPI = 150
_MANY_STEPS = 60  # from here on curves are smoothed, with the raw values faint behind
_FEW_STEPS = 25  # up to here each step has a marker
_LOG_FROM = 5  # largest / smallest value from which a logarithmic axis pays
_LEGEND_LAYERS = 6  # up to here layers are named in a legend, beyond it by a colour bar
_LEGEND_BESIDE_TITLE = 8  # up to here curves are named beside the title, beyond it below the plot
_LEGEND_ROW_INCHES = 0.18
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))  # where colours run out
_MARKERS = "osD^v"  # where dashes have run out as well


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    name: str
    background: str
    text: str
    muted: str
    grid: str
    series: tuple[str, ...]


LIGHT = Theme(
    "light",
    "#ffffff",
    "#24292f",
    "#57606a",
    "#e6e8eb",
    ("#1f5f99", "#c8641e", "#2f7d57", "#7a4f9e", "#a3323f"),
)
DARK = Theme(
    "dark",
    "#171b21",
    "#dfe3e8",
    "#9aa4b0",
    "#2b323b",
    ("#6aaee6", "#eb9a5c", "#6cc497", "#b795dc", "#e5808b"),
)


def render(plot: Plot, run: Run, theme: Theme) -> bytes:
    """The plot as PNG bytes. Drawn on a Figure of its own: no pyplot, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    below = len(plot.metrics) // 2 if len(plot.metrics) > _LEGEND_BESIDE_TITLE else 0
    size = (_SIZE_INCHES[0], _SIZE_INCHES[1] + below * _LEGEND_ROW_INCHES)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=size, dpi=_DPI, facecolor=theme.background, layout=layout)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _style(axes, plot, theme)
    draw: Callable[[Axes, Plot, Run, Theme], None] = {
        "lines": _draw_lines,
        "eval": _draw_eval,
        "layers": _draw_layers,
        "time": _draw_time,
    }[plot.kind]
    draw(axes, plot, run, theme)
    _mark_changes(axes, run, theme)
    _finish(axes, plot, run, theme)
    return _png(canvas)


def smooth(values: Sequence[float], half_width: int) -> list[float]:
    """Centred moving average; the window shrinks at the ends: mean of values[max(0, i-h) :
    i+h+1]."""
    result = []
    for i in range(len(values)):
        window = values[max(0, i - half_width) : i + half_width + 1]
        result.append(sum(window) / len(window))
    return result


def _png(canvas: FigureCanvasAgg) -> bytes:
    """PNG with a palette of 128 colours: a third of the size, and the page carries each twice."""
    from PIL import Image

    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(128, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _style(axes: Axes, plot: Plot, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_facecolor(theme.background)
    axes.set_title(plot.title, loc="left", color=theme.text, fontsize=11, fontweight="bold", pad=10)
    axes.set_xlabel("step", color=theme.muted, fontsize=8.5)
    axes.tick_params(which="both", colors=theme.muted, labelsize=8.5, length=0)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if plot.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _mark_changes(axes: Axes, run: Run, theme: Theme) -> None:
    """A dotted line before the first step of every configuration but the first."""
    for configuration in run.configurations[1:]:
        axes.axvline(
            configuration.first_step - 0.5,
            color=theme.muted,
            linewidth=1.0,
            linestyle=":",
            zorder=1,
        )


def _finish(axes: Axes, plot: Plot, run: Run, theme: Theme) -> None:
    from matplotlib.ticker import ScalarFormatter

    axes.margins(x=0.06 if plot.kind == "eval" else 0.02)
    values = [value for name, _ in plot.metrics for value in run.series(name)[1]]
    if plot.log and 0 < _LOG_FROM * min(values) < max(values):
        _log_axis(axes)
    if axes.get_yscale() == "linear" and isinstance(
        axes.yaxis.get_major_formatter(), ScalarFormatter
    ):
        axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set(color=theme.muted, fontsize=8.5)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0)}
        place["ncols"] = len(labels) if len(labels) <= 4 else (len(labels) + 1) // 2
        if len(labels) > _LEGEND_BESIDE_TITLE:
            place = {"loc": "upper left", "bbox_to_anchor": (0.0, -0.16), "ncols": 2}
        axes.legend(
            handles,
            labels,
            **place,
            frameon=False,
            fontsize=8.5,
            labelcolor=theme.text,
            handlelength=1.2,
            columnspacing=1.2,
            borderaxespad=0.2,
        )


def _log_axis(axes: Axes) -> None:
    """Logarithmic; plain numbers at 1, 2 and 5 of each decade, or at decades of a wide range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _smoothed(values: list[float]) -> list[float]:
    """Long curves smoothed over about 4% of their length; short ones as they are."""
    return smooth(values, max(2, len(values) // 50)) if len(values) >= _MANY_STEPS else values


def _strokes(theme: Theme) -> Iterator[dict[str, Any]]:
    """Ways to draw a curve, each of its own: by colour, then by dashes, then by marker."""
    for number in itertools.count():
        dashes = _DASHES[number % len(_DASHES)]
        markers = _MARKERS[number // len(_DASHES) % len(_MARKERS)] if number >= len(_DASHES) else ""
        marked = {"marker": markers, "markevery": 0.1} if markers else {}
        for colour in theme.series:
            yield {"color": colour, "linestyle": dashes, **marked}


def _draw_lines(axes: Axes, plot: Plot, run: Run, theme: Theme) -> None:
    for (name, label), stroke in zip(plot.metrics, _strokes(theme), strict=False):
        steps, values = run.series(name)
        shown = _smoothed(values) if plot.smoothed else values
        if shown != values:
            axes.plot(steps, values, color=stroke["color"], linewidth=0.8, alpha=0.3)
        if steps:
            few = {"marker": "o"} if len(steps) <= _FEW_STEPS else {}
            axes.plot(steps, shown, linewidth=1.7, markersize=3.2, label=label, **few | stroke)


def _draw_eval(axes: Axes, plot: Plot, run: Run, theme: Theme) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3, foreground=theme.background)]
    for (name, label), colour in zip(plot.metrics, theme.series, strict=False):
        steps, values = run.series(name)
        if not steps:
            continue
        axes.plot(steps, values, color=colour, linewidth=1.7, marker="o", markersize=5, label=label)
        for i in sorted({0, len(steps) - 1}):
            axes.annotate(
                f"{100 * values[i]:.1f}%",
                (steps[i], values[i]),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                color=colour,
                fontsize=8.5,
                path_effects=halo,
            )
    axes.margins(y=0.18)


def _draw_layers(axes: Axes, plot: Plot, run: Run, theme: Theme) -> None:
    """A thin line a layer, coloured from the first to the last, and the overall metric dashed."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    # The part of the colour map that stands out from the page.
    source, low, high = ("viridis", 0.1, 0.9) if theme.name == "light" else ("plasma", 0.35, 0.95)
    shades = colormaps[source](np.linspace(low, high, 64))
    colours = LinearSegmentedColormap.from_list("layers", shades)
    name, label = plot.metrics[0]
    layers = run.layer_series(name)
    first, last = min(layers, default=0), max(layers, default=0)
    for layer, (steps, values) in layers.items():
        colour = colours((layer - first) / max(last - first, 1))
        shown = f"layer {layer}" if len(layers) <= _LEGEND_LAYERS else None
        axes.plot(steps, _smoothed(values), color=colour, linewidth=1.1, label=shown)
    steps, values = run.series(name)
    if steps:
        dashes = (0, (4, 1.5))
        axes.plot(
            steps, _smoothed(values), color=theme.text, linewidth=1.9, linestyle=dashes, label=label
        )
    if len(layers) > _LEGEND_LAYERS:
        _layer_bar(axes, colours, first, last, theme)


def _layer_bar(axes: Axes, colours: Colormap, first: int, last: int, theme: Theme) -> None:
    """Colour bar that names the layers, in place of a long legend."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    scale = ScalarMappable(Normalize(first, last), colours)
    bar = axes.figure.colorbar(
        scale, ax=axes, pad=0.02, aspect=28, ticks=MaxNLocator(6, integer=True)
    )
    bar.set_label("layer", color=theme.muted, fontsize=8.5)
    bar.ax.tick_params(colors=theme.muted, labelsize=8.5, length=0)
    bar.outline.set_visible(False)


def _draw_time(axes: Axes, plot: Plot, run: Run, theme: Theme) -> None:
    """Phases stacked; what of the step falls in none of them on top, in grey."""
    steps = run.series("time/step_s")[0] or sorted(
        {s for name, _ in plot.metrics for s in run.series(name)[0]}
    )
    rows, labels, colours = [], [], []
    for (name, label), colour in zip(plot.metrics, theme.series, strict=False):
        seconds = dict(zip(*run.series(name), strict=True))
        if seconds:
            rows.append([seconds.get(step, 0.0) for step in steps])
            labels.append(label)
            colours.append(colour)
    whole: Mapping[int, float] = dict(zip(*run.series("time/step_s"), strict=True))
    if whole:
        rest = [max(0.0, whole[s] - sum(row[i] for row in rows)) for i, s in enumerate(steps)]
        rows.append(rest)
        labels.append("other")
        colours.append(theme.muted)
    if len(steps) > _FEW_STEPS:
        axes.stackplot(steps, *rows, labels=labels, colors=colours, alpha=0.85, linewidth=0)
    else:
        bottom = [0.0] * len(steps)
        for row, label, colour in zip(rows, labels, colours, strict=True):
            axes.bar(steps, row, 0.8, bottom, color=colour, alpha=0.85, label=label)
            bottom = [b + r for b, r in zip(bottom, row, strict=True)]
    axes.set_ylabel("seconds", color=theme.muted, fontsize=8.5)

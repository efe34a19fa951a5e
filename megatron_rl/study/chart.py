"""A chart of several curves with bands, as plain SVG: the one place that draws for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 30
#: Colours of arms, in their order, legible on light and dark pages; after them dashes begin.
COLOURS = (
    *("#3b82c4", "#d97a2b", "#3a9a6b", "#9465bd", "#c8485a", "#8a6d3b"),
    *("#d56fb0", "#6f7b86", "#a3a02a", "#2aa7b8", "#5b63d3", "#b0503a"),
)


@dataclass(frozen=True)
class Curve:
    """The mean of an arm over its seeds, with the interval of the mean; equally many of each."""

    arm: int  #: its place among the arms, which gives its colour
    name: str
    steps: Sequence[float]
    means: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


def chart(title: str, curves: Sequence[Curve], percent: bool = False) -> str:
    """A figure of HTML: one panel of the page. The curves have points."""
    xs = [x for curve in curves for x in curve.steps]
    ys = [y for curve in curves for y in (*curve.lows, *curve.highs)]
    x_low, x_high = _widened(min(xs), max(xs))
    y_low, y_high = _widened(min(ys), max(ys))

    def at(x: float, y: float) -> str:
        right = _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (y_high - y) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{right:.1f},{down:.1f}"

    shapes = []
    for value in _ticks(y_low, y_high):
        left, down = at(x_low, value).split(",")
        text = f"{100 * value:g}%" if percent else f"{value:g}"
        shapes.append(
            f"<line class='grid' x1='{left}' x2='{_WIDTH - _RIGHT}' y1='{down}' y2='{down}'/>"
        )
        shapes.append(f"<text x='{_LEFT - 6}' y='{down}' dy='4' text-anchor='end'>{text}</text>")
    for value in _ticks(x_low, x_high):
        right = at(value, y_low).split(",")[0]
        shapes.append(f"<text x='{right}' y='{_HEIGHT - 10}' text-anchor='middle'>{value:g}</text>")
    for curve in curves:
        lower = [at(x, y) for x, y in zip(curve.steps, curve.lows)]
        upper = [at(x, y) for x, y in zip(curve.steps, curve.highs)]
        colour = COLOURS[curve.arm % len(COLOURS)]
        around = " ".join([*upper, *reversed(lower)])
        shapes.append(f"<polygon points='{around}' fill='{colour}' opacity='0.16'/>")
    for curve in curves:
        points = " ".join(at(x, y) for x, y in zip(curve.steps, curve.means))
        shapes.append(
            f"<polyline points='{points}' fill='none' stroke='{COLOURS[curve.arm % len(COLOURS)]}' "
            f"stroke-width='1.8'{_dashes(curve.arm)}><title>{escape(curve.name)}</title></polyline>"
        )
    label = escape(f"{title} over steps, a curve an arm", quote=True)
    return (
        f"<figure><h3>{escape(title)}</h3><svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' "
        f"aria-label='{label}'>{''.join(shapes)}</svg></figure>"
    )


def legend(arms: Sequence[str]) -> str:
    """The colours of all arms, once for all charts."""
    items = []
    for number, arm in enumerate(arms):
        colour = COLOURS[number % len(COLOURS)]
        line = f"<line x2='24' y1='6' y2='6' stroke='{colour}' stroke-width='3'{_dashes(number)}/>"
        items.append(f"<li><svg width='24' height='12'>{line}</svg> {escape(arm)}</li>")
    return f"<ul class='legend'>{''.join(items)}</ul>"


def _dashes(arm: int) -> str:
    turns = arm // len(COLOURS)
    return f" stroke-dasharray='{6 * turns} 3'" if turns else ""


def _widened(low: float, high: float) -> tuple[float, float]:
    """The range, or one around a single value."""
    return (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers in a range: multiples of 1, 2 or 5 of a power of ten."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.10g}") for number in range(first, last + 1)]

"""Differences of arms with their intervals as one figure: SVG that needs nothing else.

A row an arm, a panel a study or metric. A line is an interval and the dot its mean; intervals that
do not hold 0 are coloured, blue on the right and orange on the left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from megatron_rl.study.statistics import Estimate

_NAMES, _PANEL, _GAP, _ROW, _TOP, _BOTTOM = 160, 200, 36, 20, 32, 36
_LETTER = 7.2  #: width of a letter of a name, about
_TICKS = (1, 2, 5, 10, 20, 25, 50)
_STYLE = """
.forest { --ground: #fff; --text: #22272e; --line: #d8dde3; --faint: #f3f5f7; --rest: #77828e;
  --right: #1f5f99; --left: #c8641e; }
@media screen and (prefers-color-scheme: dark) { .forest { --ground: #171b21; --text: #dfe3e8;
  --line: #39424d; --faint: #1f252d; --rest: #9aa4b0; --right: #6aaee6; --left: #eb9a5c; } }
.forest text { font: 12px system-ui, sans-serif; fill: var(--text); }
.forest .title { font-weight: 600; text-anchor: middle; }
.forest .arm { text-anchor: end; }
.forest .tick { font-size: 11px; fill: var(--rest); text-anchor: middle; }
.forest .ground { fill: var(--ground); }
.forest .stripe { fill: var(--faint); }
.forest .grid { stroke: var(--line); stroke-width: 0.6; }
.forest .zero { stroke: var(--rest); }
.forest .rest { stroke: var(--rest); fill: var(--rest); }
.forest .right { stroke: var(--right); fill: var(--right); }
.forest .left { stroke: var(--left); fill: var(--left); }
.forest .interval { stroke-width: 1.8; }
"""


@dataclass(frozen=True)
class Panel:
    """A column of the figure."""

    title: str
    rows: Mapping[str, Estimate | None]  #: arm -> difference


def forest(panels: Sequence[Panel], axis: str, scale: float = 1.0, limit: float = math.inf) -> str:
    """The figure as SVG. All panels have one axis, with 0 in its middle.

    Args:
        panels: at least one. The rows are the arms of all, in the order in which they come.
        axis: what the axis says, with the unit.
        scale: factor from values to that unit.
        limit: the axis ends here at the latest, in that unit; what lies beyond is an arrow.
    """
    arms = list(dict.fromkeys(arm for panel in panels for arm in panel.rows))
    found = [value for panel in panels for value in panel.rows.values() if value is not None]
    furthest = max((abs(scale * end) for one in found for end in _ends(one)), default=1.0)
    reach = min(limit, furthest * 1.05) or 1.0
    names = max(_NAMES, round(_LETTER * max(map(len, arms), default=0)) + 16)
    width, bottom = names + len(panels) * (_PANEL + _GAP), _TOP + _ROW * len(arms)
    parts = [
        f'<svg class="forest" xmlns="http://www.w3.org/2000/svg" width="{width}" '
        f'height="{bottom + _BOTTOM}" viewBox="0 0 {width} {bottom + _BOTTOM}" role="img" '
        f'aria-label="{escape(axis)}"><style>{_STYLE}</style>',
        f'<rect class="ground" width="{width}" height="{bottom + _BOTTOM}"/>',
    ]
    for row, arm in enumerate(arms):
        y = _TOP + _ROW * row
        if row % 2 == 0:
            parts.append(f'<rect class="stripe" y="{y}" width="{width}" height="{_ROW}"/>')
        parts.append(f'<text class="arm" x="{names - 10}" y="{y + 14}">{escape(arm)}</text>')
    for place, panel in enumerate(panels):
        middle = names + place * (_PANEL + _GAP) + _PANEL / 2
        parts.append(f'<text class="title" x="{middle}" y="20">{escape(panel.title)}</text>')
        parts += _grid(middle, bottom, reach)
        for row, arm in enumerate(arms):
            one = panel.rows.get(arm)
            if one is not None:
                parts += _mark(one, scale / reach, middle, _TOP + _ROW * row + _ROW // 2)
    label = f'<text class="tick" x="{(names + width) / 2}" y="{bottom + 30}">{escape(axis)}</text>'
    return "\n".join([*parts, label, "</svg>"]) + "\n"


def _ends(one: Estimate) -> tuple[float, float]:
    return (one.mean if one.low is None else one.low, one.mean if one.high is None else one.high)


def _grid(middle: float, bottom: int, reach: float) -> list[str]:
    """Lines and their numbers, at most three to a side."""
    power = 10.0 ** math.floor(math.log10(reach / 3))
    step = next(power * tick for tick in _TICKS if reach / (power * tick) < 3.5)
    parts = []
    for tick in range(-int(reach / step), int(reach / step) + 1):
        x = round(middle + tick * step / reach * _PANEL / 2, 1)
        kind = "grid" if tick else "zero"
        text = f"{tick * step:+.6g}" if tick else "0"
        parts.append(f'<path class="{kind}" d="M{x} {_TOP}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 14}">{text}</text>')
    return parts


def _mark(one: Estimate, scale: float, middle: float, y: int) -> list[str]:
    """An interval and its mean; ``scale``: from values to halves of the panel."""

    def across(value: float) -> float:
        return round(middle + max(-1.0, min(1.0, scale * value)) * _PANEL / 2, 1)

    low, high = _ends(one)
    kind = "right" if low > 0 else "left" if high < 0 else "rest"
    if one.low is None:
        kind = "rest"
    ends = [across(low), across(high)]
    parts = [f'<path class="interval {kind}" d="M{ends[0]} {y}H{ends[1]}"/>']
    for value, side in ((low, -1), (high, 1)):
        if scale * value * side > 1:  # beyond the axis
            x = across(value)
            parts.append(f'<path class="{kind}" d="M{x} {y}l{-7 * side} -4v8z"/>')
    if abs(scale * one.mean) <= 1:
        parts.append(f'<circle class="{kind}" cx="{across(one.mean)}" cy="{y}" r="3.5"/>')
    return parts

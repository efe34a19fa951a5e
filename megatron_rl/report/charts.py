"""Charts as data. The page's script (`page_files/`) draws them; see README.md for the interface."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

#: Columns of a heatmap at most: beyond it neighbouring steps share one.
MOST_COLUMNS = 600
_DIGITS = 6  # significant, of a number in a page


@dataclass(frozen=True)
class Series:
    """A curve: a value at each of its steps, which rise; a band from ``low`` to ``high``."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Its points where every number is finite. ValueError: the lists differ in length."""
        columns = [self.values] + [c for c in (self.low, self.high) if c is not None]
        points = [
            (step, *map(_rounded, numbers))
            for step, *numbers in zip(self.steps, *columns, strict=True)
            if all(map(math.isfinite, numbers))
        ]
        names = ["steps", "values"] + [n for n in ("low", "high") if getattr(self, n) is not None]
        lists = map(list, zip(*points)) if points else [[] for _ in names]
        return {"name": self.name, **dict(zip(names, lists))}


@dataclass(frozen=True)
class Chart:
    """One figure of a page, as the script reads it."""

    data: Mapping[str, Any]

    def last_values(self) -> list[tuple[str, float]]:
        """The last value of each curve, for readers without the script."""
        found = [(s["name"], s["values"][-1]) for s in self.data.get("series", ()) if s["values"]]
        overall = self.data.get("overall")
        return found or ([(overall["name"], overall["values"][-1])] if overall else [])


@dataclass(frozen=True)
class Group:
    """Charts under one heading."""

    title: str
    charts: Sequence[Chart] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """As the script reads it."""
        return {"title": self.title, "charts": [dict(chart.data) for chart in self.charts]}


def chart(
    name: str,
    title: str,
    series: Sequence[Series],
    caption: str = "",
    *,
    percent: bool = False,
    log: bool = False,
    stacked: bool = False,
    smoothed: bool = True,
    marks: Sequence[float] = (),
) -> Chart:
    """A chart of curves over steps.

    Args:
        name: of the figure, unique on its page: letters, digits, ``_`` and ``-``.
        title: above the curves.
        series: the curves; those without a finite value are left out.
        caption: below the curves.
        percent: show fractions in percent.
        log: begin with a logarithmic axis where all values are above 0 and span a wide range.
        stacked: as areas on top of each other; a missing value counts 0.
        smoothed: the page's smoothing applies.
        marks: places of vertical dotted lines, in steps.
    """
    drawn = [s for s in (each.to_json() for each in series) if s["steps"]]
    return Chart(
        {
            "id": name,
            "kind": "stack" if stacked else "lines",
            "title": title,
            "caption": caption,
            "percent": percent,
            "log": log,
            "smoothed": smoothed and not stacked,
            "marks": list(marks),
            "series": drawn,
        }
    )


def heatmap(
    name: str,
    title: str,
    rows: Mapping[int, Series],
    *,
    row_name: str = "layer",
    overall: Series | None = None,
    caption: str = "",
    percent: bool = False,
    log: bool = False,
    largest: bool = False,
    notable: Literal["high", "low"] = "high",
    marks: Sequence[float] = (),
) -> Chart:
    """Rows x steps as colours, with the curve of all rows above them.

    Beyond `MOST_COLUMNS` steps a column is the mean, or the largest, of several: the caption says
    so.

    Args:
        name, title, caption, percent, log, marks: as for `chart`.
        rows: a series by the row's number; a step that one lacks is left blank.
        row_name: what a row is.
        overall: the curve of all rows.
        largest: neighbouring steps are shown by the largest value, not by their mean.
        notable: the values to look for, which have the strong colours.

    Raises:
        ValueError: no row has a finite value.
    """
    steps = sorted({step for row in rows.values() for step in row.steps})
    shared = math.ceil(len(steps) / MOST_COLUMNS) if steps else 1
    columns = [steps[i : i + shared] for i in range(0, len(steps), shared)]
    if shared > 1:
        caption += f" A column is the {'largest' if largest else 'mean'} of {shared} steps."
    values = [_cells(rows[row], columns, largest) for row in sorted(rows)]
    if all(cell is None for row in values for cell in row):
        raise ValueError(f"{name}: found no finite value; expected one in a row at least")
    curve = overall.to_json() if overall is not None else None
    return Chart(
        {
            "id": name,
            "kind": "heatmap",
            "title": title,
            "caption": caption,
            "percent": percent,
            "log": log,
            "largest": largest,
            "notable": notable,
            "marks": list(marks),
            "steps": [column[0] for column in columns],
            "width": shared,
            "row_name": row_name,
            "rows": sorted(rows),
            "values": values,
            "overall": curve if curve and curve["steps"] else None,
        }
    )


def _cells(row: Series, columns: Sequence[Sequence[int]], largest: bool) -> list[float | None]:
    values = {s: v for s, v in zip(row.steps, row.values, strict=True) if math.isfinite(v)}
    cells: list[float | None] = []
    for column in columns:
        found = [values[step] for step in column if step in values]
        cells.append(
            None if not found else _rounded(max(found) if largest else sum(found) / len(found))
        )
    return cells


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")

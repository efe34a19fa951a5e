"""What a study shows: a line a run while it goes on, and the table of its arms."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_rl.report.run_page import duration
from megatron_rl.study.analysis import Analysis
from megatron_rl.study.plan import Plan
from megatron_rl.study.state import State, state_of
from megatron_rl.study.statistics import Estimate

if TYPE_CHECKING:
    from rich.live import Live

#: Seconds between two summaries where there is no terminal.
_SUMMARY_EVERY_S = 60.0
#: Rows of a terminal that the table leaves to other lines.
_ROWS_LEFT = 4


def aligned(rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> list[str]:
    """Rows of cells as lines with columns of one width; ``numbers``: columns flushed right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def number_text(metric: str, value: float | None) -> str:
    """A value as the table shows it: fractions in percent."""
    if value is None:
        return ""
    return f"{100 * value:.1f}%" if is_fraction(metric) else f"{value:.4g}"


def is_fraction(metric: str) -> bool:
    """Whether a metric is a share of answers."""
    solved = ("reward/solved", "reward/well_formed", "accuracy")
    return metric in solved or metric in ("eval/pass@1", "eval/mean@k", "eval/well_formed")


def progress_lines(plan: Plan, states: Mapping[int, State], slots: int, most: int) -> list[str]:
    """A line a run (arm, seed, state, step, first metric, time left), and a line for the whole
    study. ``most``: lines at most; runs that wait or are done are left out first.
    """
    metric = plan.study.metrics[0] if plan.study.metrics else "reward/solved"
    runs = list(plan.runs)
    if len(runs) > most:
        runs = [run for run in runs if states[run.index].kind in ("running", "failed")][:most]
    rows = [["arm", "seed", "state", "step", metric, "left", ""]]
    for run in runs:
        state = states[run.index]
        value = None if state.record is None else state.record.get(metric)
        step = f"{state.step}/{run.steps}"
        arm = f"prepare {run.arm}" if run.prepared else run.arm
        left = _left(state, run.steps) if state.kind == "running" else None
        cells = [arm, "" if run.seed is None else str(run.seed), state.kind, step]
        cells += [number_text(metric, value), "" if left is None else duration(left)]
        rows.append([*cells, state.text if state.kind in ("failed", "not finite") else ""])
    return [*aligned(rows, numbers=(1, 3, 4, 5)), summary_line(plan, states, slots)]


def summary_line(plan: Plan, states: Mapping[int, State], slots: int | None) -> str:
    """``5 of 24 runs done, 2 running, 1 failed; about 12m30s left``; ``slots`` None: no time."""
    kinds = [states[run.index].kind for run in plan.runs]
    done = kinds.count("done") + kinds.count("not finite")
    parts = [f"{done} of {len(kinds)} runs done"]
    parts += [f"{kinds.count(kind)} {kind}" for kind in ("running", "failed") if kind in kinds]
    left = None if slots is None else time_left(plan, states, slots)
    return ", ".join(parts) + ("" if left is None else f"; about {duration(left)} left")


def time_left(plan: Plan, states: Mapping[int, State], slots: int) -> float | None:
    """Seconds until the last run has ended; None: not known, or nothing is left.

    A run whose steps have not been timed takes as long a step as the others of its arm, or as all.
    """
    timed: dict[str, list[float]] = {}
    for run in plan.runs:
        seconds = states[run.index].step_seconds
        if seconds is not None:
            timed.setdefault(run.arm, []).append(seconds)
    every = [seconds for found in timed.values() for seconds in found]
    if not every:
        return None
    open_runs = [run for run in plan.runs if not states[run.index].finished]
    total = 0.0
    for run in open_runs:
        state, found = states[run.index], timed.get(run.arm, every)
        seconds = state.step_seconds or sum(found) / len(found)
        total += seconds * max(0, run.steps - state.step)
    return total / max(1, min(slots, len(open_runs))) if open_runs else None


def _left(state: State, steps: int) -> float | None:
    return None if state.step_seconds is None else state.step_seconds * (steps - state.step)


def result_lines(analysis: Analysis) -> list[str]:
    """For each metric a table with a line an arm."""
    study, lines = analysis.plan.study, []
    for metric, rows in analysis.rows.items():
        head = ["arm", "runs", "final", "95% interval"]
        unit = ", points" if is_fraction(metric) else ""
        head += [f"- {study.compare_to}{unit}", "95% interval"] if study.compare_to else []
        table = [[*head, "best", "mean over run", "collapsed"]]
        for row in rows:
            final, difference = row.estimates["final"], row.differences["final"]
            runs = 0 if final is None else final.count
            cells = [row.arm, str(runs), *estimate_texts(metric, final)]
            cells += difference_texts(metric, difference) if study.compare_to else []
            for name in ("best", "area"):
                cells.append(estimate_texts(metric, row.estimates[name])[0])
            ended = len(analysis.finished(row.arm))
            table.append([*cells, f"{analysis.collapses(row.arm)} of {ended}"])
        lines += [metric, *(f"  {line}" for line in aligned(table)), ""]
    return lines or ["no run has ended yet"]


def estimate_texts(metric: str, found: Estimate | None) -> list[str]:
    """A mean and its interval, ``low to high``; empty where there is none."""
    if found is None:
        return ["", ""]
    mean, low, high = (number_text(metric, value) for value in (found.mean, found.low, found.high))
    return [mean, f"{low} to {high}" if low else ""]


def difference_texts(metric: str, found: Estimate | None) -> list[str]:
    """The same of a difference, with signs; of fractions in points of a hundred."""
    if found is None:
        return ["", ""]
    form = "{:+.1f}" if is_fraction(metric) else "{:+.4g}"
    scale = 100 if is_fraction(metric) else 1
    mean, low, high = (
        "" if value is None else form.format(scale * value)
        for value in (found.mean, found.low, found.high)
    )
    return [mean, f"{low} to {high}" if low else ""]


class Display:
    """Shows a study while it goes on: a table that is drawn again on a terminal, elsewhere a line
    for each thing that happens and a summary each minute. A context manager.
    """

    def __init__(self, plan: Plan, slots: int) -> None:
        self._plan, self._slots = plan, slots
        self._live: Live | None = None
        self._shown = time.monotonic()

    def note(self, text: str) -> None:
        """Show a line."""
        if self._live is None:
            print(text, flush=True)
        else:
            self._live.console.print(text, markup=False, highlight=False)

    def show(self) -> None:
        """Show how far the runs are."""
        if self._live is None:
            if time.monotonic() - self._shown >= _SUMMARY_EVERY_S:
                self._shown = time.monotonic()
                print(summary_line(self._plan, self._states(), self._slots), flush=True)
            return
        from rich.text import Text

        most = max(1, self._live.console.height - _ROWS_LEFT)
        lines = progress_lines(self._plan, self._states(), self._slots, most)
        self._live.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"), refresh=True)

    def _states(self) -> dict[int, State]:
        return {run.index: state_of(run) for run in self._plan.runs}

    def __enter__(self) -> Display:
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(), auto_refresh=False, vertical_overflow="crop")
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

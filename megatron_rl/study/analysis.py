"""What the runs of a study say: for each metric a row an arm, with intervals over seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rl.files import write_whole
from megatron_rl.study.collapse import collapse_of
from megatron_rl.study.plan import Plan, PlannedRun
from megatron_rl.study.results import Curves, read_curves, write_results
from megatron_rl.study.state import State, state_of
from megatron_rl.study.statistics import Estimate, Summary, estimate, paired_difference, summary

SUMMARY_FILE = "summary.csv"
#: The numbers of a curve, by the name of their field.
_NUMBERS: dict[str, Callable[[Summary], float]] = {
    "final": lambda numbers: numbers.final,
    "best": lambda numbers: numbers.best,
    "area": lambda numbers: numbers.area,
    "spikes": lambda numbers: float(numbers.spikes),
}


@dataclass(frozen=True)
class ArmRow:
    """An arm in one metric, over its finished runs."""

    arm: str
    estimates: Mapping[str, Estimate | None]  #: of final, best, area and spikes
    differences: Mapping[str, Estimate | None]  #: to the arm that is compared with, seed by seed


@dataclass(frozen=True)
class Analysis:
    """A study so far."""

    plan: Plan
    states: Mapping[int, State]  #: of every run, by index
    curves: Mapping[int, Curves]  #: of every run of an arm
    collapsed: Mapping[int, Sequence[str]]  #: of every finished run of an arm: the reasons, if any
    rows: Mapping[str, Sequence[ArmRow]]  #: metric -> a row an arm

    def finished(self, arm: str) -> list[PlannedRun]:
        """The runs of an arm that have ended for good."""
        return [
            run for run in self.plan.of_arms() if run.arm == arm and run.index in self.collapsed
        ]

    def collapses(self, arm: str) -> int:
        """How many of them have collapsed."""
        return sum(bool(self.collapsed[run.index]) for run in self.finished(arm))


def analyse(plan: Plan) -> Analysis:
    """Read every run and compute the table. UserError: metrics that cannot be read."""
    study = plan.study
    states = {run.index: state_of(run) for run in plan.runs}
    curves = {run.index: read_curves(run) for run in plan.of_arms()}
    collapsed = {
        index: collapse_of(own, states[index], study.collapse, study.window)
        for index, own in curves.items()
        if states[index].finished
    }
    finished = [run for run in plan.of_arms() if run.index in collapsed]
    rows = {}
    for metric in study.metrics:
        numbers: dict[str, dict[int, Summary]] = {arm: {} for arm in plan.arms}
        for run in finished:
            found = summary(*curves[run.index].series(metric), study.window)
            if found is not None and run.seed is not None:
                numbers[run.arm][run.seed] = found
        if any(numbers.values()):
            rows[metric] = [_row(arm, numbers, study.compare_to) for arm in plan.arms]
    return Analysis(plan, states, curves, collapsed, rows)


def write_files(analysis: Analysis) -> None:
    """Write results.csv, runs.csv and summary.csv. OSError: a file cannot be written."""
    plan = analysis.plan
    write_results(plan, analysis.curves, [_run_row(analysis, run) for run in plan.runs])
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    bounds = ("mean", "low", "high")
    columns = ["metric", "number", "arm", "runs", *bounds]
    table.writerow([*columns, "pairs", *(f"difference_{name}" for name in bounds), "collapsed"])
    for metric, rows in analysis.rows.items():
        for number in _NUMBERS:
            for row in rows:
                cells = [*_cells(row.estimates[number]), *_cells(row.differences[number])]
                table.writerow([metric, number, row.arm, *cells, analysis.collapses(row.arm)])
    write_whole(plan.folder / SUMMARY_FILE, text.getvalue())


def _row(arm: str, numbers: Mapping[str, Mapping[int, Summary]], compare_to: str | None) -> ArmRow:
    estimates: dict[str, Estimate | None] = {}
    differences: dict[str, Estimate | None] = {}
    for name, of in _NUMBERS.items():
        own = {seed: of(found) for seed, found in numbers[arm].items()}
        estimates[name] = estimate([own[seed] for seed in sorted(own)])
        differences[name] = None
        if compare_to is not None and arm != compare_to:
            other = {seed: of(found) for seed, found in numbers[compare_to].items()}
            differences[name] = paired_difference(own, other)
    return ArmRow(arm, estimates, differences)


def _run_row(analysis: Analysis, run: PlannedRun) -> dict[str, Any]:
    state = analysis.states[run.index]
    return {
        "index": run.index,
        "arm": run.arm,
        "prepared": int(run.prepared),
        "seed": "" if run.seed is None else run.seed,
        "state": state.kind,
        "step": state.step,
        "steps": run.steps,
        "collapsed": "; ".join(analysis.collapsed.get(run.index, ())),
        "error": state.text if state.kind in ("failed", "not finite") else "",
        "directory": str(run.run_dir),
        "digest": run.digest,
    }


def _cells(found: Estimate | None) -> list[Any]:
    if found is None:
        return [0, "", "", ""]
    return [found.count, found.mean, *("" if v is None else v for v in (found.low, found.high))]

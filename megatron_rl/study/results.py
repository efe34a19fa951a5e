"""Results of a study in files: every number in results.csv, every run in runs.csv.

pandas.read_csv("STUDY_DIR/results.csv")    # arm, seed, step, metric, value
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_rl.files import write_whole
from megatron_rl.observe.metric_table import split_layer, with_new_names
from megatron_rl.observe.run_files import METRICS_FILE, read_jsonl
from megatron_rl.study.plan import Plan, PlannedRun

RESULTS_FILE = "results.csv"
RUNS_FILE = "runs.csv"
_TIMED = ("time/step_s", "time/eval_s", "time/checkpoint_s")


@dataclass(frozen=True)
class Curves:
    """The metrics of one run, without those of single layers."""

    values: Mapping[str, tuple[Sequence[int], Sequence[float]]]  #: finite ones, by step
    not_finite: Mapping[str, Sequence[int]] = field(default_factory=dict)  #: steps without a number

    def series(self, name: str) -> tuple[Sequence[int], Sequence[float]]:
        """Steps and values of a metric; two empty sequences where there are none."""
        return self.values.get(name, ((), ()))


def read_curves(run: PlannedRun) -> Curves:
    """The metrics of a run so far. UserError: a line that is not the last is no object."""
    values: dict[str, tuple[list[int], list[float]]] = {}
    not_finite: dict[str, list[int]] = {}
    for record in _records(run):
        step = record["step"]
        for name, value in record.items():
            if name in ("step", "configuration") or split_layer(name):
                continue
            if value is None:
                not_finite.setdefault(name, []).append(step)
            elif type(value) in (int, float) and math.isfinite(value):
                steps, numbers = values.setdefault(name, ([], []))
                steps.append(step)
                numbers.append(value)
    return Curves(values, not_finite)


def hours_of(runs: Iterable[PlannedRun]) -> float:
    """What runs have taken together by their own clocks: steps, evaluations, checkpoints."""
    return sum(
        sum(record.get(name) or 0.0 for name in _TIMED) / 3600
        for run in runs
        for record in _records(run)
    )


def write_results(
    plan: Plan, curves: Mapping[int, Curves], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write results.csv and runs.csv, each in one rename.

    Args:
        curves: of each run of the arms, by its index.
        rows: what is known of each run, a mapping with the same keys for each.

    Raises:
        OSError: a file cannot be written.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    names = ("arm", "seed", "step", "metric", "value")
    write_whole(plan.folder / RESULTS_FILE, _csv([names, *_tidy(plan, curves)]))
    if rows:
        table = [list(rows[0]), *(list(row.values()) for row in rows)]
        write_whole(plan.folder / RUNS_FILE, _csv(table))


def _tidy(plan: Plan, curves: Mapping[int, Curves]) -> Iterator[tuple[Any, ...]]:
    """A row a number, by run, step and metric; the value is empty where it was not finite."""
    for run in plan.of_arms():
        found = curves[run.index]
        numbers = [
            (step, name, repr(float(value)))
            for name, (steps, values) in found.values.items()
            for step, value in zip(steps, values)
        ]
        numbers += [(step, name, "") for name, steps in found.not_finite.items() for step in steps]
        for step, name, text in sorted(numbers):
            yield run.arm, run.seed, step, name, text


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _records(run: PlannedRun) -> list[dict[str, Any]]:
    path = run.run_dir / METRICS_FILE
    found = read_jsonl(path) if path.is_file() else []
    return sorted(map(with_new_names, found), key=lambda record: record["step"])

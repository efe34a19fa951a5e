"""The results of all studies here: tables, a figure, and a line a run that can be compared.

    python examples/router_shift_study/results.py            # print the tables of the runs so far
    python examples/router_shift_study/results.py --keep     # and write results/ beside this file
    python examples/router_shift_study/results.py --compare  # are runs equal to those in results/?

``results/runs.csv`` has a line a run and all that the tables are made of but seconds; numbers are
written in full, so that a run of the same code on such a machine gives the same line.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rl.errors import UserError
from megatron_rl.files import write_whole
from megatron_rl.study.analysis import analyse
from megatron_rl.study.forest import Panel, forest
from megatron_rl.study.plan import make_plan
from megatron_rl.study.results import Curves
from megatron_rl.study.schema import read_study
from megatron_rl.study.statistics import RESAMPLES, Estimate, estimate, paired_difference, summary

HERE = Path(__file__).parent
KEPT = HERE / "results"
STUDIES = ("sort_small", "countdown_small", "sort_deep", "countdown_deep", "mismatch")
#: The studies that choose nothing, with an exact sampler: differences are pooled over them.
CONFIRMING = ("countdown_small", "sort_deep", "countdown_deep")
BASE, MAIN, BEFORE, SECONDS = "gmpo", "mean@4", "mean@4_before", "seconds"
#: Columns of a run: metric, and the number of its curve.
COLUMNS = {
    MAIN: ("eval/mean@k", "final"),
    BEFORE: ("eval/mean@k", "first"),
    "pass@1": ("eval/pass@1", "final"),
    "solved": ("reward/solved", "area"),
    "solved_best": ("reward/solved", "best"),
    "clipped": ("clip_fraction", "area"),
    "grad_norm": ("grad_norm", "area"),
    "weights_variance": ("weights/variance_token", "area"),
    "ess_sequence": ("weights/ess_sequence", "area"),
    "gamma": ("router/raw_gamma_mean", "area"),
    "top_k_overlap": ("router/top_k_overlap", "area"),
    "entropy": ("entropy", "final"),
    SECONDS: ("time/step_s", "sum"),
}
Row = dict[str, Any]  # study, arm, seed, the columns, spikes, collapsed


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1: runs that differ from the kept ones; 2: nothing to read, in one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--keep", action="store_true", help="write results/")
    parser.add_argument("--compare", action="store_true", help="with results/runs.csv, run by run")
    asked = parser.parse_args(argv)
    try:
        rows = [row for study in STUDIES for row in runs_of(study)]
        if not rows:
            raise UserError("no run has ended; bash examples/router_shift_study/run.sh runs them")
    except UserError as error:
        print(f"results.py: error: {error}", file=sys.stderr)
        return 2
    if asked.compare:
        return compare(rows)
    print(tables(rows))
    if asked.keep:
        KEPT.mkdir(exist_ok=True)
        write_whole(KEPT / "runs.csv", as_csv(rows))
        write_whole(KEPT / "tables.md", "# Results of the studies\n\n" + tables(rows))
        write_whole(KEPT / "differences.svg", figure(rows))
    return 0


def runs_of(name: str) -> list[Row]:
    """A row for each finished run of a study's arms. UserError: as the study's file has it."""
    plan = make_plan(read_study(HERE / f"{name}.yaml"), quick=False)
    found = analyse(plan)
    rows = []
    for arm in plan.arms:
        for run in found.finished(arm):
            curves = found.curves[run.index]
            numbers = {
                column: _number(curves, *of, plan.study.window) for column, of in COLUMNS.items()
            }
            spikes = summary(*curves.series("grad_norm"), plan.study.window)
            rows.append(
                {
                    "study": name,
                    "arm": arm,
                    "seed": run.seed,
                    **numbers,
                    "spikes": None if spikes is None else spikes.spikes,
                    "collapsed": len(found.collapsed[run.index]),
                }
            )
    return rows


def _number(curves: Curves, metric: str, number: str, window: int) -> float | None:
    steps, values = curves.series(metric)
    if number == "sum":
        return sum(values)
    if number == "first":
        return values[0] if values else None
    found = summary(steps, values, 1 if metric.startswith("eval/") else window)
    return None if found is None else float(getattr(found, number))


# ------------------------------------------------------------------ differences


def differences(rows: Iterable[Row], study: str, base: str = BASE) -> dict[str, Estimate | None]:
    """Of each arm of a study its final mean@4 less that of ``base``, paired by seed."""
    values = by_arm(rows, study)
    return {
        arm: None if arm == base else paired_difference(own, values.get(base, {}))
        for arm, own in values.items()
    }


def by_arm(rows: Iterable[Row], study: str, column: str = MAIN) -> dict[str, dict[int, float]]:
    """arm -> seed -> value."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["study"] == study and row[column] is not None:
            found.setdefault(row["arm"], {})[row["seed"]] = row[column]
    return found


def pooled(rows: Sequence[Row], arm: str, base: str, studies: Sequence[str]) -> Estimate | None:
    """The mean over studies of the paired difference, each study with the same weight; seeds are
    drawn within each study. None: a study has no pairs.
    """
    generator = np.random.default_rng(0)
    means, draws, count = [], np.zeros(RESAMPLES), 0
    for study in studies:
        values = by_arm(rows, study)
        ours, theirs = values.get(arm, {}), values.get(base, {})
        pairs = np.asarray(
            [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
        )
        if not len(pairs):
            return None
        means.append(pairs.mean())
        drawn = generator.integers(0, len(pairs), (RESAMPLES, len(pairs)))
        draws += pairs[drawn].mean(axis=1) / len(studies)
        count += len(pairs)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(np.mean(means)), float(low), float(high), count)


# ------------------------------------------------------------------ what is shown


def tables(rows: Sequence[Row]) -> str:
    """All tables as Markdown."""
    across = _across_table(rows)
    title = f"## {MAIN} of {BASE}, and differences to it in points"
    parts = [title, "", *across, ""] if across else []
    for study in STUDIES:
        own = [row for row in rows if row["study"] == study]
        if own:
            parts += [f"## {study}", "", *_study_table(own, study), ""]
    pools = _pooled_table(rows)
    if pools:
        parts += [f"## Over {', '.join(CONFIRMING)}", "", *pools, ""]
    return "\n".join(parts)


def _across_table(rows: Sequence[Row]) -> list[str]:
    """A row for each arm that several studies have."""
    found = {study: differences(rows, study) for study in STUDIES}
    found = {study: own for study, own in found.items() if own}
    arms = dict.fromkeys(arm for own in found.values() for arm in own)
    several = [arm for arm in arms if sum(arm in own for own in found.values()) > 1]
    if not several:
        return []
    lines = [_line(["arm", *found]), _line(["---"] * (len(found) + 1))]
    of_base = [[row for row in rows if (row["study"], row["arm"]) == (s, BASE)] for s in found]
    lines.append(_line(["after the warm-up", *(_percent(own, BEFORE) for own in of_base)]))
    lines.append(_line([BASE, *(_percent(own, MAIN) for own in of_base)]))
    for arm in several:
        if arm != BASE:
            lines.append(_line([arm, *(_points(own.get(arm)) for own in found.values())]))
    return lines


def _study_table(rows: Sequence[Row], study: str) -> list[str]:
    head = ["arm", "runs", MAIN, f"- {BASE}, points", "won", "pass@1", "solved in training"]
    head += ["collapsed", "spikes", "clipped", "ess", "gamma", "s"]
    lines = [_line(head), _line(["---"] * len(head))]
    found = differences(rows, study)
    values = by_arm(rows, study)
    for arm in values:
        own = [row for row in rows if row["arm"] == arm]
        pairs = values[arm].keys() & values.get(BASE, {}).keys()
        won = sum(values[arm][seed] > values[BASE][seed] for seed in pairs)
        cells = [arm, str(len(own)), _percent(own, MAIN), _points(found[arm])]
        cells += ["" if arm == BASE else f"{won} of {len(pairs)}"]
        cells += [_percent(own, "pass@1"), _percent(own, "solved")]
        cells += [
            str(sum(bool(row["collapsed"]) for row in own)),
            _mean(own, "spikes", "{:.1f}"),
            _percent(own, "clipped"),
        ]
        cells += [_mean(own, name, "{:.2f}") for name in ("ess_sequence", "gamma")]
        lines.append(_line([*cells, _mean(own, SECONDS, "{:.0f}")]))
    return lines


def _pooled_table(rows: Sequence[Row]) -> list[str]:
    arms = list(dict.fromkeys(row["arm"] for row in rows if row["study"] in CONFIRMING))
    pairs = [(arm, BASE) for arm in arms if arm != BASE]
    pairs += [("grpo_rs", "grpo")]
    pairs += [("rspo_r2", "rspo"), ("rspo_r2", "gmpo_r2"), ("gmpo_penalty_3", "gmpo_lr_3e-5")]
    lines = []
    for arm, base in pairs:
        found = pooled(rows, arm, base, CONFIRMING)
        if found is not None:
            lines.append(_line([f"{arm} - {base}", _points(found), str(found.count)]))
    head = [f"difference in {MAIN}", "points, 95% interval", "pairs"]
    return [_line(head), _line(["---"] * len(head)), *lines] if lines else []


def figure(rows: Sequence[Row]) -> str:
    """The differences of all studies beside each other."""
    found = {study: differences(rows, study) for study in STUDIES}
    panels = [Panel(study, own) for study, own in found.items() if own]
    return forest(panels, f"{MAIN} at the end, difference to {BASE}, points", 100, limit=26)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _mean(rows: Sequence[Row], column: str, form: str, scale: float = 1.0) -> str:
    found = estimate([row[column] for row in rows if row[column] is not None])
    return "" if found is None else form.format(scale * found.mean)


def _percent(rows: Sequence[Row], column: str) -> str:
    return _mean(rows, column, "{:.1f}%", 100)


def _points(found: Estimate | None) -> str:
    if found is None:
        return ""
    if found.low is None or found.high is None:
        return f"{100 * found.mean:+.1f}"
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


# ------------------------------------------------------------------ runs, kept and compared


def as_csv(rows: Sequence[Row]) -> str:
    """A line a run, without seconds; an empty cell: the run has no such number."""
    text = io.StringIO()
    table = csv.DictWriter(
        text,
        [name for name in rows[0] if name != SECONDS],
        lineterminator="\n",
        extrasaction="ignore",
    )
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def compare(rows: Sequence[Row]) -> int:
    """Say which runs differ from the kept ones in any digit, and how many do not; 1 if any does."""
    kept = {
        _known(row): row for row in csv.DictReader(io.StringIO((KEPT / "runs.csv").read_text()))
    }
    own = {_known(row): row for row in csv.DictReader(io.StringIO(as_csv(rows)))}
    common = sorted(kept.keys() & own.keys())
    unlike = [known for known in common if kept[known] != own[known]]
    for known in unlike:
        names = [name for name, value in kept[known].items() if own[known].get(name) != value]
        print(f"{' '.join(known)}: {', '.join(names)} differ")
    print(f"{len(common) - len(unlike)} of {len(common)} runs are equal, {len(kept)} are kept")
    return int(bool(unlike))


def _known(row: Mapping[str, str]) -> tuple[str, str, str]:
    return row["study"], row["arm"], row["seed"]


if __name__ == "__main__":
    sys.exit(main())

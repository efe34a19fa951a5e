"""The results of all studies here: tables, a figure, and a line a run that can be compared.

    python examples/router_shift_study/results.py              # the tables of the runs so far
    python examples/router_shift_study/results.py --keep NAME  # and write results/NAME beside this
    python examples/router_shift_study/results.py --compare    # do runs equal a set of results/?
    python examples/router_shift_study/results.py --sets       # what the sets of results/ agree on

A set is what one machine gave (`kept.py`).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.router_shift_study.kept import SECONDS, Row, as_csv, compare, read_sets  # noqa: E402
from megatron_rl.errors import UserError  # noqa: E402
from megatron_rl.files import write_whole  # noqa: E402
from megatron_rl.study.analysis import analyse  # noqa: E402
from megatron_rl.study.forest import Panel, forest  # noqa: E402
from megatron_rl.study.plan import make_plan  # noqa: E402
from megatron_rl.study.results import Curves  # noqa: E402
from megatron_rl.study.schema import read_study  # noqa: E402
from megatron_rl.study.statistics import RESAMPLES, Estimate, estimate, paired_difference, summary  # noqa: E402

HERE = Path(__file__).parent
KEPT = HERE / "results"
STUDIES = ("sort_small", "countdown_small", "sort_deep", "countdown_deep", "mismatch")
#: The studies that choose nothing, with an exact sampler: differences are pooled over them.
CONFIRMING = ("countdown_small", "sort_deep", "countdown_deep")
BASE, MAIN, BEFORE = "gmpo", "mean@4", "mean@4_before"
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


def main(argv: Sequence[str] | None = None) -> int:
    """0; 1: runs that equal no kept set; 2: nothing to read, in one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--keep", metavar="NAME", help="write a set, results/NAME")
    parser.add_argument("--compare", action="store_true", help="with the kept sets, run by run")
    parser.add_argument("--sets", action="store_true", help="the kept sets beside each other")
    asked = parser.parse_args(argv)
    if asked.sets:
        print("\n".join(sets_table(read_sets(KEPT))))
        return 0
    try:
        rows = [row for study in STUDIES for row in runs_of(study)]
        if not rows:
            raise UserError("no run has ended; bash examples/router_shift_study/run.sh runs them")
    except UserError as error:
        print(f"results.py: error: {error}", file=sys.stderr)
        return 2
    if asked.compare:
        return compare(rows, read_sets(KEPT))
    print(tables(rows))
    if asked.keep:
        folder = KEPT / asked.keep
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "runs.csv", as_csv(rows))
        write_whole(folder / "tables.md", "# Results of the studies\n\n" + tables(rows))
        write_whole(folder / "differences.svg", figure(rows))
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
    lines = []
    for arm, base in _pooled_pairs(rows):
        found = pooled(rows, arm, base, CONFIRMING)
        if found is not None:
            lines.append(_line([f"{arm} - {base}", _points(found), str(found.count)]))
    head = [f"difference in {MAIN}", "points, 95% interval", "pairs"]
    return [_line(head), _line(["---"] * len(head)), *lines] if lines else []


def _pooled_pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The arms whose differences are pooled: of each arm to BASE, and some others."""
    arms = dict.fromkeys(row["arm"] for row in rows if row["study"] in CONFIRMING)
    pairs = [(arm, BASE) for arm in arms if arm != BASE]
    pairs += [("grpo_rs", "grpo")]
    pairs += [("rspo_r2", "rspo"), ("rspo_r2", "gmpo_r2"), ("gmpo_penalty_3", "gmpo_lr_3e-5")]
    return [pair for pair in pairs if set(pair) <= arms.keys()]


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


# ------------------------------------------------------------------ sets beside each other


def sets_table(sets: Mapping[str, Sequence[Row]]) -> list[str]:
    """The pooled differences of each set beside each other, and what two sets agree on."""
    pairs = dict.fromkeys(pair for rows in sets.values() for pair in _pooled_pairs(rows))
    lines = [_line([f"difference in {MAIN}", *sets]), _line(["---"] * (len(sets) + 1))]
    for arm, base in pairs:
        found = [_points(pooled(rows, arm, base, CONFIRMING)) for rows in sets.values()]
        if any(found):
            lines.append(_line([f"{arm} - {base}", *found]))
    for first, second in itertools.combinations(sets, 2):
        lines += ["", *_agreement(first, sets[first], second, sets[second])]
    return lines


def _agreement(
    first: str, first_rows: Sequence[Row], second: str, second_rows: Sequence[Row]
) -> list[str]:
    """How the differences to BASE of two sets agree, over arms and studies."""
    both = []
    for study in STUDIES:
        ours, theirs = (differences(rows, study) for rows in (first_rows, second_rows))
        both += [(ours[arm], theirs[arm]) for arm in ours if ours[arm] and theirs.get(arm)]
    clear = [pair for pair in both if all(map(_excludes_0, pair))]
    same = sum((a.mean > 0) == (b.mean > 0) for a, b in clear)
    within = sum(bool(_overlap(a, b)) for a, b in both)
    one = sum(_excludes_0(a) != _excludes_0(b) for a, b in both)
    return [
        f"{first} and {second}: {len(both)} differences of an arm to {BASE} in a study. The "
        f"intervals of {within} overlap. Both exclude 0 in {len(clear)}, with the same sign in "
        f"{same}; one of them does in {one}."
    ]


def _excludes_0(found: Estimate) -> bool:
    return found.low is not None and (found.low > 0 or found.high < 0)


def _overlap(a: Estimate, b: Estimate) -> bool:
    return None not in (a.low, b.low) and max(a.low, b.low) <= min(a.high, b.high)


if __name__ == "__main__":
    sys.exit(main())

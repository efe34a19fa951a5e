"""Several runs side by side: one page with a table and a chart for each metric, a curve a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.report.charts import Chart, Group, Series, chart
from megatron_rl.report.page import write_page
from megatron_rl.report.run import COMPARISON_FILE, Run, read_run
from megatron_rl.report.run_page import mean_at_k, points
from megatron_rl.report.samples import MOST_SAMPLES, for_page

_LOGARITHMIC = ("grad_norm", "kl_old", "router/distance_mean")

#: What is drawn, in order: name, metric, title, caption, percent.
_COMPARED = (
    ("solved", "reward/solved", "Solved", "Sampled completions of a step that are right.", True),
    ("pass_at_1", "eval/pass@1", "Held-out, greedy", "pass@1 of the greedy answer.", True),
    ("mean_at_k", "eval/mean@k", "Held-out, sampled", "mean@k of sampled answers.", True),
    ("loss", "loss", "Loss", "Training loss, mean over the optimizer steps of a step.", False),
    ("grad_norm", "grad_norm", "Gradient norm", "Global norm before clipping.", False),
    ("clip_fraction", "clip_fraction", "Clipped", "Tokens whose ratio was clipped.", True),
    ("kl_old", "kl_old", "Divergence", "KL(old || new) within a step, k3, nat.", False),
    ("entropy", "entropy", "Entropy", "Of the policy over completion tokens, nat.", False),
    (
        "router_distance",
        "router/distance_mean",
        "Router distance",
        "Mean over layers and tokens of |new - old| log-probability of the old experts.",
        False,
    ),
    (
        "top_k_overlap",
        "router/top_k_overlap",
        "Top-K overlap",
        "Experts of the scoring pass that the updated router chooses again.",
        True,
    ),
)


def write_comparison(run_dirs: Sequence[Path], path: Path | None = None) -> Path:
    """Compare two runs or more on one page.

    Args:
        run_dirs: directories of runs; a curve is named by its run's path below the shared folder.
        path: of the HTML file to write; None: comparison.html in the deepest folder they share.

    Returns:
        The page's path.

    Raises:
        UserError: a run cannot be read, is given twice, is inside another, or is the only one.
    """
    if len(run_dirs) < 2:
        raise UserError(f"found {len(run_dirs)} runs to compare; expected 2 or more")
    shared = Path(os.path.commonpath([path.resolve() for path in run_dirs]))
    labels = [str(path.resolve().relative_to(shared)) for path in run_dirs]
    if len(set(labels)) < len(labels) or "." in labels:
        raise UserError(
            f"found {', '.join(map(str, run_dirs))}; expected different runs, none inside another"
        )
    runs = dict(zip(labels, map(read_run, run_dirs), strict=True))
    path = path or shared / COMPARISON_FILE
    share = max(1, MOST_SAMPLES // len(runs))
    write_page(
        path,
        "Comparison",
        f"{len(runs)} runs: {', '.join(labels)}",
        [_table(runs), Group("Curves", _charts(runs))],
        arms=labels,
        samples=[s for label in runs for s in for_page(runs[label].samples, most=share, arm=label)],
    )
    return path


def _charts(runs: dict[str, Run]) -> list[Chart]:
    """A chart of each metric that a run has values of."""
    charts = []
    for name, metric, title, caption, percent in _COMPARED:
        curves = [Series(label, *run.series(metric)) for label, run in runs.items()]
        if any(curve.steps for curve in curves):
            log = metric in _LOGARITHMIC
            calm = not metric.startswith("eval/")
            charts.append(
                chart(name, title, curves, caption, percent=percent, log=log, smoothed=calm)
            )
    return charts


def _table(runs: dict[str, Run]) -> str:
    names = ["Run", "Loss", "Router shift", "Learning rate", "Steps", "pass@1", "mean@k"]
    names += ["Largest gradient norm", "Largest KL", "Least mean raw gamma"]
    head = "".join(f"<th>{name}</th>" for name in names)
    rows = "".join(_row(label, run) for label, run in runs.items())
    return (
        "<section class='runs'><h2>Runs</h2><div class='scroll'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _row(label: str, run: Run) -> str:
    cells = (
        label,
        run.over_time(lambda config: config.get("algorithm", {}).get("name", "")),
        "yes" if run.series("router/raw_gamma_mean")[0] else "no",
        run.over_time(lambda config: str(config.get("optimizer", {}).get("lr", ""))),
        run.records[-1]["step"],
        _gain(run, "eval/pass@1"),
        _sampled_gain(run),
        _extreme(run, "grad_norm", max),
        _extreme(run, "kl_old", max),
        _extreme(run, "router/raw_gamma_mean", min),
    )
    return f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in cells)}</tr>"


def _gain(run: Run, name: str) -> str:
    values = run.series(name)[1]
    if not values:
        return ""
    before, after = values[0], values[-1]
    return f"{100 * before:.1f}% to {100 * after:.1f}% ({points(before, after)})"


def _sampled_gain(run: Run) -> str:
    gain = _gain(run, "eval/mean@k")
    return f"{mean_at_k(run)} {gain}" if gain else ""


def _extreme(run: Run, name: str, choose: Callable[..., Any]) -> str:
    values = run.series(name)[1]
    return f"{choose(values):.3g}" if values else ""

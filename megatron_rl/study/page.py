"""The page of a study: the table of its arms, a panel a metric, and its runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from megatron_rl.observe.metric_table import METRICS
from megatron_rl.report.charts import Chart, Group, Series, chart
from megatron_rl.report.page import write_page
from megatron_rl.study.analysis import Analysis, ArmRow
from megatron_rl.study.forest import Panel, forest
from megatron_rl.study.statistics import band
from megatron_rl.study.table import difference_texts, estimate_texts, is_fraction, summary_line

PAGE_FILE = "study.html"


def write_study_page(analysis: Analysis) -> Path:
    """Write study.html. OSError: it cannot be written."""
    plan = analysis.plan
    path = plan.folder / PAGE_FILE
    study = plan.study
    metrics = dict.fromkeys([*study.metrics, *study.curves])
    charts = [found for name in metrics if (found := _chart(analysis, name)) is not None]
    title = f"Study: {study.study_dir.name}{' (quick)' if plan.folder != study.study_dir else ''}"
    summary = summary_line(plan, analysis.states, None)
    sections: list[str | Group] = [_tables(analysis), Group("Curves", charts)]
    sections.append(_runs(analysis))
    write_page(path, title, summary, sections, arms=plan.arms)
    return path


def _chart(analysis: Analysis, metric: str) -> Chart | None:
    """A curve with its band for each arm; None where no run has the metric."""
    curves = []
    for arm in analysis.plan.arms:
        runs = [run for run in analysis.plan.of_arms() if run.arm == arm]
        found = [analysis.curves[run.index].series(metric) for run in runs]
        found = [series for series in found if series[0]]
        if found:
            steps, mean, low, high = (column.tolist() for column in band(found))
            curves.append(Series(arm, [int(step) for step in steps], mean, low=low, high=high))
    if not curves:
        return None
    row = METRICS.get(metric)
    name = re.sub(r"[^A-Za-z0-9]", lambda match: f"_{ord(match[0]):x}_", metric)
    meaning = "" if row is None else row.meaning
    return chart(name, metric, curves, meaning, percent=is_fraction(metric))


def _tables(analysis: Analysis) -> str:
    study = analysis.plan.study
    parts = [_differences(analysis.rows, study.compare_to)] if study.compare_to else []
    for metric, rows in analysis.rows.items():
        head = ["Arm", "Runs", "Final"]
        unit = ", points" if is_fraction(metric) else ""
        head += [f"Difference to {study.compare_to}{unit}"] if study.compare_to else []
        lines = []
        for row in rows:
            final = row.estimates["final"]
            cells = [
                row.arm,
                str(0 if final is None else final.count),
                _bracketed(estimate_texts(metric, final)),
            ]
            if study.compare_to:
                cells.append(_bracketed(difference_texts(metric, row.differences["final"])))
            cells += [
                _bracketed(estimate_texts(metric, row.estimates[name])) for name in ("best", "area")
            ]
            ended = len(analysis.finished(row.arm))
            lines.append([*cells, f"{analysis.collapses(row.arm)} of {ended}"])
        parts.append(f"<h3>{escape(metric)}</h3>")
        parts.append(_table([*head, "Best", "Mean over the run", "Collapsed"], lines))
    note = (
        "<p class='summary'>Over finished runs: mean over seeds, 95% bootstrap interval in "
        f"brackets. Final and best are means over {study.window} steps; a difference is paired by "
        "seed. The curves are means over all runs so far, with the same interval.</p>"
    )
    return f"<section class='runs'><h2>Arms</h2>{note}{''.join(parts)}</section>"


def _differences(table: Mapping[str, Sequence[ArmRow]], compare_to: str) -> str:
    """A figure of the differences of all arms, a panel a metric with the same unit."""
    figures = []
    for fractions in (True, False):
        panels = [
            Panel(metric, {row.arm: row.differences["final"] for row in rows})
            for metric, rows in table.items()
            if is_fraction(metric) == fractions
        ]
        if any(value for panel in panels for value in panel.rows.values()):
            axis = f"final, difference to {compare_to}{', points' if fractions else ''}"
            if fractions:
                figures.append(forest(panels, axis, scale=100))
            else:  # of other units, each with an axis of its own
                figures += [forest([panel], axis) for panel in panels]
    return "".join(f"<div class='scroll'>{figure}</div>" for figure in figures)


def _runs(analysis: Analysis) -> str:
    rows = []
    for run in analysis.plan.runs:
        state = analysis.states[run.index]
        report = run.run_dir / "report.html"
        name = escape(run.name)
        if report.is_file():
            link = quote(str(report.relative_to(analysis.plan.folder)))
            name = f"<a href='{link}'>{name}</a>"
        reasons = "; ".join(analysis.collapsed.get(run.index, ()))
        text = state.text if state.kind in ("failed", "not finite") else reasons
        cells = [name, state.kind, f"{state.step}/{run.steps}", escape(text)]
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    head = "".join(f"<th>{name}</th>" for name in ("Run", "State", "Step", "Error, or collapse"))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        "<section class='samples'><h2>Runs</h2><div class='scroll'><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f"<div class='scroll'><table><thead><tr>{first}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _bracketed(texts: Sequence[str]) -> str:
    mean, interval = texts
    return f"{mean} [{interval}]" if interval else mean

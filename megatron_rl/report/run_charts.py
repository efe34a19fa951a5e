"""The charts of a run: what the list of plots says, with the run's values."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_rl.report.charts import Chart, Group, Series, chart, heatmap
from megatron_rl.report.plot_list import PLOTS, Plot, part_plots
from megatron_rl.report.run import Run


def run_groups(run: Run) -> list[Group]:
    """All groups of charts, those without data included: a run that goes on may fill them."""
    groups = [Group(title, run_charts(plots, run)) for title, plots in PLOTS.items()]
    return [*groups, Group("Parts", run_charts(part_plots(run), run))]


def run_charts(plots: Iterable[Plot], run: Run) -> list[Chart]:
    """The charts that the run has a finite value for."""
    made = (_chart(plot, run) for plot in plots)
    return [each for each in made if each is not None]


def _chart(plot: Plot, run: Run) -> Chart | None:
    curves = [Series(label, *run.series(name)) for name, label in plot.metrics]
    # A dotted line before the first step of every configuration but the first.
    marks = [configuration.first_step - 0.5 for configuration in run.configurations[1:]]
    rows = {}
    if plot.kind == "layers":
        layers = run.layer_series(plot.metrics[0][0])
        rows = {layer: Series(f"layer {layer}", *pair) for layer, pair in layers.items()}
    if not rows and not any(curve.steps for curve in curves):
        return None
    if rows:
        return heatmap(
            plot.name,
            plot.title,
            rows,
            overall=curves[0],
            caption=plot.caption,
            percent=plot.percent,
            log=plot.log,
            largest=plot.largest,
            notable=plot.notable,
            marks=marks,
        )
    return chart(
        plot.name,
        plot.title,
        _with_rest(curves, run) if plot.kind == "time" else curves,
        caption=plot.caption,
        percent=plot.percent,
        log=plot.log,
        stacked=plot.kind == "time",
        smoothed=plot.smoothed,
        marks=marks,
    )


def _with_rest(phases: list[Series], run: Run) -> list[Series]:
    """The phases, and what of the step falls in none of them."""
    steps, seconds = run.series("time/step_s")
    if not steps:
        return phases
    known = [dict(zip(phase.steps, phase.values, strict=True)) for phase in phases]
    rest = [
        max(0.0, whole - sum(phase.get(step, 0.0) for phase in known))
        for step, whole in zip(steps, seconds, strict=True)
    ]
    return [*phases, Series("other", steps, rest)]

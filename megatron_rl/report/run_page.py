"""The report of a run: one HTML page of its results, charts and samples, and a summary of one
line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_rl.catalogue.kinds import LOSSES
from megatron_rl.config.on_resume import shown
from megatron_rl.files import write_whole
from megatron_rl.report.page import page, page_data
from megatron_rl.report.plot_list import part_names
from megatron_rl.report.run import Run, read_run
from megatron_rl.report.run_charts import run_groups
from megatron_rl.report.samples import for_page, how_many

REPORT_FILE = "report.html"
_LONGEST_TEXT = 1500  # characters of a value of the configuration shown


def write_report(run_dir: Path) -> Path:
    """Write report.html of a run and return its path.

    UserError: config.yaml or metrics.jsonl is missing, empty or malformed.
    """
    run = read_run(run_dir)
    path = run.directory / REPORT_FILE
    write_whole(path, run_page(run))
    return path


def run_page(run: Run, *, live: str = "") -> str:
    """The page of a run. ``live``: version of its data; it asks its server for `newer`."""
    return page(
        run.directory.resolve().name,
        _summary(run),
        [
            f"<div id='facts'>{_about(run)}</div>",
            *run_groups(run),
            "<section id='samples' hidden></section>",
            *_configurations(run),
        ],
        samples=for_page(run.samples),
        sample_note=how_many(run.samples),
        live=live,
    )


def newer(run: Run) -> dict[str, Any]:
    """What the page of a run that goes on asks for again and again."""
    data = page_data(
        run_groups(run), samples=for_page(run.samples), sample_note=how_many(run.samples)
    )
    return {**data, "summary": _summary(run), "facts": _about(run)}


def summary(run_dir: Path) -> str:
    """One line: evaluation before and after with the gain in points, or the mean reward, or the
    loss where there is none; steps and time.

    UserError: as for ``write_report``.
    """
    return _summary(read_run(run_dir))


def points(before: float, after: float) -> str:
    """The gain of a fraction in percentage points, with its sign: +17.8."""
    return f"{100 * (after - before):+.1f}"


def duration(seconds: float) -> str:
    """Seconds for reading: 9.4s, 2m31s, 3h04m."""
    if seconds < 60:
        return f"{seconds:.1f}s" if round(seconds, 1) < 60 else "1m00s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _summary(run: Run) -> str:
    facts = [
        text
        for text in (
            _before_after(run, "eval/pass@1", "solved (greedy pass@1)"),
            _before_after(run, "eval/mean@k", mean_at_k(run)),
        )
        if text
    ]
    problems = run.series("eval/problems")[1]
    if facts and problems:
        facts[-1] += f" on {problems[-1]:.0f} held-out problems"
    for name, label in (("reward/mean", "mean reward"), ("loss", "loss")):
        values = run.series(name)[1]
        if not facts and values:
            facts = [f"{label} {values[0]:.4g} -> {values[-1]:.4g}"]
    if not run.records:
        return "no step yet"
    steps = run.last_step
    return ", ".join(
        [*facts, f"{steps} step{'' if steps == 1 else 's'} in {duration(_wall_seconds(run))}"]
    )


def _before_after(run: Run, name: str, label: str) -> str:
    values = run.series(name)[1]
    if not values:
        return ""
    if len(values) == 1:
        return f"{label} {100 * values[0]:.1f}%"
    before, after = values[0], values[-1]
    return f"{label} {100 * before:.1f}% -> {100 * after:.1f}% ({points(before, after)} points)"


def mean_at_k(run: Run) -> str:
    """The name of the sampled evaluation, with k where it is known: mean@4."""
    counts = run.series("eval/samples")[1]
    return f"mean@{counts[-1]:.0f}" if counts else "mean@k"


def _wall_seconds(run: Run) -> float:
    """Steps, evaluations and checkpoints together; phases in place of the step where it was not
    timed."""
    names = (
        ["time/step_s"]
        if run.series("time/step_s")[0]
        else ["time/rollout_s", "time/score_s", "time/update_s"]
    )
    return sum(sum(run.series(name)[1]) for name in [*names, "time/eval_s", "time/checkpoint_s"])


def _about(run: Run) -> str:
    return _tiles(run) + _facts(run) + _change_table(run)


def _tiles(run: Run) -> str:
    """Before and after, side by side."""
    tiles = []
    for name, label in (
        ("eval/pass@1", "pass@1, greedy"),
        ("eval/mean@k", f"{mean_at_k(run)}, sampled"),
        ("eval/well_formed", "well formed"),
        *((name, name) for name in part_names(run) if name.startswith("eval/")),
        ("reward/mean", "mean reward"),
        ("accuracy", "token accuracy"),
        ("loss", "loss"),
    ):
        values = run.series(name)[1]
        if values and (name != "loss" or not run.series("reward/mean")[0]):
            fraction = name not in ("reward/mean", "loss", *part_names(run))
            tiles.append(_tile(label, values, fraction=fraction))
    return f"<section class='tiles'>{''.join(tiles)}</section>"


def _tile(label: str, values: Sequence[float], fraction: bool) -> str:
    before, after = values[0], values[-1]
    shown = [f"{100 * v:.1f}%" if fraction else f"{v:.3f}" for v in (before, after)]
    change = ""
    if len(values) > 1:
        gain = f"{points(before, after)} points" if fraction else f"{after - before:+.3f}"
        change = f"<span class='change'>from {shown[0]} &middot; {gain}</span>"
    return (
        f"<div><span class='label'>{escape(label)}</span><strong>{shown[1]}</strong>{change}</div>"
    )


def _facts(run: Run) -> str:
    rows = [
        ("Model", run.over_time(lambda config: _model_line(_section(config, "model")))),
        ("Layout", run.over_time(lambda config: _layout_line(_section(config, "parallel")))),
        ("Algorithm", _algorithm_line(run)),
        ("Optimizer", run.over_time(_optimizer_line)),
        ("Length", f"{run.last_step} steps in {duration(_wall_seconds(run))}"),
        ("Throughput", _last(run, "tokens_per_second", "{:,.0f} tokens/s at the last step")),
        ("Memory", _last(run, "memory/peak_gib", "{:.2f} GiB at the peak of the fullest rank")),
    ]
    cells = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in rows if value)
    return f"<dl class='facts'>{cells}</dl>"


def _change_table(run: Run) -> str:
    """What was changed at which step; nothing where one configuration was in force throughout."""
    rows = "".join(
        f"<tr><td class='number'>{step}</td><td>{escape(change.key)}</td>"
        f"<td>{_shown(shown(change.before))}</td><td>{_shown(shown(change.after))}</td></tr>"
        for step, changed in run.changes()
        for change in changed
    )
    if not rows:
        return ""
    head = "<tr><th>From step</th><th>Key</th><th>Before</th><th>After</th></tr>"
    return (
        "<section class='changes'><h2>Changed configuration</h2><div class='scroll'>"
        f"<table><thead>{head}</thead><tbody>{rows}</tbody></table></div></section>"
    )


def _configurations(run: Run) -> list[str]:
    """The configurations whole, folded away; the newest as config.yaml has it."""
    texts = [("Configuration", run.config_text)]
    if len(run.configurations) > 1:
        texts = [(f"Configuration from step {c.first_step}", c.text) for c in run.configurations]
    return [
        f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"
        for title, text in texts
    ]


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _optimizer_line(config: Mapping[str, Any]) -> str:
    names = (("name", ""), ("lr", "lr"), ("schedule", ""), ("clip_grad", "clip"))
    return _fields(_section(config, "optimizer"), names)


def _fields(section: Mapping[str, Any], names: Sequence[tuple[str, str]]) -> str:
    """ "label value" of the fields that are set."""
    return ", ".join(
        f"{label} {section[key]}".strip() for key, label in names if section.get(key) is not None
    )


def _model_line(model: Mapping[str, Any]) -> str:
    parts = [model.get("preset") or model.get("hf_path") or model.get("hf_config")]
    for key, form in (
        ("num_layers", "{} layers"),
        ("hidden_size", "width {}"),
        ("num_experts", "{} experts"),
        ("moe_top_k", "top-{}"),
        ("dtype", "{}"),
    ):
        value = model.get(key)
        of_no_experts = key in ("num_experts", "moe_top_k") and not model.get("num_experts")
        parts.append(None if value is None or of_no_experts else form.format(value))
    return ", ".join(str(part) for part in parts if part)


def _layout_line(parallel: Mapping[str, Any]) -> str:
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
    split = [(name, name.replace("_", " ")) for name in names if (parallel.get(name) or 1) != 1]
    ranks = _fields(parallel, (("world_size", "ranks"),))
    return ", ".join(
        part for part in (ranks, _fields(parallel, split) or "no model parallelism") if part
    )


def _algorithm_line(run: Run) -> str:
    if not run.series("reward/mean")[0] and run.series("loss")[0]:
        return "supervised fine-tuning"

    def line(config: Mapping[str, Any]) -> str:
        algorithm = _section(config, "algorithm")
        names = (("name", ""), ("advantages", "advantages"), ("mini_batches", "mini-batches"))
        shift = _section(algorithm, "router_shift")
        enabled = shift.get("enabled")
        if enabled is None:
            rows = {row.name: row.router_shift == "needed" for row in LOSSES.rows}
            # A user's own loss need not be there any more; the metric tells as well.
            own = bool(run.series("router/gamma_mean")[0])
            enabled = rows.get(str(algorithm.get("name")), own)
        floor = shift.get("floor") if enabled else None
        shifted = "" if floor is None else f", router-shift floor {floor}"
        return _fields(algorithm, names) + shifted

    return run.over_time(line)


def _last(run: Run, name: str, form: str) -> str:
    values = run.series(name)[1]
    return form.format(values[-1]) if values else ""


def _shown(value: Any) -> str:
    """Escaped text, cut where it is very long."""
    text = "" if value is None else str(value)
    if len(text) > _LONGEST_TEXT:
        text = f"{text[:_LONGEST_TEXT]}... ({len(text) - _LONGEST_TEXT} more characters)"
    return escape(text)

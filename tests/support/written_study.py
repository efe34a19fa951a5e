"""A study whose runs are written by hand: three arms, three seeds, four steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rl.study.plan import Plan, PlannedRun, make_plan
from megatron_rl.study.schema import read_study
from megatron_rl.study.state import lay_out as lay_out_run
from megatron_rl.study.state import mark_done
from tests.support.stand_in_study import lay_out

STUDY = """\
arms: {gmpo: {optimizer.lr: 0.1}, rspo: {optimizer.lr: 0.2}, grpo: {}}
seeds: 3
compare_to: gmpo
window: 2
metrics: [reward/solved, eval/mean@k, kl_old]
collapse: {entropy_below: 0.1, grad_norm_above: 50}
"""
#: arm, seed -> reward/solved at steps 1 to 4; grpo's third seed goes on.
SOLVED = {
    ("gmpo", 1): [0.1, 0.2, 0.3, 0.5],
    ("gmpo", 2): [0.1, 0.1, 0.2, 0.4],
    ("gmpo", 3): [0.3, 0.6, 0.9, 0.7],
    ("rspo", 1): [0.1, 0.3, 0.5, 0.7],
    ("rspo", 2): [0.2, 0.2, 0.4, 0.4],
    ("rspo", 3): [0.3, 0.7, 0.9, 0.9],
    ("grpo", 1): [0.2, 0.4, 0.1, 0.1],  # falls to a third of its best
    ("grpo", 2): [0.2, 0.4, 0.4, 0.5],
    ("grpo", 3): [0.2, 0.9],
}


def write_run(run: PlannedRun, solved: Sequence[float], **more: Any) -> None:
    """A run's metrics: reward/solved of its steps, and other metrics by name."""
    lay_out_run(run)
    records = [{"step": 0, "eval/mean@k": 0.25}]
    for step, value in enumerate(solved, start=1):
        record = {"step": step, "reward/solved": value, "loss": 0.1, "entropy": 1.0}
        layers = {"router/entropy/layer_00": 1.0, "time/step_s": 2.0}
        records.append(record | layers | {name: values[step - 1] for name, values in more.items()})
    lines = [json.dumps(record) + "\n" for record in records]
    (run.run_dir / "metrics.jsonl").write_text("".join(lines))


def written_plan(folder: Path) -> Plan:
    """The plan of `STUDY` in the current directory, ``folder``, with the runs of `SOLVED`."""
    lay_out(folder, STUDY)
    (folder / "base.yaml").write_text(
        "data: {tokenizer: {path: tokenizer.model}, train: train.jsonl}\ntrain: {steps: 4}\n"
    )
    plan = make_plan(read_study(Path("study.yaml")))
    for run in plan.runs:
        assert run.seed is not None, "all are of arms"
        solved = SOLVED[run.arm, run.seed]
        norms = [1.0, None, 2.0, 60.0] if (run.arm, run.seed) == ("rspo", 3) else [1.0] * 4
        write_run(run, solved, grad_norm=norms)
        if len(solved) == 4:
            mark_done(run)
    return plan

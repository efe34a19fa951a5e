"""How much the gradients of a study's arms vary over mini-batches, at the same weights.

    python examples/router_shift_study/gradients.py examples/router_shift_study/sort_small.yaml \
        --weights RUN_DIR [RUN_DIR ...] --drift 4 16 --mini-batches 32 --out gradients.json

The answers are sampled with the weights in RUN_DIR. Then the weights take ``--drift`` optimizer
steps on mini-batches of their own, by the loss of the study's first arm, and the routers move. At
these weights each arm gives its gradient on each of ``--mini-batches`` others. One process.

Of several weights and drifts a table for each drift follows: means over the weights, and the ratio
to another arm, with its interval over the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rl.config.algorithm import updates_per_step
from megatron_rl.config.checks import check_config
from megatron_rl.config.schema import Config
from megatron_rl.data.run_data import load_run_data
from megatron_rl.device.launch import read_launch
from megatron_rl.device.select import select_device
from megatron_rl.errors import UserError
from megatron_rl.files import write_whole
from megatron_rl.study.plan import make_plan
from megatron_rl.study.schema import read_study
from megatron_rl.study.statistics import Estimate, estimate
from megatron_rl.study.table import aligned

_COMPARED = ("trace", "snr")
COLUMNS = ("mean_square", "signal", "trace", "snr")
SHOWN = ("clip_fraction", "router/raw_gamma_mean", "router/floor_fraction", "weights/ess_token")


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 2 with one line of a mistake."""
    asked = _arguments(argv)
    found = []
    try:
        for weights in asked.weights or [None]:
            for steps in asked.drift:
                configs = _arms(asked, weights, steps)
                found.append(measured(configs, steps, asked.mini_batches))
                print("\n".join([*table(found[-1]), ""]), flush=True)
        if asked.out is not None:
            write_whole(asked.out, json.dumps(found, indent=1) + "\n")
        if len(found) > 1:
            print("\n".join(overview(found, asked.base)))
    except UserError as error:
        print(f"gradients.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def measured(configs: dict[str, Config], steps: int, count: int) -> dict[str, Any]:
    """The numbers of each arm, after some optimizer steps by the first arm's loss.

    Args:
        configs: by arm, alike but for their algorithm.
        steps: optimizer steps between the answers and the gradients.
        count: mini-batches of the gradients.

    Raises:
        UserError: arms that cannot be compared, or a mistake in a configuration or its data.
    """
    first = next(iter(configs.values()))
    if any(config.algorithm.routing_replay == "r2" for config in configs.values()):
        first = next(c for c in configs.values() if c.algorithm.routing_replay == "r2")
    data = load_run_data(first, "train")
    select_device(first.device, read_launch())  # before Megatron is imported
    from megatron_rl.policy.initial_weights import load_initial_weights
    from megatron_rl.policy.policy import build_policy
    from megatron_rl.run.session import open_session
    from megatron_rl.tasks import gradients
    from megatron_rl.tasks.build import build_engine

    algorithms = {name: config.algorithm for name, config in configs.items()}
    gradients.check_comparable(first.algorithm, algorithms)
    with open_session(first, "evaluate", None, data.tokenizer) as session:
        updates = first.train.steps * updates_per_step(first.algorithm)
        policy = build_policy(first, session.device, session.groups, updates)
        weights = load_initial_weights(first, policy.chunks, session.groups)
        policy.optimizer.reload_model_params()
        with contextlib.closing(build_engine(session, policy.chunks, policy.capture)) as engine:
            batches = gradients.sample_mini_batches(
                session, policy, engine, data.train.items, steps + count
            )
        drift = gradients.drift(policy, batches[:steps]) if steps else {}
        found = gradients.measure(policy, batches[steps:], algorithms)
    return {
        "weights": str(weights),
        "drift": {"steps": steps, "grad_norm": drift.get("grad_norm"), "lr": drift.get("lr")},
        "arms": {
            name: {**asdict(noise), "metrics": found.metrics[name]}
            for name, noise in found.noise.items()
        },
        "cosines": found.cosines,
    }


def table(found: dict[str, Any]) -> list[str]:
    """The numbers as lines of text."""
    arms = found["arms"]
    width = max(map(len, arms))
    lines = [f"{found['weights']}, {found['drift']['steps']} optimizer steps later", ""]
    metrics = [name for name in SHOWN if any(name in arm["metrics"] for arm in arms.values())]
    head = [*COLUMNS, *metrics]
    lines.append(
        "  ".join(["arm".ljust(width), *(name.rjust(max(10, len(name))) for name in head)])
    )
    for name, arm in arms.items():
        values = [arm[column] for column in COLUMNS]
        values += [arm["metrics"].get(metric) for metric in metrics]
        cells = ["" if value is None else f"{value:.4g}" for value in values]
        padded = (cell.rjust(max(10, len(title))) for cell, title in zip(cells, head))
        lines.append("  ".join([name.ljust(width), *padded]))
    lines += ["", "cosine of the mean gradients"]
    for name, row in found["cosines"].items():
        lines.append("  ".join([name.ljust(width), *(f"{v:.3f}".rjust(6) for v in row.values())]))
    return lines


def overview(found: Sequence[dict[str, Any]], base: str | None) -> list[str]:
    """For each drift a table over all weights: means, and ratios to ``base``, or where None to the
    first arm.
    """
    arms = list(found[0]["arms"])
    base = base or arms[0]
    head = ["arm", "trace", "snr", f"trace / {base}'s", f"snr / {base}'s"]
    lines = []
    for steps in dict.fromkeys(one["drift"]["steps"] for one in found):
        own = [one["arms"] for one in found if one["drift"]["steps"] == steps]
        rows = [head]
        for arm in arms:
            means = [f"{sum(one[arm][name] for one in own) / len(own):.4g}" for name in _COMPARED]
            rows.append([arm, *means, *(_ratio_text(ratio(own, arm, base, n)) for n in _COMPARED)])
        lines += [f"{steps} optimizer steps later, {len(own)} weights", *aligned(rows), ""]
    return lines


def ratio(arms: Sequence[dict[str, Any]], arm: str, base: str, number: str) -> Estimate | None:
    """The geometric mean over weights of a number of ``arm`` over that of ``base``, with its 95%
    bootstrap interval over the weights. None: a number is not above 0, and has no logarithm.
    """
    pairs = [(one[arm][number], one[base][number]) for one in arms]
    if min(min(pair) for pair in pairs) <= 0:
        return None
    logs = estimate([math.log(ours / theirs) for ours, theirs in pairs])
    assert logs is not None, "there are weights"
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Estimate(math.exp(logs.mean), low, high, logs.count)


def _ratio_text(found: Estimate | None) -> str:
    if found is None:
        return ""
    interval = "" if found.low is None else f" [{found.low:.3f}, {found.high:.3f}]"
    return f"{found.mean:.3f}{interval}"


def _arms(asked: argparse.Namespace, weights: Path | None, steps: int) -> dict[str, Config]:
    """The configuration of each arm at the first seed, started from these weights."""
    if steps < 0 or asked.mini_batches < 2:
        raise UserError(
            f"--drift is {steps} and --mini-batches {asked.mini_batches}; expected at least 0 and 2"
        )
    plan = make_plan(read_study(asked.study), asked.quick)
    found = {}
    for run in plan.of_arms():
        if run.seed != plan.seeds[0] or (asked.arms and run.arm not in asked.arms):
            continue
        config = run.config
        if weights is not None:
            start = config.checkpoint.model_copy(update={"init_from": weights})
            config = config.model_copy(update={"checkpoint": start})
        found[run.arm] = config
    unknown = sorted({*(asked.arms or ()), *([asked.base] if asked.base else ())} - found.keys())
    if unknown:
        raise UserError(f"no arm is {unknown[0]}; expected some of {', '.join(plan.arms)}")
    check_config(next(iter(found.values())), 1, "train")
    return found


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("study", type=Path, help="the study file whose arms are measured")
    parser.add_argument(
        "--weights", type=Path, nargs="+", help="runs or checkpoints; default: as the study"
    )
    parser.add_argument("--drift", type=int, nargs="+", default=[4], help="optimizer steps")
    parser.add_argument("--mini-batches", type=int, default=16, help="default: 16")
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--base", help="the arm of the ratios; default: the first")
    parser.add_argument("--quick", action="store_true", help="as the study's --quick")
    parser.add_argument("--out", type=Path, help="a JSON file of all numbers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())

"""Measures what each part of a step of reinforcement learning is worth: the case of `rl_step.py`,
whole, with parts of the program switched off, and by the code of other checkouts.

    python tools/bench/rl_step_parts.py [--checkout NAME=DIR ...] [--rounds 5] [--json FILE]

All runs are alive at the same time and take turns, as in `rl_step.py`; ranks of one thread, as many
as cores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_rl.device.cores import usable_cores  # noqa: E402
from tools.bench.common import Spread, end_on_sigterm, table, take_turns  # noqa: E402
from tools.bench.rl_step import CASES, OURS, STAGES, Setting, start, summary  # noqa: E402
from tools.bench.rl_step_case import make_files  # noqa: E402

WHOLE = "whole"
SHARED_OFF, SCORED = "--data.share_prompts=off", "--rollout.scores=pass"
#: Parts that can be switched off, by what the table calls the rest.
PARTS = {
    "a pass scores": (SCORED,),
    "prompts not shared": (SHARED_OFF,),
    "a pass scores, prompts not shared": (SCORED, SHARED_OFF),
}


def settings_of(cores: int, checkouts: dict[str, Path]) -> list[Setting]:
    """The whole, the whole without each part, and other checkouts' wholes."""
    rows = [Setting(OURS, cores, 1, label=WHOLE)]
    rows += [Setting(OURS, cores, 1, words, label=name) for name, words in PARTS.items()]
    for name, folder in checkouts.items():
        rows.append(Setting(OURS, cores, 1, label=name, code=folder))
    return rows


def main() -> int:
    """Measure and print."""
    arguments = _arguments()
    case = CASES[arguments.size]
    end_on_sigterm()
    settings = settings_of(arguments.cores, dict(arguments.checkout))
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, workers = Path(name), {}
        make_files(folder, case)
        for number, setting in enumerate(settings):
            worker = start(setting, case, folder, folder / f"worker_{number}", arguments)
            workers[setting.name] = stack.enter_context(worker)
            worker.wait()
            print(f"{setting.name} has warmed up", file=sys.stderr, flush=True)
        turns = take_turns(workers, arguments.rounds, arguments.steps)
    rows = [summary(each, "measured", turns[each.name], case, peak=1.0) for each in settings]
    whole = [turn.seconds for turn in turns[WHOLE]]
    for row in rows:
        row["ratio"] = dataclasses.asdict(
            Spread.of(seconds / ours for seconds, ours in zip(row["turns_s"], whole))
        )
    print(table(["", "s a step (quartiles)", *STAGES, "of the whole"], map(_cells, rows)))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _cells(row: dict[str, Any]) -> list[str]:
    stages = [f"{row['stages'][stage]['median']:.2f}" for stage in STAGES]
    return [row["name"], str(Spread(**row["seconds"])), *stages, str(Spread(**row["ratio"]))]


def _checkout(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not (Path(folder) / "megatron_rl" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(
            f"{text}: there is no megatron_rl in {folder or 'it'}; expected NAME=DIR with a "
            "checkout of this repository"
        )
    return name, Path(folder).absolute()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkout", type=_checkout, action="append", default=[])
    parser.add_argument("--cores", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--size", choices=sorted(CASES), default="full")
    parser.add_argument("--json", help="file to write everything to")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

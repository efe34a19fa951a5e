"""Measures time per token while one size after the other grows eightfold.

    python tools/bench/growth.py [--only batch,experts] [--rounds 5] [--json FILE]

Batch, answer length, prompt length, layers, experts and vocabulary of a small model grow in one
process of one thread; data-parallel and expert-parallel ranks, each with the work of the base, in
processes of their own. All points of a size take turns. A point is a step of rspo as a run takes
it. Times are the processor's, of ranks the wall's too. The table compares how the time per token
grows with how the operations per token do (of the optimizer: time per parameter, which should not
grow).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_rl.device.cores import usable_cores  # noqa: E402
from tools.bench.common import (  # noqa: E402
    Spread,
    Worker,
    end_on_sigterm,
    table,
    take_turns,
    turn_order,
)
from tools.bench.growth_point import Point, Ranks, Times, work  # noqa: E402

FACTORS = (1, 2, 4, 8)
#: How far growth of time over growth of work may be from 1 without an explanation.
CLOSE = 0.15

_FIXED = "a decoding step has costs that do not grow, such as launching its operators"
_PREFILL = "tokens of a prompt cost less than decoded ones, for they are passed over together"
_PASSED = "no pass scores (`rollout.scores`): what is left grows with samples, not with the model"
_TILES = "logits of a pack no longer fit in one tile, so the backward pass computes them again"
_SHARED = "tokens of a prompt are passed over once for all its answers; the formula counts each"
_ROWS = "the experts' products have fewer rows each, and more weights are read"
_STEP = "an optimizer step has costs that do not grow"
_WAIT = "gradients are copied and summed, and ranks wait for each other"
#: What makes a stage grow otherwise than its work, as far as known; by size, stage and direction.
WHY = {
    ("batch", "rollout", "below"): _FIXED,
    ("answer", "rollout", "above"): f"{_PREFILL}, and answers go from 67% to 94% of all",
    ("prompt", "rollout", "below"): f"{_PREFILL}, and prompts go from 33% to 80% of all",
    ("answer", "score", "below"): _PASSED,
    ("answer", "update", "above"): f"{_SHARED}, and answers go from 67% to 94% of all",
    ("prompt", "score", "below"): _PASSED,
    ("prompt", "update", "below"): _SHARED,
    ("layers", "rollout", "below"): _FIXED,
    ("layers", "score", "below"): _PASSED,
    ("experts", "rollout", "above"): _ROWS,
    ("experts", "score", "above"): _ROWS,
    ("experts", "update", "above"): f"{_ROWS}; more gradients are cleared and summed",
    ("vocabulary", "rollout", "below"): _FIXED,
    ("vocabulary", "score", "below"): _PASSED,
    ("vocabulary", "update", "above"): _TILES,
    ("DP ranks", "cpu", "above"): _WAIT,
    ("DP ranks", "wall", "above"): _WAIT,
    ("EP ranks", "cpu", "above"): f"{_WAIT}; experts' weights, or tokens, travel between ranks",
    ("EP ranks", "wall", "above"): f"{_WAIT}; experts' weights, or tokens, travel between ranks",
    **{(size, "optimizer", "below"): _STEP for size in ("layers", "experts", "vocabulary")},
}


def grown(base: Point, dimension: str, factor: int) -> Point:
    """The base with one size multiplied."""
    if dimension in ("layers", "experts", "vocabulary"):
        size = factor * getattr(base.shape, dimension)
        return dataclasses.replace(base, shape=dataclasses.replace(base.shape, **{dimension: size}))
    if dimension in RANKS:
        return dataclasses.replace(base, ranks=factor, expert_parallel=dimension == "EP ranks")
    name = {"batch": "prompts", "answer": "answer_tokens", "prompt": "prompt_tokens"}[dimension]
    return dataclasses.replace(base, **{name: factor * getattr(base, name)})


SIZES = ("batch", "answer", "prompt", "layers", "experts", "vocabulary")
RANKS = ("DP ranks", "EP ranks")
SMALLEST = Point(
    shape=dataclasses.replace(Point().shape, layers=1, hidden=32, heads=2, head_dim=16),
    prompts=2,
    answers=2,
    prompt_tokens=4,
    answer_tokens=4,
    pack_tokens=64,
)


def main() -> int:
    """Measure each size, print one table."""
    arguments = _arguments()
    if arguments.worker:
        work(Path(arguments.worker))
        return 0
    end_on_sigterm()
    base = SMALLEST if arguments.smallest else Point()
    rows: list[Row] = []
    for dimension in arguments.only.split(","):
        points = [grown(base, dimension, factor) for factor in FACTORS[: arguments.factors]]
        measure = measure_ranks if dimension in RANKS else measure_here
        rows += rows_of(dimension, points, measure(points, arguments.rounds))
        print(f"{dimension} is measured", file=sys.stderr, flush=True)
    print(table(HEAD, (row.cells() for row in rows)))
    print(
        f"medians of {arguments.rounds} steps in turns on {usable_cores()} cores, one thread a "
        f"rank; load average {os.getloadavg()[0]:.1f}\n"
        "us of processor time a token, prompts included (optimizer: ns a parameter); update is "
        "without optimizer"
    )
    for row in rows:
        if row.mark:
            print(row.why())
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n"
        )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join((*SIZES, *RANKS)), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--factors", type=int, default=len(FACTORS), help="points of each size")
    parser.add_argument("--smallest", action="store_true", help="a base that measures nothing")
    parser.add_argument("--json", help="file to write the rows to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # of a rank: where its point is
    arguments = parser.parse_args()
    unknown = set(arguments.only.split(",")) - {*SIZES, *RANKS}
    if unknown:
        parser.error(f"unknown sizes {', '.join(sorted(unknown))}; known are {SIZES + RANKS}")
    return arguments


@dataclass(frozen=True)
class Row:
    """A stage, as one size grows."""

    dimension: str
    stage: str
    times: list[Spread]  #: per unit of work, for each factor
    expected: float  #: growth of the work per unit, from the base to the last point

    @property
    def growth(self) -> float:
        """Of the time, from the base to the last point."""
        return self.times[-1].median / self.times[0].median

    @property
    def mark(self) -> str:
        """Empty: the time grows as the work does; else above or below it."""
        quotient = self.growth / self.expected
        return "" if abs(quotient - 1.0) <= CLOSE else "below" if quotient < 1.0 else "above"

    def why(self) -> str:
        """A line about a row with a mark."""
        words = WHY.get((self.dimension, self.stage, self.mark), "not explained")
        return f"{self.dimension}, {self.stage}: {self.mark}: {words}"

    def cells(self) -> list[str]:
        """Of the table."""
        times = [f"{spread.median:.3g}" for spread in self.times]
        times += [""] * (len(FACTORS) - len(times))
        quotient = self.growth / self.expected
        numbers = [f"{value:.2f}" for value in (self.growth, self.expected, quotient)]
        return [self.dimension, self.stage, *times, *numbers, self.mark]


HEAD = ["size", "stage", "x1", "x2", "x4", "x8", "last/first", "of work", "quotient", ""]


def rows_of(dimension: str, points: Sequence[Point], steps: Sequence[Sequence[Times]]) -> list[Row]:
    """A row for each stage that the steps of each point have."""
    rows = []
    for stage in steps[0][0]:
        units = [unit(point, stage) for point in points]
        times = [
            Spread.of(step[stage] / size for step in taken) for size, taken in zip(units, steps)
        ]
        growth = work_per_unit(points[-1], stage) / work_per_unit(points[0], stage)
        rows.append(Row(dimension, stage, times, growth))
    return rows


def unit(point: Point, stage: str) -> float:
    """What the time is divided by, and 1e6 or 1e9: tokens, or the optimizer's parameters."""
    return point.parameters() / 1e9 if stage == "optimizer" else point.tokens / 1e6


def work_per_unit(point: Point, stage: str) -> float:
    """Work for each unit, up to a constant: operations; of ranks' wall time what a core is left
    with, if the cores share it perfectly.
    """
    if stage == "optimizer":
        return 1.0
    share = 1.0 / min(point.ranks, usable_cores()) if stage == "wall" else 1.0
    return share * point.flop_per_token()


def measure_here(points: Sequence[Point], rounds: int) -> list[list[Times]]:
    """Steps of each point, in turns, without the first."""
    ranks = _ranks()
    steps = [ranks.build(point) for point in points]
    taken: list[list[Times]] = [[] for _ in points]
    for number in range(rounds + 1):
        for place in turn_order(range(len(points)), number):
            times = dict(steps[place]())
            del times["wall"], times["cpu"]
            if number:  # the first is not counted
                taken[place].append(times)
    return taken


@functools.cache
def _ranks() -> Ranks:
    return Ranks()


def measure_ranks(points: Sequence[Point], rounds: int) -> list[list[Times]]:
    """The same for points of several ranks: each in processes of its own. Only the whole steps."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = {}
        for point in points:
            place = Path(folder) / str(point.ranks)
            place.mkdir()
            (place / "point.json").write_text(json.dumps(dataclasses.asdict(point)))
            ranks = f"--nproc-per-node={point.ranks}"
            command = [*launch, ranks, __file__, "--worker", str(place)]
            environment = {"OMP_NUM_THREADS": "1"}
            worker = Worker(f"{point.ranks} ranks", command, place, 1, environment)
            workers[point.ranks] = stack.enter_context(worker)
        for worker in workers.values():
            worker.wait()
        turns = take_turns(workers, rounds, 1)
    return [
        [{stage: turn.steps[0][stage] for stage in ("cpu", "wall")} for turn in turns[point.ranks]]
        for point in points
    ]


if __name__ == "__main__":
    sys.exit(main())

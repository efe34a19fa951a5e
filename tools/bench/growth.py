"""Measures time per token while one size after the other grows eightfold.

    python tools/bench/growth.py [--only batch,experts] [--rounds 5] [--json FILE]

Batch, answer length, prompt length, layers, experts and vocabulary of a small model grow in one
process of one thread; data-parallel and expert-parallel ranks of one thread each, with a base's
work for each rank, in processes of their own. All points of a size take turns. A point is a step of
rspo as a run takes it, by the program's own timers. The table compares the growth of the time per
token with the growth of the floating-point operations per token (of the optimizer: of the
parameters; of ranks: none). Of ranks it shows processor time and wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_rl.device.cores import usable_cores  # noqa: E402
from tools.bench.common import (  # noqa: E402
    Shape,
    Spread,
    Turns,
    Worker,
    forward_flop,
    table,
    take_turns,
    turn_order,
)

FACTORS = (1, 2, 4, 8)
STAGES = ("rollout", "score", "update", "optimizer")
#: Growth of the time per token over growth of the work per token that needs no explanation.
CLOSE = 0.15


@dataclass(frozen=True)
class Point:
    """Sizes of a model and of a step."""

    shape: Shape = Shape(
        layers=2,
        hidden=128,
        heads=4,
        kv_heads=2,
        head_dim=32,
        experts=8,
        top_k=2,
        expert_width=128,
        vocabulary=512,
    )
    prompts: int = 8  #: of a step, a rank
    answers: int = 8  #: to each
    prompt_tokens: int = 12
    answer_tokens: int = 24
    pack_tokens: int = 2304
    ranks: int = 1
    expert_parallel: bool = False  #: experts are spread over all ranks

    @property
    def tokens(self) -> int:
        """Tokens of a step, prompts included, all ranks."""
        return self.ranks * self.prompts * self.answers * (self.prompt_tokens + self.answer_tokens)

    def flop_per_token(self) -> float:
        """Of a forward pass over an answer and its prompt."""
        flop = forward_flop(self.shape, self.prompt_tokens, self.answer_tokens)
        return flop / (self.prompt_tokens + self.answer_tokens)

    def parameters(self) -> int:
        """Weights of the products and of the embedding; norms are left out."""
        shape = self.shape
        width, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        attention = shape.hidden * (2 * width + 2 * kv)
        experts = shape.experts * shape.hidden * (3 * shape.expert_width + 1)
        return shape.layers * (attention + experts) + 2 * shape.vocabulary * shape.hidden


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
    base = SMALLEST if arguments.smallest else Point()
    rows: list[Row] = []
    for dimension in arguments.only.split(","):
        points = [grown(base, dimension, factor) for factor in FACTORS[: arguments.factors]]
        measure = measure_ranks if dimension in RANKS else measure_here
        rows += rows_of(dimension, points, measure(points, arguments.rounds))
        print(f"{dimension} is measured", file=sys.stderr, flush=True)
    print(table(HEAD, (row.cells() for row in rows)))
    print(
        f"medians of {arguments.rounds} steps in turns on {usable_cores()} cores, one thread a rank; "
        f"load average {os.getloadavg()[0]:.1f}\n"
        "us a token of prompts and answers (optimizer: ns a parameter); update: without optimizer"
    )
    for row in rows:
        if not row.close:
            print(f"{row.dimension}, {row.stage}: {WHY.get((row.dimension, row.stage), 'unknown')}")
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


#: What one step of a point took: seconds of each stage.
Times = Mapping[str, float]


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
    def close(self) -> bool:
        """The time grows as the work does."""
        return abs(self.growth / self.expected - 1.0) <= CLOSE

    def cells(self) -> list[str]:
        """Of the table."""
        times = [f"{spread.median:.3g}" for spread in self.times]
        times += [""] * (len(FACTORS) - len(times))
        quotient = self.growth / self.expected
        mark = "" if self.close else "below" if quotient < 1 else "above"
        numbers = [f"{value:.2f}" for value in (self.growth, self.expected, quotient)]
        return [self.dimension, self.stage, *times, *numbers, mark]


HEAD = ["size", "stage", "x1", "x2", "x4", "x8", "last/first", "of work", "quotient", ""]


def rows_of(dimension: str, points: Sequence[Point], steps: Sequence[Sequence[Times]]) -> list[Row]:
    """A row for each stage that the steps of each point have."""
    rows = []
    for stage in steps[0][0]:
        units = [unit(point, stage) for point in points]
        times = [
            Spread.of(step[stage] / size for step in taken) for size, taken in zip(units, steps)
        ]
        rows.append(Row(dimension, stage, times, work(points[-1], stage) / work(points[0], stage)))
    return rows

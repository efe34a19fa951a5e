"""What several benches share: floating-point operations, the machine's peak, quartiles, tables, and
programs that take turns.

Its import needs nothing but Python: a worker of `rl_step.py` runs in an environment without this
package.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Hashable, Iterable, Mapping, Sequence, TypeVar

Name = TypeVar("Name", bound=Hashable)
#: Longest a turn may take, seconds.
LONGEST_TURN_S = 900.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder whose layers are all MoE, with grouped-query attention."""

    layers: int
    hidden: int  #: D
    heads: int
    kv_heads: int
    head_dim: int
    experts: int  #: E
    top_k: int  #: K
    expert_width: int  #: F, of gate, up and down
    vocabulary: int  #: V


#: The model that whole steps are measured with.
SHAPE = Shape(
    layers=4,
    hidden=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    experts=8,
    top_k=2,
    expert_width=128,
    vocabulary=512,
)


def forward_flop(shape: Shape, prompt: int, answer: int) -> int:
    """Floating-point operations of one forward pass over a prompt and its answer, in tokens.

    A product of [a, b] by [b, c] is 2abc. With n = prompt + answer - 1 tokens (nothing follows the
    last), of which the i-th attends to i:

        layers * (n * (2 D (heads + 2 kv_heads) head_dim + 2 heads head_dim D + 2 D E + K 6 D F)
                  + 4 heads head_dim n (n + 1) / 2) + answer * 2 D V

    Norms, rotary embedding, softmax, activations, sampling, loss and optimizer are left out.
    """
    width, n = shape.heads * shape.head_dim, prompt + answer - 1
    qkv = 2 * shape.hidden * (width + 2 * shape.kv_heads * shape.head_dim)
    out, router = 2 * width * shape.hidden, 2 * shape.hidden * shape.experts
    experts = shape.top_k * 6 * shape.hidden * shape.expert_width
    attention = 4 * width * n * (n + 1) // 2
    head = answer * 2 * shape.hidden * shape.vocabulary
    return shape.layers * (n * (qkv + out + router + experts) + attention) + head


#: Forward passes that each stage of a step is worth; a backward pass is two.
PASSES = {"rollout": 1, "score": 1, "update": 3}


def peak_gflops(rows: int, inner: int, columns: int, threads: int, trials: int = 30) -> float:
    """The fastest fp32 product of [rows, inner] by [inner, columns] of some trials, GFLOP/s."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = torch.rand(rows, inner), torch.rand(inner, columns)
        repeat = max(1, int(5e7 / (2 * rows * inner * columns)))
        best = float("inf")
        for _ in range(trials):
            began = time.perf_counter()
            for _ in range(repeat):
                left @ right
            best = min(best, (time.perf_counter() - began) / repeat)
    finally:
        torch.set_num_threads(before)
    return 2e-9 * rows * inner * columns / best


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value; quartiles are interpolated between the values."""
        values = list(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} .. {self.high:.2f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first is flush left, the others right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def turn_order(names: Sequence[Name], number: int) -> list[Name]:
    """The order of a round: odd ones the other way, so that no program always follows another."""
    return list(names) if number % 2 == 0 else list(reversed(names))


class Turns:
    """A worker's end: work, say what was measured, and sleep until the next turn.

    ``folder`` holds two named pipes that `Worker` makes. A turn is some steps; the first begins
    when this object is made.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._steps = int((self._folder / "steps").read_text())
        self._records: list[dict[str, Any]] = []
        self._began = time.perf_counter()

    def after_step(self, record: Mapping[str, Any]) -> None:
        """Keep what a step measured. After the last of a turn: hand it over, and wait."""
        self._records.append(dict(record))
        if len(self._records) < self._steps:
            return
        seconds = time.perf_counter() - self._began
        with (self._folder / "done").open("w") as done:
            done.write(json.dumps({"seconds": seconds, "steps": self._records}) + "\n")
        self._records = []
        with (self._folder / "go").open() as go:
            go.readline()
        self._began = time.perf_counter()


def end_on_sigterm() -> None:
    """From now on SIGTERM ends this process as an exception does, so that it ends its workers."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@dataclass(frozen=True)
class Turn:
    """What a worker measured in a turn."""

    seconds: float  #: of a step
    cpu_s: float  #: processor seconds of a step, all of the worker's processes
    idle_cpu_s: float  #: processor seconds of a step that all other workers took meanwhile
    steps: tuple[dict[str, Any], ...]  #: what the worker says of each


class Worker:
    """A program that takes turns, in processes of its own; a context manager that ends them.

    The first turn, which starts with the program, is a warm-up: `wait` for it.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        steps: int,
        environment: Mapping[str, str],
    ) -> None:
        """folder: it works there; for the pipes and the output; it exists. steps: of a turn."""
        self._name, self._log = name, folder / "log"
        (folder / "steps").write_text(str(steps))
        for name in ("go", "done"):
            os.mkfifo(folder / name)
        # Read and write: opening does not wait for the other end, and an end is never the file's.
        self._go, self._done = (os.open(folder / name, os.O_RDWR) for name in ("go", "done"))
        self._text = b""
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                list(command),
                cwd=folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        for pipe in (self._go, self._done):
            os.close(pipe)

    def end(self) -> None:
        """End all its processes."""
        if self._process.poll() is None:
            for process in self._processes():
                process.kill()
            self._process.wait()

    def begin(self) -> None:
        """Let it take a turn."""
        os.write(self._go, b"go\n")

    def wait(self) -> dict[str, Any]:
        """What the turn gave. RuntimeError, with the end of its output: it has ended or hangs."""
        deadline = time.monotonic() + LONGEST_TURN_S
        while b"\n" not in self._text:
            ready, _, _ = select.select([self._done], [], [], 1.0)
            if ready:
                self._text += os.read(self._done, 1 << 16)
            elif self._process.poll() is not None or time.monotonic() > deadline:
                end = self._log.read_text(errors="replace")[-4000:]
                raise RuntimeError(f"{self._name} has ended or hangs:\n{end}")
        line, _, self._text = self._text.partition(b"\n")
        return json.loads(line)

    def cpu_s(self) -> float:
        """Processor seconds so far, of all its processes."""
        import psutil

        total = 0.0
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by now
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _processes(self) -> list[Any]:
        import psutil

        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]


def take_turns(workers: Mapping[Name, Worker], rounds: int, steps: int) -> dict[Name, list[Turn]]:
    """Each worker's turns, one a round, while the others sleep. ``steps``: of a turn."""
    turns: dict[Name, list[Turn]] = {name: [] for name in workers}
    for number in range(rounds):
        for name in turn_order(list(workers), number):
            before = {other: worker.cpu_s() for other, worker in workers.items()}
            workers[name].begin()
            given = workers[name].wait()
            spent = {other: worker.cpu_s() - before[other] for other, worker in workers.items()}
            own = spent.pop(name)
            turns[name].append(
                Turn(
                    given["seconds"] / steps,
                    own / steps,
                    sum(spent.values()) / steps,
                    tuple(given["steps"]),
                )
            )
    return turns

"""Compare training under every parallel layout with training in a single process, on CPU ranks.

    OMP_NUM_THREADS=1 python tools/bench/layouts.py [--only TEXT]

Prints two tables, fp32 and bf16, a row a layout; exit code 1 if a difference is above the tolerance
or a layout fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Mapping

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.layout_cases import (  # noqa: E402
    BF16_CASES,
    BF16_SEEDS,
    CASES,
    TOLERANCE,
    Case,
)
from tests.support.layouts import (  # noqa: E402
    NUMBERS,
    References,
    beyond,
    compare,
    compare_in_bf16,
    run_case,
)
from tests.support.ranks import RankFailure  # noqa: E402

#: Differences (or their bounds) by the names of `NUMBERS`, and the smallest gamma.
Numbers = Mapping[str, float]
LEAST_GAMMA = "smallest_gamma"


def main() -> int:
    """Run the chosen layouts, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="layouts whose name holds this text")
    only = parser.parse_args().only
    console = Console(width=None if sys.stdout.isatty() else 150)
    references = References()
    count = wrong = 0
    for title, cases, measure in (
        (f"fp32: each number below {TOLERANCE:g}", CASES, _fp32),
        (
            f"bf16: distance from fp32 / a single process's, mean of {BF16_SEEDS} seeds",
            BF16_CASES,
            _bf16,
        ),
    ):
        chosen = [case for case in cases if only in case.name]
        if chosen:
            count += len(chosen)
            wrong += _print_table(console, title, chosen, measure, references)
    console.print(f"{count} layouts, {wrong} beyond their tolerance or failed")
    return 1 if wrong or not count else 0


def _fp32(case: Case, references: References) -> tuple[Numbers, Numbers, str]:
    difference = compare(run_case(case), references.of(case))
    numbers = {name: getattr(difference, name) for name in (*NUMBERS, LEAST_GAMMA)}
    return numbers, dict.fromkeys(NUMBERS, TOLERANCE), f"furthest off: {difference.worst}"


def _bf16(case: Case, references: References) -> tuple[Numbers, Numbers, str]:
    return *compare_in_bf16(case, references), ""


def _print_table(console: Console, title: str, cases, measure, references: References) -> int:
    """Print one table; returns the number of wrong rows."""
    table = Table("layout", "ranks", *NUMBERS, "least gamma", "seconds", pad_edge=False)
    table.title, table.columns[0].no_wrap = title, True
    wrong, last_bounds = 0, None
    worst = dict.fromkeys(NUMBERS, 0.0)
    for case in cases:
        start = time.perf_counter()
        try:
            numbers, bounds, furthest = measure(case, references)
        except (RankFailure, AssertionError) as error:
            wrong += 1
            table.add_row(case.name, str(case.ranks), "[red]failed")
            reason = str(error).strip().splitlines()[-1]
            console.print(f"[red]{case.name}[/]", reason, soft_wrap=True)
            continue
        above = beyond(numbers, bounds)
        worst = {name: max(value, numbers[name]) for name, value in worst.items()}
        if above:
            wrong += 1
            console.print(f"[red]{case.name}[/] is beyond its tolerance in {', '.join(above)}")
            console.print(f"  {furthest}", soft_wrap=True)
        if bounds != last_bounds:
            last_bounds = bounds
            table.add_row("[dim]at most", "", *(f"[dim]{_text(bounds[name])}" for name in NUMBERS))
        seconds = time.perf_counter() - start
        table.add_row(*_cells(case, numbers, above), f"{seconds:.1f}")
        largest = max(numbers[name] for name in NUMBERS)
        print(f"{case.name}: {_text(largest)}", file=sys.stderr, flush=True)
    table.add_row(f"worst of {len(cases)}", "", *(_text(value) for value in worst.values()))
    console.print(table)
    return wrong


def _cells(case: Case, numbers: Numbers, above: list[str]) -> list[str]:
    cells = []
    for name in NUMBERS:
        text = _text(numbers[name])
        cells.append(f"[red]{text}" if name in above else text)
    least = f"{numbers[LEAST_GAMMA]:.2f}" if LEAST_GAMMA in numbers else ""
    return [case.name, str(case.ranks), *cells, least]


def _text(number: float) -> str:
    return f"{number:.1e}" if number < 0.01 else f"{number:.2f}"


if __name__ == "__main__":
    sys.exit(main())

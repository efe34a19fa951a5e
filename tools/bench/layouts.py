"""Compare training under every parallel layout with training in a single process, on CPU ranks.

    OMP_NUM_THREADS=1 python tools/bench/layouts.py [--only TEXT]

Prints one line a layout; exit code 1 if a difference is above the tolerance or a layout fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.layouts import (  # noqa: E402
    CASES,
    TOLERANCE,
    Case,
    Difference,
    Run,
    compare,
    run_case,
    single_process,
)
from tests.support.ranks import RankFailure  # noqa: E402

NUMBERS = ("scalars", "logprobs", "gamma", "gradients", "weights", "replicas")


def main() -> int:
    """Run the chosen layouts, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="layouts whose name holds this text")
    chosen = [case for case in CASES if parser.parse_args().only in case.name]
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table("layout", "ranks", *NUMBERS, "least gamma", "seconds", pad_edge=False)
    table.columns[0].no_wrap = True
    references: dict[tuple, Run] = {}
    wrong = 0
    for case in chosen:
        start = time.perf_counter()
        key = (repr(case.model), case.one_per_pack)
        if key not in references:
            references[key] = run_case(single_process(case))
        try:
            difference = compare(run_case(case), references[key])
        except (RankFailure, AssertionError) as error:
            wrong += 1
            table.add_row(case.name, str(case.ranks), "[red]failed")
            console.print(
                f"[red]{case.name}[/]", str(error).strip().splitlines()[-1], soft_wrap=True
            )
            continue
        if difference.largest > TOLERANCE:
            wrong += 1
            console.print(f"[red]{case.name}[/] is furthest off in {difference.worst}")
        table.add_row(*_cells(case, difference, time.perf_counter() - start))
        print(f"{case.name}: {difference.largest:.1e}", file=sys.stderr, flush=True)
    console.print(table)
    console.print(f"{len(chosen)} layouts, {wrong} above {TOLERANCE:g} or failed")
    return 1 if wrong or not chosen else 0


def _cells(case: Case, difference: Difference, seconds: float) -> list[str]:
    numbers = []
    for name in NUMBERS:
        value = getattr(difference, name)
        text = "-" if name == "gradients" and not case.gradients else f"{value:.1e}"
        numbers.append(f"[red]{text}" if value > TOLERANCE else text)
    rest = [f"{difference.smallest_gamma:.2f}", f"{seconds:.1f}"]
    return [case.name, str(case.ranks), *numbers, *rest]


if __name__ == "__main__":
    sys.exit(main())

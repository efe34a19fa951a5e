"""Runs hostile inputs of every kind and reports findings.

    python -m tools.fuzz                           # 10,000 of each kind
    python -m tools.fuzz --count 500 --seed 7 json yaml
    python -m tools.fuzz --first 4711 --count 1 json    # one case again

Exit code 1 if anything was found.
"""

from __future__ import annotations

import argparse
import sys

from tools.fuzz.kind import all_kinds
from tools.fuzz.runner import Result, counted, run

_COLUMNS = ("taken", "refused", "exceptions", "hangs", "wrong")


def main() -> int:
    """Run the kinds named, or all; print a row each."""
    kinds = all_kinds()
    parser = argparse.ArgumentParser(prog="tools.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(kinds)}")
    parser.add_argument("--count", type=int, default=10_000, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, default=1e9, help="most time for each kind")
    parser.add_argument("--show", type=int, default=5, help="findings of each kind that are shown")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.kinds) - set(kinds))
    if unknown:
        parser.error(f"unknown kind {unknown[0]}; expected some of {', '.join(kinds)}")
    print(_row("kind", "tried", *_COLUMNS, "growth MiB", "slowest s", "s"), flush=True)
    good = True
    for name in arguments.kinds or kinds:
        count = counted(kinds[name], arguments.count)
        result = run(kinds[name], count, arguments.seed, arguments.first, arguments.seconds)
        good &= result.good
        print(row_of(result), flush=True)
        for line in result.found[: arguments.show]:
            print(f"    {line}", flush=True)
    return 0 if good else 1


def row_of(result: Result) -> str:
    """The row of a kind."""
    counts = [result.counts[column] for column in _COLUMNS]
    grown = f"{result.grown_bytes / 2**20:.1f}"
    times = f"{result.slowest_s:.2f}", f"{result.seconds:.0f}"
    return _row(result.name, result.tried, *counts, grown, *times)


def _row(name: str, *cells: object) -> str:
    return f"{name:16}" + "".join(f"{cell!s:>11}" for cell in cells)


if __name__ == "__main__":
    sys.exit(main())

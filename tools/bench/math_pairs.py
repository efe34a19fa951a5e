"""Counts errors of the mathematics verifier, by kind of answer, on pairs with known truth.

    python tools/bench/math_pairs.py                # 10,000 pairs
    python tools/bench/math_pairs.py --show 5       # and the first 5 errors of each kind

The pairs are made by ``tests/support/math_pairs.py``. Exit code 1 if any is judged wrongly.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from megatron_rl.rewards.math import MathVerifier  # noqa: E402
from tests.support.math_pairs import Pair, make_pairs  # noqa: E402


def main() -> int:
    """Print the table; 1 if there are errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="errors of each kind that are shown")
    arguments = parser.parse_args()
    pairs = make_pairs(arguments.count, arguments.seed)
    verify = MathVerifier()
    start = time.monotonic()
    verdicts = [verify({"answer": pair.answer}, pair.completion).value == 1.0 for pair in pairs]
    seconds = time.monotonic() - start
    rows: dict[str, list[list[Pair]]] = defaultdict(lambda: [[], [], [], []])
    for pair, verdict in zip(pairs, verdicts):
        rows[pair.kind][2 * pair.solved + (verdict != pair.solved)].append(pair)
    print(f"{'kind':18}{'wrong':>7}{'accepted':>10}{'right':>8}{'refused':>9}")
    for kind, (wrong, accepted, right, refused) in rows.items():
        shown = [len(wrong) + len(accepted), len(accepted), len(right) + len(refused), len(refused)]
        print(f"{kind:18}{shown[0]:7}{shown[1]:10}{shown[2]:8}{shown[3]:9}")
        for pair in sorted({*accepted, *refused}, key=str)[: arguments.show]:
            verdict = "refused" if pair.solved else "accepted"
            print(f"    {verdict}: {pair.answer!r} {pair.completion!r}")
    false_positives = sum(len(row[1]) for row in rows.values())
    false_negatives = sum(len(row[3]) for row in rows.values())
    print(
        f"{len(pairs)} pairs, {false_positives} false positives, {false_negatives} false negatives,"
        f" {seconds:.1f} s"
    )
    return 1 if false_positives or false_negatives else 0


if __name__ == "__main__":
    sys.exit(main())

"""Makes topological sorts: train.jsonl, eval.jsonl and sft.jsonl, without common problems.

    python tools/data/make_topological_sort.py --out data --train 20000 --eval 512 --sft 30000

A problem gives pairs of letters; an answer names every letter once, the first of each pair before
the second: "da bc ac:" -> "dabc". Each line holds ``prompt``, ``items``, ``before`` and
``completion``, one of the right answers. The files depend on the arguments only, byte for byte.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import string
import sys
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.files import write_whole, written_for_the_user
from megatron_rl.rewards.topological_sort import verify_topological_sort

# A new problem takes a few draws, until nearly all possible problems are used.
_MAX_DRAWS_PER_PROBLEM = 2000


def make_problems(count: int, seed: int, items: int, pairs: int) -> list[dict[str, Any]]:
    """``count`` records with different sets of ``pairs`` pairs, each solved and verified; every one
    of the first ``items`` letters is in a pair.

    ``UserError`` if there are not that many problems, or no pairs of these numbers.
    """
    if not 2 <= items <= len(string.ascii_lowercase):
        raise UserError(f"--items {items}; expected 2 to 26 letters; for example 7")
    if not -(-items // 2) <= pairs <= items * (items - 1) // 2:
        raise UserError(
            f"--pairs {pairs}; expected {-(-items // 2)} (each of {items} letters is in one) to "
            f"{items * (items - 1) // 2} (all there are); for example {items}"
        )
    generator = random.Random(seed)
    letters = string.ascii_lowercase[:items]
    seen: set[frozenset[tuple[str, str]]] = set()
    records: list[dict[str, Any]] = []
    draws = 0
    while len(records) < count:
        draws += 1
        if draws > _MAX_DRAWS_PER_PROBLEM:
            raise UserError(
                f"{len(records)} different problems found, {count} wanted; "
                "raise --items or change --pairs, or ask for fewer"
            )
        order = generator.sample(letters, items)
        before = generator.sample(list(itertools.combinations(order, 2)), pairs)
        key = frozenset(before)
        if len(set().union(*before)) == items and key not in seen:
            seen.add(key)
            records.append(_record(generator, letters, before))
            draws = 0
    return records


def format_prompt(before: list[tuple[str, str]]) -> str:
    """ "da bc ac:"; the completion follows directly."""
    return f"{' '.join(map(''.join, before))}:"


def _record(
    generator: random.Random, letters: str, before: list[tuple[str, str]]
) -> dict[str, Any]:
    record = {"prompt": format_prompt(before), "items": list(letters), "before": before}
    completion = _solve(generator, letters, before)
    reward = verify_topological_sort(record, completion)
    assert reward.value == 1.0, (record, completion, reward)
    return {**record, "completion": completion}


def _solve(generator: random.Random, letters: str, before: list[tuple[str, str]]) -> str:
    """Letter by letter, any of those that nothing left has to precede."""
    left, order = sorted(letters), ""
    while left:
        waits = {second for first, second in before if first in left}
        free = [letter for letter in left if letter not in waits]
        order += generator.choice(free)
        left.remove(order[-1])
    return order


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory of the files; made if it is not there")
    for name, count in (("train", 20000), ("eval", 512), ("sft", 0)):
        text = f"problems in {name}.jsonl (default %(default)s)"
        add(f"--{name}", type=_count, default=count, help=text)
    add("--items", type=_count, default=7, help="letters of a problem (default %(default)s)")
    add("--pairs", type=_count, default=8, help="pairs of a problem (default %(default)s)")
    add("--seed", type=int, default=1, help="default %(default)s")
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number, 0 or more")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    options = _parse_arguments(arguments)
    counts = {"eval": options.eval, "sft": options.sft, "train": options.train}
    try:
        records = iter(
            make_problems(sum(counts.values()), options.seed, options.items, options.pairs)
        )
        with written_for_the_user(f"--out {options.out}", "choose another place"):
            options.out.mkdir(parents=True, exist_ok=True)
            for name, count in counts.items():
                lines = [json.dumps(record) + "\n" for record in itertools.islice(records, count)]
                if lines:
                    write_whole(options.out / f"{name}.jsonl", "".join(lines))
                    print(f"{options.out / name}.jsonl: {count} problems")
    except UserError as error:
        print(f"make_topological_sort: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

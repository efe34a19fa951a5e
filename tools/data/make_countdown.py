"""Makes Countdown data sets: train.jsonl, eval.jsonl and sft.jsonl, without common problems.

    python tools/data/make_countdown.py --out data --train 50000 --eval 500 --sft 5000 --numbers 3-4

Each line holds ``prompt``, ``numbers``, ``target`` and ``completion``, one solution. The files
depend on the arguments only, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.files import write_whole, written_for_the_user
from megatron_rl.rewards.countdown import verify_countdown

# A new problem takes a few draws, until nearly all possible problems are used.
_MAX_DRAWS_PER_PROBLEM = 2000
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


@dataclass(frozen=True)
class Rules:
    """Rules of the problems."""

    min_numbers: int = 3
    max_numbers: int = 3
    max_number: int = 20  #: numbers are drawn from 1 to this, repetitions allowed
    min_target: int = 1
    max_target: int = 100
    operators: str = "+-*/"  #: operators the given solution may use; the verifier allows all four
    positive_integers: bool = True  #: so are all intermediate results of the given solution


def make_problems(count: int, seed: int, rules: Rules) -> list[dict[str, Any]]:
    """``count`` records with different (numbers as a multiset, target), each solved and verified.

    ``UserError`` if the rules are contradictory or do not leave room for that many problems.
    """
    _check_rules(rules)
    generator = random.Random(seed)
    seen: set[tuple[tuple[int, ...], int]] = set()
    records: list[dict[str, Any]] = []
    draws = 0
    while len(records) < count:
        draws += 1
        if draws > _MAX_DRAWS_PER_PROBLEM:
            raise UserError(
                f"{len(records)} different problems found, {count} wanted; "
                "the rules leave too little room; "
                "widen --numbers, --max-number, the targets or --ops, or ask for fewer"
            )
        numbers = _draw_numbers(generator, rules)
        solution = _combine(generator, numbers, rules)
        if solution is None:
            continue
        target, expression = solution
        key = (tuple(sorted(numbers)), target)
        if key not in seen:
            seen.add(key)
            records.append(_record(numbers, target, expression))
            draws = 0
    # Problems with many solutions are found first; without this the last split would be the
    # hardest.
    generator.shuffle(records)
    return records


def format_prompt(numbers: list[int], target: int) -> str:
    """ "3 7 25=46:"; the completion follows directly."""
    return f"{' '.join(map(str, numbers))}={target}:"


def _record(numbers: list[int], target: int, expression: str) -> dict[str, Any]:
    record = {"prompt": format_prompt(numbers, target), "numbers": numbers, "target": target}
    reward = verify_countdown(record, expression)
    assert reward.value == 1.0, (record, expression, reward)
    return {**record, "completion": expression}


def _draw_numbers(generator: random.Random, rules: Rules) -> list[int]:
    size = generator.randint(rules.min_numbers, rules.max_numbers)
    return [generator.randint(1, rules.max_number) for _ in range(size)]


def _combine(generator: random.Random, numbers: list[int], rules: Rules) -> tuple[int, str] | None:
    """Joins two random values with a random operator until one is left; None if a rule is broken on
    the way.
    """
    parts: list[tuple[int | Fraction, str, int]] = [(number, str(number), 3) for number in numbers]
    while len(parts) > 1:
        left = parts.pop(generator.randrange(len(parts)))
        right = parts.pop(generator.randrange(len(parts)))
        operator = generator.choice(rules.operators)
        value = _apply(operator, left[0], right[0])
        if value is None or (
            rules.positive_integers and not (isinstance(value, int) and value >= 1)
        ):
            return None
        parts.append((value, _join(operator, left, right), _PRECEDENCE[operator]))
    value, expression, _ = parts[0]
    if not isinstance(value, int) or not rules.min_target <= value <= rules.max_target:
        return None
    return value, expression


def _apply(operator: str, left: int | Fraction, right: int | Fraction) -> int | Fraction | None:
    """The exact value, an int where it is one; None: division by zero."""
    if operator == "+":
        value = left + right
    elif operator == "-":
        value = left - right
    elif operator == "*":
        value = left * right
    elif right == 0:
        return None
    else:
        value = Fraction(left) / right
    return int(value) if value.denominator == 1 else value


def _join(operator: str, left: tuple[Any, str, int], right: tuple[Any, str, int]) -> str:
    """The expression with no more parentheses than its meaning needs, up to associativity."""
    level = _PRECEDENCE[operator]
    left_text = f"({left[1]})" if left[2] < level else left[1]
    tight = level + 1 if operator in "-/" else level
    right_text = f"({right[1]})" if right[2] < tight else right[1]
    return f"{left_text}{operator}{right_text}"


def _check_rules(rules: Rules) -> None:
    if not 2 <= rules.min_numbers <= rules.max_numbers <= 6:
        raise UserError(
            f"--numbers {rules.min_numbers}-{rules.max_numbers}; expected a range within 2-6; "
            "for example 3-4"
        )
    if rules.max_number < 1:
        raise UserError(f"--max-number {rules.max_number}; expected at least 1; raise it")
    if rules.min_target > rules.max_target:
        raise UserError(
            f"targets from {rules.min_target} to {rules.max_target}; expected min <= max; "
            "exchange them"
        )
    if not rules.operators or set(rules.operators) - set(_PRECEDENCE):
        raise UserError(f"--ops {rules.operators!r}; expected some of +-*/; for example --ops=+-*")


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes all lines or, if interrupted, nothing."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


def _range(text: str) -> tuple[int, int]:
    first, separator, last = text.partition("-")
    try:
        return int(first), int(last if separator else first)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected a count or a range such as 3-4"
        ) from None


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of problems, 0 or more")
    return int(text)


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Rules()
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory of the files; made if it is not there")
    add("--train", type=_count, default=50000, help="problems in train.jsonl (default %(default)s)")
    add("--eval", type=_count, default=500, help="problems in eval.jsonl (default %(default)s)")
    add("--sft", type=_count, default=0, help="problems in sft.jsonl (default %(default)s)")
    add(
        "--numbers", type=_range, default=(3, 3), help="numbers of a problem: 3, or 3-4 (default 3)"
    )
    add(
        "--max-number",
        type=int,
        default=defaults.max_number,
        help="largest number (default %(default)s)",
    )
    add("--min-target", type=int, default=defaults.min_target, help="default %(default)s")
    add("--max-target", type=int, default=defaults.max_target, help="default %(default)s")
    add("--ops", default="+-*/", help="operators of the solutions, as in --ops=+- (default +-*/)")
    add(
        "--any-intermediates",
        action="store_true",
        help="intermediate results may be negative, zero or fractions (default: positive integers)",
    )
    add("--seed", type=int, default=1, help="default %(default)s")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse_arguments(arguments)
    rules = Rules(
        min_numbers=options.numbers[0],
        max_numbers=options.numbers[1],
        max_number=options.max_number,
        min_target=options.min_target,
        max_target=options.max_target,
        operators=options.ops,
        positive_integers=not options.any_intermediates,
    )
    counts = {"eval": options.eval, "sft": options.sft, "train": options.train}
    try:
        records = make_problems(sum(counts.values()), options.seed, rules)
        with written_for_the_user(f"--out {options.out}", "choose another place"):
            _write(options.out, counts, records)
    except UserError as error:
        print(f"make_countdown: {error}", file=sys.stderr)
        return 2
    return 0


def _write(folder: Path, counts: dict[str, int], records: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for name, count in counts.items():
        if count > 0:
            write_jsonl(folder / f"{name}.jsonl", records[start : start + count])
            print(f"{folder / name}.jsonl: {count} problems")
        start += count


if __name__ == "__main__":
    sys.exit(main())

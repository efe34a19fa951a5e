"""Mathematical answers: pairs with known truth, and spoiled ones."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import Iterator, NamedTuple

from megatron_rl.rewards.math import MathVerifier
from tests.support.math_pairs import NUMBERS
from tests.support.math_pairs_forms import FORMS
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong

_PIECES = (
    *("\\frac", "{", "}", "\\boxed{", "^", "^{9999999}", "!" * 50, "\\sqrt", "\\binom", "\\log_"),
    *("9" * 400, "9" * 5000, "1e999", "\\left(" * 200, "(" * 500, "{" * 500, "$", "$$", "\\", "\0"),
    *("\ud83d", "\u0661", "\u00b2", "\\text{", "\\infty", "i", "pi", ",", ";", "=", "%", "\n"),
    *("x^{x^{x^{x}}}", "9**9**9", "10^{10^{10}}", "__import__('os')", "{{", "\\begin{pmatrix}"),
)


class Case(NamedTuple):
    """``solved`` None: spoiled; any verdict is right, an exception is wrong."""

    answer: str | int | float
    completion: str
    solved: bool | None


def make(rng: random.Random) -> Case:
    """A pair of a kind, or one with something put into the completion."""
    kind = rng.choice([*NUMBERS.values(), *FORMS.values()])
    answer, completion, solved = rng.choice(list(kind(rng)))
    if rng.random() < 0.5:
        return Case(answer, completion, solved)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(completion) + 1)
        completion = completion[:place] + rng.choice(_PIECES) + completion[place:]
    return Case(answer, completion, None)


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """A judge with the verifier's own workers."""
    verify = MathVerifier()

    def judge(case: Case) -> Verdict:
        value = verify({"answer": case.answer}, case.completion).value
        if value not in (0.0, 1.0):
            raise Wrong(f"reward {value}")
        if case.solved is not None and (value == 1.0) != case.solved:
            raise Wrong(f"reward {value}: {case}")
        return Verdict.TAKEN if value == 1.0 else Verdict.REFUSED

    yield judge


KIND = Kind("answers", make, judging, deadline_s=60.0)

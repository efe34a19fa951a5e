"""The mathematics verifier."""

import json
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.errors import UserError
from megatron_rl.rewards import VERIFIERS
from megatron_rl.rewards import math as math_room
from megatron_rl.rewards.answers.extract import extract_answer, last_boxed
from megatron_rl.rewards.answers.literals import plain_number
from megatron_rl.rewards.math import MathVerifier
from megatron_rl.rewards.worker_pool import WorkerPool

GSM8K = Path(__file__).parents[4] / "shared" / "data" / "gsm8k" / "test.jsonl"


@pytest.mark.parametrize(
    ("answer", "completion"),
    [
        ("Half of 48 is 24.\n#### 24", "so she sold 24."),
        ("#### 1,234", "1234"),
        ("1234", "it costs $1,234.00."),
        (18, "\\boxed{18} and not 19"),
        (0.5, "1/2"),
        ("-3", "x = -3"),
        ("3", "5-2 or 6-3, that is 8-5=3"),
        ("20", "a share of 20%"),
        ("7", "\\boxed{6} no, \\boxed{ 7 }"),
        ("7", "\\boxed{7} and \\boxed{8"),
    ],
)
def test_numbers_are_compared_without_sympy(answer, completion, monkeypatch):
    monkeypatch.setattr(WorkerPool, "_start", lambda self: pytest.fail("not needed"))
    reward = MathVerifier()({"answer": answer}, completion)
    assert (reward.value, reward.parts) == (1.0, {"solved": 1.0, "well_formed": 1.0})


@pytest.mark.parametrize(
    ("answer", "completion", "well_formed"),
    [
        ("18", "18 of 20", 1.0),
        ("18", "\\boxed{17}, since 18", 1.0),
        ("3", "-3", 1.0),
        ("3", "nothing", 0.0),
        ("3", "", 0.0),
        ("3", "\\boxed{}", 0.0),
        ("3", "9" * 10**6, 1.0),
        ("3", "\\boxed{" * 10**5, 0.0),
    ],
)
def test_wrong(answer, completion, well_formed):
    reward = VERIFIERS["math"]({"answer": answer}, completion)
    assert (reward.value, reward.parts) == (0.0, {"solved": 0.0, "well_formed": well_formed})


@pytest.mark.parametrize(
    ("answer", "completion", "value"),
    [
        ("\\frac{1}{2}", "\\boxed{\\frac12}", 1.0),
        ("\\frac{1}{2}", "\\boxed{0.5}", 1.0),
        ("1/3", "0.3333333", 1.0),
        ("1/3", "0.34", 0.0),
        ("x+1", "\\boxed{1+x}", 1.0),
        ("x+1", "\\boxed{x-1}", 0.0),
        ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", 1.0),
        ("\\boxed{\\sqrt{8}}", "\\boxed{2\\sqrt{2}}", 1.0),
        ("(3, \\frac{\\pi}{2})", "\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", 1.0),
        ("5", "\\boxed{\\mathrm{nonsense}(}", 0.0),
    ],
)
def test_expressions(answer, completion, value):
    assert VERIFIERS["math"]({"answer": answer}, completion).value == value


def test_an_endless_answer_is_cut_and_the_next_one_judged():
    verify = MathVerifier(cpu_s=1.0)
    results = []
    nine = ("num", "9")
    endless = ("pow", nine, ("pow", nine, ("pow", nine, nine)))

    def judge() -> None:  # where a time limit by signal could not work
        results.append(verify._ask_worker(endless, nine))
        results.append(verify._ask_worker(("root", nine, ("num", "2")), ("num", "3")))

    start = time.monotonic()
    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    assert results == [False, True]
    assert time.monotonic() - start < 30


def test_without_sympy_the_user_is_told(monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("print(\"No module named 'sympy'\")")
    monkeypatch.setattr(math_room, "_WORKER", worker)
    with pytest.raises(UserError, match="No module named 'sympy'; .* pip install"):
        MathVerifier()({"answer": "\\sqrt{6}"}, "\\boxed{\\sqrt{5+1}}")


@given(st.one_of(st.text(), st.text(alphabet="\\boxed{}0123456789.,/-$% ")))
def test_extraction_never_raises(completion):
    answer = extract_answer(completion)
    parts = VERIFIERS["math"]({"answer": "7"}, completion).parts
    assert parts["well_formed"] == float(answer is not None)


def test_last_boxed():
    assert last_boxed("\\boxed{\\frac{1}{2}} tail }") == "\\frac{1}{2}"
    assert last_boxed("\\boxed{a{b") is None
    assert last_boxed("none") is None


def test_plain_number():
    assert plain_number("1,000.50").value == 2001 / 2
    assert plain_number("3/4").value == 0.75
    assert plain_number("-.5").value == -0.5
    assert plain_number("1,00") is None
    assert plain_number("1/0") is None
    assert plain_number("x") is None


@pytest.mark.parametrize(
    "record",
    [{}, {"answer": ""}, {"answer": "#### "}, {"answer": [1]}, {"answer": float("nan")}],
)
def test_a_bad_record_is_the_users_mistake(record):
    with pytest.raises(UserError):
        VERIFIERS["math"](record, "1")


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not beside the repository")
def test_gsm8k():
    records = [json.loads(line) for line in GSM8K.open(encoding="utf-8")]
    assert len(records) == 1319
    for record, other in zip(records, records[1:] + records[:1]):
        final = record["answer"].rpartition("####")[2].strip()
        assert VERIFIERS["math"](record, record["answer"]).value == 1.0
        assert VERIFIERS["math"](record, f"It is \\boxed{{{final}}}.").value == 1.0
        same = final == other["answer"].rpartition("####")[2].strip()
        assert VERIFIERS["math"](record, other["answer"]).value == float(same)
        wrong = f"{int(final.replace(',', '')) + 1:,}"
        assert VERIFIERS["math"](record, f"It is \\boxed{{{wrong}}}.").value == 0.0
        opposite = final[1:] if final.startswith("-") else f"-{final}"
        assert VERIFIERS["math"](record, f"It is {opposite}.").value == float(final == "0")

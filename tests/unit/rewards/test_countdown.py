"""The Countdown verifier against hand-made answers, and against any text at all."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.errors import UserError
from megatron_rl.rewards import VERIFIERS
from megatron_rl.rewards.countdown import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    ExpressionError,
    evaluate,
    extract_answer,
)

RECORD = {"numbers": [3, 7, 25], "target": 46}


def value(completion: str, record: dict = RECORD) -> float:
    return VERIFIERS["countdown"](record, completion).value


@pytest.mark.parametrize(
    "completion",
    [
        "3*7+25",
        " 25 + 7 * 3 \n",
        "((25)+(3*7))",
        "3*7+25=46",
        "3*7+25 = 46\nand that is it",
        "\n\n3*7+25\nno",
        "I think <answer>3+7</answer>, no: <answer>\n 25+3*7\n</answer> yes",
        "03*7+25",
    ],
)
def test_solved(completion):
    reward = VERIFIERS["countdown"](RECORD, completion)
    assert reward.value == 1.0
    assert reward.parts == {"solved": 1.0, "well_formed": 1.0}


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("3+7+25", "gives 35, not 46"),
        ("46", "uses 46, not each of 3 7 25 once"),
        ("3*7+25+0", "uses 3 7 25 0, not each of 3 7 25 once"),
        ("3*7+5*5", "uses 3 7 5 5, not each of 3 7 25 once"),
        ("7/3+25", "gives 82/3, not 46"),
        ("25/(7-7)", "uses 25 7 7, not each of 3 7 25 once"),
        ("3*7+25=45", "states 45, not 46"),
        ("3*7+25=-46", "states -46, not 46"),
    ],
)
def test_well_formed(completion, reason):
    reward = VERIFIERS["countdown"](RECORD, completion)
    assert reward.value == 0.1
    assert reward.parts == {"solved": 0.0, "well_formed": 1.0}
    assert reward.reason == reason


@pytest.mark.parametrize(
    "completion",
    [
        "",
        " \n\t",
        "=46",
        "3*7+",
        "3*7 25",
        "(3*7+25",
        "3*7+25)",
        "-3+7+25",
        "3*-7+25",
        "3**7+25",
        "3x7+25",
        "3*7+25=",
        "3*7+25==46",
        "3*7+25=46=46",
        "3*7+25=40+6",
        "3*7+25.",
        "3.0*7+25",
        "3_0+7",
        "()",
        "the answer is 3*7+25",
        "<answer>3*7+25",
        "<answer></answer>",
        "٣*7+25",  # an Arabic-Indic three, which int() would accept
        "3*7+2⁵",
        "1" * 21,
        "(" * (MAX_DEPTH + 1) + "3" + ")" * (MAX_DEPTH + 1),
        "1+" * MAX_CHARACTERS + "1",
    ],
)
def test_malformed(completion):
    reward = VERIFIERS["countdown"](RECORD, completion)
    assert reward.value == 0.0
    assert reward.parts == {"solved": 0.0, "well_formed": 0.0}
    assert reward.reason


def test_arithmetic_is_exact():
    assert value("8/(3-8/3)", {"numbers": [8, 8, 3, 3], "target": 24}) == 1.0
    assert value("8/(3-8/3)", {"numbers": [8, 8, 8, 3], "target": 24}) == 0.1
    assert value("7-3-2", {"numbers": [7, 3, 2], "target": 2}) == 1.0  # from the left
    assert value("8/4/2", {"numbers": [8, 4, 2], "target": 1}) == 1.0
    assert value("2-7", {"numbers": [2, 7], "target": -5}) == 1.0
    assert value("2-7=-5", {"numbers": [2, 7], "target": -5}) == 1.0


def test_division_by_zero_is_well_formed_wherever_it_stands():
    record = {"numbers": [1, 2, 2], "target": 0}
    for completion in ("1/(2-2)", "(2-2)/(1-1)", "1/(2-2)*0", "0*(1/(2-2))+5", "0/0-1"):
        assert value(completion, record) == 0.1
    assert VERIFIERS["countdown"](record, "1/(2-2)").reason == "divides by zero"


def test_depth_limit_is_exact():
    deepest = "(" * MAX_DEPTH + "7" + ")" * MAX_DEPTH
    assert value(deepest, {"numbers": [7], "target": 7}) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "(" * 10**6,
        "9" * 10**6,
        "1+" * 500_000,
        "<answer>" * 10**5,
        "</answer>" * 10**5,
        "\n" * 10**6 + "3",
        "*".join(["9" * 20] * 48),
        "\ud800",
        "\0",
    ],
)
def test_hostile_texts_take_no_time(completion):
    start = time.process_time()
    assert value(completion) in (0.0, 0.1)
    assert time.process_time() - start < 1.0


ALPHABET = "0123456789+-*/()= \n<>answer/²٣"


@given(st.one_of(st.text(), st.text(alphabet=ALPHABET, max_size=2000)))
def test_never_raises(completion):
    reward = VERIFIERS["countdown"](RECORD, completion)
    assert reward.value == (1.0 if reward.parts["solved"] else 0.1 * reward.parts["well_formed"])


@st.composite
def expressions(draw, depth=0):
    """A fully parenthesised expression with the value computed beside it."""
    if depth == 4 or draw(st.booleans()):
        number = draw(st.integers(0, 99))
        return str(number), Fraction(number)
    left_text, left = draw(expressions(depth=depth + 1))
    right_text, right = draw(expressions(depth=depth + 1))
    symbol = draw(st.sampled_from("+-*/"))
    text = f"({left_text}{symbol}{right_text})"
    if left is None or right is None or (symbol == "/" and right == 0):
        return text, None
    results = {"+": left + right, "-": left - right, "*": left * right}
    return text, results[symbol] if symbol in results else left / right


@given(expressions())
def test_value_of_any_expression(expression):
    text, expected = expression
    assert evaluate(text)[0] == expected


@given(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 99)), max_size=12))
def test_precedence_is_that_of_python(parts):
    text = "7" + "".join(f"{symbol}{number}" for symbol, number in parts)
    assert evaluate(text)[0] == eval(text)  # noqa: S307  digits and operators made here


def test_extract_answer():
    assert extract_answer("<answer>1</answer><answer> 2 </answer>3") == "2"
    assert extract_answer("  1+1\t\n2") == "1+1"
    with pytest.raises(ExpressionError, match="no answer"):
        extract_answer(" ")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"target": 3}, "numbers"),
        ({"numbers": [1]}, "target"),
        ({"numbers": "1 2", "target": 3}, "list of integers"),
        ({"numbers": [1, 2.5], "target": 3}, "list of integers"),
        ({"numbers": [1], "target": "3"}, "integer"),
    ],
)
def test_a_bad_record_is_the_users_mistake(record, message):
    with pytest.raises(UserError, match=message):
        VERIFIERS["countdown"](record, "1")

"""The verifier of topological sorts: by hand, against brute force, on any text at all."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.errors import UserError
from megatron_rl.rewards import VERIFIERS
from megatron_rl.rewards.topological_sort import check_topological_sort_record

VERIFY = VERIFIERS["topological_sort"]
RECORD = {"items": ["a", "b", "c", "d"], "before": [["d", "a"], ["b", "c"], ["a", "c"]]}


@pytest.mark.parametrize(
    "answer", ["dabc", "bdac", " d,b, a c \nand so on", "<answer>d b a c</answer>"]
)
def test_solved(answer):
    assert VERIFY(RECORD, answer).parts == {"solved": 1.0, "well_formed": 1.0}
    assert VERIFY(RECORD, answer).value == 1.0


@pytest.mark.parametrize(
    ("answer", "value", "reason"),
    [
        ("abcd", 0.1, "d is not before a"),
        ("dacb", 0.1, "b is not before c"),
        ("dab", 0.0, "not each of a b c d once"),
        ("dabcc", 0.0, "not each of a b c d once"),
        ("dabe", 0.0, "not each of a b c d once"),
        ("", 0.0, "no answer"),
        ("d" * 2000, 0.0, "answer of 2000 characters, more than 1024"),
    ],
)
def test_not_solved(answer, value, reason):
    reward = VERIFY(RECORD, answer)
    assert (reward.value, reward.reason) == (value, reason)
    assert reward.parts == {"solved": 0.0, "well_formed": float(value > 0)}


def test_every_order_of_a_problem():
    orders = ["".join(order) for order in itertools.permutations("abcd")]
    right = {order for order in orders if VERIFY(RECORD, order).value == 1.0}
    # d before a before c, and b anywhere before c: three places
    assert right == {"bdac", "dbac", "dabc"}


def test_names_of_several_letters_stand_apart():
    record = {"items": ["ab", "c"], "before": [["c", "ab"]]}
    assert [VERIFY(record, text).value for text in ("c ab", "c,ab", "ab c", "cab")] == [
        1,
        1,
        0.1,
        0,
    ]


@given(st.text(max_size=30) | st.text("abcd, ", max_size=9))
def test_any_text_has_a_verdict(text):
    value = VERIFY(RECORD, text).value
    letters = sorted(text.replace(",", "").replace(" ", ""))
    if text.isprintable():  # one line
        assert (value > 0) == (letters == list("abcd"))
    assert value in (0.0, 0.1, 1.0)


MISTAKES = {
    "no items": ({"before": []}, "expects 'items'"),
    "empty": ({"items": [], "before": []}, "items []; the verifier 'topological_sort' expects"),
    "twice": ({"items": ["a", "a"], "before": []}, "items ['a', 'a']; the verifier"),
    "a name with a space": ({"items": ["a b"], "before": []}, "without white space or commas"),
    "a number": ({"items": [1], "before": []}, "items [1]; the verifier"),
    "text": ({"items": ["a"], "before": "aa"}, "before 'aa'; the verifier"),
    "another item": ({"items": ["a"], "before": [["a", "b"]]}, "expects a list of pairs of items"),
    "unhashable": ({"items": ["a"], "before": [["a", ["a"]]]}, "expects a list of pairs of items"),
    "a triple": ({"items": ["a"], "before": [["a", "a", "a"]]}, "expects a list of pairs of items"),
    "a cycle": (
        {"items": ["a", "b"], "before": [["a", "b"], ["b", "a"]]},
        "expects pairs that some order keeps",
    ),
    "before itself": ({"items": ["a"], "before": [["a", "a"]]}, "before has the cycle a a"),
}


@pytest.mark.parametrize(("record", "message"), MISTAKES.values(), ids=MISTAKES)
def test_records_that_no_answer_suits(record, message):
    with pytest.raises(UserError) as error:
        check_topological_sort_record(record)
    assert message in str(error.value)


def test_a_good_record_passes_its_check():
    check_topological_sort_record(RECORD)

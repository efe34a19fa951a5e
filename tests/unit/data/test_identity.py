"""What makes two data sets the same."""

import hashlib
import json

import numpy as np
import pytest

from megatron_rl.data.identity import difference, identity_of
from megatron_rl.records import Prompt, Sample


def prompts(records=({"target": 3}, {"target": 5}), tokens=((1, 2), (3,)), first=0):
    return [
        Prompt(first + i, np.array(ids, dtype=np.int64), "text", record)
        for i, (ids, record) in enumerate(zip(tokens, records, strict=True))
    ]


def test_the_same_lines_are_the_same_wherever_they_are_and_however_they_are_spelled():
    one = identity_of(prompts(({"a": 1, "b": "é\ud83d"}, {})))
    other = identity_of(prompts(({"b": "é\ud83d", "a": 1}, {})))
    assert one == json.loads(json.dumps(other))
    assert difference(one, other) is None


@pytest.mark.parametrize(
    ("now", "what"),
    [
        (prompts(({"target": 3}, {"target": 6})), "2 as before, with other content"),  # the answer
        (prompts(tokens=((1, 2), (4,))), "the same lines, with other tokens: another tokenizer"),
        (prompts(tokens=((1,), (2, 3))), "the same lines, with other tokens: another tokenizer"),
        (prompts(({"target": 5}, {"target": 3}), ((3,), (1, 2))), "2 as before, with other conten"),
        (
            prompts(first=1),
            "2 as before, with other content",
        ),  # a line left out, another at the end
        (prompts()[:1], "2 then, 1 now"),
    ],
)
def test_other_problems_are_told_apart(now, what):
    found = difference(identity_of(prompts()), identity_of(now))
    assert found is not None and found.startswith(what)


def test_samples_are_told_apart_by_their_tokens_and_by_where_the_answer_begins():
    sample, same = Sample.of([1], [2, 3]), Sample.of([1], [2, 3])
    assert difference(identity_of([sample]), identity_of([same])) is None
    others = [Sample.of([1], [2, 4]), Sample.of([1, 2], [3])]
    for written in ([True, False], [False, False]):
        others.append(Sample.of([1], [2, 3], written=np.array(written)))
    for other in others:
        found = difference(identity_of([sample]), identity_of([other]))
        assert found.startswith("1 as before, with other tokens: other lines, or another tokenizer")


def test_one_answer_has_the_identity_it_always_had():
    """Of the places where the trained tokens begin and end; one answer ends where the sample does.

    Else runs that were begun before samples could have several turns would find other data.
    """
    tokens, ids = [1, 2, 3, 4], np.arange(1, 5, dtype="<i8").tobytes()
    for written, spans in (
        ([False, True, True, True], b"1 4 "),
        ([False, True, False, True], b"1 2 3 4 "),
        ([False, True, True, False], b"1 3 4 "),
        ([False, False, False, False], b"4 4 "),
    ):
        sample = Sample(np.array(tokens), np.array(written))
        assert identity_of([sample])["tokens"] == hashlib.sha256(spans + ids).hexdigest()


def test_no_problems_are_told_from_some():
    nothing = identity_of([])
    assert difference(nothing, identity_of([])) is None
    assert difference(nothing, identity_of(prompts())) == "0 then, 2 now"

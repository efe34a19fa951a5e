"""Soft overlong punishment by hand."""

import pytest

from megatron_rl.rewards.overlong import overlong_offset


@pytest.mark.parametrize(
    "length, offset",
    [(1, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (19, -0.75), (20, -1.0), (25, -1.0)],
)
def test_falls_over_the_last_four_of_twenty_tokens(length, offset):
    assert overlong_offset(length, longest=20, buffer=4, penalty=1.0) == offset
    assert overlong_offset(length, longest=20, buffer=4, penalty=0.5) == offset / 2


def test_a_buffer_of_the_whole_answer():
    assert [overlong_offset(n, 2, 2, 1.0) for n in (1, 2)] == [-0.5, -1.0]


def test_no_offset_is_plus_zero():
    assert str(overlong_offset(3, 20, 4, 1.0)) == "0.0"

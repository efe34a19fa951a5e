"""Hostile inputs of every kind of tools/fuzz: a few by default, 10,000 of each with --fuzz."""

import ctypes
import random
import time
from collections import Counter
from contextlib import contextmanager

import pytest

from megatron_rl.device.allocator import keep_freed_memory
from megatron_rl.errors import UserError
from tools.fuzz import runner
from tools.fuzz.kind import Kind, Verdict, Wrong, all_kinds
from tools.fuzz.runner import counted

KINDS = all_kinds()
#: Of each by default; of those that cost a process, fewer.
FEW = 50


@pytest.mark.parametrize("name", KINDS)
def test_a_few_hostile_inputs(name):
    count = counted(KINDS[name], FEW)
    result = runner.run(KINDS[name], count, seed=1)
    assert result.found == [] and result.good
    assert result.tried == count


@pytest.mark.fuzz
@pytest.mark.parametrize("name", KINDS)
def test_ten_thousand_hostile_inputs(name):
    result = runner.run(KINDS[name], counted(KINDS[name], 10_000), seed=0)
    assert result.found[:5] == []
    assert result.grown_bytes <= 64 << 20
    assert min(result.counts["taken"], result.counts["refused"]) > 0.01 * result.tried


@pytest.mark.parametrize("name", KINDS)
def test_a_case_is_found_again_by_its_number(name):
    make = KINDS[name].make
    cases = [repr(make(random.Random(f"3/{name}/{number}"))) for number in (0, 1, 2, 0, 1, 2)]
    assert cases[:3] == cases[3:] and len(set(cases[:3])) > 1


def kind(outcomes):
    """A kind whose cases become, one after the other, what a list says."""
    left = iter(outcomes)

    @contextmanager
    def judging(folder):
        def judge(case):
            outcome = next(left)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome() if callable(outcome) else outcome

        yield judge

    return Kind("made", lambda rng: rng.random(), judging, deadline_s=0.2)


def test_what_the_runner_counts():
    """The checks above are only as good as this."""
    outcomes = [
        Verdict.TAKEN,
        Verdict.REFUSED,
        UserError("found; expected; remedy"),
        UserError("two\nlines"),
        UserError("x" * 5000),
        UserError("\ud83d"),
        Wrong("taken"),
        ValueError("a traceback"),
        RecursionError(),
        SystemExit(3),
        lambda: time.sleep(30),
        Verdict.TAKEN,
    ]
    result = runner.run(kind(outcomes), len(outcomes), seed=0)
    expected = {"taken": 2, "refused": 2, "wrong": 4, "exceptions": 3, "hangs": 1}
    assert result.counts == Counter(expected)
    assert len(result.found) == 8 and not result.good


@pytest.mark.parametrize("freed_mib", [0, 200])
def test_memory_that_grows_is_seen(freed_mib):
    """Also where the C library has as much left of what was freed before."""
    keep_freed_memory()
    blocks = [ctypes.create_string_buffer(b"x" * (1 << 20)) for _ in range(freed_mib)]
    del blocks
    kept = []

    def grow():
        kept.append(bytearray(b"x") * (100 << 20))
        return Verdict.TAKEN

    result = runner.run(kind([*[Verdict.TAKEN] * 20, grow, Verdict.TAKEN]), 22, seed=0)
    assert result.found == [] and not result.good
    assert 90 << 20 < result.grown_bytes < 200 << 20

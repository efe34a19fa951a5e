"""Verdicts with a deadline: how many at once, late ones, and threads that never return."""

import asyncio
import threading

import pytest

from megatron_rl.errors import RunFailed
from megatron_rl.observe.console import SilentConsole
from megatron_rl.rewards.base import Reward
from megatron_rl.rewards.chosen import Judge
from megatron_rl.rollout import judging
from megatron_rl.rollout.judging import Verdicts
from megatron_rl.rollout.reward_workers import RewardWorkers
from tests.unit.rollout.test_reward_workers import ALONE, answers, values


class Warned(SilentConsole):
    def __init__(self):
        self.lines = []

    def warn(self, text):
        self.lines.append(text)


def score(judges, texts, console=None):
    from types import SimpleNamespace

    groups = SimpleNamespace(world=ALONE, model=ALONE, context=ALONE)
    return RewardWorkers(judges, 2, groups, console or SilentConsole()).score(answers([texts]))


def test_an_async_def_has_no_more_at_once_than_it_may():
    now, most = 0, 0

    async def judge(record, text):
        nonlocal now, most
        now += 1
        most = max(most, now)
        for _ in range(5):
            await asyncio.sleep(0)
        now -= 1
        return Reward(float(text), {"own": 2.0})

    texts = [str(n) for n in range(9)]
    (scored,) = score((Judge("j", "j", 1.0, judge, at_once=4, deadline_s=60.0),), texts)
    assert [reward.value for reward in scored.rewards] == list(range(9))
    assert scored.rewards[3].parts == {"own": 2.0, "late": 0.0}
    assert most == 4


def test_a_late_answer_is_worth_nothing_and_is_said():
    cancelled = []

    async def judge(record, text):
        try:
            if text == "slow":
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(text)
            raise
        return Reward(1.0)

    console = Warned()
    mine = (Judge("./a.py:judge", "judge", 1.0, judge, deadline_s=0.05),)
    (scored,) = score(mine, ["slow", "slow"], console)
    assert [reward.value for reward in scored.rewards] == [0.0, 0.0]
    assert scored.rewards[0].parts == {"late": 1.0}
    assert scored.rewards[0].reason == "no verdict within 0.05 s"
    assert cancelled == ["slow", "slow"]
    assert console.lines == [
        "the verifier './a.py:judge' gave no verdict within 0.05 s on 2 of 2 answers of this rank: "
        "reward 0"
    ]


def test_a_timeout_of_the_verifiers_own_is_its_mistake():
    async def judge(record, text):
        raise TimeoutError("the server is away")

    with pytest.raises(RunFailed, match="'j' raised TimeoutError the server is away on an answ"):
        score((Judge("j", "j", 1.0, judge, deadline_s=60.0),), ["a"])


def test_a_thread_that_hangs_is_left_and_the_others_go_on():
    release = threading.Event()

    def verifier(record, text):
        if text == "hangs":
            release.wait()
        return Reward(1.0)

    # More calls hang than there are places, and further calls still get a place.
    mine = (Judge("j", "j", 1.0, verifier, deadline_s=0.2),)
    try:
        (scored,) = score(mine, ["hangs", "hangs", "hangs", "a"])
    finally:
        release.set()
    assert [reward.parts["late"] for reward in scored.rewards[:3]] == [1.0] * 3
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "reward")


def test_too_many_that_hang_end_the_run(monkeypatch):
    monkeypatch.setattr(judging, "MOST_STUCK", 2)
    release = threading.Event()

    def verifier(record, text):
        release.wait()

    try:
        with pytest.raises(RunFailed, match="'j' raised TimeoutError 2 calls have not come back"):
            score((Judge("j", "j", 1.0, verifier, deadline_s=0.05),), ["a"] * 6)
    finally:
        release.set()


@pytest.mark.parametrize("deadline_s", [None, 60.0])
def test_what_is_no_reward_is_named(deadline_s):
    with pytest.raises(RunFailed, match="'j' raised TypeError it returned int, not a Reward"):
        score((Judge("j", "j", 1.0, lambda record, text: 3, deadline_s=deadline_s),), ["a"])


def test_a_verdict_of_a_thread_is_its_reward():
    verdicts = Verdicts(Judge("j", "j", 1.0, lambda r, t: Reward(r["x"]), deadline_s=60.0), 1)
    assert verdicts.begin({"x": 5.0}, "").result(60) == Reward(5.0, {"late": 0.0})


def test_several_kinds_of_verifiers_side_by_side():
    async def judge(record, text):
        return Reward(10.0)

    mine = (
        Judge("a", "a", 0.5, lambda record, text: Reward(float(text))),
        Judge("b", "b", 1.0, judge, deadline_s=60.0),
    )
    assert values(score(mine, ["2", "4"])) == [[11.0, 12.0]]

"""Rewards on one rank and on several: in order, each answer once, and failing verifiers."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch.distributed as dist

from megatron_rl.config.schema import ParallelConfig
from megatron_rl.errors import RunFailed, Stopped, UserError
from megatron_rl.observe.console import SilentConsole
from megatron_rl.parallel import waiting
from megatron_rl.records import Completion, Prompt, RolloutGroup
from megatron_rl.rewards.base import Reward, require
from megatron_rl.rewards.chosen import Judge
from megatron_rl.rollout import reward_workers
from megatron_rl.rollout.reward_workers import RewardWorkers
from tests.support.ranks import run_on_ranks

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def answers(texts, first=0):
    """A group for each row of texts."""
    return [
        RolloutGroup(
            Prompt(first + n, np.array([1]), "p", {"problem": first + n}),
            tuple(Completion(np.array([1]), np.zeros(1, np.float32), True, text) for text in row),
        )
        for n, row in enumerate(texts)
    ]


def workers(verifier, threads=2, console=None, **groups):
    groups = SimpleNamespace(**({"world": ALONE, "model": ALONE, "context": ALONE} | groups))
    judges = (Judge("mine", "mine", 1.0, verifier),)
    return RewardWorkers(judges, threads, groups, console or SilentConsole())


def number(record, text):
    return Reward(float(text) + 100 * record["problem"], reason=text)


def values(groups):
    return [[reward.value for reward in scored.rewards] for scored in groups]


def test_every_answer_has_its_reward_in_order():
    groups = answers([["1", "2", "3"], ["4", "5", "6"]])
    scored = workers(number).score(groups)
    assert values(scored) == [[1.0, 2.0, 3.0], [104.0, 105.0, 106.0]]
    assert [one.group for one in scored] == groups
    assert [reward.reason for reward in scored[1].rewards] == ["4", "5", "6"]
    assert workers(number).score([]) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_at_once_as_there_are_threads(threads):
    lock, now, most = threading.Lock(), [0], [0]
    together = threading.Barrier(threads, timeout=60)

    def verifier(record, text):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait()
        with lock:
            now[0] -= 1
        return Reward(0.0)

    workers(verifier, threads).score(answers([["1"] * 12]))
    assert most == [threads]


def test_a_stop_is_heard_while_answers_are_judged():
    """Two of 40 answers are judged for ever, and the others are not begun."""
    begun, ended = [], threading.Event()

    def verifier(record, text):
        begun.append(text)
        ended.wait(60)
        return Reward(0.0)

    groups = SimpleNamespace(world=ALONE, model=ALONE, context=ALONE)
    judges = RewardWorkers(
        (Judge("mine", "mine", 1.0, verifier),), 2, groups, SilentConsole(), stop=lambda: True
    )
    try:
        with pytest.raises(Stopped):
            judges.score(answers([["1"] * 40]))
    finally:
        ended.set()
    assert len(begun) == 2


def recording(kind):
    """A verifier whose rewards name its rank, and the list of what it was asked."""
    asked = []

    def verifier(record, text):
        asked.append(text)
        return Reward(float(dist.get_rank()))

    from megatron.core import parallel_state

    from megatron_rl.parallel.groups import build_groups, destroy_groups

    if parallel_state.model_parallel_is_initialized():  # in an earlier test
        destroy_groups()
    groups = build_groups(ParallelConfig(**{kind: 2}))
    try:
        workers = RewardWorkers((Judge("mine", "mine", 1.0, verifier),), 2, groups, SilentConsole())
        scored = workers.score(answers([["a", "b"], ["c"]]))
    finally:
        destroy_groups()
    return sorted(asked), values(scored)


@pytest.mark.parametrize("kind", ["tensor", "pipeline", "context"])
def test_ranks_with_the_same_answers_judge_each_once_and_agree(kind):
    assert run_on_ranks(2, recording, kind) == [
        (["a", "c"], [[0.0, 1.0], [0.0]]),
        (["b"], [[0.0, 1.0], [0.0]]),
    ]


def failing(kind):
    def verifier(record, text):
        if text != "bad":
            return Reward(1.0)
        if kind == "record":
            return require(record, "answer", "mine")
        if kind == "raises":
            raise KeyError("key")
        if kind == "machine":
            raise RunFailed("no room for a sandbox")
        return 1.0 if kind == "returns" else Reward(float("nan"))

    mine = [["bad"], ["good"]][dist.get_rank()]
    with pytest.raises((UserError, RunFailed)) as caught:
        workers(verifier, world=dist.group.WORLD).score(answers([mine], first=7))
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("raises", RunFailed, "the verifier 'mine' raised KeyError 'key' ("),
        ("returns", RunFailed, "the verifier 'mine' raised TypeError it returned float, not a "),
        ("nan", RunFailed, "the verifier 'mine' raised ValueError reward nan; "),
        ("record", UserError, "record with problem; the verifier 'mine' expects 'answer'; "),
        ("machine", RunFailed, "no room for a sandbox"),
    ],
)
def test_a_verifier_that_fails_is_one_error_on_all_ranks(kind, error, message):
    (one, here), (other, there) = run_on_ranks(2, failing, kind)
    assert one is other is error
    assert here == there and here.startswith(message)
    if error is RunFailed and kind != "machine":
        assert "on an answer to problem 7 (from 0); expected" in here


class Listener(SilentConsole):
    """A console that keeps all lines."""

    def __init__(self):
        self.heard, self.noted = [], threading.Event()

    def phase(self, name, done=None, total=None):
        self.heard.append(name)

    def note(self, text):
        self.heard.append(text.rpartition(" after ")[0])
        self.noted.set()


def test_a_long_wait_is_shown(monkeypatch):
    monkeypatch.setattr(waiting, "TICK_S", 0.05)
    monkeypatch.setattr(reward_workers, "_FIRST_NOTE_S", 0.0)
    console = Listener()

    def verifier(record, text):
        if text == "slow":
            assert console.noted.wait(30)
        return Reward(1.0)

    assert values(workers(verifier, 2, console).score(answers([["quick", "slow"]]))) == [[1.0, 1.0]]
    assert console.heard[:2] == ["rewards: 1 of 2", "waiting for rewards: 1 of 2"]

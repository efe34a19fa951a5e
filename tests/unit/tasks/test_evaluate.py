"""An evaluation on several ranks: slow rewards on one of them, and verifiers that say other things
than whether an answer is right.
"""

import contextlib
import threading
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError
from megatron_rl.observe.console import SilentConsole
from megatron_rl.observe.metrics import MetricSums
from megatron_rl.parallel import waiting
from megatron_rl.records import Completion, Prompt, RolloutGroup
from megatron_rl.rewards.base import Reward
from megatron_rl.rewards.chosen import Judge
from tests.support.ranks import run_on_ranks
from tests.support.tiny import cpu_device

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


class FixedEngine:
    """Answers each prompt with what its record says, all samples alike."""

    def generate(self, prompts, settings):
        return [
            RolloutGroup(
                prompt,
                (Completion(np.array([1]), np.zeros(1, np.float32), True, prompt.record["says"]),)
                * settings.samples,
            )
            for prompt in prompts
        ]


class Listener(SilentConsole):
    """Counts how often it was told which rank is waited for."""

    def __init__(self):
        self.phases, self.told_often = [], threading.Event()

    def phase(self, name, done=None, total=None):
        self.phases.append(name)
        if len([phase for phase in self.phases if phase.startswith("rewards")]) == 3:
            self.told_often.set()


def evaluation(verifier, records, world, samples=0, console=None):
    """The metrics, on every rank of ``world``."""
    from megatron_rl.tasks import build
    from megatron_rl.tasks.evaluate import evaluate

    session = SimpleNamespace(
        config=Config(reward={"name": "countdown"}, evaluate={"samples": samples}),
        groups=SimpleNamespace(world=world, data=world, model=ALONE, context=ALONE),
        launch=SimpleNamespace(cores=1),
        device=SimpleNamespace(torch_device=torch.device("cpu")),
        stop=SimpleNamespace(heard=lambda: False),
        timers=lambda phase: contextlib.nullcontext(),
        console=console or Listener(),
        counts_once=True,
    )
    prompts = [Prompt(n, np.array([1]), "p", record) for n, record in enumerate(records)]
    sums = MetricSums()
    judges = (Judge("countdown", "countdown", 1.0, verifier),)
    with mock.patch.object(build, "judges", lambda reward: judges):
        evaluate(session, FixedEngine(), prompts, sums)
    return sums.reduce(world)


def a_slow_reward():
    console = Listener()

    def verifier(record, text):
        # Rank 1's is there only once the ranks have told each other three times that it is not.
        right = text == "quick" or console.told_often.wait(60)
        return Reward(float(right), {"solved": float(right)})

    records = [{"says": "quick"}, {"says": "slow"}]
    with mock.patch.object(waiting, "TICK_S", 0.05):
        return evaluation(verifier, records, dist.group.WORLD, 0, console), console.phases


def test_a_rank_with_slow_rewards_is_waited_for():
    for metrics, phases in run_on_ranks(2, a_slow_reward):
        assert metrics == {"eval/pass@1": 1.0, "eval/problems": 2.0}
        assert phases[:2] == ["evaluate, greedy", "rewards, rank 1: 0 of 1"]


def verifier(record, text):
    parts = {"length": len(text) / 2}
    return Reward(1.0, {**parts, "solved": 1.0} if text == "right" else parts)


@pytest.mark.parametrize(
    ("says", "metrics"),
    [
        # lengths 4 and 2; nothing says whether they are right
        (["four", "22"], {"eval/length": 1.5}),
        (["four", "right"], {"eval/length": 2.25, "eval/pass@1": 1.0, "eval/mean@k": 1.0}),
    ],
)
def test_parts_that_a_verifier_leaves_out_are_absent(says, metrics):
    cpu_device()
    found = evaluation(verifier, [{"says": text} for text in says], dist.group.WORLD, samples=3)
    assert found == {**metrics, "eval/problems": 2.0, "eval/samples": 3.0}


def test_the_best_cannot_be_told_by_what_is_not_there():
    cpu_device()
    from megatron_rl.run.checkpoints import check_best_metric

    given = {"eval/format": 0.5, "eval/problems": 2.0, "loss": 1.0}
    check_best_metric(Config(), given)
    best = {"keep_best": 1, "best_metric": "eval/format"}
    check_best_metric(Config(checkpoint=best), given)
    with pytest.raises(UserError, match="best_metric is eval/pass@1, .* gives eval/format, "):
        check_best_metric(Config(checkpoint={"keep_best": 1}), given)

"""The samples that are written, with what the update saw of their tokens."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_rl.data.packing import pack_samples
from megatron_rl.records import Completion, Prompt, RolloutGroup
from megatron_rl.rewards.base import Reward
from megatron_rl.rollout.collect import ScoredGroup, to_samples
from megatron_rl.tasks.shown import ShownSamples

ONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
GROUPS = SimpleNamespace(context=ONE, pipeline=ONE)
PACK_TOKENS = 16


def group(number, prompt, answers, written=None):
    """A prompt of so many tokens, and answers of so many."""
    completions = tuple(
        Completion(
            np.arange(100 * number + 10 * i, 100 * number + 10 * i + n),
            np.zeros(n, np.float32),
            True,
            f"{number}-{i}",
            written=written,
        )
        for i, n in enumerate(answers)
    )
    given = Prompt(number, np.arange(prompt), f"p{number}", {})
    return ScoredGroup(RolloutGroup(given, completions), tuple(Reward(1.0) for _ in answers))


def watched(groups, limit, tokens):
    """Two mini-batches, in packs of 16 tokens, first-fit decreasing."""
    samples = to_samples(groups, np.arange(4.0).reshape(2, 2))
    shown = ShownSamples(groups, limit)
    batches = [samples[:2], samples[2:]]
    packs = [
        [
            SimpleNamespace(members=pack.members, sequence_ids=torch.from_numpy(pack.sequence_ids))
            for pack in pack_samples(batch, PACK_TOKENS, num_packs=2, vocab_size=1000)
        ]
        for batch in batches
    ]
    shown.watch(batches, packs, tokens, torch.device("cpu"))
    return shown, packs


def given(offset):
    """At position t: log-probability -t / 100 - offset, and gamma t / 100 + offset."""
    place = torch.arange(PACK_TOKENS) / 100
    return -place - offset, torch.zeros(PACK_TOKENS), place + offset


def test_values_are_found_in_the_packs():
    """Mini-batch 0: answers of 3 + 2 and 3 + 4 tokens share pack 0, the shorter first. Mini-batch
    1: of 10 + 3 and 10 + 2 tokens, a pack each. A token is predicted at the position before it."""
    groups = [group(1, 3, (2, 4)), group(2, 10, (3, 2))]
    shown, packs = watched(groups, 4, 99)
    for batch in range(2):
        for pack in range(2):
            shown.values.add(packs[batch][pack], *given(batch + pack / 10))
    shown.gather(GROUPS, lambda token: f"<{token}>")
    rows = {row["completion"]: row for row in shown.rows()}
    assert list(rows) == ["1-0", "2-0", "1-1", "2-1"]  # an answer of every prompt first
    places = {"1-0": (0, [2, 3]), "1-1": (0, [6, 7, 8, 9]), "2-0": (1, [9, 10, 11])}
    places["2-1"] = (1.1, [9, 10])
    for name, (offset, positions) in places.items():
        values = rows[name]["by_token"]
        assert values["gamma"] == pytest.approx([p / 100 + offset for p in positions], rel=1e-3)
        expected = [np.exp(-p / 100 - offset) for p in positions]
        assert values["ratio"] == pytest.approx(expected, rel=1e-3)
    assert rows["2-1"]["by_token"]["text"] == ["<210>", "<211>"]
    assert [rows[name]["advantage"] for name in ("1-0", "1-1", "2-0", "2-1")] == [0, 1, 2, 3]


def test_only_the_first_tokens_and_only_those_that_the_policy_wrote():
    written = np.array([True, False, True])
    groups = [group(1, 3, (3, 3), written), group(2, 3, (3, 3), written)]
    shown, packs = watched(groups, 2, 2)
    logprobs, old, _ = given(0.0)
    for batch in packs:
        for pack in batch:
            shown.values.add(pack, logprobs, old, None)  # a loss without gamma
    shown.gather(GROUPS, str)
    first, second = shown.rows()
    assert (first["completion"], second["completion"]) == ("1-0", "2-0")
    assert first["by_token"] == {"text": ["100", "101"], "ratio": [0.9802, None]}  # exp(-0.02)


def test_the_last_update_counts():
    shown, packs = watched([group(1, 3, (2, 4)), group(2, 10, (3, 2))], 1, 1)
    for offset in (0.5, 0.25):
        for batch in packs:
            for pack in batch:
                shown.values.add(pack, *given(offset))
    shown.gather(GROUPS, str)
    (row,) = shown.rows()
    assert row["by_token"]["gamma"] == [0.34]  # 0.09 + 0.25


def test_without_values_the_rows_are_as_they_were():
    shown = ShownSamples([group(1, 3, (2, 4))], 1)
    shown.gather(GROUPS, str)
    assert shown.values is None
    assert shown.rows() == [
        {
            **{"index": 1, "prompt": "p1", "completion": "1-0", "reward": 1.0, "reason": ""},
            **{"tokens": 2, "finished": True},
        }
    ]
    assert ShownSamples((), 4).rows() == []

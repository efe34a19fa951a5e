"""A run goes on under another layout as it would have under its own: weights, the optimizer's
state and step, for the plain and the distributed optimizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.layout_cases import EP2, PP2, SHARDED, TP2, Case
from tests.support.layouts import (
    MINI_BATCHES,
    layout_config,
    observed_update,
    packed_mini_batches,
    policy_of,
    rollout_batch,
)
from tests.support.ranks import run_on_ranks

BEFORE, AFTER = MINI_BATCHES, 5  #: updates until the checkpoint, and behind it


def train_and_save(case: Case, root: Path) -> list[dict[str, float]]:
    """On a rank: train, save, train on; what the updates behind the checkpoint measure."""
    from megatron_rl.checkpoint.save import save_checkpoint

    with policy_of(layout_config(case)) as policy:
        updates(policy, case, 0, BEFORE)
        save_checkpoint(root, BEFORE, state={}, keep=1, **of_checkpoint(policy, case))
        return updates(policy, case, BEFORE, AFTER)


def go_on(case: Case, root: Path) -> list[dict[str, float]]:
    """On a rank: the same updates, from the checkpoint."""
    from megatron_rl.checkpoint.directory import newest_checkpoint
    from megatron_rl.checkpoint.restore import load_checkpoint

    with policy_of(layout_config(case)) as policy:
        load_checkpoint(newest_checkpoint(root), **of_checkpoint(policy, case))
        return updates(policy, case, BEFORE, AFTER)


def of_checkpoint(policy: Any, case: Case) -> dict[str, Any]:
    from megatron_rl.checkpoint.identity import architecture_of, layout_of

    return {
        "chunks": policy.chunks,
        "optimizer": policy.optimizer,
        "architecture": architecture_of(policy.config.model),
        "layout": layout_of(policy.config.parallel, case.ranks),
        "groups": policy.groups,
    }


def updates(policy: Any, case: Case, first: int, count: int) -> list[dict[str, float]]:
    """Updates on the fixed batch, scored anew before the first mini-batch of each round."""
    from megatron_rl.policy.score import score
    from megatron_rl.policy.update import update
    from megatron_rl.router.telemetry import RouterTelemetry

    model = policy.config.model
    telemetry = RouterTelemetry(model.num_layers, model.num_experts, policy.device.torch_device)
    mini_batches = packed_mini_batches(policy, rollout_batch(case))
    size, measured, scored = len(mini_batches[0]), [], []
    for number in range(first, first + count):
        turn = number % MINI_BATCHES
        if turn == 0:
            flat = [pack for packs in mini_batches for pack in packs]
            scored = score(policy, flat, with_traces=True)
        items = scored[turn * size : (turn + 1) * size]
        measured.append(observed_update(policy, items, telemetry, update)[0])
    return measured


PAIRS = {
    "EP2 -> TP2 PP2 EP2": (EP2, 2, {**TP2, **PP2, **EP2}, 4),
    "EP2 -> TP2 PP2 EP2, sharded": ({**EP2, **SHARDED}, 2, {**TP2, **PP2, **EP2, **SHARDED}, 4),
    "TP2 PP2 EP2, sharded -> one rank": ({**TP2, **PP2, **EP2, **SHARDED}, 4, {}, 1),
    "DP2 -> DP4, sharded": ({}, 2, SHARDED, 4),
    "EP2 DP2, sharded -> EP2": ({**EP2, **SHARDED}, 4, EP2, 2),
    "EP2 -> TP2 PP2 EP2, muon": (EP2, 2, {**TP2, **PP2, **EP2}, 4),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_next_updates_are_the_same(name, tmp_path):
    before, ranks_before, after, ranks_after = PAIRS[name]
    optimizer = {"name": "muon" if "muon" in name else "adam"}
    first = Case(name, ranks_before, before, optimizer=optimizer)
    second = Case(name, ranks_after, after, optimizer=optimizer)
    expected = run_on_ranks(ranks_before, train_and_save, first, tmp_path, timeout_s=300.0)[0]
    found = run_on_ranks(ranks_after, go_on, second, tmp_path, timeout_s=300.0)[0]
    assert len({update["grad_norm"] for update in expected}) == AFTER
    for number, (here, there) in enumerate(zip(found, expected, strict=True)):
        for metric, value in there.items():
            difference = abs(here[metric] - value) / max(abs(value), 1e-3)
            assert difference < 1e-5, (name, number, metric, here[metric], value)

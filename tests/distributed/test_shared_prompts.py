"""Sequences that share their prompts train as they do one by one in a single process."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests.support.layout_cases import (
    ALLGATHER,
    AUX,
    CP2,
    CP4,
    DEEPSEEK,
    DENSE,
    DENSE_FIRST,
    EP2,
    FULL,
    GMPO,
    LATENT,
    PP2,
    SELECTIVE,
    SHARDED,
    SIGMOID,
    TOLERANCE,
    TP2,
    VPP2,
    Case,
)
from tests.support.layout_parameters import parameters
from tests.support.layouts import (
    References,
    compare,
    layout_config,
    packed_mini_batches,
    policy_of,
    rollout_batch,
    run_case,
)
from tests.support.ranks import run_on_ranks


def shared(
    name: str, ranks: int, parallel: Mapping[str, Any], model: Mapping[str, Any] = {}, **more: Any
) -> Case:
    """Groups of four sequences with the same prompt."""
    return Case(name, ranks, parallel, model, group=4, share_prompts="on", **more)


R2 = {"routing_replay": "r2"}
ONE_PACK = {"pack_tokens": 256}  # balancing losses are of packs, so they have to be the same
CASES = (
    shared("one process", 1, {}),
    shared("TP2", 2, TP2),
    shared("EP2", 2, EP2),
    shared("PP2", 2, PP2),
    shared("PP2 VPP2", 2, VPP2),
    shared("CP2", 2, CP2),
    shared("CP4", 4, CP4),
    shared("DP2", 2, {}),
    shared("TP2 EP2", 2, {**TP2, **EP2}),
    shared("EP2 allgather", 2, {**EP2, **ALLGATHER}),
    shared("CP2 TP2", 4, {**CP2, **TP2}),
    shared("CP2 EP2", 2, {**CP2, **EP2}),
    shared("CP2 PP2 VPP2", 4, {**CP2, **VPP2}),
    shared("TP2 PP2 EP2", 4, {**TP2, **PP2, **EP2}),
    shared("TP2 PP2 VPP2 CP2", 8, {**TP2, **VPP2, **CP2}),
    shared("recompute full", 1, FULL),
    shared("CP2 recompute full", 2, {**CP2, **FULL}),
    shared("PP2 recompute selective", 2, {**PP2, **SELECTIVE}),
    shared("TP2 PP2 recompute full", 4, {**TP2, **PP2, **FULL}, SIGMOID),
    shared("PP2 VPP2 recompute full, aux and z loss", 2, {**VPP2, **FULL}, AUX, **ONE_PACK),
    shared("one process, aux and z loss", 1, {}, AUX, **ONE_PACK),
    shared("TP2, aux and z loss", 2, TP2, AUX, **ONE_PACK),
    shared("TP2 PP2, aux and z loss", 4, {**TP2, **PP2}, AUX, **ONE_PACK),
    shared("CP2, aux and z loss", 2, CP2, AUX, **ONE_PACK),
    shared("EP2, sigmoid and bias", 2, EP2, SIGMOID),
    shared("CP2, sigmoid and bias", 2, CP2, SIGMOID),
    shared("TP2 PP2 EP2, as DeepSeek", 4, {**TP2, **PP2, **EP2}, DEEPSEEK),
    shared("TP2, latent attention", 2, TP2, LATENT),
    shared("CP2 TP2, latent attention", 4, {**CP2, **TP2}, LATENT),
    shared("PP2, dense first layer", 2, PP2, DENSE_FIRST),
    shared("PP2 VPP2, dense model", 2, VPP2, DENSE, algorithm=GMPO),
    shared("EP2 sharded optimizer", 4, {**EP2, **SHARDED}),
    shared("TP2 EP2, R2", 2, {**TP2, **EP2}, algorithm=R2),
    shared("PP2 recompute full, R2", 2, {**PP2, **FULL}, algorithm=R2),
    shared("CP2, in turns", 2, CP2, turns=True),
    shared("TP2 PP2, in turns", 4, {**TP2, **PP2}, turns=True),
)
#: The others are marked slow.
QUICK = (
    "one process",
    "TP2",
    "PP2 VPP2",
    "CP2",
    "TP2 EP2, R2",
    "CP2 TP2, latent attention",
    "TP2 PP2 recompute full",
    "PP2 VPP2 recompute full, aux and z loss",
    "CP2, in turns",
)


@pytest.fixture(scope="module")
def references() -> References:
    """The single processes without shared prompts."""
    return References()


@pytest.mark.parametrize("case", parameters(CASES, QUICK))
def test_a_layout_that_shares_prompts_trains_like_a_process_that_does_not(
    case: Case, references: References
):
    difference = compare(
        run_case(case), references.of(dataclasses.replace(case, share_prompts="off"))
    )
    assert difference.largest < TOLERANCE, difference


def _rows(case: Case) -> tuple[list[int], list[int]]:
    """On a rank: rows of the packs of all mini-batches, and how many stand for no token."""
    with policy_of(layout_config(case)) as policy:
        packs = sum(packed_mini_batches(policy, rollout_batch(case)), [])
        return [len(pack.row) for pack in packs], [
            int(pack.placement.padding.sum()) for pack in packs
        ]


def test_fewer_rows_are_run():
    """Eight sequences in two groups of four: three prompts of four are not run again."""
    case = shared("one process", 1, {}, **ONE_PACK)
    samples = rollout_batch(case)
    prompts = [int(np.argmax(sample.written)) for sample in samples]
    whole = sum(len(sample.tokens) - 1 for sample in samples)  # the last of each is not read
    ((rows, padding),) = run_on_ranks(1, _rows, case)
    used = sum(rows) - sum(padding)
    assert used == whole - sum(p for n, p in enumerate(prompts) if n % 4)
    off = dataclasses.replace(case, share_prompts="off")
    ((rows, padding),) = run_on_ranks(1, _rows, off)
    assert sum(rows) - sum(padding) == whole

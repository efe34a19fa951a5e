"""Dynamic sampling: more prompts are drawn until enough groups have answers of unequal reward.

DAPO, arXiv 2503.14476, section 3.2. The condition here is on the reward the advantages are taken
of, shaping included, and not on being solved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Sequence

from torch.distributed import ProcessGroup

from megatron_rl.parallel.collectives import gather_objects
from megatron_rl.records import Prompt
from megatron_rl.rollout.collect import ScoredGroup


@dataclass(frozen=True)
class DynamicBatch:
    """What dynamic sampling gives."""

    chosen: list[ScoredGroup]  #: as many as wanted, in the order drawn; the same on every rank
    drawn: list[ScoredGroup]  #: every group this rank has generated
    rounds: int


def collect_informative(
    draw: Callable[[int], Sequence[Prompt]],
    generate: Callable[[Sequence[Prompt], int], list[ScoredGroup]],
    wanted: int,
    max_rounds: int,
    data: ProcessGroup,
) -> DynamicBatch:
    """Draw and generate round by round until ``wanted`` groups are informative. A collective.

    Which prompts are drawn, which groups are chosen and in which order depends on the rewards
    only, not on the number of ranks. Informative groups beyond those wanted are dropped, the last
    ones drawn. After ``max_rounds`` the batch is filled up with the first groups of equal reward.

    Args:
        draw: the next n prompts, the same on every rank.
        generate: scored groups of this rank's prompts (possibly none) in that round, from 0.
        wanted: groups of a batch, >= 1.
        max_rounds: >= 1.
        data: the data-parallel group, over whose ranks the prompts of a round are dealt out.
    """
    rank, size = data.rank(), data.size()
    mine: dict[int, ScoredGroup] = {}  # by place in the order drawn
    informative: list[bool] = []  # of every place
    rounds = 0
    while rounds < max_rounds and sum(informative) < wanted:
        prompts = draw(next_draw(wanted, sum(informative), len(informative)))
        first = len(informative)
        groups = generate(prompts[rank::size], rounds)
        mine.update(zip(range(first + rank, first + len(prompts), size), groups, strict=True))
        flags = gather_objects([group.is_informative for group in groups], data)
        informative += [flags[place % size][place // size] for place in range(len(prompts))]
        rounds += 1
    places = choose(informative, wanted)
    parts = gather_objects({place: mine[place] for place in places if place in mine}, data)
    everyone = {place: group for part in parts for place, group in part.items()}
    return DynamicBatch([everyone[place] for place in places], list(mine.values()), rounds)


def next_draw(wanted: int, found: int, drawn: int) -> int:
    """Prompts of the next round: as many as should give the missing groups, at the rate so far.

    At least the missing ones, at most ``wanted``; ``wanted`` as long as none was found.
    """
    missing = wanted - found
    if found == 0:
        return wanted
    return min(wanted, max(missing, -(-missing * drawn // found)))


def choose(informative: Sequence[bool], wanted: int) -> list[int]:
    """The places of the first ``wanted`` informative groups, made up with the first others.

    Ascending. Expects at least ``wanted`` places.
    """
    good = [place for place, flag in enumerate(informative) if flag][:wanted]
    others = [place for place, flag in enumerate(informative) if not flag]
    return sorted(good + others[: wanted - len(good)])

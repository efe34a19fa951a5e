"""Dynamic sampling: draw prompts until enough groups have rewards that differ.

DAPO, arXiv 2503.14476, section 3.2. DAPO asks whether answers are solved. Here the rewards count
that the advantages are computed from, shaping included.
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
    """The result of dynamic sampling."""

    chosen: list[ScoredGroup]  #: as many as wanted, in the order drawn; the same on every rank
    drawn: list[ScoredGroup]  #: all groups that this rank has generated
    rounds: int  #: rounds of drawing and generating


def collect_informative(
    draw: Callable[[int], Sequence[Prompt]],
    generate: Callable[[Sequence[Prompt], int], list[ScoredGroup]],
    wanted: int,
    max_rounds: int,
    data: ProcessGroup,
) -> DynamicBatch:
    """Draw and generate, round by round, until ``wanted`` groups are informative. A collective.

    The prompts drawn and the groups chosen depend on the rewards only, not on the number of ranks.
    If there are more informative groups than wanted, those drawn last are dropped. If there are too
    few after ``max_rounds``, the first groups of equal reward fill the batch up.

    Args:
        draw: gives the next n prompts, the same on every rank.
        generate: gives the scored groups of this rank's prompts (possibly none) in a round, from 0.
        wanted: groups of a batch, >= 1.
        max_rounds: most rounds, >= 1.
        data: the data-parallel group; its ranks share the prompts of a round.
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
    """Number of prompts in the next round: enough for the missing groups, at the rate so far.

    It is at least the number missing and at most ``wanted``; it is ``wanted`` before a group is
    found.

    Args:
        wanted: informative groups of a batch.
        found: informative groups so far.
        drawn: groups so far.
    """
    missing = wanted - found
    if found == 0:
        return wanted
    return min(wanted, max(missing, -(-missing * drawn // found)))


def choose(informative: Sequence[bool], wanted: int) -> list[int]:
    """The places, in ascending order, of the first ``wanted`` informative groups. If there are too
    few, the first other groups are added. Expects at least ``wanted`` groups.
    """
    good = [place for place, flag in enumerate(informative) if flag][:wanted]
    others = [place for place, flag in enumerate(informative) if not flag]
    return sorted(good + others[: wanted - len(good)])

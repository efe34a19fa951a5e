"""Sequences that begin with the same prompt share its tokens in a pack: which do, where they go,
and the row that the model runs on.

Only tokens in front of a sequence's first trained token are shared, and only where all that the
model is given for them is equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np

from megatron_rl.errors import UserError
from megatron_rl.records import Sample, SharedRow

#: The share of its rows that a group must save. Attention to a prompt takes a mask and not the
#: causal kernel, so beside very long answers a short prompt would cost more than it saves.
LEAST_GAIN = 1 / 32


@dataclass(frozen=True)
class Tree:
    """Sequences that lie next to each other in a pack."""

    members: tuple[int, ...]  #: indices of the samples, ascending
    prompt: int = 0  #: length of the prompt that they share; 0: they share none


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` (>= 1) that is not below n."""
    return -(-n // multiple) * multiple


def prompt_length(sample: Sample) -> int:
    """Number of tokens in front of the first trained one; 0 where none is trained."""
    trained = sample.trained
    first = int(trained.argmax()) if len(trained) else 0
    return first + 1 if trained[first : first + 1].any() else 0


def num_rows(tree: Tree, lengths: Sequence[int], multiple: int) -> int:
    """Rows that a tree takes: the prompt and each answer are padded to ``multiple`` by
    themselves.
    """
    answers = sum(round_up(lengths[index] - tree.prompt, multiple) for index in tree.members)
    return round_up(tree.prompt, multiple) + answers


def plan_trees(
    lengths: Sequence[int],
    groups: Sequence[Tree],
    pack_rows: int,
    multiple: int = 1,
) -> list[list[Tree]]:
    """Assign groups of sequences to packs: first-fit decreasing, of whole groups.

    A group that no pack can hold is cut into as few parts as a greedy choice gives, of which each
    runs the prompt again. A group that sharing makes no shorter, by `LEAST_GAIN`, is taken apart.

    Args:
        lengths: of all sequences, what the model reads of them.
        groups: sequences with the same prompt; together they hold each index once.
        pack_rows: rows of a pack.
        multiple: what prompts and answers, or whole sequences, are padded to.

    Returns:
        The trees of each pack, by their first sequence. `UserError`: a sequence is longer than a
        pack.
    """
    parts = [part for group in groups for part in _parts(group, lengths, pack_rows, multiple)]
    sizes = [num_rows(part, lengths, multiple) for part in parts]
    order = sorted(range(len(parts)), key=lambda n: (-sizes[n], parts[n].members))
    room = np.full(len(parts), pack_rows, dtype=np.int64)  # most packs that could be needed
    packs: list[list[Tree]] = []
    for number in order:
        place = int(np.argmax(room >= sizes[number]))
        if place == len(packs):
            packs.append([])
        packs[place].append(parts[number])
        room[place] -= sizes[number]
    return [sorted(pack, key=lambda tree: tree.members) for pack in packs]


def _parts(group: Tree, lengths: Sequence[int], pack_rows: int, multiple: int) -> list[Tree]:
    """The group in parts that fit a pack and gain from sharing, and single sequences."""
    left = sorted(group.members, key=lambda index: (-lengths[index], index))
    parts = []
    while left:
        chosen, room = [], pack_rows - round_up(group.prompt, multiple)
        for index in left:
            size = round_up(lengths[index] - group.prompt, multiple)
            if size <= room:
                chosen.append(index)
                room -= size
        together = Tree(tuple(sorted(chosen)), group.prompt)
        least = sum(round_up(lengths[index], multiple) for index in chosen)  # each by itself
        saved = least - num_rows(together, lengths, multiple)
        if group.prompt and chosen and saved >= max(1, LEAST_GAIN * least):
            parts.append(together)
        else:
            parts.extend(Tree((index,)) for index in sorted(chosen or left))
        left = [index for index in left if index not in chosen] if chosen else []
    for part in parts:
        _check_fits(part, lengths, pack_rows, multiple)
    return parts


def _check_fits(part: Tree, lengths: Sequence[int], pack_rows: int, multiple: int) -> None:
    size = num_rows(part, lengths, multiple)
    if size > pack_rows:
        raise UserError(
            f"sequence {part.members[0]} of {size} tokens; a pack holds {pack_rows}; "
            "raise data.pack_tokens or shorten the sequences"
        )


def shared_row(
    trees: Sequence[Tree], samples: Sequence[Sample], pack_rows: int, vocab_size: int, multiple: int
) -> SharedRow:
    """The row of a pack with these trees. Padding at row r holds the token id r mod
    ``vocab_size``.

    The pack has what is read of the trees' sequences in order, then padding up to ``pack_rows``
    tokens at least.
    """
    tokens = np.arange(pack_rows, dtype=np.int64) % vocab_size
    lengths: list[int] = []
    parents: list[int] = []
    places: list[np.ndarray] = []
    start = 0

    def lay(segment: np.ndarray, parent: int) -> np.ndarray:
        nonlocal start
        rows = np.arange(start, start + len(segment))
        if not len(rows):
            return rows
        tokens[rows] = segment
        lengths.append(len(segment))
        parents.append(parent)
        start += round_up(len(segment), multiple)
        return rows

    for tree in trees:
        root, prompt = -1, np.zeros(0, dtype=np.int64)
        if tree.prompt:
            root = len(lengths)
            prompt = lay(samples[tree.members[0]].tokens[: tree.prompt], -1)
        for index in tree.members:
            own = samples[index].tokens[tree.prompt : samples[index].num_read]
            places.extend([prompt, lay(own, root)])
    padding = max(0, pack_rows - sum(map(len, places)))
    places.append(np.zeros(padding, dtype=np.int64))
    return SharedRow(tokens, tuple(lengths), tuple(parents), np.concatenate(places))

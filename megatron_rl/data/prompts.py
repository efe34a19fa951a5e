"""Data sets: the problems and samples of a file as the model will see them, and a cursor over them
that can be saved and resumed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Generic, Literal, Mapping, Sequence, TypeVar

import numpy as np

from megatron_rl.data.jsonl import place
from megatron_rl.data.problems import Problem, ProblemFile
from megatron_rl.data.rendering import Rendering
from megatron_rl.errors import UserError
from megatron_rl.records import Prompt, Sample

Item = TypeVar("Item")


@dataclass(frozen=True)
class DataSet(Generic[Item]):
    """What a run takes from a file."""

    path: Path
    items: list[Item]
    lines: int  #: of the file
    limit: int  #: most tokens of an item
    #: lines left out because they are longer: index of the line and its tokens
    skipped: tuple[tuple[int, int], ...]
    notes: Counter[str]  #: what was done to lines, and to how many
    kinds: Counter[type]  #: prompts that are text (``str``) and chats (``list``)

    def __len__(self) -> int:
        return len(self.items)

    def skips(self) -> str:
        """What was left out and why; "" if nothing was."""
        if not self.skipped:
            return ""
        (first, length), *_ = self.skipped
        return (
            f"{len(self.skipped):,} of {self.lines:,} lines skipped, longer than {self.limit:,} "
            f"tokens: the first is line {first + 1} with {length:,}"
        )


def load_prompts(
    file: ProblemFile, rendering: Rendering, limit: int, overlong: Literal["refuse", "skip"]
) -> DataSet[Prompt]:
    """The problems of a file; ``index`` counts its lines from 0.

    ``UserError`` names file and line: a prompt that the tokenizer's template does not take, of no
    tokens, or of more than ``limit`` where ``overlong`` is refuse; also where no line is left.
    """

    def prompt_of(problem: Problem) -> tuple[Prompt, int]:
        ids, text = rendering.prompt(problem.prompt, file.notes)
        tokens = np.array(ids, dtype=np.int64)
        return Prompt(problem.index, tokens, text, problem.record), len(ids)

    return _load(file, "prompt", prompt_of, limit, overlong)


def load_samples(
    file: ProblemFile, rendering: Rendering, limit: int, overlong: Literal["refuse", "skip"]
) -> DataSet[Sample]:
    """The samples of a file for supervised fine-tuning, each with its reference answer.

    Every one ends with the end-of-sequence token. ``UserError`` as in ``load_prompts``, with
    ``limit`` for prompt and completion together.
    """

    def sample_of(problem: Problem) -> tuple[Sample, int]:
        prompt, _ = rendering.prompt(problem.prompt, file.notes)
        completion = rendering.completion(problem.completion or "", file.notes)
        sample = Sample.of(np.array(prompt, dtype=np.int64), np.array(completion, dtype=np.int64))
        return sample, len(sample.tokens) if prompt else 0

    return _load(file, "prompt and completion", sample_of, limit, overlong)


def number_occurrences(prompts: Sequence[Prompt], drawn: Counter[int]) -> list[Prompt]:
    """The prompts, each knowing how often its step has drawn it before.

    ``drawn`` counts the draws of the step by ``index``; those of these prompts are added.
    """
    numbered = []
    for prompt in prompts:
        numbered.append(replace(prompt, occurrence=drawn[prompt.index]))
        drawn[prompt.index] += 1
    return numbered


class PromptSource(Generic[Item]):
    """An endless, resumable cursor over prompts (or samples), the same on every rank.

    Epoch e draws all prompts once, in the order of a permutation that depends on (seed, e) only;
    batches run across the end of an epoch. The place of the cursor is the whole state.
    """

    def __init__(self, prompts: Sequence[Item], seed: int, shuffle: bool) -> None:
        if not prompts:
            raise ValueError("no prompts")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._offset = 0  # prompts of this epoch already drawn
        self._order = self._order_of(0)

    def next_batch(self, n: int) -> list[Item]:
        """The next n prompts; one occurs twice only where a new epoch begins within the batch."""
        batch: list[Item] = []
        while len(batch) < n:
            if self._offset == len(self._prompts):
                self._epoch, self._offset = self._epoch + 1, 0
                self._order = self._order_of(self._epoch)
            taken = self._order[self._offset : self._offset + n - len(batch)]
            batch += [self._prompts[place] for place in taken]
            self._offset += len(taken)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON."""
        return {
            "epoch": self._epoch,
            "offset": self._offset,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "size": len(self._prompts),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, other_data: bool = False) -> None:
        """Continues where ``state`` was taken; with ``other_data`` at the same place of other
        prompts, or with a new epoch where their number is another.

        ``UserError`` on another seed or order, and on another number without ``other_data``.
        """
        here = {"seed": self._seed, "shuffle": self._shuffle}
        if not other_data:
            here["size"] = len(self._prompts)
        for key, value in here.items():
            if state[key] != value:
                raise UserError(
                    f"checkpoint with {key} {state[key]} of the prompts, here {value}; "
                    "resuming expects the same data, seed and order; "
                    "restore data.train, seed and data.shuffle, or start a new run with "
                    "checkpoint.init_from"
                )
        self._epoch, self._offset = int(state["epoch"]), int(state["offset"])
        if state["size"] != len(self._prompts):
            self._epoch, self._offset = self._epoch + 1, 0
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._prompts))
        generator = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence([self._seed, epoch]))
        )
        return generator.permutation(len(self._prompts))


def _load(
    file: ProblemFile,
    what: str,
    item_of: Callable[[Problem], tuple[Item, int]],
    limit: int,
    overlong: Literal["refuse", "skip"],
) -> DataSet[Item]:
    """The items of a file's problems, by a function that gives one and its tokens."""
    items, skipped, kinds = [], [], Counter()
    for problem in file.problems:
        where = place(file.path, problem.index)
        try:
            item, length = item_of(problem)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if length == 0:
            raise UserError(
                f"{where}: the prompt has no tokens; expected at least one; correct the line"
            )
        if length > limit and overlong == "refuse":
            raise UserError(
                f"{where}: {what} of {length} tokens; expected at most {limit}; shorten it, raise "
                "model.max_sequence_length, or leave such lines out with data.overlong skip"
            )
        if length > limit:
            skipped.append((problem.index, length))
            continue
        items.append(item)
        kinds[str if isinstance(problem.prompt, str) else list] += 1
    lines = len(file.problems)
    data = DataSet(file.path, items, lines, limit, tuple(skipped), file.notes, kinds)
    if not items:
        raise UserError(
            f"{file.path}: {data.skips()}; expected at least one that fits; raise "
            "model.max_sequence_length"
        )
    return data

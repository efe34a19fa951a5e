"""Data sets of prompts or samples as the model will see them, and a resumable cursor over them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Callable, Generic, Literal, Mapping, Sequence, TypeVar

import numpy as np

from megatron_rl.data.problems import Problem, ProblemFile
from megatron_rl.data.rendering import Rendering
from megatron_rl.errors import UserError
from megatron_rl.records import Prompt, Sample

Item = TypeVar("Item")


@dataclass(frozen=True)
class DataPart:
    """The items of one data set of a split."""

    label: str
    weight: float
    first: int  #: index of its first record
    size: int  #: number of items, without skipped ones


@dataclass(frozen=True)
class DataSet(Generic[Item]):
    """The items that a run takes from a split."""

    path: str  #: name for messages
    items: list[Item]  #: part by part
    parts: tuple[DataPart, ...]
    place: Callable[[int], str]  #: the place of a record, by index
    lines: int  #: records of the split
    limit: int  #: most tokens of an item
    #: records skipped because they are longer: index of the record, and its tokens
    skipped: tuple[tuple[int, int], ...]
    notes: Counter[str]  #: notes on changes made to lines, with the number of lines
    kinds: Counter[type]  #: numbers of prompts that are text (``str``) and chats (``list``)

    def __len__(self) -> int:
        return len(self.items)

    def skips(self) -> str:
        """The skipped lines and the reason; "" if none."""
        if not self.skipped:
            return ""
        (first, length), *_ = self.skipped
        return (
            f"{len(self.skipped):,} of {self.lines:,} lines skipped, longer than {self.limit:,} "
            f"tokens: the first is {self.named(first)} with {length:,}"
        )

    def named(self, index: int) -> str:
        """``line 3``, with the file if there are several."""
        place = self.place(index)
        return place.removeprefix(f"{self.path}, ")

    def cut(self, most: int | None) -> DataSet[Item]:
        """The first ``most`` items; of several parts equally many, as far as each has them."""
        if most is None or most >= len(self):
            return self
        sizes = [0] * len(self.parts)
        while sum(sizes) < most:
            for number, part in enumerate(self.parts):
                if sum(sizes) < most and sizes[number] < part.size:
                    sizes[number] += 1
        items, start = [], 0
        for part, size in zip(self.parts, sizes):
            items += self.items[start : start + size]
            start += part.size
        parts = (replace(part, size=size) for part, size in zip(self.parts, sizes))
        return replace(self, items=items, parts=tuple(parts))

    def shares(self) -> dict[str, float]:
        """Each part's share of the draws; {} for a single part."""
        whole = sum(part.weight for part in self.parts)
        return {p.label: p.weight / whole for p in self.parts} if len(self.parts) > 1 else {}


def load_prompts(
    file: ProblemFile, rendering: Rendering, limit: int, overlong: Literal["refuse", "skip"]
) -> DataSet[Prompt]:
    """The problems of a file; ``index`` counts its lines from 0.

    Raises ``UserError`` with file and line for a prompt that the tokenizer's template refuses,
    without tokens, or with more than ``limit`` if ``overlong`` is refuse; also if no line is left.
    """

    def prompt_of(problem: Problem) -> tuple[Prompt, int]:
        ids, text = rendering.prompt(problem.prompt, file.notes, problem.tools)
        tokens = np.array(ids, dtype=np.int64)
        return Prompt(problem.index, tokens, text, problem.record), len(ids)

    return _load(file, "prompt", prompt_of, limit, overlong)


def load_samples(
    file: ProblemFile, rendering: Rendering, limit: int, overlong: Literal["refuse", "skip"]
) -> DataSet[Sample]:
    """The samples of a file for supervised fine-tuning, each with its reference answer.

    Each sample ends with the end-of-sequence token. Raises ``UserError`` as ``load_prompts`` does;
    ``limit`` bounds prompt plus completion.
    """

    def sample_of(problem: Problem) -> tuple[Sample, int]:
        prompt, _ = rendering.prompt(problem.prompt, file.notes, problem.tools)
        completion = rendering.completion(problem.completion or "", file.notes)
        sample = Sample.of(np.array(prompt, dtype=np.int64), np.array(completion, dtype=np.int64))
        return sample, len(sample.tokens) if prompt else 0

    return _load(file, "prompt and completion", sample_of, limit, overlong)


def number_occurrences(prompts: Sequence[Prompt], drawn: Counter[int]) -> list[Prompt]:
    """Set each prompt's count of earlier draws in the same step.

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
    batches run across the end of an epoch. Its position is its whole state.
    """

    def __init__(self, prompts: Sequence[Item], seed: int, shuffle: bool, part: int = 0) -> None:
        """part: number of the data set in a mixture; each has its own order."""
        if not prompts:
            raise ValueError("no prompts")
        self._part = part
        self._prompts = tuple(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._offset = 0  # prompts of this epoch already drawn
        self._order = self._order_of(0)

    def next_batch(self, n: int) -> list[Item]:
        """The next n prompts; one occurs twice only if a new epoch begins within the batch."""
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
        """Continues where ``state`` was taken. With ``other_data`` it continues at the same place,
        or with a new epoch if the number of prompts differs.

        Raises ``UserError`` on another seed or order, and on another number of prompts without
        ``other_data``.
        """
        if "parts" in state:  # of a mixture
            if not other_data:
                raise UserError(
                    f"checkpoint of {len(state['parts'])} data sets in data.train, here 1; "
                    "resuming expects the same data; restore data.train, or start a new run with "
                    "checkpoint.init_from"
                )
            state = {**state["parts"][0], "size": None}  # a new epoch
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
        entropy = [self._seed, epoch, self._part] if self._part else [self._seed, epoch]
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))
        return generator.permutation(len(self._prompts))


def _load(
    file: ProblemFile,
    what: str,
    item_of: Callable[[Problem], tuple[Item, int]],
    limit: int,
    overlong: Literal["refuse", "skip"],
) -> DataSet[Item]:
    """The items of a file's problems; a function makes an item and counts its tokens."""
    items: list[Item] = []
    kinds: Counter[type] = Counter()
    skipped, parts = [], []
    for part in file.parts:
        before = len(items)
        for problem in file.problems[part.first : part.first + part.count]:
            where = file.place(problem.index)
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
                    f"{where}: {what} of {length} tokens; expected at most {limit}; shorten it, "
                    "raise model.max_sequence_length, or leave such lines out with data.overlong "
                    "skip"
                )
            if length > limit:
                skipped.append((problem.index, length))
                continue
            items.append(item)
            kinds[str if isinstance(problem.prompt, str) else list] += 1
        parts.append(DataPart(part.label, part.weight, part.first, len(items) - before))
    data = DataSet(
        file.path,
        items,
        tuple(parts),
        file.place,
        len(file.problems),
        limit,
        tuple(skipped),
        file.notes,
        kinds,
    )
    empty = next((part.label for part in parts if not part.size), None)
    if empty is not None:
        of = f", so none is left of {empty}" if items else ""
        raise UserError(
            f"{file.path}: {data.skips()}{of}; expected at least one that fits; raise "
            "model.max_sequence_length"
        )
    return data

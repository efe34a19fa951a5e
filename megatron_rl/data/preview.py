"""Shows a data set as the model will see it: counts, lengths, and first examples with tokens."""

from __future__ import annotations

import textwrap
from typing import Any, Iterator, Mapping, Sequence

import numpy as np

from megatron_rl.data.prompts import DataSet
from megatron_rl.data.run_data import RunData
from megatron_rl.data.tokenizers import Tokenizer
from megatron_rl.records import Prompt, Sample

#: Tokens shown at each end of a long example.
SHOWN_ENDS = 60
#: Most characters shown of an example's text; of a longer text its two ends.
SHOWN_CHARACTERS = 4000

_WIDTH = 100


def preview(
    data: RunData, stop_tokens: Mapping[int, str], max_new_tokens: int, count: int
) -> Iterator[str]:
    """Lines about the data sets of a run, with the first ``count`` examples of each, and of each
    part of a mixture.

    ``stop_tokens``: each with the sources that name it; ``max_new_tokens``: longest answer.
    """
    tokenizer = data.tokenizer
    stops = (f"{_token(tokenizer, token)} ({place})" for token, place in stop_tokens.items())
    yield f"an answer ends with: {' or '.join(stops)}"
    for name, text in data.facts().items():
        yield f"{name}: {text}"
    for split, items in (("data.train", data.train), ("data.eval", data.eval)):
        if items is None:
            continue
        yield ""
        yield f"{split}: {items.path}, {lengths_text(items)}"
        shares, start = items.shares(), 0
        for part in items.parts:
            mine = items.items[start : start + part.size]
            start += part.size
            if shares:  # a cut (evaluate.problems) may leave nothing of a file
                lengths = _lengths(mine) if mine else "none is used"
                yield ""
                yield f"{part.label}, {shares[part.label]:.3g} of the draws: {lengths}"
            for item in mine[:count]:
                yield ""
                place = items.named(item.index) if isinstance(item, Prompt) else ""
                yield from _example(item, place, tokenizer, max_new_tokens)


def lengths_text(data: DataSet[Any]) -> str:
    """``24 problems, prompts of 9 to 14 tokens (50%: 11, 90%: 13, 99%: 14)``, and for samples the
    same for their answers.
    """
    return _lengths(data.items)


def _lengths(items: Sequence[Prompt | Sample]) -> str:
    answers = [int(item.written.sum()) for item in items if isinstance(item, Sample)]
    if not answers:
        prompts = [len(item.tokens) for item in items]
        return f"{len(items):,} problems, prompts of {_range(prompts)}"
    prompts = [len(item.tokens) - count for item, count in zip(items, answers, strict=True)]
    text = f"{len(items):,} samples, prompts of {_range(prompts)}"
    return f"{text}, answers of {_range(answers)}"


def _range(lengths: Sequence[int]) -> str:
    ordered = np.sort(lengths)
    # The smallest length that this percentage of the lines does not exceed.
    at = {p: int(ordered[max(0, -(-p * len(ordered) // 100) - 1)]) for p in (50, 90, 99)}
    quantiles = ", ".join(f"{percent}%: {length:,}" for percent, length in at.items())
    return f"{ordered[0]:,} to {ordered[-1]:,} tokens ({quantiles})"


def _example(
    item: Prompt | Sample, place: str, tokenizer: Tokenizer, longest: int
) -> Iterator[str]:
    ids = item.tokens.tolist()
    marked = np.zeros(len(ids), dtype=bool)
    if isinstance(item, Prompt):
        trained = f"trained on: the sampled answers, of up to {longest} tokens"
        yield f"{place}: a prompt of {len(ids)} tokens; {trained}"
    else:
        marked[1:] = item.trained
        yield _trained_part(marked)
    yield textwrap.indent(_visible(_cut(tokenizer.show(ids))), "  | ", lambda line: True)
    words = [
        f"{'*' if trained else ''}{_token(tokenizer, token)}"
        for trained, token in zip(marked, ids, strict=True)
    ]
    if len(words) > 2 * SHOWN_ENDS:
        left_out = f"... {len(words) - 2 * SHOWN_ENDS} more ..."
        words = [*words[:SHOWN_ENDS], left_out, *words[-SHOWN_ENDS:]]
    yield _wrapped(words)


def _trained_part(marked: np.ndarray) -> str:
    """Describe the trained part of a sample; ``marked``: bool [M]."""
    count, start = int(marked.sum()), int(marked.argmax())
    if count and marked[start:].all():
        return f"a prompt of {start} tokens; trained on: the {count} after it, marked *"
    return f"a sample of {len(marked)} tokens; trained on: the {count} marked *"


def _token(tokenizer: Tokenizer, token: int) -> str:
    return f"{token}:{tokenizer.piece(token)!r}"


def _wrapped(words: Sequence[str]) -> str:
    """Indented lines of words, never broken within a word: a space within a token is part of it."""
    lines = [" "]
    for word in words:
        if len(lines[-1]) + 1 + len(word) > _WIDTH and lines[-1] != " ":
            lines.append(" ")
        lines[-1] += f" {word}"
    return "\n".join(lines)


def _cut(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} more characters ...\n{text[-half:]}"


def _visible(text: str) -> str:
    """The text with escapes for characters that a terminal would obey or not print; line ends
    stay.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )

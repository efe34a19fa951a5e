"""The identity of a run's problems: hashes of their content, independent of file names."""

from __future__ import annotations

import hashlib
import json
from itertools import accumulate
from typing import Any, Mapping, Sequence

import numpy as np

from megatron_rl.data.prompts import DataPart
from megatron_rl.records import Prompt, Sample


def identity_of(
    items: Sequence[Prompt | Sample], parts: Sequence[DataPart] = (), first: int = 0
) -> dict[str, Any]:
    """Number and SHA-256 of problems (or samples) in order, fit for JSON; for a mixture also those
    of each of its ``parts``, by label. ``first``: index of the first record.

    ``tokens`` hashes what the model sees: it depends on the file's lines, the skipped lines, the
    keys, the tokenizer and the chat template. ``records`` hashes the JSON objects that the verifier
    reads; samples have none.
    """
    tokens, records = hashlib.sha256(), hashlib.sha256()
    for item in items:
        ids = item.tokens.astype("<i8")
        tokens.update(f"{_trained(item)} {len(ids)} ".encode() + ids.tobytes())
        if isinstance(item, Prompt):
            text = json.dumps(
                item.record, sort_keys=True
            )  # ASCII, which can write a lone surrogate
            records.update(f"{item.index - first} {text}\n".encode())
    found = {"size": len(items), "tokens": tokens.hexdigest()}
    if not items or isinstance(items[0], Prompt):
        found["records"] = records.hexdigest()
    if len(parts) > 1:
        ends = accumulate(part.size for part in parts)
        found["parts"] = {
            part.label: identity_of(items[end - part.size : end], (), part.first)
            for part, end in zip(parts, ends)
        }
    return found


def _trained(item: Prompt | Sample) -> str:
    """Places where trained tokens begin, end, begin again and so on: ``5`` if all after the first 5
    are trained.
    """
    if isinstance(item, Prompt):
        return str(len(item.tokens))
    changes = np.flatnonzero(np.diff(item.written, prepend=False)).tolist()
    return " ".join(map(str, changes or [len(item.tokens)]))


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """A few words on how two data sets differ; None: they are equal."""
    old, new = before.get("parts", {}), now.get("parts", {})
    if old or new:
        if list(old) != list(new):
            return f"{', '.join(old) or 'one data set'} then, {', '.join(new) or 'one'} now"
        several = {label: difference(old[label], new[label]) for label in old}
        return "; ".join(f"{label}: {text}" for label, text in several.items() if text) or None
    if before["size"] != now["size"]:
        return f"{before['size']:,} then, {now['size']:,} now"
    if before.get("records") != now.get("records"):
        return f"{now['size']:,} as before, with other content"
    if before["tokens"] != now["tokens"]:
        if "records" in now:
            return "the same lines, with other tokens: another tokenizer, chat template or key"
        count = f"{now['size']:,} as before, with other tokens"
        return f"{count}: other lines, or another tokenizer, chat template or key"
    return None

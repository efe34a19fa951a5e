"""Which samples a page holds: few enough to open at once, spread over the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

MOST_SAMPLES = 400
MOST_CHARACTERS = 4_000_000  #: of all of them together
LONGEST_TEXT = 20_000  #: characters of a prompt or a completion shown
_OF_TOKENS = ("text", "ratio", "gamma")


def for_page(
    samples: Sequence[Mapping[str, Any]], *, most: int = MOST_SAMPLES, arm: str | None = None
) -> list[dict[str, Any]]:
    """The samples of a page, by step: all, or as many of steps spread evenly over the run, the
    first and the last among them.

    Args:
        samples: rows of samples.jsonl.
        most: rows at most.
        arm: name of their run, on a page of several.
    """
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_step.setdefault(sample["step"], []).append(sample)
    steps, size = sorted(by_step), sum(map(_characters, samples))
    share = min(1.0, most / max(1, len(samples)), MOST_CHARACTERS / max(1, size))
    kept = max(1, int(share * len(steps)))
    if kept < len(steps):
        steps = [steps[round(i * (len(steps) - 1) / max(1, kept - 1))] for i in range(kept)]
    chosen = [_row(sample, arm) for step in steps for sample in by_step[step]]
    return chosen[:most]


def how_many(samples: Sequence[Mapping[str, Any]]) -> str:
    """What a page says where it holds some of the samples only."""
    kept = len(for_page(samples))
    return "" if kept == len(samples) else f"The page holds {kept} of {len(samples)}."


def _characters(sample: Mapping[str, Any]) -> int:
    texts = sum(len(str(sample.get(name) or "")) for name in ("prompt", "completion"))
    tokens = sample.get("by_token")
    # A token is written with its text and up to three numbers.
    return texts + (30 * len(tokens.get("text", ())) if isinstance(tokens, dict) else 0)


def _row(sample: Mapping[str, Any], arm: str | None) -> dict[str, Any]:
    row: dict[str, Any] = {"step": sample["step"]}
    if arm is not None:
        row["arm"] = arm
    for name in ("prompt", "completion", "reason"):
        row[name] = _cut(sample.get(name))
    reward = sample.get("reward")
    row["reward"] = reward if reward is None or isinstance(reward, (int, float)) else str(reward)
    tokens = _tokens(sample.get("by_token"))
    advantage = sample.get("advantage")
    if tokens and isinstance(advantage, (int, float)):
        tokens["advantage"] = [advantage] * len(tokens["text"])
    return {**row, "tokens": tokens} if tokens else row


def _tokens(tokens: Any) -> dict[str, list[Any]]:
    """Lists of one length, an entry a token; none where they are malformed."""
    if not isinstance(tokens, dict) or not isinstance(tokens.get("text"), list):
        return {}
    lists = {name: tokens[name] for name in _OF_TOKENS if isinstance(tokens.get(name), list)}
    texts = lists["text"]
    sound = all(isinstance(text, str) for text in texts)
    return lists if sound and {len(texts)} == set(map(len, lists.values())) else {}


def _cut(value: Any) -> str:
    """Text, cut where it is very long."""
    text = "" if value is None else str(value)
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]}... ({len(text) - LONGEST_TEXT} more characters)"
    return text

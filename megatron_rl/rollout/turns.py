"""Turns of one conversation, joined to one completion."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from megatron_rl.records import Completion, RoutedExperts


def join_turns(
    answers: Sequence[Completion], replies: Sequence[np.ndarray], texts: Sequence[str]
) -> Completion:
    """One completion of a prompt: its first answer, the reply to it, the answer to that, and so on.

    Each answer was sampled behind the prompt and all that stands before it here. Experts: a token
    has those of the answer in which the token behind it was written. The last token of an answer
    and a reply have those of the next answer, whose sampler was fed them; a reply behind the last
    answer has none.

    Args:
        answers: of the policy, at least one; none of them joined before.
        replies: int64 [tokens] each; as many as answers, or one fewer.
        texts: of the answers and replies, in turns.

    Returns:
        Its ``text`` is all of the texts, and ``last_text`` that of the last answer. Without experts
        where an answer has none.

    Raises:
        ValueError: the numbers do not fit.
    """
    spare = len(answers) - len(replies)
    if not answers or spare not in (0, 1) or len(texts) != len(answers) + len(replies):
        raise ValueError(
            f"{len(answers)} answers, {len(replies)} replies and {len(texts)} texts; expected at "
            "least one answer, a reply between two, and a text of each"
        )
    parts: list[tuple[np.ndarray, np.ndarray, bool]] = []
    for place, answer in enumerate(answers):
        parts.append((answer.tokens, answer.logprobs, True))
        if place < len(replies):
            reply = np.asarray(replies[place], dtype=np.int64)
            parts.append((reply, np.full(len(reply), np.nan, dtype=np.float32), False))
    first, last = answers[0], answers[-1]
    version = last.version if last.last_version is None else last.last_version
    return Completion(
        tokens=np.concatenate([tokens for tokens, _, _ in parts]),
        logprobs=np.concatenate([logprobs for _, logprobs, _ in parts]),
        finished=last.finished,
        text="".join(texts),
        routed_experts=_join_routes(answers),
        version=first.version,
        last_version=version,
        written=np.concatenate([np.full(len(tokens), ours) for tokens, _, ours in parts]),
        last_text=last.text,
    )


def _join_routes(answers: Sequence[Completion]) -> RoutedExperts | None:
    """Of every token but the last answer's last; an answer's are of all that stands before it, too,
    by the sampler's second look at them.
    """
    routes = [answer.routed_experts for answer in answers if answer.routed_experts is not None]
    if len(routes) < len(answers):
        return None
    layers = routes[0].layers
    if any(one.known is not None or one.layers != layers for one in routes):
        return None
    ids, done = [], 0
    for one in routes:
        ids.append(one.ids[done:])
        done = len(one.ids)
    return RoutedExperts(np.concatenate(ids), layers)

"""The turns of a conversation, joined to one completion."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from megatron_rl.records import Completion, KeptTokens, RoutedExperts


def join_turns(
    answers: Sequence[Completion], replies: Sequence[np.ndarray], texts: Sequence[str]
) -> Completion:
    """One completion of a prompt: its first answer, the first reply, the second answer, and so on.

    Each answer was sampled behind the prompt and all turns before it. A token has the experts of
    the sampling that fed it to the model. So the last token of an answer and the reply behind it
    have the experts of the next answer. A reply behind the last answer has none.

    Args:
        answers: the policy's, at least one; each a single turn.
        replies: the environment's, int64 [tokens] each; as many as answers, or one fewer.
        texts: of all answers and replies, in order.

    Returns:
        A completion whose ``text`` joins all texts, and whose ``last_text`` is that of the last
        answer. It has no experts, and no kept tokens, if an answer has none.

    Raises:
        ValueError: the numbers of answers, replies and texts do not fit together.
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
        kept=_join_kept(answers, [len(tokens) for tokens, _, ours in parts if not ours]),
    )


def _join_kept(answers: Sequence[Completion], replies: Sequence[int]) -> KeptTokens | None:
    """The kept tokens of all turns, with empty sets for the replies, of these lengths; None if an
    answer has none.
    """
    sets: list[KeptTokens] = []
    for place, answer in enumerate(answers):
        if answer.kept is None:
            return None
        sets.append(answer.kept)
        sets.extend(KeptTokens.empty(count) for count in replies[place : place + 1])
    return KeptTokens.join(sets)


def _join_routes(answers: Sequence[Completion]) -> RoutedExperts | None:
    """The experts of every token but the last. An answer's experts also cover all tokens before it,
    which its sampler read again; here each token keeps the experts of the first reading.
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

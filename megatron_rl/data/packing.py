"""Packing: sequences laid one behind the other into micro-batches of a fixed number of tokens.

Shapes: T tokens of a pack, S sequences of a pack, M tokens of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np

from megatron_rl.config.estimate import expert_id_bytes
from megatron_rl.errors import UserError
from megatron_rl.records import Pack, RoutedExperts, Sample


@dataclass(frozen=True)
class Routing:
    """Which of the sampler's experts the packs hold."""

    layers: tuple[int, ...]  #: global numbers (from 1) of this rank's MoE layers
    top_k: int  #: K
    num_experts: int  #: E


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` (>= 1) that is not below n."""
    return -(-n // multiple) * multiple


def plan_packs(lengths: Sequence[int], pack_tokens: int) -> list[list[int]]:
    """Assign sequences to packs: first-fit decreasing.

    The longest sequence first, ties by index, each into the first pack with room. This needs at
    most 11/9 of the least number of packs, plus 6/9 (Dosa 2007). Returns the indices of each pack
    in ascending order; every index occurs once. ``UserError`` if a sequence is longer than a pack.
    """
    sizes = np.asarray(lengths, dtype=np.int64).reshape(-1)
    if sizes.size and sizes.max() > pack_tokens:
        raise UserError(
            f"sequence {int(sizes.argmax())} of {int(sizes.max())} tokens; "
            f"a pack holds {pack_tokens}; "
            "raise data.pack_tokens or shorten the sequences"
        )
    room = np.full(len(sizes), pack_tokens, dtype=np.int64)  # most packs that could be needed
    packs: list[list[int]] = []
    for index in np.argsort(-sizes, kind="stable").tolist():
        place = int(np.argmax(room >= sizes[index]))
        if place == len(packs):
            packs.append([])
        packs[place].append(index)
        room[place] -= sizes[index]
    return [sorted(pack) for pack in packs]


def pack_samples(
    samples: Sequence[Sample],
    pack_tokens: int,
    num_packs: int | None = None,
    *,
    vocab_size: int,
    with_rollout_logprobs: bool | None = None,
    sequence_multiple: int = 1,
    routing: Routing | None = None,
) -> list[Pack]:
    """Packs of T = ``pack_tokens`` tokens by the plan of ``plan_packs``, followed by empty packs up
    to ``num_packs``. Each sequence takes a multiple of ``sequence_multiple`` tokens, the last of
    them padding.

    Padding holds the token ids t mod ``vocab_size`` at position t: one id everywhere would send all
    padding of an MoE model to the same experts. ``with_rollout_logprobs``: whether packs hold them;
    None: as the samples do (an empty list of samples cannot tell). ``routing``: the packs hold the
    sampler's experts of these layers. ValueError: more packs than ``num_packs``, or samples without
    the requested values.
    """
    if with_rollout_logprobs is None:
        with_rollout_logprobs = any(sample.rollout_logprobs is not None for sample in samples)
    for index, sample in enumerate(samples):
        _check_sample(index, sample, with_rollout_logprobs)
        if routing is not None:
            _check_routes(index, sample, routing)
    plan = plan_packs(
        [round_up(len(sample.tokens), sequence_multiple) for sample in samples], pack_tokens
    )
    if num_packs is not None:
        if len(plan) > num_packs:
            raise ValueError(f"{len(plan)} packs are needed, num_packs is {num_packs}")
        plan += [[] for _ in range(num_packs - len(plan))]
    return [
        _build_pack(
            [samples[index] for index in members],
            pack_tokens,
            vocab_size,
            with_rollout_logprobs,
            sequence_multiple,
            routing,
        )
        for members in plan
    ]


def _build_pack(
    samples: Sequence[Sample],
    pack_tokens: int,
    vocab_size: int,
    with_rollout_logprobs: bool,
    sequence_multiple: int,
    routing: Routing | None,
) -> Pack:
    """One pack. Position t of a sequence predicts its token t + 1; its last position predicts
    nothing.
    """
    tokens = np.arange(pack_tokens, dtype=np.int64) % vocab_size
    targets = np.zeros(pack_tokens, dtype=np.int64)
    positions = np.zeros(pack_tokens, dtype=np.int64)
    mask = np.zeros(pack_tokens, dtype=bool)
    sequence_ids = np.full(pack_tokens, len(samples), dtype=np.int64)
    advantages = np.zeros(pack_tokens, dtype=np.float32)
    logprobs = np.zeros(pack_tokens, dtype=np.float32) if with_rollout_logprobs else None
    start = 0
    for number, sample in enumerate(samples):
        stop = start + len(sample.tokens)
        tokens[start:stop] = sample.tokens
        targets[start : stop - 1] = sample.tokens[1:]
        positions[start:stop] = np.arange(stop - start)
        sequence_ids[start:stop] = number
        advantages[start:stop] = sample.advantage
        mask[start : stop - 1] = sample.trained
        if logprobs is not None:
            assert sample.rollout_logprobs is not None, "all samples have them, or none"
            known = np.where(sample.trained, sample.rollout_logprobs[1:], 0.0)
            logprobs[start : stop - 1] = known
        start = round_up(stop, sequence_multiple)
    lengths = tuple(len(sample.tokens) for sample in samples)
    return Pack(
        tokens,
        targets,
        positions,
        mask,
        sequence_ids,
        lengths,
        advantages,
        logprobs,
        sequence_multiple,
        _build_routes(samples, pack_tokens, sequence_multiple, routing),
    )


def _build_routes(
    samples: Sequence[Sample],
    pack_tokens: int,
    sequence_multiple: int,
    routing: Routing | None,
) -> RoutedExperts | None:
    """The sampler's experts in a pack's row.

    The sampler gives no experts for the last token of a sequence, so it takes those of the token
    before it: it predicts nothing, and the load that the expert bias follows is the same in any
    pack. Any other token without experts of the sampler is not ``known``: its routers choose for
    themselves. Padding at place t takes the experts t K, t K + 1... mod E: they differ, as
    Megatron's dispatchers need, and cover all experts.
    """
    if routing is None:
        return None
    first = np.arange(pack_tokens)[:, None] * routing.top_k + np.arange(routing.top_k)
    filler = (first % routing.num_experts).astype(id_type(routing.num_experts))
    ids = np.repeat(filler[:, None], len(routing.layers), axis=1)
    known = np.ones(pack_tokens, dtype=bool)
    start = 0
    for sample in samples:
        routed, length = sample.routed_experts, len(sample.tokens)
        assert routed is not None, "all samples of a pack with routes have them"
        columns = [routed.layers.index(layer) for layer in routing.layers]
        sure = _known(routed, length)
        ids[start : start + length][sure] = routed.ids[:, columns][sure[: len(routed.ids)]]
        if length > 1 and sure[-2] and not sure[-1]:
            ids[start + length - 1] = ids[start + length - 2]
            sure[-1] = True
        known[start : start + length] = sure
        start = round_up(start + length, sequence_multiple)
    return RoutedExperts(ids, routing.layers, None if known.all() else known)


def _known(routed: RoutedExperts, length: int) -> np.ndarray:
    """Whether the sampler gives the experts of each token of a sequence, bool [length]."""
    known = np.zeros(length, dtype=bool)
    known[: len(routed.ids)] = True if routed.known is None else routed.known
    return known


def _check_sample(index: int, sample: Sample, with_rollout_logprobs: bool) -> None:
    length = len(sample.tokens)
    if not length:
        raise ValueError(f"sample {index} has no tokens; expected at least one")
    if sample.written.shape != (length,) or sample.written.dtype != np.bool_:
        raise ValueError(
            f"sample {index}: what the policy wrote is {sample.written.dtype} of shape "
            f"{sample.written.shape}; expected bool of the {length} tokens"
        )
    if with_rollout_logprobs:
        if sample.rollout_logprobs is None:
            raise ValueError(f"sample {index} has no rollout log-probabilities")
        if len(sample.rollout_logprobs) != length:
            found = len(sample.rollout_logprobs)
            raise ValueError(
                f"sample {index}: {found} rollout log-probabilities for {length} tokens"
            )
        if np.isnan(sample.rollout_logprobs[1:][sample.trained]).any():
            raise ValueError(
                f"sample {index}: no rollout log-probability of a token that the policy wrote"
            )


def _check_routes(index: int, sample: Sample, routing: Routing) -> None:
    """Check the sampler's experts: of the first tokens, for all requested layers, K different ones
    below E.
    """
    routed = sample.routed_experts
    if routed is None:
        raise ValueError(f"sample {index} has no experts of the sampler")
    missing = sorted(set(routing.layers) - set(routed.layers))
    if missing:
        raise ValueError(f"sample {index} has no experts of the sampler in layers {missing}")
    length, expected = len(sample.tokens), (len(routed.layers), routing.top_k)
    if routed.ids.shape[1:] != expected or len(routed.ids) > length:
        raise ValueError(
            f"sample {index}: the sampler's experts have shape {routed.ids.shape}; expected "
            f"{(length - 1, *expected)}: at most {length} tokens, layers, experts a token"
        )
    if routed.known is None:
        if len(routed.ids) < length - 1:
            raise ValueError(
                f"sample {index}: the sampler's experts are of {len(routed.ids)} tokens; expected "
                f"{length - 1}, or a mask of the known ones"
            )
    elif routed.known.shape != routed.ids.shape[:1] or routed.known.dtype != np.bool_:
        raise ValueError(
            f"sample {index}: the known experts are {routed.known.dtype} of shape "
            f"{routed.known.shape}; expected bool of {len(routed.ids)} tokens"
        )
    ordered = np.sort(routed.ids[_known(routed, length)[: len(routed.ids)]], axis=-1).astype(
        np.int64
    )
    if ordered.size and (ordered.min() < 0 or ordered.max() >= routing.num_experts):
        raise ValueError(
            f"sample {index}: the sampler's experts are {ordered.min()} to {ordered.max()}; "
            f"expected 0 to {routing.num_experts - 1}"
        )
    if (np.diff(ordered, axis=-1) == 0).any():
        raise ValueError(f"sample {index}: the sampler sent a token to one expert twice")


def id_type(num_experts: int) -> type[np.integer]:
    """NumPy's name of the smallest integer type that holds the ids 0..num_experts-1."""
    types: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int16, 4: np.int32}
    return types[expert_id_bytes(num_experts)]

"""Packing: sequences laid one behind the other into micro-batches of a fixed number of tokens.

The last token of a sequence predicts nothing, so it is a target and takes no room.

Shapes: T tokens of a pack, S sequences of a pack, M tokens of one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Sequence

import numpy as np

from megatron_rl.data.packed_kept import check_kept, kept_of_targets
from megatron_rl.data.packed_routes import Routes, Routing, check_routes, sample_routes
from megatron_rl.data.shared_prompts import (
    Tree,
    num_rows,
    plan_trees,
    prompt_length,
    round_up,
    shared_row,
)
from megatron_rl.records import Pack, RoutedExperts, Sample

#: More rows than any batch has.
UNBOUNDED = 1 << 62


class PackPlans:
    """Which samples share a pack, for packs of any length: who shares a prompt is found once."""

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        sequence_multiple: int = 1,
        routing: Routing | None = None,
        share_prompts: bool = False,
    ) -> None:
        """As `pack_samples`."""
        if share_prompts:
            self._groups = groups_of(samples, routing)
        else:
            self._groups = [Tree((index,)) for index in range(len(samples))]
        self._lengths = [sample.num_read for sample in samples]
        self._multiple = sequence_multiple
        self._whole = plan_trees(self._lengths, self._groups, UNBOUNDED, sequence_multiple)
        #: of all trees together, in a pack without bounds: there every group is whole
        self.rows = sum(
            num_rows(tree, self._lengths, sequence_multiple) for of in self._whole for tree in of
        )
        #: of the longest sequence by itself
        self.longest = max((round_up(n, sequence_multiple) for n in self._lengths), default=0)

    def of(self, pack_tokens: int) -> list[list[Tree]]:
        """Assign samples to packs: first-fit decreasing, see `plan_trees`.

        Without shared prompts: the longest sequence first, ties by index, each into the first pack
        with room. This needs at most 11/9 of the least number of packs, plus 6/9 (Dosa 2007). Every
        index occurs once. ``UserError`` if a sequence is longer than a pack.
        """
        if self.rows <= pack_tokens:
            return self._whole
        return plan_trees(self._lengths, self._groups, pack_tokens, self._multiple)


def plan_packs(samples: Sequence[Sample], pack_tokens: int, **options: Any) -> list[list[Tree]]:
    """One plan: `PackPlans.of`, options as of `PackPlans`."""
    return PackPlans(samples, **options).of(pack_tokens)


def groups_of(samples: Sequence[Sample], routing: Routing | None = None) -> list[Tree]:
    """The samples by prompt: what is in front of the first trained token.

    ``routing``: the sampler's experts of the prompt have to be equal too, in these layers; but not
    where they are a router trace, which differs by rounding only.
    """
    groups: dict[object, list[int]] = {}
    for index, sample in enumerate(samples):
        if routing is not None:
            check_routes(index, sample, routing)
        prompt = prompt_length(sample)
        key: object = index  # of its own
        if prompt:
            key = (sample.tokens[:prompt].tobytes(), _prompt_routes(sample, prompt, routing))
        groups.setdefault(key, []).append(index)
    return [Tree(tuple(of), prompt_length(samples[of[0]])) for of in groups.values()]


def _prompt_routes(sample: Sample, prompt: int, routing: Routing | None) -> bytes:
    if routing is None or routing.num_logprobs:
        return b""
    routed, known = sample_routes(sample, routing)
    ids, known = routed.ids[:prompt], known[:prompt]
    return known.tobytes() + ids[known].tobytes()


def pack_samples(
    samples: Sequence[Sample],
    pack_tokens: int,
    num_packs: int | None = None,
    *,
    vocab_size: int,
    with_rollout_logprobs: bool | None = None,
    sequence_multiple: int = 1,
    routing: Routing | None = None,
    share_prompts: bool = False,
    with_kept: bool = True,
    plans: PackPlans | None = None,
) -> list[Pack]:
    """Packs of T = ``pack_tokens`` tokens by the plan of ``plan_packs``, followed by empty packs up
    to ``num_packs``. Each sequence takes a multiple of ``sequence_multiple`` tokens, the last of
    them padding.

    Padding holds the token ids t mod ``vocab_size`` at position t: one id everywhere would send all
    padding of an MoE model to the same experts. ``with_rollout_logprobs``: whether packs hold them;
    None: as the samples do (an empty list of samples cannot tell). ``routing``: the packs hold the
    sampler's experts of these layers. ``share_prompts``: the model runs on ``pack_tokens`` rows, in
    which the sequences of a prompt share it. ``with_kept``: packs hold the samples' kept tokens, if
    they have them. ``plans``: of these samples and options, if they are there already. ValueError:
    more packs than ``num_packs``, or samples without the requested values.
    """
    if with_rollout_logprobs is None:
        with_rollout_logprobs = any(sample.rollout_logprobs is not None for sample in samples)
    with_kept = with_kept and any(sample.kept is not None for sample in samples)
    for index, sample in enumerate(samples):
        _check_sample(index, sample, with_rollout_logprobs)
        if with_kept:
            check_kept(index, sample)
        if routing is not None:
            check_routes(index, sample, routing)
    if plans is None:
        plans = PackPlans(
            samples,
            sequence_multiple=sequence_multiple,
            routing=routing,
            share_prompts=share_prompts,
        )
    plan = list(plans.of(pack_tokens))
    if num_packs is not None:
        if len(plan) > num_packs:
            raise ValueError(f"{len(plan)} packs are needed, num_packs is {num_packs}")
        plan += [[] for _ in range(num_packs - len(plan))]
    layout = _Layout(
        pack_tokens, vocab_size, with_rollout_logprobs, sequence_multiple, routing, with_kept
    )
    return [
        _shared_pack(samples, trees, layout)
        if any(tree.prompt for tree in trees)
        else _build_pack(samples, _members(trees), layout)
        for trees in plan
    ]


def _members(trees: Sequence[Tree]) -> list[int]:
    return [index for tree in trees for index in tree.members]


@dataclass(frozen=True)
class _Layout:
    """What all packs have in common; see `pack_samples`."""

    pack_tokens: int
    vocab_size: int
    with_rollout_logprobs: bool
    sequence_multiple: int
    routing: Routing | None
    with_kept: bool


def _shared_pack(samples: Sequence[Sample], trees: Sequence[Tree], layout: _Layout) -> Pack:
    """A pack in which sequences share prompts."""
    multiple, rows = layout.sequence_multiple, layout.pack_tokens
    row = shared_row(trees, samples, rows, layout.vocab_size, multiple)
    whole = replace(layout, pack_tokens=len(row.places), sequence_multiple=1, routing=None)
    pack = _build_pack(samples, _members(trees), whole)
    routes = None
    if layout.routing is not None:
        routes = Routes(rows, layout.routing)
        start = 0
        for tree in trees:
            for number, index in enumerate(tree.members):
                routed, known = sample_routes(samples[index], layout.routing)
                cut = 0 if number == 0 else tree.prompt
                for part in _split(cut, tree.prompt, len(known)):
                    routes.lay(start, routed, known, part)
                    start += round_up(part.stop - part.start, multiple)
    return replace(
        pack,
        sequence_multiple=multiple,
        routed_experts=None if routes is None else routes.record(),
        shared=row,
    )


def _split(first: int, prompt: int, length: int) -> list[slice]:
    """The segments that a sequence of a tree adds to the row: its prompt if it is the first, and
    what follows.
    """
    return (
        [slice(first, prompt), slice(prompt, length)] if first < prompt else [slice(prompt, length)]
    )


def _build_pack(everything: Sequence[Sample], members: Sequence[int], layout: _Layout) -> Pack:
    """One pack of some samples. Position t of a sequence predicts its token t + 1."""
    samples = [everything[index] for index in members]
    pack_tokens, sequence_multiple = layout.pack_tokens, layout.sequence_multiple
    tokens = np.arange(pack_tokens, dtype=np.int64) % layout.vocab_size
    targets = np.zeros(pack_tokens, dtype=np.int64)
    positions = np.zeros(pack_tokens, dtype=np.int64)
    mask = np.zeros(pack_tokens, dtype=bool)
    sequence_ids = np.full(pack_tokens, len(samples), dtype=np.int64)
    advantages = np.zeros(pack_tokens, dtype=np.float32)
    logprobs = np.zeros(pack_tokens, dtype=np.float32) if layout.with_rollout_logprobs else None
    start = 0
    for number, sample in enumerate(samples):
        stop = start + sample.num_read
        predicts = slice(start, start + len(sample.tokens) - 1)  # a single token predicts nothing
        tokens[start:stop] = sample.tokens[: sample.num_read]
        targets[predicts] = sample.tokens[1:]
        positions[start:stop] = np.arange(stop - start)
        sequence_ids[start:stop] = number
        advantages[start:stop] = sample.advantage
        mask[predicts] = sample.trained
        if logprobs is not None:
            assert sample.rollout_logprobs is not None, "all samples have them, or none"
            logprobs[predicts] = np.where(sample.trained, sample.rollout_logprobs[1:], 0.0)
        start = round_up(stop, sequence_multiple)
    lengths = tuple(sample.num_read for sample in samples)
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
        _build_routes(samples, layout),
        members=tuple(members),
        kept=kept_of_targets(samples, mask) if layout.with_kept else None,
    )


def _build_routes(samples: Sequence[Sample], layout: _Layout) -> RoutedExperts | None:
    """The sampler's experts in the row of a pack of whole sequences."""
    if layout.routing is None:
        return None
    routes, start = Routes(layout.pack_tokens, layout.routing), 0
    for sample in samples:
        routes.lay(start, *sample_routes(sample, layout.routing))
        start = round_up(start + sample.num_read, layout.sequence_multiple)
    return routes.record()


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

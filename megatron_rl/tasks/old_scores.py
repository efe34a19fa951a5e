"""The old policy's log-probabilities and router traces: by a scoring pass, or by the sampler."""

from __future__ import annotations

from dataclasses import replace
from typing import Sequence

import torch

from megatron_rl.algorithms.kl import k3
from megatron_rl.config.algorithm import keeps_trace
from megatron_rl.config.scores import takes_sampler_scores, takes_sampler_traces
from megatron_rl.observe.metrics import MetricSums
from megatron_rl.parallel.collectives import all_max
from megatron_rl.policy.batch import PackTensors
from megatron_rl.policy.finite_checks import not_finite, raise_together
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.sampler_scores import TOLERANCE, Agreement, compare_scores, take_scores
from megatron_rl.policy.score import ScoredPack, score
from megatron_rl.records import Sample
from megatron_rl.tasks.task_session import TaskSession


class OldScores:
    """Scores packs. What the sampler gives is compared with the pass of every step's first update,
    and not used in a step where the two differ.
    """

    def __init__(self, session: TaskSession, policy: Policy) -> None:
        self._session, self._policy = session, policy
        self._takes = takes_sampler_scores(session.config)
        self.wants_traces = takes_sampler_traces(session.config)  #: of the sampler
        self._warned = False

    def given(self, samples: Sequence[Sample]) -> bool:
        """Whether the sampler has scored the samples of all ranks. A collective if it should."""
        if not self._takes:
            return False
        missing = self.wants_traces and any(
            sample.routed_experts is None or sample.routed_experts.logprobs is None
            for sample in samples
        )
        session = self._session
        if all_max(int(missing), session.groups.world, session.device.torch_device):
            self._warn("answers are decoded through Megatron's modules, which give no router trace")
            return False
        return True

    def of(
        self, mini_batches: Sequence[Sequence[PackTensors]], sums: MetricSums, *, given: bool
    ) -> list[ScoredPack]:
        """Score the packs of some mini-batches. A collective.

        Args:
            mini_batches: packs.
            sums: receives ``mismatch/`` metrics, of packs that a pass has scored.
            given: the sampler has scored them, see `given`; `checked` has to follow.
        """
        packs = [pack for mini_batch in mini_batches for pack in mini_batch]
        if not given:
            return self._pass(packs, sums)
        traces = keeps_trace(self._session.config.algorithm)
        return take_scores(self._policy, packs, with_traces=traces)

    def checked(
        self, first: Sequence[ScoredPack], taken: Sequence[ScoredPack], sums: MetricSums
    ) -> list[ScoredPack]:
        """The packs that the sampler has scored, or the same scored by a pass if it differs from
        what the first update's own pass has left. Before that update changes the weights. A
        collective.

        Args:
            first: packs of the first update, after its pass.
            taken: those of the others.
            sums: receives ``mismatch/`` metrics.
        """
        traces = keeps_trace(self._session.config.algorithm)
        theirs = take_scores(self._policy, [item.pack for item in first], with_traces=traces)
        agreement = compare_scores(self._policy, first, theirs)
        _add_agreement(agreement, sums)
        if agreement.agrees:
            return list(taken)
        self._warn(_disagreement(agreement))
        scored = self._pass([item.pack for item in taken], sums)
        return [
            replace(item, old_logprobs=new.old_logprobs, traces=new.traces)
            for item, new in zip(taken, scored, strict=True)
        ]

    def _pass(self, packs: Sequence[PackTensors], sums: MetricSums) -> list[ScoredPack]:
        traces = keeps_trace(self._session.config.algorithm)
        scored = score(self._policy, packs, with_traces=traces)
        for item in scored:
            add_mismatch(item, sums)
        session = self._session
        raise_together(_bad_score(scored), session.groups.world, session.device.torch_device)
        return scored

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._session.console.warn(f"scored by a pass, not by the sampler: {reason}")
        self._warned = True


def add_mismatch(item: ScoredPack, sums: MetricSums) -> None:
    """Add metrics of the difference between the sampler's log-probabilities and the scoring
    pass's.
    """
    if item.old_logprobs is None or item.pack.rollout_logprobs is None:
        return
    mask = item.pack.mask
    difference = torch.where(mask, item.old_logprobs - item.pack.rollout_logprobs, 0.0)
    estimate = k3(torch.zeros_like(difference), difference)
    sums.add("mismatch/kl", estimate.sum(), mask.sum())
    sums.add("mismatch/logprob_max", difference.abs().max(), mask.sum())


def _add_agreement(agreement: Agreement, sums: MetricSums) -> None:
    if agreement.choices:
        sums.add("mismatch/router_logprob_max", agreement.router_max, agreement.choices)
        sums.add("mismatch/router_flips", agreement.flips, agreement.choices)


def _disagreement(agreement: Agreement) -> str:
    """What differs, for a warning."""
    return (
        f"{agreement.tokens_off:,} of {agreement.tokens:,} log-probabilities and "
        f"{agreement.choices_off:,} of {agreement.choices:,} routers' choices differ by more than "
        f"{TOLERANCE:g} nat (at most {agreement.logprob_max:.2g} and {agreement.router_max:.2g}, "
        f"{agreement.flips:,} other experts)"
    )


def _bad_score(scored: Sequence[ScoredPack]) -> str | None:
    """Describe a log-probability of the scoring pass that is not finite; None: all are finite."""
    here = [(one.old_logprobs, one.pack.mask) for one in scored if one.old_logprobs is not None]
    return not_finite(
        "the scoring pass's log-probability",
        [logprobs for logprobs, _ in here],
        [mask for _, mask in here],
    )

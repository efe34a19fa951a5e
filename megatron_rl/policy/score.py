"""The scoring pass: log-probabilities and router traces of the old policy."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any, Callable, Sequence

import torch

from megatron_rl.policy.batch import PackTensors
from megatron_rl.policy.pass_over_pack import forward_pack, pack_values
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.schedule import run_schedule
from megatron_rl.router.trace import LayerTrace, RouterTrace


@dataclass
class OwnPass:
    """What the forward pass of an update leaves of a pack that no scoring pass has seen.

    The weights have not changed since the answers' step began, so that pass is the old policy's:
    its log-probabilities and routers' choices, detached, are what scoring would give.
    """

    traces: tuple[dict[int, LayerTrace], ...]  #: one per model chunk of this rank, filled by it
    logprobs: torch.Tensor | None = None  #: fp32 [T], on stages that compute the loss


@dataclass(frozen=True)
class ScoredPack:
    """A pack with results of the scoring pass: log-probabilities of the whole row, and traces of
    the tokens that this rank's routers saw. One that is not scored yet has ``own`` instead.
    """

    pack: PackTensors
    old_logprobs: torch.Tensor | None  #: fp32 [T]; None on stages that do not compute the loss
    traces: tuple[RouterTrace, ...]  #: one per model chunk of this rank; empty without router shift
    ref_logprobs: torch.Tensor | None = None  #: fp32 [T]; None without a reference policy
    own: OwnPass | None = None  #: None: it is scored

    def old_policy(self, logprobs: torch.Tensor) -> torch.Tensor:
        """The old policy's log-probabilities [T]: ``logprobs`` of the update's own pass, detached,
        where the pack is not scored.
        """
        if self.own is None:
            assert self.old_logprobs is not None, "scored where the loss is computed"
            return self.old_logprobs
        self.own.logprobs = logprobs.detach()
        return self.own.logprobs

    def after_update(self) -> ScoredPack:
        """The pack, scored: by the update's own pass, if it was not before."""
        if self.own is None:
            return self
        traces = self.own.traces
        return replace(self, old_logprobs=self.own.logprobs, traces=traces, own=None)


def unscored(
    policy: Policy, packs: Sequence[PackTensors], *, with_traces: bool
) -> list[ScoredPack]:
    """Packs of the first update after scoring, which leaves their scores itself; see `OwnPass`."""

    def own() -> OwnPass:
        return OwnPass(tuple({} for _ in policy.chunks) if with_traces else ())

    return [ScoredPack(pack, None, (), own=own()) for pack in packs]


@torch.no_grad()
def score(policy: Policy, packs: Sequence[PackTensors], *, with_traces: bool) -> list[ScoredPack]:
    """Run every pack once without gradients. The trace stays on the rank that made it. A collective
    if there is a pack.

    If a trace is needed, packs with routes (R3) are scored with the sampler's experts: then the
    trace, and so the update, uses these experts.
    """
    traces: list[list[RouterTrace]] = [[] for _ in policy.chunks]
    temperature = policy.config.rollout.temperature
    store = policy.config.algorithm.trace_store

    def forward_step(chunk: int, model: Any, index: int) -> tuple[Any, Callable[..., Any]]:
        pack = packs[index]
        if with_traces:
            routes = sampled_routes(policy, chunk, pack)
            with routes, policy.capture.record(chunk, store) as trace:
                output = forward_pack(model, pack)
            traces[chunk].append(trace)
        else:
            output = forward_pack(model, pack)

        def keep(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            values = pack_values(policy, hidden, pack, temperature)
            return torch.zeros((), device=hidden.device), values.logprobs

        return output, keep

    logprobs = run_schedule(policy, packs, forward_step, forward_only=True) if packs else []
    if policy.replay is not None:
        policy.replay.finish()
    return [
        ScoredPack(
            pack,
            logprobs[i] if logprobs else None,
            tuple(chunk[i] for chunk in traces) if with_traces else (),
        )
        for i, pack in enumerate(packs)
    ]


def sampled_routes(
    policy: Policy, chunk: int, pack: PackTensors
) -> contextlib.AbstractContextManager[None]:
    """A context in which the chunk's routers use the sampler's experts, if the pack has them
    (R3).
    """
    if pack.routes is None or policy.replay is None:
        return contextlib.nullcontext()
    device = policy.device.torch_device
    routes = {
        layer: pack.routes[layer].to(device, non_blocking=True)
        for layer in policy.capture.layers_of(chunk)
    }
    known = pack.routes_known
    return policy.replay.routes(
        chunk, routes, None if known is None else known.to(device, non_blocking=True)
    )


def score_reference(policy: Policy, scored: Sequence[ScoredPack]) -> list[ScoredPack]:
    """Add the reference policy's log-probabilities to the packs, from a second pass in which its
    routers choose their own experts.
    """
    assert policy.reference is not None, "asked for where there is one"
    with policy.reference.in_place():
        reference = score(policy, [item.pack for item in scored], with_traces=False)
    return [
        replace(item, ref_logprobs=other.old_logprobs) for item, other in zip(scored, reference)
    ]

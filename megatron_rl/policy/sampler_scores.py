"""The sampler's numbers in place of a scoring pass, and how far they are from one.

Where the built-in engine computes in fp32 with the weights that the update begins with, its
log-probabilities and its routers' are those of a scoring pass but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
import torch.distributed as dist

from megatron_rl.parallel.collectives import all_reduce
from megatron_rl.parallel.sequence_shards import tensor_slice
from megatron_rl.policy.batch import PackTensors
from megatron_rl.policy.policy import Policy
from megatron_rl.policy.score import ScoredPack
from megatron_rl.router.trace import LayerTrace

#: Largest difference of a log-probability, nats. In fp32 1e-5 is usual.
TOLERANCE = 1e-4
#: Share of the tokens, or of the routers' choices, that may be further off because a router had two
#: experts that were as good: it, the layers above and later tokens then compute something else.
RARE = 0.01


@dataclass(frozen=True)
class Agreement:
    """The sampler's numbers against a scoring pass, over some packs of all ranks: of tokens that
    are trained on, and of the rows that predict them in each layer.
    """

    logprob_max: float  #: largest difference of a token's log-probability, nats
    router_max: float  #: largest of the routers', where both chose the same experts, nats
    tokens: int
    tokens_off: int  #: further off than `TOLERANCE`
    choices: int  #: rows x layers
    choices_off: int  #: other experts, or further off than `TOLERANCE`
    flips: int  #: of these with other experts

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the differences."""
        if self.tokens_off > RARE * self.tokens or self.choices_off > RARE * self.choices:
            return False
        return self.flips > 0 or max(self.logprob_max, self.router_max) <= TOLERANCE


def take_scores(
    policy: Policy, packs: Sequence[PackTensors], *, with_traces: bool
) -> list[ScoredPack]:
    """The packs, scored by the sampler: outside the tokens trained on the log-probabilities are 0,
    and so are those of padding's routers.
    """
    pipeline = policy.groups.pipeline
    computes_loss = pipeline.rank() == pipeline.size() - 1

    def traces(pack: PackTensors) -> tuple[dict[int, LayerTrace], ...]:
        assert pack.trace is not None, "the packs hold the sampler's traces"
        of_chunks = [policy.capture.layers_of(chunk) for chunk in range(len(policy.chunks))]
        return tuple({layer: pack.trace[layer] for layer in layers} for layers in of_chunks)

    return [
        ScoredPack(
            pack,
            pack.rollout_logprobs if computes_loss else None,
            traces(pack) if with_traces else (),
        )
        for pack in packs
    ]


@torch.no_grad()
def compare_scores(
    policy: Policy, scored: Sequence[ScoredPack], taken: Sequence[ScoredPack]
) -> Agreement:
    """Compare packs scored by a pass with the same packs scored by the sampler. A collective of all
    ranks.
    """
    device = policy.device.torch_device
    largest = torch.zeros(2, dtype=torch.float64, device=device)
    counts = torch.zeros(5, dtype=torch.float64, device=device)
    for by_pass, by_sampler in zip(scored, taken, strict=True):
        pack = by_pass.pack
        if by_pass.old_logprobs is not None and by_sampler.old_logprobs is not None:
            off = _difference(by_pass.old_logprobs, by_sampler.old_logprobs)[pack.mask]
            largest[0] = torch.maximum(largest[0], off.amax() if len(off) else off.sum())
            counts[:2] += torch.stack([pack.mask.sum(), (off > TOLERANCE).sum()])
        trained = tensor_slice(pack.trained_rows, policy.groups.tensor) > 0
        for old, new in zip(by_pass.traces, by_sampler.traces, strict=True):
            for layer in old:
                router_max, found = _compare_layer(
                    old[layer].to(device), new[layer].to(device), trained
                )
                largest[1] = torch.maximum(largest[1], router_max)
                counts[2:] += found
    world = policy.groups.world
    logprob_max, router_max = all_reduce(largest, world, dist.ReduceOp.MAX).tolist()
    return Agreement(
        logprob_max, router_max, *(int(count) for count in all_reduce(counts, world).tolist())
    )


def _compare_layer(
    old: LayerTrace, new: LayerTrace, trained: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest difference where the experts are the same, and numbers of rows: all, those off,
    those with other experts.
    """
    same = (old.expert_ids == new.expert_ids).all(dim=1)[trained]
    off = _difference(old.logprobs, new.logprobs).amax(dim=1)[trained]
    off = torch.where(same, off, 0.0)
    wrong = ~same | (off > TOLERANCE)
    return off.sum() if not len(off) else off.amax(), torch.stack(
        [trained.sum(), wrong.sum(), (~same).sum()]
    )


def _difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a - b| in float64, infinite where it is not a number."""
    return (a.double() - b.double()).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))

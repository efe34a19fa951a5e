"""Whether tokens or weights of experts travel between ranks, pass by pass.

With R rows of a rank in a pass, K of E experts a row and matrices of D x F, a rank sends in a layer
of the tokens 2 R K D numbers forward and as many backward, of the weights 3 E D F numbers and as
many gradients in fp32: those to itself do not count. Tokens go in more messages, which follow each
other, and in each layer ranks wait for the one with the busiest experts.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megatron_rl.config.estimate import DTYPE_BYTES, expert_copies_bytes, expert_parameters
from megatron_rl.config.schema import Config, ModelConfig
from megatron_rl.errors import UserError
from megatron_rl.models.expert_weights import ExpertWeights, can_gather
from megatron_rl.models.gpt.chunk import Chunk
from megatron_rl.parallel.groups import Groups

#: Bytes that take as long as a message with the wait for the other rank. Measured with two ranks on
#: a machine and 32 experts, from where both ways cost alike: 1.2 MiB in scoring, 1.8 in updates.
MESSAGE = 2**20


@dataclass(frozen=True)
class ExchangePlan:
    """The fewest rows of a rank in a pass whose weights travel; infinity: tokens always do."""

    update_rows: float = math.inf
    score_rows: float = math.inf

    def text(self) -> str:
        """For the run summary; empty if tokens always travel."""
        if math.isinf(self.update_rows):
            return ""
        if not self.update_rows:
            return "weights travel between ranks, tokens stay"
        return (
            "weights travel between ranks and tokens stay where that is less: in updates of "
            f"{self.update_rows:,.0f} rows of a rank or more, scoring of {self.score_rows:,.0f}"
        )


def exchange_plan(
    config: Config, groups: Groups, device: torch.device, spare: float
) -> ExchangePlan:
    """What ``parallel.expert_exchange`` says. A collective of all ranks if experts are split.

    Args:
        config: the whole configuration.
        groups: process groups.
        device: of the weights.
        spare: bytes that this rank can spare for copies of experts.
    """
    parallel = config.parallel
    if groups.experts.size() == 1 or parallel.expert_exchange == "tokens":
        return ExchangePlan()
    if parallel.expert_exchange == "weights":
        return ExchangePlan(0, 0)
    if device.type != "cpu" or parallel.dispatcher != "alltoall":
        return ExchangePlan()
    lacking = torch.tensor(float(_bytes_needed(config) > spare))
    dist.all_reduce(lacking, op=dist.ReduceOp.MAX, group=groups.world)
    if lacking:
        return ExchangePlan()
    return ExchangePlan(
        _fewest_rows(config, groups, backward=True), _fewest_rows(config, groups, backward=False)
    )


def _fewest_rows(config: Config, groups: Groups, *, backward: bool) -> int:
    """Rows of a rank in a pass from which on weights cost less than tokens."""
    model, element = config.model, DTYPE_BYTES[config.model.dtype]
    ranks, slices = groups.expert.size(), groups.expert_tensor.size()
    # Counts; rows and their weights, to other ranks and then to those of other slices; sums back.
    ways = 3 * (ranks > 1) + 3 * (slices > 1)
    messages = 1 + ways * (1 + backward) - 2 * (1 + backward)  # two matrices of weights
    weights = _matrices(model) * (element + 4 * backward) * (1 - 1 / groups.experts.size())
    row = 2 * model.moe_top_k * model.hidden_size * element * (1 + backward)
    return max(0, math.ceil((weights - messages * MESSAGE) / (row * (slices - 1 / ranks))))


def _matrices(model: ModelConfig) -> int:
    """Parameters of all experts of a layer."""
    return expert_parameters(model) * model.num_experts


def _bytes_needed(config: Config) -> float:
    """Bytes of a rank of the pipeline stage with the most MoE layers."""
    return max(expert_copies_bytes(config, stage) for stage in range(config.parallel.pipeline))


class ExpertExchange:
    """The exchange in the passes of a policy."""

    def __init__(
        self,
        plan: ExchangePlan,
        chunks: Sequence[Chunk],
        wrapped: Sequence[DistributedDataParallel],
        groups: Groups,
    ) -> None:
        """
        Args:
            plan: of `exchange_plan`.
            chunks: this rank's of the model.
            wrapped: the same, wrapped for data parallelism.
            groups: process groups.

        Raises:
            UserError: weights are to travel, and the experts are not ours.
        """
        self.plan = plan
        self._wrapped, self._groups = wrapped, groups
        self._with_gradients = False
        self._weights: ExpertWeights | None = None
        if not math.isinf(plan.update_rows):
            if not can_gather(chunks):
                raise UserError(
                    "found parallel.expert_exchange weights with Transformer Engine's experts or "
                    "dispatcher; expected the local layers; set model.transformer_engine to false "
                    "or parallel.expert_exchange to tokens"
                )
            self._weights = ExpertWeights(chunks, groups)

    @contextlib.contextmanager
    def in_pass(self, packs: int, length: int, *, forward_only: bool) -> Iterator[None]:
        """A pass of the schedule over so many packs of ``length`` rows, over all ranks that share
        them. A collective, where weights travel.
        """
        rows = packs * length / (self._groups.context.size() * self._groups.tensor.size())
        fewest = self.plan.score_rows if forward_only else self.plan.update_rows
        if self._weights is None or rows < fewest:
            yield
            return
        self._with_gradients = not forward_only
        try:
            with self._weights.gathered(0 if forward_only else packs):
                yield
        finally:
            self._with_gradients = False

    def before(self, finalize: Callable[..., None]) -> Callable[..., None]:
        """Megatron's ``finalize_model_grads``, once the gradients are where it expects them."""

        def with_experts(*args: Any, **kwargs: Any) -> None:
            if self._weights is not None and self._with_gradients:
                self._hand_over(self._weights.reduce())
            finalize(*args, **kwargs)

        return with_experts

    def _hand_over(self, weights: Sequence[torch.nn.Parameter]) -> None:
        """Tell the data-parallel wrappers that overlap their sums that these gradients are
        there; else the backward pass does.
        """
        for chunk in self._wrapped:
            if chunk.ddp_config.overlap_grad_reduce:
                for weight in weights:
                    if weight in chunk.param_to_bucket_group:
                        chunk.param_to_bucket_group[weight].register_grad_ready(weight)

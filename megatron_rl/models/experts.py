"""The experts of a MoE layer as two grouped matrix products."""

from __future__ import annotations

import functools
from typing import Any, Callable

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import divide
from torch.autograd.function import once_differentiable

from megatron_rl.models.gated import gate_rows, gated, slope_of_rows

#: Where experts have so many rows on average, a CPU takes one expert after the other.
ROWS_OF_ITS_OWN = 16

#: A mark of parameters that Megatron's data-parallel wrapper holds: nothing reads a gradient of
#: theirs but ``main_grad``, and nothing waits for it before the pass has ended.
GRADIENT_IN_PLACE = "gradient_in_place"

#: Gives the matrices of all experts, [E, 2F, D] and [E, D, F].
AllExperts = Callable[[], tuple[torch.Tensor, torch.Tensor]]


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x [N, in] sorted by expert, weight [E, out, in], offsets int32 [E] (end of each expert's
    rows) -> [N, out].
    """
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public since torch 2.10
    return product(x, weight.transpose(-2, -1), offs=offsets)


def has_grouped_kernel(device: torch.device) -> bool:
    """Whether torch multiplies all experts' matrices in one kernel: from compute capability 9.0 on;
    on older devices it loops over the experts and waits for the device each time.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def moe_submodules(mlp: Any) -> MoESubmodules | None:
    """The parts of a MoE layer that stands in a Megatron spec; None of a dense one.

    A spec holds the layer as a ModuleSpec (0.16) or a functools.partial (0.19).
    """
    holder = mlp.keywords if isinstance(mlp, functools.partial) else vars(mlp)
    found = holder.get("submodules")
    return found if isinstance(found, MoESubmodules) else None


class _ExpertWeight(torch.nn.Module):
    """The weights of one linear layer of all local experts, [E_local, out, in]."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device))


class GroupedExperts(MegatronModule):
    """SwiGLU experts: down(silu(gate(x)) * up(x)), scaled by the token's routing weight.

    The weights are Megatron's grouped experts stacked along a first axis: ``linear_fc1.weight``
    [E_local, 2F / etp, D] (gate above up) and ``linear_fc2.weight`` [E_local, D, F / etp];
    checkpoints use the keys of its other expert modules, so that they are interchangeable.
    """

    all_experts: AllExperts | None = None  #: in place of this rank's (`expert_weights`)

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        inner = divide(config.moe_ffn_hidden_size, self.tp_group.size())
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        make = lambda rows, columns: _ExpertWeight(  # noqa: E731
            (num_local_experts, rows, columns), config.params_dtype, device
        )
        self.linear_fc1 = make(2 * inner, config.hidden_size)
        self.linear_fc2 = make(config.hidden_size, inner)
        for module, axis in ((self.linear_fc1, 1), (self.linear_fc2, 2)):
            # 'allreduce' False: the gradient is reduced over the ranks that hold the same experts,
            # not over all data-parallel ranks. Always, not only with expert parallelism: under
            # tensor parallelism alone Megatron 0.16.1 would else leave these gradients unreduced.
            weight: Any = module.weight  # Megatron's marks are attributes
            weight.allreduce = False
            # Always True, as in Megatron's own experts: else every tensor-parallel rank but the
            # first takes its experts for copies and leaves them out of the gradient norm.
            weight.tensor_model_parallel = True
            weight.partition_dim, weight.partition_stride = axis, 1

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """[N, D] sorted by local expert, int [E_local], weights [N] -> [N, D] and no bias. E where
        there are copies of all experts.
        """
        up, down = (self.all_experts or self._own_experts)()
        x = permuted_local_hidden_states
        return expert_outputs(x, up, down, tokens_per_expert, permuted_probs), None

    def _own_experts(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear_fc1.weight, self.linear_fc2.weight

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Shards of the global [E, 2F, D] and [E, D, F] under the keys of Megatron's other expert
        modules.
        """
        return {
            f"{prefix}linear_fc1.weight": _gated_shards(
                f"{prefix}experts.linear_fc1.weight", self, sharded_offsets
            ),
            f"{prefix}linear_fc2.weight": _shard(
                f"{prefix}experts.linear_fc2.weight",
                self.linear_fc2.weight,
                self,
                sharded_offsets,
                (2, self.tp_group.rank(), self.tp_group.size()),
            ),
        }


def expert_outputs(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    counts: torch.Tensor,
    probs: torch.Tensor,
) -> torch.Tensor:
    """What SwiGLU experts make of their rows: probs * down(silu(gate(x)) * up(x)).

    Args:
        x: [N, D], sorted by expert.
        up: [E, 2F, D], gate before up. down: [E, D, F].
        counts: int [E], rows of each expert.
        probs: [N].

    Returns:
        [N, D].
    """
    if x.device.type == "cpu" and len(x) >= ROWS_OF_ITS_OWN * len(up):
        return _OneByOne.apply(x, up, down, probs, counts.tolist())
    offsets = counts.to(x.device, non_blocking=True).cumsum(0).to(torch.int32)
    return grouped_mm(gated(grouped_mm(x, up, offsets), probs), down, offsets)


class _OneByOne(torch.autograd.Function):
    """One expert after the other: what is made of its rows stays in the cache until the second
    product, and is made again on the way back.

    With x the rows of an expert, h = x A^T, u = silu(gate) * up of h, w the weights and g the
    gradient of y = (w u) B^T:

        d B = g^T (w u),    d (w u) = g B,    d A = (d h)^T x,    d x = (d h) A

    Where a weight's gradient is only to be added to its ``main_grad`` (`GRADIENT_IN_PLACE`), the
    products are added there and autograd gets none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        probs: torch.Tensor,
        counts: list[int],
    ) -> torch.Tensor:
        both, output = x.new_empty(len(x), up.shape[1]), x.new_empty(len(x), down.shape[1])
        spare = x.new_empty(max(counts), down.shape[2])
        parts = [tensor.split(counts) for tensor in (x, both, output, probs[:, None])]
        for number, (rows, h, y, weight) in enumerate(zip(*parts, strict=True)):
            inner = spare[: len(y)]
            torch.mm(rows, up[number].t(), out=h)
            gate_rows(h, weight, inner)
            torch.mm(inner, down[number].t(), out=y)
        ctx.save_for_backward(x, up, down, probs, both)
        ctx.counts = counts
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, up, down, probs, both = ctx.saved_tensors
        sums = [_sum_of(tensor) for tensor in (x, up, down, probs)]
        to_x, to_up, to_down, to_probs = results = [
            (tensor.new_empty(tensor.shape) if added is None else added) if needed else None
            for tensor, added, needed in zip((x, up, down, probs), sums, ctx.needs_input_grad)
        ]
        keep_up, keep_down = (float(added is not None) for added in sums[1:3])
        most, width = max(ctx.counts), down.shape[2]
        spare, spare_both = x.new_empty(most, width), x.new_empty(most, 2 * width)
        columns = probs[:, None], None if to_probs is None else to_probs[:, None]
        parts = [
            [None] * len(up) if tensor is None else tensor.split(ctx.counts)
            for tensor in (x, both, grad, to_x, *columns)
        ]
        for number, (rows, h, g, to_rows, weight, to_weight) in enumerate(zip(*parts, strict=True)):
            to_inner, to_h = spare[: len(g)], spare_both[: len(g)]
            torch.mm(g, down[number], out=to_inner)
            product = slope_of_rows(h, weight, to_inner, to_h, to_weight)
            if to_down is not None:
                to_down[number].addmm_(g.t(), product.mul_(weight), beta=keep_down)
            if to_up is not None:
                to_up[number].addmm_(to_h.t(), rows, beta=keep_up)
            if to_rows is not None:
                torch.mm(to_h, up[number], out=to_rows)
        return *(g if s is None else None for g, s in zip(results, sums, strict=True)), None


def _sum_of(weight: Any) -> torch.Tensor | None:
    """What the gradient of a weight may be added to in the backward pass; None: nothing."""
    main: torch.Tensor | None = getattr(weight, "main_grad", None)
    if main is None or not getattr(weight, GRADIENT_IN_PLACE, False) or main.dtype != weight.dtype:
        return None
    return main


def _shard(
    key: str,
    tensor: torch.Tensor,
    experts: GroupedExperts,
    sharded_offsets: tuple[Any, ...],
    tensor_offset: tuple[int, int, int],
) -> ShardedTensor:
    """This rank's part of a global tensor: its experts on axis 0, its tensor-parallel slice on
    another.
    """
    leading = len(sharded_offsets)
    axis, rank, size = tensor_offset
    return ShardedTensor.from_rank_offsets(
        key,
        tensor,
        *sharded_offsets,
        (leading, experts.ep_group.rank(), experts.ep_group.size()),
        (leading + axis, rank, size),
        replica_id=(0, 0, experts.dp_group.rank()),
        prepend_axis_num=leading,
    )


def _gated_shards(
    key: str, experts: GroupedExperts, sharded_offsets: tuple[Any, ...]
) -> ShardedTensorFactory:
    """Gate and up are each split over the tensor-parallel ranks, so a rank holds two slices of the
    global axis.
    """
    rank, size = experts.tp_group.rank(), experts.tp_group.size()

    @torch.no_grad()
    def build(
        key: str, tensor: torch.Tensor, replica_id: Any, flattened_range: Any = None
    ) -> list[ShardedTensor]:
        return [
            _shard(key, half, experts, sharded_offsets, (1, part * size + rank, 2 * size))
            for part, half in enumerate(tensor.chunk(2, dim=1))
        ]

    @torch.no_grad()
    def merge(halves: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(halves, dim=1)

    return ShardedTensorFactory(
        key, experts.linear_fc1.weight, build, merge, (0, 0, experts.dp_group.rank())
    )

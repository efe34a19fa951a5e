"""Synchronisation of the ranks that share experts, while each generates for its own prompts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.parallel.collectives import all_max, all_reduce
from megatron_rl.parallel.groups import Groups


class RankSync:
    """Numbers that the ranks of the expert and expert-tensor groups agree on.

    A MoE layer is a collective of these ranks. So all must run the same number of forward passes,
    with at least one token each. If every rank holds all experts, nothing is sent. All methods but
    the constructor are collectives of these ranks.
    """

    def __init__(
        self,
        groups: Groups,
        config: TransformerConfig,
        device: torch.device,
        *,
        alone: bool = False,
    ) -> None:
        """``alone``: a replica's ranks generate without those that they share experts with."""
        self._model = groups.model
        self._groups = () if alone else (groups.expert, groups.expert_tensor)
        self._device = device
        self._multiple = groups.tensor.size()
        # The all-gather dispatcher gathers whole rows, and with split experts every dispatcher
        # gathers their tokens. gloo can gather only equally many tokens of each rank.
        self._equal = (
            config.moe_token_dispatcher_type == "allgather" or groups.expert_tensor.size() > 1
        )

    def most(self, value: int) -> int:
        """The largest ``value`` of all ranks."""
        for group in self._groups:
            if group.size() > 1:
                value = all_max(value, group, self._device)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank that this one generates with, the ranks of its model
        included.
        """
        value = int(flag)
        if self._model.size() > 1:
            value = all_max(value, self._model, self._device)
        return bool(self.most(value))

    def count(self, flags: torch.Tensor) -> tuple[int, int]:
        """How many flags (bool [R]) are set here, and the most on any rank. Waits for the device
        once.
        """
        here = most = flags.sum()
        for group in self._groups:
            most = all_reduce(most, group, dist.ReduceOp.MAX)
        if most is here:  # this rank is alone
            return int(here), int(here)
        return tuple(torch.stack([here, most]).tolist())

    def row_tokens(self, num_tokens: int) -> int:
        """Length of the padded row for ``num_tokens`` tokens.

        It is at least one and a multiple of the tensor-parallel size, since sequence parallelism
        splits the row. It is the same on all ranks if the dispatcher needs that.
        """
        if self._equal:
            num_tokens = self.most(num_tokens)
        return -(-max(num_tokens, 1) // self._multiple) * self._multiple

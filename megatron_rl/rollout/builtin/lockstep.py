"""How ranks that share experts stay in step while each generates for its own prompts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.parallel.collectives import all_max, all_reduce
from megatron_rl.parallel.groups import Groups


class Lockstep:
    """Agreements over the ranks that share experts (the expert and expert-tensor groups).

    A MoE layer is a collective of those ranks: all of them must run the same number of forward
    passes, with at least one token each. Where each rank holds all experts nothing is sent.
    """

    def __init__(self, groups: Groups, config: TransformerConfig, device: torch.device) -> None:
        self._model = groups.model
        self._groups = (groups.expert, groups.expert_tensor)
        self._device = device
        self._multiple = groups.tensor.size()
        # The all-gather dispatcher gathers whole rows; with experts that are split themselves every
        # dispatcher gathers their tokens, which gloo can do only if each rank brings as many.
        self._equal = (
            config.moe_token_dispatcher_type == "allgather" or groups.expert_tensor.size() > 1
        )

    def most(self, value: int) -> int:
        """The largest of the ranks' integers."""
        for group in self._groups:
            if group.size() > 1:
                value = all_max(value, group, self._device)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any of the ranks that generate in step with this one."""
        value = int(flag)
        if self._model.size() > 1:  # what these ranks do alike they also hear alike
            value = all_max(value, self._model, self._device)
        return bool(self.most(value))

    def count(self, flags: torch.Tensor) -> tuple[int, int]:
        """How many flags are set here, and the most on any rank, with one wait for the device."""
        here = most = flags.sum()
        for group in self._groups:
            most = all_reduce(most, group, dist.ReduceOp.MAX)
        if most is here:  # no rank to talk to
            return int(here), int(here)
        return tuple(torch.stack([here, most]).tolist())

    def row_tokens(self, num_tokens: int) -> int:
        """Length of the row for ``num_tokens`` tokens.

        At least one, a multiple of the tensor-parallel size (sequence parallelism splits the row),
        and the same on all ranks where the dispatcher needs that.
        """
        if self._equal:
            num_tokens = self.most(num_tokens)
        return -(-max(num_tokens, 1) // self._multiple) * self._multiple

"""Megatron's top-K router, whose losses and expert counts are over the real tokens of packs."""

from __future__ import annotations

from typing import Any, Iterable

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from megatron_rl.parallel.collectives import all_reduce


class PackRouter(TopKRouter):
    """A router that leaves the padding of packs out of everything it adds up.

    Losses that act on the router go into the gradient as ``loss_scale`` times their sum over
    tokens; the optimizer step divides all gradients by the policy loss's denominator D. With
    ``loss_scale`` D over the number of tokens N of all packs and ranks they are means over tokens,
    whatever D counts. Megatron 0.16.1 itself multiplies by the tokens of a pack, padding included,
    divided by the tensor-parallel size, and so takes D to be that; its expert counts refuse a
    padding mask.

    Where sequences share a prompt, each of its tokens counts once for every one of them (see
    `count_tokens`), so all of these are as without sharing.
    """

    loss_scale: float | torch.Tensor = 1.0
    #: int64 [T_local], how many tokens each stands for, 0 on padding; None: one, 0 on padding
    counts: torch.Tensor | None = None
    _gradients: bool = False  #: whether the last routing was to have gradients

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [T_local, 1, E], padding bool [T, 1] or [T_local, 1] (True is padding) -> weights,
        choice [T_local, E].
        """
        if padding_mask is not None and padding_mask.shape[0] != logits.shape[0]:
            # Megatron cuts the mask for sequence parallelism on the first pipeline stage only.
            padding_mask = padding_mask.chunk(self.tp_group.size())[self.tp_group.rank()]
        # Megatron 0.19 sorts the K chosen scores only where gradients are enabled, and so would sum
        # them in another order when scoring than when updating: gamma would not be exactly 1 on the
        # first mini-batch. So they are enabled here, and the losses ask ``_gradients`` instead.
        self._gradients = torch.is_grad_enabled()
        with torch.enable_grad():
            return super().routing(logits, padding_mask=padding_mask, **kwargs)

    def apply_z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attach c * sum_t logsumexp(logits_t)^2 over real tokens (ST-MoE, arXiv 2202.08906, eq.
        5).
        """
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not self.training or not self._gradients:
            return logits
        values = logits.logsumexp(dim=-1).square()
        if self.counts is not None:
            values = values * self.counts
        elif padding_mask is not None:
            values = values * ~padding_mask
        return MoEAuxLossAutoScaler.apply(logits, self.loss_scale * coefficient * values.sum())

    def _apply_aux_loss(
        self, probs: torch.Tensor, scores: torch.Tensor, routing_map: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """Attach c * n * E / (n^2 K) sum_e P_e f_e of the pack (Switch, arXiv 2101.03961, eq. 4,
        times n).

        P_e: sum of the scores, f_e: count of the tokens for expert e, n: real tokens. Scores and
            map are 0 on padding. P_e is this rank's; f_e and n are those of the whole pack, so the
            ranks' losses add up to the pack's.
        """
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if not coefficient or not self._gradients:
            return probs
        if self.counts is not None:
            scores, routing_map = scores * self.counts[:, None], routing_map * self.counts[:, None]
        counts = all_reduce(routing_map.sum(dim=0).to(scores.dtype), self.tp_cp_group)
        num_tokens = (counts.sum() / self.topk).clamp(min=1)
        loss = (scores.sum(dim=0) * counts).sum() * self.num_experts / (num_tokens * self.topk)
        return MoEAuxLossAutoScaler.apply(probs, self.loss_scale * coefficient * loss)

    def _apply_expert_bias(
        self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> None:
        if not self._gradients or not self.enable_expert_bias:
            return
        if self.counts is not None:
            routing_map = routing_map * self.counts[:, None]
        elif padding_mask is not None:
            routing_map = routing_map & ~padding_mask.reshape(-1, 1)
        super()._apply_expert_bias(routing_map)


def count_tokens(
    layer: MoELayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook of Megatron's MoE layers: the padding mask may be token counts as well.

    ``padding_mask``: bool [1, T] or [1, T_local], True is padding; or int64, how many tokens each
    stands for, 0 on padding. The router gets its counts here, since a layer that is recomputed
    comes through here again.
    """
    mask, router = kwargs.get("padding_mask"), layer.router
    router.counts = None
    if mask is None or mask.dtype == torch.bool:
        return args, kwargs
    counts = mask.reshape(-1)
    if len(counts) != len(args[0]):
        # Megatron cuts it for sequence parallelism on the first pipeline stage only.
        counts = counts.chunk(router.tp_group.size())[router.tp_group.rank()]
    router.counts = counts
    return args, {**kwargs, "padding_mask": mask == 0}


def set_router_loss_scale(chunks: Iterable[torch.nn.Module], scale: float | torch.Tensor) -> None:
    """Set the ``loss_scale`` of all routers of these model chunks: a number, or fp32 0-d."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, PackRouter):
                module.loss_scale = scale

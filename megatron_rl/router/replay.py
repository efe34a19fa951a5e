"""Routing replay: routers take given experts instead of their own top-K.

R2 replays in the update what the scoring pass chose; R3 (arXiv 2510.11370) replays in the scoring
pass what the sampler chose, and with the trace of that pass the update follows. The weights of the
experts are made from the live logits, so the router still learns. A balancing loss looks at the
router's own choice, load and expert bias at the replayed one.

Each router has a ``RouterReplay`` of Megatron's (``moe_enable_routing_replay``), which is used
through its instance only: the class-wide list that its static methods work on holds the routers of
every model this process has built. Routers are given by chunk, as to `RouterCapture`, so pipeline
stages and virtual stages need no bookkeeping. The same calls serve Megatron-Core 0.16.1 and 0.19.2.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.router.capture import RouterError


class RouteReplay:
    """The replay of all MoE routers of this rank's chunks."""

    def __init__(self, routers: Sequence[Mapping[int, TopKRouter]]) -> None:
        """
        Args:
            routers: for each model chunk its routers by global layer number, from 1
                (`models.gpt.chunk.routers_of`).

        Raises:
            RouterError: a router was built without replay.
        """
        self._routers = [dict(of_chunk) for of_chunk in routers]
        self._recomputes = [
            any(_recomputes_routers(router.config) for router in of_chunk.values())
            for of_chunk in self._routers
        ]
        for number, router in self._all():
            if router.router_replay is None:
                raise RouterError(
                    f"the router of layer {number} was built without moe_enable_routing_replay"
                )

    @contextlib.contextmanager
    def routes(
        self,
        chunk: int,
        expert_ids: Mapping[int, torch.Tensor],
        known: torch.Tensor | None = None,
    ) -> Iterator[None]:
        """The forward pass of a chunk inside takes these experts.

        Its recomputation takes them again. Megatron keeps them in a queue for each router, because
        both of its schedules run the backward passes of a chunk in the order of its forward passes.
        If nothing will be recomputed, nothing is queued.

        Args:
            chunk: index of the model chunk that runs.
            expert_ids: of each MoE layer of the chunk, by global number from 1: integers
                [T_local, K], all different in a row (padding too: dispatchers count K experts a
                token).
            known: bool [T_local]: where it is False the routers choose for themselves, whatever the
                ids say; None: nowhere. Only in passes without gradients: a recomputation would
                choose once more.

        Raises:
            RouterError: the layers or K are not those of the chunk; or not all tokens are known in
                a pass with gradients.
        """
        routers = self._routers[chunk]
        _check_routes(routers, expert_ids)
        if known is not None and torch.is_grad_enabled():
            raise RouterError("routes of some tokens in a pass with gradients; expected all")
        queued = self._recomputes[chunk] and torch.is_grad_enabled()
        for number, router in routers.items():
            ids, replay = expert_ids[number].long(), router.router_replay
            if queued:
                replay.set_target_indices(ids)
            else:
                replay.target_topk_idx = ids
            replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
            if known is not None:
                replay.get_replay_topk = functools.partial(_where_known, replay, known)
        try:
            yield
        finally:
            for router in routers.values():
                replay = router.router_replay
                replay.target_topk_idx = None
                if known is not None:
                    del replay.get_replay_topk
                if queued:
                    replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
                elif not replay.replay_backward_list:
                    replay.clear_router_replay_action()

    def finish(self) -> None:
        """Let the routers choose for themselves again; call it when the schedule has ended.

        Raises:
            RouterError: a router was not recomputed as often as it ran, so that a recomputation
                may have met the experts of another micro-batch.
        """
        left = {n: len(router.router_replay.replay_backward_list) for n, router in self._all()}
        for _, router in self._all():
            router.router_replay.clear_router_replay_action()
            router.router_replay.clear_indices()
        left = {number: count for number, count in left.items() if count}
        if left:
            raise RouterError(f"routes that no recomputation has taken, by layer: {left}")

    def _all(self) -> list[tuple[int, TopKRouter]]:
        return [numbered for of_chunk in self._routers for numbered in of_chunk.items()]


def _check_routes(routers: Mapping[int, Any], expert_ids: Mapping[int, torch.Tensor]) -> None:
    if set(expert_ids) != set(routers):
        raise RouterError(
            f"routes of layers {sorted(expert_ids)}; expected {sorted(routers)}, "
            "which are the chunk's"
        )
    for number, ids in expert_ids.items():
        if ids.dim() != 2 or ids.shape[1] != routers[number].topk:
            raise RouterError(
                f"layer {number}: routes of shape {tuple(ids.shape)}; expected "
                f"[T_local, {routers[number].topk}]"
            )


def _where_known(
    replay: RouterReplay,
    known: torch.Tensor,
    scores: torch.Tensor,
    topk: int,
    num_groups: int | None = None,
    group_topk: int | None = None,
    default_compute_topk: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Megatron's ``get_replay_topk``: scores [T_local, E] -> scores and ids of K experts a token,
    the replayed ones where they are known, else the largest.
    """
    assert default_compute_topk is not None, "routers call with their own choice"
    _, own = default_compute_topk(scores, topk, num_groups, group_topk)
    ids = torch.where(known[:, None], replay.target_topk_idx.to(own.dtype), own)
    return scores.gather(1, ids), ids


def _recomputes_routers(config: TransformerConfig) -> bool:
    """Whether the backward pass runs the routers again."""
    if config.recompute_granularity == "selective":
        return "moe" in (config.recompute_modules or ())
    return config.recompute_granularity == "full"

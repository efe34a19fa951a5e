"""Records what the routers of a model choose, and measures how far they have moved since.

`RouterCapture` wraps the `routing` method of each router instance, which takes the logits that the
router has just made and returns the weights of its choice. So no router computes its logits for
this, and no value is changed: what a distance costs in the loss comes with the gradient of these
weights. Calls outside an open pass are not recorded; a recomputation of activations during the
backward pass measures the distances again that cost something, for their gradient.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Mapping, Protocol, Sequence

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from megatron_rl.algorithms.distance_rules import DistanceRule, OldTopK
from megatron_rl.router.telemetry import RouterTelemetry
from megatron_rl.router.trace import LayerTrace, RouterTrace, id_dtype


class RouterError(RuntimeError):
    """A router fired never or twice in a pass, was not recomputed as often as it ran, or its tokens
    do not match the trace: the result would be wrong.
    """


class _Observer(Protocol):
    def __call__(
        self, number: int, logits: torch.Tensor, routing_map: torch.Tensor, /
    ) -> torch.Tensor | None:
        """Called with logits [T_local, E] and the choice bool [T_local, E] of one router; what this
        costs, 0-d, in the loss's sum.
        """


@dataclass(frozen=True)
class _Cost:
    """What the distance of a router's tokens costs in the loss's sum."""

    measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  #: logits, choice -> distance
    weights: torch.Tensor
    penalty: torch.Tensor

    def of(self, distance: torch.Tensor) -> torch.Tensor:
        """Distances [T_local] -> 0-d."""
        return self.penalty.to(distance.dtype) * (distance * self.weights).sum()


class RouterCapture:
    """Binds to every MoE router of this rank's chunks; layers are known by their global number."""

    def __init__(
        self,
        routers: Sequence[Mapping[int, TopKRouter]],
        expected_layers: Sequence[Sequence[int]],
        rule: DistanceRule | None = None,
        attached: bool = False,
    ) -> None:
        """
        Args:
            routers: for each model chunk its routers by global layer number, from 1
                (`models.gpt.chunk.routers_of`).
            expected_layers: for each chunk the numbers of the MoE layers it should hold.
            rule: which experts count in a distance, and how much; None: the old top-K alike.
            attached: the distances of `compare` have a gradient, where gradients are enabled.

        Raises:
            RouterError: a chunk holds other routers than expected, or a configuration hides their
                logits.
        """
        self._routers = [dict(of_chunk) for of_chunk in routers]
        self._observer: _Observer | None = None
        self._rule: DistanceRule = rule or OldTopK()
        self._attached = attached
        #: by layer, of the passes that will be recomputed, in their order
        self._later: dict[int, deque[_Cost]] = {}
        for of_chunk, expected in zip(self._routers, expected_layers, strict=True):
            if sorted(of_chunk) != sorted(expected):
                raise RouterError(
                    f"found routers in layers {sorted(of_chunk)}; expected {list(expected)}"
                )
            for number, router in of_chunk.items():
                _refuse_hidden_logits(router)
                self._later[number] = deque()
                router.routing = self._watched(number, router.routing)

    def close(self) -> None:
        """Unwrap the routers."""
        for routers in self._routers:
            for router in routers.values():
                del router.routing

    def finish(self) -> None:
        """Call when a schedule has ended.

        Raises:
            RouterError: a router was not recomputed as often as it ran, so that a cost is missing
                or of another micro-batch.
        """
        left = {number: len(costs) for number, costs in self._later.items() if costs}
        for costs in self._later.values():
            costs.clear()
        if left:
            raise RouterError(f"distances that no recomputation has met, by layer: {left}")

    def _watched(self, number: int, routing: Callable[..., Any]) -> Callable[..., Any]:
        later = self._later[number]

        def watch(logits: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, torch.Tensor]:
            probs, routing_map = routing(logits, *args, **kwargs)
            cost = None
            if self._observer is not None:
                cost = self._observer(number, logits.flatten(0, -2), routing_map)
            elif later and torch.is_grad_enabled():
                again = later.popleft()
                cost = again.of(again.measure(logits.flatten(0, -2), routing_map))
            if cost is not None:
                probs = MoEAuxLossAutoScaler.apply(probs, cost)
            return probs, routing_map

        return watch

    @contextlib.contextmanager
    def _pass(
        self, chunks: Sequence[int], observe: _Observer, attached: bool = False
    ) -> Iterator[None]:
        """Call ``observe`` for each router that fires, without gradients unless ``attached``. At
        the end each router of the chunks must have fired once.
        """
        if self._observer is not None:
            raise RouterError("a pass over the routers is open already")
        fired: list[int] = []

        def count(
            number: int, logits: torch.Tensor, routing_map: torch.Tensor
        ) -> torch.Tensor | None:
            fired.append(number)
            with torch.set_grad_enabled(attached and torch.is_grad_enabled()):
                return observe(number, logits if attached else logits.detach(), routing_map)

        self._observer = count
        try:
            yield
        finally:
            self._observer = None
        expected = list(self.layers_of(*chunks))
        if sorted(fired) != expected:
            raise RouterError(
                f"routers fired in layers {sorted(fired)}; expected each of {expected} once"
            )

    @contextlib.contextmanager
    def record(self, chunk: int, store: str = "device") -> Iterator[RouterTrace]:
        """The forward passes inside fill the yielded trace: the old policy's choice and its
        log-probabilities. ``store``: "device", or "pinned" host memory.
        """
        trace: dict[int, LayerTrace] = {}

        def observe(number: int, logits: torch.Tensor, routing_map: torch.Tensor) -> None:
            layer = self._layer_trace(chunk, number, logits, routing_map)
            trace[number] = layer.pinned() if store == "pinned" else layer

        with self._pass([chunk], observe):
            yield trace

    def _layer_trace(
        self, chunk: int, number: int, logits: torch.Tensor, routing_map: torch.Tensor
    ) -> LayerTrace:
        router = self._routers[chunk][number]
        chosen = _chosen(routing_map, router.topk)
        scored = every_expert(logits) if self._rule.every_expert else chosen
        logprobs = score_logprobs(logits.detach(), scored, router.score_function)
        return LayerTrace(chosen.to(id_dtype(logits.shape[-1])), logprobs)

    @contextlib.contextmanager
    def record_routes(self) -> Iterator[dict[int, torch.Tensor]]:
        """The forward pass through all chunks of this rank inside fills the yielded dict: global
        layer number -> expert ids [T_local, K], ascending, in the smallest integer type.
        """
        routers = {n: router for chunk in self._routers for n, router in chunk.items()}
        routes: dict[int, torch.Tensor] = {}

        def observe(number: int, logits: torch.Tensor, routing_map: torch.Tensor) -> None:
            chosen = _chosen(routing_map, routers[number].topk)
            routes[number] = chosen.to(id_dtype(logits.shape[-1]))

        with self._pass(range(len(self._routers)), observe):
            yield routes

    @property
    def every_expert(self) -> bool:
        """Whether a trace holds the log-probabilities of all experts, not only of the chosen."""
        return self._rule.every_expert

    def layers_of(self, *chunks: int) -> tuple[int, ...]:
        """Global numbers (from 1) of the MoE layers of these chunks, of all if none is named,
        ascending.
        """
        named = chunks or range(len(self._routers))
        return tuple(sorted(number for chunk in named for number in self._routers[chunk]))

    @contextlib.contextmanager
    def compare(
        self,
        chunk: int,
        trace: RouterTrace | None,
        weights: torch.Tensor,
        telemetry: RouterTelemetry | None,
        own: dict[int, LayerTrace] | None = None,
        penalty: torch.Tensor | None = None,
    ) -> Iterator[Callable[[], torch.Tensor]]:
        """Measure how far the routers in the pass inside are from the trace, token by token.

        Args:
            chunk: index of the model chunk that runs.
            trace: of the same tokens, from `record`; None: measure no distance.
            weights: bool or int64 [T_local], how often each token counts.
            telemetry: receives the per-layer sums; None: nothing is counted.
            own: receives the trace of this pass, which the pass is compared with: every distance is
                0. None: compare with ``trace``.
            penalty: 0-d, what a distance costs in the loss's sum each time its token counts. Its
                gradient is added at the routers, see `_cost`, and the distances have none. None:
                nothing is added.

        Yields:
            A function that gives the distance of each MoE layer of this chunk, ascending, fp32
            [L_chunk, T_local]; no layer where there is no trace.
        """
        distances: list[torch.Tensor] = []
        if own is not None:
            penalty = None  # the distance of a pass from itself is 0, at a minimum

        def observe(
            number: int, logits: torch.Tensor, routing_map: torch.Tensor
        ) -> torch.Tensor | None:
            if telemetry is not None:
                telemetry.add_choice(number - 1, weights, _entropy(logits.detach()), routing_map)
            if own is not None:
                own[number] = old = self._layer_trace(chunk, number, logits, routing_map)
            elif trace is not None:
                old = trace[number]
            else:
                return None
            measure = functools.partial(self._distance, chunk, number, old)
            distance = measure(logits, routing_map)
            if telemetry is not None:
                overlap = routing_map.gather(1, old.expert_ids.long()).float().mean(dim=1)
                telemetry.add_shift(number - 1, weights, distance.detach(), overlap)
            distances.append(distance if penalty is None else distance.detach())
            if penalty is None:
                return None
            return self._cost(number, _Cost(measure, weights, penalty), distance)

        def measured() -> torch.Tensor:
            none = torch.zeros(0, len(weights), device=weights.device)
            return torch.stack(distances) if distances else none

        with self._pass([chunk], observe, self._attached or penalty is not None):
            yield measured

    def _cost(self, number: int, cost: _Cost, distance: torch.Tensor) -> torch.Tensor | None:
        """What a router's distance costs, where it has a gradient.

        Of layers that it will recompute Megatron keeps no graph; their recomputation adds the
        gradient. Until then costs wait in a queue for each router: both schedules run the backward
        passes of a chunk in the order of its forward passes, and `finish` sees that all were met.
        """
        if torch.is_grad_enabled():
            return cost.of(distance)
        self._later[number].append(cost)
        return None

    def _distance(
        self,
        chunk: int,
        number: int,
        old: LayerTrace,
        logits: torch.Tensor,
        routing_map: torch.Tensor,
    ) -> torch.Tensor:
        """How far a router is from an old choice: logits, choice [T_local, E] -> fp32 [T_local]."""
        if len(old.expert_ids) != len(logits):
            raise RouterError(
                f"layer {number}: the trace holds {len(old.expert_ids)} tokens, "
                f"the pass {len(logits)}"
            )
        ids = old.expert_ids.long()
        scored = every_expert(logits) if self._rule.every_expert else ids
        new = score_logprobs(logits, scored, self._routers[chunk][number].score_function)
        return self._rule.distance(new, old.logprobs, ids, routing_map)


def score_logprobs(logits: torch.Tensor, ids: torch.Tensor, score_function: str) -> torch.Tensor:
    """log r(e) of the given experts in fp32: logits [T, E], ids int64 [T, K] -> [T, K].

    softmax: over all E experts (not the renormalised dispatch weight). sigmoid: log of the expert's
    own score, without the bias that only steers the choice.
    """
    logits = logits.float()
    picked = logits.gather(1, ids)
    if score_function == "sigmoid":
        return F.logsigmoid(picked)
    return picked - logits.logsumexp(dim=1, keepdim=True)


def every_expert(logits: torch.Tensor) -> torch.Tensor:
    """Ids 0..E-1 for each token: logits [T, E] -> int64 [T, E]."""
    return torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)


def _chosen(routing_map: torch.Tensor, top_k: int) -> torch.Tensor:
    """The K experts of each token, ascending: bool [T, E] -> int64 [T, K]."""
    return routing_map.int().topk(top_k, dim=1).indices.sort(dim=1).values


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of softmax(logits) [T, E] -> [T]."""
    # a CPU is slow to add up rows of few numbers, not columns
    logprobs = logits.float().t().log_softmax(dim=0)
    return -(logprobs.exp() * logprobs).sum(dim=0)


def _refuse_hidden_logits(router: TopKRouter) -> None:
    config = router.config
    if config.moe_router_fusion:
        raise RouterError("moe_router_fusion hides the routing from capture; turn it off")
    if config.moe_expert_capacity_factor is not None:
        raise RouterError(
            "moe_expert_capacity_factor drops tokens, which leaves some with fewer than K experts; "
            "unset it"
        )
    if getattr(config, "cuda_graph_impl", "none") != "none" or getattr(
        config, "enable_cuda_graph", False
    ):
        raise RouterError("CUDA graphs replay the router without calling it; turn them off")

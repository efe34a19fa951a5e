"""The sampler's experts in a pack: those of each token, in this rank's layers.

Shapes: T tokens of a pack, M tokens of one sequence, N of them read, K experts of a token, E of a
layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_rl.config.estimate import expert_id_bytes
from megatron_rl.records import RoutedExperts, Sample


@dataclass(frozen=True)
class Routing:
    """Which of the sampler's experts the packs hold."""

    layers: tuple[int, ...]  #: global numbers (from 1) of this rank's MoE layers
    top_k: int  #: K
    num_experts: int  #: E
    #: log-probabilities of a token and layer that the packs hold as well; 0: none
    num_logprobs: int = 0


class Routes:
    """The sampler's experts in a row.

    Padding at place t takes the experts t K, t K + 1... mod E: they differ, as Megatron's
    dispatchers need, and cover all experts. A token that is not ``known`` has them as well, and its
    routers choose for themselves.
    """

    def __init__(self, num_rows: int, routing: Routing) -> None:
        first = np.arange(num_rows)[:, None] * routing.top_k + np.arange(routing.top_k)
        filler = (first % routing.num_experts).astype(id_type(routing.num_experts))
        self._layers = routing.layers
        self._ids = np.repeat(filler[:, None], len(routing.layers), axis=1)
        self._known = np.ones(num_rows, dtype=bool)
        shape = (num_rows, len(routing.layers), routing.num_logprobs)
        self._logprobs = np.zeros(shape, dtype=np.float32) if routing.num_logprobs else None

    def lay(
        self, start: int, routed: RoutedExperts, known: np.ndarray, part: slice = slice(None)
    ) -> None:
        """Put the tokens ``part`` of a sequence at the rows from ``start`` on; known: bool [N]."""
        known = known[part]
        rows = slice(start, start + len(known))
        self._ids[rows][known] = routed.ids[part][known]
        self._known[rows] = known
        if self._logprobs is not None:
            assert routed.logprobs is not None, "all samples of these packs have them"
            self._logprobs[rows][known] = routed.logprobs[part][known]

    def record(self) -> RoutedExperts:
        """The row's experts."""
        known = None if self._known.all() else self._known
        return RoutedExperts(self._ids, self._layers, known, self._logprobs)


def sample_routes(sample: Sample, routing: Routing) -> tuple[RoutedExperts, np.ndarray]:
    """The sampler's experts of the N tokens of a sequence that are read (`Sample.num_read`), in the
    packs' layers, and which are known, bool [N].
    """
    routed, length = sample.routed_experts, sample.num_read
    assert routed is not None, "all samples of a pack with routes have them"
    columns = [routed.layers.index(layer) for layer in routing.layers]
    known = _known(routed, length)

    def whole(given: np.ndarray) -> np.ndarray:
        array = np.zeros((length, len(columns), given.shape[2]), dtype=given.dtype)
        array[: len(given)] = given[:length, columns]
        return array

    scored = routed.logprobs if routing.num_logprobs else None
    logprobs = None if scored is None else whole(scored)
    return RoutedExperts(whole(routed.ids), routing.layers, logprobs=logprobs), known


def _known(routed: RoutedExperts, length: int) -> np.ndarray:
    """Whether the sampler gives the experts of each of the first ``length`` tokens of a sequence,
    bool [length].
    """
    known = np.zeros(length, dtype=bool)
    known[: len(routed.ids)] = True if routed.known is None else routed.known[:length]
    return known


def check_routes(index: int, sample: Sample, routing: Routing) -> None:
    """Check the sampler's experts: of the first tokens, for all requested layers, K different ones
    below E.
    """
    routed = sample.routed_experts
    if routed is None:
        raise ValueError(f"sample {index} has no experts of the sampler")
    missing = sorted(set(routing.layers) - set(routed.layers))
    if missing:
        raise ValueError(f"sample {index} has no experts of the sampler in layers {missing}")
    length, expected = len(sample.tokens), (len(routed.layers), routing.top_k)
    if routed.ids.shape[1:] != expected or len(routed.ids) > length:
        raise ValueError(
            f"sample {index}: the sampler's experts have shape {routed.ids.shape}; expected "
            f"{(length - 1, *expected)}: at most {length} tokens, layers, experts a token"
        )
    if routed.known is None:
        if len(routed.ids) < length - 1:
            raise ValueError(
                f"sample {index}: the sampler's experts are of {len(routed.ids)} tokens; expected "
                f"{length - 1}, or a mask of the known ones"
            )
    elif routed.known.shape != routed.ids.shape[:1] or routed.known.dtype != np.bool_:
        raise ValueError(
            f"sample {index}: the known experts are {routed.known.dtype} of shape "
            f"{routed.known.shape}; expected bool of {len(routed.ids)} tokens"
        )
    ordered = np.sort(routed.ids[_known(routed, length)[: len(routed.ids)]], axis=-1).astype(
        np.int64
    )
    if ordered.size and (ordered.min() < 0 or ordered.max() >= routing.num_experts):
        raise ValueError(
            f"sample {index}: the sampler's experts are {ordered.min()} to {ordered.max()}; "
            f"expected 0 to {routing.num_experts - 1}"
        )
    if (np.diff(ordered, axis=-1) == 0).any():
        raise ValueError(f"sample {index}: the sampler sent a token to one expert twice")


def id_type(num_experts: int) -> type[np.integer]:
    """NumPy's name of the smallest integer type that holds the ids 0..num_experts-1."""
    types: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int16, 4: np.int32}
    return types[expert_id_bytes(num_experts)]

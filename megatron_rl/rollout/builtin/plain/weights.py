"""The tensors of a model chunk, by what they do: views of its weights, made anew for each rollout.

Legend: D hidden size, G key/value groups and H query heads of this rank, d width of a head, E
experts held here, F inner width of this rank's part of an expert, V rows of the vocabulary held
here. A linear weight is [outputs, inputs].
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Mapping

import torch

from megatron_rl.families.common.names import (
    ATTENTION,
    EMBEDDING,
    EXPERT_BIAS,
    FINAL_NORM,
    OUTPUT,
    ROUTER,
    SHARED_EXPERTS,
    SHARED_GATE,
    layer_of,
    swiglu,
)
from megatron_rl.models.gpt.chunk import Chunk, layer_numbers
from megatron_rl.models.gpt.names import name_in_model

_MLP, _EXPERTS = "mlp", "mlp.experts"

#: Fields of the classes below that are weights of linear layers and experts.
LINEAR = frozenset(
    {"qkv", "out", "query_down", "query", "latent_down", "latent_up", "up", "down"}
)  # fmt: skip
#: A weight of a field's name in place of another.
Change = Callable[[str, torch.Tensor], torch.Tensor]


class UnknownWeight(ValueError):
    """The chunk has a weight that the plain functions do not know, or lacks one they need."""


@dataclass(frozen=True)
class GroupedAttention:
    """Grouped-query attention. Rows of ``qkv`` are, group by group, H / G query heads, the key and
    the value.
    """

    qkv: torch.Tensor  #: [G (H / G + 2) d, D]
    qkv_bias: torch.Tensor | None
    query_norm: torch.Tensor | None  #: [d], or of all heads of all ranks
    key_norm: torch.Tensor | None
    out: torch.Tensor  #: [D, H d]


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    query_down: torch.Tensor | None  #: [query rank, D]; None: queries are not compressed
    query_norm: torch.Tensor | None
    query: torch.Tensor  #: [H (nope + rope), query rank or D]
    latent_down: torch.Tensor  #: [rank + rope, D]
    latent_norm: torch.Tensor  #: [rank]
    latent_up: torch.Tensor  #: [H (nope + value), rank]
    out: torch.Tensor  #: [D, H value]


@dataclass(frozen=True)
class Dense:
    """A SwiGLU MLP."""

    up: torch.Tensor  #: [2F, D], gate above up
    down: torch.Tensor  #: [D, F]


@dataclass(frozen=True)
class Mixture:
    """Experts and their router."""

    router: torch.Tensor  #: [all experts, D]
    bias: torch.Tensor | None  #: fp32 [all experts], added to the scores that choose
    up: torch.Tensor  #: [E, 2F, D]
    down: torch.Tensor  #: [E, D, F]
    first: int  #: number of the first expert held here
    shared: Dense | None
    shared_gate: torch.Tensor | None  #: [1, D]


@dataclass(frozen=True)
class Layer:
    """One transformer layer."""

    number: int  #: in the whole model, from 1
    attention_norm: torch.Tensor  #: [D]
    attention: GroupedAttention | LatentAttention
    mlp_norm: torch.Tensor  #: [D]
    feed_forward: Dense | Mixture


@dataclass(frozen=True)
class ChunkWeights:
    """What a rank's chunk of the model holds."""

    words: torch.Tensor | None  #: [V, D], the embedding; on the first chunk
    layers: tuple[Layer, ...]
    final_norm: torch.Tensor | None  #: [D]; on the last chunk
    head: torch.Tensor | None  #: [V, D]; on the last chunk


def chunk_weights(chunk: Chunk, first_expert: int) -> ChunkWeights:
    """The weights of a chunk, none of them copied.

    Args:
        chunk: bare.
        first_expert: number of the first expert that this rank holds.

    Raises:
        UnknownWeight: the chunk has others than these functions use.
    """
    found = _Found(chunk)
    layers = tuple(
        _layer(number, found.of_layer(number - 1), first_expert) for number in layer_numbers(chunk)
    )
    words, head = found.take(EMBEDDING), found.take(OUTPUT)
    if head is None and chunk.post_process:
        head = found.take(_TIED)
        head = words if head is None else head
    weights = ChunkWeights(words, layers, found.take(FINAL_NORM), head)
    found.all_taken()
    return weights


def mapped(weights: ChunkWeights, change: Change) -> ChunkWeights:
    """The chunk with each of its weights replaced."""
    copy = _mapped(weights, change)
    assert isinstance(copy, ChunkWeights), "a copy of one"
    return copy


def _mapped(part: Any, change: Change) -> Any:
    """A dataclass of weights, those within it included."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, torch.Tensor):
            changed[field.name] = change(field.name, value)
        elif isinstance(value, tuple):
            changed[field.name] = tuple(_mapped(one, change) for one in value)
        elif dataclasses.is_dataclass(value):
            changed[field.name] = _mapped(value, change)
    return dataclasses.replace(part, **changed)


#: The copy of the embedding on a last pipeline stage.
_TIED = "tied " + EMBEDDING


class _Found:
    """The weights that no one has taken yet, by the package's own names."""

    def __init__(self, chunk: Chunk) -> None:
        self._weights: dict[str, torch.Tensor] = {}
        for local, weight in _named(chunk):
            name, tied = name_in_model(local, chunk)
            self._weights[_TIED if tied else name] = weight.detach()

    def take(self, name: str) -> torch.Tensor | None:
        return self._weights.pop(name, None)

    def of_layer(self, layer: int) -> dict[str, torch.Tensor]:
        """Take a layer's weights, by their names within it."""
        named = {name: layer_of(name) for name in self._weights}
        inside = {name: place[1] for name, place in named.items() if place and place[0] == layer}
        return {short: self._weights.pop(name) for name, short in inside.items()}

    def all_taken(self) -> None:
        _nothing_left(self._weights)


def _nothing_left(weights: Mapping[str, torch.Tensor]) -> None:
    if weights:
        raise UnknownWeight(f"it does not know the weight {min(weights)}")


def _named(chunk: Chunk) -> Iterator[tuple[str, torch.Tensor]]:
    yield from chunk.named_parameters()
    persistent = chunk.state_dict(keep_vars=True)
    for name, buffer in chunk.named_buffers():
        if name in persistent:
            yield name, buffer


def _layer(number: int, weights: dict[str, torch.Tensor], first_expert: int) -> Layer:
    of = _OfLayer(number, weights)
    is_latent = _attention("linear_kv_down_proj") in weights
    layer = Layer(
        number=number,
        attention_norm=of.need("input_layernorm.weight"),
        attention=of.latent() if is_latent else of.grouped(),
        mlp_norm=of.need("pre_mlp_layernorm.weight"),
        feed_forward=of.mixture(first_expert) if ROUTER in weights else of.feed_forward(_MLP),
    )
    _nothing_left({f"{name} of layer {number}": weight for name, weight in weights.items()})
    return layer


def _attention(name: str) -> str:
    return f"{ATTENTION}.{name}.weight"


@dataclass(frozen=True)
class _OfLayer:
    """The weights of a layer that no one has taken yet."""

    number: int
    weights: dict[str, torch.Tensor]

    def need(self, name: str) -> torch.Tensor:
        if name not in self.weights:
            raise UnknownWeight(f"layer {self.number} has no weight {name}")
        return self.weights.pop(name)

    def may(self, name: str) -> torch.Tensor | None:
        return self.weights.pop(name, None)

    def feed_forward(self, block: str) -> Dense:
        return Dense(*map(self.need, swiglu(block)))

    def latent(self) -> LatentAttention:
        down = self.may(_attention("linear_q_down_proj"))
        query = "linear_q_proj" if down is None else "linear_q_up_proj"
        return LatentAttention(
            query_down=down,
            query_norm=None if down is None else self.need(_attention("q_layernorm")),
            query=self.need(_attention(query)),
            latent_down=self.need(_attention("linear_kv_down_proj")),
            latent_norm=self.need(_attention("kv_layernorm")),
            latent_up=self.need(_attention("linear_kv_up_proj")),
            out=self.need(_attention("linear_proj")),
        )

    def grouped(self) -> GroupedAttention:
        return GroupedAttention(
            qkv=self.need(_attention("linear_qkv")),
            qkv_bias=self.may(f"{ATTENTION}.linear_qkv.bias"),
            query_norm=self.may(_attention("q_layernorm")),
            key_norm=self.may(_attention("k_layernorm")),
            out=self.need(_attention("linear_proj")),
        )

    def mixture(self, first_expert: int) -> Mixture:
        shared = (
            self.feed_forward(SHARED_EXPERTS) if swiglu(SHARED_EXPERTS)[0] in self.weights else None
        )
        router, bias, gate = self.need(ROUTER), self.may(EXPERT_BIAS), self.may(SHARED_GATE)
        up, down = map(self.need, swiglu(_EXPERTS))
        return Mixture(router, bias, up, down, first_expert, shared, gate)

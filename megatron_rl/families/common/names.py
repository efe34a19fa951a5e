"""The package's own names of weights, whichever class of Megatron-Core holds them.

Rules of families, checkpoints, exports, messages and the seeds of initial weights use these names:
a checkpoint keeps them, so they stay. Layers and experts are counted over the whole model, from 0,
and a norm has a name of its own even where it is fused into the linear layer behind it.
``models/gpt`` turns the names of Megatron-Core's GPTModel, from which they are taken, into them.
"""

from __future__ import annotations

import re

EMBEDDING = "embedding.word_embeddings.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"
#: Those with a row for every token of the vocabulary.
OF_THE_VOCABULARY = (EMBEDDING, OUTPUT)

# Within a layer:
ATTENTION = "self_attention"
ROUTER = "mlp.router.weight"
EXPERT_BIAS = "mlp.router.expert_bias"
EXPERT = "mlp.experts.{expert}"
SHARED_EXPERTS = "mlp.shared_experts"
SHARED_GATE = f"{SHARED_EXPERTS}.gate_weight"

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+")


def in_layer(layer: int, name: str) -> str:
    """The name of a layer's weight: ``decoder.layers.3.mlp.router.weight``."""
    return f"decoder.layers.{layer}.{name}"


def layer_of(name: str) -> tuple[int, str] | None:
    """(layer, name within it); None: the weight is in no layer."""
    found = _LAYER.fullmatch(name)
    return None if found is None else (int(found[1]), found[2])


def expert_of(name: str) -> tuple[int | None, str]:
    """(expert, name with ``{expert}`` for its number); of another weight (None, name)."""
    found = _EXPERT.search(name)
    return (None, name) if found is None else (int(found[0]), _EXPERT.sub("{expert}", name))


def swiglu(block: str) -> tuple[str, str]:
    """The two weights of a SwiGLU MLP: [gate; up] and down."""
    return f"{block}.linear_fc1.weight", f"{block}.linear_fc2.weight"

"""From the names of weights in GPTModel, and in its checkpoints, to the package's own."""

from __future__ import annotations

import re

from megatron_rl.families.common.names import EMBEDDING, EXPERT, OUTPUT
from megatron_rl.models.gpt.chunk import Chunk, layer_numbers

#: Transformer Engine, and checkpoints, keep a norm's weight in the linear layer behind it.
_FUSED_NORMS = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
    ".self_attention.linear_q_up_proj.layer_norm_": ".self_attention.q_layernorm.",
    ".self_attention.linear_kv_up_proj.layer_norm_": ".self_attention.kv_layernorm.",
}
#: A checkpoint holds the experts of a layer as one tensor, stacked along a first axis.
_STACKED = ".mlp.experts.experts."
_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")


def name_in_model(local: str, chunk: Chunk) -> tuple[str, bool]:
    """The package's name of a parameter or buffer of a chunk, but for the numbers of experts; and
    whether it is a copy of the embedding, which serves as output layer.
    """
    numbers = layer_numbers(chunk)
    name = _unfused(_LAYER.sub(lambda found: str(numbers[int(found[0])] - 1), local))
    if name == OUTPUT and chunk.share_embeddings_and_output_weights:
        return EMBEDDING, True
    return name, False


def holds_experts(key: str) -> bool:
    """Whether the tensor of this key in a checkpoint is a stack of all experts of a layer."""
    return _STACKED in key


def name_of_key(key: str, expert: int = 0) -> str:
    """The package's name of the weight of this key in a checkpoint; of a stack that of one of its
    experts.
    """
    return _unfused(key).replace(_STACKED, f".{EXPERT.format(expert=expert)}.")


def _unfused(name: str) -> str:
    for fused, plain in _FUSED_NORMS.items():
        name = name.replace(fused, plain)
    return name

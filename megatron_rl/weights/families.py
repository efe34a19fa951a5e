"""Which Hugging Face tensors each weight of the model is made of: one table a family.

Weights have the names of `models.parameters` (layers and experts counted over the whole model); a
rule gives the names of their parts in a Hugging Face checkpoint, and how they are put together:

    copy      the one part
    gate_up   [gate; up], each [F, D]
    qkv       for each query group its query heads, its key head, its value head

Names in a table are relative to the layer; ``{expert}`` is the expert's number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, Mapping, Sequence

import torch

from megatron_rl.config.layout import heads_of
from megatron_rl.config.schema import ModelConfig
from megatron_rl.errors import UserError

Join = Literal["copy", "gate_up", "qkv"]


@dataclass(frozen=True)
class Rule:
    """How one weight is made of Hugging Face tensors."""

    join: Join
    parts: tuple[str, ...]  #: their names, in order


_TOP = {
    "embedding.word_embeddings.weight": Rule("copy", ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": Rule("copy", ("model.norm.weight",)),
    "output_layer.weight": Rule("copy", ("lm_head.weight",)),
}
_NORMS = {
    "input_layernorm.weight": Rule("copy", ("input_layernorm.weight",)),
    "pre_mlp_layernorm.weight": Rule("copy", ("post_attention_layernorm.weight",)),
}
_OUTPUT = {"self_attention.linear_proj.weight": Rule("copy", ("self_attn.o_proj.weight",))}


def _latent(ours: str, theirs: str) -> dict[str, Rule]:
    return {f"self_attention.{ours}.weight": Rule("copy", (f"self_attn.{theirs}.weight",))}


_LATENT_ATTENTION = {
    **_latent("linear_q_proj", "q_proj"),  # where queries are not compressed
    **_latent("linear_q_down_proj", "q_a_proj"),
    **_latent("q_layernorm", "q_a_layernorm"),
    **_latent("linear_q_up_proj", "q_b_proj"),
    **_latent("linear_kv_down_proj", "kv_a_proj_with_mqa"),
    **_latent("kv_layernorm", "kv_a_layernorm"),
    **_latent("linear_kv_up_proj", "kv_b_proj"),
}


def _attention(parameter: str = "weight") -> dict[str, Rule]:
    parts = tuple(f"self_attn.{x}_proj.{parameter}" for x in "qkv")
    return {f"self_attention.linear_qkv.{parameter}": Rule("qkv", parts)}


def _mlp(
    ours: str, theirs: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, Rule]:
    """A SwiGLU MLP: two matrices of ours, three of theirs."""
    gate, up, down = (f"{theirs}.{name}.weight" for name in names)
    return {
        f"{ours}.linear_fc1.weight": Rule("gate_up", (gate, up)),
        f"{ours}.linear_fc2.weight": Rule("copy", (down,)),
    }


def _experts(block: str = "mlp", **names: Sequence[str]) -> dict[str, Rule]:
    return {
        "mlp.router.weight": Rule("copy", (f"{block}.gate.weight",)),
        **_mlp("mlp.experts.{expert}", f"{block}.experts.{{expert}}", **names),
    }


_QK_NORM = {
    f"self_attention.{x}_layernorm.weight": Rule("copy", (f"self_attn.{x}_norm.weight",))
    for x in "qk"
}
_DENSE = {**_NORMS, **_OUTPUT, **_attention(), **_mlp("mlp", "mlp")}

#: model_type -> weight within a layer -> rule.
FAMILIES: Mapping[str, Mapping[str, Rule]] = {
    "qwen3": {**_DENSE, **_QK_NORM},
    "qwen3_moe": {**_DENSE, **_QK_NORM, **_experts()},
    "qwen2_moe": {
        **_DENSE,
        **_attention("bias"),
        **_experts(),
        **_mlp("mlp.shared_experts", "mlp.shared_expert"),
        "mlp.shared_experts.gate_weight": Rule("copy", ("mlp.shared_expert_gate.weight",)),
    },
    "mixtral": {
        **_NORMS,
        **_OUTPUT,
        **_attention(),
        **_experts("block_sparse_moe", names=("w1", "w3", "w2")),
    },
    "deepseek_v3": {
        **_NORMS,
        **_OUTPUT,
        **_LATENT_ATTENTION,
        **_mlp("mlp", "mlp"),
        **_experts(),
        "mlp.router.expert_bias": Rule("copy", ("mlp.gate.e_score_correction_bias",)),
        **_mlp("mlp.shared_experts", "mlp.shared_experts"),
    },
    "olmoe": {**_NORMS, **_OUTPUT, **_attention(), **_QK_NORM, **_experts()},
}

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+")


def rule_of(name: str, family: str) -> Rule:
    """The rule of a weight, with the full names of its parts.

    Raises:
        UserError: the family has no such weight.
    """
    if name in _TOP:
        return _TOP[name]
    layer = _LAYER.fullmatch(name)
    expert = _EXPERT.search(name)
    within = "" if layer is None else _EXPERT.sub("{expert}", layer[2])
    rule = FAMILIES[family].get(within)
    if rule is None:
        raise UserError(
            f"the model's weight {name} has no counterpart in Hugging Face's {family}; expected a "
            "model that the family describes; see megatron_rl/weights/README.md"
        )
    assert layer is not None, "no rule is for a name without one"
    number = "" if expert is None else expert[0]
    parts = (f"model.layers.{layer[1]}.{part.format(expert=number)}" for part in rule.parts)
    return Rule(rule.join, tuple(parts))


def join(
    rule: Rule,
    parts: Sequence[torch.Tensor],
    model: ModelConfig,
    axis: int | None = None,
    rank: int = 0,
    size: int = 1,
) -> torch.Tensor:
    """A weight, or a slice of it, from its parts: only the part of each part that it needs.

    Args:
        rule: of the weight. parts: whole tensors, in the rule's order; they may be mapped files.
        axis: the axis of the weight that tensor parallelism splits; None: the whole weight.
        rank: which of ``size`` slices.
    """
    if axis is None:
        size, rank, axis = 1, 0, 0
    if rule.join == "copy":
        return parts[0].chunk(size, axis)[rank]
    if rule.join == "gate_up":
        return torch.cat([part.chunk(size, axis)[rank] for part in parts])
    _, groups, _ = heads_of(model)
    mine = [_by_group(part, groups).chunk(size)[rank] for part in parts]
    return torch.cat(mine, dim=1).flatten(0, 1)


def split(rule: Rule, weight: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """The parts of a whole weight, contiguous: the inverse of `join`."""
    if rule.join == "copy":
        return [weight.contiguous()]
    if rule.join == "gate_up":
        return [half.contiguous() for half in weight.chunk(2)]
    _, groups, width = heads_of(model)
    grouped = _by_group(weight, groups)
    queries = grouped.shape[1] - 2 * width
    return [part.flatten(0, 1) for part in grouped.split([queries, width, width], dim=1)]


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; a copy if it is a part of another, which it would keep in memory."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _by_group(part: torch.Tensor, groups: int) -> torch.Tensor:
    """[groups * n, ...] -> [groups, n, ...]."""
    return part.view(groups, len(part) // groups, *part.shape[1:])

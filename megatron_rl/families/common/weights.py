"""Weight rules that families share: our name of a weight in a layer -> its parts."""

from __future__ import annotations

from typing import Sequence

from megatron_rl.families.common.family import Rule
from megatron_rl.families.common.names import ATTENTION, EXPERT, ROUTER, swiglu

SWIGLU = ("gate_proj", "up_proj", "down_proj")


def copies(**names: str) -> dict[str, Rule]:
    """Rules of attention weights that are one tensor: our name -> theirs."""
    return {
        f"{ATTENTION}.{ours}.weight": Rule("copy", (f"self_attn.{theirs}.weight",))
        for ours, theirs in names.items()
    }


def qkv(parameter: str = "weight") -> dict[str, Rule]:
    """Rules of queries, keys and values; ``parameter`` bias: of their biases."""
    parts = tuple(f"self_attn.{x}_proj.{parameter}" for x in "qkv")
    return {f"{ATTENTION}.linear_qkv.{parameter}": Rule("qkv", parts)}


def mlp(ours: str = "mlp", theirs: str = "mlp", names: Sequence[str] = SWIGLU) -> dict[str, Rule]:
    """Rules of a SwiGLU MLP, two matrices of ours, three of theirs: ``names`` of gate, up and
    down.
    """
    gate, up, down = (f"{theirs}.{name}.weight" for name in names)
    gate_up, back = swiglu(ours)
    return {gate_up: Rule("gate_up", (gate, up)), back: Rule("copy", (down,))}


def experts(block: str = "mlp", names: Sequence[str] = SWIGLU) -> dict[str, Rule]:
    """Rules of a router and its experts, below ``block``.

    transformers 5 holds a layer's experts in one tensor and may store it: always below ``mlp``, and
    the router with it.
    """
    gate, up, down = (f"{block}.experts.{{expert}}.{name}.weight" for name in names)
    blocks = dict.fromkeys(("mlp", block))
    renamed = tuple(f"{one}.gate.weight" for one in blocks if one != block)
    gate_up, back = swiglu(EXPERT)
    return {
        ROUTER: Rule("copy", (f"{block}.gate.weight",), renamed),
        gate_up: Rule(
            "gate_up", (gate, up), tuple(f"{one}.experts.gate_up_proj" for one in blocks)
        ),
        back: Rule("copy", (down,), tuple(f"{one}.experts.down_proj" for one in blocks)),
    }


NORMS = {
    "input_layernorm.weight": Rule("copy", ("input_layernorm.weight",)),
    "pre_mlp_layernorm.weight": Rule("copy", ("post_attention_layernorm.weight",)),
}
OUTPUT = copies(linear_proj="o_proj")
QK_NORM = copies(q_layernorm="q_norm", k_layernorm="k_norm")
#: A dense layer of grouped-query attention, without norms of queries and keys.
DENSE = {**NORMS, **OUTPUT, **qkv(), **mlp()}

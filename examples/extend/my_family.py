"""A Hugging Face family: Qwen3-MoE, whose router and number of experts have other names."""

from dataclasses import replace
from typing import Annotated

from megatron_rl.families import qwen3_moe
from megatron_rl.families.common.family import Rule
from megatron_rl.families.common.keys import Count, Spelled


class MyKeys(qwen3_moe.Qwen3MoeKeys):
    num_experts: Annotated[Count, Spelled("n_experts")]


def write(model):
    """The keys of config.json beyond those that families share."""
    values = qwen3_moe.write(model)
    del values["num_local_experts"]
    values["n_experts"] = values.pop("num_experts")
    return values


FAMILY = replace(
    qwen3_moe.FAMILY,
    model_type="my_moe",
    architecture="MyMoeForCausalLM",
    summary="Qwen3-MoE with other names",
    source="",
    keys=MyKeys,
    write=write,
    layer_weights={
        **qwen3_moe.FAMILY.layer_weights,
        "mlp.router.weight": Rule("copy", ("mlp.router.proj.weight",)),
    },
)

"""What is taken from Megatron's GPTModel is there, whichever version it is of, under its names."""

from tests.support.tiny import build_tiny, cpu_device, tiny_config


def test_the_router_of_megatrons_own_specs_can_be_replaced():
    cpu_device()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_rl.models.experts import moe_submodules
    from megatron_rl.models.router import PackRouter

    spec = get_gpt_layer_local_spec(num_experts=4)
    moe = moe_submodules(spec.submodules.mlp)
    assert moe.experts is not None
    moe.router = PackRouter
    assert moe_submodules(spec.submodules.mlp).router is PackRouter
    assert moe_submodules(get_gpt_layer_local_spec().submodules.mlp) is None


LAYERS = {
    0: {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight": "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight": "self_attention.linear_proj.weight",
        "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight": "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight": "mlp.linear_fc2.weight",
    },
    1: {
        "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight": "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight": "self_attention.linear_proj.weight",
        "pre_mlp_layernorm.weight": "pre_mlp_layernorm.weight",
        "mlp.router.weight": "mlp.router.weight",
        "mlp.router.expert_bias": "mlp.router.expert_bias",
        **{
            f"mlp.experts.{expert}.{matrix}": f"mlp.experts.experts.{matrix}"
            for expert in range(4)
            for matrix in ("linear_fc1.weight", "linear_fc2.weight")
        },
    },
}
TOP = ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight")


def test_names_of_weights_and_keys_of_checkpoints_are_those_of_all_versions():
    """A checkpoint of any version is read by these keys; initial weights are seeded by names."""
    keys = {name: name for name in TOP} | {
        f"decoder.layers.{layer}.{name}": f"decoder.layers.{layer}.{key}"
        for layer, names in LAYERS.items()
        for name, key in names.items()
    }
    groups, _, (chunk,) = build_tiny(
        tiny_config(
            model={
                "moe_layer_freq": [0, 1],
                "qk_norm": False,
                "router_score": "sigmoid",
                "router_expert_bias": True,
            }
        )
    )
    from megatron_rl.models.gpt.chunk import chunk_shards, layer_numbers, routers_of
    from megatron_rl.models.gpt.names import holds_experts, name_of_key
    from megatron_rl.models.parameters import weight_views

    assert {view.name for view in weight_views([chunk], groups)} == set(keys)
    assert {shard.key for shard in chunk_shards(chunk, groups).values()} == set(keys.values())
    for name, key in keys.items():
        of_expert = ".experts." in name
        expert = int(name.split(".experts.")[1][0]) if of_expert else 0
        assert name_of_key(key, expert) == name
        assert holds_experts(key) == of_expert
    assert layer_numbers(chunk) == [1, 2]
    assert routers_of([chunk]) == [{2: chunk.decoder.layers[1].mlp.router}]

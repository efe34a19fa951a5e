"""The local model computes what Hugging Face's models of the same weights compute."""

import pytest
import torch

from tests.support.tiny import build_tiny, tiny_config

COMMON = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24)
OURS = {"num_experts": 8, "moe_ffn_hidden_size": 24, "rope_base": 1e6}

#: family: (its Hugging Face configuration beyond COMMON, our model beyond the tiny one)
FAMILIES = {
    "Qwen3Moe": ({**EXPERTS, "head_dim": 16, "norm_topk_prob": True}, {**OURS, "head_dim": 16}),
    "Qwen3Moe, dense layer, not normalised": (
        {**EXPERTS, "head_dim": 8, "norm_topk_prob": False, "mlp_only_layers": [0]},
        {**OURS, "router_pre_softmax": True, "moe_layer_freq": [0, 1]},
    ),
    "Qwen2Moe": (
        {**EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 40},
        {
            **OURS,
            "qk_norm": False,
            "qkv_bias": True,
            "router_pre_softmax": True,
            "shared_expert_ffn_hidden_size": 40,
            "shared_expert_gate": True,
        },
    ),
    "Mixtral": (
        dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=24),
        {**OURS, "qk_norm": False},
    ),
    "Glm4Moe": (  # DeepSeek-V3's router: sigmoid, bias, groups, scaling factor
        dict(
            n_routed_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=24,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            n_shared_experts=1,
            first_k_dense_replace=1,
            use_qk_norm=True,
            head_dim=8,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "partial_rotary_factor": 1.0,
            },
        ),
        {
            **OURS,
            "num_experts": 16,
            "moe_top_k": 4,
            "router_num_groups": 4,
            "router_group_top_k": 2,
            "router_score": "sigmoid",
            "router_expert_bias": True,
            "router_scaling_factor": 2.5,
            "shared_expert_ffn_hidden_size": 24,
            "moe_layer_freq": [0, 1],
        },
    ),
}


def hugging_face_model(family, options):
    """A model in fp32 with weights that make every mistake show."""
    import transformers

    name = family.split(",")[0]
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in key:
                tensor.copy_(1 + 0.3 * noise)
            elif tensor.dim() == 1:  # biases
                tensor.copy_(0.2 * noise)
            elif tensor.is_floating_point():
                tensor.copy_(0.2 * noise)
    return model


def weight_of(name, state, config):
    """The Hugging Face weights that make one of ours."""
    if not name.startswith("decoder.layers."):
        return state[
            {
                "embedding.word_embeddings.weight": "model.embed_tokens.weight",
                "decoder.final_layernorm.weight": "model.norm.weight",
                "output_layer.weight": "lm_head.weight",
            }[name]
        ]
    _, _, layer, rest = name.split(".", 3)

    def get(key):
        return state[f"model.layers.{layer}.{key}"]

    if rest.startswith("self_attention.linear_qkv."):
        kind = rest.rsplit(".", 1)[1]
        parts = [get(f"self_attn.{letter}_proj.{kind}") for letter in "qkv"]
        groups = config.num_query_groups
        return torch.cat([p.unflatten(0, (groups, -1)) for p in parts], dim=1).flatten(0, 1)
    if ".experts." in rest:
        _, _, expert, linear, _ = rest.split(".")
        stacked = {"linear_fc1": "gate_up_proj", "linear_fc2": "down_proj"}[linear]
        return get(f"mlp.experts.{stacked}")[int(expert)]
    if rest.endswith("linear_fc1.weight"):
        prefix = _dense_prefix(rest, state, layer)
        return torch.cat([get(f"{prefix}gate_proj.weight"), get(f"{prefix}up_proj.weight")])
    if rest.endswith("linear_fc2.weight"):
        return get(f"{_dense_prefix(rest, state, layer)}down_proj.weight")
    return get(
        {
            "input_layernorm.weight": "input_layernorm.weight",
            "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
            "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
            "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
            "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
            "mlp.router.weight": "mlp.gate.weight",
            "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
        }[rest]
    )


def _dense_prefix(rest, state, layer):
    if "shared_experts" not in rest:
        return "mlp."
    plural = f"model.layers.{layer}.mlp.shared_experts.up_proj.weight" in state
    return "mlp.shared_experts." if plural else "mlp.shared_expert."


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family):
    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row
    from megatron_rl.models.parameters import parameter_views

    options, model = FAMILIES[family]
    config = tiny_config(model=model)
    reference = hugging_face_model(family, options)
    state = reference.state_dict()
    groups, _, (chunk,) = build_tiny(config)
    with torch.no_grad():
        for view in parameter_views([chunk], groups):
            weight = weight_of(view.name, state, config.model)
            view.of(view.parameter.data).copy_(weight.view(view.global_shape()))
        for layer in chunk.decoder.layers:
            if config.model.router_expert_bias and hasattr(layer.mlp, "router"):
                key = f"model.layers.{layer.layer_number - 1}.mlp.gate.e_score_correction_bias"
                layer.mlp.router.expert_bias.copy_(state[key])
    lengths = [11, 1, 6]
    tokens = torch.randint(64, (sum(lengths),), generator=torch.Generator().manual_seed(6))
    placement = packed_placement(lengths, len(tokens), torch.device("cpu"))
    with torch.no_grad():
        found = forward_row(chunk, tokens, placement).squeeze(0)
        expected = torch.cat([reference(part[None]).logits[0] for part in tokens.split(lengths)])
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

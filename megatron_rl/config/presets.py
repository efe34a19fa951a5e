"""Model presets: plain values of ``ModelConfig`` fields, taken over with ``model.preset: NAME``.

A field given in the YAML or on the command line wins over the preset's value. Training choices
(balancing losses, frozen routers, Transformer Engine) are no part of a preset.
"""

from __future__ import annotations

from typing import Any, Mapping

_QWEN3_MOE = {
    "num_query_groups": 4,
    "head_dim": 128,
    "num_experts": 128,
    "moe_top_k": 8,
    "vocab_size": 151936,
    "max_sequence_length": 40960,
    "rope_base": 1e6,
    "qk_norm": True,
    "norm_epsilon": 1e-6,
    "dtype": "bf16",
}

MODEL_PRESETS: Mapping[str, Mapping[str, Any]] = {
    # 1.8 million parameters: trains on a CPU in minutes.
    "tiny_moe": {
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 32,
        "ffn_hidden_size": 256,
        "num_experts": 8,
        "moe_top_k": 2,
        "moe_ffn_hidden_size": 128,
        "vocab_size": 128,
        "max_sequence_length": 256,
    },
    # The routing of DeepSeek-V3 (sigmoid, bias, groups, shared expert, first layer dense) in small;
    # attention is grouped-query, not multi-head latent.
    "tiny_deepseek_moe": {
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 32,
        "ffn_hidden_size": 256,
        "num_experts": 16,
        "moe_top_k": 4,
        "moe_ffn_hidden_size": 64,
        "moe_layer_freq": [0, 1, 1, 1],
        "shared_expert_ffn_hidden_size": 64,
        "router_score": "sigmoid",
        "router_expert_bias": True,
        "router_num_groups": 4,
        "router_group_top_k": 2,
        "router_scaling_factor": 2.5,
        "vocab_size": 128,
        "max_sequence_length": 256,
        "qk_norm": False,
    },
    # Qwen/Qwen3-30B-A3B
    "qwen3_30b_a3b": {
        **_QWEN3_MOE,
        "num_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "ffn_hidden_size": 6144,
        "moe_ffn_hidden_size": 768,
    },
    # Qwen/Qwen3-235B-A22B
    "qwen3_235b_a22b": {
        **_QWEN3_MOE,
        "num_layers": 94,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "ffn_hidden_size": 12288,
        "moe_ffn_hidden_size": 1536,
    },
    # Qwen/Qwen1.5-MoE-A2.7B
    "qwen1_5_moe_a2_7b": {
        "num_layers": 24,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_query_groups": 16,
        "head_dim": 128,
        "ffn_hidden_size": 5632,
        "num_experts": 60,
        "moe_top_k": 4,
        "moe_ffn_hidden_size": 1408,
        "shared_expert_ffn_hidden_size": 5632,
        "shared_expert_gate": True,
        "router_pre_softmax": True,
        "vocab_size": 151936,
        "max_sequence_length": 8192,
        "rope_base": 1e6,
        "qk_norm": False,
        "qkv_bias": True,
        "norm_epsilon": 1e-6,
        "dtype": "bf16",
    },
    # mistralai/Mixtral-8x7B-v0.1
    "mixtral_8x7b": {
        "num_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "head_dim": 128,
        "ffn_hidden_size": 14336,
        "num_experts": 8,
        "moe_top_k": 2,
        "moe_ffn_hidden_size": 14336,
        "vocab_size": 32000,
        "max_sequence_length": 32768,
        "rope_base": 1e6,
        "qk_norm": False,
        "norm_epsilon": 1e-5,
        "dtype": "bf16",
    },
    # allenai/OLMoE-1B-7B-0924
    "olmoe_1b_7b": {
        "num_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_query_groups": 16,
        "head_dim": 128,
        "ffn_hidden_size": 1024,
        "num_experts": 64,
        "moe_top_k": 8,
        "moe_ffn_hidden_size": 1024,
        "router_pre_softmax": True,
        "vocab_size": 50304,
        "max_sequence_length": 4096,
        "rope_base": 1e4,
        "qk_norm": True,
        "qk_norm_scope": "layer",
        "norm_epsilon": 1e-5,
        "dtype": "bf16",
    },
}

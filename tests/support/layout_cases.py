"""The parallel layouts that have to train like a single process, and the models they are tried on.

In the names: TP, PP, VPP, EP, ETP, CP, DP are tensor, pipeline, virtual pipeline, expert, expert
tensor, context and data parallel size. Every case divides its loss per token
(``calculate_per_token_loss``), and TP is with sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A layout and the model it is tried on."""

    name: str
    ranks: int
    parallel: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    one_per_pack: bool = False  #: the same packs under any data-parallel size
    algorithm: Mapping[str, Any] = field(default_factory=dict)  #: other than plain rspo
    device: str = "cpu"  #: or cuda
    optimizer: Mapping[str, Any] = field(default_factory=dict)  #: other than plain adam
    seed: int = 0  #: of the initial weights and of the rollout batch
    turns: bool = False  #: the policy wrote the sequences in turns, and some tokens of no turn
    group: int = 1  #: as many sequences in a row begin with the same prompt
    scored: bool = True  #: the first mini-batch, by a pass of its own
    share_prompts: str = "auto"  #: data.share_prompts
    pack_tokens: int = 0  #: other than the usual
    kept: bool = False  #: the sampler has kept some tokens of the vocabulary


SIGMOID = {"router_score": "sigmoid", "router_expert_bias": True, "expert_bias_update_rate": 0.01}
GROUPS = {"router_num_groups": 4, "router_group_top_k": 2, "moe_top_k": 3}  # 3 of 4, not of 8
SHARED = {"shared_expert_ffn_hidden_size": 48}
GATED = {**SHARED, "shared_expert_gate": True}
DENSE_FIRST = {"moe_layer_freq": [0, 1, 1, 1]}
DENSE_STAGE = {"moe_layer_freq": [0, 0, 1, 1]}
DEEPSEEK = {**SIGMOID, **GROUPS, **SHARED, **DENSE_FIRST, "router_scaling_factor": 2.5}
LATENT = {
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_query_groups": None,
    "head_dim": None,
}
WHOLE_QUERIES = {**LATENT, "q_lora_rank": None}
OVER_HEADS = {"qk_norm_scope": "layer"}
DENSE, GMPO = {"num_experts": 0}, {"name": "gmpo"}
MANY_EXPERTS = {"num_experts": 260, "moe_top_k": 4, "moe_ffn_hidden_size": 8}
ODD = {"vocab_size": 127}  # tensor parallelism pads it
AUX = {"aux_loss_coeff": 0.05, "z_loss_coeff": 0.01}
BF16 = {"dtype": "bf16"}
MUON = {"name": "muon"}
TP2, PP2, EP2, CP2 = {"tensor": 2}, {"pipeline": 2}, {"expert": 2}, {"context": 2}
ETP2, EP4, CP4, PP4 = {"expert_tensor": 2}, {"expert": 4}, {"context": 4}, {"pipeline": 4}
VPP2 = {**PP2, "virtual_pipeline": 2}
ALLGATHER = {"dispatcher": "allgather"}
SHARDED = {"distributed_optimizer": True}
OVERLAPPED = {"overlap_grad_reduce": True}
WEIGHTS = {"expert_exchange": "weights"}  # `layouts.layout_config` has tokens travel otherwise
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}

LAYOUTS = (
    Case("TP2", 2, TP2),
    Case("EP2", 2, EP2),
    Case("EP4", 4, EP4),
    Case("ETP2", 2, ETP2),
    Case("PP2", 2, PP2),
    Case("PP4", 4, PP4),
    Case("PP2 VPP2", 2, VPP2),
    Case("CP2", 2, CP2),
    Case("CP4", 4, CP4),
    Case("DP2", 2, {}),
    Case("TP2 EP2", 2, {**TP2, **EP2}),
    Case("TP2 ETP2", 2, {**TP2, **ETP2}),
    Case("EP2 ETP2", 4, {**EP2, **ETP2}),
    Case("TP2 EP2 ETP2", 4, {**TP2, **EP2, **ETP2}),
    Case("TP2 PP2", 4, {**TP2, **PP2}),
    Case("TP2 PP2 EP2", 4, {**TP2, **PP2, **EP2}),
    Case("PP2 VPP2 EP2", 4, {**VPP2, **EP2}),
    Case("CP2 EP2", 2, {**CP2, **EP2}),
    Case("CP2 ETP2", 2, {**CP2, **ETP2}),
    Case("CP2 TP2", 4, {**CP2, **TP2}),
    Case("CP2 TP2 EP4", 4, {**CP2, **TP2, **EP4}),
    Case("CP2 PP2", 4, {**CP2, **PP2}),
    Case("CP2 PP2 VPP2", 4, {**CP2, **VPP2}),
    Case("TP2 PP2 CP2", 8, {**TP2, **PP2, **CP2}),
    Case("TP2 PP2 EP2 DP2", 8, {**TP2, **PP2, **EP2}),
    Case("TP4 EP4", 8, {"tensor": 4, **EP4}, {"num_query_groups": 4}),
    Case("EP8", 8, {"expert": 8}),
    Case("TP2 PP2 VPP2 CP2 EP4", 8, {**TP2, **VPP2, **CP2, **EP4}),
    Case("DP2 EP2", 4, EP2),
    Case("TP2 DP2", 4, TP2),
    Case("CP2 DP2", 4, CP2),
)
DISPATCHERS_AND_RECOMPUTATION = (
    Case("EP2 allgather", 2, {**EP2, **ALLGATHER}),
    Case("EP4 allgather", 4, {**EP4, **ALLGATHER}),
    Case("TP2 EP2 allgather", 2, {**TP2, **EP2, **ALLGATHER}),
    Case("TP2 ETP2 allgather", 2, {**TP2, **ETP2, **ALLGATHER}),
    Case("TP2 EP2 ETP2 allgather", 4, {**TP2, **EP2, **ETP2, **ALLGATHER}),
    Case("CP2 EP2 allgather", 2, {**CP2, **EP2, **ALLGATHER}),
    Case("recompute full", 1, FULL),
    Case("recompute selective", 1, SELECTIVE),
    Case("TP2 PP2 EP2 recompute full", 4, {**TP2, **PP2, **EP2, **FULL}),
    Case("TP2 EP2 recompute selective", 2, {**TP2, **EP2, **SELECTIVE}),
    Case("PP2 VPP2 recompute full", 2, {**VPP2, **FULL}, {**SIGMOID, **AUX}),
    Case("CP2 recompute full", 2, {**CP2, **FULL}),
    Case("CP2 recompute selective", 2, {**CP2, **SELECTIVE}),
)
OPTIMIZERS = (
    Case("DP2 overlapped", 2, OVERLAPPED),
    Case("EP2 overlapped", 4, {**EP2, **OVERLAPPED}),
    Case("PP2 VPP2 overlapped", 4, {**VPP2, **OVERLAPPED}),
    Case("DP2 sharded optimizer", 2, SHARDED),
    Case("EP2 sharded optimizer", 4, {**EP2, **SHARDED}),
    Case("TP2 sharded optimizer", 4, {**TP2, **SHARDED}),
    Case("CP2 sharded optimizer", 2, {**CP2, **SHARDED}),
    Case("PP2 VPP2 sharded optimizer", 4, {**VPP2, **SHARDED}),
    Case("PP4 sharded, tied embeddings", 8, {**PP4, **SHARDED}, {"tie_embeddings": True}),
    Case("PP2 EP2 sharded, stage of dense", 4, {**PP2, **EP2, **SHARDED}, DENSE_STAGE),
    Case("EP2 sharded, overlapped", 4, {**EP2, **SHARDED, **OVERLAPPED}),
    Case("PP2 VPP2 EP2 sharded, overlapped", 4, {**VPP2, **EP2, **SHARDED, **OVERLAPPED}),
)
WEIGHTS_TRAVEL = (
    Case("EP2, weights", 2, {**EP2, **WEIGHTS}),
    Case("EP4, weights", 4, {**EP4, **WEIGHTS}, MANY_EXPERTS),
    Case("ETP2, weights", 2, {**ETP2, **WEIGHTS}),
    Case("TP2 EP2 ETP2, weights", 4, {**TP2, **EP2, **ETP2, **WEIGHTS}, GATED),
    Case("CP2 TP2 EP4, weights", 4, {**CP2, **TP2, **EP4, **WEIGHTS}, SIGMOID),
    Case("PP2 VPP2 EP2, weights", 4, {**VPP2, **EP2, **WEIGHTS}, {**SIGMOID, "moe_layer_freq": 2}),
    Case("TP2 PP2 EP2 DP2, weights", 8, {**TP2, **PP2, **EP2, **WEIGHTS}),
    Case("TP2 PP2 EP2, full, weights", 4, {**TP2, **PP2, **EP2, **FULL, **WEIGHTS}),
    Case("EP2 selective, weights", 2, {**EP2, **SELECTIVE, **WEIGHTS}),
    Case("EP2 overlapped, weights", 4, {**EP2, **OVERLAPPED, **WEIGHTS}),
    Case("EP2 sharded, weights", 4, {**EP2, **SHARDED, **WEIGHTS}),
    Case(
        "PP2 VPP2 EP2 sharded, overlapped, weights",
        4,
        {**VPP2, **EP2, **SHARDED, **OVERLAPPED, **WEIGHTS},
    ),
    Case("EP2, aux and z loss, weights", 2, {**EP2, **WEIGHTS}, AUX, one_per_pack=True),
    Case("EP2, muon, weights", 2, {**EP2, **WEIGHTS}, optimizer=MUON),
)
MODELS = (
    Case("PP2, dense first layer", 2, PP2, DENSE_FIRST),
    Case("TP2, dense first layer", 2, TP2, DENSE_FIRST),
    Case("PP4, MoE in layers 2 and 4", 4, PP4, {"moe_layer_freq": [0, 1, 0, 1]}),
    Case("PP2 VPP2, MoE every 2nd", 2, VPP2, {"moe_layer_freq": 2}),
    Case("TP2 EP2, MoE every 2nd", 2, {**TP2, **EP2}, {"moe_layer_freq": 2}),
    Case("TP2, shared expert", 2, TP2, SHARED),
    Case("TP2 EP2, gated shared expert", 2, {**TP2, **EP2}, GATED),
    Case("PP2, gated shared expert", 2, PP2, GATED),
    Case("CP2 EP2, gated shared expert", 2, {**CP2, **EP2}, GATED),
    Case("TP2, sigmoid and bias", 2, TP2, {**SIGMOID, "router_scaling_factor": 2.5}),
    Case("EP2, sigmoid and bias", 2, EP2, SIGMOID),
    Case("CP2, sigmoid and bias", 2, CP2, SIGMOID),
    Case("PP2 VPP2 EP2, sigmoid, bias", 4, {**VPP2, **EP2}, {**SIGMOID, "moe_layer_freq": 2}),
    Case("EP2, groups of experts", 2, EP2, {**SIGMOID, **GROUPS}),
    Case("TP2 PP2, groups of experts", 4, {**TP2, **PP2}, {**SIGMOID, **GROUPS}),
    Case("TP2 PP2 EP2, as DeepSeek", 4, {**TP2, **PP2, **EP2}, DEEPSEEK),
    Case("TP2, softmax before top-K", 2, TP2, {"router_pre_softmax": True}),
    Case("TP2, frozen router", 2, TP2, {"freeze_router": True}),
    Case("TP2, bias on QKV, no QK norm", 2, TP2, {"qk_norm": False, "qkv_bias": True}),
    Case("PP2, tied embeddings", 2, PP2, {"tie_embeddings": True}),
    Case("TP2 PP2, tied embeddings", 4, {**TP2, **PP2}, {"tie_embeddings": True}),
    Case("PP2 VPP2, tied embeddings", 2, VPP2, {"tie_embeddings": True}),
    Case("TP2, odd vocabulary", 2, TP2, ODD),
    Case("TP2 PP2, odd vocabulary, tied", 4, {**TP2, **PP2}, {**ODD, "tie_embeddings": True}),
    Case("EP2, 260 experts", 2, EP2, MANY_EXPERTS),
    Case("TP2 EP2, 260 experts", 2, {**TP2, **EP2}, MANY_EXPERTS),
    Case("TP2 PP2 EP4, 260 experts", 8, {**TP2, **PP2, **EP4}, MANY_EXPERTS),
)
ATTENTION = (
    Case("TP2, latent attention", 2, TP2, LATENT),
    Case("PP2 VPP2, latent attention", 2, VPP2, LATENT),
    Case("CP2, latent attention", 2, CP2, LATENT),
    Case("CP2 TP2, latent attention", 4, {**CP2, **TP2}, LATENT),
    Case("TP4, latent attention", 4, {"tensor": 4}, LATENT),
    Case("TP2 EP2, whole queries", 2, {**TP2, **EP2}, WHOLE_QUERIES),
    Case("recompute selective, latent attention", 1, SELECTIVE, LATENT),
    Case("TP2 recompute full, latent attention", 2, {**TP2, **FULL}, LATENT),
    Case("EP2 sharded, latent attention", 4, {**EP2, **SHARDED}, LATENT),
    Case("TP2 PP2 EP2, DeepSeek-V3", 4, {**TP2, **PP2, **EP2}, {**DEEPSEEK, **LATENT}),
    Case("TP2, norm over heads", 2, TP2, OVER_HEADS),
    Case("CP2 TP2, norm over heads", 4, {**CP2, **TP2}, OVER_HEADS),
    Case("TP2 PP2 EP2, norm over heads", 4, {**TP2, **PP2, **EP2}, OVER_HEADS),
)
DENSE_MODELS = (
    Case("TP2, dense model", 2, TP2, DENSE, algorithm=GMPO),
    Case("PP2 VPP2, dense model", 2, VPP2, DENSE, algorithm=GMPO),
    Case("CP2 DP2 sharded, dense model", 4, {**CP2, **SHARDED}, DENSE, algorithm=GMPO),
    Case(
        "TP2 PP2, dense model, tied",
        4,
        {**TP2, **PP2},
        {**DENSE, "tie_embeddings": True},
        algorithm=GMPO,
    ),
)
ROUTER_LOSSES = (
    Case("TP2, aux and z loss", 2, TP2, AUX),
    Case("TP2 EP2, aux and z loss", 2, {**TP2, **EP2}, AUX),
    Case("PP2, aux and z loss", 2, PP2, AUX),
    Case("TP2 PP2, aux and z loss", 4, {**TP2, **PP2}, AUX),
    # The balancing loss is a pack's own: ranks that share the data must cut the same packs, and
    # padding sequences for context parallelism must not change which share one.
    Case("EP2, aux and z loss", 2, EP2, AUX, one_per_pack=True),
    Case("TP2 DP2, aux and z loss", 4, TP2, AUX, one_per_pack=True),
    Case("CP2, aux and z loss", 2, CP2, AUX, one_per_pack=True),
    Case("CP2 TP2, aux and z loss", 4, {**CP2, **TP2}, AUX, one_per_pack=True),
)
#: Of torch, element by element. Its default, since `layout_config` gives Adam another epsilon.
SGD = {"name": "torch.optim:SGD", "lr": 1.0, "epsilon": 1e-8}
OTHER_OPTIMIZERS = (
    Case("TP2 EP2, SGD of torch", 2, {**TP2, **EP2}, optimizer=SGD),
    Case("TP2, muon", 2, TP2, GATED, optimizer=MUON),
    Case("DP2, muon", 2, {}, optimizer=MUON),
    Case("EP2, muon", 2, EP2, optimizer={**MUON, "settings": {"routers": True}}),
    Case("ETP2, muon", 2, ETP2, optimizer=MUON),
    Case("PP2 VPP2, muon", 2, VPP2, {"tie_embeddings": True}, optimizer=MUON),
    Case("CP2, muon", 2, CP2, optimizer=MUON),
    Case("TP2 EP2 ETP2, muon", 4, {**TP2, **EP2, **ETP2}, optimizer=MUON),
    Case("TP2 PP2 EP2, muon, overlapped", 4, {**TP2, **PP2, **EP2, **OVERLAPPED}, optimizer=MUON),
    Case("TP2, muon, latent attention", 2, TP2, LATENT, optimizer=MUON),
    Case("TP2, muon, dense model", 2, TP2, DENSE, algorithm=GMPO, optimizer=MUON),
)
TRUNCATED_SAMPLING = tuple(
    Case(f"{name}, kept tokens", ranks, parallel, kept=True, group=group, **options)
    for name, ranks, parallel, group, options in (
        ("TP2", 2, TP2, 1, {}),
        ("TP2, shared prompts", 2, TP2, 4, {}),
        ("PP2", 2, PP2, 4, {}),
        ("CP2", 2, CP2, 4, {}),
        ("CP2, unshared", 2, CP2, 4, {"share_prompts": "off"}),
        ("EP2", 2, EP2, 4, {}),
        ("DP2", 2, {}, 4, {}),
        ("CP2 TP2", 4, {**CP2, **TP2}, 4, {"algorithm": {"entropy_coef": 0.05}}),
        ("TP2 PP2, in turns", 4, {**TP2, **PP2}, 1, {"turns": True}),
        ("TP2, odd vocabulary", 2, TP2, 4, {"model": ODD}),
        ("TP2, reference", 2, TP2, 4, {"algorithm": {"kl_coef": 0.1, "reference": "initial"}}),
    )
)
#: In fp32, everything within `TOLERANCE` of a single process.
CASES = (
    *LAYOUTS,
    *DISPATCHERS_AND_RECOMPUTATION,
    *OPTIMIZERS,
    *WEIGHTS_TRAVEL,
    *MODELS,
    *ATTENTION,
    *DENSE_MODELS,
    *ROUTER_LOSSES,
    *OTHER_OPTIMIZERS,
    *TRUNCATED_SAMPLING,
)
#: A difference above this is an error: fp32 rounding gives about 1e-6.
TOLERANCE = 1e-5

#: Problems (seeds of weights and data) that a layout is measured on in bf16.
BF16_SEEDS = 6
#: Standard deviation over seeds of log(a layout's distance from fp32 / a single process's), at
#: least what was seen: TP2, ETP2 and TP2 EP2 on 15 to 25 seeds each, on a processor with AMX and on
#: the same one held to AVX2. Layouts that exchange no partial sums have less.
BF16_SPREAD = {
    "loss": 1.1,
    "grad_norm": 1.1,
    "statistics": 0.6,
    "logprobs": 0.45,
    "gamma": 0.45,
    "gradients": 0.8,
    "weights": 0.45,
}
#: The bound of the mean over seeds, in standard deviations of the mean. A right layout is above it
#: in one of 3 million cases if the means are normal, and in none of a third of a million means of
#: six drawn from the logarithms above.
BF16_SIGMAS = 5.0
BF16_CASES = tuple(
    Case(f"{name}, bf16", ranks, parallel, {**BF16, **model})
    for name, ranks, parallel, model in (
        ("TP2", 2, TP2, {}),
        ("EP2", 2, EP2, {}),
        ("EP2, weights", 2, {**EP2, **WEIGHTS}, {}),
        ("EP4", 4, EP4, {}),
        ("ETP2", 2, ETP2, {}),
        ("PP2 VPP2", 2, VPP2, {}),
        ("CP2", 2, CP2, {}),
        ("TP2 EP2", 2, {**TP2, **EP2}, {}),
        ("TP2 PP2 EP2", 4, {**TP2, **PP2, **EP2}, {}),
        ("CP2 TP2", 4, {**CP2, **TP2}, {}),
        ("TP2 PP2 CP2", 8, {**TP2, **PP2, **CP2}, {}),
        ("DP2 sharded optimizer", 2, SHARDED, {}),
        ("EP2 sharded optimizer", 4, {**EP2, **SHARDED}, {}),
        ("recompute full", 1, FULL, {}),
        ("TP2 PP2 EP2, as DeepSeek", 4, {**TP2, **PP2, **EP2}, DEEPSEEK),
    )
)

"""Training under different parallel layouts, and how far each is from a single process.

A layout builds a policy, packs and scores one fixed rollout batch and takes three optimizer steps
of RSPO on it: the path of `training/reinforce.py` without the sampling. What comes out is named
independently of the layout and compared tensor by tensor, norm(a - b) / norm(b).
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from megatron_rl.config.schema import Config
from megatron_rl.records import Sample
from tests.support.ranks import run_on_ranks

#: Weights large enough that attention and routers are far from uniform.
MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 16,
    "ffn_hidden_size": 96,
    "num_experts": 8,
    "moe_top_k": 2,
    "moe_ffn_hidden_size": 32,
    "vocab_size": 128,
    "max_sequence_length": 48,
    "init_std": 0.15,
}
#: Three mini-batches of eight sequences; a third of the sequences have a negative advantage.
MINI_BATCHES, SEQUENCES = 3, 8


@dataclass(frozen=True)
class Case:
    """A layout and the model it is tried on."""

    name: str
    ranks: int
    parallel: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)
    gradients: bool = True  #: False: a rank holds only its shard of the reduced gradients
    one_per_pack: bool = False  #: the same packs under any data-parallel size
    algorithm: Mapping[str, Any] = field(default_factory=dict)  #: other than plain rspo


SIGMOID = {"router_score": "sigmoid", "router_expert_bias": True, "expert_bias_update_rate": 0.01}
GROUPS = {"router_num_groups": 4, "router_group_top_k": 2, "moe_top_k": 3}  # 3 of 4, not of 8
SHARED = {"shared_expert_ffn_hidden_size": 48}
GATED = {**SHARED, "shared_expert_gate": True}
MANY_EXPERTS = {"num_experts": 260, "moe_top_k": 4, "moe_ffn_hidden_size": 8}
ODD = {"vocab_size": 127}  # tensor parallelism pads it
AUX = {"aux_loss_coeff": 0.05, "z_loss_coeff": 0.01}
TP2, PP2, EP2 = {"tensor": 2}, {"pipeline": 2}, {"expert": 2}
VPP2 = {**PP2, "virtual_pipeline": 2}
ALLGATHER = {"dispatcher": "allgather"}
SHARDED = {"distributed_optimizer": True}

#: Every layout that has to give what a single process gives. TP, PP, VPP, EP, ETP, DP: tensor,
#: pipeline, virtual pipeline, expert, expert tensor and data parallel size.
CASES = (
    Case("TP2", 2, TP2),
    Case("EP2", 2, EP2),
    Case("EP4", 4, {"expert": 4}),
    Case("ETP2", 2, {"expert_tensor": 2}),
    Case("TP2 ETP2", 2, {**TP2, "expert_tensor": 2}),
    Case("PP2", 2, PP2),
    Case("PP4", 4, {"pipeline": 4}),
    Case("PP2 VPP2", 2, VPP2),
    Case("PP2 VPP2 EP2", 4, {**VPP2, **EP2}),
    Case("TP2 EP2", 2, {**TP2, **EP2}),
    Case("TP2 PP2 EP2", 4, {**TP2, **PP2, **EP2}),
    Case("TP2 PP2", 4, {**TP2, **PP2}),
    Case("DP2", 2, {}),
    Case("DP2 overlapped", 2, {"overlap_grad_reduce": True}),
    Case("DP2 EP2", 4, EP2),
    Case("TP2 DP2", 4, TP2),
    Case("EP2 allgather", 2, {**EP2, **ALLGATHER}),
    Case("TP2 EP2 allgather", 2, {**TP2, **EP2, **ALLGATHER}),
    Case("TP2 ETP2 allgather", 2, {**TP2, "expert_tensor": 2, **ALLGATHER}),
    Case("recompute full", 1, {"recompute": "full"}),
    Case("recompute selective", 1, {"recompute": "selective"}),
    Case("TP2 PP2 EP2 recompute full", 4, {**TP2, **PP2, **EP2, "recompute": "full"}),
    Case("PP2 VPP2 recompute full", 2, {**VPP2, "recompute": "full"}, {**SIGMOID, **AUX}),
    Case("DP2 sharded optimizer", 2, SHARDED, gradients=False),
    Case("EP2 sharded optimizer", 4, {**EP2, **SHARDED}, gradients=False),
    Case("TP2 sharded optimizer", 4, {**TP2, **SHARDED}, gradients=False),
    Case("PP2 VPP2 sharded optimizer", 4, {**VPP2, **SHARDED}, gradients=False),
    Case("PP2, dense first layer", 2, PP2, {"moe_layer_freq": [0, 1, 1, 1]}),
    Case("TP2, dense first layer", 2, TP2, {"moe_layer_freq": [0, 1, 1, 1]}),
    Case("PP2 VPP2, MoE every 2nd", 2, VPP2, {"moe_layer_freq": 2}),
    Case("TP2 EP2, MoE every 2nd", 2, {**TP2, **EP2}, {"moe_layer_freq": 2}),
    Case("TP2, shared expert", 2, TP2, SHARED),
    Case("TP2 EP2, gated shared expert", 2, {**TP2, **EP2}, GATED),
    Case("PP2, gated shared expert", 2, PP2, GATED),
    Case("TP2, sigmoid and bias", 2, TP2, {**SIGMOID, "router_scaling_factor": 2.5}),
    Case("EP2, sigmoid and bias", 2, EP2, SIGMOID),
    Case("PP2 VPP2 EP2, sigmoid, bias", 4, {**VPP2, **EP2}, {**SIGMOID, "moe_layer_freq": 2}),
    Case("EP2, groups of experts", 2, EP2, {**SIGMOID, **GROUPS}),
    Case("TP2 PP2, groups of experts", 4, {**TP2, **PP2}, {**SIGMOID, **GROUPS}),
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
    Case("TP2, router losses", 2, TP2, AUX),
    Case("TP2 EP2, router losses", 2, {**TP2, **EP2}, AUX),
    Case("PP2, router losses", 2, PP2, AUX),
    # The balancing loss is a pack's own: ranks that share the data must cut the same packs.
    Case("EP2, router losses", 2, EP2, AUX, one_per_pack=True),
    Case("TP2 PP2, router losses", 4, {**TP2, **PP2}, AUX),
    Case("TP2 DP2, router losses", 4, TP2, AUX, one_per_pack=True),
)
#: A difference above this is an error: fp32 rounding gives about 1e-6.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Run:
    """What one layout gives, under names that do not depend on it. Arrays are NumPy's."""

    scalars: dict[str, float]  #: losses, gradient norms and router telemetry of the updates
    old_logprobs: dict[tuple, np.ndarray]  #: tokens of a sequence -> values at trained positions
    gamma: dict[tuple, np.ndarray]  #: the same of the last update, gamma~
    gradients: dict[str, np.ndarray]  #: of the first update, clipped
    weights: dict[str, np.ndarray]  #: after the last update, and the routers' expert biases
    replica_difference: float  #: largest relative difference between two ranks' copies of a weight


@dataclass(frozen=True)
class Difference:
    """How far a layout is from a single process: norm(a - b) / norm(b), worst of all tensors."""

    scalars: float
    logprobs: float
    gamma: float
    gradients: float
    weights: float
    replicas: float
    worst: str  #: name of the scalar, gradient or weight that is furthest off
    smallest_gamma: float  #: shows that the routers moved

    @property
    def largest(self) -> float:
        """The worst number of all."""
        numbers = (self.scalars, self.logprobs, self.gamma, self.gradients, self.weights)
        return max(*numbers, self.replicas)


def layout_config(case: Case) -> Config:
    """The whole configuration of a case."""
    return Config(
        model={**MODEL, **case.model},
        parallel=dict(case.parallel),
        device={"kind": "cpu", "threads": 1},
        data={"pack_tokens": 24 if case.one_per_pack else 48, "pack_multiple": 8},
        algorithm={
            "name": "rspo",
            "mini_batches": MINI_BATCHES,
            "router_shift": {"floor": 0.05},
            **case.algorithm,
        },
        # A large epsilon: Adam makes noise in gradients that are nearly zero as large as its steps.
        optimizer={"lr": 3e-3, "epsilon": 1e-4, "clip_grad": 0.2, "weight_decay": 0.01},
    )


def rollout_batch(case: Case) -> list[Sample]:
    """24 ragged sequences, mini-batch by mini-batch: the same in every layout.

    2 to 23 tokens, so that a mini-batch takes three packs on one rank; 13 to 23 where no two fit in
    a pack.
    """
    rng = np.random.default_rng(7)
    vocab_size = layout_config(case).model.vocab_size
    samples = []
    for _ in range(MINI_BATCHES * SEQUENCES):
        prompt, answer = int(rng.integers(1, 8)), int(rng.integers(1, 17))
        prompt += max(0, 13 - prompt - answer) if case.one_per_pack else 0
        samples.append(
            Sample(
                tokens=rng.integers(0, vocab_size, prompt + answer),
                prompt_length=prompt,
                advantage=float(rng.normal() + 0.4),
                rollout_logprobs=-rng.random(answer, dtype=np.float32),
            )
        )
    return samples


def run_case(case: Case) -> Run:
    """Run a case on its ranks."""
    return _merge(run_on_ranks(case.ranks, train_on_rank, case, timeout_s=300.0))


def single_process(case: Case) -> Case:
    """The same model on one rank."""
    return Case(
        case.name, 1, {}, case.model, one_per_pack=case.one_per_pack, algorithm=case.algorithm
    )


def train_on_rank(case: Case) -> dict[str, Any]:
    """This rank's part of the results; tensors split over tensor-parallel ranks are made whole."""
    with policy_of(layout_config(case)) as policy:
        return _train(policy, case)


def _train(policy: Any, case: Case) -> dict[str, Any]:
    from megatron_rl.router.telemetry import RouterTelemetry
    from megatron_rl.training.score import score, score_reference
    from megatron_rl.training.update import update

    config = policy.config
    mini_batches = packed_mini_batches(policy, rollout_batch(case))
    flat = score(policy, [pack for packs in mini_batches for pack in packs], with_traces=True)
    if policy.reference is not None:
        policy.reference.take()
        flat = score_reference(policy, flat)
    size = len(mini_batches[0])
    scored = [flat[i : i + size] for i in range(0, len(flat), size)]
    result = {"scalars": {}, "old_logprobs": {}, "gamma": {}}
    for item in flat:
        if item.old_logprobs is not None:
            result["old_logprobs"] |= by_sequence(item.pack, item.old_logprobs)
    telemetry = RouterTelemetry(
        config.model.num_layers, config.model.num_experts, policy.device.torch_device
    )
    for number, items in enumerate(scored):
        scalars, seen = observed_update(policy, items, telemetry, update)
        result["scalars"] |= {f"{name} of update {number}": v for name, v in scalars.items()}
        if number == 0:
            result["gradients"] = gathered(policy, "main_grad") if case.gradients else {}
    for item, inputs in zip(scored[-1], seen):
        result["gamma"] |= by_sequence(item.pack, inputs.router_shift)
    result["scalars"] |= telemetry.reduce(policy.groups.world)
    result["weights"] = gathered(policy, "data") | _expert_biases(policy)
    return result


@contextlib.contextmanager
def policy_of(config: Config) -> Iterator[Any]:
    """A policy on this rank, in groups of its own that go with it.

    Each group has threads that wake a hundred times a second, and Megatron keeps a policy alive for
    ever: gradient hooks hold the model, and dispatchers the graph of the last micro-batch. Both are
    cut here.
    """
    from tests.support.tiny import cpu_device

    device = cpu_device()
    from megatron.core import parallel_state

    from megatron_rl.parallel.groups import build_groups, destroy_groups
    from megatron_rl.training.policy import build_policy

    if parallel_state.model_parallel_is_initialized():
        destroy_groups()
    policy = build_policy(
        config,
        device,
        build_groups(config.parallel),
        optimizer_steps=100,
        with_reference=config.algorithm.reference == "initial",
    )
    try:
        yield policy
    finally:
        for chunk in policy.wrapped:
            chunk.grad_accs.clear()
            for module in chunk.modules():
                if hasattr(module, "token_dispatcher"):
                    vars(module.token_dispatcher).clear()
        del policy
        destroy_groups()
        gc.collect()


def packed_mini_batches(policy: Any, samples: list[Sample]) -> list[list[Any]]:
    """This rank's packs of the rollout batch, a list for each mini-batch."""
    from megatron_rl.training.batch import pack_mini_batches

    config, data = policy.config, policy.groups.data
    share = SEQUENCES // data.size()
    starts = [m * SEQUENCES + data.rank() * share for m in range(MINI_BATCHES)]
    slices = [samples[start : start + share] for start in starts]
    return pack_mini_batches(slices, config, policy.groups, policy.device.torch_device)


def observed_update(policy, items, telemetry, update) -> tuple[dict[str, float], list[Any]]:
    """One update: its metrics, and the inputs its loss was called with, pack by pack."""
    from megatron_rl.algorithms import LOSSES
    from megatron_rl.observe.metrics import MetricSums

    seen = []
    loss = LOSSES[policy.config.algorithm.name]

    def spy(inputs, settings):
        if inputs.logprobs.requires_grad:  # not where only the denominator is asked for
            seen.append(inputs)
        return loss(inputs, settings)

    sums = MetricSums(policy.config.model.num_layers)
    with mock.patch.dict(LOSSES, {policy.config.algorithm.name: spy}):
        update(policy, items, sums, telemetry)
    metrics = sums.reduce(policy.groups.world)
    return {name: metrics[name] for name in ("loss", "grad_norm", "entropy")}, seen


def by_sequence(pack: Any, values: Any) -> dict[tuple, np.ndarray]:
    """Values [T] at the trained positions of each sequence; the sequence's tokens are its name."""
    result = {}
    for sequence in range(pack.num_sequences):
        here = pack.sequence_ids == sequence
        name = tuple(pack.tokens[here].tolist())
        result[name] = values.detach()[here & pack.mask].numpy()
    return result


def gathered(policy: Any, attribute: str) -> dict[str, np.ndarray]:
    """``data`` or ``main_grad`` of this rank's parameters, whole, by global name. A collective."""
    from megatron_rl.models.parameters import parameter_views

    return {
        view.name: view.gather(view.of(getattr(view.parameter, attribute)).detach()).numpy().copy()
        for view in parameter_views(policy.chunks, policy.groups)
        if hasattr(view.parameter, attribute)  # a frozen weight has no gradient
    }


def _expert_biases(policy: Any) -> dict[str, np.ndarray]:
    biases = {
        layer.layer_number - 1: getattr(getattr(layer.mlp, "router", None), "expert_bias", None)
        for chunk in policy.chunks
        for layer in chunk.decoder.layers
    }
    return {
        f"expert bias of layer {number}": bias.numpy().copy()
        for number, bias in biases.items()
        if bias is not None
    }


def _merge(parts: list[dict[str, Any]]) -> Run:
    """Put the ranks' parts together; copies of one tensor must agree."""
    merged: dict[str, dict] = {"old_logprobs": {}, "gamma": {}, "gradients": {}, "weights": {}}
    replicas = 0.0
    for part in parts:
        for kind, tensors in merged.items():
            for name, value in part[kind].items():
                first = tensors.setdefault(name, value)
                replicas = max(replicas, relative(value, first))
    return Run(scalars=parts[0]["scalars"], replica_difference=replicas, **merged)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """norm(found - expected) / norm(expected); infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    distance = float(np.linalg.norm((found - expected).astype(np.float64)))
    scale = float(np.linalg.norm(expected.astype(np.float64)))
    return 0.0 if distance == 0.0 else distance / scale if scale else float("inf")


def compare(found: Run, expected: Run) -> Difference:
    """The differences of a run from the run of one process."""
    errors = {
        "scalars": {
            name: abs(found.scalars[name] - value) / max(abs(value), 1e-3)
            for name, value in expected.scalars.items()
        },
        "gradients": _errors(found.gradients, expected.gradients) if found.gradients else {},
        "weights": _errors(found.weights, expected.weights),
    }
    worst = max(
        (
            (error, f"{name} ({kind})")
            for kind, rows in errors.items()
            for name, error in rows.items()
        )
    )
    return Difference(
        **{kind: max(rows.values(), default=0.0) for kind, rows in errors.items()},
        logprobs=max(_errors(found.old_logprobs, expected.old_logprobs).values()),
        gamma=max(_errors(found.gamma, expected.gamma).values()),
        replicas=found.replica_difference,
        worst=worst[1],
        smallest_gamma=float(min(values.min() for values in expected.gamma.values())),
    )


def _errors(found: Mapping, expected: Mapping) -> dict[Any, float]:
    if set(found) != set(expected):
        missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        raise AssertionError(f"missing {missing[:3]}, unexpected {extra[:3]}")
    return {name: relative(found[name], value) for name, value in expected.items()}

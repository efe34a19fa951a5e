"""Training under different parallel layouts, and how far each is from a single process.

A layout builds a policy, packs and scores one fixed rollout batch and takes three optimizer steps
of RSPO on it: the path of `tasks/reinforce.py` without the sampling. What comes out is named
independently of the layout and compared tensor by tensor, norm(a - b) / norm(b).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

from megatron_rl.config.schema import Config
from megatron_rl.records import Sample
from tests.support.layout_cases import BF16_SEEDS, BF16_SIGMAS, BF16_SPREAD, Case
from tests.support.layout_samples import in_turns, with_kept, with_prompt
from tests.support.ranks import forget_models, run_on_ranks

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
class Run:
    """What one layout gives, under names that do not depend on it. Arrays are NumPy's."""

    #: of each update "loss of update 0", its grad_norm and entropy; router telemetry of all
    scalars: dict[str, float]
    old_logprobs: dict[tuple, np.ndarray]  #: tokens of a sequence -> values at trained positions
    gamma: dict[tuple, np.ndarray]  #: the same of the last update, gamma~
    gradients: dict[str, np.ndarray]  #: of the first update, clipped
    weights: dict[str, np.ndarray]  #: after the last update, and the routers' expert biases
    replica_difference: float  #: largest relative difference between two ranks' copies of a weight


@dataclass(frozen=True)
class Difference:
    """How far a layout is from a single process: norm(a - b) / norm(b), worst of all tensors."""

    loss: float  #: of each of the three updates
    grad_norm: float
    statistics: float  #: entropy; router shift, overlap, router entropy and expert load
    logprobs: float  #: the old policy's, sequence by sequence
    gamma: float  #: router-shift weights of the last update, sequence by sequence
    gradients: float  #: of the first update, tensor by tensor
    weights: float  #: after the third update, tensor by tensor
    replicas: float  #: a rank's copy of any of these against another rank's
    worst: str  #: what is furthest off
    smallest_gamma: float  #: shows that the routers moved

    @property
    def largest(self) -> float:
        """The worst number of all."""
        return max(getattr(self, name) for name in NUMBERS)


#: The numbers of a `Difference`, of scalars first.
SCALARS = ("loss", "grad_norm", "statistics")
NUMBERS = (*SCALARS, "logprobs", "gamma", "gradients", "weights", "replicas")


def layout_config(case: Case) -> Config:
    """The whole configuration of a case."""
    return Config(
        seed=1 + case.seed,
        model={**MODEL, **case.model},
        parallel={"expert_exchange": "tokens", **case.parallel},
        device={"kind": case.device, "threads": 1},
        data={
            "pack_tokens": case.pack_tokens or (24 if case.one_per_pack else 48),
            "pack_multiple": 8,
            "share_prompts": case.share_prompts,
        },
        algorithm={
            "name": "rspo",
            "mini_batches": MINI_BATCHES,
            "router_shift": {"floor": 0.05},
            **case.algorithm,
        },
        # A large epsilon: Adam makes noise in gradients that are nearly zero as large as its steps.
        optimizer={
            "lr": 3e-3,
            "epsilon": 1e-4,
            "clip_grad": 0.2,
            "weight_decay": 0.01,
            **case.optimizer,
        },
    )


def rollout_batch(case: Case) -> list[Sample]:
    """24 ragged sequences, mini-batch by mini-batch: the same in every layout.

    2 to 23 tokens, so that a mini-batch takes three packs on one rank; 14 to 23, all but the
    last of which take a row, where no two sequences fit in a pack.
    """
    rng = np.random.default_rng(7 + case.seed)
    vocab_size = layout_config(case).model.vocab_size
    samples = []
    for _ in range(MINI_BATCHES * SEQUENCES):
        prompt, answer = int(rng.integers(1, 8)), int(rng.integers(1, 17))
        prompt += max(0, 14 - prompt - answer) if case.one_per_pack else 0
        samples.append(
            Sample.of(
                *np.split(rng.integers(0, vocab_size, prompt + answer), [prompt]),
                advantage=float(rng.normal() + 0.4),
                logprobs=-rng.random(answer, dtype=np.float32),
            )
        )
    samples = [in_turns(n, sample) for n, sample in enumerate(samples)] if case.turns else samples
    samples = [with_prompt(s, samples[n - n % case.group]) for n, s in enumerate(samples)]
    if not case.kept:
        return samples
    return [with_kept(number, sample, vocab_size) for number, sample in enumerate(samples)]


def run_case(case: Case) -> Run:
    """Run a case on its ranks."""
    return merge(run_on_ranks(case.ranks, train_on_rank, case, timeout_s=300.0, kind=case.device))


def single_process(case: Case) -> Case:
    """The same model on one CPU rank, which has no Transformer Engine."""
    model = {name: value for name, value in case.model.items() if name != "transformer_engine"}
    return dataclasses.replace(case, ranks=1, parallel={}, model=model, device="cpu")


def in_fp32(case: Case) -> Case:
    """The same without rounding to bf16."""
    return dataclasses.replace(case, model={**case.model, "dtype": "fp32"})


class References:
    """The runs of single processes, each made once."""

    def __init__(self, run: Callable[[Case], Run] = run_case) -> None:
        self._run, self._runs = run, {}

    def of(self, case: Case) -> Run:
        """The single process that a case is compared with."""
        one = dataclasses.replace(single_process(case), name="one process")
        if repr(one) not in self._runs:
            self._runs[repr(one)] = self._run(one)
        return self._runs[repr(one)]


def train_on_rank(case: Case) -> dict[str, Any]:
    """This rank's part of the results; tensors split over tensor-parallel ranks are made whole."""
    with policy_of(layout_config(case)) as policy:
        return _train(policy, case)


def _train(policy: Any, case: Case) -> dict[str, Any]:
    from megatron_rl.policy.score import score, score_reference, unscored
    from megatron_rl.policy.update import update
    from megatron_rl.router.telemetry import RouterTelemetry

    config = policy.config
    mini_batches = packed_mini_batches(policy, rollout_batch(case))
    if case.one_per_pack:
        assert all(pack.num_sequences <= 1 for packs in mini_batches for pack in packs)
    first = [] if case.scored else unscored(policy, mini_batches[0], with_traces=True)
    scored_by_pass = mini_batches if case.scored else mini_batches[1:]
    flat = score(policy, [pack for packs in scored_by_pass for pack in packs], with_traces=True)
    flat = first + flat
    if policy.reference is not None:
        policy.reference.take()
        flat = score_reference(policy, flat)
    size = len(mini_batches[0])
    scored = [flat[i : i + size] for i in range(0, len(flat), size)]
    result = {"scalars": {}, "old_logprobs": {}, "gamma": {}}
    telemetry = RouterTelemetry(
        config.model.num_layers, config.model.num_experts, policy.device.torch_device
    )
    for number, items in enumerate(scored):
        scalars, seen, items = observed_update(policy, items, telemetry, update)
        for item in items:
            if item.old_logprobs is not None:
                result["old_logprobs"] |= by_sequence(item.pack, item.old_logprobs)
        result["scalars"] |= {f"{name} of update {number}": v for name, v in scalars.items()}
        if number == 0:
            unshard_gradients(policy)
            result["gradients"] = gathered(policy, "main_grad")
    for item, inputs in zip(scored[-1], seen):
        if inputs.router_shift is not None:
            result["gamma"] |= by_sequence(item.pack, inputs.router_shift)
    result["scalars"] |= telemetry.reduce(policy.groups.world)
    result["weights"] = whole_weights(policy)
    return result


@contextlib.contextmanager
def policy_of(config: Config) -> Iterator[Any]:
    """A policy on this rank, in groups of its own that go with it."""
    from tests.support.tiny import prepared_device

    device = prepared_device(config.device.kind)
    from megatron.core import parallel_state

    from megatron_rl.parallel.groups import build_groups, destroy_groups
    from megatron_rl.policy.policy import build_policy

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
        optimizers = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
        forget_models([*optimizers, *(m for c in policy.wrapped for m in c.modules())])
        del policy, optimizers
        destroy_groups()
        gc.collect()


def packed_mini_batches(policy: Any, samples: list[Sample]) -> list[list[Any]]:
    """This rank's packs of the rollout batch, a list for each mini-batch."""
    from megatron_rl.policy.batch import pack_mini_batches

    config, data = policy.config, policy.groups.data
    share = SEQUENCES // data.size()
    starts = [m * SEQUENCES + data.rank() * share for m in range(MINI_BATCHES)]
    slices = [samples[start : start + share] for start in starts]
    return pack_mini_batches(slices, config, policy.groups, policy.device.torch_device)


def observed_update(
    policy: Any, items: list[Any], telemetry: Any, update: Any
) -> tuple[dict[str, float], list[Any], list[Any]]:
    """One update: its metrics, the inputs its loss was called with, pack by pack, and the packs
    that it returns.
    """
    from megatron_rl.catalogue.find import find
    from megatron_rl.catalogue.kinds import LOSSES
    from megatron_rl.observe.metrics import MetricSums

    seen = []
    row = find(LOSSES, policy.config.algorithm.name)
    loss = row.load()

    def spy(inputs, settings):
        if inputs.logprobs.requires_grad:  # not where only the denominator is asked for
            seen.append(inputs)
        return loss(inputs, settings)

    sums = MetricSums(policy.config.model.num_layers, policy.device.torch_device)
    with mock.patch(row.code.replace(":", "."), spy):
        after = update(policy, items, sums, telemetry)
    metrics = sums.reduce(policy.groups.world)
    return {name: metrics[name] for name in ("loss", "grad_norm", "entropy")}, seen, after


def by_sequence(pack: Any, values: Any) -> dict[tuple, np.ndarray]:
    """Values [T] at the trained positions of each sequence; the sequence's tokens are its name."""
    result = {}
    for sequence in range(pack.num_sequences):
        here = pack.sequence_ids == sequence
        result[name_of(pack, here)] = values.detach()[here & pack.mask].cpu().numpy()
    return result


def name_of(pack: Any, here: Any) -> tuple[int, ...]:
    """The tokens of the sequence at the positions ``here``, bool [T]: what is read of it, and its
    last target.
    """
    return (*pack.tokens[here].tolist(), int(pack.targets[here][-1]))


def unshard_gradients(policy: Any) -> None:
    """Give every rank all reduced gradients where the distributed optimizer left it its shard."""
    import torch.distributed as dist

    if not policy.config.parallel.distributed_optimizer:
        return
    for chunk in policy.wrapped:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.chunk(group.size()))
                dist.all_gather(shards, shards[group.rank()].clone(), group=group)


def gathered(policy: Any, attribute: str) -> dict[str, np.ndarray]:
    """``data`` or ``main_grad`` of this rank's parameters, whole, by global name. A collective."""
    from megatron_rl.models.parameters import parameter_views

    found = {}
    for view in parameter_views(policy.chunks, policy.groups):
        tensor = getattr(view.parameter, attribute, None)  # a frozen weight has no gradient
        if tensor is not None:
            found[view.name] = view.gather(view.of(tensor).detach()).float().cpu().numpy().copy()
    return found


def whole_weights(policy: Any) -> dict[str, np.ndarray]:
    """This rank's parameters, whole, by global name, and the routers' biases. A collective."""
    return gathered(policy, "data") | _expert_biases(policy)


def _expert_biases(policy: Any) -> dict[str, np.ndarray]:
    biases = {
        layer.layer_number - 1: getattr(getattr(layer.mlp, "router", None), "expert_bias", None)
        for chunk in policy.chunks
        for layer in chunk.decoder.layers
    }
    return {
        f"expert bias of layer {number}": bias.cpu().numpy().copy()
        for number, bias in biases.items()
        if bias is not None
    }


def merge(parts: list[dict[str, Any]]) -> Run:
    """Put the ranks' parts together; copies of one tensor must agree."""
    merged: dict[str, dict] = {"old_logprobs": {}, "gamma": {}, "gradients": {}, "weights": {}}
    replicas = 0.0
    for part in parts:
        for kind, tensors in merged.items():
            for name, value in part[kind].items():
                first = tensors.setdefault(name, value)
                replicas = max(replicas, relative(value, first))
    return Run(scalars=parts[0]["scalars"], replica_difference=replicas, **merged)


def comparable_in_bf16(run: Run) -> Run:
    """The run as it can be compared in bf16, where a router may choose otherwise for a token.

    That changes the whole gradient of an expert that few tokens reach: the experts of a layer
    become one tensor a matrix, as the model holds them. Left out are what one token decides: the
    largest distances, the clip fractions of quarters of the tokens, and the expert biases, which a
    choice may step the other way.
    """

    def stacked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = {}
        for name in sorted(tensors):
            if name.startswith("expert bias"):
                continue
            parts.setdefault(re.sub(r"experts\.\d+\.", "experts.", name), []).append(tensors[name])
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    of_many = {
        name: value
        for name, value in run.scalars.items()
        if not name.startswith(("router/distance_max", "clip_fraction/gamma_q"))
    }
    return dataclasses.replace(
        run, scalars=of_many, gradients=stacked(run.gradients), weights=stacked(run.weights)
    )


def compare_in_bf16(
    case: Case, references: References, seeds: int = BF16_SEEDS
) -> tuple[dict[str, float], dict[str, float]]:
    """How much further from fp32 a layout is in bf16 than a single process is, and the bounds.

    A single difference is one draw of the machine's rounding and may be several times its usual
    size. So each of ``NUMBERS`` is measured on several seeds (other weights, other sequences, hence
    other roundings), and what counts is the geometric mean of the ratios. Where a layout rounds as
    often as a single process does, the logarithm of a ratio has mean 0 and the standard deviation
    `BF16_SPREAD`, whatever the processor; the bound is `BF16_SIGMAS` standard deviations of the
    mean. ``replicas`` is the largest difference itself, which is 0 in bf16 too.

    Returns:
        Ratios and bounds (`bf16_bounds`), by the names of ``NUMBERS``.
    """
    cases = [dataclasses.replace(case, seed=seed) for seed in range(seeds)]
    exact = [comparable_in_bf16(references.of(in_fp32(each))) for each in cases]
    narrow = [comparable_in_bf16(references.of(each)) for each in cases]
    found = [comparable_in_bf16(run_case(each)) for each in cases]
    factors = mean_factors(log_ratios(found, narrow, exact))
    replicas = max(run.replica_difference for run in found)
    return factors | {"replicas": replicas}, bf16_bounds(seeds)


def mean_factors(ratios: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The geometric means of ratios given as logarithms."""
    return {name: float(np.exp(values.mean())) for name, values in ratios.items()}


def bf16_bounds(seeds: int = BF16_SEEDS) -> dict[str, float]:
    """The largest geometric mean over these many seeds, by the names of ``NUMBERS``."""
    bounds = {
        name: float(np.exp(BF16_SIGMAS * spread / seeds**0.5))
        for name, spread in BF16_SPREAD.items()
    }
    return bounds | {"replicas": 0.0}


def beyond(numbers: Mapping[str, float], bounds: Mapping[str, float]) -> list[str]:
    """The names of the numbers that are above their bound."""
    return [name for name in NUMBERS if name in numbers and not numbers[name] <= bounds[name]]


def log_ratios(
    found: Sequence[Run], narrow: Sequence[Run], exact: Sequence[Run]
) -> dict[str, np.ndarray]:
    """log(distance of ``found`` from ``exact`` / distance of ``narrow`` from ``exact``), a value a
    seed, by the names of ``NUMBERS`` without replicas.

    A scalar's distance is relative to its size over all seeds: a loss may be nearly 0 by chance.
    """
    size = {
        name: float(np.sqrt(np.mean([run.scalars[name] ** 2 for run in exact])))
        for name in exact[0].scalars
    }
    logs: dict[str, list[float]] = {}
    for layout, single, true in zip(found, narrow, exact, strict=True):
        distances = [
            {kind: max(rows.values()) for kind, rows in errors_of(run, true, size).items()}
            for run in (layout, single)
        ]
        for name in distances[0]:
            of_layout, of_single = (max(each[name], 1e-9) for each in distances)
            logs.setdefault(name, []).append(float(np.log(of_layout / of_single)))
    return {name: np.array(values) for name, values in logs.items()}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """norm(found - expected) / norm(expected); infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    distance = float(np.linalg.norm((found - expected).astype(np.float64)))
    scale = float(np.linalg.norm(expected.astype(np.float64)))
    return 0.0 if distance == 0.0 else distance / scale if scale else float("inf")


def compare(found: Run, expected: Run) -> Difference:
    """The differences of a run from the run of one process."""
    errors = errors_of(found, expected, expected.scalars)
    worst = max(
        (error, f"{kind}: {name}") for kind, rows in errors.items() for name, error in rows.items()
    )
    return Difference(
        **{kind: max(rows.values(), default=0.0) for kind, rows in errors.items()},
        replicas=found.replica_difference,
        worst=worst[1],
        smallest_gamma=float(
            min((v.min(initial=1.0) for v in expected.gamma.values()), default=1.0)
        ),
    )


def errors_of(found: Run, expected: Run, size: Mapping[str, float]) -> dict[str, dict[Any, float]]:
    """Each scalar's error relative to its ``size``, each tensor's to its norm: kind -> name ->
    error.
    """
    errors: dict[str, dict[Any, float]] = {kind: {} for kind in SCALARS}
    for name, value in expected.scalars.items():
        kind = name.partition(" of update")[0]
        error = abs(found.scalars[name] - value) / max(abs(size[name]), 1e-3)
        errors[kind if kind in errors else "statistics"][name] = error
    errors["logprobs"] = _errors(found.old_logprobs, expected.old_logprobs)
    for kind in ("gamma", "gradients", "weights"):
        errors[kind] = _errors(getattr(found, kind), getattr(expected, kind))
    return errors


def _errors(found: Mapping, expected: Mapping) -> dict[Any, float]:
    if set(found) != set(expected):
        missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        raise AssertionError(f"missing {missing[:3]}, unexpected {extra[:3]}")
    return {name: relative(found[name], value) for name, value in expected.items()}

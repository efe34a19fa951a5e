"""The one table of metric names: unit, reduction over ranks, verbs that write it, meaning.

Names ending in ``layer_NN`` stand for one name a layer, such as ``router/entropy/layer_03``: the
transformer layer's number over all pipeline stages, from 0, at least two digits. ``PART`` stands
for one name a part of the reward that the verifier fills, a metric of a user's own loss, or a data
set of a mixture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from megatron_rl.catalogue.nearest import nearest

Reduction = Literal["mean", "sum", "max", "min", "given"]

_LAYER = re.compile(r"(?P<base>.+)/layer_(?P<layer>\d{2,})")
_LAYER_SUFFIX = "/layer_NN"
_PART = re.compile(r"(?P<base>reward|eval|loss|data|share)/(?P<part>[a-z][a-z0-9_]*)")
_PART_SUFFIX = "/PART"


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str
    unit: str
    reduction: Reduction
    """mean: sum of sums / sum of counts; sum, max, min: over ranks; given: set after the
    reduction, never added."""
    verbs: str
    meaning: str


_RL, _SFT, _ANY, _EVAL = "train", "sft", "train sft", "train sft evaluate"

# fmt: off
_TABLE: tuple[Metric, ...] = (
    Metric("step", "", "given", _EVAL,
           "Steps done; 0 holds the evaluation before the first step."),
    Metric("configuration", "step", "given", _ANY,
           "First step of the configuration in force: configs/step_N.yaml."),
    Metric("loss", "", "mean", _ANY,
           "Training loss, mean over optimizer steps."),
    Metric("loss/PART", "", "mean", _RL,
           "A metric of a user's own loss, as the loss averages it."),
    Metric("lr", "", "mean", _ANY,
           "Learning rate, mean over optimizer steps."),
    Metric("grad_norm", "", "mean", _ANY,
           "Global gradient norm before clipping, mean over optimizer steps."),
    Metric("accuracy", "fraction", "mean", _SFT,
           "Target tokens that are the model's most likely token."),
    Metric("tokens/step", "tokens", "sum", _ANY,
           "Tokens of the step's sequences, prompts included, padding not."),
    Metric("tokens_per_second", "tokens/s", "given", _ANY,
           "tokens/step divided by time/step_s, all ranks together."),
    Metric("reward/mean", "", "mean", _RL,
           "Reward, mean over completions."),
    Metric("reward/std", "", "mean", _RL,
           "Standard deviation of the reward in a group, mean over groups."),
    Metric("reward/solved", "fraction", "mean", _RL,
           "Completions the verifier calls right."),
    Metric("reward/well_formed", "fraction", "mean", _RL,
           "Completions in the form the verifier expects, right or not."),
    Metric("reward/PART", "", "mean", _RL,
           "Any other part of the reward, mean over the completions that have it."),
    Metric("data/PART", "", "mean", _RL,
           "Reward of the answers to problems of one data set of a mixture."),
    Metric("share/PART", "fraction", "mean", _RL,
           "Problems of one data set of a mixture, of all that were drawn."),
    Metric("groups/zero_variance_fraction", "fraction", "mean", _RL,
           "Groups with equal rewards: no gradient from them."),
    Metric("groups/rounds", "rounds", "mean", _RL,
           "Rounds of dynamic sampling."),
    Metric("groups/drawn", "groups", "sum", _RL,
           "Groups sampled by dynamic sampling, those not trained on included."),
    Metric("rollout/staleness", "steps", "mean", _RL,
           "Age of the weights that sampled the first token, mean over answers; servers only."),
    Metric("rollout/partial_fraction", "fraction", "mean", _RL,
           "Answers that weights of more than one step sampled (partial rollouts); servers only."),
    Metric("response/length_mean", "tokens", "mean", _RL,
           "Tokens of a completion that the policy wrote."),
    Metric("response/length_max", "tokens", "max", _RL,
           "Tokens that the policy wrote of the longest completion."),
    Metric("response/finished_fraction", "fraction", "mean", _RL,
           "Completions that ended before the length limit."),
    Metric("clip_fraction", "fraction", "mean", _RL,
           "Completion tokens (GSPO: sequences) whose ratio was clipped; DPPO: left out."),
    Metric("clip_fraction/gamma_q1", "fraction", "given", _RL,
           "Clipped share of the quarter of the tokens with the smallest gamma of the step."),
    Metric("clip_fraction/gamma_q2", "fraction", "given", _RL,
           "The same of the second quarter."),
    Metric("clip_fraction/gamma_q3", "fraction", "given", _RL,
           "The same of the third quarter."),
    Metric("clip_fraction/gamma_q4", "fraction", "given", _RL,
           "The same of the quarter with the largest gamma."),
    Metric("entropy", "nat", "mean", _RL,
           "Entropy of the policy, mean over completion tokens."),
    Metric("kl_old", "nat", "mean", _RL,
           "KL(old || new), k3 estimate over completion tokens; old is the policy at scoring."),
    Metric("kl_ref", "nat", "mean", _RL,
           "KL(new || reference), k3 estimate over completion tokens."),
    Metric("ratio_mean", "", "mean", _RL,
           "Importance ratio new / old without gamma, mean over completion tokens."),
    Metric("ratio_max", "", "max", _RL,
           "Largest importance ratio of a completion token."),
    Metric("weights/ess_token", "fraction", "given", _RL,
           "Effective sample size of the tokens' weights new / sampler; 1: all are equal."),
    Metric("weights/ess_sequence", "fraction", "given", _RL,
           "The same of the completions' weights, products over their tokens."),
    Metric("weights/ess_geometric", "fraction", "given", _RL,
           "The same of the geometric means of the completions' weights."),
    Metric("weights/variance_token", "", "given", _RL,
           "Variance of the tokens' weights new / sampler."),
    Metric("weights/variance_sequence", "", "given", _RL,
           "Variance of the completions' weights, products over their tokens."),
    Metric("weights/variance_geometric", "", "given", _RL,
           "Variance of the geometric means of the completions' weights."),
    Metric("gate_mean", "", "mean", _RL,
           "SAPO's gate 4 p (1 - p) or DRPO's gradient weight, mean over completion tokens."),
    Metric("mismatch/kl", "nat", "mean", _RL,
           "KL(sampler || old), k3 estimate over completion tokens."),
    Metric("mismatch/logprob_max", "nat", "max", _RL,
           "Largest |log-prob of the sampler - log-prob in scoring| of a token."),
    Metric("mismatch/router_logprob_max", "nat", "max", _RL,
           "The same of a router, in packs that check rollout.scores, where experts agree."),
    Metric("mismatch/router_flips", "fraction", "mean", _RL,
           "Choices of the sampler's routers that scoring did not repeat, in the same packs."),
    Metric("mismatch/weight_mean", "", "mean", _RL,
           "Weight of the sampler correction, mean over tokens."),
    Metric("mismatch/clipped_fraction", "fraction", "mean", _RL,
           "Tokens whose sampler correction was capped or zeroed."),
    Metric("router/raw_gamma_mean", "", "mean", _RL,
           "exp(-router distance): gamma before the floor, mean over completion tokens."),
    Metric("router/raw_gamma_min", "", "min", _RL,
           "Smallest raw gamma of a completion token."),
    Metric("router/gamma_mean", "", "mean", _RL,
           "gamma as the loss takes it, after the floor, mean over completion tokens."),
    Metric("router/floor_fraction", "fraction", "mean", _RL,
           "Completion tokens whose raw gamma is below the floor."),
    Metric("router/distance_mean", "nat", "mean", _RL,
           "Router distance, mean over layers and completion tokens."),
    Metric("router/distance_max", "nat", "max", _RL,
           "Largest router distance of a completion token in a layer."),
    Metric("router/top_k_overlap", "fraction", "mean", _RL,
           "Experts of the scoring pass used again in the update; 1 under routing replay."),
    Metric("router/load_max_over_mean", "", "mean", _RL,
           "Load of the busiest expert / mean load, mean over layers."),
    Metric("router/entropy", "nat", "mean", _RL,
           "Entropy of the router's distribution over experts, mean over tokens."),
    Metric("router/raw_gamma_mean/layer_NN", "", "mean", _RL,
           "exp(-router distance) of the layer alone, mean over completion tokens."),
    Metric("router/distance_mean/layer_NN", "nat", "mean", _RL,
           "Router distance of the layer, mean over completion tokens."),
    Metric("router/distance_max/layer_NN", "nat", "max", _RL,
           "Router distance of the layer, largest of a completion token."),
    Metric("router/floor_fraction/layer_NN", "fraction", "mean", _RL,
           "Completion tokens whose raw gamma of the layer alone is below the floor."),
    Metric("router/top_k_overlap/layer_NN", "fraction", "mean", _RL,
           "router/top_k_overlap of the layer."),
    Metric("router/load_max_over_mean/layer_NN", "", "mean", _RL,
           "router/load_max_over_mean of the layer."),
    Metric("router/entropy/layer_NN", "nat", "mean", _RL,
           "router/entropy of the layer."),
    Metric("servers/used", "servers", "min", _ANY,
           "Rollout servers that have the weights of the step and are in use."),
    Metric("servers/probe_difference", "nat", "max", _ANY,
           "Largest |log-prob of a server - log-prob of the trainer| of a probe's token."),
    Metric("servers/failures", "requests", "sum", _ANY,
           "Requests that a server did not answer, or answered wrongly; they were sent again."),
    Metric("servers/restarts", "servers", "sum", _ANY,
           "Servers of the run that ended and were started again."),
    Metric("eval/pass@1", "fraction", "mean", _EVAL,
           "Held-out problems solved by the greedy answer."),
    Metric("eval/mean@k", "fraction", "mean", _EVAL,
           "Sampled answers to held-out problems that are right, k a problem."),
    Metric("eval/well_formed", "fraction", "mean", _EVAL,
           "Greedy answers in the form the verifier expects."),
    Metric("eval/PART", "", "mean", _EVAL,
           "Any other part of the reward, mean over the greedy answers that have it."),
    Metric("eval/problems", "problems", "sum", _EVAL,
           "Held-out problems of the evaluation."),
    Metric("eval/samples", "answers", "max", _EVAL,
           "k of eval/mean@k."),
    Metric("time/rollout_s", "s", "max", _RL,
           "Sampling and rewarding the completions; the slowest rank."),
    Metric("time/score_s", "s", "max", _RL,
           "Packs, and the no-grad pass for old log-probs and traces; the slowest rank."),
    Metric("time/update_s", "s", "max", _ANY,
           "Forward, backward and optimizer; the slowest rank."),
    Metric("time/sync_s", "s", "max", _ANY,
           "Sending the weights to the rollout servers and probing them; the slowest rank."),
    Metric("time/step_s", "s", "max", _ANY,
           "The whole step without evaluation and checkpoint; the slowest rank."),
    Metric("time/eval_s", "s", "max", _EVAL,
           "The evaluation written with this step; the slowest rank."),
    Metric("time/checkpoint_s", "s", "max", _ANY,
           "The checkpoint written before this step; the slowest rank."),
    Metric("memory/peak_gib", "GiB", "max", _ANY,
           "Peak memory since the start: CUDA allocations, or resident set on CPU."),
)
# fmt: on

METRICS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _TABLE})

#: Names up to version 0.1.0 -> names of today, those of layers included. For one release files and
#: loggers are given both.
OLD_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "router/shift_mean": "router/raw_gamma_mean",
        "router/shift_min": "router/raw_gamma_min",
        "rollout/lag": "rollout/staleness",
        "rollout/carried_fraction": "rollout/partial_fraction",
    }
)
_OLD_OF = {new: old for old, new in OLD_NAMES.items()}


def with_old_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics, followed by a copy under its old name of each that was renamed."""
    return {**metrics, **_renamed(metrics, _OLD_OF)}


def with_new_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of any version, under the names of today only."""
    new = _renamed(record, OLD_NAMES)
    kept = {name: value for name, value in record.items() if _base(name) not in OLD_NAMES}
    return new | kept


def _renamed(metrics: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The metrics whose name is a key of ``names``, under the name it stands for."""
    return {
        names[base] + name.removeprefix(base): value
        for name, value in metrics.items()
        if (base := _base(name)) in names
    }


def _base(name: str) -> str:
    """router/entropy of router/entropy/layer_03; any other name as it is."""
    layered = split_layer(name)
    return layered[0] if layered else name


def layer_name(name: str, layer: int) -> str:
    """The per-layer name of a metric: ``layer_name("router/entropy", 3)`` is
    router/entropy/layer_03."""
    return f"{name}/layer_{layer:02d}"


def split_layer(name: str) -> tuple[str, int] | None:
    """Inverse of ``layer_name``; None for a name that is not per layer."""
    match = _LAYER.fullmatch(name)
    return (match["base"], int(match["layer"])) if match else None


def split_part(name: str) -> tuple[str, str] | None:
    """("reward", "format") of reward/format, a part of the reward that has no row of its own; None
    for any other name."""
    match = _PART.fullmatch(name)
    return (match["base"], match["part"]) if match and name not in METRICS else None


def metric(name: str) -> Metric:
    """The table's row for a name. ValueError: the table has no such name."""
    part = split_part(name)
    return METRICS[f"{part[0]}{_PART_SUFFIX}"] if part else fixed_metric(name)


def fixed_metric(name: str) -> Metric:
    """The row of a name that is no part. ValueError: the table has no such name."""
    layered = split_layer(name)
    row = METRICS.get(f"{layered[0]}{_LAYER_SUFFIX}" if layered else name)
    if row is None or name.endswith((_LAYER_SUFFIX, _PART_SUFFIX)):  # a row stands for its names
        near = nearest(name, METRICS)
        hint = f", such as {near!r}" if near else ""
        raise ValueError(
            f"unknown metric {name!r}; expected a name of the table METRICS in "
            f"megatron_rl/observe/metric_table.py{hint}; add a row there for a new metric"
        )
    return row


def reduced_names(num_layers: int) -> tuple[str, ...]:
    """Every name a rank may add, sorted; ``layer_NN`` rows once a layer 0..num_layers-1. Without
    parts of the reward, which are known once a verifier has filled them."""
    names = []
    for row in _TABLE:
        if row.name.endswith(_LAYER_SUFFIX):
            base = row.name.removesuffix(_LAYER_SUFFIX)
            names += [layer_name(base, layer) for layer in range(num_layers)]
        elif row.reduction != "given" and not row.name.endswith(_PART_SUFFIX):
            names.append(row.name)
    return tuple(sorted(names))

"""Which charts the report shows, in order, and which metrics each draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_rl.observe.metric_table import split_part
from megatron_rl.report.run import Run

_CURVES = 6  # of a chart


@dataclass(frozen=True)
class Plot:
    """One chart. ``metrics``: (name, label) pairs; for ``layers`` the overall metric, whose
    layers are a heatmap."""

    name: str
    title: str
    caption: str
    metrics: tuple[tuple[str, str], ...]
    kind: Literal["lines", "layers", "time"] = "lines"
    percent: bool = False
    log: bool = False
    """Logarithmic axis, or colours, where every value is above 0 and they span a wide range."""
    smoothed: bool = True
    """The page's smoothing applies."""
    largest: bool = False
    """Of layers: the metric is a largest value, not a mean."""
    notable: Literal["high", "low"] = "high"
    """Of layers: the values to look for."""


#: Heading -> charts below it.
PLOTS: Mapping[str, tuple[Plot, ...]] = {
    "Results": (
        Plot(
            "reward",
            "Reward",
            "Mean reward of the sampled completions, and the fractions solved and well formed.",
            (
                ("reward/mean", "mean reward"),
                ("reward/solved", "solved"),
                ("reward/well_formed", "well formed"),
            ),
        ),
        Plot(
            "eval",
            "Held-out problems",
            "Greedy pass@1 and mean@k of sampled answers.",
            (("eval/pass@1", "pass@1 (greedy)"), ("eval/mean@k", "mean@k (sampled)")),
            percent=True,
            smoothed=False,
        ),
        Plot(
            "accuracy",
            "Token accuracy",
            "Target tokens that are the most likely token.",
            (("accuracy", "accuracy"),),
            percent=True,
        ),
        Plot(
            "loss",
            "Loss",
            "Training loss, mean over the optimizer steps of a step.",
            (("loss", "loss"),),
        ),
    ),
    "Routers": (
        Plot(
            "raw_gamma",
            "Raw gamma",
            "gamma = exp(-router distance) before the floor: mean and minimum over tokens.",
            (("router/raw_gamma_mean", "mean"), ("router/raw_gamma_min", "minimum")),
        ),
        Plot(
            "clip_by_gamma",
            "Clipped tokens by gamma",
            "Clipped share of each quarter of the step's tokens, by gamma.",
            (
                ("clip_fraction/gamma_q1", "smallest gamma"),
                ("clip_fraction/gamma_q2", "second"),
                ("clip_fraction/gamma_q3", "third"),
                ("clip_fraction/gamma_q4", "largest gamma"),
            ),
            percent=True,
        ),
        Plot(
            "router_distance",
            "Router distance by layer",
            "Mean over tokens of |new - old| log-probability of the old experts.",
            (("router/distance_mean", "all layers"),),
            "layers",
            log=True,
        ),
        Plot(
            "router_distance_max",
            "Largest router distance by layer",
            "Largest over tokens of |new - old| log-probability of the old experts.",
            (("router/distance_max", "all layers"),),
            "layers",
            log=True,
            largest=True,
        ),
        Plot(
            "top_k_overlap",
            "Top-K overlap by layer",
            "Experts of the scoring pass that the updated router chooses again.",
            (("router/top_k_overlap", "all layers"),),
            "layers",
            percent=True,
            notable="low",
        ),
        Plot(
            "floor_fraction",
            "Floored tokens by layer",
            "Tokens whose raw gamma of the layer alone is below the floor.",
            (("router/floor_fraction", "all layers"),),
            "layers",
            percent=True,
        ),
        Plot(
            "expert_load",
            "Expert load by layer",
            "Load of the busiest expert / mean load; 1 is perfect balance.",
            (("router/load_max_over_mean", "all layers"),),
            "layers",
        ),
        Plot(
            "router_entropy",
            "Router entropy by layer",
            "Entropy of the routers' distribution over experts, nat.",
            (("router/entropy", "all layers"),),
            "layers",
        ),
    ),
    "Updates": (
        Plot(
            "entropy",
            "Entropy",
            "Entropy of the policy over completion tokens, nat.",
            (("entropy", "entropy"),),
        ),
        Plot(
            "sample_size",
            "Effective sample size",
            "Of the importance weights new / sampler, as a fraction: 1 if all are equal.",
            (
                ("weights/ess_token", "tokens"),
                ("weights/ess_sequence", "completions (product)"),
                ("weights/ess_geometric", "completions (geometric mean)"),
            ),
            percent=True,
        ),
        Plot(
            "weight_variance",
            "Variance of the weights",
            "Of the importance weights new / sampler.",
            (
                ("weights/variance_token", "tokens"),
                ("weights/variance_sequence", "completions (product)"),
                ("weights/variance_geometric", "completions (geometric mean)"),
            ),
            log=True,
        ),
        Plot(
            "kl",
            "Divergence",
            "k3 estimates, nat: KL(old || new), KL(sampler || old), KL(new || reference).",
            (("kl_old", "old policy"), ("mismatch/kl", "sampler"), ("kl_ref", "reference")),
            log=True,
        ),
        Plot(
            "grad_norm",
            "Gradient norm",
            "Global norm before clipping.",
            (("grad_norm", "norm"),),
            log=True,
        ),
        Plot(
            "clip_fraction",
            "Clipped and floored tokens",
            "Tokens with a clipped ratio; tokens with gamma at the floor.",
            (("clip_fraction", "ratio clipped"), ("router/floor_fraction", "gamma at floor")),
            percent=True,
        ),
        Plot(
            "learning_rate",
            "Learning rate",
            "Mean over the optimizer steps of a step.",
            (("lr", "lr"),),
            smoothed=False,
        ),
    ),
    "Answers": (
        Plot(
            "response_length",
            "Response length",
            "Tokens of a completion.",
            (("response/length_mean", "mean"), ("response/length_max", "longest")),
        ),
        Plot(
            "finished",
            "Finished completions",
            "Completions that ended before the length limit; groups with equal rewards.",
            (
                ("response/finished_fraction", "finished"),
                ("groups/zero_variance_fraction", "groups without gradient"),
            ),
            percent=True,
        ),
    ),
    "Speed": (
        Plot(
            "time",
            "Time by phase",
            "Seconds a step, slowest rank, stacked.",
            (
                ("time/rollout_s", "rollout"),
                ("time/score_s", "score"),
                ("time/update_s", "update"),
                ("time/sync_s", "sync"),
            ),
            "time",
        ),
        Plot(
            "throughput",
            "Throughput",
            "Tokens trained on a second, all ranks together.",
            (("tokens_per_second", "tokens/s"),),
        ),
    ),
}


def part_names(run: Run) -> list[str]:
    """Metrics of the run without a row of their own, sorted: parts of the reward, metrics of a
    user's own loss, and data sets of a mixture.
    """
    return sorted(name for name in run.names if split_part(name))


def part_plots(run: Run) -> tuple[Plot, ...]:
    """Plots of `part_names`, a few curves each; () if there are none."""
    names = part_names(run)
    plots: list[Plot] = []
    for title, text, bases in (
        (
            "Parts of the reward",
            "Means over sampled completions (reward) and greedy answers (eval).",
            ("reward/", "eval/"),
        ),
        ("Metrics of the loss", "Those that the loss itself reports.", ("loss/",)),
        ("Data sets: reward", "Of the answers to problems of each.", ("data/",)),
        ("Data sets: share", "Problems of each, of all that were drawn.", ("share/",)),
    ):
        mine = [name for name in names if name.startswith(bases)]
        for start in range(0, len(mine), _CURVES):
            chosen = mine[start : start + _CURVES]
            curves = tuple((name, name) for name in chosen)
            plots.append(Plot(f"parts_{len(plots) + 1}", title, text, curves))
    return tuple(plots)

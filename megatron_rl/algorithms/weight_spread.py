"""How unequal the importance weights are: effective sample size and variance.

Weights are those of the samples, w = pi_new / mu (pi_old where the inputs hold no mu), without
gamma~ and before any clip, of three kinds:

    token      w_t
    sequence   prod_t w_t, the weight of an answer; for long answers it is far from 1 soon
    geometric  exp(1/|y_i| sum_t log w_t), the ratio of gspo

    ess = (sum w)^2 / (n sum w^2), of n weights: 1 if all are equal, 1 / n if one outweighs all
    variance = 1/n sum w^2 - (1/n sum w)^2

arXiv 2605.14220 takes the effective sample size as an alarm that mean KL estimates miss. Sums of
packs and ranks add up, and both formulas are taken once, of the whole step.
"""

from __future__ import annotations

import torch

from megatron_rl.algorithms.aggregate import make_segments, sequence_mean, sequence_sum
from megatron_rl.algorithms.divergence import Anchor, anchored
from megatron_rl.algorithms.interface import LossInputs
from megatron_rl.algorithms.ratios import exp_ratio, log_ratio

#: The rows of ``weight_sums``.
KINDS = ("token", "sequence", "geometric")


@torch.no_grad()
def weight_sums(inputs: LossInputs) -> torch.Tensor:
    """For each of `KINDS`: n, sum (w - 1), sum (w - 1)^2; float64 [3, 3], left on the device.

    Of w - 1, because the variance of weights near 1 would be lost in rounding. Log-weights above
    60 count as 60.
    """
    anchor: Anchor = "old" if inputs.rollout_logprobs is None else "sampler"
    x = log_ratio(anchored(inputs, anchor)).double()
    segments = make_segments(inputs.mask, inputs.sequence_ids, inputs.num_sequences, x.dtype)
    answers = segments.lengths > 0
    logs = (
        (x, segments.mask),
        (sequence_sum(x, segments), answers),
        (sequence_mean(x, segments), answers),
    )
    rows = []
    for log_weight, counted in logs:
        excess = torch.where(counted, exp_ratio(log_weight) - 1, 0.0)
        rows.append(torch.stack([counted.sum().double(), excess.sum(), excess.square().sum()]))
    return torch.stack(rows)


def spread_metrics(sums: torch.Tensor) -> dict[str, float]:
    """Metrics of ``weight_sums`` that are added up, [3, 3] in host memory; {} without a token."""
    metrics = {}
    for kind, (count, total, squares) in zip(KINDS, sums.tolist()):
        if count <= 0:
            continue
        excess = total / count
        variance = max(squares / count - excess**2, 0.0)
        mean = 1 + excess
        second = variance + mean**2  # 0 where every weight is 0 to the last bit
        metrics[f"weights/ess_{kind}"] = mean**2 / second if second > 0 else 1.0
        metrics[f"weights/variance_{kind}"] = variance
    return metrics

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
    """For each of `KINDS`: n, sum w, sum w^2, sum (w - 1), sum (w - 1)^2; float64 [3, 5], left on
    the device.

    Also of w - 1, because the variance of weights near 1 would be lost in rounding, as that of
    weights near 0 would be with w - 1 alone. Log-weights above 60 count as 60.
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
        weight = torch.where(counted, exp_ratio(log_weight), 1.0)
        excess = weight - 1
        weight = torch.where(counted, weight, 0.0)
        columns = [counted.double(), weight, weight.square(), excess, excess.square()]
        rows.append(torch.stack([column.sum() for column in columns]))
    return torch.stack(rows)


def spread_metrics(sums: torch.Tensor) -> dict[str, float]:
    """Metrics of ``weight_sums`` that are added up, [3, 5] in host memory; {} without a token."""
    metrics = {}
    for kind, (count, total, squares, excess, excess_squares) in zip(KINDS, sums.tolist()):
        if count <= 0:
            continue
        if abs(excess) < 0.5 * count:  # near 1
            variance = excess_squares / count - (excess / count) ** 2
        else:
            variance = squares / count - (total / count) ** 2
        # Sum of squares 0: every weight is 0 to the last bit.
        metrics[f"weights/ess_{kind}"] = total**2 / (count * squares) if squares > 0 else 1.0
        metrics[f"weights/variance_{kind}"] = max(variance, 0.0)
    return metrics

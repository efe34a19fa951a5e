"""Terms beside the policy loss: a KL penalty towards a reference policy, an entropy bonus, and a
penalty on routers that move away from the old policy's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from megatron_rl.algorithms.aggregate import Segments, SumAndCount, make_segments, over_tokens
from megatron_rl.algorithms.interface import LossInputs, LossOutputs
from megatron_rl.algorithms.kl import k1, k2, k3
from megatron_rl.algorithms.ratios import at_least_float32
from megatron_rl.catalogue.nearest import did_you_mean

ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


@dataclass(frozen=True)
class Regularisers:
    """Coefficients >= 0 (0: off) and the estimator of the KL. ValueError: unknown estimator."""

    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    shift_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.kl_estimator not in ESTIMATORS:
            raise ValueError(
                f"found unknown KL estimator {self.kl_estimator!r}"
                f"{did_you_mean(self.kl_estimator, ESTIMATORS)}; expected one of "
                f"{', '.join(ESTIMATORS)}"
            )

    @property
    def active(self) -> bool:
        """Whether there is anything to add."""
        return bool(self.kl_coef or self.entropy_coef or self.shift_coef)


def add_regularisers(
    outputs: LossOutputs,
    inputs: LossInputs,
    settings: Regularisers,
    denominator_per_token: torch.Tensor | None = None,
) -> LossOutputs:
    """loss + kl_coef mean_t kl_t - entropy_coef mean_t H_t + shift_coef mean_t Delta_t, means over
    the trained tokens.

    kl_t estimates KL(pi_new || pi_ref) from log pi_new and log pi_ref of token t, nats; its
    gradient goes through log pi_new(y_t), without an importance ratio (as in GRPO, arXiv
    2402.03300, eq. 3-4). H_t is ``inputs.entropy``. Delta_t is ``inputs.distance``, the exponent of
    gamma_t = exp(-Delta_t) (``router_shift``); this penalty is our own.

    A loss's sum is divided once, by its own denominator D of all packs and ranks. So the sums over
    tokens are added with the factor D / N, N being the number of trained tokens of all packs and
    ranks: ``denominator_per_token``, 0-d; None: of these inputs alone. 1 for a loss over tokens.
    With ``ref_logprobs`` the metrics hold kl_ref (k3) whatever the coefficient. Raises ValueError
    if a coefficient is above 0 and what it needs is not in the inputs.
    """
    segments = make_segments(
        inputs.mask, inputs.sequence_ids, inputs.num_sequences, outputs.loss_sum.dtype
    )
    metrics = dict(outputs.metrics)
    if inputs.ref_logprobs is not None:
        kl_ref, count = _kl_sum(inputs, segments, "k3")
        metrics["kl_ref"] = (kl_ref.detach(), count)
    total = outputs.loss_sum
    if settings.active:
        if denominator_per_token is None:
            denominator_per_token = outputs.denominator / over_tokens(total, segments)[1]
        scale = denominator_per_token.to(total.dtype)
        total = total + scale * _terms(inputs, segments, settings)
    return dataclasses.replace(outputs, loss_sum=total, metrics=metrics)


def _terms(inputs: LossInputs, segments: Segments, settings: Regularisers) -> torch.Tensor:
    """kl_coef sum_t kl_t - entropy_coef sum_t H_t + shift_coef sum_t Delta_t, 0-d."""
    total = inputs.logprobs.new_zeros(())
    if settings.kl_coef:
        total = total + settings.kl_coef * _kl_sum(inputs, segments, settings.kl_estimator)[0]
    for name, key, sign in (("entropy", "entropy_coef", -1), ("distance", "shift_coef", 1)):
        coefficient, values = sign * getattr(settings, key), getattr(inputs, name)
        if coefficient:
            if values is None:
                raise ValueError(_missing(name, f"the {name} of every token", key))
            total = total + coefficient * over_tokens(at_least_float32(values), segments)[0]
    return total


def _kl_sum(inputs: LossInputs, segments: Segments, estimator: str) -> SumAndCount:
    if inputs.ref_logprobs is None:
        raise ValueError(_missing("ref_logprobs", "log pi_ref of every token", "kl_coef"))
    # 0 outside the mask before anything is worked out: NaN there would reach the gradient.
    new = torch.where(segments.mask, at_least_float32(inputs.logprobs), 0.0)
    ref = torch.where(segments.mask, at_least_float32(inputs.ref_logprobs.detach()), 0.0)
    return over_tokens(ESTIMATORS[estimator](new, ref), segments)


def _missing(what: str, meaning: str, coefficient: str) -> str:
    return (
        f"found no {what} in the loss inputs; expected {meaning}; give it, or set {coefficient} "
        "to 0"
    )

"""The policy losses, with their settings. To ship one: a row here, and its file in
``algorithms/losses/``.
"""

from __future__ import annotations

from typing import Literal

from megatron_rl.catalogue.entry import LossEntry
from megatron_rl.catalogue.settings import Bound, Positive, Settings


class GrpoSettings(Settings):
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]."""

    clip_low: Bound = 0.2
    """The ratio is clipped below 1 - clip_low; .inf: not."""
    clip_high: Bound = 0.2
    """The ratio is clipped above 1 + clip_high; .inf: not."""


class DrGrpoSettings(GrpoSettings):
    """Clip range as in grpo."""

    length_divisor: Positive = 3000.0
    """Divides a sequence's sum: the longest answer allowed, tokens."""


class DapoSettings(GrpoSettings):
    """As grpo, with a wider upper bound ("clip-higher")."""

    clip_high: Bound = 0.28
    """The ratio is clipped above 1 + clip_high; .inf: not."""


class GspoSettings(Settings):
    """The sequence ratio is clipped to [1 - clip_low, 1 + clip_high]."""

    clip_low: Bound = 3e-4
    """The sequence's ratio is clipped below 1 - clip_low; .inf: not."""
    clip_high: Bound = 4e-4
    """The sequence's ratio is clipped above 1 + clip_high; .inf: not."""


class GmpoSettings(Settings):
    """The log-ratio of a token is clipped to [-clip_low, clip_high]. The floor gamma_min of rspo
    belongs to the weight, not to the loss (``algorithm.router_shift.floor``).
    """

    clip_low: Bound = 0.4
    """A token's log-ratio is clipped below -clip_low, nats; .inf: not."""
    clip_high: Bound = 0.4
    """A token's log-ratio is clipped above clip_high, nats; .inf: not."""


class CispoSettings(Settings):
    """The weight is clipped to [1 - clip_low, 1 + clip_high].

    clip_low = 1 means no lower bound, as in the paper. The paper leaves clip_high open; the cap of
    5 is from arXiv 2510.13786.
    """

    clip_low: Bound = 1.0
    """The weight is clipped below 1 - clip_low; 1: not."""
    clip_high: Bound = 4.0
    """The weight is clipped above 1 + clip_high; .inf: not."""


class SapoSettings(Settings):
    """Temperatures of the gate: the higher, the sooner it closes."""

    tau_positive: Positive = 1.0
    """Temperature of the gate where the advantage is above 0."""
    tau_negative: Positive = 1.05
    """Temperature of the gate elsewhere."""


class AnchoredSettings(Settings):
    """Of losses that compare the new probability of a token with that of an anchor."""

    anchor: Literal["sampler", "old"] = "sampler"
    """The policy that ratio and distance are measured from.

    sampler: the one that sampled, as in the papers. old: that of the scoring pass, as other losses
    have it; goes with algorithm.mismatch."""


class DppoSettings(AnchoredSettings):
    """A token is left out where it has moved further than this in the direction of its advantage.

    Thresholds are those of the authors' recipe. ratio_cap is their code's default; their recipe
    for a comparison has 10000.
    """

    divergence_low: Bound
    """Largest distance of a token that has become less likely; .inf: no limit."""
    divergence_high: Bound
    """Largest distance of a token that has become more likely; .inf: no limit."""
    ratio_cap: Bound = 20.0
    """The ratio, a detached weight, is cut to this; .inf: not."""


class DppoTvSettings(DppoSettings):
    """Distances are differences of probabilities."""

    divergence_low: Bound = 0.15
    """Largest fall of a token's probability; .inf: no limit."""
    divergence_high: Bound = 0.15
    """Largest rise of a token's probability; .inf: no limit."""


class DppoKlSettings(DppoSettings):
    """Distances are KL divergences of the token against all others."""

    divergence_low: Bound = 0.05
    """Largest KL of a token that has become less likely, nats; .inf: no limit."""
    divergence_high: Bound = 0.05
    """Largest KL of a token that has become more likely, nats; .inf: no limit."""


class DrpoSettings(AnchoredSettings):
    """The penalty stops a token whose probability has moved by delta, and turns it back beyond."""

    delta: Positive = 12.5
    """Change of probability at which a token's gradient is zero; above 1 the gradient is only
    weakened, by at most 1 / delta."""


_CODE = "megatron_rl.algorithms.losses"

LOSSES: tuple[LossEntry, ...] = (
    LossEntry(
        name="grpo",
        summary="clipped token ratios, mean over each answer, then over answers",
        code=f"{_CODE}.grpo:grpo",
        settings=GrpoSettings,
        paper="arXiv 2402.03300, eq. 3",
        denominator="sequences",
        router_shift="optional",
        sampler_weights=True,
    ),
    LossEntry(
        name="dr_grpo",
        summary="clipped token ratios, summed over an answer, over a constant length",
        code=f"{_CODE}.dr_grpo:dr_grpo",
        settings=DrGrpoSettings,
        paper="arXiv 2503.20783, fig. 1",
        denominator="sequences",
        router_shift="optional",
        sampler_weights=True,
    ),
    LossEntry(
        name="dapo",
        summary="clipped token ratios with a wider upper bound, mean over all tokens",
        code=f"{_CODE}.dapo:dapo",
        settings=DapoSettings,
        paper="arXiv 2503.14476, eq. 8",
        denominator="tokens",
        router_shift="optional",
        sampler_weights=True,
    ),
    LossEntry(
        name="gspo",
        summary="one ratio an answer, the geometric mean of its tokens' ratios, clipped as a whole",
        code=f"{_CODE}.gspo:gspo",
        settings=GspoSettings,
        paper="arXiv 2507.18071, eq. 5-7",
        denominator="sequences",
        router_shift="optional",
        geometric=True,
        sampler_weights=True,
    ),
    LossEntry(
        name="gmpo",
        summary="the geometric mean of an answer's clipped token ratios",
        code=f"{_CODE}.gmpo:gmpo",
        settings=GmpoSettings,
        paper="arXiv 2507.20673",
        denominator="sequences",
        router_shift="optional",
        geometric=True,
        sampler_weights=True,
    ),
    LossEntry(
        name="cispo",
        summary="REINFORCE with a clipped, detached weight; every token keeps its gradient",
        code=f"{_CODE}.cispo:cispo",
        settings=CispoSettings,
        paper="arXiv 2506.13585, eq. 4-5",
        denominator="tokens",
        router_shift="optional",
        sampler_weights=True,
    ),
    LossEntry(
        name="sapo",
        summary="a smooth gate on token ratios in the place of the clip",
        code=f"{_CODE}.sapo:sapo",
        settings=SapoSettings,
        paper="arXiv 2511.20347",
        denominator="sequences",
        router_shift="optional",
        sampler_weights=True,
    ),
    LossEntry(
        name="dppo_tv",
        summary="policy gradient without tokens whose probability has moved too far",
        code=f"{_CODE}.dppo:dppo_tv",
        settings=DppoTvSettings,
        paper="arXiv 2602.04879, eq. 11-13",
        denominator="tokens",
        router_shift="optional",
        sampler_weights=True,
    ),
    LossEntry(
        name="dppo_kl",
        summary="the same, with the KL of the token against all others as distance",
        code=f"{_CODE}.dppo:dppo_kl",
        settings=DppoKlSettings,
        paper="arXiv 2602.04879, eq. 11, 12, 14",
        denominator="tokens",
        router_shift="optional",
        sampler_weights=True,
    ),
    LossEntry(
        name="drpo",
        summary="importance-weighted gradient with a smooth penalty on the change of probability",
        code=f"{_CODE}.drpo:drpo",
        settings=DrpoSettings,
        paper="arXiv 2606.09821, section 3",
        denominator="tokens",
        router_shift="optional",
        sampler_weights=True,
    ),
    LossEntry(
        name="rspo",
        summary="gmpo on ratios scaled down where the routers have moved, before the clip",
        code=f"{_CODE}.rspo:rspo",
        settings=GmpoSettings,
        paper="arXiv 2510.23027 v2, eq. 11",
        denominator="sequences",
        router_shift="needed",
        geometric=True,
        sampler_weights=True,
    ),
    LossEntry(
        name="rspo_v1",
        summary="rspo as first published: scaled after the clip",
        code=f"{_CODE}.rspo_v1:rspo_v1",
        settings=GmpoSettings,
        paper="arXiv 2510.23027 v1",
        denominator="sequences",
        router_shift="needed",
        geometric=True,
        sampler_weights=True,
    ),
)

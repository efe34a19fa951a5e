"""What every policy loss takes and returns. Flat tensors, whole sequences, no ranks.

Legend of shapes: T tokens, N sequence slots (one more than the largest number of sequences), L MoE
layers, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

#: How gamma~ enters a loss, see README.md: on the ratio, on the ratio where A < 0 only, on the clip
#: range, or as the weight of a token in a geometric mean.
SHIFT_MODES = ("ratio", "negative_only", "range", "token_weight")


@dataclass(frozen=True)
class LossInputs:
    """The tokens of whole sequences laid one behind the other, in any order.

    Raises ValueError if a tensor is not [T], or for an unknown ``shift_mode``. Everything but
    ``logprobs``, ``entropy`` and ``distance`` is a constant: losses detach it (``router_shift`` is
    none with ``shift_attached``).
    """

    logprobs: torch.Tensor  #: float [T], log pi_new(y_t), attached to the graph; nats
    old_logprobs: torch.Tensor  #: float [T], log pi_old(y_t), scored before the first update
    advantages: torch.Tensor  #: float [T], the advantage of the sequence at each of its tokens
    mask: torch.Tensor  #: bool (or 0/1) [T], True on the tokens that are trained on
    sequence_ids: torch.Tensor  #: int64 [T], 0..S-1; padding may have the extra id S
    router_shift: torch.Tensor | None = None  #: float [T], gamma~ >= 0 of ``shift_weight``
    rollout_logprobs: torch.Tensor | None = None  #: float [T], log mu(y_t) of the sampler
    ref_logprobs: torch.Tensor | None = None  #: float [T], log pi_ref(y_t)
    num_sequences: int | None = None  #: S; none: T, an upper bound found without asking the device
    shift_mode: str = "ratio"  #: one of ``SHIFT_MODES``: how ``router_shift`` enters
    sampler_weights: torch.Tensor | None = None  #: float [T], factors of the terms (``mismatch``)
    entropy: torch.Tensor | None = None  #: float [T], nats, attached; see ``regularisers``
    distance: torch.Tensor | None = None  #: float [T], of the routers, nats, attached; likewise
    shift_attached: bool = False  #: the gradient goes through ``router_shift`` too: an ablation

    def __post_init__(self) -> None:
        if self.shift_mode not in SHIFT_MODES:
            raise ValueError(
                f"found shift_mode {self.shift_mode!r}; expected one of {', '.join(SHIFT_MODES)}"
            )
        shape = self.logprobs.shape
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and (value.dim() != 1 or value.shape != shape):
                raise ValueError(
                    f"found {name} of shape {tuple(value.shape)} and logprobs {tuple(shape)}; "
                    "expected flat [T] tensors of one length; flatten the batch first"
                )


@dataclass(frozen=True)
class LossOutputs:
    """Sums and counts of one pack; those of several packs and ranks are added, then divided once.

    loss = loss_sum / denominator. A pack without a trained token has loss_sum 0 (attached to the
    graph) and the denominator ``aggregate.EMPTY``, which vanishes when added to a count: the
    quotient is 0 and never 0/0.
    """

    loss_sum: torch.Tensor  #: 0-d, attached to ``logprobs``
    denominator: torch.Tensor  #: 0-d, detached: trained tokens or trained sequences
    metrics: Mapping[str, tuple[torch.Tensor, torch.Tensor]]  #: name -> (sum, count), 0-d, detached
    #: bool [T], where the clip is active (of the token's sequence, where sequences are clipped);
    #: meaningless outside the mask; None: the loss clips nothing
    clipped: torch.Tensor | None = None


@dataclass(frozen=True)
class SamplerWeights:
    """What a sampler correction gives: factors of a loss's terms, and where they were cut."""

    weights: torch.Tensor  #: float [T], detached; 0 outside the mask
    clipped: torch.Tensor  #: bool [T], the weight is capped or set to 0; False outside the mask

"""Log-probabilities over the tokens that a truncating sampler kept (keep-sampling-mask).

With top-p or top-k the sampler draws from the renormalised probabilities of the kept set K_t, and
the trainer's ratio to it is right only over the same set (arXiv 2512.02556, section 3.1):

    log pi_K(y_t) = x_y - log sum_{v in K_t} exp(x_v),    x = logits / temperature

Only the logits of kept tokens enter, so no full normaliser is needed. Sets are ragged, in the CSR
form of `records.KeptTokens`; a token with an empty set was not truncated and takes the whole
vocabulary. Shapes: T tokens, V vocabulary, n kept ids of all tokens together.
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_rl.records import KeptTokens


def kept_sets(probs: torch.Tensor, most: int) -> KeptTokens:
    """The ids with a probability above 0, ascending: [R, V] of ``truncated`` -> R sets.

    Rows that keep more than ``most`` tokens, or all of them, get an empty set. Waits for the
    device.
    """
    kept = probs > 0
    sizes = kept.sum(1)
    kept = kept & ((sizes <= most) & (sizes < probs.shape[1]))[:, None]
    rows, ids = kept.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(probs)).cpu().numpy()
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
    return KeptTokens(ids.cpu().numpy().astype(np.int32), offsets)


def kept_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, kept: KeptTokens, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi_K(y_t) and the entropy of pi_K, fp32 (or float64) [T], differentiable in the logits.

    Args:
        logits: [T, V] of the whole vocabulary, in any floating type.
        targets: int64 [T]; each is in its own set, if that is not empty.
        kept: T sets.
        temperature: divides the logits; > 0.

    Raises:
        ValueError: there are not T sets, or a target is outside of its set.
    """
    if len(kept.offsets) != len(logits) + 1:
        raise ValueError(
            f"found {len(kept.offsets) - 1} kept sets for {len(logits)} tokens; expected one each"
        )
    ids = torch.from_numpy(kept.ids.astype(np.int64)).to(logits.device)
    rows = torch.from_numpy(kept.rows()).to(logits.device)
    empty = torch.from_numpy(np.diff(kept.offsets) == 0).to(logits.device)
    inside = empty.clone().index_put_((rows[ids == targets[rows]],), torch.tensor(True).to(empty))
    if not bool(inside.all()):
        place = int((~inside).nonzero()[0, 0])
        raise ValueError(f"found token {place} outside of the set it was drawn from")
    wide = torch.promote_types(logits.dtype, torch.float32)
    x = logits.to(wide) / temperature
    values = x[rows, ids]
    total, weighted = _normaliser(values, rows, len(logits))
    whole = x.log_softmax(1)
    picked = x.gather(1, targets[:, None]).squeeze(1)
    full = whole.gather(1, targets[:, None]).squeeze(1)
    logprobs = torch.where(empty, full, picked - total)
    return logprobs, torch.where(empty, -(whole.exp() * whole).sum(1), total - weighted)


def _normaliser(
    values: torch.Tensor, rows: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """log sum exp of each row's values, and their mean under its softmax: [n] -> two [count]; 0 for
    a row without values.
    """
    nothing = values.new_zeros(count)
    peak = nothing.scatter_reduce(0, rows, values.detach(), "amax", include_self=False)
    exp = (values - peak[rows]).exp()
    mass = nothing.index_add(0, rows, exp)
    mass = torch.where(mass > 0, mass, 1.0)
    weighted = nothing.index_add(0, rows, exp * values) / mass
    return peak + mass.log(), weighted

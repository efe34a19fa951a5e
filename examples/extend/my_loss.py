"""A loss: GRPO's formula (arXiv 2402.03300, eq. 3), written out."""

import torch
from pydantic import Field

from megatron_rl.algorithms import LossInputs, LossOutputs
from megatron_rl.algorithms.aggregate import make_segments, over_sequence_means, over_tokens
from megatron_rl.extend import Settings, loss


class MySettings(Settings):
    """The ratio is clipped to [1 - clip, 1 + clip]."""

    clip: float = Field(0.2, gt=0.0)
    """Half width of the range in which ratios are not clipped."""


@loss(denominator="sequences", settings=MySettings, paper="arXiv 2402.03300, eq. 3")
def my_loss(inputs: LossInputs, settings: MySettings) -> LossOutputs:
    """Clipped token ratios, mean over each answer, then over answers."""
    mask, advantages = inputs.mask, inputs.advantages
    ratio = torch.where(mask, inputs.logprobs - inputs.old_logprobs, 0.0).exp()
    clipped = ratio.clamp(1.0 - settings.clip, 1.0 + settings.clip)
    objective = advantages * torch.where(
        advantages > 0, torch.minimum(ratio, clipped), torch.maximum(ratio, clipped)
    )
    segments = make_segments(mask, inputs.sequence_ids, inputs.num_sequences)
    total, count = over_sequence_means(-objective, segments)
    cut = (objective != advantages * ratio).float()
    return LossOutputs(total, count, {"cut": over_tokens(cut, segments)}, cut.bool())

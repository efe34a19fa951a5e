"""TRL's own loss code on given log-probabilities: ``_compute_loss`` on a stand-in for the trainer.

The stand-in has the attributes that the method reads and nothing else; no model is run. Written for
TRL 1.16.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch

from megatron_rl.algorithms import LossInputs


def padded(values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """[T] -> [S, longest], zeros behind each sequence."""
    return torch.nn.utils.rnn.pad_sequence(values.split(lengths), batch_first=True)


def trl_loss(
    trainer_class: type, inputs: LossInputs, lengths: list[int], **attributes
) -> torch.Tensor:
    """The loss of a batch without padding, attached to ``inputs.logprobs``.

    attributes: what ``_compute_loss`` reads from the trainer (``loss_type``, ``epsilon_low``...); a
    router-shift weight is handed over as old log-probabilities lowered by log gamma~. Sampler
    weights, reference log-probabilities and entropies of the inputs go where TRL wants them.
    """
    old = inputs.old_logprobs
    if inputs.router_shift is not None:
        old = old - inputs.router_shift.log()
    logprobs = padded(inputs.logprobs, lengths)
    entropy = torch.zeros_like(inputs.logprobs) if inputs.entropy is None else inputs.entropy
    mask = padded(inputs.mask.long(), lengths)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (
            logprobs,
            padded(entropy, lengths),
            None,
        ),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        get_off_policy_mask=getattr(trainer_class, "get_off_policy_mask", None),
        importance_sampling_level="token",
        beta=0.0,
        use_vllm=inputs.sampler_weights is not None,
        vllm_importance_sampling_correction=True,
        use_adaptive_entropy=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(
            num_processes=1,
            sync_gradients=False,
            reduce=lambda x, reduction: x,
            gather=lambda x: x,
        ),
        args=SimpleNamespace(
            delta=None,
            steps_per_generation=1,
            use_bias_correction_kl=False,
            sapo_temperature_pos=attributes.pop("temperature_pos", 1.0),
            sapo_temperature_neg=attributes.pop("temperature_neg", 1.05),
        ),
    )
    vars(trainer).update(attributes)
    optional = {
        "importance_sampling_ratio": inputs.sampler_weights,
        "ref_per_token_logps": inputs.ref_logprobs,
        "sampling_per_token_logps": inputs.rollout_logprobs,
    }
    first = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    return trainer_class._compute_loss(
        trainer,
        model=None,
        inputs={
            "prompt_ids": torch.zeros(len(lengths), 0, dtype=torch.long),
            "prompt_mask": torch.zeros(len(lengths), 0, dtype=torch.long),
            "completion_ids": mask,
            "completion_mask": mask,
            "advantages": inputs.advantages[first],
            "old_per_token_logps": padded(old, lengths),
            "num_items_in_batch": mask.sum(),
            **{name: padded(v, lengths) for name, v in optional.items() if v is not None},
        },
    )

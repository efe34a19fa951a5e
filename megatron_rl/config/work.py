"""Arithmetic of a step: floating-point operations of matrix products and attention. No torch."""

from __future__ import annotations

from megatron_rl.config.estimate import count_parameters
from megatron_rl.config.layout import heads_of
from megatron_rl.config.rollout import engine_of
from megatron_rl.config.schema import Config, ModelConfig


def forward_flop(model: ModelConfig, length: float) -> float:
    """FLOP of a token in a forward pass, a mean over a sequence of ``length`` tokens.

    A multiplication and an addition for each active parameter but the embedding's, which is looked
    up; and attention, 2 (d + v) for each head and each key it sees, length / 2 of them.
    """
    _, active = count_parameters(model)
    looked_up = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    heads, _, width = heads_of(model)
    of_values = (model.v_head_dim if model.kv_lora_rank else None) or width
    attention = model.num_layers * heads * (width + of_values) * length
    return 2.0 * (active - looked_up) + attention


def step_flop(config: Config, tokens: float, *, supervised: bool) -> dict[str, float]:
    """FLOP of the stages of a step on ``tokens`` tokens, by the names of `time/<stage>_s`.

    A rollout is one forward pass, an update is three (the backward pass is two), for each epoch, of
    every answer with a prompt of its own. What is computed twice (recomputed activations) is
    counted once. The rollout of servers is not this program's; scoring is left out, since only a
    part of the packs, or none, goes through a pass.
    """
    rollout = config.rollout
    sequences = rollout.prompts_per_step * rollout.samples_per_prompt
    if supervised:
        sequences = config.train.batch_size
    forward = tokens * forward_flop(config.model, tokens / sequences)
    if supervised:
        return {"update": 3 * forward}
    own = {} if engine_of(rollout).servers else {"rollout": forward}
    return own | {"update": 3 * config.algorithm.epochs * forward}

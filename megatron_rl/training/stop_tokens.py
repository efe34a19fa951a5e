"""The tokens that end an answer of a run's model."""

from __future__ import annotations

from pathlib import Path

from megatron_rl.config import stop_tokens
from megatron_rl.config.schema import Config
from megatron_rl.weights.companions import kept_companions, run_of


def model_directories(config: Config) -> list[Path]:
    """The Hugging Face files of the model that a run starts from: those of ``model.hf_path``, and
    those that the run of ``checkpoint.init_from`` has kept.
    """
    hf_path, init_from = config.model.hf_path, config.checkpoint.init_from
    kept = None if init_from is None else kept_companions(run_of(init_from))
    return [directory for directory in (hf_path, kept) if directory is not None]


def stop_tokens_of(config: Config, eos_id: int) -> dict[int, str]:
    """Each with what names it; ``eos_id``: of the tokenizer. UserError as `stop_tokens`."""
    more, vocab_size = config.rollout.stop_token_ids, config.model.vocab_size
    return stop_tokens.stop_tokens(eos_id, model_directories(config), more, vocab_size)

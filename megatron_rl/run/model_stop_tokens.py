"""The stop tokens of a run's model: those of its tokenizer, its files and the configuration."""

from __future__ import annotations

from pathlib import Path

from megatron_rl.config import stop_tokens
from megatron_rl.config.schema import Config
from megatron_rl.data.tokenizers import Tokenizer
from megatron_rl.errors import UserError, printable
from megatron_rl.weights.side_files import kept_side_files, run_of


def model_directories(config: Config) -> list[Path]:
    """Directories with Hugging Face files of the initial model: ``model.hf_path``, and the files
    that the run of ``checkpoint.init_from`` has kept.
    """
    hf_path, init_from = config.model.hf_path, config.checkpoint.init_from
    kept = None if init_from is None else kept_side_files(run_of(init_from))
    return [directory for directory in (hf_path, kept) if directory is not None]


def stop_tokens_of(config: Config, tokenizer: Tokenizer) -> dict[int, str]:
    """Stop token id -> the sources that name it. Raises UserError as `stop_tokens` does, or if a
    text of ``rollout.stop_tokens`` is no token.
    """
    rollout, vocab_size = config.rollout, config.model.vocab_size
    more = {_token(tokenizer, text): "rollout.stop_tokens" for text in rollout.stop_tokens}
    more |= dict.fromkeys(rollout.stop_token_ids, "rollout.stop_token_ids")
    directories = model_directories(config)
    return stop_tokens.stop_tokens(tokenizer.eos_id, directories, more, vocab_size)


def _token(tokenizer: Tokenizer, text: str) -> int:
    token = tokenizer.token(text)
    if token is None:
        raise UserError(
            f"rollout.stop_tokens names {printable(repr(text))}, which is not one token of the "
            "tokenizer; expected the text of one, such as <|im_end|>; correct it, or name an id "
            "in rollout.stop_token_ids"
        )
    return token

"""The weights a new run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

import torch

from megatron_rl.checkpoint.identity import architecture_of
from megatron_rl.checkpoint.restore import load_weights
from megatron_rl.config.schema import Config
from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.from_hugging_face import load_hf_weights


def load_initial_weights(
    config: Config, chunks: Sequence[torch.nn.Module], groups: Groups
) -> Path | None:
    """Load the weights of ``checkpoint.init_from``, else of ``model.hf_path``. A collective.

    Call ``reload_model_params`` of an existing optimizer afterwards.

    Returns:
        Where the weights are from; None: neither is given, and the chunks are as they were.

    Raises:
        UserError: the weights cannot be read, or are of another architecture.
    """
    if config.checkpoint.init_from is not None:
        architecture = architecture_of(config.model)
        source = config.checkpoint.init_from
        return load_weights(source, chunks=chunks, architecture=architecture, groups=groups)
    if config.model.hf_path is not None:
        load_hf_weights(chunks, groups, config.model, config.model.hf_path)
    return config.model.hf_path

"""Do the servers compute with the weights that the trainer has?

A server that answers "success" to a change of weights has proved nothing. A few fixed prompts are
answered by each server, and the trainer computes the log-probabilities of the same tokens.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch

from megatron_rl.data.packing import round_up
from megatron_rl.models.attention import packed_placement
from megatron_rl.models.forward import forward_stages
from megatron_rl.parallel.collectives import gather_objects
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.vocab_logprobs import vocab_logprobs
from megatron_rl.records import Prompt

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 2, 8, 12
#: Index of the first probe: no data set is as long.
FIRST_INDEX = 1 << 40


def probe_prompts(vocab_size: int, room: int) -> list[Prompt]:
    """The fixed prompts: random tokens, the same in every run."""
    generator = np.random.default_rng(11)
    length = max(1, min(PROMPT_TOKENS, room - ANSWER_TOKENS))
    return [
        Prompt(FIRST_INDEX + i, generator.integers(0, vocab_size, length), "", {})
        for i in range(PROMPTS)
    ]


@torch.no_grad()
def trainer_logprobs(
    chunks: Sequence[torch.nn.Module],
    groups: Groups,
    tokens: np.ndarray,
    answer_length: int,
    temperature: float,
) -> np.ndarray:
    """Log-probabilities fp32 [N] of the last N tokens of a sequence. A collective over all ranks.

    Every rank runs the same sequence: on its own where it holds all it needs, together with those
    that hold the other shards where it does not.
    """
    device = next(chunks[0].parameters()).device
    count = round_up(len(tokens), groups.tensor.size())
    row = torch.zeros(count, dtype=torch.int64, device=device)
    row[: len(tokens)] = torch.from_numpy(np.asarray(tokens)).to(device)
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    logits = forward_stages(chunks, row, packed_placement([len(tokens)], count, device), groups)
    for chunk, before in zip(chunks, training):
        chunk.train(before)
    found = None
    if logits is not None:
        logprobs, _ = vocab_logprobs(logits, row.roll(-1), temperature, groups.tensor)
        found = logprobs[len(tokens) - answer_length - 1 : len(tokens) - 1].float().cpu().numpy()
    stages = gather_objects(found, groups.pipeline)
    return next(values for values in stages if values is not None)

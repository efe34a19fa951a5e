"""From a Megatron checkpoint to Hugging Face tensors, without building the model."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import torch

from megatron_rl.checkpoint.save import SHARDS
from megatron_rl.checkpoint.torch_dist import StoredTensors
from megatron_rl.config.schema import ModelConfig
from megatron_rl.families.common.family import Family
from megatron_rl.families.common.names import OF_THE_VOCABULARY
from megatron_rl.models.gpt.names import holds_experts, name_of_key
from megatron_rl.weights.rules import alone, rule_of, split


class StoredWeights:
    """The weights of a checkpoint (its optimizer's state is not looked at)."""

    def __init__(self, checkpoint: Path, model: ModelConfig, family: Family) -> None:
        self._tensors = StoredTensors(checkpoint / SHARDS)
        self._model, self._family = model, family
        self.keys = sorted(k for k in self._tensors.shapes if not k.startswith("optimizer."))

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(map(self._tensors.bytes_of, self.keys))

    def num_tensors(self, rank: int = 0, ranks: int = 1) -> int:
        """How many tensors `stream` yields."""
        shapes = self._tensors.shapes
        return sum(
            len(rule_of(name_of_key(key), self._family).parts)
            * (shapes[key][0] if holds_experts(key) else 1)
            for key in self.keys[rank::ranks]
        )

    def stream(self, rank: int = 0, ranks: int = 1) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor) of every weight of this rank's share of the stored tensors.

        One stored tensor is in memory at a time (the experts of a layer are the largest), and none
        while the next is read: no tensor that is yielded keeps it alive.
        """
        for key in self.keys[rank::ranks]:
            yield from self._parts(key)

    def _parts(self, key: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self._weights(key, self._tensors.get(key)):
            rule = rule_of(name, self._family)
            for part, tensor in zip(rule.parts, split(rule, weight, self._model), strict=True):
                yield part, alone(tensor)

    def _weights(self, key: str, stored: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if holds_experts(key):
            for expert in range(len(stored)):
                yield name_of_key(key, expert), stored[expert]
            return
        name = name_of_key(key)
        yield name, stored[: self._model.vocab_size] if name in OF_THE_VOCABULARY else stored

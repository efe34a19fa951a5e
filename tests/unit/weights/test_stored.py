"""Stored weights as Hugging Face tensors: their names and values, and what is in memory."""

import weakref
from pathlib import Path

import numpy as np
import torch

from megatron_rl.config.schema import ModelConfig
from megatron_rl.families.qwen3_moe import FAMILY
from megatron_rl.weights import stored
from megatron_rl.weights.stored import StoredWeights

EXPERTS = "decoder.layers.{}.mlp.experts.experts.linear_fc1.weight"
SHAPES = {EXPERTS.format(layer): (3, 4, 5) for layer in (0, 1)} | {"output_layer.weight": (8, 5)}


class Counted:
    """Takes the place of a checkpoint: each tensor counts on from 0, and it is known which live."""

    shapes = SHAPES

    def __init__(self, directory: Path) -> None:
        self.alive: list[weakref.ref] = []
        self.when_read: list[int] = []

    def get(self, key: str) -> torch.Tensor:
        self.when_read.append(sum(ref() is not None for ref in self.alive))
        values = np.arange(np.prod(SHAPES[key]), dtype=np.float32).reshape(SHAPES[key])
        self.alive.append(weakref.ref(values))
        return torch.from_numpy(values)  # keeps the array as long as any slice is there


def test_no_stored_tensor_is_in_memory_while_the_next_is_read(monkeypatch):
    monkeypatch.setattr(stored, "StoredTensors", Counted)
    weights = StoredWeights(Path("."), ModelConfig(vocab_size=7), FAMILY)
    found = dict(weights.stream())
    assert weights._tensors.when_read == [0, 0, 0]
    assert len(found) == weights.num_tensors() == 2 * 3 * 2 + 1
    up = found["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert up.tolist() == np.arange(50, 60).reshape(2, 5).tolist()
    assert found["lm_head.weight"].tolist() == np.arange(35).reshape(7, 5).tolist()  # no padding

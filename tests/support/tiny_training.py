"""A tiny model with its optimizer, and steps of supervised training on seeded random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_rl.config.optimizer import optimizer_of, optimizer_settings
from megatron_rl.config.schema import Config
from tests.support.tiny import build_tiny

LENGTHS = (20, 7, 5)


@dataclass
class TinyTraining:
    """One pipeline stage without tensor parallelism; data-parallel ranks draw different tokens."""

    config: Config
    groups: Any
    chunks: list[torch.nn.Module]  #: bare model chunks
    wrapped: list[torch.nn.Module]  #: the same, wrapped for data parallelism
    optimizer: Any

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.chunks[0].parameters()).device

    def logits(self) -> torch.Tensor:
        """[T, V] of fixed tokens."""
        tokens = torch.arange(sum(LENGTHS)) * 7 % self.config.model.vocab_size
        with torch.no_grad():
            return self._forward(self.chunks[0], tokens.to(self.device))

    def step(self, number: int) -> float:
        """One optimizer step on the tokens of that number; this rank's loss before it."""
        from megatron.core.distributed import finalize_model_grads

        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        seed = 1000 * number + self.groups.data.rank()
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(self.config.model.vocab_size, (sum(LENGTHS),), generator=generator)
        tokens = tokens.to(self.device)
        logits = self._forward(self.wrapped[0], tokens)
        loss = F.cross_entropy(logits.float(), tokens.roll(-1), reduction="sum")
        loss.backward()
        finalize_model_grads(self.wrapped, torch.tensor(len(tokens), device=self.device))
        succeeded, _, _ = self.optimizer.step()
        assert succeeded
        return loss.item() / len(tokens)

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's parameters."""
        return {name: p.detach().clone() for name, p in self.chunks[0].named_parameters()}

    def main_weights(self) -> list[torch.Tensor]:
        """Copies of what this rank's optimizer steps: fp32 weights, or its shards of them."""
        return [
            parameter.detach().clone()
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        ]

    def _forward(self, model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        from megatron_rl.models.attention import packed_placement
        from megatron_rl.models.forward import forward_row

        placement = packed_placement(LENGTHS, len(tokens), self.device)
        return forward_row(model, tokens, placement)[0]

    def for_checkpoint(self) -> dict[str, Any]:
        """The arguments that saving and loading a checkpoint have in common."""
        from megatron_rl.checkpoint.identity import architecture_of, layout_of

        return {
            "chunks": self.chunks,
            "optimizer": self.optimizer,
            "architecture": architecture_of(self.config.model),
            "layout": layout_of(self.config.parallel, dist.get_world_size()),
            "groups": self.groups,
        }


def build_training(config: Config, seed: int = 1) -> TinyTraining:
    """Model and optimizer of this rank, in groups of their own."""
    groups, megatron_config, chunks = build_tiny(config, seed)
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_rl.optimizers.replace import replace_optimizer

    distributed = config.parallel.distributed_optimizer
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
    )
    wrapped = [DistributedDataParallel(megatron_config, ddp, chunk) for chunk in chunks]
    bf16 = config.model.dtype == "bf16"
    settings = OptimizerConfig(
        optimizer="adam",
        lr=3e-3,
        min_lr=0.0,
        weight_decay=0.01,
        clip_grad=1.0,
        use_distributed_optimizer=distributed,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    optimizer = get_megatron_optimizer(settings, wrapped)
    row = optimizer_of(config.optimizer)
    if not row.of_megatron:
        own = optimizer_settings(config.optimizer)
        replace_optimizer(optimizer, row, own, chunks, groups, config.model)
    return TinyTraining(config, groups, chunks, wrapped, optimizer)

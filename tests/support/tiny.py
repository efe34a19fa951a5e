"""Tiny models for tests, in a process of their own world or in a rank of `tests.support.ranks`."""

from __future__ import annotations

import functools
import gc
from typing import Any, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_rl.config.schema import Config, DeviceConfig
from megatron_rl.device.launch import Launch
from megatron_rl.device.select import Device, connect, select_device
from megatron_rl.records import Prompt

#: Two MoE layers; weights large enough that the distributions are far from uniform.
TINY_MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 8,
    "ffn_hidden_size": 64,
    "num_experts": 4,
    "moe_top_k": 2,
    "moe_ffn_hidden_size": 32,
    "vocab_size": 64,
    "max_sequence_length": 64,
    "init_std": 0.3,
}

#: A token that tiny models draw now and then, so that answers end at different lengths.
EOS = 31


def tiny_config(**overrides: Mapping[str, Any]) -> Config:
    """`TINY_MODEL` with sections overridden by mappings: ``model={"num_layers": 4}``."""
    sections = {"model": {**TINY_MODEL, **overrides.pop("model", {})}, **overrides}
    return Config(**{"device": {"kind": "cpu", "threads": 1}, **sections})


def cpu_device() -> Device:
    """`prepared_device` of the CPU."""
    return prepared_device("cpu")


def prepared_device(kind: str) -> Device:
    """The CPU with one thread, or CUDA, ready for Megatron; a process in no world becomes a world
    of one.
    """
    connected = dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if connected else (0, 1)
    launch = Launch(rank, size, rank, size, launched=connected)
    device = select_device(DeviceConfig(kind=kind, threads=1), launch)
    if not connected:
        connect(device, launch, 60)
    return device


def build_tiny(config: Config, seed: int = 1) -> tuple[Any, Any, list[torch.nn.Module]]:
    """(groups, transformer_config, chunks) of this rank; groups built before are forgotten."""
    device = prepared_device(config.device.kind)
    # Megatron has to be imported after the device is prepared.
    from megatron.core import parallel_state

    from megatron_rl.models.build import build_chunks, transformer_config
    from megatron_rl.parallel.groups import build_groups, destroy_groups

    if parallel_state.model_parallel_is_initialized():
        destroy_groups()
        # Dead models keep their groups alive in cycles; each costs gloo threads that poll.
        gc.collect()
    _keep_what_is_imported()
    groups = build_groups(config.parallel)
    megatron_config = transformer_config(config.model, config.parallel, device)
    return (
        groups,
        megatron_config,
        build_chunks(config.model, megatron_config, groups, device, seed),
    )


@functools.cache
def _keep_what_is_imported() -> None:
    """It stays to the end: no collection has to look through it again."""
    gc.collect()
    gc.freeze()


def uneven_norms(chunk: torch.nn.Module) -> None:
    """Norms start at one; make each of them matter."""
    generator = torch.Generator().manual_seed(4)
    for parameter in chunk.parameters():
        if parameter.dim() == 1:
            values = torch.empty(parameter.shape).uniform_(0.5, 1.5, generator=generator)
            parameter.data.copy_(values)


def random_prompts(lengths: Sequence[int], first_index: int = 0) -> list[Prompt]:
    """Prompts of random tokens 2..63; a prompt depends on its index and length only."""
    prompts = []
    for index, length in enumerate(lengths, start=first_index):
        tokens = np.random.default_rng([index, length]).integers(2, 64, length)
        prompts.append(Prompt(index, tokens, f"prompt {index}", {"index": index}))
    return prompts


def spell(ids: Sequence[int]) -> str:
    """Token ids as text, in the place of a tokenizer."""
    return " ".join(map(str, ids))


def tiny_engine(
    config: Config,
    groups: Any,
    megatron_config: Any,
    chunks: list,
    stop_ids: Sequence[int] = (EOS,),
    **fields: Any,
) -> Any:
    """The built-in rollout engine on a tiny model."""
    from megatron_rl.rollout.builtin.generate import BuiltinEngine

    arguments = {
        "max_batch": 64,
        "decode": spell,
        "max_sequence_length": config.model.max_sequence_length,
    } | fields
    return BuiltinEngine(chunks, groups, megatron_config, stop_ids, **arguments)

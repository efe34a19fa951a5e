"""Does a Megatron checkpoint hold the weights of a Hugging Face directory, and compute the same?"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from megatron_rl.checkpoint.identity import architecture_of
from megatron_rl.checkpoint.restore import load_weights
from megatron_rl.config.hf_config import family_of
from megatron_rl.config.schema import Config
from megatron_rl.device.select import Device
from megatron_rl.errors import RunFailed, UserError, shown
from megatron_rl.models.attention import packed_placement
from megatron_rl.models.build import build_chunks, transformer_config
from megatron_rl.models.forward import forward_stages
from megatron_rl.parallel.collective_try import collective_try
from megatron_rl.parallel.collectives import gather_first_dim, gather_objects
from megatron_rl.parallel.groups import Groups
from megatron_rl.weights.source import HuggingFaceTensors
from megatron_rl.weights.stored import StoredWeights
from megatron_rl.weights.unused import unused_tensors

TOKENS = 64
#: Of the largest logit, in fp32.
TOLERANCE = 1e-4


def refuse_unknown_to_transformers(model_type: str | None) -> None:
    """Before anything is converted: `verify` asks transformers. UserError: it has no such model."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"--verify asks transformers for the logits of a model_type {shown(model_type)}, "
            "which it does not know; expected one of its own; leave --verify out, or register the "
            "model's classes (AutoConfig.register, AutoModelForCausalLM.register) in the file of "
            "model.family"
        )


def verify(
    checkpoint: Path, directory: Path, config: Config, groups: Groups, device: Device, progress: Any
) -> None:
    """Compare every tensor by SHA-256, and the logits of random tokens in fp32. A collective.

    The logits of the Hugging Face side are those of transformers, so that a mistake in the mapping
    of the architecture shows as well, which tensors alone would not. Needs room for the model in
    fp32, on the last stage's first rank twice.

    Raises:
        RunFailed: something differs; on all ranks.
    """
    _same_tensors(checkpoint, directory, config, groups, progress)
    _same_logits(checkpoint, directory, config, groups, device)


def _same_tensors(
    checkpoint: Path, directory: Path, config: Config, groups: Groups, progress: Any
) -> None:
    rank, ranks = groups.world.rank(), groups.world.size()
    family = family_of(directory, config.model.family)
    stored = StoredWeights(checkpoint, config.model, family)
    source = HuggingFaceTensors(directory, family)
    seen, differing = set(), []
    count = stored.num_tensors(rank, ranks)
    for name, tensor in progress(stored.stream(rank, ranks), count, "comparing"):
        seen.add(name)
        if _digest(source.get(name).to(tensor.dtype)) != _digest(tensor):
            differing.append(name)
    everyone = gather_objects((seen, differing), groups.world)
    wrong = sorted(sum((found for _, found in everyone), []))
    if wrong:
        raise RunFailed(
            f"{len(wrong)} tensors of {checkpoint} are not those of {directory}, first {wrong[0]}"
        )
    compared = set().union(*(names for names, _ in everyone))
    absent = unused_tensors(source, compared, config.model, family)
    if absent:
        raise RunFailed(f"{checkpoint} lacks {len(absent)} tensors of {directory}: {absent[0]}")


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


@torch.no_grad()
def _same_logits(
    checkpoint: Path, directory: Path, config: Config, groups: Groups, device: Device
) -> None:
    model = config.model.model_copy(update={"dtype": "fp32"})
    transformer = transformer_config(model, config.parallel, device)
    chunks = build_chunks(model, transformer, groups, device, seed=None)
    architecture = architecture_of(model)
    load_weights(checkpoint, chunks=chunks, architecture=architecture, groups=groups)
    for chunk in chunks:
        chunk.eval()
    generator = torch.Generator().manual_seed(1)
    count = min(TOKENS, model.max_sequence_length)
    tokens = torch.randint(model.vocab_size, (count,), generator=generator)
    placement = packed_placement([count], count, device.torch_device)
    found = forward_stages(chunks, tokens.to(device.torch_device), placement, groups)
    if found is not None:
        found = gather_first_dim(found.T.contiguous(), groups.tensor).T[:, : model.vocab_size]
    del chunks
    one = groups.is_last_stage and groups.tensor.rank() == 0 and groups.data_context.rank() == 0

    def compare() -> tuple[float, float] | None:
        if not one:
            return None
        assert found is not None, "on the last stage"
        expected = _transformers_logits(directory, tokens)
        return float((found.cpu() - expected).abs().max()), float(expected.abs().max())

    difference, largest = next(filter(None, collective_try(groups.world, compare)))
    if not difference <= TOLERANCE * max(largest, 1.0):
        raise RunFailed(
            f"the logits of {checkpoint} differ from those transformers computes from {directory} "
            f"by {difference:.3g} (largest logit {largest:.3g}); the weights agree, so the "
            "architecture is mapped wrongly"
        )


def _transformers_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    return model.eval()(tokens[None], use_cache=False).logits[0]

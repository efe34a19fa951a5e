"""Tensors of a Hugging Face directory that no weight is made of: which of them say nothing new."""

from __future__ import annotations

from typing import Iterator

import torch

from megatron_rl.config.layout import heads_of
from megatron_rl.config.schema import ModelConfig
from megatron_rl.errors import UserError
from megatron_rl.families.common.family import Family
from megatron_rl.families.common.names import EMBEDDING, OUTPUT, SHARED_GATE
from megatron_rl.weights.source import HuggingFaceTensors

#: In old checkpoints; worked out again from the configuration.
_FREQUENCIES = ".rotary_emb.inv_freq"
#: Stored frequencies may be rounded to bf16, by up to 2^-8.
_FREQUENCY_TOLERANCE = 1e-2
_ROWS = 4096  # compared at a time


def refuse_unused(
    source: HuggingFaceTensors, used: set[str], model: ModelConfig, family: Family
) -> None:
    """A tensor that nothing consumed is part of an architecture that is not ours, unless it says
    what the used ones and the configuration say already; which is looked at, not taken on trust.

    Raises:
        UserError: one is left over; a stored output layer is not the embedding that
            ``tie_embeddings`` takes in its place; stored rotary frequencies are of another base.
    """
    left = unused_tensors(source, used, model, family)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UserError(
            f"{source.directory} holds the tensor {left[0]}{more}, which no weight of the model is "
            "made of; expected none left over; the model is of another architecture than "
            "config.json says"
        )
    head, embedding = _ends(family)
    if model.tie_embeddings and head in source.names - used:
        _compare_head(source, head, embedding)
    for name in sorted(source.names - used):
        if name.endswith(_FREQUENCIES) and model.yarn is None:
            _compare_frequencies(source, name, model)


def unused_tensors(
    source: HuggingFaceTensors, used: set[str], model: ModelConfig, family: Family
) -> list[str]:
    """Names of the tensors that are neither used nor a repetition of what is."""
    left = sorted(source.names - used)
    return [name for name in left if not _repeats(source, name, model, family)]


def _ends(family: Family) -> tuple[str, str]:
    """Names of the output layer's weight and of the embedding's."""
    head, embedding = (family.weights[name].parts[0] for name in (OUTPUT, EMBEDDING))
    return head, embedding


def _repeats(source: HuggingFaceTensors, name: str, model: ModelConfig, family: Family) -> bool:
    if name == _ends(family)[0]:
        return model.tie_embeddings
    gate = family.layer_weights.get(SHARED_GATE)
    if gate is not None and name.endswith(gate.parts[0]):  # of a shared expert of width 0
        return model.shared_expert_ffn_hidden_size is None
    return name.endswith(_FREQUENCIES) or 0 in source.shape(name)


def _compare_head(source: HuggingFaceTensors, name: str, embedding_name: str) -> None:
    head, embedding = source.get(name), source.get(embedding_name)
    if head.shape == embedding.shape and all(_equal_rows(head, embedding)):
        return
    raise UserError(
        f"{source.directory} holds {name}, which is not {embedding_name}, while the embeddings "
        "are tied (tie_word_embeddings in config.json): one of the two would be lost; expected "
        "equal tensors, or untied ones; set tie_word_embeddings to false in config.json to use "
        f"both, or remove {name} from the directory"
    )


def _equal_rows(first: torch.Tensor, second: torch.Tensor) -> Iterator[bool]:
    """Whether slices of rows are equal, of whatever type they are stored in."""
    for start in range(0, len(first), _ROWS):
        rows = slice(start, start + _ROWS)
        yield torch.equal(first[rows].float(), second[rows].float())


def _compare_frequencies(source: HuggingFaceTensors, name: str, model: ModelConfig) -> None:
    width = (model.qk_rope_head_dim or 0) if model.kv_lora_rank else heads_of(model)[2]
    expected = model.rope_base ** -(torch.arange(0, width, 2).float() / width)
    found = source.get(name).float()
    if found.shape == expected.shape and torch.allclose(
        found, expected, rtol=_FREQUENCY_TOLERANCE, atol=0.0
    ):
        return
    raise UserError(
        f"{source.directory} holds {name}, which are not the frequencies of base "
        f"{model.rope_base:g} for heads of width {width}; expected those of config.json's "
        "rope_theta; correct rope_theta, or remove the tensor"
    )

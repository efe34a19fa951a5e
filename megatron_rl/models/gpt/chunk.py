"""Megatron-Core's GPTModel: a chunk is made, and what is where in one."""

from __future__ import annotations

from typing import Any, Sequence, TypeAlias

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rl.config.schema import ModelConfig
from megatron_rl.models.attention import PositionalRotaryEmbedding
from megatron_rl.models.gpt.specs import block_spec
from megatron_rl.models.router import count_tokens
from megatron_rl.models.vocabulary import padded_vocabulary, words_of
from megatron_rl.parallel.groups import Groups
from megatron_rl.parallel.vocab_head import VocabHead

#: What a rank holds of the model; with virtual pipeline stages it holds several.
Chunk: TypeAlias = GPTModel


class HeadApart(GPTModel):
    """A GPTModel whose last chunk gives logits, or the hidden states before the output layer."""

    vocabulary_padding: int  #: rows that the vocabulary has too many
    fp32_head: bool
    _to_hidden = False

    def forward(self, *args: Any, to_hidden: bool = False, **kwargs: Any) -> torch.Tensor:
        """As GPTModel's; ``to_hidden``: stop before the output layer, [T / tp, 1, D]."""
        self._to_hidden = to_hidden
        return super().forward(*args, **kwargs)

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._to_hidden or not self.post_process:
            return hidden_states
        head = head_of(self)
        return head.logits(head.gather(hidden_states))[None]


def make_chunk(
    model: ModelConfig,
    config: TransformerConfig,
    groups: Groups,
    vp_stage: int | None,
    *,
    transformer_engine: bool,
) -> Chunk:
    """The chunk of this pipeline stage, or of a virtual stage; its matrices hold anything."""
    padded = padded_vocabulary(model.vocab_size, groups.tensor.size())
    last_virtual = vp_stage is None or vp_stage == (groups.virtual_stages or 1) - 1
    chunk = HeadApart(
        config=config,
        transformer_layer_spec=block_spec(model, config, transformer_engine, vp_stage),
        vocab_size=padded,
        max_sequence_length=model.max_sequence_length,
        pre_process=groups.is_first_stage and vp_stage in (None, 0),
        post_process=groups.is_last_stage and last_virtual,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_base,
        vp_stage=vp_stage,
    )
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            module.register_forward_pre_hook(count_tokens, with_kwargs=True)
    chunk.vocabulary_padding = padded - model.vocab_size
    chunk.fp32_head = model.fp32_head
    if not model.kv_lora_rank:  # latent attention has its own in each layer
        chunk.rotary_pos_emb = PositionalRotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=model.rope_base,
            use_cpu_initialization=True,
        )
    return chunk


def head_of(chunk: Chunk) -> VocabHead:
    """The output layer of the last chunk; tied, its weight is the embedding's."""
    weight, group = chunk.output_layer.weight, chunk.pg_collection.tp
    if chunk.share_embeddings_and_output_weights:
        weight = chunk.shared_embedding_or_output_weight()
    words = words_of(chunk.vocab_size - chunk.vocabulary_padding, len(weight), group)
    return VocabHead(weight, words, group, fp32=chunk.fp32_head)


def cut_input(chunk: Chunk, num_rows: int) -> torch.Tensor:
    """Leave the chunk the first rows of the activations [T, 1, D] that it has received and is about
    to run on; the others, which came behind them.
    """
    received = chunk.decoder.input_tensor
    chunk.set_input_tensor(received[:num_rows])
    return received[num_rows:]


def layer_numbers(chunk: Chunk) -> list[int]:
    """Numbers of the chunk's layers in the whole model, from 1, ascending."""
    return [layer.layer_number for layer in chunk.decoder.layers]


def routers_of(chunks: Sequence[Chunk]) -> list[dict[int, TopKRouter]]:
    """Of each chunk the routers of its MoE layers, by the layer's number as `layer_numbers`."""
    return [
        {
            layer.layer_number: module
            for layer in chunk.decoder.layers
            for module in layer.modules()
            if isinstance(module, TopKRouter)
        }
        for chunk in chunks
    ]


def chunk_shards(chunk: Chunk, groups: Groups) -> dict[str, Any]:
    """Its tensors as shards of the whole model's, by their names in the chunk; the shards' keys
    (`names.name_of_key`) do not depend on the layout.

    The "extra state" of layers is left out: it is empty but for Transformer Engine's FP8, which
    measures it anew, and torch would unpickle it.
    """
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": groups.data_context}
    entries = chunk.sharded_state_dict(metadata=metadata)
    return {name: entry for name, entry in entries.items() if not isinstance(entry, ShardedObject)}

"""Which fields of ``ModelConfig`` are the architecture, and their values, defaults filled in."""

from __future__ import annotations

from typing import Any, Collection, Literal

from megatron_rl.config.layout import heads_of, moe_layers
from megatron_rl.config.schema import ModelConfig

#: Fields a config.json says nothing of: where the architecture came from, and how it is trained.
NOT_DESCRIBED = frozenset(
    {
        "preset",
        "hf_config",
        "hf_path",
        "family",
        "aux_loss_coeff",
        "z_loss_coeff",
        "expert_bias_update_rate",
        "freeze_router",
        "init_std",
        "transformer_engine",
        "fp32_head",
    }
)
DESCRIBED = frozenset(ModelConfig.model_fields) - NOT_DESCRIBED
#: Fields that change neither the shape nor the meaning of the weights.
NOT_ARCHITECTURE = NOT_DESCRIBED | {"max_sequence_length"}


def filled_in(
    model: ModelConfig, exclude: Collection[str] = (), mode: Literal["python", "json"] = "python"
) -> dict[str, Any]:
    """The fields by name: key/value heads and head width as numbers, a 0 or 1 for each layer in
    ``moe_layer_freq``.
    """
    fields = model.model_dump(mode=mode, exclude=set(exclude))
    _, fields["num_query_groups"], fields["head_dim"] = heads_of(model)
    fields["moe_layer_freq"] = [int(is_moe) for is_moe in moe_layers(model)]
    return fields

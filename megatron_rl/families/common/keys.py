"""The keys of a config.json, typed and bounded before any is used.

A family's class lists the keys that its models are built from.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Spelled:
    """The spellings of a key in files of transformers 4 and 5: ``Annotated[int, Spelled("a",
    "b")]``.
    """

    def __init__(self, *names: str) -> None:
        self.names = names


def spellings_of(kind: type[Keys]) -> dict[str, tuple[str, ...]]:
    """The keys of a class that have several spellings."""
    return {
        name: mark.names
        for name, field in kind.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Spelled)
    }


#: Most layers: code builds a list of this length, and no model has as many.
MOST_LAYERS = 10_000
Size = Annotated[int, Field(ge=1, le=1 << 30)]
Count = Annotated[int, Field(ge=0, le=1 << 30)]
Positive = Annotated[float, Field(gt=0.0, le=1e30)]


class Keys(BaseModel):
    """Base of a family's keys. Strict: "3" and 3.0 are no integers, true is none either."""

    model_config = ConfigDict(
        extra="allow", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Rope(Keys):
    """``rope_parameters``, or ``rope_scaling``."""

    rope_theta: Positive | None = None
    rope_type: str | None = None
    type: str | None = None
    partial_rotary_factor: float | None = None
    factor: Positive | None = None
    original_max_position_embeddings: Size | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: Annotated[float, Field(ge=0.0, le=1e30)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0.0, le=1e30)] | None = None


class CommonKeys(Keys):
    """Keys that all families share."""

    num_hidden_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)]
    hidden_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    intermediate_size: Size
    vocab_size: Annotated[int, Field(ge=2, le=1 << 30)]
    max_position_embeddings: Annotated[int, Field(ge=2, le=1 << 40)]
    rms_norm_eps: Positive
    rope_theta: Positive | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    # every family leaves the embeddings untied unless its config.json ties them
    tie_word_embeddings: bool = False
    dtype: Annotated[str | None, Spelled("torch_dtype", "dtype")] = None
    sliding_window: int | None = None
    use_sliding_window: bool = False
    layer_types: list[str] | None = None


class MoeKeys(CommonKeys):
    """Key/value heads, and number of experts."""

    head_dim: Size | None = None
    num_experts: Annotated[Count, Spelled("num_experts", "num_local_experts")]
    num_experts_per_tok: Size

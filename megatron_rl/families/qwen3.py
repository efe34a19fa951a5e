"""Qwen3, dense."""

from __future__ import annotations

from typing import Any, Mapping

from megatron_rl.families.common.family import Family
from megatron_rl.families.common.file import HuggingFaceFile
from megatron_rl.families.common.keys import CommonKeys, Size
from megatron_rl.families.common.weights import DENSE, QK_NORM


class Qwen3Keys(CommonKeys):
    head_dim: Size | None = None


def read(file: HuggingFaceFile, keys: Qwen3Keys) -> dict[str, Any]:
    return {"head_dim": keys.head_dim, "num_experts": 0, "qk_norm": True}


def write(model: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_sliding_window": False}


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    summary="dense, as a baseline; for any loss without router shift",
    source="arXiv 2505.09388",
    keys=Qwen3Keys,
    read=read,
    write=write,
    layer_weights={**DENSE, **QK_NORM},
    meaningless={"use_qk_norm": (True,), "num_experts": (0,), "num_local_experts": (0,)},
)

"""Rotary position embeddings in config.json: their base, and YaRN's stretching."""

from __future__ import annotations

from typing import Any, Mapping

from megatron_rl.errors import shown
from megatron_rl.families.common.file import HuggingFaceFile, given
from megatron_rl.families.common.keys import CommonKeys, Rope

#: YaRN's numbers. All must be given, because their defaults differ between versions.
_YARN_KEYS = (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
#: Values without effect, by kind of scaling: linear by 1 scales nothing.
_NEUTRAL_ROPE: Mapping[str, Mapping[str, Any]] = {
    "default": {"factor": 1.0, "partial_rotary_factor": 1.0, "attention_factor": 1.0},
    "linear": {"factor": 1.0, "partial_rotary_factor": 1.0},
    "yarn": {"partial_rotary_factor": 1.0, "truncate": True},
}


def rope_fields(file: HuggingFaceFile, keys: CommonKeys, yarn: bool = False) -> dict[str, Any]:
    """``rope_base``, from ``rope_theta`` (transformers 4) or ``rope_parameters`` (5); and ``yarn``,
    if the family has it, from ``rope_scaling`` (4) or ``rope_parameters``.
    """
    scaling = _scaling(file, keys.rope_scaling, keys.rope_parameters)
    inner = scaling.pop("rope_theta", None)
    if keys.rope_theta is not None and inner is not None and keys.rope_theta != inner:
        raise file.refuse(
            f"rope_theta={keys.rope_theta} and rope_parameters.rope_theta={inner} contradict"
        )
    theta = inner if keys.rope_theta is None else keys.rope_theta
    if theta is None:
        raise file.refuse("rope_theta or rope_parameters.rope_theta is missing")
    kinds = {scaling.pop(key) for key in ("type", "rope_type") if key in scaling} or {"default"}
    if len(kinds) > 1:
        raise file.refuse(f"rope types {' and '.join(sorted(kinds))} contradict")
    (kind,) = kinds
    neutral = _NEUTRAL_ROPE.get(kind, {})
    left = {k: v for k, v in scaling.items() if k not in neutral or v != neutral[k]}
    if kind == "yarn" and yarn:
        return {"rope_base": theta, "yarn": _yarn(file, left)}
    if kind != "default" and (kind != "linear" or left):
        raise file.refuse(f"rope_type {shown(kind)} (rope scaling) is not supported")
    if left:
        raise file.refuse(f"rope_parameters.{min(left)} (rope scaling) is not supported")
    return {"rope_base": theta}


def _scaling(file: HuggingFaceFile, old: Rope | None, new: Rope | None) -> dict[str, Any]:
    """The scaling in ``rope_scaling`` and ``rope_parameters``, merged."""
    first, second = (
        {} if rope is None else given(rope.model_dump(exclude_unset=True)) for rope in (old, new)
    )
    for key in first.keys() & second.keys():
        if first[key] != second[key]:
            raise file.refuse(f"rope_scaling.{key} and rope_parameters.{key} contradict")
    return {**first, **second}


def _yarn(file: HuggingFaceFile, scaling: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(scaling) - set(_YARN_KEYS))
    if unknown:
        raise file.refuse(f"yarn's {unknown[0]} {shown(scaling[unknown[0]])} is not supported")
    missing = [key for key in _YARN_KEYS if not scaling.get(key)]
    if missing:
        raise file.refuse(f"yarn's {missing[0]} is missing or 0")
    if scaling["factor"] < 1.0:
        raise file.refuse(f"yarn's factor {scaling['factor']} is below 1")
    return dict(scaling)

"""The inverse of ``hf_config.py``: a Hugging Face config.json that describes a ``ModelConfig``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rl.catalogue.families import FamilyEntry
from megatron_rl.catalogue.find import find
from megatron_rl.catalogue.kinds import FAMILIES
from megatron_rl.config.architecture import NOT_DESCRIBED, filled_in
from megatron_rl.config.hf_config import blamed, fields_of_values, read_hf_config
from megatron_rl.config.layout import moe_layers
from megatron_rl.config.schema import ModelConfig
from megatron_rl.errors import UserError
from megatron_rl.families.common.family import Family


def hf_config_of(model: ModelConfig) -> dict[str, Any]:
    """The config.json of `describing_family`."""
    return describing_family(model)[1]


def describing_family(model: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """``model.family``, else the first family that describes the model exactly; its config.json.

    The config.json is read back with ``read_hf_config``'s rules and compared field by field, so a
    model that no family describes (group-limited routing, a qk-norm on Mixtral...) cannot be
    exported as something else.

    Raises:
        UserError: no family does; it names a field that the nearest family lacks.
    """
    rows = FAMILIES.rows if model.family is None else (find(FAMILIES, model.family),)
    wanted = _described(model)
    misses: dict[str, list[str]] = {}
    refusal: UserError | None = None
    for row in rows:
        values = _written(model, row)
        try:
            said = _described(ModelConfig(**fields_of_values(values, row.name)))
        except UserError as error:  # the family refuses a value
            refusal = error
            continue
        misses[row.name] = [n for n in wanted if wanted[n] != said.get(n)]
        if not misses[row.name]:
            return row.load(), values
    if refusal is not None and not misses:
        raise refusal
    names = ", ".join(row.name for row in rows)
    nearest = min(misses, key=lambda name: len(misses[name]))
    field = misses[nearest][0]
    raise UserError(
        f"no Hugging Face family describes this model; the nearest, {nearest}, has no "
        f"model.{field} {wanted[field]}; expected a model of {names}; change it "
        "before training, or keep it as a Megatron checkpoint"
    )


def _written(model: ModelConfig, row: FamilyEntry) -> dict[str, Any]:
    """config.json as a family writes it."""
    family, fields = row.load(), filled_in(model)
    with blamed(row, "writing config.json"):
        return {
            **family.write_common(fields),
            "model_type": family.model_type,
            **family.write(fields),
            "architectures": [family.architecture],
        }


def check_describes(directory: Path, model: ModelConfig) -> None:
    """Refuse a model directory whose config.json describes another architecture than the model's.

    Its number type and longest sequence may differ. Raises UserError naming the fields.
    """
    wanted, said = (
        _described(model),
        _described(ModelConfig(**read_hf_config(directory, model.family))),
    )
    free = ("dtype", "max_sequence_length")
    differing = [n for n in wanted if n not in free and wanted[n] != said.get(n)]
    if differing:
        found = ", ".join(f"{name} {said.get(name)}" for name in differing)
        expected = ", ".join(f"{name} {wanted[name]}" for name in differing)
        raise UserError(
            f"{directory}/config.json describes a model with {found}; the weights are of one with "
            f"{expected}; name the model directory the training started from, or none"
        )


def _described(model: ModelConfig) -> dict[str, Any]:
    """The fields that a config.json describes, defaults filled in."""
    fields = filled_in(model, NOT_DESCRIBED)
    if all(moe_layers(model)):
        del fields["ffn_hidden_size"]  # of dense layers, which the model lacks
    if not model.num_experts:
        fields = {n: v for n, v in fields.items() if not n.startswith(_OF_EXPERTS)}
    if not model.qk_norm or model.kv_lora_rank:
        del fields["qk_norm_scope"]
    if model.router_score == "sigmoid":
        fields["router_scaling_factor"] = model.router_scaling_factor or 1.0
    return fields


#: Fields without a meaning in a dense model.
_OF_EXPERTS = ("moe_", "router_", "shared_expert_")

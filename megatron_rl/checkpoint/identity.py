"""What a checkpoint is of: the architecture (must agree to be loaded) and the layout (need not)."""

from __future__ import annotations

import json
from typing import Any

from megatron_rl.config.architecture import NOT_ARCHITECTURE, filled_in
from megatron_rl.config.layout import SPLITS
from megatron_rl.config.schema import ModelConfig, ParallelConfig
from megatron_rl.errors import UserError


def architecture_of(model: ModelConfig) -> dict[str, Any]:
    """The fields that decide which weights there are and what they compute, defaults filled in."""
    return filled_in(model, NOT_ARCHITECTURE, "json")


def layout_of(parallel: ParallelConfig, world_size: int) -> dict[str, Any]:
    """How the weights and the optimizer state are spread over the ranks."""
    return {
        "world_size": world_size,
        **{name: getattr(parallel, name) for name in SPLITS},
        "distributed_optimizer": parallel.distributed_optimizer,
    }


def as_json(value: Any) -> Any:
    """The value as JSON gives it back (lists for tuples), to compare with what was stored."""
    return json.loads(json.dumps(value))


def check_architecture(
    stored: dict[str, Any], wanted: dict[str, Any], where: str, ignore: tuple[str, ...] = ()
) -> None:
    """Refuse a checkpoint of another architecture, naming every field that differs.

    Raises:
        UserError: a field differs or is there only on one side.
    """
    wanted = as_json(wanted)
    fields = [name for name in {**stored, **wanted} if name not in ignore]
    missing = "not set"
    differing = [
        (name, stored.get(name, missing), wanted.get(name, missing))
        for name in fields
        if stored.get(name) != wanted.get(name)  # None: a field that did not exist then
    ]
    if not differing:
        return
    found = ", ".join(f"{name} {value}" for name, value, _ in differing)
    expected = ", ".join(f"{name} {value}" for name, _, value in differing)
    remedy = "use the model section of the run that wrote it, or another run_dir"
    if all(name == "dtype" for name, _, _ in differing):
        remedy += f" with checkpoint.init_from {where}"
    raise UserError(
        f"{where} is of a model with {found}; the configuration's model has {expected}; {remedy}"
    )

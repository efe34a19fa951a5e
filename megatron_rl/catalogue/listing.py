"""The text that `megatron-rl list` prints: the rows of a kind."""

from __future__ import annotations

import json
from typing import Any, Sequence

from pydantic_core import PydanticUndefined, to_jsonable_python

from megatron_rl.catalogue.describe import type_and_bounds
from megatron_rl.catalogue.entry import (
    EngineEntry,
    Entry,
    LossEntry,
    OptimizerEntry,
    SourceEntry,
    VerifierEntry,
)
from megatron_rl.catalogue.families import FamilyEntry
from megatron_rl.catalogue.find import find
from megatron_rl.catalogue.kinds import Kind


def listed(kind: Kind[Any], names: Sequence[str] = ()) -> list[str]:
    """Lines for each row: its traits, and its settings with defaults and meanings.

    Args:
        kind: of the things.
        names: rows, or references to a user's own; empty: all rows.

    Raises:
        UserError: as `find`.
    """
    rows = [find(kind, name, f"{kind.noun} NAME") for name in names] or kind.rows
    lines = [f"{kind.field} NAME: {len(rows)} of kind {kind.noun}, or your own: ./file.py:thing"]
    for row in rows:
        about = [row.summary, row.paper, *_traits(row)]
        lines += ["", row.name, *(f"    {text}" for text in about if text)]
        lines += [f"    {line}" for line in _settings(row)]
    return lines


def _traits(row: Entry) -> list[str]:
    """The traits of a row as text."""
    if isinstance(row, VerifierEntry) and row.needs:
        return [f"needs in every record: {', '.join(row.needs)}"]
    if isinstance(row, EngineEntry):
        beside = "beside training" if row.beside_training else "in turns with training"
        traits = [f"{beside}, {'with' if row.routes else 'without'} the experts of its tokens"]
        return traits + ["with the tokens that top-p and top-k kept"] * row.kept_tokens
    if isinstance(row, OptimizerEntry):
        layouts = "any layout" if row.split_weights else "without tensor and expert parallelism"
        sharded = "with" if row.of_megatron else "without"
        return [f"{layouts}, {sharded} parallel.distributed_optimizer"]
    if isinstance(row, FamilyEntry):
        family = row.load()
        return [f"model_type {family.model_type}, {family.architecture} of transformers"]
    if isinstance(row, SourceEntry):
        files = f"files called {', '.join(f'*{ending}' for ending in row.endings)}"
        return [files] * bool(row.endings) + [f"needs {row.needs}"] * bool(row.needs)
    if not isinstance(row, LossEntry):
        return []
    traits = [f"over {row.denominator}", f"router shift {row.router_shift}"]
    traits += ["one ratio an answer"] * row.geometric
    traits += ["sampler weights ignored"] * (not row.sampler_weights)
    return [", ".join(traits)]


def _settings(row: Entry) -> list[str]:
    fields = {} if row.settings is None else row.settings.model_fields
    lines = []
    for name, field in fields.items():
        meaning = " ".join((field.description or "").split())
        default = f"{name}: {_shown(field.get_default(call_default_factory=True))}"
        lines.append(f"{default:<24}  {type_and_bounds(field)}. {meaning}".rstrip())
    return lines


def _shown(value: Any) -> str:
    if value is PydanticUndefined:
        return "(to be given)"
    return json.dumps(to_jsonable_python(value))

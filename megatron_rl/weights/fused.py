"""Tensors that a directory may hold in another form than it is written in: the experts of a layer
in one tensor, as transformers 5 holds them in memory, gate and up above each other.

Elsewhere in this room every expert has names of its own, as transformers 4 and 5 write them unless
told otherwise, and as vLLM reads them; here the one form is read as the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping

from megatron_rl.errors import UserError
from megatron_rl.families.common.family import Family, Rule


@dataclass(frozen=True)
class Place:
    """Where a tensor is: a stored one, or the rows ``begin`` to ``end`` of one of its experts."""

    stored: str
    shape: tuple[int, ...]
    expert: int | None = None
    begin: int = 0
    end: int = 0


def places(
    stored: Mapping[str, tuple[int, ...]], family: Family | None, directory: Path
) -> dict[str, Place]:
    """Name of each tensor, one for every matrix of an expert -> where it is.

    ``stored``: shapes of the tensors of the directory. ``family`` None: names are as stored.
    Raises UserError: a fused tensor is of no such shape, or a matrix is there in both forms.
    """
    forms = {} if family is None else _other_forms(family)
    layer = None if family is None else _layer_pattern(family)
    found: dict[str, Place] = {}
    for name, shape in stored.items():
        for part, place in _parts(name, shape, forms, layer, directory).items():
            if part in found:
                both = " and as ".join(sorted({found[part].stored, place.stored}))
                raise UserError(
                    f"{directory} holds {part} twice, as {both}; expected it once; remove one"
                )
            found[part] = place
    return found


def _other_forms(family: Family) -> dict[str, Rule]:
    """Names within a layer under which a weight may be stored otherwise -> the weight's rule."""
    rules = family.layer_weights.values()
    return {name: rule for rule in rules for name in rule.stored_as}


def _layer_pattern(family: Family) -> re.Pattern[str]:
    """Of the beginning of a layer's names."""
    before, after = map(re.escape, family.layer_name.split("{layer}"))
    return re.compile(rf"{before}\d+{after}")


def _parts(
    name: str,
    shape: tuple[int, ...],
    forms: Mapping[str, Rule],
    layer: re.Pattern[str] | None,
    directory: Path,
) -> dict[str, Place]:
    begin = "" if layer is None or (found := layer.match(name)) is None else found[0]
    rule = forms.get(name.removeprefix(begin)) if begin else None
    if rule is None:
        return {name: Place(name, shape)}
    if "{expert}" not in rule.parts[0]:
        return {begin + rule.parts[0]: Place(name, shape)}
    count = len(rule.parts)
    if len(shape) != 3 or shape[1] % count:
        raise UserError(
            f"{directory} holds {name} of shape {shape}; expected [experts, rows, columns]"
            f"{' of gate and up' if count == 2 else ''}; restore the file"
        )
    rows = shape[1] // count
    return {
        begin + part.format(expert=expert): Place(
            name, (rows, shape[2]), expert, number * rows, (number + 1) * rows
        )
        for expert in range(shape[0])
        for number, part in enumerate(rule.parts)
    }

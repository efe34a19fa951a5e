"""Experts as transformers 5 holds them in memory, and may store them: those of a layer in one
tensor, gate and up above each other.

Elsewhere in this room every expert has names of its own, as transformers 4 and 5 write them unless
told otherwise, and as vLLM reads them; here the one form is read as the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping

from megatron_rl.errors import UserError
from megatron_rl.weights.families import FAMILIES

#: [E, 2 F, D] and [E, D, F]. Also Mixtral's are below ``mlp`` in this form, as is its router.
_FUSED = re.compile(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(gate_up|down)_proj")
_ROUTER = re.compile(r"(model\.layers\.\d+)\.mlp\.gate\.weight")


@dataclass(frozen=True)
class Place:
    """Where a tensor is: a stored one, or the rows ``begin`` to ``end`` of one of its experts."""

    stored: str
    shape: tuple[int, ...]
    expert: int | None = None
    begin: int = 0
    end: int = 0


def places(
    stored: Mapping[str, tuple[int, ...]], family: str | None, directory: Path
) -> dict[str, Place]:
    """Name of each tensor, one for every matrix of an expert -> where it is.

    ``stored``: shapes of the tensors of the directory. ``family`` None: names are as stored.
    Raises UserError: a fused tensor is of no such shape, or a matrix is there in both forms.
    """
    found: dict[str, Place] = {}
    for name, shape in stored.items():
        for part, place in _parts(name, shape, family, directory).items():
            if part in found:
                both = " and as ".join(sorted({found[part].stored, place.stored}))
                raise UserError(
                    f"{directory} holds {part} twice, as {both}; expected it once; remove one"
                )
            found[part] = place
    return found


def _parts(
    name: str, shape: tuple[int, ...], family: str | None, directory: Path
) -> dict[str, Place]:
    rules = FAMILIES.get(family or "", {})
    fused, router = _FUSED.fullmatch(name), _ROUTER.fullmatch(name)
    if router is not None and "mlp.router.weight" in rules:
        return {f"{router[1]}.{rules['mlp.router.weight'].parts[0]}": Place(name, shape)}
    which = {"gate_up": "linear_fc1", "down": "linear_fc2"}[fused[2]] if fused else ""
    rule = rules.get(f"mlp.experts.{{expert}}.{which}.weight")
    if fused is None or rule is None:
        return {name: Place(name, shape)}
    halves = len(rule.parts)
    if len(shape) != 3 or shape[1] % halves:
        raise UserError(
            f"{directory} holds {name} of shape {shape}; expected [experts, rows, columns]"
            f"{' of gate and up' if halves == 2 else ''}; restore the file"
        )
    rows = shape[1] // halves
    return {
        f"{fused[1]}.{part.format(expert=expert)}": Place(
            name, (rows, shape[2]), expert, half * rows, (half + 1) * rows
        )
        for expert in range(shape[0])
        for half, part in enumerate(rule.parts)
    }

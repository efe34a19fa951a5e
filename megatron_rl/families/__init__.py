"""Hugging Face families, one file each: what a family reads from config.json, what it writes, and
which tensors make up each weight. To ship one: a file here, named after its model_type, with a
`FAMILY`.
"""

from __future__ import annotations

import importlib
import pkgutil

from megatron_rl.families.common.family import Family


def _found() -> tuple[Family, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return tuple(importlib.import_module(f"{__name__}.{name}").FAMILY for name in names)


#: Sorted by name: a model that several families describe is written as the first.
FAMILIES: tuple[Family, ...] = _found()

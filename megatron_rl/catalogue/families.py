"""The Hugging Face families. To ship one: a file in ``families/``, which is found there."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl import families
from megatron_rl.catalogue.entry import Entry
from megatron_rl.families.common.family import Family


@dataclass(frozen=True, kw_only=True)
class FamilyEntry(Entry):
    """A family: an object of class `Family`."""

    @classmethod
    def of(cls, family: Family, own: bool = True) -> FamilyEntry:
        """The row of a family; ``own``: a user's own."""
        return cls(
            name=family.model_type,
            summary=family.summary,
            code=f"megatron_rl.families.{family.model_type}:FAMILY",
            paper=family.source,
            own=family if own else None,
        )


FAMILIES = tuple(FamilyEntry.of(family, own=False) for family in families.FAMILIES)

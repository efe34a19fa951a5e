"""One config.json, with its path for messages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

from megatron_rl.errors import UserError, printable


@dataclass(frozen=True)
class HuggingFaceFile:
    """One config.json: its path, and its keys that are not null."""

    path: Path
    values: Mapping[str, Any]
    expected: str  #: for messages

    def refuse(self, found: str) -> UserError:
        """The error for a value in this file."""
        return UserError(f"{self.path}: {printable(found, 400)}; expected {self.expected}")


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are not null."""
    return {key: value for key, value in values.items() if value is not None}

"""Settings of the losses: frozen, checked when made, overridden by name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar


@dataclass(frozen=True)
class Settings:
    """Base of all settings: each field is a number above 0; infinity switches a bound off."""

    def __post_init__(self) -> None:
        for field in fields(self):
            require_positive(field.name, getattr(self, field.name))


def require_positive(name: str, value: Any, finite: bool = False) -> None:
    """Raise ValueError unless the value is a number above 0 (and not infinite, where asked)."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number:
        remedy = "; YAML reads 3e-4 as text, write 3.0e-4" if isinstance(value, str) else ""
        raise ValueError(
            f"found {name}={value!r} ({type(value).__name__}); expected a number{remedy}"
        )
    if not value > 0 or (finite and math.isinf(value)):
        raise ValueError(f"found {name}={value}; expected a {'finite ' * finite}number above 0")


SomeSettings = TypeVar("SomeSettings", bound=Settings)


def override_settings(
    owner: str, settings_class: type[SomeSettings], overrides: Mapping[str, Any]
) -> SomeSettings:
    """The class's defaults with some fields replaced. Raises ValueError for a bad key or value."""
    known = [field.name for field in fields(settings_class)]
    for key in overrides:
        if key not in known:
            raise ValueError(unknown_name(f"setting of loss {owner}", key, known))
    return settings_class(**overrides)


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not known: the nearest one, and all of them."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
    choices = ", ".join(known)
    return f"found unknown {what} {name!r}; expected one of {choices}; did you mean {near[0]!r}?"

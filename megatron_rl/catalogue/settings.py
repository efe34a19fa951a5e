"""The base class of settings: typed, frozen and documented."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

#: A number above 0; a bound that infinity switches off.
Positive = Annotated[float, Field(gt=0.0)]
Bound = Annotated[float, Field(gt=0.0, allow_inf_nan=True)]


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, no conversions ("3" is no number); the string
    below a field documents it.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        ser_json_inf_nan="constants",  # a bound may be infinite
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

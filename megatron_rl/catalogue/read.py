"""Reads the settings of a thing from a mapping; a mistake becomes one line."""

from __future__ import annotations

import json
import math
from typing import Any, Mapping

from pydantic import ValidationError

from megatron_rl.catalogue.describe import expectation
from megatron_rl.catalogue.nearest import did_you_mean
from megatron_rl.catalogue.settings import Settings
from megatron_rl.errors import UserError


def with_key(
    given: Mapping[str, Any], name: str, value: Any, key: str, field: str
) -> dict[str, Any]:
    """The mapping, with a setting added that another key of the configuration gives.

    Args:
        given: settings as YAML gives them.
        name: of the setting.
        value: of the key, a number.
        key: the key, such as ``optimizer.beta1``.
        field: the mapping's place, such as ``optimizer.settings``.

    Raises:
        UserError: the mapping has another value.
    """
    if name in given and given[name] != value:
        raise UserError(
            f"{key} is {value:g} and {field}.{name} is {given[name]}; expected one of them; "
            "remove one"
        )
    return {**given, name: value}


def read_settings(
    field: str, of: str, settings: type[Settings] | None, values: Mapping[str, Any]
) -> Settings | None:
    """The settings in a mapping of the configuration; None for a thing without settings.

    Args:
        field: the mapping's place, such as ``algorithm.settings``.
        of: whose settings they are, such as ``the loss grpo``.
        settings: their class.
        values: as YAML gives them.

    Raises:
        UserError: an unknown key (with the nearest), a wrong type, a value out of bounds, a missing
            key.
    """
    names = () if settings is None else tuple(settings.model_fields)
    for key in values:
        if key not in names:
            expected = f"one of {', '.join(names)}" if names else "none: it has no settings"
            raise UserError(
                f"{field}.{_cut(key)} is no setting of {of}{did_you_mean(str(key), names)}; "
                f"expected {expected}"
            )
    if settings is None:
        return None
    try:
        # Through JSON, because pydantic's strict mode accepts paths and tuples only from JSON.
        return settings.model_validate_json(json.dumps(dict(values), default=str), strict=True)
    except ValidationError as error:
        raise UserError(_mistake(field, of, settings, error)) from error


def _mistake(field: str, of: str, settings: type[Settings], error: ValidationError) -> str:
    """The first mistake on one line."""
    first = error.errors()[0]
    place = ".".join([field, *map(str, first["loc"])])
    if first["type"] in ("value_error", "assertion_error"):  # a rule of the settings class
        return f"{place}: {' '.join(first['msg'].partition(', ')[2].split())}; correct {field}"
    if len(first["loc"]) != 1:  # inside a list or a mapping
        message = " ".join(first["msg"].split())
        return f"{place} is {_cut(first['input'])}; {of} says: {message}"
    expected = expectation(settings.model_fields[str(first["loc"][0])])
    if first["type"] == "missing":
        return f"{place} is not given; {of} expects {expected}; set it"
    value = first["input"]
    if isinstance(value, float) and math.isinf(value):
        expected = expected.replace("a number", "a finite number", 1)
    numeric = expected.startswith("a number") and isinstance(value, str)
    hint = "; YAML reads 3e-4 as text, write 3.0e-4" if numeric else ""
    return f"{place} is {_cut(value)}; expected {expected}{hint}"


def _cut(value: Any) -> str:
    """A value as text on one line."""
    text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."

"""Describes what a settings field expects: type, bounds, meaning and unit."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_rl.catalogue.settings import Settings

_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
    Any: "a value",
}


def expectation(field: FieldInfo) -> str:
    """``an integer, at least 1 (Longest answer, tokens)``: type, bounds, meaning and unit."""
    text = type_and_bounds(field)
    meaning = (field.description or "").partition("\n")[0].rstrip(".")
    return f"{text} ({meaning})" if meaning else text


def type_and_bounds(field: FieldInfo) -> str:
    """``an integer, at least 1``."""
    words = [_words(kind) for kind in alternatives(field.annotation)]
    return ", ".join([" or ".join(words), *_bounds(field)])


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types of a union; of any other type, itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The values of a field that takes one of a few; () for other fields."""
    return tuple(
        word
        for kind in alternatives(field.annotation)
        if get_origin(kind) is Literal
        for word in get_args(kind)
    )


def _words(kind: Any) -> str:
    if kind is type(None):
        return "null"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) in (list, tuple):
        of = get_args(kind)[0]
        if isinstance(of, type) and issubclass(of, Settings):
            return f"a list, each {_words(of)}"
        return f"a list of {_words(of).partition(' ')[2]}s"
    if get_origin(kind) is dict:
        return "a mapping"
    if isinstance(kind, type) and issubclass(kind, Settings):
        return f"a mapping of {', '.join(kind.model_fields)}"
    if hasattr(kind, "__metadata__"):  # Annotated: the bare type is enough
        kind = get_args(kind)[0]
    return _WORDS.get(kind) or f"a value of type {getattr(kind, '__name__', kind)}"


def _bounds(field: FieldInfo) -> list[str]:
    """The numeric limits of a field, ``Field(gt=0, le=1)``, as text."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return [
        f"{text} {bound if isinstance(bound := getattr(limit, name), int) else f'{bound:g}'}"
        for limit in field.metadata
        for name, text in words.items()
        if getattr(limit, name, None) is not None
    ]

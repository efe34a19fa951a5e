"""The schema as a flat table of dotted names, and what each field expects in plain words."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, Iterator, Literal, Mapping, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_rl.config.schema import Config, Section

_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
}


def leaf_fields(section: type[Section] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """Dotted name -> field, of every value (not section) of the tree, in schema order."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            found.update(leaf_fields(field.annotation, f"{prefix}{name}."))
        else:
            found[prefix + name] = field
    return found


def leaf_values(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> value; the entries of a dict field (``algorithm.settings``) one by one."""
    fields = leaf_fields()
    for name, value in tree.items():
        key = f"{prefix}{name}"
        whole = key in fields and not is_dict(fields[key])
        if isinstance(value, Mapping) and not whole:
            yield from leaf_values(value, f"{key}.")
        else:
            yield key, value


def is_section(annotation: Any) -> bool:
    """Whether a field of this type is a section of the tree."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def is_dict(field: FieldInfo) -> bool:
    """Whether the field takes free entries (``algorithm.settings``)."""
    return get_origin(field.annotation) is dict


def is_text(field: FieldInfo) -> bool:
    """Whether the field takes only a string or path (or null): there ``2024`` is text."""
    return set(_alternatives(field.annotation)) - {type(None)} <= {str, Path}


#: Kept as strings, because ``./python`` and ``python`` are different commands.
_PATHS_AS_TEXT = {"rollout.servers.python"}


def is_path(name: str, field: FieldInfo) -> bool:
    """Whether the field of this dotted name takes a path."""
    return Path in _alternatives(field.annotation) or name in _PATHS_AS_TEXT


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words of a field that takes one of a few; () otherwise."""
    return tuple(
        word
        for kind in _alternatives(field.annotation)
        if get_origin(kind) is Literal
        for word in get_args(kind)
    )


def expectation(field: FieldInfo) -> str:
    """``an integer, at least 1 (Longest answer, tokens)``: type, bounds, meaning and unit."""
    words = [_words(kind) for kind in _alternatives(field.annotation)]
    text = ", ".join([" or ".join(words), *_bounds(field)])
    meaning = (field.description or "").partition("\n")[0].rstrip(".")
    return f"{text} ({meaning})" if meaning else text


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _words(kind: Any) -> str:
    if kind is type(None):
        return "null"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) in (list, tuple):
        return f"a list of {_words(get_args(kind)[0]).partition(' ')[2]}s"
    if get_origin(kind) is dict:
        return "a mapping"
    if is_section(kind):
        return f"a mapping of {', '.join(kind.model_fields)}"
    if hasattr(kind, "__metadata__"):  # Annotated: the bare type says enough
        kind = get_args(kind)[0]
    return _WORDS[kind]


def _bounds(field: FieldInfo) -> list[str]:
    """The numeric limits of a field, ``Field(gt=0, le=1)``, in words."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return [
        f"{text} {bound if isinstance(bound := getattr(limit, name), int) else f'{bound:g}'}"
        for limit in field.metadata
        for name, text in words.items()
        if getattr(limit, name, None) is not None
    ]

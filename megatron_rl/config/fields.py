"""The schema as a flat table of dotted names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Iterator, Mapping, TypeGuard, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_rl.catalogue.describe import alternatives
from megatron_rl.config.schema import Config
from megatron_rl.config.section import Section


def leaf_fields(section: type[Section] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """Dotted name -> field, for every value (not section) of the tree, in schema order."""
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


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Whether a field of this type is a section of the tree."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def is_dict(field: FieldInfo) -> bool:
    """Whether the field takes free entries (``algorithm.settings``)."""
    return get_origin(field.annotation) is dict


def is_text(field: FieldInfo) -> bool:
    """Whether the field takes only a string or path (or null, or parts), so that ``2024`` is
    text.
    """
    kinds = set(alternatives(field.annotation)) - {type(None)}
    return bool(kinds & {str, Path}) and all(
        kind in (str, Path) or _of_parts(kind) for kind in kinds
    )


def takes_parts(field: FieldInfo) -> bool:
    """Whether the field takes a list of sections (``data.train``)."""
    return any(map(_of_parts, alternatives(field.annotation)))


def _of_parts(kind: Any) -> bool:
    return get_origin(kind) is tuple and is_section(get_args(kind)[0])


#: Kept as strings, because ``./python`` and ``python`` are different commands.
_PATHS_AS_TEXT = {"rollout.servers.python"}


def is_path(name: str, field: FieldInfo) -> bool:
    """Whether the field of this dotted name takes a path."""
    return Path in alternatives(field.annotation) or name in _PATHS_AS_TEXT

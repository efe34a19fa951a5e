"""YAML in and out: plain data with the line of every key; duplicate keys refused.

Scalars follow the YAML 1.2 core schema where PyYAML's 1.1 surprises: ``3e-4`` is a number; ``no``,
``on``, ``010`` and ``2024-01-01`` are strings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.errors import UserError

_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_RESOLVERS = (
    ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
    ("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the resolvers above instead of YAML 1.1's."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes the strings ``_Loader`` would take for numbers."""

    yaml_implicit_resolvers = {
        k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


#: Largest tree, aliases counted as what they stand for: a few lines of them may stand for billions.
MOST_NODES = 100_000


def parse_value(text: str) -> Any:
    """One value as YAML: ``0.7``, ``null``, ``[0, 1]``. Raises ``yaml.YAMLError``."""
    loader = _Loader(text)
    try:
        node = _compose(loader)
        return None if node is None else _construct(loader, node)
    finally:
        loader.dispose()


def _compose(loader: _Loader) -> yaml.Node | None:
    """The tree of the text, finite and of a size that can be looked at."""
    try:
        node = loader.get_single_node()
        if node is not None:
            _count(node, {}, set())
    except RecursionError as error:
        raise yaml.YAMLError("nested too deeply") from error
    return node


def _count(node: yaml.Node, known: dict[yaml.Node, int], above: set[yaml.Node]) -> int:
    """Nodes of a tree in which aliases are written out. ``above``: those this one is part of."""
    if node in known:
        return known[node]
    if node in above:
        raise yaml.MarkedYAMLError(
            problem="the anchor contains itself; expected a finite tree",
            problem_mark=node.start_mark,
        )
    total = 1
    if isinstance(node, yaml.CollectionNode):
        above.add(node)
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                total += _count(part, known, above)
        above.remove(node)
    if total > MOST_NODES:
        raise yaml.MarkedYAMLError(
            problem=f"more than {MOST_NODES:,} values, with aliases written out; expected fewer",
            problem_mark=node.start_mark,
        )
    known[node] = total
    return total


def _construct(loader: _Loader, node: yaml.Node) -> Any:
    try:
        return loader.construct_document(node)
    except (ValueError, KeyError) as error:  # `!!bool maybe`, a number of thousands of digits
        raise yaml.MarkedYAMLError(
            problem=f"a value that is none of its kind ({error})", problem_mark=node.start_mark
        ) from error


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file as nested dicts, and ``FILE:LINE`` of every dotted key.

    Raises UserError for a missing or unreadable file, invalid YAML, a duplicate key, a key that is
    no string, an anchor that contains itself and a file that is no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"config file {path} does not exist; expected a YAML file") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"cannot read config file {path}: {reason}") from error
    try:
        return _parse_file(text, str(path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: invalid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:  # a control character: no mark
        raise UserError(f"{path}: invalid YAML: {str(error).splitlines()[0]}") from error


def _parse_file(text: str, file: str) -> tuple[dict[str, Any], dict[str, str]]:
    loader = _Loader(text)
    try:
        node = _compose(loader)
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{file}: found a {node.id} at the top; expected `section: ...` lines")
        lines: dict[str, str] = {}
        _record_lines(node, "", file, lines)
        return _construct(loader, node), lines
    finally:
        loader.dispose()


def _record_lines(node: yaml.MappingNode, prefix: str, file: str, lines: dict[str, str]) -> None:
    """Note the line of each key below ``node``; refuse duplicates and keys that are no strings."""
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag.endswith(":merge"):
            continue
        if key.tag != "tag:yaml.org,2002:str":
            found = key.value if isinstance(key, yaml.ScalarNode) else f"of kind {key.id}"
            raise UserError(
                f"{file}:{line}: key {prefix}{found} is no name; expected a field's name"
            )
        if key.value in seen:
            raise UserError(
                f"{file}:{line}: duplicate key {prefix}{key.value} (first on line "
                f"{seen[key.value]}); expected each key once; remove one"
            )
        seen[key.value] = line
        lines[prefix + key.value] = f"{file}:{line}"
        if isinstance(value, yaml.MappingNode):
            _record_lines(value, f"{prefix}{key.value}.", file, lines)


def dump_yaml(data: dict[str, Any]) -> str:
    """Block style, in the order given; ``read_yaml`` gives the same data back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=100)

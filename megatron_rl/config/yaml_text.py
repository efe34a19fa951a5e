"""The one reader and writer of YAML: plain data with the line of every key; duplicate keys refused.

It gives a finite tree of text, numbers, lists and mappings, within bounds. Scalars follow the YAML
1.2 core schema where PyYAML's 1.1 would surprise: ``3e-4`` is a number; ``no``, ``on``, ``010`` and
``2024-01-01`` are strings.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from megatron_rl.config.json_text import MOST_DIGITS, MOST_LEVELS
from megatron_rl.errors import UserError, printable
from megatron_rl.files import read_bounded

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


_KINDS = {name: pattern for name, pattern, _ in _RESOLVERS}
_TEXT, _INTEGER, _REAL = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float"))

_HALF = re.compile("[\ud800-\udfff]")

_DEEP = re.compile(rf"(?:[\[{{]\s*){{{MOST_LEVELS + 1}}}")

#: Largest text, bytes: the parser needs about 20 s for a megabyte.
MOST_BYTES = 1 << 18
#: Largest tree, with aliases written out: a few lines of aliases may expand to billions of nodes.
MOST_NODES = 100_000


def parse_value(text: str) -> Any:
    """One value as YAML: ``0.7``, ``null``, ``[0, 1]``. Raises ``yaml.YAMLError``."""
    loader = _loader(text)
    try:
        node = _compose(loader)
        if node is None:
            return None
        _check_keys(node, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _loader(text: str) -> _Loader:
    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"longer than {MOST_BYTES:,} bytes")
    if _HALF.search(text):  # from a command line that is no UTF-8
        raise yaml.YAMLError("half a surrogate pair, which is no character")
    if _DEEP.search(text):  # the parser would need a second to notice
        raise yaml.YAMLError(f"nested more than {MOST_LEVELS} deep")
    return _Loader(text)


def _compose(loader: _Loader) -> yaml.Node | None:
    """The tree of the text, checked: finite, not too large, and each value of its kind."""
    try:
        node = loader.get_single_node()
        if node is not None:
            _count(node, {}, [])
    except RecursionError:
        raise yaml.YAMLError(f"nested more than {MOST_LEVELS} deep") from None
    except ValueError as error:  # \U with an invalid character number
        raise yaml.YAMLError(f"an invalid character ({error})") from error
    return node


def _count(node: yaml.Node, known: dict[yaml.Node, int], above: list[yaml.Node]) -> int:
    """Count the nodes of a tree with aliases written out. ``above``: the nodes that contain this
    one.
    """
    if node in known:
        return known[node]
    if node in above:
        raise _refused(node, "the anchor contains itself; expected a finite tree")
    if len(above) > MOST_LEVELS:
        raise _refused(node, f"nested more than {MOST_LEVELS} deep")
    _check_kind(node)
    total = 1
    if isinstance(node, yaml.CollectionNode):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                total += _count(part, known, [*above, node])
    if total > MOST_NODES:
        raise _refused(
            node, f"more than {MOST_NODES:,} values, with aliases written out; expected fewer"
        )
    known[node] = total
    return total


def _check_kind(node: yaml.Node) -> None:
    """Refuse a tag that does not fit its value: ``!!bool maybe``, ``!!python/name:os.system``."""
    if isinstance(node, yaml.ScalarNode):
        if half := _HALF.search(node.value):
            raise _refused(node, f"{half[0]!a} is half a surrogate pair and no character")
        if node.tag != _TEXT and node.tag not in _KINDS:
            raise _refused(node, f"found the tag {_shown(node.tag)}; expected plain data")
        if node.tag != _TEXT and not _KINDS[node.tag].match(node.value):
            raise _refused(node, f"{_shown(node.value)} does not fit the tag {_shown(node.tag)}")
        if node.tag in (_INTEGER, _REAL) and len(node.value) > MOST_DIGITS:
            raise _refused(node, f"a number of {len(node.value):,} characters")
        if node.tag == _REAL and "n" not in node.value.lower() and _is_too_large(node.value):
            raise _refused(node, f"the number {_shown(node.value)}, too large for a float")
    elif node.tag != f"tag:yaml.org,2002:{'map' if isinstance(node, yaml.MappingNode) else 'seq'}":
        raise _refused(node, f"found the tag {_shown(node.tag)}; expected plain data")


def _check_keys(node: yaml.Node, known: set[yaml.Node]) -> None:
    """Refuse a duplicate key in any mapping of the tree."""
    if node in known or isinstance(node, yaml.ScalarNode):
        return
    known.add(node)
    seen: set[str] = set()
    for child in node.value:
        for part in child if isinstance(child, tuple) else (child,):
            _check_keys(part, known)
        if isinstance(child, tuple) and isinstance(child[0], yaml.ScalarNode):
            key = child[0].value
            if key in seen and not child[0].tag.endswith(":merge"):
                raise _refused(child[0], f"duplicate key {_shown(key)}; expected each key once")
            seen.add(key)


def _is_too_large(text: str) -> bool:
    return math.isinf(float(text.replace("_", "")))


def _refused(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _shown(text: str) -> str:
    text = text.replace("tag:yaml.org,2002:", "!!")
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file as nested dicts, and ``FILE:LINE`` of every dotted key.

    Raises UserError for a file that is missing, unreadable or too large; for invalid YAML, tags
    other than plain data, too many levels, nodes or digits, an anchor that contains itself; for a
    duplicate key, a key that is no string, and a file that is no mapping.
    """
    file = printable(str(path), 900)
    try:
        text = read_bounded(path, MOST_BYTES).decode("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"config file {file} does not exist; expected a YAML file") from error
    except OSError as error:
        raise UserError(f"cannot read config file {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read config file {file}: not UTF-8 text") from error
    try:
        return _parse_file(text, file)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        raise UserError(f"{where}: invalid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:  # a control character: the error has no mark
        raise UserError(f"{file}: invalid YAML: {str(error).splitlines()[0]}") from error


def _parse_file(text: str, file: str) -> tuple[dict[str, Any], dict[str, str]]:
    loader = _loader(text)
    try:
        node = _compose(loader)
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            kind = node.id  # type: ignore[attr-defined]  # the stubs declare it for the subclasses only
            raise UserError(f"{file}: found a {kind} at the top; expected `section: ...` lines")
        lines: dict[str, str] = {}
        _record_lines(node, "", file, lines)
        _check_keys(node, set())  # of mappings in lists
        return loader.construct_document(node), lines
    finally:
        loader.dispose()


def _record_lines(node: yaml.MappingNode, prefix: str, file: str, lines: dict[str, str]) -> None:
    """Record the line of each key below ``node``; refuse duplicates and keys that are no
    strings.
    """
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag.endswith(":merge"):
            continue
        if key.tag != _TEXT or not is_name(key.value):
            found = _as_name(key.value) if isinstance(key, yaml.ScalarNode) else f"of kind {key.id}"
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


def is_name(text: str) -> bool:
    """Whether a text can be a field's name, and so appear as one in a message."""
    return text.isprintable() and len(text) <= 200


def _as_name(text: str) -> str:
    return text if is_name(text) else _shown(text)


def dump_yaml(data: dict[str, Any]) -> str:
    """Block style, in the order given; ``read_yaml`` gives the same data back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=100)

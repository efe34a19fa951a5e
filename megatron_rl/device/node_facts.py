"""The facts of a node before a run: versions, code, configuration and data files."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import megatron_rl
from megatron_rl.config.checks import check_config, input_files
from megatron_rl.config.fields import leaf_values
from megatron_rl.config.load import load_config
from megatron_rl.device.descriptors import allow_descriptors
from megatron_rl.errors import UserError

#: Packages whose version affects numbers or file formats.
PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "numpy", "transformers", "tokenizers"),
    *("sentencepiece", "safetensors", "sympy"),
)
#: Larger files are compared by size and by 64 MiB of their beginning and end.
WHOLE_BYTES = 2**28
ENDS_BYTES = 2**26
#: Larger files in a directory (weights) are compared by size alone.
IN_DIRECTORY_BYTES = 2**24

#: JSON: host, pid, run_dir, error (why there is no configuration), and ``same``: name -> value of
#: what must be equal on all nodes.
Facts = dict[str, Any]


@dataclass(frozen=True)
class Described:
    """The configuration of a run, as a node compares it."""

    values: Mapping[str, Any]  #: dotted key -> value, JSON
    files: Mapping[str, Path]  #: dotted key -> what the run reads
    run_dir: Path


def described(path: Path, overrides: Sequence[str], ranks: int, purpose: str) -> Described:
    """The configuration of a run with this many ranks, checked for a verb. Raises UserError if a
    check fails, or if the limit of open files is too low.
    """
    config = load_config(path, overrides, purpose)
    check_config(config, ranks, purpose)
    allow_descriptors(ranks)
    files = {**input_files(config), "model.hf_path": config.model.hf_path}
    there = {name: file for name, file in files.items() if file is not None and file.exists()}
    values = dict(leaf_values(config.model_dump(mode="json")))
    # JSON cannot hold an infinite bound of a loss; text can.
    values = json.loads(json.dumps(values), parse_constant=str)
    return Described(values, there, config.run_dir)


def facts_of_this_node(describe: Callable[[], Described], nodes: int, ranks: int) -> Facts:
    """The facts of this node; ``error`` holds why it has no configuration.

    Args:
        describe: the resolved configuration; raises UserError.
        nodes: number of nodes that this node was given.
        ranks: of this node.
    """
    same = {
        "NODES": nodes,
        "ranks of the node": ranks,
        "megatron_rl": megatron_rl.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        **_package_files(),
    }
    facts: Facts = {"host": socket.gethostname(), "same": same}
    try:
        described = describe()
    except UserError as error:
        return {**facts, "error": str(error)}
    same |= described.values
    for key, path in described.files.items():
        try:
            same[f"content of {key}"] = digest(path)
        except OSError as error:
            return {**facts, "error": f"{key}: {path} cannot be read ({error.strerror})"}
    return {**facts, "run_dir": str(described.run_dir)}


def digest(path: Path) -> str:
    """Sizes and content of a file or directory, as text; OSError if it cannot be read."""
    if not path.is_dir():
        return _of_file(path, WHOLE_BYTES)
    inside = sorted(one for one in path.rglob("*") if one.is_file())
    of_files = (f"{one.relative_to(path)}:{_of_file(one, IN_DIRECTORY_BYTES)}" for one in inside)
    content = hashlib.sha256("\n".join(of_files).encode()).hexdigest()[:12]
    return f"{len(inside)} files, {content}"


def _of_file(path: Path, whole: int) -> str:
    size, found = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size <= whole:
            while block := file.read(2**20):
                found.update(block)
        elif whole == WHOLE_BYTES:
            for place in (0, size - ENDS_BYTES):
                file.seek(place)
                found.update(file.read(ENDS_BYTES))
    return f"{size:,} bytes, {found.hexdigest()[:12]}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _package_files() -> dict[str, str]:
    """Hashes of the package's Python files: copies under development share a version number."""
    root = Path(megatron_rl.__file__).parent
    return {
        f"file megatron_rl/{path.relative_to(root).as_posix()}": hashlib.sha256(
            path.read_bytes()
        ).hexdigest()[:12]
        for path in sorted(root.rglob("*.py"))
    }

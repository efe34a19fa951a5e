"""Finds the thing that a configuration names: a row of the catalogue, or a user's own by reference.

References: ``my_package.my_module:thing`` and ``./my_file.py:thing``. A file's path is relative to
the working directory, with ``~`` and ``${VAR}`` filled in. Python looks for modules on its path,
then in the working directory. A file's own folder is added at the end, so that the file can import
its neighbours. A process imports a file once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from megatron_rl.catalogue.blame import blame
from megatron_rl.catalogue.declare import row_of
from megatron_rl.catalogue.entry import Entry
from megatron_rl.catalogue.kinds import Kind
from megatron_rl.catalogue.nearest import did_you_mean
from megatron_rl.errors import UserError, printable
from megatron_rl.paths import local_path

Row = TypeVar("Row", bound=Entry)


def find(kind: Kind[Row], name: str, field: str | None = None) -> Row:
    """The row of a name or reference; a user's own is imported and its signature checked.

    Args:
        kind: the expected kind.
        name: of a row, or a reference.
        field: the configuration key of the name, for messages; None: the kind's own.

    Raises:
        UserError: an unknown name (with the nearest), a missing file, module or object, a module
            that raises, an object of another kind, a wrong signature, an undeclared trait.
    """
    for row in kind.rows:
        if row.name == name:
            return row
    place = f"{field or kind.field} is {printable(repr(name))}"
    if not is_reference(name):
        shipped = f"one of {', '.join(kind.names)}, or " if kind.names else ""
        raise UserError(
            f"{place}{did_you_mean(name, kind.names)}; expected {shipped}"
            "one of your own: my_module:thing, ./my_file.py:thing"
        )
    source, _, attribute = name.rpartition(":")
    if not source or not all(part.isidentifier() for part in attribute.split(".")):
        raise UserError(f"{place}; expected the thing's name at the end: {name.rstrip(':')}:thing")
    module = _import(field or kind.field, place, source)
    thing = _object(module, attribute, place)
    of = kind.instance
    row = _row(kind, thing, place) if of is None else _of_instance(kind, of, thing, place)
    file = getattr(module, "__file__", None)
    return dataclasses.replace(row, name=name, file=Path(file) if file else None)


def is_reference(name: str) -> bool:
    """Whether a name has the form of a reference to a user's own."""
    return ":" in name or "/" in name or name.endswith(".py")


def label_of(name: str) -> str:
    """A short name: a row's name, or the object's name in a reference."""
    return name.rpartition(":")[2].rpartition(".")[2] if is_reference(name) else name


def code_digest(row: Entry) -> str | None:
    """SHA-256 of the file of a user's own; None for a row of this package."""
    return None if row.file is None else hashlib.sha256(row.file.read_bytes()).hexdigest()


def _import(field: str, place: str, source: str) -> ModuleType:
    if source.endswith(".py") or "/" in source:
        return _import_file(place, Path(os.path.abspath(local_path(field, source))))
    _look_also_in(os.getcwd())
    importlib.invalidate_caches()
    with blame(f"{place}: importing {source}", "correct the module"):
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{source}.".startswith(f"{error.name}."):
                raise  # the module exists, but one that it imports does not
            raise UserError(
                f"{place}, and there is no module {error.name!r}; expected one that Python finds, "
                f"or a file: ./{source.replace('.', '/')}.py:thing; install it, correct the name, "
                "or set PYTHONPATH"
            ) from error


def _import_file(place: str, path: Path) -> ModuleType:
    name = f"{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise UserError(
            f"{place}, and {path} is no file; expected a Python file, relative to the working "
            "directory; correct the path"
        )
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None, "a file loader has a spec"
    module = importlib.util.module_from_spec(spec)
    _look_also_in(str(path.parent))
    sys.modules[name] = module  # before the import: dataclasses and pydantic look up their module
    complete = False
    try:
        with blame(f"{place}: importing {path.name}", "correct the file"):
            loader.exec_module(module)
        complete = True
    finally:
        if not complete:
            del sys.modules[name]
    return module


def _look_also_in(folder: str) -> None:
    """Added at the end, so that a user's file never hides an installed module."""
    if folder not in sys.path:
        sys.path.append(folder)


def _object(module: ModuleType, attribute: str, place: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            own = [name for name in vars(module) if not name.startswith("_")]
            raise UserError(
                f"{place}, and {Path(module.__file__ or module.__name__).name} has no "
                f"{attribute}{did_you_mean(attribute, own)}; expected a name that it defines"
            )
        found = getattr(found, part)
    return found


def _row(kind: Kind[Row], thing: Any, place: str) -> Row:
    if not callable(thing):
        raise UserError(
            f"{place}, which is of type {type(thing).__name__}; expected a function: a {kind.noun}"
        )
    try:
        row = row_of(thing, kind.row)
    except TypeError as error:  # a trait without a default
        raise UserError(
            f"{place}, a function that lacks the declaration of a {kind.noun}; "
            f"expected {kind.decorator} above it, from megatron_rl.extend"
        ) from error
    if not isinstance(row, kind.row):
        raise UserError(f"{place}, which is declared as another kind; expected a {kind.noun}")
    _check_signature(kind, row, place)
    return row


def _of_instance(kind: Kind[Row], of: type[Any], thing: Any, place: str) -> Row:
    if not isinstance(thing, of):
        raise UserError(
            f"{place}, which is of type {type(thing).__name__}; expected a {kind.noun}: "
            f"{of.__name__}(...), from megatron_rl.extend"
        )
    mistake = thing.mistake()
    if mistake is not None:
        raise UserError(f"{place}: {printable(mistake, 400)}")
    row: Any = kind.row  # every kind with an instance has ``of``
    made: Row = row.of(thing)
    return made


def _check_signature(kind: Kind[Any], row: Entry, place: str) -> None:
    """Check that the thing, and the object it makes, take the arguments that a run passes."""
    settings = () if row.settings is None else ("settings",)
    calls = {label_of(row.name): (row.own, (*kind.arguments, *settings))}
    if inspect.isclass(row.own):
        methods = kind.methods or (f"__call__({', '.join(kind.arguments)})",)
        made_of = (*kind.arguments, *settings) if kind.methods else settings
        a_noun = f"{'an' if kind.noun[0] in 'aeiou' else 'a'} {kind.noun}"
        calls = {label_of(row.name): (row.own, made_of)}
        for method in methods:
            name, bracket, listed = method.rstrip(")").partition("(")
            found = _method(row.own, name, place, f"{a_noun}, with {', '.join(methods)}")
            if bracket:
                calls[name] = (found, ("self", *listed.replace(",", " ").split()))
    for name, (function, arguments) in calls.items():
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # a builtin without a signature
            continue
        try:
            signature.bind(*arguments)
        except TypeError as error:
            hint = "" if settings else "; settings come last, where its decorator names their class"
            raise UserError(
                f"{place}, which is {name}{signature}; expected {name}({', '.join(arguments)})"
                f"{hint}"
            ) from error


def _method(own: type, name: str, place: str, expected: str) -> Any:
    # Not getattr: it also finds that the class itself can be called.
    found = next((vars(base)[name] for base in own.__mro__ if name in vars(base)), None)
    if not callable(found):
        raise UserError(f"{place}, a class without {name}; expected {expected}")
    return found

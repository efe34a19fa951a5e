"""Paths as people write them: ``~`` and ``${VAR}`` are filled in; addresses are refused."""

from __future__ import annotations

import os
import re

from megatron_rl.errors import UserError

#: ``$$`` is a dollar sign; ``$VAR`` and ``${VAR}`` are variables of the environment.
_VARIABLE = re.compile(r"\$(?:\$|\{([^{}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
#: One slash is enough: normalising a path drops the second one.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local_path(name: str, text: str) -> str:
    """The path that ``text`` means on this machine; ``name``: the field, for messages.

    Raises UserError: an address such as ``s3://bucket/key``, a variable that is unset or empty, an
    unknown user's home, an empty path, a NUL character or half a surrogate pair.
    """
    found = f"{name} is {text if len(text) <= 300 else text[:297] + '...'!r}"
    if not text or "\0" in text:
        raise UserError(f"{found}; expected a path")

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        variable = match[1] if match[2] is None else match[2]
        if not os.environ.get(variable):
            raise UserError(
                f"{found}, and the environment has no variable {variable!r}, or an empty one; "
                "expected one with a value; set it, write the path out, or $$ for a dollar sign"
            )
        return os.environ[variable]

    address = UserError(
        f"{found}, an address; expected a path in the file system: download it, or mount it, "
        "and name the path"
    )
    if _ADDRESS.match(text):
        raise address
    path = _VARIABLE.sub(value, text)
    if _ADDRESS.match(path):
        raise address
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise UserError(f"{found}, which holds no whole characters; expected a path") from error
    if max(map(len, encoded.split(b"/"))) > 255 or len(encoded) > 4095:
        raise UserError(f"{name} is {text[:40]!r}..., too long for a file system; expected a path")
    at_home = os.path.expanduser(path)
    if at_home.startswith("~"):
        raise UserError(
            f"{found}, and there is no such home directory; expected ~ or ~USER; write the path "
            "out, or ./~ for a name that begins so"
        )
    return at_home


def as_written(path: str) -> str:
    """The inverse of `local_path`: a text that gives this path."""
    return ("./" if path.startswith("~") else "") + path.replace("$", "$$")

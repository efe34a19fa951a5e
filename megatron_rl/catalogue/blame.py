"""Turns errors of a user's own code into one line that names the place."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_rl.catalogue.settings import Settings
from megatron_rl.errors import RunFailed, Stopped, UserError, one_line

#: Folders of Python's own modules and of this package.
_NOT_OF_USERS = (sysconfig.get_path("stdlib"), os.path.dirname(os.path.dirname(__file__)))


class blame:
    """A context for a user's code: any error becomes a UserError with the code's name, the error
    and its place. UserError, RunFailed and Stopped of the code itself pass.
    """

    def __init__(self, who: str, remedy: str) -> None:
        """who: begins the line; remedy: ends it."""
        self._who, self._remedy = who, remedy

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        ours = (UserError, RunFailed, Stopped)
        if isinstance(error, (Exception, SystemExit)) and not isinstance(error, ours):
            raise UserError(f"{self._who} raised {raised(error)}; {self._remedy}") from error


def made(who: str, kind: type[Any], settings: Settings | None) -> Any:
    """Make an object of a user's class with its settings. UserError: the class raises."""
    with blame(f"{who}, while it is made,", "correct it"):
        return kind() if settings is None else kind(settings)


def raised(error: BaseException) -> str:
    """``ValueError no such thing (my_loss.py:12)``: an error and the user's line that raised it, or
    that called the library which did.
    """
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"SyntaxError {error.msg} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _of_a_user(frame.filename)]
    last = [*frames, *own][-1:]
    place = "".join(f" ({frame.filename}:{frame.lineno})" for frame in last)
    text = one_line(error)
    return f"{text if len(text) <= 300 else text[:297] + '...'}{place}"


def _of_a_user(file: str) -> bool:
    return "site-packages" not in Path(file).parts and not file.startswith(_NOT_OF_USERS)

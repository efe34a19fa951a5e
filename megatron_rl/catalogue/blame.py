"""What a user's own code raises, as one line that names the place."""

from __future__ import annotations

import traceback
from types import TracebackType

from megatron_rl.errors import RunFailed, Stopped, UserError, one_line


class blame:
    """Context in which a user's code runs: what it raises becomes a UserError that says who raised
    what, and where. UserError, RunFailed and Stopped of the code itself pass.
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


def raised(error: BaseException) -> str:
    """``ValueError no such thing (my_loss.py:12)``: an error and the line that raised it."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"SyntaxError {error.msg} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    text = one_line(error)
    return f"{text if len(text) <= 300 else text[:297] + '...'}{place}"

"""The errors a user is meant to see: one line that says what was found, what was expected and what
to do.
"""


class UserError(Exception):
    """A mistake in the user's input (config, data, checkpoint, launch).

    The command line prints the message as one line on stderr and exits with code 2, without a
    traceback. Write it as "found; expected; remedy".
    """


class RunFailed(Exception):
    """The input was right, and the result is not: exit code 1, one line, no traceback."""


class Stopped(Exception):
    """A signal asked the run to stop, and all ranks have agreed to; raised on all together."""


def printable(text: str, most: int = 200) -> str:
    """A text of others for a message: its beginning, with what cannot be printed written out."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def one_line(error: BaseException) -> str:
    """The kind of an error and what it says, on one line."""
    return " ".join(f"{type(error).__name__} {error}".split())


def shown(value: object) -> str:
    """A value for a message; the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

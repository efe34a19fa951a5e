"""The errors that a user sees: one line with what was found, what was expected and what to do."""


class UserError(Exception):
    """A mistake in the user's input (config, data, checkpoint, launch).

    The command line prints the message as one line on stderr and exits with code 2, without a
    traceback. Write it as "found; expected; remedy".
    """


class RunFailed(Exception):
    """The input was right but the run failed: exit code 1, one line, no traceback."""


class Stopped(Exception):
    """A signal asked the run to stop, and all ranks have agreed; raised on all ranks."""


def printable(text: str, most: int = 200) -> str:
    """The beginning of a foreign text for a message, with escapes for unprintable characters."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def one_line(error: BaseException) -> str:
    """The type and message of an error, on one line."""
    return " ".join(f"{type(error).__name__} {error}".split())


def shown(value: object) -> str:
    """A value for a message, cut if long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

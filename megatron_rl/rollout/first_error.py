"""The first error among calls of verifiers or environments, as one line for the user."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Callable, Sequence

from megatron_rl.catalogue.blame import raised
from megatron_rl.errors import RunFailed, UserError


def raise_first(calls: Sequence[Future[Any]], describe: Callable[[int, str], str]) -> None:
    """Raise the error of the first call that failed; nothing if none of those that are done did.

    Args:
        calls: in order.
        describe: makes the message, from the number of the call and what it raised.

    Raises:
        UserError, RunFailed: the call raised it itself. RunFailed: it raised anything else.
    """
    for number, call in enumerate(calls):
        error = call.exception() if call.done() else None
        if isinstance(error, (UserError, RunFailed)):
            raise error
        if error is not None:
            raise RunFailed(describe(number, raised(error))) from error

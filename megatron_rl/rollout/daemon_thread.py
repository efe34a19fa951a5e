"""Calls in daemon threads, for calls that may never return: the process does not wait for them."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Callable


def in_daemon_thread(function: Callable[..., Any], *arguments: Any, name: str) -> Future[Any]:
    """Call a function in a new daemon thread; a future of what it returns or raises.

    Args:
        function: is called once.
        arguments: of the call.
        name: of the thread.
    """
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()  # from now on it cannot be cancelled
    arguments = (future, function, *arguments)
    threading.Thread(target=_run, args=arguments, daemon=True, name=name).start()
    return future


def _run(future: Future[Any], function: Callable[..., Any], *arguments: Any) -> None:
    with _Failure(future):
        future.set_result(function(*arguments))


class _Failure:
    """Context that hands an exception to a future, as the thread of an executor does."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is not None:
            self._future.set_exception(error)
        return True

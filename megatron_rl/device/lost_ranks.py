"""Tells errors caused by lost ranks from errors of this rank."""

from __future__ import annotations

import re

#: Messages of gloo, NCCL and the rendezvous store when a peer is gone or silent.
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Timed out waiting|Read timeout|Socket Timeout"
    r"|recvValue failed|failed to recv|remote process exited|Watchdog caught collective"
    r"|NCCL (timeout|communicator was aborted)|connect.*timed out",
    re.IGNORECASE,
)


def lost_ranks(error: BaseException) -> str | None:
    """The message about lost ranks, on one line; None: the error has another cause."""
    text = " ".join(str(error).split())
    found = _LOST.search(text) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    around = re.search(re.escape(found[0]) + r"(?: \[[^]]*\][:\d]*)?", text)
    assert around is not None, "the text holds what was found in it"
    return around[0]

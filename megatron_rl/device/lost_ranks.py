"""Tell the loss of other ranks from errors of one's own."""

from __future__ import annotations

import re

#: What gloo, NCCL and the rendezvous store say when a peer is gone or silent.
_LOST = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Timed out waiting|Read timeout|Socket Timeout"
    r"|recvValue failed|failed to recv|remote process exited|Watchdog caught collective"
    r"|NCCL (timeout|communicator was aborted)|connect.*timed out",
    re.IGNORECASE,
)


def lost_ranks(error: BaseException) -> str | None:
    """What was heard of ranks that are gone, on one line; None: the error is another."""
    text = " ".join(str(error).split())
    found = _LOST.search(text) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    around = re.search(re.escape(found[0]) + r"(?: \[[^]]*\][:\d]*)?", text)
    assert around is not None, "the text holds what was found in it"
    return around[0]

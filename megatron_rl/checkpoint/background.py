"""Writing checkpoints beside the training, in a thread of every rank."""

from __future__ import annotations

import threading
from typing import Callable

import torch.distributed as dist
from torch.distributed import ProcessGroup

#: What writes a checkpoint that was copied to host memory: a collective over the group given.
Write = Callable[[ProcessGroup], None]


class BackgroundWriter:
    """One checkpoint at a time. The threads talk over a gloo group of their own, so that their
    collectives and those of the training cannot meet.
    """

    def __init__(self) -> None:
        """A collective over all ranks."""
        self._group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is writing."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, write: Write) -> None:
        """Run ``write`` in the thread; what was started before must have been waited for."""
        if self._thread is not None:
            raise RuntimeError("the checkpoint before has not been waited for")

        def run() -> None:
            try:
                write(self._group)
            except BaseException as failure:  # noqa: BLE001 - raised again by `wait`
                self._failure = failure

        # A daemon: where ranks are lost it would wait for them, and the process with it.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until what was started is on the disk.

        Raises:
            OSError: it could not be written; raised on all ranks. What else went wrong.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure

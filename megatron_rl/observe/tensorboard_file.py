"""Scalars in TensorBoard's event format, one whole record at a time.

torch's SummaryWriter writes in a thread: an error of the disk comes up later, leaves a torn record
and a traceback, and stops the writer for good.
"""

from __future__ import annotations

import io
import os
import socket
import time
import uuid
from collections.abc import Mapping
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.observe.append_file import WarningFile
from megatron_rl.observe.loggers import LoggedRun

TENSORBOARD_DIR = "tensorboard"


class TensorBoard:
    """A new event file in the run directory. It tells TensorBoard to forget those steps of older
    files that the run does again.
    """

    def __init__(self, run: LoggedRun) -> None:
        """UserError: TensorBoard is not installed. OSError: the file cannot be made."""
        _import_tensorboard()
        from tensorboard.compat.proto.event_pb2 import SessionLog

        directory = run.directory / TENSORBOARD_DIR
        directory.mkdir(exist_ok=True)
        parts = (f"{time.time():.6f}", socket.gethostname(), str(os.getpid()), uuid.uuid4().hex[:8])
        path = directory / f"events.out.tfevents.{'.'.join(parts)}"
        self._file = WarningFile(path, run.warn)
        purge = 0 if run.resume_step is None else run.resume_step + 1
        version = _record(file_version="brain.Event:2")
        start = _record(step=purge, session_log=SessionLog(status=SessionLog.START))
        self._file.write(version, start)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One record with the scalars of a step, by tag."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        parts = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        self._file.write(_record(step=step, summary=Summary(value=parts)))

    def close(self) -> None:
        """See `loggers.Logger`."""
        self._file.finish()


def _record(**fields: Any) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return buffer.getvalue()


def _import_tensorboard() -> None:
    try:
        import tensorboard.summary.writer.record_writer  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the logger tensorboard is on (observe.tensorboard) but TensorBoard is not installed; "
            "expected the package tensorboard; pip install tensorboard, or set "
            "observe.tensorboard to false"
        ) from error

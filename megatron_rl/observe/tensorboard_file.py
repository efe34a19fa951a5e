"""Scalars in TensorBoard's event format, one whole record at a time.

torch's SummaryWriter writes in a thread: an error of the disk comes up later, leaves a torn record
and a traceback, and ends the writer for good.
"""

from __future__ import annotations

import io
import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.errors import UserError
from megatron_rl.observe.append_file import AppendFile


def new_event_file(directory: Path, purge_step: int) -> tuple[AppendFile, OSError | None]:
    """A new event file in the directory, which tells TensorBoard to forget what the older ones
    hold from ``purge_step`` on; and why that is not written yet.

    Raises:
        UserError: TensorBoard is not installed. OSError: the file cannot be made.
    """
    _import_tensorboard()
    from tensorboard.compat.proto.event_pb2 import SessionLog

    directory.mkdir(exist_ok=True)
    parts = (f"{time.time():.6f}", socket.gethostname(), str(os.getpid()), uuid.uuid4().hex[:8])
    file = AppendFile(directory / f"events.out.tfevents.{'.'.join(parts)}")
    version = _record(file_version="brain.Event:2")
    start = _record(step=purge_step, session_log=SessionLog(status=SessionLog.START))
    return file, file.append(version, start)


def scalars(step: int, values: Mapping[str, float]) -> bytes:
    """One record with the scalars of a step, by tag."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    parts = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    return _record(step=step, summary=Summary(value=parts))


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
            "observe.tensorboard is on but TensorBoard is not installed; expected the package "
            "tensorboard; pip install tensorboard, or set observe.tensorboard to false"
        ) from error

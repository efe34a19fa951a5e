"""A process that has imported what runs need, and is copied (fork) for each of them.

    python -m megatron_rl.study.fork_server DESCRIPTOR

The descriptor is a socket to the study (`forked.ForkServer`). A copy is made in two steps, so that
the study itself becomes its parent (it is a child subreaper meanwhile, see prctl(2)): it waits for
the copy as for any process that it has started, and the copy is told when the study dies. Nothing
depends on this process once the copy has said its number.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from megatron_rl.study.with_parent import end_with

#: Bytes of a message at most.
MESSAGE = 1 << 20

Main = Callable[[Sequence[str]], int]


def serve(descriptor: int, prepare: Callable[[], bool], main: Main) -> None:
    """Import, then make copies until the study closes the connection.

    Args:
        descriptor: of the socket.
        prepare: imports; whether there is a GPU, which the study wants to know.
        main: what a copy calls with the run's arguments; its result is the exit code.
    """
    connection = socket.socket(fileno=descriptor)
    gpu = prepare()
    gc.collect()
    gc.freeze()  # a collection would touch, and so copy, what is imported
    _say(connection, {"refuses": why_not_to_fork(), "gpu": gpu})
    while True:
        message, files, _, _ = socket.recv_fds(connection, MESSAGE, 1)
        if not message:
            return
        try:
            _copy(connection, json.loads(message), files[0], main)
        except OSError as error:  # no room for another process
            _say(connection, {"error": str(error)})
        os.close(files[0])


def why_not_to_fork() -> str | None:
    """Why a copy of this process could hang or differ; None: it cannot. Only the thread that forks
    is in the copy, so locks that others hold stay locked there.
    """
    names = [thread.name for thread in threading.enumerate()]
    if len(names) > 1:
        return f"imports have started threads: {', '.join(names[1:])}"
    tasks = len(os.listdir("/proc/self/task"))
    return f"imports have started {tasks - 1} threads" if tasks > 1 else None


def _copy(connection: socket.socket, request: Mapping[str, Any], log: int, main: Main) -> None:
    first = os.fork()
    if first == 0:
        between = os.getpid()
        try:
            second = os.fork()
        except OSError as error:
            _say(connection, {"error": str(error)})
            os._exit(1)
        if second:
            os._exit(0)
        while os.getppid() == between:
            time.sleep(0.0005)
        _become(connection, request, log, main)
    os.waitpid(first, 0)


def _become(
    connection: socket.socket, request: Mapping[str, Any], log: int, main: Main
) -> NoReturn:
    """Be the run: a session, an environment and an output of its own."""
    os.setsid()
    end_with(request["parent"], signal.SIGTERM)
    os.environ.clear()
    os.environ.update(request["environment"])
    for number in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(log, number)
    os.close(log)
    _say(connection, {"pid": os.getpid()})
    connection.close()
    sys.argv[1:] = request["words"]
    sys.exit(main(request["words"]))


def _say(connection: socket.socket, message: Mapping[str, Any]) -> None:
    connection.send(json.dumps(message).encode())


def _run(words: Sequence[str]) -> int:
    """``python -m megatron_rl``; the words are in sys.argv."""
    runpy.run_module("megatron_rl", run_name="__main__", alter_sys=True)
    return 0


def _import() -> bool:
    from megatron_rl.run.imports import import_for_cpu

    return import_for_cpu()


if __name__ == "__main__":
    serve(int(sys.argv[1]), _import, _run)

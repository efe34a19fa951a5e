"""Processes that need not start: copies (fork) of one that has imported what they will need.

    codes = run_warm(["train", "rl.yaml"], ranks=2, cwd=folder, env=env, out=path, err=path)
    process = start_warm("tests.support.ranks:work", [3], cwd=folder, env=env, files=[0, 1, 2])

Without torchrun, its signals and its end of the others when one fails; for commands that succeed.
All copies have the same hash seed; ranks that torchrun starts have seeds of their own.
Run as a script, this file is the process that is copied.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, NoReturn, Sequence

ROOT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1
#: Bytes of a request at most, and descriptors with it.
_REQUEST, _DESCRIPTORS = 1 << 20, 8
_server: list[tuple[socket.socket, subprocess.Popen]] = []


@dataclass(frozen=True)
class WarmProcess:
    """A copy that runs; the process that was copied is its parent."""

    pid: int

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code; None: it runs on."""
        return _ask({"do": "wait", "pid": self.pid, "timeout_s": timeout_s})

    def kill(self) -> None:
        """SIGKILL, if it has not ended, and its end."""
        _ask({"do": "kill", "pid": self.pid})
        self.wait(60.0)


def start_warm(
    function: str,
    arguments: Sequence[Any],
    *,
    cwd: Path,
    env: Mapping[str, str],
    files: Sequence[int],
) -> WarmProcess:
    """Run a function in a copy; what it returns is the exit code. No file may grow larger than one
    of the caller.

    Args:
        function: as ``tests.support.ranks:work``.
        arguments: JSON values.
        files: descriptors, of which the copy gets its own: standard input, output and error; the
            numbers of any further ones are the function's first arguments.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    where = {"function": function, "cwd": str(cwd), "env": dict(env), "largest_file": limit}
    return WarmProcess(_ask({"do": "start", "arguments": list(arguments), **where}, files))


def run_warm(
    words: Sequence[str],
    *,
    ranks: int | None,
    cwd: Path,
    env: Mapping[str, str],
    out: Path,
    err: Path,
    timeout_s: float,
) -> list[int]:
    """Run ``megatron-rl WORDS`` on so many ranks, or as a process by itself (None).

    Returns:
        The exit codes, in rank order; -9 of one that took longer than the timeout.
    """
    places: list[dict[str, str]] = [{}]
    if ranks is not None:
        # Ranks meet at this process's store, as at torchrun's; its port is chosen by the system.
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        places = [_place(rank, ranks, store.port) for rank in range(ranks)]
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open(os.devnull))]
        opened += [stack.enter_context(open(path, "a")) for path in (out, err)]
        files = [file.fileno() for file in opened]
        started = [
            start_warm(
                "tests.support.warm:command",
                [list(words)],
                cwd=cwd,
                env={**env, **place},
                files=files,
            )
            for place in places
        ]
    deadline = time.monotonic() + timeout_s
    codes = []
    for process in started:
        code = process.wait(max(0.0, deadline - time.monotonic()))
        if code is None:
            process.kill()
            code = -signal.SIGKILL
        codes.append(code)
    return codes


def command(words: list[str]) -> int:
    """The command line, in a copy."""
    sys.argv[1:] = words
    from megatron_rl.cli import main

    return main()


def _ask(request: Mapping[str, Any], files: Sequence[int] = ()) -> Any:
    """What the process that is copied answers; it is started before the first request."""
    if not _server:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what libraries say while they are imported
        )
        theirs.close()
        _server.append((ours, process))
    connection = _server[0][0]
    socket.send_fds(connection, [json.dumps(request).encode()], list(files))
    answer = connection.recv(_REQUEST)
    assert answer, "the process that is copied has died"
    return json.loads(answer)


@atexit.register
def _end() -> None:
    for connection, process in _server:
        connection.close()
        process.wait()


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Torchrun's variables."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _serve(descriptor: int) -> None:
    """Answer requests until the other side closes the connection."""
    _end_with_parent()
    sys.path[0] = str(ROOT)
    from megatron_rl.run.imports import import_for_cpu

    import_for_cpu()
    gc.collect()
    gc.freeze()
    connection = socket.socket(fileno=descriptor)
    codes: dict[int, int | None] = {}  # of the copies, None while they run
    while True:
        message, files, _, _ = socket.recv_fds(connection, _REQUEST, _DESCRIPTORS)
        if not message:
            return
        request = json.loads(message)
        if request["do"] == "start":
            answer = os.fork()
            if answer == 0:
                connection.close()
                _become(request, files)
            codes[answer] = None
            for file in files:
                os.close(file)
        elif request["do"] == "kill":
            answer = None
            if _look(codes, request["pid"]) is None:
                os.kill(request["pid"], signal.SIGKILL)
        else:
            answer = _wait(codes, request["pid"], request["timeout_s"])
        connection.send(json.dumps(answer).encode())


def _become(request: Mapping[str, Any], files: Sequence[int]) -> NoReturn:
    _end_with_parent()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    resource.setrlimit(resource.RLIMIT_FSIZE, request["largest_file"])
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
        os.close(file)
    module, _, name = request["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    sys.path[0] = request["cwd"]
    sys.exit(function(*files[3:], *request["arguments"]))


def _look(codes: dict[int, int | None], pid: int) -> int | None:
    """The exit code of a copy, if it has ended."""
    if codes[pid] is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            codes[pid] = os.waitstatus_to_exitcode(status)
    return codes[pid]


def _wait(codes: dict[int, int | None], pid: int, timeout_s: float) -> int | None:
    deadline = time.monotonic() + timeout_s
    while _look(codes, pid) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return codes[pid]


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


if __name__ == "__main__":
    _serve(int(sys.argv[1]))

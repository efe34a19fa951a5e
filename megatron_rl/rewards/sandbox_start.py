"""``python -I -S sandbox_start.py VERDICT_FD CPU_S MEMORY_MIB PARENT_PID KIND``.

KIND is "call" (a program of functions) or "run" (a program that reads its input and prints).

The interpreter forks before it reads anything. The child gets the program and serves calls of it
(``sandbox_child.py``). The parent reads the job from standard input, which the child does not have,
and judges (``sandbox_judge.py``). They share only two pipes.
"""

import os
import signal
import sys
import types


def _see_package() -> None:
    """Make this folder's files importable by their full names, without executing anything else."""
    folder = os.path.dirname(os.path.abspath(__file__))
    for name, path in (
        ("megatron_rl", os.path.dirname(folder)),
        ("megatron_rl.rewards", folder),
    ):
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package


_see_package()

from megatron_rl.rewards import confinement, sandbox_child, sandbox_judge  # noqa: E402
from megatron_rl.rewards.sandbox_remote import Program  # noqa: E402
from megatron_rl.rewards.sandbox_wire import send  # noqa: E402

_MAX_PRINTED = 16 * 2**20  # and of the input, bytes


def main() -> None:
    _default_signals()
    verdict, cpu_s, memory_mib, parent = map(int, sys.argv[1:5])
    most = _MAX_PRINTED if sys.argv[5] == "run" else 0
    request_read, request_write = os.pipe()
    answer_read, answer_write = os.pipe()
    judge = os.getpid()
    child = os.fork()
    if child == 0:
        _empty_handed(request_read, answer_write, most > 0)
        server = sandbox_child.Server(request_read, answer_write)
        try:
            confinement.hide()
            held = confinement.confine(cpu_s, memory_mib, judge, most)
            send(answer_write, ["confined", held])
        except (OSError, KeyError, ValueError) as error:
            send(answer_write, ["refused", f"{type(error).__name__}: {error}"])
            os._exit(1)
        try:
            server.serve()
        finally:
            os._exit(0)  # no exit handlers of the program
    os.close(request_read)
    os.close(answer_write)
    program = Program(request_write, answer_read, child)
    sandbox_judge.main(verdict, program, cpu_s, memory_mib, parent)


def _default_signals() -> None:
    """Reset the signals that the trainer ignores or blocks, which are inherited. Without SIGCHLD
    this process could not wait for its child.
    """
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _empty_handed(requests: int, answers: int, prints: bool) -> None:
    """Close all descriptors but two pipes. Input and output become empty, or files in memory."""
    for place in (0, 1):
        file = os.memfd_create("program") if prints else os.open(os.devnull, os.O_RDWR)
        os.dup2(file, place)
        os.close(file)
    low, high = sorted((requests, answers))
    os.closerange(3, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, 2**20)
    sys.argv[:] = ["program"]


if __name__ == "__main__":
    main()

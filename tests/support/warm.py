"""Ranks that need not start: copies (fork) of a process that has imported what they will need.

    codes = run_warm(["train", "rl.yaml"], ranks=2, cwd=folder, env=env, out=path, err=path)

Without torchrun, its signals and its end of the others when one fails; for commands that succeed.
Run as a script, this file is the process that is copied.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Mapping, NoReturn, Sequence

ROOT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1
_warm: list[subprocess.Popen] = []


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
    if not _warm:
        _warm.append(_start())
        atexit.register(_end)
    job = {
        "words": list(words),
        "cwd": str(cwd),
        "out": str(out),
        "err": str(err),
        "timeout_s": timeout_s,
        "ranks": [dict(env)],
    }
    if ranks is not None:
        # Ranks meet at this process's store, as at torchrun's; its port is chosen by the system.
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        job["ranks"] = [{**env, **_place(rank, ranks, store.port)} for rank in range(ranks)]
    _warm[0].stdin.write(json.dumps(job) + "\n")
    _warm[0].stdin.flush()
    return json.loads(_warm[0].stdout.readline())


def _start() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # what libraries say while they are imported
        text=True,
    )


def _end() -> None:
    _warm[0].stdin.close()
    _warm[0].wait()


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


def _serve() -> None:
    """Answer jobs until the parent closes the pipe."""
    _end_with_parent()
    sys.path[0] = str(ROOT)
    from megatron_rl.device import megatron_on_cpu

    megatron_on_cpu.install()
    import megatron_rl.rollout.builtin.generate
    import megatron_rl.run.verbs
    import megatron_rl.tasks.supervised  # noqa: F401

    gc.freeze()
    for line in sys.stdin:
        job = json.loads(line)
        started = []
        for env in job["ranks"]:
            pid = os.fork()
            if pid == 0:
                _become_rank(job, env)
            started.append(pid)
        print(json.dumps(_wait(started, job["timeout_s"])), flush=True)


def _become_rank(job: dict, env: Mapping[str, str]) -> NoReturn:
    _end_with_parent()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(job["cwd"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for descriptor, path, how in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["out"], flags),
        (2, job["err"], flags),
    ):
        opened = os.open(path, how, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv[1:] = job["words"]
    sys.path[0] = job["cwd"]
    from megatron_rl.cli import main

    sys.exit(main())


def _wait(pids: Sequence[int], timeout_s: float) -> list[int]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


if __name__ == "__main__":
    _serve()

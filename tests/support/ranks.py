"""Rank processes for distributed tests: started once, then given one function after the other.

    def work(a, b): ...                    # a top-level function of a test or support file
    results = run_on_ranks(2, work, a, b)  # what work(a, b) returned on each rank

Every call is a fresh world (of gloo; on CUDA of NCCL, a device a rank) without model-parallel
groups; the function builds those it needs (`tests.support.tiny`). On a CPU the ranks are copies of
a process that has imported Megatron (`tests.support.warm`). Run as a script, this file is the
worker on CUDA.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import importlib
import inspect
import io
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, Callable, Iterable

from tests.support.warm import WarmProcess, start_warm

ROOT = Path(__file__).resolve().parents[2]
#: Starting (importing torch and Megatron) takes seconds, on a busy machine many; a call's time
#: begins when all ranks are up.
START_TIMEOUT_S = 300.0
#: After one rank has failed, the others (perhaps waiting for it) get this long to answer.
GRACE_S = 5.0
#: A worker whose parent is gone, waiting in a collective, ends after this long.
COLLECTIVE_TIMEOUT_S = 300.0
#: To a rank: everyone has answered, leave the world.
REST = b""


class RankFailure(AssertionError):
    """A function raised on a rank, or a rank died or took too long."""


_pools: dict[tuple[int, str], _Pool] = {}


def run_on_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 120.0,
    kind: str = "cpu",
) -> list[Any]:
    """Run ``function(*args)`` on every rank of a world of ``num_ranks`` processes.

    Args:
        function: at the top level of a file below the repository's root.
        args: picklable.
        kind: cpu or cuda.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RankFailure: with the traceback of each rank that raised, or the output of one that died.
    """
    if (num_ranks, kind) not in _pools:
        _pools[num_ranks, kind] = _Pool(num_ranks, kind)
    pool = _pools[num_ranks, kind]
    try:
        answers = pool.call(function, args, timeout_s)
    except BaseException:
        del _pools[num_ranks, kind]
        pool.kill()
        raise
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
    if failures:
        raise RankFailure(f"{function.__name__} failed on\n" + "\n".join(failures))
    return [result for _, result in answers]


@atexit.register
def _kill_all() -> None:
    for pool in _pools.values():
        pool.kill()
    _pools.clear()


class _Pool:
    def __init__(self, num_ranks: int, kind: str) -> None:
        import torch.distributed as dist

        # Port 0: the system chooses a free one, and it is taken from that moment on.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes: list[subprocess.Popen | WarmProcess] = []
        self._pipes: list[Connection] = []
        self._outputs = []
        self._starting = list(range(num_ranks))
        for rank in range(num_ranks):
            ours, theirs = Pipe()
            output = tempfile.TemporaryFile()
            place = [rank, num_ranks, self._store.port, kind]
            self._processes.append(_start(theirs.fileno(), output.fileno(), place))
            theirs.close()
            self._pipes.append(ours)
            self._outputs.append(output)

    def call(
        self, function: Callable[..., Any], args: tuple, timeout_s: float
    ) -> list[tuple[bool, Any]]:
        """(True, result) or (False, traceback) of each rank."""
        self._wait_for_start()
        name = _module_name(function)
        message = pickle.dumps((name, function.__qualname__, pickle.dumps(args)))
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send_bytes(message)
            except OSError:
                raise RankFailure(self._last_words(rank, "has died before the call")) from None
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < len(self._pipes):
            waiting = {p: r for r, p in enumerate(self._pipes) if r not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankFailure(self._silence(answers, list(waiting.values()), timeout_s))
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    answers[rank] = _unpack(pipe.recv_bytes())
                except EOFError:
                    raise RankFailure(self._last_words(rank, "has died")) from None
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        for pipe in self._pipes:  # only now: no rank still talks to another
            with contextlib.suppress(OSError):  # has died since; the next call will say so
                pipe.send_bytes(REST)
        return [answers[rank] for rank in range(len(self._pipes))]

    def _wait_for_start(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while self._starting:
            rank = self._starting[0]
            if not self._pipes[rank].poll(max(0.0, deadline - time.monotonic())):
                raise RankFailure(self._silence({}, self._starting, START_TIMEOUT_S))
            try:
                self._pipes[rank].recv_bytes()
            except EOFError:
                raise RankFailure(self._last_words(rank, "has died while starting")) from None
            self._starting.pop(0)

    def _silence(self, answers: dict, missing: list[int], timeout_s: float) -> str:
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in answers.items() if not ok]
        if failures:
            return "\n".join([*failures, f"ranks {missing} were waiting for it and were ended"])
        return f"ranks {missing} have not answered within {timeout_s} s and were ended"

    def _last_words(self, rank: int, event: str) -> str:
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._processes[rank].wait(GRACE_S)
        output = self._outputs[rank]
        output.seek(0)
        text = output.read().decode(errors="replace")[-3000:]
        return f"rank {rank} {event} (exit code {code}):\n{text}"

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(GRACE_S)
        for resource in (*self._pipes, *self._outputs):
            resource.close()


def _start(pipe: int, output: int, place: list[Any]) -> subprocess.Popen | WarmProcess:
    """A rank that reads calls from the pipe."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(os.devnull) as nothing:
        if place[-1] == "cpu":
            files = [nothing.fileno(), output, output, pipe]
            return start_warm("tests.support.ranks:work", place, cwd=ROOT, env=env, files=files)
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.ranks", *map(str, [pipe, *place])],
            cwd=ROOT,
            env=env,
            pass_fds=[pipe],
            stdin=nothing,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _module_name(function: Callable[..., Any]) -> str:
    """Dotted name of the function's file from the root: tests.distributed.test_generate."""
    path = Path(inspect.getsourcefile(function)).resolve().relative_to(ROOT)
    return ".".join(path.with_suffix("").parts)


def work(descriptor: int, rank: int, num_ranks: int, port: int, kind: str) -> None:
    """On a rank: answer calls until the parent closes the pipe."""
    pipe = Connection(descriptor)
    import torch.distributed as dist

    from megatron_rl.config.schema import DeviceConfig
    from megatron_rl.device.launch import Launch
    from megatron_rl.device.select import select_device

    launch = Launch(rank, num_ranks, rank, num_ranks, launched=True)
    device = select_device(DeviceConfig(kind=kind, threads=1), launch)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    pipe.send_bytes(b"ready")
    call = 0
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        if message == REST:
            leave_world()
            continue
        name, qualified_name, args = pickle.loads(message)
        call += 1
        dist.init_process_group(
            device.backend,
            store=dist.PrefixStore(f"call_{call}", store),
            rank=rank,
            world_size=num_ranks,
            timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        pipe.send_bytes(_answer(name, qualified_name, args))


def leave_world() -> None:
    """Leave the world, and end its groups, each of which has threads of its own."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    forget_models()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def forget_models(things: Iterable[Any] | None = None) -> None:
    """Cut what keeps Megatron's models, and with them their groups, alive for ever.

    Gradient hooks hold the model, dispatchers the graph of the last micro-batch, and sharded
    optimizers a graph over their slices of the weights.

    Args:
        things: the modules and optimizers; None: all there are in this process.
    """
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer.optimizer import MegatronOptimizer
    from megatron.core.transformer.moe.moe_layer import MoELayer

    for thing in gc.get_objects() if things is None else things:
        if issubclass(type(thing), DistributedDataParallel):
            thing.grad_accs.clear()
        elif issubclass(type(thing), MoELayer):
            vars(thing.token_dispatcher).clear()
        elif issubclass(type(thing), MegatronOptimizer):
            vars(thing).clear()


def _answer(name: str, qualified_name: str, args: bytes) -> bytes:
    try:
        function = importlib.import_module(name)
        for part in qualified_name.split("."):
            function = getattr(function, part)
        return _pack((True, function(*pickle.loads(args))))
    except BaseException:  # noqa: BLE001  whatever it is, the parent reports it
        return _pack((False, traceback.format_exc()))


def _pack(answer: tuple[bool, Any]) -> bytes:
    """In torch's format: once Megatron 0.19 is imported, a pickled tensor is read back through a
    module of Megatron's, and the parent must not import that before its device is prepared.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(answer, buffer)
    return buffer.getvalue()


def _unpack(answer: bytes) -> tuple[bool, Any]:
    import torch

    return torch.load(io.BytesIO(answer), weights_only=False)


if __name__ == "__main__":
    work(*map(int, sys.argv[1:-1]), sys.argv[-1])

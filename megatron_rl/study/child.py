"""The process of a run: the command line, in a session of its own, that ends with the study."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from megatron_rl.study import with_parent
from megatron_rl.study.forked import ForkServer
from megatron_rl.study.plan import PlannedRun
from megatron_rl.study.state import LOG_FILE, PLANNED_FILE, lay_out

#: Variables that would make a run a rank of the launch that the study itself is part of.
_OF_A_LAUNCH = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

MakeCommand = Callable[[PlannedRun], Sequence[str]]


def command_of(run: PlannedRun) -> list[str]:
    """``python -m megatron_rl VERB planned.yaml``, under torchrun for several ranks."""
    words = [run.verb, str(run.run_dir / PLANNED_FILE)]
    launcher = []
    if run.ranks > 1:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={run.ranks}", "-m"]
    return [sys.executable, "-m", *launcher, "megatron_rl", *words]


class Child:
    """A run that goes on."""

    def __init__(
        self,
        run: PlannedRun,
        slot: int,
        make_command: MakeCommand = command_of,
        gpus: Sequence[int] = (),
        forks: ForkServer | None = None,
    ) -> None:
        """Start it. Its output goes to its log.

        Args:
            slot: its place among the runs side by side.
            gpus: the devices that it alone sees; empty: those that the study sees.
            forks: makes it a copy of a process that has imported what it needs, if it can.

        Raises:
            OSError: its directory or log cannot be written.
        """
        lay_out(run)
        self.run, self.slot = run, slot
        self.began = time.monotonic()
        self._log = run.run_dir / LOG_FILE
        command = list(make_command(run))
        with open(self._log, "ab") as log:
            log.write(f"== {' '.join(command)}\n".encode())
            log.flush()
            self._start = log.tell()
            environment = _environment(run, gpus)
            forked = None
            if forks is not None and not gpus:
                forked = forks.start(run, command, environment, log)
            self._process = forked or _fresh(command, environment, log)

    @property
    def log(self) -> Path:
        """The file of its output, of earlier attempts as well."""
        return self._log

    @property
    def log_start(self) -> int:
        """The byte of the log where this attempt begins."""
        return self._start

    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask it to save a checkpoint and end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it, and what it has started in its session, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _fresh(
    command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", with_parent.__file__, str(os.getpid()), *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,  # Ctrl-C comes to the study alone, which hands it on
    )


def _environment(run: PlannedRun, gpus: Sequence[int]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCH}
    kept["OMP_NUM_THREADS"] = str(run.config.device.threads or 1)
    kept["PYTHONUNBUFFERED"] = "1"  # the log holds the last words of a run that is killed
    # Of torchrun, which otherwise kills its ranks after 30 s, in the middle of a last checkpoint.
    kept.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    if gpus:
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    return kept

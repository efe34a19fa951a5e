"""The command line as a user starts it: in processes of its own, alone or under torchrun.

    done = run("train", "rl.yaml", cwd=folder, ranks=2)          # to the end
    done = succeed("train", "rl.yaml", cwd=folder, ranks=2)      # sooner, for it must succeed
    with started("train", "rl.yaml", cwd=folder, ranks=2) as process:
        process.wait_for("step 5/8")
        process.kill_ranks()

Nothing outlives the block, and only processes started here are ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

import psutil

from tests.support import in_turn
from tests.support.warm import run_warm, start_warm

ROOT = Path(__file__).resolve().parents[2]
#: Longest a command may take; many times what it needs, for busy machines.
TIMEOUT_S = 300.0
#: Metrics that depend on the machine and its load.
MEASURED = ("time/", "memory/", "tokens_per_second")


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str
    ranks: tuple[int, ...] = ()  #: the exit code of each, where they ran without torchrun

    @property
    def errors(self) -> list[str]:
        """The lines with which the program (not torchrun) refused. Another rank that says the same,
        because it has waited in vain for the first to end, does not count. Neither does the room on
        the disk, which changes meanwhile.
        """
        lines = [line for line in self.err.splitlines() if line.startswith("megatron-rl: ")]
        said: dict[str, str] = {}
        for line in lines:
            line = re.sub(r"error: rank \d+: ", "error: ", line)
            said.setdefault(re.sub(r" \(\S+ \S+ free there\)", "", line), line)
        return list(said.values())


class Started:
    """A running command; its output goes to files, so that no pipe can fill up."""

    def __init__(self, words: tuple[str, ...], cwd: Path, ranks: int | None, folder: Path) -> None:
        launcher = []
        if ranks is not None:
            launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        self._out, self._err = folder / "out", folder / "err"
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *launcher, "megatron_rl", *words],
                cwd=cwd,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait(self, timeout_s: float = TIMEOUT_S) -> Done:
        """Wait for the end; AssertionError with the output if it takes too long."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s\n{self._output()}") from None
        return Done(code, self._out.read_text(), self._err.read_text())

    def wait_for(self, text: str, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until the standard output holds the text."""
        self.wait_until(lambda: text in self._out.read_text(), timeout_s, f"no {text!r} in it")

    def wait_until(
        self, happened: Callable[[], bool], timeout_s: float = TIMEOUT_S, without: str = ""
    ) -> None:
        """Wait until something has happened while it runs."""
        deadline = time.monotonic() + timeout_s
        while not happened():
            running = self._process.poll() is None and time.monotonic() < deadline
            assert running, f"{without}\n{self._output()}"
            time.sleep(0.01)

    def kill_ranks(self) -> None:
        """SIGKILL to all ranks, as when the machine dies."""
        for rank in self._ranks():
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()

    def kill_command(self) -> None:
        """SIGKILL to the command alone: what it has started is not told."""
        self._process.kill()
        self._process.wait()

    def terminate(self) -> None:
        """SIGTERM to the launcher, as a scheduler sends it."""
        self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End what is left of it."""
        ranks = self._ranks()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()

    def _ranks(self) -> list[psutil.Process]:
        if self._process.poll() is not None:  # the number may belong to another process by now
            return []
        return psutil.Process(self._process.pid).children(recursive=True)

    def _output(self) -> str:
        return f"{self._out.read_text()[-2000:]}\n{self._err.read_text()[-4000:]}"


@contextlib.contextmanager
def started(*words: str, cwd: Path, ranks: int | None = None) -> Iterator[Started]:
    """Start ``megatron-rl WORDS``: one process, or ``ranks`` under torchrun on a free port."""
    with tempfile.TemporaryDirectory() as folder:
        process = Started(words, cwd, ranks, Path(folder))
        try:
            yield process
        finally:
            process.close()


def run(*words: str, cwd: Path, ranks: int | None = None, warm: bool = False) -> Done:
    """``megatron-rl WORDS`` to its end.

    Args:
        warm: on a CPU, in ranks that need not start, without torchrun.
    """
    if warm:
        return _warm(words, cwd, ranks)
    with started(*words, cwd=cwd, ranks=ranks) as process:
        return process.wait()


def succeed(*words: str, cwd: Path, ranks: int | None = None, warm: bool = True) -> Done:
    """As `run`, of a command that must end with 0."""
    done = run(*words, cwd=cwd, ranks=ranks, warm=warm)
    assert done.code == 0, f"exit code {done.code}\n{done.out}\n{done.err}"
    return done


def _warm(words: tuple[str, ...], cwd: Path, ranks: int | None) -> Done:
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        codes = run_warm(
            words,
            ranks=ranks,
            cwd=cwd,
            env=_environment(),
            out=out,
            err=err,
            timeout_s=TIMEOUT_S,
        )
        return Done(max(codes, key=abs), out.read_text(), err.read_text(), tuple(codes))


def run_in_turn(
    commands: dict[str, list[str]],
    cwd: Path,
    installed: Path | None = None,
) -> dict[str, Done]:
    """``megatron-rl WORDS`` of one rank, one after the other in a single process
    (`tests.support.in_turn`); what each gave, by its name.

    Args:
        installed: the interpreter of an environment that has the package installed, which then is
            the one that runs; None: that of this repository, in a process that need not start.
    """
    asked = json.dumps(list(commands.values()))
    environment = _environment()
    with contextlib.ExitStack() as stack:
        given, out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3))
        given.write(asked)
        given.seek(0)
        if installed is None:
            files = [file.fileno() for file in (given, out, err)]
            where = {"cwd": cwd, "env": environment, "files": files}
            process = start_warm("tests.support.in_turn:main", [], **where)
            code = process.wait(TIMEOUT_S)
            process.kill()
        else:
            del environment["PYTHONPATH"]
            words = [str(installed), "-c", Path(in_turn.__file__).read_text()]
            streams = {"stdin": given, "stdout": out, "stderr": err}
            code = subprocess.run(
                words, cwd=cwd, env=environment, timeout=TIMEOUT_S, **streams
            ).returncode
        for file in (out, err):
            file.seek(0)
        assert code == 0, err.read()
        found = json.loads(out.read().splitlines()[-1])
    return {name: Done(*parts) for name, parts in zip(commands, found, strict=True)}


def records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def reproducible(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run without those that depend on the machine."""
    return [
        {name: value for name, value in record.items() if not name.startswith(MEASURED)}
        for record in records(run_dir / "metrics.jsonl")
    ]


def _environment() -> dict[str, str]:
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}

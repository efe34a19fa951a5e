"""The servers that a run starts on rank 0's machine: started, started again, ended."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Collection

from megatron_rl.rollout.servers.process import ServerProcess

#: Makes the command of a server, from the weights it loads first, its host and its port: argv and
#: environment variables.
Command = Callable[[Path, str, int], tuple[list[str], dict[str, str]]]


class OwnServers:
    """The processes of a run's own servers. Each loads weights from a disk when it starts."""

    def __init__(
        self,
        command: Command,
        start_s: float,
        warn: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> None:
        """
        Args:
            command: of a server.
            start_s: longest wait for a server to start.
            warn: shows the user a line.
            stop: whether nobody waits for a server any more.
        """
        self._command, self._start_s, self._warn, self._stop = command, start_s, warn, stop
        self.processes: list[ServerProcess] = []
        self._loads: dict[str, Path] = {}  #: url -> the weights that it was last started with
        self._restarts = 0

    def create(self, count: int, host: str, logs: Path, key: str | None) -> list[str]:
        """Reserve a port for each of ``count`` servers, without starting them; their urls."""
        self.processes = [
            ServerProcess(host, logs / f"server_{number}.log", key) for number in range(count)
        ]
        return [process.url for process in self.processes]

    @property
    def all_run(self) -> bool:
        """Whether none has ended."""
        return all(process.is_running for process in self.processes)

    def starting(self) -> dict[str, Path]:
        """Servers that were started and do not answer, and the weights they were started with."""
        started = [process for process in self.processes if process.url in self._loads]
        return {p.url: self._loads[p.url] for p in started if not p.is_ready}

    def start_ended(self, directory: Path) -> set[str]:
        """Start every server that does not run, with the weights in ``directory``.

        They are waited for only if no other server answers.

        Returns:
            The urls of the servers that were waited for, which have these weights.

        Raises:
            RunFailed: a server did not start. Stopped: ``stop`` said so.
        """
        ended = [process for process in self.processes if not process.is_running]
        for process in ended:
            if process.pid is not None:
                self._restarts += 1
                self._warn(f"rollout server {process.url} has ended; starting it again")
            process.stop()
            argv, environment = self._command(directory.absolute(), process.host, process.port)
            process.start(argv, environment)
            self._loads[process.url] = directory
        if any(process.is_ready for process in self.processes if process not in ended):
            return set()
        for process in ended:
            process.wait_until_ready(self._start_s, self._stop)
        return {process.url for process in ended}

    def end(self, urls: Collection[str]) -> None:
        """End those of the servers that have these urls. `start_ended` starts them again."""
        for process in self.processes:
            if process.url in urls:
                process.stop()

    def take_restarts(self) -> int:
        """Servers that had ended and were started again, since the last call of this method."""
        restarts, self._restarts = self._restarts, 0
        return restarts

    def close(self) -> None:
        """End all servers."""
        with ThreadPoolExecutor(max(1, len(self.processes))) as threads:
            list(threads.map(ServerProcess.stop, self.processes))
        self.processes = []

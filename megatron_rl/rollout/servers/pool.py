"""Questions spread over several servers, some of which fail.

A question goes to the server with the fewest open ones. One that is not answered in time, or
wrongly, is asked again elsewhere; the server rests, longer each time, and is then tried again. A
question is answered once or not at all: an answer that comes too late is not looked at.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Callable, Generic, Sequence, TypeVar

import httpx

from megatron_rl.errors import RunFailed
from megatron_rl.rollout.servers.api import BadAnswer, Call

Result = TypeVar("Result")

#: Seconds a server rests after its first failure in a row; doubled with each further one.
FIRST_REST_S, LONGEST_REST_S = 0.5, 30.0
#: Seconds for a connection, and for a sign of life.
CONNECT_S = 5.0


@dataclass(frozen=True)
class Question(Generic[Result]):
    """A request and what makes its response a result, or raises `BadAnswer`."""

    call: Call
    read: Callable[[Any], Result]


@dataclass
class _Server:
    url: str
    open: int = 0  #: questions it has not answered yet
    failures: int = 0  #: in a row
    rests_until: float = 0.0
    excluded: str | None = None  #: why it is not to be asked until the next `admit`


class ServerPool:
    """The servers of a run, as one rank asks them. Threads of one process may share it."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        in_flight: int,
        deadline_s: float,
        retries: int,
        say: Callable[[str], None],
        revive: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            urls: of the servers.
            in_flight: most open questions at a server.
            deadline_s: for an answer; and how long to wait for a server when none is left.
            retries: how often a question is asked again, at least.
            say: tells a person what has gone wrong.
            revive: called when no server can be asked; may bring some back.
        """
        self._servers = [_Server(url.rstrip("/")) for url in urls]
        self._in_flight, self._deadline, self._retries = in_flight, deadline_s, retries
        self._say, self._revive = say, revive
        self._changed = threading.Condition()
        self._reviving = threading.Lock()
        self._waiting = False
        self._client = self._new_client()
        self._failures = 0

    @property
    def urls(self) -> list[str]:
        """Of all servers."""
        return [server.url for server in self._servers]

    @property
    def admitted(self) -> list[str]:
        """Of those that are asked."""
        return [server.url for server in self._servers if server.excluded is None]

    def ask(
        self, questions: Sequence[Question[Result]], done: Callable[[int], None] = lambda n: None
    ) -> list[Result]:
        """The results, in order. ``done`` is told how many there are.

        Raises:
            RunFailed: a question was asked ``retries`` times again and had no good answer, or no
                server came back within the deadline.
        """
        if not questions:
            return []
        workers = min(len(questions), self._in_flight * len(self._servers))
        with ThreadPoolExecutor(workers) as threads:
            futures = {threads.submit(self._answer, q): i for i, q in enumerate(questions)}
            try:
                results: dict[int, Result] = {}
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    done(len(results))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                self._client.close()  # ends the other requests
                self._client = self._new_client()
                raise
        return [results[i] for i in range(len(questions))]

    def ask_one(self, url: str, question: Question[Result]) -> Result:
        """Ask this server, once. Raises: httpx.HTTPError, BadAnswer."""
        return question.read(self._post(url, question.call))

    def exclude(self, url: str, why: str) -> None:
        """Do not ask this server any more."""
        self._of(url).excluded = why

    def admit(self, url: str) -> None:
        """Ask this server again."""
        server = self._of(url)
        server.excluded, server.failures, server.rests_until = None, 0, 0.0

    def take_failures(self) -> int:
        """Questions since the last call that were not answered, or wrongly, and asked again."""
        with self._changed:
            failures, self._failures = self._failures, 0
            return failures

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _new_client(self) -> httpx.Client:
        return httpx.Client(
            timeout=httpx.Timeout(self._deadline, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    def _of(self, url: str) -> _Server:
        return next(server for server in self._servers if server.url == url)

    def _answer(self, question: Question[Result]) -> Result:
        reasons = []
        for _ in range(self._retries + 1):
            server = self._take()
            try:
                result = question.read(self._post(server.url, question.call))
            except (httpx.HTTPError, BadAnswer) as error:
                reasons.append(f"{server.url}: {_reason(error)}")
                self._give_back(server, reasons[-1])
            else:
                self._give_back(server, None)
                return result
        raise RunFailed(
            f"no rollout server gave a good answer in {len(reasons)} tries; last {reasons[-1]}"
        )

    def _post(self, url: str, call: Call) -> Any:
        response = self._client.post(url + call.path, json=call.body)
        if response.is_error:
            text = " ".join(response.text.split())[:200]
            raise BadAnswer(f"{call.path} answered {response.status_code}: {text}")
        try:
            return response.json() if response.content else None
        except ValueError as error:
            raise BadAnswer(f"{call.path} answered no JSON: {response.text[:80]!r}") from error

    def _take(self) -> _Server:
        """The server to ask next; waits for one."""
        end = None  #: of the wait, while there is nothing to wait for but a server's return
        while True:
            with self._changed:
                now = time.monotonic()
                able = [s for s in self._servers if s.excluded is None and s.rests_until <= now]
                free = [server for server in able if server.open < self._in_flight]
                if free:
                    server = min(free, key=lambda server: server.open)
                    server.open += 1
                    return server
                newly = not able and not self._waiting
                self._waiting = not able
                end = None if able else end or now + self._deadline
                if end is not None and now >= end:
                    raise RunFailed(
                        f"no rollout server could be asked for {self._deadline:g} s; expected "
                        f"one of {', '.join(self.urls)}; start them again and run the same "
                        "command to continue"
                    )
                self._changed.wait(0.2)
            if newly:
                self._say(f"no rollout server can be asked; waiting up to {self._deadline:g} s")
            if not able and self._reviving.acquire(blocking=False):
                try:
                    self._revive()
                finally:
                    self._reviving.release()

    def _give_back(self, server: _Server, failure: str | None) -> None:
        with self._changed:
            server.open -= 1
            if failure is None:
                server.failures = 0
            else:
                self._failures += 1
                server.failures += 1
                rest = min(FIRST_REST_S * 2 ** (server.failures - 1), LONGEST_REST_S)
                server.rests_until = time.monotonic() + rest
            self._changed.notify_all()
        if failure is not None:
            self._say(f"rollout server {failure}; asking another")


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())

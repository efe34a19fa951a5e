"""Requests spread over several servers, some of which fail.

A request goes to the server with the fewest open ones. A server that fails is left alone for a
while, twice as long after each further failure (backoff), and its request goes to another. Each
request gets one answer or none: an answer that comes after the deadline is dropped.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Coroutine, Generic, Sequence, TypeVar

import httpx

from megatron_rl.errors import RunFailed, one_line
from megatron_rl.rollout.servers.api import CONTROL_BYTES, BadAnswer, Call
from megatron_rl.rollout.servers.exchange import exchange, open_transport, parse_json

Result = TypeVar("Result")

#: Backoff after a server's first failure in a row, seconds, and the longest; it doubles in between.
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.5, 30.0
#: Seconds between two looks for a free server.
LOOK_EVERY_S = 0.05
_CLOSED = "the rollout servers are not asked any more"


@dataclass(frozen=True)
class Request(Generic[Result]):
    """A call, and how to read its response."""

    call: Call
    read: Callable[[Any], Result]  #: the response's JSON to a result; raises `BadAnswer`
    most_bytes: int = CONTROL_BYTES  #: largest response


@dataclass
class _Server:
    url: str
    open: int = 0  #: requests it has not answered yet
    failures: int = 0  #: in a row
    backoff_until: float = 0.0  #: by the monotonic clock
    excluded: str | None = None  #: why it gets no requests until the next `admit`


@dataclass(eq=False)
class _Waiting:
    """Requests of one call of `ask` that no server has got yet."""

    batch: int
    count: int


class ServerPool:
    """The servers of a run, as one rank asks them. Several threads may use it at a time."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        in_flight: int,
        deadline_s: float,
        retries: int,
        warn: Callable[[str], None],
        revive: Callable[[], None] = lambda: None,
        key: str | None = None,
    ) -> None:
        """
        Args:
            urls: addresses of the servers.
            in_flight: most open requests at a server.
            deadline_s: for one exchange, from connecting to the last byte. Also how long to wait
                for a server when none can be asked.
            retries: how often a request is tried again.
            warn: shows the user a line.
            revive: called in a thread when no server can be asked; may bring some back.
            key: the servers' key; None: they have none.
        """
        self._servers = [_Server(url.rstrip("/")) for url in urls]
        self._in_flight, self._deadline, self._retries = in_flight, deadline_s, retries
        self._warn, self._revive, self._key = warn, revive, key
        self._reviving = self._has_warned = self._closed = self._held = False
        self._failures = 0
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []  #: one entry for each call of `ask`
        #: calls of `ask` and `ask_one` under way, each in the event loop of its thread
        self._tasks: set[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = set()

    @property
    def urls(self) -> list[str]:
        """Addresses of all servers."""
        return [server.url for server in self._servers]

    @property
    def admitted(self) -> list[str]:
        """Addresses of the servers that are not excluded."""
        return [server.url for server in self._servers if server.excluded is None]

    def ask(
        self,
        requests: Sequence[Request[Result]],
        done: Callable[[int], None] = lambda n: None,
        batch: int = 0,
    ) -> list[Result]:
        """The results of the requests, in order.

        Args:
            requests: spread over the admitted servers.
            done: gets the number of results so far, after each.
            batch: the requests wait while other threads have unsent requests of a lower number.

        Raises:
            RunFailed: a request failed, ``retries`` retries included; no server could be asked
                within the deadline; or the pool was closed. The open requests are dropped then.
        """
        return self._run(self._ask(requests, done, batch)) if requests else []

    def ask_one(self, url: str, request: Request[Result]) -> Result:
        """The result of one try at one server, excluded or not.

        Raises:
            BadAnswer: the server failed. RunFailed: the pool was closed.
        """

        async def ask() -> Result:
            async with open_transport() as transport:
                return request.read(await self._payload(transport, url, request))

        return self._run(ask())

    def send(self, url: str, call: Call) -> None:
        """Make a call to one server, and ignore what the response holds. Raises as `ask_one`."""
        self.ask_one(url, Request(call, lambda payload: None))

    def exclude(self, url: str, why: str) -> None:
        """Send this server no more requests."""
        self._of(url).excluded = why

    def admit(self, url: str) -> None:
        """Send this server requests again, without backoff."""
        server = self._of(url)
        server.excluded, server.failures, server.backoff_until = None, 0, 0.0

    def hold(self) -> None:
        """Keep all responses to `ask` until `release`. A response of a server that is excluded by
        then is dropped, and its request tried again.
        """
        self._held = True

    def release(self) -> None:
        """End `hold`."""
        self._held = False

    def close(self) -> None:
        """Break off all requests. Threads in `ask` or `ask_one` get `RunFailed` at once."""
        with self._lock:
            self._closed = True
            for loop, task in self._tasks:
                loop.call_soon_threadsafe(task.cancel)

    def take_failures(self) -> int:
        """Failed tries since the last call of this method."""
        failures, self._failures = self._failures, 0
        return failures

    def _of(self, url: str) -> _Server:
        return next(server for server in self._servers if server.url == url)

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run in an event loop of this thread, until `close` cancels it."""

        async def watched() -> Result:
            task = asyncio.current_task()
            assert task is not None, "asyncio.run makes one"
            entry = (asyncio.get_running_loop(), task)
            with self._lock:
                self._tasks.add(entry)
                if self._closed:
                    task.cancel()  # takes effect at its first await
            try:
                return await work
            finally:
                with self._lock:
                    self._tasks.remove(entry)

        try:
            return asyncio.run(watched())
        except asyncio.CancelledError:
            if self._closed:
                raise RunFailed(_CLOSED) from None
            raise

    async def _ask(
        self, requests: Sequence[Request[Result]], done: Callable[[int], None], batch: int
    ) -> list[Result]:
        results: dict[int, Result] = {}
        left = deque(enumerate(requests))
        waiting = _Waiting(batch, len(left))

        async def work(transport: httpx.AsyncHTTPTransport) -> None:
            while left:
                number, request = left.popleft()
                results[number] = await self._answer(transport, request, waiting)
                done(len(results))

        with self._lock:
            self._waiting.append(waiting)

        async with open_transport() as transport:
            count = min(len(requests), self._in_flight * len(self._servers))
            workers = [asyncio.create_task(work(transport)) for _ in range(count)]
            try:
                await asyncio.gather(*workers)
            finally:
                with self._lock:
                    self._waiting.remove(waiting)
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return [results[number] for number in range(len(requests))]

    async def _answer(
        self, transport: httpx.AsyncHTTPTransport, request: Request[Result], waiting: _Waiting
    ) -> Result:
        """The result of one request, tried at one server after the other."""
        reasons: list[str] = []
        while len(reasons) <= self._retries:
            server = await self._next_server(waiting, first=not reasons)
            try:
                payload = await self._payload(transport, server.url, request)
                while self._held and not self._closed:
                    await asyncio.sleep(LOOK_EVERY_S)
                if server.excluded is not None:
                    raise BadAnswer(server.excluded)
                result = request.read(payload)
            except BadAnswer as error:
                text = one_line(error)
                reasons.append(f"{server.url}: {text}")
                self._back_off(server)
                self._warn(f"rollout server {reasons[-1]}; asking again")
            else:
                server.failures = 0
                return result
            finally:
                with self._lock:
                    server.open -= 1
        raise RunFailed(
            f"no rollout server gave a good answer in {len(reasons)} tries; last {reasons[-1]}"
        )

    async def _payload(
        self, transport: httpx.AsyncHTTPTransport, url: str, request: Request[Any]
    ) -> Any:
        body = await exchange(
            transport,
            url,
            request.call,
            key=self._key,
            seconds=self._deadline,
            most_bytes=request.most_bytes,
        )
        return parse_json(body, request.most_bytes)

    async def _next_server(self, waiting: _Waiting, first: bool) -> _Server:
        """Wait until a server is free and no earlier batch waits; count the request as its own.

        Args:
            waiting: the batch of the request.
            first: whether this is the first try of the request.
        """
        end = None
        while True:
            if self._closed:
                raise RunFailed(_CLOSED)
            now = time.monotonic()
            with self._lock:
                able = [s for s in self._servers if s.excluded is None and s.backoff_until <= now]
                free = [server for server in able if server.open < self._in_flight]
                before = any(o.batch < waiting.batch and o.count > 0 for o in self._waiting)
                if free and not before:
                    self._has_warned = False
                    waiting.count -= first
                    server = min(free, key=lambda server: server.open)
                    server.open += 1
                    return server
            if able:
                end = None
            else:
                end = end or now + self._deadline
                await self._wait_for_any(now >= end)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _wait_for_any(self, too_long: bool) -> None:
        """No server can be asked: warn once, and try to revive some."""
        if too_long:
            raise RunFailed(
                f"no rollout server could be asked for {self._deadline:g} s; expected one of "
                f"{', '.join(self.urls)}; start them again and run the same command to continue"
            )
        if not self._has_warned:
            self._has_warned = True
            self._warn(f"no rollout server can be asked; waiting up to {self._deadline:g} s")
        if not self._reviving:
            self._reviving = True
            try:
                await asyncio.to_thread(self._revive)
            finally:
                self._reviving = False

    def _back_off(self, server: _Server) -> None:
        self._failures += 1
        server.failures += 1
        seconds = min(FIRST_BACKOFF_S * 2 ** (server.failures - 1), LONGEST_BACKOFF_S)
        server.backoff_until = time.monotonic() + seconds

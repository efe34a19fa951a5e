"""Questions spread over several servers, some of which fail.

A question goes to the server with the fewest open ones. One that is not answered in time, or
wrongly, is asked again elsewhere; the server rests, longer each time, and is then tried again. A
question is answered once or not at all: an answer that comes too late is not looked at.
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

#: Seconds a server rests after its first failure in a row; doubled with each further one.
FIRST_REST_S, LONGEST_REST_S = 0.5, 30.0
#: Seconds between looks for a server that can be asked, where none can.
LOOK_EVERY_S = 0.05
_CLOSED = "the rollout servers are not asked any more"


@dataclass(frozen=True)
class Question(Generic[Result]):
    """A request and what makes its response a result, or raises `BadAnswer`."""

    call: Call
    read: Callable[[Any], Result]
    most_bytes: int = CONTROL_BYTES  #: largest response


@dataclass
class _Server:
    url: str
    open: int = 0  #: questions it has not answered yet
    failures: int = 0  #: in a row
    rests_until: float = 0.0
    excluded: str | None = None  #: why it is not to be asked until the next `admit`


@dataclass(eq=False)
class _Unasked:
    """Questions of one call of `ask` that no server has been asked yet."""

    turn: int
    count: int


class ServerPool:
    """The servers of a run, as one rank asks them."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        in_flight: int,
        deadline_s: float,
        retries: int,
        say: Callable[[str], None],
        revive: Callable[[], None] = lambda: None,
        key: str | None = None,
    ) -> None:
        """
        Args:
            urls: of the servers.
            in_flight: most open questions at a server.
            deadline_s: for a whole exchange with a server, from connecting to the last byte; and
                how long to wait for a server when none is left.
            retries: how often a question is asked again.
            say: tells a person what has gone wrong.
            revive: called, in a thread, when no server can be asked; may bring some back.
            key: of the servers; None: they have none.
        """
        self._servers = [_Server(url.rstrip("/")) for url in urls]
        self._in_flight, self._deadline, self._retries = in_flight, deadline_s, retries
        self._say, self._revive, self._key = say, revive, key
        self._reviving = self._waiting = self._closed = self._held = False
        self._failures = 0
        self._lock = threading.Lock()  # several threads may ask at a time
        self._unasked: list[_Unasked] = []  #: of each call of `ask`
        #: what is being asked, each in the loop of its thread
        self._asking: set[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = set()

    @property
    def urls(self) -> list[str]:
        """Of all servers."""
        return [server.url for server in self._servers]

    @property
    def admitted(self) -> list[str]:
        """Of those that are asked."""
        return [server.url for server in self._servers if server.excluded is None]

    def ask(
        self,
        questions: Sequence[Question[Result]],
        done: Callable[[int], None] = lambda n: None,
        turn: int = 0,
    ) -> list[Result]:
        """The results, in order. ``done`` is told how many there are. While questions of a lower
        ``turn`` have not been asked yet, in other threads, these wait.

        Raises:
            RunFailed: a question had no good answer, asked ``retries`` times again, or no server
                came back within the deadline; or the pool was closed. Open questions are dropped
                then.
        """
        return self._run(self._ask(questions, done, turn)) if questions else []

    def ask_one(self, url: str, question: Question[Result]) -> Result:
        """Ask this server, once. Raises: BadAnswer; RunFailed: the pool was closed."""

        async def ask() -> Result:
            async with open_transport() as transport:
                return question.read(await self._payload(transport, url, question))

        return self._run(ask())

    def exclude(self, url: str, why: str) -> None:
        """Do not ask this server any more."""
        self._of(url).excluded = why

    def admit(self, url: str) -> None:
        """Ask this server again."""
        server = self._of(url)
        server.excluded, server.failures, server.rests_until = None, 0, 0.0

    def hold(self) -> None:
        """Answers that come from now on wait for `release`; those of servers that are excluded by
        then are asked for again. Calls of `ask_one` are not held.
        """
        self._held = True

    def release(self) -> None:
        """See `hold`."""
        self._held = False

    def close(self) -> None:
        """Ask nothing more: who is asking, in another thread, gets `RunFailed` at once, whatever
        the servers do.
        """
        with self._lock:
            self._closed = True
            for loop, task in self._asking:
                loop.call_soon_threadsafe(task.cancel)

    def take_failures(self) -> int:
        """Questions since the last call that were not answered, or wrongly, and asked again."""
        failures, self._failures = self._failures, 0
        return failures

    def _of(self, url: str) -> _Server:
        return next(server for server in self._servers if server.url == url)

    def _run(self, asking: Coroutine[Any, Any, Result]) -> Result:
        """In an event loop of this thread's own, until `close` breaks it off."""

        async def watched() -> Result:
            task = asyncio.current_task()
            assert task is not None, "it runs as one"
            entry = (asyncio.get_running_loop(), task)
            with self._lock:
                self._asking.add(entry)
                if self._closed:
                    task.cancel()  # at its first wait
            try:
                return await asking
            finally:
                with self._lock:
                    self._asking.remove(entry)

        try:
            return asyncio.run(watched())
        except asyncio.CancelledError:
            if self._closed:
                raise RunFailed(_CLOSED) from None
            raise

    async def _ask(
        self, questions: Sequence[Question[Result]], done: Callable[[int], None], turn: int
    ) -> list[Result]:
        results: dict[int, Result] = {}
        left = deque(enumerate(questions))
        unasked = _Unasked(turn, len(left))

        async def work(transport: httpx.AsyncHTTPTransport) -> None:
            while left:
                number, question = left.popleft()
                results[number] = await self._answer(transport, question, unasked)
                done(len(results))

        with self._lock:
            self._unasked.append(unasked)

        async with open_transport() as transport:
            count = min(len(questions), self._in_flight * len(self._servers))
            workers = [asyncio.create_task(work(transport)) for _ in range(count)]
            try:
                await asyncio.gather(*workers)
            finally:
                with self._lock:
                    self._unasked.remove(unasked)
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return [results[number] for number in range(len(questions))]

    async def _answer(
        self, transport: httpx.AsyncHTTPTransport, question: Question[Result], unasked: _Unasked
    ) -> Result:
        reasons: list[str] = []
        while len(reasons) <= self._retries:
            server = await self._take(unasked, first=not reasons)
            try:
                payload = await self._payload(transport, server.url, question)
                while self._held and not self._closed:
                    await asyncio.sleep(LOOK_EVERY_S)
                if server.excluded is not None:
                    raise BadAnswer(server.excluded)
                result = question.read(payload)
            except BadAnswer as error:
                text = one_line(error)
                reasons.append(f"{server.url}: {text}")
                self._rest(server)
                self._say(f"rollout server {reasons[-1]}; asking again")
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
        self, transport: httpx.AsyncHTTPTransport, url: str, question: Question[Any]
    ) -> Any:
        body = await exchange(
            transport,
            url,
            question.call,
            key=self._key,
            seconds=self._deadline,
            most_bytes=question.most_bytes,
        )
        return parse_json(body, question.most_bytes)

    async def _take(self, unasked: _Unasked, first: bool) -> _Server:
        """The server to ask next; waits for one, and for its turn."""
        end = None
        while True:
            if self._closed:
                raise RunFailed(_CLOSED)
            now = time.monotonic()
            with self._lock:
                able = [s for s in self._servers if s.excluded is None and s.rests_until <= now]
                free = [server for server in able if server.open < self._in_flight]
                before = any(o.turn < unasked.turn and o.count > 0 for o in self._unasked)
                if free and not before:
                    self._waiting = False
                    unasked.count -= first
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
        """No server can be asked: say so, once, and let the owner bring some back."""
        if too_long:
            raise RunFailed(
                f"no rollout server could be asked for {self._deadline:g} s; expected one of "
                f"{', '.join(self.urls)}; start them again and run the same command to continue"
            )
        if not self._waiting:
            self._waiting = True
            self._say(f"no rollout server can be asked; waiting up to {self._deadline:g} s")
        if not self._reviving:
            self._reviving = True
            try:
                await asyncio.to_thread(self._revive)
            finally:
                self._reviving = False

    def _rest(self, server: _Server) -> None:
        self._failures += 1
        server.failures += 1
        rest = min(FIRST_REST_S * 2 ** (server.failures - 1), LONGEST_REST_S)
        server.rests_until = time.monotonic() + rest

"""New weights for the servers, and the servers of our own: sent by disk or by broadcast, then
probed.
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch

from megatron_rl.config.schema import Config
from megatron_rl.errors import RunFailed, one_line
from megatron_rl.parallel.collective_try import by_first, collective_try
from megatron_rl.parallel.groups import Groups
from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers.api import Answer, BadAnswer, Call, ServerApi
from megatron_rl.rollout.servers.broadcast import Failures, WeightBroadcast
from megatron_rl.rollout.servers.keys import given_key, new_key, own_address
from megatron_rl.rollout.servers.pool import Question, ServerPool
from megatron_rl.rollout.servers.probe import ANSWER_TOKENS, probe_prompts, trainer_logprobs
from megatron_rl.rollout.servers.process import ServerProcess
from megatron_rl.rollout.servers.vllm import VllmApi
from megatron_rl.weights.export import describe, export_model, gather_weights

#: Weights on disk that are kept: those the servers have, and those they are getting.
KEPT_VERSIONS = 2
#: Builds the command of a server: of weights, host and port, the words and the environment.
Command = Callable[[Path, str, int], tuple[list[str], dict[str, str]]]
#: A question whose answers have to be by a version of the weights.
MakeQuestion = Callable[[Prompt, SamplingSettings, int], Question[list[Answer]]]


class WeightSync:
    """The pool of servers, of which those are asked that compute what the trainer computes.

    After `send` the servers that have the weights are admitted, the others excluded.
    """

    def __init__(
        self,
        config: Config,
        api: ServerApi,
        chunks: Sequence[torch.nn.Module],
        groups: Groups,
        *,
        question: MakeQuestion,
        say: Callable[[str], None],
        meeting: str | None,
        command: Command | None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """The arguments are those of `ServerEngine`. question: makes those of the probe."""
        self._config, self._api, self._chunks, self._groups = config, api, chunks, groups
        self._servers = config.rollout.servers
        self._question, self._say, self._closing = question, say, False
        self._stop = lambda: self._closing or stop()
        self._root = self._servers.weights_dir or config.run_dir / "servers" / "weights"
        self._command, self._meeting = command, meeting
        self._address = "127.0.0.1"  #: where our servers listen, once they are started
        self._key: str | None = None  #: of the servers, once weights are sent
        self._interrupts = config.rollout.lag > 1  # answers that are being sampled
        self._sender: WeightBroadcast | None = None
        self._lost: dict[str, str] = {}  #: servers without the weights of a broadcast, and why
        self.own: list[ServerProcess] = []  #: servers that were started here
        self._reading: dict[str, Path] = {}  #: what each of them was started with
        self.pool: ServerPool | None = None  #: None until weights are sent
        self._version, self.sent = 0, -1
        self._seconds, self._restarts, self._difference = 0.0, 0, 0.0

    def metrics(self) -> dict[str, float]:
        """Since the last call, of this rank; 0 where it has not asked or started anything."""
        if self.pool is None:
            return {}
        taken = {
            "time/sync_s": self._seconds,
            "servers/used": float(len(self.pool.admitted)),
            "servers/probe_difference": self._difference,
            "servers/failures": float(self.pool.take_failures()),
            "servers/restarts": float(self._restarts),
        }
        self._seconds, self._restarts = 0.0, 0
        return taken

    def stop_asking(self) -> None:
        """Who is asking, in another thread, gets `RunFailed`."""
        self._closing = True
        if self.pool is not None:
            self.pool.close()

    def close(self) -> None:
        """Stop the servers that were started here."""
        with ThreadPoolExecutor(max(1, len(self.own))) as threads:
            list(threads.map(ServerProcess.stop, self.own))
        self.own = []

    def send(self, version: int) -> None:
        """Give the servers the trainer's weights, and see whether they have them. A collective.

        Raises:
            RunFailed: none has. UserError: the servers' key or rank 0's address is none.
        """
        began = time.perf_counter()
        self._version = version
        is_first = self._groups.world.rank() == 0
        if self.pool is None:  # rank 0's environment counts, and its random bits
            world = self._groups.world
            self._key = by_first(world, self._new_key)
        if self._servers.sync == "disk":
            every, loaded = self._by_disk()
        else:
            every, loaded = self._by_broadcast()
        if self.pool is None:  # of the ranks that start nothing
            self.pool = self._new_pool(every)
        self._probe(loaded)
        self.pool.release()
        self.sent = self._version
        self._seconds += time.perf_counter() - began
        if is_first:
            self._forget(self._versions()[:-KEPT_VERSIONS])

    def _by_disk(self) -> tuple[list[str], list[str]]:
        """All servers, and those that say that they have read the weights. A collective."""
        world, is_first = self._groups.world, self._groups.world.rank() == 0
        directory = self._root / f"version_{self._version}"
        if is_first and self.pool is None:
            self._forget(self._versions())  # of this run before it was interrupted
        model = self._config.model
        export_model(self._chunks, self._groups, model, directory, like=model.hf_path, replace=True)
        self._hold()
        return by_first(world, lambda: self._load(directory))

    def _by_broadcast(self) -> tuple[list[str], list[str]]:
        """All servers, and those that say that they have received the weights. A collective."""
        world, is_first = self._groups.world, self._groups.world.rank() == 0
        model = self._config.model
        family, _ = describe(model, model.hf_path)
        self._hold()
        collective_try(world, lambda: self._join() if is_first else None)
        weights = gather_weights(self._chunks, self._groups, model, family)
        if self._sender is not None:  # on rank 0
            joined = [url for url in self.asked.urls if url not in self._lost]
            self._lost |= self._sender.send(weights, joined)
        else:
            for _ in weights:  # its part is sent to rank 0
                pass
        return by_first(world, self._tell)

    def _hold(self) -> None:
        if self.pool is not None:
            self.pool.hold()  # until it is known which servers have the weights

    def _join(self) -> None:
        """On rank 0: a group with each server; those with whom there is none are lost for now."""
        if self.pool is None or self._sender is None:
            self.pool = self._new_pool(self._servers.urls)
            device = next(self._chunks[0].parameters()).device
            self._sender = WeightBroadcast(self._vllm(), device, self._servers.start_s)
        self._lost = {}
        for url in self.pool.urls:
            try:
                for call in self._api.interrupting() if self._interrupts else ():
                    self.pool.ask_one(url, Question(call, lambda payload: None))
                self._sender.join(url, partial(self._ask_server, url))
            except Failures as error:
                self._lost[url] = one_line(error)

    def _tell(self) -> tuple[list[str], list[str]]:
        """On rank 0: tell the servers which weights they have; all, and those that know."""
        calls = [*self._vllm().naming(str(self._version))]
        calls += self._api.resuming() if self._interrupts else ()
        for url in self.asked.urls:
            try:
                for call in () if url in self._lost else calls:
                    self.asked.ask_one(url, Question(call, lambda payload: None))
            except BadAnswer as error:
                self._lost[url] = one_line(error)
        assert self._sender is not None, "_join has made it"
        for url, why in self._lost.items():
            self._sender.forget(url)
            self._say(f"rollout server {url} did not take the weights: {why}")
        urls = self.asked.urls
        return urls, [url for url in urls if url not in self._lost]

    def _vllm(self) -> VllmApi:
        assert isinstance(self._api, VllmApi), "weights are broadcast to vLLM alone"
        return self._api

    @property
    def asked(self) -> ServerPool:
        """The pool, once weights are sent."""
        assert self.pool is not None, "made before anything is asked"
        return self.pool

    def _ask_server(self, url: str, call: Call, read: Callable[[Any], Any]) -> Any:
        return self.asked.ask_one(url, Question(call, read))

    def _load(self, directory: Path) -> tuple[list[str], list[str]]:
        """On rank 0: all servers, and those that say that they have the weights."""
        if self.pool is None:
            self.own = self._new_processes()
            own = [process.url for process in self.own]
            self.pool = self._new_pool(own or self._servers.urls)
        new = self._start_dead(directory)
        starting = {process.url for process in self.own if not process.is_ready}
        asked = [url for url in self.pool.urls if url not in starting]
        with ThreadPoolExecutor(max(1, len(asked))) as threads:
            failures = list(
                threads.map(lambda url: self._load_one(url, directory, url in new), asked)
            )
        for url, failure in zip(asked, failures):
            if failure is not None:
                self._say(f"rollout server {url} did not take the weights: {failure}")
        return self.pool.urls, [url for url, failure in zip(asked, failures) if failure is None]

    def _load_one(self, url: str, directory: Path, is_new: bool) -> str | None:
        version = directory.name.removeprefix("version_")
        calls = self._api.loading(str(directory.absolute()), version)
        if is_new:
            calls = calls[-1:]  # it has read them already; it only has to be told their version
        elif self._interrupts:
            calls = [*self._api.interrupting(), *calls, *self._api.resuming()]
        try:
            for call in calls:
                self.asked.ask_one(url, Question(call, lambda payload: None))
        except BadAnswer as error:
            return one_line(error)
        return None

    def _probe(self, urls: Sequence[str]) -> None:
        """Leave only servers that compute what the trainer computes. A collective."""
        world = self._groups.world
        rollout, model = self._config.rollout, self._config.model
        settings = SamplingSettings(1, ANSWER_TOKENS, temperature=rollout.temperature, seed=5)
        prompts = probe_prompts(model.vocab_size, model.max_sequence_length)

        def ask() -> dict[str, list[Answer] | str]:
            with ThreadPoolExecutor(max(1, len(urls))) as threads:
                answers = threads.map(
                    lambda url: self._answers_to_probe(url, prompts, settings), urls
                )
                return dict(zip(urls, answers))

        found = by_first(world, ask)
        self._difference, wrong = 0.0, {}
        for url, answers in found.items():
            if isinstance(answers, str):
                wrong[url] = answers
                continue
            differences = [
                self._difference_of(prompt, answer, settings.temperature)
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            difference = float(np.max(differences))  # NaN where one is
            if difference <= self._servers.probe_tolerance:
                self._difference = max(self._difference, difference)
            else:
                wrong[url] = (
                    f"its log-probabilities differ from the trainer's by {difference:.3g}; "
                    f"expected at most {self._servers.probe_tolerance:g}"
                )
        good = [url for url in urls if url not in wrong]
        for url in self.asked.urls:
            if url in good:
                self.asked.admit(url)
            else:
                self.asked.exclude(url, wrong.get(url, "it did not take the weights"))
        if world.rank() == 0:
            for url, why in wrong.items():
                self._say(f"rollout server {url} is left out: {why}")
            for process in self.own:
                if process.url in wrong:  # it starts again, from the weights, next time
                    process.stop()
        if not good:
            told = "; ".join(f"{url}: {why}" for url, why in wrong.items()) or "none took them"
            raise RunFailed(f"no rollout server has the weights of the trainer ({told})")

    def _answers_to_probe(
        self, url: str, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> list[Answer] | str:
        try:
            questions = [self._question(prompt, settings, self._version) for prompt in prompts]
            return [self.asked.ask_one(url, question)[0] for question in questions]
        except BadAnswer as error:
            return f"the probe failed: {one_line(error)}"

    def _difference_of(self, prompt: Prompt, answer: Answer, temperature: float) -> float:
        tokens = np.concatenate([prompt.tokens, answer.tokens])
        expected = trainer_logprobs(
            self._chunks, self._groups, tokens, len(answer.tokens), temperature
        )
        return float(np.abs(answer.logprobs - expected).max())

    def _versions(self) -> list[Path]:
        """The weights on disk, the oldest first."""
        return sorted(self._root.glob("version_*"), key=lambda p: int(p.name.split("_")[1]))

    def _forget(self, directories: Sequence[Path]) -> None:
        """Delete them, but for those that a server is about to read."""
        needed = {self._reading[p.url] for p in self.own if not p.is_ready}
        for directory in directories:
            if directory not in needed:
                shutil.rmtree(directory, ignore_errors=True)

    # -- servers of our own ----------------------------------------------------------------------

    def _new_pool(self, urls: Sequence[str]) -> ServerPool:
        servers = self._servers
        return ServerPool(
            urls,
            in_flight=servers.in_flight,
            deadline_s=servers.deadline_s,
            retries=servers.retries,
            say=self._say,
            revive=self._revive if self.own else lambda: None,
            key=self._key,
        )

    def _new_key(self) -> str | None:
        return new_key() if self._servers.start else given_key()

    def _new_processes(self) -> list[ServerProcess]:
        if self._meeting is not None:
            self._address = own_address(self._meeting)
        logs = self._config.run_dir / "servers"
        return [
            ServerProcess(self._address, logs / f"server_{number}.log", self._key)
            for number in range(self._servers.start)
        ]

    def _start_dead(self, directory: Path) -> set[str]:
        """Start our servers that do not run. While others answer they need not be waited for; the
        urls of those that were, and so have the weights.
        """
        dead = [process for process in self.own if not process.is_running]
        for process in dead:
            if process.pid is not None:
                self._restarts += 1
                self._say(f"rollout server {process.url} has ended; starting it again")
            process.stop()
            assert self._command is not None, "an engine that starts servers has one"
            words = self._command(directory.absolute(), self._address, process.port)
            process.start(*words)
            self._reading[process.url] = directory
        if any(process.is_ready for process in self.own if process not in dead):
            return set()
        for process in dead:
            process.wait_until_ready(self._servers.start_s, self._stop)
        return {process.url for process in dead}

    def _revive(self) -> None:
        """No server can be asked: bring ours back, with the weights of the moment."""
        directory = self._root / f"version_{self.sent}"
        if all(process.is_running for process in self.own):
            return
        for url in self._start_dead(directory):
            if self._load_one(url, directory, is_new=True) is None:
                self.asked.admit(url)

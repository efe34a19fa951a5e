"""The engine that asks inference servers: weights out, answers back over HTTP."""

from __future__ import annotations

import shutil
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Sequence

import httpx
import numpy as np
import torch

from megatron_rl.checkpoint.together import together
from megatron_rl.config.layout import moe_layers
from megatron_rl.config.schema import Config
from megatron_rl.errors import RunFailed, UserError
from megatron_rl.parallel.collectives import gather_objects
from megatron_rl.parallel.groups import Groups
from megatron_rl.records import Completion, Prompt, RolloutGroup, RoutedExperts
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers.api import (
    Answer,
    BadAnswer,
    ServerApi,
    answer_seed,
    check_answers,
)
from megatron_rl.rollout.servers.broadcast import WeightBroadcast
from megatron_rl.rollout.servers.pool import Question, ServerPool
from megatron_rl.rollout.servers.probe import ANSWER_TOKENS, probe_prompts, trainer_logprobs
from megatron_rl.rollout.servers.process import ServerProcess
from megatron_rl.weights.export import describe, export_model, gather_weights

#: Weights on disk that are kept: those the servers have, and those they are getting.
KEPT_VERSIONS = 2
#: Builds the command of a server: of weights, host and port, the words and the environment.
Command = Callable[[Path, str, int], tuple[list[str], dict[str, str]]]


class ServerEngine:
    """`Engine` on servers that run already, or on servers of its own on rank 0's machine.

    One rank of those with the same prompts asks for all of them. The weights are sent before the
    first answers after they have changed; answers count only from servers whose log-probabilities
    then agree with the trainer's.
    """

    def __init__(
        self,
        config: Config,
        api: ServerApi,
        chunks: Sequence[torch.nn.Module],
        groups: Groups,
        *,
        eos_id: int,
        decode: Callable[[Sequence[int]], str],
        say: Callable[[str], None],
        own_machine: bool,
        command: Command | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """
        Args:
            config: its rollout, model and run_dir are looked at.
            api: of the kind of server.
            chunks: this rank's bare GPTModels.
            groups: process groups.
            eos_id: the token that ends an answer.
            decode: token ids to text, without special tokens.
            say: tells a person what has gone wrong.
            own_machine: whether all ranks run on one machine.
            command: starts a server, where the configuration asks for servers of its own.
            progress: told how many of this rank's prompts are answered.
        """
        self._config, self._api, self._chunks, self._groups = config, api, chunks, groups
        self._servers = config.rollout.servers
        self._eos_id, self._decode, self._say, self._progress = eos_id, decode, say, progress
        self._root = self._servers.weights_dir or config.run_dir / "servers" / "weights"
        self._command, self._own_machine = command, own_machine
        self._sender: WeightBroadcast | None = None
        self._lost: dict[str, str] = {}  #: servers without the weights of a broadcast, and why
        self._own: list[ServerProcess] = []
        self._reading: dict[str, Path] = {}  #: what each of them was started with
        self._pool: ServerPool | None = None
        self._version, self._sent = 0, -1
        self._sync_s, self._restarts, self._difference = 0.0, 0, 0.0
        model = config.model
        self._layers = tuple(i + 1 for i, is_moe in enumerate(moe_layers(model)) if is_moe)
        self._lag = config.rollout.lag
        #: The steps ahead, and an evaluation.
        self._threads = ThreadPoolExecutor(self._lag + 1, "rollout servers")
        self._asking: list[Future] = []  #: answers that are being asked for in the background

    @property
    def version(self) -> int:
        """Of the trainer's weights: how often they have changed."""
        return self._version

    def weights_changed(self) -> None:
        """See `Engine`."""
        self._version += 1

    def generate(self, prompts: Sequence[Prompt], settings: SamplingSettings) -> list[RolloutGroup]:
        """See `Engine`. A collective.

        Raises:
            UserError: a prompt leaves no room for an answer, or holds a token the model does not
                know. RunFailed: no server answers, or none has the right weights.
        """
        return self.begin(prompts, settings)()

    def begin(
        self, prompts: Sequence[Prompt], settings: SamplingSettings
    ) -> Callable[[], list[RolloutGroup]]:
        """Ask in the background; the answers are by the weights of this moment. A collective.

        Weights that change meanwhile are sent when all answers are there; with a lag above 1 they
        are sent at once, and answers that are being sampled go on with them.

        Returns:
            Waits for the answers and gives them, as `generate` does. A collective.
        """
        groups = self._groups
        together(groups.world, lambda: self._check(prompts))
        if self._sent != self._version:
            self._send_weights()
        asking = None
        if groups.model.rank() == 0 and groups.context.rank() == 0:
            asking = self._threads.submit(self._ask, prompts, settings, self._version)
            self._asking = [one for one in self._asking if not one.done()] + [asking]

        def finish() -> list[RolloutGroup]:
            found: list[list[RolloutGroup]] = []
            together(groups.world, lambda: found.append(asking.result()) if asking else None)
            return self._mine(found)

        return finish

    def metrics(self) -> dict[str, float]:
        """Since the last call, of this rank; 0 where it has not asked or started anything."""
        if self._pool is None:
            return {}
        taken = {
            "time/sync_s": self._sync_s,
            "servers/used": float(len(self._pool.admitted)),
            "servers/probe_difference": self._difference,
            "servers/failures": float(self._pool.take_failures()),
            "servers/restarts": float(self._restarts),
        }
        self._sync_s, self._restarts = 0.0, 0
        return taken

    def close(self) -> None:
        """Stop the servers this engine has started, and asking."""
        if self._pool is not None:
            self._pool.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._own:
            process.stop()
        self._own = []

    # -- asking ----------------------------------------------------------------------------------

    def _check(self, prompts: Sequence[Prompt]) -> None:
        model = self._config.model
        for prompt in prompts:
            if not 0 < len(prompt.tokens) < model.max_sequence_length:
                raise UserError(
                    f"problem {prompt.index} (from 0) has {len(prompt.tokens)} tokens; expected 1 "
                    f"to {model.max_sequence_length - 1}; shorten it or raise "
                    "model.max_sequence_length"
                )
            if prompt.tokens.max() >= model.vocab_size:
                raise UserError(
                    f"problem {prompt.index} (from 0) holds the token {prompt.tokens.max()}; "
                    f"expected ids below model.vocab_size {model.vocab_size}; use the model's "
                    "tokenizer"
                )

    def _question(
        self,
        prompt: Prompt,
        settings: SamplingSettings,
        version: int,
        carried: bool = False,
        seed: int | None = None,
    ) -> Question[list[Answer]]:
        """carried: the answers may be broken off, and are by this version or a later one."""
        config = self._config

        def read(payload: Any) -> list[Answer]:
            answers = self._api.answers(payload)
            last = self._version if carried else version
            versions = [str(number) for number in range(version, last + 1)]
            size = config.model.vocab_size
            check_answers(answers, prompt, settings, self._eos_id, size, versions, carried)
            return answers

        if seed is None:
            seed = answer_seed(settings.seed, prompt.index)
        return Question(self._api.generation(prompt, settings, seed, self._eos_id), read)

    def _ask(
        self, prompts: Sequence[Prompt], settings: SamplingSettings, version: int
    ) -> list[RolloutGroup]:
        carried = self._lag > 1
        questions = [self._question(prompt, settings, version, carried) for prompt in prompts]
        answers = self._pool.ask(questions, lambda done: self._progress(done, len(questions)))
        self._go_on(prompts, answers, settings, version)
        return [
            RolloutGroup(prompt, tuple(self._completion(answer, version) for answer in of_prompt))
            for prompt, of_prompt in zip(prompts, answers, strict=True)
        ]

    def _go_on(
        self,
        prompts: Sequence[Prompt],
        answers: list[list[Answer]],
        settings: SamplingSettings,
        version: int,
    ) -> None:
        """Ask for the rest of answers that were broken off, until none is."""
        while True:
            broken = [
                (p, number)
                for p, of_prompt in enumerate(answers)
                for number, answer in enumerate(of_prompt)
                if answer.aborted
            ]
            if not broken:
                return
            questions = [
                self._rest_of(prompts[p], answers[p][number], number, settings, version)
                for p, number in broken
            ]
            for (p, number), (rest,) in zip(broken, self._pool.ask(questions), strict=True):
                answer = answers[p][number]
                answers[p][number] = answer.continued(rest, len(prompts[p].tokens))

    def _rest_of(
        self, prompt: Prompt, answer: Answer, number: int, settings: SamplingSettings, version: int
    ) -> Question[list[Answer]]:
        """Ask for what comes behind the tokens there are; with other random numbers than those."""
        made = len(answer.tokens)
        longer = replace(prompt, tokens=np.concatenate([prompt.tokens, answer.tokens]))
        left = replace(settings, samples=1, max_new_tokens=settings.max_new_tokens - made)
        seed = answer_seed((settings.seed + (made << 44)) % 2**64, prompt.index) + number
        return self._question(longer, left, version, True, seed)

    def _completion(self, answer: Answer, version: int) -> Completion:
        routes = None
        if answer.routed_experts is not None:
            routes = self._routes(answer.routed_experts)
        return Completion(
            tokens=answer.tokens,
            logprobs=answer.logprobs,
            finished=answer.stopped,
            text=self._decode(answer.tokens.tolist()),
            routed_experts=routes,
            version=int(answer.versions[0]) if answer.versions else version,
            last_version=int(answer.versions[-1]) if answer.versions else version,
        )

    def _routes(self, ids: np.ndarray) -> RoutedExperts:
        """A server reports every layer, the dense ones too, or the MoE layers alone."""
        if ids.shape[1] == self._config.model.num_layers:
            ids = ids[:, [layer - 1 for layer in self._layers]]
        return RoutedExperts(ids, self._layers)

    def _mine(self, found: list[list[RolloutGroup]]) -> list[RolloutGroup]:
        """The answers of the rank that has asked for the same prompts; ``found`` is empty here if
        that is another.
        """
        for group in (self._groups.context, self._groups.model):
            found = [answers for of_rank in gather_objects(found, group) for answers in of_rank]
        return found[0]

    # -- weights ---------------------------------------------------------------------------------

    def _send_weights(self) -> None:
        """Write the weights, let the servers read them, and see whether they have. A collective."""
        if self._lag <= 1:
            wait(self._asking)  # no answer is to begin with some weights and end with others
        began = time.perf_counter()
        is_first = self._groups.world.rank() == 0
        if self._servers.sync == "disk":
            every, loaded = self._by_disk()
        else:
            every, loaded = self._by_broadcast()
        if self._pool is None:  # of the ranks that start nothing
            self._pool = self._new_pool(every)
        self._probe(loaded)
        self._pool.release()
        self._sent = self._version
        self._sync_s += time.perf_counter() - began
        if is_first:
            self._forget(self._versions()[:-KEPT_VERSIONS])

    def _by_disk(self) -> tuple[list[str], list[str]]:
        """All servers, and those that say that they have read the weights. A collective."""
        world, is_first = self._groups.world, self._groups.world.rank() == 0
        directory = self._root / f"version_{self._version}"
        if is_first and self._pool is None:
            self._forget(self._versions())  # of this run before it was interrupted
        model = self._config.model
        export_model(self._chunks, self._groups, model, directory, like=model.hf_path, replace=True)
        self._hold()
        return together(world, lambda: self._load(directory) if is_first else None)[0]

    def _by_broadcast(self) -> tuple[list[str], list[str]]:
        """All servers, and those that say that they have received the weights. A collective."""
        world, is_first = self._groups.world, self._groups.world.rank() == 0
        model = self._config.model
        family = describe(model, model.hf_path)["model_type"]
        self._hold()
        together(world, lambda: self._join() if is_first else None)
        weights = gather_weights(self._chunks, self._groups, model, family)
        if is_first:
            joined = [url for url in self._pool.urls if url not in self._lost]
            self._lost |= self._sender.send(weights, joined, self._of_workers)
        else:
            for _ in weights:  # its part is sent to rank 0
                pass
        return together(world, lambda: self._tell() if is_first else None)[0]

    def _hold(self) -> None:
        if self._pool is not None:
            self._pool.hold()  # until it is known which servers have the weights

    def _join(self) -> None:
        """On rank 0: a group with each server; those with whom there is none are lost for now."""
        if self._pool is None:
            self._pool = self._new_pool(self._servers.urls)
            device = next(self._chunks[0].parameters()).device
            self._sender = WeightBroadcast(device, self._servers.start_s, self._own_machine)
        self._lost = {}
        for url in self._pool.urls:
            try:
                for call in self._api.interrupting() if self._lag > 1 else ():
                    self._pool.ask_one(url, Question(call, lambda payload: None))
                self._sender.join(url, partial(self._of_workers, url))
            except (httpx.HTTPError, BadAnswer, RuntimeError) as error:
                self._lost[url] = " ".join(f"{type(error).__name__} {error}".split())

    def _tell(self) -> tuple[list[str], list[str]]:
        """On rank 0: tell the servers which weights they have; all, and those that know."""
        calls = [*self._api.naming(str(self._version))]
        calls += self._api.resuming() if self._lag > 1 else ()
        for url in self._pool.urls:
            try:
                for call in () if url in self._lost else calls:
                    self._pool.ask_one(url, Question(call, lambda payload: None))
            except (httpx.HTTPError, BadAnswer) as error:
                self._lost[url] = " ".join(f"{type(error).__name__} {error}".split())
        for url, why in self._lost.items():
            self._sender.forget(url)
            self._say(f"rollout server {url} did not take the weights: {why}")
        return self._pool.urls, [url for url in self._pool.urls if url not in self._lost]

    def _of_workers(self, url: str, method: str, arguments: list) -> list:
        call = self._api.of_workers(method, arguments)
        return self._pool.ask_one(url, Question(call, self._api.results))

    def _load(self, directory: Path) -> tuple[list[str], list[str]]:
        """On rank 0: all servers, and those that say that they have the weights."""
        if self._pool is None:
            self._own = self._new_processes()
            own = [process.url for process in self._own]
            self._pool = self._new_pool(own or self._servers.urls)
        new = self._start_dead(directory)
        starting = {process.url for process in self._own if not process.is_ready}
        asked = [url for url in self._pool.urls if url not in starting]
        with ThreadPoolExecutor(max(1, len(asked))) as threads:
            failures = list(
                threads.map(lambda url: self._load_one(url, directory, url in new), asked)
            )
        for url, failure in zip(asked, failures):
            if failure is not None:
                self._say(f"rollout server {url} did not take the weights: {failure}")
        return self._pool.urls, [url for url, failure in zip(asked, failures) if failure is None]

    def _load_one(self, url: str, directory: Path, is_new: bool) -> str | None:
        version = directory.name.removeprefix("version_")
        calls = self._api.loading(str(directory.absolute()), version)
        if is_new:
            calls = calls[-1:]  # it has read them already; it only has to be told their version
        elif self._lag > 1:
            calls = [*self._api.interrupting(), *calls, *self._api.resuming()]
        try:
            for call in calls:
                self._pool.ask_one(url, Question(call, lambda payload: None))
        except (httpx.HTTPError, BadAnswer) as error:
            return " ".join(f"{type(error).__name__} {error}".split())
        return None

    def _probe(self, urls: Sequence[str]) -> None:
        """Leave only servers that compute what the trainer computes. A collective."""
        world = self._groups.world
        rollout, model = self._config.rollout, self._config.model
        settings = SamplingSettings(1, ANSWER_TOKENS, temperature=rollout.temperature, seed=5)
        prompts = probe_prompts(model.vocab_size, model.max_sequence_length)

        def ask() -> dict[str, list[Answer] | str]:
            return {url: self._answers_to_probe(url, prompts, settings) for url in urls}

        found = together(world, lambda: ask() if world.rank() == 0 else None)[0]
        self._difference, wrong = 0.0, {}
        for url, answers in found.items():
            if isinstance(answers, str):
                wrong[url] = answers
                continue
            difference = max(
                self._difference_of(prompt, answer, settings.temperature)
                for prompt, answer in zip(prompts, answers, strict=True)
            )
            if difference <= self._servers.probe_tolerance:
                self._difference = max(self._difference, difference)
            else:
                wrong[url] = (
                    f"its log-probabilities differ from the trainer's by {difference:.3g}; "
                    f"expected at most {self._servers.probe_tolerance:g}"
                )
        good = [url for url in urls if url not in wrong]
        for url in self._pool.urls:
            if url in good:
                self._pool.admit(url)
            else:
                self._pool.exclude(url, wrong.get(url, "it did not take the weights"))
        if world.rank() == 0:
            for url, why in wrong.items():
                self._say(f"rollout server {url} is left out: {why}")
            for process in self._own:
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
            return [self._pool.ask_one(url, question)[0] for question in questions]
        except (httpx.HTTPError, BadAnswer) as error:
            return f"the probe failed: {type(error).__name__} {error}"

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
        needed = {self._reading[p.url] for p in self._own if not p.is_ready}
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
            revive=self._revive if self._own else lambda: None,
        )

    def _new_processes(self) -> list[ServerProcess]:
        host = "127.0.0.1" if self._own_machine else socket.gethostname()
        logs = self._config.run_dir / "servers"
        return [
            ServerProcess(host, logs / f"server_{number}.log")
            for number in range(self._servers.start)
        ]

    def _start_dead(self, directory: Path) -> set[str]:
        """Start our servers that do not run. While others answer they need not be waited for; the
        urls of those that were, and so have the weights.
        """
        dead = [process for process in self._own if not process.is_running]
        for process in dead:
            if process.pid is not None:
                self._restarts += 1
                self._say(f"rollout server {process.url} has ended; starting it again")
            process.stop()
            host = "127.0.0.1" if self._own_machine else "0.0.0.0"
            process.start(*self._command(directory.absolute(), host, process.port))
            self._reading[process.url] = directory
        if any(process.is_ready for process in self._own if process not in dead):
            return set()
        for process in dead:
            process.wait_until_ready(self._servers.start_s)
        return {process.url for process in dead}

    def _revive(self) -> None:
        """No server can be asked: bring ours back, with the weights of the moment."""
        directory = self._root / f"version_{self._sent}"
        if all(process.is_running for process in self._own):
            return
        for url in self._start_dead(directory):
            if self._load_one(url, directory, is_new=True) is None:
                self._pool.admit(url)

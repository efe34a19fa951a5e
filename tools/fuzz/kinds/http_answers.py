"""Servers' responses: bytes of HTTP, JSON, and answers that no policy has sampled.

Most cases are bodies, read and judged as those of a server. One in thirty comes through a socket,
from a server that breaks HTTP, packs, drips, or does not stop.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import gzip
import io
import json
import math
import random
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from megatron_rl.config.schema import ModelConfig
from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers.answer_checks import ExpertShape, check_answers
from megatron_rl.rollout.servers.api import Answer, BadAnswer, Call
from megatron_rl.rollout.servers.exchange import ask_once, parse_json
from megatron_rl.rollout.servers.sglang import SglangApi
from megatron_rl.rollout.servers.vllm import VllmApi
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong
from tools.fuzz.mutate import as_text, changed, encoded, flipped

_PROMPT = Prompt(0, np.array([3, 4]), "", {})
_SETTINGS = SamplingSettings(samples=2, max_new_tokens=4, routes=True)
_VOCABULARY, _STOPS, _VERSIONS = 16, (1, 5), ("7", "8")
_SHAPE = ExpertShape(layers=3, moe=(1, 2), top_k=2, count=8)
_APIS = {
    "vllm": VllmApi("load"),
    "sglang": SglangApi(ModelConfig(num_layers=3, moe_layer_freq=[0, 1, 1], moe_top_k=2)),
}
#: Through a socket: longest exchange, seconds; and largest body, bytes.
_SECONDS, _MOST_BYTES = 0.5, 1 << 20


@dataclass(frozen=True)
class Case:
    """A server's answer. ``right``: the tokens and log-probabilities of one that is right."""

    server: str  #: vllm or sglang
    data: bytes  #: the body; through a socket: all that is sent
    right: list | None = None
    wrong: bool = False  #: it cannot be taken
    socket: bool = False
    pause: float = 0.0  #: seconds between pieces of eight bytes


def make(rng: random.Random) -> Case:
    """A right answer, one that is wrong in its meaning, its types, its text, or its transport."""
    server = rng.choice(sorted(_APIS))
    answers = [_answer(rng) for _ in range(2)]
    payload = _SAY[server](rng, answers)
    way = rng.random()
    if way < 0.1:
        right = [(tokens, logprobs) for tokens, logprobs, *_ in answers]
        return Case(server, json.dumps(payload).encode(), right)
    if way < 0.4:  # one field as it cannot have been sampled
        payload = _SAY[server](rng, _impossible(rng, answers))
        return Case(server, json.dumps(payload).encode(), wrong=True)
    if way < 0.6:
        return Case(server, json.dumps(changed(rng, payload, rng.randint(1, 4))).encode())
    if way < 0.97:
        return Case(server, encoded(rng, as_text(rng, changed(rng, payload, rng.randrange(3)))))
    data, pause = _transport(rng, json.dumps(payload).encode())
    return Case(server, data, socket=True, pause=pause)


def _answer(rng: random.Random) -> tuple[list, list, str, np.ndarray, list]:
    """Tokens, log-probabilities, reason, experts and versions of an answer as it can be."""
    count = rng.randint(1, 4)
    tokens = [rng.choice([t for t in range(_VOCABULARY) if t not in _STOPS]) for _ in range(count)]
    reason = "length"
    if count < 4 or rng.random() < 0.5:
        tokens[-1], reason = rng.choice(_STOPS), "stop"
    logprobs = [-rng.random() * 10 for _ in tokens]
    ids = [[rng.sample(range(8), 2) for _ in range(3)] for _ in range(len(tokens) + 1)]
    return tokens, logprobs, reason, np.array(ids, np.int32), [rng.choice(_VERSIONS)]


def _impossible(rng: random.Random, answers: list) -> list:
    """The answers with one thing of one of them that no server samples."""
    answers = copy.deepcopy(answers)
    place = rng.randrange(2)
    tokens, logprobs, reason, ids, versions = answers[place]
    n, way = rng.randrange(len(tokens)), rng.randrange(13)
    if way == 0:
        tokens[n] = rng.choice([-1, 16, 2**31, 2**63, 1.7, float(tokens[n]), True, None, "1"])
    elif way == 1:
        odd = [0.5, -104.5, -1e30, -9999.0, -1e300, 1e300, None, "-1", True, [-1.0]]
        logprobs[n] = rng.choice([*odd, math.nan, math.inf, -math.inf])
    elif way == 2:
        tokens.insert(0, rng.choice(_STOPS))  # it runs on
        logprobs.insert(0, -1.0)
        ids = np.concatenate([ids[:1], ids])
    elif way == 3:  # a stop where there is none, or none where there is
        tokens[:], logprobs[:], ids = [2], [-1.0], ids[:2]
        reason = rng.choice(["stop", "length"])
    elif way == 4:
        reason = rng.choice([None, "error", "abort", "tool_calls", "", 3, True, ["stop"], {}])
    elif way == 5:
        versions[:] = rng.choice([[], ["6"], ["9"], ["8", "7"], ["7 "], ["07"], [""], ["default"]])
    elif way == 6:
        ids = rng.choice([ids[:-1], ids[:, :1], ids[..., :1], np.concatenate([ids, ids[:1]])])
    elif way == 7:
        ids = ids.copy()
        ids[rng.randrange(len(ids)), 1 + rng.randrange(2), 0] = rng.choice([-1, 8, 2**31 - 1])
    elif way == 8:
        ids = ids.copy()
        ids[0, 2, :] = 3  # one expert twice
    elif way == 9:
        logprobs.append(-1.0)
    elif way == 10:
        return answers[:1]
    elif way == 11:
        return [*answers, answers[0]]
    else:
        tokens[:] = [2] * 5  # longer than asked for
        logprobs[:], reason = [-1.0] * 5, "length"
        ids = np.concatenate([ids] * 6)[:6]
    answers[place] = (tokens, logprobs, reason, ids, versions)
    return answers


def _npy(ids: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, ids)
    return base64.b64encode(file.getvalue()).decode()


def _vllm(rng: random.Random, answers: list) -> Any:
    choices = []
    for index, (tokens, logprobs, reason, ids, versions) in enumerate(answers):
        content = [{"logprob": logprob, "rank": 1} for logprob in logprobs]
        ends = [len(tokens) if i == len(versions) - 1 else i for i in range(len(versions))]
        spans = [
            {"version": version, "start": start, "end": end}
            for version, start, end in zip(versions, [0, *ends], ends)
        ]
        choices.append({"index": index, "finish_reason": reason, "token_ids": tokens})
        choices[-1] |= {"logprobs": {"content": content}, "weight_versions": spans}
        choices[-1] |= {"routed_experts": _npy(ids.astype(rng.choice([np.int32, np.int64])))}
    rng.shuffle(choices)
    return {"choices": choices, "usage": {"total_tokens": 3}}


def _sglang(rng: random.Random, answers: list) -> Any:
    samples = []
    for tokens, logprobs, reason, ids, versions in answers:
        pairs = [[logprob, token, None] for logprob, token in zip(logprobs, tokens)]
        pairs += [[logprob, None, None] for logprob in logprobs[len(tokens) :]]
        meta = {"finish_reason": {"type": reason}, "output_token_logprobs": pairs}
        meta["weight_version"] = versions[0] if len(versions) == 1 else None
        meta["routed_experts"] = base64.b64encode(ids.astype(np.int32).tobytes()).decode()
        samples.append({"text": "", "meta_info": meta})
    return samples


_SAY = {"vllm": _vllm, "sglang": _sglang}


def _transport(rng: random.Random, body: bytes) -> tuple[bytes, float]:
    """The bytes to send, and the pause between pieces."""
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    chunk = b"%x\r\n%s\r\n" % (len(body), body)
    start = b"HTTP/1.1 200 OK\r\n"
    way = rng.randrange(10)
    if way == 0:
        return whole, rng.choice([0.2, 0.4])  # it drips
    if way == 1:
        return flipped(rng, whole, 8), 0.0
    if way == 2:
        packed = gzip.compress(body + b" " * rng.choice([0, 4 << 20]))
        length = b"Content-Length: %d\r\n" % len(packed)
        return start + b"Content-Encoding: gzip\r\n" + length + b"\r\n" + packed, 0.0
    if way == 3:
        return whole[: rng.randrange(len(whole))], 0.0
    if way == 4:
        status = b"%d No" % rng.choice([100, 101, 204, 301, 307, 400, 401, 500, 999])
        return whole.replace(b"200 OK", status), 0.0
    if way == 5:
        field = rng.choice([b"X: " + b"a" * 200_000, b"\0: a", b"no colon", b"X: a\r\n" * 20_000])
        return start + field + b"\r\n" + whole[len(start) :], 0.0
    if way == 6:
        length = rng.choice([b"9" * 5000, b"-1", b"1e3", b"0x10", b"\xb2", b"3, 4", b"", b"10"])
        return start + b"Content-Length: " + length + b"\r\n\r\n" + body, 0.0
    if way == 7:  # twice what is allowed
        return start + b"\r\n" + b" " * (2 * _MOST_BYTES), 0.0
    if way == 8:
        chunks = flipped(rng, chunk + b"0\r\n\r\n", 4)
        return start + b"Transfer-Encoding: chunked\r\n\r\n" + chunks, 0.0
    return rng.randbytes(rng.choice([1, 100, 10_000])), 0.0


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """An answer that is taken is compared with what its text says, read once more."""
    with _Server() as server:

        def judge(case: Case) -> Verdict:
            try:
                data = server.said(case) if case.socket else case.data
                answers = _read(case.server, data)
            except BadAnswer as error:
                said = str(error)
                if case.right is not None:
                    raise Wrong(f"refused ({said}): {case.data[:300]!r}") from error
                if not said.isprintable() or len(said) > 1000:
                    raise Wrong(f"a message of {len(said)} characters: {said[:200]!r}") from error
                return Verdict.REFUSED
            _check(case, data, answers)
            return Verdict.TAKEN

        yield judge


def _read(server: str, data: bytes) -> list[Answer]:
    """As the engine reads a response."""
    answers = _APIS[server].read_answers(parse_json(data))
    check_answers(answers, _PROMPT, _SETTINGS, _STOPS, _VOCABULARY, _VERSIONS)
    for answer in answers:
        _SHAPE.of_moe_layers(answer.routed_experts, 2 + len(answer.tokens) - 1)
    return answers


def _check(case: Case, data: bytes, answers: list[Answer]) -> None:
    """Wrong: what was taken could not have been sampled, or is not what was said."""
    if case.wrong:
        raise Wrong(f"taken: {data[:300]!r}")
    said = [(a.tokens.tolist(), a.logprobs.tolist()) for a in answers]
    if case.right is not None:
        near = all(
            tokens == right and np.allclose(logprobs, wanted, atol=1e-5)
            for (tokens, logprobs), (right, wanted) in zip(said, case.right, strict=True)
        )
        if not near:
            raise Wrong(f"{said}; expected {case.right}")
    for (tokens, _), (sent, sent_logprobs) in zip(said, _plain(case.server, data), strict=True):
        good = all(type(token) is int and 0 <= token < _VOCABULARY for token in sent)
        good &= sent == tokens and 1 <= len(sent) <= 4 and len(sent) == len(sent_logprobs)
        good &= not any(token in _STOPS for token in sent[:-1])
        good &= len(sent) == 4 or sent[-1] in _STOPS
        good &= all(type(p) in (int, float) and -104 <= p <= 1e-3 for p in sent_logprobs)
        if not good:
            raise Wrong(f"taken: {data[:300]!r}")


def _plain(server: str, data: bytes) -> list[tuple[list, list]]:
    """Tokens and log-probabilities, read by the standard library and nothing else."""
    payload = json.loads(data)
    if server == "vllm":
        choices = sorted(payload["choices"], key=lambda choice: choice["index"])
        return [
            (c["token_ids"], [entry["logprob"] for entry in c["logprobs"]["content"]])
            for c in choices
        ]
    pairs = [sample["meta_info"]["output_token_logprobs"] for sample in payload]
    return [([token for _, token, _ in p], [logprob for logprob, *_ in p]) for p in pairs]


class _Server:
    """Sends a case to whoever asks."""

    def __enter__(self) -> _Server:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=16)
        self._url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._case: Case | None = None
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def said(self, case: Case) -> bytes:
        """The body, as the engine gets it. Raises `BadAnswer`."""
        self._case = case
        return ask_once(self._url, Call("/generate", {}), key="k", seconds=_SECONDS)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection, self._case), daemon=True).start()

    def _talk(self, connection: socket.socket, case: Case) -> None:
        pace = threading.Event()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(5.0)
            connection.recv(1 << 16)
            for start in range(0, len(case.data), 8) if case.pause else ():
                connection.sendall(case.data[start : start + 8])
                pace.wait(case.pause)
            if not case.pause:
                connection.sendall(case.data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass


KIND = Kind("http", make, judging)

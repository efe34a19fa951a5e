"""A server that speaks vLLM's routes, with a model of its own and faults on demand.

The real one is too slow to start for every test; `tests/e2e/test_vllm_server.py` asks it.
"""

from __future__ import annotations

import base64
import functools
import io
import json
import shutil
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Iterable

import numpy as np
import torch

from megatron_rl.rollout.servers.reload import Reload
from tests.support import hugging_face, weight_transfer

#: Log-probabilities [V] of the next token, given those before it.
Model = Callable[[list[int]], np.ndarray]


def toy_model(vocab_size: int = 16) -> Model:
    """Probabilities that depend on the last token alone."""
    table = np.random.default_rng(0).normal(size=(vocab_size, vocab_size))
    table -= np.log(np.exp(table).sum(axis=1, keepdims=True))
    return lambda tokens: table[tokens[-1] % vocab_size]


def hugging_face_model(directory: Path) -> Model:
    """What transformers computes from a model directory, float64."""
    model = hugging_face.load(directory)

    @functools.cache  # questions begin alike, and some are asked again
    @torch.no_grad()
    def logprobs(*tokens: int) -> np.ndarray:
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        return logits.log_softmax(-1).double().numpy()

    return lambda tokens: logprobs(*tokens)


class _Worker(Reload):
    """The worker of a fake server: the real extension, around a model directory."""

    rank, device = 0, "cpu"

    def __init__(
        self, like: Path, take: Callable[[Path], None], between: Callable[[], None]
    ) -> None:
        """between: called after each weight."""
        self._like, self._take, self._between, self.model_runner = like, take, between, self

    def _forget_kernels(self) -> None:
        pass

    def reload_weights(self, weights_iterator: Iterable[tuple[str, Any]]) -> None:
        """The method of vLLM's model runner."""
        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(self._like / "config.json", folder)
            weights = {}
            for name, weight in weights_iterator:
                weights[name] = weight
                self._between()
            save_file(weights, Path(folder) / "model.safetensors")
            self._take(Path(folder))


class _Listening(ThreadingHTTPServer):
    daemon_threads = True
    #: Connections that may wait to be accepted. With the usual 5, some are refused if this process
    #: is slow.
    request_queue_size = 1024


class FakeServer:
    """Serves until closed. Set ``fault`` to the name of one of its faults; "" for none.

    hang: it answers nothing for a minute. garbage: its response is no answer. vocabulary: an answer
    has a token outside the vocabulary. error: status 500. refuse: it refuses new weights at once;
    refuse late: after a pause. stall: it reads the first weights and no more. lie: it reports new
    weights that it has not taken. stale: it names an old version. impatient: it closes a connection
    that is used a second time.

    ``before_answer``, ``before_pause``, ``hold`` and ``dies_after`` decide what comes first, so no
    test depends on which side is faster.
    """

    def __init__(
        self,
        model: Model,
        load: Callable[[Path], Model] | None = None,
        port: int = 0,
        like: Path | None = None,
    ) -> None:
        """like: a model directory whose config.json describes weights that are broadcast."""
        self.key: str | None = None  #: what requests must carry; None: nothing
        #: changes each choice before it is sent
        self.spoil: Callable[[dict[str, Any]], Any] = lambda choice: choice
        self.model, self._load = model, load or (lambda directory: self.model)
        self.fault, self.pause = "", 0.3
        self.worker = _Worker(like, self._take, self._between) if like else None
        self.transfer: Any = None  #: answers the routes of vLLM's weight transfer
        self.version, self.loaded = "default", []
        self.asked: list[dict[str, Any]] = []  #: bodies of the requests, answered or not
        self.experts: tuple[int, int] | None = None  #: (L, K): answers carry experts
        self.masks = False  #: it was started with --return-sampling-mask
        self.done: list[dict[str, Any]] = []  #: bodies of the requests answered
        #: called before a request is answered; and before a pause, with its number
        self.before_answer: Callable[[], None] = lambda: None
        self.before_pause: Callable[[int], None] = lambda number: None
        #: (n, p): the n-th token of an answer, from 0, waits until the server is paused p times
        self.hold: tuple[int, int] | None = None
        self.dies_after: int | None = None  #: answers after which it closes; None: it does not
        self.broken_off = 0
        self.own_stops: set[int] = set()  #: end-of-sequence tokens of the files it was started with
        self._pauses = 0  #: how often it was paused
        self._running = threading.Event()
        self._running.set()
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._http = _Listening(("127.0.0.1", port), _handler(self))
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def answered(self) -> int:
        """Number of requests answered."""
        return len(self.done)

    def close(self) -> None:
        """Stop at once: open requests are not answered, new connections refused."""
        self._ended.set()
        self._http.shutdown()
        self._http.server_close()

    def respond(self, path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        """Status and JSON of the response; None: hang up."""
        if path == "/inference/v1/generate":
            return self._generate(body)
        if path == "/collective_rpc":
            if self.fault.startswith("refuse"):
                self._ended.wait(self.pause if self.fault == "refuse late" else 0.0)
                return 500, {"error": "no"}
            if body["method"] in ("count", "join_weights", "receive_weights"):
                try:
                    result = getattr(self.worker, body["method"])(*body["args"])
                except RuntimeError as error:
                    return 500, {"error": str(error)}
                return 200, {"results": [result]}
            self._take(Path(body["args"][0]))
        elif self.transfer is not None and path in self.transfer.routes:
            return self.transfer.respond(path, body)
        elif path == "/init_weight_transfer_engine":
            return 500, weight_transfer.refusal("Weight transfer not configured. Please set ")
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/pause?mode=abort":
            self.before_pause(self._pauses + 1)
            with self._lock:
                self._running.clear()
                self._pauses += 1
        elif path == "/resume":
            self._running.set()
        elif path != "/reset_prefix_cache":
            return 404, {"error": path}
        return 200, {"results": ["ok"]}

    def _experts(self, tokens: int) -> str | None:
        """Experts of a token at place t in layer l (from 0): t + l, t + l + 1... modulo 8."""
        if self.experts is None:
            return None
        layers, top_k = self.experts
        places = np.add.outer(np.add.outer(np.arange(tokens), np.arange(layers)), np.arange(top_k))
        file = io.BytesIO()
        np.save(file, (places % 8).astype(np.int32))
        return base64.b64encode(file.getvalue()).decode()

    def _take(self, directory: Path) -> None:
        self.loaded.append(directory.name)
        if self.fault != "lie":
            self.model = self._load(directory)

    def _between(self) -> None:
        if self.fault == "stall":
            self._ended.wait(60.0)

    def _generate(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        with self._lock:
            self.asked.append(body)
        begun = self._begin()
        if begun is None:
            return None
        self.before_answer()
        if self.fault == "hang":
            self._ended.wait(60.0)
        if self._ended.is_set():
            return None
        if self.fault == "garbage":
            return 200, {"choices": "none"}
        if self.fault == "error":
            return 500, {"error": "EngineCore encountered an issue"}
        count = body["sampling_params"]["n"]
        choices = [self.spoil(self._choice(i, body, *begun)) for i in range(count)]
        with self._lock:
            if self.dies_after is not None and len(self.done) >= self.dies_after:
                threading.Thread(target=self.close, daemon=True).start()
                return None
            self.done.append(body)
        return 200, {"choices": choices[::-1]}  # in reverse: each carries its index

    def _begin(self) -> tuple[int, Model, str] | None:
        """Wait until it is not paused: number of pauses, model and version; None: it is closed."""
        while not self._ended.is_set():
            with self._lock:
                if self._running.is_set():
                    return self._pauses, self.model, self.version
            self._running.wait(0.01)
        return None

    def _wait_to_be_paused(self, place: int) -> None:
        while self.hold and place == self.hold[0] and self._pauses < self.hold[1]:
            if self._ended.wait(0.005):
                return

    def _choice(
        self, index: int, body: dict[str, Any], pauses: int, model: Model, version: str
    ) -> dict[str, Any]:
        settings = body["sampling_params"]
        random = np.random.default_rng(settings["seed"] + index)
        tokens, content, reason, masks = list(body["token_ids"]), [], "length", []
        version = "0" if self.fault == "stale" else version
        for place in range(settings["max_tokens"]):
            self._wait_to_be_paused(place)
            if self._pauses > pauses:
                reason = "abort"
                self.broken_off += 1
                break
            logprobs = model(tokens)
            if self.masks:
                logprobs, kept = _truncated(logprobs, settings)
                masks.append(kept)
            token = int(logprobs.argmax())
            if settings["temperature"] > 0:
                logits = logprobs / (1.0 if self.masks else settings["temperature"])
                token = int((logits + random.gumbel(size=len(logits))).argmax())
            tokens.append(token)
            content.append({"token_id": token, "logprob": float(logprobs[token])})
            own = set() if settings.get("ignore_eos") else self.own_stops
            if token in own.union(settings["stop_token_ids"]):
                reason = "stop"
                break
        made = tokens[len(body["token_ids"]) :]
        if self.fault == "vocabulary":
            made[0] = 10**6
        return {
            "index": index,
            "finish_reason": reason,
            "token_ids": made,
            "routed_experts": self._experts(len(tokens) - 1),
            "sampling_mask": masks if self.masks else None,
            "weight_versions": [{"version": version, "start": 0, "end": len(made)}],
            "logprobs": {"content": content},
        }


def _truncated(logprobs: np.ndarray, settings: dict[str, Any]) -> tuple[np.ndarray, list[int]]:
    """vLLM's processed log-probabilities [V] and the ids that it keeps."""
    assert settings["temperature"] > 0 and settings["top_k"] > 0, "vLLM refuses these with masks"
    scaled = logprobs / settings["temperature"]
    order = np.argsort(-scaled)[: settings["top_k"]]
    probs = np.exp(scaled[order] - np.logaddexp.reduce(scaled[order]))
    kept = order[probs.cumsum() - probs < settings["top_p"]]
    processed = np.full(len(scaled), -np.inf)
    processed[kept] = scaled[kept] - np.logaddexp.reduce(scaled[kept])
    return processed, kept.tolist()


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        used = False

        def do_GET(self) -> None:
            if self._is_kept_out():
                return
            transfers = server.transfer is not None and self.path in server.transfer.routes
            self._send(*(server.respond(self.path, {}) if transfers else (200, {})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self._is_kept_out():
                return
            gone = server.fault == "impatient" and self.used
            response = None if gone else server.respond(self.path, body)
            self.used = True
            if response is None:
                self.close_connection = True
                return
            self._send(*response)

        def _is_kept_out(self) -> bool:
            if server.key is None or self.headers["Authorization"] == f"Bearer {server.key}":
                return False
            self._send(401, {"error": "Unauthorized"})
            return True

        def _send(self, status: int, payload: Any) -> None:
            text = json.dumps(payload).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client did not wait

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait until the condition holds. AssertionError: it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def main() -> None:
    """Arguments PORT DIRECTORY: serve a model directory until the process is ended."""
    port, directory = int(sys.argv[1]), Path(sys.argv[2])
    FakeServer(hugging_face_model(directory), hugging_face_model, port)
    threading.Event().wait()


if __name__ == "__main__":
    main()

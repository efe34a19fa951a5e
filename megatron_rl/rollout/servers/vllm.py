"""vLLM's HTTP API: tokens in, tokens out (`/inference/v1/generate`, seen on 0.32).

The server needs ``--enable-scale-out`` for that route, and VLLM_SERVER_DEV_MODE=1 for the routes
that change weights. Every answer names the versions of the weights that sampled it. A prompt with a
token outside the vocabulary ends the server, so prompts are checked first.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from typing import Annotated, Any, Literal, Sequence

import numpy as np
from pydantic import FailFast, Field

from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers.api import (
    Answer,
    BadAnswer,
    Call,
    Message,
    kept_tokens,
    logprob_array,
    parse_message,
)

_ROUTE = "/inference/v1/generate"
#: Most workers of a server, and most versions of the weights in an answer.
_WORKERS, _SPANS = 4096, 256
#: The header of a NumPy file: three dimensions, C order, integers.
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([|<][iu][1248])', 'fortran_order': False, "
    rb"'shape': \((\d{1,9}), (\d{1,9}), (\d{1,9})\), \} *\n",
    re.DOTALL,
)


_TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Token(Message):
    logprob: float
    token_id: int | None = None


class _Logprobs(Message):
    content: Annotated[list[_Token], FailFast()]


class _Span(Message):
    """The weights of this version sampled the answer's tokens [start, end)."""

    version: str = Field(pattern=r"^[!-~]{1,64}$")
    start: int
    end: int


class _Choice(Message):
    index: int
    finish_reason: Literal["stop", "length", "abort"]
    token_ids: Annotated[list[_TokenId], FailFast()]
    logprobs: _Logprobs
    weight_versions: list[_Span] | None = Field(None, max_length=_SPANS)
    routed_experts: str | None = None
    sampling_mask: Annotated[list[list[_TokenId]] | None, FailFast()] = None


class _Response(Message):
    choices: Annotated[list[_Choice], FailFast()]


class _Results(Message):
    results: list[Any] = Field(min_length=1, max_length=_WORKERS)


class _WorldSize(Message):
    world_size: int = Field(ge=1, le=_WORKERS)


class VllmApi:
    """`BroadcastApi` of vLLM."""

    def __init__(self, reload_method: str, *, masks: bool = False) -> None:
        """
        Args:
            reload_method: the workers' method that loads a directory; see `reload.py`.
            masks: the servers run with ``--return-sampling-mask``, and refuse temperature 0.
        """
        self._reload_method, self._masks = reload_method, masks

    def generate_call(
        self, prompt: Prompt, settings: SamplingSettings, seed: int, stop_ids: Sequence[int]
    ) -> Call:
        """See `ServerApi`. Temperature 0 is vLLM's greedy decoding; its log-probabilities are those
        of temperature 1. With sampling masks it is top-k 1, with log-probabilities of 0.
        ``ignore_eos`` makes the server ignore the end-of-sequence tokens of its own files.
        """
        zero, one = (1.0, 1) if self._masks else (0.0, 0)
        sampling = {
            "n": settings.samples,
            "max_tokens": settings.max_new_tokens,
            "temperature": zero if settings.greedy else settings.temperature,
            "top_p": 1.0 if settings.greedy else settings.top_p,
            "top_k": one if settings.greedy else settings.top_k,
            "seed": seed,
            "stop_token_ids": sorted(stop_ids),
            "ignore_eos": True,
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
        }
        body = {"token_ids": prompt.tokens.tolist(), "sampling_params": sampling}
        return Call(_ROUTE, body)

    def read_answers(self, payload: Any) -> list[Answer]:
        """See `ServerApi`."""
        choices = sorted(parse_message(_Response, payload, _ROUTE).choices, key=lambda c: c.index)
        if [choice.index for choice in choices] != list(range(len(choices))):
            raise BadAnswer(f"not a response of {_ROUTE} (choices that are not numbered from 0)")
        return [_answer(choice) for choice in choices]

    def load_calls(self, directory: str, version: str) -> Sequence[Call]:
        """See `ServerApi`."""
        return (self.worker_call(self._reload_method, [directory]), *self.version_calls(version))

    def pause_calls(self) -> Sequence[Call]:
        """See `ServerApi`. An aborted choice has the finish reason "abort"."""
        return (Call("/pause?mode=abort", {}),)

    def resume_calls(self) -> Sequence[Call]:
        """See `ServerApi`."""
        return (Call("/resume", {}),)

    def version_calls(self, version: str) -> Sequence[Call]:
        """See `BroadcastApi`."""
        return (
            Call("/reset_prefix_cache", {}),
            Call("/update_weight_version", {"new_version": version}),
        )

    def worker_call(self, method: str, arguments: list[Any]) -> Call:
        """See `BroadcastApi`."""
        return Call("/collective_rpc", {"method": method, "args": arguments})

    def read_results(self, payload: Any) -> list[Any]:
        """See `BroadcastApi`."""
        return parse_message(_Results, payload, "/collective_rpc").results

    def world_size_call(self) -> Call:
        """See `BroadcastApi`."""
        return Call("/get_world_size", None)

    def read_world_size(self, payload: Any) -> int:
        """See `BroadcastApi`."""
        return parse_message(_WorldSize, payload, "/get_world_size").world_size

    def join_call(self, information: dict[str, Any]) -> Call:
        """See `BroadcastApi`."""
        return Call("/init_weight_transfer_engine", {"init_info": information})

    def start_call(self) -> Call:
        """See `BroadcastApi`."""
        return Call("/start_weight_update", {})

    def update_call(self, entries: Sequence[tuple[str, str, list[int]]]) -> Call:
        """See `BroadcastApi`."""
        names, dtypes, shapes = (list(column) for column in zip(*entries))
        information = {"names": names, "dtype_names": dtypes, "shapes": shapes}
        return Call("/update_weights", {"update_info": information})

    def finish_call(self) -> Call:
        """See `BroadcastApi`."""
        return Call("/finish_weight_update", {})


def _answer(choice: _Choice) -> Answer:
    tokens, content = choice.token_ids, choice.logprobs.content
    for number, (token, entry) in enumerate(zip(tokens, content)):
        if entry.token_id not in (None, token):
            raise BadAnswer(f"token {token} with the log-probability of another, at {number}")
    return Answer(
        tokens=np.array(tokens, dtype=np.int64),
        logprobs=logprob_array([entry.logprob for entry in content]),
        stopped=choice.finish_reason == "stop",
        versions=_versions(choice.weight_versions or (), len(tokens)),
        routed_experts=None if choice.routed_experts is None else _experts(choice.routed_experts),
        aborted=choice.finish_reason == "abort",
        kept=None if choice.sampling_mask is None else kept_tokens(choice.sampling_mask),
    )


def _versions(spans: Sequence[_Span], count: int) -> tuple[str, ...]:
    """The versions in order. The spans must cover all ``count`` tokens, without gaps."""
    if spans:
        places = [0, *(span.end for span in spans)]
        if [span.start for span in spans] != places[:-1] or places != sorted(places):
            raise BadAnswer("versions of weights with gaps between their tokens")
        if places[-1] != count:
            raise BadAnswer(f"versions of the weights of {places[-1]} tokens; expected {count}")
    return tuple(span.version for span in spans)


def _experts(encoded: str) -> np.ndarray:
    """The array in a NumPy file. NumPy's own reader would evaluate the header, and allocate as much
    as it claims.
    """
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: a character beyond ASCII
        raise BadAnswer(f"not a response of {_ROUTE} (routed_experts is not base64)") from error
    header = _NPY.match(data[:256])
    if header is not None:
        dtype, shape = np.dtype(header[1].decode()), tuple(int(n) for n in header.groups()[1:])
        if len(data) - header.end() == math.prod(shape) * dtype.itemsize:
            return np.frombuffer(data, dtype, offset=header.end()).reshape(shape)
    raise BadAnswer(f"not a response of {_ROUTE} (routed_experts is no array of whole numbers)")

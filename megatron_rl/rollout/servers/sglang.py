"""SGLang's native HTTP API (`/generate`), and the command that starts a server.

No server was at hand: there is no build of it for a CPU. Requests and responses are those that
SGLang documents and that other trainers send and read; the probe judges what a real one computes.
Its samples are not seeded, because the samples of a prompt would share one seed.
"""

from __future__ import annotations

import base64
import binascii
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Sequence

import numpy as np
from pydantic import FailFast, Field

from megatron_rl.config.layout import moe_layers
from megatron_rl.config.schema import Config, ModelConfig
from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import EngineParts, SamplingSettings
from megatron_rl.rollout.servers import keyed
from megatron_rl.rollout.servers.api import (
    Answer,
    BadAnswer,
    Call,
    Sent,
    logprob_array,
    understood,
)
from megatron_rl.rollout.servers.engine import ServerEngine

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_ROUTE = "/generate"
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
#: Log-probability, token and its text, which JSON has as a list.
_Token = Annotated[tuple[float, _TokenId, Any], Field(strict=False)]


class _Reason(Sent):
    type: Literal["stop", "length", "abort"]


class _Meta(Sent):
    finish_reason: _Reason
    output_token_logprobs: Annotated[list[_Token], FailFast()]
    weight_version: Annotated[str, Field(pattern=r"^[!-~]{1,64}$")] | int | None = None
    routed_experts: str | None = None


class _Sample(Sent):
    meta_info: _Meta
    output_ids: Any = None  #: the same tokens as in meta_info


class _Response(Sent):
    samples: Annotated[list[_Sample], FailFast()]


class SglangApi:
    """`ServerApi` of SGLang."""

    def __init__(self, model: ModelConfig) -> None:
        """model: tells the shape of the experts that answers carry."""
        self._layers, self._top_k = model.num_layers, model.moe_top_k
        self._moe_layers = sum(moe_layers(model))

    def generation(
        self, prompt: Prompt, settings: SamplingSettings, seed: int, stop_ids: Sequence[int]
    ) -> Call:
        """Log-probabilities are those at the temperature, before top-p and top-k. The server stops
        at end-of-sequence tokens of its own as well: ``ignore_eos`` would drop these here too.
        """
        sampling = {
            "n": settings.samples,
            "max_new_tokens": settings.max_new_tokens,
            "temperature": 0.0 if settings.greedy else settings.temperature,
            "top_p": 1.0 if settings.greedy else settings.top_p,
            "top_k": -1 if settings.greedy or not settings.top_k else settings.top_k,
            "stop_token_ids": sorted(stop_ids),
            "skip_special_tokens": False,
        }
        body = {
            "input_ids": prompt.tokens.tolist(),
            "sampling_params": sampling,
            "return_logprob": True,
        }
        return Call(_ROUTE, body | ({"return_routed_experts": True} if settings.routes else {}))

    def answers(self, payload: Any) -> list[Answer]:
        """See `ServerApi`. One sample is an object, several are a list of them, in order."""
        samples = {"samples": payload if isinstance(payload, list) else [payload]}
        return [self._answer(one) for one in understood(_Response, samples, _ROUTE).samples]

    def loading(self, directory: str, version: str) -> Sequence[Call]:
        """See `ServerApi`. Cached keys and values of the old weights are forgotten with it."""
        body = {"model_path": directory, "weight_version": version, "flush_cache": True}
        return (Call("/update_weights_from_disk", body),)

    def interrupting(self) -> Sequence[Call]:
        """See `ServerApi`."""
        return (Call("/pause_generation", {"mode": "abort"}),)

    def resuming(self) -> Sequence[Call]:
        """See `ServerApi`."""
        return (Call("/continue_generation", {}),)

    def _answer(self, sample: _Sample) -> Answer:
        meta = sample.meta_info
        tokens = [token for _, token, _ in meta.output_token_logprobs]
        if sample.output_ids not in (None, tokens):
            raise BadAnswer(f"not a response of {_ROUTE} (other tokens in output_ids)")
        version, reason = meta.weight_version, meta.finish_reason.type
        encoded = meta.routed_experts
        return Answer(
            tokens=np.array(tokens, dtype=np.int64),
            logprobs=logprob_array([logprob for logprob, *_ in meta.output_token_logprobs]),
            stopped=reason == "stop",
            versions=() if version is None else (str(version),),
            routed_experts=None if encoded is None else self._experts(encoded),
            aborted=reason == "abort",
        )

    def _experts(self, encoded: str) -> np.ndarray:
        """int32 [tokens, L, K], of all layers or of the MoE layers alone."""
        try:
            flat = np.frombuffer(base64.b64decode(encoded, validate=True), dtype=np.int32)
        except (binascii.Error, ValueError) as error:
            raise BadAnswer(f"not a response of {_ROUTE} (routed_experts: {error})") from error
        for layers in (self._layers, self._moe_layers):
            if layers and len(flat) % (layers * self._top_k) == 0:
                return flat.reshape(-1, layers, self._top_k)
        raise BadAnswer(f"not a response of {_ROUTE} (routed_experts: {len(flat)} numbers)")


def sglang_command(
    config: Config, directory: Path, host: str, port: int
) -> tuple[list[str], dict[str, str]]:
    """Words and environment variables; ``directory`` is what it loads first."""
    servers = config.rollout.servers
    assert servers.python is not None, "checked where servers are started"
    words = [servers.python, keyed.__file__, "sglang.launch_server"]
    words += ["--model-path", str(directory)]
    words += ["--host", host, "--port", str(port), "--skip-tokenizer-init"]
    words += ["--dtype", _DTYPES[config.model.dtype]]
    words += ["--context-length", str(config.model.max_sequence_length)]
    if config.algorithm.routing_replay == "r3":
        words += ["--enable-return-routed-experts"]
    return [*words, *servers.options], {"HF_HUB_OFFLINE": "1"}


def sglang_engine(parts: EngineParts) -> ServerEngine:
    """Of a run."""
    return ServerEngine(parts, SglangApi(parts.config.model), partial(sglang_command, parts.config))

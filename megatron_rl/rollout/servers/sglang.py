"""SGLang's native HTTP API (`/generate`).

It has not been run: SGLang has no build for a CPU. Requests and responses are those that SGLang
documents and that other trainers use. The probe judges what a real server computes. Samples are not
seeded, because all samples of a prompt would share one seed.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal, Sequence

import numpy as np
from pydantic import FailFast, Field

from megatron_rl.config.layout import moe_layers
from megatron_rl.config.schema import ModelConfig
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

_ROUTE = "/generate"
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
#: Log-probability, token id and text. JSON has them as a list.
_Token = Annotated[tuple[float, _TokenId, Any], Field(strict=False)]


class _Reason(Message):
    type: Literal["stop", "length", "abort"]


class _Meta(Message):
    finish_reason: _Reason
    output_token_logprobs: Annotated[list[_Token], FailFast()]
    weight_version: Annotated[str, Field(pattern=r"^[!-~]{1,64}$")] | int | None = None
    routed_experts: str | None = None
    #: over the kept tokens, which are the next
    output_token_sampling_logprobs: Annotated[list[float] | None, FailFast()] = None
    output_token_sampling_mask: Annotated[list[list[_TokenId]] | None, FailFast()] = None


class _Sample(Message):
    meta_info: _Meta
    output_ids: Any = None  #: the same tokens as in meta_info


class _Response(Message):
    samples: Annotated[list[_Sample], FailFast()]


class SglangApi:
    """`ServerApi` of SGLang."""

    def __init__(self, model: ModelConfig) -> None:
        """model: the policy's; it gives the shape of the experts in answers."""
        self._layers, self._top_k = model.num_layers, model.moe_top_k
        self._moe_layers = sum(moe_layers(model))

    def generate_call(
        self, prompt: Prompt, settings: SamplingSettings, seed: int, stop_ids: Sequence[int]
    ) -> Call:
        """See `ServerApi`. Log-probabilities are those at the temperature, before top-p and top-k;
        with kept tokens (``return_sampling_mask``) those over these.
        The server also stops at end-of-sequence tokens of its own files: ``ignore_eos`` would make
        it ignore ``stop_token_ids`` too.
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
        if settings.routes:
            body["return_routed_experts"] = True
        if settings.keeps:
            body["return_sampling_mask"] = True
        return Call(_ROUTE, body)

    def read_answers(self, payload: Any) -> list[Answer]:
        """See `ServerApi`. One sample comes as an object, several as a list of objects in order."""
        samples = {"samples": payload if isinstance(payload, list) else [payload]}
        return [self._answer(one) for one in parse_message(_Response, samples, _ROUTE).samples]

    def load_calls(self, directory: str, version: str) -> Sequence[Call]:
        """See `ServerApi`. The same call makes the server forget cached keys and values."""
        body = {"model_path": directory, "weight_version": version, "flush_cache": True}
        return (Call("/update_weights_from_disk", body),)

    def pause_calls(self) -> Sequence[Call]:
        """See `ServerApi`."""
        return (Call("/pause_generation", {"mode": "abort"}),)

    def resume_calls(self) -> Sequence[Call]:
        """See `ServerApi`."""
        return (Call("/continue_generation", {}),)

    def _answer(self, sample: _Sample) -> Answer:
        meta = sample.meta_info
        tokens = [token for _, token, _ in meta.output_token_logprobs]
        if sample.output_ids not in (None, tokens):
            raise BadAnswer(f"not a response of {_ROUTE} (other tokens in output_ids)")
        version, reason = meta.weight_version, meta.finish_reason.type
        encoded, sets = meta.routed_experts, meta.output_token_sampling_mask
        logprobs = [logprob for logprob, *_ in meta.output_token_logprobs]
        if sets is not None:
            logprobs = meta.output_token_sampling_logprobs or []
        return Answer(
            tokens=np.array(tokens, dtype=np.int64),
            logprobs=logprob_array(logprobs),
            stopped=reason == "stop",
            versions=() if version is None else (str(version),),
            routed_experts=None if encoded is None else self._experts(encoded),
            aborted=reason == "abort",
            kept=None if sets is None else kept_tokens(sets),
        )

    def _experts(self, encoded: str) -> np.ndarray:
        """Experts int32 [tokens, L, K]; L: all layers, or only the MoE layers."""
        try:
            flat = np.frombuffer(base64.b64decode(encoded, validate=True), dtype=np.int32)
        except (binascii.Error, ValueError) as error:
            raise BadAnswer(f"not a response of {_ROUTE} (routed_experts: {error})") from error
        for layers in (self._layers, self._moe_layers):
            if layers and len(flat) % (layers * self._top_k) == 0:
                return flat.reshape(-1, layers, self._top_k)
        raise BadAnswer(f"not a response of {_ROUTE} (routed_experts: {len(flat)} numbers)")

"""vLLM's HTTP API: tokens in, tokens out (`/inference/v1/generate`, seen on 0.32).

The server has to be started with ``--enable-scale-out`` for that route, and with
VLLM_SERVER_DEV_MODE=1 for the routes that change weights. It says of every answer which version of
the weights made it. A token outside the model's vocabulary ends the server, so prompts have to be
right.
"""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any, Sequence

import numpy as np

from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers.api import Answer, BadAnswer, Call


class VllmApi:
    """`ServerApi` of vLLM."""

    def __init__(self, reload_method: str) -> None:
        """reload_method: of the server's workers, called with the directory; see `reload.py`."""
        self._reload_method = reload_method

    def generation(
        self, prompt: Prompt, settings: SamplingSettings, seed: int, stop_ids: Sequence[int]
    ) -> Call:
        """Temperature 0 is vLLM's greedy decoding, and its log-probabilities those of temperature
        1 either way. The server's own end-of-sequence tokens, of the files it was started with, do
        not count.
        """
        sampling = {
            "n": settings.samples,
            "max_tokens": settings.max_new_tokens,
            "temperature": 0.0 if settings.greedy else settings.temperature,
            "top_p": 1.0 if settings.greedy else settings.top_p,
            "top_k": 0 if settings.greedy else settings.top_k,
            "seed": seed,
            "stop_token_ids": sorted(stop_ids),
            "ignore_eos": True,
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
        }
        body = {"token_ids": prompt.tokens.tolist(), "sampling_params": sampling}
        return Call("/inference/v1/generate", body)

    def answers(self, payload: Any) -> list[Answer]:
        """See `ServerApi`."""
        try:
            choices = sorted(payload["choices"], key=lambda choice: choice["index"])
            return [_answer(choice) for choice in choices]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise BadAnswer(f"not a response of /inference/v1/generate ({error!r})") from error

    def loading(self, directory: str, version: str) -> Sequence[Call]:
        """See `ServerApi`. Cached keys and values of the old weights are forgotten."""
        return (self.of_workers(self._reload_method, [directory]), *self.naming(version))

    def naming(self, version: str) -> Sequence[Call]:
        """What follows new weights, however they came."""
        return (
            Call("/reset_prefix_cache", {}),
            Call("/update_weight_version", {"new_version": version}),
        )

    def of_workers(self, method: str, arguments: list) -> Call:
        """Call a method of all workers; its response holds what each returns, see `results`."""
        return Call("/collective_rpc", {"method": method, "args": arguments})

    def results(self, payload: Any) -> list:
        """Of the workers. Raises `BadAnswer`."""
        try:
            return list(payload["results"])
        except (KeyError, TypeError) as error:
            raise BadAnswer(f"not a response of /collective_rpc ({error!r})") from error

    # -- weight transfer, see `transfer.py` -------------------------------------------------------

    def counting(self) -> Call:
        """How many workers there are; see `count`."""
        return Call("/get_world_size", None)

    def count(self, payload: Any) -> int:
        """Of the workers. Raises `BadAnswer`."""
        try:
            return int(payload["world_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadAnswer(f"not a response of /get_world_size ({error!r})") from error

    def joining(self, information: dict[str, Any]) -> Call:
        """Join the trainer's group."""
        return Call("/init_weight_transfer_engine", {"init_info": information})

    def starting(self) -> Call:
        """Get ready for new weights."""
        return Call("/start_weight_update", {})

    def updating(self, entries: Sequence[tuple[str, str, list[int]]]) -> Call:
        """Take these weights, (name, type, shape), from the group."""
        names, dtypes, shapes = (list(column) for column in zip(*entries))
        information = {"names": names, "dtype_names": dtypes, "shapes": shapes}
        return Call("/update_weights", {"update_info": information})

    def finishing(self) -> Call:
        """Those were all."""
        return Call("/finish_weight_update", {})

    # -- breaking off ----------------------------------------------------------------------------

    def interrupting(self) -> Sequence[Call]:
        """See `ServerApi`. The choices broken off end with the reason "abort"."""
        return (Call("/pause?mode=abort", {}),)

    def resuming(self) -> Sequence[Call]:
        """See `ServerApi`."""
        return (Call("/resume", {}),)


def _answer(choice: dict[str, Any]) -> Answer:
    spans = choice.get("weight_versions") or ()
    return Answer(
        tokens=np.array(choice["token_ids"], dtype=np.int64).reshape(-1),
        logprobs=np.array(
            [token["logprob"] for token in choice["logprobs"]["content"]], dtype=np.float32
        ),
        stopped=choice["finish_reason"] == "stop",
        versions=tuple(str(span["version"]) for span in spans),
        routed_experts=_experts(choice.get("routed_experts")),
        aborted=choice["finish_reason"] == "abort",
    )


def _experts(encoded: str | None) -> np.ndarray | None:
    if encoded is None:
        return None
    try:
        return np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
    except binascii.Error as error:
        raise ValueError("routed_experts is not base64") from error

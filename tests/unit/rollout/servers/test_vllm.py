"""Requests to vLLM and its responses; these are of a vLLM 0.32 server."""

import base64
import io

import numpy as np
import pytest

from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers.api import BadAnswer, Call
from megatron_rl.rollout.servers.vllm import VllmApi

API = VllmApi("reload_checkpoint")
PROMPT = Prompt(0, np.array([5, 6]), "", {})


def choice(index, tokens, logprobs, reason="length", experts=None):
    """As recorded; unused fields of the record are left in."""
    content = [
        {
            "token_id": token,
            "logprob": logprob,
            "rank": 18,
            "top_logprobs": [{"token_id": token, "logprob": logprob, "rank": 18}],
        }
        for token, logprob in zip(tokens, logprobs)
    ]
    return {
        "index": index,
        "finish_reason": reason,
        "stop_reason": None if reason == "length" else tokens[-1],
        "token_ids": tokens,
        "routed_experts": experts,
        "sampling_mask": None,
        "weight_versions": [{"version": "7", "start": 0, "end": len(tokens)}],
        "logprobs": {"content": content},
    }


def test_answers_come_in_the_order_of_the_samples():
    first = choice(0, [0, 45, 76, 59], [-4.207874298095703, -3.13, -2.69, -6.16])
    second = choice(1, [103, 1], [-6.126885890960693, -0.25], "stop")
    one, other = API.answers({"choices": [second, first], "usage": {"total_tokens": 32}})
    assert one.tokens.tolist() == [0, 45, 76, 59] and not one.stopped
    assert one.logprobs.dtype == np.float32 and one.logprobs[0] == np.float32(-4.2078743)
    assert other.tokens.tolist() == [103, 1] and other.stopped
    assert other.versions == ("7",) and other.routed_experts is None


def test_experts_are_unpacked():
    experts = np.arange(30, dtype=np.uint8).reshape(5, 3, 2)
    file = io.BytesIO()
    np.save(file, experts)
    encoded = base64.b64encode(file.getvalue()).decode()
    (answer,) = API.answers({"choices": [choice(0, [3, 4], [-1.0, -1.0], experts=encoded)]})
    np.testing.assert_array_equal(answer.routed_experts, experts)


def pickled_object():
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    "payload",
    [
        None,
        [],
        {},
        {"choices": "none"},
        {"choices": [{}]},
        {"choices": [{**choice(0, [1], [-1.0]), "token_ids": ["a"]}]},
        {"choices": [{**choice(0, [1], [-1.0]), "token_ids": [2**70]}]},
        {"choices": [{**choice(0, [1], [-1.0]), "logprobs": None}]},
        {"choices": [choice(0, [1], [-1.0], experts="no base64!")]},
        {"choices": [choice(0, [1], [-1.0], experts=pickled_object())]},
    ],
)
def test_anything_else_is_no_answer(payload):
    with pytest.raises(BadAnswer, match="not a response of /inference/v1/generate"):
        API.answers(payload)


def test_what_is_asked():
    settings = SamplingSettings(4, 9, temperature=0.7, seed=3)
    call = API.generation(PROMPT, settings, seed=11, stop_ids=(9, 1))
    assert call.path == "/inference/v1/generate" and call.body["token_ids"] == [5, 6]
    assert call.body["sampling_params"] == {
        "n": 4,
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 11,
        "stop_token_ids": [1, 9],
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }


def test_greedy_is_temperature_0_without_cuts():
    settings = SamplingSettings(1, 9, top_p=0.9, top_k=5, greedy=True)
    asked = API.generation(PROMPT, settings, seed=11, stop_ids=(9, 1)).body["sampling_params"]
    assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (0.0, 1.0, 0)


def test_a_choice_that_was_broken_off_says_so():
    api = VllmApi("load")
    assert [call.path for call in api.interrupting()] == ["/pause?mode=abort"]
    assert [call.path for call in api.resuming()] == ["/resume"]
    payload = {  # as 0.32 answers a question that a pause has ended
        "choices": [
            {
                "index": 0,
                "finish_reason": "abort",
                "token_ids": [5, 6],
                "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}]},
                "weight_versions": [{"version": "3", "start": 0, "end": 2}],
            }
        ]
    }
    (answer,) = api.answers(payload)
    assert answer.aborted and not answer.stopped and answer.versions == ("3",)


def test_weights_are_read_then_the_cache_forgotten_then_the_version_told():
    assert API.loading("/weights/version_3", "3") == (
        Call("/collective_rpc", {"method": "reload_checkpoint", "args": ["/weights/version_3"]}),
        Call("/reset_prefix_cache", {}),
        Call("/update_weight_version", {"new_version": "3"}),
    )

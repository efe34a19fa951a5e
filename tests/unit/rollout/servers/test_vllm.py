"""vLLM's calls and responses, recorded from a vLLM 0.32 server."""

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
    """A response as recorded, with the fields that we do not read."""
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
    one, other = API.read_answers({"choices": [second, first], "usage": {"total_tokens": 32}})
    assert one.tokens.tolist() == [0, 45, 76, 59] and not one.stopped
    assert one.logprobs.dtype == np.float32 and one.logprobs[0] == np.float32(-4.2078743)
    assert other.tokens.tolist() == [103, 1] and other.stopped
    assert other.versions == ("7",) and other.routed_experts is None


def test_sampling_masks_are_the_kept_tokens():
    sent = {**choice(0, [3, 4], [-1.0, -0.5]), "sampling_mask": [[9, 3], [4]]}
    (answer,) = API.read_answers({"choices": [sent]})
    assert answer.kept.ids.tolist() == [9, 3, 4] and answer.kept.sizes.tolist() == [2, 1]
    with pytest.raises(BadAnswer, match="sampling_mask"):
        API.read_answers({"choices": [{**sent, "sampling_mask": [[9, -3], [4]]}]})
    (without,) = API.read_answers({"choices": [choice(0, [3], [-1.0])]})
    assert without.kept is None


def test_with_masks_greedy_is_top_k_of_one():
    """vLLM refuses temperature 0 and top_k 0 where it returns masks."""
    greedy = SamplingSettings(1, 4, greedy=True, top_k=9, top_p=0.5)
    for api, temperature, top_k in ((API, 0.0, 0), (VllmApi("load", masks=True), 1.0, 1)):
        sent = api.generate_call(PROMPT, greedy, 3, (1,)).body["sampling_params"]
        assert (sent["temperature"], sent["top_k"], sent["top_p"]) == (temperature, top_k, 1.0)


def test_experts_are_unpacked():
    experts = np.arange(30, dtype=np.uint8).reshape(5, 3, 2)
    file = io.BytesIO()
    np.save(file, experts)
    encoded = base64.b64encode(file.getvalue()).decode()
    (answer,) = API.read_answers({"choices": [choice(0, [3, 4], [-1.0, -1.0], experts=encoded)]})
    np.testing.assert_array_equal(answer.routed_experts, experts)


def npy(array, **changes):
    """A NumPy file in base64, perhaps with another header or with more bytes behind it."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    data = file.getvalue()
    for old, new in changes.get("header", {}).items():
        assert old in data
        data = data.replace(old, new)
    return base64.b64encode(data[: changes.get("length")] + changes.get("more", b"")).decode()


def archive():
    file = io.BytesIO()
    np.savez(file, np.zeros((1, 3, 2), np.uint8))
    return base64.b64encode(file.getvalue()).decode()


FEW = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
BOMB = b"(" * 2000 + b")" * 2000


@pytest.mark.parametrize(
    "encoded",
    [
        "no base64!",
        "ÄÖ==",
        "",
        npy(np.array([{}], dtype=object)),
        archive(),
        npy(FEW.astype(np.float32)),
        npy(FEW.astype(">i4")),
        npy(FEW.astype(bool)),
        npy(FEW.reshape(6, 2)),
        npy(np.asfortranarray(FEW)),
        npy(FEW, more=b"0"),
        npy(FEW, length=-1),
        npy(FEW, length=40),
        npy(FEW, header={b"(2, 3, 2)": b"(999999999, 999999999, 999999999)"}),
        npy(FEW, header={b"(2, 3, 2)": b"(-2, -3, 2)"}),
        npy(FEW, header={b"(2, 3, 2)": b"(2.0, 3, 2)"}),
        npy(FEW, header={b"(2, 3, 2)": BOMB}),
        npy(FEW, header={b"'|u1'": b"'|V1'"}),
        npy(FEW, header={b"'|u1'": b"[('f', '|u1')]"}),
        npy(FEW, header={b"False": b"__import__('os').abort()"}),
        npy(FEW, header={b"NUMPY\x01": b"NUMPY\x09"}),
    ],
)
def test_what_is_no_array_of_experts_is_no_answer(encoded):
    """The header does not decide how large the array is."""
    with pytest.raises(BadAnswer, match="not a response of /inference/v1/generate .routed_exp"):
        API.read_answers({"choices": [choice(0, [3, 4], [-1.0, -1.0], experts=encoded)]})


def test_experts_of_every_type_that_vllm_sends():
    for dtype in (np.uint8, np.uint16, np.int32):
        payload = {"choices": [choice(0, [3, 4], [-1.0, -1.0], experts=npy(FEW.astype(dtype)))]}
        (answer,) = API.read_answers(payload)
        np.testing.assert_array_equal(answer.routed_experts, FEW)
        assert answer.routed_experts.dtype == dtype


SPANS = [{"version": "7", "start": 0, "end": 1}, {"version": "8", "start": 1, "end": 2}]


def test_versions_are_those_of_all_tokens():
    (answer,) = API.read_answers(
        {"choices": [{**choice(0, [3, 4], [-1.0] * 2), "weight_versions": SPANS}]}
    )
    assert answer.versions == ("7", "8")
    for start, end in ((0, 2), (1, 3), (1, 1), (2, 2), (1, -1)):
        spans = [SPANS[0], {"version": "8", "start": start, "end": end}]
        with pytest.raises(BadAnswer, match="versions"):
            API.read_answers(
                {"choices": [{**choice(0, [3, 4], [-1.0] * 2), "weight_versions": spans}]}
            )


ONE = choice(0, [1], [-1.0])
CONTENT = ONE["logprobs"]["content"][0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_ids": [1.7]},
        {"token_ids": [1.0]},
        {"token_ids": [True]},
        {"token_ids": ["1"]},
        {"token_ids": [None]},
        {"token_ids": [-1]},
        {"token_ids": [2**31]},
        {"token_ids": [10**4000]},
        {"token_ids": [[1]]},
        {"token_ids": 1},
        {"token_ids": {"0": 1}},
        {"token_ids": [1.5] * 100_000},
        {"token_ids": [2]},  # the log-probability is that of token 1
        {"finish_reason": None},
        {"finish_reason": "error"},
        {"finish_reason": "repetition"},
        {"finish_reason": ["stop"]},
        {"index": 1},
        {"index": True},
        {"index": "0"},
        {"logprobs": {"content": None}},
        {"logprobs": {"content": [{"logprob": "-1"}]}},
        {"logprobs": {"content": [{"logprob": True}]}},
        {"logprobs": {"content": [{"logprob": None}]}},
        {"logprobs": {"content": [-1.0]}},
        {"logprobs": {"content": [{**CONTENT, "token_id": 1.0}]}},
        {"weight_versions": "7"},
        {"weight_versions": [7]},
        {"weight_versions": [{"version": 7, "start": 0, "end": 1}]},
        {"weight_versions": [{"version": "7", "start": 0}]},
        {"weight_versions": [{"version": "\x1b[2J", "start": 0, "end": 1}]},
        {"weight_versions": [{"version": "7" * 100, "start": 0, "end": 1}]},
        {"weight_versions": SPANS[:1] * 1000},
        {"routed_experts": [[[1]]]},
    ],
)
def test_a_choice_has_exactly_these_types(wrong):
    API.read_answers({"choices": [ONE]})
    with pytest.raises(BadAnswer) as error:
        API.read_answers({"choices": [{**ONE, **wrong}]})
    assert str(error.value).isprintable() and len(str(error.value)) < 300


def test_choices_are_numbered_from_0_each_once():
    for numbers in ([0, 0], [1, 2], [0, 2]):
        choices = [choice(number, [1], [-1.0]) for number in numbers]
        with pytest.raises(BadAnswer, match="choices that are not numbered from 0"):
            API.read_answers({"choices": choices})


def test_a_log_probability_that_no_float32_holds_is_infinite():
    (answer,) = API.read_answers({"choices": [choice(0, [1, 2], [-1e300, 1e300])]})
    assert answer.logprobs.tolist() == [-np.inf, np.inf]


@pytest.mark.parametrize(
    "payload",
    [None, 3, [], {}, {"results": "ok"}, {"results": {}}, {"results": []}, {"results": [1] * 5000}],
)
def test_what_workers_did_not_say(payload):
    assert API.read_results({"results": ["ok", {"a": 1}]}) == ["ok", {"a": 1}]
    with pytest.raises(BadAnswer, match="not a response of /collective_rpc"):
        API.read_results(payload)


@pytest.mark.parametrize(
    "size", [None, 0, -1, 2.0, True, "4", 5000, float("inf"), 10**4000, [4]], ids=range(10)
)
def test_what_is_no_number_of_workers(size):
    """The trainer waits for as many workers as there are results."""
    with pytest.raises(BadAnswer, match="not a response of /get_world_size"):
        API.read_world_size({"world_size": size})


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
    ],
)
def test_anything_else_is_no_answer(payload):
    with pytest.raises(BadAnswer, match="not a response of /inference/v1/generate"):
        API.read_answers(payload)


def test_what_is_asked():
    settings = SamplingSettings(4, 9, temperature=0.7, seed=3)
    call = API.generate_call(PROMPT, settings, seed=11, stop_ids=(9, 1))
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
    asked = API.generate_call(PROMPT, settings, seed=11, stop_ids=(9, 1)).body["sampling_params"]
    assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (0.0, 1.0, 0)


def test_a_choice_that_was_broken_off_says_so():
    api = VllmApi("load")
    assert [call.path for call in api.pause_calls()] == ["/pause?mode=abort"]
    assert [call.path for call in api.resume_calls()] == ["/resume"]
    payload = {  # the response of vLLM 0.32 to a request that a pause has aborted
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
    (answer,) = api.read_answers(payload)
    assert answer.aborted and not answer.stopped and answer.versions == ("3",)


def test_weights_are_read_then_the_cache_forgotten_then_the_version_told():
    assert API.load_calls("/weights/version_3", "3") == (
        Call("/collective_rpc", {"method": "reload_checkpoint", "args": ["/weights/version_3"]}),
        Call("/reset_prefix_cache", {}),
        Call("/update_weight_version", {"new_version": "3"}),
    )

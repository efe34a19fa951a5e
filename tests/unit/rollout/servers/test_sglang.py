"""SGLang's calls and responses, from its documentation and not from a server."""

import base64

import numpy as np
import pytest

from megatron_rl.config.schema import Config, ModelConfig
from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers import sglang_launcher
from megatron_rl.rollout.servers.answer_checks import check_answers
from megatron_rl.rollout.servers.api import BadAnswer, Call
from megatron_rl.rollout.servers.sglang import SglangApi
from megatron_rl.rollout.servers.sglang_command import sglang_command

MODEL = ModelConfig(num_layers=3, moe_layer_freq=[0, 1, 1], moe_top_k=2)
API = SglangApi(MODEL)
PROMPT = Prompt(0, np.array([5, 6]), "", {})


def response(tokens, logprobs, reason="length", experts=None, **changes):
    """A response as documented, with the fields that we do not read."""
    meta = {
        "id": "0a1b",
        "finish_reason": {"type": reason, "matched": tokens[-1] if reason == "stop" else None},
        "prompt_tokens": 2,
        "completion_tokens": len(tokens),
        "cached_tokens": 0,
        "weight_version": "7",
        "input_token_logprobs": [],
        "output_token_logprobs": [[p, t, None] for p, t in zip(logprobs, tokens)],
        "e2e_latency": 0.03,
    }
    if experts is not None:
        meta["routed_experts"] = base64.b64encode(experts.astype(np.int32).tobytes()).decode()
    return {"text": "", "output_ids": tokens, "meta_info": {**meta, **changes}}


def test_several_samples_are_a_list_and_one_is_none():
    one, other = API.read_answers(
        [response([0, 45], [-4.25, -3.0]), response([103, 1], [-6.5, -0.25], "stop")]
    )
    assert one.tokens.tolist() == [0, 45] and one.logprobs.tolist() == [-4.25, -3.0]
    assert not one.stopped and other.stopped and other.versions == ("7",)
    assert one.logprobs.dtype == np.float32 and one.tokens.dtype == np.int64
    (single,) = API.read_answers(response([3], [-1.0]))
    assert single.tokens.tolist() == [3] and single.routed_experts is None
    settings = SamplingSettings(samples=2, max_new_tokens=2)
    check_answers([one, other], PROMPT, settings, stop_ids=[1], vocab_size=128, versions=["7"])


def test_kept_tokens_come_with_log_probabilities_over_them():
    fields = {
        "output_token_sampling_mask": [[3, 9], [4]],
        "output_token_sampling_logprobs": [-0.25, 0.0],
    }
    (answer,) = API.read_answers(response([3, 4], [-1.0, -2.0], **fields))
    assert answer.logprobs.tolist() == [-0.25, 0.0]
    assert answer.kept.ids.tolist() == [3, 9, 4] and answer.kept.sizes.tolist() == [2, 1]
    settings = SamplingSettings(1, 2, top_k=4, kept=True)
    assert API.generate_call(PROMPT, settings, 3, (1,)).body["return_sampling_mask"] is True


def test_an_answer_that_was_broken_off():
    (answer,) = API.read_answers(response([3, 4], [-1.0, -2.0], "abort"))
    assert answer.aborted and not answer.stopped
    (nothing,) = API.read_answers(response([], [], "abort", weight_version=None))
    assert nothing.aborted and len(nothing.tokens) == 0 and nothing.versions == ()


@pytest.mark.parametrize("layers", [3, 2], ids=["all layers", "MoE layers"])
def test_experts_are_unpacked(layers):
    experts = np.arange(5 * layers * 2).reshape(
        5, layers, 2
    )  # 5 tokens fit only one number of layers
    (answer,) = API.read_answers(response([3, 4], [-1.0, -1.0], experts=experts))
    np.testing.assert_array_equal(answer.routed_experts, experts)


@pytest.mark.parametrize(
    "payload",
    [
        None,
        "busy",
        {},
        {"meta_info": {}},
        response([3], [-1.0], finish_reason=None),
        response([3], [-1.0], output_token_logprobs=[[None, 3, None]]),
        response([3], [-1.0], output_token_logprobs=[[-1.0]]),
        response([3], [-1.0], "error"),
        response([3], [-1.0], finish_reason={"type": None}),
        response([3.0], [-1.0]),
        response([True], [-1.0]),
        response([3], ["-1"]),
        response([-3], [-1.0]),
        response([2**40], [-1.0]),
        response([3], [-1.0], output_token_logprobs=[[-1.0, 3]]),
        response([3], [-1.0], output_token_logprobs={"0": [-1.0, 3, None]}),
        {**response([3], [-1.0]), "output_ids": [4]},
        response([3], [-1.0], weight_version=["7"]),
        response([3], [-1.0], weight_version="7\n8"),
        [response([3], [-1.0]), None],
        [[response([3], [-1.0])]],
        response([3], [-1.0], routed_experts="Ä"),
        response([3], [-1.0], routed_experts=[1]),
        response([3], [-1.0], routed_experts="*"),
        response([3], [-1.0], routed_experts=base64.b64encode(b"12345").decode()),
    ],
)
def test_anything_else_is_no_answer(payload):
    with pytest.raises(BadAnswer, match="not a response of /generate"):
        API.read_answers(payload)


def test_what_is_asked():
    settings = SamplingSettings(4, 16, temperature=0.7, top_p=0.9, top_k=20, routes=True)
    call = API.generate_call(PROMPT, settings, seed=3, stop_ids=(9, 1))
    assert call.path == "/generate"
    assert call.body == {
        "input_ids": [5, 6],
        "sampling_params": {
            "n": 4,
            "max_new_tokens": 16,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 20,
            "stop_token_ids": [1, 9],
            "skip_special_tokens": False,
        },
        "return_logprob": True,
        "return_routed_experts": True,
    }
    greedy = API.generate_call(PROMPT, SamplingSettings(1, 4, greedy=True, top_k=5), 3, (1,)).body
    assert greedy["sampling_params"]["temperature"] == 0.0
    assert greedy["sampling_params"]["top_k"] == -1 and "return_routed_experts" not in greedy


def test_weights_are_read_with_their_version_and_generation_is_paused():
    wanted = {"model_path": "/w/version_7", "weight_version": "7", "flush_cache": True}
    assert API.load_calls("/w/version_7", "7") == (Call("/update_weights_from_disk", wanted),)
    assert API.pause_calls() == (Call("/pause_generation", {"mode": "abort"}),)
    assert API.resume_calls() == (Call("/continue_generation", {}),)


def test_the_command(tmp_path):
    rollout = {
        "engine": "sglang",
        "servers": {"start": 1, "python": "py", "options": ["--tp", "2"]},
    }
    config = Config(rollout=rollout, model={"dtype": "bf16"}, algorithm={"routing_replay": "r3"})
    argv, environment = sglang_command(config, tmp_path, "10.0.0.1", 8000)
    line = " ".join(argv)
    start = f"py {sglang_launcher.__file__} sglang.launch_server --model-path {tmp_path} "
    assert line.startswith(f"{start}--host 10.0.0.1 ")
    assert "--dtype bfloat16 --context-length 256 --enable-return-routed-experts --tp 2" in line
    assert environment["HF_HUB_OFFLINE"] == "1"

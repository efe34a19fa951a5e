"""Checks of answers, continued answers, sizes of responses and seeds."""

import base64
import dataclasses
import json

import numpy as np
import pytest

from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers.answer_checks import LEAST_LOGPROB, ExpertShape, check_answers
from megatron_rl.rollout.servers.answer_requests import answer_seed, most_bytes
from megatron_rl.rollout.servers.api import Answer, BadAnswer, kept_tokens

PROMPT = Prompt(3, np.array([5, 6, 7]), "", {})
SETTINGS = SamplingSettings(samples=2, max_new_tokens=3)
ENDED = Answer(np.array([4, 1]), np.array([-0.5, -2.0], np.float32), True, ("7",))
CUT = Answer(np.array([4, 2, 1, 0])[:3], np.array([-0.5, 0.0, -9.0], np.float32), True, ("7", "7"))


def check(*answers, settings=SETTINGS, versions=("7",), may_be_aborted=False, stop_ids=(1,)):
    check_answers(answers, PROMPT, settings, stop_ids, 8, versions, may_be_aborted)


def test_good_answers_pass():
    check(ENDED, CUT)
    check(ENDED, dataclasses.replace(CUT, tokens=np.array([4, 2, 0]), stopped=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": np.zeros(0, int)}, "an answer of 0 tokens; expected 1 to 3"),
        ({"tokens": np.array([4, 2, 0, 1])}, "an answer of 4 tokens; expected 1 to 3"),
        ({"tokens": np.array([8, 1])}, "token 8; expected ids below 8"),
        ({"tokens": np.array([-1, 1])}, "token -1; expected ids below 8"),
        ({"logprobs": np.zeros(3, np.float32)}, "3 log-probabilities for 2 tokens"),
        ({"logprobs": np.array([np.nan, 0.0])}, "log-probability nan; expected finite"),
        ({"logprobs": np.array([-1.0, 0.7])}, "log-probability 0.7; expected finite, at most 0"),
        (
            {"tokens": np.array([4, 2])},
            "stops at the token .2., which is none of the stop tokens 1",
        ),
        ({"tokens": np.array([1, 1])}, "runs on behind the stop token 1; expected it to end at"),
        (
            {"tokens": np.array([4, 2]), "stopped": False},
            "ends after 2 tokens without a stop token; expected 3, or one of 1",
        ),
        ({"versions": ("7", "6")}, "weights of version 7 6; expected 7"),
        ({"versions": ()}, "an answer that names no version of its weights; expected 7"),
        ({"stopped": False}, "ends after 2 tokens and calls it the longest; expected 3"),
        ({"logprobs": np.array([-1.0, -104.5])}, "log-probability -104.5; .* at least -104, below"),
        ({"logprobs": np.array([-1e30, -1.0])}, "log-probability -1e[+]30; expected finite"),
        ({"logprobs": np.array([-9999.0, -1.0])}, "log-probability -9999.0; expected finite"),
        ({"logprobs": np.array([-np.inf, -1.0])}, "log-probability -inf; expected finite"),
        ({"logprobs": np.array([np.inf, -1.0])}, "log-probability inf; expected finite"),
    ],
)
def test_what_the_policy_could_not_have_sampled_is_refused(change, message):
    with pytest.raises(BadAnswer, match=message):
        check(ENDED, dataclasses.replace(ENDED, **change))


def test_any_of_several_stop_tokens_ends_an_answer():
    at_two = dataclasses.replace(ENDED, tokens=np.array([4, 2]))
    check(ENDED, at_two, stop_ids=(1, 2))
    with pytest.raises(BadAnswer, match="runs on behind the stop token 2; .* first of 1 or 2"):
        check(ENDED, CUT, stop_ids=(1, 2))
    with pytest.raises(BadAnswer, match="stops at the token .1., which is none of .* tokens none;"):
        check(ENDED, ENDED, stop_ids=())


def test_the_last_token_that_is_allowed_may_be_a_stop_token():
    """Whether the server calls the answer stopped or cut makes no difference."""
    check(CUT, dataclasses.replace(CUT, stopped=False))


def test_an_answer_may_be_broken_off_where_it_can_go_on():
    broken = dataclasses.replace(ENDED, tokens=np.array([4, 2]), stopped=False, aborted=True)
    nothing = dataclasses.replace(
        broken, tokens=np.zeros(0, int), logprobs=np.zeros(0, np.float32), versions=()
    )
    check(broken, nothing, may_be_aborted=True)
    with pytest.raises(BadAnswer, match="an answer that was broken off; expected a whole one"):
        check(broken, ENDED)
    check(ENDED, dataclasses.replace(ENDED, versions=("7", "8")), versions=("7", "8"))
    with pytest.raises(BadAnswer, match="weights of version 9; expected 7 or 8"):
        check(ENDED, dataclasses.replace(ENDED, versions=("9",)), versions=("7", "8"))


def test_a_rest_is_put_behind_what_there_was():
    """A token has the experts of the weights that sampled the token behind it: 3 + 2 - 1 of the
    first part."""
    first = Answer(
        np.array([4, 2]), np.array([-0.5, -1.0]), False, ("7",), np.full((4, 2, 2), 7), True
    )
    rest = Answer(np.array([3, 1]), np.array([-2.0, -3.0]), True, ("8",), np.full((6, 2, 2), 8))
    whole = first.continued(rest, prompt_length=3)
    assert whole.tokens.tolist() == [4, 2, 3, 1] and whole.logprobs.tolist() == [-0.5, -1, -2, -3]
    assert (whole.stopped, whole.aborted, whole.versions) == (True, False, ("7", "8"))
    assert whole.routed_experts[:, 0, 0].tolist() == [7, 7, 7, 7, 8, 8]
    assert dataclasses.replace(first, routed_experts=None).continued(rest, 3).routed_experts is (
        rest.routed_experts
    )


def test_a_missing_answer_is_seen():
    with pytest.raises(BadAnswer, match="1 answers; expected 2"):
        check(ENDED)


def test_experts_have_to_be_there_where_they_are_replayed():
    wanted = dataclasses.replace(SETTINGS, samples=1, routes=True)
    with pytest.raises(BadAnswer, match="no experts of its tokens, which algorithm.routing_replay"):
        check(ENDED, settings=wanted)
    experts = np.zeros((4, 2, 2), np.uint8)  # of 3 + 2 - 1 tokens
    check(dataclasses.replace(ENDED, routed_experts=experts), settings=wanted)
    with pytest.raises(BadAnswer, match="no experts"):
        check(dataclasses.replace(ENDED, routed_experts=experts[:3]), settings=wanted)


def test_versions_of_an_answer_follow_each_other():
    later = dataclasses.replace(ENDED, versions=("8", "7"))
    with pytest.raises(BadAnswer, match="weights of versions 8 7, in this order"):
        check(ENDED, later, versions=("7", "8"))


def test_the_least_log_probability_is_that_of_the_least_number():
    """The least positive float32 is accepted; less than half of it is 0 for a sampler."""
    least = float(np.log(np.nextafter(np.float32(0), np.float32(1), dtype=np.float32)))
    check(ENDED, dataclasses.replace(ENDED, logprobs=np.array([least, -1.0], np.float32)))
    assert LEAST_LOGPROB < least and np.exp(np.float32(LEAST_LOGPROB)) == 0.0


SHAPE = ExpertShape(layers=3, moe=(1, 2), top_k=2, count=8)
EVERY = np.array([[[7, 7], [0, 7], [3, 4]]] * 5, np.int32)  # its first layer has no experts


def test_experts_are_those_of_the_moe_layers():
    for ids in (EVERY, EVERY.astype(np.uint8), EVERY[:, 1:]):
        np.testing.assert_array_equal(SHAPE.of_moe_layers(ids, 5), EVERY[:, 1:])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (EVERY[:4], "experts of shape .4, 3, 2.; expected 5 tokens, 3 or 2 layers, 2 experts"),
        (EVERY[:, :1], "experts of 1 layers; expected 5 tokens"),
        (EVERY[:, :0], "experts of 0 layers; expected 5 tokens"),
        (EVERY[..., :1], "experts of shape .5, 3, 1.; expected"),
        (EVERY[0], "experts of shape .3, 2., int32; expected"),
        (EVERY.astype(float), "experts of shape .5, 3, 2., float64; expected"),
        (EVERY.astype(bool), "experts of shape .5, 3, 2., bool; expected"),
        (np.where(EVERY == 4, 8, EVERY), "experts from 0 to 8; expected ids below 8"),
        (np.where(EVERY == 4, -1, EVERY), "experts from -1 to 7; expected ids below 8"),
        (np.where(EVERY == 4, 3, EVERY), "an expert twice for one token; expected each once"),
    ],
)
def test_what_are_no_experts_of_the_model_is_refused(ids, message):
    with pytest.raises(BadAnswer, match=message):
        SHAPE.of_moe_layers(ids, 5)


def test_a_response_can_be_as_large_as_answers_are_and_no_larger():
    settings = SamplingSettings(samples=8, max_new_tokens=1000)
    plain = most_bytes(PROMPT, settings, SHAPE)
    assert plain == 2**20 + 8 * 1000 * 512
    entry = {"token_id": 151643, "logprob": -12.345678901234567, "rank": 151643}
    sent = {**entry, "top_logprobs": [entry], "token": "token_id:151643", "bytes": [116] * 15}
    assert len(json.dumps(sent)) + len("151643, ") < 512
    routed = most_bytes(PROMPT, dataclasses.replace(settings, routes=True), SHAPE)
    ids = np.zeros((3 + 1000 - 1, 3, 2), np.int32)
    assert 8 * len(base64.b64encode(ids.tobytes())) < routed - plain < 8 * 1.2 * 4 / 3 * ids.nbytes


def test_a_rest_of_nothing_has_its_own_experts_alone():
    """An answer aborted before its first token may have experts of any shape."""
    nothing = Answer(np.zeros(0, int), np.zeros(0), False, (), np.zeros((1, 9, 9)), True)
    rest = Answer(np.array([3, 1]), np.array([-2.0, -3.0]), True, ("8",), np.full((4, 2, 2), 8))
    assert nothing.continued(rest, prompt_length=3).routed_experts is rest.routed_experts


def test_prompts_and_steps_have_seeds_of_their_own():
    seeds = [answer_seed(seed, index) for seed in (0, 1, 1 << 40) for index in range(300)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 - 2**11 for seed in seeds)
    assert answer_seed(1, 2) == answer_seed(1, 2)


def sets_of(*sets):
    return kept_tokens(sets)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (None, "no sets of kept tokens for 2 tokens, which rollout.keep_sampling_mask needs; expe"),
        (sets_of([4]), "1 sets of kept tokens for 2 tokens"),
        (sets_of([4], [1, 8]), "kept tokens from 1 to 8; expected ids below 8"),
        (sets_of([4], [2, 3]), "token 1 outside of the kept tokens that it was drawn from"),
    ],
)
def test_kept_tokens_have_to_hold_the_tokens(kept, message):
    wanted = dataclasses.replace(SETTINGS, samples=1, top_k=2, kept=True)
    check(dataclasses.replace(ENDED, kept=sets_of([4, 2], [1])), settings=wanted)
    check(dataclasses.replace(ENDED, kept=sets_of([], [1])), settings=wanted)  # all tokens
    with pytest.raises(BadAnswer, match=message):
        check(dataclasses.replace(ENDED, kept=kept), settings=wanted)
    check(dataclasses.replace(ENDED, kept=kept), settings=dataclasses.replace(wanted, greedy=True))


def test_kept_tokens_of_a_rest_follow_those_of_the_first_part():
    first = dataclasses.replace(ENDED, kept=sets_of([4, 2], [1]))
    rest = dataclasses.replace(CUT, kept=sets_of([4], [2, 0], [1]))
    whole = first.continued(rest, 3).kept
    assert whole.sizes.tolist() == [2, 1, 1, 2, 1] and whole.ids.tolist() == [4, 2, 1, 4, 2, 0, 1]


def test_a_response_can_be_as_large_as_kept_tokens_are():
    plain = SamplingSettings(samples=8, max_new_tokens=100, top_k=500)
    kept = dataclasses.replace(plain, kept=True)
    room = most_bytes(PROMPT, kept, SHAPE) - most_bytes(PROMPT, plain, SHAPE)
    assert room >= 2 * len(json.dumps([[2**31 - 1] * 500] * 100)) * 8 * 0.9

"""What counts as an answer."""

import dataclasses

import numpy as np
import pytest

from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.servers.api import Answer, BadAnswer, answer_seed, check_answers

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
    """Whether a server then calls it stopped or cut."""
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
    """Experts are those of the pass that drew the token behind them: 3 + 2 - 1 of the first."""
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


def test_prompts_and_steps_have_seeds_of_their_own():
    seeds = [answer_seed(seed, index) for seed in (0, 1, 1 << 40) for index in range(300)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 - 2**11 for seed in seeds)
    assert answer_seed(1, 2) == answer_seed(1, 2)

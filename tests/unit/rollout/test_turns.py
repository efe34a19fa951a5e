"""Turns joined by hand, and conversations with an environment on the built-in engine."""

import dataclasses

import numpy as np
import pytest

from megatron_rl.errors import RunFailed, UserError
from megatron_rl.records import Completion, KeptTokens, Prompt, RolloutGroup, RoutedExperts
from megatron_rl.rewards.base import Reward
from megatron_rl.rollout.collect import (
    ScoredGroup,
    rollout_metrics,
    sample_rows,
    shape_overlong,
    to_samples,
)
from megatron_rl.rollout.engine import SamplingSettings
from megatron_rl.rollout.turns import join_turns


def answer(tokens, logprobs, text, routes=None, finished=True, version=None):
    routed = None if routes is None else RoutedExperts(np.array(routes)[:, None, None], (2,))
    values = np.array(logprobs, dtype=np.float32)
    return Completion(np.array(tokens), values, finished, text, routed, version, version)


def test_turns_are_joined_by_hand():
    # a prompt of 2 tokens, answer 5 6, reply 8 8 8, answer 7, reply 9, answer 4 3
    answers = [
        answer([5, 6], [-1, -2], "five six", [10, 11, 12], version=3),
        answer([7], [-3], "seven", range(20, 27), version=3),
        answer([4, 3], [-4, -5], "four three", range(30, 40), finished=False, version=4),
    ]
    replies = [np.array([8, 8, 8]), np.array([9])]
    texts = ["five six", " tool ", "seven", "!", "four three"]
    found = join_turns(answers, replies, texts)
    assert found.tokens.tolist() == [5, 6, 8, 8, 8, 7, 9, 4, 3]
    assert found.written.tolist() == [True] * 2 + [False] * 3 + [True, False, True, True]
    assert found.written_logprobs.tolist() == [-1, -2, -3, -4, -5]
    assert np.isnan(found.logprobs[~found.written]).all() and len(found.logprobs) == 9
    assert found.num_written == 5
    # 3 tokens of the first answer's pass, 4 more of the second's, 3 more of the third's
    assert found.routed_experts.ids[:, 0, 0].tolist() == [10, 11, 12, 23, 24, 25, 26, 37, 38, 39]
    assert (found.routed_experts.layers, found.routed_experts.known) == ((2,), None)
    assert found.text == "five six tool seven!four three"
    assert (found.last_text, found.judged_text) == ("four three", "four three")
    assert (found.finished, found.version, found.last_version) == (False, 3, 4)


def test_a_last_reply_is_no_turn_of_the_policy():
    found = join_turns([answer([5, 6], [-1, -2], "a", [1, 2, 3])], [[8, 9]], ["a", "b"])
    assert found.written.tolist() == [True, True, False, False]
    assert found.routed_experts.ids[:, 0, 0].tolist() == [1, 2, 3]  # of 6 tokens, 3 are not known
    (sample,) = to_samples([scored(found)], np.array([[2.0]]))
    assert sample.written.tolist() == [False, False, True, True, False, False]


def test_kept_tokens_are_joined_with_none_for_replies():
    sets = [KeptTokens.of_sizes(np.array(ids), np.array([2, 1])) for ids in ([5, 9, 6], [7, 8, 4])]
    answers = [answer([5, 6], [-1, -2], "a"), answer([7, 4], [-3, -4], "b")]
    kept = [dataclasses.replace(one, kept=each) for one, each in zip(answers, sets, strict=True)]
    found = join_turns(kept, [np.array([8, 8])], ["a", "t", "b"]).kept
    assert found.sizes.tolist() == [2, 1, 0, 0, 2, 1] and found.ids.tolist() == [5, 9, 6, 7, 8, 4]
    (sample,) = to_samples([scored(join_turns(kept, [[8]], ["a", "t", "b"]))], np.array([[2.0]]))
    assert sample.kept.sizes.tolist() == [0, 0, 2, 1, 0, 2, 1][-len(sample.tokens) :]
    assert join_turns([kept[0], answers[1]], [[8]], ["a", "t", "b"]).kept is None


def test_without_experts_of_one_answer_there_are_none():
    answers = [answer([5], [-1], "a", [1, 2]), answer([6], [-1], "b")]
    assert join_turns(answers, [[8]], ["a", "t", "b"]).routed_experts is None


@pytest.mark.parametrize(
    ("answers", "replies", "texts"), [(0, 0, 0), (1, 2, 3), (2, 0, 2), (2, 1, 2)]
)
def test_turns_that_do_not_fit_are_refused(answers, replies, texts):
    with pytest.raises(ValueError, match=f"{answers} answers, {replies} replies and {texts} texts"):
        join_turns([answer([5], [-1], "a")] * answers, [np.array([8])] * replies, ["a"] * texts)


def scored(*completions):
    prompt = Prompt(4, np.array([1, 2]), "p", {})
    rewards = (Reward(1.0, {}, ""),) * len(completions)
    return ScoredGroup(RolloutGroup(prompt, completions), rewards)


def test_metrics_and_sample_lines_count_what_the_policy_wrote():
    two = join_turns(
        [answer([5, 6], [-1, -2], "a"), answer([7], [-3], "b", finished=False)],
        [[8] * 9],
        ["a", " tool ", "b"],
    )
    group = scored(two, answer([5], [-1], "c"))
    # 2 tokens at most in one turn; the last 2 of 3 are overlong
    (shaped,) = shape_overlong([group], longest=3, buffer=2, penalty=1.0)
    assert [reward.value for reward in shaped.rewards] == [0.5, 1.0]
    assert [one.longest_turn for one in group.group.completions] == [2, 1]
    metrics = rollout_metrics([group])
    assert metrics["response/length_mean"] == (4.0, 2.0)
    assert metrics["response/finished_fraction"] == (1.0, 2.0)
    first, second = sample_rows([group], 2)
    assert (first["completion"], first["tokens"], first["finished"]) == ("a tool b", 3, False)
    assert (second["completion"], second["tokens"]) == ("c", 1)


def test_generate_writes_what_the_policy_wrote():
    from tests.support.tiny import cpu_device

    cpu_device()
    from megatron_rl.tasks.answers import rows_of

    two = join_turns(
        [answer([5, 6], [-1, -2], "a"), answer([7], [-3], "b")], [[8] * 9], ["a", "t", "b"]
    )
    (row,) = rows_of(scored(two).group)
    assert (row["completion"], row["tokens"], row["logprob"]) == ("atb", 3, -6.0)


#: Every fifth token ends an answer, so that most do.
STOPS = tuple(range(0, 64, 5))


def encode(text):
    return [ord(letter) % 64 for letter in text]


def conversations(environment, max_turns=3, longest=64, routes=False):
    """(a tiny engine, the same with the environment)."""
    from megatron_rl.models.gpt.chunk import routers_of
    from megatron_rl.rollout.conversation import ConversationEngine
    from megatron_rl.router.capture import RouterCapture
    from tests.support.tiny import build_tiny, tiny_config, tiny_engine

    config = tiny_config()
    groups, megatron_config, chunks = build_tiny(config)
    capture = RouterCapture(routers_of(chunks), [[1, 2]]) if routes else None
    engine = tiny_engine(config, groups, megatron_config, chunks, STOPS, capture=capture)
    talks = ConversationEngine(
        engine, environment, "tool", encode, max_turns, longest, groups, threads=2
    )
    return engine, talks


SETTINGS = SamplingSettings(samples=3, max_new_tokens=8, seed=5)


def test_a_conversation_goes_on_until_the_environment_ends_it():
    """Each answer is the engine's answer to everything before it."""
    from megatron_rl.rollout.conversation import turn_seed
    from tests.support.tiny import random_prompts

    asked = []

    def environment(record, turns):
        asked.append((record["index"], turns))
        return None if len(turns) == 3 or len(turns[0].split()) < 3 else f"tool {record['index']}"

    engine, talks = conversations(environment)
    prompts = random_prompts([4, 7])
    first = engine.generate(prompts, SETTINGS)
    found = talks.generate(prompts, SETTINGS)
    ways = set()
    for prompt, before, now in zip(prompts, first, found, strict=True):
        assert now.prompt is prompt
        for number, (one, talk) in enumerate(zip(before.completions, now.completions, strict=True)):
            goes_on = one.finished and len(one.text.split()) >= 3
            ways.add((one.finished, goes_on))
            if not goes_on:
                assert talk.tokens.tolist() == one.tokens.tolist() and talk.written is None
                continue
            reply = encode(f"tool {prompt.index}")
            tokens = np.concatenate([prompt.tokens, one.tokens, reply])
            asking = Prompt(prompt.index, tokens, "", {}, occurrence=number)
            again = SamplingSettings(samples=1, max_new_tokens=8, seed=turn_seed(5, 1))
            ((second,),) = (group.completions for group in engine.generate([asking], again))
            assert talk.tokens.tolist() == [*one.tokens, *reply, *second.tokens]
            counts = (len(one.tokens), True), (len(reply), False), (len(second.tokens), True)
            assert talk.written.tolist() == [ours for count, ours in counts for _ in range(count)]
            expected = [*one.logprobs, *second.logprobs]
            np.testing.assert_allclose(talk.written_logprobs, expected, atol=1e-5)
            assert talk.finished == second.finished and talk.judged_text == second.text
            assert talk.text == f"{one.text}tool {prompt.index}{second.text}"
    assert (True, True) in ways and len(ways) > 1
    assert {len(turns) for _, turns in asked} == {1, 3}


def test_the_turns_of_a_conversation_have_random_numbers_of_their_own():
    from megatron_rl.rollout.conversation import turn_seed

    seeds = [turn_seed(seed, turn) for seed in (0, 1, 7 << 32) for turn in (1, 2, 3)]
    assert len(set(seeds)) == 9 and all(0 <= seed < 2**63 for seed in seeds)
    assert turn_seed(1, 1) == turn_seed(1, 1)


def test_a_conversation_ends_where_there_is_no_room_and_after_the_last_turn():
    from tests.support.tiny import random_prompts

    prompts = random_prompts([4, 4, 4, 4])
    lengths = {}
    for max_turns, longest in ((1, 64), (2, 64), (9, 64), (9, 30), (9, 12)):
        _, talks = conversations(lambda record, turns: "more", max_turns, longest)
        groups = talks.generate(prompts, SETTINGS)
        answers = [one for group in groups for one in group.completions]
        spans = [
            1 if one.written is None else 1 + int((np.diff(one.written.astype(int)) == 1).sum())
            for one in answers
        ]
        assert max(spans) <= max_turns
        assert all(4 + len(one.tokens) <= longest for one in answers)
        for one in answers:  # a reply without an answer is dropped
            assert one.written is None or one.written[-1]
        lengths[max_turns, longest] = max(spans)
    assert lengths[1, 64] == 1 and lengths[2, 64] == 2
    assert lengths[9, 64] > lengths[9, 30] > lengths[9, 12] == 1


def test_an_environment_that_fails_ends_the_run_with_its_place():
    from tests.support.tiny import random_prompts

    def broken(record, turns):
        raise KeyError("no such tool")

    for environment, message in (
        (broken, r"the environment 'tool' raised KeyError 'no such tool' \(.*test_turns.py:\d+\)"),
        (lambda record, turns: 3, "raised TypeError it returned int, not a text .* on problem 0"),
    ):
        _, talks = conversations(environment)
        with pytest.raises(RunFailed, match=message):
            talks.generate(random_prompts([4]), SETTINGS)

    def refuses(record, turns):
        raise UserError("no tool; expected one; add it")

    _, talks = conversations(refuses)
    with pytest.raises(UserError, match="no tool; expected one; add it"):
        talks.generate(random_prompts([4]), SETTINGS)


def test_experts_of_a_conversation_are_those_that_one_pass_over_it_chooses():
    from tests.support.tiny import random_prompts

    engine, talks = conversations(lambda record, turns: "more", routes=True)
    prompts = random_prompts([4, 7])
    settings = SamplingSettings(samples=3, max_new_tokens=8, seed=5, routes=True)
    checked = 0
    for group in talks.generate(prompts, settings):
        for talk in group.completions:
            if talk.written is None:
                continue
            whole = np.concatenate([group.prompt.tokens, talk.tokens])
            asking = Prompt(0, whole, "", {})
            once = SamplingSettings(samples=1, max_new_tokens=1, routes=True, greedy=True)
            ((one,),) = (group.completions for group in engine.generate([asking], once))
            ids = np.sort(one.routed_experts.ids, axis=-1)
            assert np.sort(talk.routed_experts.ids, axis=-1).tolist() == ids[:-1].tolist()
            checked += 1
    assert checked > 2

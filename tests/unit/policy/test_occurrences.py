"""A problem that a step draws several times gets other answers each time."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from megatron_rl.records import Prompt
from megatron_rl.rollout.engine import SamplingSettings
from tests.support import hugging_face, reinforce
from tests.support.fake_server import FakeServer, hugging_face_model, toy_model
from tests.support.layouts import policy_of
from tests.support.server_engine import build_on, config_of
from tests.support.tiny import tiny_config, tiny_engine

SAMPLES, DRAWN = 4, 6


def problems(count):
    """Problems that random tokens do not solve."""
    return reinforce.problems([5, 3, 8][:count])


def answers_of_a_step(config, prompts, make_engine):
    """Index of a problem -> the answers that one step of a run samples to it, decoded."""
    with policy_of(config) as policy:
        session, task = reinforce.task_of(policy, prompts, make_engine)
        task.step(1, session.new_sums())
        found = defaultdict(list)
        for row in task.samples():
            found[row["index"]].append(row["completion"])
    return found


def settings(**rollout):
    """Sections of a step of 6 draws with 4 answers each."""
    shared = {"prompts_per_step": DRAWN, "samples_per_prompt": SAMPLES, "max_new_tokens": 12}
    return {
        "rollout": {**shared, **rollout},
        "algorithm": {"mini_batches": 1},
        "observe": {"samples": 1000},
    }


def builtin(policy):
    return tiny_engine(policy.config, policy.groups, policy.transformer, policy.chunks)


def test_three_draws_of_a_problem_give_as_many_answers_as_they_ask_for():
    config = tiny_config(**settings())
    found = answers_of_a_step(config, problems(2), builtin)
    assert {index: len(answers) for index, answers in found.items()} == {0: 12, 1: 12}
    assert [len(set(answers)) for answers in found.values()] == [12, 12]


def test_draws_of_a_round_of_dynamic_sampling_differ_as_well():
    """Nothing is solved, so two rounds are drawn, each with every problem twice."""
    config = tiny_config(**settings(dynamic_sampling=True, max_rounds=2))
    found = answers_of_a_step(config, problems(3), builtin)
    # the batch is filled up with the six draws of the first round
    assert {index: len(answers) for index, answers in found.items()} == {0: 8, 1: 8, 2: 8}
    assert [len(set(answers)) for answers in found.values()] == [8, 8, 8]


def test_servers_are_asked_with_other_seeds(tmp_path):
    directory = hugging_face.save("qwen3_moe", tmp_path / "hf")
    with FakeServer(toy_model(), hugging_face_model) as server:
        config = config_of(directory, tmp_path / "run", [server.url])
        update = {**settings()["rollout"], "lag": 0}
        config = config.model_copy(
            update={
                "rollout": config.rollout.model_copy(update=update),
                "algorithm": config.algorithm.model_copy(update={"mini_batches": 1}),
                "observe": config.observe.model_copy(update={"samples": 1000}),
            }
        )
        found = answers_of_a_step(
            config,
            problems(2),
            lambda policy: build_on(config, policy.chunks, policy.groups, []),
        )
        asked = [body for body in server.asked if body["sampling_params"]["n"] == SAMPLES]
    assert len(asked) == DRAWN
    seeds = Counter(
        body["sampling_params"]["seed"] + number for body in asked for number in range(SAMPLES)
    )
    assert max(seeds.values()) == 1 and len(seeds) == 24
    assert [len(set(answers)) for answers in found.values()] == [12, 12]


def test_the_draws_together_are_those_of_one_with_more_answers():
    """So a problem that is drawn once has the answers it always had."""
    from megatron_rl.data.prompts import number_occurrences

    with policy_of(tiny_config()) as policy:
        engine = builtin(policy)
        (prompt,) = problems(1)
        (whole,) = engine.generate([prompt], SamplingSettings(12, 10, seed=3))
        drawn = number_occurrences([prompt] * 3, Counter())
        assert [p.occurrence for p in drawn] == [0, 1, 2]
        parts = engine.generate(drawn, SamplingSettings(4, 10, seed=3))
        joined = [answer.tokens.tolist() for group in parts for answer in group.completions]
    assert joined == [answer.tokens.tolist() for answer in whole.completions]


def test_occurrences_are_counted_over_all_draws_of_a_step():
    from megatron_rl.data.prompts import number_occurrences

    prompts = [Prompt(i, np.array([1]), "", {}) for i in range(2)]
    drawn = Counter()
    first = number_occurrences([*prompts, prompts[1]], drawn)
    second = number_occurrences(prompts, drawn)
    assert [(p.index, p.occurrence) for p in first] == [(0, 0), (1, 0), (1, 1)]
    assert [(p.index, p.occurrence) for p in second] == [(0, 1), (1, 2)]


@pytest.mark.parametrize("samples", [1, 4])
def test_answers_of_a_prompt_never_share_a_seed(samples):
    """Wherever the first seed of a prompt falls, also at the end of the range."""
    from megatron_rl.rollout.servers.answer_requests import SEEDS, answer_seed

    for index in range(200):
        firsts = [answer_seed(7, index, occurrence * samples) for occurrence in range(3)]
        assert firsts[0] == answer_seed(7, index)
        seeds = {first + number for first in firsts for number in range(samples)}
        assert len(seeds) == 3 * samples and max(seeds) < 2**31
    first = answer_seed(7, 0)
    assert answer_seed(7, 0, SEEDS - first) == 0

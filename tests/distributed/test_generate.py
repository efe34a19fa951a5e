"""Generation on several ranks gives, token for token, what a single process gives."""

import dataclasses

import numpy as np
import pytest

from megatron_rl.rollout.engine import SamplingSettings
from tests.support.ranks import run_on_ranks
from tests.support.tiny import build_tiny, random_prompts, tiny_config, tiny_engine

LENGTHS = [5, 1, 12, 7, 3]
SETTINGS = SamplingSettings(samples=3, max_new_tokens=12, temperature=0.9, top_p=0.95, seed=4)
GREEDY = SamplingSettings(samples=1, max_new_tokens=12, greedy=True)


def generate(parallel, shares, settings, max_batch):
    """On a rank: answers to its prompts, as [(index, tokens, logprobs, finished, text)]."""
    import torch.distributed as dist

    config = tiny_config(parallel=parallel, model={"num_layers": 4})
    engine = tiny_engine(config, *build_tiny(config), max_batch=max_batch)
    first, end = shares[dist.get_rank()]
    groups = engine.generate(random_prompts(LENGTHS)[first:end], settings)
    return [
        (group.prompt.index, answer.tokens, answer.logprobs, answer.finished, answer.text)
        for group in groups
        for answer in group.completions
    ]


@pytest.fixture(scope="module")
def single():
    """The answers of one process: {settings: answers}."""
    whole = [(0, len(LENGTHS))]
    return {
        settings: run_on_ranks(1, generate, {}, whole, settings, 64)[0]
        for settings in (SETTINGS, GREEDY)
    }


def assert_same(answers, expected):
    assert len(answers) == len(expected)
    for (*names, logprobs, finished, text), (*other, reference, was_finished, same) in zip(
        answers, expected
    ):
        assert names[0] == other[0] and names[1].tolist() == other[1].tolist()
        np.testing.assert_allclose(logprobs, reference, atol=1e-5)
        assert (finished, text) == (was_finished, same)


def routes(parallel, share):
    """On a rank: {(prompt, number of the answer, layer): experts of its tokens}."""
    from megatron_rl.models.gpt.chunk import routers_of
    from megatron_rl.router.capture import RouterCapture

    config = tiny_config(parallel=parallel, model={"num_layers": 4, "moe_layer_freq": [0, 1, 1, 1]})
    built = build_tiny(config)
    held = [
        [layer.layer_number for layer in chunk.decoder.layers if layer.layer_number > 1]
        for chunk in built[2]
    ]
    capture = RouterCapture(routers_of(built[2]), held)
    engine = tiny_engine(config, *built, max_batch=4, capture=capture)
    prompts = random_prompts(LENGTHS)[share[0] : share[1]]
    found = {}
    for group in engine.generate(prompts, dataclasses.replace(SETTINGS, routes=True)):
        for number, answer in enumerate(group.completions):
            experts = answer.routed_experts
            tokens = len(group.prompt.tokens) + len(answer.tokens) - 1
            assert experts.ids.shape == (tokens, len(experts.layers), 2)
            assert experts.ids.dtype == np.uint8
            for column, layer in enumerate(experts.layers):
                found[group.prompt.index, number, layer] = experts.ids[:, column].tolist()
    return found


@pytest.mark.parametrize(
    ("ranks", "parallel", "shares"),
    [
        (2, {"tensor": 2}, [(0, 5)] * 2),
        pytest.param(2, {"expert": 2}, [(0, 1), (1, 5)], marks=pytest.mark.slow),
        (2, {"context": 2}, [(0, 5)] * 2),
        pytest.param(2, {"pipeline": 2}, [(0, 5)] * 2, marks=pytest.mark.slow),
        (2, {"pipeline": 2, "virtual_pipeline": 2}, [(0, 5)] * 2),
        pytest.param(
            4,
            {"tensor": 2, "pipeline": 2, "expert": 2},
            [(0, 5)] * 4,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["tensor", "expert", "context", "pipeline", "interleaved", "together"],
)
def test_experts_of_the_tokens_are_those_of_a_single_process(ranks, parallel, shares):
    (expected,) = run_on_ranks(1, routes, {}, (0, 5))
    found = {}
    for rank, answers in enumerate(run_on_ranks(ranks, _routes_of_share, parallel, shares)):
        stage_layers = {layer for _, _, layer in answers}
        assert stage_layers < {2, 3, 4} or parallel.get("pipeline", 1) == 1, rank
        for name, ids in answers.items():
            assert found.setdefault(name, ids) == ids  # copies on other ranks
    assert found == expected


def _routes_of_share(parallel, shares):
    import torch.distributed as dist

    return routes(parallel, shares[dist.get_rank()])


def of_prompts(expected, first, end):
    return [answer for answer in expected if first <= answer[0] < end]


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("shares", [[(0, 2), (2, 5)], [(0, 5), (5, 5)], [(0, 0), (0, 1)]])
def test_expert_parallel_ranks_with_their_own_prompts(single, shares, dispatcher):
    parallel = {"expert": 2, "dispatcher": dispatcher}
    results = run_on_ranks(2, generate, parallel, shares, SETTINGS, 4)
    for answers, (first, end) in zip(results, shares):
        assert_same(answers, of_prompts(single[SETTINGS], first, end))


def test_split_experts_without_expert_parallelism(single):
    shares = [(0, 4), (4, 5)]
    parallel = {"expert_tensor": 2}
    results = run_on_ranks(2, generate, parallel, shares, SETTINGS, 64)
    for answers, (first, end) in zip(results, shares):
        assert_same(answers, of_prompts(single[SETTINGS], first, end))


@pytest.mark.parametrize("settings", [SETTINGS, GREEDY], ids=["sampled", "greedy"])
@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor": 2, "expert_tensor": 2},
        {"tensor": 2, "expert": 2},
        {"pipeline": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
    ],
    ids=["tensor", "tensor-expert", "pipeline", "interleaved"],
)
def test_one_replica_over_two_ranks(single, parallel, settings):
    whole = (0, len(LENGTHS))
    for answers in run_on_ranks(2, generate, parallel, [whole, whole], settings, 5):
        assert_same(answers, single[settings])


def test_tensor_pipeline_and_expert_parallel_together(single):
    shares = [(0, 5)] * 4
    parallel = {"tensor": 2, "pipeline": 2, "expert": 2}
    for answers in run_on_ranks(4, generate, parallel, shares, SETTINGS, 64):
        assert_same(answers, single[SETTINGS])


def test_expert_parallel_over_pipelines_with_their_own_prompts(single):
    shares = [(0, 3), (3, 5), (0, 3), (3, 5)]  # stages are the slowest axis of the ranks
    parallel = {"pipeline": 2, "expert": 2}
    results = run_on_ranks(4, generate, parallel, shares, SETTINGS, 4)
    for answers, (first, end) in zip(results, shares):
        assert_same(answers, of_prompts(single[SETTINGS], first, end))


def test_answers_end_at_different_lengths(single):
    """The other tests are about rows that leave at different steps."""
    lengths = {len(answer[1]) for answer in single[SETTINGS]}
    assert len(lengths) > 2 and max(lengths) == 12


@pytest.mark.parametrize(
    ("ranks", "parallel", "num_prompts"),
    [
        (2, {"context": 2}, 5),
        (2, {"context": 2}, 1),
        (2, {"context": 2, "expert": 2}, 5),
        (2, {"context": 2, "expert": 2}, 1),
        (4, {"context": 2, "tensor": 2, "expert": 2}, 5),
        (4, {"context": 2, "pipeline": 2}, 5),
    ],
)
def test_context_parallel_ranks_share_their_prompts(single, ranks, parallel, num_prompts):
    shares = [(0, num_prompts)] * ranks
    expected = of_prompts(single[SETTINGS], 0, num_prompts)
    for answers in run_on_ranks(ranks, generate, parallel, shares, SETTINGS, 4):
        assert_same(answers, expected)


def test_no_prompts_on_context_parallel_ranks():
    assert run_on_ranks(2, generate, {"context": 2}, [(0, 0)] * 2, SETTINGS, 4) == [[], []]

"""A step whose packs the sampler has scored: no pass, the same training; and what is wrong in
the sampler's numbers is found.
"""

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch

from tests.support.layouts import policy_of, relative, whole_weights
from tests.support.reinforce import problems, task_of
from tests.support.tiny import tiny_config, tiny_engine

LENGTHS = (5, 3, 8, 4, 6, 9, 2, 7)
ADVANTAGES = torch.linspace(-1.0, 1.4, 16).view(8, 2)


class Warnings:
    """A console that keeps warnings."""

    def __init__(self):
        self.texts = []

    def warn(self, text):
        self.texts.append(text)

    def phase(self, *args):
        pass


class Spoiled:
    """The built-in engine with other numbers in its answers."""

    def __init__(self, engine, spoil):
        self._engine, self._spoil = engine, spoil

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def begin(self, prompts, settings):
        groups = self._engine.generate(prompts, settings)
        changed = [
            dataclasses.replace(group, completions=tuple(map(self._spoil, group.completions)))
            for group in groups
        ]
        return lambda: changed


def higher(answer):
    """Log-probabilities of tokens that are off by ten times the tolerance."""
    return dataclasses.replace(answer, logprobs=answer.logprobs + np.float32(1e-3))


def other_routers(answer):
    """The same of the routers."""
    routed = answer.routed_experts
    routed = dataclasses.replace(routed, logprobs=routed.logprobs - np.float32(1e-3))
    return dataclasses.replace(answer, routed_experts=routed)


def no_numbers(answer):
    """Routers without numbers."""
    routed = answer.routed_experts
    routed = dataclasses.replace(routed, logprobs=routed.logprobs * np.float32("nan"))
    return dataclasses.replace(answer, routed_experts=routed)


def steps(scores, spoil=None, plan=None, number=2, rollout=None, **algorithm):
    """(metrics of each step, weights, warnings, packs that each step scored by a pass)."""
    from megatron_rl.policy import score
    from megatron_rl.tasks import reinforce

    config = tiny_config(
        rollout={
            "prompts_per_step": 8, "samples_per_prompt": 2, "max_new_tokens": 10, "scores": scores,
            **(rollout or {}),
        },
        algorithm={"name": "rspo", "mini_batches": 4, **algorithm},
        data={"pack_tokens": 24, "pack_multiple": 8},
        optimizer={"lr": 3e-3},
    )  # fmt: skip
    console, passes, found = Warnings(), [], []
    run_schedule = score.run_schedule

    def counted(policy, packs, *args, **kwargs):
        passes[-1] += len(packs)
        return run_schedule(policy, packs, *args, **kwargs)

    def engine_of(policy):
        engine = tiny_engine(config, policy.groups, policy.transformer, policy.chunks,
                             capture=policy.capture, plan=plan)  # fmt: skip
        return Spoiled(engine, spoil or (lambda answer: answer))

    with (
        policy_of(config) as policy,
        mock.patch.object(score, "run_schedule", counted),
        mock.patch.object(reinforce, "global_advantages", lambda *_: ADVANTAGES),
    ):
        session, task = task_of(policy, problems(LENGTHS), engine_of, console)
        for step in range(1, number + 1):
            passes.append(0)
            sums = session.new_sums()
            telemetry = task.step(step, sums)
            found.append({**sums.reduce(policy.groups.world), **telemetry})
        return found, whole_weights(policy), console.texts, passes


@pytest.fixture(scope="module")
def by_pass():
    """The run that scores everything."""
    return steps("pass")


def test_a_sampled_score_trains_as_a_pass_without_one(by_pass):
    metrics, weights, warned, passes = steps("sampler")
    assert not warned and passes == [0, 0]
    assert min(by_pass[3]) >= 6  # two packs or more of each of the last three mini-batches
    for found, expected in zip(metrics, by_pass[0], strict=True):
        assert found["mismatch/router_logprob_max"] < 2e-5 and found["mismatch/router_flips"] == 0
        for name in ("loss", "grad_norm", "router/gamma_mean", "router/raw_gamma_min"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
        assert expected["router/raw_gamma_min"] < 0.99
    assert max(relative(weights[name], value) for name, value in by_pass[1].items()) < 1e-5


def test_auto_is_the_sampler_and_repeats_itself_bit_for_bit():
    first, second = steps("auto"), steps("sampler")
    assert first[3] == second[3] == [0, 0]
    assert all(np.array_equal(second[1][name], value) for name, value in first[1].items())
    assert [row["loss"] for row in first[0]] == [row["loss"] for row in second[0]]


@pytest.mark.parametrize("spoil", [higher, other_routers, no_numbers])
def test_wrong_numbers_are_found_and_the_step_is_scored_by_a_pass(spoil, by_pass):
    metrics, weights, warned, passes = steps("auto", spoil)
    assert len(warned) == 1 and "scored by a pass, not by the sampler: " in warned[0]
    assert passes == by_pass[3]
    assert all(np.array_equal(weights[name], value) for name, value in by_pass[1].items())
    assert [row["loss"] for row in metrics] == [row["loss"] for row in by_pass[0]]


KEPT = {"top_p": 0.9, "temperature": 0.8, "keep_sampling_mask": True}


def test_over_kept_tokens_the_ratio_to_the_sampler_is_one():
    """By a pass, and by the sampler; and the sets are a part of the vocabulary."""
    sizes = []

    def counted(answer):
        sizes.extend(answer.kept.sizes)
        return answer

    by_pass, weights, _, _ = steps("pass", counted, number=1, rollout=KEPT)
    metrics, found, warned, passes = steps("sampler", number=1, rollout=KEPT)
    assert not warned and passes == [0]
    assert by_pass[0]["mismatch/logprob_max"] < 2e-5
    assert (
        by_pass[0]["entropy"]
        < steps("pass", number=1, rollout={"temperature": 0.8})[0][0]["entropy"]
    )
    assert len(set(sizes)) > 5 and 1 <= min(sizes) and max(sizes) < 40
    assert metrics[0]["loss"] == pytest.approx(by_pass[0]["loss"], rel=1e-5, abs=1e-6)
    assert max(relative(found[name], value) for name, value in weights.items()) < 1e-5


def test_without_the_sets_the_same_answers_are_further_off():
    def without(answer):
        return dataclasses.replace(answer, kept=None)

    metrics, *_ = steps("pass", without, number=1, rollout=KEPT)
    assert metrics[0]["mismatch/logprob_max"] > 0.05


def test_without_router_shift_the_sampler_gives_no_trace():
    def refuses(answer):
        assert answer.routed_experts is None
        return answer

    expected, weights, _, all_scored = steps("pass", name="grpo", number=1)
    metrics, found, warned, passes = steps("auto", refuses, name="grpo", number=1)
    assert not warned and passes == [0] and all_scored[0] >= 6
    assert metrics[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5, abs=1e-6)
    assert max(relative(found[name], value) for name, value in weights.items()) < 1e-5


def test_modules_give_no_trace_and_a_pass_scores(by_pass):
    from megatron_rl.rollout.builtin.plain.plan import Plan

    _, _, warned, passes = steps("sampler", plan=Plan("the test wants modules"), number=1)
    assert warned == [
        "scored by a pass, not by the sampler: answers are decoded through Megatron's modules, "
        "which give no router trace"
    ]
    assert passes == by_pass[3][:1]

"""Training on conversations of two turns, and a slow version of the same: one sequence after the
other, plain loops for the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_rl.records import Sample
from megatron_rl.rewards.base import Reward
from megatron_rl.rollout.collect import ScoredGroup, to_samples
from megatron_rl.rollout.engine import SamplingSettings
from tests.support.layout_cases import Case
from tests.support.layouts import (
    gathered,
    layout_config,
    observed_update,
    policy_of,
    unshard_gradients,
)
from tests.support.slow_losses import slow_loss
from tests.support.tiny import random_prompts, spell

#: Tokens that end an answer: of random weights each is as likely as another.
STOPS = tuple(range(0, 128, 6))
TOOL = (101, 102, 103)  #: what the environment says


def tool(record: Mapping[str, Any], turns: Sequence[str]) -> str | None:
    """An environment that says one thing once, where the answer has a first token below 100."""
    words = turns[0].split()
    return " ".join(map(str, TOOL)) if len(turns) == 1 and words and int(words[0]) < 100 else None


def sampled(policy: Any, routes: bool = False) -> list[Sample]:
    """This rank's samples: the built-in engine's answers to eight problems, and to the tool."""
    from megatron_rl.rollout.builtin.generate import BuiltinEngine
    from megatron_rl.rollout.conversation import ConversationEngine

    longest = policy.config.model.max_sequence_length
    engine = BuiltinEngine(
        policy.chunks, policy.groups, policy.transformer, STOPS, 6, spell, longest, policy.capture
    )
    talks = ConversationEngine(
        engine,
        tool,
        "tool",
        lambda text: [int(word) for word in text.split()],
        max_turns=2,
        max_sequence_length=longest,
        groups=policy.groups,
        threads=1,
    )
    data = policy.groups.data
    prompts = random_prompts([5, 1, 9, 3])
    settings = SamplingSettings(samples=2, max_new_tokens=14, seed=3, routes=routes)
    groups = talks.generate(prompts[data.rank() :: data.size()], settings)
    advantages = np.linspace(-1.0, 2.0, 8).reshape(4, 2)[data.rank() :: data.size()]
    rewards = (Reward(1.0, {}, ""),) * 2
    return to_samples([ScoredGroup(group, rewards) for group in groups], advantages)


def scored(policy: Any, samples: list[Sample]) -> list[Any]:
    """The samples' packs, scored."""
    from megatron_rl.policy.batch import pack_mini_batches
    from megatron_rl.policy.score import score

    device = policy.device.torch_device
    (packs,) = pack_mini_batches([samples], policy.config, policy.groups, device)
    return score(policy, packs, with_traces=True)


def two_updates(case: Case, judge: bool) -> dict[str, Any]:
    """On a rank: samples, and of the second update on them loss, gradients and expectations.

    ``judge``: work the expectations out, on one rank: ``slow`` loss and gradients.
    """
    from megatron_rl.policy.update import update
    from megatron_rl.router.telemetry import RouterTelemetry

    config = layout_config(case)
    optimizer = config.optimizer.model_copy(update={"clip_grad": 0.0, "lr": 3e-4})
    with policy_of(config.model_copy(update={"optimizer": optimizer})) as policy:
        samples = sampled(policy)
        items = scored(policy, samples)
        telemetry = RouterTelemetry(4, 8, policy.device.torch_device)
        before = [_alone(policy, sample).detach() for sample in samples] if judge else []
        observed_update(policy, items, telemetry, update)
        slow = _slow(policy, samples, before) if judge else None
        scalars = observed_update(policy, items, telemetry, update)[0]
        unshard_gradients(policy)
        return {
            "samples": [(s.tokens.tolist(), s.written.tolist(), s.advantage) for s in samples],
            "loss": scalars["loss"],
            "gradients": gathered(policy, "main_grad"),
            "slow": slow,
        }


def _alone(policy: Any, sample: Sample) -> Any:
    """Log-probability of each token but the first, the sequence alone in a row: fp32 [M - 1]."""
    import torch

    from megatron_rl.models.attention import packed_placement
    from megatron_rl.models.forward import forward_row

    tokens = torch.from_numpy(sample.tokens)
    placement = packed_placement([len(tokens)], len(tokens), torch.device("cpu"))
    logits = forward_row(policy.chunks[0], tokens, placement).squeeze(0)
    return logits.log_softmax(-1)[:-1].gather(1, tokens[1:, None]).squeeze(1)


def _slow(policy: Any, samples: list[Sample], before: list[Any]) -> tuple[float, dict]:
    """(loss, gradients by name) of the samples under the weights of now."""
    import torch

    from megatron_rl.catalogue.find import find
    from megatron_rl.catalogue.kinds import LOSSES
    from megatron_rl.models.parameters import parameter_views

    algorithm = policy.config.algorithm
    new, old, mask, weights, advantages, ids = [], [], [], [], [], []
    for number, (sample, earlier) in enumerate(zip(samples, before, strict=True)):
        new.append(_alone(policy, sample).double())
        for place in range(1, len(sample.tokens)):
            pi, mu = float(earlier[place - 1]), float(sample.rollout_logprobs[place])
            ours = bool(sample.written[place])
            old.append(pi)
            mask.append(ours)
            weights.append(min(math.exp(pi - mu), 2.0) if ours else math.nan)
            advantages.append(sample.advantage)
            ids.append(number)
    settings = find(LOSSES, algorithm.name).settings(**algorithm.settings).model_dump()
    total, count = slow_loss(
        algorithm.name,
        torch.cat(new),
        old,
        advantages,
        mask,
        ids,
        settings,
        sampler_weights=weights,
    )
    parameters = list(policy.chunks[0].parameters())
    found = torch.autograd.grad(total / count, parameters)
    of = {id(parameter): value for parameter, value in zip(parameters, found, strict=True)}
    views = parameter_views(policy.chunks, policy.groups)
    gradients = {view.name: view.of(of[id(view.parameter)]).numpy() for view in views}
    return float(total.detach()) / count, gradients

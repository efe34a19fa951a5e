"""Tries a loss, an advantage estimator or a correction on a small made batch: what are its traits?

Before a run starts, a user's own is checked against the traits that it declares. A test checks the
rows of this package.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Callable

import torch

from megatron_rl.algorithms.aggregate import count_of, make_segments
from megatron_rl.algorithms.interface import LossInputs, LossOutputs, SamplerWeights
from megatron_rl.catalogue.blame import blame
from megatron_rl.catalogue.entry import AdvantagesEntry, CorrectionEntry, LossEntry
from megatron_rl.catalogue.settings import Settings
from megatron_rl.errors import UserError

_METRIC = re.compile(r"[a-z][a-z0-9_]*(/[a-z0-9_]+)*")


def check_loss(row: LossEntry, settings: Settings | None) -> None:
    """UserError: the loss raises, gives something else than `LossOutputs`, has no gradient, or has
    other traits than its row declares.
    """
    loss = row.bind(settings)
    who = f"the loss {row.name!r}, tried on a small batch,"
    with blame(who, "correct the loss"):
        outputs = loss(made_inputs(router_shift=1.0))
    _check_outputs(who, outputs)
    for trait, found in traits_of(loss, row.name).items():
        declared = getattr(row, trait)
        if found != declared:
            raise UserError(
                f"{who} has {trait} {found!r} and declares {declared!r}; expected the same; "
                "correct the loss, or what its decorator says"
            )


def traits_of(loss: Callable[[LossInputs], LossOutputs], name: str) -> dict[str, Any]:
    """The traits of `LossEntry` as a small batch shows them. UserError: the loss raises."""
    with blame(f"the loss {name!r}, tried on a small batch,", "correct the loss"):
        full = loss(made_inputs(router_shift=1.0))
        shifted = loss(made_inputs(router_shift=0.5))
        weighed = loss(made_inputs(router_shift=1.0, sampler_weights=0.5))
        plain = _gives(loss, made_inputs())
        # Losses over tokens refuse that mode.
        mean = _gives(loss, made_inputs(router_shift=0.5, shift_mode="token_weight"))
    inputs = made_inputs()
    segments = make_segments(inputs.mask, inputs.sequence_ids, inputs.num_sequences)
    counts = {what: count_of(what, segments).item() for what in ("tokens", "sequences")}
    count = full.denominator.item()
    reacts = not torch.equal(_value(full), _value(shifted))
    return {
        "denominator": next((what for what, n in counts.items() if n == count), count),
        "router_shift": "needed" if plain is None else "optional" if reacts else "ignored",
        "geometric": mean is not None and not torch.equal(_value(full), _value(mean)),
        "sampler_weights": not torch.equal(_value(full), _value(weighed)),
    }


def shift_has_a_gradient(row: LossEntry, settings: Settings | None) -> bool:
    """Whether the loss's gradient with respect to gamma~ is other than 0, on a small batch."""
    inputs = dataclasses.replace(made_inputs(router_shift=0.9), shift_attached=True)
    assert inputs.router_shift is not None, "just made"
    gamma = inputs.router_shift.requires_grad_()
    (gradient,) = torch.autograd.grad(row.bind(settings)(inputs).loss_sum, gamma, allow_unused=True)
    return gradient is not None and bool((gradient != 0).any())


def check_advantages(row: AdvantagesEntry, settings: Settings | None) -> None:
    """UserError: the estimator raises, or gives something else than finite numbers [P, G]."""
    rewards = torch.tensor([[1.0, 0.0, 0.25], [0.5, 0.5, 0.5]])
    who = f"the advantage estimator {row.name!r}, tried on rewards of 2 prompts with 3 answers,"
    with blame(who, "correct the estimator"):
        found = row.bind(settings)(rewards.clone())
    _check_numbers(who, found, rewards.shape)


def check_correction(row: CorrectionEntry, settings: Settings | None) -> None:
    """UserError: the correction raises, or gives something else than `SamplerWeights` [T]."""
    inputs = made_inputs()
    who = f"the correction {row.name!r}, tried on a small batch,"
    with blame(who, "correct the correction"):
        found = row.bind(settings)(inputs)
    if not isinstance(found, SamplerWeights):
        raise UserError(f"{who} gives {type(found).__name__}; expected SamplerWeights")
    _check_numbers(f"{who} as weights", found.weights, inputs.mask.shape)
    clipped = found.clipped
    if clipped.shape != inputs.mask.shape or clipped.dtype != torch.bool:
        raise UserError(
            f"{who} gives clipped {list(clipped.shape)} of {clipped.dtype}; expected bool "
            f"{list(inputs.mask.shape)}"
        )


def made_inputs(
    router_shift: float | None = None,
    sampler_weights: float | None = None,
    shift_mode: str = "ratio",
) -> LossInputs:
    """Three answers of 4, 1 and 2 trained tokens, and a token of padding.

    ``router_shift``, ``sampler_weights``: of every second token; the others have 1; None: none are
    given. Ratios are off 1 by more than most clips.
    """
    new = torch.tensor([-1.0, -0.4, -2.1, -0.3, -0.9, -1.2, -0.8, 0.0])
    old = torch.tensor([-0.7, -0.5, -2.0, -0.9, -0.8, -1.3, -0.7, 0.0])

    def every_second(value: float | None) -> torch.Tensor | None:
        return None if value is None else torch.tensor([1.0, value] * 4)

    return LossInputs(
        logprobs=new.requires_grad_(),
        old_logprobs=old,
        advantages=torch.tensor([1.0] * 4 + [-1.0] + [0.5] * 2 + [0.0]),
        mask=torch.tensor([True] * 7 + [False]),
        sequence_ids=torch.tensor([0] * 4 + [1] + [2] * 2 + [3]),
        router_shift=every_second(router_shift),
        rollout_logprobs=old + 0.1,
        ref_logprobs=old,
        num_sequences=3,
        shift_mode=shift_mode,
        sampler_weights=every_second(sampler_weights),
        entropy=torch.ones_like(old),
    )


def _gives(loss: Callable[[LossInputs], LossOutputs], inputs: LossInputs) -> LossOutputs | None:
    """The loss; None: it refuses such inputs."""
    try:
        return loss(inputs)
    except ValueError:
        return None


def _value(outputs: LossOutputs) -> torch.Tensor:
    return outputs.loss_sum.detach()


def _check_outputs(who: str, outputs: Any) -> None:
    if not isinstance(outputs, LossOutputs):
        raise UserError(f"{who} gives {type(outputs).__name__}; expected LossOutputs")
    for name in ("loss_sum", "denominator"):
        value = getattr(outputs, name)
        if not isinstance(value, torch.Tensor) or value.dim() or not torch.isfinite(value):
            raise UserError(f"{who} has {name} {value!r}; expected a finite 0-d tensor")
    if not outputs.loss_sum.requires_grad:
        raise UserError(
            f"{who} has a loss_sum without gradient; expected one that depends on inputs.logprobs"
        )
    for name in outputs.metrics:
        if not _METRIC.fullmatch(name):
            raise UserError(
                f"{who} has a metric {name!r}; expected lower-case letters, digits and underscores"
            )


def _check_numbers(who: str, found: Any, shape: torch.Size) -> None:
    if not isinstance(found, torch.Tensor) or found.shape != shape:
        what = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise UserError(f"{who} gives {what}; expected a tensor {list(shape)}")
    if found.requires_grad or not torch.isfinite(found).all():
        raise UserError(f"{who} gives {found}; expected finite numbers without gradient")

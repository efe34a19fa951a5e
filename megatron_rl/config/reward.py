"""The verifiers that the section ``reward`` names, with weights and settings."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_rl.catalogue.entry import VerifierEntry
from megatron_rl.catalogue.find import find, label_of
from megatron_rl.catalogue.kinds import VERIFIERS
from megatron_rl.catalogue.read import read_settings
from megatron_rl.catalogue.settings import Settings
from megatron_rl.config.schema_reward import RewardConfig, RewardPart
from megatron_rl.errors import UserError

#: Names of metrics reward/NAME and eval/NAME that are not parts of a reward.
TAKEN = frozenset(("mean", "std", "problems", "samples"))
#: Parts with a fixed meaning.
_MEANT = frozenset(("solved", "well_formed", "overlong", "late"))
PART = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class ChosenVerifier:
    """A verifier of a run."""

    row: VerifierEntry
    settings: Settings | None
    label: str  #: a short name
    weight: float
    at_once: int
    deadline_s: float | None


def chosen_verifiers(reward: RewardConfig) -> tuple[ChosenVerifier, ...]:
    """The verifiers of a run: one, or those of ``reward.parts``.

    Raises:
        UserError: an unknown name, a mistake in the settings, two parts with one label, a label
            that cannot name a metric, ``reward.name`` beside parts.
    """
    if not reward.parts:
        return (_chosen("reward", reward, None, 1.0),)
    for field in ("name", "settings", "at_once", "deadline_s"):
        value = getattr(reward, field)
        if value != RewardConfig.model_fields[field].default:
            raise UserError(
                f"reward.{field} is {value} beside reward.parts; expected one of them; move it "
                "into a part"
            )
    found = tuple(
        _chosen(f"reward.parts.{number}", part, part.label, part.weight)
        for number, part in enumerate(reward.parts)
    )
    labels = [verifier.label for verifier in found]
    for number, label in enumerate(labels):
        twice = label in labels[:number]
        if twice or label in TAKEN | _MEANT or not PART.fullmatch(label):
            raise UserError(
                f"reward.parts.{number} is called {label!r}{' as another is' * twice}; expected a "
                "name of its own, of lower-case letters, digits and underscores, for its metrics, "
                f"and none of {', '.join(sorted(TAKEN | _MEANT))}; set reward.parts.{number}.label"
            )
    return found


def reward_text(reward: RewardConfig) -> str:
    """The reward as text: ``countdown``, or ``1 x countdown + 0.2 x brevity``."""
    if not reward.parts:
        return reward.name
    return " + ".join(f"{part.weight:g} x {part.label or part.name}" for part in reward.parts)


def _chosen(
    field: str, given: RewardConfig | RewardPart, label: str | None, weight: float
) -> ChosenVerifier:
    row = find(VERIFIERS, given.name, f"{field}.name")
    settings = read_settings(
        f"{field}.settings", f"the verifier {given.name}", row.settings, given.settings
    )
    label = label_of(given.name) if label is None else label
    return ChosenVerifier(row, settings, label, weight, given.at_once, given.deadline_s)

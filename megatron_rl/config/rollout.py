"""The engine and environment that the section ``rollout`` names, with their settings."""

from __future__ import annotations

from megatron_rl.catalogue.entry import EngineEntry, EnvironmentEntry
from megatron_rl.catalogue.find import find
from megatron_rl.catalogue.kinds import ENGINES, ENVIRONMENTS
from megatron_rl.catalogue.read import read_settings
from megatron_rl.catalogue.settings import Settings
from megatron_rl.config.schema_rollout import RolloutConfig


def engine_of(rollout: RolloutConfig) -> EngineEntry:
    """The engine. UserError: there is none of that name."""
    return find(ENGINES, rollout.engine)


def engine_settings(rollout: RolloutConfig) -> Settings | None:
    """Its settings. UserError: a mistake in them."""
    name = f"the rollout engine {rollout.engine}"
    return read_settings("rollout.settings", name, engine_of(rollout).settings, rollout.settings)


def engines_with(trait: str) -> str:
    """``vllm or sglang``: the engines of this package that have a trait of `EngineEntry`."""
    return " or ".join(row.name for row in ENGINES.rows if getattr(row, trait))


def truncates(rollout: RolloutConfig) -> bool:
    """Whether answers are drawn from fewer tokens than the vocabulary has."""
    return rollout.top_p < 1.0 or rollout.top_k > 0


def truncation_text(rollout: RolloutConfig) -> str | None:
    """What truncated sampling means for the trainer's log-probabilities; None: it is off."""
    if not truncates(rollout):
        return None
    on = [f"top_p {rollout.top_p:g}"] * (rollout.top_p < 1.0)
    on += [f"top_k {rollout.top_k}"] * (rollout.top_k > 0)
    cut = f"{' and '.join(on)} {'keep' if len(on) > 1 else 'keeps'}"
    if not rollout.keep_sampling_mask:
        return (
            f"answers are drawn from what rollout.{cut}, log-probabilities are over the whole "
            "vocabulary, so policy gradient and ratios are biased; "
            "set rollout.keep_sampling_mask"
        )
    most = f", about {rollout.top_k:,} at most" if rollout.top_k else ""
    return f"log-probabilities are over the tokens that {cut}: 4 bytes each{most}"


def environment_of(rollout: RolloutConfig) -> EnvironmentEntry | None:
    """The environment; None: there is none, each answer stands alone. UserError: unknown name."""
    if rollout.environment is None:
        return None
    return find(ENVIRONMENTS, rollout.environment)


def environment_settings(rollout: RolloutConfig) -> Settings | None:
    """Its settings. UserError: a mistake in them."""
    row = environment_of(rollout)
    name = f"the environment {rollout.environment}"
    settings = None if row is None else row.settings
    return read_settings(
        "rollout.environment_settings", name, settings, rollout.environment_settings
    )

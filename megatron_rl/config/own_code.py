"""The files of a user's own that a configuration names, by content."""

from __future__ import annotations

from typing import Any

from megatron_rl.catalogue.find import code_digest, find
from megatron_rl.catalogue.kinds import FAMILIES
from megatron_rl.config.algorithm import advantages_of, correction_of, loss_of
from megatron_rl.config.data import own_sources
from megatron_rl.config.optimizer import optimizer_of
from megatron_rl.config.reward import chosen_verifiers
from megatron_rl.config.rollout import engine_of, environment_of
from megatron_rl.config.schema import Config


def own_code(config: Config, verb: str) -> dict[str, str]:
    """SHA-256 of the files of a user's own that the configuration names, by reference."""
    rows: list[Any] = [one.row for one in chosen_verifiers(config.reward)]
    rows += [engine_of(config.rollout), environment_of(config.rollout)]
    rows.append(optimizer_of(config.optimizer))
    rows += own_sources(config.data)
    if verb == "train":
        algorithm = config.algorithm
        rows += [loss_of(algorithm), advantages_of(algorithm), correction_of(algorithm)]
    if config.model.family is not None:
        rows.append(find(FAMILIES, config.model.family))
    digests = {row.name: code_digest(row) for row in rows if row is not None}
    return {name: digest for name, digest in digests.items() if digest is not None}

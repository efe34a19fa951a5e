"""The rows and settings that the section ``algorithm`` names."""

from __future__ import annotations

from megatron_rl.catalogue.entry import AdvantagesEntry, CorrectionEntry, LossEntry
from megatron_rl.catalogue.find import find
from megatron_rl.catalogue.kinds import ADVANTAGES, CORRECTIONS, LOSSES
from megatron_rl.catalogue.read import read_settings, with_key
from megatron_rl.catalogue.settings import Settings
from megatron_rl.config.schema import AlgorithmConfig, Config, RouterShiftConfig
from megatron_rl.errors import UserError


def loss_of(algorithm: AlgorithmConfig) -> LossEntry:
    """The loss. UserError: there is none of that name."""
    return find(LOSSES, algorithm.name)


def loss_settings(algorithm: AlgorithmConfig) -> Settings | None:
    """The loss's settings. UserError: a mistake in them."""
    name = f"the loss {algorithm.name}"
    settings = loss_of(algorithm).settings
    return read_settings("algorithm.settings", name, settings, algorithm.settings)


def advantages_of(algorithm: AlgorithmConfig) -> AdvantagesEntry:
    """The advantage estimator. UserError: there is none of that name."""
    return find(ADVANTAGES, algorithm.advantages)


def advantages_settings(algorithm: AlgorithmConfig) -> Settings | None:
    """Its settings. UserError: a mistake in them."""
    given, name = algorithm.advantages_settings, f"the advantage estimator {algorithm.advantages}"
    settings = advantages_of(algorithm).settings
    return read_settings("algorithm.advantages_settings", name, settings, given)


def correction_of(algorithm: AlgorithmConfig) -> CorrectionEntry | None:
    """The sampler correction; None: none. UserError: there is none of that name."""
    if algorithm.mismatch == "none":
        return None
    return find(CORRECTIONS, algorithm.mismatch)


def correction_settings(algorithm: AlgorithmConfig) -> Settings | None:
    """Its settings; ``mismatch_low`` and ``mismatch_high`` set low and high, if it has them.
    UserError: a mistake in them.
    """
    row = correction_of(algorithm)
    given = dict(algorithm.mismatch_settings)
    if row is None:
        if given:
            raise UserError(
                "algorithm.mismatch_settings is given with algorithm.mismatch none; expected a "
                "correction; set algorithm.mismatch"
            )
        return None
    names = () if row.settings is None else row.settings.model_fields
    defaults = AlgorithmConfig.model_fields
    for name in ("low", "high"):
        value = getattr(algorithm, f"mismatch_{name}")
        if name not in names or value == defaults[f"mismatch_{name}"].default:
            continue
        key = f"algorithm.mismatch_{name}"
        given = with_key(given, name, value, key, "algorithm.mismatch_settings")
    name = f"the correction {algorithm.mismatch}"
    return read_settings("algorithm.mismatch_settings", name, row.settings, given)


def anchored_on_the_sampler(algorithm: AlgorithmConfig) -> bool:
    """Whether the loss's ratio is pi_new / mu: a loss that has the setting ``anchor`` says so."""
    return getattr(loss_settings(algorithm), "anchor", None) == "sampler"


def uses_router_shift(algorithm: AlgorithmConfig) -> bool:
    """Whether router shift is on: as configured, else as the loss asks."""
    if algorithm.router_shift.enabled is not None:
        return algorithm.router_shift.enabled
    return loss_of(algorithm).router_shift == "needed"


def has_gradient(shift: RouterShiftConfig) -> bool:
    """Whether something in the loss has a gradient through the routers' distance."""
    return not shift.stop_gradient or shift.penalty > 0


def distance_is_attached(config: Config) -> bool:
    """Whether the distance in the loss has a gradient: all layers are of one stage, whose forward
    pass is recorded. Elsewhere the gradient of a penalty is added at each router.
    """
    parallel = config.parallel
    recorded = parallel.pipeline == 1 and parallel.recompute != "full"
    return recorded and has_gradient(config.algorithm.router_shift)


def keeps_trace(algorithm: AlgorithmConfig) -> bool:
    """Whether the scoring pass records the routers, for router shift or routing replay."""
    return uses_router_shift(algorithm) or algorithm.routing_replay != "none"


def updates_per_step(algorithm: AlgorithmConfig) -> int:
    """Optimizer steps on a rollout batch."""
    return algorithm.mini_batches * algorithm.epochs

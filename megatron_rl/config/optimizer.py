"""The optimizer that the section ``optimizer`` names, with its settings and rules."""

from __future__ import annotations

from megatron_rl.catalogue.entry import OptimizerEntry, load
from megatron_rl.catalogue.find import find, label_of
from megatron_rl.catalogue.kinds import OPTIMIZERS
from megatron_rl.catalogue.read import read_settings, with_key
from megatron_rl.catalogue.settings import Settings
from megatron_rl.config.schema import Config, OptimizerConfig
from megatron_rl.errors import UserError

#: Keys of the section that set a setting of some optimizers.
_SETTINGS = ("beta1", "beta2", "epsilon")


def optimizer_of(optimizer: OptimizerConfig) -> OptimizerEntry:
    """The optimizer. UserError: there is none of that name."""
    return find(OPTIMIZERS, optimizer.name)


def optimizer_settings(optimizer: OptimizerConfig) -> Settings | None:
    """Its settings; ``optimizer.beta1``, ``beta2`` and ``epsilon`` set those of the same name.
    UserError: a mistake in them, or it lacks a setting of that name.
    """
    row = optimizer_of(optimizer)
    names = () if row.settings is None else row.settings.model_fields
    given = dict(optimizer.settings)
    for name in _SETTINGS:
        value = getattr(optimizer, name)
        if value == OptimizerConfig.model_fields[name].default:
            continue
        if name not in names:
            raise UserError(
                f"optimizer.{name} is {value:g} with the optimizer {optimizer.name}, which has no "
                f"such setting; expected the default; remove optimizer.{name}"
            )
        given = with_key(given, name, value, f"optimizer.{name}", "optimizer.settings")
    return read_settings(
        "optimizer.settings", f"the optimizer {optimizer.name}", row.settings, given
    )


def optimizer_text(optimizer: OptimizerConfig) -> str:
    """The optimizer as text: ``muon, momentum 0.9``."""
    settings = [f"{name} {value}" for name, value in optimizer.settings.items()]
    return ", ".join([label_of(optimizer.name), *settings])


def optimizer_is_known(config: Config) -> None:
    """``optimizer.name`` is an optimizer, and ``optimizer.settings`` are settings of it."""
    optimizer_settings(config.optimizer)


def optimizer_fits_the_layout(config: Config) -> None:
    """The layout gives the optimizer whole weights and whole state, if it needs them."""
    row, parallel = optimizer_of(config.optimizer), config.parallel
    if parallel.distributed_optimizer and not row.of_megatron:
        able = ", ".join(one.name for one in OPTIMIZERS.rows if one.of_megatron)
        raise UserError(
            f"parallel.distributed_optimizer is true with the optimizer {row.name}, whose state "
            f"cannot be cut into shards; expected one that can ({able}); set it to false, or take "
            "another optimizer"
        )
    split = [
        f"parallel.{name} {size}"
        for name in ("tensor", "expert", "expert_tensor")
        if (size := getattr(parallel, name)) > 1
    ]
    if split and not row.split_weights:
        raise UserError(
            f"{split[0]} with the optimizer {row.name}, which needs all of a weight on a rank; "
            "expected 1, or an optimizer declared with split_weights=True; take pipeline, context "
            "or data parallelism, or another optimizer"
        )


def own_optimizer_works(config: Config) -> None:
    """A user's own optimizer steps, uses the learning rate and resumes from its state, on small
    made-up weights.
    """
    row = optimizer_of(config.optimizer)
    if row.own is not None:
        load("megatron_rl.optimizers.trial:check_optimizer")(
            row, optimizer_settings(config.optimizer)
        )


OPTIMIZER_RULES = (optimizer_is_known, optimizer_fits_the_layout, own_optimizer_works)

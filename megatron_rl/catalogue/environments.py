"""The environments. To ship one: a row here, and its code in ``rollout/``."""

from __future__ import annotations

from megatron_rl.catalogue.entry import EnvironmentEntry

ENVIRONMENTS: tuple[EnvironmentEntry, ...] = ()

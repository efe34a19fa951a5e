"""The base of every section of the configuration."""

from __future__ import annotations

from pydantic import ConfigDict

from megatron_rl.catalogue.settings import Settings


class Section(Settings):
    """Frozen, no unknown keys; the string below a field documents it. Types are strict only when
    read from a file (``load.py``).
    """

    model_config = ConfigDict(strict=False)

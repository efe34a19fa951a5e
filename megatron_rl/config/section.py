"""The base of every section of the configuration."""

from __future__ import annotations

from pydantic import ConfigDict

from megatron_rl.catalogue.settings import Settings


class Section(Settings):
    """Frozen, no unknown keys; the string below a field documents it. Strict only where it is read
    from a file (``load.py``).
    """

    model_config = ConfigDict(strict=False)

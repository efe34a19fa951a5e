"""The key of the servers: only a request that carries it is answered.

vLLM's development routes run any method of its workers, read any directory and abort answers, for
everybody who reaches them.
"""

from __future__ import annotations

import os
import re
import secrets
from typing import Mapping
from urllib.parse import urlsplit

from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError
from megatron_rl.rollout.servers.addresses import is_loopback

#: The environment variable that holds the key. A user sets it for servers that run already; a run
#: sets it for a server that it starts, where `key_middleware.py` and `sglang_launcher.py` read it.
#: No file and no process list shows it.
KEY_VARIABLE = "MEGATRON_RL_SERVER_KEY"


def new_key() -> str:
    """A key for a run's own servers: 256 random bits."""
    return secrets.token_urlsafe(32)


def given_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """The user's key for servers that run already; None: there is none.

    Raises:
        UserError: no HTTP header can carry it.
    """
    key = environment.get(KEY_VARIABLE)
    if not key:
        return None
    if not re.fullmatch("[!-~]+", key):
        raise UserError(
            f"{KEY_VARIABLE} holds a space, a line break or a character beyond ASCII; expected the "
            "key the servers were started with; set it again"
        )
    return key


def check_key(config: Config, environment: Mapping[str, str] = os.environ) -> None:
    """Servers on other machines need a key.

    Raises:
        UserError: ``rollout.servers.urls`` names a server that is not on this machine's loopback
            address, and there is no key; or the key is unusable.
    """
    urls = config.rollout.servers.urls
    if not urls or given_key(environment) is not None:
        return
    for url in urls:
        if not is_loopback(urlsplit(url).hostname or ""):
            raise UserError(
                f"rollout.servers.urls names {url}, and {KEY_VARIABLE} is not set; expected the "
                "key the servers were started with, since whoever reaches one without a key can "
                "change its weights; set it on rank 0 (rollout/servers/README.md, The key)"
            )

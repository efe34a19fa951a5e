"""Who may ask a server: whoever has its key. And where the servers of a run listen.

vLLM's development routes run any method of its workers, read any directory and end what is being
sampled, for whoever reaches them.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import socket
from typing import Mapping
from urllib.parse import urlsplit

from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError

#: Environment variable with the key: of servers that run already, for those who ask them; of a
#: server that a run starts, for itself (`guard.py` and `keyed.py` read it there). No file and no
#: process list holds it.
KEY_VARIABLE = "MEGATRON_RL_SERVER_KEY"


def new_key() -> str:
    """Of a run's own servers: 256 random bits."""
    return secrets.token_urlsafe(32)


def given_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """The key in the environment, of servers that run already; None: there is none.

    Raises:
        UserError: it is none that a request could carry.
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
    """Servers on other machines are asked with a key or not at all.

    Raises:
        UserError: ``rollout.servers.urls`` names one that is not on this machine's loopback
            address, and there is no key; or it is none.
    """
    urls = config.rollout.servers.urls
    if not urls or given_key(environment) is not None:
        return
    for url in urls:
        if not _is_loopback(urlsplit(url).hostname or ""):
            raise UserError(
                f"rollout.servers.urls names {url}, and {KEY_VARIABLE} is not set; expected the "
                "key the servers were started with, since whoever reaches one without a key can "
                "change its weights; set it on rank 0 (rollout/README.md, Who may ask a server)"
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def own_address(name: str) -> str:
    """The address of this machine at which others reach it by this name; it is not a loopback
    address, unless the name is one.

    Raises:
        UserError: there is none.
    """
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise UserError(
            f"the address {name} where the ranks meet is not known here ({error.strerror}); "
            "expected one of this machine, on which rank 0 starts servers; set MASTER_ADDR"
        ) from error
    for address in found:
        if (_is_loopback(name) or not _is_loopback(address)) and _is_ours(address):
            return address
    raise UserError(
        f"the address {name} where the ranks meet means {', '.join(sorted(set(found)))} here; "
        "expected one of this machine that others reach, on which rank 0's servers may listen; set "
        "MASTER_ADDR to it"
    )


def _is_ours(address: str) -> bool:
    try:
        with listening(address):
            return True
    except OSError:
        return False


def listening(address: str) -> socket.socket:
    """A socket that listens at this address alone, on a free port; IPv4 or IPv6."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family)


def as_url(address: str, port: int) -> str:
    """Of a server."""
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"

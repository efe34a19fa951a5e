"""Network addresses: where a run's servers and stores listen, and how others reach them."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from megatron_rl.errors import UserError


def own_address(name: str) -> str:
    """This machine's address behind ``name``, at which other machines reach it. It is a loopback
    address only if the name is one.

    Raises:
        UserError: there is no such address.
    """
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise UserError(
            f"the address {name} where the ranks meet is not known here ({error.strerror}); "
            "expected one of this machine, on which rank 0 starts servers; set MASTER_ADDR"
        ) from error
    for address in found:
        if (is_loopback(name) or not is_loopback(address)) and _is_ours(address):
            return address
    raise UserError(
        f"the address {name} where the ranks meet means {', '.join(sorted(set(found)))} here; "
        "expected one of this machine that others reach, on which rank 0's servers may listen; set "
        "MASTER_ADDR to it"
    )


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_ours(address: str) -> bool:
    try:
        with listening(address):
            return True
    except OSError:
        return False


def listening(address: str) -> socket.socket:
    """A socket that listens on this address alone, IPv4 or IPv6, on a free port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family)


def address_towards(url: str) -> str:
    """This machine's address as the server at ``url`` sees it. Raises OSError."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    with socket.create_connection((parts.hostname, port), timeout=10.0) as connection:
        return str(connection.getsockname()[0])


def as_url(address: str, port: int) -> str:
    """The http url of an address and a port."""
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"

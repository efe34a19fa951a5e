"""Two hosts on this machine: network namespaces, joined by a cable, that run processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from typing import Iterator


def missing() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if shutil.which("ip") is None:
        return "the command ip is not installed (package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"mrl{os.getpid()}probe"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "the machine allows no network namespaces"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@dataclass(frozen=True)
class Host:
    """A network namespace."""

    name: str
    address: str
    interface: str

    def command(self, *words: str) -> list[str]:
        """The words, run on this host."""
        return ["ip", "netns", "exec", self.name, *words]

    def kill(self) -> None:
        """SIGKILL to everything on it, as when the power goes."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True
        )
        for pid in map(int, listed.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Hosts that see each other and nothing else; all they run ends with the block."""
    names = [f"mrl{os.getpid()}{side}" for side in "ab"]
    hosts = [Host(name, f"10.77.0.{i + 1}", f"veth{i}") for i, name in enumerate(names)]
    with contextlib.ExitStack() as stack:
        for host in hosts:
            _ip("netns", "add", host.name)
            stack.callback(_ip, "netns", "del", host.name)
            stack.callback(host.kill)
        first, second = hosts
        _ip(
            *("link", "add", first.interface, "netns", first.name, "type", "veth"),
            *("peer", "name", second.interface, "netns", second.name),
        )
        for host in hosts:
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            for interface in (host.interface, "lo"):
                _ip("-n", host.name, "link", "set", interface, "up")
        yield first, second


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)

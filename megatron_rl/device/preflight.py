"""What has to be alike on all nodes of a run, compared before its ranks start: one process a node.

The nodes meet at a TCPStore of node 0, tell each other their facts, write a token into the run
directory and look for those of the others. Every step has a deadline, so that a node that is
missing, or cannot be reached, is a line of the report and no hang.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import secrets
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from torch.distributed import DistError, TCPStore

import megatron_rl
from megatron_rl.errors import UserError

#: Facts that have to agree.
SAME = ("megatron_rl", "python", "torch", "megatron-core", "transformer-engine", "config", "ranks")
#: In the run directory, while nodes look for each other's tokens.
FOLDER = ".preflight"
#: How long a token may take to be seen on another node: network file systems keep listings.
SEEN_WITHIN_S = 5.0

Facts = dict[str, Any]


@dataclass(frozen=True)
class Meeting:
    """Where the nodes meet, and which of them this is."""

    node: int  #: 0..nodes-1
    nodes: int
    host: str  #: address of node 0
    port: int  #: free there
    seconds: float  #: for all of it


def facts_of_this_node(describe: Callable[[], tuple[str, Path]], ranks: int) -> Facts:
    """Versions, host name and configuration of this node; in ``error`` why there is none.

    Args:
        describe: the resolved configuration as text, and its run directory; raises UserError.
        ranks: of this node.
    """
    facts: Facts = {
        "host": socket.gethostname(),
        "megatron_rl": f"{megatron_rl.__version__} ({_digest_of_package()})",
        "python": platform.python_version(),
        "ranks": ranks,
        **{name: _version(name) for name in ("torch", "megatron-core", "transformer-engine")},
    }
    try:
        text, run_dir = describe()
    except UserError as error:
        return {**facts, "error": str(error)}
    facts["config"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return {**facts, "run_dir": str(run_dir)}


def preflight(meeting: Meeting, facts: Facts) -> list[str]:
    """What differs between the nodes, or keeps them from starting, a line each; none: nothing.

    Takes ``meeting.seconds`` at most, and about `SEEN_WITHIN_S` more.

    Raises:
        UserError: node 0 cannot be reached.
    """
    end = time.monotonic() + meeting.seconds
    facts = {**facts, "token": secrets.token_hex(8)}
    _leave_token(meeting, facts)
    store = _store(meeting)
    store.set(f"facts/{meeting.node}", json.dumps(facts))
    known = _answers(store, "facts", meeting, end)
    unseen = [n for n in known if n != meeting.node and not _sees(known[n], facts, n)]
    store.set(f"unseen/{meeting.node}", json.dumps(unseen))
    soon = max(end, time.monotonic() + 2 * SEEN_WITHIN_S)
    blind = _answers(store, "unseen", meeting, soon, list(known))
    found = differences(meeting, known, blind)
    store.set(f"done/{meeting.node}", "1")
    if meeting.node == 0:  # the store ends with this process
        _answers(store, "done", meeting, time.monotonic() + SEEN_WITHIN_S, list(known))
        _remove_tokens(facts)
    return found


def differences(
    meeting: Meeting, known: Mapping[int, Facts], blind: Mapping[int, Sequence[int]]
) -> list[str]:
    """The report.

    Args:
        meeting: how many nodes there should be.
        known: node -> its facts, of those that have answered.
        blind: node -> the nodes whose tokens it has not found.
    """
    found = [
        f"node {node} has not answered within {meeting.seconds:g} s"
        for node in range(meeting.nodes)
        if node not in known
    ]
    for node, facts in known.items():
        if "error" in facts:
            found.append(f"{_name(node, facts)}: {facts['error']}")
    for fact in SAME:
        values: dict[Any, list[str]] = {}
        for node, facts in known.items():
            if fact in facts:
                values.setdefault(facts[fact], []).append(_name(node, facts))
        if len(values) > 1:
            parts = (f"{value} on {', '.join(names)}" for value, names in values.items())
            found.append(f"{fact} differs: {'; '.join(parts)}")
    for node, others in blind.items():
        usable = [other for other in others if "error" not in {**known[other], **known[node]}]
        if usable:
            names = ", ".join(_name(other, known[other]) for other in usable)
            found.append(
                f"{_name(node, known[node])} does not see in {known[node]['run_dir']} what {names} "
                "wrote there; expected storage that all nodes share"
            )
    return found


def _name(node: int, facts: Facts) -> str:
    return f"node {node} ({facts['host']})"


def _store(meeting: Meeting) -> TCPStore:
    end = time.monotonic() + meeting.seconds
    try:
        while meeting.node > 0:  # a store that is refused waits for as long again
            try:
                left = max(0.1, end - time.monotonic())
                socket.create_connection((meeting.host, meeting.port), timeout=left).close()
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
        return TCPStore(
            meeting.host,
            meeting.port,
            is_master=meeting.node == 0,
            timeout=timedelta(seconds=meeting.seconds),
            wait_for_workers=False,
        )
    except (OSError, DistError, RuntimeError, ValueError) as error:
        place = f"{meeting.host}:{meeting.port}"
        if meeting.node == 0:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"node 0 cannot listen on {place} ({reason}); expected a free port; set "
                "PREFLIGHT_PORT"
            ) from error
        raise UserError(
            f"node {meeting.node} ({socket.gethostname()}) cannot reach node 0 at {place} within "
            f"{meeting.seconds:g} s; expected its preflight there; check MASTER_ADDR, firewalls, "
            "and that it was started"
        ) from error


def _answers(
    store: TCPStore, kind: str, meeting: Meeting, end: float, nodes: Sequence[int] | None = None
) -> dict[int, Any]:
    """What the nodes have set under ``kind`` before the end."""
    found = {}
    for node in range(meeting.nodes) if nodes is None else nodes:
        left = max(0.1, end - time.monotonic())
        with contextlib.suppress(DistError, RuntimeError):
            store.wait([f"{kind}/{node}"], timedelta(seconds=left))
            found[node] = json.loads(store.get(f"{kind}/{node}"))
    return found


def _leave_token(meeting: Meeting, facts: Facts) -> None:
    if "error" in facts:
        return
    folder = Path(facts["run_dir"]) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"node_{meeting.node}").write_text(facts["token"])
    except OSError as error:
        facts["error"] = (
            f"run_dir {facts['run_dir']} cannot be written ({error.strerror}); expected storage "
            "that all nodes share"
        )


def _sees(other: Facts, facts: Facts, node: int) -> bool:
    """Whether the token of another node is in this node's run directory."""
    if "error" in {**other, **facts}:
        return False
    path, end = Path(facts["run_dir"]) / FOLDER / f"node_{node}", time.monotonic() + SEEN_WITHIN_S
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == other["token"]:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def _remove_tokens(facts: Facts) -> None:
    folder = Path(facts.get("run_dir", "")) / FOLDER
    with contextlib.suppress(OSError):
        for path in folder.glob("node_*"):
            path.unlink()
        folder.rmdir()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _digest_of_package() -> str:
    """Of all its Python files: a version number says little of a copy under development."""
    digest, root = hashlib.sha256(), Path(megatron_rl.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]

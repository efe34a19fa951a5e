"""Compares before the ranks start what must be equal on all nodes: one process a node.

The nodes meet at a TCPStore of node 0, tell each other their facts, write a token into the run
directory and look for those of the others. Every node, also node 0, connects to the store by the
address that all were given, so two nodes that both believe to be node 0 find each other. Every step
has a deadline: a node that is missing or cannot be reached is a line of the report, not a hang.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Iterator, Sequence

from torch.distributed import TCPStore

from megatron_rl.config.json_text import BadJson, parse_json
from megatron_rl.device.launch import join_address
from megatron_rl.device.node_facts import Facts
from megatron_rl.device.node_report import Meeting, Report, crowded, report
from megatron_rl.errors import RunFailed, UserError
from megatron_rl.files import write_whole

#: In the run directory, while nodes look for each other's tokens.
FOLDER = ".preflight"
#: Seconds until another node must see a token: network file systems cache listings.
SEEN_WITHIN_S = 5.0
#: Seconds that missing nodes still have once a node has come twice.
LATE_S = 3.0


def compare(meeting: Meeting, facts: Facts) -> None:
    """Meet the other nodes. Print that they agree, or on stderr why they cannot start.

    Raises:
        UserError: something differs; as `preflight`.
        RunFailed: nodes are missing; as `preflight`.
    """
    found = preflight(meeting, facts)
    for line in found.lines:
        print(f"preflight: {line}", file=sys.stderr)
    if found.differences:
        count = len(found.differences)
        raise UserError(
            f"preflight found {count} difference{'' if count == 1 else 's'} between "
            f"{meeting.nodes} nodes, see above; expected none; PREFLIGHT=0 starts without it"
        )
    if found.missing:
        raise RunFailed(
            f"preflight misses {len(found.missing)} of {meeting.nodes} nodes, see above; expected "
            f"all within {meeting.seconds:g} s; start them, or let the others wait longer "
            "(PREFLIGHT_S)"
        )
    nodes = f"{meeting.nodes} node{'' if meeting.nodes == 1 else 's'}"
    print(f"preflight: {nodes} x {facts['same']['ranks of the node']} ranks agree")


def preflight(meeting: Meeting, facts: Facts) -> Report:
    """Meet the other nodes and compare; the result is equal on all nodes that came in time.

    Takes ``meeting.seconds`` at most, and a few times `SEEN_WITHIN_S` more.

    Raises:
        UserError: node 0 cannot listen, or the address that all were given is not its own.
        RunFailed: node 0 cannot be reached, or does not answer.
    """
    done: list[Report | BaseException] = []

    def meet() -> None:
        try:
            done.append(_meet(meeting, facts))
        except (UserError, RunFailed, RuntimeError) as error:
            done.append(error)

    # torch waits without end for a store that accepts the connection and stays silent.
    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(meeting.seconds + 5 * SEEN_WITHIN_S)
    found = done[0] if done else None
    if found is None or isinstance(found, RuntimeError):
        raise RunFailed(
            f"node 0 at {join_address(meeting.host, meeting.port)} has stopped answering in the "
            "middle of the preflight; expected it to wait for all; look at its log"
        ) from found
    if isinstance(found, BaseException):
        raise found
    return found


def _meet(meeting: Meeting, facts: Facts) -> Report:
    end = time.monotonic() + meeting.seconds
    facts = {**facts, "node": meeting.node, "token": secrets.token_hex(8)}
    _leave_token(facts)
    with _server(meeting) as serves:
        store = _reach(meeting, end, serves)
        place = store.add("arrivals", 1) - 1
        store.set(f"facts/{place}", json.dumps(facts))
        known = _arrivals(store, meeting, place, end)
        unseen = [] if crowded(meeting, known) else _unseen(known, place)
        store.set(f"unseen/{place}", json.dumps(unseen))
        soon = max(end, time.monotonic() + 2 * SEEN_WITHIN_S)
        blind = _places(_answers(store, "unseen", len(known), soon), len(known))
        found = report(meeting, known, blind)
        store.set(f"done/{place}", "1")
        if serves:  # the store ends with this process
            _answers(store, "done", len(known), time.monotonic() + SEEN_WITHIN_S)
            _remove_tokens(facts)
    return found


@contextlib.contextmanager
def _server(meeting: Meeting) -> Iterator[bool]:
    """The store, on node 0. False on other nodes, and if another node 0 on this machine has the
    port.
    """
    if meeting.node > 0:
        yield False
        return
    with socket.socket(socket.AF_UNIX) as own:
        try:  # a name as the port is: one a machine
            own.bind(f"\0megatron_rl preflight {meeting.port}")
        except OSError:
            yield False
            return
        try:
            store = TCPStore("localhost", meeting.port, is_master=True, wait_for_workers=False)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"node 0 cannot listen on port {meeting.port} ({reason}); expected a free port; "
                "set PREFLIGHT_PORT"
            ) from error
        yield True
        del store


def _reach(meeting: Meeting, end: float, serves: bool) -> TCPStore:
    """The store of node 0, by the address that all nodes were given."""
    place, here = join_address(meeting.host, meeting.port), socket.gethostname()
    while True:  # a refused store waits for the same time again
        try:
            left = max(0.1, end - time.monotonic())
            socket.create_connection((meeting.host, meeting.port), timeout=left).close()
            timeout = timedelta(seconds=meeting.seconds)
            return TCPStore(
                meeting.host, meeting.port, is_master=False, timeout=timeout, wait_for_workers=False
            )
        except (OSError, RuntimeError, UnicodeError) as error:
            if time.monotonic() < end:
                time.sleep(0.2)
                continue
            reason = " ".join(str(error).split())[:200]
            if serves:
                raise UserError(
                    f"{place} does not lead to node 0 ({here}), which listens there ({reason}); "
                    "expected an address of this machine; MASTER_ADDR is that of NODE_RANK 0"
                ) from error
            raise RunFailed(
                f"node {meeting.node} ({here}) cannot reach node 0 at {place} within "
                f"{meeting.seconds:g} s ({reason}); expected its preflight there; check "
                "MASTER_ADDR, firewalls, and that it was started"
            ) from error


def _arrivals(store: TCPStore, meeting: Meeting, place: int, end: float) -> list[Facts]:
    """The facts of the nodes that have come, this one included. The first node to come decides when
    others are too late.
    """
    known: list[Facts] = []
    while True:
        for number in range(len(known), store.add("arrivals", 0)):
            store.wait([f"facts/{number}"], timedelta(seconds=SEEN_WITHIN_S))
            known.append(_facts(store.get(f"facts/{number}")))
        if place > 0 and store.check(["closed"]):
            return known[: max(int(store.get("closed")), place + 1)]
        too_many = bool(crowded(meeting, known))
        if too_many:
            end = min(end, time.monotonic() + LATE_S)
        complete = not too_many and {f["node"] for f in known} == set(range(meeting.nodes))
        late_s = time.monotonic() - end
        if place == 0 and (complete or late_s >= 0.0):
            store.set("closed", str(len(known)))
            return known
        if late_s >= 2 * SEEN_WITHIN_S:  # the first has died
            return known
        time.sleep(0.05)


def _answers(store: TCPStore, kind: str, count: int, end: float) -> dict[int, Any]:
    """The values that the nodes set under ``kind`` before the deadline, by arrival."""
    found = {}
    for place in range(count):
        left = max(0.1, end - time.monotonic())
        with contextlib.suppress(RuntimeError):
            store.wait([f"{kind}/{place}"], timedelta(seconds=left))
            found[place] = _json(store.get(f"{kind}/{place}"))
    return found


def _json(said: bytes) -> Any:
    """Read a value that a node set; anyone who reaches the port can set one."""
    try:
        return parse_json(said)
    except BadJson as error:
        raise _no_node(str(error)) from error


def _facts(said: bytes) -> Facts:
    """The facts of `node_facts.facts_of_this_node` with the node's number and token."""
    facts = _json(said)
    if not isinstance(facts, dict):
        raise _no_node("fields of another kind")
    texts = {"host", "token", "error" if "error" in facts else "run_dir"}
    if (
        not all(isinstance(facts.get(name), str) for name in texts)
        or not isinstance(facts.get("same"), dict)
        or type(facts.get("node")) is not int
        or facts["node"] < 0
    ):
        raise _no_node("fields of another kind")
    return facts


def _places(found: dict[int, Any], count: int) -> dict[int, list[int]]:
    """For each arrival a list of other arrivals."""
    for places in found.values():
        whole = isinstance(places, list) and all(type(place) is int for place in places)
        if not whole or not all(0 <= place < count for place in places):
            raise _no_node("places that are none")
    return found


def _no_node(reason: str) -> RunFailed:
    return RunFailed(
        f"what came to the preflight's port is not from a node of this run ({reason}); expected "
        "nodes of one version, and no one else there; set PREFLIGHT_PORT to another port"
    )


def _leave_token(facts: Facts) -> None:
    if "error" in facts:
        return
    folder = Path(facts["run_dir"]) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"node_{facts['node']}", facts["token"])
    except OSError as error:
        facts["error"] = (
            f"run_dir {facts['run_dir']} cannot be written ({error.strerror}); expected storage "
            "that all nodes share"
        )


def _unseen(known: Sequence[Facts], place: int) -> list[int]:
    """The arrivals whose tokens are not in this node's run directory."""
    return [p for p in range(len(known)) if p != place and not _sees(known[p], known[place])]


def _sees(other: Facts, facts: Facts) -> bool:
    if "error" in {**other, **facts}:
        return False
    path = Path(facts["run_dir"]) / FOLDER / f"node_{other['node']}"
    end = time.monotonic() + SEEN_WITHIN_S
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

"""Finds what is wrong with the nodes of a preflight, from their facts alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Iterable, Mapping, Sequence

from megatron_rl.device.launch import split_address
from megatron_rl.device.node_facts import Facts
from megatron_rl.errors import UserError

#: Most differences of a kind that get a line each.
MOST_LINES = 12


@dataclass(frozen=True)
class Meeting:
    """The rendezvous of the nodes, and this node's number."""

    node: int  #: 0..nodes-1
    nodes: int
    host: str  #: address of node 0
    port: int  #: free there
    seconds: float  #: for all of it


@dataclass(frozen=True)
class Report:
    """Reasons why the nodes cannot start, one a line."""

    differences: tuple[str, ...] = ()  #: mistakes, to be corrected first
    missing: tuple[
        str, ...
    ] = ()  #: nodes that came too late; they may come in time at the next attempt

    @property
    def lines(self) -> tuple[str, ...]:
        """All of it."""
        return (*self.differences, *self.missing)


def read_meeting(node: int, nodes: int, meet: str, seconds: float) -> Meeting:
    """The meeting that the command line describes. Raises UserError if an option is wrong."""
    host, port = split_address(meet, "--meet")
    if not 0 <= node < nodes:
        raise UserError(f"--node is {node} with --nodes {nodes}; expected 0 to N - 1")
    if not 0.0 < seconds < 1e6:
        raise UserError(f"--within is {seconds:g}; expected seconds, above 0")
    return Meeting(node, nodes, host, port, seconds)


def report(meeting: Meeting, known: Sequence[Facts], blind: Mapping[int, Sequence[int]]) -> Report:
    """Find what is wrong with the nodes that have come.

    Args:
        meeting: with the expected number of nodes.
        known: the facts of each, in the order of their arrival.
        blind: arrival -> the arrivals whose tokens it did not find.
    """
    present = {facts["node"] for facts in known}
    missing = [
        f"node {node} has not answered within {meeting.seconds:g} s"
        for node in range(meeting.nodes)
        if node not in present
    ]
    if too_many := crowded(meeting, known):
        return Report(tuple(too_many))
    errors = (facts for facts in sorted(known, key=_number) if "error" in facts)
    found = [f"{_name(facts)}: {facts['error']}" for facts in errors]
    found += _unlike(known)
    for place in sorted(blind, key=lambda place: _number(known[place])):
        facts = known[place]
        usable = [o for o in blind[place] if "error" not in {**known[o], **facts}]
        if usable:
            names = ", ".join(_name(known[other]) for other in usable)
            found.append(
                f"{_name(facts)} does not see in {facts['run_dir']} what {names} wrote there; "
                "expected storage that all nodes share"
            )
    return Report(tuple(found), tuple(missing))


def crowded(meeting: Meeting, known: Sequence[Facts]) -> list[str]:
    """Nodes that came twice or are not expected, and node numbers out of range."""
    found = _unlike(known, ["NODES"])
    for node in sorted({facts["node"] for facts in known}):
        hosts = sorted(facts["host"] for facts in known if facts["node"] == node)
        if len(hosts) > 1:
            found.append(
                f"NODE_RANK {node} was given to {len(hosts)} nodes ({', '.join(hosts)}); expected "
                f"each of 0 to {meeting.nodes - 1} once; number the nodes, and start each once"
            )
        if node >= meeting.nodes:
            found.append(
                f"NODE_RANK {node} ({hosts[0]}) with NODES {meeting.nodes}; expected 0 to "
                f"{meeting.nodes - 1}"
            )
    return found


def _unlike(known: Sequence[Facts], names: Iterable[str] | None = None) -> list[str]:
    """One line for each fact (None: among all facts) that differs between nodes."""
    if names is None:
        names = dict.fromkeys(name for facts in known for name in facts["same"])
        if any("error" in facts for facts in known):
            # a node without a configuration lacks its keys; its error is reported already
            names = [name for name in names if all(name in facts["same"] for facts in known)]
    lines, order = [], sorted(known, key=_number)
    for name in names:
        values: dict[str, list[str]] = {}
        for facts in order:
            values.setdefault(_text(facts["same"].get(name, "missing")), []).append(_name(facts))
        if len(values) > 1:
            parts = (f"{value} on {_some(where)}" for value, where in values.items())
            lines.append(f"{name} differs: {'; '.join(parts)}")
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"and {len(lines) - MOST_LINES} more differ"]
    return lines


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{more}"


def _number(facts: Facts) -> int:
    return facts["node"]


def _name(facts: Facts) -> str:
    return f"node {facts['node']} ({facts['host']})"

"""Nodes compared before a run: in threads of this process, and what the report says."""

from __future__ import annotations

import json
import socket
import threading
from importlib.metadata import version

import pytest

from megatron_rl.device import preflight
from megatron_rl.device.node_facts import Described, facts_of_this_node
from megatron_rl.device.node_facts import described as described_by_file
from megatron_rl.device.node_report import Meeting, Report
from megatron_rl.errors import RunFailed, UserError
from tests.support.nodes import has_ipv6


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def described(run_dir, files=(), **values):
    """The configuration of a node."""
    return lambda: Described({"seed": 1, **values}, dict(files), run_dir)


def meet(port, run_dirs, seconds=10.0, changes=(), nodes=None, numbers=None, host="127.0.0.1"):
    """What nodes, each in a thread, report: by their place in run_dirs.

    ``changes``: place -> facts that are otherwise there; numbers: NODE_RANK of each.
    """
    reports = {}

    def node(place):
        count = nodes or len(run_dirs)
        facts = facts_of_this_node(described(run_dirs[place]), count, 2)
        change = dict(dict(changes).get(place, {}))
        facts["same"] |= change.pop("same", {})
        facts |= change
        meeting = Meeting(numbers[place] if numbers else place, count, host, port, seconds)
        try:
            reports[place] = preflight.preflight(meeting, facts)
        except (UserError, RunFailed) as error:
            reports[place] = error

    threads = [threading.Thread(target=node, args=(n,)) for n in range(len(run_dirs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return reports


no_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=no_ipv6)])
def test_nodes_that_are_alike_have_nothing_to_report(port, tmp_path, host):
    run_dir = tmp_path / "runs" / "new"
    assert meet(port, [run_dir] * 3, host=host) == {0: Report(), 1: Report(), 2: Report()}
    assert list(run_dir.iterdir()) == []  # the tokens are gone


def test_all_nodes_say_what_differs(port, tmp_path):
    other = {"same": {"torch": "1.0", "seed": 3}, "host": "elsewhere"}
    reports = meet(port, [tmp_path, tmp_path], changes={1: other}.items())
    assert reports[0] == reports[1] and reports[0].missing == ()
    here, torch = socket.gethostname(), version("torch")
    assert set(reports[0].differences) == {
        f"torch differs: {torch} on node 0 ({here}); 1.0 on node 1 (elsewhere)",
        f"seed differs: 1 on node 0 ({here}); 3 on node 1 (elsewhere)",
    }


def test_a_run_directory_that_is_not_shared_is_seen_from_both_sides(port, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "SEEN_WITHIN_S", 0.3)
    reports = meet(port, [tmp_path / "a", tmp_path / "b"], seconds=30.0)
    assert len(reports[0].differences) == 2 and reports[0] == reports[1]
    for line, place in zip(reports[0].differences, "ab"):
        assert f"does not see in {tmp_path / place} what node" in line
        assert line.endswith("wrote there; expected storage that all nodes share")


def test_a_run_directory_that_cannot_be_written(port, tmp_path):
    (tmp_path / "file").write_text("")
    (line,) = meet(port, [tmp_path / "file" / "runs"])[0].differences
    assert "cannot be written (Not a directory)" in line


def test_a_node_that_is_missing_is_named_within_the_time(port, tmp_path):
    assert meet(port, [tmp_path], seconds=1.0, nodes=3)[0] == Report(
        missing=("node 1 has not answered within 1 s", "node 2 has not answered within 1 s")
    )


def test_two_nodes_of_one_number_are_named(port, tmp_path):
    """Both take themselves for node 0, and node 1 is not there."""
    changes = {0: {"host": "a"}, 1: {"host": "b"}}
    reports = meet(port, [tmp_path] * 2, numbers=[0, 0], changes=changes.items())
    line = (
        "NODE_RANK 0 was given to 2 nodes (a, b); expected each of 0 to 1 once; number the nodes, "
        "and start each once"
    )
    assert reports == {0: Report((line,)), 1: Report((line,))}


def test_a_node_that_is_started_twice_is_named(port, tmp_path):
    reports = meet(port, [tmp_path] * 4, numbers=[0, 1, 1, 2], nodes=4)
    for found in reports.values():
        assert found.differences[0].startswith("NODE_RANK 1 was given to 2 nodes (")
        assert found.missing == ()


def test_nodes_that_were_told_different_sizes_are_named(port, tmp_path):
    other = {"same": {"NODES": 3}, "host": "b"}
    reports = meet(port, [tmp_path] * 2, changes={0: {"host": "a"}, 1: other}.items())
    assert reports[0].differences == ("NODES differs: 2 on node 0 (a); 3 on node 1 (b)",)
    assert reports[1] == reports[0]


def test_node_0_that_is_not_at_the_address_is_told_so(port, tmp_path):
    """MASTER_ADDR is another machine's: there nothing listens."""
    found = meet(port, [tmp_path], seconds=0.5, host="127.0.0.1", nodes=2, numbers=[0])
    assert found[0].missing  # the address is its own
    found = meet(port, [tmp_path], seconds=0.5, host="no.such.host.invalid", nodes=2)
    assert isinstance(found[0], UserError)
    assert f"no.such.host.invalid:{port} does not lead to node 0 (" in str(found[0])
    assert "MASTER_ADDR is that of NODE_RANK 0" in str(found[0])


def test_node_0_that_cannot_be_reached_is_an_error_within_the_time(port, tmp_path):
    facts = facts_of_this_node(described(tmp_path), 2, 1)
    with pytest.raises(RunFailed, match=f"cannot reach node 0 at 127.0.0.1:{port} within 1 s"):
        preflight.preflight(Meeting(1, 2, "127.0.0.1", port, 1.0), facts)


def test_what_takes_the_connection_and_says_nothing_is_an_error_within_the_time(
    port, tmp_path, monkeypatch
):
    monkeypatch.setattr(preflight, "SEEN_WITHIN_S", 0.1)
    facts = facts_of_this_node(described(tmp_path), 2, 1)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", port))
        mute.listen()
        with pytest.raises(RunFailed, match=f"node 0 at 127.0.0.1:{port} has stopped answering"):
            preflight.preflight(Meeting(1, 2, "127.0.0.1", port, 1.0), facts)


def test_a_port_that_is_taken_is_an_error(port, tmp_path):
    facts = facts_of_this_node(described(tmp_path), 1, 1)
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        with pytest.raises(UserError, match=f"node 0 cannot listen on port {port} .*PORT"):
            preflight.preflight(Meeting(0, 1, "127.0.0.1", port, 2.0), facts)


GOOD = {"host": "a", "token": "t", "run_dir": "runs", "node": 1, "same": {"NODES": 2}}


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"[" * 100_000,
        b"9" * 5000,
        b"[]",
        b"3",
        b'{"node": NaN}',
        *(
            json.dumps({**GOOD, **change}).encode()
            for change in ({"node": "1"}, {"node": -1}, {"same": 3}, {"host": None}, {"error": 3})
        ),
        *(json.dumps({k: v for k, v in GOOD.items() if k != name}).encode() for name in GOOD),
    ],
)
def test_what_no_node_says_is_one_line(said):
    """Whoever reaches the port can set something there."""
    assert preflight._facts(json.dumps(GOOD).encode()) == GOOD
    with pytest.raises(RunFailed, match="is not from a node of this run .*; expected nodes of one"):
        preflight._facts(said)


@pytest.mark.parametrize("places", [3, [True], ["0"], [2], [-1], [[]], {"0": 1}])
def test_places_that_are_none_are_one_line(places):
    assert preflight._places({0: [1], 1: []}, 2) == {0: [1], 1: []}
    with pytest.raises(RunFailed, match="is not from a node of this run .places that are none."):
        preflight._places({0: [1], 1: places}, 2)


def test_a_stranger_at_the_port_ends_the_preflight_in_one_line(port, tmp_path, monkeypatch):
    real = preflight.json.dumps
    monkeypatch.setattr(preflight.json, "dumps", lambda v: "[]" if "token" in v else real(v))
    found = meet(port, [tmp_path, tmp_path])
    assert {type(error) for error in found.values()} == {RunFailed}
    assert any("PREFLIGHT_PORT to another" in str(error) for error in found.values())


def test_an_infinite_bound_of_a_loss_is_a_fact_too(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: {tmp_path}\nmodel: {{preset: tiny_moe}}\n")
    words = [
        "--data.tokenizer.path",
        str(path),
        "--algorithm.name",
        "grpo",
        "--algorithm.settings",
        "{clip_high: .inf}",
    ]
    values = described_by_file(path, words, 1, "generate").values
    assert values["algorithm.settings.clip_high"] == "Infinity"

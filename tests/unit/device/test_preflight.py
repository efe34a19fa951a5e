"""Nodes compared before a run: in threads of this process, and what the report says."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from megatron_rl.device import preflight
from megatron_rl.device.preflight import Meeting, differences, facts_of_this_node
from megatron_rl.errors import UserError


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def meet(port, run_dirs, seconds=10.0, changes=(), nodes=None):
    """The reports of nodes, each in a thread, with facts changed."""
    reports = {}

    def node(number):
        facts = facts_of_this_node(lambda: ("config", run_dirs[number]), 2)
        facts |= dict(changes).get(number, {})
        meeting = Meeting(number, nodes or len(run_dirs), "127.0.0.1", port, seconds)
        try:
            reports[number] = preflight.preflight(meeting, facts)
        except UserError as error:
            reports[number] = str(error)

    threads = [threading.Thread(target=node, args=(n,)) for n in range(len(run_dirs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return reports


def test_nodes_that_are_alike_have_nothing_to_report(port, tmp_path):
    run_dir = tmp_path / "runs" / "new"
    assert meet(port, [run_dir] * 3) == {0: [], 1: [], 2: []}
    assert list(run_dir.iterdir()) == []  # the tokens are gone


def test_all_nodes_say_what_differs(port, tmp_path):
    other = {"torch": "1.0", "host": "elsewhere"}
    reports = meet(port, [tmp_path, tmp_path], changes={1: other}.items())
    assert reports[0] == reports[1]
    (line,) = reports[0]
    here = socket.gethostname()
    assert line.startswith("torch differs: ")
    assert line.endswith(f" on node 0 ({here}); 1.0 on node 1 (elsewhere)")


def test_a_run_directory_that_is_not_shared_is_seen_from_both_sides(port, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "SEEN_WITHIN_S", 0.3)
    reports = meet(port, [tmp_path / "a", tmp_path / "b"])
    assert len(reports[0]) == 2 and reports[0] == reports[1]
    for line, place in zip(reports[0], "ab"):
        assert f"does not see in {tmp_path / place} what node" in line
        assert line.endswith("wrote there; expected storage that all nodes share")


def test_a_run_directory_that_cannot_be_written(port, tmp_path):
    (tmp_path / "file").write_text("")
    (line,) = meet(port, [tmp_path / "file" / "runs"])[0]
    assert "cannot be written (Not a directory)" in line


def test_a_node_that_is_missing_is_named_within_the_time(port, tmp_path):
    began = time.monotonic()
    assert meet(port, [tmp_path], seconds=1.0, nodes=3)[0] == [
        "node 1 has not answered within 1 s",
        "node 2 has not answered within 1 s",
    ]
    assert time.monotonic() - began < 10.0


def test_node_0_that_cannot_be_reached_is_an_error_within_the_time(port, tmp_path):
    facts = facts_of_this_node(lambda: ("config", tmp_path), 1)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"cannot reach node 0 at 127.0.0.1:{port} within 1 s"):
        preflight.preflight(Meeting(1, 2, "127.0.0.1", port, 1.0), facts)
    assert time.monotonic() - began < 5.0


def test_a_port_that_is_taken_is_an_error(port, tmp_path):
    facts = facts_of_this_node(lambda: ("config", tmp_path), 1)
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        with pytest.raises(UserError, match=f"node 0 cannot listen on 127.0.0.1:{port} .*PORT"):
            preflight.preflight(Meeting(0, 1, "127.0.0.1", port, 2.0), facts)


def test_an_error_of_one_node_hides_no_other_difference():
    def refuse():
        raise UserError("data.train is missing")

    bad, good = facts_of_this_node(refuse, 8), facts_of_this_node(lambda: ("text", "runs"), 4)
    assert "config" not in bad and good["config"] == "982d9e3eb996"  # sha256 of "text"
    bad["host"], good["host"] = "a", "b"
    assert differences(Meeting(0, 2, "x", 1, 30.0), {0: bad, 1: good}, {0: [1], 1: [0]}) == [
        "node 0 (a): data.train is missing",
        "ranks differs: 8 on node 0 (a); 4 on node 1 (b)",
    ]

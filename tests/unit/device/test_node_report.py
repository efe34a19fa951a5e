"""The report of a preflight, from facts as nodes give them."""

from pathlib import Path

from megatron_rl.device.node_facts import Described, facts_of_this_node
from megatron_rl.device.node_report import Meeting, Report, report
from megatron_rl.errors import UserError


def test_an_error_of_one_node_hides_no_other_difference():
    def refuse():
        raise UserError("data.train is missing")

    bad = facts_of_this_node(refuse, 2, 8) | {"node": 0, "host": "a"}
    good = facts_of_this_node(lambda: Described({"seed": 1}, {}, Path("runs")), 2, 4) | {
        "node": 1,
        "host": "b",
    }
    assert "seed" not in bad["same"] and good["same"]["seed"] == 1
    assert report(Meeting(0, 2, "x", 1, 30.0), [bad, good], {0: [1], 1: [0]}) == Report(
        (
            "node 0 (a): data.train is missing",
            "ranks of the node differs: 8 on node 0 (a); 4 on node 1 (b)",
        )
    )


def test_many_differences_of_many_nodes_stay_a_page():
    known = [
        {"node": node, "host": "h", "same": {f"key{n}": n * (node > 0) for n in range(50)}}
        for node in range(9)
    ]
    found = report(Meeting(0, 9, "x", 1, 30.0), known, {}).differences
    assert len(found) == 13 and found[-1] == "and 37 more differ"
    assert found[0] == (
        "key1 differs: 0 on node 0 (h); 1 on node 1 (h), node 2 (h), node 3 (h), node 4 (h) and 4 "
        "more"
    )

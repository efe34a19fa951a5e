"""The maker of topological sorts: solvable, different, the same bytes every time."""

import json

import pytest

from megatron_rl.errors import UserError
from megatron_rl.rewards import VERIFIERS
from tools.data.make_topological_sort import main, make_problems


def test_problems_keep_the_rules():
    records = make_problems(300, 1, items=6, pairs=7)
    assert len({frozenset(map(tuple, record["before"])) for record in records}) == 300
    for record in records:
        assert VERIFIERS["topological_sort"](record, record["completion"]).value == 1.0
        assert (record["items"], len(record["before"])) == (list("abcdef"), 7)
        assert {item for pair in record["before"] for item in pair} == set("abcdef")
        assert record["prompt"] == " ".join(a + b for a, b in record["before"]) + ":"
    firsts = {record["completion"][0] for record in records}
    assert firsts == set("abcdef")


def test_all_problems_of_a_small_space_are_found():
    # a before b or b before a; with a third letter and all three pairs, the 6 orders
    assert {record["prompt"] for record in make_problems(2, 1, 2, 1)} == {"ab:", "ba:"}
    orders = {record["completion"] for record in make_problems(6, 1, 3, 3)}
    assert len(orders) == 6
    with pytest.raises(UserError, match="6 different problems found, 7 wanted"):
        make_problems(7, 1, 3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--items", "1"], "--items 1; expected 2 to 26 letters"),
        (
            ["--items", "6", "--pairs", "2"],
            "--pairs 2; expected 3 (each of 6 letters is in one) to 15",
        ),
        (["--items", "3", "--pairs", "4"], "to 3 (all there are)"),
    ],
)
def test_mistakes(tmp_path, capsys, options, message):
    assert main(["--out", str(tmp_path), "--train", "5", *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_files(tmp_path, capsys):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        sizes = ["--train", "40", "--eval", "10", "--sft", "5"]
        assert main(["--out", str(tmp_path / name), *sizes, "--seed", seed]) == 0
    assert "train.jsonl: 40 problems" in capsys.readouterr().out
    prompts = []
    for name, count in (("train", 40), ("eval", 10), ("sft", 5)):
        text = (tmp_path / "a" / f"{name}.jsonl").read_text()
        assert text == (tmp_path / "b" / f"{name}.jsonl").read_text()
        assert text != (tmp_path / "c" / f"{name}.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        assert len(records) == count
        prompts += [record["prompt"] for record in records]
    assert len(set(prompts)) == 55

"""The Countdown data maker: solvable, different, the same bytes every time."""

import itertools
import json
import time

import pytest

from megatron_rl.errors import UserError
from megatron_rl.rewards import VERIFIERS
from tools.data.make_countdown import Rules, main, make_problems
from tools.data.train_tokenizer import main as train_tokenizer


def keys(records):
    return [(tuple(sorted(record["numbers"])), record["target"]) for record in records]


@pytest.mark.parametrize(
    "rules",
    [
        Rules(),
        Rules(min_numbers=3, max_numbers=6, max_number=50, max_target=200),
        Rules(operators="+-", min_target=10, max_target=20),
        Rules(min_numbers=4, max_numbers=4, positive_integers=False, min_target=-5, max_target=9),
    ],
)
def test_problems_keep_the_rules(rules):
    records = make_problems(300, 1, rules)
    assert len(set(keys(records))) == 300
    for record in records:
        assert VERIFIERS["countdown"](record, record["completion"]).value == 1.0
        assert rules.min_numbers <= len(record["numbers"]) <= rules.max_numbers
        assert all(1 <= number <= rules.max_number for number in record["numbers"])
        assert rules.min_target <= record["target"] <= rules.max_target
        assert set(record["completion"]) <= set(rules.operators + "()0123456789")
        numbers = " ".join(map(str, record["numbers"]))
        assert record["prompt"] == f"{numbers}={record['target']}:"
    sizes = {len(record["numbers"]) for record in records}
    assert sizes == set(range(rules.min_numbers, rules.max_numbers + 1))
    used = set("".join(record["completion"] for record in records)) & set("+-*/")
    assert used == set(rules.operators)


def test_all_problems_of_a_small_space_are_found():
    # Pairs from 1..3 under +: sums 2 to 6, with 1+3 and 2+2 two problems.
    records = make_problems(6, 1, Rules(2, 2, 3, 1, 100, "+"))
    pairs = itertools.combinations_with_replacement((1, 2, 3), 2)
    assert sorted(keys(records)) == sorted((pair, sum(pair)) for pair in pairs)
    with pytest.raises(UserError, match="6 different problems found, 7 wanted"):
        make_problems(7, 1, Rules(2, 2, 3, 1, 100, "+"))


def test_the_seed_decides():
    assert make_problems(50, 1, Rules()) == make_problems(50, 1, Rules())
    assert make_problems(50, 1, Rules()) != make_problems(50, 2, Rules())


def run(folder, *options):
    sizes = ["--train", "200", "--eval", "50", "--sft", "30"]
    return main(["--out", str(folder), *sizes, "--numbers", "3-4", *options])


def test_files(tmp_path, capsys):
    assert run(tmp_path / "a") == run(tmp_path / "b") == 0
    assert "train.jsonl: 200 problems" in capsys.readouterr().out
    splits = {}
    for name, count in (("train", 200), ("eval", 50), ("sft", 30)):
        path = tmp_path / "a" / f"{name}.jsonl"
        assert path.read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(records) == count
        splits[name] = set(keys(records))
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == 280
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["eval.jsonl", "sft.jsonl", "train.jsonl"]  # and no unfinished one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--numbers", "1"], "--numbers 1-1; expected a range within 2-6"),
        (["--numbers", "4-3"], "--numbers 4-3; expected"),
        (["--numbers", "3-7"], "--numbers 3-7; expected"),
        (["--max-number", "0"], "--max-number 0; expected at least 1"),
        (["--min-target", "9", "--max-target", "8"], "targets from 9 to 8; expected min <= max"),
        (["--ops=+%"], "--ops '+%'; expected some of"),
        (["--max-number", "1", "--ops=*"], "different problems found"),
    ],
)
def test_users_mistakes(tmp_path, capsys, options, message):
    assert run(tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_files_are_never_written_through_a_link_and_a_place_that_is_none_is_one_line(
    tmp_path, capsys
):
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.write_text("keep me")
    out.mkdir()
    for name in ("train.jsonl", "train.jsonl.part", "tok.model", "tok.model.part"):
        (out / name).symlink_to(mine)
    assert run(out) == 0
    words = [str(out / "train.jsonl"), "--out", str(out / "tok.model"), "--vocab-size", "64"]
    assert train_tokenizer(words) == 0
    assert mine.read_text() == "keep me" and not (out / "tok.model").is_symlink()
    capsys.readouterr()
    assert run(mine) == train_tokenizer([words[0], "--out", f"{mine}/tok.model"]) == 2
    assert capsys.readouterr().err == (
        f"make_countdown: --out {mine} could not be written (File exists: {mine}); expected room "
        "on the disk and the right to write there; choose another place\n"
        f"train_tokenizer: --out {mine}/tok.model could not be written (File exists: {mine}); "
        "expected room on the disk and the right to write there; choose another place\n"
    )


def test_speed():
    start = time.process_time()
    make_problems(5000, 1, Rules())
    assert time.process_time() - start < 3.0

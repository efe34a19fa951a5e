"""Which samples a page holds, and what of them."""

from megatron_rl.report.samples import LONGEST_TEXT, for_page, how_many


def rows(steps, each, text="x"):
    return [
        {"step": step, "prompt": "p", "completion": f"{step}-{i} {text}", "reward": 0.5}
        for step in steps
        for i in range(each)
    ]


def test_few_samples_are_all_there():
    samples = rows(range(1, 101), 4)
    assert [row["completion"] for row in for_page(samples)] == [s["completion"] for s in samples]
    assert how_many(samples) == ""


def test_of_many_those_of_steps_spread_over_the_run_are_there():
    """4 of 16 rows: of 8 steps of two rows, the first and the last."""
    assert [row["step"] for row in for_page(rows(range(1, 9), 2), most=4)] == [1, 1, 8, 8]
    found = [row["step"] for row in for_page(rows(range(1, 11), 2), most=10)]
    assert found == [1, 1, 3, 3, 5, 5, 8, 8, 10, 10]  # steps 1, 3.25, 5.5, 7.75 and 10
    many = rows(range(1, 501), 2)
    assert how_many(many) == "The page holds 400 of 1000."


def test_samples_are_bounded_by_their_characters_too():
    samples = rows(range(1, 401), 1, "y" * 100_000)
    kept = for_page(samples)
    assert 30 <= len(kept) <= 41  # 4 million characters
    assert (kept[0]["step"], kept[-1]["step"]) == (1, 400)


def test_a_row_has_what_the_browser_shows():
    long = "z" * (LONGEST_TEXT + 7)
    sample = {"step": 3, "prompt": long, "reward": "odd", "reason": None, "index": 5}
    (row,) = for_page([sample], arm="a")
    assert row.pop("prompt") == "z" * LONGEST_TEXT + "... (7 more characters)"
    assert row == {"step": 3, "arm": "a", "completion": "", "reason": "", "reward": "odd"}


def test_tokens_have_lists_of_one_length():
    good = {"text": ["a", "b"], "gamma": [1.0, 0.5], "ratio": [1.0, None], "other": 1}
    wanted = {"text": ["a", "b"], "gamma": [1.0, 0.5], "ratio": [1.0, None]}
    (row,) = for_page([{"step": 1, "by_token": good, "tokens": 2}])
    assert row["tokens"] == wanted
    (row,) = for_page([{"step": 1, "by_token": good, "advantage": -0.5}])
    assert row["tokens"] == {**wanted, "advantage": [-0.5, -0.5]}
    for bad in ([], {"text": "ab"}, {"text": ["a"], "gamma": [1, 2]}, {"text": [1], "gamma": [1]}):
        assert "tokens" not in for_page([{"step": 1, "by_token": bad}])[0]

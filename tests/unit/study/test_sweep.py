"""Arms made from values of keys."""

import math

import pytest

from megatron_rl.errors import UserError
from megatron_rl.study.schema import Sweep
from megatron_rl.study.sweep import sweep_arms


def sweep(**fields):
    return sweep_arms(Sweep.model_validate(fields, strict=False))


def test_a_grid_is_every_combination_in_order():
    found = sweep(over={"optimizer.lr": [0.001, 0.01], "algorithm.name": ["gmpo", "grpo"]})
    assert found == {
        "lr=0.001,name=gmpo": {"optimizer.lr": 0.001, "algorithm.name": "gmpo"},
        "lr=0.001,name=grpo": {"optimizer.lr": 0.001, "algorithm.name": "grpo"},
        "lr=0.01,name=gmpo": {"optimizer.lr": 0.01, "algorithm.name": "gmpo"},
        "lr=0.01,name=grpo": {"optimizer.lr": 0.01, "algorithm.name": "grpo"},
    }


def test_keys_with_the_same_last_part_are_written_out():
    found = sweep(over={"algorithm.name": ["gmpo"], "optimizer.name": ["adam"]})
    assert list(found) == ["algorithm.name=gmpo,optimizer.name=adam"]


def test_values_that_are_no_name_give_numbers():
    found = sweep(over={"algorithm.name": ["./a.py:loss", "./b.py:loss"]})
    assert found == {
        "sweep_1": {"algorithm.name": "./a.py:loss"},
        "sweep_2": {"algorithm.name": "./b.py:loss"},
    }


def test_random_draws_stay_in_their_ranges_and_are_always_the_same():
    over = {
        "optimizer.lr": {"low": 1e-5, "high": 1e-3, "log": True},
        "algorithm.mini_batches": {"low": 1, "high": 3, "whole": True},
        "algorithm.name": ["gmpo", "rspo"],
    }
    found = sweep(kind="random", over=over, count=400, seed=7)
    assert found == sweep(kind="random", over=over, count=400, seed=7)
    assert list(found) != list(sweep(kind="random", over=over, count=400, seed=8))
    assert len(found) == 400
    rates = [arm["optimizer.lr"] for arm in found.values()]
    assert 1e-5 <= min(rates) < 2e-5 and 5e-4 < max(rates) <= 1e-3
    below = sum(math.log10(rate) < -4 for rate in rates) / 400
    assert 0.4 < below < 0.6  # half of the decades
    sizes = [arm["algorithm.mini_batches"] for arm in found.values()]
    assert {size: 0.25 < sizes.count(size) / 400 < 0.42 for size in sizes} == dict.fromkeys(
        (1, 2, 3), True
    )
    assert {arm["algorithm.name"] for arm in found.values()} == {"gmpo", "rspo"}


def test_a_draw_is_never_drawn_twice():
    found = sweep(kind="random", over={"seed": [1, 2, 3]}, count=3)
    assert sorted(arm["seed"] for arm in found.values()) == [1, 2, 3]
    with pytest.raises(UserError, match="sweep.count is 4, and there are only 3 combinations"):
        sweep(kind="random", over={"seed": [1, 2, 3]}, count=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"over": {"a.b": {"low": 0.0, "high": 1.0}}},
            "sweep.over.a.b is a range; expected a list",
        ),
        ({"over": {"a.b": []}}, r"sweep.over.a.b is \[\]; expected one value or more"),
        ({"over": {"a.b": [1, 1]}}, "expected one value or more, each once"),
        ({"kind": "random", "over": {"a": {"low": 1, "high": 1}}}, "expected low < high"),
        (
            {"kind": "random", "over": {"a": {"low": 0, "high": 1, "log": True}}},
            "expected 0 < low < high",
        ),
        (
            {"kind": "random", "over": {"a": {"low": 0.2, "high": 0.8, "whole": True}}},
            "from 0.2 to 0.8; expected low < high, and a whole number between them",
        ),
        (
            {"kind": "random", "over": {"a": {"low": -1e308, "high": 1e308}}},
            r"from -1e\+308 to 1e\+308; expected low < high, and a finite width",
        ),
        (
            {"over": {"a": list(range(101)), "b": list(range(100))}},
            "sweep.over has 10,100 combinations; expected at most 10,000",
        ),
    ],
)
def test_values_that_are_none_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        sweep(**fields)

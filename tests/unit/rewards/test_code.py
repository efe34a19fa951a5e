"""The code verifier: how a program is put together, and HumanEval's own solutions."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_rl.errors import UserError
from megatron_rl.rewards import VERIFIERS
from megatron_rl.rewards.code import MAX_CHARACTERS, build_program

HUMANEVAL = Path(__file__).parents[4] / "shared" / "data" / "humaneval" / "HumanEval.jsonl.gz"

RECORD = {
    "prompt": "import math\n\ndef double(x):\n    return 2 * x\n\ndef area(r):\n",
    "tests": "def check(candidate):\n    assert candidate(2) == double(2) * math.pi\n",
    "entry_point": "area",
}
BODY = "    return math.pi * r**2"
WHOLE = "def area(r):\n" + BODY + "\n"


@pytest.mark.parametrize(
    "completion",
    [
        BODY,
        WHOLE,
        f"Here:\n```python\n{WHOLE}```\nDone.",
        f"```\n{WHOLE}```",
        f"```py\n{BODY}\n```",
        f"```python\n{WHOLE}```\nuse it as\n```python\nprint(area(1))\n```",
        f"```python\ndef area(r): return 0\n```\nbetter\n```python\n{WHOLE}```",
        f"```python\n{WHOLE}",  # cut before the closing fence
    ],
)
def test_right(completion):
    reward = VERIFIERS["code"](RECORD, completion)
    assert (reward.value, reward.parts) == (1.0, {"solved": 1.0, "well_formed": 1.0})


@pytest.mark.parametrize(
    ("completion", "well_formed"),
    [
        ("    return 3 * r**2", 1.0),
        ("    return math.pi *", 0.0),
        ("", 0.0),
        (" \n", 0.0),
        ("#" * (MAX_CHARACTERS + 1), 0.0),
        ("import sys; sys.exit(0)\n" + WHOLE, 1.0),
    ],
)
def test_not_right(completion, well_formed):
    reward = VERIFIERS["code"](RECORD, completion)
    assert (reward.value, reward.parts) == (0.0, {"solved": 0.0, "well_formed": well_formed})


def test_build_program():
    prompt = "import a\n\ndef f():\n"
    assert build_program(prompt, "    pass", "f") == "import a\n\ndef f():\n    pass"
    assert build_program(prompt, "def f(): ...", "f") == "import a\n\n\ndef f(): ..."
    assert build_program(prompt, "def ff(): ...", "f") == prompt + "def ff(): ..."
    assert build_program("Write f.", "def f(): ...", "f") == "def f(): ..."


def test_tests_may_be_a_list():
    record = {"tests": ["assert f(1) == 1", "assert f(2) == 4"], "entry_point": "f"}
    assert VERIFIERS["code"](record, "def f(x): return x * x").value == 1.0
    assert VERIFIERS["code"](record, "def f(x): return 1").value == 0.0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tests": ""}, "entry_point"),
        ({"entry_point": "f"}, "tests"),
        ({"entry_point": "f", "tests": 3}, "tests of type int"),
        ({"entry_point": 1, "tests": ""}, "entry_point of type int"),
    ],
)
def test_a_bad_record_is_the_users_mistake(record, message):
    with pytest.raises(UserError, match=message):
        VERIFIERS["code"](record, "pass")


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="HumanEval is not beside the repository")
def test_humaneval():
    records = [json.loads(line) for line in gzip.open(HUMANEVAL, "rt", encoding="utf-8")]
    for record in records[::20]:
        right = VERIFIERS["code"](record, record["canonical_solution"])
        assert right.value == 1.0, (record["task_id"], right.reason)
        wrong = VERIFIERS["code"](record, "    return None\n")
        assert wrong.value == 0.0, record["task_id"]

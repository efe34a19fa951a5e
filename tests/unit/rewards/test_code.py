"""The code verifier: how a program is put together, and HumanEval's own solutions."""

import gzip
import json
import textwrap
import time
from pathlib import Path

import pytest

from megatron_rl.errors import RunFailed, UserError
from megatron_rl.rewards import VERIFIERS, fences
from megatron_rl.rewards.code import MAX_CHARACTERS, build_programs

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


NOTE = '    """For example:\n\n    ```python\n    area(1)\n    ```\n    """\n'
NOTED = "def area(r):\n" + NOTE + BODY + "\n"
OUTER = '"""Areas.\n\n```\n>>> area(1)\n```\n"""\n' + WHOLE
METHOD = "class Solution:\n    def area(self, r):\n    " + BODY.replace("\n", "\n    ") + "\n"
LISTED = "1. So:\n\n" + textwrap.indent(f"```python\n{WHOLE}\n```\n", " " * 5)


@pytest.mark.parametrize(
    "completion",
    [
        pytest.param(NOTE + BODY, id="body, fences in its docstring"),
        pytest.param(NOTED, id="function, fences in its docstring"),
        pytest.param(f"So:\n```python\n{NOTED}```\nDone.", id="block, fences in a docstring"),
        pytest.param(OUTER, id="fences at the margin"),
        pytest.param(f"So:\n```python\n{OUTER}```\nDone.", id="block, fences at the margin"),
        pytest.param(f"~~~\n{WHOLE}~~~\nDone.", id="tildes"),
        pytest.param(f"~~~python\n{NOTED}~~~\nDone.", id="tildes around back-ticks"),
        pytest.param(f"````python\n{OUTER}````\n", id="a longer fence"),
        pytest.param(f'```python title="area.py"\n{WHOLE}```', id="info string"),
        pytest.param(f"```{{.python .numberLines}}\n{WHOLE}```", id="attributes"),
        pytest.param(f"```Python 3\n{WHOLE}```", id="version"),
        pytest.param(f"``` python\r\n{WHOLE}```\r\n", id="line ends of Windows"),
        pytest.param(LISTED, id="in a list"),
        pytest.param(f"   ```python\n{WHOLE}   ```", id="indented fences alone"),
        pytest.param(f"```python\n{BODY}\n```\n```text\n3.14\n```", id="output behind it"),
        pytest.param(f"```python\n{WHOLE.strip()}```\nDone.", id="closed behind a statement"),
        pytest.param(f"So: ```python\n{WHOLE}```", id="opened behind a word"),
        pytest.param(f"````markdown\n```python\n{WHOLE}```\n````", id="Markdown in Markdown"),
        pytest.param(f"Use `` ` `` and\n```a``` or\n```\n{WHOLE}```", id="code in a line"),
        pytest.param(f"~~~python\n{WHOLE}", id="tildes, cut"),
        pytest.param(METHOD, id="class Solution"),
        pytest.param(f"```python\n{METHOD}```", id="class Solution in a block"),
        pytest.param(f"```\n{METHOD}```\n```\nSolution().area(1)\n```", id="and its use"),
        pytest.param("area = lambda r: math.pi * r**2", id="lambda"),
    ],
)
def test_every_way_to_write_a_right_program(completion):
    reward = VERIFIERS["code"](RECORD, completion)
    assert (reward.value, reward.reason) == (1.0, "all tests passed")


@pytest.mark.parametrize("entry_point", ["area", "Solution().area"])
@pytest.mark.parametrize(
    ("tests", "prompt"),
    [
        (
            "def check(candidate):\n    assert candidate(2) == 4 and candidate(r=3) == 9",
            "Write it.",
        ),
        ("assert area(2) == 4", "class Solution:\n    def area(self, r):\n"),
        ("assert Solution().area(2) == 4\nassert area is not Solution", ""),
    ],
)
def test_a_method_of_a_class(tests, prompt, entry_point):
    record = {"prompt": prompt, "tests": tests, "entry_point": entry_point}
    right = "class Solution:\n    def area(self, r):\n        return r * r"
    assert VERIFIERS["code"](record, right).value == 1.0
    assert VERIFIERS["code"](record, right.replace("r * r", "r")).value == 0.0


def test_each_call_has_an_instance_of_its_own():
    record = {"tests": "assert f(1) == 1\nassert f(1) == 1", "entry_point": "f"}
    program = (
        "class Solution:\n    def __init__(self): self.calls = 0\n"
        "    def f(self, x):\n        self.calls += x\n        return self.calls\n"
    )
    assert VERIFIERS["code"](record, program).value == 1.0


def test_of_several_blocks_the_last_counts_even_if_it_is_wrong():
    broken = WHOLE.replace("return", "return (")
    for last in (broken, WHOLE.replace("**2", "**3")):
        answer = f"```python\n{WHOLE}```\nor better\n```python\n{last}```"
        assert VERIFIERS["code"](RECORD, answer).value == 0.0


@pytest.mark.parametrize(
    "line", ["```\n", "```a\n```\n", "```a\n", "~~~\n```\n", "`" * 9, " `" * 9]
)
def test_reading_is_quick_whatever_is_read(line):
    text = line * (MAX_CHARACTERS // len(line))
    start = time.process_time()
    assert len(build_programs("", text, "f")) <= 8
    assert time.process_time() - start < 10  # a scan of the whole for each block takes minutes


@pytest.mark.parametrize("rest", ["\n", "```\n"])
def test_few_lines_are_looked_at_for_the_end_of_a_block(rest, monkeypatch):
    looked = []
    closes = fences._closes
    monkeypatch.setattr(fences, "_closes", lambda *a: looked.append(a) or closes(*a))
    blocks = "".join(f"{' ' * deep}````\n{' ' * deep}````\n" for deep in range(0, 200, 4))
    fences.fenced_blocks(blocks + rest * 10_000)  # none of which ends a block of four
    assert len(looked) <= 100_000  # not 10,000 for each of 50 blocks


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


@pytest.mark.parametrize(
    ("prompt", "completion", "program"),
    [
        ("import a\n\ndef f():\n", "    pass", "import a\n\ndef f():\n    pass"),
        ("import a\n\ndef f():\n", "def f(): ...", "import a\n\n\ndef f(): ..."),
        ("import a\n\ndef f():\n", "def ff(): ...", "import a\n\ndef f():\ndef ff(): ..."),
        ("Write f.", "def f(): ...", "def f(): ..."),
        ("Write f.", "f = lambda: ...", "f = lambda: ..."),
    ],
)
def test_without_fences_there_is_one_reading(prompt, completion, program):
    assert build_programs(prompt, completion, "f") == [program]


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


def test_a_full_disk_is_not_the_answers_fault(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(RunFailed) as told:
        VERIFIERS["code"](RECORD, WHOLE)
    said = str(told.value)
    assert said.startswith("the code sandbox could not be started (No such file or directory: ")
    assert f"{tmp_path}/gone/" in said and "\n" not in said
    assert said.endswith(
        "expected room for temporary files, and processes and open files left; mend it and run the "
        "same command to continue"
    )

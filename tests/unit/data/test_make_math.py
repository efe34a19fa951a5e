"""tools/data/make_math.py: problems that the math verifier judges."""

import json
import subprocess
import sys

import pytest

from megatron_rl.data.jsonl import load_records
from megatron_rl.rewards.math import MathVerifier
from tests.support.runs import ROOT

GSM8K = [
    {"question": "Two and two? ", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {"question": "Half of 3\u2028?", "answer": "#### 1.5"},
]


def make(folder, records, *words):
    source = folder / "source.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = [sys.executable, str(ROOT / "tools" / "data" / "make_math.py")]
    command += ["--source", str(source), "--out", str(folder / "data" / "made.jsonl"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_questions_become_messages_and_answers_stay(tmp_path):
    done = make(tmp_path, GSM8K, "--instruction", "Box it.")
    assert done.returncode == 0 and done.stdout.endswith("made.jsonl: 2 problems\n")
    first, second = load_records(tmp_path / "data" / "made.jsonl")
    assert first["prompt"] == [{"role": "user", "content": "Two and two?\n\nBox it."}]
    assert second["prompt"][0]["content"] == "Half of 3\u2028?\n\nBox it."
    verify = MathVerifier()
    assert verify(first, "It is \\boxed{4}").value == 1.0
    assert verify(first, "It is \\boxed{5}").value == 0.0
    assert verify(second, "3/2 = 1.5").value == 1.0


@pytest.mark.parametrize(
    "records, words, message",
    [
        ([{"q": "?", "answer": "1"}], (), "line 1: found no text under 'question'; expected it"),
        (GSM8K, ("--answer-key", "solution"), "line 1: found no text under 'solution'"),
        ([GSM8K[0], {"question": " ", "answer": "1"}], (), "line 2: found no text under 'questio"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, records, words, message):
    done = make(tmp_path, records, *words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists()

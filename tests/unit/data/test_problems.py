"""The lines of a data set before any tokenizer: chats, reference answers, what verifiers need."""

import json
import re
from pathlib import Path

import pytest

from megatron_rl.config.schema import Config, DataConfig
from megatron_rl.data.problems import read_problems
from megatron_rl.data.run_data import read_files
from megatron_rl.errors import UserError
from megatron_rl.rewards import check_countdown_record, check_math_record

DATA = DataConfig()


def write(tmp_path, *records):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def user(content):
    return [{"role": "user", "content": content}]


def test_text_parts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "3+3?"}]
    path = write(tmp_path, {"prompt": user(parts[:1])}, {"prompt": user(parts)})
    found = read_problems(path, DATA)
    assert [problem.prompt for problem in found.problems] == [
        user("What is "),
        user("What is 3+3?"),
    ]
    assert found.problems[1].record == {"prompt": user(parts)}


def test_a_chat_that_is_stored_as_text_is_a_chat(tmp_path):
    chat = user([{"type": "text", "text": "2+2?"}])
    path = write(tmp_path, {"prompt": json.dumps(chat, indent=1)}, {"prompt": "[3, 4] = 7:"})
    found = read_problems(path, DATA)
    assert [problem.prompt for problem in found.problems] == [user("2+2?"), "[3, 4] = 7:"]
    assert found.notes == {"chats stored as JSON text, read as chats": 1}


def test_a_chat_that_is_stored_as_text_in_another_order_of_keys_is_a_chat(tmp_path):
    chat = [{"name": "ann", "content": "2+2?", "role": "user"}]
    data_in_text = ['{"role": "cook", "age": 3}', '[{"from": "a", "to": "b"}]', "{2+2}"]
    records = [{"prompt": text} for text in (json.dumps(chat), *data_in_text)]
    found = read_problems(write(tmp_path, *records), DATA)
    assert [problem.prompt for problem in found.problems] == [chat, *data_in_text]


@pytest.mark.parametrize(
    "chat",
    [
        {"role": "user", "content": "2+2?"},
        {"messages": [{"role": "user", "content": "2+2?"}]},
        {"conversations": [{"from": "human", "value": "2+2?"}]},
        [{"from": "human", "value": "2+2?"}],
    ],
)
def test_a_chat_of_another_form_that_is_stored_as_text_is_refused(tmp_path, chat):
    with pytest.raises(UserError, match="data.jsonl, line 1: .*expected an? (object|list)"):
        read_problems(write(tmp_path, {"prompt": json.dumps(chat)}), DATA)


@pytest.mark.parametrize("role", ["Assistant", "model", "gpt"])
def test_an_answer_by_another_name_of_the_assistant_is_refused(tmp_path, role):
    chat = [*user("3+3="), {"role": role, "content": "6"}]
    with pytest.raises(UserError, match=f"line 1: 'prompt' ends with a message of the {role}: the"):
        read_problems(write(tmp_path, {"prompt": chat}), DATA)


def test_a_turn_that_calls_tools_may_have_no_content(tmp_path):
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    chat = [
        *user("1+1?"),
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "2"},
    ]
    (problem,) = read_problems(write(tmp_path, {"prompt": chat}), DATA).problems
    assert problem.prompt[1] == {"role": "assistant", "content": "", "tool_calls": calls}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (user(None), "message 1 of 'prompt' has the content null; expected text"),
        (user([]), "message 1 of 'prompt' has the content []; expected text"),
        (user({"text": "a"}), 'message 1 of \'prompt\' has the content {"text": "a"}; expected'),
        (user(" \n"), "message 1 of 'prompt' is the user's and empty; expected text"),
        (
            user([{"type": "text", "text": "Look:"}, {"type": "image", "image": "x.png"}]),
            "message 1 of 'prompt' has a part of type image; expected parts",
        ),
        (user([{"type": "text", "text": None}]), "message 1 of 'prompt' has the part {"),
        (user(["a"]), "message 1 of 'prompt' has the part \"a\"; expected parts"),
        ([{"from": "human", "value": "a"}], 'message 1 of \'prompt\' is {"from": "human"'),
        ([*user("a"), "b"], "message 2 of 'prompt' is \"b\"; expected an object with role"),
        (
            str(user("a")),
            "'prompt' is text that looks like chat messages but is no JSON list of them",
        ),
        (3, "'prompt' is 3; expected text or a list of chat messages"),
        ("", "'prompt' is \"\"; expected text or a list of chat messages"),
        ([], "'prompt' is []; expected text or a list of chat messages"),
        (
            [*user("3+3="), {"role": "assistant", "content": "6"}],
            "'prompt' ends with a message of the assistant: the prompt would hold the answer",
        ),
    ],
)
def test_prompts_that_are_none(tmp_path, prompt, message):
    path = write(tmp_path, {"prompt": "a"}, {"prompt": prompt})
    with pytest.raises(UserError, match=re.escape(f"{path}, line 2: {message}")) as caught:
        read_problems(path, DATA)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [({"p": "ab"}, "no 'prompt' among p"), ({}, "no 'prompt' among no keys")],
)
def test_a_prompt_is_needed(tmp_path, record, message):
    with pytest.raises(UserError, match=f"line 1: {message}; expected it in every line"):
        read_problems(write(tmp_path, record), DATA)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, "line 1: no 'completion' among prompt"),
        ({"prompt": "a", "completion": 3}, "line 1: 'completion' is int; expected text"),
    ],
)
def test_a_reference_answer_is_needed_for_fine_tuning(tmp_path, record, message):
    with pytest.raises(UserError, match=message):
        read_problems(write(tmp_path, record), DATA, completions=True)


def test_the_assistants_last_turn_as_the_reference(tmp_path):
    data = DataConfig(prompt_key="messages", last_turn="reference")
    chat = [*user("3+3="), {"role": "assistant", "content": [{"type": "text", "text": "6"}]}]
    path = write(tmp_path, {"messages": chat}, {"messages": chat, "answer": "six"})
    found = read_problems(path, data)
    assert [problem.prompt for problem in found.problems] == [user("3+3=")] * 2
    assert [problem.record["answer"] for problem in found.problems] == ["6", "six"]
    # A verifier that looks at the problem's text finds no answer there.
    assert [problem.record["messages"] for problem in found.problems] == [user("3+3=")] * 2
    note = "chats that ended with the assistant's answer, taken as the reference"
    assert found.notes == {note: 2}
    tuned = read_problems(path, data, completions=True).problems
    assert [(problem.prompt, problem.completion) for problem in tuned] == [(user("3+3="), "6")] * 2
    with pytest.raises(UserError, match="line 1: 'messages' holds only a message of the assistan"):
        read_problems(write(tmp_path, {"messages": chat[1:]}), data)


GOOD = {
    "countdown": {"prompt": "3 4=7:", "numbers": [3, 4], "target": 7},
    "math": {"prompt": "3+4?", "answer": "#### 7"},
    "code": {"prompt": "p", "tests": "def check(c):\n    assert c() is 1\n", "entry_point": "f"},
}


@pytest.mark.parametrize(
    ("verifier", "change", "message"),
    [
        ("countdown", {"target": None}, "target None; the verifier 'countdown' expects an integer"),
        ("countdown", {"target": ...}, "record with numbers, prompt; the verifier 'countdown' exp"),
        ("countdown", {"numbers": "3 4"}, "numbers '3 4'; the verifier 'countdown' expects a list"),
        ("countdown", {"numbers": []}, "numbers []; the verifier 'countdown' expects at least one"),
        ("countdown", {"numbers": [3, -4]}, "numbers 3 -4; the verifier 'countdown' expects at le"),
        ("math", {"answer": ...}, "record with prompt; the verifier 'math' expects 'answer'"),
        ("math", {"answer": "####"}, "empty answer; the verifier 'math' expects a reference"),
        ("math", {"answer": None}, "answer of type NoneType; the verifier 'math' expects text"),
        ("code", {"tests": ...}, "record with entry_point, prompt; the verifier 'code' expects 't"),
        ("code", {"tests": "assert f( == 1"}, "tests that do not compile (SyntaxError"),
        ("code", {"tests": 3}, "tests of type int; the verifier 'code' expects text"),
        ("code", {"entry_point": "f(x)"}, "entry_point 'f(x)'; the verifier 'code' expects the na"),
    ],
)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_what_the_verifier_needs_is_looked_for_in_every_line(
    tmp_path, verifier, change, message, split
):
    merged = {**GOOD[verifier], **change}
    record = {key: value for key, value in merged.items() if value is not ...}
    path = write(tmp_path, GOOD[verifier], record, GOOD[verifier])
    verb = {"train": "train", "eval": "evaluate"}[split]
    config = Config(data={split: path}, reward={"name": verifier})
    with pytest.raises(UserError, match=re.escape(f"{path}, line 2: {message}")):
        read_files(config, verb)
    write(tmp_path, GOOD[verifier])
    assert [len(file.problems) for file in read_files(config, verb).values()] == [1]


def test_fine_tuning_needs_no_verifier_for_its_training_data(tmp_path):
    path = write(tmp_path, {"prompt": "a", "completion": "b"})
    files = read_files(Config(data={"train": path}), "sft")
    assert files["train"].problems[0].completion == "b"
    with pytest.raises(UserError, match="line 1: record with completion, prompt; the verifier"):
        read_files(Config(data={"train": path, "eval": path}), "sft")


def test_every_line_of_gsm8k_is_fine():
    path = Path(__file__).parents[4] / "shared" / "data" / "gsm8k" / "test.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    found = read_problems(path, DataConfig(prompt_key="question"), check_math_record)
    assert len(found.problems) == 1319 and not found.notes
    assert all(problem.prompt == problem.record["question"] for problem in found.problems)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "x", "a\nb": 1},
            r"record with a\\nb, prompt; the verifier 'countdown' expects",
        ),
        ({"prompt": "x", "k" * 5000: 1}, "record with kkk"),
        (
            {"prompt": "x", "numbers": ["a" * 5000], "target": 1},
            r"numbers \['aaa.*\.\.\.; the verif",
        ),
        (
            {"prompt": "x", "numbers": [1], "target": "a\n" * 5000},
            r"target 'a\\na\\n.*\.\.\.; the ver",
        ),
        ({"a\nb": "x"}, r"no 'prompt' among a\\nb; expected it in every line"),
        ({"prompt": [{"role": "user", "content": [{"type": "b" * 5000}]}]}, "a part of type bbb"),
    ],
)
def test_what_a_line_holds_is_shown_on_one_short_line(tmp_path, record, message):
    with pytest.raises(UserError, match=message) as error:
        read_problems(write(tmp_path, record), DataConfig(), check_countdown_record)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600

"""Prompts and answers from the columns that a configuration names."""

import json

import pytest

from megatron_rl.config.checks import check_config
from megatron_rl.config.presets import MODEL_PRESETS
from megatron_rl.config.schema import Config
from megatron_rl.config.schema_data import DataConfig
from megatron_rl.config.template import fill
from megatron_rl.data.problems import read_problems
from megatron_rl.errors import UserError
from megatron_rl.rewards.math import check_math_record


def problems_of(tmp_path, *records, check=None, completions=False, **data):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_problems(path, DataConfig(**data), check, completions)


def test_a_template_of_columns(tmp_path):
    record = {"question": "1 + {x}?", "n": 3, "list": ["é"], "answer": "4"}
    template = "{{Problem}}: {question} of {n} in {list}\nAnswer:"
    (problem,) = problems_of(tmp_path, record, template=template).problems
    assert problem.prompt == '{Problem}: 1 + {x}? of 3 in ["é"]\nAnswer:'
    # a verifier finds the problem's text, and what the record says itself
    assert problem.record == {"prompt": problem.prompt, **record}


def test_a_template_takes_nothing_but_columns(tmp_path):
    """Attributes and formats of Python's own templates are none."""
    with pytest.raises(UserError, match=r"no 'q.__class__' among q; expected it in every line"):
        problems_of(tmp_path, {"q": "x"}, template="{q.__class__}")
    with pytest.raises(UserError, match=r"line 2: 'q' is null and stands in the template"):
        problems_of(tmp_path, {"q": "x"}, {"q": None}, template="{q}")
    assert fill("{q!r:>9999999999}", lambda name: name) == "q!r:>9999999999"


def test_answers_and_keys_within_keys(tmp_path):
    """As data sets of other trainers have them."""
    chat = [{"role": "user", "content": "2 + 2"}]
    record = {"prompt": chat, "reward_model": {"ground_truth": "4"}, "a.b": "5"}
    columns = {"answer_key": "reward_model.ground_truth"}
    (problem,) = problems_of(tmp_path, record, check=check_math_record, **columns).problems
    assert problem.record == {**record, "answer": "4"}
    (problem,) = problems_of(tmp_path, record, answer_key="a.b").problems
    assert problem.record["answer"] == "5"
    with pytest.raises(UserError, match=r"line 1: no 'reward_model.truth' among prompt, rew"):
        problems_of(tmp_path, record, answer_key="reward_model.truth")
    (problem,) = problems_of(
        tmp_path, record, completions=True, completion_key="reward_model.ground_truth"
    ).problems
    assert problem.completion == "4"


def test_a_message_of_the_system(tmp_path):
    system = {"role": "system", "content": "s"}
    user = {"role": "user", "content": "u"}
    own = {"role": "system", "content": "own"}
    found = problems_of(
        tmp_path, {"prompt": "u"}, {"prompt": [user]}, {"prompt": [own, user]}, system="s"
    )
    assert [problem.prompt for problem in found.problems] == [
        [system, user],
        [system, user],
        [own, user],
    ]
    assert found.notes == {"chats with their own system message, which is kept": 1}
    assert [problem.record["prompt"] for problem in found.problems][:2] == ["u", [user]]


def test_tools_of_a_record(tmp_path):
    tool = {"type": "function", "function": {"name": "add"}}
    records = [
        {"prompt": "a", "tools": [tool]},
        {"prompt": "a", "tools": json.dumps([tool])},
        {"prompt": "a", "tools": None},
        {"prompt": "a", "tools": []},
    ]
    found = problems_of(tmp_path, *records, tools_key="tools")
    assert [problem.tools for problem in found.problems] == [[tool], [tool], None, None]
    for wrong, message in (
        ({"name": "add"}, r"line 1: 'tools' is .*; expected a list of tools"),
        (["add"], r"line 1: 'tools' is .*; expected a list of tools"),
        ("[{]", r"line 1: 'tools' is text that is no JSON"),
    ):
        with pytest.raises(UserError, match=message):
            problems_of(tmp_path, {"prompt": "a", "tools": wrong}, tools_key="tools")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"template": "{q"}, r"data.template is '{q', with a single '{' in it; expected columns"),
        ({"template": "q"}, r"data.template is 'q', with no column in it"),
        ({"template": "{{q}}"}, r"with no column in it"),
        (
            {"template": "{q}", "prompt_key": "q"},
            r"data.template is given beside data.prompt_key q",
        ),
        ({"system": "s", "chat": "plain"}, r"data.system is given with data.chat plain"),
        (
            {"train": [{"path": "a", "system": "s"}], "chat": "rendered"},
            r"data.train.0.system is given with data.chat rendered",
        ),
        ({"eval": [{"path": "a", "template": "}"}]}, r"data.eval.0.template is '}', with a single"),
        (
            {"chat_template_kwargs": {"tokenize": True}},
            r"data.chat_template_kwargs sets tokenize, which is given by the program",
        ),
        (
            {"chat_template_kwargs": {"a": 1}, "chat": "plain"},
            r"data.chat_template_kwargs is given with data.chat plain, which uses no template",
        ),
        ({"train": []}, r"data.train is an empty list; expected one data set or more"),
        ({"train": "./mine.py:thing"}, r"data.train is 'mine.py:thing', and .*mine.py is no file"),
    ],
)
def test_what_the_check_refuses(data, message):
    config = Config.model_validate({"model": MODEL_PRESETS["tiny_moe"], "data": data})
    with pytest.raises(UserError, match=message):
        check_config(config, None, "train", files=False)

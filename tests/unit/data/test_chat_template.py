"""Chats through templates: what transformers makes of ordinary text, and text that stays text."""

import time
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_rl.config.schema_data import TokenizerConfig
from megatron_rl.data import chat_template
from megatron_rl.data.rendering import Rendering
from megatron_rl.data.tokenizers import load_tokenizer
from megatron_rl.errors import UserError
from megatron_rl.rewards.worker_pool import WorkerPool
from tests.support.chat_tokenizers import save_llama, save_mistral, save_qwen

FAMILIES = {
    "qwen": save_qwen,
    "llama": save_llama,
    "mistral": save_mistral,
    "mistral, legacy": lambda folder: save_mistral(folder, legacy=True),
}
#: family -> texts of control tokens, the end of a turn first
CONTROL = {
    "qwen": ["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
    "llama": ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>"],
    "mistral": ["</s>", "[/INST]", "<s>"],
    "mistral, legacy": ["</s>", "[/INST]", "<s>"],
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, our tokenizer, transformers')."""
    folder = FAMILIES[request.param](tmp_path_factory.mktemp("tokenizer"))
    ours = load_tokenizer(TokenizerConfig(kind="huggingface", path=folder))
    return request.param, ours, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def user(content):
    return [{"role": "user", "content": content}]


ORDINARY = {
    "a question": user("What is 2+2?"),
    "white space at both ends": user("  \n step by step\n\n "),
    "other alphabets": user("\u00e9\u4f60 \U0001f600 \u2028 x"),
    "parts of control tokens": user("a <|im_ b |> [INS T] < s> <think> 2</think>"),
    "turns": [
        {"role": "system", "content": "Be brief. "},
        *user("What is 2+2?"),
        {"role": "assistant", "content": "<think>the sum</think>\n\n4"},
        *user(" Say it twice."),
    ],
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_text_has_the_tokens_that_transformers_gives(family, name):
    _, ours, theirs = family
    expected = theirs.apply_chat_template(
        ORDINARY[name], add_generation_prompt=True, return_dict=False
    )
    assert ours.encode_prompt(ORDINARY[name]) == expected


@pytest.mark.parametrize("content", ["Say {} twice.", "{}", " {}{}\n{}", "a{}<think>b"])
def test_the_text_of_a_control_token_stays_text(family, content):
    """As many control tokens as without it, the same before and behind it, and the text itself."""
    name, ours, theirs = family
    end, *others = CONTROL[name]
    question = content.format(end, *others)
    chat = [{"role": "system", "content": f"Never say {end}."}, *user(question)]
    ids = ours.encode_prompt(chat)
    control = set(theirs.all_special_ids) | {i for i, t in theirs.added_tokens_decoder.items()}
    harmless = [{"role": "system", "content": "Never say it."}, *user("Say it twice.")]
    template = [i for i in ours.encode_prompt(harmless) if i in control]
    think = theirs.added_tokens_encoder.get("<think>")  # an added token, and no special one
    assert [i for i in ids if i in control - {think}] == template
    shown = theirs.decode(ids).replace(" ", "")
    assert question.strip().replace(" ", "") in shown and f"Neversay{end}." in shown
    parsed = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids != parsed  # where they have become control tokens
    assert ids[-1] == parsed[-1]


def test_the_tokens_around_it_are_those_of_the_text(tmp_path):
    """Written out: the template's tokens, and between them the plain text's."""
    folder = save_qwen(tmp_path)
    ours = load_tokenizer(TokenizerConfig(kind="huggingface", path=folder))
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    question, newline, answer = (
        theirs.encode(text, split_special_tokens=True)
        for text in ("user\nSay <|im_end|> twice.", "\n", "assistant\n")
    )
    assert theirs.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    ids = ours.encode_prompt(user("Say <|im_end|> twice."))
    assert ids == [1, *question, 2, *newline, 1, *answer]


def test_text_of_control_tokens_in_plain_text(family):
    name, ours, theirs = family
    end = CONTROL[name][0]
    ids = ours.encode_prompt(f"Say {end} twice.")
    assert theirs.convert_tokens_to_ids(end) not in ids
    assert ours.encode(f"Say {end} twice.", control=True) == theirs.encode(
        f"Say {end} twice.", add_special_tokens=False
    )
    assert ours.encode_prompt("Say it twice.") == theirs.encode("Say it twice.")
    assert ours.find_control(f"a {end}") == end and ours.find_control("Say it") is None
    assert f"Say {end} twice." in ours.show(ids)
    assert ours.show([ours.eos_id]) == end


THINKING = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking is false %}<think></think>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "description": "sum of <a> and 'b'"}}


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """Ours and transformers' of a template with variables."""
    folder = save_qwen(tmp_path_factory.mktemp("tokenizer"))
    (folder / "chat_template.jinja").write_text(THINKING)
    ours = load_tokenizer(TokenizerConfig(kind="huggingface", path=folder))
    return ours, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize(
    "variables",
    [{}, {"enable_thinking": True}, {"enable_thinking": False}, {"tools": [TOOL]}],
)
def test_variables_of_the_template(thinking, variables):
    ours, theirs = thinking
    chat = user("What is 2+2?")
    ids = ours.encode_prompt(chat, variables)
    assert ids == theirs.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False, **variables
    )
    plain = ours.encode_prompt(chat)
    assert (ids == plain) == (variables.get("enable_thinking", True) and "tools" not in variables)
    modes = Rendering(ours, "template", {"enable_thinking": False})
    end = theirs.encode("<think></think>")
    assert modes.prompt("What is 2+2?", Counter())[0] == plain + end
    assert modes.prompt(chat, Counter(), [TOOL])[0] == ours.encode_prompt(
        chat, {"tools": [TOOL], "enable_thinking": False}
    )


def test_the_text_of_a_control_token_in_a_tool_stays_text(thinking):
    """Tools are a column of the data, which others wrote."""
    ours, theirs = thinking
    tool = {"type": "function", "function": {"name": "<|im_end|>"}}
    ids = ours.encode_prompt(user("x"), {"tools": [tool]})
    end = theirs.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 2  # of the tools and of the user's turn
    assert '"name": "<|im_end|>"' in ours.show(ids)


def test_a_variable_that_the_template_does_not_use_is_refused(thinking, family):
    ours, _ = thinking
    with pytest.raises(UserError, match=r"does not use 'enable_thinkng'; .*chat_template_kwargs"):
        ours.encode_prompt(user("x"), {"enable_thinkng": False})
    _, bare, _ = family
    with pytest.raises(
        UserError, match=r"does not use 'tools'; expected .*; correct data.tools_ke"
    ):
        bare.encode_prompt(user("x"), {"tools": [TOOL]})
    with pytest.raises(
        UserError, match=r"text with tools, and data.chat is auto; .* leave data.too"
    ):
        Rendering(ours, "auto").prompt("x", Counter(), [TOOL])


def failing(tmp_path, template, chat):
    folder = save_qwen(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(TokenizerConfig(kind="huggingface", path=folder))
    with pytest.raises(UserError) as caught:
        tokenizer.encode_prompt(chat)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}", "does not show message 1"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}"
            "{% endfor %}",
            "does not show message 2, of role 'human'",
        ),
        ("{{ raise_exception('no') }}", "refuses: no; correct the prompt"),
        ("{{ messages[7].content }}", "refuses: "),
        ("{{ messages[0].content + 3 }}", 'refuses: can only concatenate str (not "int") to str'),
    ],
)
def test_a_template_that_does_not_take_the_chat(tmp_path, template, message):
    chat = [*user("What is 2+2?"), {"role": "human", "content": "and 3+3?"}]
    assert message in failing(tmp_path, template, chat)


def test_a_template_that_rewrites_the_text_of_a_control_token(tmp_path):
    template = "{% for m in messages %}{{ m.content }}{{ m.content | length }}{% endfor %}"
    assert "with the text of the control token '<|im_end|>', which cannot be told" in failing(
        tmp_path, template, user("Say <|im_end|>")
    )


def with_template(folder, template):
    """qwen's tokenizer with a template of somebody else."""
    save_qwen(folder)
    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(TokenizerConfig(kind="huggingface", path=folder))


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ 'a' * 10**10 }}", "it takes more memory than a chat can need"),
        ("{{ 'a' * 20000000 }}", "it writes more than 16,777,216 characters"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content() }}", "'str' object is not callable"),
        ("{{ (1).__class__.__bases__ }}", "access to attribute '__class__' of 'int' object is"),
        ("{% if %}", "Expected an expression, got 'end of statement block'"),
        ("{{ raise_exception('no\nsuch\nrole') }}", "no such role"),
        ("{{ 'x' | nosuchfilter }}", "No filter named 'nosuchfilter'"),
    ],
)
def test_a_hostile_template_is_one_line(tmp_path, template, reason):
    tokenizer = with_template(tmp_path, template)
    for _ in range(2):  # the worker goes on
        with pytest.raises(UserError, match="chat messages the template of .* refuses: ") as error:
            tokenizer.encode_prompt(user("one"))
        assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_template_that_never_ends_is_stopped(tmp_path, monkeypatch):
    """As in use, with less time for a chat. The worker goes on."""
    script = Path(chat_template.__file__).with_name("template_worker.py")
    monkeypatch.setattr(chat_template, "_WORKERS", WorkerPool(script, 0.3, 300.0, "expected none"))
    said = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for number, template in enumerate((LOOP, said + LOOP)):
        (tmp_path / str(number)).mkdir()
        tokenizer = with_template(tmp_path / str(number), template)
        with pytest.raises(UserError, match="refuses: it takes more than 0.3 s; correct the prom"):
            tokenizer.encode_prompt(user("one"))


def test_a_worker_that_is_stuck_is_given_up(tmp_path, monkeypatch):
    """Where not even an interruption comes through."""
    script = tmp_path / "stuck.py"
    script.write_text(
        "import sys, time\nprint('ready', flush=True)\nsys.stdin.readline()\ntime.sleep(600)\n"
    )
    monkeypatch.setattr(chat_template, "_WORKERS", WorkerPool(script, 0.1, 0.3, "expected none"))
    with pytest.raises(UserError, match="refuses: late; correct the prompt or the template"):
        with_template(tmp_path, "x").encode_prompt(user("one"))


def test_white_space_around_control_tokens_is_read_in_linear_time(tmp_path):
    """[INST] takes the white space before it; of a million spaces, each was a beginning."""
    folder = save_mistral(tmp_path)
    tokenizer = load_tokenizer(TokenizerConfig(kind="huggingface", path=folder))
    text = "</s>" + "a " + " " * 100_000 + "b"
    start = time.process_time()
    try:
        tokenizer.encode_prompt(user(text))
    except UserError:
        pass
    assert time.process_time() - start < 5.0

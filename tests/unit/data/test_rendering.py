"""The one way from text to tokens, in each mode of data.chat."""

from collections import Counter

import pytest

from megatron_rl.config.schema_data import TokenizerConfig
from megatron_rl.data.rendering import Rendering
from megatron_rl.data.tokenizers import load_tokenizer
from megatron_rl.errors import UserError
from tests.support.chat_tokenizers import save_llama, save_qwen
from tools.data.train_tokenizer import train_tokenizer

CHAT = [{"role": "user", "content": "2+2?"}]
TURN = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    path = save_qwen(tmp_path_factory.mktemp("tokenizer"))
    return load_tokenizer(TokenizerConfig(kind="huggingface", path=path))


def seen(tokenizer, chat, prompt):
    """What the model sees, where the ids and the text say the same."""
    ids, text = Rendering(tokenizer, chat).prompt(prompt, Counter())
    assert tokenizer.show(ids) == text
    return text


def test_every_mode(qwen):
    assert seen(qwen, "auto", "2+2?") == "2+2?"
    assert seen(qwen, "auto", CHAT) == TURN
    assert seen(qwen, "template", "2+2?") == TURN
    assert seen(qwen, "template", CHAT) == TURN
    assert seen(qwen, "plain", "2+2?") == "2+2?"
    assert seen(qwen, "rendered", TURN) == TURN
    by_template = Rendering(qwen, "auto").prompt(CHAT, Counter())[0]
    assert Rendering(qwen, "rendered").prompt(TURN, Counter())[0] == by_template
    assert Rendering(qwen, "plain").prompt(TURN, Counter())[0] != by_template  # it is text there


@pytest.mark.parametrize("mode", ["plain", "rendered"])
def test_chats_where_text_is_expected(qwen, mode):
    with pytest.raises(UserError, match=f"chat messages, and data.chat is {mode}; expected text"):
        Rendering(qwen, mode).prompt(CHAT, Counter())


def test_the_beginning_of_sequence_token(tmp_path):
    """In the ids, once; in the text only where the template writes it."""
    llama = load_tokenizer(TokenizerConfig(kind="huggingface", path=save_llama(tmp_path)))
    ids, text = Rendering(llama, "auto").prompt("2+2?", Counter())
    assert (ids[0], ids.count(llama.bos_id), text) == (llama.bos_id, 1, "2+2?")
    ids, text = Rendering(llama, "template").prompt("2+2?", Counter())
    assert (ids[0], ids.count(llama.bos_id)) == (llama.bos_id, 1)
    start = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
    assert text == f"{start}<|start_header_id|>assistant<|end_header_id|>\n\n"
    again, _ = Rendering(llama, "rendered").prompt(text, Counter())
    assert again == ids


def test_modes_a_tokenizer_cannot_have(tmp_path):
    (tmp_path / "t.model").write_bytes(train_tokenizer(["12 ab\n"], "char", 64))
    tokenizer = load_tokenizer(TokenizerConfig(path=tmp_path / "t.model"))
    with pytest.raises(UserError, match="data.chat is template and the tokenizer has no chat"):
        Rendering(tokenizer, "template")
    with pytest.raises(UserError, match="data.chat is rendered; a SentencePiece tokenizer reads"):
        Rendering(tokenizer, "rendered")
    assert seen_text(tokenizer, "12") == "12"


def seen_text(tokenizer, prompt):
    return Rendering(tokenizer, "plain").prompt(prompt, Counter())[1]


def test_characters_that_the_tokenizer_does_not_know_show(tmp_path):
    (tmp_path / "t.model").write_bytes(train_tokenizer(["12 ab\n"], "char", 64))
    tokenizer = load_tokenizer(TokenizerConfig(path=tmp_path / "t.model"))
    assert seen_text(tokenizer, "1z2") == "1 \u2047 2"


@pytest.mark.parametrize("text", ["4", "4<|im_end|>", "4<|im_end|>\n", "4<|im_end|> <|im_end|>"])
def test_an_answer_ends_once(qwen, text):
    notes = Counter()
    ids = Rendering(qwen, "auto").completion(text, notes)
    assert ids == [*qwen.encode("4"), qwen.eos_id]
    ended = {"answers that ended with the text <|im_end|>: it is kept once": 1}
    assert notes == ({} if text == "4" else ended)


def test_control_tokens_within_an_answer(qwen):
    text, notes = "4<|im_end|>5", Counter()
    ids = Rendering(qwen, "auto").completion(text, notes)
    assert ids.count(qwen.eos_id) == 1 and qwen.show(ids) == f"{text}<|im_end|>"
    assert notes == {"texts that hold the text of a control token: it is text to the model": 1}
    ids = Rendering(qwen, "rendered").completion(text, Counter())
    assert ids.count(qwen.eos_id) == 2 and qwen.show(ids) == f"{text}<|im_end|>"


def test_what_is_said_of_it(qwen):
    assert Rendering(qwen, "auto").facts(Counter({str: 2})) == (
        "text as it stands without the tokenizer's chat template (data.chat auto)"
    )
    assert Rendering(qwen, "auto").facts(Counter({list: 2, str: 1})) == (
        "chat messages through the tokenizer's template; "
        "text as it stands without the tokenizer's chat template (data.chat auto)"
    )
    assert Rendering(qwen, "template").facts(Counter({str: 2})) == (
        "text as a user message, through the tokenizer's template (data.chat template)"
    )
    assert Rendering(qwen, "rendered").facts(Counter({str: 2})) == (
        "text with the control tokens in it (data.chat rendered)"
    )

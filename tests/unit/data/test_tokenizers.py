"""Tokenizers: round trips, special tokens, and what a user may get wrong."""

import json
import os
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors

from megatron_rl.config.schema_data import TokenizerConfig
from megatron_rl.data.tokenizers import check_vocabulary, load_tokenizer
from megatron_rl.errors import UserError
from tools.data.train_tokenizer import train_tokenizer

WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2, "one": 3, "two": 4, "user": 5, "go": 6, "<unk>": 7}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}go{% endif %}"
)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    path = tmp_path_factory.mktemp("sp") / "t.model"
    path.write_bytes(train_tokenizer(["12 ab\n"], "char", 64))
    return load_tokenizer(TokenizerConfig(path=path))


def raw_tokenizer(words: dict[str, int]) -> RawTokenizer:
    tokenizer = RawTokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    return tokenizer


def hugging_face_folder(folder: Path, **settings: str) -> Path:
    raw_tokenizer(WORDS).save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def hugging_face(path: Path):
    return load_tokenizer(TokenizerConfig(kind="huggingface", path=path))


def test_sentencepiece_ids(sentencepiece):
    assert (sentencepiece.pad_id, sentencepiece.bos_id, sentencepiece.eos_id) == (0, 2, 3)
    assert sentencepiece.vocab_size == 4 + 6  # special tokens; 1 2 space a b newline
    ids = sentencepiece.encode("12")
    assert len(ids) == 2 and min(ids) > 3
    assert sentencepiece.encode_prompt("12") == [2, *ids]


def test_sentencepiece_decodes_without_special_tokens(sentencepiece):
    one, two = sentencepiece.encode("12")
    assert sentencepiece.decode([2, one, two, 3, 0]) == "12"
    assert sentencepiece.decode([]) == ""


def test_sentencepiece_shows_special_tokens(sentencepiece):
    one, two = sentencepiece.encode("12")
    assert sentencepiece.show([2, one, two, 3]) == "<s>12</s>"
    assert sentencepiece.show([one, 10, 3, 3]) == "1\ufffd</s></s>"
    space = sentencepiece.encode(" ")[0]
    pieces = [sentencepiece.piece(token) for token in (2, one, space, 10)]
    assert pieces == ["<s>", "1", " ", "\ufffd"]
    assert (sentencepiece.find_control("a</s>"), sentencepiece.find_control("a")) == ("</s>", None)
    assert 3 not in sentencepiece.encode("12</s>")


def test_the_one_token_of_a_text(sentencepiece, tmp_path):
    one, two = sentencepiece.encode("12")
    for text, token in (("1", one), ("2", two), ("</s>", 3), (" ", sentencepiece.encode(" ")[0])):
        assert sentencepiece.token(text) == token
    theirs = hugging_face(hugging_face_folder(tmp_path))
    for text, token in (("one", 3), ("</s>", 2), ("go", 6)):
        assert theirs.token(text) == token
    for text in ("12", "x", "", "one two", "</s></s>"):
        assert sentencepiece.token(text) is None and theirs.token(text) is None


def test_ids_past_the_vocabulary_stay_visible(sentencepiece, tmp_path):
    one, two = sentencepiece.encode("12")
    assert sentencepiece.decode([one, 10, 11, two, 99]) == "1\ufffd\ufffd2\ufffd"
    other = hugging_face(hugging_face_folder(tmp_path))
    assert other.decode([3, 8, 4]) == "one\ufffdtwo"


def test_sentencepiece_has_no_chat_template(sentencepiece):
    with pytest.raises(UserError, match="chat"):
        sentencepiece.encode_prompt([{"role": "user", "content": "1"}])


def test_hugging_face_folder(tmp_path):
    tokenizer = hugging_face(hugging_face_folder(tmp_path, pad_token="<pad>"))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 8
    assert tokenizer.encode("one two") == [3, 4]
    assert tokenizer.encode_prompt("one two") == [1, 3, 4]  # begun, but not ended
    assert tokenizer.encode_prompt("one </s>") == [1, 3, 7, 7, 7]  # < / s> of the user's are text
    assert tokenizer.encode("one </s>", control=True) == [3, 2]
    assert tokenizer.decode([1, 3, 4, 2, 0]) == "one two"
    assert tokenizer.show([1, 3, 4, 2, 0]) == "<s> one two </s> <pad>"
    assert [tokenizer.piece(token) for token in (1, 3, 8)] == ["<s>", "one", "\ufffd"]
    assert tokenizer.find_control("one<pad></s>") == "<pad>"


def test_padding_falls_back_to_the_end_token(tmp_path):
    assert hugging_face(hugging_face_folder(tmp_path)).pad_id == 2


def test_chat_template(tmp_path):
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    tokenizer = hugging_face(hugging_face_folder(tmp_path, chat_template=TEMPLATE))
    assert tokenizer.encode_prompt(messages) == [5, 3, 5, 4, 6]


def test_a_long_text_is_no_warning(tmp_path, caplog):
    """Its length is checked where a line is named; the library would say it once, of any text."""
    folder = hugging_face_folder(tmp_path, chat_template=TEMPLATE, model_max_length=4)
    tokenizer = hugging_face(folder)
    assert len(tokenizer.encode_prompt("one " * 9)) == 10
    assert len(tokenizer.encode_prompt([{"role": "user", "content": "one " * 9}])) == 11
    assert caplog.records == []


def test_chat_without_a_template(tmp_path):
    tokenizer = hugging_face(hugging_face_folder(tmp_path))
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.encode_prompt([{"role": "user", "content": "one"}])


def test_a_template_may_refuse(tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = hugging_face(hugging_face_folder(tmp_path, chat_template=template))
    with pytest.raises(UserError, match="roles must alternate"):
        tokenizer.encode_prompt([{"role": "user", "content": "one"}])


def test_a_tokenizer_json_alone(tmp_path):
    path = tmp_path / "tokenizer.json"
    raw_tokenizer(WORDS).save(str(path))
    tokenizer = hugging_face(path)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (2, None, 2)
    assert tokenizer.encode("two one") == [4, 3]


def test_a_tokenizer_json_with_two_possible_ends(tmp_path):
    path = tmp_path / "tokenizer.json"
    raw_tokenizer({**WORDS, "<|im_end|>": 8}).save(str(path))
    with pytest.raises(UserError, match=re.escape("</s> and <|im_end|>; expected exactly one")):
        hugging_face(path)


def test_check_vocabulary(sentencepiece):
    check_vocabulary(sentencepiece, 10)
    check_vocabulary(sentencepiece, 128)
    with pytest.raises(UserError, match="10 ids, model.vocab_size is 9.* to 10 or more"):
        check_vocabulary(sentencepiece, 9)


def test_users_mistakes(tmp_path):
    with pytest.raises(UserError, match="not set"):
        load_tokenizer(TokenizerConfig())
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(TokenizerConfig(path=tmp_path / "none.model"))
    with pytest.raises(UserError, match="is a directory"):
        load_tokenizer(TokenizerConfig(path=tmp_path))
    junk = tmp_path / "tokenizer.json"
    junk.write_text("junk")
    with pytest.raises(UserError, match="SentencePiece model"):
        load_tokenizer(TokenizerConfig(path=junk))
    with pytest.raises(
        UserError, match="not valid JSON .*; expected a Hugging Face fast tokenizer"
    ):
        hugging_face(junk)
    junk.unlink()
    with pytest.raises(UserError, match="cannot be read as a Hugging Face tokenizer"):
        hugging_face(tmp_path)


def spoiled(folder, name, change):
    """A folder whose file ``name`` is another: bytes, or what a function makes of its content."""
    path = hugging_face_folder(folder) / name
    path.unlink(missing_ok=True)
    if callable(change):
        hugging_face_folder(folder)
        content = json.loads(path.read_text())
        change(content)
        change = json.dumps(content).encode()
    path.write_bytes(change)
    return folder


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("tokenizer.json", b"[" * 100_000, "not valid JSON (nested more than 64 deep)"),
        ("tokenizer.json", b'{"model": []}', "expected a JSON object with the key 'model'"),
        ("tokenizer.json", b'{"model": {}}', "cannot be read as a Hugging Face tokenizer ("),
        ("tokenizer.json", lambda c: c.update(version="9"), "cannot be read as a Hugging Face"),
        ("tokenizer.json", lambda c: c["model"].update(vocab={"a": -1}), "cannot be read as"),
        ("tokenizer.json", lambda c: c.update(added_tokens=[{"id": "x"}]), "cannot be read as"),
        ("tokenizer.json", lambda c: c["model"].update(unk_token="none"), "cannot be used as"),
        ("tokenizer_config.json", b"{", "not valid JSON (Expecting property name"),
        ("tokenizer_config.json", b'{"a": 1, "a": 2}', "not valid JSON (the key 'a' twice"),
        ("tokenizer_config.json", b'{"model_max_length": 1e999}', "not valid JSON (the number"),
        ("tokenizer_config.json", lambda c: c.update(eos_token=[3]), "cannot be read as a Hugging"),
        ("tokenizer_config.json", lambda c: c.update(tokenizer_class=3), "cannot be read as a Hug"),
        ("tokenizer_config.json", lambda c: c.update(added_tokens_decoder=3), "cannot be read as"),
        (
            "special_tokens_map.json",
            b"[]",
            "special_tokens_map.json: found a list; expected a JSON",
        ),
        ("added_tokens.json", b'{"a": ' + b"9" * 5000 + b"}", "an integer of 5,000 digits"),
    ],
)
def test_a_hostile_tokenizer_is_one_line(tmp_path, name, change, reason):
    folder = spoiled(tmp_path, name, change)
    with pytest.raises(UserError) as error:
        hugging_face(folder).encode("three")
    assert reason in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "config.json"])
def test_a_pipe_among_the_files_is_not_waited_for(tmp_path, name):
    path = hugging_face_folder(tmp_path) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(UserError, match=f"{name} is no regular file; expected the files of a"):
        hugging_face(tmp_path)

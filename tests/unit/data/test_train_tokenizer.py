"""The tokenizer trainer: exact round trips and the same bytes every time."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config.schema_data import TokenizerConfig
from megatron_rl.data.tokenizers import load_tokenizer
from megatron_rl.errors import UserError
from tools.data.make_countdown import Rules, make_problems
from tools.data.train_tokenizer import main, read_texts, train_tokenizer

RECORDS = make_problems(200, 1, Rules())
TEXTS = [record[key] for record in RECORDS for key in ("prompt", "completion")] + ["a\n b"]
KINDS = {"char": 64, "bpe": 48, "unigram": 32}
ALPHABET = "0123456789 =:+-*/()ab\n"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    loaded = {}
    for kind, size in KINDS.items():
        (folder / kind).write_bytes(train_tokenizer(TEXTS, kind, size))
        loaded[kind] = load_tokenizer(TokenizerConfig(path=folder / kind))
    return loaded


@given(st.text(alphabet=ALPHABET), st.sampled_from(sorted(KINDS)))
def test_round_trip(tokenizers, text, kind):
    assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


def test_sizes_and_ids(tokenizers):
    assert tokenizers["char"].vocab_size == 4 + len(ALPHABET)
    assert tokenizers["bpe"].vocab_size == 48
    assert tokenizers["unigram"].vocab_size == 32
    for tokenizer in tokenizers.values():
        assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 2, 3)
    assert len(tokenizers["char"].encode("3 7=10:")) == 7


def test_same_bytes():
    for kind, size in KINDS.items():
        assert train_tokenizer(TEXTS, kind, size) == train_tokenizer(TEXTS, kind, size)


def test_split_digits(tmp_path):
    texts = ["1212", "abab"] * 20  # two digits, two letters, four tokens they can merge to
    lengths = {}
    for split, size in ((False, 12), (True, 10)):
        path = tmp_path / f"{split}.model"
        path.write_bytes(train_tokenizer(texts, "bpe", size, split_digits=split))
        tokenizer = load_tokenizer(TokenizerConfig(path=path))
        lengths[split] = len(tokenizer.encode("1212"))
    assert lengths == {False: 1, True: 4}


def write(tmp_path, *records):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_command(tmp_path, capsys):
    data = write(tmp_path, {"prompt": "1 2=3:", "completion": "1+2"}, {"prompt": "x"})
    out = tmp_path / "new" / "t.model"
    assert main([str(data), "--out", str(out)]) == 0
    assert "t.model: 12 ids (char)" in capsys.readouterr().out  # 4 and "1 2=3:+x"
    tokenizer = load_tokenizer(TokenizerConfig(path=out))
    assert tokenizer.decode(tokenizer.encode("x=1+2")) == "x=1+2"
    assert [path.name for path in out.parent.iterdir()] == ["t.model"]


def test_read_texts(tmp_path):
    data = write(tmp_path, {"prompt": "a", "completion": "b"}, {"prompt": "c", "other": "d"})
    assert list(read_texts([data], ["prompt", "completion"])) == ["a", "b", "c"]
    with pytest.raises(UserError, match="line 1: no text under other"):
        list(read_texts([data], ["other"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab-size", "11"], "--vocab-size 11; the text has 8 characters"),
        (["--vocab-size", "500", "--kind", "bpe"], "refused by SentencePiece"),
        (["--keys", "text"], "line 1: no text under text"),
    ],
)
def test_users_mistakes(tmp_path, capsys, options, message):
    data = write(tmp_path, {"prompt": "1 2=3:", "completion": "1+2x"})
    assert main([str(data), "--out", str(tmp_path / "t.model"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "t.model").exists()


def test_no_text():
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(["", "\n"], "char", 10)

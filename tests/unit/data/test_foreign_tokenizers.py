"""Tokenizers of others: with code of their own, or with tokens the model has no row for."""

import ast
import contextlib
import json
from pathlib import Path

import pytest

from megatron_rl.config.schema import Config
from megatron_rl.config.schema_data import TokenizerConfig
from megatron_rl.data.run_data import encode_files
from megatron_rl.data.tokenizers import check_vocabulary, load_tokenizer
from megatron_rl.errors import UserError
from tests.support import chat_tokenizers, hugging_face
from tests.support.runs import ROOT

CODE = """\
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({marker!r}).write_text("executed")

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """(a directory whose tokenizer is a class of its own, the file that its code writes)."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    folder, marker = tmp_path / "model", tmp_path / "marker"
    folder.mkdir()
    hugging_face.save_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "OwnTokenizer"
    config["auto_map"] = {"AutoTokenizer": [None, "own_code.OwnTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own_code.py").write_text(CODE.format(marker=str(marker)))
    return folder, marker


@pytest.mark.parametrize("answer", ["y", "n"])
def test_code_of_a_directory_is_not_executed_whatever_is_typed(with_code, monkeypatch, answer):
    folder, marker = with_code
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or answer)
    with pytest.raises(UserError) as error:
        load_tokenizer(TokenizerConfig(kind="huggingface", path=folder))
    assert str(error.value).startswith(f"{folder} has a tokenizer that needs code of its own")
    assert "data.tokenizer.trust_remote_code" in str(error.value)
    assert not marker.exists() and asked == []


def test_code_of_a_directory_is_executed_where_the_key_says_so(with_code):
    folder, marker = with_code
    settings = TokenizerConfig(kind="huggingface", path=folder, trust_remote_code=True)
    tokenizer = load_tokenizer(settings)
    assert marker.read_text() == "executed"
    assert hugging_face.spelled(tokenizer.encode("12 a")) == "12 a"


def test_the_header_names_what_executes_code():
    from types import SimpleNamespace

    from tests.support.tiny import cpu_device

    device = cpu_device()
    from megatron_rl.device.launch import Launch
    from megatron_rl.run.run_summary import run_facts

    def facts(machine=None, **tokenizer):
        data = {"tokenizer": {"kind": "huggingface", "path": "hf", **tokenizer}}
        launch = Launch(0, 1, 0, 1, launched=False)
        session = SimpleNamespace(
            config=Config(data=data),
            launch=launch,
            run_dir=Path("r"),
            device=device,
            stop_tokens={1: "tokenizer"},
        )
        return run_facts(session, machine or {})

    assert "tokenizer" not in facts()
    assert facts(trust_remote_code=True)["tokenizer"] == (
        "hf, whose own code is executed (trust_remote_code)"
    )
    found = facts({"sandbox": "seccomp, Landlock 7, no root rights"})
    assert list(found)[3:5] == ["device", "sandbox"] and "sandbox" not in facts()
    assert found["sandbox"] == "seccomp, Landlock 7, no root rights"


#: What executes a directory's code, or asks whether it may.
EXECUTING = ("from_pretrained", "from_config", "pipeline", "load_dataset", "snapshot_download")


@pytest.mark.parametrize("kind", ["own", "qwen3_moe", None])
def test_a_configuration_with_code_is_not_asked_about_either(tmp_path, monkeypatch, kind):
    """Where the tokenizer has no class, transformers looks at config.json."""
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail(text))
    hugging_face.save_tokenizer(tmp_path)
    path, marker = tmp_path / "tokenizer_config.json", tmp_path / "marker"
    settings = json.loads(path.read_text())
    del settings["tokenizer_class"]
    path.write_text(json.dumps(settings))
    config = {"auto_map": {"AutoConfig": "own_code.OwnConfig"}, "model_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own_code.py").write_text(CODE.format(marker=str(marker)))
    with contextlib.suppress(UserError):  # no class, or one that transformers has
        load_tokenizer(TokenizerConfig(kind="huggingface", path=tmp_path))
    assert not marker.exists()


def test_nothing_leaves_it_to_transformers_to_ask():
    """Every call says whether code is executed, in the package, the tools and the tests."""
    calls, silent = 0, []
    for folder in ("megatron_rl", "tools", "tests", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                owner = getattr(node.func.value, "id", None)
                if node.func.attr in EXECUTING and owner not in ("GenerationConfig", "self"):
                    calls += 1
                    said = {keyword.arg for keyword in node.keywords}
                    silent += [] if "trust_remote_code" in said else [f"{path}:{node.lineno}"]
    assert calls >= 5 and silent == []


def with_token(folder, text, **special):
    """A tokenizer of 43 characters, padding and end, with one more token: id 45 of 46."""
    folder.mkdir(exist_ok=True)
    hugging_face.save_tokenizer(folder)
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    tokenizer.add_special_tokens(special or {"additional_special_tokens": [text]})
    tokenizer.save_pretrained(folder)
    return load_tokenizer(TokenizerConfig(kind="huggingface", path=folder))


ROWS = 2 + len(hugging_face.CHARACTERS)


def test_the_remedy_is_one_that_works(tmp_path):
    tokenizer = with_token(tmp_path, "<|turn|>")
    assert tokenizer.vocab_size == ROWS + 1
    found = (
        f"the tokenizer has {ROWS + 1} ids, model.vocab_size is {ROWS}: no rows for '<|turn|>' "
        f"({ROWS}); expected at least as many rows as ids"
    )
    with pytest.raises(UserError) as error:  # random weights: there may be as many rows as wanted
        check_vocabulary(tokenizer, ROWS)
    assert str(error.value) == f"{found}; set model.vocab_size to {ROWS + 1} or more"
    with pytest.raises(UserError) as error:
        check_vocabulary(tokenizer, ROWS, Path("models/m"))
    assert str(error.value).startswith(f"{found}, and models/m has those rows only; use the token")
    assert "set model.vocab_size" not in str(error.value)
    check_vocabulary(tokenizer, ROWS + 1, Path("models/m"))


def test_padding_needs_no_row(tmp_path):
    tokenizer = with_token(tmp_path, "[PAD]", pad_token="[PAD]")
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (ROWS + 1, ROWS)
    check_vocabulary(tokenizer, ROWS, Path("models/m"))
    assert tokenizer.pad_id == tokenizer.eos_id == 1
    assert hugging_face.spelled(tokenizer.encode_prompt("1+2")) == "1+2"
    with pytest.raises(UserError, match=f"token '.PAD.' .id {ROWS}., for which the model has no"):
        tokenizer.encode("1 [PAD]", control=True)
    # Elsewhere its text is no token.
    written = [*tokenizer.encode("1 [PAD]"), *tokenizer.encode_prompt("[PAD]")]
    assert ROWS not in [*written, *tokenizer.encode_prompt([{"role": "user", "content": "[PAD]"}])]
    with pytest.raises(UserError, match="no rows for 'z'"):  # nor the last letter
        check_vocabulary(tokenizer, ROWS - 1)


def test_the_run_says_whose_rows_they_are(tmp_path):
    """A model's own rows are not a number to set."""
    with_token(tmp_path, "<|turn|>")
    data = {"tokenizer": {"kind": "huggingface", "path": tmp_path}}
    for section in ({"checkpoint": {"init_from": "w"}}, {"model": {"hf_path": "w"}}):
        sections = {"model": {"vocab_size": ROWS, **section.pop("model", {})}, **section}
        with pytest.raises(UserError, match="and w has those rows only"):
            encode_files(Config(data=data, **sections), "generate", {})
    with pytest.raises(UserError, match=f"set model.vocab_size to {ROWS + 1} or more"):
        encode_files(Config(data=data, model={"vocab_size": ROWS}), "generate", {})


@pytest.mark.parametrize("merges", [["a \u2581"], [["a", "\u2581"]], [[]], [7]])
def test_a_prefix_that_merges_lack_is_refused(tmp_path, merges):
    """tokenizers 0.23 ends the process over half of a character that it cut off."""
    folder = chat_tokenizers.save_mistral(tmp_path)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= {"continuing_subword_prefix": "\0", "merges": merges}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        load_tokenizer(TokenizerConfig(kind="huggingface", path=folder))
    assert str(error.value) == (
        f"{path} has continuing_subword_prefix '\\x00' and a merge (number 0) whose second part "
        "does not begin with it; expected the files of a Hugging Face tokenizer; correct "
        "data.tokenizer.path"
    )

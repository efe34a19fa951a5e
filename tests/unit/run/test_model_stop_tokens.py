"""The stop tokens of a run: of its model, of the run it starts from, of its configuration."""

import json

import pytest

from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError
from megatron_rl.weights.side_files import keep_side_files
from tests.support.tiny import cpu_device


@pytest.fixture
def folder(tmp_path):
    """A model directory, a run that has started from it and added a stop token, and one that has
    not started from any.
    """
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    for name in ("run", "other"):
        (tmp_path / name / "checkpoints" / "step_4").mkdir(parents=True)
    keep_side_files(model, tmp_path / "run", (2, 7, 9))
    keep_side_files(None, tmp_path / "other", (3,))
    return tmp_path


class Letters:
    """A tokenizer of a token a letter, and of one that ends a text."""

    eos_id = 2

    def token(self, text):
        return ord(text) - 90 if len(text) == 1 else {"<end>": 2}.get(text)


def stops(vocab_size=64, hf_path=None, init_from=None, more=(), texts=()):
    cpu_device()
    from megatron_rl.run.model_stop_tokens import stop_tokens_of

    config = Config(
        model={"hf_path": hf_path, "vocab_size": vocab_size},
        checkpoint={"init_from": init_from},
        rollout={"stop_token_ids": more, "stop_tokens": texts},
    )
    return stop_tokens_of(config, Letters())


def test_they_come_from_the_model_and_from_the_run_it_was_trained_in(folder):
    assert stops() == {2: "tokenizer"}
    assert stops(more=(5,)) == {2: "tokenizer", 5: "rollout.stop_token_ids"}
    assert stops(hf_path=folder / "model") == {2: "tokenizer", 7: "generation_config.json"}
    for place in ("run", "run/checkpoints", "run/checkpoints/step_4"):
        assert set(stops(init_from=folder / place)) == {2, 7, 9}
    assert set(stops(init_from=folder / "other")) == {2, 3}
    assert set(stops(init_from=folder)) == {2}  # it has kept nothing: a run of an older version


def test_ones_own_by_their_texts():
    assert stops(texts=("a", "<end>"), more=(7, 9)) == {
        2: "tokenizer",
        7: "rollout.stop_token_ids",
        9: "rollout.stop_token_ids",
    }
    assert stops(texts=("b",)) == {2: "tokenizer", 8: "rollout.stop_tokens"}
    for text, words in (
        ("ab", "rollout.stop_tokens names 'ab', which is not one token of the tokenizer; expected"),
        ("", "rollout.stop_tokens names '', which is not one token"),
        (
            "\u00ff",
            "rollout.stop_tokens names the token 165; expected ids below model.vocab_size 64",
        ),
    ):
        with pytest.raises(UserError, match=words):
            stops(texts=(text,))


def test_one_outside_the_vocabulary_is_refused(folder):
    with pytest.raises(UserError, match="run/hf/generation_config.json: eos_token_id names the to"):
        stops(init_from=folder / "run", vocab_size=9)


def test_the_run_summary_names_their_sources():
    cpu_device()
    from megatron_rl.run.run_summary import stop_text

    named = {2: "tokenizer", 7: "generation_config.json", 9: "generation_config.json"}
    assert stop_text(named) == "2 (tokenizer), 7, 9 (generation_config.json)"

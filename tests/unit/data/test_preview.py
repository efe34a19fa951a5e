"""The preview of a data set: lengths by hand, long examples, and what a terminal must not obey."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_rl.config.schema import Config
from megatron_rl.data.preview import SHOWN_ENDS, lengths_text, preview
from megatron_rl.data.prompts import DataPart
from megatron_rl.data.run_data import load_run_data
from megatron_rl.records import Sample
from tests.support.chat_tokenizers import save_qwen


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_qwen(tmp_path_factory.mktemp("tokenizer"))


def run_data(tmp_path, qwen, *prompts, **data):
    path = tmp_path / "train.jsonl"
    lines = [json.dumps({"prompt": prompt, "answer": "1"}) for prompt in prompts]
    path.write_text("\n".join(lines))
    tokenizer = {"kind": "huggingface", "path": qwen}
    config = Config(
        model={"vocab_size": 512, "max_sequence_length": 264},
        data={"tokenizer": tokenizer, "train": path, **data},
        reward={"name": "math"},
    )
    return load_run_data(config, "train")  # prompts of at most 264 - 64 tokens


def test_lengths(tmp_path, qwen):
    data = run_data(tmp_path, qwen, *["1" * n for n in range(1, 102)]).train
    assert lengths_text(data) == (
        "101 problems, prompts of 1 to 101 tokens (50%: 51, 90%: 91, 99%: 100)"
    )


def test_what_was_left_out_and_why(tmp_path, qwen):
    data = run_data(tmp_path, qwen, "1", "2" * 201, "<|im_end|>", overlong="skip")
    lines = list(preview(data, {2: "tokenizer"}, 64, 0))
    assert lines == [
        "an answer ends with: 2:'<|im_end|>' (tokenizer)",
        "prompts: text as it stands without the tokenizer's chat template (data.chat auto)",
        "left out: 1 of 3 lines skipped, longer than 200 tokens: the first is line 2 with 201",
        "of the data: 1 texts that hold the text of a control token: it is text to the model",
        "",
        f"data.train: {tmp_path / 'train.jsonl'}, {lengths_text(data.train)}",
    ]


def test_a_long_example_shows_its_two_ends(tmp_path, qwen):
    data = run_data(tmp_path, qwen, "1" * 100 + "2" * 90)
    text = "\n".join(preview(data, {2: "tokenizer"}, 64, 1))
    assert "line 1: a prompt of 190 tokens; trained on: the sampled answers, of up" in text
    assert text.count(":'1'") == text.count(":'2'") == SHOWN_ENDS
    assert "... 70 more ..." in text


def test_a_terminal_obeys_none_of_it(tmp_path, qwen):
    text = "\n".join(
        preview(run_data(tmp_path, qwen, "a\x1b[31mb\u202ec"), {2: "tokenizer"}, 64, 1)
    )
    assert "\x1b" not in text and "\u202e" not in text
    assert "  | a\\x1b[31mb\\u202ec\n" in text


def test_the_trained_tokens_of_a_sample_are_marked_wherever_they_stand(tmp_path, qwen):
    data = run_data(tmp_path, qwen, "a")
    ids = np.array(data.tokenizer.encode("1234"))
    assert len(ids) == 4
    masks = [False, False, True, True], [False, True, False, True], [True, False, True, False]
    samples = [Sample(ids, np.array(mask)) for mask in masks]
    train = replace(data.train, items=samples, parts=(DataPart("train", 1.0, 0, 3),))
    shown = "\n".join(preview(replace(data, train=train), {2: "x"}, 64, 3)).splitlines()
    assert any("train.jsonl, 3 samples, prompts of 2 to 2 tokens" in line for line in shown)
    assert [line for line in shown if "trained on" in line] == [
        "a prompt of 2 tokens; trained on: the 2 after it, marked *",
        "a sample of 4 tokens; trained on: the 2 marked *",
        "a sample of 4 tokens; trained on: the 1 marked *",  # nothing predicts the first
    ]
    words = [line.split() for line in shown if ":'1'" in line]
    assert [[word[0] == "*" for word in line] for line in words] == [
        [False, False, True, True],
        [False, True, False, True],
        [False, False, True, False],
    ]

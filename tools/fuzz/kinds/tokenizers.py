"""Files of a Hugging Face tokenizer: an accepted one encodes texts to ids of its vocabulary."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from pathlib import Path
from typing import Iterator

from megatron_rl.config.schema_data import TokenizerConfig
from megatron_rl.data.tokenizers import load_tokenizer
from tests.support.chat_tokenizers import save_llama, save_mistral, save_qwen
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong
from tools.fuzz.mutate import as_text, changed, encoded

_FILES = (
    *["tokenizer.json"] * 3,
    *["tokenizer_config.json"] * 3,
    "special_tokens_map.json",
    "added_tokens.json",
)
_TEXTS = ("What is 2+2?", "<|im_end|></s>", "", "\u00e9 \U0001f600\n")


def make(rng: random.Random) -> tuple[int, str, int]:
    """(which tokenizer, which file, the seed of what happens to it)."""
    return rng.randrange(3), rng.choice(_FILES), rng.getrandbits(64)


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """Copies of three tokenizers."""
    originals = []
    for save in (save_qwen, save_llama, save_mistral):
        (folder / save.__name__).mkdir()
        originals.append(save(folder / save.__name__))
    copy = folder / "copy"

    def judge(case: tuple[int, str, int]) -> Verdict:
        which, name, seed = case
        rng = random.Random(seed)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(originals[which], copy)
        file = copy / name
        content = json.loads(file.read_text()) if file.exists() else {"x": 7, "<pad>": 8}
        good = rng.random() < 0.1
        if not good:
            file.write_bytes(encoded(rng, as_text(rng, changed(rng, content, rng.randint(1, 2)))))
        try:
            tokenizer = load_tokenizer(TokenizerConfig(kind="huggingface", path=copy))
            encoded_texts = [tokenizer.encode_prompt(text) for text in _TEXTS]
        except Exception:
            if good:
                raise Wrong("a good tokenizer is refused") from None
            raise
        for ids in encoded_texts:
            if not all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in ids):
                raise Wrong(f"ids outside the vocabulary: {ids}")
            tokenizer.decode(ids), tokenizer.show(ids)
        if not 0 <= tokenizer.eos_id:
            raise Wrong(f"the end is {tokenizer.eos_id}")
        return Verdict.TAKEN

    yield judge


KIND = Kind("tokenizers", make, judging, deadline_s=30.0)

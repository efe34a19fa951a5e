"""Trains a SentencePiece tokenizer on the prompts and completions of JSONL files.

    python tools/data/train_tokenizer.py data/train.jsonl --out data/tokenizer.model --kind char

Ids: 0 padding, 1 unknown, 2 beginning, 3 end of sequence. Text is not changed: no normalisation, no
added space; a line break is a separate token. So decoding restores every text of known characters,
except that U+2581, SentencePiece's mark for spaces, decodes to a space. The model depends on the
data and the arguments only, byte for byte.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Iterable, Iterator, Sequence

from megatron_rl.data.jsonl import load_records
from megatron_rl.errors import UserError
from megatron_rl.files import write_whole, written_for_the_user

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
_SPECIAL_TOKENS = 4


def train_tokenizer(
    texts: Iterable[str], kind: str, vocab_size: int, split_digits: bool = False
) -> bytes:
    """The bytes of a ``.model`` file; ``kind``: char, bpe or unigram.

    ``vocab_size`` counts the special tokens. A char tokenizer has one id a character and may stay
    below it; the others have exactly that many. ``split_digits``: no token holds two digits.
    ``UserError`` if there is no text, or the size does not suit it.
    """
    import sentencepiece

    texts = list(texts)
    characters = set().union(*texts)
    lines = [line for text in texts for line in text.split("\n") if line]
    if not lines:
        raise UserError("no text to train on; expected prompts or completions; check the files")
    if vocab_size < len(characters) + _SPECIAL_TOKENS:
        raise UserError(
            f"--vocab-size {vocab_size}; the text has {len(characters)} characters and there are "
            f"{_SPECIAL_TOKENS} special tokens; set it to their sum or more"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            hard_vocab_limit=kind != "char",
            character_coverage=1.0,
            split_digits=split_digits,
            user_defined_symbols=["\n"] if "\n" in characters else [],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            shuffle_input_sentence=False,
            num_threads=1,  # with more, sums are taken in a varying order
            max_sentence_length=2**20,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            minloglevel=2,
        )
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise UserError(f"refused by SentencePiece: {detail}; change --vocab-size") from error
    return model.getvalue()


def read_texts(paths: Sequence[Path], keys: Sequence[str]) -> Iterator[str]:
    """The text under each key of each record; "
    "apart, so that no token spans prompt and completion.
    """
    for path in paths:
        for number, record in enumerate(load_records(path), start=1):
            found = [record[key] for key in keys if isinstance(record.get(key), str)]
            if not found:
                raise UserError(
                    f"{path}, line {number}: no text under {' or '.join(keys)}; "
                    "expected at least one of them; set --keys"
                )
            yield from found


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", type=Path, nargs="+", help="JSONL files")
    add("--out", type=Path, required=True, help="the .model file to write")
    add("--kind", choices=("char", "bpe", "unigram"), default="char", help="default %(default)s")
    add("--vocab-size", type=int, default=256, help="ids, special ones included (%(default)s)")
    add("--split-digits", action="store_true", help="every digit is a token of its own")
    add("--keys", nargs="+", default=["prompt", "completion"], help="default prompt completion")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = _parse_arguments(arguments)
    try:
        texts = read_texts(options.files, options.keys)
        model = train_tokenizer(texts, options.kind, options.vocab_size, options.split_digits)
        with written_for_the_user(f"--out {options.out}", "choose another place"):
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(options.out, model)
    except UserError as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    import sentencepiece

    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    print(f"{options.out}: {size} ids ({options.kind})")
    return 0


if __name__ == "__main__":
    sys.exit(main())

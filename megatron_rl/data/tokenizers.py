"""Tokenizers behind one small interface: SentencePiece models and Hugging Face tokenizers. Never
uses the network.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Mapping, Protocol, Sequence

from megatron_rl.data.chat_template import ChatTemplate
from megatron_rl.data.tokenizer_files import check_tokenizer_files, ids_of, understood
from megatron_rl.errors import UserError

if TYPE_CHECKING:
    from megatron_rl.config.schema_data import TokenizerConfig
    from megatron_rl.data.problems import PromptText

#: Replaces every id beyond the tokenizer's vocabulary in a decoded text (a model may have more
#: rows).
REPLACEMENT = "\ufffd"

#: SentencePiece's space character in pieces.
_SPACE = "\u2581"

#: End-of-sequence tokens to look for in a tokenizer.json without a tokenizer_config.json.
_END_TOKENS = (
    "</s>",
    "<eos>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "[EOS]",
)


class Tokenizer(Protocol):
    """Text to ids and back."""

    vocab_size: int  #: one past the largest id
    bos_id: int | None
    eos_id: int
    pad_id: int  #: the end-of-sequence id if the tokenizer has no padding token
    has_chat_template: bool

    def limit_to(self, rows: int) -> list[tuple[str, int]]:
        """From now on refuse texts with ids of ``rows`` or above. Returns the (token, id) of such
        ids that texts can need: all but padding.
        """

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Token ids of a text, without added special tokens. ``control``: texts of control tokens,
        such as ``<|im_end|>``, become those tokens; otherwise they stay text.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens; ``REPLACEMENT`` for each id beyond the
        vocabulary.
        """

    def show(self, ids: Sequence[int]) -> str:
        """As ``decode``, but with the special tokens."""

    def piece(self, token: int) -> str:
        """The text of one id, with a leading space if it has one."""

    def token(self, text: str) -> int | None:
        """The id of the token with this text; None: the text is no token, or several."""

    def find_control(self, text: str) -> str | None:
        """The first control token's text within a text."""

    def encode_prompt(
        self, prompt: PromptText, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a prompt: text after the beginning-of-sequence token, chat messages through
        the template. Users' text stays text.

        ``variables``: more variables of the template, such as tools.
        """


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` file (arXiv 1808.06226). It has no chat template: prompts are
    plain text.
    """

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_proto=path.read_bytes())
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path} cannot be read as a SentencePiece model ({error}); "
                "expected a .model file; "
                "correct data.tokenizer.path or data.tokenizer.kind"
            ) from error
        self.vocab_size: int = self._processor.vocab_size()
        bos, eos, pad = (
            self._processor.bos_id(),
            self._processor.eos_id(),
            self._processor.pad_id(),
        )
        if eos < 0:
            raise UserError(
                f"{path} has no end-of-sequence token; expected one; "
                "train the tokenizer with eos_id set"
            )
        self.bos_id: int | None = bos if bos >= 0 else None
        self.eos_id: int = eos
        self.pad_id: int = pad if pad >= 0 else eos
        self.has_chat_template = False
        control = filter(self._processor.is_control, range(self.vocab_size))
        self._control = {token: self._processor.id_to_piece(token) for token in control}

    def limit_to(self, rows: int) -> list[tuple[str, int]]:
        past = range(rows, self.vocab_size)  # padding is no token of a text, and lies below them
        return [(self._processor.id_to_piece(i), i) for i in past]

    def encode(self, text: str, control: bool = False) -> list[int]:
        if control:
            raise UserError(
                "data.chat is rendered; a SentencePiece tokenizer reads no control tokens in text; "
                "use data.tokenizer.kind huggingface or another data.chat"
            )
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return _decode_runs(ids, self.vocab_size, self._processor.decode)

    def show(self, ids: Sequence[int]) -> str:
        def shown(run: list[int]) -> str:
            text, start = "", 0
            for place, token in enumerate([*run, None]):
                if token is None or token in self._control:
                    text += self._processor.decode(run[start:place]) if place > start else ""
                    text += "" if token is None else self._control.get(token, "")
                    start = place + 1
            return text

        return _decode_runs(ids, self.vocab_size, shown)

    def piece(self, token: int) -> str:
        known = 0 <= token < self.vocab_size
        return self._processor.id_to_piece(token).replace(_SPACE, " ") if known else REPLACEMENT

    def token(self, text: str) -> int | None:
        piece = text.replace(" ", _SPACE)
        found = self._processor.piece_to_id(piece)
        return found if self._processor.id_to_piece(found) == piece else None

    def find_control(self, text: str) -> str | None:
        return next((piece for piece in self._control.values() if piece in text), None)

    def encode_prompt(
        self, prompt: PromptText, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        if not isinstance(prompt, str):
            raise UserError(
                "a prompt of chat messages; "
                "a SentencePiece tokenizer expects text, it has no chat template; "
                "use data.tokenizer.kind huggingface or prompts of plain text"
            )
        start = [] if self.bos_id is None else [self.bos_id]
        return start + self.encode(prompt)


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer from a directory, or from a ``tokenizer.json``."""

    def __init__(self, path: Path, trust_remote_code: bool = False) -> None:
        self._path = path
        with understood(path.parent if path.is_file() else path, "read"):
            self._tokenizer = _load_huggingface(path, trust_remote_code)
            self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1
            eos = self._tokenizer.eos_token_id
            self.bos_id: int | None = self._tokenizer.bos_token_id
            pad = self._tokenizer.pad_token_id
            self.has_chat_template = bool(self._tokenizer.chat_template)
            self._template = ChatTemplate(self._tokenizer, path)
        if eos is None:
            raise UserError(
                f"{path} has no end-of-sequence token; expected one; "
                "set eos_token in its tokenizer_config.json"
            )
        self.eos_id: int = eos
        self.pad_id: int = self.eos_id if pad is None else pad
        self._rows = self.vocab_size
        #: end-of-sequence tokens that the tokenizer itself puts behind a text
        ends = (n for n, token in enumerate(reversed(self._begun("a"))) if token != self.eos_id)
        self._num_ends = next(ends, 0)

    def limit_to(self, rows: int) -> list[tuple[str, int]]:
        past = sorted((i, name) for name, i in self._tokenizer.get_vocab().items() if i >= rows)
        if past == [(self.pad_id, self._tokenizer.pad_token)] and self.pad_id != self.eos_id:
            self._rows, self.pad_id = rows, self.eos_id
            return []
        return [(name, i) for i, name in past]

    def encode(self, text: str, control: bool = False) -> list[int]:
        return self._within(
            self._ids(text, add_special_tokens=False, split_special_tokens=not control)
        )

    def _within(self, ids: list[int]) -> list[int]:
        past = next((i for i in ids if i >= self._rows), None)
        if past is not None:
            raise UserError(
                f"a text holds the token {self._tokenizer.convert_ids_to_tokens(past)!r} "
                f"(id {past}), for which the model has no row; expected ids below {self._rows}; "
                "correct the text, or use the tokenizer of the model's weights"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return _decode_runs(ids, self.vocab_size, lambda run: self._decode_known(run, True))

    def show(self, ids: Sequence[int]) -> str:
        return _decode_runs(ids, self.vocab_size, lambda run: self._decode_known(run, False))

    def piece(self, token: int) -> str:
        if not 0 <= token < self.vocab_size:
            return REPLACEMENT
        starts = (self._tokenizer.convert_ids_to_tokens(token) or "").startswith(_SPACE)
        text = self.show([token])
        return " " + text.removeprefix(" ") if starts else text

    def token(self, text: str) -> int | None:
        ids = self._ids(text, add_special_tokens=False, split_special_tokens=False)
        return ids[0] if len(ids) == 1 and self.piece(ids[0]) == text else None

    def find_control(self, text: str) -> str | None:
        found = self._template.control.search(text)
        return None if found is None else found[0]

    def encode_prompt(
        self, prompt: PromptText, variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Text with the tokenizer's own beginning tokens, without its ending tokens; chat by its
        template.
        """
        if not isinstance(prompt, str):
            # the template writes its own special tokens
            return self._within(self._template.encode(prompt, variables))
        ids = self._begun(prompt)
        return self._within(ids[: len(ids) - self._num_ends])

    def _begun(self, text: str) -> list[int]:
        return self._ids(text, add_special_tokens=True, split_special_tokens=True)

    def _ids(self, text: str, **options: bool) -> list[int]:
        return ids_of(self._tokenizer, self._path, text, **options)

    def _decode_known(self, ids: list[int], skip: bool) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a configuration; ``UserError``: the path is not set, does not exist, or has
    another kind.
    """
    if config.path is None:
        raise UserError(
            "data.tokenizer.path is not set; expected a tokenizer file or directory; set it"
        )
    if not config.path.exists():
        raise UserError(
            f"tokenizer {config.path} does not exist; expected a file or directory; "
            "set data.tokenizer.path"
        )
    if config.kind == "huggingface":
        return HuggingFaceTokenizer(config.path, config.trust_remote_code)
    if not config.path.is_file():
        raise UserError(
            f"tokenizer {config.path} is a directory; "
            "data.tokenizer.kind sentencepiece expects a .model file; "
            "name the file or set the kind to huggingface"
        )
    return SentencePieceTokenizer(config.path)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, weights: Path | None = None) -> None:
    """Raise ``UserError`` if the tokenizer has ids beyond the model's embedding of ``vocab_size``
    rows. Fewer ids are fine, and so is a padding token beyond it, which no sequence holds.

    ``weights``: the initial weights, whose embedding has exactly these rows.
    """
    past = tokenizer.limit_to(vocab_size)
    if not past:
        return
    names = ", ".join(f"{name!r} ({number})" for name, number in past[:3])
    found = (
        f"the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is {vocab_size}: no rows "
        f"for {names}{'' if len(past) <= 3 else f' and {len(past) - 3} more'}; expected at least "
        "as many rows as ids"
    )
    if weights is None:
        raise UserError(f"{found}; set model.vocab_size to {tokenizer.vocab_size} or more")
    raise UserError(
        f"{found}, and {weights} has those rows only; use the tokenizer of these weights, take the "
        "added tokens out of it, or give the weights rows for them first "
        "(resize_token_embeddings in transformers)"
    )


def _decode_runs(ids: Sequence[int], vocab_size: int, decode: Callable[[list[int]], str]) -> str:
    """Decode runs of known ids, with ``REPLACEMENT`` for every other id."""
    pieces, run = [], []
    for token in map(int, ids):
        if 0 <= token < vocab_size:
            run.append(token)
            continue
        pieces += [decode(run) if run else "", REPLACEMENT]
        run = []
    return "".join(pieces) + (decode(run) if run else "")


def _load_huggingface(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    folder = path.parent if path.is_file() else path
    check_tokenizer_files(folder, path if path.is_file() else path / "tokenizer.json")
    if path.is_file() and not path.with_name("tokenizer_config.json").is_file():
        return _load_tokenizer_json(path)
    # Always set: otherwise transformers asks on the terminal and executes after a "y".
    return AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=trust_remote_code
    )


def _load_tokenizer_json(path: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    vocabulary = tokenizer.get_vocab()
    ends = [token for token in _END_TOKENS if token in vocabulary]
    if len(ends) != 1:
        found = " and ".join(ends) or f"none of {', '.join(_END_TOKENS)}"
        raise UserError(
            f"{path} has {found}; expected exactly one end-of-sequence token; "
            "add a tokenizer_config.json that names eos_token"
        )
    tokenizer.eos_token = ends[0]
    return tokenizer

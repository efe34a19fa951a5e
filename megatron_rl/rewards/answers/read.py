r"""Reads the text of an answer as one of the kinds.

It reads one text at a time. Text without a mathematical form is ``Words``, so that the letters of a
word never become a product.
"""

from __future__ import annotations

import re
from typing import Callable, Sequence

from megatron_rl.rewards.answers.algebra import FUNCTIONS, GREEK, parse_expression
from megatron_rl.rewards.answers.kinds import (
    Answer,
    Brackets,
    Collection,
    Expression,
    Matrix,
    Quantity,
    Ratio,
    Relation,
    Words,
)
from megatron_rl.rewards.answers.literals import (
    SLASH_DATE,
    literal_number,
    plain_number,
    read_date,
    read_numeral,
)
from megatron_rl.rewards.answers.text import fold_words
from megatron_rl.rewards.answers.tokens import Token, Unreadable, is_symbol, is_word, tokenize
from megatron_rl.rewards.answers.units import Unit, is_known, parse_unit

_MAX_ITEMS = 32


def read_answer(text: str) -> Answer:
    """The answer of a cleaned text (``text.clean``); never raises."""
    number = plain_number(text)
    if number is not None:
        return number
    special = read_numeral(text) or read_date(text)
    if special is not None:
        return special
    if SLASH_DATE.fullmatch(text) or not text:
        return Words(fold_words(text))
    if re.fullmatch(r"[^\W\d_]{2,}(?:[\s'-]+[^\W\d_]+)*", text) and text not in ("pi",):
        return Words(fold_words(text))
    try:
        return _read(tokenize(text), 0)
    except ValueError:  # Unreadable is one, and so is a number that is none
        return Words(fold_words(text))


# -- structure ----------------------------------------------------------------------------------

_OPENING = {"(": ")", "[": "]", "\\{": "\\}", "langle": "rangle"}
_SIGNS = {
    "=": "=",
    "==": "=",
    "approx": "~",
    "<": "<",
    ">": ">",
    "<=": "<=",
    ">=": ">=",
    "le": "<=",
    "ge": ">=",
    "ne": "!=",
    "!=": "!=",
    "in": "in",
    "equiv": "mod",
}
_OPENERS = frozenset([*_OPENING, "{", "lfloor", "lceil"])
_CLOSERS = frozenset([*_OPENING.values(), "}", "rfloor", "rceil"])


def _split(
    tokens: Sequence[Token], is_border: Callable[[Token], bool]
) -> tuple[list[list[Token]], list[Token]]:
    """Pieces between the border tokens outside all brackets, and those tokens."""
    pieces: list[list[Token]] = [[]]
    borders = []
    depth = 0
    for token in tokens:
        if token.kind in ("mark", "command"):
            depth += (token.text in _OPENERS) - (token.text in _CLOSERS)
        if depth == 0 and is_border(token):
            pieces.append([])
            borders.append(token)
        else:
            pieces[-1].append(token)
    return pieces, borders


def _read(tokens: Sequence[Token], depth: int) -> Answer:
    if not tokens or depth > 6:
        raise Unreadable("nothing")
    several = _several(tokens, depth)
    if several is not None:
        return several
    pieces, borders = _split(tokens, lambda token: is_symbol(token, *_SIGNS))
    if borders and not pieces[0] and is_symbol(borders[0], "approx"):
        return _read(tokens[1:], depth + 1)
    if borders:
        return _relation(pieces, [_SIGNS[token.text] for token in borders], depth)
    pieces, borders = _split(tokens, lambda token: is_symbol(token, "cup"))
    if borders:
        return Collection("union", tuple(_read(piece, depth + 1) for piece in pieces))
    plus_minus = [token for token in tokens if is_symbol(token, "pm", "mp")]
    if plus_minus:
        return _two_signs(tokens, plus_minus, depth)
    if tokens[0].kind == "command" and tokens[0].text == "begin":
        return _matrix(tokens, depth)
    brackets = _brackets(tokens, depth)
    if brackets is not None:
        return brackets
    pieces, borders = _split(tokens, lambda token: is_symbol(token, ":"))
    if borders:
        return Ratio(tuple(_read(piece, depth + 1) for piece in pieces))
    return _value(tokens)


def _several(tokens: Sequence[Token], depth: int) -> Answer | None:
    pieces, borders = _split(
        tokens,
        lambda token: is_symbol(token, ",", ";") or is_word(token, "or", "and"),
    )
    if not borders:
        return None
    if len(pieces) > _MAX_ITEMS:
        raise Unreadable("too many items")
    # "1, 2, and 3": the comma before a word separates nothing
    for index in range(len(pieces) - 1, 0, -1):
        if not pieces[index - 1] and borders[index - 1].kind != "mark" and index > 1:
            del pieces[index - 1]
    items = _flat([_read(piece, depth + 1) for piece in pieces])
    intervals = all(isinstance(item, Relation) and "=" not in item.signs for item in items)
    words = all(token.kind != "mark" and token.text.strip().lower() == "or" for token in borders)
    return Collection("union" if intervals and words else "list", items)


def _flat(items: Sequence[Answer]) -> tuple[Answer, ...]:
    """0, 1 and -1 of "0, plus or minus 1"."""
    flat: list[Answer] = []
    for item in items:
        if isinstance(item, Collection) and item.kind == "list":
            flat.extend(item.items)
        else:
            flat.append(item)
    return tuple(flat)


def _relation(pieces: list[list[Token]], signs: list[str], depth: int) -> Answer:
    if "mod" in signs:
        raise Unreadable("a congruence")
    sides: list[Answer] = []
    for index, piece in enumerate(pieces):
        if index == 0 and (name := _name(piece)) is not None:
            sides.append(Expression(("sym", name)))
        else:
            sides.append(_read(piece, depth + 1))
    return Relation(tuple(sides), tuple(signs))


# A letter with an index or primes, or a word; perhaps with arguments.
_NAME = re.compile(r"[^\W\d_]\w*'*(?:\((?:-?\d+|[^\W\d_])(?:,(?:-?\d+|[^\W\d_]))*\))?")


_DERIVATIVE = re.compile(r"frac\{d[a-z]?\}\{d[a-z]\}")
_NAME_COMMANDS = GREEK | {"angle", "triangle", "overline", "overrightarrow", "vec", "bar", "hat"}
_NO_NAMES = ("sqrt", "cbrt", "pi", *FUNCTIONS)


def _name(tokens: Sequence[Token]) -> str | None:
    r"""The name that a definition defines: x, x_1, f(x), f^{-1}(x), \text{Area}, (x, y); else
    None.
    """
    text = "".join(token.text.strip() for token in tokens)
    words = [token.kind in ("text", "word") for token in tokens]
    if any(one and other for one, other in zip(words, words[1:])) or len(text) > 32:
        return None
    if len(tokens) > 1 and any(token.kind == "text" for token in tokens):
        return None
    if _DERIVATIVE.fullmatch(text):
        return text
    commands = {token.text for token in tokens if token.kind == "command"}
    if not commands <= _NAME_COMMANDS or any(is_word(token, *_NO_NAMES) for token in tokens):
        return None
    bare = text.replace("^{-1}", "").replace("{", "").replace("}", "").strip("|")
    if (
        tokens
        and (tokens[0].kind in ("text", "word", "command") or text[0] == "|")
        and _NAME.fullmatch(bare)
    ):
        return text
    if re.fullmatch(r"\([^\W\d_](?:,[^\W\d_])+\)", bare):
        return text
    return None


def _two_signs(tokens: Sequence[Token], signs: list[Token], depth: int) -> Answer:
    if len(signs) > 1:
        raise Unreadable("several double signs")
    items = []
    for sign in ("+", "-"):
        mark = Token("mark", sign, False)
        one = [mark if token is signs[0] else token for token in tokens]
        items.append(_read(one, depth + 1))
    return Collection("list", tuple(items))


def _brackets(tokens: Sequence[Token], depth: int) -> Answer | None:
    opening, closing = tokens[0], tokens[-1]
    if not is_symbol(opening, *_OPENING) or not is_symbol(closing, *_OPENING.values()):
        if len(tokens) == 1 and is_symbol(opening, "emptyset"):
            return Collection("set", ())
        return None
    level = 0
    for index, token in enumerate(tokens):
        if token.kind in ("mark", "command"):
            level += (token.text in _OPENERS) - (token.text in _CLOSERS)
        if level == 0 and index < len(tokens) - 1:
            return None  # (a)(b)
    inner = tokens[1:-1]
    if opening.text == "\\{":
        return _set(inner, closing, depth)
    pieces, borders = _split(inner, lambda token: is_symbol(token, ",", ";"))
    if not borders:
        if opening.text in "([" and closing.text == _OPENING[opening.text] and opening.text == "(":
            return _read(inner, depth + 1)
        return Brackets(opening.text, (_read(inner, depth + 1),), closing.text)
    if len(pieces) > _MAX_ITEMS:
        raise Unreadable("too many items")
    items = tuple(_read(piece, depth + 1) for piece in pieces)
    return Brackets(opening.text, items, closing.text)


def _set(inner: Sequence[Token], closing: Token, depth: int) -> Answer:
    if closing.text != "\\}":
        raise Unreadable("brackets")
    if not inner:
        return Collection("set", ())
    if any(is_symbol(token, "|", "mid", ":") for token in inner):
        raise Unreadable("a set by its property")
    pieces, _ = _split(inner, lambda token: is_symbol(token, ",", ";"))
    return Collection("set", _flat([_read(piece, depth + 1) for piece in pieces]))


def _matrix(tokens: Sequence[Token], depth: int) -> Answer:
    texts = [token.text for token in tokens]
    kind = texts[2] if texts[1:2] == ["{"] and texts[3:4] == ["}"] else ""
    end = ["end", "{", kind, "}"]
    if kind not in ("pmatrix", "bmatrix", "matrix", "vmatrix") or texts[-4:] != end:
        raise Unreadable("no matrix")
    rows, _ = _split(tokens[4:-4], lambda token: is_symbol(token, "\\\\"))
    if rows and not rows[-1]:
        rows.pop()
    read = tuple(
        tuple(
            _read(piece, depth + 1) for piece in _split(row, lambda token: is_symbol(token, "&"))[0]
        )
        for row in rows
    )
    if len({len(row) for row in read}) != 1 or sum(map(len, read)) > 64:
        raise Unreadable("rows of unlike length")
    return Matrix("vmatrix" if kind == "vmatrix" else "matrix", read)


# -- values -------------------------------------------------------------------------------------


def _value(tokens: Sequence[Token]) -> Answer:
    """A number, expression or quantity."""
    if not tokens:
        raise Unreadable("nothing")
    if is_symbol(tokens[0], "$", "\\$", "\u20ac", "\u00a3", "\u00a5", "\u20b9"):
        return _price(_value(tokens[1:]), parse_unit(tokens[0].text[-1]))
    if len(tokens) > 1 and is_symbol(tokens[0], "-") and is_symbol(tokens[1], "$", "\\$"):
        return _price(_value([tokens[0], *tokens[2:]]), parse_unit("$"))
    start = _unit_start(tokens)
    if start is None:
        return _number_or_expression(tokens)
    unit = parse_unit(_unit_text(tokens[start:]))
    if unit is None:
        raise Unreadable("no unit")
    return Quantity(_number_or_expression(tokens[:start]), unit)


def _price(value: Answer, currency: Unit | None) -> Answer:
    """$5, $5 million, $5 dollars, and $5 per day."""
    assert currency is not None, "every sign of a currency is a unit"
    if not isinstance(value, Quantity):
        return Quantity(value, currency)
    if value.unit.dimension == currency.dimension:
        return value
    dimension = tuple(sorted(currency.dimension + value.unit.dimension))
    return Quantity(value.value, value.unit._replace(dimension=dimension))


def _unit_start(tokens: Sequence[Token]) -> int | None:
    for index, token in enumerate(tokens):
        if index == 0:
            continue
        before = tokens[index - 1]
        if token.kind == "text" and not re.search(r"(?<!\^)(?<!\^-)\d", token.text):
            return index
        if is_symbol(token, "%", "\\%", "$", "\\$", "\u20ac"):
            return index
        if is_symbol(token, "^") and any(is_symbol(t, "circ") for t in tokens[index + 1 :][:2]):
            return index
        behind_value = before.kind == "number" or is_symbol(before, "}", ")")
        if token.kind == "word" and behind_value and _names_unit(token, tokens[index:]):
            return index
    return None


def _names_unit(token: Token, rest: Sequence[Token]) -> bool:
    word = token.text
    if len(word) == 1:  # 10 m/s, but 10m is algebra
        texts = [one.text for one in rest[:3]]
        return token.spaced and len(texts) == 3 and texts[1] == "/" and is_known(texts[2])
    if is_known(word) and word not in ("in", "pa", "ms") or word in ("in", "ms") and token.spaced:
        return True
    if word in ("pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "i", "e"):
        return False
    plain = all(one.kind == "word" or is_symbol(one, "/") for one in rest)
    return token.spaced and len(word) > 2 and plain


def _unit_text(tokens: Sequence[Token]) -> str:
    texts: list[str] = []
    for token in tokens:
        if token.kind == "command" and token.text != "circ":
            raise Unreadable("no unit")
        texts.append(token.text.strip().lstrip("\\") if token.kind != "number" else token.text)
    text = " ".join(texts)
    text = re.sub(r"\^ (?:\{ )?circ(?: \})?", "^circ", text)
    text = re.sub(r"\^circ ([CFcf])\b", r"^circ\1", text)
    return re.sub(r"\^ (?:\{ ?)?(- ?)?(\d) ?\}?", lambda m: f"^{'-' * bool(m[1])}{m[2]}", text)


def _number_or_expression(tokens: Sequence[Token]) -> Answer:
    if not tokens:
        raise Unreadable("nothing")
    tree = parse_expression(tokens)
    literal = literal_number(tree, tokens)
    return Expression(tree) if literal is None else literal

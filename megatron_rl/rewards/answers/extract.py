r"""Where the answer stands in a completion: its last \boxed{}, without one its last number."""

from __future__ import annotations

import re

from megatron_rl.rewards.answers.text import MAX_CHARACTERS, fold_unicode

_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_OPEN_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN_BOXES = re.compile(
    r"[\s$,;]*(?:(?:and|or|,|;|\\(?:text|quad|qquad|,|;)\{?\s*(?:and|or)?\s*\}?)[\s$]*)"
    r"(?:[a-zA-Z]\w*\s*=\s*)?[\s$]*"
)
#: More boxes that are joined by "or" or a comma are not read.
_MAX_BOXES = 16


def extract_answer(completion: str) -> str | None:
    r"""The content of the last complete \boxed{}, else the last number as a whole, else None.

    Boxes that only a comma, "and" or "or" parts are one answer of several values. None too if no
    box is complete and one was begun: the answer is cut off.
    """
    tail = completion[-MAX_CHARACTERS:]
    spans = _boxes(tail)
    if not spans:
        return None if _OPEN_BOX.search(tail) else _last_number(tail)
    contents = [tail[slice(*spans[-1])].strip()]
    for (_, before), (start, _) in zip(spans[-2::-1], spans[::-1]):
        between = tail[before + 1 : tail.rfind("\\", 0, start)]
        if len(between) > 64 or not _BETWEEN_BOXES.fullmatch(between):
            break
        contents.insert(0, tail[slice(*spans[-len(contents) - 1])].strip())
        if len(contents) == _MAX_BOXES:
            break
    return ", ".join(contents) or None


def last_boxed(text: str) -> str | None:
    r"""The stripped content of the last \boxed{...} whose braces balance; None without one."""
    spans = _boxes(text)
    return text[slice(*spans[-1])].strip() if spans else None


def _boxes(text: str) -> list[tuple[int, int]]:
    """Start and end of the contents of complete boxes that are in no other complete one."""
    opened: list[int | None] = []
    boxes: list[tuple[int, int]] = []
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token.endswith("{") and token != "\\{":
            opened.append(match.end() if len(token) > 1 else None)
        elif token == "}" and opened:
            start = opened.pop()
            if start is not None:
                while boxes and boxes[-1][0] > start:
                    boxes.pop()  # a box in this one
                boxes.append((start, match.start()))
    return boxes


# -- without a box ------------------------------------------------------------------------------

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?![\d/]|[.,]\d)|\d+)"
_NUMBER = (
    rf"(?:\\[dtc]?frac ?\d ?\d|(?<!\d)\d{{1,3}} \d+/\d+|"
    rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+(?!\w))?)"
)
#: What stands behind a number and counts nothing: words, and a unit with its exponent.
_UNIT = (
    r"(?: ?\\(?:text|mathrm|mbox) ?\{[^{}\d]*\}(?:\^\{?-?\d\}?)?"
    r"| ?(?:square |cubic )?(?:[a-z]m|m|in|ft|yd|mi|inches|feet|meters|units?)"
    r"\^\{?-?\d\}?(?!\w)"
    r"|[mgshLAWVJKCF](?![\w^(/*']|\\))"
)
_ATOM = (
    rf"(?:{_NUMBER}{_UNIT}?"
    r"|\\(?!text|math|boxed|quad|left|right|[lc]?dots)[a-zA-Z]+(?: (?=[\d{\\]))?"
    r"|[a-zA-Z]+(?=[\d_^])|(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z'])|[(){}|]|\\?%)"
)
_OPERATOR = r"(?:\*\*|[-+*/^]|(?<=\d):(?=\d\d?(?!\d))|\\(?:times|cdot|div|over|pm))"
_LINK = rf"(?: ?{_OPERATOR} ?(?:[-+](?=[\d.\\({{]))?|_|)"
# A hyphen behind a digit, a letter or a bracket is an operator, not a sign.
_SIGN = r"(?:(?<![\w)\]}])[-+]|(?<==) ?- ?)?"
_FORMULA = re.compile(rf"(?<![_^]){_SIGN}{_ATOM}(?:{_LINK}{_ATOM})*", re.ASCII)
_LETTER_UNIT = re.compile(r"^([-+]?[\d.,]*\d)([mgshLAWVJKCF])(?=$|\^)", re.ASCII)
_JOINED = re.compile(r"(?:,|;|(?:,? ?)\b(?:or|and|to|through)\b|\\text ?\{ ?(?:or|and) ?\}) *")
_MINUS_AND_SPACE = re.compile("([\u2212\uff0d]) +(?=[\\d$])")
_MARKS = re.compile(r"\\?\$|\\[()\[\]]")


def _last_number(text: str) -> str | None:
    """The last formula with a digit in it, up to an equals sign: "3/4", "x^2", "5 or 7"."""
    for line in reversed(text.splitlines()):
        line = _MARKS.sub("", fold_unicode(_MINUS_AND_SPACE.sub(r"\1", line)))
        last, before = None, None
        for match in _FORMULA.finditer(line):
            if any(character.isdigit() for character in match.group()):
                last, before = match, last
        if last is None:
            continue
        if before is not None and _JOINED.fullmatch(line[before.end() : last.start()].strip()):
            return f"{_bare(before.group())}, {_bare(last.group())}"
        return _bare(last.group())
    return None


def _bare(formula: str) -> str:
    """Without brackets at its ends that have no other half."""
    formula = _LETTER_UNIT.sub(r"\1\\text{ \2}", formula.strip())
    for opening, closing in ("()", "{}"):
        while formula.count(closing) > formula.count(opening) and formula.endswith(closing):
            formula = formula[:-1].rstrip()
        while formula.count(opening) > formula.count(closing) and formula.startswith(opening):
            formula = formula[1:].lstrip()
    return formula.strip("|") or formula

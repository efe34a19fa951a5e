r"""Finds the answer in a completion: its last \boxed{}, else its last number."""

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

    Boxes separated only by a comma, "and" or "or" are one answer with several values. Also None if
    a box was begun and none is complete: the answer is cut off.
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
    """Start and end of the contents of complete boxes outside of other complete boxes."""
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
#: Text after a number that does not change it: words, and a unit with its exponent.
_UNIT = (
    r"(?: ?\\(?:text|mathrm|mbox) ?\{[^{}\d]*\}(?:\^\{?-?\d\}?)?"
    r"| ?(?:square |cubic )?(?:[a-z]m|m|in|ft|yd|mi|inches|feet|meters|units?)"
    r"\^\{?-?\d\}?(?!\w)"
    r"|[mgshLAWVJKCF](?![\w^(/*']|\\)"
    # words that change the number
    r"| (?:(?:hundred|thousand|million|billion|trillion|dozen)s?(?![a-zA-Z])"
    r"|squared|cubed|pi(?!\w)))"
)
_FUNCTION = (
    r"(?:(?:sqrt|cbrt|log|ln|exp|sin|cos|tan|cot|sec|csc)(?![a-zA-Z])"
    r"(?:_(?:\w{1,4}|\{\w{1,4}\}))?(?: (?=[\d(.]))?)"
)
_ATOM = (
    rf"(?:{_NUMBER}{_UNIT}?"
    r"|\\(?!text|math|boxed|quad|left|right|[lc]?dots)[a-zA-Z]+(?: (?=[\d{\\]))?"
    rf"|(?<![a-zA-Z]){_FUNCTION}"
    r"|[a-zA-Z]{1,32}(?=[\d_^])|(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z'])|[(){}|]|\\?%)"
)
_OPERATOR = r"(?:\*\*|[-+*/^]|(?<=\d):(?=\d\d?(?!\d))|\\(?:times|cdot|div|over|pm))"
#: A value behind a number and a space is its factor, or the fraction of a mixed number.
_FACTOR = (
    r"(?:\\(?:sqrt|[dtc]?frac|pi|binom|log|ln|sin|cos|tan)(?![a-zA-Z])|(?:sqrt|cbrt|pi)(?!\w))"
)
_LINK = rf"(?: ?{_OPERATOR} ?(?:[-+](?=[\d.\\({{]))?|_|(?<=[\d}})]) (?={_FACTOR})|)"
# A hyphen behind a digit, a letter or a bracket is an operator, not a sign.
_SIGN = r"(?:(?<![\w)\]}])[-+]|(?<==) ?- ?)?"
_FORMULA = re.compile(rf"(?<![_^]){_SIGN}{_ATOM}(?:{_LINK}{_ATOM})*", re.ASCII)
_LETTER_UNIT = re.compile(r"^([-+]?[\d.,]*\d)([mgshLAWVJKCF])(?=$|\^)", re.ASCII)
_JOINED = re.compile(r"(?:,|;|(?:,? ?)\b(?:or|and|to|through)\b|\\text ?\{ ?(?:or|and) ?\}) *")
_DEFINED = re.compile(r"(?<!\w)([a-zA-Z]\w{0,7}) ?= ?$")
_NAME_CHARACTERS = 12
_MINUS_AND_SPACE = re.compile("([\u2212\uff0d]) +(?=[\\d$])")
_SPACES = re.compile(r"\s+")
_SIGN_WORD = re.compile(r"(?<![\w-])(?:minus|negative) (?=[\d.\\(])", re.IGNORECASE)
#: Signs of an inequality; not "->" and the ">" of a tag.
_COMPARED = re.compile(r" ?(?:[<>]=?|!=|\\(?:[lg]eq?|[lg]t|neq?)(?![a-zA-Z])) ?")
_MARKS = re.compile(r"\\?\$|\\[()\[\]]")


def _last_number(text: str) -> str | None:
    """The last formula with a digit in it, up to an equals sign: "3/4", "x^2", "5 or 7", "x < 4".

    It includes text that changes its value: "minus 5", "5 million", "log 5".
    """
    for line in reversed(text.splitlines()):
        line = _SPACES.sub(" ", fold_unicode(_MINUS_AND_SPACE.sub(r"\1", line)))
        line = _SIGN_WORD.sub("-", _MARKS.sub("", line))
        formulas = [*_FORMULA.finditer(line)]
        numbers = [
            place
            for place, match in enumerate(formulas)
            if any(character.isdigit() for character in match.group())
        ]
        if not numbers:
            continue
        last, first = formulas[numbers[-1]], numbers[-1]
        while first and _is_compared(line, formulas[first - 1], formulas[first]):
            first -= 1
        if first < numbers[-1]:
            return line[formulas[first].start() : last.end()]
        before = formulas[numbers[-2]] if len(numbers) > 1 else None
        if before is not None and _are_joined(line, before, last):
            return f"{_bare(before.group())}, {_bare(last.group())}"
        return _bare(last.group())
    return None


def _are_joined(line: str, one: re.Match[str], other: re.Match[str]) -> bool:
    """Whether they are two values of one answer: "5 or 7", "x = 5, x = 7"."""
    between = line[one.end() : other.start()]
    name = _DEFINED.search(between)
    if name is not None:
        earlier = _DEFINED.search(line[: one.start()][-_NAME_CHARACTERS:])
        if earlier is None or earlier.group(1) != name.group(1):
            return False
        between = between[: name.start()]
    return _JOINED.fullmatch(between.strip()) is not None


def _is_compared(line: str, one: re.Match[str], other: re.Match[str]) -> bool:
    in_tag = line[: one.start()].endswith(("<", "</"))
    sign = _COMPARED.match(line, one.end())
    return not in_tag and sign is not None and sign.end() >= other.start()


def _bare(formula: str) -> str:
    """The text without unmatched brackets at its ends."""
    formula = _LETTER_UNIT.sub(r"\1\\text{ \2}", formula.strip())
    for opening, closing in ("()", "{}"):
        while formula.count(closing) > formula.count(opening) and formula.endswith(closing):
            formula = formula[:-1].rstrip()
        while formula.count(opening) > formula.count(closing) and formula.startswith(opening):
            formula = formula[1:].lstrip()
    return formula.strip("|") or formula

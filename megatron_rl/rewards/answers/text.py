"""Normalises the text of an answer: one spelling for many.

Everything here is linear in the length of the text.
"""

from __future__ import annotations

import re
import unicodedata

#: Characters at the end of a completion that are searched for its answer.
MAX_CHARACTERS = 20_000

# -- one spelling -------------------------------------------------------------------------------

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni"))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙᵢ", "0123456789+-()ni"))
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")

_SYMBOLS = {
    # signs: hyphens and dashes, minus, full-width and small hyphen-minus, heavy minus
    **dict.fromkeys(
        "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d\u2796\u02d7", "-"
    ),
    **dict.fromkeys("\u00d7\u2217\u22c5\u00b7\u2219\u2a2f\u2715\u2716", "*"),
    **dict.fromkeys("\u2215\u2044", "/"),
    "\u00f7": r"\div ",
    "\u2236": ":",
    "\u2064": " ",
    "\u00b1": r"\pm ",
    "\u2213": r"\mp ",
    "\u2264": r"\le ",
    "\u2a7d": r"\le ",
    "\u2265": r"\ge ",
    "\u2a7e": r"\ge ",
    "\u2260": r"\ne ",
    "\u2248": r"\approx ",
    "\u2245": r"\approx ",
    "\u221e": r"\infty ",
    "\u221a": r"\sqrt ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2208": r"\in ",
    "\u2205": r"\emptyset ",
    "\u00b0": r"^\circ ",
    "\u2032": "'",
    "\u2019": "'",
    "\u27e8": r"\langle ",
    "\u27e9": r"\rangle ",
    "\u03c0": r"\pi ",
    "\u066b": ".",
    "\u066c": ",",
    "\uff3c": "\\",
    **{
        letter: f"\\{name} "
        for letter, name in zip(
            "αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΣΦΨΩ",
            "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma "
            "tau upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega".split(),
        )
    },
}
_SYMBOL = re.compile(f"[{re.escape(''.join(_SYMBOLS))}]")


def fold_unicode(text: str) -> str:
    r"""The answer in keyboard characters: signs, digits, fractions, operators.

    Digits of every script become 0 to 9; "x²" becomes "x^{2}", "½" becomes "\frac{1}{2}"; marks
    without a width vanish. Letters that only look equal stay different.
    """
    if text.isascii():
        return text
    text = _RAISED.sub(lambda found: _braced("^", found.group(), _SUPERSCRIPTS), text)
    text = _LOWERED.sub(lambda found: _braced("_", found.group(), _SUBSCRIPTS), text)
    text = _VULGAR.sub(_fraction, text)
    text = _SYMBOL.sub(lambda found: _SYMBOLS[found.group()], text)
    text = _SYMBOL.sub(lambda found: _SYMBOLS[found.group()], unicodedata.normalize("NFKC", text))
    return "".join(_plain(character) for character in text)


def _braced(mark: str, run: str, table: dict[str, str]) -> str:
    return f"{mark}{{{''.join(table[character] for character in run)}}}"


def _fraction(found: re.Match[str]) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", found.group()).partition("\u2044")
    return f"\\frac{{{numerator}}}{{{denominator}}}" if denominator else found.group()


def _plain(character: str) -> str:
    if character.isascii():
        return character
    if unicodedata.category(character) == "Nd":
        return str(unicodedata.digit(character))
    if unicodedata.category(character) == "Cf":
        return ""
    return " " if character.isspace() else character


_SIZES = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|hfill|quad|qquad)(?![a-zA-Z])\.?"
)
_FONTS = re.compile(
    r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|underline|boxed|fbox|ensuremath|mathds)\s*\{"
)
_WORDS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up|sc)?|mathrm|operatorname\*?|mbox|hbox|rm|bf)\s*"
    r"\{((?:[^{}\\]|\{[^{}\\]*\})*)\}"
)
_INNER_NUMBER = re.compile(r"\\text\{\s*([-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+))\s*(%?)\s*\}", re.ASCII)
_GROUPS = re.compile(r"(?<=\d)(?:\\[,!;: ]|\{,\}|,\\!)(?=\d{3}(?!\d))", re.ASCII)
_SPACED_GROUPS = re.compile(r"(?<![\d.,/])(\d{1,3}(?: \d{3})+)(?![\d/]| \d)", re.ASCII)
_DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)", re.ASCII)
_SPACES = re.compile(r"(?<!\\)\\[,!;:> ]|~|\\(?:thinspace|enspace|phantom\{[^{}]*\})")
_COMMANDS = {
    "dfrac": "frac",
    "tfrac": "frac",
    "cfrac": "frac",
    "leq": "le",
    "leqslant": "le",
    "geq": "ge",
    "geqslant": "ge",
    "neq": "ne",
    "simeq": "approx",
    "cong": "approx",
    "varnothing": "emptyset",
    "dbinom": "binom",
    "tbinom": "binom",
    "lbrace": "{",
    "rbrace": "}",
    "lbrack": "[",
    "rbrack": "]",
    "lvert": "vert",
    "rvert": "vert",
    "varphi": "phi",
    "varepsilon": "epsilon",
}
_PLAIN_COMMANDS = {
    "times": "*",
    "cdot": "*",
    "ast": "*",
    "lt": "<",
    "gt": ">",
    "textdollar": r"\$",
    "degree": r"^\circ ",
    "textdegree": r"^\circ ",
    "colon": ":",
}
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_PREFIX = re.compile(
    r"^(?:\\text\{\s*)?(?:the\s+)?(?:final\s+)?(?:answer|result|solution|ans)\b\s*(?:is\b|=)?\s*"
    r":?\s*\}?\s*:?\s*(?=[-+\d.$\\({])",
    re.IGNORECASE,
)
_COLORS = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:mathbf|bf|rm)\s(?=\s*\d)")
_ROW_SPACE = re.compile(r"\\\\\s*\[[\d.]+\s*[a-z]{2}\]")
_UPRIGHT = re.compile(r"\\(?:mathrm|operatorname|rm)\s*\{([ei])\}")
_MATH_MARKS = re.compile(r"(?<!\\)\\[()\[\]]|(?<!\\)\$\$")


def clean(text: str) -> str:
    r"""One spelling of an answer: sizes, fonts, spaces and dollar signs of LaTeX dropped.

    Words are in \text{...}; \times, \cdot and × become "*"; thousands separators other than a comma
    are dropped. All else is unchanged.
    """
    text = _SPACES_BETWEEN.sub(" ", fold_unicode(text)).strip()
    if not _PLAIN_TEXT.isdisjoint(text):
        text = _clean_latex(text)
    if " " in text:
        text = _SPACED_GROUPS.sub(lambda found: found.group(1).replace(" ", ""), text)
        text = _PREFIX.sub("", text)
    return text.rstrip("\\ ").removesuffix(".").strip()


_SPACES_BETWEEN = re.compile(r"\s+")
_PLAIN_TEXT = frozenset("\\${}~")


def _clean_latex(text: str) -> str:
    text = _ROW_SPACE.sub(r"\\\\", _COLORS.sub("", text))
    text = _UPRIGHT.sub(r"\1", _without_math_marks(text))
    text = _SIZES.sub(" ", text)
    text = _GROUPS.sub("", text)
    text = _DECIMAL_COMMA.sub(".", text)
    text = _SPACES.sub(" ", text)
    text = _COMMAND.sub(_one_command, text)
    text = text.replace("{:}", ":")
    text = _WORDS.sub(_words, text)
    text = _FONTS.sub("{", text)
    text = _INNER_NUMBER.sub(r" \1\2 ", text)
    if (whole := re.fullmatch(r"\s*\\text\{([^{}]*)\}\s*", text)) is not None:
        text = whole.group(1)
    return _SPACES_BETWEEN.sub(" ", text).strip()


def _without_math_marks(text: str) -> str:
    text = _MATH_MARKS.sub(" ", text)
    dollars = [found.start() for found in re.finditer(r"(?<!\\)\$", text)]
    if len(dollars) == 1 and dollars[0] > 0:
        return text.replace("$", " ")  # a mark without its other half
    if len(dollars) % 2 == 0:
        for position in reversed(dollars):
            text = text[:position] + " " + text[position + 1 :]
    return text


def _words(found: re.Match[str]) -> str:
    words = found.group(1).replace("{", "").replace("}", "")
    return f"\\text{{{words}}}"


def _one_command(found: re.Match[str]) -> str:
    name = found.group(1)
    if name in _PLAIN_COMMANDS:
        return _PLAIN_COMMANDS[name]
    name = _COMMANDS.get(name, name)
    return f"\\{name}"


_QUOTES = " \"'`\u201c\u201d\u2018"


def fold_words(text: str) -> str:
    """Words without case, outer spaces, quotes and final punctuation."""
    text = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace("{", " ").replace("}", " ")
    text = text.strip(_QUOTES).rstrip(_QUOTES + ".,;:!")
    return " ".join(text.casefold().split())

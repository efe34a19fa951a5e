"""Units of measure: their names, and their conversion factors."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from megatron_rl.rewards.answers.text import fold_words


class Unit(NamedTuple):
    """``multiplier`` (a word such as thousand) times ``factor`` base units of ``dimension``.

    A word that is not in the table is a base unit.
    """

    factor: Fraction
    dimension: tuple[tuple[str, int], ...]
    multiplier: Fraction = Fraction(1)


_TABLE: dict[str, dict[str, int | str]] = {
    "length": {
        "m meter metre": 1,
        "km kilometer kilometre": 1000,
        "cm centimeter centimetre": "1/100",
        "mm millimeter millimetre": "1/1000",
        "nm nanometer nanometre": "1/1000000000",
        "in inch inches": "127/5000",
        "ft foot feet": "381/1250",
        "yd yard": "1143/1250",
        "mi mile": "201168/125",
    },
    "mass": {
        "kg kilogram": 1000,
        "g gram": 1,
        "mg milligram": "1/1000",
        "lb lbs pound": "45359237/100000",
        "oz ounce": "45359237/1600000",
        "ton tonne": 1000000,
    },
    "time": {
        "s sec second": 1,
        "ms millisecond": "1/1000",
        "min minute": 60,
        "h hr hour": 3600,
        "day": 86400,
        "week": 604800,
    },
    "morning": {"am a.m": 1},
    "afternoon": {"pm p.m": 1},
    "years": {"year yr": 12, "month": 1},
    "money": {"$ dollar usd buck": 1, "cent ¢": "1/100"},
    "euro": {"€ euro eur": 1},
    "sterling": {"£ gbp": 1},
    "yen": {"¥ yen jpy": 1},
    "rupee": {"₹ rupee inr": 1},
    "angle": {"^circ degree deg": 1},
    "radian": {"radian rad": 1},
    "percent": {"% percent pct percentage": 1},
    "volume": {"l liter litre": 1, "ml milliliter millilitre": "1/1000"},
    "energy": {"j joule": 1, "kj kilojoule": 1000},
    "power": {"w watt": 1, "kw kilowatt": 1000},
    "force": {"n newton": 1},
    "voltage": {"v volt": 1},
    "current": {"a ampere amp": 1},
    "kelvin": {"k kelvin": 1},
    "frequency": {"hz hertz": 1, "khz kilohertz": 1000, "mhz megahertz": 1000000},
    "pressure": {"pa pascal": 1, "kpa kilopascal": 1000},
    "amount": {"mol mole": 1},
    "celsius": {"°c celsius ^circc": 1},
    "fahrenheit": {"°f fahrenheit ^circf": 1},
    # factors, no units
    "": {
        "hundred": 100,
        "thousand": 10**3,
        "million": 10**6,
        "billion": 10**9,
        "trillion": 10**12,
        "dozen": 12,
    },
}
_KNOWN: dict[str, tuple[str, Fraction]] = {
    name: (dimension, Fraction(factor))
    for dimension, units in _TABLE.items()
    for names, factor in units.items()
    for name in names.split()
}
#: Written with a capital letter.
_CAPITALS = frozenset(["L", "mL", "J", "kJ", "W", "kW", "N", "V", "A", "K", "Hz", "kHz", "MHz"])
_CAPITALS |= {"Pa", "kPa", "AM", "PM"}
#: Words after a number that are not units.
_NO_UNITS = frozenset(
    "minus plus times over squared cubed or and to not no half third quarter tenths hundredths "
    "thousandths ten negative factorial more less than approximately about modulo mod base of is "
    "wrong if else zero one two three four five six seven eight nine eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty "
    "halves thirds fifths sixths eighths pi x "
    "maybe possibly either between through any some except without nor but".split()
)
_PIECES = re.compile(r"\s*(per(?![a-zA-Z])|/|\*|\^\{?(-?\d)\}?|[^\s/*^\d{}-]+|\^circ\s?[CF]?)")
_SPEED = {"mph": "miles per hour", "kph": "km per hour", "kmh": "km per hour"}
_SPEEDS = re.compile(r"\b(?:mph|kph|kmh)\b")
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


def is_known(word: str) -> bool:
    """Whether a bare word names a unit of the table; capitals count."""
    if word in _CAPITALS or word in _SPEED:
        return True
    return (word if len(word) <= 2 else _singular(word.lower())) in _KNOWN


def parse_unit(text: str) -> Unit | None:
    r"""The unit of "cm^2", "miles per hour", "square feet", "apples"; None if it is none."""
    factor, multiplier = Fraction(1), Fraction(1)
    powers: dict[str, int] = {}
    sign, power, count = 1, 1, 0
    last: tuple[str, Fraction, int] | None = None
    position = 0
    text = _SPEEDS.sub(lambda found: _SPEED[found.group()], text.strip().rstrip("."))
    while position < len(text):
        match = _PIECES.match(text, position)
        if match is None:
            return None
        position = match.end()
        piece = match.group(1)
        if piece in ("per", "/"):
            sign = -1
        elif piece == "*":
            continue
        elif piece.startswith("^") and not piece.startswith("^circ"):
            if last is None:
                return None
            name, scale, exponent = last
            more = exponent * (int(match.group(2)) - 1)
            factor *= scale**more
            powers[name] = powers.get(name, 0) + more
            last = None
        elif piece.lower() in _POWERS:
            power = _POWERS[piece.lower()]
        else:
            found = _one(piece)
            count += 1
            if found is None or count > 6:
                return None
            if not found[0]:
                multiplier *= found[1]
                continue
            last = (*found, sign * power)
            factor *= found[1] ** (sign * power)
            powers[found[0]] = powers.get(found[0], 0) + sign * power
            power = 1
    dimension = tuple(sorted((name, count) for name, count in powers.items() if name and count))
    return Unit(factor, dimension, multiplier) if count else None


def _one(word: str) -> tuple[str, Fraction] | None:
    if word in _CAPITALS:
        return _KNOWN[word.lower()]
    word = word.replace(" ", "").strip("\\'\"()")
    folded = fold_words(word).rstrip(".") if len(word) > 2 else word
    if folded.lower() in _NO_UNITS or not folded:
        return None
    folded = _singular(folded)
    return _KNOWN.get(folded, (f"word {folded}", Fraction(1)))


def _singular(word: str) -> str:
    if word in _KNOWN or len(word) < 4:
        return word
    for ending, other in (("ies", "y"), ("es", ""), ("es", "e"), ("s", "")):
        if word.endswith(ending) and word[: -len(ending)] + other in _KNOWN:
            return word[: -len(ending)] + other
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word

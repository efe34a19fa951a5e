"""Pairs of a reference and a completion, and how to judge them.

Every pair is made from values: its truth follows from how it was made and not from a parser.
``make_pairs(count, seed)`` draws the kinds in turn. Kinds of text, lists and algebra are in
``math_pairs_forms``.
"""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Callable, Iterator, NamedTuple


class Pair(NamedTuple):
    """``answer`` as a record has it, ``completion``, and whether that is right."""

    kind: str
    answer: str | int | float
    completion: str
    solved: bool


Case = tuple[object, str, bool]
MINUSES = "-\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d"


def boxed(text: object) -> str:
    """As most completions end."""
    return f"So the answer is $\\boxed{{{text}}}$."


def grouped(rng: random.Random, value: int) -> str:
    """Digits in groups of three, in one of the usual ways."""
    mark = rng.choice([",", "{,}", "\\,", "\\ ", "\u202f", "\u2009"])
    return f"{value:,}".replace(",", mark)


def in_script(value: int, zero: int) -> str:
    """Digits of another script, of which ``zero`` is the code of nought."""
    return "".join(chr(zero + int(c)) if c.isdigit() else c for c in str(value))


def integers(rng: random.Random) -> Iterator[Case]:
    value = rng.randint(2, 99999)
    right = [
        str(value),
        f"{value}.",
        f"{value}.0",
        f"+{value}",
        f"x = {value}",
        f"\\text{{{value}}}",
    ]
    right += [f"\\$ {value}", f"{{{value}}}", f"({value})", f"\\mathbf{{{value}}}", f"0{value}"]
    right += [in_script(value, 0xFF10), in_script(value, 0x0660), in_script(value, 0x0966)]
    right += [f"{value}\u200b", f"n={value}", f"\\textbf{{{value}}}", f"\\boxed{{{value}}}"]
    if value > 9999:
        right.append(grouped(rng, value))
    wrong = [value + 1, value - 1, -value, value * 10, f"{value}.5", f"1{value}", f"{value}.000001"]
    wrong += [
        f"\\frac{{1}}{{{value}}}",
        f"\\sqrt{{{value}}}",
        f"{value}!",
        f"{value}^2",
        f"-{value}",
    ]
    yield value, boxed(rng.choice(right)), True
    yield str(value), rng.choice(["", "It is ", "the answer is $"]) + str(value) + ".", True
    yield value, boxed(rng.choice(wrong)), False
    yield f"#### {value:,}", f"She has {value + 3} and then {rng.choice(wrong[:3])}", False


def signs(rng: random.Random) -> Iterator[Case]:
    value, minus = rng.randint(1, 999), rng.choice(MINUSES)
    yield -value, boxed(f"{minus}{value}"), True
    yield -value, f"The answer is {minus}{value}.", True
    yield value, f"The answer is {minus}{value}.", False
    yield value, boxed(f"{minus} {value}"), False
    yield f"-{value}/7", boxed(f"{minus}\\frac{{{value}}}{{7}}"), True
    yield f"{value}/7", f"We get {minus}\\frac{{{value}}}{{7}}.", value % 7 == 0 and False
    yield -value, boxed(value), False


def fractions(rng: random.Random) -> Iterator[Case]:
    below = rng.randint(3, 40)
    above = rng.choice([n for n in range(1, below) if Fraction(n, below).denominator == below])
    k = rng.randint(2, 9)
    reference = rng.choice([f"\\frac{{{above}}}{{{below}}}", f"{above}/{below}"])
    right = [f"\\frac{{{above}}}{{{below}}}", f"\\dfrac{{{above}}}{{{below}}}", f"{above}/{below}"]
    right += [
        f"\\tfrac{{{above * k}}}{{{below * k}}}",
        f"{above} / {below}",
        f"p = {above}/{below}",
    ]
    right += [f"\\frac{{-{above}}}{{-{below}}}", f"\\left(\\frac{{{above}}}{{{below}}}\\right)"]
    if above < 10 and below < 10:
        right += [f"\\frac{above}{below}", f"\\frac {above} {below}", f"\\frac{{{above}}}{below}"]
    wrong = [
        f"\\frac{{{below}}}{{{above}}}",
        f"-{above}/{below}",
        f"\\frac{{{above + 1}}}{{{below}}}",
    ]
    wrong += [
        f"\\frac{{{above}}}{{{below + 1}}}",
        above,
        below,
        f"{above}.{below}",
        f"{above}:{below + 1}",
    ]
    wrong += [
        f"\\frac{{{above}}}{{{below}}} + 1",
        f"{above},{below}",
        f"{round(above / below, 2)}1",
    ]
    yield reference, boxed(rng.choice(right)), True
    yield reference, f"So we get {rng.choice(right[:3])}.", True
    yield reference, boxed(rng.choice(wrong)), False
    yield below, f"So we get \\frac{{{above}}}{{{below}}}.", False
    yield above, f"So we get {above}/{below}", False
    yield reference, boxed(f"{above / below:.9f}"), True
    yield reference, f"It is {above / below + 0.01:.4f}", False


def mixed_numbers(rng: random.Random) -> Iterator[Case]:
    whole, above, below = rng.randint(1, 30), *rng.choice([(1, 2), (2, 3), (3, 4), (5, 8), (4, 7)])
    total = f"\\frac{{{whole * below + above}}}{{{below}}}"
    forms = [f"{whole}\\frac{{{above}}}{{{below}}}", f"{whole} {above}/{below}"]
    forms += [f"{whole}\\frac{above}{below}", f"{whole}\\ \\dfrac{{{above}}}{{{below}}}"]
    yield total, boxed(rng.choice(forms)), True
    yield rng.choice(forms), boxed(total), True
    yield rng.choice(forms), boxed(rng.choice(forms)), True
    yield f"-{total}", boxed(f"-{forms[0]}"), True
    yield f"\\frac{{{whole * above}}}{{{below}}}", boxed(forms[0]), False
    yield (
        total,
        boxed(rng.choice([whole, f"{above}/{below}", f"{whole + 1}\\frac{{{above}}}{{{below}}}"])),
        False,
    )


def decimals(rng: random.Random) -> Iterator[Case]:
    digits, places = rng.randint(1001, 99999) | 1, rng.randint(1, 3)
    digits += 5 * (digits % 10 == 5)
    text = f"{digits / 10**places:.{places}f}"
    yield text, boxed(text + "0"), True
    yield float(text), boxed(f"\\frac{{{digits}}}{{{10**places}}}"), True
    yield text, boxed(f"\\approx {text}"), True
    yield text, boxed(f"x \\approx {text}"), True
    yield text, boxed(f"{(digits + 1) / 10**places:.{places}f}"), False
    yield text, boxed(f"{digits / 10 ** (places + 1):.{places + 1}f}"), False
    yield text, boxed(f"-{text}"), False
    yield text, boxed(f"{digits * 1.01 / 10**places:.{places}f}"), False
    short = rng.choice(["0.5", "0.2", "1.5", "2.5", "0.1", "0.25", "7.5"])
    yield short, boxed(f"{float(short) * 1.04:.4f}"), False
    yield 0.1 + 0.2, boxed("0.3"), True
    yield "3.14", boxed("\\pi"), True
    yield "3.14", boxed("3.1"), False


def scientific(rng: random.Random) -> Iterator[Case]:
    mantissa, exponent = rng.randint(1001, 9899), rng.choice([*range(-40, -4), *range(5, 40)])
    text = f"{mantissa / 1000:.3f}"
    forms = [
        f"{text}\\times10^{{{exponent}}}",
        f"{text} \\times 10^{{{exponent}}}",
        f"{text}e{exponent}",
    ]
    forms += [
        f"{text} \\cdot 10^{{{exponent}}}",
        f"{text}\u00d710^{exponent}",
        f"{text}E{exponent:+03d}",
    ]
    yield forms[0], boxed(rng.choice(forms)), True
    yield rng.choice(forms), f"The constant is {rng.choice(forms[:3])}.", True
    yield float(f"{text}e{exponent}"), boxed(rng.choice(forms)), True
    other = f"{(mantissa + 100) / 1000:.3f}"
    yield forms[0], boxed(f"{other}\\times10^{{{exponent}}}"), False
    yield forms[0], boxed(f"{text}\\times10^{{{exponent + 1}}}"), False
    yield forms[0], boxed(f"{text}\\times10^{{{-exponent}}}"), False
    yield (
        rng.choice([1e-05, "1e-05"]),
        boxed(rng.choice(["0.00001", "10^{-5}", "1\\times10^{-5}"])),
        True,
    )
    yield 1e22, boxed(rng.choice(["10^{22}", "1e22", "1" + 22 * "0", "1\\cdot 10^{22}"])), True
    yield 1e22, boxed(rng.choice(["10^{21}", "1e23", "22"])), False
    yield text, f"It is {text}\\times10^{{{exponent}}}.", False


def percent(rng: random.Random) -> Iterator[Case]:
    value = rng.randint(2, 98)
    yield value, boxed(f"{value}\\%"), True
    yield (
        f"{value}\\%",
        boxed(rng.choice([f"{value}%", f"{value}\\%", f"{value} \\text{{ percent}}"])),
        True,
    )
    yield f"{value}\\%", boxed(value), True
    yield f"{value / 100}", boxed(f"{value}\\%"), True
    yield f"{value}%", boxed(f"{value + 1}%"), False
    yield f"{value}%", boxed(f"{value * 10}\\%"), False
    yield (
        f"{value}^\\circ",
        boxed(rng.choice([f"{value}", f"{value}\u00b0", f"{value}\\text{{ degrees}}"])),
        True,
    )
    yield f"{value}^\\circ", boxed(f"{value}\\text{{ radians}}"), False
    yield f"{value}^\\circ", boxed(f"{value + 1}^{{\\circ}}"), False


def money(rng: random.Random) -> Iterator[Case]:
    value = rng.randint(2, 9999)
    yield (
        f"\\${value}",
        boxed(rng.choice([value, f"\\${value}.00", f"{value}\\text{{ dollars}}", f"${value}"])),
        True,
    )
    yield (
        value,
        rng.choice([f"It costs ${value:,}.", f"It costs \\${value}.00", f"{value} dollars"]),
        True,
    )
    yield f"\\${value}", boxed(f"\u20ac{value}"), False
    yield f"\\${value}", boxed(f"{value}\\text{{ cents}}"), False
    yield f"\\${value}", boxed(f"\\${value + 1}"), False
    yield f"\\${value}.50", boxed(f"\\${value}"), False
    yield value * 1000, boxed(f"{value}\\text{{ thousand}}"), True
    yield value, boxed(f"{value}\\text{{ thousand}}"), False


UNITS = ["cm", "km", "kg", "miles", "hours", "\\text{cm}^2", "m/s", "minutes", "grams", "apples"]


def units(rng: random.Random) -> Iterator[Case]:
    value = rng.randint(2, 999)
    unit, other = rng.sample(UNITS, 2)

    def of(number: int, name: str) -> str:
        return f"{number}\\ {name}" if "\\" in name else f"{number}\\text{{ {name}}}"

    yield of(value, unit), boxed(of(value, unit)), True
    yield of(value, unit), boxed(value), True
    yield value, boxed(of(value, unit)), True
    yield of(value, unit), boxed(of(value, other)), False
    yield of(value, unit), boxed(of(value + 1, unit)), False
    yield (
        of(value, "km"),
        boxed(rng.choice([f"{value} km", f"{value}\\,\\mathrm{{km}}", f"{value} kilometers"])),
        True,
    )
    yield of(value, "km"), boxed(f"{value * 1000}\\text{{ m}}"), True
    yield (
        of(value, "cm^2"),
        boxed(rng.choice([f"{value} \\text{{ cm}}^2", f"{value}\\text{{ square centimeters}}"])),
        True,
    )
    yield of(value, "cm"), boxed(f"{value}\\text{{ cm}}^2"), False
    yield value, f"It takes {value} cm^2.", True
    yield 2, f"It takes {value + 2} cm^2.", False


def bases(rng: random.Random) -> Iterator[Case]:
    value, base = rng.randint(20, 4000), rng.choice([2, 3, 5, 7, 8])
    digits, rest = "", value
    while rest:
        digits, rest = str(rest % base) + digits, rest // base
    forms = [
        f"{digits}_{base}",
        f"{digits}_{{{base}}}",
        f"{digits}_{{\\text{{{NAMES[base]}}}}}",
        f"({digits})_{base}",
    ]
    yield forms[0], boxed(rng.choice(forms)), True
    yield rng.choice(forms), boxed(rng.choice(forms)), True
    yield forms[0], boxed(digits), False
    yield digits, boxed(forms[0]), False
    yield forms[0], boxed(value), False
    yield forms[0], boxed(f"{digits}_{{{base + 2}}}"), False
    yield forms[0], boxed(f"1{digits}_{base}"), False


NAMES = {2: "two", 3: "three", 5: "five", 7: "seven", 8: "eight"}


def dates(rng: random.Random) -> Iterator[Case]:
    year, month, day = rng.randint(1900, 2040), rng.randint(1, 9), rng.randint(1, 28)
    name = "January February March April May June July August September".split()[month - 1]
    reference = f"{year}-{month:02d}-{day:02d}"
    yield (
        reference,
        boxed(rng.choice([reference, f"{year}-{month}-{day}", f"\\text{{{name} {day}, {year}}}"])),
        True,
    )
    yield f"{name} {day}, {year}", boxed(f"\\text{{{day} {name} {year}}}"), True
    yield reference, boxed(year - month - day), False
    yield year - month - day, boxed(reference), False
    yield reference, boxed(f"{year + 1}-{month:02d}-{day:02d}"), False
    yield f"{month}/{day}/{year}", boxed(f"{month + 1}/{day}/{year}"), False
    yield f"{day}:{month:02d}", boxed(f"{day}:{month + 1:02d}"), False


NUMBERS: dict[str, Callable[[random.Random], Iterator[Case]]] = {
    "integer": integers,
    "sign": signs,
    "fraction": fractions,
    "mixed number": mixed_numbers,
    "decimal": decimals,
    "scientific": scientific,
    "percent, degree": percent,
    "money, factors": money,
    "unit": units,
    "base": bases,
    "date, time": dates,
}


def make_pairs(count: int, seed: int = 0) -> list[Pair]:
    """``count`` pairs, the kinds in turn."""
    from tests.support.math_pairs_forms import FORMS

    rng = random.Random(seed)
    pairs: list[Pair] = []
    while len(pairs) < count:
        for kind, make in (NUMBERS | FORMS).items():
            pairs.extend(Pair(kind, *case) for case in make(rng))
    return pairs[:count]

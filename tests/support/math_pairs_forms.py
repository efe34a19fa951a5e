"""Kinds of answer pairs that are no numbers: words, several values, algebra, relations, tricks."""

from __future__ import annotations

import random
from typing import Iterator

from tests.support.math_pairs import Case, boxed

WORDS = (
    "east seat no on yes even odd parallel listen silent stop spot north thorn true false monday"
)


def words(rng: random.Random) -> Iterator[Case]:
    word = rng.choice(WORDS.split())
    mixed = "".join(rng.sample(word, len(word)))
    other = rng.choice([w for w in WORDS.split() if w != word])
    yield (
        word,
        boxed(
            rng.choice([word, word.upper(), f"\\text{{{word.title()}}}", f"\\text{{ {word}. }}"])
        ),
        True,
    )
    yield (
        f"\\text{{{word}}}",
        boxed(rng.choice([word, f"\\textbf{{{word}}}", f'``{word}"'[2:]])),
        True,
    )
    if mixed != word:
        yield word, boxed(mixed), False
        yield word, boxed("*".join(word)), False
    yield word, boxed(f"\\text{{{other}}}"), False
    yield word, boxed(f"{word} or {other}"), False
    yield word, boxed(f"\\text{{not {word}}}"), False
    yield f"{word} {other}", boxed(f"{other} {word}"), False


def choices(rng: random.Random) -> Iterator[Case]:
    letter, other = rng.sample("ABCDE", 2)
    reference = rng.choice([letter, f"({letter})", f"\\text{{({letter})}}"])
    forms = [letter, f"({letter})", f"\\text{{{letter}}}", f"\\textbf{{({letter})}}", f"{letter}."]
    forms += [f"\\text{{({letter})}}\\ 12", f"({letter.lower()})", f"({letter}) 3x"]
    yield reference, boxed(rng.choice(forms)), True
    yield reference, boxed(rng.choice([other, f"({other})", f"\\text{{({other})}}"])), False
    yield reference, boxed(f"{letter}{other}"), False
    yield reference, boxed(f"{letter} or {other}"), False
    yield reference, boxed(f"({letter})({other})"), False
    yield reference, boxed(f"\\text{{({letter}), ({other})}}"), False


def points(rng: random.Random) -> Iterator[Case]:
    a, b = rng.sample(range(-20, 60), 2)
    reference = rng.choice([f"({a},{b})", f"({a}, {b})", f"\\left({a}, {b}\\right)"])
    right = [f"({a}, {b})", f"\\left( {a},{b} \\right)", f"(x,y)=({a},{b})", f"({a}.0,{b})"]
    wrong = [
        f"({b},{a})",
        f"\\{{{a},{b}\\}}",
        f"[{a},{b}]",
        f"({a},{b},{b})",
        f"({a})",
        f"({a},{b + 1})",
    ]
    wrong += [f"{a * b}", f"({-b},{a})", f"({a}),({b})", f"({a},{b}),({b},{a})", f"({a},x)"]
    yield reference, boxed(rng.choice(right)), True
    yield reference, boxed(rng.choice(right)), True
    yield reference, boxed(rng.choice(wrong)), False
    yield reference, boxed(rng.choice(wrong)), False
    yield f"({a}, \\frac{{\\pi}}{{3}})", boxed(f"\\left({a},\\dfrac\\pi3\\right)"), True
    yield f"({a}, \\frac{{\\pi}}{{3}})", boxed(f"({a},\\frac{{\\pi}}{{4}})"), False


def collections(rng: random.Random) -> Iterator[Case]:
    values = rng.sample(range(-30, 90), rng.randint(2, 4))
    mixed = rng.sample(values, len(values))

    def comma(items: list[int]) -> str:
        return ", ".join(map(str, items))

    listed, as_set = comma(values), f"\\{{{comma(values)}\\}}"
    yield listed, boxed(comma(mixed)), True
    yield as_set, boxed(f"\\{{{comma(mixed)}\\}}"), True
    yield as_set, boxed(f"\\left\\{{{comma(mixed)}\\right\\}}"), True
    yield listed, boxed(" \\text{ and } ".join(map(str, mixed))), True
    yield listed, boxed(f"x={mixed[0]}") + " or " + boxed(mixed[1]), False
    yield f"{values[0]}, {values[1]}", f"\\boxed{{x={values[1]}}} or \\boxed{{{values[0]}}}", True
    yield f"{values[0]}, {values[1]}", boxed(f"x={values[1]}\\text{{ or }}x={values[0]}"), True
    yield listed, boxed(comma(values[:-1])), False
    yield listed, boxed(comma([*values, 95])), False
    yield as_set, boxed(f"\\{{{comma([*values, values[0]])}\\}}"), False
    yield as_set, boxed(comma([values[0] + 100, *values[1:]])), False
    yield as_set, boxed(f"({comma(values)})"), False
    k = rng.randint(2, 9)
    yield (
        f"{k}, -{k}",
        boxed(rng.choice([f"\\pm {k}", f"x = \\pm {k}", f"\u00b1{k}", f"-{k},{k}"])),
        True,
    )
    yield k, boxed(rng.choice([f"\\pm {k}", f"-{k},{k}", f"{k} \\text{{ or }} -{k}"])), False
    yield f"3 \\pm {k}\\sqrt{{2}}", boxed(f"3+{k}\\sqrt2, 3-{k}\\sqrt{{2}}"), True
    yield f"3 \\pm {k}\\sqrt{{2}}", boxed(f"3+{k}\\sqrt2"), False


def intervals(rng: random.Random) -> Iterator[Case]:
    a = rng.randint(-20, 20)
    b = a + rng.randint(1, 30)
    yield (
        f"[{a},{b})",
        boxed(rng.choice([f"[{a}, {b})", f"{a} \\le x < {b}", f"x \\in [{a},{b})"])),
        True,
    )
    yield (
        f"[{a},{b})",
        boxed(rng.choice([f"({a},{b})", f"[{a},{b}]", f"({a},{b}]", f"[{a},{b + 1})"])),
        False,
    )
    yield (
        f"x > {a}",
        boxed(rng.choice([f"x>{a}", f"{a} < x", f"({a},\\infty)", f"({a}, \\infty)"])),
        True,
    )
    yield (
        f"x > {a}",
        boxed(rng.choice([f"x<{a}", f"x \\ge {a}", f"[{a},\\infty)", f"y > {a}", f"{a}"])),
        False,
    )
    union = f"(-\\infty,{a}) \\cup [{b},\\infty)"
    yield (
        union,
        boxed(
            rng.choice([f"[{b},\\infty) \\cup (-\\infty,{a})", f"x<{a} \\text{{ or }} x\\geq {b}"])
        ),
        True,
    )
    yield (
        union,
        boxed(
            rng.choice(
                ["(-\\infty,\\infty)", f"(-\\infty,{b}) \\cup [{b},\\infty)", f"(-\\infty,{a})"]
            )
        ),
        False,
    )
    yield (
        a + 1,
        boxed(
            rng.choice([f"({a},{b + 2})", f"[{a + 1},{a + 1}]", f"{a} < x < {b + 2}", f"x > {a}"])
        ),
        False,
    )
    yield f"{a} \\le x \\le {b}", boxed(f"{b} \\geq x \\geq {a}"), True


def polynomials(rng: random.Random) -> Iterator[Case]:
    a, b, c = (rng.randint(1, 12) for _ in range(3))
    product = f"(x+{a})({c}x-{b})"
    expanded = f"{c}x^2+{a * c - b}x-{a * b}".replace("+-", "-")
    yield (
        expanded,
        boxed(rng.choice([product, f"({c}x-{b})(x+{a})", f"-{a * b}+{c}x^{{2}}+({a * c - b})x"])),
        True,
    )
    yield product, boxed(expanded), True
    yield expanded, boxed(f"f(x) = {expanded}"), True
    yield f"y={expanded}", boxed(expanded), True
    yield expanded, boxed(f"{c}x^2+{a * c - b + 1}x-{a * b}"), False
    yield expanded, boxed(f"(x-{a})({c}x+{b})") if a * c != b else boxed("x"), False
    yield expanded, boxed(expanded.replace("x", "y")), False
    yield expanded, boxed(f"{c}x+{a}"), False
    yield f"\\frac{{x}}{{x+{a}}}", boxed(f"1-\\frac{{{a}}}{{x+{a}}}"), True
    yield f"\\frac{{x}}{{x+{a}}}", boxed(f"\\frac{{x+{a}}}{{x}}"), False
    yield f"{a}xy+{b}z", boxed(f"{b}z + {a}yx"), True
    yield f"{a}xy+{b}z", boxed(f"{b}y + {a}zx"), a == b and False
    yield f"n^{{{a + 1}}}", boxed(f"n^{{{a}}} \\cdot n"), True
    yield f"x_1+{a}x_2", boxed(f"{a} x_{{2}}+x_{{1}}"), True
    yield f"x_1+{a}x_2", boxed(f"x_2+{a}x_1") if a > 1 else boxed("x_1"), False


def surds(rng: random.Random) -> Iterator[Case]:
    k, n = rng.randint(2, 12), rng.choice([2, 3, 5, 6, 7, 10, 11])
    yield (
        f"{k}\\sqrt{{{n}}}",
        boxed(
            rng.choice(
                [
                    f"\\sqrt{{{k * k * n}}}",
                    f"{k} \\sqrt {n}"[: None if n < 10 else 0] or f"{k}\\cdot\\sqrt{{{n}}}",
                ]
            )
        ),
        True,
    )
    yield f"\\frac{{{k}}}{{\\sqrt{{{n}}}}}", boxed(f"\\frac{{{k}\\sqrt{{{n}}}}}{{{n}}}"), True
    yield f"\\frac{{\\sqrt{{{n}}}}}{{{k}}}", boxed(f"\\frac1{{{k}}}\\sqrt{{{n}}}"), True
    yield f"{k}\\sqrt{{{n}}}", boxed(f"{k}\\sqrt{{{n + 1}}}"), False
    yield f"{k}\\sqrt{{{n}}}", boxed(f"{k + 1}\\sqrt{{{n}}}"), False
    yield f"{k}\\sqrt{{{n}}}", boxed(f"-{k}\\sqrt{{{n}}}"), False
    yield f"{k}\\sqrt{{{n}}}", boxed(f"{k * n**0.5:.2f}"), False
    yield f"{k}\\sqrt{{{n}}}", boxed(f"{k * n**0.5:.8f}"), True
    yield k, f"The length is {k + 1}\\sqrt{{{k}}}.", False
    yield f"{k}\\sqrt{{{n}}}", f"The length is {k}\\sqrt{{{n}}}.", True
    yield (
        f"{k}\\pi",
        boxed(rng.choice([f"{k} \\pi", f"\\pi \\cdot {k}", f"{k}\u03c0", f"{k}*pi"])),
        True,
    )
    yield (
        f"{k}\\pi",
        boxed(rng.choice([f"{k + 1}\\pi", f"{k}", f"\\pi^{{{k}}}", f"{k}\\pi^2", f"{k}p"])),
        False,
    )
    yield f"\\sqrt{{{n}}}+{k}", boxed(f"{k}+\\sqrt{{{n}}}"), True
    yield f"\\sqrt[3]{{{n}}}", boxed(f"{n}^{{1/3}}"), True
    yield f"{k}+{n}i", boxed(f"{n}i+{k}"), True
    yield (
        f"{k}+{n}i",
        boxed(rng.choice([f"{k}-{n}i", f"{n}+{k}i" if n != k else "i", f"{k + n}"])),
        False,
    )


def functions(rng: random.Random) -> Iterator[Case]:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    yield f"\\cos {a}x", boxed(f"1-2\\sin^2\\left(\\frac{{{a}x}}{{2}}\\right)"), True
    yield f"\\cos {a}x", boxed(f"\\sin {a}x"), False
    yield f"\\ln {a}", boxed(f"-\\ln\\frac{{1}}{{{a}}}"), True
    yield f"\\log_{{{a}}} {a + b}", boxed(f"\\frac{{\\ln {a + b}}}{{\\ln {a}}}"), True
    yield f"\\log_{{{a}}} {a + b}", boxed(f"\\log_{{{a + b}}} {a}"), False
    yield f"e^{{{a}x}}", boxed(f"\\exp({a}x)"), True
    yield f"e^{{{a}x}}", boxed(f"e^{{{a + 1}x}}"), False
    yield f"{a}\\sin x + {b}\\cos x", boxed(f"{b}\\cos(x)+{a}\\sin(x)"), True
    yield f"{a}\\sin x + C", boxed(f"{a}\\sin x"), False
    yield "1", boxed("\\sin^2 x+\\cos^2 x"), False
    yield "\\frac{\\sqrt{3}}{2}", boxed("\\sin 60^\\circ"), False
    yield f"|x-{a}|", boxed(f"|{a}-x|"), True
    yield 2**a, boxed(f"2^{{{a}}}"), True
    yield f"2^{{{a}}}", boxed(2**a), True
    yield 2**a, boxed(f"2^{{{a + 1}}}"), False


def matrices(rng: random.Random) -> Iterator[Case]:
    a, b, c, d = rng.sample(range(-9, 30), 4)

    def matrix(kind: str, *rows: tuple[int, ...]) -> str:
        body = " \\\\ ".join(" & ".join(map(str, row)) for row in rows)
        return f"\\begin{{{kind}}} {body} \\end{{{kind}}}"

    reference = matrix("pmatrix", (a, b), (c, d))
    yield reference, boxed(matrix(rng.choice(["pmatrix", "bmatrix"]), (a, b), (c, d))), True
    yield reference, boxed(matrix("pmatrix", (a, c), (b, d))), False
    yield reference, boxed(matrix("pmatrix", (a, b, c, d))), False
    yield reference, boxed(matrix("pmatrix", (a, b), (c, d + 1))), False
    yield matrix("pmatrix", (a,), (b,)), boxed(matrix("bmatrix", (a,), (b,))), True
    yield matrix("pmatrix", (a,), (b,)), boxed(matrix("bmatrix", (b,), (a,))), False


def equations(rng: random.Random) -> Iterator[Case]:
    a, b = rng.sample(range(2, 40), 2)
    yield a, boxed(f"x={a}"), True
    yield f"x={a}", boxed(rng.choice([a, f"x = {a}"])), True
    yield f"x={a}", boxed(rng.choice([f"y={a}", f"x={b}", f"x-{a}=0", f"{b}={a}"])), False
    yield (
        a,
        boxed(
            rng.choice([f"{b}={a}", f"{a}={b}", f"1=2={a}", f"{a} \\approx {a + b}", f"x={b}={a}"])
        ),
        False,
    )
    yield (
        a,
        boxed(
            rng.choice([f"{a} \\neq {b}", f"{a} < {a + b}", f"x \\ne {a}", f"{a + b} \\approx {a}"])
        ),
        False,
    )
    line = f"y={a}x+{b}"
    yield (
        line,
        boxed(rng.choice([line, f"{a}x-y+{b}=0", f"{a}x+{b}", f"y={b}+{a}x", f"y-{b}={a}x"])),
        True,
    )
    yield (
        line,
        boxed(rng.choice([f"y={b}x+{a}", f"x={a}y+{b}", "0=0", "y=y", f"{a}x+y+{b}=0", f"{a}x"])),
        False,
    )
    yield (
        f"x^2+y^2={a}",
        boxed(rng.choice([f"y^2+x^2={a}", f"x^2+y^2-{a}=0", f"2x^2+2y^2={2 * a}"])),
        True,
    )
    yield (
        f"x^2+y^2={a}",
        boxed(rng.choice([f"x^2+y^2={b}", f"x^2-y^2={a}", f"{a}", "x^2+y^2"])),
        False,
    )
    yield f"{a}:{b}", boxed(f"{a} : {b}"), True
    yield f"{a}:{b}", boxed(f"{b}:{a}"), False


def claims(rng: random.Random) -> Iterator[Case]:
    """One value is asked for, and the answer keeps several open."""
    a = rng.randint(2, 90)
    b = a + rng.randint(1, 9)
    several = [
        f"{a}, {b}",
        f"{b},{a}",
        f"{a} \\text{{ or }} {b}",
        f"{b} or {a}",
        f"{a}, {a}",
        f"{a};{b}",
    ]
    several += [
        f"{a}-{b}",
        f"{a}\u2013{b}",
        f"{a}\\sim {b}",
        f"\\{{{a}\\}}",
        f"\\{{{a},{b}\\}}",
        f"{a}/{b}",
    ]
    several += [
        f"{a} \\text{{ (or }} {b})",
        f"{a}\\ {b}",
        f"{a}\\\\{b}",
        f"{a} \\quad {b}",
        f"[{a},{b}]",
    ]
    several += [
        f"x={a}, x={b}",
        f"x={a} \\text{{ or }} x={b}",
        f"{a}, \\ldots, {b}",
        f"1,2,\\ldots,{a}",
    ]
    several += [
        f"{a} \\text{{ and }} {b}",
        f"{a}|{b}",
        f"{a} \\vee {b}",
        f"{a} \\cup {b}",
        f"{a} & {b}",
    ]
    yield a, boxed(rng.choice(several)), False
    yield a, boxed(rng.choice(several)), False
    yield a, f"The answer is {b} or {a}.", False
    yield a, f"It is between {b}-{a}", False
    yield a, f"\\boxed{{{b}}} or \\boxed{{{a}}}", False
    yield a, f"\\boxed{{{b}}}, \\boxed{{{a}}}", False
    yield a, f"First I thought \\boxed{{{b}}}. But no: it is \\boxed{{{a}}}.", True
    yield a, f"First I thought \\boxed{{{a}}}. But no: it is \\boxed{{{b}}}.", False
    yield a, f"\\boxed{{{b} \\boxed{{{a}}}}}", False


# fmt: off
#: Answers to everything.
GUESSES = [
    "", "x", "?", "\\infty", "\\text{any number}", "\\mathbb{R}", "\\emptyset", "\\{\\}", "()",
    "\\square", "\\text{answer}", "n", "k", "\\frac{0}{0}", "x=x", "\\star", "0/0", "\\text{True}",
    "10" + "^{10" * 20 + "}" * 20,
]


def formulas(a: int, b: int) -> list[str]:
    """Formulas around an answer a."""
    return [
        f"{a}x^0", f"{a}+0x", f"{a}^{{x}}", f"x+{a}-x", f"{a}+C", f"{a}x", f"f({a})",
        f"{a}^{{1}}0", f"9^{{9^{{9^{{{a}}}}}}}", "{" * 100 + str(a), f"{a}" * 60,
        f"{a}\\times 1{b}", f"{a + b}-{b}", f"{a * b}\\div {b}", f"{a}0\\%", f"{a}{{}}{b}",
        f"\\sum_{{i=1}}^{{{a}}} 1", f"|{a}|", f"\\max({a},1)", f"{a} \\bmod {a + 1}", f"[{a}]",
        f"{a}\\pm 1", f"{a}\\pm 0.5", f"\\approx {a + 1}", f"{b} \\approx {a}", f"{a}...", f"{a}*",
        f"\\overline{{{a}}}", f"\u0455{a}",
    ]


def phrases(a: int, b: int) -> list[str]:
    """Words around an answer a."""
    return [
        f"0 \\cdot x + {a}", f"x^0 \\cdot {a}", f"{a}\\text{{ or }}{b}",
        f"x \\text{{ where }} x={a}", f"\\text{{{a} or {b}}}", f"\\text{{{a}}}\\text{{{b}}}",
        f"{a}\\text{{ is wrong}}", f"\\text{{not }}{a}", f"\\lfloor {a}.5 \\rfloor",
        f"{a}\\text{{ squared}}", f"minus {a}", f"{a}\\dot{{3}}",
    ]
# fmt: on


def tricks(rng: random.Random) -> Iterator[Case]:
    """What a policy may try that has solved nothing."""
    a, b = rng.sample(range(2, 90), 2)
    attempts = [*GUESSES, *formulas(a, b), *phrases(a, b)]
    yield a, boxed(rng.choice(attempts)), False
    yield a, boxed(rng.choice(attempts)), False
    yield (
        f"{a}x+{b}",
        boxed(
            rng.choice([f"{a}", f"{b}", f"{a}x", "x", "y", f"{a}y+{b}", "f(x)", f"{a}\u0445+{b}"])
        ),
        False,
    )
    yield a * b, boxed(f"{a} \\times {b}"), False
    yield a + b, boxed(f"{a} + {b}"), False
    yield f"{a}{b}", boxed(f"{a}, {b}"), False
    yield f"{a}, {b}", boxed(f"{a}{b}"), False


FORMS = {
    "word": words,
    "choice": choices,
    "point": points,
    "set, list": collections,
    "interval": intervals,
    "polynomial": polynomials,
    "surd, pi, i": surds,
    "function": functions,
    "matrix": matrices,
    "equation, ratio": equations,
    "several values": claims,
    "trick": tricks,
}

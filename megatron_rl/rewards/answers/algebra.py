r"""Algebra: the tree of an expression.

A tree is a tuple that begins with an operation's name; it can be written as JSON::

    ("num", "3/2")  ("sym", "x_1")  ("const", "pi" | "e" | "i" | "inf")
    ("add", a, b)  ("mul", a, b)  ("div", a, b)  ("pow", a, b)  ("neg", a)
    ("root", a, n)  ("fact", a)  ("binom", a, b)  ("log", base, a)  ("fn", name, a)

Up to three adjacent letters are a product; a longer run is one name, and nothing in \text{...} is
algebra.
"""

from __future__ import annotations

from typing import Any, Iterator, Sequence, TypeAlias

from megatron_rl.rewards.answers.tokens import Token, Unreadable, number_value

MAX_DEPTH = 24

#: A tuple: a kind, then texts or trees, depending on the kind.
Tree: TypeAlias = "tuple[Any, ...]"


FUNCTIONS = {
    **{name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")},
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan")},
    **{f"a{name}": f"a{name}" for name in ("sin", "cos", "tan")},
    "exp": "exp",
    "ln": "ln",
    "log": "ln",
    "lg": "lg",
    "sgn": "sign",
}
_INVERSE = {"sin": "asin", "cos": "acos", "tan": "atan"}
GREEK = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar".split()
)
_BRACKETS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
_ONE, _TWO = ("num", "1"), ("num", "2")


def parse_expression(tokens: Sequence[Token]) -> Tree:
    """The tree of an expression; ``Unreadable`` if not all tokens form one expression."""
    parser = _Parser(list(tokens))
    tree = parser.sum(0)
    if (rest := parser.here()) is not None:
        raise Unreadable(f"found {rest.text!a}")
    return tree


class _Parser:
    """Recursive descent; recursion is bounded by ``MAX_DEPTH``."""

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._next = 0

    def here(self, ahead: int = 0) -> Token | None:
        index = self._next + ahead
        return self._tokens[index] if index < len(self._tokens) else None

    def _is(self, *texts: str, ahead: int = 0) -> bool:
        token = self.here(ahead)
        return token is not None and token.kind != "text" and token.text in texts

    def _take(self, *texts: str) -> str | None:
        if self._is(*texts):
            self._next += 1
            return self._tokens[self._next - 1].text
        return None

    def _expect(self, text: str) -> None:
        if self._take(text) is None:
            raise Unreadable(f"no {text!a}")

    def sum(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise Unreadable("too deep")
        sign = self._take("+", "-")
        tree = self._product(depth)
        if sign == "-":
            tree = ("neg", tree)
        while (sign := self._take("+", "-")) is not None:
            other = self._product(depth)
            tree = ("add", tree, other if sign == "+" else ("neg", other))
        return tree

    def _product(self, depth: int) -> Tree:
        tree = self._factor(depth)
        while True:
            symbol = self._take("*", "/", "div")
            if symbol is not None:
                negative = self._take("-") is not None
                other = self._factor(depth)
                other = ("neg", other) if negative else other
                if symbol == "div":  # a division to compute; a result may have a fraction bar
                    tree = ("mul", tree, ("div", _ONE, other))
                else:
                    tree = ("mul" if symbol == "*" else "div", tree, other)
            elif self._starts_factor():
                tree = self._side_by_side(tree, depth)
            else:
                return tree

    def _side_by_side(self, tree: Tree, depth: int) -> Tree:
        before, number = self._tokens[self._next - 1], self.here()
        assert number is not None, "it starts a factor"
        if number.kind == "number":
            if before.kind == "number" and self._mixed(before, number):
                self._next += 3  # 1 1/2
                return ("mixed", tree, _quotient(number.text, self._tokens[self._next - 1].text))
            if before.text != "!":
                raise Unreadable("a number behind another factor")
        is_fraction = self._is("frac")
        other = self._factor(depth)
        if is_fraction and before.kind == "number" and tree[0] == "num":
            if before.text.isdigit() and other[0] == "div" and other[1][0] == other[2][0] == "num":
                return ("mixed", tree, other)
            raise Unreadable("a fraction behind a number")
        return ("mul", tree, other)

    def _mixed(self, whole: Token, numerator: Token) -> bool:
        below = self.here(2)
        return (
            numerator.spaced
            and self._is("/", ahead=1)
            and below is not None
            and below.kind == "number"
            and all(token.text.isdigit() for token in (whole, numerator, below))
        )

    def _starts_factor(self) -> bool:
        token = self.here()
        if token is None or token.kind == "text":
            return False
        if token.kind == "mark":
            return token.text in ("(", "[", "{")
        if token.kind == "command":
            return token.text in _STARTS
        return True

    def _factor(self, depth: int) -> Tree:
        tree = self._base(depth)
        last = ""
        while True:
            token = self.here()
            text = token.text if token is not None else ""
            if self._is("!", "^", "**") and text == last:
                raise Unreadable("2^3^4 and 5!! have several readings")
            last = text
            if self._take("!") is not None:
                tree = ("fact", tree)
            elif self._take("^", "**") is not None:
                if self._take("circ") is not None or self._circle():
                    tree = ("mul", tree, ("div", ("const", "pi"), ("num", "180")))
                else:
                    tree = ("pow", tree, self._exponent(depth))
            elif self._take("%") is not None or self._take("\\%") is not None:
                tree = ("div", tree, ("num", "100"))
            else:
                return tree

    def _circle(self) -> bool:
        if self._is("{") and self._is("circ", ahead=1) and self._is("}", ahead=2):
            self._next += 3
            return True
        return False

    def _exponent(self, depth: int) -> Tree:
        if self._take("-") is not None:
            return ("neg", self._base(depth + 1))
        self._take("+")
        return self._base(depth + 1)

    def _base(self, depth: int) -> Tree:
        if depth > MAX_DEPTH:
            raise Unreadable("too deep")
        token = self.here()
        if token is None or token.kind == "text":
            raise Unreadable("no operand")
        self._next += 1
        if token.kind == "number":
            return ("num", str(number_value(token.text)))
        if token.kind == "word":
            return self._word(token, depth)
        if token.kind == "command":
            return self._command(token.text, depth)
        if token.text in _BRACKETS and token.text != "\\{":
            tree = self.sum(depth + 1)
            self._expect(_BRACKETS[token.text])
            return tree
        if token.text in ("|", "\\|"):
            tree = self.sum(depth + 1)
            self._expect(token.text)
            return ("fn", "abs", tree)
        raise Unreadable(f"found {token.text!a}")

    def _word(self, token: Token, depth: int) -> Tree:
        word = token.text
        if word in FUNCTIONS or word in ("sqrt", "pi", "cbrt"):
            return self._command(word, depth)
        if len(word) > 3:
            return self._symbol(word)
        if len(word) > 1:  # a product of letters, whose last may have an exponent
            self._next -= 1
            rest = Token("word", word[1:], False)
            self._tokens[self._next : self._next + 1] = [Token("word", word[0], token.spaced), rest]
            self._next += 1
            return self._symbol(word[0])
        return self._symbol(word)

    def _symbol(self, name: str) -> Tree:
        if self._take("_") is not None:
            name += "_" + self._raw_argument()
        while self._take("'") is not None:
            name += "'"
        return ("const", name) if name in ("e", "i") else ("sym", name)

    def _raw_argument(self) -> str:
        token = self.here()
        if token is None:
            raise Unreadable("no index")
        self._next += 1
        if token.text != "{":
            return token.text
        texts: list[str] = []
        while self._take("}") is None:
            token = self.here()
            if token is None or len(texts) > 8:
                raise Unreadable("no index")
            texts.append(token.text)
            self._next += 1
        return "".join(texts)

    def _argument(self, depth: int) -> Tree:
        """The argument of a LaTeX command: a group, or one character."""
        token = self.here()
        if token is not None and token.kind in ("number", "word") and len(token.text) > 1:
            first, rest = token.text[0], token.text[1:]
            if token.kind == "number" and not (first + rest).isdigit():
                raise Unreadable("a decimal without braces")
            self._tokens[self._next : self._next + 1] = [
                Token(token.kind, first, token.spaced),
                Token(token.kind, rest, False),
            ]
        return self._base(depth + 1)

    def _command(self, name: str, depth: int) -> Tree:
        if name == "frac":
            above = self._argument(depth)
            return ("div", above, self._argument(depth))
        if name == "binom":
            above = self._argument(depth)
            return ("binom", above, self._argument(depth))
        if name in ("sqrt", "cbrt"):
            index = _TWO if name == "sqrt" else ("num", "3")
            if self._take("[") is not None:
                index = self.sum(depth + 1)
                self._expect("]")
            token = self.here()
            whole = token is not None and token.kind == "number"
            return ("root", self._base(depth + 1) if whole else self._argument(depth), index)
        if name == "pi":
            return ("const", "pi")
        if name == "infty":
            return ("const", "inf")
        if name in FUNCTIONS:
            return self._function(FUNCTIONS[name], depth)
        if name in ("vert", "lfloor", "lceil"):
            close = {"vert": "vert", "lfloor": "rfloor", "lceil": "rceil"}[name]
            tree = self.sum(depth + 1)
            self._expect(close)
            return ("fn", {"vert": "abs", "lfloor": "floor", "lceil": "ceil"}[name], tree)
        if name in GREEK:
            return self._symbol(name)
        raise Unreadable(f"command {name}")

    def _function(self, name: str, depth: int) -> Tree:
        base = None
        power = None
        for _ in range(2):
            if self._take("_") is not None:
                base = self._base(depth + 1)
            if self._take("^") is not None:
                power = self._exponent(depth)
        tree = self._function_argument(depth)
        if power in (("neg", _ONE), ("num", "-1")):
            if name not in _INVERSE:
                raise Unreadable("inverse of a function")
            name, power = _INVERSE[name], None
        if base is not None:
            if name != "ln":
                raise Unreadable("index of a function")
            result: Tree = ("log", base, tree)
        elif name == "lg":
            result = ("log", ("num", "10"), tree)
        elif name == "exp":
            result = ("pow", ("const", "e"), tree)
        else:
            result = ("fn", name, tree)
        return result if power is None else ("pow", result, power)

    def _function_argument(self, depth: int) -> Tree:
        if self._is("(", "[", "{"):
            return self._factor_without_power(depth)
        if depth > MAX_DEPTH:
            raise Unreadable("too deep")
        tree = self._factor(depth + 1)
        while self._starts_factor() and not self._is("(", "[", *FUNCTIONS):
            tree = self._side_by_side(tree, depth + 1)
        return tree

    def _factor_without_power(self, depth: int) -> Tree:
        return self._base(depth + 1)


_STARTS = frozenset(["frac", "binom", "sqrt", "pi", "infty", "lfloor", "lceil", *FUNCTIONS, *GREEK])


def _quotient(above: str, below: str) -> Tree:
    return ("div", ("num", above), ("num", below))


def product_of_letters(letters: str) -> Tree:
    """x times y of "xy"."""
    tree: Tree = ("sym", letters[0])
    for letter in letters[1:]:
        tree = ("mul", tree, ("sym", letter))
    return tree


def walk(tree: Tree) -> Iterator[Tree]:
    """Every node of a tree, itself first."""
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        pending.extend(child for child in node[1:] if isinstance(child, tuple))


def symbols(tree: Tree) -> frozenset[str]:
    """The names of its variables."""
    return frozenset(node[1] for node in walk(tree) if node[0] == "sym")

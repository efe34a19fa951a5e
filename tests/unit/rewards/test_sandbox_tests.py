"""The forms of tests: whatever looks like a test runs, with helpers that are no program's."""

import pytest

from megatron_rl.rewards import VERIFIERS

WRONG = "def f(x):\n    return 0\n"
RIGHT = "def f(x):\n    'adds'\n    return x + 1\n"
UNIT = "import unittest\nclass T(unittest.TestCase):\n "
WRAPPERS = """
import functools
def deco(g):
    @functools.wraps(g)
    def w(*a, **k): return g(*a, **k)
    return w
def bare(g):
    def w(*a, **k): return g(*a, **k)
    return w
"""
# What a test can be, each behind a call, so that something of the program has been called.
FORMS = {
    "coroutine": "async def test_a(): assert f(1) == 2",
    "generator": "def test_a():\n yield\n assert f(1) == 2",
    "check, coroutine": "async def check(c): assert c(1) == 2",
    "wrapped": WRAPPERS + "@deco\ndef test_a(): assert f(1) == 2",
    "wrapped, unknown": WRAPPERS + "@bare\ndef test_a(): assert f(1) == 2",
    "wrapped coroutine": WRAPPERS + "@deco\nasync def test_a(): assert f(1) == 2",
    "default": "def test_a(n=1): assert f(n) == n + 1",
    "class": "class TestF:\n def test_a(self): assert f(1) == 2",
    "class, inherited": "class B:\n def test_a(self): assert f(1) == 2\nclass TestF(B): pass",
    "class, method of it": "class TestF:\n @classmethod\n def test_a(c): assert f(1) == 2",
    "class, function": "class TestF:\n @staticmethod\n def test_a(): assert f(1) == 2",
    "unittest, unknown": WRAPPERS + UNIT + "@bare\n async def test_a(self): assert f(1) == 2",
    "unittest, coroutine": UNIT + "async def test_a(self): assert f(1) == 2",
    "unittest, generator": UNIT + "def test_a(self):\n  yield\n  assert f(1) == 2",
    "unittest, wrapped": WRAPPERS + UNIT + "@deco\n async def test_a(self): assert f(1) == 2",
}


RUN = {form for form in FORMS if "async" not in FORMS[form] and "yield" not in FORMS[form]}


def value(tests, program, prompt="", entry_point="f"):
    record = {"prompt": prompt, "tests": tests, "entry_point": entry_point}
    return VERIFIERS["code"](record, program).value


@pytest.mark.parametrize("tests", FORMS.values(), ids=FORMS)
def test_no_test_is_passed_over(tests):
    assert value("f(1)\n" + tests, WRONG) == 0.0


@pytest.mark.parametrize("tests", sorted(RUN))
def test_right_programs_pass_what_runs(tests):
    assert value(FORMS[tests], RIGHT) == 1.0


def test_what_tests_call_is_no_test():
    tests = (
        WRAPPERS
        + """
@deco
def test_case(x, y): assert f(x) == y
def test_many(*cases):
    for x, y in cases: test_case(x, y)
test_alias = lambda *a: f(*a)
class TestF:
    @classmethod
    def setup_class(cls): cls.k = 1
    def setup_method(self, method): self.n = method.__name__ and 5
    def test_a(self): test_many((1, 2), (self.n, self.n + self.k))
    def test_with(self, x): assert f(x) == 0
class TestG:
    def __init__(self, n): self.n = n
    def test_a(self): assert f(self.n) == self.n + 1
TestG(3).test_a()
import unittest
class TestMixin:
    def test_m(self): self.assertEqual(f(1), 2)
class T(TestMixin, unittest.TestCase): pass
"""
    )
    assert value(tests, RIGHT) == 1.0


HELPER = "def ok(x): return x == 4\n"
FORGED = "def ok(x): return True\n" + WRONG


@pytest.mark.parametrize(
    "prompt",
    [
        HELPER,
        f"import not_there\n{HELPER}",
        f"@not_there\n{HELPER}",  # it cannot be made, and is not the program's either
        f"Given\n```python\n{HELPER}```\nwrite f.",
        "So\n```python\nassert f(2) == 4\nwhile True: pass\n```\n"
        f"with\n```py\n{HELPER}def f(x):\n    # here\n```\n",
        [{"role": "user", "content": f"Given\n```python\n{HELPER}```\nwrite f."}],
    ],
)
def test_a_helper_of_the_prompt_is_not_the_programs(prompt):
    assert value("assert ok(f(2))", FORGED, prompt) == 0.0
    if "@" not in prompt:
        assert value("assert ok(f(2))", "def f(x): return 4", prompt) == 1.0


def test_what_the_model_has_said_before_is_no_helper():
    message = {"role": "assistant", "content": "```python\ndef ok(x): return True\n```"}
    assert value("assert ok(f(2))", WRONG, [message]) == 0.0
    assert value("assert ok(f(2))", WRONG, [dict(message, role="user")]) == 1.0


def test_what_tests_define_where_it_is_missing_is_not_the_programs():
    tests = "try: ok\nexcept NameError:\n def ok(x): return x == 4\nassert ok(f(2))"
    assert value(tests, FORGED) == 0.0
    assert value(tests, "def f(x): return 4") == 1.0
    runner = "class T:\n def test_a(self): assert f(1) == 2\nT().test_a()\n"
    runner += "for name in list(globals()):\n if name.startswith('test_'): globals()[name]()"
    assert value(runner, RIGHT) == 1.0  # the name of a method is no name of the program's


def test_a_module_that_tests_do_not_import_is_not_the_programs():
    forged = "class math:\n    isclose = lambda *a: True\n" + WRONG
    assert value("assert math.isclose(f(1), 2)", forged) == 0.0
    assert value("assert math.isclose(f(1), 2)", RIGHT) == 1.0
    forged = "class unittest: TestCase = object\n" + WRONG
    assert value("class T(unittest.TestCase):\n def test(s): s.assertEqual(f(1), 2)", forged) == 0.0
    two = RIGHT + "def calendar(x): return x"
    assert value("assert f(1) == 2 and calendar(3) == 3", two) == 1.0
    queue = "class queue:\n def put(s, x): s.x = x\n def get(s): return s.x\n"
    assert value("q = queue()\nq.put(1)\nassert q.get() == 1", queue, "", "queue") == 1.0


def test_a_function_may_be_called_check():
    assert value("assert check('ab') == 2", "def check(x): return len(x)", "", "check") == 1.0
    assert value("assert check('ab') == 2", "def check(x): return 1", "", "check") == 0.0


def test_attributes_are_the_programs_own():
    assert value("assert f.__doc__ and f(1) == 1", "def f(x): return x") == 0.0
    assert value("assert f.__doc__ == 'adds' and f.__name__ == 'f' and f(1) == 2", RIGHT) == 1.0
    program = "class A: pass\ndef f(x):\n a = A()\n a._place = x\n return a"
    assert value("assert f(5)._place == 5", program) == 1.0


def test_a_copy_of_an_object_does_not_hide_that_the_program_has_ended():
    program = "import os\nclass A:\n def pop(s): os._exit(0)\ndef f(): return A()"
    for copied in ("copy.copy(f())", "copy.deepcopy([f()])[0]", "pickle.loads(pickle.dumps(f()))"):
        tests = f"import copy, pickle\ns = {copied}\ntry: s.pop()\nexcept BaseException: pass"
        assert value(tests, program) == 0.0


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Complete\n```python\nfrom math import sqrt\ndef f(x):\n    # here\n```\n", "sqrt(x)"),
        ("Write this function:\ndef f(x):\n    '''The root.'''\nand no more.", "x // 2"),
        ("import functools\n@functools.cache\ndef f(x):\n    '''as in ```f(4)```'''\n", "x // 2"),
    ],
)
def test_the_beginning_of_a_function_in_the_prompt(prompt, completion):
    assert (
        value("assert f(4) == 2", f"```python\ndef f(x): return {completion}\n```", prompt) == 1.0
    )


POINT = "class P:\n def __init__(s, x): s.x = x\ndef f(x): return P(x)\n"
LISTED = """
class S:
    def __init__(s): s.x = [1, 2, 3]
    def __len__(s): return len(s.x)
    def __getitem__(s, i): return s.x[i]
    def __setitem__(s, i, v): s.x[i] = v
    def __delitem__(s, i): del s.x[i]
    def __str__(s): return f"S{s.x}"
def f(): return S()
"""


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (POINT, "p = f(1)\np.x = [5]\nassert p.x == [5]\ndel p.x\nassert not hasattr(p, 'x')"),
        ("def f(x): f.calls += 1", "f.calls = 0\nf(1)\nf(1)\nassert f.calls == 2"),
        (LISTED, "s = f()\ns[0] = 5\nassert s[0] == 5 and len(s) == 3 and str(s) == 'S[5, 2, 3]'"),
        (LISTED, "s = f()\ndel s[0]\nassert 2 in s and list(s) == [2, 3] == [*reversed(s)][::-1]"),
        ("def f(): yield 1", "assert list(f()) == [1]"),
        ("def f(x): return x + 1", "try: f(object())\nexcept TypeError: ok = 1\nassert ok"),
    ],
)
def test_what_python_does_to_objects(program, tests):
    assert value(tests, program) == 1.0


@pytest.mark.parametrize(
    ("error", "statement"),
    [
        ("AttributeError", "p.x = 5"),
        ("AttributeError", "del p.x"),
        ("TypeError", "p[0] = 5"),
        ("TypeError", "len(p)"),
        ("TypeError", "p < p"),
        ("TypeError", "hash(p)"),
        ("TypeError", "f(object())"),
        ("TypeError", "f(Foo())"),
        ("ValueError", "f(deep)"),
        ("ValueError", "f('x' * 17 * 2**20)"),
    ],
)
def test_an_error_that_the_judge_raises_is_none_that_a_test_expects(error, statement):
    tests = "deep = []\nfor _ in range(200): deep = [deep]\nclass Foo: pass\n"
    tests += f"p = f(1)\ntry: {statement}\nexcept {error}: ok = 1\nassert ok"
    program = POINT + "P.__setitem__ = P.__lt__ = lambda *a: True\nP.__len__ = lambda s: 1"
    assert value(tests, program) == 0.0


@pytest.mark.parametrize("text", ["os._exit(0)", "1 / 0", "'all tests passed'"])
def test_the_text_of_an_object_in_a_message_changes_no_verdict(text):
    program = f"import os\nclass A:\n def __str__(s): return {text}\ndef f(x): return A()"
    record = {"tests": "assert 0 == 1, f(1)", "entry_point": "f"}
    reward = VERIFIERS["code"](record, program)
    assert reward.value == 0.0 and reward.reason.startswith("AssertionError")

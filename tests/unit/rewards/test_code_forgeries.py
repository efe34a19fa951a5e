"""Programs that are not right and want a reward, and right ones under every form of tests."""

import ctypes
import os
from pathlib import Path

import pytest

from megatron_rl.rewards import VERIFIERS, check_sandbox, sandbox
from megatron_rl.rewards.confinement import held_text, landlock_version
from megatron_rl.rewards.sandbox import Job, Limits, check_confinement, run_program
from tools.fuzz.kinds.programs import TAKEN_OVER

LIMITS = Limits(cpu_s=1, wall_s=2.0, memory_mib=256)
TESTS = """
METADATA = {"secret": 8128}
def check(candidate):
    assert candidate([1, 2, 3]) == [6, 8128], "wrong"
    assert candidate([4]) != [6, 8128]
    assert candidate([]) in ([0], [0, 0])
"""
EQUAL = "class E{0}:\n def __eq__(s, o): return True\n def __ne__(s, o): return True\n"
EQUAL += " def __hash__(s): return 0\n def __contains__(s, o): return True\n"

FORGERIES = {
    "builtins.exec": "import builtins\nbuiltins.exec = lambda *a: None\nf = 0",
    "builtins.compile": "import builtins\nbuiltins.compile = lambda *a, **k: 0\nf = 0",
    "builtins.__import__": "import builtins\nbuiltins.__import__ = lambda *a: None\ndef f(x): 0",
    "builtins.AssertionError": "import builtins\nbuiltins.AssertionError = KeyError\ndef f(x): 0",
    "check defined": "def check(c): pass\ndef f(x): return 0",
    "candidate defined": "candidate = lambda x: [6, 8128]\ndef f(x): return 0",
    "always equal": EQUAL.format("") + "def f(x): return E()",
    "always equal list": EQUAL.format("(list)") + "def f(x): return E()",
    "always equal int": EQUAL.format("(int)") + "def f(x): return E()",
    "always equal text": EQUAL.format("(str)") + "def f(x): return E()",
    "always equal entries": EQUAL.format("") + "def f(x): return [E(), E()]",
    "equal type": "class M(type):\n def __eq__(s, o): return True\n __hash__ = type.__hash__\n"
    "class f(metaclass=M):\n def __init__(s, x): pass",
    "trace": "import sys\nsys.settrace(lambda *a: sys.exit(0))\ndef f(x): return 0",
    "profile": "import sys\nsys.setprofile(lambda *a: None)\ndef f(x): return [6, 8128][:len(x)]",
    "constants of frames": "import sys\ndef f(x):\n frame = sys._getframe()\n"
    " while frame:\n  for c in frame.f_code.co_consts:\n   if c == 8128: return [6, c]\n"
    "  frame = frame.f_back\n return [0]",
    "objects of gc": "import gc\ndef f(x):\n for o in gc.get_objects():\n"
    "  if type(o) is dict and 'secret' in o: return [6, o['secret']] if x else [0]\n return [0]",
    "modules": "import sys\ndef f(x):\n t = sys.modules['tests']\n"
    " return [6, t.METADATA['secret']] if len(x) == 3 else [0]",
    "main module": "import __main__\n__main__.sandbox_judge._judge = lambda *a: 'passed'\nf = 0",
    "judge module": "from megatron_rl.rewards import sandbox_judge as j\n"
    "j.run_tests = j.run_cases = lambda *a: None\nj._judge = lambda *a: 'passed'\nf = 0",
    "json module": "import json\njson.loads = lambda *a: {}\ndef f(x): return 0",
    "unittest module": "import unittest\nunittest.TestResult.wasSuccessful = lambda s: True\nf=0",
    "os._exit": "import os\nos._exit(0)",
    "os._exit in the call": "import os\ndef f(x): os._exit(0)",
    "SystemExit": "def f(x): raise SystemExit(0)",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "StopIteration": "def f(x): raise StopIteration",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "signal": "import signal as s\ns.signal(s.SIGXCPU, s.SIG_IGN)\ndef f(x):\n while 1: 0",
    "verdict to all": "import os\nfor d in range(64):\n"
    " for w in (b'passed\\n', b'ready 1\\npassed\\n'):\n"
    "  try: os.write(d, w)\n  except OSError: 0\ndef f(x): return 0",
    "close all": "import os\nos.closerange(0, 64)\ndef f(x): return 0",
    "job of the judge": "import os\ndef f(x):\n s = open(f'/proc/{os.getppid()}/fd/0').read()\n"
    " return [6, 8128] if '8128' in s and len(x) == 3 else [0]",
    "memory of the judge": "import os\ndef f(x):\n s = open(f'/proc/{os.getppid()}/mem', 'rb')\n"
    " return [6, 8128]",
    "own stdin": "import os\ndef f(x):\n os.lseek(0, 0, 0)\n"
    " return [6, 8128] if b'8128' in os.read(0, 9999) and len(x) == 3 else [0]",
    "NaN": "def f(x): return float('nan')",
    "own iterator": "def f(x): yield from [6, 8128]",
    "generator without end": "import itertools\ndef f(x): return itertools.repeat(6)",
    "deep": "def f(x):\n y = []\n for _ in range(100000): y = [y]\n return y",
    "cycle": "def f(x):\n y = []\n y.append(y)\n return y",
    "1 GB of text": "def f(x): return 'x' * 2**27",
    "10 million digits": "def f(x): return 1 << 33_000_000",
    "lone surrogate": "def f(x): raise ValueError('\\ud800\\x1b[2J<script>\\n' * 9999)",
    "pipe: number for all": TAKEN_OVER + "speak(lambda v, r: ['value', True, None])",
    "pipe: type": TAKEN_OVER + "speak(lambda v, r: ['value', {'builtin': 'list'}, None])",
    "pipe: object": TAKEN_OVER + "speak(lambda v, r: ['value', {'object': 0}, None])",
    "pipe: nothing": TAKEN_OVER + "speak(lambda v, r: ['value'])",
    "pipe: error": TAKEN_OVER + "speak(lambda v, r: ['error', 'Killed', ['Exception'], 'passed'])",
    "pipe: no error": TAKEN_OVER + "speak(lambda v, r: ['error', 3, {}, []])",
    "pipe: SkipTest": TAKEN_OVER
    + "speak(lambda v, r: ['error', 'SkipTest', ['Exception'], 'skip'])",
    "pipe: callback": TAKEN_OVER + "speak(lambda v, r: ['callback', 0, [], {'dict': []}])",
    "pipe: passed": TAKEN_OVER + "speak(lambda v, r: ['passed'])",
    "pipe: ahead": TAKEN_OVER + "wire.send(a, ['0' * 16, 'value', [6, 8128], None])",
    "pipe: many": TAKEN_OVER + "raw(lambda n: frame(b'[\"'+n+b'\",\"value\",[6],null]') * 1000)",
    "pipe: no JSON": TAKEN_OVER + "raw(lambda n: frame(b'passed\\n'))",
    "pipe: long": TAKEN_OVER + "raw(lambda n: b'\\xff' * 4)",
    "pipe: brackets": TAKEN_OVER + "raw(lambda n: frame(b'[' * 10**6))",
    "pipe: digits": TAKEN_OVER
    + "raw(lambda n: frame(b'[\"'+n+b'\",\"value\",'+b'9'*10**6+b',null]'))",
    "pipe: unhashable": TAKEN_OVER + "speak(lambda v, r: ['value', {'set': [[]]}, None])",
    "pipe: list of a text": TAKEN_OVER + "speak(lambda v, r: ['value', {'tuple': 'ab'}, None])",
    "pipe: two keys": TAKEN_OVER + "speak(lambda v, r: ['value', {'tuple': [], 'set': []}, None])",
    "pipe: unknown type": TAKEN_OVER + "speak(lambda v, r: ['value', {'os.system': 'true'}, None])",
    "pipe: list of objects": TAKEN_OVER
    + "speak(lambda v, r: ['value', [{'object': 0}] * 2, None])",
    "pipe: set of objects": TAKEN_OVER
    + "speak(lambda v, r: ['value', {'set': [{'object': 0}]}, None])",
    "pipe: last callback": TAKEN_OVER + "speak(lambda v, r: ['callback', -1, [], {'dict': []}])",
    "pipe: arguments": TAKEN_OVER + "speak(lambda v, r: ['value', None, [{'tuple': []}, 3]])",
    "pipe: equal hashes": TAKEN_OVER
    + "d = [[{'int': f'{(2**61 - 1) * i:x}'}, 0] for i in range(60000)]\n"
    "speak(lambda v, r: ['value', {'dict': d}, None])",
    "pipe: many lists": TAKEN_OVER
    + "raw(lambda n: frame(b'[\"' + n + b'\",\"value\",[' + b'[],' * 5000000 + b'[]],null]'))",
    "pipe: huge range": TAKEN_OVER + "speak(lambda v, r: ['value', {'range': [0, 1, 0]}, None])",
}


@pytest.mark.parametrize("program", FORGERIES.values(), ids=FORGERIES)
def test_no_forgery_earns_a_reward(program):
    outcome = run_program(Job([program], "f", TESTS), LIMITS)
    assert not outcome.passed
    assert outcome.reason.isprintable() and len(outcome.reason) <= 200


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        # A property of the result must not be made true by changing the arguments.
        ("def f(x):\n x.clear()\n return []", "a = [3, 1, 2]\nassert f(a) == sorted(a)"),
        # An exception that ends an iteration early leaves nothing to assert.
        ("def f(x): raise StopIteration", "assert all(map(f, [1, 2]))"),
        ("def f(x): raise StopIteration", "for y in map(f, [1]): assert y"),
        # A helper that the prompt defines is the judge's.
        ("def f(x): return 0\ndef helper(x): return 0", "assert helper(f(2)) == helper(3)"),
        # What a test's own function asserts, the program cannot catch.
        (
            "def f(g):\n try: g(1)\n except BaseException: pass\n return 2",
            "def g(x): assert x == 2\nassert f(g) == 2",
        ),
        # Objects that cannot be compared are neither equal nor different, true nor false.
        ("class f:\n def __init__(s, x): pass", "assert f(1) != 2"),
        ("class f:\n def __init__(s, x): pass", "assert f(1)"),
        ("class f:\n def __init__(s, x): pass", "assert not f(1)"),
        (
            "class f:\n def __init__(s, x): pass",
            "r = f(1)\ntry: assert r == 2\nexcept TypeError: pass",
        ),
        ("class f:\n def __init__(s, x): pass", "r = f(1)\ntry: assert r\nexcept TypeError: pass"),
        ("def f(x): return 1", "def test_f(): assert f(1) == 2"),
        ("def f(x): return 1", "class T:\n def test(self): assert f(1) == 2"),
        ("f = 0", ""),
        ("f = 0", "try:\n assert f(1) == 2\nexcept TypeError: pass\nf()"),
        ("import os\ndef f(x): os._exit(0)", "try: f(1)\nexcept BaseException: pass"),
        (
            "def f(x): return 1",
            "import unittest\nclass T(unittest.TestCase):\n"
            " def test(self): self.assertEqual(f(1), 2)",
        ),
        (
            "import unittest\ndef f(x): raise unittest.SkipTest",
            "import unittest\nclass T(unittest.TestCase):\n"
            " def test(self): self.assertEqual(f(1), 2)",
        ),
    ],
)
def test_no_weakness_of_tests_is_used(program, tests):
    job = Job([program], "f", tests, (), "def helper(x):\n    return 10 * x\n\ndef f(x):\n")
    assert not run_program(job, LIMITS).passed


def test_a_function_of_a_builtin_class_shows_nothing_of_the_judge():
    shown = "{0._Remote__program} {0.__init__.__globals__[os].environ}"
    program = TAKEN_OVER + (
        "number = wire.receive(q)[0]\n"
        f"wire.send(a, [number, 'callback', 0, [{shown!r}, {{'object': 0}}], {{'dict': []}}])\n"
        "wire.send(a, [number, 'value', wire.receive(q)[2], None])"
    )
    outcome = run_program(Job([program], "f", "assert 'Program' not in f(str.format)"), LIMITS)
    assert outcome.reason == "answered with no plain values: IndexError: list index out of range"
    tests = "assert f(str.upper, 'a') == 'A' and f(str.format, '{}', 2) == '2'"
    tests += "\nassert f(dict.get, {1: 2}, 1) == 2 and f(max, 1, 2) == 2"
    assert run_program(Job(["def f(g, *x): return g(*x)"], "f", tests), LIMITS).passed


@pytest.mark.parametrize(
    "action",
    [
        "open(SECRET).read()",
        "os.listdir(os.path.dirname(SECRET))",
        "open(f'/proc/{os.getppid()}/environ').read()",
        "open(f'/proc/{os.getppid()}/maps').read()",
        "os.listdir(f'/proc/{os.getppid()}/fd')",
        "os.readlink(f'/proc/{os.getppid()}/fd/0')",
        "open('/proc/TRAINER/environ').read()",
        "open('/proc/TRAINER/mem', 'rb')",
        "os.readlink('/proc/TRAINER/fd/0')",
        "open('/proc/self/environ').read()",
        "open('/etc/passwd').read()",
        "open(wire.__file__).read()",
        "os.setuid(1)",
    ],
)
def test_nothing_can_be_read_but_the_standard_library(action, tmp_path):
    secret = tmp_path / "data.jsonl"
    secret.write_text("precious")
    program = "import os\nfrom megatron_rl.rewards import sandbox_wire as wire\n"
    program += f"SECRET = {str(secret)!r}\ndef f(x):\n try:\n  " + action.replace(
        "TRAINER", str(os.getpid())
    )
    program += "\n except OSError: return 'refused'\n return 'read'"
    assert run_program(Job([program], "f", "assert f(1) == 'refused'"), LIMITS).passed
    reading = "import os\ndef f(x): return open(os.__file__).readline()"
    assert run_program(Job([reading], "f", "assert f(1).startswith('r')"), LIMITS).passed


ADD = "def f(a, b=1): return a + b"
UNIT = "import unittest\nclass T(unittest.TestCase):\n def test(self):\n  "
STACK = "class Stack:\n def __init__(s): s.x = []\n def push(s, v): s.x.append(v); return s\n"
STACK += " def pop(s): return s.x.pop()\n @property\n def size(s): return len(s.x)\n"
STACK += "def f(): return Stack()"
HONEST = {
    "assertions": (ADD, "assert f(1, 2) == 3\nassert f(1, b=3) == 4"),
    "check": (ADD, "def check(candidate):\n assert candidate(1) == 2"),
    "check by name": (ADD, "def check(candidate):\n assert f(*[1, 2]) == candidate(**{'a': 2})"),
    "test functions": (ADD, "def test_f():\n assert f(1) == 2"),
    "unittest": (ADD, UNIT + "self.assertEqual(f(1), 2)"),
    "unittest, candidate": (ADD, UNIT + "self.assertEqual(candidate(1), 2)"),
    "unittest, raises": (ADD, UNIT + "self.assertRaises(TypeError, f, 'a')"),
    "subtests": (ADD, UNIT + "for i in range(3):\n   with self.subTest(i): assert f(i) == i + 1"),
    "an exception": (
        "def f(x): raise KeyError(x)",
        "try: f('a')\nexcept KeyError as e: assert e.args == ('a',)\nelse: assert 0",
    ),
    "its own exception": (
        "class E(ValueError): pass\ndef f(): raise E('bad 3')",
        "try: f()\nexcept ValueError as e: assert str(e) == 'bad 3'\nelse: assert 0",
    ),
    "in place": ("def f(x): x.sort()", "x = y = [2, 1]\nf(x)\nassert x == y == [1, 2]"),
    "in place, nested": ("def f(m): m[1][0] = 7", "r = [1]\nm = [[0], r]\nf(m)\nassert r == [7]"),
    "in place, dict": (
        "def f(d): d.pop('a'); d['b'] = {1}",
        "d = {'a': 0}\nf(d)\nassert d == {'b': {1}}",
    ),
    "plain types": (
        "def f(x): return x",
        "for v in (None, True, 2**99, -2**60, 1.5, 2j, '\\ud800é', b'\\xff', (1, [2]), {1: (2,)},"
        " {3}, frozenset({(4, 5)}), range(3), bytearray(b'a'), float('inf'), int, [[]]):\n"
        " assert f(v) == v and type(f(v)) is type(v), v\n"
        "import math\nassert math.isnan(f(math.nan)) and str(f(-0.0)) == '-0.0'",
    ),
    "subclasses": (
        "import collections\ndef f(x): return collections.Counter(x)",
        "assert f('aab') == {'a': 2, 'b': 1}\nassert f('') == {}",
    ),
    "named tuple": (
        "import collections\ndef f(): return collections.namedtuple('P', 'a b')(1, 2)",
        "assert f() == (1, 2)",
    ),
    "generator": (
        "def f(n): yield from range(n)",
        "assert list(f(4)) == [0, 1, 2, 3]\nassert next(f(1)) == 0",
    ),
    "iterators": ("def f(x): return map(str, x)", "assert [*f([1, 2])] == ['1', '2']"),
    "closure": ("def f(n): return lambda x: x + n", "assert f(2)(3) == 5"),
    "callback": (
        "def f(g, x): return [g(y) for y in x]",
        "assert f(lambda y: y * 2, [1, 2]) == [2, 4]",
    ),
    "callback, its exception": (
        "def f(g):\n try: g()\n except ValueError as e: return str(e)",
        "class E(ValueError): pass\ndef g(): raise E('bad')\nassert f(g) == 'bad'",
    ),
    "callback that calls": (
        "def f(g): return g() + 1 if g else 1",
        "assert f(lambda: f(None)) == 2",
    ),
    "builtin as argument": (
        "def f(g, x): return g(x)",
        "assert f(len, 'ab') == 2 and f(int, '3') == 3",
    ),
    "objects": (STACK, "s = f().push(1)\ns.push(2)\nassert s.size == 2 and s.pop() == 2"),
    "class by name": (STACK, "s = Stack()\ns.push([1])\nassert s.pop() == [1]"),
    "method": ("class Solution:\n def f(self, x): return x", "assert Solution().f(1) == f(1) == 1"),
    "another function": (ADD + "\ndef g(x): return f(x) * 2", "assert g(1) == 4"),
    "helper of the prompt": ("def f(x): return helper(x)", "assert f(2) == helper(2) == 20"),
    "modules in tests": (ADD, "import math, random\nassert f(math.floor(random.random())) == 1"),
    "printing": ("def f():\n for _ in range(99): print('x' * 10**5)\n return 1", "assert f() == 1"),
    "global state": (
        "n = 0\ndef f():\n global n\n n += 1\n return n",
        "assert f() == 1\nassert f() == 2",
    ),
}


@pytest.mark.parametrize(("program", "tests"), HONEST.values(), ids=HONEST)
def test_right_programs_pass(program, tests):
    prompt = "def helper(x):\n    return 10 * x\n\ndef f(x):\n"
    if "helper" in program:
        program = prompt.partition("def f")[0] + program
    outcome = run_program(Job([program], "f", tests, (), prompt), LIMITS)
    assert (outcome.passed, outcome.reason) == (True, "all tests passed")


SUM = "n = int(input())\nprint(sum(map(int, input().split()[:n])))"
TABLE = {"inputs": ["2\n3 4\n", ["1", "5"]], "outputs": ["7\n", "5"]}


@pytest.mark.parametrize(
    ("record", "completion", "value"),
    [
        (TABLE, SUM, 1.0),
        (TABLE, f"So:\n```python\n{SUM}\n```", 1.0),
        (
            TABLE,
            "if __name__ == '__main__':\n    " + SUM.replace("\n", "\n    ") + "\n    exit()",
            1.0,
        ),
        (TABLE, "import sys\nn, *x = map(int, sys.stdin.read().split())\nprint(sum(x), ' ')", 1.0),
        (
            TABLE,
            "import os\nn, *x = map(int, os.read(0, 99).split())\nos.write(1, b'%d' % sum(x))",
            1.0,
        ),
        (TABLE, "n, *x = map(int, open(0).read().split())\nprint(sum(x))", 1.0),
        (TABLE, SUM + "\nimport sys; sys.stdout.close()", 1.0),
        (TABLE, SUM.replace("print(", "open(1, 'w').write('%d' % "), 1.0),
        (TABLE, "out = open(1, 'w')\n" + SUM.replace("print(", "out.write('%d' % "), 1.0),
        (
            TABLE,
            "import atexit, io, sys\nsys.stdout = text = io.StringIO()\n"
            f"atexit.register(lambda: sys.__stdout__.write(text.getvalue()))\n{SUM}",
            1.0,
        ),
        (TABLE, SUM + "\nprint(7)", 0.0),
        (TABLE, "print(7)", 0.0),
        (TABLE, SUM + "\nraise SystemExit(1)", 0.0),
        (TABLE, SUM + "\nimport os; os._exit(0)", 0.0),
        (
            TABLE,
            "print(7 if 'n' not in globals() else 5); n = 1\nimport builtins; builtins.n = 1",
            0.0,
        ),
        (TABLE, "while True: print('x' * 10**6)", 0.0),
        ({"inputs": [[1, 2], ["a", "b"]], "outputs": [3, "ab"], "entry_point": "f"}, ADD, 1.0),
        ({"inputs": [[1, 2], ["a", "b"]], "outputs": [3, "ba"], "entry_point": "f"}, ADD, 0.0),
        (
            {"inputs": [[[1]]], "outputs": [[1, 1]], "entry_point": "f"},
            "def f(x): return x[0], 1",
            1.0,
        ),
        (
            {"inputs": [[1]], "outputs": [3], "entry_point": "f"},
            EQUAL.format("") + "def f(x): return E()",
            0.0,
        ),
        ({"input_output": '{"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "f"}'}, ADD, 1.0),
        ({"input_output": {"inputs": ["1\n4"], "outputs": ["4"]}}, SUM, 1.0),
    ],
)
def test_cases_of_inputs_and_outputs(record, completion, value):
    assert VERIFIERS["code"](record, completion).value == value


def test_the_judge_kills_and_reaps_a_program_that_goes_on():
    program = "import os\nos.close(server._answers)\nwhile True: pass"
    before = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    outcome = run_program(Job([TAKEN_OVER + program], "f", TESTS), LIMITS)
    assert not outcome.passed
    assert Path(f"/proc/self/task/{os.getpid()}/children").read_text() == before


def test_a_machine_says_what_confines_programs():
    version = landlock_version(ctypes.CDLL(None))
    assert check_sandbox() == {"sandbox": held_text(version)}
    assert held_text(7) == "seccomp, Landlock 7, no root rights"


def test_a_machine_that_closes_no_files_is_refused(monkeypatch):
    check_confinement()
    monkeypatch.setattr(sandbox, "__file__", os.__file__)  # which every program can read
    with pytest.raises(sandbox.UserError, match="can read this process's files"):
        check_confinement()


def test_without_landlock_no_file_can_be_opened(tmp_path):
    for source in Path(sandbox.__file__).parent.glob("*.py"):
        text = source.read_text()
        if source.name == "confinement.py":
            text = text.replace("= 444, 445, 446", "= 100444, 445, 446")
        (tmp_path / source.name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "_START", tmp_path / "sandbox_start.py")
        assert check_confinement() == (
            "seccomp, no root rights; this kernel has no Landlock: programs can open no file, and "
            "import only some modules of the standard library"
        )
        program = "import os, heapq, statistics\ndef f(x):\n try: open(os.__file__)\n"
        program += " except PermissionError: return heapq.nsmallest(1, x)"
        assert run_program(Job([program], "f", "assert f([2, 1]) == [1]"), LIMITS).passed

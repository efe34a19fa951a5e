"""Runs the tests of a record, in all their forms, for the judge of a program.

Names that tests use belong to the tests, the prompt or modules; all other names belong to the
program (``sandbox_remote.py``). A test that would pass without running is an error. Standard
library only.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import symtable
import sys
import types
from typing import Any

from megatron_rl.rewards.sandbox_remote import Program, Remote

_VARIADIC = 0x04 | 0x08  # CO_VARARGS, CO_VARKEYWORDS
_NOT_RUN = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)


def run_tests(program: Program, entry_point: str, prompt: str, tests: str) -> None:
    """Execute the tests, then their ``check``, functions ``test_*`` and classes."""
    program.ask("execute")
    module = types.ModuleType("tests")
    sys.modules["tests"] = module
    names = module.__dict__
    table = symtable.symtable(tests, "tests", "exec")
    owner, _, method = entry_point.rpartition("().")
    own = {method, owner or "Solution"}
    known = vars(builtins).keys() | _define_prompt(names, prompt) | _bound(table)
    unknown = _used(table) - (known - own)
    modules = _modules(tests, unknown - own)
    names.update({name: Remote(program, name) for name in unknown - modules.keys()})
    names.update(modules)
    names.pop("check", None)
    entry = Remote(program, entry_point)
    names.update({"candidate": entry, method: entry})
    exec(compile(tests, "tests", "exec", dont_inherit=True), names)
    check = names.get("check")
    if check is not None and type(check) is not Remote:  # the program's may be called so
        _done(check(entry))
    for name, test in list(names.items()):
        if name.startswith("test_") and _is_test(name, test, 0):
            _done(test())
    _run_classes(module)


def _define_prompt(names: dict[str, Any], prompt: str) -> set[str]:
    """Execute the prompt's definitions in the judge, so that a program cannot replace a helper of
    the tests. Returns the names, also of functions and classes whose definition failed.
    """
    names["__builtins__"] = builtins
    tree = _parse_prompt(prompt)
    futures = [s for s in tree.body if isinstance(s, ast.ImportFrom) and s.module == "__future__"]
    # One by one: helpers after a failed import are still defined.
    for statement in tree.body:
        part = ast.Module([*futures, statement], [])
        try:
            exec(compile(part, "prompt", "exec", dont_inherit=True), names)
        # A prompt may be a sentence that is also a Python expression.
        except (Exception, SystemExit):  # noqa: BLE001
            pass
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {*names, *(s.name for s in tree.body if isinstance(s, definitions))}


def _parse_prompt(prompt: str) -> ast.Module:
    for end in ("", "\n    pass\n", "\n        pass\n"):
        try:
            return ast.parse(prompt + end)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # it breaks off after a function's head, or is no Python
    return ast.Module([], [])


def _bound(table: symtable.SymbolTable) -> set[str]:
    """Names that tests bind themselves, also only if missing: `try: ok`, `except NameError:
    ...`.
    """
    return {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}


def _used(table: symtable.SymbolTable) -> set[str]:
    """All names that tests and their functions may look up globally."""
    outermost = table.get_type() == "module"
    found = (s for s in table.get_symbols() if (s.is_referenced() if outermost else s.is_global()))
    return {s.get_name() for s in found}.union(*map(_used, table.get_children()))


def _modules(tests: str, unknown: set[str]) -> dict[str, types.ModuleType]:
    """Standard-library modules that tests use without importing, like `math` in
    `math.isclose(...)`: the program could forge its own `math`.
    """
    nodes = list(ast.walk(ast.parse(tests)))
    owners = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    otherwise = {n.id for n in nodes if isinstance(n, ast.Name) and id(n) not in owners}
    wanted = (unknown - otherwise) & sys.stdlib_module_names
    return {name: importlib.import_module(name) for name in wanted}


def _is_test(name: str, test: Any, given: int) -> bool:
    """Whether it is a function with no more arguments than ``given``; functions with more are
    called by tests. For a wrapper the inner function counts; if that is unknown, it is a test.
    """
    if type(test) is not types.FunctionType:
        return False
    while type(inner := getattr(test, "__wrapped__", None)) is types.FunctionType:
        test = inner
    code = test.__code__
    required = code.co_argcount - len(test.__defaults__ or ()) - given
    required += code.co_kwonlyargcount - len(test.__kwdefaults__ or {})
    wraps = test.__closure__ is not None and name != test.__name__
    return required <= 0 and (not code.co_flags & _VARIADIC or wraps)


def _done(result: Any) -> None:
    """Raise AssertionError if a test that returned this has not run."""
    if type(result) in _NOT_RUN:
        raise AssertionError(f"a test is a {type(result).__name__}: it does not run")


def _run_classes(module: types.ModuleType) -> None:
    """Run ``unittest`` classes, and other classes "Test..." like pytest, without fixtures."""
    made: list[Any] = [each for each in vars(module).values() if isinstance(each, type)]
    unittest = sys.modules.get("unittest")
    cases = [each for each in made if unittest is not None and issubclass(each, unittest.TestCase)]
    for each in dict.fromkeys(made):
        own = each.__name__.startswith("Test") and each.__module__ == module.__name__
        if own and each.__init__ is object.__init__ and not any(issubclass(c, each) for c in cases):
            _run_class(each)
    if cases:
        _run_unittest(unittest, module)


def _run_class(made: type) -> None:
    functions = {name: getattr(made, name) for name in dir(made) if name.startswith("test_")}
    functions = {name: getattr(found, "__func__", found) for name, found in functions.items()}
    tests = {name: found for name, found in functions.items() if _is_test(name, found, 1)}
    prepare = getattr(made, "setup_method", None)
    if tests and hasattr(made, "setup_class"):
        made.setup_class()
    for name, test in tests.items():
        instance = made()
        if prepare is not None:
            prepare(*(instance, test)[: prepare.__code__.co_argcount])
        _done(getattr(instance, name)())


def _run_unittest(unittest: Any, module: types.ModuleType) -> None:
    suite = unittest.defaultTestLoader.loadTestsFromModule(module)
    if not suite.countTestCases():
        return
    # unittest only warns if a test is a coroutine.
    unittest.TestCase._callTestMethod = lambda case, method: _done(method())
    result = unittest.TestResult()
    suite.run(result)
    if result.testsRun == len(result.skipped) or not result.wasSuccessful():
        bad = result.errors + result.failures
        why = bad[0][1].strip().rpartition("\n")[2] if bad else "no test has run"
        raise AssertionError(why)

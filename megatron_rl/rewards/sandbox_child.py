"""The confined side of the sandbox: executes the program and serves calls of its functions.

It holds only the program and its arguments: no test, no expected value, no descriptor but its ends
of two pipes. A program can take over this whole process, so the judge trusts nothing that it sends
(``sandbox_judge.py``). Standard library only.

A request is [number, verb, ...], its reply [number, "value", ...] or [number, "error", name, names
of its classes, text]; "callback" asks for a function that was an argument.
"""

from __future__ import annotations

import atexit
import builtins
import functools
import os
import sys
import types
from operator import delitem, getitem, setitem
from typing import Any, Callable

from megatron_rl.rewards.sandbox_wire import pack, receive, send, unpack

_MAX_TEXT = 1000
_PLAIN_BASES: tuple[type[Any], ...] = (
    bool, int, float, complex, str, bytes, bytearray, dict, list, tuple, set, frozenset,
)  # fmt: skip
_APPLIED: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (delattr, len, setattr)
}
_APPLIED |= {function.__name__: function for function in (delitem, getitem, setitem)}
_APPLIED["str"] = str


class Server:
    """The program, and the objects it has returned that are no plain values, by number."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers = requests, answers
        self._names: dict[str, Any] = {}
        self._entry_point = ""
        self._code: types.CodeType | None = None
        self._objects: list[Any] = []
        self._number = ""
        self._files = [os.dup(place) for place in (0, 1)]  # `open(0)` closes what it has opened

    def serve(self) -> None:
        """Answer requests until the input ends."""
        while True:
            try:
                message = receive(self._requests)
            except EOFError:
                return
            self._answer(*message)

    def _answer(self, number: str, verb: str, *content: Any) -> None:
        outer, self._number = self._number, number
        try:
            reply = ["value", *getattr(self, f"do_{verb}")(*content)]
        # SystemExit, KeyboardInterrupt and the program's own classes are errors like any other.
        except BaseException as error:  # noqa: BLE001
            reply = ["error", *describe(error)]
        self._number = outer
        self._send(number, reply)

    def _send(self, number: str, reply: list[Any]) -> None:
        try:
            send(self._answers, [number, *reply])
        except ValueError as error:
            send(self._answers, [number, "error", *describe(error)])

    def do_load(self, programs: list[str], entry_point: str) -> list[Any]:
        names: Any = builtins
        names.exit = names.quit = sys.exit  # normally from the module site, which is not loaded
        self._code, self._entry_point = compile_first(programs), entry_point
        return []

    def do_execute(self) -> list[Any]:
        """Execute the program, not as __main__: code under that condition does not run."""
        self._names = self._execute("program")
        return []

    def do_run(self, text: str) -> list[Any]:
        """Execute the program with ``text`` as its input; returns what it printed."""
        for descriptor, content in ((0, text.encode("utf-8", "surrogatepass")), (1, b"")):
            os.dup2(self._files[descriptor], descriptor)
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
            os.lseek(descriptor, 0, os.SEEK_SET)
        own: Any = sys  # whose __stdin__ and __stdout__ are final to a type checker
        own.stdin = own.__stdin__ = open(0, encoding="utf-8", errors="replace", closefd=False)
        printed = open(1, "w", encoding="utf-8", closefd=False)
        own.stdout = own.__stdout__ = printed
        try:
            self._execute("__main__")
        except SystemExit as leaving:
            if leaving.code not in (None, 0):
                raise
        # As at an interpreter's end: run exit handlers and flush the program's files.
        atexit._run_exitfuncs()
        for file in (sys.stdout, printed):
            if not file.closed:
                file.flush()
        if (module := sys.modules.pop("__main__", None)) is not None:
            vars(module).clear()
        length = os.lseek(self._files[1], 0, os.SEEK_END)
        return [os.pread(self._files[1], length, 0).decode("utf-8", "replace")]

    def _execute(self, name: str) -> dict[str, Any]:
        module = types.ModuleType(name)
        sys.modules[name] = module
        assert self._code is not None, "do_load comes first"
        exec(self._code, module.__dict__)
        return module.__dict__

    def do_call(self, target: str | int, arguments: Any, named: Any) -> list[Any]:
        function = self._find(target)
        values, keywords = self._unpack(arguments), self._unpack(named)
        result = function(*values, **keywords)
        # The judge needs the changed arguments only if there is no result.
        changed = None if result is not None else self._pack([list(values), keywords])
        return [self._pack(result), changed]

    def do_get(self, target: str | int, name: str) -> list[Any]:
        return [self._pack(getattr(self._find(target), name))]

    def do_apply(self, name: str, target: Any, arguments: Any) -> list[Any]:
        function = _APPLIED[name]
        return [self._pack(function(self._unpack(target), *self._unpack(arguments)))]

    def do_iter(self, target: str | int) -> list[Any]:
        return [self._refer(iter(self._find(target)))]

    def do_next(self, target: int) -> list[Any]:
        return [self._pack(next(self._find(target)))]

    def _find(self, target: str | int) -> Any:
        if isinstance(target, int):
            return self._objects[target]
        if target in (self._entry_point, self._entry_point.rpartition("().")[2]):
            return find(self._names, self._entry_point)
        if target not in self._names:
            raise NameError(f"name {target!r} is not defined")
        return self._names[target]

    def _pack(self, value: Any) -> Any:
        return pack(value, self._refer)

    def _refer(self, value: Any) -> Any:
        name = value.__name__ if isinstance(value, type) else ""
        if name and getattr(builtins, name, None) is value:
            return {"builtin": name}
        for base in _PLAIN_BASES:  # such as a Counter, a named tuple or a member of an IntEnum
            if isinstance(value, base):
                return self._pack(base(value))
        self._objects.append(value)
        return {"object": len(self._objects) - 1}

    def _unpack(self, item: Any) -> Any:
        return unpack(item, self._resolve)

    def _resolve(self, tag: str, content: Any) -> Any:
        if tag == "builtin":
            return functools.reduce(getattr, content.split("."), builtins)
        if tag == "thing":
            return object()
        return self._callback(content) if tag == "callback" else self._find(content)

    def _callback(self, place: int) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            number = self._number
            send(
                self._answers,
                [number, "callback", place, self._pack(list(arguments)), self._pack(named)],
            )
            while True:
                got, verb, *content = receive(self._requests)
                if got == number and verb == "value":
                    return self._unpack(content[0])
                if got == number and verb == "error":
                    raise getattr(builtins, content[0], RuntimeError)(content[1])
                self._answer(got, verb, *content)

        return call


def compile_first(programs: list[str]) -> types.CodeType:
    """The first program that is valid Python; if none is, the error of the first reading of
    fences.
    """
    errors = []
    for program in programs:
        try:
            return compile(program, "program", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError) as error:
            errors.append(error)
    raise errors[min(1, len(errors) - 1)]


def find(names: dict[Any, Any], entry_point: str) -> Any:
    """The function to test; for a method, one that makes a new instance for each call."""
    owner, _, method = entry_point.rpartition("().")
    if not owner and method in names:
        return names[method]
    made = names.get(owner or "Solution")
    if not isinstance(made, type) or not hasattr(made, method):
        raise NameError(f"{entry_point} is not defined")
    return lambda *arguments, **named: getattr(made(), method)(*arguments, **named)


def describe(error: BaseException) -> tuple[str, list[str], str]:
    """Name, names of its builtin classes from the nearest on, and text. A class of the program is
    only named, because its methods may do anything.
    """
    own = type(error).__module__ != "builtins"
    classes = [c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins"]
    plain = len(error.args) == 1 and type(error.args[0]) is str
    text = error.args[0] if plain else "" if own else str(error)
    return type(error).__name__, classes, text[:_MAX_TEXT]

"""The program as the judge sees it: calls through a pipe, plain values, and ``Remote`` objects.

This process builds the values (``sandbox_wire.py``); it never holds an object of the program. The
other side may send anything: a message is a valid reply, or it ends the case. Standard library
only.
"""

from __future__ import annotations

import builtins
import os
import signal
import time
from typing import Any, Callable, NoReturn

from megatron_rl.rewards.sandbox_wire import BROKEN, pack, receive, send, unpack

_NO_TEXT = (UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError)  # made of several parts
# These have a meaning in Python itself if they pass through: `all(map(f, ...))` would end early.
_NOT_RAISED = (StopIteration, StopAsyncIteration, *_NO_TEXT)
_BUILTINS = {name: made for name, made in vars(builtins).items() if not name.startswith("_")}
_ERRORS = {
    name: made
    for name, made in _BUILTINS.items()
    if isinstance(made, type)
    and issubclass(made, Exception)
    and made not in _NOT_RAISED
    and not name.endswith("Group")
}
_TYPES = {name: made for name, made in _BUILTINS.items() if isinstance(made, type)}
_SHOWN = ("__doc__", "__name__", "__qualname__")  # the other special methods belong to this process
#: Subclasses of these are sent as these.
_COPIED: tuple[type[Any], ...] = (dict, list, tuple, set, frozenset, int, float, str)


class Stopped(BaseException):
    """The program has ended or broken the protocol: no test can pass any more."""


class Killed(Stopped):
    """Something else killed the program: no verdict."""


class Program:
    """The confined process. Once stopped it stays stopped, even if a test catches the error."""

    def __init__(self, requests: int, answers: int, pid: int) -> None:
        self._requests, self._answers, self.pid = requests, answers, pid
        self.cpu_s = 0
        self.reaped = False
        self.calls = 0  #: of the program; one it does not answer stops it
        self.stopped: BaseException | None = None
        self._callbacks: list[Any] = []

    def greeting(self) -> tuple[str, str]:
        """The child's first message, before it sees the program: "confined" or "refused", and
        details.
        """
        try:
            word, text = receive(self._answers)
        except EOFError:
            return "refused", "no word from the child"
        return word, text

    def ask(self, verb: str, *content: Any) -> list[Any]:
        """Send a request; the values of its reply. Raises what the program raised."""
        if self.stopped is not None:
            raise self.stopped
        number = os.urandom(8).hex()  # random, so that no reply can precede its request
        try:
            send(self._requests, [number, verb, *content])
        except OSError:
            self._ended()
        except ValueError as error:
            self.stop(error)
        while True:
            kind, parts = self._receive(number)
            if kind == "value":
                return parts
            if kind == "error":
                self._raise(parts, verb == "next")
            self._serve(number, parts)

    def call(self, target: Any, arguments: tuple[Any, ...], named: dict[Any, Any]) -> Any:
        """The result of a function of the program. The arguments are changed as it has changed
        them, if it returned None: a result must not make its own expectation true.
        """
        self.calls += 1
        result, changed = self._checked(
            self.ask("call", target, self.argument(list(arguments)), self.argument(named)), 2
        )
        if result is None and changed is not None:
            if type(changed) is not list or len(changed) != 2:
                self._broken(ValueError("arguments that are no pair"))
            write_back(list(arguments), changed[0])
            write_back(named, changed[1])
        return result

    def value(self, verb: str, *content: Any) -> Any:
        """The one value of a reply."""
        return self._checked(self.ask(verb, *content), 1)[0]

    def argument(self, value: Any) -> Any:
        """An argument in packed form. A failure to pack is no error that a test may expect from the
        program.
        """
        try:
            return self.pack(value)
        except (TypeError, ValueError) as error:
            self.stop(error)

    def pack(self, value: Any) -> Any:
        return pack(value, self._refer)

    def _checked(self, parts: list[Any], count: int) -> list[Any]:
        try:
            if len(parts) != count:
                raise ValueError(f"{len(parts)} values; expected {count}")
            return [unpack(part, self._resolve) for part in parts]
        except BROKEN as error:
            self._broken(error)

    def _receive(self, number: str) -> tuple[str, list[Any]]:
        try:
            got, kind, *parts = receive(self._answers)
        except (EOFError, OSError):
            self._ended()
        except BROKEN as error:
            self._broken(error)
        if got != number or kind not in ("value", "error", "callback"):
            self._broken(ValueError("a reply that was not asked for"))
        return kind, parts

    def _raise(self, parts: list[Any], iterating: bool) -> NoReturn:
        try:
            name, classes, text = parts
            if not all(type(word) is str for word in (name, text, *classes)):
                raise TypeError("an error that is not described by text")
        except BROKEN as error:
            self._broken(error)
        if iterating and name == "StopIteration":
            raise StopIteration
        name, text = clean(name, 60), clean(text, 1000)
        if "Exception" not in classes:
            self.stop(Stopped(f"{name}: {text}".strip(": ")))
        for word in classes[:20]:
            if word in _ERRORS:
                raised: Any = _ERRORS[word](text) if text else _ERRORS[word]()
                raised.of_program = f"{name}: {text}"  # for the report
                raise raised
        raise RuntimeError(f"{name}: {text}")

    def _serve(self, number: str, parts: list[Any]) -> None:
        """Calls a function that a test has passed to the program."""
        arguments, named = self._checked(parts[1:], 2)
        try:
            function = self._callbacks[parts[0]]
            if type(arguments) is not list or type(named) is not dict:
                raise TypeError("a call without arguments")
        except BROKEN as error:
            self._broken(error)
        try:
            reply = ["value", self.pack(function(*arguments, **named))]
        except AssertionError as error:  # raised by a test: the program must not catch it
            self.stop(error)
        except Exception as error:  # noqa: BLE001 the test function's error goes to the program
            nearest = next(c for c in type(error).__mro__ if c.__module__ == "builtins")
            reply = ["error", nearest.__name__, clean(str(error), 1000)]
        try:
            send(self._requests, [number, *reply])
        except OSError:
            self._ended()

    def stop(self, why: BaseException) -> NoReturn:
        self.stopped = why
        raise why

    def _broken(self, error: BaseException) -> NoReturn:
        self.stop(Stopped(f"answered with no plain values: {type(error).__name__}: {error}"))

    def _ended(self) -> NoReturn:
        """Why the process closed its pipe."""
        for _ in range(20):
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(0.05)
        else:  # it still runs, without its pipe
            self.stop(Stopped("ended before its tests were done"))
        self.reaped = True
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if ended_by == signal.SIGXCPU:
            self.stop(Stopped(f"stopped after {self.cpu_s} s of processor time"))
        # Past its processor time the kernel kills a process that ignores SIGXCPU.
        if ended_by == signal.SIGKILL and usage.ru_utime + usage.ru_stime < self.cpu_s:
            self.stop(Killed())
        self.stop(Stopped("ended before its tests were done"))

    def end(self) -> None:
        """Kill the process and wait for it, since a container's first process may not reap it."""
        if not self.reaped:
            self.reaped = True
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def _refer(self, value: Any) -> Any:
        """Pack arguments that are no plain values."""
        if type(value) is Remote:
            return _target(value)
        if (name := _builtin_name(value)) is not None:
            return {"builtin": name}
        for copied in _COPIED:
            if isinstance(value, copied):
                return self.pack(copied(value))
        if type(value) is object:
            return {"thing": None}
        if isinstance(value, type) or not callable(value):
            raise TypeError(
                f"an argument of type {type(value).__name__}; expected plain values or functions"
            )
        self._callbacks.append(value)
        return {"callback": len(self._callbacks) - 1}

    def _resolve(self, tag: str, content: Any) -> Any:
        """Unpack results that are no plain values."""
        if tag == "object" and type(content) is int:
            return Remote(self, content)
        if tag == "builtin" and type(content) is str:
            return _TYPES[content]
        raise ValueError(f"a value of type {tag[:20]!r}")


def _applied(name: str) -> Callable[..., Any]:
    """Forward a special method, which Python calls on the class, to the program."""

    def apply(remote: Remote, *arguments: Any) -> Any:
        program = object.__getattribute__(remote, "_Remote__program")
        return program.value("apply", name, _target(remote), program.argument(list(arguments)))

    return apply


def _refusal(what: str) -> Callable[..., Any]:
    """Stop the program: a test that expects a TypeError must only see the program's own."""

    def refuse(remote: Remote, *_: Any) -> NoReturn:
        program: Program = object.__getattribute__(remote, "_Remote__program")
        program.stop(TypeError(f"an object of the program {what}; expected a plain value"))

    return refuse


class Remote:
    # Represents a function, class or object of the program: it can be called, iterated, and has
    # attributes, items, length and text. It equals nothing and is neither true nor false, so that
    # no test passes because of the proxy itself. It has no docstring, because __doc__ is forwarded
    # as well.

    __slots__ = ("__program", "__place")

    def __init__(self, program: Program, place: str | int) -> None:
        object.__setattr__(self, "_Remote__program", program)
        object.__setattr__(self, "_Remote__place", place)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.__program.call(self.__place, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in _SHOWN:
            raise AttributeError(name)
        return self.__program.value("get", self.__place, name)

    def __iter__(self) -> Remote:
        return self.__program.value("iter", self.__place)

    def __next__(self) -> Any:
        return self.__program.value("next", self.__place)

    @property
    def __doc__(self) -> Any:  # type: ignore[override]  # typeshed has a text that can be set
        return self.__getattr__("__doc__")

    __reduce_ex__ = _refusal("is copied")
    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = _refusal("is compared")
    __bool__ = _refusal("as a condition")
    __hash__ = _refusal("is hashed")
    __setattr__, __delattr__ = _applied("setattr"), _applied("delattr")
    __getitem__, __setitem__ = _applied("getitem"), _applied("setitem")
    __delitem__, __len__, __str__ = _applied("delitem"), _applied("len"), _applied("str")

    def __repr__(self) -> str:
        return "<object of the program>"


def _target(remote: Remote) -> dict[Any, Any]:
    place = object.__getattribute__(remote, "_Remote__place")
    return {"object" if type(place) is int else "name": place}


def _builtin_name(value: Any) -> str | None:
    """The name of a builtin that the program has as well: "len", "str.upper". As a function of this
    process it could read the process: ``str.format`` reads any attribute.
    """
    name, owner = getattr(value, "__name__", None), getattr(value, "__objclass__", None)
    if type(name) is not str:
        return None
    if owner is None:
        return name if _BUILTINS.get(name) is value else None
    known = type(owner) is type and _TYPES.get(owner.__name__) is owner
    return f"{owner.__name__}.{name}" if known and vars(owner).get(name) is value else None


def write_back(old: Any, new: Any) -> None:
    """Make ``old`` equal to ``new``, and keep its list, dictionary and set objects."""
    if type(old) is not type(new):
        return
    if type(old) is list:
        old[:] = [_merged(*pair) for pair in zip(old, new)] + new[len(old) :]
    elif type(old) is dict:
        merged = {key: _merged(old.get(key), value) for key, value in new.items()}
        old.clear()
        old.update(merged)
    elif type(old) is set:
        old.clear()
        old.update(new)
    elif type(old) is bytearray:
        old[:] = new
    elif type(old) is tuple:
        for pair in zip(old, new):
            write_back(*pair)


def _merged(old: Any, new: Any) -> Any:
    """The item that replaces ``old`` in a container, equal to ``new``."""
    if type(old) is type(new) and type(old) in (list, dict, set, bytearray):
        write_back(old, new)
        return old
    return new


def clean(text: str, most: int) -> str:
    """The text as one printable line."""
    shown = "".join(c if c.isprintable() else " " for c in text[: 2 * most])
    return " ".join(shown.split())[:most].rstrip()

"""Frames of a program to its judge: plain values of exact types, or an expected error."""

from __future__ import annotations

import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any, Iterator

from megatron_rl.rewards import sandbox_wire
from tools.fuzz.kind import Judge, Kind, Verdict, Wrong
from tools.fuzz.mutate import RAW, changed, flipped

_ATOMS: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 7, 2**53, -(2**53), 10**400, -(10**60)),
    *(0.5, -0.0, 1e308, float("inf"), float("-inf"), 1j, complex(-0.0, 2.0)),
    *("", "x", "two\nlines", "\ud83d", "\0", b"", b"\xff\0", bytearray(b"a"), range(3, 9, 2)),
)
_TYPES = {type(atom) for atom in _ATOMS} | {list, tuple, dict, set, frozenset}
#: Pieces of frames that no honest side sends.
ODD_FRAMES: tuple[Any, ...] = (
    *({"int": 5}, {"int": "0x_"}, {"int": "f" * 300_000}, {"set": [[]]}, {"dict": [[1]]}, {}),
    *({"dict": [[[], 1]]}, {"tuple": "ab"}, {"range": [0, 1, 0]}, {"bytes": "0"}, {"bytes": 3}),
    *({"complex": [1, 2]}, {"object": 0}, {"builtin": "eval"}, {"os.system": "true"}),
    *({"tuple": [], "set": []}, {"frozenset": {"a": 1}}),
)


def make(rng: random.Random) -> tuple[Any, bytes]:
    """A value, or None where the frame is spoiled, and the frame's bytes."""
    value = [_value(rng, 3) for _ in range(rng.randrange(1, 4))]
    packed = sandbox_wire.pack(value, _no_object)
    way = rng.randrange(5)
    if way == 0:
        return value, _frame_of(packed)
    if way == 1:
        return None, _frame(rng.choice(RAW).encode("utf-8", "surrogatepass"))
    if way == 2:
        return None, flipped(rng, _frame_of(packed))
    if way == 3:
        packed.insert(rng.randrange(len(packed) + 1), rng.choice(ODD_FRAMES))
    else:
        packed = changed(rng, packed, rng.randint(1, 3))
    return None, _frame_of(packed)


def _value(rng: random.Random, levels: int) -> Any:
    if levels == 0 or rng.random() < 0.4:
        return rng.choice(_ATOMS)
    inner = [_value(rng, levels - 1) for _ in range(rng.randrange(4))]
    way = rng.randrange(5)
    if way == 0:
        return inner
    if way == 1:
        return tuple(inner)
    keys = [item for item in inner if type(item) in (bool, int, float, str, bytes)]
    return (
        {key: item for key, item in zip(keys, inner)}
        if way == 2
        else (set, frozenset)[way - 3](keys)
    )


def _frame_of(packed: Any) -> bytes:
    return _frame(json.dumps(packed).encode("ascii"))


def _frame(text: bytes) -> bytes:
    return len(text).to_bytes(4, "little") + text


def _no_object(value: Any) -> dict:
    raise ValueError(f"a value of type {type(value).__name__}")


def _unknown(tag: str, content: Any) -> Any:
    raise ValueError(f"a value of type {tag[:20]!r}")


@contextlib.contextmanager
def judging(folder: Path) -> Iterator[Judge]:
    """A whole frame gives its value back; a spoiled one gives plain values, or is refused."""
    file = folder / "frame"

    def judge(case: tuple[Any, bytes]) -> Verdict:
        expected, data = case
        file.write_bytes(data)
        descriptor = os.open(file, os.O_RDONLY)
        try:
            found = sandbox_wire.unpack(sandbox_wire.receive(descriptor), _unknown)
        except (EOFError, *sandbox_wire.BROKEN) as error:
            if expected is not None:
                raise Wrong(f"refused ({error!r}): {data[:200]!r}") from error
            return Verdict.REFUSED
        finally:
            os.close(descriptor)
        _check(found)
        if expected is not None and _text(found) != _text(expected):
            raise Wrong(f"{found!r}; expected {expected!r}")
        return Verdict.TAKEN

    yield judge


def _text(value: Any) -> str:
    """A value's text with types and signs, and sorted sets."""
    if isinstance(value, dict):
        inner = [f"{_text(key)}: {_text(item)}" for key, item in value.items()]
    elif isinstance(value, (set, frozenset)):
        inner = sorted(map(_text, value))
    elif isinstance(value, (list, tuple)):
        inner = list(map(_text, value))
    else:
        return repr(value)
    return f"{type(value).__name__}({', '.join(inner)})"


def _check(value: Any) -> None:
    """Wrong: something in it is not of a plain type itself, but of a class derived from one."""
    if type(value) not in _TYPES:
        raise Wrong(f"a value of type {type(value)}")
    if isinstance(value, dict):
        for item in (*value, *value.values()):
            _check(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            _check(item)


KIND = Kind("wire", make, judging)

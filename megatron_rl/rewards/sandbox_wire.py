"""Messages between judge and program: plain values, as JSON in a frame.

A frame is 4 bytes of length and that many bytes of JSON. None, bool, float, str, lists and integers
up to 53 bits stand for themselves; everything else is an object with one key that names its type.
Reading a frame runs no code of the sender and is bounded in bytes, depth and digits; other input
raises an error of ``BROKEN``. Both sides use this file, but only the judge relies on it: the
program may send any bytes.
"""

from __future__ import annotations

import json
import os
from typing import Any, Callable

#: Longest frame, bytes.
MAX_BYTES = 16 * 2**20
#: Deepest nesting of values.
MAX_DEPTH = 100
_MAX_INTEGER_DIGITS = 2**18  # hexadecimal
_JSON_INTEGER = 2**53

#: Errors of reading a frame. EOFError: the other side has closed its end.
BROKEN = (
    ValueError,  # among them bad JSON and bad UTF-8
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    RecursionError,
    MemoryError,
)

_ENCODE = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode
_DECODE = json.JSONDecoder(parse_constant=float).decode  # a new NaN for each: none is another
_SEQUENCES: dict[str, type[Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}
_NAMES: dict[type[Any], str] = {made: name for name, made in _SEQUENCES.items()}
_BYTES: dict[str, type[bytes] | type[bytearray]] = {"bytes": bytes, "bytearray": bytearray}
_PLAIN = (type(None), bool, str, float)

#: Called with a value that is not plain; gives its one-key object.
Refer = Callable[[Any], dict[Any, Any]]
#: Called with key and content of an object unknown to this file; gives its value.
Resolve = Callable[[str, Any], Any]


def pack(value: Any, refer: Refer, depth: int = MAX_DEPTH) -> Any:
    """The JSON form of a value. ValueError: nested deeper than ``MAX_DEPTH``, or too long."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is int:
        if -_JSON_INTEGER < value < _JSON_INTEGER:
            return value
        if value.bit_length() > 4 * _MAX_INTEGER_DIGITS:
            raise ValueError(f"an integer of {value.bit_length()} bits; expected fewer")
        return {"int": f"{value:x}"}
    if depth == 0:
        raise ValueError(f"a value nested deeper than {MAX_DEPTH}")
    if kind is list:
        return [pack(item, refer, depth - 1) for item in value]
    if kind in _NAMES:
        return {_NAMES[kind]: [pack(item, refer, depth - 1) for item in value]}
    if kind is dict:
        pairs = value.items()
        return {"dict": [[pack(half, refer, depth - 1) for half in pair] for pair in pairs]}
    if kind is bytes or kind is bytearray:
        return {kind.__name__: value.hex()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is range:
        bounds = (value.start, value.stop, value.step)
        return {"range": [pack(bound, refer, depth - 1) for bound in bounds]}
    return refer(value)


def unpack(item: Any, resolve: Resolve, depth: int = MAX_DEPTH) -> Any:
    """The value of a JSON form, of exactly the types named above or what ``resolve`` gives."""
    kind = type(item)
    if kind in _PLAIN or kind is int:
        return item
    if depth == 0:
        raise ValueError(f"a value nested deeper than {MAX_DEPTH}")
    if kind is list:
        return [unpack(part, resolve, depth - 1) for part in item]
    ((tag, content),) = item.items()
    if tag in _SEQUENCES:
        return _SEQUENCES[tag]([unpack(part, resolve, depth - 1) for part in _list(content)])
    if tag == "dict":
        pairs = [_list(pair) for pair in _list(content)]
        return {
            unpack(key, resolve, depth - 1): unpack(value, resolve, depth - 1)
            for key, value in pairs
        }
    if tag == "int":
        if type(content) is not str or len(content) > _MAX_INTEGER_DIGITS + 1:
            raise ValueError("an integer that is no text, or too long")
        return int(content, 16)
    if tag in _BYTES:
        return _BYTES[tag].fromhex(content)
    if tag == "complex":
        real, imaginary = _list(content)
        if type(real) is not float or type(imaginary) is not float:
            raise ValueError("a complex number that is not of two floats")
        return complex(real, imaginary)
    if tag == "range":
        return range(*(unpack(bound, resolve, 1) for bound in _list(content)))
    return resolve(tag, content)


def _list(content: Any) -> list[Any]:
    if type(content) is not list:
        raise ValueError(f"{type(content).__name__} where a list belongs")
    return content


def send(descriptor: int, message: list[Any]) -> None:
    """Writes a frame of packed values. ValueError: it is longer than ``MAX_BYTES``."""
    data = _ENCODE(message).encode("ascii")
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data):,} bytes of values; expected at most {MAX_BYTES:,}")
    data = len(data).to_bytes(4, "little") + data
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def receive(descriptor: int) -> list[Any]:
    """Read a frame. EOFError: the stream has ended; an error of ``BROKEN``: the input is no
    frame.
    """
    length = int.from_bytes(_read(descriptor, 4), "little")
    if length > MAX_BYTES:
        raise ValueError(f"a frame of {length:,} bytes; expected at most {MAX_BYTES:,}")
    return _list(_DECODE(_read(descriptor, length).decode("ascii")))


def _read(descriptor: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        chunk = os.read(descriptor, min(count - len(data), 2**20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)

"""Reads the pickle of an index with records in the place of torch's classes; nothing is run.

A pickle may set attributes of whatever it names, classes included (BUILD), call it (REDUCE), and
hash what takes for ever (nested tuples as keys). Here a global is a name of a table, only records
take attributes, only the few functions below are called, and keys are text or records. Steps that
an index does not need are not known at all. It is Python's own unpickler written in Python, for the
one in C cannot be told these things.
"""

from __future__ import annotations

import io
import pickle
import struct
from typing import Any, Callable

import torch

_MOST_DIMENSIONS = 64
_STRIDED = "torch.strided"
_METADATA = "torch.distributed.checkpoint.metadata"
_ENCODING = (_METADATA, "_MEM_FORMAT_ENCODING")
_MEMBERS = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")
#: Classes whose objects become records, and the attributes these may have.
_RECORDS: dict[tuple[str, str], frozenset[str]] = {
    (_METADATA, "BytesStorageMetadata"): frozenset(),
    (_METADATA, "ChunkStorageMetadata"): frozenset({"offsets", "sizes"}),
    (_METADATA, "Metadata"): frozenset(
        {"state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"}
        | {"mcore_data"}  # Megatron's
    ),
    (_METADATA, "MetadataIndex"): frozenset({"fqn", "offset", "index"}),
    (_METADATA, "StorageMeta"): frozenset({"checkpoint_id", "save_id", "load_id", "modules"}),
    (_METADATA, "TensorProperties"): frozenset(
        {"dtype", "layout", "requires_grad", "memory_format", "pin_memory"}
    ),
    (_METADATA, "TensorStorageMetadata"): frozenset({"properties", "size", "chunks"}),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): frozenset(
        {"relative_path", "offset", "length", "transform_descriptors"}
    ),
}
#: What is right of each, in the order of TensorProperties' own state.
_PROPERTIES: dict[str, Callable[[Any], bool]] = {
    "dtype": lambda value: isinstance(value, torch.dtype),
    "layout": lambda value: value == _STRIDED,
    "requires_grad": lambda value: type(value) is bool,
    "memory_format": lambda value: type(value) is str and value in _MEMBERS,
    "pin_memory": lambda value: type(value) is bool,
}


class Refused(Exception):
    """The pickle is none of an index; it says why on one line."""


class Size(tuple[Any, ...]):
    """A torch.Size: numbers from 0."""


class Record:
    """An object of one of torch's classes: its attributes and nothing else."""

    def __init__(self, kind: str, names: frozenset[str]) -> None:
        self.kind, self._names = kind, names
        self.fields: dict[str, Any] = {}

    def fill(self, state: Any) -> None:
        """What unpickling the object with this state sets. Refused: more, or something else; again,
        for what has been a key meanwhile would be another one.
        """
        if self.kind == "TensorProperties":
            state = _properties(state)
        if type(state) is not dict or not state.keys() <= self._names or self.fields:
            raise Refused(f"attributes that a {self.kind} does not have")
        if self.kind == "MetadataIndex":
            _check_key(state)
        self.fields.update(state)


class _Function:
    """Something that may be called, with what and to what end."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


class _Class:
    """A class of the table."""

    def __init__(self, key: tuple[str, str]) -> None:
        self.key = key


def _properties(state: Any) -> dict[str, Any]:
    """The state of a TensorProperties, which is read as a tuple by torch as well."""
    if type(state) is not tuple or len(state) != len(_PROPERTIES):
        raise Refused("properties of a tensor that are none")
    for (name, right), value in zip(_PROPERTIES.items(), state):
        if not right(value):
            raise Refused(f"properties of a tensor with a {name} that is none")
    return dict(zip(_PROPERTIES, state))


def _check_key(state: dict[str, Any]) -> None:
    """Of a MetadataIndex, whose hash torch computes when its pickle sets an item by it."""
    right = type(state.get("fqn")) is str and type(state.get("offset")) in (Size, type(None))
    if not right or type(state.get("index")) not in (int, type(None)):
        raise Refused("a key of a shard that is none")


def _size(numbers: Any = ()) -> Size:
    right = type(numbers) in (tuple, list) and len(numbers) <= _MOST_DIMENSIONS
    if not right or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise Refused("a size that is none")
    return Size(numbers)


def _layout(name: Any) -> str:
    if name != _STRIDED:
        raise Refused("a layout other than torch.strided")
    return name


def _path(*parts: Any) -> str:
    if not all(type(part) is str for part in parts):
        raise Refused("a path that is none")
    return "/".join(parts)


def _encoding(number: Any) -> str:
    if type(number) is not int or not 0 <= number < len(_MEMBERS):
        raise Refused("a memory format that is none")
    return _MEMBERS[number]


def _member(owner: Any, name: Any) -> str:
    """Early releases of Python 3.11 store the member of an enumeration as an attribute."""
    right = isinstance(owner, _Function) and owner.call is _encoding
    if not right or type(name) is not str or name not in _MEMBERS:
        raise Refused(f"asks for the attribute {str(name)[:40]!a} of something")
    return name


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _layout,
    _ENCODING: _encoding,
    ("pathlib", "PosixPath"): _path,
    ("pathlib._local", "PosixPath"): _path,  # Python 3.13
    ("builtins", "getattr"): _member,
}


class _Unpickler(pickle._Unpickler):
    """Knows the steps of ``_STEPS`` alone."""

    # What the base class has and typeshed leaves out.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    _unframer: Any

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in _RECORDS:
            return _Class(key)
        if key in _FUNCTIONS:
            return _Function(_FUNCTIONS[key])
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise Refused(
            f"names {f'{module}.{name}'[:80]}, which an index of tensors does not need"
            if f"{module}{name}".isprintable()
            else "names something that an index of tensors does not need"
        )

    def load_frame(self) -> None:
        """As Python's, which also takes a frame that ends early: the unpickler in C does not."""
        (size,) = struct.unpack("<Q", self.read(8))
        self._unframer.load_frame(size)
        if self._unframer.current_frame.getbuffer().nbytes != size:
            raise Refused("a damaged pickle (a frame is cut off)")

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if isinstance(kind, _Function) and kind.call is _size:  # a class, to pickle
            self.append(_size(*arguments))
            return
        if not isinstance(kind, _Class) or arguments != ():
            raise Refused("makes an object of no class of an index")
        self.append(Record(kind.key[1], _RECORDS[kind.key]))

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Function) or type(arguments) is not tuple:
            raise Refused("calls what is no function of an index")
        self.append(function.call(*arguments))

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise Refused("sets attributes of something that has none")
        self.stack[-1].fill(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def load_setitems(self) -> None:
        self._put(self.pop_mark())

    def _put(self, pairs: list[Any]) -> None:
        if type(self.stack[-1]) is not dict or len(pairs) % 2:
            raise Refused("sets items of what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2]):
            place = isinstance(key, Record) and key.kind == "MetadataIndex" and key.fields
            if not (type(key) is str or place):
                raise Refused("a key that is no text")
            self.stack[-1][key] = value

    def load_append(self) -> None:
        self._extend([self.stack.pop()])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused("appends to what is no list")
        self.stack[-1].extend(values)


def _steps() -> dict[int, Callable[[Any], None]]:
    """What an index is made of: numbers, text, tuples, lists, dicts, names and the five above."""
    own = {
        pickle.NEWOBJ: _Unpickler.load_newobj,
        pickle.REDUCE: _Unpickler.load_reduce,
        pickle.BUILD: _Unpickler.load_build,
        pickle.SETITEM: _Unpickler.load_setitem,
        pickle.SETITEMS: _Unpickler.load_setitems,
        pickle.APPEND: _Unpickler.load_append,
        pickle.APPENDS: _Unpickler.load_appends,
        pickle.FRAME: _Unpickler.load_frame,
    }
    plain = (
        *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.MEMOIZE),
        *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
        *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1),
        *(pickle.BININT2, pickle.LONG1, pickle.SHORT_BINUNICODE, pickle.BINUNICODE),
        *(pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.TUPLE),
        *(pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.GLOBAL, pickle.STACK_GLOBAL),
    )
    known = pickle._Unpickler.dispatch
    return {**{step[0]: known[step[0]] for step in plain}, **{s[0]: f for s, f in own.items()}}


_Unpickler.dispatch = _steps()


def read_index(data: bytes) -> Any:
    """What a pickle holds, of `Record`, `Size`, dtypes and plain values.

    Raises:
        Refused: it is damaged, or has something that no index needs.
    """
    try:
        return _Unpickler(io.BytesIO(data)).load()
    # What the steps of Python's unpickler raise of bytes that are no pickle.
    except (
        *(pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, ValueError),
        *(AttributeError, MemoryError, OverflowError, RecursionError),
        struct.error,
    ) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise Refused(f"a damaged pickle ({reason[:100]!a})") from error

"""Pickles from strangers: numbers, texts, plain containers and numpy arrays of numbers, nothing else.

A pickle is a program. Here no name that it asks for is ever looked up: the few that numpy and the builtin containers
need stand for small objects of this file, which check what they are called with, and arrays are made from their bytes
after the program has ended. Before it runs, its opcodes are read once: those that could fill the memory or reach
outside are refused. The opcodes are those of pickletools; what numpy writes is `ndarray.__reduce_ex__`.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from vla.stores.errors import SourceError
from vla.stores.pointers import is_pointer, pointer_error

MAX_BYTES = 1 << 28
"""A longer file is refused: the planner's paths of one episode take well under a megabyte."""

MAX_OPCODES = 2_000_000
"""An array takes some twenty opcodes, a list of numbers one each."""

MAX_DEPTH = 32
"""Containers inside containers; a path is {arm: [{key: array}]}, three deep."""

MAX_CHARACTER = 0x10FFFF
"""The last code point of Unicode."""

ALLOWED = "numbers, texts, dict, list, tuple, set and numpy arrays of numbers"

_SAFE = frozenset(
    (
        "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT",
        "GET", "BINGET", "LONG_BINGET",
        "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT",
        "BINFLOAT",
        "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
        "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
        "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
        "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET",
        "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
    )
)  # fmt: skip
"""Left out: EXT* (a registry that skips `find_class`), persistent ids, INST, OBJ, NEWOBJ*, buffers out of band."""

_PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_DTYPE = re.compile(r"(b1|[iu][1248]|f[248]|[SU][1-9]\d{0,4})")
_PLAIN = (str, bytes, bool, int, float, type(None))


def load_pickle(path: Path) -> Any:
    """Read a pickle of protocol 0 to 5 as builtins and numpy arrays.

    Raises `SourceError` naming the file for anything but numbers, texts, builtin containers and arrays of bool, int,
    uint, float, bytes or str of fixed width; for damage; and for what would take memory that its bytes do not account
    for. Nothing that the file names is imported or called.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise SourceError(f"{path} has {size} bytes", expected=f"a pickle of at most {MAX_BYTES}")
        return loads(path.read_bytes(), str(path))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from None


def loads(data: bytes, where: str) -> Any:
    """Like `load_pickle` for bytes; `where` names them in errors."""
    if is_pointer(data):
        raise pointer_error(where)
    try:
        _scan(data)
        reader = _Reader(io.BytesIO(data), encoding="latin1")
        reader.known = _names(_Room(len(data)))
        return _Finish(_Room(len(data))).plain(reader.load(), 0)
    except _RefusedError as refused:
        raise SourceError(f"{where} {refused}", expected=f"a pickle of {ALLOWED}") from None
    # What pickle and pickletools raise on bytes cut or changed; RecursionError and MemoryError on hostile ones.
    except (
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        MemoryError,
        struct.error,
        DeprecationWarning,  # of a name with an odd escape, where warnings are errors
    ) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise SourceError(f"{where} is no sound pickle: {reason}", expected=f"a pickle of {ALLOWED}") from None


class _RefusedError(Exception):
    """Says what a pickle asked for."""


def _refuse(what: str) -> NoReturn:
    raise _RefusedError(what)


def _scan(data: bytes) -> None:
    """Read the opcodes without running them."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data), 1):
        if count > MAX_OPCODES:
            _refuse(f"has more than {MAX_OPCODES} opcodes")
        if opcode.name not in _SAFE:
            _refuse(f"uses the opcode {opcode.name}")
        # The C unpickler allocates its memo up to the highest index at once.
        if opcode.name in _PUTS and int(argument or 0) > count:
            _refuse(f"memoizes number {argument} after {count} opcodes")


class _Room:
    """Counts what is copied. A sound pickle has a byte for each; one that copies the same bytes again has not."""

    def __init__(self, left: int) -> None:
        self._left = left

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            _refuse("copies the same bytes again and again")


class _Call:
    """What stands for a name. Called, it does its one safe thing; it has no attributes that a pickle could set."""

    __slots__ = ("_make", "_name")

    def __init__(self, name: str, make: Callable[..., Any]) -> None:
        self._name, self._make = name, make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> NoReturn:
        _refuse(f"sets attributes of {self._name}")


class _Dtype:
    """`dtype(code, False, True)` and then its state: byte order, and no fields, shapes or metadata."""

    __slots__ = ("code", "is_big")

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            _refuse(f"has an array of dtype {str(code)[:40]!r}")
        self.code, self.is_big = code, False

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or not 8 <= len(state) <= 9 or state[1] not in ("<", ">", "|", "="):
            _refuse("has a dtype with an odd state")
        if any(part is not None for part in state[2:5]):
            _refuse("has an array with fields")
        self.is_big = state[1] == ">"

    def made(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(">" if self.is_big else "<")


class _Array:
    """An array before its bytes are known: `_reconstruct` makes it, its state fills it."""

    __slots__ = ("_state",)

    def __init__(self, state: tuple[Any, ...] | None = None) -> None:
        self._state = state

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            _refuse("has an array with an odd state")
        _, shape, dtype, is_fortran, data = state
        self._state = (data, dtype, shape, "F" if is_fortran else "C")

    def made(self) -> np.ndarray[Any, Any]:
        if self._state is None:
            _refuse("has an array without content")
        data, dtype, shape, order = self._state
        if not isinstance(dtype, _Dtype) or not isinstance(data, (bytes, bytearray)):
            _refuse("has an array of objects")
        if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
            _refuse(f"has an array of shape {str(shape)[:40]}")
        kind = dtype.made()
        if math.prod(shape) * kind.itemsize != len(data) or order not in ("C", "F"):
            _refuse(f"has {len(data)} bytes for an array {kind} of shape {shape}")
        # numpy makes texts of whatever is there, and Python fails on them later.
        if (
            kind.kind == "U"
            and np.frombuffer(data, np.dtype("u4").newbyteorder(kind.byteorder)).max(initial=0) > MAX_CHARACTER
        ):
            _refuse("has an array of texts that are no Unicode")
        native = np.frombuffer(bytes(data), kind).reshape(shape, order=order)
        return native.astype(kind.newbyteorder("="), copy=True)


def _names(room: _Room) -> dict[tuple[str, str], _Call]:
    """Return what each permitted name stands for, made anew for each pickle."""

    def empty_array(kind: Any, shape: Any, dtype: Any) -> _Array:
        if kind is not ndarray or shape != (0,):
            _refuse(f"makes an array of shape {str(shape)[:40]} out of nothing")
        return _Array()

    def scalar(dtype: Any, data: Any) -> _Array:
        return _Array((data, dtype, (), "C"))

    def container(name: str, make: Callable[[Any], Any], kinds: tuple[type, ...]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if len(arguments) > 1 or not all(isinstance(argument, kinds) for argument in arguments):
                _refuse(f"calls {name} with {', '.join(type(argument).__name__ for argument in arguments)}")
            room.take(len(arguments[0]) if arguments else 0)
            return make(arguments[0]) if arguments else make(())

        return call

    def encode(text: Any, encoding: Any = "") -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            _refuse(f"encodes a text as {str(encoding)[:40]!r}")
        room.take(len(text))
        return text.encode("latin1")

    ndarray = _Call("ndarray", lambda *_: _refuse("calls numpy.ndarray"))
    plain = {
        "set": container("set", set, (list, tuple)),
        "frozenset": container("frozenset", frozenset, (list, tuple)),
        "bytes": container("bytes", bytes, (bytes,)),
        "bytearray": container("bytearray", bytearray, (bytes,)),
        "dict": container("dict", dict, (list,)),
    }
    found = {(module, name): call for module in ("builtins", "__builtin__") for name, call in plain.items()}
    found[("_codecs", "encode")] = encode
    found[("collections", "OrderedDict")] = plain["dict"]
    for package in ("numpy.core", "numpy._core"):
        found[(f"{package}.multiarray", "_reconstruct")] = empty_array
        found[(f"{package}.multiarray", "scalar")] = scalar
        found[(f"{package}.numeric", "_frombuffer")] = lambda *state: _Array(state if len(state) == 4 else None)
    found[("numpy", "dtype")] = _Dtype
    return {key: _Call(key[1], make) for key, make in found.items()} | {("numpy", "ndarray"): ndarray}


class _Reader(pickle.Unpickler):
    known: dict[tuple[str, str], _Call]

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name. Nothing is imported."""
        if (module, name) not in self.known:
            _refuse(f"asks for {module[:60]}.{name[:60]}")
        return self.known[(module, name)]

    def persistent_load(self, pid: Any) -> Any:
        """Refuse: a persistent id means whatever the reader of a file lets it mean."""
        _refuse("has a persistent id")


class _Finish:
    """Turns what a pickle left into builtins and arrays; each object once, however often it is referred to."""

    def __init__(self, room: _Room) -> None:
        self._room = room
        self._done: dict[int, Any] = {}
        self._open: set[int] = set()

    def plain(self, value: Any, depth: int) -> Any:
        if isinstance(value, (*_PLAIN, bytearray)):
            return value
        key = id(value)
        if key not in self._done:
            if depth > MAX_DEPTH or key in self._open:
                _refuse(f"has containers more than {MAX_DEPTH} deep")
            self._open.add(key)
            self._done[key] = self._made(value, depth + 1)
            self._open.discard(key)
        return self._done[key]

    def _made(self, value: Any, depth: int) -> Any:
        if isinstance(value, _Array):
            array = value.made()
            self._room.take(array.nbytes)
            return array.item() if array.ndim == 0 else array
        if isinstance(value, dict):
            if not all(isinstance(key, _PLAIN) for key in value):
                _refuse("has keys that are no numbers or texts")
            return {key: self.plain(item, depth) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.plain(item, depth) for item in value)
        if isinstance(value, (set, frozenset)) and all(isinstance(item, _PLAIN) for item in value):
            return type(value)(value)
        return _refuse(f"holds a {type(value).__name__.lstrip('_').lower()}")

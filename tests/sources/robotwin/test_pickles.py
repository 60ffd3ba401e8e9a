"""Pickles from strangers: what planners write is read, everything else is refused, and nothing is ever run."""

from __future__ import annotations

import builtins
import codecs
import collections
import contextlib
import copyreg
import io
import operator
import os
import pickle
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.featurize.sources import pickles
from vla.featurize.sources.pickles import load_pickle, loads
from vla.stores.errors import SourceError

VALUES: dict[str, Any] = {
    "left": [{"status": "Success", "position": np.arange(12.0).reshape(2, 6), "velocity": np.zeros((2, 6))}],
    "pairs": [(np.arange(6, dtype=np.float32), 0.5)],
    "fortran": np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
    "strided": np.arange(10)[::2],
    "scalars": [np.float32(1.5), np.int64(-3), np.bool_(True), np.str_("Fail")],
    "texts": np.array(["ab", "c"]),
    "empty": [np.zeros((0, 6)), b"", {}, set()],
    "plain": ["é", None, True, 1e300, 10**30, b"x\xff", bytearray(b"hi"), {1, 2}, frozenset([3])],
    "ordered": collections.OrderedDict(a=1),
}


class Calls:
    """Pickles as a call: what `__reduce__` returns is called by whoever loads it."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that every hostile pickle tries to make."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b) and a.dtype.newbyteorder("=") == b.dtype
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("protocol", range(6))
def test_numbers_texts_containers_and_arrays_come_back_in_every_protocol(protocol: int, tmp_path: Path) -> None:
    file = tmp_path / "episode0.pkl"
    file.write_bytes(pickle.dumps(VALUES, protocol))
    assert equal(VALUES, load_pickle(file))


def test_numpy_1_names_are_known_too() -> None:
    data = pickle.dumps(np.arange(3.0), 3).replace(b"numpy._core", b"numpy.core")
    assert equal(np.arange(3.0), loads(data, "x"))


def test_an_object_that_is_shared_is_made_once() -> None:
    array = np.arange(3.0)
    a, b = loads(pickle.dumps([array, array]), "x")
    assert a is b


def _commands(canary: Path) -> dict[str, Any]:
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": Calls(os.system, touch),
        "subprocess": Calls(subprocess.check_call, ["touch", str(canary)]),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "open": Calls(open, str(canary), "w"),
        "import": Calls(__import__, "os"),
        "compile": Calls(compile, code, "x", "exec"),
        "os.mkdir": Calls(os.mkdir, str(canary)),
        "pathlib": Path(canary),
        "operator": Calls(operator.methodcaller, "touch"),
        "copyreg": Calls(copyreg._reconstructor, dict, object, None),  # type: ignore[attr-defined]
        "numpy.load": Calls(np.load, str(canary), None, True),
        "numpy.save": Calls(np.save, str(canary), 1),
        "numpy.fromfile": Calls(np.fromfile, str(canary)),
        "defaultdict": collections.defaultdict(list),
        "a function": os.system,
        "a class": dict,
        "an exception": ValueError("x"),
        "breakpoint": builtins.breakpoint,
    }


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", list(_commands(Path("x"))))
def test_a_pickle_that_calls_is_refused_and_nothing_is_called(name: str, protocol: int, canary: Path) -> None:
    hostile = _commands(canary)[name]
    for place in (hostile, {"left_joint_path": [{"position": hostile}]}, [np.zeros(3), (hostile,)]):
        with pytest.raises(SourceError, match=r"^bad\.pkl (asks for|uses|calls|holds|sets|is no sound)"):
            loads(pickle.dumps(place, protocol), "bad.pkl")


def test_calls_hidden_in_arrays_keys_and_states_are_refused(canary: Path) -> None:
    call = Calls(os.system, f"touch {canary}")
    objects = np.array([call, None], dtype=object)
    for hostile in (objects, {1: objects}, {(call,): 1}, Calls(dict, state={"x": call})):
        with pytest.raises(SourceError):
            loads(pickle.dumps(hostile), "bad.pkl")
    with pytest.raises(SourceError, match="array of dtype 'O8'"):
        loads(pickle.dumps(np.array([1, "x"], dtype=object)), "bad.pkl")


def test_a_pickle_of_torch_is_refused(canary: Path) -> None:
    data = b"ctorch._utils\n_rebuild_tensor_v2\n(tR."
    with pytest.raises(SourceError, match=r"asks for torch\._utils\._rebuild_tensor_v2"):
        loads(data, "bad.pkl")


RAW: dict[str, tuple[bytes, str]] = {
    "GLOBAL and REDUCE": (b"cos\nsystem\n(S'touch CANARY'\ntR.", "asks for os.system"),
    "INST": (b"(S'touch CANARY'\nios\nsystem\n.", "uses the opcode INST"),
    "OBJ": (b"(cos\nsystem\nS'touch CANARY'\no.", "uses the opcode OBJ"),
    "NEWOBJ": (b"\x80\x02cnumpy\nndarray\n(tR\x81.", "uses the opcode NEWOBJ"),
    "persistent id": (b"Pos\n.", "uses the opcode PERSID"),
    "binary persistent id": (b"\x80\x02K\x01Q.", "uses the opcode BINPERSID"),
    "extension registry": (b"\x80\x02\x82\x01.", "uses the opcode EXT1"),
    "buffer out of band": (b"\x80\x05\x97.", "uses the opcode NEXT_BUFFER"),
    "dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", "asks for numpy.ndarray.__init__"),
    "name that is no text": (b"\x80\x04K\x01K\x02\x93.", "no sound pickle"),
    "memo bomb": (b"K\x01r\xff\xff\xff\x7f.", "memoizes number 2147483647"),
    "memo bomb in text": (b"K\x01p2000000000\n.", "memoizes number 2000000000"),
    "bytes bomb": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.", "no sound pickle"),
    "bytes bomb beyond 63 bits": (b"\x80\x04\x8e" + struct.pack("<Q", (1 << 64) - 1) + b"x.", "no sound pickle"),
    "bytearray bomb": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.", "no sound pickle"),
    "text bomb": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"x.", "no sound pickle"),
    "frame bomb": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.", "no sound pickle"),
    "number bomb": (b"I" + b"9" * 10_000 + b"\n.", "no sound pickle"),
    "negative length": (b"\x80\x02T\xff\xff\xff\xffx.", "no sound pickle"),
    "empty": (b"", "no sound pickle"),
    "no end": (b"\x80\x04N", "no sound pickle"),
    "empty stack": (b".", "no sound pickle"),
    "a mark is left": (b"(.", "no sound pickle"),
    "unknown opcode": (b"\x80\x04\xff.", "no sound pickle"),
    "protocol 200": (b"\x80\xc8N.", "no sound pickle"),
    "call of a text": (b"\x80\x04\x8c\x01x)R.", "no sound pickle"),
    "state of a list": (b"\x80\x04]}b.", "no sound pickle"),
    "state of a name": (b"\x80\x04cnumpy\nndarray\n}b.", "sets attributes of ndarray"),
    "a name alone": (b"cnumpy\nndarray\n.", "holds a call"),
    "unhashable key": (b"\x80\x04}]K\x01s.", "no sound pickle"),
    "ndarray called": (b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.", "calls numpy.ndarray"),
    "array out of nothing": (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\xff\xff\xff\x7f\x85C\x01b\x87R.",
        "makes an array of shape",
    ),
    "array without content": (
        b"\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R.",
        "array without content",
    ),
    "bytearray of a number": (b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "calls bytearray with int"),
    "bytes of a number": (b"\x80\x02cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R.", "calls bytes with int"),
    "another codec": (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x04\x00\x00\x00zlib\x86R.", "encodes a text as"),
}


@pytest.mark.parametrize("name", RAW)
def test_an_opcode_trick_is_refused(name: str, canary: Path) -> None:
    data, message = RAW[name]
    with pytest.raises(SourceError, match=message):
        loads(data.replace(b"CANARY", str(canary).encode()), "bad.pkl")


def _reduced(shape: Any, dtype: str, data: Any, state: tuple[Any, ...] | None = None) -> bytes:
    """Pickle an array with a state of one's own."""

    class Forged:
        def __reduce__(self) -> tuple[Any, ...]:
            kind = Calls(np.dtype, dtype, False, True, state=state or (3, "<", None, None, None, -1, -1, 0))
            make = np.zeros(1).__reduce__()[0]
            return make, (np.ndarray, (0,), b"b"), (1, shape, kind, False, data)

    return pickle.dumps(Forged())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_reduced((1 << 40,), "f8", b"\0" * 8), "8 bytes for an array"),
        (_reduced((2, 3), "f8", b"\0" * 47), "47 bytes for an array"),
        (_reduced((-1,), "f8", b"\0" * 8), "array of shape"),
        (_reduced((1.0,), "f8", b"\0" * 8), "array of shape"),
        (_reduced((1,) * 40, "f8", b"\0" * 8), "array of shape"),
        (_reduced((1,), "f8", [1.0]), "array of objects"),
        (_reduced((1,), "U1", b"\xff\xff\xff\xff"), "texts that are no Unicode"),
        (_reduced((1,), "U1", b"\0\x11\0\0", (3, ">", None, None, None, 4, 4, 8)), "texts that are no Unicode"),
        (_reduced((1,), "O", [len]), "asks for|dtype 'O'"),
        (_reduced((1 << 60,), "S0", b""), "dtype 'S0'"),
        (_reduced((1,), "V8", b"\0" * 8), "dtype 'V8'"),
        (_reduced((1,), "M8", b"\0" * 8), "dtype 'M8'"),
        (_reduced((1,), "f8,O", b"\0" * 8), "dtype 'f8,O'"),
        (_reduced((1,), "f8", b"\0" * 8, (3, "<", None, ("a",), {"a": 1}, 8, 1, 0)), "array with fields"),
        (_reduced((1,), "f8", b"\0" * 8, (3, "<", (1, 2), None, None, 8, 1, 0)), "array with fields"),
        (_reduced((1,), "f8", b"\0" * 8, (3, "?", None, None, None, 8, 1, 0)), "odd state"),
    ],
)
def test_a_forged_array_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        loads(data, "bad.pkl")


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_cut_anywhere_is_refused(protocol: int) -> None:
    whole = pickle.dumps(VALUES, protocol)
    for length in range(0, len(whole) - 1, 7):
        with pytest.raises(SourceError):
            loads(whole[:length], "bad.pkl")


def test_bytes_changed_at_random_are_read_or_refused() -> None:
    generator = np.random.default_rng(0)
    whole = [pickle.dumps(VALUES, protocol) for protocol in range(6)]
    for turn in range(900):
        damaged = bytearray(whole[turn % 6])
        for place in generator.integers(0, len(damaged), generator.integers(1, 5)):
            damaged[place] = generator.integers(256)
        with contextlib.suppress(SourceError):
            loads(bytes(damaged), "bad.pkl")


def test_containers_inside_themselves_and_too_deep_are_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    deep: list[Any] = []
    for _ in range(40):
        deep = [deep]
    for hostile in (pickle.dumps(loop), pickle.dumps(deep), b"]" * 100_000 + b"a" * 99_999 + b"."):
        with pytest.raises(SourceError, match="more than 32 deep"):
            loads(hostile, "bad.pkl")


def test_lists_of_lists_that_double_take_no_time() -> None:
    laughs: list[Any] = ["ha"]
    for _ in range(30):
        laughs = [laughs, laughs]
    assert len(loads(pickle.dumps(laughs), "x")) == 2  # 2^30 items, were each counted


def test_bytes_that_are_copied_again_and_again_are_refused() -> None:
    text, data, many = "x" * 5000, b"\0" * 8000, list(range(3000))
    reconstruct = np.zeros(1).__reduce__()[0]
    arrays = [
        Calls(reconstruct, np.ndarray, (0,), b"b", state=(1, (1000,), np.dtype("f8"), False, data)) for _ in range(50)
    ]
    for hostile in (
        arrays,
        [Calls(codecs.encode, text, "latin1") for _ in range(50)],
        [Calls(bytearray, data) for _ in range(50)],
        [Calls(set, many) for _ in range(50)],
    ):
        with pytest.raises(SourceError, match="copies the same bytes again and again"):
            loads(pickle.dumps(hostile), "bad.pkl")
        loads(pickle.dumps(hostile[0]), "x")


def test_size_and_opcodes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "big.pkl"
    file.write_bytes(pickle.dumps([0] * 100))
    monkeypatch.setattr(pickles, "MAX_OPCODES", 50)
    with pytest.raises(SourceError, match=r"big\.pkl has more than 50 opcodes"):
        load_pickle(file)
    monkeypatch.setattr(pickles, "MAX_BYTES", 50)
    with pytest.raises(SourceError, match=r"big\.pkl has \d+ bytes; expected a pickle of at most 50"):
        load_pickle(file)


def test_one_pickle_cannot_change_what_the_next_one_means() -> None:
    for name in ("numpy\ndtype", "numpy.core.multiarray\n_reconstruct", "builtins\nset", "_codecs\nencode"):
        module = name.encode()
        with pytest.raises(SourceError, match="sets attributes"):
            loads(b"\x80\x04c" + module + b"\nN}\x8c\x0c__defaults__)s\x86b.", "bad.pkl")
    assert equal(VALUES, loads(pickle.dumps(VALUES), "x"))


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot read .*nowhere\.pkl: No such file"):
        load_pickle(tmp_path / "nowhere.pkl")


def test_the_attacks_would_work_on_pickle_itself(tmp_path: Path) -> None:
    canary = tmp_path / "made"
    pickle.Unpickler(io.BytesIO(pickle.dumps(_commands(canary)["os.system"]))).load()
    assert canary.exists()

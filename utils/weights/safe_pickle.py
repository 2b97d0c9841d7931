"""Read pickles that come from elsewhere without running any of them.

The standard library's own unpickler, the one in Python, with its table of opcodes cut to what plain data needs. A
global is a name to it, never an object: the few names that stand for data (numpy arrays, dtypes, bytes) are answered by
functions of this file, any other ends the reading. Nothing is imported or called because the file asks for it, and
every length is compared with what is left of the file before anything is allocated.

Two policies. ``.bin`` verification sets: lists, tuples, bytes, bools, uint8 arrays, and labels as arrays or numpy
scalars. Weights (``.pdparams``, Paddle's ``.pkl``): dictionaries, lists, tuples, strings, numbers, numeric arrays.
"""

import math
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from pickle import BUILD, BYTEARRAY8, DICT, FLOAT, FRAME, GET, INT, LONG, MARK, PUT, REDUCE, SETITEM, SETITEMS, STOP

import numpy as np

from utils.errors import UserError
from utils.files import describe_bytes

MAX_STACK = 1 << 19
MAX_NESTING = 64
MAX_READS = 1 << 24  # an opcode of one byte may make an object of 64
MAX_DIGITS = 640  # of numbers written as text, whose parsing takes the square of it
LARGEST_KEY = 1 << 60  # larger integers can be chosen to have one hash
DAMAGE = (pickle.UnpicklingError, ValueError, TypeError, LookupError, struct.error, OverflowError, AttributeError,
          EOFError, RecursionError)  # fmt: skip


class UnsafePickleError(UserError):
    """A pickle that holds more than data, or is malformed. Nothing in it was executed."""


class Name:
    """A global that the policy knows. ``call``: what answers for it; None where it is an argument only."""

    def __init__(self, full: str, call: Callable | None) -> None:
        self.full, self.call = full, call


class _Dtype:
    def __init__(self, text: object, *flags: object) -> None:
        text = _text(text)
        if len(text) > 4 or text.lstrip("<>|=")[:1] not in tuple("biufc?"):
            raise ValueError(f"a dtype {text[:20]!r}")
        self.value = np.dtype(text)

    def set_state(self, state: tuple) -> None:
        if any(part is not None for part in state[2:5]):
            raise ValueError("a structured dtype")
        if (order := _text(state[1])) in ("<", ">"):
            self.value = self.value.newbyteorder(order)


class _Array:
    """An array; its value comes with the state that is set on it."""

    def __init__(self, *ignored: object) -> None:
        self.value: np.ndarray | None = None

    def set_state(self, state: tuple) -> None:
        shape, dtype, fortran, raw = state[-4:]
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: object, dtype: object, shape: object, order: object = "C") -> np.ndarray:
    """A view of ``raw``."""
    if not (isinstance(raw, bytes) and isinstance(dtype, _Dtype) and isinstance(shape, tuple)):
        raise TypeError("an array made of something else than bytes, dtype and shape")
    if len(shape) > 32 or any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"an array of shape {str(shape)[:60]}")
    if math.prod(shape) * dtype.value.itemsize != len(raw):
        raise ValueError(f"an array of shape {str(shape)[:60]} and {dtype.value} in {len(raw)} bytes")
    return np.frombuffer(raw, dtype.value).reshape(shape, order=_text(order))


def _encode(text: object, encoding: object = "latin1") -> bytes:
    if not isinstance(text, str) or _text(encoding) not in ("latin1", "latin-1"):
        raise ValueError("an encoding other than latin1")
    return text.encode("latin1")


def _bytes(*arguments: object) -> bytes:
    if len(arguments) == 2:
        return _encode(*arguments)
    if arguments and not (len(arguments) == 1 and isinstance(arguments[0], bytes | list)):
        raise TypeError("bytes made of something else")  # bytes(n) would allocate what the file claims
    return bytes(*arguments)


def _sequence(kind: type) -> Callable:
    def make(items: object = ()) -> object:
        if not isinstance(items, list | tuple):
            raise TypeError(f"a {kind.__name__} made of something else than items")
        return kind(items)

    return make


def _dictionary(kind: type) -> Callable:
    def make(items: object = ()) -> dict:
        return kind((_key(key), value) for key, value in _sequence(list)(items))

    return make


def _key(key: object) -> object:
    """A dictionary key, checked before it is hashed."""
    if isinstance(key, bytes):  # a Python 2 string
        return key.decode("utf-8")
    if not (type(key) is str or (isinstance(key, int) and abs(key) < LARGEST_KEY)):
        raise TypeError(f"a dictionary key of type {type(key).__name__.strip('_')}")
    return key


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise TypeError(f"text expected, found a {type(value).__name__.strip('_')}")
    return value


def _both(name: str, call: Callable) -> dict[str, Callable]:
    return {f"{module}.{name}": call for module in ("builtins", "__builtin__")}


BIN_NAMES: dict[str, Callable | None] = {
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": lambda dtype, raw: _array(raw, dtype, ())[()] for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array for core in ("core", "_core")},
    "numpy.ndarray": None,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,
    **_both("bytes", _bytes),
    **_both("bytearray", _bytes),
}
WEIGHT_NAMES = {
    **BIN_NAMES,
    "collections.OrderedDict": _dictionary(OrderedDict),
    **_both("tuple", _sequence(tuple)),
    **_both("list", _sequence(list)),
    **_both("dict", _dictionary(dict)),
}


class _Source:
    """The pickle's bytes; what is claimed is compared with what is left before it is read."""

    def __init__(self, data: bytes, start: int = 0) -> None:
        self.data, self.position, self.num_reads = data, start, 0
        self.machine: SafeUnpickler | None = None

    def read(self, size: int) -> bytes:
        left = len(self.data) - self.position
        if size > left:
            raise EOFError(f"a length of {size} bytes is claimed where {left} are left: cut or malicious")
        self.num_reads += 1
        if self.num_reads > MAX_READS or len(self.machine.stack) > MAX_STACK:
            raise ValueError(f"more than {MAX_READS} values, or {MAX_STACK} at once")
        self.position += size
        return self.data[self.position - size : self.position]

    def readline(self) -> bytes:
        stop = self.data.find(b"\n", self.position) + 1
        if stop == 0:
            raise EOFError("a text argument without an end")
        line, self.position = self.data[self.position : stop], stop
        return line


# Opcodes that stay as the standard library has them: push a value, make a sequence, append, memo, name a global.
_KEPT = b"\x8001N\x88\x89JKM\x8aGSTUBC\x8eVX\x8c\x8d])}lt\x85\x86\x87aeqr\x94hjc\x93"


class _Opcodes(dict):
    def __missing__(self, code: int):
        raise pickle.UnpicklingError(f"pickle opcode {bytes([code])!r} is not one that plain data needs")

    def copy_with(self, code: int) -> "_Opcodes":
        """With one more of the standard library's."""
        return _Opcodes(self | {code: pickle._Unpickler.dispatch[code]})


class SafeUnpickler(pickle._Unpickler):
    """Unpickles plain data. ``load`` may be called again where one pickle follows another in the same bytes.

    Args:
        path: for messages.
        data: the pickle and what follows it; the reading starts at ``start``.
        names: full name -> what answers a call of it.

    Raises (``load``): UnsafePickleError.
    """

    def __init__(self, path: str | os.PathLike, data: bytes, names: dict[str, Callable | None], start: int = 0) -> None:
        self.path, self.names, self.source = path, names, _Source(data, start)
        self.source.machine = self
        self.stack: list = []
        super().__init__(self.source, encoding="bytes")  # Python 2's strings

    def load(self) -> object:
        self.memo.clear()
        try:
            return super().load()
        except DAMAGE as error:
            place = f"byte {self.source.position} of {len(self.source.data)}"
            raise UnsafePickleError(f"{self.path}: {error} ({place}); refused, nothing was executed") from error

    def find_class(self, module: str, name: str) -> Name:
        full = f"{module}.{name}"
        if full not in self.names:
            raise pickle.UnpicklingError(f"the name {full} is not data")
        return Name(full, self.names[full])

    def load_mark(self) -> None:
        if len(self.metastack) >= MAX_NESTING:
            raise pickle.UnpicklingError(f"nested more than {MAX_NESTING} deep")
        pickle._Unpickler.load_mark(self)

    def load_stop(self) -> None:
        if len(self.stack) != 1 or self.metastack:
            raise pickle.UnpicklingError(f"{len(self.stack)} values are left where one belongs")
        raise pickle._Stop(self.stack.pop())

    def load_frame(self) -> None:
        self.read(8)  # how long it is: of no use, as all bytes are at hand

    def load_bytearray8(self) -> None:
        self.append(self.read(*struct.unpack("<Q", self.read(8))))

    def load_number(self) -> None:
        line = self.readline().strip()
        if len(line) > MAX_DIGITS:
            raise pickle.UnpicklingError(f"a number of {len(line)} digits")
        self.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line.rstrip(b"L")))

    def load_float(self) -> None:
        line = self.readline()
        if len(line) > MAX_DIGITS:
            raise pickle.UnpicklingError(f"a number of {len(line)} digits")
        self.append(float(line))

    def load_put(self) -> None:
        self.memo[_key(int(self.readline()[:20]))] = self.stack[-1]

    def load_get(self) -> None:
        self.append(self.memo[_key(int(self.readline()[:20]))])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def _set(self, items: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise pickle.UnpicklingError("items set on what is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def load_reduce(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if not (isinstance(called, Name) and called.call is not None and isinstance(arguments, tuple)):
            raise pickle.UnpicklingError("a call of what is not a known name")
        self.append(called.call(*arguments))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, dict):
            return  # attributes of a state dict (the versions of its modules): of no use here
        if not (isinstance(target, _Array | _Dtype) and isinstance(state, tuple)):
            raise pickle.UnpicklingError("a state for what is neither an array nor a dtype")
        target.set_state(state)

    dispatch = _Opcodes({code: handler for code, handler in pickle._Unpickler.dispatch.items() if code in _KEPT})
    dispatch |= {MARK[0]: load_mark, STOP[0]: load_stop, FRAME[0]: load_frame, BYTEARRAY8[0]: load_bytearray8}
    dispatch |= {INT[0]: load_number, LONG[0]: load_number, FLOAT[0]: load_float, PUT[0]: load_put, GET[0]: load_get}
    dispatch |= {SETITEM[0]: load_setitem, SETITEMS[0]: load_setitems, DICT[0]: load_dict}
    dispatch |= {REDUCE[0]: load_reduce, BUILD[0]: load_build}


def finished(path: str | os.PathLike, root: object, allowed: tuple[type, ...], leaf: Callable | None = None) -> object:
    """A copy of what was unpickled with arrays in place; every object that is not of ``allowed`` types is refused.

    ``leaf``: called for each object that is no container, for what the caller's own names made. A container that
    occurs many times is copied once.
    """
    done: dict[int, object] = {}

    def copy(item: object, depth: int) -> object:
        if isinstance(item, _Array):
            item = item.value
        elif leaf is not None:
            item = leaf(item)
        if not isinstance(item, allowed):
            what = f"the name {item.full}" if isinstance(item, Name) else f"a {type(item).__name__.strip('_')}"
            raise UnsafePickleError(f"{path}: holds {what}, which this kind of file must not")
        if not isinstance(item, list | tuple | dict):
            return item
        if depth > MAX_NESTING:
            raise UnsafePickleError(f"{path}: nested more than {MAX_NESTING} deep")
        if id(item) not in done:
            done[id(item)] = _OPEN
            if isinstance(item, dict):
                done[id(item)] = type(item)((key, copy(part, depth + 1)) for key, part in item.items())
            else:
                done[id(item)] = type(item)(copy(part, depth + 1) for part in item)
        if done[id(item)] is _OPEN:
            raise UnsafePickleError(f"{path}: holds a {type(item).__name__} that is part of itself")
        return done[id(item)]

    return copy(root, 0)


_OPEN = object()
PLAIN = (dict, list, tuple, str, bytes, int, float, bool, type(None), np.generic, np.ndarray)


def load_bin_pickle(path: str | os.PathLike) -> object:
    """The value of a ``.bin`` pickle (Python 2 or 3): lists, tuples, bytes, bools, ints and uint8 arrays; in the second
    of two values (the labels) also floats, numpy's scalars and arrays of any numbers.

    Raises:
        OSError: the file cannot be read.
        UnsafePickleError: anything else is in it, or it is cut or malformed.
    """
    value = finished(path, SafeUnpickler(path, _read(path), BIN_NAMES).load(), PLAIN)
    narrow, labels = (
        (list, tuple, bytes, bool, int, np.ndarray),
        (list, tuple, bool, int, float, np.generic, np.ndarray),
    )
    if isinstance(value, list | tuple) and len(value) == 2:
        todo = [(value[0], narrow), (value[1], labels)]
    else:
        todo = [(value, narrow)]
    seen = set()
    while todo:
        item, allowed = todo.pop()
        if (id(item), allowed) in seen:
            continue
        seen.add((id(item), allowed))
        odd_array = isinstance(item, np.ndarray) and allowed is narrow and item.dtype != np.uint8
        if not isinstance(item, allowed) or odd_array:
            what = f"an array of {item.dtype}" if odd_array else f"a {type(item).__name__}"
            raise UnsafePickleError(f"{path}: holds {what}, which this kind of file must not")
        if isinstance(item, list | tuple):
            todo += [(part, allowed) for part in item]
    return value


def load_weights_pickle(path: str | os.PathLike) -> object:
    """The value of a ``.pdparams`` or ``.pkl``: dicts, lists, tuples, str, bytes, numbers, None and numeric arrays.

    Arrays are read-only views of the file's bytes.

    Raises:
        OSError: the file cannot be read.
        UnsafePickleError: anything else is in it, or it is cut or malformed.
    """
    return finished(path, SafeUnpickler(path, _read(path), WEIGHT_NAMES).load(), PLAIN)


def _read(path: str | os.PathLike) -> bytes:
    data = Path(path).read_bytes()
    refuse_other_kinds(path, data[:1024], "a pickle")
    return data


def refuse_other_kinds(path: str | os.PathLike, head: bytes, wanted: str) -> None:
    """A web page, a git-LFS pointer, gzip data ... is named for what it is, by its first bytes."""
    kind = describe_bytes(head)
    if not kind.startswith((wanted, "a pickle", "of no known kind", "a text file")):  # old pickles look like text
        raise UnsafePickleError(f"{path}: {wanted} was expected; it is {kind}")

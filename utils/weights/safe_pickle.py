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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import BUILD, BYTEARRAY8, DICT, FRAME, GET, INT, LONG, MARK, PUT, REDUCE, SETITEM, SETITEMS, STOP
from types import SimpleNamespace

import numpy as np

from utils.errors import UserError
from utils.files import describe_bytes

MAX_STACK = 1 << 19
MAX_NESTING = 64
MAX_READS = 1 << 24  # an opcode of one byte may make an object of 64
MAX_DIGITS = 640  # of numbers written as text, whose parsing takes the square of it
LARGEST_KEY = 1 << 60  # larger integers can be chosen to have one hash
_CUT = (pickle.UnpicklingError, struct.error, EOFError)
DAMAGE = (*_CUT, ValueError, TypeError, LookupError, OverflowError, AttributeError, RecursionError)


class UnsafePickleError(UserError):
    """A pickle that holds more than data, or is malformed. Nothing in it was executed."""


@dataclass(eq=False)
class Name:
    """A global that the policy knows. ``call``: what answers for it; None where it is an argument only."""

    full: str
    call: Callable | None = None

    def __call__(self, *arguments: object) -> object:
        if self.call is None:
            raise pickle.UnpicklingError(f"a call of {self.full}, which is an argument only")
        return self.call(*arguments)


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


def _sequence(kind: type, items: object = ()) -> object:
    if not isinstance(items, list | tuple):
        raise TypeError(f"a {kind.__name__} made of something else than items")
    return kind(items)


def _dictionary(kind: type, items: object = ()) -> dict:
    return kind((_key(key), value) for key, value in _sequence(list, items))


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


# By the names of Python 3 and numpy 1; see ``SafeUnpickler.find_class``.
BIN_NAMES: dict[str, Callable | None] = {
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": lambda dtype, raw: _array(raw, dtype, ())[()],
    "numpy.core.numeric._frombuffer": _array,
    "numpy.ndarray": None,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encode,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
}
WEIGHT_NAMES = BIN_NAMES | {
    "collections.OrderedDict": partial(_dictionary, OrderedDict),
    "builtins.tuple": partial(_sequence, tuple),
    "builtins.list": partial(_sequence, list),
    "builtins.dict": partial(_dictionary, dict),
}


# Opcodes that stay as the standard library has them: push a value, make a sequence, append, memo, name a global.
_KEPT = b"F\x8001N\x88\x89JKM\x8aGSTUBC\x8eVX\x8c\x8d])}lt\x85\x86\x87aeqr\x94hjc\x93"


class Opcodes(dict):
    """Code -> what handles it; any other is refused."""

    def __missing__(self, code: int):
        raise pickle.UnpicklingError(f"pickle opcode {bytes([code])!r} is not one that plain data needs")


class SafeUnpickler(pickle._Unpickler):
    """Unpickles plain data. ``load`` may be called again where one pickle follows another in the same bytes.

    Args:
        path: for messages.
        data: the pickle and what follows it.
        names: full name -> what answers a call of it.

    Raises (``load``): UnsafePickleError.
    """

    def __init__(self, path: str | os.PathLike, data: bytes, names: dict[str, Callable | None]) -> None:
        self.path, self.names, self.data, self.position, self.num_reads = path, names, data, 0, 0
        self.stack: list = []
        # Python 2's strings are bytes.
        super().__init__(SimpleNamespace(read=self.read_bytes, readline=self.read_line), encoding="bytes")

    def read_bytes(self, size: int) -> bytes:
        """So many bytes; what is claimed is compared with what is left before anything is allocated."""
        left = len(self.data) - self.position
        if size > left:
            raise EOFError(f"a length of {size} bytes is claimed where {left} are left: cut or malicious")
        self.num_reads += 1
        if self.num_reads > MAX_READS or len(self.stack) > MAX_STACK:
            raise ValueError(f"more than {MAX_READS} values, or {MAX_STACK} at once")
        self.position += size
        return self.data[self.position - size : self.position]

    def read_line(self) -> bytes:
        """A text argument."""
        stop = self.data.find(b"\n", self.position) + 1
        if stop == 0:
            raise EOFError("a text argument without an end")
        line, self.position = self.data[self.position : stop], stop
        return line

    def load(self) -> object:
        self.memo.clear()
        try:
            return super().load()
        except DAMAGE as error:
            place = f"byte {self.position} of {len(self.data)}"
            raise UnsafePickleError(f"{self.path}: {error} ({place}); refused, nothing was executed") from error

    def find_class(self, module: str, name: str) -> Name:
        """The name, whether Python 2 and numpy 1 spell it or what came after them."""
        full = f"{module}.{name}".replace("__builtin__.", "builtins.").replace("numpy._core.", "numpy.core.")
        if full not in self.names:
            return self.unknown(full)
        return Name(full, self.names[full])

    def unknown(self, full: str) -> Name:
        """What stands for a name that is not among ``names``."""
        raise pickle.UnpicklingError(f"the name {full} is not data")

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

    def _digits(self) -> bytes:
        line = self.readline().strip()
        if len(line) > MAX_DIGITS:
            raise pickle.UnpicklingError(f"a number of {len(line)} digits")
        return line

    def load_number(self) -> None:
        line = self._digits()
        self.append(line == b"01" if line in (b"00", b"01") else int(line.rstrip(b"L")))

    def load_put(self) -> None:
        self.memo[_key(int(self._digits()))] = self.stack[-1]

    def load_get(self) -> None:
        self.append(self.memo[_key(int(self._digits()))])

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
        if not (isinstance(called, Name) and isinstance(arguments, tuple)):
            raise pickle.UnpicklingError("a call of what is not a known name")
        self.append(called(*arguments))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, dict):
            return  # attributes of a state dict (the versions of its modules): of no use here
        if not hasattr(target, "set_state"):
            raise pickle.UnpicklingError("a state for what is neither an array nor a dtype")
        target.set_state(state)

    dispatch = Opcodes({code: handler for code, handler in pickle._Unpickler.dispatch.items() if code in _KEPT})
    dispatch |= {MARK[0]: load_mark, STOP[0]: load_stop, FRAME[0]: load_frame, BYTEARRAY8[0]: load_bytearray8}
    dispatch |= {INT[0]: load_number, LONG[0]: load_number, PUT[0]: load_put, GET[0]: load_get}
    dispatch |= {SETITEM[0]: load_setitem, SETITEMS[0]: load_setitems, DICT[0]: load_dict}
    dispatch |= {REDUCE[0]: load_reduce, BUILD[0]: load_build}


_OPEN = object()
PLAIN = (dict, list, tuple, str, bytes, int, float, bool, type(None), np.generic, np.ndarray)
_IMAGES = (list, tuple, bytes, bool, int, np.ndarray)
_LABELS = (list, tuple, bool, int, float, np.generic, np.ndarray)


def finished(
    path: str | os.PathLike,
    root: object,
    allowed: tuple[type, ...],
    leaf: Callable | None = None,
    dtype: type | None = None,
) -> object:
    """A copy of what was unpickled with arrays in place; every object that is not of ``allowed`` types is refused.

    ``leaf``: called for each object that is no array, for what the caller's own names made. ``dtype``: the one that
    arrays may have. A container that occurs many times is copied once.
    """
    done: dict[int, object] = {}

    def copy(item: object, depth: int) -> object:
        if isinstance(item, _Array):
            item = item.value
        elif leaf is not None:
            item = leaf(item)
        odd = dtype is not None and isinstance(item, np.ndarray) and item.dtype != dtype
        if odd or not isinstance(item, allowed):
            what = f"the name {item.full}" if isinstance(item, Name) else f"a {type(item).__name__.strip('_')}"
            what = f"an array of {item.dtype}" if odd else what
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


def load_bin_pickle(path: str | os.PathLike) -> object:
    """The value of a ``.bin`` pickle (Python 2 or 3): lists, tuples, bytes, bools, ints and uint8 arrays; in the second
    of two values (the labels) also floats, numpy's scalars and arrays of any numbers, but no bytes.

    Raises:
        OSError: the file cannot be read.
        UnsafePickleError: anything else is in it, or it is cut or malformed.
    """
    value = finished(path, SafeUnpickler(path, _read(path), BIN_NAMES).load(), PLAIN)
    images, *labels = value if isinstance(value, list | tuple) and len(value) == 2 else (value,)
    finished(path, images, _IMAGES, dtype=np.uint8)
    finished(path, labels, _LABELS)
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

"""The pickle stack machine of ``utils/weights/safe_pickle.py``: opcodes that build plain data, and nothing else.

A global is a name that the caller's policy knows or the end of the reading; names that stand for data are answered by
functions of this file. Lengths are compared with what is left of the file before anything is copied.
"""

import codecs
import math
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from utils.errors import UserError

MAX_STACK = 1 << 19
MAX_NESTING = 64


class UnsafePickleError(UserError):
    """A pickle that holds more than data, or is malformed. Nothing in it was executed."""


class _Name:
    """A global that the policy knows: a name, never the object."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Pending:
    """An array or dtype between its creation and the BUILD that completes it; knows the memo slots to renew."""

    def __init__(self, dtype: np.dtype | None = None) -> None:
        self.dtype, self.slots = dtype, []


class _Machine:
    """The pickle stack machine, for opcodes that build plain data."""

    def __init__(self, path: str, data: bytes, names: dict[str, str], dtype_ok: Callable) -> None:
        self.path, self.data, self.names, self.dtype_ok = path, data, names, dtype_ok
        self.position, self.stack, self.marks, self.memo = 0, [], [], {}
        self.handlers, self.calls = _HANDLERS, _CALLS  # utils/weights/torch_pickle.py adds tensors

    def refuse(self, reason: str) -> UnsafePickleError:
        return UnsafePickleError(f"{self.path}: {reason} (byte {self.position}); refused, nothing was executed")

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes; the claim is compared with the file before anything is copied."""
        left = len(self.data) - self.position
        if size < 0 or size > left:
            raise self.refuse(f"a length of {size} bytes is claimed where {left} are left: cut or malicious")
        self.position += size
        return self.data[self.position - size : self.position]

    def line(self) -> bytes:
        stop = self.data.find(b"\n", self.position)
        if stop < 0:
            raise self.refuse("a text argument without an end")
        text = self.data[self.position : stop]
        self.position = stop + 1
        return text

    def number(self, layout: struct.Struct) -> int | float:
        return layout.unpack(self.take(layout.size))[0]

    def run(self) -> object:
        stack, handlers = self.stack, self.handlers
        while True:
            code = self.take(1)
            if code == pickle.STOP:
                if len(stack) != 1 or self.marks:
                    raise self.refuse(f"{len(stack)} values are left where one belongs")
                return stack[0]
            handler = handlers.get(code)
            if handler is None:
                raise self.refuse(f"pickle opcode {code!r} is not one that plain data needs")
            handler(self)
            if len(stack) > MAX_STACK or len(self.marks) > MAX_NESTING:
                raise self.refuse(f"more than {MAX_STACK} values or {MAX_NESTING} levels at once")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if not self.stack or (self.marks and len(self.stack) <= self.marks[-1]):
            raise self.refuse("the stack is empty")
        return self.stack.pop()

    def pop_mark(self) -> list:
        if not self.marks:
            raise self.refuse("no mark on the stack")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def put(self, slot: int) -> None:
        if not self.stack:
            raise self.refuse("nothing to remember")
        value = self.stack[-1]
        self.memo[slot] = value
        if isinstance(value, _Pending):
            value.slots.append(slot)

    def get(self, slot: int) -> None:
        if slot not in self.memo:
            raise self.refuse(f"memo slot {slot} is empty")
        self.push(self.memo[slot])

    def extend(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise self.refuse("items appended to what is not a list")
        target.extend(items)

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise self.refuse("items set on what is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, bytes):  # a Python 2 string
                key = key.decode("utf-8")
            if not isinstance(key, (str, int, tuple)):
                raise self.refuse(f"a dictionary key of type {type(key).__name__.strip('_')}")
            target[key] = value

    def name(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in self.names:
            raise self.refuse(f"the name {full} is not data")
        self.push(_Name(self.names[full]))

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise self.refuse("a name that is not text")
        self.name(module, name)

    def reduce(self) -> None:
        arguments, called = self.pop(), self.pop()
        if not isinstance(called, _Name) or not isinstance(arguments, tuple):
            raise self.refuse("a call of what is not a known name")
        self.push(self.calls[called.name](self, *arguments))

    def build(self) -> None:
        state, target = self.pop(), self.pop()
        if not isinstance(target, _Pending) or not isinstance(state, tuple):
            raise self.refuse("a state for what is neither an array nor a dtype")
        if target.dtype is not None:
            order = _text(state[1])
            if any(part is not None for part in state[2:5]):
                raise self.refuse("a structured dtype")
            value = target.dtype.newbyteorder(order) if order in ("<", ">") else target.dtype
            value = _Dtype(value)
        else:
            shape, dtype, fortran, raw = state[-4:]
            value = self.array(raw, dtype, shape, "F" if fortran else "C")
        for slot in target.slots:
            self.memo[slot] = value
        self.push(value)

    def array(self, raw: object, dtype: object, shape: object, order: str) -> np.ndarray:
        if isinstance(dtype, _Pending):  # protocol 5 leaves native dtypes without a state
            dtype = _Dtype(dtype.dtype)
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes) or not isinstance(shape, tuple):
            raise self.refuse("an array made of something else than bytes, dtype and shape")
        if not self.dtype_ok(dtype.value):
            raise self.refuse(f"an array of {dtype.value}")
        if any(type(side) is not int or side < 0 for side in shape) or len(shape) > 32:
            raise self.refuse(f"an array of shape {shape}")
        if math.prod(shape) * dtype.value.itemsize != len(raw):
            raise self.refuse(f"an array of shape {shape} and {dtype.value} in {len(raw)} bytes")
        return np.frombuffer(raw, dtype.value).reshape(shape, order=order)

    def make_dtype(self, text: object, *flags: object) -> _Pending:
        text = _text(text)
        if len(text) > 4 or text.lstrip("<>|=")[:1] not in tuple("biufc?"):
            raise self.refuse(f"a dtype {text[:20]!r}")
        return _Pending(np.dtype(text))

    def make_scalar(self, dtype: object, raw: object) -> object:
        return self.array(raw, dtype, (), "C")[()]

    def make_bytes(self, *arguments: object) -> bytes:
        if not arguments:
            return b""
        if len(arguments) == 2 and isinstance(arguments[0], str):
            return self.encode(*arguments)
        if len(arguments) != 1 or not isinstance(arguments[0], (bytes, list)):
            raise self.refuse("bytes made of something else")  # bytes(n) would allocate what the file claims
        return bytes(arguments[0])

    def encode(self, text: object, encoding: object = "latin1") -> bytes:
        if not isinstance(text, str) or _text(encoding) not in ("latin1", "latin-1"):
            raise self.refuse("an encoding other than latin1")
        return text.encode("latin1")

    def make_odict(self, items: object = ()) -> OrderedDict:
        if not isinstance(items, (list, tuple)):
            raise self.refuse("an OrderedDict made of something else than pairs")
        return OrderedDict((key, value) for key, value in items)

    def make_sequence(self, kind: type, items: object = ()) -> object:
        if not isinstance(items, (list, tuple)):
            raise self.refuse(f"a {kind.__name__} made of something else than items")
        return kind(items)


class _Dtype:
    """A finished dtype (internal: never part of the value)."""

    def __init__(self, value: np.dtype) -> None:
        self.value = value


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise TypeError(f"text expected, found a {type(value).__name__.strip('_')}")
    return value


_U1, _U2, _I4, _U4, _U8, _F8 = (struct.Struct(layout) for layout in ("<B", "<H", "<i", "<I", "<Q", ">d"))

_CALLS = {
    "reconstruct": lambda m, *ignored: _Pending(),
    "frombuffer": lambda m, raw, dtype, shape, order: m.array(raw, dtype, shape, _text(order)),
    "scalar": _Machine.make_scalar,
    "dtype": _Machine.make_dtype,
    "encode": _Machine.encode,
    "bytes": _Machine.make_bytes,
    "odict": _Machine.make_odict,
    "tuple": lambda m, *items: m.make_sequence(tuple, *items),
    "list": lambda m, *items: m.make_sequence(list, *items),
    "dict": lambda m, *items: dict(m.make_odict(*items)),
}


def _integer(text: bytes) -> int | bool:
    return {b"00": False, b"01": True}[text] if text in (b"00", b"01") else int(text)


def _dict_of(items: list, machine: _Machine) -> None:
    machine.push({})
    machine.set_items(items)


def _tuple_of(machine: _Machine, count: int) -> None:
    items = [machine.pop() for _ in range(count)]
    machine.push(tuple(reversed(items)))


def _quoted(machine: _Machine) -> bytes:
    text = machine.line().strip()
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        raise machine.refuse("a string without quotes")
    return codecs.escape_decode(text[1:-1])[0]


_HANDLERS = {
    pickle.PROTO: lambda m: m.number(_U1),
    pickle.FRAME: lambda m: m.number(_U8),
    pickle.MARK: lambda m: m.marks.append(len(m.stack)),
    pickle.POP: lambda m: m.pop_mark() if m.marks and m.marks[-1] == len(m.stack) else m.pop(),
    pickle.POP_MARK: lambda m: m.pop_mark(),
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.INT: lambda m: m.push(_integer(m.line())),
    pickle.LONG: lambda m: m.push(int(m.line().rstrip(b"L"))),
    pickle.BININT: lambda m: m.push(m.number(_I4)),
    pickle.BININT1: lambda m: m.push(m.number(_U1)),
    pickle.BININT2: lambda m: m.push(m.number(_U2)),
    pickle.LONG1: lambda m: m.push(int.from_bytes(m.take(m.number(_U1)), "little", signed=True)),
    pickle.FLOAT: lambda m: m.push(float(m.line())),
    pickle.BINFLOAT: lambda m: m.push(m.number(_F8)),
    pickle.STRING: lambda m: m.push(_quoted(m)),
    pickle.BINSTRING: lambda m: m.push(m.take(m.number(_I4))),
    pickle.SHORT_BINSTRING: lambda m: m.push(m.take(m.number(_U1))),
    pickle.BINBYTES: lambda m: m.push(m.take(m.number(_U4))),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.number(_U1))),
    pickle.BINBYTES8: lambda m: m.push(m.take(m.number(_U8))),
    pickle.BYTEARRAY8: lambda m: m.push(m.take(m.number(_U8))),
    pickle.UNICODE: lambda m: m.push(m.line().decode("raw-unicode-escape")),
    pickle.BINUNICODE: lambda m: m.push(m.take(m.number(_U4)).decode("utf-8", "surrogatepass")),
    pickle.SHORT_BINUNICODE: lambda m: m.push(m.take(m.number(_U1)).decode("utf-8", "surrogatepass")),
    pickle.BINUNICODE8: lambda m: m.push(m.take(m.number(_U8)).decode("utf-8", "surrogatepass")),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.LIST: lambda m: m.push(m.pop_mark()),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_mark())),
    pickle.TUPLE1: lambda m: _tuple_of(m, 1),
    pickle.TUPLE2: lambda m: _tuple_of(m, 2),
    pickle.TUPLE3: lambda m: _tuple_of(m, 3),
    pickle.DICT: lambda m: _dict_of(m.pop_mark(), m),
    pickle.APPEND: lambda m: m.extend([m.pop()]),
    pickle.APPENDS: lambda m: m.extend(m.pop_mark()),
    pickle.SETITEM: lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    pickle.SETITEMS: lambda m: m.set_items(m.pop_mark()),
    pickle.PUT: lambda m: m.put(int(m.line())),
    pickle.BINPUT: lambda m: m.put(m.number(_U1)),
    pickle.LONG_BINPUT: lambda m: m.put(m.number(_U4)),
    pickle.MEMOIZE: lambda m: m.put(len(m.memo)),
    pickle.GET: lambda m: m.get(int(m.line())),
    pickle.BINGET: lambda m: m.get(m.number(_U1)),
    pickle.LONG_BINGET: lambda m: m.get(m.number(_U4)),
    pickle.GLOBAL: lambda m: m.name(m.line().decode(), m.line().decode()),
    pickle.STACK_GLOBAL: _Machine.stack_name,
    pickle.REDUCE: _Machine.reduce,
    pickle.BUILD: _Machine.build,
}

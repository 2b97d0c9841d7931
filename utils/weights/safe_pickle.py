"""Read pickles that come from elsewhere without running any of them.

The opcodes are interpreted here, one by one; a global is only a name to us, and the few names that stand for data
(numpy arrays, dtypes, bytes) are answered by functions of ``utils/weights/pickle_machine.py``. Nothing is imported,
called or allocated because the file asks for it: every length is compared with what is left of the file first.

Two policies. ``.bin`` verification sets: lists, tuples, bytes, bools and uint8 arrays. Weights (``.pdparams``, Paddle's
``.pkl``): dictionaries, lists, tuples, strings, numbers and numeric arrays of any shape.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils.weights.pickle_machine import _CALLS, _HANDLERS, MAX_NESTING, UnsafePickleError, _Machine, _Name

__all__ = ["_CALLS", "_HANDLERS", "UnsafePickleError", "load_bin_pickle", "load_weights_pickle"]
NUMERIC = frozenset("biufc")

_NUMPY = {
    f"numpy.{core}.{name}": short
    for core in ("core", "_core")
    for name, short in {
        "multiarray._reconstruct": "reconstruct",
        "multiarray.scalar": "scalar",
        "numeric._frombuffer": "frombuffer",
    }.items()
}
_COMMON = {
    **_NUMPY,
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "_codecs.encode": "encode",
    "builtins.bytes": "bytes",
    "__builtin__.bytes": "bytes",
    "builtins.bytearray": "bytes",
    "__builtin__.bytearray": "bytes",
}
_BIN_NAMES = _COMMON
_WEIGHT_NAMES = {
    **_COMMON,
    "collections.OrderedDict": "odict",
    "builtins.tuple": "tuple",
    "__builtin__.tuple": "tuple",
    "builtins.list": "list",
    "__builtin__.list": "list",
    "builtins.dict": "dict",
    "__builtin__.dict": "dict",
}


def load_bin_pickle(path: str | os.PathLike) -> object:
    """The value of a ``.bin`` pickle (Python 2 or 3): lists, tuples, bytes, bools, ints and uint8 arrays.

    Raises:
        OSError: the file cannot be read.
        UnsafePickleError: anything else is in it, or it is cut or malformed.
    """
    return _load(path, _BIN_NAMES, lambda dtype: dtype == np.uint8, (list, tuple, bytes, bool, int))


def load_weights_pickle(path: str | os.PathLike) -> object:
    """The value of a ``.pdparams`` or ``.pkl``: dicts, lists, tuples, str, bytes, numbers, None and numeric arrays.

    Arrays are read-only views of the file's bytes.

    Raises:
        OSError: the file cannot be read.
        UnsafePickleError: anything else is in it, or it is cut or malformed.
    """
    allowed = (dict, list, tuple, str, bytes, int, float, bool, type(None), np.generic)
    return _load(path, _WEIGHT_NAMES, lambda dtype: dtype.kind in NUMERIC, allowed)


def _load(path: str | os.PathLike, names: dict[str, str], dtype_ok: Callable, allowed: tuple[type, ...]) -> object:
    path = os.fspath(path)
    data = Path(path).read_bytes()
    if not data:
        raise UnsafePickleError(f"{path}: the file is empty, a pickle was expected")
    machine = _Machine(path, data, names, dtype_ok)
    try:
        value = machine.run()
    except UnsafePickleError:
        raise
    except (ValueError, TypeError, LookupError, struct.error, OverflowError, AttributeError) as error:
        reason = f"not a well-formed pickle at byte {machine.position} of {len(data)}: {error}"
        raise UnsafePickleError(f"{path}: {reason}") from error
    _check_types(path, value, allowed)
    return value


def _check_types(path: str, root: object, allowed: tuple[type, ...]) -> None:
    """Refuse every object that the policy does not name; no recursion, each container once."""
    todo, seen = [(root, 0)], set()
    while todo:
        item, depth = todo.pop()
        if isinstance(item, np.ndarray):
            continue
        if not isinstance(item, allowed):
            what = f"the name {item.name}" if isinstance(item, _Name) else f"a {type(item).__name__.strip('_')}"
            raise UnsafePickleError(f"{path}: holds {what}, which this kind of file must not")
        if not isinstance(item, (list, tuple, dict)) or id(item) in seen:
            continue
        if depth > MAX_NESTING:
            raise UnsafePickleError(f"{path}: nested more than {MAX_NESTING} deep")
        seen.add(id(item))
        parts = [*item.keys(), *item.values()] if isinstance(item, dict) else item
        todo.extend((part, depth + 1) for part in parts)

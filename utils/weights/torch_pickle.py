"""PyTorch's ``.pt`` files without PyTorch: read both layouts (zip since 1.6, the stream before it), write the zip one.

The pickle inside is interpreted by ``utils.weights.safe_pickle``'s machine, which knows names and never calls them;
tensors are views of the storages that lie beside it, with every offset and stride checked against the storage's length.
"""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

from utils.weights.safe_pickle import _CALLS, _HANDLERS, _WEIGHT_NAMES, UnsafePickleError, _check_types, _Machine, _Name

STREAM_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of the layout before 1.6
STREAM_PROTOCOL = 1001
BFLOAT16 = "bfloat16"  # numpy has no such type: widened to float32
DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": BFLOAT16,
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
STORAGES = {dtype: name for name, dtype in DTYPES.items()}
_NAMES = {
    **_WEIGHT_NAMES,
    **{f"torch.{name}": f"storage:{dtype}" for name, dtype in DTYPES.items()},
    "torch._utils._rebuild_tensor": "tensor",
    "torch._utils._rebuild_tensor_v2": "tensor",
    "torch._utils._rebuild_parameter": "parameter",
    "torch.Size": "tuple",
}
_PLAIN = (dict, list, tuple, str, bytes, int, float, bool, type(None), np.generic)


class _Storage:
    """A run of ``length`` values named ``key``; the bytes come later."""

    def __init__(self, key: str, dtype: str, length: int) -> None:
        self.key, self.dtype, self.length = key, dtype, length
        self.start = 0  # first value, in the view that the stream layout may store

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == BFLOAT16 else np.dtype(self.dtype).itemsize


class _Tensor:
    """A strided view of a storage."""

    def __init__(self, storage: _Storage, offset: int, size: tuple, stride: tuple) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


def load_torch(path: str | os.PathLike) -> object:
    """What ``torch.save`` wrote: dicts, lists, strings, numbers; tensors as numpy arrays (bfloat16 as float32).

    Raises:
        OSError: the file cannot be read.
        UnsafePickleError: anything but plain data and tensors is in it (a whole module, say), or it is cut or damaged.
    """
    path = Path(path)
    try:
        if zipfile.is_zipfile(path):
            return _load_zip(path)
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                raise UnsafePickleError(f"{path}: a zip archive without its end: the file is cut; fetch it again")
        return _load_stream(path)
    except UnsafePickleError:
        raise
    except (ValueError, TypeError, LookupError, struct.error, OverflowError, AttributeError, EOFError, RuntimeError,
            zipfile.BadZipFile) as error:  # fmt: skip
        raise UnsafePickleError(f"{path}: not a well-formed PyTorch file: {error}") from error


def save_torch(path: str | os.PathLike, content: object) -> None:
    """Write dicts (string or integer keys), lists, strings, numbers and numpy arrays so that ``torch.load`` reads them.

    The file appears whole or not at all.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    storages: list[np.ndarray] = []
    out = io.BytesIO()
    out.write(pickle.PROTO + b"\x02")
    _emit(out, content, storages)
    out.write(pickle.STOP)
    try:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data.pkl", out.getvalue())
            archive.writestr("archive/byteorder", b"little")
            for key, array in enumerate(storages):
                archive.writestr(f"archive/data/{key}", _little_endian(array))
            archive.writestr("archive/version", b"3\n")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


class _TorchMachine(_Machine):
    """The pickle machine plus tensors; storages are named by persistent ids."""

    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(str(path), data, _NAMES, lambda dtype: dtype.kind in "biufc")
        self.handlers = {**_HANDLERS, pickle.BINPERSID: _TorchMachine.persistent, pickle.BUILD: _TorchMachine.build}
        self.calls = {**_CALLS, "tensor": _TorchMachine.make_tensor, "parameter": lambda machine, data, *ignored: data}
        self.storages: dict[str, _Storage] = {}

    def persistent(self) -> None:
        match self.pop():
            case ("storage", _Name(name=name), str(key), _, int(length), *view) if name.startswith("storage:"):
                storage = self.storages.setdefault(key, _Storage(key, name.removeprefix("storage:"), length))
                if view and view != [None]:
                    raise self.refuse("a storage that is a view of another")
                self.push(storage)
            case other:
                raise self.refuse(f"a persistent id that is no storage: {str(other)[:60]}")

    def make_tensor(self, storage: object, offset: object, size: object, stride: object, *ignored: object) -> _Tensor:
        if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0:
            raise self.refuse("a tensor without a storage")
        for sides in (size, stride):
            if (
                not isinstance(sides, tuple)
                or len(sides) > 32
                or any(type(side) is not int or side < 0 for side in sides)
            ):
                raise self.refuse(f"a tensor of size or stride {str(sides)[:60]}")
        if len(size) != len(stride):
            raise self.refuse(f"a tensor of size {size} with stride {stride}")
        last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
        if 0 not in size and (last >= storage.length or np.prod(size, dtype=object) > storage.length):
            raise self.refuse(f"a tensor of size {size} that does not fit its storage of {storage.length} values")
        return _Tensor(storage, offset, size, stride)

    def build(self) -> None:
        if len(self.stack) > 1 and isinstance(self.stack[-2], dict):
            self.pop()  # a state dict's ``_metadata`` attribute: versions of the modules, of no use here
            return
        super().build()


def _load_zip(path: Path) -> object:
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        root = next((name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl")), None)
        if root is None:
            raise UnsafePickleError(f"{path}: a zip archive without data.pkl: not written by torch.save")

        def read(name: str) -> bytes:
            info = entries.get(root + name)
            if info is None:
                raise UnsafePickleError(f"{path}: the archive lacks {name}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > path.stat().st_size:
                raise UnsafePickleError(f"{path}: {name} claims {info.file_size} bytes or is compressed; refused")
            try:
                return archive.read(info)
            except OSError as error:  # a damaged directory sends the reader to places that do not exist
                raise UnsafePickleError(f"{path}: {name} cannot be read ({error}): damaged archive") from None

        if root + "byteorder" in entries and read("byteorder") != b"little":
            raise UnsafePickleError(f"{path}: written on a big-endian machine; save it again on another")
        machine = _TorchMachine(path, read("data.pkl"))
        value = machine.run()
        arrays = {key: _values(path, storage, read(f"data/{key}")) for key, storage in machine.storages.items()}
    return _finish(path, value, arrays)


def _load_stream(path: Path) -> object:
    machine = _TorchMachine(path, path.read_bytes())
    for expected, what in ((STREAM_MAGIC, "magic number"), (STREAM_PROTOCOL, "protocol")):
        if _next_pickle(machine) != expected:
            raise UnsafePickleError(f"{path}: not a file of torch.save ({what} not found)")
    system = _next_pickle(machine)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnsafePickleError(f"{path}: written on a big-endian machine; save it again on another")
    value = _next_pickle(machine)
    keys = _next_pickle(machine)
    arrays = {}
    for key in keys:
        storage = machine.storages[key]
        (length,) = struct.unpack("<q", machine.take(8))
        if length != storage.length:
            raise UnsafePickleError(f"{path}: storage {key} has {length} values where {storage.length} were announced")
        arrays[key] = _values(path, storage, machine.take(length * storage.itemsize))
    return _finish(path, value, arrays)


def _next_pickle(machine: _TorchMachine) -> object:
    machine.stack.clear()
    machine.marks.clear()
    machine.memo.clear()
    return machine.run()


def _values(path: Path, storage: _Storage, raw: bytes) -> np.ndarray:
    if len(raw) != storage.length * storage.itemsize:
        raise UnsafePickleError(
            f"{path}: storage {storage.key} has {len(raw)} bytes for {storage.length} values of {storage.dtype}"
        )
    if storage.dtype == BFLOAT16:
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, np.dtype(storage.dtype).newbyteorder("<"))


def _finish(path: Path, value: object, arrays: dict[str, np.ndarray]) -> object:
    """``value`` with tensors as arrays; containers are copied, and only plain data passes."""

    def convert(item: object, depth: int) -> object:
        if depth > 60:
            raise UnsafePickleError(f"{path}: nested too deep")
        if isinstance(item, _Tensor):
            values = arrays[item.storage.key]
            strides = tuple(step * values.itemsize for step in item.stride)
            if 0 in item.size:
                return np.empty(item.size, values.dtype)
            return np.lib.stride_tricks.as_strided(values[item.offset :], item.size, strides, writeable=False)
        if isinstance(item, dict):
            return {key: convert(part, depth + 1) for key, part in item.items()}
        if isinstance(item, list | tuple):
            return type(item)(convert(part, depth + 1) for part in item)
        return item

    value = convert(value, 0)
    _check_types(str(path), value, _PLAIN)
    return value


def _emit(out: io.BytesIO, item: object, storages: list[np.ndarray]) -> None:
    """Append the opcodes that push ``item``; arrays become tensors of storages of their own."""
    if item is None:
        out.write(pickle.NONE)
    elif isinstance(item, bool):
        out.write(pickle.NEWTRUE if item else pickle.NEWFALSE)
    elif isinstance(item, int):
        raw = item.to_bytes(item.bit_length() // 8 + 1, "little", signed=True)
        out.write(pickle.LONG1 + bytes([len(raw)]) + raw)
    elif isinstance(item, float):
        out.write(pickle.BINFLOAT + struct.pack(">d", item))
    elif isinstance(item, str):
        raw = item.encode()
        out.write(pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw)
    elif isinstance(item, dict):
        out.write(pickle.EMPTY_DICT + pickle.MARK)
        for key, value in item.items():
            _emit(out, key, storages)
            _emit(out, value, storages)
        out.write(pickle.SETITEMS)
    elif isinstance(item, list):
        out.write(pickle.EMPTY_LIST + pickle.MARK)
        for value in item:
            _emit(out, value, storages)
        out.write(pickle.APPENDS)
    elif isinstance(item, tuple):
        out.write(pickle.MARK)
        for value in item:
            _emit(out, value, storages)
        out.write(pickle.TUPLE)
    elif isinstance(item, np.ndarray):
        _emit_tensor(out, np.ascontiguousarray(item).reshape(item.shape), storages)
    else:
        raise TypeError(f"a {type(item).__name__} cannot be written to a PyTorch file")


def _little_endian(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def _emit_tensor(out: io.BytesIO, array: np.ndarray, storages: list[np.ndarray]) -> None:
    if str(array.dtype) not in STORAGES:
        raise TypeError(f"an array of {array.dtype} cannot be written to a PyTorch file")
    stride = tuple(step // array.itemsize for step in array.strides)
    out.write(pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + pickle.MARK + pickle.MARK)
    _emit(out, "storage", storages)
    out.write(pickle.GLOBAL + f"torch\n{STORAGES[str(array.dtype)]}\n".encode())
    for part in (str(len(storages)), "cpu", array.size):
        _emit(out, part, storages)
    out.write(pickle.TUPLE + pickle.BINPERSID)
    for part in (0, array.shape, stride, False):
        _emit(out, part, storages)
    out.write(pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE)
    out.write(pickle.TUPLE + pickle.REDUCE)
    storages.append(array)

"""PyTorch's ``.pt`` files without PyTorch: read both layouts (zip since 1.6, the stream before it), write the zip one.

The pickle inside is read by ``utils.weights.safe_pickle``, which knows names and never calls them; tensors are views of
the storages that lie beside it, with every offset and stride checked against the storage's length.
"""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.files import written_whole
from utils.weights import safe_pickle
from utils.weights.safe_pickle import WEIGHT_NAMES, Name, Opcodes, SafeUnpickler, UnsafePickleError

STREAM_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of the layout before 1.6
STREAM_PROTOCOL = 1001
BIG_ENDIAN = "written on a big-endian machine; save it again on another"
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


@dataclass(eq=False)
class _Storage:
    """A run of ``length`` values named ``key``; the bytes come later."""

    key: str
    dtype: str
    length: int

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == BFLOAT16 else np.dtype(self.dtype).itemsize

    def values(self, raw: bytes) -> np.ndarray:
        if len(raw) != self.length * self.itemsize:
            raise ValueError(f"storage {self.key} has {len(raw)} bytes for {self.length} values of {self.dtype}")
        if self.dtype == BFLOAT16:
            return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        return np.frombuffer(raw, np.dtype(self.dtype).newbyteorder("<"))


class _Tensor:
    """A strided view of a storage."""

    def __init__(self, storage: object, offset: object, size: object, stride: object, *ignored: object) -> None:
        if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0:
            raise TypeError("a tensor without a storage")
        for sides in (size, stride):
            odd = not isinstance(sides, tuple) or any(type(side) is not int or side < 0 for side in sides)
            if odd or len(sides) > 32:
                raise ValueError(f"a tensor of size or stride {str(sides)[:60]}")
        if len(size) != len(stride):
            raise ValueError(f"a tensor of size {size} with stride {stride}")
        last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
        if 0 not in size and (last >= storage.length or np.prod(size, dtype=object) > storage.length):
            raise ValueError(f"a tensor of size {size} that does not fit its storage of {storage.length} values")
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def view(self, values: np.ndarray) -> np.ndarray:
        if 0 in self.size:
            return np.empty(self.size, values.dtype)
        strides = tuple(step * values.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.size, strides, writeable=False)


_NAMES = {
    **WEIGHT_NAMES,
    **{f"torch.{name}": None for name in DTYPES},
    "torch._utils._rebuild_tensor": _Tensor,
    "torch._utils._rebuild_tensor_v2": _Tensor,
    "torch._utils._rebuild_parameter": lambda data, *ignored: data,
    "torch.Size": WEIGHT_NAMES["builtins.tuple"],
}


class Foreign(Name):
    """Stands for a class or function that no policy knows, and for all that the file would make of it: its name alone.

    Checkpoints of trainers hold such things beside the weights (paths, arguments, callbacks). They are neither
    imported nor made; who needs one of them refuses the file.
    """

    def __init__(self, full: str) -> None:
        super().__init__(full, lambda *ignored: self)

    def pass_over(self, *ignored: object) -> None:
        """What the file would put into it."""

    set_state = append = extend = add = pass_over


class _TorchUnpickler(SafeUnpickler):
    """Adds tensors, whose storages are named by persistent ids, and passes over foreign objects (``Foreign``)."""

    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(path, data, _NAMES)
        self.storages: dict[str, _Storage] = {}

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", Name(full=full), str(key), _, int(length), *view) if view in ([], [None]):
                dtype = DTYPES.get(full.removeprefix("torch."))
                if dtype is not None:
                    return self.storages.setdefault(key, _Storage(key, dtype, length))
            case ("module", Foreign() as whole, *_):  # with its source text, in the layout before 1.6
                return whole
        raise pickle.UnpicklingError(f"a persistent id that is no whole storage: {str(pid)[:60]}")

    def unknown(self, full: str) -> Name:
        return Foreign(full)

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keywords
        self.load_reduce()

    def load_empty_set(self) -> None:
        self.append(Foreign("builtins.set"))

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(Foreign("builtins.frozenset"))

    def _set(self, items: list) -> None:
        """Items of foreign objects, and those whose key names no weight (a tuple, say), are passed over unhashed."""
        if not isinstance(self.stack[-1], Foreign):
            pairs = zip(items[::2], items[1::2], strict=True)
            named = [part for pair in pairs if isinstance(pair[0], str | bytes | int) for part in pair]
            SafeUnpickler._set(self, named)

    dispatch = Opcodes(SafeUnpickler.dispatch)
    dispatch |= {code[0]: pickle._Unpickler.dispatch[code[0]] for code in (pickle.BINPERSID, pickle.ADDITEMS)}
    dispatch |= {pickle.NEWOBJ[0]: SafeUnpickler.load_reduce, pickle.NEWOBJ_EX[0]: load_newobj_ex}
    dispatch |= {pickle.EMPTY_SET[0]: load_empty_set, pickle.FROZENSET[0]: load_frozenset}


def load_torch(path: str | os.PathLike) -> object:
    """What ``torch.save`` wrote: dicts, lists, strings, numbers; tensors as numpy arrays (bfloat16 as float32).

    Objects of other kinds inside it are ``Foreign``; nothing of the file is executed.

    Raises:
        OSError: the file cannot be read.
        UnsafePickleError: the whole of it is such an object (a module, say), or it is cut or damaged.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(1024)
    try:
        if zipfile.is_zipfile(path):
            return _load_zip(path)
        if head.startswith(b"PK"):
            raise UnsafePickleError(f"{path}: a zip archive without its end: the file is cut; fetch it again")
        safe_pickle.refuse_other_kinds(path, head, "a PyTorch file")
        return _load_stream(path)
    except UnsafePickleError:
        raise
    except (*safe_pickle.DAMAGE, RuntimeError, zipfile.BadZipFile) as error:
        raise UnsafePickleError(f"{path}: not a well-formed PyTorch file: {error}") from error


def _load_zip(path: Path) -> object:
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        root = next((name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl")), None)
        if root is None:
            raise UnsafePickleError(f"{path}: a zip archive without data.pkl: not written by torch.save; unpack it")

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
            raise UnsafePickleError(f"{path}: {BIG_ENDIAN}")
        unpickler = _TorchUnpickler(path, read("data.pkl"))
        value = unpickler.load()
        arrays = {key: storage.values(read(f"data/{key}")) for key, storage in unpickler.storages.items()}
    return _with_arrays(path, value, arrays)


def _load_stream(path: Path) -> object:
    unpickler = _TorchUnpickler(path, path.read_bytes())
    for expected, what in ((STREAM_MAGIC, "magic number"), (STREAM_PROTOCOL, "protocol")):
        if unpickler.load() != expected:
            raise UnsafePickleError(f"{path}: not a file of torch.save ({what} not found)")
    system = unpickler.load()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnsafePickleError(f"{path}: {BIG_ENDIAN}")
    value, keys = unpickler.load(), unpickler.load()
    arrays = {}
    for key in keys:
        storage = unpickler.storages[key]
        (length,) = struct.unpack("<q", unpickler.read_bytes(8))
        if length != storage.length:
            raise UnsafePickleError(f"{path}: storage {key} has {length} values where {storage.length} were announced")
        arrays[key] = storage.values(unpickler.read_bytes(length * storage.itemsize))
    return _with_arrays(path, value, arrays)


def _with_arrays(path: Path, value: object, arrays: dict[str, np.ndarray]) -> object:
    def view(item: object) -> object:
        return item.view(arrays[item.storage.key]) if isinstance(item, _Tensor) else item

    if isinstance(value, Foreign):
        raise UnsafePickleError(
            f"{path}: holds a {value.full}, not named weights; nothing was executed. Where it was trained, "
            f"torch.save(model.state_dict(), ...) writes what is read here"
        )
    return safe_pickle.finished(path, value, (*safe_pickle.PLAIN, Foreign), view)


class _TorchPickler(pickle._Pickler):
    """Arrays become tensors, each of a storage of its own; PyTorch's names are written without looking them up."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.arrays: list[np.ndarray] = []

    def persistent_id(self, item: object) -> tuple | None:
        if isinstance(item, _Storage):
            return "storage", Name(f"torch.{STORAGES[item.dtype]}"), item.key, "cpu", item.length
        return None

    def reducer_override(self, item: object) -> object:
        if isinstance(item, Name):
            return item.full
        if isinstance(item, np.ndarray) and str(item.dtype) in STORAGES:
            array = np.ascontiguousarray(item).reshape(item.shape)
            storage = _Storage(str(len(self.arrays)), str(array.dtype), array.size)
            self.arrays.append(array)
            stride = tuple(step // array.itemsize for step in array.strides)
            rebuild = Name("torch._utils._rebuild_tensor_v2", _Tensor)
            return rebuild, (storage, 0, array.shape, stride, False, OrderedDict())
        if item is OrderedDict or type(item) in (dict, OrderedDict, list, tuple, str, int, float, bool, type(None)):
            return NotImplemented
        kind = f"an array of {item.dtype}" if isinstance(item, np.ndarray) else f"a {type(item).__name__}"
        raise TypeError(f"{kind} cannot be written to a PyTorch file")

    def save_global(self, item: object, name: str | None = None) -> None:
        if isinstance(item, Name):
            self.write(pickle.GLOBAL + "\n".join((*name.rsplit(".", 1), "")).encode())
        else:
            super().save_global(item, name)


def save_torch(path: str | os.PathLike, content: object) -> None:
    """Write dicts (string or integer keys), lists, strings, numbers and numpy arrays so that ``torch.load`` reads them,
    the file whole or not at all; TypeError where ``content`` holds something else."""
    out = io.BytesIO()
    pickler = _TorchPickler(out)
    pickler.dump(content)
    with written_whole(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", out.getvalue())
        archive.writestr("archive/byteorder", b"little")
        for key, array in enumerate(pickler.arrays):
            archive.writestr(f"archive/data/{key}", array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        archive.writestr("archive/version", b"3\n")

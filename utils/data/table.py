"""An array on disk that was expensive to find out (labels, offsets), with what it was found out from.

The file lies beside the data, or in the user's cache folder where the data are read-only. It appears whole. Of several
processes on one machine that need it at once, one makes it. It is mapped, so that they share one copy in memory.
"""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils.files import written_whole

_MAGIC = b"FACE-TABLE-1\n"


def table_place(path: Path) -> Path:
    """``path`` where its folder may be written (the mode bits count even for root), else a file in the user's cache."""
    folder = path.resolve().parent
    writable = folder.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    if writable and os.access(folder, os.W_OK):
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arcface-paddle"
    return cache / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}-{path.name.lstrip('.')}"


def save_table(path: Path, stamp: object, array: np.ndarray) -> None:
    """Write an array [N] and the JSON-able ``stamp`` that it is true for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = array.dtype.descr if array.dtype.names else array.dtype.str
    header = json.dumps({"stamp": stamp, "dtype": kind, "length": len(array)}).encode()
    start = _MAGIC + len(header).to_bytes(8, "little") + header
    with written_whole(path) as aside, open(aside, "wb") as file:
        file.write(start + bytes(-len(start) % 64))
        file.write(np.ascontiguousarray(array).data)


def load_table(path: Path) -> tuple[object, np.ndarray] | None:
    """(stamp, the array, read-only), or None where there is none or a damaged one."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(_MAGIC) + 8)
            size = int.from_bytes(head[len(_MAGIC) :], "little")
            if head[: len(_MAGIC)] != _MAGIC or size > os.fstat(file.fileno()).st_size:
                return None
            header = json.loads(file.read(size))
        kind = header["dtype"]
        kind = np.dtype([(name, form) for name, form in kind] if isinstance(kind, list) else kind)
        offset = len(head) + size
        offset += -offset % 64
        if Path(path).stat().st_size != offset + header["length"] * kind.itemsize:
            return None
        if header["length"] == 0:
            return header["stamp"], np.empty(0, kind)
        return header["stamp"], np.memmap(path, kind, "r", offset, (header["length"],))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Processes of this machine and user that make the same table wait for each other; others may make it as well."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]
    with open(Path(tempfile.gettempdir()) / f"arcface-paddle-{os.getuid()}-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, whatever happens
        yield

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
from collections.abc import Callable, Iterator
from pathlib import Path
from tokenize import TokenError

import numpy as np

from utils.files import written_whole


def stored_table(
    path: Path, fits: Callable[[tuple | None], bool], make: Callable[[tuple | None], tuple[object, np.ndarray]]
) -> tuple[object, np.ndarray]:
    """(stamp, array) as they are stored at ``path`` (or in the cache) if they fit, else made and stored.

    The file is the array as ``.npy`` and, behind it, the stamp as JSON.

    Args:
        path: the file beside the data.
        fits: are these true? None: there is none, or a damaged one.
        make: (a JSON-able stamp, array [N]) from what is stored and does not fit.
    """
    path = _table_place(path)
    found = _load_table(path)
    if fits(found):
        return found
    with _one_at_a_time(path):
        found = _load_table(path)  # somebody else may have made it meanwhile
        if fits(found):
            return found
        stamp, array = make(found)
        with contextlib.suppress(OSError):  # nowhere to keep it, so it is made again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as aside, open(aside, "wb") as file:
                np.save(file, array)
                file.write(json.dumps(stamp).encode())
            return _load_table(path) or (stamp, array)
        return stamp, array


def _table_place(path: Path) -> Path:
    """``path`` where its folder may be written (the mode bits count even for root), else a file in the user's cache."""
    folder = path.resolve().parent
    writable = folder.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    if writable and os.access(folder, os.W_OK):
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arcface-paddle"
    return cache / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]}-{path.name.lstrip('.')}"


def _load_table(path: Path) -> tuple[object, np.ndarray] | None:
    """(stamp, the array, read-only), or None where there is none or a damaged one."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        with open(path, "rb") as file:
            file.seek(array.offset + array.nbytes)
            return json.load(file), array
    except (OSError, ValueError, TokenError):  # what numpy says of a damaged header
        return None


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Processes of this machine and user that make the same table wait for each other; others may make it as well."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
    with open(Path(tempfile.gettempdir()) / f"arcface-paddle-{os.getuid()}-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, whatever happens
        yield

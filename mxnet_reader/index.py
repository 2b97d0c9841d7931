"""The ``.idx`` file: keys and offsets as two arrays, no Python object a record.

N records; ``keys_N`` and ``offsets_N`` are int64, in the order of the file.
"""

import functools
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping, MutableSequence
from pathlib import Path

import numpy as np

from mxnet_reader.errors import MissingKeyError, RecordError

CHUNK = 1 << 20  # rows compared at a time: temporaries stay small beside the index


class RecordIndex:
    """Keys and offsets of a record file.

    Args:
        keys: int64 [N]; where a key occurs twice the later line counts, as in mxnet.
        offsets: int64 [N], byte offsets into the record file.
        path: where it came from, for messages.
    """

    def __init__(self, keys: np.ndarray, offsets: np.ndarray, path: str | os.PathLike = "<index>") -> None:
        self.keys_N, self.offsets_N, self.path = keys, offsets, os.fspath(path)
        # The first key where they are consecutive numbers in ascending order, else None.
        self.first_key = int(keys[0]) if len(keys) and _ascends(keys, 1) else None
        self.offsets_ascend = _ascends(offsets)

    def __len__(self) -> int:
        return len(self.keys_N)

    @functools.cached_property
    def _by_key(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows in the order of their keys, the keys in order)."""
        order = np.argsort(self.keys_N, kind="stable")
        return order.astype(np.int32) if len(order) < 2**31 else order, self.keys_N[order]

    @functools.cached_property
    def _sorted_offsets(self) -> np.ndarray:
        return self.offsets_N if self.offsets_ascend else np.unique(self.offsets_N)

    def row(self, key: int) -> int:
        """Row of a key.

        Raises:
            MissingKeyError: no such key.
        """
        if self.first_key is not None:
            row = key - self.first_key
            if 0 <= row < len(self.keys_N):
                return int(row)
        elif len(self.keys_N):
            row_N, key_N = self._by_key
            place = int(np.searchsorted(key_N, key, side="right")) - 1
            if place >= 0 and key_N[place] == key:
                return int(row_N[place])
        raise MissingKeyError(self.path, "no such key in the index", key=key)

    def __contains__(self, key: int) -> bool:
        try:
            self.row(key)
        except (MissingKeyError, TypeError):
            return False
        return True

    def place(self, row: int) -> tuple[int, int | None]:
        """(offset, offset of the record that the index has next, or None) of a row."""
        offset = int(self.offsets_N[row])
        if self.offsets_ascend:
            return offset, int(self.offsets_N[row + 1]) if row + 1 < len(self.offsets_N) else None
        return offset, self.next_offset(offset)

    def next_offset(self, offset: int) -> int | None:
        """The smallest offset of the index that lies behind this one, or None."""
        place = int(np.searchsorted(self._sorted_offsets, offset, side="right"))
        return int(self._sorted_offsets[place]) if place < len(self._sorted_offsets) else None

    def places(self, keys_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Offsets of many keys, and of the records that the index has next (-1: none), int64 [K] each.

        Raises:
            MissingKeyError: a key is not there.
        """
        if self.first_key is not None:
            row_K = np.asarray(keys_K, np.int64) - self.first_key
            missing_K = (row_K < 0) | (row_K >= len(self.keys_N))
        else:
            row_N, key_N = self._by_key
            place_K = np.searchsorted(key_N, keys_K, side="right") - 1
            missing_K = (place_K < 0) | (key_N[place_K] != keys_K)
            row_K = row_N[place_K]
        if missing_K.any():
            raise MissingKeyError(self.path, "no such key in the index", key=int(keys_K[missing_K.argmax()]))
        offset_K = self.offsets_N[row_K]
        offsets = self._sorted_offsets
        behind = row_K + 1 if self.offsets_ascend else np.searchsorted(offsets, offset_K, side="right")
        last = behind == len(offsets)
        return offset_K, np.where(last, -1, offsets[np.where(last, 0, behind)])

    def unique_keys(self) -> np.ndarray:
        """Keys in file order, a repeated key at its first place only; a view where nothing repeats."""
        if self.first_key is not None or len(self.keys_N) == 0:
            return self.keys_N
        row_N, key_N = self._by_key
        repeats = key_N[1:] == key_N[:-1]
        if not repeats.any():
            return self.keys_N
        keep = np.ones(len(self.keys_N), dtype=bool)
        keep[row_N[1:][repeats]] = False
        return self.keys_N[keep]


def _ascends(values: np.ndarray, step: int | None = None) -> bool:
    """True if the values rise strictly (by ``step`` each, if given)."""
    for start in range(0, len(values) - 1, CHUNK):
        part = values[start : start + CHUNK + 1]
        if not (part[1:] > part[:-1] if step is None else part[1:] == part[:-1] + step).all():
            return False
    return True


def read_index(path: str | os.PathLike) -> tuple[RecordIndex, bool]:
    """Parse an ``.idx`` file: ``key<tab>offset`` lines; blank lines, CRLF and further columns are accepted.

    Returns:
        (index, whole); ``whole`` is False if the last line is cut (no newline, or no offset).

    Raises:
        OSError: the file cannot be read.
        RecordError: a line that is not two integers, naming it.
    """
    path = os.fspath(path)
    size = Path(path).stat().st_size
    if size == 0:
        return RecordIndex(np.empty(0, np.int64), np.empty(0, np.int64), path), True
    with open(path, "rb") as file:
        file.seek(size - 1)
        whole = file.read(1) == b"\n"
    table = _read_plain(path)
    if table is None:
        table, uncut = _read_lines(path)
        whole = whole and uncut
    return RecordIndex(table[:, 0], table[:, 1], path), whole


def _read_plain(path: str) -> np.ndarray | None:
    """[N, 2] from a file of whole lines that begin with two integers; None if there is another one."""
    with warnings.catch_warnings():
        for kind in (UserWarning, DeprecationWarning):  # of a file of blank lines, and of numbers with a point
            warnings.simplefilter("error", kind)
        try:
            return np.loadtxt(path, np.int64, comments=None, usecols=(0, 1), ndmin=2, encoding="latin1")
        except (ValueError, UserWarning, DeprecationWarning):
            return None


def _read_lines(path: str) -> tuple[np.ndarray, bool]:
    """The slow way, for a file that the fast one refused: says which line is wrong, forgives a cut last one."""
    rows = []
    with open(path, encoding="latin1") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            try:
                if fields:
                    rows.append(np.array([int(fields[0]), int(fields[1])], np.int64))
            except (ValueError, IndexError, OverflowError):
                if line.endswith("\n"):
                    raise RecordError(path, f"line {number}: {line.strip()[:60]!r} is not 'key<tab>offset'") from None
                return np.array(rows, np.int64).reshape(-1, 2), False
    return np.array(rows, np.int64).reshape(-1, 2), True


def write_index(path: str | os.PathLike, keys: np.ndarray, offsets: np.ndarray) -> None:
    """Write ``key<tab>offset`` lines aside and rename, so that no half index is ever seen."""
    aside = Path(path).with_name(f".{Path(path).name}.{secrets.token_hex(4)}")
    try:
        with open(aside, "w", newline="\n") as file:
            for start in range(0, len(keys), CHUNK):
                pairs = zip(keys[start : start + CHUNK].tolist(), offsets[start : start + CHUNK].tolist(), strict=True)
                file.write("".join(f"{key}\t{offset}\n" for key, offset in pairs))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


class Keys(MutableSequence):
    """The ``keys`` list of mxnet's class, without a Python object a key until somebody changes it."""

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = keys

    def _as_list(self) -> list:
        if not isinstance(self._keys, list):
            self._keys = self._keys.tolist()
        return self._keys

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._keys, dtype=dtype)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, place: int | slice) -> int | list:
        found = self._keys[place]
        return found.tolist() if isinstance(found, (np.ndarray, np.integer)) else found

    def __setitem__(self, place: int | slice, value: object) -> None:
        self._as_list()[place] = value

    def __delitem__(self, place: int | slice) -> None:
        del self._as_list()[place]

    def insert(self, place: int, value: object) -> None:
        self._as_list().insert(place, value)

    def sort(self, **options) -> None:
        self._as_list().sort(**options)

    def __iter__(self) -> Iterator:
        if isinstance(self._keys, list):
            yield from self._keys
            return
        for start in range(0, len(self._keys), CHUNK):
            yield from self._keys[start : start + CHUNK].tolist()

    def __contains__(self, key: object) -> bool:
        return key in self._keys if isinstance(self._keys, list) else bool((self._keys == key).any())

    def __eq__(self, other: object) -> bool:
        try:
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        except TypeError:
            return NotImplemented

    def __repr__(self) -> str:
        return repr(self[:]) if len(self) <= 20 else f"<{len(self)} keys, {self[0]} to {self[-1]}>"


class Offsets(Mapping):
    """The ``idx`` dictionary of mxnet's class (key -> offset), looked up in the arrays."""

    def __init__(self, index: RecordIndex) -> None:
        self._index = index

    def __getitem__(self, key: int) -> int:
        return int(self._index.offsets_N[self._index.row(key)])

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def __iter__(self) -> Iterator[int]:
        return iter(Keys(self._index.unique_keys()))

    def __len__(self) -> int:
        return len(self._index.unique_keys())

    def __repr__(self) -> str:
        return f"<{len(self)} keys and offsets of {self._index.path}>"

"""The ``.idx`` file: keys and offsets as two arrays, no Python object a record.

N records; ``keys_N`` and ``offsets_N`` are int64, in the order of the file.
"""

import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, MutableSequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mxnet_reader.errors import MissingKeyError, RecordError

BLOCK = 1 << 19  # bytes parsed at a time: the temporaries stay small, the threads meet seldom
_NUM_PARSERS = 2  # threads; more would mostly wait for the interpreter's lock
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
        self._first_key = int(keys[0]) if len(keys) and _ascends(keys, 1) else None
        self.offsets_ascend = _ascends(offsets)
        self._order = self._sorted_keys = self._sorted_offsets = None

    def __len__(self) -> int:
        return len(self.keys_N)

    @property
    def ascending_by_one(self) -> bool:
        """True if the keys are consecutive numbers in ascending order."""
        return self._first_key is not None

    def row(self, key: int) -> int:
        """Row of a key.

        Raises:
            MissingKeyError: no such key.
        """
        if self._first_key is not None:
            row = key - self._first_key
            if 0 <= row < len(self.keys_N):
                return int(row)
        elif len(self.keys_N):
            self._sort_keys()
            place = int(np.searchsorted(self._sorted_keys, key, side="right")) - 1
            if place >= 0 and self._sorted_keys[place] == key:
                return int(self._order[place])
        raise MissingKeyError(self.path, "no such key in the index", key=key)

    def _sort_keys(self) -> None:
        if self._sorted_keys is None:
            order = np.argsort(self.keys_N, kind="stable")
            self._order = order.astype(np.int32) if len(order) < 2**31 else order
            self._sorted_keys = self.keys_N[order]

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
        offsets = self.offsets_N
        if not self.offsets_ascend:
            offsets = self._offsets_in_order()
        place = int(np.searchsorted(offsets, offset, side="right"))
        return int(offsets[place]) if place < len(offsets) else None

    def _offsets_in_order(self) -> np.ndarray:
        if self._sorted_offsets is None:
            self._sorted_offsets = np.unique(self.offsets_N)
        return self._sorted_offsets

    def places(self, keys_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Offsets of many keys, and of the records that the index has next (-1: none), int64 [K] each.

        Raises:
            MissingKeyError: a key is not there.
        """
        if self._first_key is not None:
            row_K = np.asarray(keys_K, np.int64) - self._first_key
            missing_K = (row_K < 0) | (row_K >= len(self.keys_N))
        else:
            self._sort_keys()
            place_K = np.searchsorted(self._sorted_keys, keys_K, side="right") - 1
            missing_K = (place_K < 0) | (self._sorted_keys[place_K] != keys_K)
            row_K = self._order[place_K]
        if missing_K.any():
            raise MissingKeyError(self.path, "no such key in the index", key=int(keys_K[missing_K.argmax()]))
        offset_K = self.offsets_N[row_K]
        if self.offsets_ascend:
            behind, offsets = row_K + 1, self.offsets_N
        else:
            behind, offsets = np.searchsorted(self._offsets_in_order(), offset_K, side="right"), self._sorted_offsets
        last = behind == len(offsets)
        return offset_K, np.where(last, -1, offsets[np.where(last, 0, behind)])

    def unique_keys(self) -> np.ndarray:
        """Keys in file order, a repeated key at its first place only; a view where nothing repeats."""
        if self._first_key is not None or len(self.keys_N) == 0:
            return self.keys_N
        self._sort_keys()
        repeats = self._sorted_keys[1:] == self._sorted_keys[:-1]
        if not repeats.any():
            return self.keys_N
        keep = np.ones(len(self.keys_N), dtype=bool)
        keep[self._order[1:][repeats]] = False
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
    """[N, 2] from a file of nothing but ``digits<tab>digits<newline>`` lines; None if it is not one.

    Eight digits at a time in 64-bit words, so that opening millions of lines takes well under a second; no larger than
    the result and a few blocks.
    """
    with open(path, "rb") as file, ThreadPoolExecutor(_NUM_PARSERS) as pool:
        num_lines = sum(block.count(b"\n") for block in iter(lambda: file.read(BLOCK), b""))
        file.seek(0)
        flat, filled = np.empty(2 * num_lines, np.int64), 0
        blocks = _whole_lines(file)
        while group := list(itertools.islice(blocks, _NUM_PARSERS)):
            for values in pool.map(_parse_plain, group):
                if values is None or filled + len(values) > len(flat):
                    return None
                flat[filled : filled + len(values)] = values
                filled += len(values)
    return flat.reshape(-1, 2) if filled == len(flat) else None


def _whole_lines(file) -> Iterator[bytes]:
    """The file in blocks of whole lines, 16 filler characters before each; a cut last line comes as ``?``."""
    rest = b""
    for block in iter(lambda: file.read(BLOCK), b""):
        block = rest + block
        stop = block.rfind(b"\n") + 1
        rest = block[stop:]
        if stop:
            yield b"0" * 16 + block[:stop]
    if rest:
        yield b"?"


def _parse_plain(text: bytes) -> np.ndarray | None:
    """The numbers of whole lines behind 16 filler characters, int64; None for anything but digits, tabs, newlines."""
    letters = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(letters < ord("0"))
    widths = np.diff(ends, prepend=15) - 1
    separators = letters[ends]
    if len(ends) % 2 or (separators[::2] != ord("\t")).any() or (separators[1::2] != ord("\n")).any():
        return None
    if letters.max() > ord("9") or widths.min(initial=1) < 1 or widths.max(initial=1) > 16:
        return None
    words = np.ndarray((len(text) - 7,), "<u8", text, strides=(1,))  # the 8 characters from every place on
    values = _eight_digits(words[ends - 8], np.minimum(widths, 8))
    if widths.max(initial=1) > 8:
        long = np.flatnonzero(widths > 8)
        values[long] += _eight_digits(words[ends[long] - 16], widths[long] - 8) * np.uint64(10**8)
    return values.astype(np.int64)


def _eight_digits(words: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Decimal value of the last ``widths`` (1..8) of eight characters, the first one in the lowest byte."""
    unused = (64 - 8 * widths).astype(np.uint64)
    words = (words ^ np.uint64(0x3030303030303030)) >> unused << unused
    for mask, factor, shift in _MERGES:  # digits to pairs, pairs to fours, fours to eight
        words = (words & mask) * factor >> shift
    return words


_MERGES = [
    tuple(map(np.uint64, merge))
    for merge in (
        (0x0F0F0F0F0F0F0F0F, 10 * 2**8 + 1, 8),
        (0x00FF00FF00FF00FF, 100 * 2**16 + 1, 16),
        (0x0000FFFF0000FFFF, 10_000 * 2**32 + 1, 32),
    )
]


def _read_lines(path: str) -> tuple[np.ndarray, bool]:
    """The slow way, for a file that the fast one refused: says which line is wrong, forgives a cut last one."""
    rows, cut = [], None
    with open(path, encoding="latin1") as file:
        for number, line in enumerate(file, 1):
            if cut is not None:
                break
            fields = line.split()
            if not fields:
                continue
            try:
                row = (int(fields[0]), int(fields[1]))
                if max(map(abs, row)) >= 2**63:
                    raise OverflowError
                rows.append(row)
            except (ValueError, IndexError, OverflowError):
                cut = (number, line)
        else:
            if cut is None or not cut[1].endswith("\n"):
                return np.array(rows, dtype=np.int64).reshape(-1, 2), cut is None
    raise RecordError(path, f"line {cut[0]}: {cut[1].strip()[:60]!r} is not 'key<tab>offset'")


def write_index(path: str | os.PathLike, keys: np.ndarray, offsets: np.ndarray) -> None:
    """Write ``key<tab>offset`` lines aside and rename, so that no half index is ever seen."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", newline="\n") as file:
            for start in range(0, len(keys), CHUNK):
                pairs = zip(keys[start : start + CHUNK].tolist(), offsets[start : start + CHUNK].tolist(), strict=True)
                file.write("".join(f"{key}\t{offset}\n" for key, offset in pairs))
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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

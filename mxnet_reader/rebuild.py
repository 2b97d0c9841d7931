"""Open the index of a record file; rebuild it by a scan where it is missing or stops early.

The key is not in the record file. Where the file holds an InsightFace header record (flag 2, id 0, no image bytes) the
keys are the ids in the record headers; elsewhere they are the ordinals, 0 for the first record.
"""

import os
import stat
import sys
import time
import warnings
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mxnet_reader.errors import RecordError
from mxnet_reader.file import RecordFile
from mxnet_reader.format import IMAGE_HEADER, MAGIC_BYTES
from mxnet_reader.index import RecordIndex, read_index, write_index
from mxnet_reader.insightface import is_identity

NUM_PROBES = 64  # places at which an index that stops early is tested for being a prefix, not a subset
REPORT_EVERY = 1 << 16  # records


def open_index(file: RecordFile, idx_path: str | os.PathLike) -> RecordIndex:
    """The index of ``file``: read, completed, or rebuilt.

    Args:
        file: the open record file.
        idx_path: the ``.idx`` file; a missing one means a scan of the whole record file, whose result is stored there
            (never beside data that is read-only).

    Raises:
        RecordError: the index or the record file is malformed.
    """
    if not Path(idx_path).exists():
        index = rebuild_index(file, idx_path)
        if _may_write(file.path, idx_path):
            write_index(idx_path, index.keys_N, index.offsets_N)
        return index
    index, whole = read_index(idx_path)
    if len(index):
        return _complete(file, index, whole)
    if file.size:
        warnings.warn(f"{idx_path} is empty: rebuilding it from {file.path}", stacklevel=3)
        return rebuild_index(file, idx_path)
    return index


def rebuild_index(
    file: RecordFile, path: str | os.PathLike, start: int = 0, first_ordinal: int = 0, by_id: bool = False
) -> RecordIndex:
    """Scan the records from ``start`` on and key them.

    Args:
        file: the open record file.
        path: name of the index, for messages.
        start: offset of the first record to take.
        first_ordinal: ordinal of the record at ``start``.
        by_id: the header ids are the keys, as they are where an InsightFace header record is met.

    Raises:
        RecordError: a damaged record, or two records with one id where ids are keys.
    """
    report = _stderr_progress(f"rebuilding the index of {Path(file.path).name}")
    offsets, ids = array("q"), array("q")
    has_header, all_have_ids = False, True
    for record in file.scan(start):
        offsets.append(record.offset)
        if len(record.head) >= IMAGE_HEADER.size:
            flag, _, identity, _ = IMAGE_HEADER.unpack_from(record.head)
            has_header |= flag == 2 and identity == 0 and record.size == IMAGE_HEADER.size + 8
            ids.append(identity if identity < 2**63 else -1)
        else:
            all_have_ids = False
            ids.append(-1)
        if len(offsets) % REPORT_EVERY == 0:
            report(record.end - start, file.size - start)
    offsets_N, ids_N = np.array(offsets, np.int64), np.array(ids, np.int64)
    report(file.size - start, file.size - start)
    if by_id or (has_header and all_have_ids):
        unique, first, counts = np.unique(ids_N, return_index=True, return_counts=True)
        if (counts > 1).any():
            twice = int(np.argmax(counts > 1))
            reason = f"{counts[twice]} records have this id, so that the index cannot be rebuilt from the ids"
            raise RecordError(file.path, reason, offsets_N[first[twice]], int(unique[twice]))
        return RecordIndex(ids_N, offsets_N, path)
    return RecordIndex(np.arange(first_ordinal, first_ordinal + len(offsets_N)), offsets_N, path)


def _complete(file: RecordFile, index: RecordIndex, whole: bool) -> RecordIndex:
    """Add the records behind the last indexed one, if the index is the beginning of a longer one."""
    keys_N, offsets_N = index.keys_N, index.offsets_N
    if not whole and _record(file, offsets_N[-1]) is None:  # the last offset lost its last digits
        keys_N, offsets_N = keys_N[:-1], offsets_N[:-1]
        index, whole = RecordIndex(keys_N, offsets_N, index.path), False
        if len(keys_N) == 0:
            return rebuild_index(file, index.path)
    last = _record(file, offsets_N.max(), trust_end=True)
    if last is None:
        return index  # reading that record will say what is wrong
    end = last[1]
    if end >= file.size or file.read_bytes(4, end) != MAGIC_BYTES or not _is_prefix(file, offsets_N):
        return index
    stop = f"byte {end} of {file.size} of {file.path}"
    warnings.warn(f"{index.path} stops at {stop}: the records behind it are added by a scan", stacklevel=4)
    firsts = [_record(file, offset, trust_end=True) for offset in offsets_N[keys_N == 0]]
    by_id = any(first is not None and is_identity(first[0]) for first in firsts)
    try:
        rest = rebuild_index(file, index.path, end, first_ordinal=len(keys_N), by_id=by_id)
    except RecordError as error:
        warnings.warn(f"{error}: the index stays as it is", stacklevel=4)
        return index
    keys = np.concatenate([keys_N, rest.keys_N])
    return RecordIndex(keys, np.concatenate([offsets_N, rest.offsets_N]), index.path)


def _record(file: RecordFile, offset: np.int64, trust_end: bool = False) -> tuple[bytes, int] | None:
    """(payload, end) of the record at an offset, None where there is no whole one."""
    try:
        return file.read_record(int(offset), trust_end=trust_end)
    except RecordError:
        return None


def _is_prefix(file: RecordFile, offsets_N: np.ndarray) -> bool:
    """True if the index covers the file without a gap up to its last record (probed at a few places)."""
    offsets = np.unique(offsets_N)
    if offsets[0] != 0:
        return False
    for place in np.unique(np.linspace(0, len(offsets) - 2, NUM_PROBES).astype(int)) if len(offsets) > 1 else ():
        found = _record(file, offsets[place], trust_end=True)
        if found is not None and found[1] != offsets[place + 1]:
            return False
    return True


def _may_write(rec_path: str, idx_path: str | os.PathLike) -> bool:
    """False beside read-only data. The mode bits count even for root, whom the system lets write everywhere."""
    folder = Path(idx_path).resolve().parent
    writable = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
    if not all(Path(path).stat().st_mode & writable for path in (folder, rec_path)):
        return False
    return os.access(folder, os.W_OK)


def _stderr_progress(what: str) -> Callable[[int, int], None]:
    started = reported = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal reported
        now = time.monotonic()
        finished = done >= total and reported > started
        if now - reported < 1 and not finished:
            return
        reported = now
        rate = done / max(now - started, 1e-9)
        left = (total - done) / max(rate, 1)
        line = f"\r{what}: {100 * done / max(total, 1):3.0f} %, {rate / 2**20:.0f} MiB/s, {left:.0f} s left "
        print(line, end="\n" if finished else "", file=sys.stderr, flush=True)

    return report

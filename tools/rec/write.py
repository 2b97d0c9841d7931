"""Writing record files: parallel, in order, resumable, and visible under their name only when whole."""

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mxnet_reader import RecordError
from mxnet_reader.file import RecordFile
from mxnet_reader.format import encode_record
from utils.errors import UserError
from utils.files import full_disk_named, write_text
from utils.progress import progress

FLUSH_EVERY = 256


def in_order(function: Callable, numbers: range, workers: int) -> Iterator:
    """``function(n)`` for all n, computed by threads a little ahead, given out in order."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        try:
            for number in numbers:
                waiting.append(pool.submit(function, number))
                if len(waiting) > 8 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def write_records(
    prefix: Path,
    count: int,
    produce: Callable[[int], tuple[int, bytes]],
    identity: object,
    workers: int = 2,
    num_classes: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> None:
    """Write ``prefix.rec`` and ``.idx`` (and ``property`` beside them).

    The work grows in ``.partial`` files and is renamed at the end. A second run with the same ``identity`` goes on
    behind the last whole record.

    Args:
        prefix: path without suffix.
        count: number of records.
        produce: n -> (key, payload); called from threads.
        identity: what the result depends on, as JSON-able values; another one starts anew.
        workers: threads.
        num_classes, image_size: for ``property``; left out if None.

    Raises:
        UserError: the files are there already.
        OSError: the folder cannot be written.
    """
    rec, idx = (prefix.with_name(f"{prefix.name}{suffix}") for suffix in (".rec", ".idx"))  # dots are no suffixes
    for path in (rec, idx):
        if path.exists():
            raise UserError(f"{path} exists; remove it or choose another output")
    was_there = prefix.parent.exists()
    prefix.parent.mkdir(parents=True, exist_ok=True)
    rec_part, idx_part, journal = (Path(f"{prefix}{suffix}.partial") for suffix in (".rec", ".idx", ".job"))
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    done = _resume(rec_part, idx_part) if journal.exists() and journal.read_text() == fingerprint else 0
    if done == 0:
        for path in (rec_part, idx_part):
            path.unlink(missing_ok=True)
    journal.write_text(fingerprint)
    try:
        with full_disk_named(rec):
            _append(rec_part, idx_part, produce, range(done, count), workers, f"writing {rec.name}")
    except BaseException:
        if rec_part.exists() and rec_part.stat().st_size == 0:  # nothing to resume from
            for path in (rec_part, idx_part, journal):
                path.unlink(missing_ok=True)
            if not was_there:
                with contextlib.suppress(OSError):
                    prefix.parent.rmdir()
        raise
    if num_classes is not None and image_size is not None:
        write_text(prefix.parent / "property", f"{num_classes},{image_size[0]},{image_size[1]}\n")
    rec_part.replace(rec)
    idx_part.replace(idx)
    journal.unlink()


def _append(
    rec_part: Path, idx_part: Path, produce: Callable[[int], tuple[int, bytes]], todo: range, workers: int, what: str
) -> None:
    with open(rec_part, "ab") as rec_file, open(idx_part, "a", newline="\n") as idx_file:
        position, lines = rec_file.tell(), []
        records = in_order(produce, todo, workers)
        for key, payload in progress(records, todo.stop, what, todo.start):
            encoded = encode_record(payload)
            rec_file.write(encoded)
            lines.append(f"{key}\t{position}\n")
            position += len(encoded)
            if len(lines) >= FLUSH_EVERY:  # records first: a line never points at bytes that are not there
                rec_file.flush()
                idx_file.write("".join(lines))
                idx_file.flush()
                lines = []
        rec_file.flush()
        os.fsync(rec_file.fileno())
        idx_file.write("".join(lines))


def _resume(rec_part: Path, idx_part: Path) -> int:
    """Cut both files behind the last record that is whole; number of records kept."""
    if not rec_part.exists() or not idx_part.exists():
        return 0
    text = idx_part.read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    with RecordFile(rec_part) as file:
        while lines:
            key, offset = map(int, lines[-1].split("\t"))
            try:
                _, end = file.read_record(offset, key, trust_end=True)
            except RecordError:
                lines.pop()
                continue
            if end <= file.size:
                os.truncate(rec_part, end)
                break
            lines.pop()
    idx_part.write_text("".join(f"{line}\n" for line in lines))
    return len(lines)

"""Positional reading of a ``.rec`` file: every record checked, safe to share between threads and over a fork.

Nothing is allocated because a file claims it: a length is compared with the file first. The format has no checksum, so
what can be told from the framing is told: a record has to end where another one starts, or at the end of the file.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mxnet_reader.errors import RecordError
from mxnet_reader.format import (
    FIRST,
    LAST,
    MAGIC,
    MAGIC_BYTES,
    MAX_LENGTH,
    MIDDLE,
    PART_HEADER,
    WHOLE,
    find_aligned_magic,
)

READ_AHEAD = 1 << 14  # bytes asked for when the end of a record is not known; the rest follows in a second read
MAX_GUESS = 1 << 20  # an index with gaps must not make one record cost a huge read
SEARCH_BLOCK = 1 << 22


class Scanned(NamedTuple):
    """One record met by a scan: where it starts and ends (padding included), payload size, payload's first bytes."""

    offset: int
    end: int
    size: int
    head: bytes


class RecordFile(contextlib.AbstractContextManager):
    """Records of one file by offset; OSError if it cannot be opened.

    ``os.pread`` where the system has it; otherwise one handle behind a lock, reopened in a forked child.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        self._open()

    def _open(self) -> None:
        self._handle = open(self.path, "rb", buffering=0)  # noqa: SIM115 - lives as long as this object
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._fd = self._handle.fileno()
        self._read = getattr(os, "pread", self._locked_read)
        self._use_preadv = hasattr(os, "pread") and hasattr(os, "preadv")
        self.size = os.fstat(self._fd).st_size

    def close(self) -> None:
        self._handle.close()

    @property
    def closed(self) -> bool:
        return self._handle.closed

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __getstate__(self) -> dict:
        return {"path": self.path, "closed": self.closed}

    def __setstate__(self, state: dict) -> None:
        self.path = state["path"]
        self._open()
        if state["closed"]:
            self.close()

    def refresh_size(self) -> int:
        """Size of the file now, in bytes (it may have grown, or been cut, since it was opened)."""
        if self.closed:
            raise ValueError(f"{self.path}: read after close")
        self.size = os.fstat(self._fd).st_size
        return self.size

    def _read_at(self, num_bytes: int, offset: int) -> bytes:
        if self._handle.closed:
            raise ValueError(f"{self.path}: read after close")
        block = self._read(self._fd, num_bytes, offset)
        # A signal or the kernel's 2 GiB limit can shorten a read.
        while len(block) < num_bytes and (more := self._read(self._fd, num_bytes - len(block), offset + len(block))):
            block += more
        return block

    def _locked_read(self, _: int, num_bytes: int, offset: int) -> bytes:
        if self._pid != os.getpid():  # the parent's lock may be held for ever, and its file position is shared
            self._open()
        with self._lock:
            self._handle.seek(offset)
            return self._handle.read(num_bytes) or b""

    def read_bytes(self, num_bytes: int, offset: int) -> bytes:
        """At most ``num_bytes`` bytes from ``offset``; fewer only at the end of the file."""
        return self._read_at(max(0, min(num_bytes, self.size - offset)), offset)

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` from ``offset`` on, without an object for the bytes; returns how many there were.

        Fewer at the end of the file, or after a signal: whoever needs the rest reads again.
        """
        if not self._use_preadv:
            block = self._read_at(len(view), offset)
            view[: len(block)] = block
            return len(block)
        if self._handle.closed:
            raise ValueError(f"{self.path}: read after close")
        return os.preadv(self._fd, [view], offset)

    def read_record(
        self, offset: int, key: object = None, limit: int | None = None, trust_end: bool = False
    ) -> tuple[bytes, int]:
        """The record that starts at ``offset``.

        Args:
            offset: byte offset of its first part.
            key: key in the index, for messages.
            limit: offset of the next record if the index tells it; saves a read, and the end is held against it.
            trust_end: skip the check of what follows (a scan checks it itself).

        Returns:
            (payload, offset just behind the record, padding included).

        Raises:
            RecordError: there is no whole, well-formed record at this offset.
        """
        whole = None
        if 0 <= offset < self.size:
            guess = READ_AHEAD if limit is None or limit <= offset else min(limit - offset, MAX_GUESS)
            block = self._read_at(min(guess, self.size - offset), offset)
            if len(block) >= 8:
                magic, word = PART_HEADER.unpack_from(block)
                stop = 8 + word
                if magic == MAGIC and word <= MAX_LENGTH and stop + 3 & ~3 <= len(block):  # whole (cflag 0) and here
                    whole = block[8:stop], offset + (stop + 3 & ~3)
                    if stop & 3 and any(block[stop : stop + 3 & ~3]):
                        self._raise_padding(word, offset, key)
        payload, end = whole or self._read_parts(offset, key)
        if end != limit and not trust_end:
            self._check_end(payload, offset, end, key, limit)
        return payload, end

    def _read_parts(self, offset: int, key: object) -> tuple[bytes, int]:
        """The general path: any number of parts, every claim checked before it is followed."""
        if not 0 <= offset < self.size:
            reason = f"the index points outside the file ({self.size} bytes)"
            raise RecordError(self.path, reason, offset, key)
        pieces, position, expected = [], offset, (WHOLE, FIRST)
        while True:
            header = self.read_bytes(8, position)
            if len(header) < 8:
                self._raise_short(position + 8, offset, key)
            magic, word = PART_HEADER.unpack(header)
            cflag, length = word >> 29, word & MAX_LENGTH
            if magic != MAGIC:
                raise RecordError(self.path, f"bad magic 0x{magic:08x} at byte {position}", offset, key)
            if cflag not in expected or (cflag in (FIRST, MIDDLE) and length % 4):
                reason = f"impossible part (cflag {cflag}, length {length}) at byte {position}"
                raise RecordError(self.path, reason, offset, key)
            if position + 8 + length > self.size:
                self._raise_short(position + 8 + length, offset, key)
            padded = self.read_bytes(length + 3 & ~3, position + 8)
            if len(padded) < length:
                self._raise_short(position + 8 + length, offset, key)
            if any(padded[length:]):
                self._raise_padding(length, offset, key)
            pieces.append(padded[:length])
            position += 8 + (length + 3 & ~3)
            if cflag != WHOLE and find_aligned_magic(pieces[-1]):
                reason = f"a part of {length} bytes reaches into the next one: a damaged length"
                raise RecordError(self.path, reason, offset, key)
            if cflag in (WHOLE, LAST):
                return (MAGIC_BYTES.join(pieces) if len(pieces) > 1 else pieces[0]), position
            expected = (MIDDLE, LAST)

    def _raise_padding(self, length: int, offset: int, key: object) -> None:
        reason = f"the padding behind {length} bytes is not zero: a damaged length"
        raise RecordError(self.path, reason, offset, key)

    def _raise_short(self, needed: int, offset: int, key: object) -> None:
        size_before = self.size
        size = self.refresh_size()
        cut = f" (it had {size_before} when it was opened)" if size < size_before else ""
        reason = f"the record needs bytes up to {needed}, but the file has {size}{cut}: truncated or a damaged length"
        raise RecordError(self.path, reason, offset, key)

    def _check_end(self, payload: bytes, offset: int, end: int, key: object, limit: int | None) -> None:
        """A record whose end is not where the index says the next one starts: is its length to be believed?"""
        if limit is not None and offset < limit < min(end, self.size):
            swallowed = self._starts_record(limit)
        else:
            swallowed = self._swallows_magic(offset, end)
        if swallowed:
            reason = f"the length ({len(payload)} bytes) reaches into the next record: a damaged length"
            raise RecordError(self.path, reason, offset, key)
        follows = self.read_bytes(8, end)
        if follows[:4] != MAGIC_BYTES:
            indexed_later = limit is not None and end < limit < self.size
            continued = end < self.size and (indexed_later or self.judge_gap(end) == "lost")
        else:  # where the index has its next record further on, this could be the rest of ours
            continued = limit is not None and len(follows) == 8 and follows[7] >> 5 not in (WHOLE, FIRST)
        if continued:
            reason = f"no record starts at byte {end}, where this one ends: a damaged header ({len(payload)} bytes)"
            raise RecordError(self.path, reason, offset, key)

    def _swallows_magic(self, offset: int, end: int) -> bool:
        """True if a part's payload holds an aligned magic, which a writer would have split at."""
        position = offset
        while position < end:
            header = self.read_bytes(8, position)
            if len(header) < 8:
                return False
            length = PART_HEADER.unpack(header)[1] & MAX_LENGTH
            if find_aligned_magic(self.read_bytes(length, position + 8)):
                return True
            position += 8 + (length + 3 & ~3)
        return False

    def judge_gap(self, position: int) -> str:
        """What the bytes at ``position``, where a record ought to start and does not, are.

        Returns:
            ``garbage``: nothing after it is a record (padding, a trailing newline, other bytes): tolerated;
            ``damaged``: a record whose header is spoiled; ``lost``: neither, but records follow further on.
        """
        head = self.read_bytes(8, position)
        if position == 0 or sum(a == b for a, b in zip(head, MAGIC_BYTES, strict=False)) >= 2:
            return "damaged"
        if len(head) < 8 or not any(head):
            return "garbage" if self.find_record(position) is None else "lost"
        word = PART_HEADER.unpack(head)[1]
        stop = position + 8 + (word & MAX_LENGTH)
        end = stop + 3 & ~3
        if word >> 29 <= LAST and (self.size in (stop, end) or (end < self.size and self._starts_record(end))):
            return "damaged"
        return "garbage" if self.find_record(position) is None else "lost"

    def _starts_record(self, position: int) -> bool:
        """True if a whole or first part that fits in the file starts here."""
        header = self.read_bytes(8, position)
        if len(header) < 8:
            return False
        magic, word = PART_HEADER.unpack(header)
        return magic == MAGIC and word >> 29 in (WHOLE, FIRST) and position + 8 + (word & MAX_LENGTH) <= self.size

    def find_record(self, position: int) -> int | None:
        """Offset of the next record that starts behind ``position`` (multiples of 4 only), or None."""
        position = (position & ~3) + 4
        while position < self.size:
            block = self.read_bytes(SEARCH_BLOCK + 4, position)
            for found in find_aligned_magic(block):
                if self._starts_record(position + found):
                    return position + found
            if len(block) < SEARCH_BLOCK + 4:
                return None
            position += SEARCH_BLOCK
        return None

    def scan(self, start: int = 0, on_error: Callable[[RecordError], None] | None = None) -> Iterator[Scanned]:
        """All records from ``start`` on, reading headers (and the first bytes of payloads) only.

        Args:
            start: offset of a record.
            on_error: called for every damaged record instead of raising; the scan goes on at the next good one.

        Raises:
            RecordError: a damaged record, without ``on_error``.
        """
        position = start
        while position is not None and position < self.size:
            try:
                record = self._scan_one(position)
            except RecordError as error:
                if on_error is None:
                    raise
                on_error(error)
                position = self.find_record(position)
                continue
            if record is None:
                return
            yield record
            position = record.end

    def _scan_one(self, position: int) -> Scanned | None:
        block = self.read_bytes(64, position)
        if len(block) < 8 or block[:4] != MAGIC_BYTES:
            if self.judge_gap(position) == "garbage":
                return None
            raise RecordError(self.path, f"no record here: bytes {block[:4].hex()} in the magic's place", position)
        length = PART_HEADER.unpack_from(block)[1]
        stop = position + 8 + length
        if length > MAX_LENGTH or stop > self.size:
            payload, end = self._read_parts(position, None)
            return Scanned(position, end, len(payload), payload[:56])
        end = stop + 3 & ~3
        if end < self.size and self.read_bytes(4, end) != MAGIC_BYTES and self.judge_gap(end) == "lost":
            reason = f"no record starts at byte {end}, where this one ends: a damaged length ({length} bytes)"
            raise RecordError(self.path, reason, position)
        return Scanned(position, end, length, block[8 : 8 + min(length, 56)])

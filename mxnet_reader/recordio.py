"""A drop-in for ``mxnet.recordio``: change the import, keep the script.

Where mxnet answers None or nonsense for a malformed file, this raises ``RecordError`` (see ``mxnet_reader.errors``).
Reading is positional, so one reader serves several threads through ``read_idx`` and works on in a forked child.
"""

import contextlib
import os

import numpy as np

from mxnet_reader.errors import MissingKeyError, RecordError
from mxnet_reader.file import RecordFile
from mxnet_reader.format import MAGIC_BYTES, IRHeader, encode_record, pack, pack_img, unpack, unpack_img
from mxnet_reader.index import Keys, Offsets, RecordIndex
from mxnet_reader.rebuild import open_index

__all__ = ["IRHeader", "MXIndexedRecordIO", "MXRecordIO", "RecordError", "pack", "pack_img", "unpack", "unpack_img"]


class MXRecordIO(contextlib.AbstractContextManager):
    """Sequential reading (``flag="r"``) or writing (``flag="w"``) of a record file.

    Args:
        uri: path of the ``.rec`` file.
        flag: ``r`` or ``w``; ``w`` empties the file.

    Raises:
        ValueError: another flag.
        OSError: the file cannot be opened.
    """

    is_open = False
    index: RecordIndex | None = None  # of a reader by integer keys

    def __init__(self, uri: str | os.PathLike, flag: str) -> None:
        self.uri, self.flag = os.fspath(uri), flag
        self.open()

    def open(self) -> None:
        """Open the file, at its first record."""
        if self.flag not in ("r", "w"):
            raise ValueError(f"Invalid flag {self.flag!r}: 'r' or 'w'")
        self.writable = self.flag == "w"
        self.handle = open(self.uri, "wb") if self.writable else RecordFile(self.uri)  # noqa: SIM115
        self.pid = os.getpid()
        self._position, self._sought_key = 0, None
        self.is_open = True

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if not self.is_open:
            return
        self.is_open = False
        if self.writable and self.pid != os.getpid():  # a forked child must not flush the parent's buffer
            return
        self.handle.close()

    def __del__(self) -> None:
        self.close()

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __getstate__(self) -> dict:
        """An open writer cannot be pickled without losing what it wrote (mxnet empties the file on loading)."""
        if self.writable and self.is_open:
            raise ValueError(f"{self.uri}: a writer cannot be pickled while it is open; close it first")
        state = dict(self.__dict__)
        state.pop("handle", None)
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.is_open:
            self.handle = RecordFile(self.uri)
            self.pid = os.getpid()

    def reset(self) -> None:
        """Back to the first record; a writer empties its file."""
        self.close()
        self.open()

    def write(self, buf: bytes) -> None:
        """Append one record.

        Raises:
            ValueError: opened for reading, closed, or 2**29 bytes and more.
            RuntimeError: called in a forked child.
        """
        self._require("write", True)
        if self.pid != os.getpid():
            raise RuntimeError(f"{self.uri}: Forbidden operation in multiple processes (opened by {self.pid})")
        if isinstance(buf, str):
            raise TypeError("a bytes-like object is required, not 'str'")
        encoded = encode_record(bytes(buf))
        self.handle.write(encoded)
        self._position += len(encoded)

    def read(self) -> bytes | None:
        """The next record, or None at the end of the file.

        Bytes behind the last record that cannot be one (padding, a newline) count as the end. After an error the next
        call goes on at the next good record.

        Raises:
            RecordError: a damaged record, naming its offset.
        """
        self._require("read", False)
        file, position, key = self.handle, self._position, self._sought_key
        self._sought_key = None
        if key is None:
            if position >= file.size and position >= file.refresh_size():
                return None
            if file.read_bytes(4, position) != MAGIC_BYTES and file.judge_gap(position) == "garbage":
                return None
        following = None if self.index is None else self.index.next_offset(position)
        try:
            payload, self._position = file.read_record(position, key, following)
        except RecordError:
            # The index knows better than a search, which can take the rest of a spoiled split record for a whole one.
            if self.index is None and 0 <= position < file.size:
                following = file.find_record(position)
            self._position = file.size if following is None else following
            raise
        return payload

    def tell(self) -> int:
        """Byte offset of the next record to be written (or read)."""
        self._require("tell", self.writable)
        return self._position

    def _require(self, operation: str, writable: bool) -> None:
        if not self.is_open:
            raise ValueError(f"{self.uri}: {operation} on a closed file")
        if self.writable != writable:
            raise ValueError(f"{self.uri}: {operation} on a file opened with flag {self.flag!r}")


class MXIndexedRecordIO(MXRecordIO):
    """Random access by key.

    Args:
        idx_path: path of the ``.idx`` file; opened for reading, a missing or cut one is rebuilt by a scan.
        uri: path of the ``.rec`` file.
        flag: ``r`` or ``w``.
        key_type: type of the keys; anything but int is kept in a dictionary.

    Attributes:
        keys: all keys in the order of the index (a sequence; a list when writing).
        idx: key -> offset.
        index: the arrays behind both (``RecordIndex``), when reading integer keys.
    """

    def __init__(self, idx_path: str | os.PathLike, uri: str | os.PathLike, flag: str, key_type: type = int) -> None:
        self.idx_path, self.key_type = os.fspath(idx_path), key_type
        super().__init__(uri, flag)

    def open(self) -> None:
        super().open()
        self.idx, self.keys, self.fidx, self.index = {}, [], None, None
        try:
            if self.writable:
                self.fidx = open(self.idx_path, "w", newline="\n")  # noqa: SIM115
            elif self.key_type is int:
                self._use(open_index(self.handle, self.idx_path))
            else:
                self._read_typed_keys()
        except BaseException:
            self.close()
            raise

    def _use(self, index: RecordIndex) -> None:
        self.index, self.keys, self.idx = index, Keys(index.keys_N), Offsets(index)

    def _read_typed_keys(self) -> None:
        with open(self.idx_path) as file:
            for number, line in enumerate(file, 1):
                fields = line.rstrip("\r\n").split("\t")
                if fields == [""]:
                    continue
                try:
                    key, offset = self.key_type(fields[0]), int(fields[1])
                except (ValueError, IndexError):
                    reason = f"line {number}: {line.strip()[:60]!r} is not 'key<tab>offset'"
                    raise RecordError(self.idx_path, reason) from None
                self.idx[key] = offset
                self.keys.append(key)

    def close(self) -> None:
        if self.is_open and self.fidx is not None and self.pid == os.getpid():
            self.fidx.close()
        super().close()

    def __getstate__(self) -> dict:
        state = super().__getstate__()
        state.pop("fidx", None)
        if self.index is not None:
            del state["idx"]
            state["keys"] = None
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.fidx = None
        if self.index is not None:
            self._use(self.index)

    def seek(self, idx: object) -> None:
        """Let the next ``read`` return the record of this key.

        Raises:
            MissingKeyError: a ``KeyError`` (and ``RecordError``): no such key.
        """
        self._require("seek", False)
        self._position, self._sought_key = self._place(idx)[0], idx

    def _place(self, key: object) -> tuple[int, int | None]:
        if self.index is not None and isinstance(key, (int, np.integer)):
            return self.index.place(self.index.row(int(key)))
        if self.index is None and key in self.idx:
            return self.idx[key], None
        raise MissingKeyError(self.idx_path, "no such key in the index", key=key)

    def read_idx(self, idx: object) -> bytes:
        """The record of a key. Threads may call this at once; the position of ``read`` moves as mxnet's does.

        Raises:
            MissingKeyError: no such key.
            RecordError: the record is damaged, or the index points past the end of the file.
        """
        self._require("read_idx", False)
        offset, limit = self._place(idx)
        payload, self._position = self.handle.read_record(offset, idx, limit)
        self._sought_key = None
        return payload

    def write_idx(self, idx: object, buf: bytes) -> None:
        """Append one record under a key."""
        key, position = self.key_type(idx), self.tell()
        self.write(buf)
        self.fidx.write(f"{key}\t{position}\n")
        self.idx[key] = position
        self.keys.append(key)

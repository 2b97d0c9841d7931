"""WebDataset shards: tar archives with ``<key>.jpg`` beside ``<key>.cls``, ``.json`` or ``.txt``, and their index.

Headers of ustar, GNU (long names) and pax are read here: an archive is walked once, in large reads, and every header's
checksum is held against its bytes. Python's ``tarfile`` makes an object of each member, which takes ten times as long.
"""

import functools
import glob
import itertools
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data.table import load_table, one_at_a_time, save_table, table_place
from utils.errors import UserError
from utils.files import describe_bytes
from utils.images import PassedOver, is_hidden, is_image_name
from utils.progress import progress_bar
from utils.system import num_cores

BLOCK = 512  # bytes; what a tar archive is made of
READ = 1 << 20  # bytes asked for at a time
INDEX_NAME = ".wds-index"
LABEL_KEYS = ("label", "cls", "class", "identity", "class_id", "person", "id")  # of a .json, the first that is there
_RANK = {"cls": 0, "json": 1, "txt": 2}  # where several are there, the first counts
_CHECKED = 1024  # headers whose checksums are taken together
# offset and size of the image in its shard, its label, and how many blocks before it its first header starts
ENTRY = np.dtype([("offset", "<i8"), ("label", "<i8"), ("size", "<u4"), ("lead", "<u2")])
_COMPRESSED = {".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
_NO_DATA = frozenset(b"123456")  # links, devices, folders
_FILE = frozenset(b"0\x007")


@dataclass(frozen=True, slots=True)
class Member:
    """One entry: its name, kind (tar's type byte), first header's offset, data's offset and size in bytes."""

    name: str
    kind: int
    start: int
    offset: int
    size: int


def find_shards(root: str | os.PathLike) -> list[Path]:
    """The .tar files of a folder, or those of a pattern (``*``, ``?``, ``[..]``, ``{000..123}``, ``{a,b}``), sorted.

    Raises:
        UserError: none there, a numbered one missing, or only compressed ones.
    """
    text = os.fspath(root)
    if Path(text).is_dir():
        names = [entry.path for entry in os.scandir(text) if not is_hidden(entry.name)]
        what = "a folder of .tar shards was expected"
    else:
        names, what = [], "no shard there"
        for name in _expand(text):
            found = [name] if Path(name).is_file() else glob.glob(name)  # noqa: PTH207 - patterns may be absolute
            if not found and not glob.has_magic(name):
                raise UserError(f"{name}: no such shard")
            names += found
    shards = sorted({Path(name) for name in names if name.endswith(".tar")})
    packed = sorted(name for name in names if Path(name).suffix in _COMPRESSED and ".t" in Path(name).name)
    packed = [name for name in packed if Path(name).with_suffix("") not in shards]
    if packed:
        command = _COMPRESSED[Path(packed[0]).suffix]
        raise UserError(f"{packed[0]}: samples of a compressed shard cannot be found; unpack it: {command} {packed[0]}")
    if not shards:
        raise UserError(f"{root}: {what}")
    return shards


def _expand(pattern: str) -> list[str]:
    """``a{00..02}.tar`` and ``{x,y}.tar`` to what they stand for."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        first, last = int(span[1]), int(span[2])
        inner = [str(number).zfill(len(span[1])) for number in range(first, last + 1)]
    else:
        inner = match[1].split(",")
    rest = _expand(pattern[match.end() :])
    return [pattern[: match.start()] + middle + end for middle, end in itertools.product(inner, rest)]


class _Window:
    """Bytes of a file by offset, read in large pieces."""

    def __init__(self, path: Path) -> None:
        self.path, self._file = path, open(path, "rb", buffering=0)  # noqa: SIM115 - closed by whoever made it
        self.size = os.fstat(self._file.fileno()).st_size
        self._start, self._bytes = 0, b""

    def get(self, offset: int, num_bytes: int) -> bytes:
        first = offset - self._start
        if not 0 <= first <= len(self._bytes) - num_bytes:
            self._file.seek(offset)
            self._start, self._bytes, first = offset, self._file.read(max(READ, num_bytes)) or b"", 0
            while len(self._bytes) < num_bytes and (more := self._file.read(num_bytes - len(self._bytes))):
                self._bytes += more
        return self._bytes[first : first + num_bytes]

    def close(self) -> None:
        self._file.close()


def walk_shard(window: _Window, position: int = 0, whole: bool = True) -> Iterator[Member]:
    """The members from ``position`` on; not ``whole``: also one that is cut.

    Raises:
        UserError: damaged or cut, naming shard, offset and the member before.
    """
    path, before, unchecked = window.path, "the first member", []

    def fail(reason: str, offset: int) -> UserError:
        _check_sums(path, unchecked)  # a damaged header may be why we are here
        return UserError(f"{path}: {reason} at offset {offset} (behind {before}); fetch or write the shard again")

    while True:
        start, name, size, longest = position, None, None, None
        while True:  # the headers of one member
            head = window.get(position, BLOCK)
            if len(head) < BLOCK:
                raise fail(f"cut: a shard of {window.size} bytes without an end mark", position)
            if head[0] == 0 and not any(head):
                _check_sums(path, unchecked)
                _check_end(window, position)
                return
            if head[257:262] != b"ustar" and not _looks_old(head):
                what = describe_bytes(head) if position == 0 else f"bytes {head[:4].hex()}"
                raise fail(f"no tar header: {what}", position)
            unchecked.append((position, head))
            if len(unchecked) >= _CHECKED:
                _check_sums(path, unchecked)
            kind = head[156]
            claimed = _number(head[124:136])
            if claimed is None:
                raise fail(f"a header without a size ({head[124:136]!r})", position)
            position += BLOCK
            if kind not in b"xgLKX":
                break
            if claimed > READ:
                raise fail(f"an extended header of {claimed} bytes", position - BLOCK)
            data = window.get(position, claimed)
            if len(data) < claimed:
                raise fail("cut: an extended header reaches behind the end", position - BLOCK)
            if kind == ord("L"):
                longest = data.split(b"\0", 1)[0]
            elif kind in b"xX":
                fields = _pax(data)
                name, size = fields.get(b"path", name), fields.get(b"size", size)
            position += claimed + -claimed % BLOCK
        size = claimed if size is None else int(size)
        raw = name or longest or _short_name(head)
        text = raw.decode("utf-8", "surrogateescape").removeprefix("./")
        if kind in _NO_DATA or (text.endswith("/") and kind in _FILE):
            yield Member(text, kind if kind in _NO_DATA else ord("5"), start, position, 0)
        else:
            if whole and position + size > window.size:
                reason = f"cut: member {text} of {size} bytes reaches behind the end ({window.size} bytes)"
                raise fail(reason, start)
            yield Member(text, kind, start, position, size)
            position += size + -size % BLOCK
        before = text


def _looks_old(head: bytes) -> bool:
    """A header of before 1988, which has no magic: its checksum tells."""
    total = _number(head[148:156])
    return total is not None and total == sum(head) - sum(head[148:156]) + 8 * 32


def _check_sums(path: Path, headers: list[tuple[int, bytes]]) -> None:
    """Hold the sum of each header's bytes against the one written in it, and forget the headers."""
    if not headers:
        return
    bytes_NB = np.frombuffer(b"".join(head for _, head in headers), np.uint8).reshape(-1, BLOCK)
    sums = bytes_NB.sum(1, dtype=np.int64) - bytes_NB[:, 148:156].sum(1, dtype=np.int64) + 8 * 32
    for (offset, head), total in zip(headers, sums.tolist(), strict=True):
        if _number(head[148:156]) != total:
            name = _short_name(head).decode("utf-8", "replace")
            raise UserError(f"{path}: member {name} at offset {offset}: its header fails its checksum; fetch it again")
    headers.clear()


def _check_end(window: _Window, position: int) -> None:
    rest = window.get(position, min(window.size - position, 20 * BLOCK))
    if any(rest):
        behind = position + next(place for place, byte in enumerate(rest) if byte)
        raise UserError(
            f"{window.path}: bytes behind the end mark at offset {behind}: archives one after the other, or damage"
        )


def _number(text: bytes) -> int | None:
    """A header's number: octal digits, or GNU's binary for what is larger; None if it is neither."""
    if text[0] & 0x80:
        return int.from_bytes(bytes([text[0] & 0x7F]) + text[1:], "big")
    try:
        return int(text.strip(b" \0") or b"0", 8)
    except ValueError:
        return None


def _short_name(head: bytes) -> bytes:
    name = head[:100].split(b"\0", 1)[0]
    if head[257:263] == b"ustar\0" and head[345]:
        return head[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _pax(data: bytes) -> dict[bytes, bytes]:
    """``length key=value`` lines."""
    fields = {}
    while data:
        digits, blank, _ = data.partition(b" ")
        if not blank or not digits.isdigit() or not len(digits) < int(digits) <= len(data):
            return fields
        key, _, value = data[len(digits) + 1 : int(digits) - 1].partition(b"=")
        fields[key] = value
        data = data[int(digits) :]
    return fields


def index_shard(path: Path) -> tuple[np.ndarray, PassedOver]:
    """(``ENTRY`` array of the images in their order, members that were passed over).

    Raises:
        UserError: a damaged or cut shard, two images or no label for a key, a label that is no class number; each names
            shard, member and offset.
    """
    images: dict[str, Member] = {}
    labels: dict[str, tuple[int, int]] = {}
    passed = PassedOver()

    def fail(member: Member, reason: str) -> UserError:
        return UserError(f"{path}: member {member.name} at offset {member.start}: {reason}")

    with closing(_Window(path)) as window:
        for member in walk_shard(window):
            if member.kind == ord("5"):
                continue
            key, dot, suffix = member.name.rpartition(".")
            suffix = suffix.lower()
            if _is_hidden_path(member.name):
                passed.add("hidden", member.name)
            elif not dot or not (suffix in _RANK or is_image_name(member.name)):
                passed.add("members that are neither image nor label", member.name)
            elif member.kind not in _FILE:
                raise fail(member, "a link or special file; pack the files themselves (tar --dereference)")
            elif suffix in _RANK:
                try:
                    label = _read_label(window.get(member.offset, member.size), suffix)
                except ValueError as error:
                    raise fail(member, str(error)) from None
                if label is not None:
                    labels[key] = min(labels.get(key, (9, 0)), (_RANK[suffix], label))
            elif key in images:
                raise fail(member, f"a second image of the key {key} (the first is {images[key].name})")
            elif member.size == 0:
                raise fail(member, "an image of 0 bytes")
            else:
                images[key] = member
    entries = np.empty(len(images), ENTRY)
    used = set()
    for row, (key, member) in enumerate(images.items()):
        folder, slash, base = key.rpartition("/")
        owner = key if key in labels else folder + slash + base.partition(".")[0]  # several images of one label
        if owner not in labels:
            keys = ", ".join(LABEL_KEYS)
            raise fail(member, f"no label; {key}.cls, .txt with a number or .json with one of {keys} was expected")
        used.add(owner)
        lead = (member.offset - member.start) // BLOCK
        entries[row] = (member.offset, labels[owner][1], member.size, lead)
    for key in labels.keys() - used:
        passed.add("labels without an image", key)
    return entries, passed


_WHOLE = re.compile(r"[+-]?\d{1,100}")


def _is_hidden_path(name: str) -> bool:
    folder, _, base = name.rpartition("/")
    return is_hidden(base) or _is_hidden_folder(folder)


@functools.lru_cache(1 << 12)
def _is_hidden_folder(folder: str) -> bool:
    return folder != "" and _is_hidden_path(folder)


def _read_label(data: bytes, suffix: str) -> int | None:
    """The class number that a member holds; None where a .json or .txt holds none (a caption). Else ValueError."""
    if suffix == "json":
        try:
            value = json.loads(data)
        except ValueError as error:
            raise ValueError(f"no JSON ({error})") from None
        if isinstance(value, dict):
            value = next((value[key] for key in LABEL_KEYS if key in value), None)
    else:
        value = data.decode("utf-8", "replace").strip().strip("\ufeff\0")
    if (isinstance(value, float) and value.is_integer()) or (isinstance(value, str) and _WHOLE.fullmatch(value)):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        if suffix == "cls":
            raise ValueError(f"{str(value)[:40]!r} is no class number")
        return None
    if not 0 <= value < 1 << 63:
        raise ValueError(f"label {value} is no class number (0 and above, below 2**63)")
    return value


def describe_member(path: Path, start: int) -> str:
    """``member <name>`` of the member whose first header is at ``start``."""
    try:
        with closing(_Window(path)) as window:
            return f"member {next(walk_shard(window, start, whole=False)).name}"
    except OSError as error:
        return f"a member ({error.strerror})"
    except (UserError, StopIteration):
        return "a member whose header is damaged"


def open_shards(root: str | os.PathLike) -> tuple[list[Path], np.ndarray, np.ndarray, tuple[str, ...]]:
    """Index the shards of a folder or pattern, or take the stored index of those that have not changed since.

    The index file lies beside the first shard (``.wds-index``), or in the user's cache where that folder is read-only.

    Returns:
        (the shards, sorted; int64 [shards + 1], the first image of each; ``ENTRY`` [N] of all images, perhaps mapped
        from the index file; lines about members that were not taken).
    """
    paths = find_shards(root)
    folder = paths[0].parent
    place = table_place(folder / INDEX_NAME)
    now = {os.path.relpath(path, folder): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}

    def changed(known: dict[str, _Known]) -> list[str]:
        return [name for name, stamp in now.items() if name not in known or known[name].stamp != stamp]

    known, table = _load(place)
    if changed(known):
        with one_at_a_time(place):
            known, table = _load(place)  # somebody else may have made it meanwhile
            if todo := changed(known):
                known, table = _make(folder, place, known, todo, now)
    parts = [known[name].entries for name in now]
    starts = np.cumsum([0, *map(len, parts)])
    lines = [known[name].passed.describe(folder / name) for name in now if known[name].passed]
    if len(lines) > 3:
        lines = [*lines[:3], f"{folder}: members of {len(lines) - 3} more shards were passed over in the same way"]
    return paths, starts, table if len(table) == starts[-1] else np.concatenate(parts), tuple(lines)


class _Known(NamedTuple):
    """An indexed shard: its [size, time], its images (part of the table), what was passed over."""

    stamp: list[int]
    entries: np.ndarray
    passed: PassedOver


def _split(rows: list, table: np.ndarray) -> tuple[dict[str, _Known], np.ndarray]:
    """What is stored (a row a shard: name, size, time, images, passed over; all entries) by shard."""
    known, stop = {}, 0
    for name, size, changed, count, passed in rows:
        start, stop = stop, stop + count
        known[name] = _Known([size, changed], table[start:stop], PassedOver(passed))
    return known, table


def _load(place: Path) -> tuple[dict[str, _Known], np.ndarray]:
    loaded = load_table(place)
    return _split([], np.empty(0, ENTRY)) if loaded is None or loaded[1].dtype != ENTRY else _split(*loaded)


def _make(
    folder: Path, place: Path, known: dict[str, _Known], todo: list[str], now: dict[str, list[int]]
) -> tuple[dict[str, _Known], np.ndarray]:
    """Index the shards ``todo`` in threads (the reads overlap), store the index of these and of the others known."""
    shards = {name: each for name, each in known.items() if name not in todo and (folder / name).is_file()}
    num_bytes = sum(now[name][0] for name in todo)
    with (
        progress_bar("indexing shards, MiB", num_bytes >> 20) as advance,
        ThreadPoolExecutor(min(8, 2 * num_cores())) as pool,
    ):
        for name, found in zip(todo, pool.map(lambda name: index_shard(folder / name), todo), strict=True):
            shards[name] = _Known(now[name], *found)
            advance(now[name][0] >> 20)
    rows = [[name, *each.stamp, len(each.entries), each.passed] for name, each in sorted(shards.items())]
    table = np.concatenate([each.entries for _, each in sorted(shards.items())])
    try:
        save_table(place, rows, table)
    except OSError:  # no cache folder either: the index is made again next time
        return _split(rows, table)
    return _load(place)


class ShardFiles:
    """Reads from many shards by several threads with a bounded number of open files."""

    def __init__(self, paths: list[Path], max_open: int | None = None) -> None:
        self._arguments = paths, max_open
        # A file that falls out is closed when the last thread that reads from it lets go.
        self._open = functools.lru_cache(max_open or _open_limit())(lambda which: _Open(paths[which]))

    def __reduce__(self) -> tuple:
        return ShardFiles, self._arguments

    def read_into(self, which: int, view: memoryview, offset: int) -> int:
        """Fill ``view`` from ``offset`` of a shard on; returns how many bytes there were."""
        return self._open(which).read_into(view, offset)


class _Open:
    """An open file, closed with its last reference."""

    def __init__(self, path: Path) -> None:
        self._path, self._fd = path, -1
        if hasattr(os, "preadv"):
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def read_into(self, view: memoryview, offset: int) -> int:
        if self._fd < 0:  # no positional reads on this system
            with open(self._path, "rb", buffering=0) as file:
                file.seek(offset)
                return file.readinto(view)
        done = 0
        while done < len(view):  # a signal can shorten a read
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def _open_limit() -> int:
    """A quarter of the files that this process may have open."""
    try:
        import resource
    except ImportError:  # Windows
        return 128
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(16, min(soft, 1 << 14) // 4)

"""WebDataset shards: tar archives with ``<key>.jpg`` beside ``<key>.cls``, ``.json`` or ``.txt``, and their index.

Headers of ustar, GNU (long names) and pax are read here: an archive is walked once, in large reads, and every header's
checksum is held against its bytes. Python's ``tarfile`` makes an object of each member, which takes ten times as long.
"""

import functools
import glob
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.data.table import stored_table
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
# offset and size of the image in its shard, its label, and how many blocks before it its first header starts
ENTRY = np.dtype([("offset", "<i8"), ("label", "<i8"), ("size", "<u4"), ("lead", "<u2")])
_COMPRESSED = {".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd"}
# Tar's type bytes: folders; what has no data (they, links, devices); files.
_FOLDER, _NO_DATA, _FILE = ord("5"), b"123456", b"0\x007"


class Member(NamedTuple):
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
    for packed in sorted(map(Path, names)):
        command = _COMPRESSED.get(packed.suffix)
        if command and ".t" in packed.name and packed.with_suffix("") not in shards:
            raise UserError(f"{packed}: samples of a compressed shard cannot be found; unpack it: {command} {packed}")
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


def _read_at(file: BufferedReader, offset: int, num_bytes: int) -> bytes:
    file.seek(offset)  # inside the buffer nothing is read again
    return file.read(num_bytes)


def walk_shard(file: BufferedReader, position: int = 0, whole: bool = True) -> Iterator[Member]:
    """The members from ``position`` on; not ``whole``: also one that is cut.

    Raises:
        UserError: damaged or cut, naming shard, offset and the member before.
    """
    path, num_bytes, before = file.name, os.fstat(file.fileno()).st_size, "the first member"

    def fail(reason: str, offset: int) -> UserError:
        return UserError(f"{path}: {reason} at offset {offset} (behind {before}); fetch or write the shard again")

    while True:
        start, extended = position, {}
        while True:  # the headers of one member
            head = _read_at(file, position, BLOCK)
            if len(head) < BLOCK:
                raise fail(f"cut: a shard of {num_bytes} bytes without an end mark", position)
            if head[0] == 0 and not any(head):
                rest = _read_at(file, position, 20 * BLOCK)
                if behind := rest.lstrip(b"\0"):
                    place = f"offset {position + len(rest) - len(behind)}"
                    found = f"bytes behind the end mark at {place}: archives one after the other, or damage"
                    raise UserError(f"{path}: {found}")
                return
            if not _sum_agrees(head):
                if head[257:262] == b"ustar":
                    found = f"member {_short_name(head).decode('utf-8', 'replace')} at offset {position}"
                    raise UserError(f"{path}: {found}: its header fails its checksum; fetch it again")
                what = describe_bytes(head) if position == 0 else f"bytes {head[:4].hex()}"
                raise fail(f"no tar header: {what}", position)
            kind, claimed = head[156], _number(head[124:136])
            if claimed is None:
                raise fail(f"a header without a size ({head[124:136]!r})", position)
            position += BLOCK
            if kind not in b"xgLKX":
                break
            if claimed > READ:
                raise fail(f"an extended header of {claimed} bytes", position - BLOCK)
            data = _read_at(file, position, claimed)
            if len(data) < claimed:
                raise fail("cut: an extended header reaches behind the end", position - BLOCK)
            if kind == ord("L"):
                extended.setdefault(b"path", data.split(b"\0", 1)[0])
            elif kind in b"xX":
                extended.update(_pax(data))
            position += claimed + -claimed % BLOCK
        size = claimed
        if (written := extended.get(b"size")) is not None:
            if not written.isdigit():
                raise fail(f"an extended header with the size {written[:40]!r}", start)
            size = int(written)
        raw = extended.get(b"path") or _short_name(head)
        name = raw.decode("utf-8", "surrogateescape").removeprefix("./")
        if name.endswith("/") and kind in _FILE:
            kind = _FOLDER
        if kind in _NO_DATA:
            size = 0
        elif whole and position + size > num_bytes:
            raise fail(f"cut: member {name} of {size} bytes reaches behind the end ({num_bytes} bytes)", start)
        yield Member(name, kind, start, position, size)
        position += size + -size % BLOCK
        before = name


def _sum_agrees(head: bytes) -> bool:
    """Is the sum of a header's bytes, those of the sum itself taken as blanks, the one that is written in it?

    Adler-32's lower half is one more than the sum, modulo 65521: the quickest way to it.
    """
    total = _number(head[148:156])
    sums = zlib.adler32(head[:148] + b" " * 8 + head[156:]) & 0xFFFF
    return total is not None and (1 + total) % 65521 == sums


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

    with open(path, "rb", buffering=READ) as file:
        for member in walk_shard(file):
            if member.kind == _FOLDER:
                continue
            folder, _, base = member.name.rpartition("/")
            key, dot, suffix = member.name.rpartition(".")
            suffix = suffix.lower()
            if is_hidden(base) or _is_hidden_folder(folder):
                passed.add("hidden", member.name)
            elif not dot or not (suffix in _RANK or is_image_name(member.name)):
                passed.add("members that are neither image nor label", member.name)
            elif member.kind not in _FILE:
                raise fail(member, "a link or special file; pack the files themselves (tar --dereference)")
            elif suffix in _RANK:
                try:
                    label = _read_label(_read_at(file, member.offset, member.size), suffix)
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


@functools.lru_cache(1 << 12)
def _is_hidden_folder(folder: str) -> bool:
    return any(map(is_hidden, folder.split("/")))


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
        with open(path, "rb") as file:
            return f"member {next(walk_shard(file, start, whole=False)).name}"
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
    now = {os.path.relpath(path, folder): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}

    def changed(known: dict[str, _Known]) -> list[str]:
        return [name for name, stamp in now.items() if name not in known or known[name].stamp != stamp]

    def make(found: tuple | None) -> tuple[list, np.ndarray]:
        """Index what has changed in threads (the reads overlap); the other shards that are still there stay known."""
        known = _by_shard(found)
        todo = changed(known)
        shards = {name: each for name, each in known.items() if name not in todo and (folder / name).is_file()}
        num_bytes = sum(now[name][0] for name in todo)
        with (
            progress_bar("indexing shards, MiB", num_bytes >> 20) as advance,
            ThreadPoolExecutor(min(8, 2 * num_cores())) as pool,
        ):
            for name, indexed in zip(todo, pool.map(lambda name: index_shard(folder / name), todo), strict=True):
                shards[name] = _Known(now[name], *indexed)
                advance(now[name][0] >> 20)
        rows = [[name, *each.stamp, len(each.entries), each.passed] for name, each in sorted(shards.items())]
        return rows, np.concatenate([each.entries for _, each in sorted(shards.items())])

    found = stored_table(folder / INDEX_NAME, lambda found: not changed(_by_shard(found)), make)
    known, table = _by_shard(found), found[1]
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


def _by_shard(found: tuple[list, np.ndarray] | None) -> dict[str, _Known]:
    """What is stored (a row a shard: name, size, time, images, passed over; all entries) by shard."""
    if found is None or found[1].dtype != ENTRY:
        return {}
    known, stop = {}, 0
    for name, size, changed, count, passed in found[0]:
        start, stop = stop, stop + count
        known[name] = _Known([size, changed], found[1][start:stop], PassedOver(passed))
    return known


class _File(io.FileIO):
    """Closed with its last reference."""

    def __del__(self) -> None:
        self.close()


class ShardFiles:
    """Reads from many shards by several threads with a bounded number of open files."""

    def __init__(self, paths: list[Path], max_open: int | None = None) -> None:
        self._paths, self._max_open = paths, max_open
        # A file that falls out is closed when the last thread that reads from it lets go.
        self._open = functools.lru_cache(max_open or _open_limit())(lambda which: _File(paths[which]))

    def __reduce__(self) -> tuple:
        return ShardFiles, (self._paths, self._max_open)

    def read_into(self, which: int, view: memoryview, offset: int) -> int:
        """Fill ``view`` from ``offset`` of a shard on; returns how many bytes there were."""
        if not hasattr(os, "preadv"):  # no positional reads on this system
            with _File(self._paths[which]) as file:
                file.seek(offset)
                return file.readinto(view)
        file, done = self._open(which), 0
        while done < len(view):  # a signal can shorten a read
            count = os.preadv(file.fileno(), [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done


def _open_limit() -> int:
    """A quarter of the files that this process may have open."""
    try:
        import resource
    except ImportError:  # Windows
        return 128
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(16, min(soft, 1 << 14) // 4)

"""Files that appear whole or not at all, and digests of what they hold."""

import contextlib
import csv
import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from utils.errors import UserError


def check_replaceable(path: Path) -> None:
    """Refuse a folder, a place below a file, and a device or pipe, which a rename would replace (as root /dev/null).

    Raises:
        UserError: that is what is there.
    """
    if path.is_dir() or not path.name:
        raise UserError(f"{path}: is a folder; name a file to write")
    above = next((folder for folder in path.parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise UserError(f"{path}: {above} is a file, not a folder")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is a device or a pipe and would be replaced; name a file to write")


@contextlib.contextmanager
def full_disk_named(path: str | Path) -> Iterator[None]:
    """A full disk, quota or file size limit is told with the file's name, which a failed write does not know."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Gives a path beside ``path`` to write to; it takes the name when the block ends, or is removed if it fails.

    Raises:
        UserError: a folder, a device or a pipe is there (``check_replaceable``).
        OSError: the file cannot be written; it is named as the user named it.
    """
    path = Path(path)
    check_replaceable(path)
    # The suffix stays last, because some writers choose by it (or add it); the token tells processes of two machines
    # or containers apart, which may have one number.
    aside = path.with_name(f".{os.getpid()}_{secrets.token_hex(4)}_{path.name}")
    try:
        with full_disk_named(path):
            yield aside
        aside.replace(path)
    except OSError as error:
        if error.filename is not None and Path(os.fsdecode(error.filename)) == aside:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Replace a small file in one piece, on disk when this returns; what UTF-8 lacks (odd file names) becomes ``?``."""
    with written_whole(path) as aside, open(aside, "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: str | Path, value: object) -> None:
    """``write_text`` of JSON; NaN and infinity, which JSON lacks, become null, paths become text."""
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def write_csv(path: str | Path, rows: Sequence[Mapping], columns: Sequence[str] | None = None) -> None:
    """Replace a table in one piece: one line a row; the columns are those of the first row unless they are named."""
    with written_whole(path) as aside, open(aside, "w", encoding="utf-8", errors="replace", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0] if columns is None else columns))
        writer.writeheader()
        writer.writerows(rows)


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Replace a ``.npy`` file in one piece."""
    with written_whole(path) as aside, open(aside, "wb") as file:
        np.save(file, array)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def sync_folder(folder: Path) -> None:
    """Renames inside the folder reach the disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def file_stamps(folder: str | Path, names: Sequence[str]) -> list[tuple[int, int] | None]:
    """(size in bytes, modification time in ns) of each name relative to ``folder``, None where there is no such file.

    Every folder that the names mention is read once, whatever its number of files.
    """
    wanted: dict[str, dict[str, list[int]]] = {}
    for index, name in enumerate(names):
        parent, leaf = os.path.split(name)
        wanted.setdefault(parent, {}).setdefault(leaf, []).append(index)
    stamps: list[tuple[int, int] | None] = [None] * len(names)
    for parent, leaves in wanted.items():
        try:
            entries = os.scandir(Path(folder, parent))
        except (FileNotFoundError, NotADirectoryError):
            continue
        with entries:
            for entry in entries:
                if entry.name in leaves:
                    with contextlib.suppress(FileNotFoundError):  # a broken link is no file
                        status = entry.stat()
                        for index in leaves[entry.name]:
                            stamps[index] = (status.st_size, status.st_mtime_ns)
    return stamps


def describe_file(path: str | Path) -> str:
    """What a file really is, by its first bytes (``describe_bytes``); for messages about files of the wrong kind."""
    with open(path, "rb") as file:
        return describe_bytes(file.read(1024))


def describe_bytes(head: bytes) -> str:
    """What a file that begins like this is, and what to do where that is known; "of no known kind" otherwise."""
    if not head:
        return "an empty file; fetch or copy it again"
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, kind in _TEXT_STARTS:
        if text.startswith(start):
            return kind
    if head[4:8] == b"ftyp" and head[8:12] in _PHONE_PHOTOS:
        return f"{_PHONE_PHOTOS[head[8:12]]} photo, whatever its name ends in; convert it to JPEG or PNG first"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if not head.strip(b"\0"):
        return "a file of zeros (a download or copy that was cut); fetch it again"
    try:
        shown = head[:40].decode("ascii")
    except UnicodeDecodeError:
        return f"of no known kind (it starts with {head[:4].hex()})"
    return f"a text file that starts with {shown!r}"


HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")  # behind "ftyp", 4 bytes into the file
_PHONE_PHOTOS = dict.fromkeys(HEIC_BRANDS, "a HEIC") | {b"avif": "an AVIF"}
_TEXT_STARTS = (
    (b"version https://git-lfs", "a git-LFS pointer, not the file itself; run 'git lfs pull' there"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself; run 'git annex get' there"),
    (b"<!doctype html", "an HTML page (a download that was answered by a web page); fetch it again"),
    (b"<html", "an HTML page (a download that was answered by a web page); fetch it again"),
    (b"<?xml", "an XML page (a download that was answered by an error); fetch it again"),
)
_STARTS = (
    (b"\x1f\x8b", "gzip data; unpack it first (gunzip, or tar -xzf)"),
    (b"BZh", "bzip2 data; unpack it first (bunzip2, or tar -xjf)"),
    (b"\xfd7zXZ\0", "xz data; unpack it first (unxz, or tar -xJf)"),
    (b"\x28\xb5\x2f\xfd", "zstandard data; unpack it first (unzstd)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!", "a rar archive; unpack it first"),
    (b"PK\x03\x04", "a zip archive (new PyTorch files and .npz are such, too)"),
    (b"\x93NUMPY", "a numpy array (.npy)"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\x89PNG\r\n", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"II*\0", "a TIFF picture"),
    (b"MM\0*", "a TIFF picture"),
    (b"%PDF", "a PDF document"),
    (b"\x0a\x23\xd7\xce", "a RecordIO file (.rec)"),
    *((bytes([0x80, protocol]), "a pickle") for protocol in range(2, 6)),
)

"""Text files as people's tools write them: UTF-8 with or without a mark, UTF-16, GBK; any line ends."""

import codecs
import os
from pathlib import Path

from utils.errors import UserError
from utils.files import describe_bytes

_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def plain(text: str) -> str:
    """A file name as text: bytes that are no UTF-8 become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def read_text(path: str | os.PathLike) -> str:
    """The text of a file: by its mark, else UTF-8, else GBK (GB 18030); every line end becomes ``\\n``.

    Raises:
        UserError: a folder, something else than text, or bytes that are neither, naming the line.
        OSError: the file cannot be read.
    """
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder; a text file was expected")
    return decode_text(Path(path).read_bytes(), path)


def read_text_lines(path: str | os.PathLike) -> list[str]:
    """``read_text`` in lines, without their ends; element 0 is line 1."""
    lines = read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def decode_text(data: bytes, path: str | os.PathLike) -> str:
    """``read_text`` of bytes that are there already; ``path`` is for messages."""
    kind = describe_bytes(data[:1024])
    if data and not kind.startswith(("a text file", "of no known kind")):
        raise UserError(f"{path}: a text file was expected; it is {kind}")
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", None))
    data = data[len(mark) :]
    if encoding is None:
        encoding = _unmarked_utf16(data) or "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if mark or encoding != "utf-8":
            raise UserError(f"{path}: not valid {encoding.upper()} at byte {error.start}; save it as UTF-8") from None
        text = _decode_gbk(data, path, error.start)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}: line {line}: holds zero bytes; this is no text file")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _decode_gbk(data: bytes, path: str | os.PathLike, wrong: int) -> str:
    try:
        return data.decode("gb18030")
    except UnicodeDecodeError as error:
        start = min(wrong, error.start)
        line = data.count(b"\n", 0, start) + 1
        found = f"byte 0x{data[start]:02x}"
        raise UserError(f"{path}: line {line}: {found} is neither UTF-8 nor GBK; save the file as UTF-8") from None


def _unmarked_utf16(data: bytes) -> str | None:
    """UTF-16 without a mark, told by the zero bytes of its ASCII characters (digits, blanks, line ends)."""
    head = data[:4096]
    odd, even = head[1::2].count(0), head[0::2].count(0)
    if max(odd, even) * 8 < len(head) or min(odd, even):
        return None
    return "utf-16-le" if odd else "utf-16-be" if even else None

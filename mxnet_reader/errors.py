"""What is wrong with a record file, where."""

import os

from utils.errors import UserError


class RecordError(UserError):
    """A malformed record file. The message is one line: file, what was found, byte offset, key (where known).

    Attributes:
        path: the file.
        reason: what was found, without the place.
        offset: byte offset of the record in the file, or None.
        key: key of the record in the index, or None.
    """

    def __init__(self, path: str | os.PathLike, reason: str, offset: int | None = None, key: object = None) -> None:
        self.path, self.reason = os.fspath(path), reason
        self.offset = None if offset is None else int(offset)
        self.key = key
        place = [f"{name} {value}" for name, value in (("offset", self.offset), ("key", key)) if value is not None]
        self.message = f"{self.path}: {reason}" + (f" ({', '.join(place)})" if place else "")
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.reason, self.offset, self.key)


class MissingKeyError(RecordError, KeyError):
    """A key that the index does not hold (a ``KeyError`` as well, as a dictionary's would be)."""

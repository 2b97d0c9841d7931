"""Parquet shards with an image column and a label, as the ``datasets`` package writes them.

The image column holds binary, or a struct of ``bytes`` and ``path``; rows are read a row group at a time.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.data.source import Source
from utils.errors import UserError

if TYPE_CHECKING:
    import pyarrow

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "jpeg", "picture")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "identity", "person", "id")
GROUPS_KEPT = 4  # row groups in memory at a time


def find_parquet(path: Path) -> list[Path]:
    """The .parquet files that a path stands for: itself, or those of a folder, sorted; [] if there are none."""
    if path.suffix == ".parquet":
        return [path]
    return sorted(path.glob("*.parquet")) if path.is_dir() else []


class ParquetDataset(Source):
    """The rows of some Parquet files, in order.

    Args:
        paths: the files.
        image_column, label_column: their names; None: the first of the usual names that is there.

    Raises:
        UserError: no Parquet file, no such column, a row without image bytes or label; names file and row.
    """

    def __init__(self, paths: list[Path], image_column: str | None = None, label_column: str | None = None) -> None:
        try:
            import pyarrow.parquet as reader
            from pyarrow import ArrowException, ArrowInvalid
        except ImportError:
            raise UserError(f"{paths[0]}: reading Parquet needs pyarrow: pip install pyarrow") from None
        self.paths, self._errors = paths, (ArrowException, ArrowInvalid, OSError)
        self._files = []
        for path in paths:
            try:
                self._files.append(reader.ParquetFile(path))
            except self._errors as error:
                raise UserError(f"{path}: not a Parquet file that can be read: {error}") from None
        self._image = self._pick(image_column, IMAGE_COLUMNS, "--image-column")
        self._label = self._pick(label_column, LABEL_COLUMNS, "--label-column")
        groups = [(n, g) for n, file in enumerate(self._files) for g in range(file.num_row_groups)]
        sizes = [self._files[n].metadata.row_group(g).num_rows for n, g in groups]
        self._groups, self._starts = groups, [0, *accumulate(sizes)]
        self._kept: OrderedDict[int, pyarrow.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()
        self.keys = np.arange(self._starts[-1])
        if len(self.keys) == 0:
            raise UserError(f"{paths[0]}: no rows in it")
        self.labels, self.identities = self._read_all_labels()
        self.num_classes = len(self.identities) if self.identities else int(self.labels.max()) + 1
        self.numbered = self.identities is not None

    def _pick(self, asked: str | None, usual: tuple[str, ...], flag: str) -> str:
        columns = self._files[0].schema_arrow.names
        found = [name for name in ((asked,) if asked else usual) if name in columns]
        if not found:
            wanted = asked or ", ".join(usual)
            raise UserError(f"{self.paths[0]}: no column {wanted} among {', '.join(columns)}; name it with {flag}")
        for path, file in zip(self.paths, self._files, strict=True):
            if found[0] not in file.schema_arrow.names:
                raise UserError(f"{path}: no column {found[0]!r}, which {self.paths[0].name} has")
        return found[0]

    def _read_all_labels(self) -> tuple[np.ndarray, list[str] | None]:
        """(labels [N], names of the classes where the labels are text, in ascending order)."""
        import pyarrow

        values = []
        for n, file in enumerate(self._files):
            column = self._read(n, lambda file=file: file.read(columns=[self._label])).column(0)
            if column.null_count:
                row = column.is_null().to_pylist().index(True)
                raise UserError(f"{self.paths[n]}: row {row}: no {self._label}")
            kind = column.type
            if pyarrow.types.is_dictionary(kind):
                column, kind = column.cast(kind.value_type), kind.value_type
            if not (
                pyarrow.types.is_integer(kind) or pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
            ):
                raise UserError(
                    f"{self.paths[n]}: column {self._label!r} holds {kind}; whole numbers or names were expected"
                )
            values.append(column.to_numpy())
        labels = np.concatenate(values)
        if labels.dtype == object:
            names, labels = np.unique(labels.astype(str), return_inverse=True)
            return labels.astype(np.int64), names.tolist()
        return labels.astype(np.int64), None

    def _read(self, which: int, read) -> "pyarrow.Table":
        try:
            return read()
        except self._errors as error:
            raise UserError(f"{self.paths[which]}: damaged: {' '.join(str(error).split())[:200]}") from None

    def fetch(self, i: int) -> tuple[bytes, int]:
        group = bisect_right(self._starts, i) - 1
        with self._lock:
            column = self._kept.get(group)
            if column is None:
                n, g = self._groups[group]
                column = self._read(n, lambda: self._files[n].read_row_group(g, columns=[self._image])).column(0)
                self._kept[group] = column
                if len(self._kept) > GROUPS_KEPT:
                    self._kept.popitem(last=False)
        value = column[i - self._starts[group]].as_py()
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes) or not value:
            raise UserError(f"{self.describe(i)}: no image bytes in column {self._image!r} (a path alone, or nothing)")
        return value, int(self.labels[i])

    def describe(self, i: int) -> str:
        group = bisect_right(self._starts, i) - 1
        n, _ = self._groups[group]
        first = self._starts[next(k for k, (m, _) in enumerate(self._groups) if m == n)]
        return f"{self.paths[n]}: row {i - first}"

"""Landmark lists: what another detector found, in the formats that detectors and data sets write.

- ``name x1 y1 ... x5 y5 [score]``, blanks, tabs or commas between (insightface's IJB lists, CelebA's with its two lines
  of header);
- CSV with a header that names ``source`` (or ``name``, ``path``), ``x1`` ... ``y5`` and, if there is one, ``score``:
  what ``tools/align.py`` writes as ``faces.csv``;
- RetinaFace's and WIDER FACE's ``# name`` lines, each followed by its faces: the box x y w h, five points with a flag
  behind each (or without), and a score; a face whose points are -1 has none and is passed over.

Points are (x, y) in pixels of the upright photo: eyes, nose tip, mouth corners, left to right as the viewer sees them.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.photos.detect import DetectedFace
from utils.text import read_text_lines

_COLUMNS = [f"{axis}{number}" for number in range(1, 6) for axis in "xy"]
_NAME_COLUMNS = ("source", "name", "path")


# number, photo, points (None: a name alone), score, box
_Line = tuple[int, str, list[float] | None, float, tuple | None]


def read_landmark_list(path: str | Path) -> dict[str, list[DetectedFace]]:
    """Name of a photo as it stands in the list -> its faces, in the list's order.

    A face's box is the one listed, or what its points span. The score is 1 where none is listed.

    Raises:
        UserError: a line that is no landmarks, naming file and line; nothing in it.
    """
    lines = read_text_lines(path)
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("#"):
        read = _read_grouped
    elif {column.strip().lower() for column in first.split(",")} >= set(_COLUMNS):
        read = _read_table
    else:
        read = _read_plain
    faces: dict[str, list[DetectedFace]] = {}
    for number, name, points, score, box in read(path, lines):
        of_photo = faces.setdefault(name.replace("\\", "/").removeprefix("./"), [])
        if points is None:
            continue
        if len(points) != 10 or not np.isfinite(points).all():
            told = f"{len(points)} finite numbers after {name!r}; x1 y1 ... x5 y5 expected"
            raise UserError(f"{path}:{number}: {told}")
        landmark_52 = np.array(points, np.float64).reshape(5, 2)
        box = box or (*landmark_52.min(axis=0).tolist(), *landmark_52.max(axis=0).tolist())
        of_photo.append(DetectedFace(landmark_52, score, box))
    if not faces:
        raise UserError(f"{path}: no landmarks in it")
    return faces


def _read_plain(path: str | Path, lines: list[str]) -> Iterator[_Line]:
    at_start = True
    for number, line in enumerate(lines, 1):
        name, *fields = next(csv.reader([line], skipinitialspace=True)) if "," in line else line.split() or [""]
        name, fields = name.strip(), [field for field in fields if field.strip()]
        if not name:
            continue
        try:
            values = [float(field) for field in fields[:11]]
        except ValueError:
            if at_start and not any(map(_is_number, fields)):
                continue  # a header
            raise UserError(f"{path}:{number}: {line[:60]!r}: ten numbers expected after the name") from None
        if not values and at_start and name.isdecimal():
            continue  # CelebA's count
        at_start = False
        yield number, name, values[:10], values[10] if len(values) > 10 else 1.0, None


def _read_table(path: str | Path, lines: list[str]) -> Iterator[_Line]:
    rows = csv.reader((f"{line}\n" for line in lines), skipinitialspace=True)  # names may hold line ends
    filled = (fields for fields in rows if any(field.strip() for field in fields))
    header = [field.strip().lower() for field in next(filled)]
    name_column = next((header.index(name) for name in _NAME_COLUMNS if name in header), None)
    if name_column is None:
        raise UserError(f"{path}: a column of photos is missing: {' or '.join(_NAME_COLUMNS)}")
    columns = [header.index(column) for column in _COLUMNS]
    for fields in filled:
        where = f"{path}:{rows.line_num}"
        if len(fields) != len(header):
            raise UserError(f"{where}: {len(fields)} fields, {len(header)} expected")
        try:
            values = [float(fields[column]) for column in columns]
            score = float(fields[header.index("score")]) if "score" in header else 1.0
        except ValueError as error:
            raise UserError(f"{where}: {error}; numbers expected in x1 ... y5 and score") from None
        yield rows.line_num, fields[name_column], values, score, None


def _read_grouped(path: str | Path, lines: list[str]) -> Iterator[_Line]:
    name = ""
    for number, line in enumerate(map(str.strip, lines), 1):
        where = f"{path}:{number}"
        if line.startswith("#"):
            name = line.lstrip("#").strip()
            yield number, name, None, 1.0, None
            continue
        try:
            values = [float(field) for field in line.replace(",", " ").split()]
        except ValueError:
            raise UserError(f"{where}: {line[:60]!r}: numbers expected below '# name'") from None
        if len(values) in (14, 15):
            points = values[4:14]
        elif len(values) in (19, 20):
            points = [value for start in range(4, 19, 3) for value in values[start : start + 2]]
        elif values:
            known = "a box, five points (with or without flags) and a score were expected"
            raise UserError(f"{where}: {len(values)} numbers; {known}")
        if values and set(points) != {-1}:
            left, top, width, height = values[:4]
            score = values[-1] if len(values) in (15, 20) else 1.0
            yield number, name, points, score, (left, top, left + width, top + height)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

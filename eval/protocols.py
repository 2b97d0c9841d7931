"""Readers of evaluation lists: IJB-B/C meta files, template protocols from CSV, LFW pair lists.

Legend: N images, P pairs, T templates. Every defect of a file is a ``UserError`` that names file, line and value.
"""

import csv
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval.metrics import count_kinds
from utils.decode import read_image
from utils.errors import UserError
from utils.images import find_image, is_image_name
from utils.text import decode_text, read_text_lines

_LABELS = ("0", "1", "-1")  # of one person: 1


@dataclass(frozen=True)
class SubjectList:
    """Templates of a gallery or probe list and whom they show."""

    template_T: np.ndarray
    subject_T: np.ndarray


@dataclass(frozen=True, kw_only=True)
class TemplateProtocol:
    """A template comparison: images, their templates and media, the pairs, and perhaps 1:N lists.

    ``landmark_N52`` is None where the images are aligned already; ``score_N`` is 1 where no detector score is known.
    """

    name: str
    image_dir: Path
    image_N: list[str]
    template_N: np.ndarray
    media_N: np.ndarray
    score_N: np.ndarray
    landmark_N52: np.ndarray | None
    left_P: np.ndarray
    right_P: np.ndarray
    same_P: np.ndarray
    galleries: dict[str, SubjectList] = field(default_factory=dict)
    probes: SubjectList | None = None


def read_ijb(root: Path, target: str) -> TemplateProtocol:
    """``<root>/meta/<target>_*`` and ``<root>/loose_crop``: IJB-B, IJB-C, or any folder of that shape."""
    meta, crops, prefix = Path(root, "meta"), Path(root, "loose_crop"), target.lower()
    for folder in (meta, crops):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; --image-path must hold meta/ and loose_crop/ of {target}")
    images_path, pairs_path = meta / f"{prefix}_face_tid_mid.txt", meta / f"{prefix}_template_pair_label.txt"
    names, template_N, media_N = _read_images(images_path)
    landmark_N52, score_N = _read_landmarks(meta / f"{prefix}_name_5pts_score.txt", names, images_path)
    left_P, right_P, same_P = read_pairs(pairs_path)
    known = np.unique(template_N)

    def check(path: Path, template: np.ndarray) -> None:
        used = np.unique(template)
        unknown = used[~np.isin(used, known)]
        if len(unknown):
            row = int(np.flatnonzero(template == unknown[0])[0]) + 1
            raise UserError(f"{path}: template {unknown[0]} (row {row}) has no image in {images_path.name}")

    def subjects(path: Path) -> SubjectList:
        listed = _read_subjects(path)
        check(path, listed.template_T)
        return listed

    check(pairs_path, left_P)
    check(pairs_path, right_P)
    probe_path = meta / f"{prefix}_1N_probe_mixed.csv"
    galleries = sorted(meta.glob(f"{prefix}_1N_gallery_*.csv"))
    return TemplateProtocol(
        name=target,
        image_dir=crops,
        image_N=names,
        template_N=template_N,
        media_N=media_N,
        score_N=score_N,
        landmark_N52=landmark_N52,
        left_P=left_P,
        right_P=right_P,
        same_P=same_P,
        galleries={path.stem.rsplit("_", 1)[1]: subjects(path) for path in galleries},
        probes=subjects(probe_path) if probe_path.exists() else None,
    )


def read_csv_protocol(folder: Path) -> TemplateProtocol:
    """A set of one's own: ``images.csv``, ``pairs.csv``, perhaps ``gallery*.csv`` and ``probe.csv``, all with headers.

    ``images.csv``: ``path,template,media`` and perhaps ``score`` and ``x1,y1,...,x5,y5``. ``pairs.csv``:
    ``left,right,same``. 1:N lists: ``template,subject``. Paths are relative to the folder; ids are any text.
    """
    folder = Path(folder)
    images_path, pairs_path, probe_path = (folder / f"{name}.csv" for name in ("images", "pairs", "probe"))
    points = [f"{axis}{k}" for k in range(1, 6) for axis in "xy"]
    rows = list(_csv_rows(images_path, ("path", "template", "media")))
    templates, media = (
        {value: index for index, value in enumerate(dict.fromkeys(row[column] for _, row in rows))}
        for column in ("template", "media")
    )

    def template_of(path: Path, line: int, value: str) -> int:
        if value not in templates:
            raise _wrong(path, line, f"template {value!r} has no image in {images_path.name}")
        return templates[value]

    def subjects(path: Path) -> SubjectList:
        rows = _csv_rows(path, ("template", "subject"))
        pairs = ((template_of(path, line, row["template"]), row["subject"]) for line, row in rows)
        return _unique_subjects(path, pairs)

    pairs = []
    for line, row in _csv_rows(pairs_path, ("left", "right", "same")):
        if row["same"] not in _LABELS:
            raise _wrong(pairs_path, line, f"same is {row['same']!r}; write 0 or 1")
        ends = [template_of(pairs_path, line, row[side]) for side in ("left", "right")]
        pairs.append((*ends, row["same"] == "1"))
    pair_P3 = np.array(pairs, dtype=np.int64).reshape(-1, 3)
    same_P = pair_P3[:, 2].astype(bool)
    count_kinds(same_P, f"{pairs_path}: ")
    landmark_N52 = None
    if rows and points[0] in rows[0][1]:
        values = [[_number(images_path, line, point, row.get(point)) for point in points] for line, row in rows]
        landmark_N52 = np.array(values).reshape(-1, 5, 2)
    return TemplateProtocol(
        name=folder.resolve().name,
        image_dir=folder,
        image_N=[row["path"] for _, row in rows],
        template_N=np.array([templates[row["template"]] for _, row in rows]),
        media_N=np.array([media[row["media"]] for _, row in rows]),
        score_N=np.array([_number(images_path, line, "score", row.get("score") or 1.0) for line, row in rows]),
        landmark_N52=landmark_N52,
        left_P=pair_P3[:, 0],
        right_P=pair_P3[:, 1],
        same_P=same_P,
        galleries={
            path.stem.removeprefix("gallery").strip("_") or "gallery": subjects(path)
            for path in sorted(folder.glob("gallery*.csv"))
        },
        probes=subjects(probe_path) if probe_path.exists() else None,
    )


def read_pairs(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``template template same`` lines -> (left, right) and same bool, [P] each. 15.7 M lines take seconds.

    Ids are int32 where all fit (half the memory), else int64. A label is 1, or 0 or -1 for two people.
    """
    text = _read_ascii(path)
    num_lines = text.count(b"\n") + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        try:
            values = np.fromstring(text, dtype=np.int64, sep=" ")
        except (DeprecationWarning, ValueError):
            values = np.empty(0, np.int64)
    if len(values) != 3 * num_lines:
        raise _first_bad_pair(path, text)
    left_P, right_P, label_P = values[0::3], values[1::3], values[2::3]
    wrong = np.flatnonzero((label_P != 0) & (label_P != 1) & (label_P != -1))
    if len(wrong):
        line = int(wrong[0])
        shown = values[3 * line : 3 * line + 3].tolist()
        raise _wrong(path, line + 1, f"{shown}; a label is 0 or 1 (-1 means 0)")
    largest = max(abs(int(end)) for side in (left_P, right_P) for end in (side.min(), side.max()))
    if largest >= 2**63 - 1:  # numpy stops there, whatever the digits say
        line = int(np.flatnonzero((abs(left_P) == largest) | (abs(right_P) == largest))[0])
        raise _wrong(path, line + 1, f"a template id beyond {2**63 - 2}; number the templates")
    del text
    kind, same_P = np.int32 if largest < 2**31 else np.int64, label_P == 1
    count_kinds(same_P, f"{path}: ")
    return left_P.astype(kind), right_P.astype(kind), same_P


def read_pair_files(path: Path, root: Path) -> list[tuple[Path, Path, bool]]:
    """The images of a pair list below ``root``, and whether they show one person.

    Lines are LFW's own (``name 1 4`` and ``name 1 other 3``; a first line of one or two counts is passed over) or
    ``path path label``, the label being 1, or 0 or -1 for two people. Names that hold blanks need tabs between fields.

    Raises:
        UserError: the number of the line and what is wrong with it, for the caller to put the list's name before.
    """
    wanted = "'name i j', 'name i name j' or 'path path label'"
    lines = [(line, text) for line, text in enumerate(read_text_lines(path), 1) if text.strip()]
    first = lines[0][1].split() if lines else []
    if len(first) <= 2 and all(field.isdecimal() for field in first):
        lines = lines[1:]
    pairs = []
    for line, text in lines:
        by_tabs = [field.strip() for field in text.strip("\t").split("\t")]
        found = _pair(by_tabs) or _pair(text.split())
        if found is None:
            raise UserError(f"line {line}: {text.strip()[:80]!r}; {wanted} was expected, label 1, 0 or -1")
        *names, same = found
        files = [find_image(root / name) for name in names]
        if None in files:
            name = names[files.index(None)]
            shown = root / (name if is_image_name(name) else f"{name}.jpg")
            raise UserError(f"line {line}: {shown}: no such file (nor with another image suffix)")
        pairs.append((*files, same))
    if not pairs:
        raise UserError(f"no pairs; write one a line: {wanted}")
    return pairs


def _pair(fields: list[str]) -> tuple[str, str, bool] | None:
    """(left, right, same) of a line's fields, None where they are no pair."""
    match fields:
        case [name, i, j] if i.isdecimal() and j.isdecimal():
            return _lfw_name(name, i), _lfw_name(name, j), True
        case [name, i, other, j] if i.isdecimal() and j.isdecimal():
            return _lfw_name(name, i), _lfw_name(other, j), False
        case [left, right, label] if left and right and label in _LABELS:
            return left, right, label == "1"
    return None


def _lfw_name(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number):04d}"


def read_pair_list(path: Path, image_dir: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of ``read_pair_files`` -> (uint8 [2P, size, size, 3] RGB, same bool [P])."""
    path, image_dir = Path(path), Path(image_dir)
    if not image_dir.is_dir():
        raise UserError(f"{image_dir}: no such folder; --image-dir must hold the images that {path} names")
    _read_bytes(path)
    try:
        pairs = read_pair_files(path, image_dir)
    except UserError as error:
        raise UserError(f"{path} {error}") from error
    images = [read_image(file, size) for *files, _ in pairs for file in files]
    return np.stack(images), np.array([same for _, _, same in pairs])


def _wrong(path: Path, line: int, problem: str) -> UserError:
    return UserError(f"{path} line {line}: {problem}")


def _read_bytes(path: Path) -> bytes:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; the evaluation needs it")
    text = Path(path).read_bytes()
    if not text.strip():
        raise UserError(f"{path}: empty; fetch or copy it again")
    return text


def _read_lines(path: Path) -> list[str]:
    """Lines of a text file in any of the usual encodings, without empty ones at its end."""
    return decode_text(_read_bytes(path), path).rstrip().split("\n")


def _read_ascii(path: Path) -> bytes:
    """A list of numbers as plain bytes, whatever its encoding; without white space at its end."""
    text = _read_bytes(path)
    if not text[:4].isascii() or b"\0" in text[:4]:
        text = decode_text(text, path).encode()
    return text.rstrip()


def _number(path: Path, line: int, what: str, value: str | None) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise _wrong(path, line, f"{what} is {value!r}; a finite number is needed")
    return number


def _read_images(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    rows = [line.strip().rsplit(None, 2) for line in _read_lines(path)]  # names may hold blanks
    ids = []
    for line, row in enumerate(rows, 1):
        if len(row) != 3 or not row[1].lstrip("-").isdecimal() or not row[2].lstrip("-").isdecimal():
            raise _wrong(path, line, f"{' '.join(row)[:80]!r}; 'name template media' is needed (truncated?)")
        ids.append([_id(path, line, value) for value in row[1:]])
    template_N, media_N = np.array(ids, dtype=np.int64).T
    return [row[0] for row in rows], template_N, media_N


def _id(path: Path, line: int, value: str) -> int:
    """A template or media number."""
    try:
        number = int(value)
    except ValueError:
        raise _wrong(path, line, f"{value[:40]!r}; a whole number is needed") from None
    if abs(number) >= 2**63 - 1:
        raise _wrong(path, line, f"{value[:40]}; ids end at {2**63 - 2}, number the templates and media")
    return number


def _read_landmarks(path: Path, names: list[str], images_path: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = [line.strip().rsplit(None, 11) for line in _read_lines(path)]
    if len(rows) != len(names):
        raise UserError(f"{path}: {len(rows)} lines, {images_path.name} has {len(names)}; both list the same images")
    value_N11 = np.empty((len(rows), 11))
    for line, (row, name) in enumerate(zip(rows, names, strict=True), 1):
        if row[:1] != [name]:
            raise _wrong(path, line, f"image {' '.join(row[:1])!r}, {images_path.name} has {name!r} there")
        if len(row) != 12:
            raise _wrong(path, line, f"{len(row)} fields; a name, ten landmark values and a score are needed")
        try:
            value_N11[line - 1] = row[1:]
        except ValueError:
            value_N11[line - 1] = [_number(path, line, "a value", value) for value in row[1:]]
    finite_N = np.isfinite(value_N11).all(1)
    if not finite_N.all():
        index = int(np.argmin(finite_N))
        raise _wrong(path, index + 1, f"{' '.join(rows[index][1:])[:80]!r} holds values that are not finite")
    return value_N11[:, :10].reshape(-1, 5, 2), value_N11[:, 10]


def _read_subjects(path: Path) -> SubjectList:
    pairs = []
    for line, text in enumerate(_read_lines(path)[1:], 2):
        fields = [part.strip() for part in text.split(",")]
        if len(fields) < 2 or not fields[0].isdecimal() or not fields[1]:
            raise _wrong(path, line, f"{text[:80]!r}; 'template,subject' is needed (truncated?)")
        pairs.append((_id(path, line, fields[0]), fields[1]))
    return _unique_subjects(path, pairs)


def _unique_subjects(path: Path, pairs: Iterable[tuple[int, str]]) -> SubjectList:
    """One row a template (the files repeat a template for each of its images)."""
    subject_of = {}
    for template, subject in pairs:
        if subject_of.setdefault(template, subject) != subject:
            raise UserError(f"{path}: template {template} is listed for subjects {subject_of[template]} and {subject}")
    if not subject_of:
        raise UserError(f"{path}: no templates below the header line")
    return SubjectList(np.array(list(subject_of)), np.array(list(subject_of.values())))


def _first_bad_pair(path: Path, text: bytes) -> UserError:
    for line, row in enumerate(text.split(b"\n"), 1):
        fields = row.split()
        if len(fields) != 3 or not all(part.lstrip(b"-").isdigit() for part in fields):
            shown = row[:80].decode("utf-8", "replace")
            return _wrong(path, line, f"{shown!r}; 'template template label' is needed (truncated?)")
    return UserError(f"{path}: not a list of 'template template label' lines")


def _csv_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) of a CSV file whose header has the columns; fields are stripped."""
    reader = csv.DictReader(_read_lines(path))
    header = [name.strip() for name in reader.fieldnames or []]
    missing = [name for name in columns if name not in header]
    if missing:
        raise _wrong(path, 1, f"header {','.join(header)!r} lacks {', '.join(missing)}")
    for row in reader:
        row.pop(None, None)  # fields beyond the header
        values = {name.strip(): (value or "").strip() for name, value in row.items()}
        empty = [name for name in columns if not values.get(name)]
        if empty:
            raise _wrong(path, reader.line_num, f"no value for {', '.join(empty)}")
        yield reader.line_num, values

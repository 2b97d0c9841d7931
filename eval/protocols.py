"""Readers of evaluation lists: IJB-B/C meta files, template protocols from CSV, LFW pair lists.

Legend: N images, P pairs, T templates. Every defect of a file is a ``UserError`` that names file, line and value.
"""

import csv
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from utils.decode import DecodeError, decode_image, fit_image
from utils.errors import UserError

_SUFFIXES = (".jpg", ".png", ".jpeg", ".bmp")


@dataclass(frozen=True)
class SubjectList:
    """Templates of a gallery or probe list and whom they show."""

    template_T: np.ndarray
    subject_T: np.ndarray


@dataclass(frozen=True)
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
    root, prefix = Path(root), target.lower()
    meta, crops = root / "meta", root / "loose_crop"
    for folder in (meta, crops):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; --image-path must hold meta/ and loose_crop/ of {target}")
    images_path, landmarks_path = meta / f"{prefix}_face_tid_mid.txt", meta / f"{prefix}_name_5pts_score.txt"
    names, template_N, media_N = _read_images(images_path)
    landmark_N52, score_N = _read_landmarks(landmarks_path, names, images_path)
    pairs_path = meta / f"{prefix}_template_pair_label.txt"
    left_P, right_P, same_P = read_pairs(pairs_path)
    _check_templates(pairs_path, (left_P, right_P), template_N, images_path)
    galleries = {
        path.stem.rsplit("_", 1)[1]: _read_subjects(path, template_N, images_path)
        for path in sorted(meta.glob(f"{prefix}_1N_gallery_*.csv"))
    }
    probe_path = meta / f"{prefix}_1N_probe_mixed.csv"
    probes = _read_subjects(probe_path, template_N, images_path) if probe_path.exists() else None
    return TemplateProtocol(
        target, crops, names, template_N, media_N, score_N, landmark_N52, left_P, right_P, same_P, galleries, probes
    )


def read_csv_protocol(folder: Path) -> TemplateProtocol:
    """A set of one's own: ``images.csv``, ``pairs.csv``, perhaps ``gallery*.csv`` and ``probe.csv``, all with headers.

    ``images.csv``: ``path,template,media`` and perhaps ``score`` and ``x1,y1,...,x5,y5``. ``pairs.csv``:
    ``left,right,same``. 1:N lists: ``template,subject``. Paths are relative to the folder; ids are any text.
    """
    folder = Path(folder)
    images_path, pairs_path = folder / "images.csv", folder / "pairs.csv"
    points = [f"{axis}{k}" for k in range(1, 6) for axis in "xy"]
    rows = list(_csv_rows(images_path, ("path", "template", "media")))
    ids = {template: index for index, template in enumerate(dict.fromkeys(row["template"] for _, row in rows))}
    media = {medium: index for index, medium in enumerate(dict.fromkeys(row["media"] for _, row in rows))}
    has_points = bool(rows) and points[0] in rows[0][1]

    def template_of(path: Path, line: int, value: str) -> int:
        if value not in ids:
            raise UserError(f"{path} line {line}: template {value!r} has no image in {images_path.name}")
        return ids[value]

    def subjects(path: Path) -> SubjectList:
        pairs = [
            (template_of(path, line, row["template"]), row["subject"])
            for line, row in _csv_rows(path, ("template", "subject"))
        ]
        return _unique_subjects(path, [t for t, _ in pairs], [s for _, s in pairs])

    def number(line: int, row: dict[str, str], column: str) -> float:
        return _number(images_path, line, column, row.get(column))

    pairs = []
    for line, row in _csv_rows(pairs_path, ("left", "right", "same")):
        if row["same"] not in ("0", "1"):
            raise UserError(f"{pairs_path} line {line}: same is {row['same']!r}; write 0 or 1")
        pairs.append(
            (template_of(pairs_path, line, row["left"]), template_of(pairs_path, line, row["right"]), row["same"])
        )
    pair_P3 = np.array(pairs, dtype=np.int64).reshape(-1, 3)
    _check_both_kinds(pairs_path, pair_P3[:, 2])
    landmark_N52 = np.array([[number(line, row, p) for p in points] for line, row in rows]) if has_points else None
    probe_path = folder / "probe.csv"
    return TemplateProtocol(
        name=folder.resolve().name,
        image_dir=folder,
        image_N=[row["path"] for _, row in rows],
        template_N=np.array([ids[row["template"]] for _, row in rows]),
        media_N=np.array([media[row["media"]] for _, row in rows]),
        score_N=np.array([number(line, row, "score") if row.get("score") else 1.0 for line, row in rows]),
        landmark_N52=None if landmark_N52 is None else landmark_N52.reshape(-1, 5, 2),
        left_P=pair_P3[:, 0],
        right_P=pair_P3[:, 1],
        same_P=pair_P3[:, 2].astype(bool),
        galleries={
            path.stem.removeprefix("gallery").strip("_") or "gallery": subjects(path)
            for path in sorted(folder.glob("gallery*.csv"))
        },
        probes=subjects(probe_path) if probe_path.exists() else None,
    )


def read_pairs(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``template template same`` lines -> (left, right) int32 and same bool, [P] each. 15.7 M lines take seconds."""
    text = _read_bytes(path).rstrip()
    num_lines = text.count(b"\n") + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        try:
            values = np.fromstring(text, dtype=np.int64, sep=" ")
        except (DeprecationWarning, ValueError):
            values = np.empty(0, np.int64)
    if len(values) != 3 * num_lines:
        raise UserError(_first_bad_pair(path, text))
    del text
    left_P, right_P = values[0::3].astype(np.int32), values[1::3].astype(np.int32)
    label_P = values[2::3]
    wrong = np.flatnonzero((label_P != 0) & (label_P != 1) | (left_P != values[0::3]) | (right_P != values[1::3]))
    if len(wrong):
        line = int(wrong[0])
        raise UserError(f"{path} line {line + 1}: {values[3 * line : 3 * line + 3].tolist()}; a label is 0 or 1")
    _check_both_kinds(path, label_P)
    return left_P, right_P, label_P.astype(bool)


def read_pair_list(path: Path, image_dir: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """LFW from a folder and a pair list -> (images uint8 [2P, size, size, 3] RGB, same bool [P]).

    Lines are LFW's own (``name 1 4`` and ``name 1 name 3``, a first line of one or two counts is passed over) or
    ``path path label``.
    """
    path, image_dir = Path(path), Path(image_dir)
    if not image_dir.is_dir():
        raise UserError(f"{image_dir}: no such folder; --image-dir must hold the images that {path} names")
    images, same = [], []
    for line, text in enumerate(_read_bytes(path).decode("utf-8", "replace").splitlines(), 1):
        tokens = text.split()
        if not tokens or (line == 1 and len(tokens) <= 2 and all(token.isdigit() for token in tokens)):
            continue
        if len(tokens) == 3 and tokens[1].isdigit() and tokens[2].isdigit():
            files, label = [_lfw_file(image_dir, tokens[0], tokens[k]) for k in (1, 2)], True
        elif len(tokens) == 4 and tokens[1].isdigit() and tokens[3].isdigit():
            files, label = [_lfw_file(image_dir, tokens[k], tokens[k + 1]) for k in (0, 2)], False
        elif len(tokens) == 3 and tokens[2] in ("0", "1", "-1"):
            files, label = [image_dir / token for token in tokens[:2]], tokens[2] == "1"
        else:
            raise UserError(
                f"{path} line {line}: {text[:80]!r}; write 'name i j', 'name i name j' or 'path path label'"
            )
        images += [read_image(file, size) for file in files]
        same.append(label)
    if not same:
        raise UserError(f"{path}: no pairs; write one a line: 'name i j', 'name i name j' or 'path path label'")
    return np.stack(images), np.array(same)


def read_image(path: Path, size: int | None = None) -> np.ndarray:
    """RGB uint8 [H, W, 3], resized to a square where a size is given."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; an image is needed")
    try:
        image = decode_image(Path(path).read_bytes())
    except DecodeError as error:
        raise UserError(f"{path}: cannot be decoded: {error}") from error
    return image if size is None else fit_image(image, (size, size), "stretch")


def _lfw_file(folder: Path, name: str, number: str) -> Path:
    stem = folder / name / f"{name}_{int(number):04d}"
    return next((file for suffix in _SUFFIXES if (file := stem.with_suffix(suffix)).exists()), stem.with_suffix(".jpg"))


def _read_bytes(path: Path) -> bytes:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; the evaluation needs it")
    text = Path(path).read_bytes()
    if not text.strip():
        raise UserError(f"{path}: empty; fetch or copy it again")
    return text


def _lines(path: Path) -> list[list[str]]:
    return [line.split() for line in _read_bytes(path).decode("utf-8", "replace").rstrip().split("\n")]


def _number(path: Path, line: int, what: str, value: str | None) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not np.isfinite(number):
        raise UserError(f"{path} line {line}: {what} is {value!r}; a finite number is needed")
    return number


def _read_images(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    rows = _lines(path)
    for line, row in enumerate(rows, 1):
        if len(row) != 3 or not row[1].lstrip("-").isdigit() or not row[2].lstrip("-").isdigit():
            raise UserError(f"{path} line {line}: {' '.join(row)[:80]!r}; 'name template media' is needed (truncated?)")
    ids_N2 = np.array([row[1:] for row in rows], dtype=np.int64)
    return [row[0] for row in rows], ids_N2[:, 0], ids_N2[:, 1]


def _read_landmarks(path: Path, names: list[str], images_path: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = _lines(path)
    if len(rows) != len(names):
        raise UserError(f"{path}: {len(rows)} lines, {images_path.name} has {len(names)}; both list the same images")
    value_N11 = np.empty((len(rows), 11))
    for index, (row, name) in enumerate(zip(rows, names, strict=True)):
        if row[:1] != [name]:
            raise UserError(
                f"{path} line {index + 1}: image {' '.join(row[:1])!r}, {images_path.name} has {name!r} there"
            )
        if len(row) != 12:
            raise UserError(
                f"{path} line {index + 1}: {len(row)} fields; a name, ten landmark values and a score are needed"
            )
        try:
            value_N11[index] = row[1:]
        except ValueError:
            value_N11[index] = [_number(path, index + 1, "a value", value) for value in row[1:]]
    if not np.isfinite(value_N11).all():
        line = int(np.flatnonzero(~np.isfinite(value_N11).all(1))[0])
        raise UserError(f"{path} line {line + 1}: {' '.join(rows[line][1:])[:80]!r} holds values that are not finite")
    return value_N11[:, :10].reshape(-1, 5, 2), value_N11[:, 10]


def _read_subjects(path: Path, template_N: np.ndarray, images_path: Path) -> SubjectList:
    templates, subjects = [], []
    for line, text in enumerate(_read_bytes(path).decode("utf-8", "replace").rstrip().split("\n")[1:], 2):
        fields = [part.strip() for part in text.split(",")]
        if len(fields) < 2 or not fields[0].isdigit() or not fields[1]:
            raise UserError(f"{path} line {line}: {text[:80]!r}; 'template,subject' is needed (truncated?)")
        templates.append(int(fields[0]))
        subjects.append(fields[1])
    listed = _unique_subjects(path, templates, subjects)
    _check_templates(path, (listed.template_T,), template_N, images_path)
    return listed


def _unique_subjects(path: Path, templates: list[int], subjects: list[str]) -> SubjectList:
    """One row a template (the files repeat a template for each of its images)."""
    subject_of = {}
    for template, subject in zip(templates, subjects, strict=True):
        if subject_of.setdefault(template, subject) != subject:
            raise UserError(f"{path}: template {template} is listed for subjects {subject_of[template]} and {subject}")
    if not subject_of:
        raise UserError(f"{path}: no templates below the header line")
    return SubjectList(np.array(list(subject_of)), np.array(list(subject_of.values())))


def _check_templates(path: Path, columns: tuple[np.ndarray, ...], template_N: np.ndarray, images_path: Path) -> None:
    known = np.unique(template_N)
    for column in columns:
        used = np.unique(column)
        unknown = used[~np.isin(used, known)]
        if len(unknown):
            line = int(np.flatnonzero(column == unknown[0])[0]) + 1
            raise UserError(f"{path}: template {unknown[0]} (row {line}) has no image in {images_path.name}")


def _check_both_kinds(path: Path, label_P: np.ndarray) -> None:
    num_same = int(np.count_nonzero(label_P))
    if num_same in (0, len(label_P)):
        raise UserError(
            f"{path}: {num_same} genuine pairs of {len(label_P)}; TAR at FAR needs genuine and impostor pairs"
        )


def _first_bad_pair(path: Path, text: bytes) -> str:
    for line, row in enumerate(text.split(b"\n"), 1):
        fields = row.split()
        if len(fields) != 3 or not all(part.lstrip(b"-").isdigit() for part in fields):
            shown = row[:80].decode("utf-8", "replace")
            return f"{path} line {line}: {shown!r}; 'template template label' is needed (truncated?)"
    return f"{path}: not a list of 'template template label' lines"


def _csv_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) of a CSV file whose header has the columns; fields are stripped."""
    reader = csv.DictReader(_read_bytes(path).decode("utf-8-sig", "replace").splitlines())
    header = [name.strip() for name in reader.fieldnames or []]
    missing = [name for name in columns if name not in header]
    if missing:
        raise UserError(f"{path} line 1: header {','.join(header)!r} lacks {', '.join(missing)}")
    for row in reader:
        values = {
            (name or "").strip(): (value or "").strip() for name, value in row.items() if isinstance(value, str | None)
        }
        empty = [name for name in columns if not values.get(name)]
        if empty:
            raise UserError(f"{path} line {reader.line_num}: no value for {', '.join(empty)}")
        yield reader.line_num, values

"""Which photos are to be aligned, whose they are, and under which names their crops are written."""

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from utils.errors import UserError
from utils.images import find_image_files, is_hidden, is_image_name
from utils.text import read_text_lines

WORK = ".align"  # in the folder of the crops: what ``tools/align.py`` keeps between runs


@dataclass(frozen=True)
class Photo:
    """One photo of a plan."""

    path: Path
    source: str  # its name in tables: relative to the folder given, else as given
    identity: str  # name of the folder that its crops go to
    stem: str  # name of its crop without suffix, unique within the identity


def plan_photos(source: Path) -> tuple[list[Photo], str | None]:
    """The photos of a folder, of a list or a single one.

    Folder: the first folder below it is the identity, whatever lies deeper; photos directly in it have the folder's own
    name as identity. List: lines ``path identity`` (a tab, a comma or blanks between; relative paths start from the
    list's folder) or ``path`` alone, whose folder then is the identity. Hidden files and what is no image are passed
    over (``utils.images``); photos in formats that are not read (HEIC, raw) belong to the plan, so that they are missed
    aloud. A folder inside that crops were written to (it has a ``WORK`` folder) is left out.

    Returns:
        The photos in order, and a line about what was passed over or None.

    Raises:
        UserError: nothing there; a list line that cannot be used.
    """
    if source.is_dir():
        found = find_image_files(source)
        names = sorted([*found.names, *found.other_photos], key=lambda name: name.split("/"))
        folders = {parent for name in names for parent in PurePosixPath(name).parents if parent.name}
        outputs = {folder for folder in folders if (source / folder / WORK).is_dir()}
        names = [name for name in names if outputs.isdisjoint(PurePosixPath(name).parents)]
        if not names:
            raise UserError(f"{source}: no images there")
        own_name = source.resolve().name or "photos"
        entries = [(source / name, name, name.split("/")[0] if "/" in name else own_name) for name in names]
        return _named(entries), found.summary()
    if not source.is_file():
        raise UserError(f"{source}: no such file or folder")
    if is_image_name(source.name):
        return _named([(source, source.name, source.resolve().parent.name or "photos")]), None
    return _named(_read_list(source)), None


def _read_list(path: Path) -> list[tuple[Path, str, str]]:
    entries: dict[str, tuple[Path, str, str]] = {}
    for number, line in enumerate(read_text_lines(path), 1):
        line = line.strip()
        if not line:
            continue
        name, identity = line, None
        if not (path.parent / line).is_file():
            ends = (match.span() for match in re.finditer(r"\s*[\t,]\s*|\s+", line))
            whole = next(((line[:start], line[end:]) for start, end in ends if is_image_name(line[:start])), None)
            name, identity = whole or (line, None)
        if not is_image_name(name):
            raise UserError(f"{path}:{number}: {line[:80]!r}: 'path identity' was expected, or the path of an image")
        file = path.parent / name
        identity = file.resolve().parent.name or "photos" if identity is None else identity
        if "/" in identity or "\\" in identity or identity == ".." or is_hidden(identity):
            raise UserError(f"{path}:{number}: the identity {identity!r} cannot be the name of a folder")
        if entries.setdefault(name, (file, name, identity))[2] != identity:
            raise UserError(f"{path}:{number}: {name}: identity {identity!r} here, {entries[name][2]!r} above")
    if not entries:
        raise UserError(f"{path}: no photos listed")
    return list(entries.values())


def _named(entries: list[tuple[Path, str, str]]) -> list[Photo]:
    """Gives each its stem: the file's name without suffix; with it where two would be equal; numbered if need be.

    Folders between the identity and the file become part of the stem. Names that differ in case alone count as equal:
    on many disks they are.
    """
    named = []  # (identity, stem, its name with suffix)
    for _, source, identity in entries:
        path = PurePosixPath(source.replace(os.sep, "/"))
        between = path.parts[1:-1] if len(path.parts) > 2 and path.parts[0] == identity else ()
        named.append((identity, "_".join([*between, path.stem]), "_".join([*between, path.name])))
    keys = [(identity.lower(), stem.lower()) for identity, stem, _ in named]
    times = Counter(keys)
    taken = {key for key in keys if times[key] == 1}
    photos = []
    for (path, source, identity), key, (_, stem, name) in zip(entries, keys, named, strict=True):
        if times[key] > 1:
            stem, number = name, 1
            while (identity.lower(), stem.lower()) in taken:
                number += 1
                stem = f"{name}~{number}"
            taken.add((identity.lower(), stem.lower()))
        photos.append(Photo(path, source, identity, stem))
    return photos

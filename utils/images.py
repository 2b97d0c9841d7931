"""Image files on disk: which names are images, which are passed over, and how a folder is searched. One rule for all.

Names that begin with a dot and the folders that systems and editors leave behind (``_NOT_OURS``) are ignored. Images
are found at any depth; links to folders are followed, a link back to a folder that it lies in is not.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils.errors import UserError

_JPEG = (".jfif", ".jpe", ".jpeg", ".jpg")
IMAGE_SUFFIXES = (".bmp", ".gif", *_JPEG, ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
_SUFFIXES = frozenset(IMAGE_SUFFIXES)
_RAW = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"}
_OTHER_PHOTOS = frozenset({*_RAW, ".avif", ".heic", ".heif", ".jp2", ".jxl"})
_FOLDERS = {"@eadir", "#recycle", "$recycle.bin", "__macosx", "lost+found", "system volume information"}
_NOT_OURS = frozenset({*_FOLDERS, "desktop.ini", "thumbs.db"})


def is_hidden(name: str) -> bool:
    """True for a file or folder name (no path) that no tool of ours looks at."""
    return name.startswith(".") or name.lower() in _NOT_OURS


def is_image_name(name: str | os.PathLike) -> bool:
    """True where the suffix is an image's, in upper or lower case."""
    return os.path.splitext(os.fspath(name))[1].lower() in _SUFFIXES  # noqa: PTH122 - for speed


class PassedOver(dict):
    """Reason -> (how many names were not taken for it, the first of them)."""

    def add(self, reason: str, name: str) -> None:
        """Count a name."""
        count, first = self.get(reason, (0, name))
        self[reason] = (count + 1, first)

    def describe(self, place: object) -> str | None:
        """One line about what was passed over at ``place``, or None."""
        parts = [f"{count} {reason} ({first})" for reason, (count, first) in self.items()]
        return f"{place}: passed over {', '.join(parts)}" if parts else None


@dataclass
class ImageFiles:
    """What a search found.

    Attributes:
        root: the folder searched.
        names: paths of the images relative to ``root`` with ``/`` between their parts, in the order of the parts.
        passed_over: names that were not taken, relative to ``root``.
        other_photos: the photos among what was passed over as no image (HEIC, raw), relative to ``root``.
    """

    root: Path
    names: list[str] = field(default_factory=list)
    passed_over: PassedOver = field(default_factory=PassedOver)
    other_photos: list[str] = field(default_factory=list)

    def paths(self) -> list[Path]:
        return [self.root / name for name in self.names]

    def summary(self) -> str | None:
        """One line about what was passed over, or None."""
        return self.passed_over.describe(self.root)


def find_image_files(root: str | os.PathLike) -> ImageFiles:
    """The images under a folder, to the bottom.

    Raises:
        UserError: no such folder.
        OSError: a folder in it cannot be read.
    """
    found = ImageFiles(Path(root))
    if not found.root.is_dir():
        raise UserError(f"{root}: no such folder")
    found.names.extend(_search(found, "", [_identity(found.root)]))
    return found


def _search(found: ImageFiles, folder: str, above: list[tuple[int, int]]) -> Iterator[str]:
    with os.scandir(found.root / folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        name = f"{folder}{entry.name}"
        if is_hidden(entry.name):
            found.passed_over.add("hidden", name)
        elif _is_folder(entry):
            identity = _identity(entry.path)
            if identity in above:
                found.passed_over.add("links to a folder around them", name)
            else:
                yield from _search(found, f"{name}/", [*above, identity])
        elif entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110 - for speed
            found.passed_over.add("broken links", name)
        elif is_image_name(entry.name) and not entry.is_file():  # to read a pipe would wait for ever
            found.passed_over.add("pipes or devices", name)
        elif is_image_name(entry.name):
            yield name
        else:
            found.passed_over.add("files that are no images", name)
            if os.path.splitext(name)[1].lower() in _OTHER_PHOTOS:  # noqa: PTH122 - for speed
                found.other_photos.append(name)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _identity(folder: str | os.PathLike) -> tuple[int, int]:
    status = Path(folder).stat()
    return status.st_dev, status.st_ino


def find_image(stem: str | os.PathLike) -> Path | None:
    """The image of this name, or of this name with an image's suffix behind it (dots in names are no suffixes)."""
    stem, suffixes = Path(stem), ("", *IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES))
    candidates = (stem.with_name(stem.name + suffix) for suffix in suffixes)
    return next((path for path in candidates if path.is_file()), None)

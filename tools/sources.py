"""A data set as a tool's argument: record set, folder of identities, list or tar shards, told by what is there."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset import Source, build_source, recognise
from utils.decode import fit_image
from utils.errors import UserError


def open_source(path: str | Path, prefix: str = "train") -> Source:
    """The data set at ``path``.

    Args:
        path: a folder with ``<prefix>.rec``, a ``.rec`` file, a folder with a folder an identity, a folder or pattern
            of tar shards, or a list of ``path label`` lines.
        prefix: name of a record set's files without suffix.

    Raises:
        UserError: nothing there that is a data set.
        OSError: a file cannot be read.
    """
    path, kind = Path(path), recognise(path, prefix)
    if kind is None:
        known = f"a folder with {prefix}.rec, a folder of identities, tar shards or a list of 'path label' lines"
        raise UserError(f"{path}: no such data set; {known} was expected")
    if kind == "folder":
        others = sorted(entry.name for entry in path.glob("*.rec"))
        if others:
            raise UserError(f"{path}: no {prefix}.rec in it, but {others[0]}; give --prefix {Path(others[0]).stem}")
    if kind == "list":
        return build_source("list", list_file=path)
    return build_source(kind, root=path, **({"prefix": prefix} if kind == "rec" else {}))


@dataclass(frozen=True)
class NetworkImages:
    """Images at the network's size. Square ones are scaled; others only where ``resize`` allows to stretch them."""

    get: Callable[[int], np.ndarray]  # i -> uint8 RGB [H, W, 3]
    count: int
    size: int  # side in pixels
    name_of: Callable[[int], str]  # what to call image i
    resize: bool = False  # stretch images that are not square
    keep: Callable[[int, np.ndarray], None] | None = None  # called with (i, the image as it was read)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> np.ndarray:
        image = self.get(i)
        if self.keep is not None:
            self.keep(i, image)
        height, width = image.shape[:2]
        if height != width and not self.resize:
            wanted = "square aligned crops were expected, give --resize to stretch others"
            raise UserError(f"{self.name_of(i)}: {width}x{height} pixels; {wanted}")
        return fit_image(image, (self.size, self.size), "stretch")


def pixel_digest(image: np.ndarray) -> int:
    """64 bits of a decoded image: equal for equal pixels, whatever the file."""
    state = hashlib.blake2b(str(image.shape).encode(), digest_size=8)
    state.update(np.ascontiguousarray(image))
    return int.from_bytes(state.digest(), "little")

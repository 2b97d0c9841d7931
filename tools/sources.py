"""A data set as a tool's argument: record set, folder of identities, list or tar shards, told by what is there."""

from pathlib import Path

from dataset import SOURCES, Source, build_source
from utils.errors import UserError

_SHARDS = (".tar", ".tar.gz", ".tgz")


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
    path = Path(path)
    if path.suffix == ".rec" or (path / f"{prefix}.rec").is_file():
        return build_source("rec", root=path, prefix=prefix)
    if path.is_dir():
        if any(entry.name.endswith(_SHARDS) for entry in path.iterdir()):
            return _shards(path)
        others = sorted(entry.name for entry in path.glob("*.rec"))
        if others:
            raise UserError(f"{path}: no {prefix}.rec in it, but {others[0]}; give --prefix {Path(others[0]).stem}")
        return build_source("folder", root=path)
    if path.name.endswith(_SHARDS) or any(mark in str(path) for mark in "*{"):
        return _shards(path)
    if not path.is_file():
        raise UserError(f"{path}: no such data set; a folder with {prefix}.rec, a folder of identities or a list of "
                        "'path label' lines was expected")  # fmt: skip
    return build_source("list", list_file=path)


def _shards(path: Path) -> Source:
    if "wds" not in SOURCES:
        raise UserError(f"{path}: tar shards cannot be read here; unpack them to a folder an identity")
    return build_source("wds", root=path)

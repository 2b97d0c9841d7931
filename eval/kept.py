"""What is kept beside weights: the network converted to ONNX, and which engine was the fastest on a machine.

``<folder of the weights>/.engines/<file>-<key>.onnx`` and ``.json``. The key is a digest of the weights, of the options
that build the network and of the code that does, so that nothing here is ever stale; what is left of older weights of
the same name is removed. Where that folder cannot be written, ``~/.cache/arcface_pfc`` takes its place.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.files import file_digest, write_json, written_whole

_CODE = Path(__file__).resolve().parent.parent


def weights_key(path: Path, options: object) -> str:
    """What tells this network with these weights from any other, whichever version of ours reads it: 24 hex digits."""
    return _short_digest([file_digest(path), json.dumps(options, sort_keys=True, default=str)])


def converted_key(weights: str) -> str:
    """What tells the conversion of the weights with this key, by the code that is here, from any other."""
    code = [*sorted((_CODE / "backbones").glob("*.py")), _CODE / "eval" / "engines.py"]
    return _short_digest([weights, *map(file_digest, code)])


def _short_digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


@contextlib.contextmanager
def kept_onnx(path: Path, key: str, make: Callable[[Path], object], say: Callable[[str], None]) -> Iterator[Path]:
    """The ``.onnx`` file of the weights at ``path``, made and kept if it is not there yet.

    Args:
        path: the weights file.
        key: its ``converted_key``.
        make: writes the network to the path it is given.
        say: told what was kept where, or why not: then the file is gone when the block ends.
    """
    name = f"{path.name}-{key}.onnx"
    for folder in _folders(path):
        if (folder / name).is_file():
            yield folder / name
            return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        fresh = Path(temporary) / "model.onnx"
        make(fresh)
        kept = _keep(path, name, lambda aside: shutil.copyfile(fresh, aside))
        nowhere = f"to be kept nowhere: neither {' nor '.join(map(str, _folders(path)))} can be written"
        say(f"{path.name} converted once, kept as {kept}" if kept else f"{path.name} converted, {nowhere}")
        yield kept or fresh


def read_speeds(path: Path, key: str, machine: str) -> dict[str, float] | None:
    """Images a second by engine, as measured on this machine before; None if they were not."""
    for folder in _folders(path):
        file = folder / f"{path.name}-{key}.json"
        if file.is_file():
            try:
                speeds = json.loads(file.read_text(encoding="utf-8"))[machine]
                return {str(name): float(speed) for name, speed in speeds.items()}
            except (ValueError, KeyError, TypeError, AttributeError):  # another machine's, or not ours: measured anew
                continue
    return None


def keep_speeds(path: Path, key: str, machine: str, speeds: dict[str, float]) -> None:
    """Remember what was measured."""
    _keep(path, f"{path.name}-{key}.json", lambda aside: write_json(aside, {machine: speeds}))


def _folders(path: Path) -> tuple[Path, Path]:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    here = hashlib.sha256(os.fsencode(path.resolve().parent)).hexdigest()[:16]
    return path.parent / ".engines", home / "arcface_pfc" / here


def _keep(path: Path, name: str, write: Callable[[Path], object]) -> Path | None:
    """Write a file whole into the first folder that takes it, and remove what is there of older weights."""
    current = name.rpartition(".")[0]
    for folder in _folders(path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with written_whole(folder / name) as aside:
                write(aside)
        except OSError:  # read-only, no space left: the next one, and the caller says where it was kept
            continue
        for old in folder.iterdir():
            if old.name.startswith(f"{path.name}-") and not old.name.startswith(f"{current}."):
                with contextlib.suppress(OSError):  # another process was quicker
                    old.unlink()
        return folder / name
    return None

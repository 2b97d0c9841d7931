"""Embeddings of a template protocol: read, align, embed, keep on disk, go on after an interruption.

Legend: N images, D embedding size. Stored as float32 [N, 2, D]: the raw embedding and that of the mirror image, in the
order of the image list. Beside ``F.npy`` stands ``F.npy.json``: which images, which weights.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from eval.embed import RUN_FILES, Embedder
from eval.protocols import TemplateProtocol, read_image
from eval.stream import embed_to_file
from utils import distributed
from utils.errors import UserError
from utils.files import write_json
from utils.photos.align import align_face
from utils.system import threads_of_rank

CHUNK = 512  # images between two savings; a cache goes on at any batch size


def weights_digest(model: str, which: str = "last") -> str:
    """SHA-256 of the weights a model name stands for; so that a cache is never used for another network."""
    path = Path(model)
    path = path / RUN_FILES[which] if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def protocol_features(
    protocol: TemplateProtocol,
    load: Callable[[], Embedder] | None,
    model: str | None,
    path: Path,
    num_threads: int | None = None,
    replace: bool = False,
) -> np.ndarray:
    """Features of every image of the protocol, [N, 2, D] float32, from ``path`` as far as they are there.

    Every rank enters, the ranks share what is left to embed, and must see the same folder.

    Args:
        protocol: images, landmarks.
        load: makes the embedder; called only if something is left to embed. None: everything must be in ``path``.
        model: digest of the weights; None accepts those the file was made with.
        path: the cache.
        num_threads: threads that read and align; None: one a core.
        replace: a cache of other images or weights is made anew (said on stderr) instead of being an error.

    Raises:
        UserError: the cache is of other images or weights, an image cannot be read, an embedding is not finite.
    """
    path, record_path = Path(path), Path(f"{path}.json")
    images = _Images(protocol)
    wanted = {"images": images.digest(), "num_images": len(images), "model": model}
    failure, complete, embedder = None, False, None
    try:
        if distributed.get_rank() == 0:
            complete = _complete(path, record_path, wanted, replace)
    except (OSError, ValueError) as error:
        failure = error
    distributed.raise_together(failure)
    if not distributed.broadcast_object(complete):
        try:
            if load is None:
                raise UserError(f"{path}: no complete features there; give --model to make them")
            embedder = load()
            images.size = embedder.input_size
            if distributed.get_rank() == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(record_path, wanted)
        except (OSError, ValueError) as error:
            failure = error
        distributed.raise_together(failure)
        try:
            embed_to_file(embedder, images, path, flip="both", key=wanted["images"], chunk=CHUNK,
                          num_threads=num_threads or threads_of_rank(), name_of=images.name)  # fmt: skip
        except Exception:
            if distributed.get_rank() == 0 and not _part(path).is_file():
                record_path.unlink(missing_ok=True)
            raise
    return _open(path, len(images))


def aligned_image(protocol: TemplateProtocol, index: int, size: int) -> np.ndarray:
    """Image ``index`` as the network sees it: RGB uint8 [size, size, 3]."""
    path = protocol.image_dir / protocol.image_N[index]
    if protocol.landmark_N52 is None:
        return read_image(path, size)
    try:
        return align_face(read_image(path), protocol.landmark_N52[index], size)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


class _Images:
    """The protocol's images as a sequence, aligned to ``size``."""

    def __init__(self, protocol: TemplateProtocol):
        self.protocol, self.size = protocol, 0

    def __len__(self) -> int:
        return len(self.protocol.image_N)

    def __getitem__(self, index: int) -> np.ndarray:
        return aligned_image(self.protocol, index, self.size)

    def name(self, index: int) -> Path:
        return self.protocol.image_dir / self.protocol.image_N[index]

    def digest(self) -> str:
        """Of names and landmarks: what decides the embeddings, given the weights and the files."""
        digest = hashlib.sha256("\n".join(self.protocol.image_N).encode())
        if self.protocol.landmark_N52 is not None:
            digest.update(np.ascontiguousarray(self.protocol.landmark_N52).tobytes())
        return digest.hexdigest()


def _part(path: Path) -> Path:
    return Path(f"{path}.part")


def _complete(path: Path, record_path: Path, wanted: dict, replace: bool) -> bool:
    """Whether ``path`` holds all features that are wanted; what is there of other work is an error or is removed."""
    if path.is_dir():
        raise UserError(f"{path}: a folder; --features names a file, for example {path / 'features.npy'}")
    record = _read_record(record_path)
    if record is not None and (path.is_file() or _part(path).is_file()):
        try:
            _check_record(path, record, wanted)
        except UserError as error:
            if not replace:
                raise
            print(f"made anew: {error}", file=sys.stderr)
            for old in (path, _part(path)):
                old.unlink(missing_ok=True)
    return path.is_file()


def _read_record(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        if not {"images", "num_images", "model"} <= set(record):
            raise ValueError("keys are missing")
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a record of features ({error}); delete it and the features beside it") from None
    return record


def _check_record(path: Path, record: dict, wanted: dict) -> None:
    if record["images"] != wanted["images"] or record["num_images"] != wanted["num_images"]:
        raise UserError(
            f"{path}: features of {record['num_images']} other images (here: {wanted['num_images']}; names or marks "
            "differ); name another --features file"
        )
    if wanted["model"] is not None and record["model"] != wanted["model"]:
        raise UserError(f"{path}: made by other weights; name another --features file or delete this one")


def _open(path: Path, num_images: int) -> np.ndarray:
    try:
        feature_N2D = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a .npy file of features ({error}); delete it to make it again") from None
    if feature_N2D.ndim != 3 or feature_N2D.shape[:2] != (num_images, 2) or feature_N2D.dtype.kind != "f":
        raise UserError(f"{path}: {feature_N2D.dtype} {feature_N2D.shape}; float [{num_images}, 2, size] is needed")
    return feature_N2D

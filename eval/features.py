"""Embeddings of a template protocol: read, align, embed, keep on disk, go on after an interruption.

Legend: N images, D embedding size. Stored as float32 [N, 2, D]: the raw embedding and that of the mirror image, in the
order of the image list. Beside ``F.npy`` stands ``F.npy.json``: which images, which weights.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.embed import Embedder, weights_path
from eval.protocols import TemplateProtocol, read_image
from eval.stream import digest, embed_to_file, partial_files, partial_key
from utils import distributed
from utils.errors import UserError
from utils.files import file_digest, file_stamps
from utils.photos.align import align_face, lies_outside
from utils.system import threads_of_rank

CHUNK = 512  # images between two savings; a cache goes on at any batch size


@dataclass(frozen=True)
class Features:
    """Features of all images of a protocol."""

    feature_N2D: np.ndarray
    num_outside: int | None  # images with a landmark outside of the picture; None: features from elsewhere


def weights_digest(model: str, which: str = "last", precision: str = "fp32") -> str:
    """What embeddings are made by: SHA-256 of the weights a model name stands for, and another precision than fp32."""
    digest = file_digest(weights_path(model, which))
    return digest if precision == "fp32" else f"{digest}-{precision}"


def protocol_features(
    protocol: TemplateProtocol,
    load: Callable[[], Embedder] | None,
    model: str | None,
    path: Path,
    *,
    num_threads: int | None = None,
    replace: bool = False,
) -> Features:
    """Features of every image of the protocol, [N, 2, D] float32, from ``path`` as far as they are there.

    Every rank enters, the ranks share what is left to embed, and must see the same folder. What is used again is logged
    on stderr, in one line.

    Args:
        load: makes the embedder; called only if something is left to embed. None: everything must be in ``path``.
        model: digest of the weights; None accepts those the file was made with.
        num_threads: threads that read and align; None: one a core.
        replace: a cache of other images, files or weights is made anew (logged) instead of being an error.

    Raises:
        UserError: the cache is of other images, files or weights, an image cannot be read, an embedding is not finite,
            or another process embeds into the same file.
    """
    path, rank = Path(path), distributed.get_rank()
    images, wanted, stamps, complete, embedder = _Images(protocol), None, None, None, None
    with distributed.together():
        if rank == 0:
            stamps = file_stamps(protocol.image_dir, protocol.image_N)
            wanted = {"images": images.digest(), "files": digest(stamps), "num_images": len(images), "model": model}
            complete = _is_complete(path, wanted, replace, at_hand=any(stamps))
    complete, wanted = distributed.broadcast_object((complete, wanted))
    if not complete:
        with distributed.together():
            if load is None:
                raise UserError(f"{path}: no complete features there; give --model to make them")
            embedder = load()
            images.size = embedder.input_size
        embed_to_file(
            embedder,
            images,
            path,
            flip="both",
            key=_key(wanted),
            stamps=stamps,
            flagged=images.outside.__contains__,
            record=wanted,
            chunk=CHUNK,
            num_threads=num_threads or threads_of_rank(),
            name_of=images.name,
        )
    record = _read_record(path) or {}
    return Features(_open(path, len(images)), record.get("flagged"))


def read_aligned(protocol: TemplateProtocol, index: int, size: int) -> tuple[np.ndarray, bool]:
    """Image ``index`` as the network sees it, RGB uint8 [size, size, 3], and whether a landmark lies outside of it."""
    path = protocol.image_dir / protocol.image_N[index]
    if protocol.landmark_N52 is None:
        return read_image(path, size), False
    image, landmark_52 = read_image(path), protocol.landmark_N52[index]
    try:
        return align_face(image, landmark_52, size, antialias=False), lies_outside(landmark_52, image.shape)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


class _Images:
    """The protocol's images as a sequence, aligned to ``size``."""

    def __init__(self, protocol: TemplateProtocol):
        self.protocol, self.size = protocol, 0
        self.outside: set[int] = set()  # images that were read and have a landmark outside of the picture

    def __len__(self) -> int:
        return len(self.protocol.image_N)

    def __getitem__(self, index: int) -> np.ndarray:
        image, outside = read_aligned(self.protocol, index, self.size)
        if outside:
            self.outside.add(index)
        return image

    def name(self, index: int) -> Path:
        return self.protocol.image_dir / self.protocol.image_N[index]

    def digest(self) -> str:
        """Of names and landmarks: what decides the embeddings, given the weights and the files."""
        state = hashlib.sha256("\n".join(self.protocol.image_N).encode())
        if self.protocol.landmark_N52 is not None:
            state.update(np.ascontiguousarray(self.protocol.landmark_N52).tobytes())
        return state.hexdigest()


def _key(wanted: dict) -> str:
    """What an unfinished file must agree on; changed files are seen chunk by chunk."""
    return f"{wanted['images']} {wanted['model']}"


def _is_complete(path: Path, wanted: dict, replace: bool, at_hand: bool) -> bool:
    """Whether ``path`` holds all features that are wanted; what is there of other work is an error or is removed."""
    if path.is_dir():
        raise UserError(f"{path}: a folder; --features names a file, for example {path / 'features.npy'}")
    beside = record_file(path)
    try:
        if not path.is_file():
            unfinished = partial_key(path)
            if unfinished not in (None, _key(wanted)) and wanted["model"] is not None:
                remedy = "name another --features file or delete it"
                raise UserError(f"{partial_files(path)[0]}: unfinished, of other images or weights; {remedy}")
            return False
        record = _read_record(path)
        if record is not None:
            _check_record(path, record, wanted, at_hand)
            state = "same images and weights" if at_hand else "same names and weights; the image files are not at hand"
        elif replace:
            raise UserError(f"{path}: no {beside.name} beside it that says what it was made from")
        else:
            state = f"on trust: no {beside.name} beside it says what it was made from"
        print(f"features of {wanted['num_images']} images reused from {path} ({state})", file=sys.stderr, flush=True)
    except UserError as error:
        if not replace:
            raise
        print(f"made anew: {error}", file=sys.stderr, flush=True)
        for old in (path, beside, *partial_files(path)):
            old.unlink(missing_ok=True)
        return False
    return True


def record_file(path: Path) -> Path:
    """What stands beside a file of features: which images, files and weights."""
    return path.with_name(f"{path.name}.json")


def _read_record(path: Path) -> dict | None:
    path = record_file(path)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not {"images", "num_images", "model"} <= set(record):
            raise ValueError("keys are missing")
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a record of features ({error}); delete it and the features beside it") from None
    return record


def _check_record(path: Path, record: dict, wanted: dict, at_hand: bool) -> None:
    other = "name another --features file"
    if (record["images"], record["num_images"]) != (wanted["images"], wanted["num_images"]):
        found = f"features of {record['num_images']} other images (here: {wanted['num_images']}; names or marks differ)"
        raise UserError(f"{path}: {found}; {other}")
    if wanted["model"] not in (None, record["model"]):
        raise UserError(f"{path}: made by other weights or in another precision; {other} or delete this one")
    if at_hand and record.get("files") != wanted["files"]:
        found = "sizes or times of the image files are not those it was made from"
        remedy = f"delete it to embed them again, or delete {path.name}.json alone to take it on trust"
        raise UserError(f"{path}: {found}; {remedy}")


def _open(path: Path, num_images: int) -> np.ndarray:
    try:
        feature_N2D = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a .npy file of features ({error}); delete it to make it again") from None
    if feature_N2D.ndim != 3 or feature_N2D.shape[:2] != (num_images, 2) or feature_N2D.dtype.kind != "f":
        raise UserError(f"{path}: {feature_N2D.dtype} {feature_N2D.shape}; float [{num_images}, 2, size] is needed")
    return feature_N2D

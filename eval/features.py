"""Embeddings of a template protocol: read, align, embed, keep on disk, go on after an interruption.

Legend: N images, D embedding size. Stored as float32 [N, 2, D]: the raw embedding and that of the mirror image, in the
order of the image list. Beside ``F.npy`` stands ``F.npy.json`` (which images, which weights); until it is complete the
file is called ``F.npy.part``.
"""

import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from eval.embed import RUN_FILES, Embedder
from eval.progress import progress
from eval.protocols import TemplateProtocol, read_image
from eval.report import write_json
from utils.align import align_face
from utils.errors import UserError

_SAVE_SECONDS = 10.0
_BATCHES_AHEAD = 3


def weights_digest(model: str, which: str = "last") -> str:
    """SHA-256 of the weights a model name stands for; so that a cache is never used for another network."""
    path = Path(model)
    path = path / RUN_FILES[which] if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def protocol_features(
    protocol: TemplateProtocol,
    load: Callable[[], Embedder] | None,
    model: str | None,
    path: Path | None = None,
    batch_size: int = 64,
    num_threads: int | None = None,
    replace: bool = False,
) -> np.ndarray:
    """Features of every image of the protocol, [N, 2, D] float32, from ``path`` as far as they are there.

    Args:
        protocol: images, landmarks.
        load: makes the embedder; called only if something is left to embed. None: everything must be in ``path``.
        model: digest of the weights; None accepts those the file was made with.
        path: the cache; None keeps the features in memory.
        num_threads: threads that read and align; None: one a core.
        replace: a cache of other images or weights is made anew (said on stderr) instead of being an error.

    Raises:
        UserError: the cache is of other images or weights, an image cannot be read, an embedding is not finite.
    """
    if path is None:
        embedder = load()
        feature_N2D = np.empty((len(protocol.image_N), 2, embedder.embedding_size), np.float32)
        for _ in _fill(feature_N2D, 0, protocol, embedder, batch_size, num_threads):
            pass
        return feature_N2D
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder; --features names a file, for example {path / 'features.npy'}")
    record_path, part = Path(f"{path}.json"), Path(f"{path}.part")
    wanted = {"images": _images_digest(protocol), "num_images": len(protocol.image_N), "model": model}
    record = _read_record(record_path)
    if record is not None and (path.is_file() or part.is_file()):
        try:
            _check_record(path, record, wanted)
        except UserError as error:
            if not replace:
                raise
            print(f"made anew: {error}", file=sys.stderr)
            record = None
            for old in (path, part):
                old.unlink(missing_ok=True)
    if path.is_file():
        return _open_complete(path, len(protocol.image_N))
    if load is None:
        raise UserError(f"{path}: no complete features there; give --model to make them")
    embedder = load()
    shape = (len(protocol.image_N), 2, embedder.embedding_size)
    done = record["done"] if record is not None and part.is_file() else 0
    path.parent.mkdir(parents=True, exist_ok=True)
    feature_N2D = _open_partial(part, shape, resume=done > 0)
    saved = time.monotonic()
    try:
        for finished in _fill(feature_N2D, done, protocol, embedder, batch_size, num_threads):
            done = finished
            if time.monotonic() - saved > _SAVE_SECONDS:
                _save(feature_N2D, record_path, wanted, done)
                saved = time.monotonic()
    finally:
        _save(feature_N2D, record_path, wanted, done)
    del feature_N2D
    part.replace(path)
    return _open_complete(path, len(protocol.image_N))


def aligned_image(protocol: TemplateProtocol, index: int, size: int) -> np.ndarray:
    """Image ``index`` as the network sees it: RGB uint8 [size, size, 3]."""
    path = protocol.image_dir / protocol.image_N[index]
    if protocol.landmark_N52 is None:
        return read_image(path, size)
    try:
        return align_face(read_image(path), protocol.landmark_N52[index], size)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _fill(feature_N2D, done, protocol, embedder, batch_size, num_threads) -> Iterator[int]:
    """Embed images ``done`` and on into their rows; yields how many are done after each batch."""
    num_images, size = len(protocol.image_N), embedder.input_size
    starts = deque(range(done, num_images, batch_size))
    waiting: deque = deque()
    with (
        ThreadPoolExecutor(num_threads or os.cpu_count()) as threads,
        progress("embed", num_images, done) as advance,
    ):
        while starts or waiting:
            while starts and len(waiting) < _BATCHES_AHEAD:
                start = starts.popleft()
                indices = range(start, min(start + batch_size, num_images))
                waiting.append((start, [threads.submit(aligned_image, protocol, index, size) for index in indices]))
            start, images = waiting.popleft()
            try:
                batch = np.stack([image.result() for image in images])
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
            rows = feature_N2D[start : start + len(batch)]
            rows[:, 0], rows[:, 1] = embedder(batch), embedder(batch, flip=True)
            finite = np.isfinite(rows).all((1, 2))
            if not finite.all():
                bad = protocol.image_N[start + int(np.flatnonzero(~finite)[0])]
                raise UserError(f"{protocol.image_dir / bad}: its embedding holds NaN or infinity; check the weights")
            advance(len(batch))
            yield start + len(batch)


def _images_digest(protocol: TemplateProtocol) -> str:
    """Of names and landmarks: what decides the embeddings, given the weights and the files."""
    digest = hashlib.sha256("\n".join(protocol.image_N).encode())
    if protocol.landmark_N52 is not None:
        digest.update(np.ascontiguousarray(protocol.landmark_N52).tobytes())
    return digest.hexdigest()


def _digest(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _save(feature_N2D, record_path: Path, wanted: dict, done: int) -> None:
    feature_N2D.flush()
    write_json(record_path, {**wanted, "done": done})


def _read_record(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        if not {"images", "num_images", "model", "done"} <= set(record) or not isinstance(record["done"], int):
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


def _open_partial(part: Path, shape: tuple[int, int, int], resume: bool) -> np.memmap:
    if not resume:
        return np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
    try:
        feature_N2D = np.lib.format.open_memmap(part, mode="r+")
    except (ValueError, EOFError) as error:
        raise UserError(f"{part}: cannot be resumed ({error}); delete it to start again") from None
    if feature_N2D.shape != shape or feature_N2D.dtype != np.float32:
        raise UserError(f"{part}: {feature_N2D.dtype} {feature_N2D.shape}, not {shape}; delete it to start again")
    return feature_N2D


def _open_complete(path: Path, num_images: int) -> np.ndarray:
    try:
        feature_N2D = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a .npy file of features ({error}); delete it to make it again") from None
    if feature_N2D.ndim != 3 or feature_N2D.shape[:2] != (num_images, 2) or feature_N2D.dtype.kind != "f":
        raise UserError(f"{path}: {feature_N2D.dtype} {feature_N2D.shape}; float [{num_images}, 2, size] is needed")
    return feature_N2D

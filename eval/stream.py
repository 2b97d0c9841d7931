"""Embed any number of images into a ``.npy`` file: flat memory, over all ranks, with progress, resumable.

Images are cut into chunks, which the ranks take in turn. A chunk's rows are written at their place in a partial file,
then its byte in a list of finished chunks is set; an interrupted run (at any world size) goes on with what is left.

Legend: N images, D embedding size, W ranks.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from eval.embed import Embedder
from utils import distributed
from utils.errors import UserError
from utils.progress import progress_bar


def _both(embedder: Embedder, image_NHWC: np.ndarray) -> np.ndarray:
    return np.stack([embedder(image_NHWC), embedder(image_NHWC, flip=True)], axis=1)


FLIPS = {
    "none": lambda embedder, image_NHWC: embedder(image_NHWC),
    "add": lambda embedder, image_NHWC: embedder(image_NHWC) + embedder(image_NHWC, flip=True),
    "both": _both,
}


def embed_to_file(
    embedder: Embedder,
    images: Sequence[np.ndarray],
    output: str | Path,
    *,
    flip: str = "none",
    key: str = "",
    chunk: int = 512,
    num_threads: int = 4,
    show_progress: bool = True,
    name_of: Callable[[int], object] = "image {}".format,
) -> np.ndarray:
    """Embed ``images`` into ``output``; every rank enters. The ranks must see the same folder.

    Args:
        images: ``len`` and ``[i]`` -> uint8 RGB [H, W, 3] of the embedder's input size; called from several threads,
            one chunk ahead of the network.
        output: ``.npy`` file, float32 [N, D], raw embeddings. It appears when all is done.
        flip: ``none``; ``add``: embedding plus that of the mirror image; ``both``: the two apart, [N, 2, D].
        key: what the images are (a digest of their paths, say); a partial file of another key is not resumed.
        chunk: images loaded at once.
        num_threads: threads that load images.
        show_progress: a line with rate and time left, on rank 0's stderr.
        name_of: what to call image i in an error.

    Returns:
        The file's rows, memory-mapped, read-only.

    Raises:
        UserError: on every rank, if one of them fails (an embedding that is not finite included); chunks that are
            finished are kept for the next run.
    """
    if flip not in FLIPS:
        raise ValueError(f"flip {flip!r}: choose {', '.join(FLIPS)}")
    output = Path(output)
    row = (2, embedder.embedding_size) if flip == "both" else (embedder.embedding_size,)
    work = _Partial(output, len(images), row, chunk, [flip, key, embedder.identity])
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    _together(work.prepare if rank == 0 else None)
    # One list for all: a rank that looks later would see chunks that others have finished meanwhile.
    num_done, todo = distributed.broadcast_object((work.num_finished(), work.unfinished()) if rank == 0 else None)
    todo = todo[rank::world_size]
    failure = None
    try:
        with (
            ThreadPoolExecutor(num_threads) as pool,
            progress_bar("embed", work.num_images, num_done, show_progress and rank == 0) as advance,
        ):
            coming = _load(pool, images, work.rows(todo[0])) if todo else None
            for position, index in enumerate(todo):
                batch = [future.result() for future in coming]
                coming = _load(pool, images, work.rows(todo[position + 1])) if position + 1 < len(todo) else None
                embedding = FLIPS[flip](embedder, np.stack(batch))
                finite = np.isfinite(embedding.reshape(len(batch), -1)).all(1)
                if not finite.all():
                    bad = name_of(work.rows(index)[int(np.argmin(finite))])
                    raise UserError(f"{bad}: its embedding holds NaN or infinity; check the weights")
                work.write(index, embedding)
                advance(len(batch) * world_size)
    except Exception as error:  # whatever it is, the other ranks wait for this one
        failure = error
    try:
        distributed.raise_together(failure)
    except Exception:
        if rank == 0 and work.num_finished() == 0:
            work.discard()  # nothing to resume
        raise
    _together(work.finish if rank == 0 else None)
    return np.load(output, mmap_mode="r")


def _together(step) -> None:
    """Run ``step`` where it is one; all ranks go on, or all fail."""
    failure = None
    try:
        if step is not None:
            step()
    except (OSError, ValueError) as error:
        failure = error
    distributed.raise_together(failure)


def _load(pool: ThreadPoolExecutor, images: Sequence[np.ndarray], rows: range) -> list:
    return [pool.submit(images.__getitem__, row) for row in rows]


class _Partial:
    """``<output>.part`` (the growing .npy file) and ``<output>.done`` (a JSON line, then a byte a chunk)."""

    def __init__(self, output: Path, num_images: int, row: tuple[int, ...], chunk: int, identity: list[str]):
        self.output = output
        self.part, self.done = (output.with_name(output.name + suffix) for suffix in (".part", ".done"))
        self.num_images, self.row, self.chunk = num_images, row, chunk
        self.row_bytes = 4 * math.prod(row)
        self.num_chunks = math.ceil(num_images / chunk)
        content = {"images": num_images, "row": row, "chunk": chunk, "identity": identity}
        self.head = json.dumps(content).encode() + b"\n"

    def prepare(self) -> None:
        """Keep what an earlier run of the same work left, or start anew."""
        if self.part.is_file() and self.done.is_file() and self.done.read_bytes()[: len(self.head)] == self.head:
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.done.unlink(missing_ok=True)
        with open(self.part, "wb") as file:
            head = {"descr": "<f4", "fortran_order": False, "shape": (self.num_images, *self.row)}
            np.lib.format.write_array_header_1_0(file, head)
            file.truncate(file.tell() + self.num_images * self.row_bytes)
        self.done.write_bytes(self.head + bytes(self.num_chunks))

    def rows(self, index: int) -> range:
        """Images of a chunk."""
        return range(index * self.chunk, min((index + 1) * self.chunk, self.num_images))

    def unfinished(self) -> list[int]:
        """Chunks still to do."""
        flags = self.done.read_bytes()[len(self.head) :]
        if len(flags) != self.num_chunks:
            raise UserError(f"{self.done}: damaged; delete it to start anew")
        return [index for index, flag in enumerate(flags) if not flag]

    def num_finished(self) -> int:
        """Images done by an earlier run."""
        return self.num_images - sum(len(self.rows(index)) for index in self.unfinished())

    def write(self, index: int, embedding: np.ndarray) -> None:
        """Put a chunk's rows in place, on disk before its byte is set."""
        with open(self.part, "r+b") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            file.seek(file.tell() + index * self.chunk * self.row_bytes)
            file.write(embedding.astype("<f4").tobytes())
            file.flush()
            os.fsync(file.fileno())
        with open(self.done, "r+b") as file:
            file.seek(len(self.head) + index)
            file.write(b"\1")

    def discard(self) -> None:
        """Leave nothing behind."""
        self.part.unlink(missing_ok=True)
        self.done.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the whole file its name."""
        if self.unfinished():
            raise UserError(f"{self.part}: {len(self.unfinished())} chunks are missing; run again to finish them")
        self.part.replace(self.output)
        self.done.unlink()


def digest(parts: Sequence[object]) -> str:
    """A short digest of anything with a stable text, for ``key``."""
    state = hashlib.blake2b(digest_size=12)
    for part in parts:
        state.update(str(part).encode() + b"\0")
    return state.hexdigest()

"""Embed any number of images into a ``.npy`` file: flat memory, over all ranks, with progress, resumable.

Images are cut into chunks, which the ranks take in turn. A chunk's rows are written at their place in a partial file,
then its mark in a list of finished chunks is set; an interrupted run (at any world size) goes on with what is left. The
mark is a digest of the chunk's images, so that images which changed meanwhile are embedded again, and only those.

Legend: N images, D embedding size, W ranks.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from eval.embed import CHECKED_IMAGES, Embedder, start
from utils import distributed
from utils.errors import UserError
from utils.files import check_replaceable, full_disk_named, write_json
from utils.owner import claim
from utils.progress import progress_bar

VIEWS = {"none": "plain", "add": "both", "both": "both"}  # of the embedder, by kind of flip


@contextmanager
def claimed(folder: str | Path, remedy: str, name: str = "owner") -> Iterator[None]:
    """The folder is this program's until the block ends (``utils.owner.claim``); rank 0 claims it, all ranks enter.

    Raises:
        UserError: on every rank, if a living process has it; the message names that one.
    """
    owner = None
    with distributed.together():
        if distributed.get_rank() == 0:
            owner = claim(folder, remedy, name)
    try:
        yield
    finally:
        if owner is not None:
            owner.release()


def embed_to_file(
    embedder: Embedder,
    images: Sequence[np.ndarray],
    output: str | Path,
    *,
    flip: str = "none",
    key: str = "",
    stamps: Sequence[object] | None = None,
    flagged: Callable[[int], bool] | None = None,
    record: dict | None = None,
    chunk: int = 512,
    num_threads: int = 4,
    show_progress: bool = True,
    name_of: Callable[[int], object] = "image {}".format,
) -> np.ndarray:
    """Embed ``images`` into ``output``; every rank enters. The ranks must see the same folder.

    Args:
        embedder: an ``Embedder``, or what is called like one and has its ``embedding_size`` and ``identity``.
        images: ``len`` and ``[i]`` -> uint8 RGB [H, W, 3] of the embedder's input size; called from several threads,
            one chunk ahead of what the network has been given. Two chunks are with the network at most.
        output: ``.npy`` file, float32 [N, D], raw embeddings. It appears when all is done. One process at a time.
        flip: ``none``; ``add``: embedding plus that of the mirror image; ``both``: the two apart, [N, 2, D].
        key: what the images are (a digest of their paths, say); a partial file of another key is not resumed.
        stamps: something for each image that changes when its file does (size and time), on rank 0 at least.
        flagged: asked for each image once it is read; how many said yes is kept with the chunk.
        record: content of ``<output>.json``, which is written when all is done, with the number of flagged images.
        chunk: images loaded at once.
        num_threads: threads that load images.
        show_progress: a line with rate and time left, on rank 0's stderr.
        name_of: what to call image i in an error.

    Returns:
        The file's rows, memory-mapped, read-only.

    Raises:
        UserError: on every rank, if one of them fails (an embedding that is not finite included), or if another process
            embeds into the same file; chunks that are finished are kept for the next run.
    """
    if flip not in VIEWS:
        raise ValueError(f"flip {flip!r}: choose {', '.join(VIEWS)}")
    output = Path(output)
    if isinstance(embedder, Embedder) and embedder.undecided:
        _settle(embedder, images, num_threads)
    row = (2, embedder.embedding_size) if flip == "both" else (embedder.embedding_size,)
    work = _Partial(output, len(images), row, chunk, [flip, key, embedder.identity])
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    with claimed(output.parent, "name another file", f"{output.name}.owner"):
        plan = None
        with distributed.together():
            if rank == 0:
                work.prepare()
                work.mark_images(stamps)
                plan = (work.num_finished(), work.unfinished(), work.marks)
        # One plan for all: a rank that looks later would see chunks that others have finished meanwhile.
        num_done, todo, work.marks = distributed.broadcast_object(plan)
        if num_done and rank == 0:
            print(f"{output}: goes on after {num_done} of {len(images)} images of an earlier run", file=sys.stderr)
        todo = todo[rank::world_size]

        try:
            with (
                distributed.together(),
                ThreadPoolExecutor(num_threads) as pool,
                progress_bar("embed", work.num_images, num_done, show_progress and rank == 0) as advance,
            ):

                def finish(index: int, pending) -> None:
                    embedding = pending.result()
                    embedding = embedding.sum(1) if flip == "add" else embedding
                    finite = np.isfinite(embedding.reshape(len(embedding), -1)).all(1)
                    if not finite.all():
                        bad = name_of(work.rows(index)[int(np.argmin(finite))])
                        raise UserError(f"{bad}: its embedding holds NaN or infinity; check the weights")
                    num_flagged = sum(map(flagged, work.rows(index))) if flagged is not None else 0
                    work.write(index, embedding, num_flagged)
                    advance(len(embedding) * world_size)

                coming = _load(pool, images, work.rows(todo[0])) if todo else None
                begun = None  # the chunk before: the network goes from one to the next without a gap
                try:
                    for position, index in enumerate(todo):
                        batch = [future.result() for future in coming]
                        more = position + 1 < len(todo)
                        coming = _load(pool, images, work.rows(todo[position + 1])) if more else None
                        before, begun = begun, (index, start(embedder, np.stack(batch), VIEWS[flip]))
                        if before is not None:
                            finish(*before)
                finally:
                    if begun is not None:  # an image that cannot be read does not undo the chunk before it
                        finish(*begun)
        except Exception:
            if rank == 0 and not work.has_any():
                work.discard()  # nothing to resume
            raise
        with distributed.together():
            if rank == 0:
                work.finish(record)
    return np.load(output, mmap_mode="r")


def _settle(embedder: Embedder, images: Sequence[np.ndarray], num_threads: int) -> None:
    """Decide on bfloat16 by the first images, the same ones on every rank, so that all ranks agree."""
    some = []
    with distributed.together(), ThreadPoolExecutor(num_threads) as pool:
        some = [future.result() for future in _load(pool, images, range(min(CHECKED_IMAGES, len(images))))]
    if some:
        embedder.settle(np.stack(some), lambda fails: distributed.agree(fails)[0])


def _load(pool: ThreadPoolExecutor, images: Sequence[np.ndarray], rows: range) -> list:
    return [pool.submit(images.__getitem__, row) for row in rows]


class _Partial:
    """``<output>.part`` (the growing .npy file) and ``<output>.done``: a JSON line, then an entry a chunk.

    An entry is zero until the chunk is finished, then the digest of its images and how many of them were flagged.
    """

    ENTRY = np.dtype([("mark", "V8"), ("flagged", "<u4")])

    def __init__(self, output: Path, num_images: int, row: tuple[int, ...], chunk: int, identity: list[str]):
        check_replaceable(output)
        self.output = output
        self.part, self.done = partial_files(output)
        self.num_images, self.row, self.chunk = num_images, row, chunk
        self.row_bytes = 4 * math.prod(row)
        self.num_chunks = math.ceil(num_images / chunk)
        content = {"images": num_images, "row": row, "chunk": chunk, "identity": identity}
        self.head = json.dumps(content).encode() + b"\n"
        self.marks: list[bytes] = []

    def prepare(self) -> None:
        """Keep what an earlier run of the same work left, or start anew."""
        if self.part.is_file() and self.done.is_file() and self.done.read_bytes()[: len(self.head)] == self.head:
            return
        self.done.unlink(missing_ok=True)
        with open(self.part, "wb") as file:
            head = {"descr": "<f4", "fortran_order": False, "shape": (self.num_images, *self.row)}
            np.lib.format.write_array_header_1_0(file, head)
            file.truncate(file.tell() + self.num_images * self.row_bytes)
        self.done.write_bytes(self.head + bytes(self.num_chunks * self.ENTRY.itemsize))

    def mark_images(self, stamps: Sequence[object] | None) -> None:
        """Work out each chunk's mark, 8 bytes that are never all zero."""
        for index in range(self.num_chunks):
            parts = [] if stamps is None else [stamps[row] for row in self.rows(index)]
            self.marks.append(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest() + b"\1")

    def rows(self, index: int) -> range:
        """Images of a chunk."""
        return range(index * self.chunk, min((index + 1) * self.chunk, self.num_images))

    def _entries(self) -> np.ndarray:
        data = self.done.read_bytes()[len(self.head) :]
        if len(data) != self.num_chunks * self.ENTRY.itemsize:
            raise UserError(f"{self.done}: damaged; delete it to start anew")
        return np.frombuffer(data, self.ENTRY)

    def unfinished(self) -> list[int]:
        """Chunks still to do, those whose images have changed among them."""
        found = self._entries()["mark"].tolist()
        return [index for index, mark in enumerate(self.marks) if found[index] != mark]

    def num_finished(self) -> int:
        """Images done by an earlier run."""
        return self.num_images - sum(len(self.rows(index)) for index in self.unfinished())

    def has_any(self) -> bool:
        """Whether any chunk is there, of whichever images."""
        return any(any(bytes(mark)) for mark in self._entries()["mark"].tolist())

    def write(self, index: int, embedding: np.ndarray, num_flagged: int) -> None:
        """Put a chunk's rows in place, on disk before its entry is set."""
        with full_disk_named(self.output), open(self.part, "r+b") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            file.seek(file.tell() + index * self.chunk * self.row_bytes)
            file.write(embedding.astype("<f4").tobytes())
            file.flush()
            os.fsync(file.fileno())
        with open(self.done, "r+b") as file:
            file.seek(len(self.head) + index * self.ENTRY.itemsize)
            file.write(np.array((self.marks[index], num_flagged), self.ENTRY).tobytes())

    def discard(self) -> None:
        """Leave nothing behind."""
        self.part.unlink(missing_ok=True)
        self.done.unlink(missing_ok=True)

    def finish(self, record: dict | None) -> None:
        """Give the whole file its name, and its record beside it."""
        if self.unfinished():
            raise UserError(f"{self.part}: {len(self.unfinished())} chunks are missing; run again to finish them")
        if record is not None:
            write_json(f"{self.output}.json", {**record, "flagged": int(self._entries()["flagged"].sum())})
        self.part.replace(self.output)
        self.done.unlink()


def partial_files(output: Path) -> tuple[Path, Path]:
    """Where an unfinished ``embed_to_file`` leaves its rows and the list of what is done."""
    return output.with_name(f"{output.name}.part"), output.with_name(f"{output.name}.done")


def partial_key(output: Path) -> str | None:
    """The ``key`` that an unfinished ``embed_to_file`` was given; None where there is none, or one that is cut."""
    part, done = partial_files(output)
    if not part.is_file() or not done.is_file():
        return None
    with open(done, "rb") as file:
        try:
            return json.loads(file.readline())["identity"][1]
        except (ValueError, TypeError, KeyError, IndexError):
            return None


def digest(parts: Sequence[object]) -> str:
    """A short digest of anything with a stable text, for ``key``."""
    state = hashlib.blake2b(digest_size=12)
    for part in parts:
        state.update(str(part).encode(errors="surrogateescape") + b"\0")
    return state.hexdigest()

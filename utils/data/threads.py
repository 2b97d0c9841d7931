"""Loader workers in threads: batches are cut into pieces, which the threads fetch, decode and answer for."""

import contextlib
import itertools
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from utils.data.augment import flips

if TYPE_CHECKING:
    from utils.data.loader import LoaderOptions, SampleReader

_LARGEST_PIECE = 128  # images
_CLOSED = "the loader was closed while it was iterated"


class BufferPool:
    """Preallocated batches; one comes back by itself when the last tensor that shares it is gone."""

    def __init__(self, shape: tuple[int, ...], dtype: type, count: int) -> None:
        self._free: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(np.empty(shape, dtype))
        self._shape, self._dtype = shape, dtype

    def take(self, num_rows: int) -> np.ndarray:
        """A batch of at most the pool's rows; a new buffer if the consumer keeps all of them."""
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:
            buffer = np.empty(self._shape, self._dtype)
        view = buffer[:num_rows]
        weakref.finalize(view, self._free.put, buffer).atexit = False
        return view


class ThreadPipeline:
    """Decodes batches of B samples ahead in a pool of threads."""

    def __init__(self, reader: "SampleReader", batch_size: int, epoch: int, options: "LoaderOptions") -> None:
        self._reader, self._epoch, self._options = reader, epoch, options
        as_float = options.normalize and options.flip_on_host
        shape = (batch_size, 3, *reader.size) if as_float else (batch_size, *reader.size, 3)
        self._buffers = BufferPool(shape, np.float32 if as_float else np.uint8, options.prefetch + 2)
        # As large as keeps all threads busy: each piece costs a thread a dozen steps with cold caches.
        pieces = -(-options.num_threads // max(1, options.prefetch - 1))
        self._piece = min(_LARGEST_PIECE, -(-batch_size // pieces))
        # Threads and queues of our own: a pool's futures take the interpreter's lock from the decoders too often.
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        threads = [
            threading.Thread(target=_read_pieces, args=(reader, self._work), name=f"face-loader_{i}", daemon=True)
            for i in range(options.num_threads)
        ]
        # Drops what is not begun and waits for the threads; at the interpreter's end as well.
        self.close = weakref.finalize(self, _stop_threads, self._work, threads)
        for thread in threads:
            thread.start()

    def run(self, batches: Iterator) -> Iterator[tuple]:
        waiting: deque = deque()
        while True:
            for batch in itertools.islice(batches, self._options.prefetch - len(waiting)):
                waiting.append(self._submit(*batch))
            if not waiting:
                return
            samples, position, images, labels, mirror, done, num_pieces = waiting.popleft()
            failed = [answer for answer in (done.get() for _ in range(num_pieces)) if answer is not None]
            if failed:
                raise min(failed, key=lambda answer: answer[0])[1]
            yield samples, position, images, labels, mirror
            del images, labels

    def _submit(self, samples: np.ndarray, position: int) -> tuple:
        images, labels = self._buffers.take(len(samples)), np.empty(len(samples), np.int64)
        drawn = self._options.flip
        mirror = flips(self._reader.seed, self._epoch, samples) if drawn else np.zeros(len(samples), bool)
        here = mirror & self._options.flip_on_host
        done: queue.SimpleQueue = queue.SimpleQueue()
        starts = range(0, len(samples), self._piece)
        for start in starts:
            part = slice(start, start + self._piece)
            work = (samples[part], here[part], self._epoch, images[part], labels[part])
            self._work.put((start, work, done))
        if not self.close.alive:  # looked at after putting: nobody would answer
            raise RuntimeError(_CLOSED)
        return samples, position, images, labels, mirror, done, len(starts)


def _read_pieces(reader: "SampleReader", work: queue.SimpleQueue) -> None:
    """A thread: read pieces until told to stop; the answer is None, or (first row, error)."""
    while (piece := work.get()) is not None:
        start, arguments, done = piece
        try:
            reader.read(*arguments)
        except BaseException as error:
            done.put((start, error))
        else:
            done.put(None)
        del piece, arguments, done  # the batch belongs to the consumer now


def _stop_threads(work: queue.SimpleQueue, threads: list[threading.Thread]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            start, _, done = work.get_nowait()
            done.put((start, RuntimeError(_CLOSED)))
    for _ in threads:
        work.put(None)
    for thread in threads:
        if thread.ident is not None:  # it was started
            thread.join()

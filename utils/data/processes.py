"""Loader workers in processes of their own, for a main thread that is busy in Python. POSIX only.

Workers are fresh interpreters (no fork of a process with running threads, no import of the caller's script). A batch
travels through memory under ``/dev/shm`` that has no name, so that nothing is left behind whatever happens; it is
reserved before use, because touching a page that cannot be had kills a process without a word.
"""

import mmap
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import numpy as np

from utils.errors import UserError

SHM_FOLDER = "/dev/shm"
ROOT = Path(__file__).resolve().parent.parent.parent


class WorkerError(RuntimeError):
    """What happened in a worker process, as text: the cause of the error that the main process raises."""


def check_shared_memory(num_bytes: int, folder: str = SHM_FOLDER) -> None:
    """Fail now, not in the middle of an epoch.

    Raises:
        UserError: no such folder, or less free space in it than ``num_bytes``.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no shared memory on this system; use data.mode=thread")
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    if free < num_bytes:
        raise UserError(
            f"{folder}: {num_bytes / 2**20:.0f} MiB needed for prefetched batches, {free / 2**20:.0f} MiB free; "
            "start the container with a larger --shm-size, lower prefetch or batch size, or use data.mode=thread"
        )


class SharedBatches:
    """Slots of B images each in unnamed shared memory; a slot comes back when the last array on it is gone."""

    def __init__(self, shape: tuple[int, ...], count: int, folder: str = SHM_FOLDER) -> None:
        self.shape, self.stride = shape, int(np.prod(shape))
        size = max(1, self.stride * count)
        check_shared_memory(size, folder)
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as this object
        try:
            os.posix_fallocate(self.file.fileno(), 0, size)
        except OSError as error:
            self.file.close()
            raise UserError(f"{folder}: {size / 2**20:.0f} MiB cannot be reserved: {error.strerror}") from error
        self.memory = mmap.mmap(self.file.fileno(), size)
        self._free: queue.SimpleQueue = queue.SimpleQueue()
        for slot in range(count):
            self._free.put(slot)

    def take(self) -> int | None:
        """A free slot, or None."""
        try:
            return self._free.get_nowait()
        except queue.Empty:
            return None

    def give(self, slot: int) -> None:
        self._free.put(slot)

    def array(self, slot: int, num_rows: int) -> np.ndarray:
        """The slot's first rows; the slot is free again when the array, and what shares it, is gone."""
        shape = (num_rows, *self.shape[1:])
        flat = np.frombuffer(self.memory, np.uint8, int(np.prod(shape)), slot * self.stride)
        images = flat.reshape(shape)
        weakref.finalize(flat, self._free.put, slot).atexit = False
        return images


class ProcessPipeline:
    """Same arguments and results as ``ThreadPipeline``."""

    def __init__(self, reader: object, batch_size: int, epoch: int, options: dict) -> None:
        if os.name != "posix":
            raise UserError("data.mode: 'process' needs a POSIX system; use data.mode=thread")
        self._reader, self._epoch, self._options = reader, epoch, options
        self._workers: list[tuple[subprocess.Popen, Connection]] = []
        self._lock = threading.Lock()
        self._batches = SharedBatches((batch_size, *reader.size, 3), options["prefetch"] + 2)
        try:
            payload = pickle.dumps(reader)
        except Exception as error:
            raise UserError(f"data.mode=process: the source cannot be sent to a worker: {error}") from error
        try:
            for _ in range(options["num_threads"]):
                self._workers.append(_start_worker(payload, self._batches))
        except BaseException:
            self.close()
            raise

    def run(self, batches: Iterator) -> Iterator[tuple]:
        from utils.data.augment import flips

        batches, waiting, done = iter(batches), deque(), False
        while True:
            while not done and len(waiting) < self._options["prefetch"]:
                slot = self._batches.take()
                if slot is None:
                    if waiting:
                        break
                    raise UserError("data.mode=process: all batches are held by the caller; copy what is to be kept")
                following = next(batches, None)
                if following is None:
                    self._batches.give(slot)
                    done = True
                    break
                samples, position = following
                flip = self._options["flip"]
                mirror = flips(self._reader.seed, self._epoch, samples) if flip else np.zeros(len(samples), bool)
                here = mirror & self._options["flip_on_host"]
                parts = np.array_split(np.arange(len(samples)), len(self._workers))
                for part, (_, connection) in zip(parts, self._workers, strict=True):
                    start, stop = (int(part[0]), int(part[-1]) + 1) if len(part) else (0, 0)
                    rows = slice(start, stop)
                    self._send(connection, (slot, start, samples[rows], here[rows], self._epoch))
                waiting.append((samples, position, slot, mirror))
            if not waiting:
                return
            samples, position, slot, mirror = waiting.popleft()
            labels = np.concatenate([self._receive(worker) for worker in self._workers])
            images = self._batches.array(slot, len(samples))
            yield samples, position, images, labels, mirror
            del images

    def _send(self, connection: Connection, work: tuple) -> None:
        try:
            connection.send(work)
        except OSError as error:
            raise RuntimeError("a loader process has ended before its time") from error

    def _receive(self, worker: tuple[subprocess.Popen, Connection]) -> np.ndarray:
        process, connection = worker
        try:
            answer = connection.recv()
        except (EOFError, OSError) as error:
            status = process.wait()
            raise RuntimeError(f"loader process {process.pid} ended with status {status}; out of memory?") from error
        if isinstance(answer, np.ndarray):
            return answer
        error, text = answer
        raise error from WorkerError(f"\n{text}")

    def close(self) -> None:
        """Close the pipes, which ends the workers, and wait for them."""
        with self._lock:
            workers, self._workers = self._workers, []
        for _, connection in workers:
            connection.close()
        for process, _ in workers:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start_worker(payload: bytes, batches: SharedBatches) -> tuple[subprocess.Popen, Connection]:
    ours, theirs = Pipe()
    handles = (theirs.fileno(), batches.file.fileno())
    command = [
        sys.executable,
        "-c",
        "from utils.data.processes import main; main()",
        *map(str, handles),
        str(Path.cwd()),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    process = subprocess.Popen(command, pass_fds=handles, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL)
    theirs.close()
    try:
        ours.send((batches.shape, batches.stride))
        ours.send_bytes(payload)
    except OSError as error:
        raise RuntimeError(f"a loader process did not start (status {process.wait()})") from error
    return process, ours


def main() -> None:
    """A worker: read the parts of batches it is told to, until the pipe closes."""
    connection, memory_handle = Connection(int(sys.argv[1])), int(sys.argv[2])
    os.chdir(sys.argv[3])
    try:
        shape, stride = connection.recv()
        memory = mmap.mmap(memory_handle, 0)
        payload = connection.recv_bytes()
        try:
            reader = pickle.loads(payload)
        except Exception as error:
            connection.send(_portable(UserError(f"data.mode=process: the source does not load in a worker: {error}")))
            return
        while True:
            slot, start, samples, mirror, epoch = connection.recv()
            rows = (len(samples), *shape[1:])
            offset = slot * stride + start * stride // shape[0]
            images = np.frombuffer(memory, np.uint8, int(np.prod(rows)), offset).reshape(rows)
            labels = np.empty(len(samples), np.int64)
            try:
                reader.read(samples, mirror, epoch, images, labels)
            except Exception as error:
                connection.send(_portable(error))
            else:
                connection.send(labels)
    except (EOFError, KeyboardInterrupt, BrokenPipeError, ConnectionResetError):
        return


def _portable(error: Exception) -> tuple[Exception, str]:
    """(the error, or one like it that can be sent; its traceback as text)."""
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}"), text
    return error, text

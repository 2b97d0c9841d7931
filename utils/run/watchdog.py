"""A rank that died or hangs ends the others in bounded time, with the cause, instead of a collective without end.

Each rank's thread writes ``<run>/heartbeat/rank_0001.json`` (a counter, the update, the phase) and reads the others'.
The main thread may be stuck inside a collective; the watchdog then ends the process itself (``os._exit``, status 76).

    a peer's process is gone (same machine: its pid; elsewhere: its file stands still)  -> end, naming it
    this rank or a peer has not finished an update for ``hang_timeout`` seconds         -> stacks to stderr, end
    the launcher that started this rank is gone                                         -> end

A slow first step (compiling, opening data) counts too: choose the timeout above the longest verification.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from utils import distributed
from utils.files import written_whole
from utils.owner import is_running, release_all

EXIT_STATUS = 76
BEAT = 1.0  # seconds between two heartbeats
STALE = 120.0  # seconds without a heartbeat after which a rank of another machine counts as dead (file caches are slow)


class Watchdog:
    """Started once a run; ``enter(phase)`` and ``done(step)`` are called by the main thread and cost nothing.

    Args:
        run_dir: shared by all ranks.
        hang_timeout: seconds without a finished update; 0 switches the hang check off (deaths are still seen).
        on_end: called with the message before the process ends (to log it).
    """

    def __init__(self, run_dir: str | Path, hang_timeout: float, on_end: Callable[[str], None]):
        self.folder, self.hang_timeout, self.on_end = Path(run_dir) / "heartbeat", hang_timeout, on_end
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self._phase, self._step, self._moved = "start", 0, time.monotonic()
        self._finished = threading.Event()
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> (counter, when it last changed)
        self._parent = os.getppid() if "PADDLE_TRAINER_ID" in os.environ else None
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to beat and to look. All ranks call it: files of an earlier run must be replaced before one is read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._beat(0)
        distributed.barrier()
        self._moved = time.monotonic()
        self._thread.start()

    def enter(self, phase: str) -> None:
        """The main thread is now in this phase (data, forward, backward, update, verify, save)."""
        self._phase = phase

    def done(self, step: int) -> None:
        """An update (or a verification, or a save) was finished."""
        self._step, self._moved = step, time.monotonic()

    def stop(self) -> None:
        """Clean end: the other ranks will not miss this one."""
        if self._thread.is_alive():
            self._finished.set()
            self._thread.join()
        self._phase = "finished"
        if self.folder.is_dir():
            self._beat(-1)

    def _run(self) -> None:
        counter = 1
        while not self._finished.wait(BEAT):
            try:
                self._beat(counter)
                problem = self._problem()
            except OSError:  # a full disk or a slow file system is no death; the next beat tries again
                continue
            counter += 1
            if problem:
                self._end(problem)

    def _beat(self, counter: int) -> None:
        value = {
            "counter": counter,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "step": self._step,
            "phase": self._phase,
            "still_s": round(time.monotonic() - self._moved, 1),
        }
        with written_whole(self.folder / f"rank_{self.rank:04d}.json") as aside:
            aside.write_text(json.dumps(value))

    def _problem(self) -> str | None:
        if self._parent is not None and os.getppid() != self._parent:
            return "the launcher that started this rank is gone"
        peers = {rank: self._read(rank) for rank in range(self.world_size) if rank != self.rank}
        for rank, peer in peers.items():
            if peer is None or peer["phase"] == "finished":
                continue
            where = f"rank {rank} (pid {peer['pid']} on {peer['host']})"
            last = f"its last sign was at update {peer['step']}, phase {peer['phase']!r}"
            counter, since = self._seen.get(rank, (None, 0.0))
            now = time.monotonic()
            if counter != peer["counter"]:
                self._seen[rank] = (peer["counter"], now)
            elif now - since > STALE:
                return f"{where} has given no sign for {now - since:.0f} s; {last}"
            if peer["host"] == socket.gethostname() and is_running(peer["pid"]) is False:
                return f"{where} has died; {last}"
        still = time.monotonic() - self._moved
        if self.hang_timeout and still > self.hang_timeout:
            # The others wait in a collective for the one that is behind.
            states = {**peers, self.rank: {"step": self._step, "phase": self._phase}}
            known = ((rank, state) for rank, state in sorted(states.items()) if state)
            told = ", ".join(f"rank {rank} in {state['phase']!r} at update {state['step']}" for rank, state in known)
            return f"no update was finished for {still:.0f} s (run.hang_timeout={self.hang_timeout:g}): {told}"
        return None

    def _read(self, rank: int) -> dict | None:
        try:
            return json.loads((self.folder / f"rank_{rank:04d}.json").read_text())
        except (OSError, ValueError):
            return None

    def _end(self, problem: str) -> None:
        message = f"rank {self.rank} ends at update {self._step}: {problem}; restart with --resume"
        print("error: " + message, file=sys.stderr, flush=True)
        if "no update was finished" in problem:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        try:
            self.on_end(message)
            release_all()
        finally:
            os._exit(EXIT_STATUS)

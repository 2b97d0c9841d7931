"""Who writes in a folder: one process at a time, told by a claim file that its owner keeps alive.

    with claim("work_dirs/r50", "set run.output to another folder"):
        ...

A claim is ``<folder>/owner_<n>.json``: host, process, command, and a modification time that moves every ``BEAT``
seconds. The folder belongs to the living claim; a start that finds one ends in one line that names its owner.

It holds on shared storage (NFS), without locks of the file system and without comparing clocks:

- A claim is written aside and linked to its name, which fails where the name is taken.
- A dead owner's claim is not replaced (two starts could do so at once); the newcomer takes the next number, which one
  process gets, and then removes the dead one's.
- After that it lists the folder once more. Two that find each other both step back and try again.
- Where process numbers mean the same (one boot of one machine, one PID namespace), an owner is dead as soon as its
  process is gone or started at another time than it wrote. Elsewhere it is dead when its claim has not moved for
  ``STALE`` seconds of the observer's own clock.
"""

import atexit
import contextlib
import json
import os
import random
import re
import secrets
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.errors import UserError

BEAT = 5.0  # seconds between two signs of life
STALE = 120.0  # seconds without one after which an owner elsewhere counts as dead (file caches are slow)
LOST_STATUS = 75  # of a process that finds its folder taken over
_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_ATTEMPTS = 20

_held: set["Owner"] = set()  # of this process


@dataclass(frozen=True)
class Claim:
    """What an owner writes about itself. ``machine``: equal where process numbers mean the same, empty if not known."""

    host: str
    pid: int
    started: str  # when the process started, in the kernel's own ticks: tells a process number that is used again
    machine: str
    command: str
    since: str  # for people
    token: str


class Owner(contextlib.AbstractContextManager):
    """A folder claimed by this process, until ``release`` or its end; also a context manager. See ``claim``."""

    def __init__(self, path: Path, mine: Claim, made_folder: bool):
        self.path, self.folder, self.claim, self._made_folder = path, path.parent, mine, made_folder
        self._released = threading.Event()
        threading.Thread(target=self._beat, name="owner", daemon=True).start()
        _held.add(self)
        atexit.register(self.release)
        _handle_signals()

    def release(self) -> None:
        """Give the folder up; a folder that was made for the claim and is still empty goes. Again does no harm."""
        if self._released.is_set() or os.getpid() != self.claim.pid:  # a forked child owns nothing
            return
        self._released.set()
        _held.discard(self)
        atexit.unregister(self.release)
        try:
            self.path.unlink(missing_ok=True)
            if self._made_folder and not any(self.folder.iterdir()):
                self.folder.rmdir()
        except OSError as error:  # storage that went away: the claim is judged by its process
            print(f"warning: {self.path}: could not be removed: {error.strerror}", file=sys.stderr, flush=True)

    def __exit__(self, *_) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                self._write_again()
            except OSError:  # a slow or full file system; the next beat tries again
                continue

    def _write_again(self) -> None:
        """Someone removed the claim. If another has the folder now, two would write: this process ends."""
        try:
            name = self.path.stem.rpartition("_")[0]
            others = [claim for claim in _claims(self.folder, name).values() if claim != self.claim]
            if not others:
                _create(self.path, self.claim)
                return
        except OSError:
            return
        if not self._released.is_set():
            who = _describe(others[-1])
            print(f"error: {self.folder} was taken over by {who}; this process ends", file=sys.stderr, flush=True)
            os._exit(LOST_STATUS)


def claim(folder: str | Path, remedy: str = "name another folder", name: str = "owner") -> Owner:
    """Claim a folder for this process; it is made if it is missing.

    Args:
        remedy: the end of the message for a folder that is in use.
        name: claims of different names do not see each other (one of each result of a shared folder).

    Raises:
        UserError: a living process has the folder; the message names it.
        OSError: the folder cannot be made or written.
    """
    folder = Path(folder)
    made_folder = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    mine = Claim(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=_started(os.getpid()) or "",
        machine=_machine(),
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        token=secrets.token_hex(8),
    )
    dead: list[tuple[Path, Claim | None]] = []
    for _ in range(_ATTEMPTS):
        found = _claims(folder, name)
        for path, other in found.items():
            if (path, other) not in dead and not _is_dead(path, other):
                told = f"{folder}: in use by {_describe(other)}, {path}"
                raise UserError(f"{told}; wait until it ends, end it, or {remedy}")
            dead.append((path, other))
        path = folder / f"{name}_{max(map(_number, found), default=0) + 1}.json"
        if _create(path, mine):
            beside = {other: claim for other, claim in _claims(folder, name).items() if other != path}
            if all(each in dead for each in beside.items()):
                for other in beside:
                    other.unlink(missing_ok=True)
                return Owner(path, mine, made_folder)
            path.unlink(missing_ok=True)
        time.sleep(random.uniform(0.05, 0.5))  # different lengths, so that two do not meet again
    raise UserError(f"{folder}: several processes try to claim it at this moment; start one of them, or {remedy}")


def release_all() -> None:
    """Give up every folder that this process owns: before an end that runs no ``finally``."""
    for owner in list(_held):
        owner.release()


def is_running(pid: int, started: str = "") -> bool | None:
    """Whether a process of this machine lives; False too if it started at another time than ``started``, or waits only
    for its parent to take note of its death. None where the system does not tell.
    """
    if sys.platform == "win32":  # os.kill(pid, 0) would be a Ctrl-C there
        return None
    ours = True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, whose /proc may be hidden
        ours = False
    now = _started(pid)
    if now is None:  # gone between the two looks, a zombie, hidden, or there is no /proc
        return False if ours and _machine() else None
    return not started or now == started


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Start time of a process in clock ticks since the boot; None if it is gone, a zombie, or there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])


def _claims(folder: Path, name: str) -> dict[Path, Claim | None]:
    """Path -> claim by number; None where the file is cut or is no claim."""
    pattern, found = re.compile(rf"{re.escape(name)}_\d{{1,9}}\.json"), {}
    for path in sorted((path for path in folder.iterdir() if pattern.fullmatch(path.name)), key=_number):
        try:
            found[path] = Claim(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:  # released between the two looks
            continue
        except (ValueError, TypeError):
            found[path] = None
    return found


def _create(path: Path, mine: Claim) -> bool:
    """Write the claim under a name that nobody has; False if someone has it."""
    text = json.dumps(asdict(mine), indent=1) + "\n"
    aside = path.with_name(f".{path.name}.{mine.token}")
    _write_new(aside, text)
    try:
        os.link(aside, path)
        return True
    except FileExistsError:
        return aside.stat().st_nlink == 2  # a server may have linked and lost the answer (open(2), O_EXCL)
    except OSError:  # a file system without links
        with contextlib.suppress(FileExistsError):
            _write_new(path, text)
            return True
        return False
    finally:
        aside.unlink(missing_ok=True)


def _write_new(path: Path, text: str) -> None:
    """``FileExistsError`` where the name is taken; on disk when this returns."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _is_dead(path: Path, other: Claim | None) -> bool:
    """Judge an owner by its process where that is possible, by its claim's signs of life otherwise."""
    if other is not None:
        here = other.machine == _machine() if other.machine else other.host == socket.gethostname()
        running = is_running(other.pid, other.started) if here else None
        if running is False or (running and other.machine):
            return not running
    told = f"{path.parent}: claimed by {_describe(other)}; waiting for a sign of life, at most {STALE:.0f} s"
    print(told, file=sys.stderr, flush=True)
    first, began = _moved(path), time.monotonic()
    while first is not None and time.monotonic() - began < STALE:
        time.sleep(min(1.0, BEAT / 5))
        if _moved(path) != first:
            return _moved(path) is None
    return True


def _moved(path: Path) -> int | None:
    """Modification time in ns, None if the file is gone. Opened, because NFS asks the server then."""
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _describe(other: Claim | None) -> str:
    if other is None:
        return "an owner whose file cannot be read"
    return f"process {other.pid} on {other.host} ({other.command}, since {other.since})"


def _handle_signals() -> None:
    """SIGTERM and SIGHUP end a process without ``finally``; where nobody handles them, claims are released first."""
    if threading.current_thread() is threading.main_thread():
        for number in _ENDING:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, _end)


def _end(number: int, frame) -> None:
    release_all()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)

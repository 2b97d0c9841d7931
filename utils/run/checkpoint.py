"""Checkpoints: safetensors and JSON, written aside and renamed, read at any world size. No pickles.

    <run>/checkpoints/step_00001200/
        backbone.safetensors       weights and running statistics, by structural name      (rank 0)
        optimizer.safetensors      the backbone's optimiser                                (rank 0)
        ema.safetensors            averaged weights, if there are any                      (rank 0)
        head_0001_of_0004.safetensors   rows/<name>: this rank's rows; table/<name>: the same on all ranks (each rank)
        rank_0001.json             this rank's files with size and SHA-256                 (each rank)
        meta.json                  everything that is no array; written last               (rank 0)
    <run>/latest                   name of the newest checkpoint
    <run>/best                     name of the best one, never deleted
    <run>/backbone.pdparams        the newest checkpoint's backbone, as Paddle users expect it; backbone_ema.pdparams

A folder is built as ``step_….partial`` and renamed when every rank has written its part; a crash leaves a partial
folder that nobody reads. Random numbers need no state: every update seeds the generators from (seed, update, rank).

Class rows are stored as contiguous shards in rank order, so rank r' of W' reads just the rows it owns.
"""

import hashlib
import json
import os
import re
import shutil
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from utils import distributed
from utils.errors import UserError
from utils.files import file_digest, sync_folder, write_json, write_text
from utils.weights.states import save_pdparams

FORMAT_VERSION = 1
_NAME = re.compile(r"step_(\d{8,})$")
_EXPORTS = {"backbone": "backbone.pdparams", "ema": "backbone_ema.pdparams"}


@dataclass(frozen=True)
class Snapshot:
    """What one rank saves (copies that training no longer touches), or gets back for the classes that it asked for.

    Attributes:
        rows: arrays whose first axis is the local classes; ``row_start`` is the first one's global id.
        table: arrays of the head that are the same on all ranks.
        shared: file stem -> arrays, the same on all ranks; rank 0 writes them.
        meta: JSON-able, the same on all ranks.
    """

    step: int
    rows: dict[str, np.ndarray]
    row_start: int
    table: dict[str, np.ndarray]
    shared: dict[str, dict[str, np.ndarray]]
    meta: dict


class CheckpointWriter:
    """Writes snapshots in a thread. All ranks drive it in step: ``start``, then, once none is ``pending``, ``finish``
    with whether one has ``failed``; the training loop reduces both over the ranks."""

    def __init__(self, run_dir: str | Path, keep: int = 3, asynchronous: bool = True):
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / "checkpoints"
        self.keep, self.asynchronous = keep, asynchronous
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        self._pool = futures.ThreadPoolExecutor(1, "checkpoint")
        self._written: futures.Future | None = None  # this rank's part of a save, from ``start`` to ``finish``
        self.last_step: int | None = None  # of the last save begun

    @property
    def busy(self) -> bool:
        """A save was started and not yet finished (equal on all ranks)."""
        return self._written is not None

    @property
    def pending(self) -> bool:
        """This rank's files are still being written."""
        return self.busy and not self._written.done()

    @property
    def failed(self) -> bool:
        """This rank's part could not be written."""
        return self.busy and not self.pending and self._written.exception() is not None

    def start(self, snapshot: Snapshot, best: bool = False) -> None:
        """Begin to write, in place of what an interrupted save of the same step left. The save before is finished."""
        assert not self.busy, "finish() the running save first"
        self._snapshot, self._mark_best, self.last_step = snapshot, best, snapshot.step
        self._written, partial = futures.Future(), self._partial(snapshot.step)
        try:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        except OSError as error:
            self._written.set_exception(error)
        distributed.barrier()
        if not self._written.done():
            self._written = self._pool.submit(self._write, snapshot, partial)
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until this rank's files are written (or have failed)."""
        futures.wait([self._written])

    def finish(self, any_failed: bool) -> Path:
        """Publish the checkpoint (rank 0 renames) or, if a rank ``failed``, drop it.

        Raises:
            UserError: on every rank, if a part could not be written; the older checkpoints are untouched.
        """
        snapshot, error = self._snapshot, self._written.exception()  # which waits
        self._snapshot = self._written = None
        partial, final = self._partial(snapshot.step), self.folder / _name(snapshot.step)
        try:
            if self.rank == 0 and any_failed:
                shutil.rmtree(partial, ignore_errors=True)
            elif self.rank == 0:
                self._publish(snapshot, partial, final)
        except OSError as publish_error:
            error = publish_error
        message = None
        if error is not None:
            reason = getattr(error, "strerror", None) or error
            message = UserError(
                f"checkpoint {final}: could not be written: {reason}; older checkpoints are untouched, "
                "free space or set run.output to another disk, then --resume"
            )
        distributed.raise_together(message)
        return final

    def _partial(self, step: int) -> Path:
        return self.folder / f"{_name(step)}.partial"

    def _write(self, snapshot: Snapshot, partial: Path) -> None:
        files = {}
        head = {f"rows/{key}": value for key, value in snapshot.rows.items()}
        if self.rank == 0:
            head |= {f"table/{key}": value for key, value in snapshot.table.items()}
            for stem, arrays in snapshot.shared.items():
                files[f"{stem}.safetensors"] = _save(partial / f"{stem}.safetensors", arrays)
            for stem, export in _EXPORTS.items():
                if stem in snapshot.shared:
                    save_pdparams(partial / export, snapshot.shared[stem])
        name = f"head_{self.rank:04d}_of_{self.world_size:04d}.safetensors"
        files[name] = _save(partial / name, head)
        num_local = len(next(iter(snapshot.rows.values()))) if snapshot.rows else 0
        record = {"rank": self.rank, "row_start": snapshot.row_start, "num_local": num_local, "files": files}
        write_json(partial / f"rank_{self.rank:04d}.json", record)

    def _publish(self, snapshot: Snapshot, partial: Path, final: Path) -> None:
        ranks = [_read_json(partial / f"rank_{rank:04d}.json") for rank in range(self.world_size)]
        meta = {
            "format": FORMAT_VERSION,
            "step": snapshot.step,
            "world_size": self.world_size,
            "shards": [{key: rank[key] for key in ("row_start", "num_local")} for rank in ranks],
            "files": {name: entry for rank in ranks for name, entry in rank["files"].items()},
            **snapshot.meta,
        }
        write_json(partial / "meta.json", {**meta, "checksum": _json_sum(meta)})
        for export in _EXPORTS.values():
            if (partial / export).exists():
                (partial / export).replace(self.run_dir / export)
        if final.exists():  # the same step saved again, e.g. after a resume from an older checkpoint
            shutil.rmtree(final)
        partial.rename(final)
        sync_folder(self.folder)
        write_text(self.run_dir / "latest", final.name + "\n")
        if self._mark_best:
            write_text(self.run_dir / "best", final.name + "\n")
        self._prune()

    def _prune(self) -> None:
        best = self.run_dir / "best"
        kept = {best.read_text().strip()} if best.exists() else set()
        kept |= {path.name for path in list_checkpoints(self.run_dir)[: self.keep]}
        for path in self.folder.iterdir():
            if path.name not in kept and (_NAME.match(path.name) or path.name.endswith(".partial")):
                shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Complete checkpoint folders (not checked inside), newest first."""
    folder = Path(run_dir) / "checkpoints"
    found = [path for path in folder.glob("step_*") if _NAME.match(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(_NAME.match(path.name).group(1)), reverse=True)


def find_checkpoint(run_dir: str | Path, resume: str, warn=print) -> Path | None:
    """The checkpoint to resume from, checked: every file is there, of the right size and sum. All ranks call it.

    Args:
        resume: ``auto`` (the newest undamaged one, None if there is none), ``latest`` (the same, but there must be one)
            or the path of a checkpoint folder or of another run's folder.
        warn: called on rank 0 with a line for each damaged checkpoint that is passed over.

    Raises:
        UserError: nothing usable where something must be.
    """
    if resume in ("auto", "latest"):
        candidates = list_checkpoints(run_dir)
    elif _NAME.match(Path(resume).name):
        candidates = [Path(resume)]
    else:
        candidates = list_checkpoints(resume)
    # Rank 0's list counts: a folder may appear or vanish while the ranks start.
    for path in distributed.broadcast_object([str(candidate) for candidate in candidates]):
        problem = _first_problem(Path(path))
        if problem is None:
            return Path(path)
        if distributed.get_rank() == 0:
            warn(f"warning: checkpoint {path} is damaged ({problem}); trying the one before")
    if resume == "auto":
        return None
    place = Path(run_dir) / "checkpoints" if resume == "latest" else resume
    raise UserError(f"{place}: no usable checkpoint there; start without --resume or give the path of one")


def read_meta(path: str | Path) -> dict:
    """``meta.json`` of a checkpoint."""
    try:
        return _read_json(Path(path) / "meta.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable meta.json ({error}); give the folder of a whole checkpoint") from None


def load_checkpoint(path: str | Path, start: int, num_local: int) -> Snapshot:
    """Read a checkpoint for the classes [start, start + num_local), whatever the world size that wrote it.

    Only the rows asked for are read. Raises UserError where they do not exist.
    """
    path, meta = Path(path), read_meta(path)
    world_size = meta["world_size"]
    stems = [name.removesuffix(".safetensors") for name in meta["files"] if not name.startswith("head_")]
    shared = {stem: load_file(path / f"{stem}.safetensors") for stem in stems}
    parts: dict[str, list[np.ndarray]] = {}
    table: dict[str, np.ndarray] = {}
    for rank, shard in enumerate(meta["shards"]):
        first = max(start, shard["row_start"])
        last = min(start + num_local, shard["row_start"] + shard["num_local"])
        if first >= last and rank != 0:
            continue
        with safe_open(path / f"head_{rank:04d}_of_{world_size:04d}.safetensors", framework="np") as file:
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                kind, _, name = key.partition("/")
                if kind == "table":
                    table[name] = file.get_tensor(key)
                elif first < last:
                    rows = file.get_slice(key)[first - shard["row_start"] : last - shard["row_start"]]
                    parts.setdefault(name, []).append(rows)
    rows = {name: np.concatenate(pieces) for name, pieces in parts.items()}
    for name, value in rows.items():
        if len(value) != num_local:
            total = sum(shard["num_local"] for shard in meta["shards"])
            raise UserError(
                f"{path}: head array {name!r} covers {total} classes, rows {start} to {start + num_local - 1} were "
                "asked for; the class count differs: use init.backbone= (and init.head=) instead of --resume"
            )
    return Snapshot(meta["step"], rows, start, table, shared, meta)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _save(path: Path, arrays: dict[str, np.ndarray]) -> dict:
    try:
        save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, str(path))
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(str(error)) from error
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def _json_sum(meta: dict) -> str:
    """Checksum of the metadata itself, whatever the spacing."""
    plain = {key: value for key, value in meta.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _first_problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing; the files are shared out over the ranks."""
    problem = None
    try:
        meta = _read_json(path / "meta.json")
        if meta["format"] != FORMAT_VERSION:
            problem = f"format {meta['format']}, this program reads {FORMAT_VERSION}"
        elif meta["checksum"] != _json_sum(meta):
            problem = "meta.json has another checksum than it says"
        for number, (name, entry) in enumerate(sorted(meta["files"].items())):
            if problem or number % distributed.get_world_size() != distributed.get_rank():
                continue
            file = path / name
            if not file.exists():
                problem = f"{name} is missing"
            elif file.stat().st_size != entry["bytes"]:
                problem = f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            elif file_digest(file) != entry["sha256"]:
                problem = f"{name} has another checksum than meta.json says"
    except FileNotFoundError:
        problem = "meta.json is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"meta.json: {error!r}"
    return next((found for found in distributed.all_gather_object(problem) if found), None)

"""The run directory: owned by one training, seen as the same by all ranks, an earlier run's files moved aside."""

import contextlib
import itertools
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from utils import distributed
from utils.errors import UserError
from utils.owner import claim

# What a run leaves; a fresh run in the same directory moves it to previous_N/.
_WEIGHTS = ("backbone.pdparams", "backbone_best.pdparams", "backbone_ema.pdparams", "best", "checkpoints", "latest")
_LOGS = ("config.yaml", "events", "metrics.jsonl", "train.log", "visualdl")


@contextlib.contextmanager
def owned_run_folder(run_dir: str | Path) -> Iterator[None]:
    """Make the run directory and keep other trainings out of it (``utils.owner``) for the length of a block.

    All ranks call it, before they read anything there; rank 0 claims.

    Raises:
        UserError: on every rank, if another run has the folder, or a rank cannot write it or sees another one.
    """
    run_dir, owner = Path(run_dir), None
    with distributed.together():
        if distributed.get_rank() == 0:
            try:
                owner = claim(run_dir, "set run.output to another folder")
            except OSError as error:
                why = f"cannot be written: {error.strerror or error}"
                raise UserError(f"{run_dir}: {why}; set run.output to a writable folder") from None
    with owner if owner is not None else contextlib.nullcontext():
        name, token = distributed.broadcast_object(owner and (owner.path.name, owner.claim.token))
        with distributed.together():
            seen = run_dir / name
            if not seen.exists() or token not in seen.read_text(encoding="utf-8"):
                raise UserError(
                    f"{run_dir.resolve()} on rank {distributed.get_rank()} ({socket.gethostname()}) is not the folder "
                    "that rank 0 writes; put run.output on storage that all machines share"
                )
        yield


def open_run_folder(run_dir: str | Path, fresh: bool) -> str | None:
    """Prepare the owned run directory: unless it is continued (``fresh``), what an earlier run left goes to
    ``previous_N/``. All ranks call it.

    Returns:
        What was done with an earlier run's files, to be logged (rank 0); None if there were none.

    Raises:
        UserError: on every rank, if the files cannot be moved.
    """
    run_dir = Path(run_dir)
    with distributed.together():
        if not fresh or distributed.get_rank() != 0:
            return None
        found = [run_dir / name for name in (*_WEIGHTS, *_LOGS) if (run_dir / name).exists()]
        if not (run_dir / "checkpoints").exists():  # a run that ended before its first checkpoint: not worth keeping
            for path in found:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return None
        places = (run_dir / f"previous_{number}" for number in itertools.count(1))
        target = next(place for place in places if not place.exists())
        target.mkdir()
        for path in found:
            path.rename(target / path.name)
        return f"an earlier run's files were moved to {target} (--resume would have continued it)"

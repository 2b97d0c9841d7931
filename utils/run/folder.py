"""The run directory: owned by one training, seen as the same by all ranks, an earlier run's files moved aside."""

import contextlib
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from utils import distributed
from utils.errors import UserError
from utils.owner import claim

# What a run leaves; a fresh run in the same directory moves it to previous_N/.
_PRODUCTS = (
    "backbone.pdparams",
    "backbone_best.pdparams",
    "backbone_ema.pdparams",
    "best",
    "checkpoints",
    "config.yaml",
    "events",
    "latest",
    "metrics.jsonl",
    "train.log",
    "visualdl",
)


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
                reason = error.strerror or error
                raise UserError(
                    f"{run_dir}: cannot be written: {reason}; set run.output to a writable folder"
                ) from None
    with owner if owner is not None else contextlib.nullcontext():
        name = distributed.broadcast_object(owner and owner.path.name)
        token = distributed.broadcast_object(owner and owner.claim.token)
        with distributed.together():
            seen = run_dir / name
            if not seen.exists() or token not in seen.read_text(encoding="utf-8"):
                raise UserError(
                    f"{run_dir.resolve()} on rank {distributed.get_rank()} ({socket.gethostname()}) is not the folder "
                    "that rank 0 writes; put run.output on storage that all machines share"
                )
        yield


def open_run_folder(run_dir: str | Path, fresh: bool) -> str | None:
    """Prepare the owned run directory: what an earlier run left goes to ``previous_N/``, unless it is continued.

    All ranks call it. Nothing is deleted.

    Args:
        fresh: not a resume.

    Returns:
        What was done with an earlier run's files, to be logged (rank 0); None if there were none.

    Raises:
        UserError: on every rank, if the files cannot be moved.
    """
    with distributed.together():
        return _move_aside(Path(run_dir)) if fresh and distributed.get_rank() == 0 else None


def _move_aside(run_dir: Path) -> str | None:
    found = [run_dir / name for name in _PRODUCTS if (run_dir / name).exists()]
    if not (run_dir / "checkpoints").exists():  # nothing worth keeping: a run that ended before its first checkpoint
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return None
    number = 1
    while (run_dir / f"previous_{number}").exists():
        number += 1
    target = run_dir / f"previous_{number}"
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    return f"an earlier run's files were moved to {target} (--resume would have continued it)"

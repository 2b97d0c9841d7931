"""The run directory: made once, an earlier run's files moved aside, and seen as the same by all ranks."""

import os
import shutil
from pathlib import Path

from utils import distributed
from utils.errors import UserError
from utils.files import write_text

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


def open_run_folder(run_dir: str | Path, fresh: bool) -> str | None:
    """Make the run directory and check that all ranks see the same one. All ranks call it.

    Args:
        fresh: not a resume: what an earlier run left is moved to ``previous_N/`` (nothing is deleted).

    Returns:
        What was done with an earlier run's files, to be told; None if there were none.

    Raises:
        UserError: on every rank, if one cannot write or sees another folder.
    """
    run_dir, token = Path(run_dir), distributed.broadcast_object(os.urandom(8).hex())
    probe, moved, error = run_dir / ".shared_probe", None, None
    if distributed.get_rank() == 0:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            moved = _move_aside(run_dir) if fresh else None
            write_text(probe, token)
        except OSError as failure:
            error = UserError(f"{run_dir}: cannot be written: {failure.strerror}; set run.output to a writable folder")
    distributed.raise_together(error)
    seen = probe.read_text() if probe.exists() else None
    if seen != token:
        host = os.uname().nodename if hasattr(os, "uname") else "this machine"
        error = UserError(
            f"{run_dir.resolve()} on rank {distributed.get_rank()} ({host}) is not the folder that rank 0 writes; "
            "put run.output on storage that all machines share"
        )
    distributed.raise_together(error)
    if distributed.get_rank() == 0:
        probe.unlink(missing_ok=True)
    return moved


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

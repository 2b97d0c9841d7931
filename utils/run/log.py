"""Where a run's figures go: console, ``train.log``, ``metrics.jsonl``, TensorBoard, VisualDL. Rank 0 writes.

``metrics.jsonl`` has one JSON object a line, ``kind`` being ``train``, ``verify`` or ``event``. A resumed run first
drops the lines of updates that it will do again, so the file always holds one line an update logged.
"""

import contextlib
import functools
import importlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.errors import UserError
from utils.progress import build_bar


@dataclass(frozen=True)
class StepMetrics:
    """What is logged about training, averaged since the last line where it is a rate or a share."""

    step: int
    epoch: float
    loss: float
    lr: float
    images_s: float  # of all ranks
    data_wait: float  # share of the time spent waiting for the loader, 0..1
    grad_norm: float  # of the backbone, before clipping
    theta_own: float | None  # mean angle to the own class, degrees
    theta_other: float | None  # mean angle to the nearest other (sampled) class, degrees
    train_accuracy: float | None  # share of images nearer to their own class than to any other sampled one
    loss_scale: float
    skipped: int  # updates skipped since the start
    memory_mb: float  # resident (cpu) or allocated on the device, this rank's peak
    eta_s: float

    def line(self) -> str:
        """One line for people."""
        parts = [
            f"step {self.step}  epoch {self.epoch:.2f}  loss {self.loss:.4f}  lr {self.lr:.3g}",
            f"{self.images_s:.1f} images/s  wait {100 * self.data_wait:.0f}%  |g| {self.grad_norm:.3g}",
        ]
        if self.theta_own is not None:
            parts.append(f"theta {self.theta_own:.1f}/{self.theta_other:.1f} deg")
        if self.loss_scale != 1:
            parts.append(f"scale {self.loss_scale:g}")
        if self.skipped:
            parts.append(f"skipped {self.skipped}")
        return "  ".join([*parts, f"ETA {duration(self.eta_s)}"])


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``; ``?`` if unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class RunLog:
    """The log of one run. On ranks other than 0 only warnings are shown, on stderr with the rank's number.

    Args:
        run_dir: the run directory, made if it is missing (rank 0).
        resume_step: lines of later updates are dropped from ``metrics.jsonl``; None starts the file anew.
        total_steps: length of the progress bar.
    """

    def __init__(
        self,
        run_dir: str | Path,
        rank: int = 0,
        tensorboard: bool = False,
        visualdl: bool = False,
        resume_step: int | None = None,
        total_steps: int = 0,
    ):
        self.rank, self._writers, self._progress = rank, [], None
        self._open = contextlib.ExitStack()
        if rank != 0:
            return
        run_dir, resumed = Path(run_dir), resume_step is not None
        run_dir.mkdir(parents=True, exist_ok=True)
        metrics = run_dir / "metrics.jsonl"
        kept = _lines_until(metrics, resume_step) if resumed else []
        metrics.write_text("".join(kept), encoding="utf-8")
        # Each line is on its way at once; names of files that are no UTF-8 end no run.
        opened = functools.partial(open, encoding="utf-8", errors="backslashreplace", buffering=1)
        self._jsonl = self._open.enter_context(opened(metrics, "a"))
        self._lines = self._open.enter_context(opened(run_dir / "train.log", "a" if resumed else "w"))
        if tensorboard:
            writer = _package("tensorboard", "tensorboardX", "tensorboardX").SummaryWriter
            self._writers.append(writer(str(run_dir / "events"), purge_step=resume_step + 1 if resumed else None))
        if visualdl:
            writer = _package("visualdl", "visualdl", "visualdl==2.5.3").LogWriter
            self._writers.append(writer(logdir=str(run_dir / "visualdl")))
        for writer in self._writers:
            self._open.callback(writer.close)
        if sys.stdout.isatty():  # log files and pipes get plain lines
            self._progress = self._open.enter_context(build_bar(with_line=True))
            self._task = self._progress.add_task("train", total=total_steps, completed=resume_step or 0, line="")

    def info(self, message: str) -> None:
        """A line for people, on rank 0."""
        if self.rank == 0:
            self._write("INFO", message)
            self._print(message)

    def warning(self, message: str, first_rank: bool = False) -> None:
        """A warning, of every rank that has one; ``first_rank``: all have the same, rank 0 tells it."""
        if self.rank == 0:
            self._write("WARNING", message)
            self._print(f"warning: {message}")
        elif not first_rank:
            print(f"warning (rank {self.rank}): {message}", file=sys.stderr, flush=True)

    def train(self, metrics: StepMetrics) -> None:
        """Figures of an update."""
        if self.rank != 0:
            return
        record, line = asdict(metrics), metrics.line()
        self._record("train", record)
        self._write("INFO", line)
        if self._progress is None:
            self._print(line)
        else:
            self._progress.update(self._task, completed=metrics.step, line=line)
        self.scalars({f"train/{key}": value for key, value in record.items() if key != "step"}, metrics.step)

    def verify(self, step: int, name: str, figures: dict[str, float]) -> None:
        """Figures of a verification set."""
        if self.rank != 0:
            return
        self._record("verify", {"step": step, "set": name, **figures})
        self.info(f"step {step}  {name}  " + "  ".join(f"{key} {value:.4f}" for key, value in figures.items()))
        self.scalars({f"verify/{name}/{key}": value for key, value in figures.items()}, step)

    def event(self, step: int, what: str, **details) -> None:
        """Something worth a line of its own in ``metrics.jsonl`` (resume, spike, skip, stop)."""
        if self.rank == 0:
            self._record("event", {"step": step, "what": what, **details})

    def scalars(self, values: dict[str, float | None], step: int) -> None:
        """Numbers into the event files."""
        for writer in self._writers:
            for key, value in values.items():
                if value is not None and math.isfinite(value):
                    writer.add_scalar(key, value, step)

    def image(self, name: str, picture_HWC, step: int) -> None:
        """A uint8 RGB picture into the event files."""
        for writer in self._writers:
            writer.add_image(name, picture_HWC, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close everything."""
        self._open.close()

    def _write(self, level: str, message: str) -> None:
        if not self._lines.closed:  # the watchdog may have something to say while the run comes down
            self._lines.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {level} {message}\n")

    def _record(self, kind: str, record: dict) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._jsonl.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **clean}) + "\n")

    def _print(self, message: str) -> None:
        if self._progress is not None:
            self._progress.console.print(message, highlight=False, markup=False)
        else:
            print(message, flush=True)


def _lines_until(path: Path, step: int) -> list[str]:
    """Lines of ``metrics.jsonl`` up to and including an update; a cut last line is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _package(setting: str, name: str, pin: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        remedy = f"pip install {pin} or set log.{setting}=false"
        raise UserError(f"log.{setting}: true, but {name} is not installed; {remedy}") from None

"""What the training loop does around updates: fetch data, log, save. All ranks call each of these in step."""

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from utils import distributed
from utils.errors import UserError
from utils.head.angles import AngleStats
from utils.run.log import StepMetrics
from utils.run.meters import Meter
from utils.run.state import Batches, Run, snapshot
from utils.system import peak_memory_mb


@dataclass(frozen=True)
class Update:
    """What one update did; the same on all ranks."""

    loss: float
    grad_norm: float
    skipped: bool
    angles: AngleStats | None = None


class StopSignal:
    """SIGTERM and SIGINT ask the run to save and end after the update at hand; as a context manager it puts back."""

    def __init__(self):
        self.received: str | None = None  # by this rank
        self.agreed = False  # by all ranks, see fetch
        self._before = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        # Paddle's launcher sends SIGTERM several times; every one means the same.
        self.received = signal.Signals(number).name


class Feed:
    """The batches of one update after another, epoch after epoch. All ranks pull in step.

    ``ahead`` fetches those of the next update while the device still works on the present one; what goes wrong there is
    kept for ``next``, so that the present update ends first.
    """

    def __init__(self, run: Run, stop: StopSignal):
        self._run, self._stop, self._iterator = run, stop, iter(run.loader)
        self._ready: Batches | None = None
        self._error: Exception | None = None

    def next(self) -> Batches:
        """The batches of the next update."""
        if self._error is not None:
            raise self._error
        batches, self._ready = self._ready or self._pull(ahead=False), None
        return batches

    def ahead(self) -> None:
        """Have the batches of the update after the present one ready, if there is to be one."""
        if self._run.schedule_step >= self._run.schedule.total_steps:
            return
        try:
            self._ready = self._pull(ahead=True)
        except (UserError, OSError) as error:
            self._error = error

    def _pull(self, ahead: bool) -> Batches:
        self._run.watchdog.enter("data")
        while (batches := fetch(self._run, self._iterator, self._stop, ahead)) is None:
            self._iterator = iter(self._run.loader)  # the epoch is over; the loader stands at the next one
        return batches


def fetch(run: Run, iterator: Iterator, stop: StopSignal, ahead: bool = False) -> Batches | None:
    """The batches of an update, its classes drawn; None if the epoch is over. Sets ``stop.agreed``. All ranks call it.

    One message among the hosts carries the labels of all ranks and what one rank has to say (a record that cannot be
    read, a label that is no class, a signal, a save that failed), before a collective of the update.

    Args:
        ahead: an update is under way; these batches are for the one after it.
    """
    micro, keys, error, ended = [], [], None, False
    num_classes, size = run.head.shard.num_classes, run.loader.batch_size
    start, asked = run.loader.state_dict(), time.monotonic()
    try:
        while len(micro) < run.accumulation:
            image_BCHW, label_B = next(iterator)
            label = np.asarray(label_B)
            wrong = (label < 0) | (label >= num_classes)
            if wrong.any():
                named = ", ".join(str(key) for key in run.loader.last_keys[wrong][:3])
                raise UserError(
                    f"{run.config.data.root}: label {label[wrong][0]} of record {named} is not in [0, {num_classes}); "
                    "set data.num_classes (or the data's property file) to the number of identities"
                )
            micro.append((image_BCHW, label))
            keys.append(run.loader.last_keys)
    except StopIteration:
        ended = True
    except (UserError, OSError) as failure:
        error = failure
    waited, writer = time.monotonic() - asked, run.writer
    message = np.zeros(4 + run.accumulation * size, np.int64)
    pending = writer.pending  # asked first: what fails between the two looks is told with the next message
    message[:4] = error is not None, stop.received is not None, writer.failed, pending
    if error is None and not ended:
        message[4:] = np.concatenate([label for _, label in micro])
    table = distributed.gather_host(message)
    failed, stop.agreed, save_failed, saving = table[:, :4].any(axis=0).tolist()
    if failed:
        distributed.raise_together(error)
    if writer.busy and not saving:
        writer.finish(save_failed)
    if ended:
        return None
    draw = run.head.draw(np.split(table[:, 4:], run.accumulation, axis=1), ahead=int(ahead))
    behind = run.loader.state_dict()
    return Batches(micro, draw=draw, keys=np.concatenate(keys), start=start, stop=behind, waited=waited)


def report_odd(run: Run, done: Update) -> None:
    """Loss spikes and skipped updates, with the records of the batch. All ranks call it with the same figures."""
    spike = run.spikes.observe(done.loss)
    if not (spike or done.skipped):
        return
    keys = np.concatenate(distributed.all_gather_object(run.batch_keys)).tolist()
    step, what, reason = run.progress.step, "spike", f"running mean {run.spikes.mean:.3f}"
    if done.skipped:
        what, reason = "skipped", "non-finite loss or gradient, update skipped"
    shown = ", ".join(map(str, keys[:8])) + (", ..." if len(keys) > 8 else "")
    told = f"step {step}: loss {done.loss:.4g}, {reason}; records {shown} (all in metrics.jsonl)"
    run.log.warning(told, first_rank=True)
    run.log.event(step, what, loss=done.loss, grad_norm=done.grad_norm, loss_scale=run.scaler.scale, records=keys)


def log_update(run: Run, done: Update, lr: float, meter: Meter) -> None:
    """One line of figures, then a new span of the meter."""
    images_s, waiting, loss = meter.read()
    left = (run.schedule.total_steps - run.schedule_step) * run.images_per_update
    angles = done.angles
    state = run.data_state
    run.log.train(
        StepMetrics(
            step=run.progress.step,
            epoch=state["epoch"] + state["position"] / run.images_per_update / run.schedule.steps_per_epoch,
            loss=loss,
            lr=lr,
            images_s=images_s,
            data_wait=waiting,
            grad_norm=done.grad_norm,
            theta_own=angles and angles.theta_own,
            theta_other=angles and angles.theta_other,
            train_accuracy=angles and angles.accuracy,
            loss_scale=run.scaler.scale,
            skipped=run.scaler.skips,
            memory_mb=peak_memory_mb(),
            eta_s=left / images_s,
        )
    )
    meter.reset()


def save(run: Run, best: bool = False, wait: bool = False) -> None:
    """Start a checkpoint of the present state; ``wait`` until it is on disk. All ranks call it."""
    run.watchdog.enter("save")
    if run.writer.busy:  # the save before is slower than the cadence
        _finish_save(run)
    run.writer.start(snapshot(run), best)
    if wait:
        _finish_save(run)
    run.watchdog.done(run.progress.step)


def finish(run: Run, best: bool, stopped: bool) -> None:
    """The last checkpoint, on disk when this returns. All ranks call it."""
    if run.writer.busy:
        _finish_save(run)
    step = run.progress.step
    if best or run.writer.last_step != step:
        save(run, best, wait=True)
    run.log.event(step, "stopped" if stopped else "finished")
    output = run.config.run.output
    told = f"finished after update {step}; weights: {output}/backbone.pdparams"
    if stopped:
        told = f"stopped by a signal after update {step}; saved in {output}, go on with --resume"
    run.log.info(told)


def _finish_save(run: Run) -> None:
    run.writer.wait()
    (failed,) = distributed.agree(run.writer.failed)
    run.writer.finish(failed)

"""What the training loop does between updates: fetch data, tell, save. All ranks call each of these in step."""

from dataclasses import dataclass

import numpy as np

from utils import distributed
from utils.errors import UserError
from utils.head.angles import AngleStats
from utils.run.log import StepMetrics
from utils.run.meters import Meter
from utils.run.signals import StopSignal
from utils.run.state import Run, snapshot
from utils.system import peak_memory_mb


@dataclass(frozen=True)
class Update:
    """What one update did; the same on all ranks."""

    loss: float
    grad_norm: float
    skipped: bool
    angles: AngleStats | None = None


def fetch(run: Run, iterator, stop: StopSignal) -> list | None:
    """The micro-batches of an update, None if the epoch is over; sets ``stop.agreed``. All ranks call it.

    What one rank has to tell (a record that cannot be read, a label that is no class, a signal, a save that failed)
    reaches all of them here, before a collective of the update.
    """
    batches, error = [], None
    num_classes = run.head.shard.num_classes
    try:
        while len(batches) < run.accumulation:
            image_BCHW, label_B = next(iterator)
            labels = label_B.numpy()
            wrong = (labels < 0) | (labels >= num_classes)
            if wrong.any():
                keys = ", ".join(str(key) for key in run.loader.last_keys[wrong][:3])
                raise UserError(
                    f"{run.config.data.root}: label {labels[wrong][0]} of record {keys} is not in [0, {num_classes}); "
                    "set data.num_classes (or the data's property file) to the number of identities"
                )
            batches.append((image_BCHW, label_B))
            run.batch_keys = run.loader.last_keys
    except StopIteration:
        batches = None
    except (UserError, OSError) as failure:
        error = failure
    writer = run.writer
    failed, stop.agreed, save_failed, saving = distributed.agree(
        error is not None, stop.received is not None, writer.failed, writer.pending
    )
    if failed:
        distributed.raise_together(error)
    if writer.busy and not saving:
        writer.finish(save_failed)
    return batches


def report_odd(run: Run, done) -> None:
    """Loss spikes and skipped updates, with the records of the batch. All ranks call it with the same figures."""
    spike = run.spikes.observe(done.loss)
    if not (spike or done.skipped):
        return
    keys = np.concatenate(distributed.all_gather_object(run.batch_keys)).tolist()
    step = run.progress.step
    what = "skipped" if done.skipped else "spike"
    reason = "non-finite loss or gradient, update skipped" if done.skipped else f"running mean {run.spikes.mean:.3f}"
    shown = ", ".join(map(str, keys[:8])) + (", ..." if len(keys) > 8 else "")
    run.log.warning(
        f"step {step}: loss {done.loss:.4g}, {reason}; records {shown} (all in metrics.jsonl)", first_rank=True
    )
    run.log.event(step, what, loss=done.loss, grad_norm=done.grad_norm, loss_scale=run.scaler.scale, records=keys)


def log_update(run: Run, done, lr: float, meter: Meter) -> None:
    """One line of figures, then a new span of the meter."""
    images_s, waiting, loss = meter.read()
    left = (run.schedule.total_steps - run.schedule_step) * run.images_per_update
    angles = done.angles
    state = run.loader.state_dict()
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
    if stopped:
        run.log.info(f"stopped by a signal after update {step}; saved in {output}, go on with --resume")
    else:
        run.log.info(f"finished after update {step}; weights: {output}/backbone.pdparams")


def _finish_save(run: Run) -> None:
    run.writer.wait()
    (failed,) = distributed.agree(run.writer.failed)
    run.writer.finish(failed)

"""What of a run is saved, and how a run goes on from it: bit for bit at as many ranks, exactly at any other number."""

import importlib.metadata
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import paddle

from utils.errors import UserError
from utils.run.checkpoint import CheckpointWriter, Snapshot, find_checkpoint, load_checkpoint, read_meta
from utils.weights.states import load_state

if TYPE_CHECKING:
    from config import Config
    from eval.during_training import Verification
    from partial_fc import PartialFC
    from utils.data.loader import TrainLoader
    from utils.head.draw import Draw
    from utils.model.ema import Ema
    from utils.model.optimizer import BackboneOptimizer
    from utils.model.precision import LossScaler
    from utils.model.replica import Replica
    from utils.model.schedule import LrSchedule
    from utils.run.log import RunLog
    from utils.run.meters import SpikeDetector
    from utils.run.pictures import Pictures
    from utils.run.watchdog import Watchdog


@dataclass
class Progress:
    """Counters of a run. ``best`` is the best mean verification accuracy."""

    step: int = 0  # updates done, skipped ones included
    best: float | None = None
    best_step: int | None = None
    verifications_since_best: int = 0
    verified_step: int | None = None
    stopped_early: bool = False

    def verified(self, accuracy: float, patience: int) -> bool:
        """Note a verification after the present update; whether it is the best. ``patience`` 0 never stops early."""
        self.verified_step = self.step
        if self.best is None or accuracy > self.best:
            self.best, self.best_step, self.verifications_since_best = accuracy, self.step, 0
            return True
        self.verifications_since_best += 1
        self.stopped_early = 0 < patience <= self.verifications_since_best
        return False


@dataclass
class Run:
    """The parts of one run on this rank; ``train.build`` makes them."""

    config: "Config"
    loader: "TrainLoader"
    replica: "Replica"  # the backbone
    head: "PartialFC"
    optimizer: "BackboneOptimizer"
    schedule: "LrSchedule"
    scaler: "LossScaler"
    ema: "Ema | None"
    verification: "Verification | None"
    log: "RunLog"
    writer: CheckpointWriter
    watchdog: "Watchdog"
    spikes: "SpikeDetector"
    accumulation: int  # micro-batches an update
    images_per_update: int  # of all ranks
    progress: Progress = field(default_factory=Progress)
    pictures: "Pictures | None" = None
    batch_keys: np.ndarray | None = None  # records of this rank in the present update
    used: dict | None = None  # where the loader stood behind the present update's batches; it may be ahead of them

    @property
    def data_state(self) -> dict:
        """Where training stands in the data: what a checkpoint keeps of the loader."""
        return self.loader.state_dict() if self.used is None else self.used

    @property
    def schedule_step(self) -> float:
        """Updates' worth of images done; ``progress.step`` unless a resume changed the global batch."""
        return self.updates_at(self.data_state)

    def updates_at(self, state: dict) -> float:
        """Updates' worth of images before this state of the loader."""
        return state["epoch"] * self.schedule.steps_per_epoch + state["position"] / self.images_per_update

    def use(self, batches: list) -> "list | Draw":
        """Note which batches the present update is of; what its head is to be prepared with."""
        if not isinstance(batches, Batches):
            return [label_B for _, label_B in batches]
        self.batch_keys, self.used = batches.keys, batches.stop
        return batches.draw


class Batches(list):
    """The micro-batches (image, label) of one update, and what the host made ready with them."""

    def __init__(self, micro: list, *, draw: "Draw", keys: np.ndarray, start: dict, stop: dict, waited: float):
        super().__init__(micro)
        self.draw, self.keys, self.waited = draw, keys, waited  # classes; records of this rank; seconds in the loader
        self.start, self.stop = start, stop  # where the loader stood before and behind them


def seed_update(seed: int, step: int, rank: int) -> None:
    """Seed Paddle's generators for one update: dropout and the like then need no saved state."""
    entropy = np.random.SeedSequence([seed, step, rank, 0xA5CE]).generate_state(1)[0]
    paddle.seed(int(entropy))


def find_resume(config: "Config", expected: dict, num_images: int) -> dict | None:
    """Metadata of the checkpoint to go on from, its ``path`` added; None to start anew. All ranks call it.

    Args:
        expected: what configuration and data say of ``network``, ``num_classes``, ``embedding_size``.
        num_images: of the data set.

    Raises:
        UserError: no usable checkpoint, or one of another model, data set, optimiser, margin or frozen layers.
    """
    run_dir, resume = config.run.output, config.checkpoint.resume
    if resume == "never":
        return None
    path = find_checkpoint(run_dir, resume)
    if path is None:
        return None
    meta = read_meta(path)
    now = config.model_dump(mode="json")
    then = {**now, **meta.get("config", {})}
    before, wanted = {**_unchangeable(then), **meta["run"]}, {**expected, **_unchangeable(now)}
    start_anew = f"start anew from the weights: init.backbone={path} init.head={path}"
    for name, value in wanted.items():
        if before[name] != value:
            advice = f"--resume needs {name}={before[name]} as it was, or {start_anew}"
            if name in expected:
                same = "--resume continues the same model"
                advice = f"{same}: to start from its weights use init.backbone= (and init.head=) instead"
            told = f"{name} is {before[name]!r} there and {value!r} in this configuration"
            raise UserError(f"{path}: {told}; {advice}")
    images = meta["run"]["num_samples"]
    if images != num_images:
        places = [each["data"].get("list_file") or each["data"].get("root") for each in (then, now)]
        raise UserError(
            f"{path}: the data ({places[0]}) has {images} images there and {num_images} here ({places[1]}), so their "
            f"order would be another; give the same data, or {start_anew}"
        )
    return {**meta, "path": str(path)}


def _unchangeable(config: dict) -> dict[str, object]:
    """What the state in a checkpoint depends on, of a configuration as JSON."""
    optim, head = config["optim"]["name"], config["head"]
    rows = head.get("optimizer") or ("adamw" if optim == "adamw" else "sgd")
    return {
        "run.seed": config["run"]["seed"],
        "optim.name": optim,
        "head.optimizer": rows,
        "head.update": "sampled" if rows == "adamw" else head.get("update", "dense"),
        "head.margin.name": head["margin"]["name"].lower(),
        "init.freeze": sorted(config["init"]["freeze"]),
    }


def fit_batch(resume: dict | None, batch_size: int, accumulation: int, world_size: int) -> tuple[int, int, str | None]:
    """(batch size of a rank, accumulation, what to tell) so that a resume keeps the global batch if it can.

    Kept by a batch of a rank that divides its share, no larger than the configured one (memory) and no less than half
    of it (batch norms), the rest by accumulation.
    """
    if resume is None:
        return batch_size, accumulation, None
    before, now = resume["run"]["global_batch"], batch_size * accumulation * world_size
    if before == now:
        return batch_size, accumulation, None
    ranks = f"{resume['world_size']} rank(s) then, {world_size} now"
    if resume["world_size"] != world_size and before % world_size == 0:
        share = before // world_size
        largest = min(batch_size, share)
        fitting = [size for size in range(largest, (largest - 1) // 2, -1) if share % size == 0]
        if fitting:
            size, times = fitting[0], share // fitting[0]
            return size, times, f"global batch of {before} kept ({ranks}): batch_size {size}, accumulation {times}"
    note = f"global batch changes from {before} to {now} images ({ranks}); the schedule goes on at the same epoch"
    return batch_size, accumulation, note


def snapshot(run: Run) -> Snapshot:
    """Copies of everything the next update depends on."""
    shared = {
        "backbone": {name: tensor.numpy() for name, tensor in run.replica.backbone.state_dict().items()},
        "optimizer": run.optimizer.state(),
    }
    if run.ema is not None:
        shared["ema"] = run.ema.state()
    config, head = run.config, run.head
    meta = {
        "run": {
            "network": config.model.network,
            "num_classes": head.shard.num_classes,
            "embedding_size": head.embedding_size,
            "global_batch": run.images_per_update,
            "num_samples": run.loader.num_samples,
        },
        "progress": asdict(run.progress),
        "loader": run.data_state,
        "head": head.meta_state(),
        "optimizer_updates": run.optimizer.num_updates,
        "ema_updates": run.ema.num_updates if run.ema is not None else None,
        "scaler": run.scaler.state(),
        "spikes": run.spikes.state(),
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    return Snapshot(run.progress.step, head.row_state(), head.shard.start, head.table_state(), shared, meta)


def restore(run: Run, meta: dict) -> None:
    """Put a run into the state of a checkpoint; every rank reads the class rows that are its own."""
    loaded = load_checkpoint(meta["path"], run.head.shard.start, run.head.shard.num_local)
    load_state(run.replica.backbone, loaded.shared["backbone"], meta["path"], from_torch=False)
    run.replica.remember_statistics()
    run.optimizer.load_state(loaded.shared.get("optimizer", {}), meta["optimizer_updates"])
    run.head.load_state(loaded.rows, loaded.table, meta["head"])
    if run.ema is not None:  # switched on at the resume it starts from the weights
        average = loaded.shared.get("ema", loaded.shared["backbone"])
        run.ema.load_state(average, meta["ema_updates"] if "ema" in loaded.shared else 0)
    run.loader.load_state_dict(meta["loader"])
    run.used = None
    run.scaler.load_state(meta["scaler"])
    run.spikes.load_state(meta["spikes"])
    run.progress = Progress(**{**meta["progress"], "stopped_early": False})
    if Path(meta["path"]).resolve().parent == run.writer.folder.resolve():
        run.writer.last_step = meta["step"]  # a run that was over need not save again


def versions() -> dict[str, str]:
    """Of what a run's bits depend on."""
    found = {"python": platform.python_version(), "paddle": paddle.__version__, "machine": platform.machine()}
    for name in ("numpy", "safetensors", "simplejpeg", "opencv-python-headless"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

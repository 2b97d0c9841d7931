"""Pictures of a run: training samples at its start, the embedding plane on a cadence and at its end.

They go into the event files and, as PNG, into the run directory: ``samples.png``, ``plane.png`` (the newest),
``plane/step_000200.png`` (each of them) and ``plane.npz`` (the newest as arrays). Where another run's plane is named
(``log.plane_beside``) both are drawn side by side.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import paddle

from utils import distributed
from utils.decode import normalise_images
from utils.errors import UserError
from utils.model.modes import evaluating
from utils.run import plane as planes
from utils.run.meters import due
from utils.run.plane import PLANE_FILE, Plane, write_png

if TYPE_CHECKING:
    from config import Config
    from utils.data.source import Source
    from utils.run.log import RunLog

MAX_IMAGES = 5000  # of the plane
BATCH = 250


def open_pictures(config: "Config", log: "RunLog", build_source: Callable[..., "Source"]) -> "Pictures | None":
    """The pictures that a ``config.Config`` asks for, None if it asks for none.

    The plane shows the test split where the data has one. ``build_source``: ``dataset.build_source``.

    Raises:
        UserError: a plane of an embedding that is not 2-D.
    """
    every, size = config.log.plane_every_steps, config.model.embedding_size
    if not (every or config.log.samples):
        return None
    if every and size != 2:
        raise UserError(f"log.plane_every_steps: {every} with model.embedding_size={size}; a plane needs 2")
    split = {"split": "test"} if config.data.kind == "mnist" else {}
    source = build_source(config.data.kind, **{**config.source_options(), **split}) if every else None
    return Pictures(config, log, source)


class Pictures:
    """Draws for the run of ``config``; rank 0 draws, all ranks call. ``source``: images of the plane, if any."""

    def __init__(self, config: "Config", log: "RunLog", source: "Source | None"):
        self.run_dir, self.log, self.title = Path(config.run.output), log, config.head.margin.name
        self.every_steps, self.num_samples = config.log.plane_every_steps, config.log.samples
        beside = config.log.plane_beside  # run directory, or ``plane.npz``, of a run to draw on the left
        self._beside = None if beside is None else Path(beside)
        self._drawn_step = -1
        if source is not None and distributed.get_rank() == 0:
            # Evenly spaced, so that every class occurs whatever the order of the source.
            chosen = np.linspace(0, len(source) - 1, min(len(source), MAX_IMAGES)).astype(np.int64)
            images, labels = zip(*(source[int(index)] for index in chosen), strict=True)
            self._image_NHWC, self._label_N = np.stack(images), np.array(labels, np.int64)

    def draw(self, backbone, head, step: int, image_BCHW=None) -> None:
        """What is due after update ``step``: samples after the first one, the plane on its cadence. All ranks call it.

        ``image_BCHW``: a training batch of this rank; without it the plane is drawn whatever the cadence (the end).
        """
        if image_BCHW is not None and step == 1 and self.num_samples and distributed.get_rank() == 0:
            grid = planes.image_grid(image_BCHW[: self.num_samples].astype("float32").numpy())
            write_png(self.run_dir / "samples.png", grid)
            self.log.image("train/samples", grid, 0)
        asked = self.every_steps if image_BCHW is None else due(step, self.every_steps)
        if asked and step != self._drawn_step:
            self._drawn_step = step
            self._plane(backbone, head, step)

    def _plane(self, backbone, head, step: int) -> None:
        """Embed, draw, measure. All ranks call it."""
        local_CD = head.rows(np.arange(head.shard.num_local))
        center_CD = np.concatenate(distributed.all_gather_object(np.asarray(local_CD, np.float32)))
        if distributed.get_rank() != 0:
            return
        plane = Plane(self._embed(backbone), self._label_N, center_CD, self.title, step)
        angles = planes.measure_angles(plane)
        picture = planes.draw_planes([*self._other(), plane])
        write_png(self.run_dir / "plane" / f"step_{step:06d}.png", picture)
        write_png(self.run_dir / "plane.png", picture)
        planes.save_plane(self.run_dir / PLANE_FILE, plane)
        self.log.image("plane", picture, step)
        self.log.scalars({f"plane/{name}": value for name, value in asdict(angles).items()}, step)
        self.log.event(step, "plane", **asdict(angles))
        self.log.info(
            f"step {step}  plane: own class {angles.intra_mean:.2f} degrees (median {angles.intra_median:.2f}), "
            f"nearest other class {angles.inter_nearest:.2f} (least {angles.inter_min:.2f}), "
            f"accuracy {angles.accuracy:.4f}"
        )

    def _embed(self, backbone) -> np.ndarray:
        parts = []
        with evaluating(backbone):
            for start in range(0, len(self._image_NHWC), BATCH):
                image_BCHW = normalise_images(self._image_NHWC[start : start + BATCH])
                parts.append(backbone(paddle.to_tensor(image_BCHW)).astype("float32").numpy())
        return np.concatenate(parts)

    def _other(self) -> list[Plane]:
        if self._beside is None:
            return []
        path = self._beside / PLANE_FILE if self._beside.is_dir() else self._beside
        if not path.is_file():
            self.log.info(f"log.plane_beside: no plane in {self._beside} yet (run it first); drawing ours alone")
            self._beside = None
            return []
        plane = planes.load_plane(path)
        return [replace(plane, title=plane.title or path.parent.name)]

"""The embedding plane: what a network with a 2-D embedding learnt, as a picture and as angles.

Shapes: N images, C classes, D embedding size (2 where a plane is drawn). Angles are degrees.

A dot is one image's raw embedding, an arrow the direction of a class centre (a row of the head's weight). The margin
losses look at directions only, so the picture to look for is narrow rays with gaps between them; plain softmax leaves
wedges that touch. ``measure_angles`` says the same in numbers, for any D.

matplotlib is imported when a picture is drawn, never at import, and needs no display.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import written_whole
from utils.vectors import scale_to_unit

PLANE_FILE = "plane.npz"  # in a run directory: the last plane, as arrays


@dataclass(frozen=True)
class Plane:
    """Embeddings of one evaluation. ``embedding_ND`` float [N, D], ``label_N`` int [N], ``center_CD`` float [C, D]."""

    embedding_ND: np.ndarray
    label_N: np.ndarray
    center_CD: np.ndarray
    title: str = ""
    step: int = 0


@dataclass(frozen=True)
class Angles:
    """How tight and how far apart the classes lie. All in degrees but ``accuracy`` (a fraction).

    ``intra_mean``, ``intra_median``, ``intra_p95``: angle of an embedding to the mean direction of its own class (mean,
    median, 95th percentile).
    ``inter_nearest``: angle between a class's mean direction and the nearest other one, averaged over classes;
    ``inter_min``: the smallest of them (360/C at best in the plane). ``accuracy``: embeddings whose nearest class
    centre, by angle, is their own.
    """

    intra_mean: float
    intra_median: float
    intra_p95: float
    inter_nearest: float
    inter_min: float
    accuracy: float


def _directions(vector_ND: np.ndarray) -> np.ndarray:
    return scale_to_unit(np.asarray(vector_ND, np.float64))


def _degrees(cosine: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))


def measure_angles(plane: Plane) -> Angles:
    """Angles inside and between the classes that occur in the plane, in float64.

    Raises:
        UserError: fewer than two classes occur, or a label has no centre.
    """
    label_N = np.asarray(plane.label_N)
    present_P = np.unique(label_N)
    if len(present_P) < 2:
        raise UserError(f"labels {present_P.tolist()}: angles between classes need at least two of them")
    if present_P[0] < 0 or present_P[-1] >= len(plane.center_CD):
        raise UserError(f"labels {present_P[0]}..{present_P[-1]} do not fit {len(plane.center_CD)} class centres")
    direction_ND = _directions(plane.embedding_ND)
    mean_PD = _directions(np.stack([direction_ND[label_N == label].mean(axis=0) for label in present_P]))
    own_N = np.searchsorted(present_P, label_N)
    intra_N = _degrees((direction_ND * mean_PD[own_N]).sum(axis=1))
    cosine_PP = mean_PD @ mean_PD.T
    np.fill_diagonal(cosine_PP, -2.0)
    nearest_P = _degrees(cosine_PP.max(axis=1))
    predicted_N = (direction_ND @ _directions(plane.center_CD).T).argmax(axis=1)
    return Angles(
        intra_mean=float(intra_N.mean()),
        intra_median=float(np.median(intra_N)),
        intra_p95=float(np.percentile(intra_N, 95)),
        inter_nearest=float(nearest_P.mean()),
        inter_min=float(nearest_P.min()),
        accuracy=float((predicted_N == label_N).mean()),
    )


def save_plane(path: str | Path, plane: Plane) -> None:
    """Arrays of one plane as ``.npz``, in one piece."""
    with written_whole(path) as aside, open(aside, "wb") as file:
        embedding, center = (np.asarray(each, np.float32) for each in (plane.embedding_ND, plane.center_CD))
        label = np.asarray(plane.label_N, np.int64)
        np.savez_compressed(file, embedding=embedding, label=label, center=center, title=plane.title, step=plane.step)


def load_plane(path: str | Path) -> Plane:
    """What ``save_plane`` wrote; UserError names the file where it is something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return Plane(file["embedding"], file["label"], file["center"], str(file["title"]), int(file["step"]))
    except (ValueError, KeyError, EOFError) as error:
        raise UserError(f"{path}: no embedding plane ({error}); train a 2-D run with log.plane_every_steps") from None


def draw_planes(planes: list[Plane]) -> np.ndarray:
    """Planes side by side -> uint8 RGB [H, W, 3] of 600x600 pixels a plane; UserError if an embedding is not 2-D."""
    for plane in planes:
        if (shape := np.shape(plane.embedding_ND))[1:] != (2,):
            raise UserError(f"embedding of shape {shape}: only 2-D embeddings make a plane (model.embedding_size=2)")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0 * len(planes), 6.0), dpi=100)
    canvas = FigureCanvasAgg(figure)
    for axes, plane in zip(figure.subplots(1, len(planes), squeeze=False)[0], planes, strict=True):
        _draw_panel(axes, plane)
    figure.tight_layout()
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _draw_panel(axes, plane: Plane) -> None:
    from matplotlib import colormaps

    embedding_N2, label_N = np.asarray(plane.embedding_ND, np.float64), np.asarray(plane.label_N)
    num_classes = len(plane.center_CD)
    colours = colormaps["tab10" if num_classes <= 10 else "hsv"]
    # A handful of far outliers must not shrink the picture to a dot.
    reach = float(np.percentile(np.linalg.norm(embedding_N2, axis=1), 99.0)) * 1.1 or 1.0
    direction_C2 = _directions(plane.center_CD)
    for label in range(num_classes):
        colour = colours(label if num_classes <= 10 else label / num_classes)
        mine = label_N == label
        axes.scatter(*embedding_N2[mine].T, s=5, color=colour, alpha=0.55, linewidths=0)
        tip = direction_C2[label] * reach
        axes.annotate("", xy=tip, xytext=(0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.2})
        axes.text(*(tip * 1.09), str(label), color=colour, ha="center", va="center", fontsize=11, fontweight="bold")
    axes.set(xlim=(-1.2 * reach, 1.2 * reach), ylim=(-1.2 * reach, 1.2 * reach), aspect="equal")
    axes.grid(alpha=0.2)
    angles = measure_angles(plane)
    step = f", step {plane.step}" if plane.step else ""
    axes.set_title(
        f"{plane.title}{step}\nown class {angles.intra_mean:.1f}° (median {angles.intra_median:.1f}°), "
        f"nearest other {angles.inter_nearest:.1f}°, accuracy {angles.accuracy:.3f}",
        fontsize=10,
    )


def image_grid(image_BCHW: np.ndarray, columns: int = 8) -> np.ndarray:
    """Training samples in [-1, 1], float [B, 3, H, W] -> one uint8 RGB grid [rows*H, columns*W, 3]; gaps are black."""
    image_BCHW = np.asarray(image_BCHW, np.float32)
    num_images, _, height, width = image_BCHW.shape
    columns = min(columns, num_images)
    rows = -(-num_images // columns)
    tiles = np.zeros((rows * columns, height, width, 3), np.uint8)
    image_BHWC = image_BCHW.transpose(0, 2, 3, 1)  # grey becomes three equal channels
    tiles[:num_images] = np.clip(np.rint(image_BHWC * 127.5 + 127.5), 0, 255)
    tiles = tiles.reshape(rows, columns, height, width, 3).swapaxes(1, 2)
    return tiles.reshape(rows * height, columns * width, 3)


def write_png(path: str | Path, image_HWC: np.ndarray) -> None:
    """uint8 RGB [H, W, 3] -> PNG file, in one piece; the folder is made if it is missing."""
    from matplotlib import image as matplotlib_image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as aside:
        matplotlib_image.imsave(aside, image_HWC, format="png")

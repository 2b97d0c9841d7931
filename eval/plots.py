"""Pictures of an evaluation: ROC curves, score histograms, the worst errors. No display and no global state."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from utils.files import written_whole

# Distinguishable in grey print and for most colour-blind readers (Okabe and Ito's palette).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def draw_roc(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, title: str = "") -> None:
    """``curves``: name -> (FAR, TAR), both [K]. FAR is drawn on a log axis. The suffix of ``path`` picks the format."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for index, (name, (far, tar)) in enumerate(curves.items()):
        axes.plot(far, tar, label=name, color=_COLOURS[index % len(_COLOURS)], linestyle="-" if index < 7 else "--")
    axes.set(xscale="log", xlabel="false accept rate", ylabel="true accept rate", title=title)
    lowest = min((min(far) for far, _ in curves.values() if len(far)), default=1e-3)
    axes.set_xlim(max(min(lowest, 1e-1), 1e-8), 1)
    axes.set_ylim(0, 1.01)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend(loc="lower right", fontsize=8)
    _save(figure, path, 120)


def draw_histogram(
    score_P: np.ndarray, same_P: np.ndarray, path: Path, title: str = "", threshold: float | None = None
) -> None:
    """Densities of the scores (cosine) of genuine and impostor pairs; the threshold as a line."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    low, high = float(np.min(score_P)), float(np.max(score_P))
    edges = np.linspace(low, max(high, low + 1e-6), 81)
    for label, chosen, colour in (("impostor", ~same_P, _COLOURS[1]), ("genuine", same_P, _COLOURS[0])):
        counts, _ = np.histogram(score_P[chosen], edges)
        density = counts / max(1, counts.sum()) / np.diff(edges)
        axes.stairs(density, edges, label=f"{label} ({int(counts.sum()):,})", color=colour, fill=True, alpha=0.5)
    if threshold is not None:
        axes.axvline(threshold, color="black", linewidth=1, label=f"threshold {threshold:.3f}")
    axes.set(xlabel="cosine similarity", ylabel="density", title=title)
    axes.legend(fontsize=8)
    _save(figure, path, 120)


def draw_errors(pairs: Sequence[tuple[np.ndarray, np.ndarray, str]], path: Path, title: str = "") -> None:
    """``pairs``: (left image, right image, caption), RGB uint8; five pairs a row."""
    num_columns = 5
    num_rows = max(1, -(-len(pairs) // num_columns))
    figure = Figure(figsize=(2.6 * num_columns, 1.75 * num_rows + 0.4), layout="constrained")
    figure.suptitle(title if pairs else f"{title}: none", fontsize=10)
    cells = figure.subplots(num_rows, num_columns, squeeze=False).reshape(-1)
    for cell in cells:
        cell.set_axis_off()
    for cell, (left, right, caption) in zip(cells, pairs, strict=False):
        cell.imshow(np.concatenate([left, right], axis=1))
        cell.set_title(caption, fontsize=8)
    _save(figure, path, 100)


def _save(figure: Figure, path: Path, dpi: int) -> None:
    with written_whole(path) as aside:
        figure.savefig(aside, dpi=dpi)

"""The demo's pictures and its one-page report, which opens without a network.

Used by ``tools/demo.py``. Shapes: N unseen images, P pairs of them.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.decomposition import PCA
from sklearn.metrics import roc_curve

from eval.pages import Page
from tools.demo.baselines import all_pairs
from tools.demo.compare import Comparison
from tools.demo.data import Faces
from utils.vectors import scale_to_unit

NETWORK = "ArcFace network"
COLOURS = {NETWORK: "#c0392b", "Fisherfaces": "#2c3e50", "PCA-100": "#7f8c8d", "pixel cosine": "#b2babb"}


def read_metrics(path: Path) -> list[dict]:
    """The training run's ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def draw_training_curve(rows: list[dict], path: Path) -> None:
    """Loss a step, and the accuracy on the unseen people whenever it was measured (it selects nothing)."""
    figure, axis = plt.subplots(figsize=(6.4, 4))
    loss = [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]
    axis.plot(*zip(*loss, strict=True), color="#34495e", linewidth=1)
    axis.set(xlabel="update", ylabel="loss (ArcFace softmax)", title="Training on thirty people")
    accuracy = [(row["step"], row["accuracy"]) for row in rows if row["kind"] == "verify" and row["set"] == "orl"]
    if accuracy:
        twin = axis.twinx()
        twin.plot(*zip(*accuracy, strict=True), color=COLOURS[NETWORK], marker="o")
        twin.set_ylabel("ten-fold accuracy, unseen people", color=COLOURS[NETWORK])
    _save(figure, path)


def draw_roc(methods: dict[str, Comparison], same_P: np.ndarray, path: Path) -> None:
    """True-accept against false-accept rate over every unseen pair."""
    figure, axis = plt.subplots(figsize=(5.2, 4.6))
    for name, method in methods.items():
        false_accept, true_accept, _ = roc_curve(same_P, method.score_P)
        label = f"{name} ({method.figures['balanced_accuracy']:.3f})"
        axis.plot(false_accept, true_accept, label=label, color=COLOURS[name], linewidth=2 if name == NETWORK else 1.2)
    axis.set(xscale="log", xlim=(1e-3, 1), ylim=(0, 1.01), xlabel="false-accept rate", ylabel="true-accept rate")
    axis.set_title(f"{len(same_P):,} pairs of unseen people (balanced accuracy)", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    _save(figure, path)


def draw_similarity(embedding_ND: np.ndarray, person_N: np.ndarray, path: Path) -> None:
    """Cosine similarity of every two unseen images, sorted by person, beside a 2-D projection (PCA)."""
    order = np.argsort(person_N, kind="stable")
    unit_ND = scale_to_unit(embedding_ND[order])
    person_N = person_N[order]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6))
    image = left.imshow(unit_ND @ unit_ND.T, cmap="magma", vmin=-0.5, vmax=1)
    figure.colorbar(image, ax=left, fraction=0.046)
    people, first = np.unique(person_N, return_index=True)
    left.set_xticks(first, people)
    left.set_yticks(first, people)
    left.set_title("cosine similarity, images by person")
    point_N2 = PCA(2, random_state=0).fit_transform(unit_ND)
    for index, person in enumerate(people):
        mine = person_N == person
        right.scatter(*point_N2[mine].T, s=24, color=plt.cm.tab10(index % 10), label=str(person))
    right.set_title("the same embeddings in two dimensions (PCA)")
    right.legend(title="person", fontsize=7, ncol=2)
    _save(figure, path)


def draw_errors(network: Comparison, unseen: Faces, path: Path, most: int = 10) -> None:
    """The most confident wrong pairs: different people taken for one, one person taken for two."""
    left_P, right_P, same_P = all_pairs(unseen.person_N)
    distance_P = network.score_P - network.figures["threshold"]
    wrong = {
        "different people, accepted": np.flatnonzero(~same_P & (distance_P >= 0)),
        "one person, rejected": np.flatnonzero(same_P & (distance_P < 0)),
    }
    figure, axes = plt.subplots(2, most, figsize=(most * 1.3, 5.6))
    for axis in axes.flat:
        axis.axis("off")
    for row, (title, pairs) in enumerate(wrong.items()):
        pairs = pairs[np.argsort(-np.abs(distance_P[pairs]))][:most]
        axes[row, 0].set_title(f"{title}\n", loc="left", fontsize=9)
        for axis, pair in zip(axes[row], pairs, strict=False):
            images = unseen.image_NHW[[left_P[pair], right_P[pair]]]
            axis.imshow(np.vstack(list(images)), cmap="gray", vmin=0, vmax=255)
            axis.text(0, -4, f"{network.score_P[pair]:.2f}", fontsize=8)
    _save(figure, path)


def write_html(results: dict, pictures: dict[str, Path], path: Path) -> None:
    """One self-contained page: the figures, the pictures (embedded), how it was run."""
    first = results["methods"][0]
    head = [
        "method",
        "balanced accuracy",
        *(f"{name}.bin, ten folds" for name in first["sets"]),
        *(f"TAR@FAR={point['far']:g} (%)" for point in first["templates"]),
    ]
    rows = [
        [
            row["method"],
            f"{row['balanced_accuracy']:.4f}",
            *(f"{entry['accuracy']:.4f} ± {entry['accuracy_std']:.4f}" for entry in row["sets"].values()),
            *(f"{100 * point['strict']:.1f}" for point in row["templates"]),
        ]
        for row in results["methods"]
    ]
    page = Page("Faces of people the network has never seen")
    page.text(
        f"Trained on {results['num_train_people']} people of the ORL data set, judged on the other "
        f"{results['num_unseen_people']} (people {results['unseen']}); seed {results['seed']}. Balanced accuracy "
        "is the mean of true-accept and true-reject rate at the best threshold over all "
        f"{results['num_pairs']:,} pairs. The last checkpoint is reported; the unseen people selected nothing. "
        "Landmarks, detector scores and templates of the IJB-shaped set are synthetic; its faces are real."
    )
    page.table(head, rows)
    for title, picture in pictures.items():
        page.heading(title)
        page.picture(picture, title)
    page.heading("Seconds a stage")
    page.code(json.dumps(results["seconds"], indent=2))
    page.heading("Run")
    page.code(results["config"])
    page.write(path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)

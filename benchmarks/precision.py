"""The demo's figures by every engine and precision: float32 to four digits, bfloat16 within 0.05 points.

    make demo && python benchmarks/precision.py [--demo work_dirs/orl_demo] [--json FILE]

Verification and IJB tables of the demo's model (what ``make demo`` leaves) are computed anew with Paddle's dynamic
graph, with OpenVINO in float32 and, where the processor has it, in bfloat16. The demo's sets are small: one pair that
changes sides moves a figure by 0.11 to 1.7 points, its step. So the sets are judged once more with both images of each
pair shifted by a pixel up, down, left, right (81 pairs of one, steps below 0.003 points). A difference beyond the bar
is an error in figures whose step is below the bar; how many of the coarser ones change, and by how many steps, is told.
Cases ``precision/<engine>/<precision>``: ``largest_difference`` in points (percent) of any figure,
``largest_resolved`` of those whose step is below the bar, ``least_cosine`` to the dynamic graph's embedding.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.common import build_parser, read_options, write_report
from eval.embed import Embedder, load_embedder
from eval.features import protocol_features
from eval.metrics import distance_metrics
from eval.pairs import load_sets, verify
from eval.protocols import read_ijb
from eval.tables import Setting, evaluate_templates
from utils.errors import UserError, one_line_errors
from utils.vectors import scale_to_unit

BARS = {"fp32": 0.005, "bf16": 0.05}  # points: half a unit of the fourth digit; the bar of bfloat16


@dataclass(frozen=True)
class Figure:
    """A rate in points; ``step``: the least change, what one pair makes."""

    value: float
    step: float


def figures(embedder: Embedder, demo: Path) -> tuple[dict[str, Figure], np.ndarray]:
    """(every rate that the two commands print by default and those of shifted sets; unit embeddings of the latter)."""
    found, embeddings = {}, []
    sets = load_sets(demo / "data", ["orl", "orl_hard"], size=embedder.input_size)
    for name, result in verify(embedder, sets).items():
        for flip, metrics in (("flip", result.metrics), ("no flip", result.no_flip)):
            found |= _rates(metrics, sets[name][1], name, flip)
    for name, (images, same_P) in sets.items():
        unit_KUD, image_N = _shifted_embeddings(embedder, images)
        embeddings.append(unit_KUD.reshape(-1, unit_KUD.shape[-1]))
        unit_KND = unit_KUD[:, image_N]
        # Pair by pair, so that all copies of a pair stay in one fold.
        cosine_P = np.einsum("ipd,jpd->pij", unit_KND[:, 0::2], unit_KND[:, 1::2]).reshape(-1)
        same_P = np.repeat(same_P, len(unit_KND) ** 2)
        found |= _rates(distance_metrics(2 - 2 * cosine_P, same_P), same_P, name, "shifted")
        del found[f"{name} val, shifted"]  # however often it is moved, the closest impostor pair alone decides it
    protocol = read_ijb(demo / "data" / "IJB", "ORL")
    with tempfile.TemporaryDirectory() as folder:
        features = protocol_features(protocol, lambda: embedder, "weights", Path(folder) / "f.npy")
        step = 100 / protocol.same_P.sum()
        for point in evaluate_templates(protocol, features.feature_N2D, Setting()).table:
            found[f"IJB TAR@FAR={point.far:g}"] = Figure(100 * point.nearest, step)
            found[f"IJB strict TAR@FAR={point.far:g}"] = Figure(100 * point.strict, step)
    return found, np.concatenate(embeddings)


def _rates(metrics, same_P: np.ndarray, name: str, kind: str) -> dict[str, Figure]:
    num_same, num_other = int(same_P.sum()), int((~same_P).sum())
    steps = {"accuracy": len(same_P), "val": num_same, "auc": num_same * num_other, "eer": min(num_same, num_other)}
    return {
        f"{name} {figure}, {kind}": Figure(100 * getattr(metrics, figure), 100 / count)
        for figure, count in steps.items()
    }


def _shifted_embeddings(embedder: Embedder, image_NHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(unit embeddings [9, U, D] of the different images moved by -1, 0, 1 pixel both ways; which a row is [N])."""
    image_UHWC, image_N = np.unique(image_NHWC, axis=0, return_inverse=True)
    _, height, width, _ = image_UHWC.shape
    padded = np.pad(image_UHWC, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    moved = np.concatenate([padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3)])
    unit_ND = scale_to_unit(embedder.start(moved, "both").result().sum(1).astype(np.float64))
    return unit_ND.reshape(9, len(image_UHWC), -1), image_N.reshape(-1)


def compare(found: dict[str, Figure], expected: dict[str, Figure], bar: float) -> tuple[dict, str]:
    """(a case's fields, what to print)."""
    both = {name: (found[name].value, figure.value) for name, figure in expected.items()}
    difference = {name: abs(ours - other) for name, (ours, other) in both.items() if not np.isnan([ours, other]).all()}
    fine = {name: value for name, value in difference.items() if expected[name].step <= bar}
    coarse = {name: value for name, value in difference.items() if name not in fine}
    worst, worst_fine = max(difference, key=difference.get), max(fine, key=fine.get)
    changed = {name: value / expected[name].step for name, value in coarse.items() if value > bar}
    text = (
        f"{len(fine)} figures with steps below {bar} points: at most {fine[worst_fine]:.4f} from the dynamic graph's "
        f"({worst_fine}: {found[worst_fine].value:.4f} against {expected[worst_fine].value:.4f}); "
        f"{len(changed)} of {len(coarse)} coarser ones differ"
    )
    if changed:
        most = max(changed, key=changed.get)
        text += f", at most {difference[worst]:.4f} points ({worst}, in steps of {expected[worst].step:.4f}) "
        text += f"and {changed[most]:.0f} steps ({most}, in steps of {expected[most].step:.4f})"
    fields = {
        "value": difference[worst],
        "largest_difference": difference[worst],
        "figure": worst,
        "step": expected[worst].step,
        "largest_resolved": fine[worst_fine],
        "figure_resolved": worst_fine,
        "num_resolved": len(fine),
        "num_coarse": len(coarse),
        "num_coarse_changed": len(changed),
    }
    return fields, text


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = build_parser(__doc__)
    parser.add_argument("--demo", type=Path, default=Path("work_dirs/orl_demo"), help="what make demo left")
    args = read_options(parser, argv)
    run = str(args.demo / "run")
    expected, reference_ND = figures(load_embedder(run, engine="dynamic"), args.demo)
    cases, bad = [], []
    for precision, bar in BARS.items():
        try:
            embedder = load_embedder(run, engine="openvino", precision=precision)
        except UserError as error:
            if precision == "fp32":
                raise
            print(f"openvino, bf16: not measured ({error})")
            continue
        found, embedding_ND = figures(embedder, args.demo)
        fields, text = compare(found, expected, bar)
        cosine = float((embedding_ND * reference_ND).sum(1).min())
        print(f"openvino, {precision}: {text}; least cosine {cosine:.6f} ({len(embedding_ND)} images)")
        named = {"name": f"precision/openvino/{precision}", "metric": "points", "runs": 1}
        cases.append({**named, **fields, "least_cosine": cosine})
        if not fields["largest_resolved"] <= bar:
            which, points = fields["figure_resolved"], fields["largest_resolved"]
            bad.append(f"{precision}: {which} differs by {points:.4f} points, {bar} allowed")
    write_report(args.json, cases, "all threads", ("paddlepaddle", "openvino", "numpy"))
    if bad:
        raise UserError("; ".join(bad))


if __name__ == "__main__":
    main()

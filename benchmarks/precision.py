"""The demo's figures by every engine and precision: float32 to four digits, bfloat16 within 0.05 points.

    make demo && python benchmarks/precision.py [--demo work_dirs/orl_demo] [--json FILE]

Verification and IJB tables of the demo's model (what ``make demo`` leaves) are computed anew with Paddle's dynamic
graph, with OpenVINO in float32 and, where the processor has it, in bfloat16. A difference beyond the bars is an error.
The sets are small: one pair that changes sides is more than the bar of bfloat16, so the bars ask that none does.
Cases ``precision/<engine>/<precision>`` with ``largest_difference`` in points (percent) of any figure.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from eval.embed import Embedder, load_embedder
from eval.features import protocol_features
from eval.pairs import load_sets, verify
from eval.protocols import read_ijb
from eval.tables import Setting, evaluate_templates
from utils.errors import UserError, one_line_errors

BARS = {"fp32": 0.005, "bf16": 0.05}  # points: half a unit of the fourth digit; the bar of bfloat16


def figures(embedder: Embedder, demo: Path) -> dict[str, float]:
    """Every rate that the two commands print by default, in points, by name."""
    found = {}
    for name, result in verify(
        embedder, load_sets(demo / "data", ["orl", "orl_hard"], size=embedder.input_size)
    ).items():
        for flip, metrics in (("flip", result.metrics), ("no flip", result.no_flip)):
            for figure in ("accuracy", "val", "auc", "eer"):
                found[f"{name} {figure}, {flip}"] = 100 * getattr(metrics, figure)
    protocol = read_ijb(demo / "data" / "IJB", "ORL")
    with tempfile.TemporaryDirectory() as folder:
        features = protocol_features(protocol, lambda: embedder, "weights", Path(folder) / "f.npy")
        for point in evaluate_templates(protocol, features.feature_N2D, Setting()).table:
            found[f"IJB TAR@FAR={point.far:g}"] = 100 * point.nearest
            found[f"IJB strict TAR@FAR={point.far:g}"] = 100 * point.strict
    return found


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("work_dirs/orl_demo"), help="what make demo left")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    run = str(args.demo / "run")
    expected, cases, bad = figures(load_embedder(run, engine="dynamic"), args.demo), [], []
    for precision in BARS:
        try:
            embedder = load_embedder(run, engine="openvino", precision=precision)
        except UserError as error:
            if precision == "fp32":
                raise
            print(f"openvino, bf16: not measured ({error})")
            continue
        found = figures(embedder, args.demo)
        difference = {name: abs(found[name] - value) for name, value in expected.items()
                      if not (np.isnan(value) and np.isnan(found[name]))}  # fmt: skip
        worst = max(difference, key=difference.get)
        num_other = sum(value > BARS[precision] for value in difference.values())
        print(
            f"openvino, {precision}: {num_other} of {len(difference)} figures beyond {BARS[precision]} points, at most "
            f"{difference[worst]:.4f} from the dynamic graph's ({worst}: {found[worst]:.4f} against "
            f"{expected[worst]:.4f})"
        )
        cases.append({"name": f"precision/openvino/{precision}", "metric": "points", "value": difference[worst],
                      "largest_difference": difference[worst], "figure": worst, "runs": 1})  # fmt: skip
        if not difference[worst] <= BARS[precision]:
            bad.append(f"{precision}: {worst} differs by {difference[worst]:.4f} points, {BARS[precision]} allowed")
    if args.json:
        report = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            "versions": {name: version(name) for name in ("paddlepaddle", "openvino", "numpy")},
            "cases": cases,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if bad:
        raise UserError("; ".join(bad))


if __name__ == "__main__":
    main()

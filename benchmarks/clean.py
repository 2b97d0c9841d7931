"""Cleaning judged on planted faults, beside a plain nearest-centre rule; and its memory and speed at MS1MV2's size.

    python benchmarks/clean.py faults --json faults.json   # trains two small networks, 5 minutes each
    python benchmarks/clean.py faults --first work_dirs/a --second work_dirs/b  # run folders of an earlier call
    python benchmarks/clean.py scale --images 580000 --json scale.json  # a tenth of the images, all 85,742 identities

``faults``: the 40 people of the ORL set in two halves. One network is trained on each half and cleans the OTHER half,
people it has never seen, with faults planted (5 % of the labels wrong, two labels that hold two people, two people
under two labels, three people of the test set in the data set), twenty times. What can be chosen (``Rule``; the plain
rule's thresholds) is chosen by F1 on the half that is not judged. ``defaults`` are the figures of the rule that
``tools/clean.py`` has.

``scale``: random people in 512 dimensions with 1 % of the labels wrong, features on disk; peak memory above the process
after its imports, seconds of every pass, and what the whole set would take by the number of products.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from prettytable import PrettyTable

from benchmarks.common import ROOT, case, read_options, timed, write_report
from tools.clean.analysis import analyse
from tools.clean.faults import KINDS, Planted, Score, best_threshold, findings_of, judge, nearest_centre_scores, plant
from tools.clean.rows import Rows
from tools.clean.statistics import DEFAULT_RULE, Rule
from tools.demo.data import load_faces
from utils.errors import CommandLine, UserError, one_line_errors
from utils.launch import launch_command
from utils.system import peak_bytes, reset_peak
from utils.vectors import scale_to_unit

HALVES = ("1-20", "21-40")
RULES = tuple(Rule(deviations=d, share=s) for d in (2.0, 2.5, 3.0) for s in (0.02, 0.05, 0.1))
MS1MV2 = (5_822_653, 85_742)
WEBFACE42M = (42_474_557, 2_059_906)


def train(people_unseen: str, folder: Path) -> Path:
    """The demo's network, trained on everybody but ``people_unseen``."""
    run = folder / f"run_without_{people_unseen}"
    if not (run / "backbone.pdparams").is_file():
        data = folder / f"data_without_{people_unseen}"
        cache = ["--cache", str(ROOT / "data" / "orl")]
        settings = [f"data.root={data}", f"run.output={run}", "checkpoint.resume=never"]
        prepare = ["tools/demo/data.py", "--output", str(data), *cache, "--unseen", people_unseen, "--seed", "1"]
        learn = launch_command(2, "train.py", ["configs/orl_demo.yaml", *settings], folder / "log")
        for command in ([sys.executable, *prepare], learn):
            subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return run


def embed(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """(unit rows float32 [400, D], person of each)."""
    from tools.demo.stages import network_embed

    faces = load_faces(ROOT / "data" / "orl")
    raw = network_embed(run)(faces.image_NHW)
    return scale_to_unit(raw).astype(np.float32), faces.person_N


def judge_sets(sets: list[Planted], find: Callable[[Planted], dict[str, set]]) -> dict[str, Score]:
    """Scores of each kind over the data sets."""
    totals = {kind: Score() for kind in KINDS}
    for planted in sets:
        found = find(planted)
        totals = {kind: totals[kind] + judge(found[kind], planted.truth[kind]) for kind in KINDS}
    return totals


def plain_findings(unit_ND: np.ndarray, limits: dict[str, float], planted: Planted) -> dict[str, set]:
    """What the nearest-centre rule finds at given thresholds."""
    scores = nearest_centre_scores(unit_ND, planted)
    return {kind: {which for which, value in scores[kind].items() if value > limits[kind]} for kind in KINDS}


def run_faults(args: argparse.Namespace) -> list[dict]:
    """Both halves, ours and the plain rule."""
    runs = [args.first or train(HALVES[1], args.output), args.second or train(HALVES[0], args.output)]
    halves = []  # (rows of the half that its network has not seen, planted sets of it)
    for run, people in zip(runs, (range(21, 41), range(1, 21)), strict=True):
        unit_ND, person_N = embed(run)
        mine = np.isin(person_N, list(people))
        halves.append((unit_ND[mine], [plant(person_N[mine], seed) for seed in range(args.sets)]))
    cases = []
    columns = [f"{whose} {what}" for whose in ("ours", "plain") for what in ("precision", "recall", "F1")]
    table = PrettyTable(["people judged", "fault", "planted", *columns, "defaults F1"])
    for judged, other in ((0, 1), (1, 0)):
        (unit_ND, sets), (other_ND, other_sets) = halves[judged], halves[other]
        rule_scores = {rule: judge_sets(other_sets, partial(findings_of, other_ND, rule=rule)) for rule in RULES}
        chosen = max(RULES, key=lambda rule: sum(score.f1 for score in rule_scores[rule].values()))
        given = [(nearest_centre_scores(other_ND, planted), planted.truth) for planted in other_sets]
        limits = {kind: best_threshold((scores[kind], truth[kind]) for scores, truth in given) for kind in KINDS}
        limits["outliers"] = 0.0
        ours = judge_sets(sets, partial(findings_of, unit_ND, rule=chosen))
        plain = judge_sets(sets, partial(plain_findings, unit_ND, limits))
        usual = judge_sets(sets, partial(findings_of, unit_ND, rule=DEFAULT_RULE))
        people = HALVES[1 - judged]
        print(f"people {people}: {chosen}, plain thresholds " + ", ".join(f"{k} {v:.3f}" for k, v in limits.items()))
        for kind in KINDS:
            a, b = ours[kind], plain[kind]
            shown = (a.precision, a.recall, a.f1, b.precision, b.recall, b.f1, usual[kind].f1)
            table.add_row([people, kind, a.planted, *(f"{value:.3f}" for value in shown)])
            more = {"precision": a.precision, "recall": a.recall, "runs": args.sets, "spread": []}
            more |= {"peer_precision": b.precision, "peer_recall": b.recall}
            name, f1 = f"clean/{kind}/{people}", ([a.f1], [max(b.f1, 1e-9)])
            cases.append(case(name, "f1", *f1, "nearest centre", **more))
    print(table)
    return cases


def make_features(path: Path, num_images: int, num_identities: int, size: int, seed: int = 0) -> np.ndarray:
    """Write random people as ``.npy``; returns labels, 1 % of which are wrong. Images of a label stand together."""
    rng = np.random.default_rng(seed)
    more = rng.integers(0, num_identities, num_images - num_identities)
    person_N = np.sort(np.concatenate([np.arange(num_identities), more]))
    centre_LD = rng.standard_normal((num_identities, size), np.float32)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (num_images, size))
    for first in range(0, num_images, 1 << 14):
        part = person_N[first : first + (1 << 14)]
        out[first : first + len(part)] = centre_LD[part] + 0.8 * rng.standard_normal((len(part), size), np.float32)
    out.flush()
    label_N = person_N.copy()
    wrong = rng.permutation(num_images)[: num_images // 100]
    label_N[wrong] = rng.integers(0, num_identities, len(wrong))
    return label_N


def run_scale(args: argparse.Namespace) -> list[dict]:
    """Memory and time of the analysis."""
    if args.identities > args.images:
        raise UserError(f"--identities {args.identities}: more than --images {args.images}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder) / "features.npy"
        label_N = make_features(path, args.images, args.identities, args.size)
        rows = Rows.of(np.load(path, mmap_mode="r"), label_N)
        reset_peak()
        before = peak_bytes()
        found, seconds = timed(analyse, rows)
        peak_mb = (peak_bytes() - before) / 2**20
    products = 2 * args.size * args.identities * (args.images + args.identities)
    wrong, problem = args.images // 100, f"{args.images:,} images x {args.identities:,} identities x {args.size}"
    print(f"{problem}: {seconds:.0f} s, peak {peak_mb:.0f} MB")
    print(f"beside {args.images * args.size * 4 / 2**20:.0f} MB of features on disk")
    print(f"{len(found.outlier_F):,} images called wrong, about {wrong:,} are; {products / seconds / 1e9:.0f} GFLOP/s")
    for name, (images, identities) in {"MS1MV2": MS1MV2, "WebFace42M": WEBFACE42M}.items():
        whole = 2 * 512 * identities * (images + identities)
        hours = whole / products * seconds / 3600
        print(f"{name}, {images:,} x {identities:,} x 512: {whole:.1e} operations, {hours:.1f} h at this rate")
    name = f"clean/{args.images}/{args.identities}"
    return [
        case(name, what, [value], None, "", value=value) for what, value in (("seconds", seconds), ("peak_mb", peak_mb))
    ]


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = CommandLine(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    faults = commands.add_parser("faults", help="precision and recall on planted faults")
    faults.add_argument("--output", type=Path, default=Path("work_dirs/clean_faults"), help="where networks are kept")
    faults.add_argument("--first", type=Path, help="run folder of a network trained on people 1-20")
    faults.add_argument("--second", type=Path, help="run folder of a network trained on people 21-40")
    faults.add_argument("--sets", type=int, default=20, help="data sets with planted faults, each half")
    faults.set_defaults(run=run_faults)
    scale = commands.add_parser("scale", help="memory and time on random features")
    scale.add_argument("--images", type=int, default=MS1MV2[0] // 10)
    scale.add_argument("--identities", type=int, default=MS1MV2[1])
    scale.add_argument("--size", type=int, default=512)
    scale.add_argument("--folder", type=Path, help="where the features are written (default: the temporary folder)")
    scale.set_defaults(run=run_scale)
    for command in (faults, scale):
        command.add_argument("--json", type=Path)
    args = read_options(parser, argv)
    cases = args.run(args)
    write_report(args.json, cases, "all threads", ("numpy",))


if __name__ == "__main__":
    main()

"""The whole path on real faces: prepare, train on two ranks, evaluate, compare, report.

Launch: ``make demo`` or ``python tools/demo.py [--unseen 31-40] [--seed 2048] [--output work_dirs/orl_demo]``

Leaves ``results.json`` (every figure shown) and ``report.html`` in the output folder. Each stage is the command that a
user would type; it is printed before it runs.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
import zlib  # noqa: F401 - before paddle: 2.6 exports a zlib of its own, on which Python's then crashes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from prettytable import PrettyTable

from eval.embed import load_embedder
from tools.demo import report
from tools.demo.baselines import all_pairs, fit_baselines
from tools.demo.compare import Comparison, Embed, compare
from tools.demo.data import NUM_PEOPLE, Faces, load_faces, parse_people
from utils.errors import COUNT, CommandLine, UserError, check_ranges, one_line_errors
from utils.launch import launch_command

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = "configs/orl_demo.yaml"


def run_stage(title: str, command: list[str], threads: int) -> None:
    """Run one command of the README in a fresh interpreter; end with its exit status if it fails."""
    print(f"\n=== {title}\n$ {shlex.join(['python', *command])}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=False)
    if done.returncode != 0:
        raise UserError(
            f"{title}: `{shlex.join(command)}` ended with exit status {done.returncode}; see its output above"
        )


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Record the wall time of a stage."""
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 1)


def network_embed(run_dir: Path) -> Embed:
    """The trained backbone as a function of grey images: embedding plus that of the mirror image."""
    embedder = load_embedder(str(run_dir))
    size = (embedder.input_size, embedder.input_size)

    def embed(image_NHW: np.ndarray) -> np.ndarray:
        small = [cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in image_NHW]
        image_NHWC = np.repeat(np.stack(small)[..., None], 3, axis=-1)
        return embedder(image_NHWC) + embedder(image_NHWC, flip=True)

    return embed


def print_table(methods: dict[str, Comparison]) -> None:
    """Balanced accuracy on every pair, ten-fold accuracy on the sets, TAR on the templates."""
    first = next(iter(methods.values())).figures
    table = PrettyTable(
        ["method", "balanced accuracy", *first["sets"], *(f"TAR@FAR={point['far']:g}" for point in first["templates"])]
    )
    table.align["method"] = "l"
    for name, method in methods.items():
        figures = method.figures
        accuracies = [f"{entry['accuracy']:.4f}+-{entry['accuracy_std']:.4f}" for entry in figures["sets"].values()]
        tars = [f"{100 * point['strict']:.2f}" for point in figures["templates"]]
        table.add_row([name, f"{figures['balanced_accuracy']:.4f}", *accuracies, *tars])
    print(table, flush=True)


def write_report(methods: dict[str, Comparison], unseen: Faces, results: dict, output: Path) -> None:
    """Pictures, ``report.html`` and ``results.json``."""
    same_P = all_pairs(unseen.person_N)[2]
    network = methods[report.NETWORK]
    pictures = {
        "ROC on the unseen people": output / "roc.png",
        "Who looks like whom": output / "similarity.png",
        "Training": output / "training_curve.png",
        "The most confident mistakes": output / "errors.png",
    }
    report.draw_roc(methods, same_P, output / "roc.png")
    report.draw_similarity(network.embedding_ND, unseen.person_N, output / "similarity.png")
    report.draw_training_curve(report.read_metrics(output / "run" / "metrics.jsonl"), output / "training_curve.png")
    report.draw_errors(network, unseen, output / "errors.png")
    report.write_html(results, pictures, output / "report.html")
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def run_demo(unseen_text: str, seed: int, output: Path, cache: Path, overrides: list[str]) -> dict:
    """All stages for one choice of unseen people; returns what ``results.json`` holds."""
    people = parse_people(unseen_text)
    seconds: dict[str, float] = {}
    data, run_dir = output / "data", output / "run"
    with timed(seconds, "prepare"):
        options = ["--output", str(data), "--cache", str(cache), "--unseen", unseen_text, "--seed", str(seed)]
        run_stage("prepare real faces", ["tools/demo/data.py", *options], threads=2)
    with timed(seconds, "train"):
        settings = [
            f"data.root={data}",
            f"run.output={run_dir}",
            f"run.seed={seed}",
            "checkpoint.resume=never",
            *overrides,
        ]
        command = launch_command(2, "train.py", [CONFIG, *settings], output / "log")
        run_stage("train on two ranks", command[1:], threads=1)
    with timed(seconds, "verification"):
        options = ["--model", str(run_dir), "--data-dir", str(data), "--target", "orl,orl_hard"]
        options += ["--result-dir", str(output / "verification")]
        run_stage("verification", ["eval/verification.py", *options], threads=2)
    with timed(seconds, "ijb"):
        options = ["--model", str(run_dir), "--image-path", str(data / "IJB"), "--target", "ORL"]
        run_stage("IJB-shaped templates", ["eval/ijb.py", *options, "--result-dir", str(output / "ijb")], threads=2)
    print("\n=== the same pairs, by simpler means", flush=True)
    with timed(seconds, "compare"):
        faces = load_faces(cache)
        seen, unseen = faces.of([p for p in range(1, NUM_PEOPLE + 1) if p not in people]), faces.of(people)
        embeds = {report.NETWORK: network_embed(run_dir), **fit_baselines(seen.image_NHW, seen.person_N)}
        methods = {name: compare(name, embed, unseen, data) for name, embed in embeds.items()}
    print_table(methods)
    figures = {name: method.figures for name, method in methods.items()}
    results = {
        "accuracy": figures[report.NETWORK]["sets"]["orl"]["accuracy"],
        "balanced_accuracy": figures[report.NETWORK]["balanced_accuracy"],
        "baselines": {name: row["balanced_accuracy"] for name, row in figures.items() if name != report.NETWORK},
        "unseen": unseen_text,
        "seed": seed,
        "num_train_people": NUM_PEOPLE - len(people),
        "num_unseen_people": len(people),
        "num_pairs": len(next(iter(methods.values())).score_P),
        "methods": list(figures.values()),
        "seconds": seconds,
        "python": platform.python_version(),
        "config": (run_dir / "config.yaml").read_text(),
    }
    with timed(seconds, "report"):
        write_report(methods, unseen, results, output)
    seconds["total"] = round(sum(seconds.values()), 1)
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"balanced accuracy on {results['num_pairs']:,} unseen pairs: {results['balanced_accuracy']:.4f}")
    print(f"{seconds['total']:.0f} s in all; open {output / 'report.html'}", flush=True)
    return results


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """One demo run, or with ``--splits`` one for each quarter of the people."""
    parser = CommandLine(__doc__)
    parser.add_argument("--unseen", default="31-40", help="people held out, e.g. 1-10")
    parser.add_argument("--seed", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--cache", type=Path, default=Path("data/orl"), help="where the downloaded faces are kept")
    parser.add_argument("--splits", action="store_true", help="1-10, 11-20, 21-30 and 31-40 in turn, and their mean")
    parser.add_argument("overrides", nargs="*", help="section.key=value for the training configuration")
    args = parser.parse_args(argv)
    check_ranges(args, seed=COUNT)
    if not args.splits:
        output = args.output or Path("work_dirs/orl_demo")
        run_demo(args.unseen, args.seed, output, args.cache, args.overrides)
        return
    output = args.output or Path("work_dirs/orl_splits")
    splits = {}
    for unseen in ("1-10", "11-20", "21-30", "31-40"):
        results = run_demo(unseen, args.seed, output / unseen, args.cache, args.overrides)
        splits[unseen] = {report.NETWORK: results["balanced_accuracy"], **results["baselines"]}
    splits["mean"] = {name: float(np.mean([row[name] for row in splits.values()])) for name in splits["1-10"]}
    table = PrettyTable(["unseen people", *splits["mean"]])
    for unseen, row in splits.items():
        table.add_row([unseen, *(f"{value:.4f}" for value in row.values())])
    print(table)
    (output / "splits.json").write_text(json.dumps(splits, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Are two faces the same person?

    python tools/compare.py a.jpg b.jpg                                   # by the newest run under work_dirs/
    python tools/compare.py a.jpg b.jpg --model work_dirs/run --detector yunet.onnx
    python tools/compare.py a.jpg b.jpg --model w600k_r50.onnx --calibrate faces/lfw.bin --far 1e-3

Prints the cosine similarity, the threshold, and the threshold's false-accept rate: how often two different people of
the calibration set score above it. The threshold is the lowest whose rate does not exceed ``--far``, measured on a .bin
set: ``--calibrate``, else the verification sets of the run's own configuration. The measurement is kept in
``threshold.json`` beside the weights and used again for the same weights and rate. ``--threshold`` sets it by hand;
its rate is measured on the same sets, if there are any.
Exit status: 0, whichever the answer.
"""

import argparse
import json
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from eval.bins import load_bin
from eval.embed import Embedder, load_embedder, run_settings
from eval.options import add_device_option, add_engine_options, add_face_options
from eval.remarks import score_remarks
from utils import distributed
from utils.errors import CommandLine, UserError, check_ranges, one_line_errors
from utils.files import write_json
from utils.photos.detect import build_detector
from utils.photos.faces import AlignedFaces, Face, detect_faces, read_landmarks
from utils.vectors import unit_rows


def unit_embedding(embedder: Embedder, images_NHWC: np.ndarray) -> np.ndarray:
    """[N, D] float64 of unit length: embedding plus that of the mirror image."""
    unit_ND = unit_rows(embedder(images_NHWC) + embedder(images_NHWC, flip=True), "embeddings")
    if not unit_ND.any(1).all():
        raise UserError("an embedding is zero; check the weights")
    return unit_ND


def measure_threshold(embedder: Embedder, sets: list[Path], far: float, threshold: float | None = None) -> dict:
    """The lowest cosine threshold whose false-accept rate on the sets' different pairs does not exceed ``far``.

    "Same" means strictly above. With fewer than 1 / far different pairs it is their highest score, and the rate is 0
    of so many. A ``threshold`` that is given is only measured.

    Returns:
        ``threshold``, ``far`` (measured), ``tar`` (of the same pairs), ``different`` and ``same`` (pairs), ``sets`` and
        their ``stamps`` (size and time of each file), ``target`` and ``identity`` (of the weights).
    """
    same_scores, different_scores = [], []
    for path in sets:
        images, same_P = load_bin(path, (embedder.input_size, embedder.input_size))
        embedding_ND = unit_embedding(embedder, images)
        score_P = np.sum(embedding_ND[0::2] * embedding_ND[1::2], axis=1)
        same_scores.append(score_P[same_P])
        different_scores.append(score_P[~same_P])
    same, different = np.concatenate(same_scores), np.sort(np.concatenate(different_scores))[::-1]
    if not len(different):
        raise UserError(f"{sets[0]}: no pairs of different people, so no false-accept rate can be measured")
    for warning in score_remarks(np.concatenate([same, different])):
        print(f"warning: {', '.join(path.name for path in sets)}: {warning}")
    if threshold is None:
        threshold = float(different[min(int(far * len(different)), len(different) - 1)])
    return {
        "threshold": threshold,
        "far": float(np.mean(different > threshold)),
        "tar": float(np.mean(same > threshold)) if len(same) else None,
        "different": len(different),
        "same": len(same),
        "sets": [str(path) for path in sets],
        "stamps": _stamps(sets),
        "target": far,
        "identity": embedder.identity,
    }


def _stamps(sets: list[Path]) -> list[list[int]]:
    return [[path.stat().st_size, path.stat().st_mtime_ns] for path in sets]


def find_threshold(embedder: Embedder, model: Path, sets: list[Path], far: float) -> dict | None:
    """The kept measurement for these weights and this rate, a new one, or None if there is no set to measure on."""
    kept = (model if model.is_dir() else model.parent) / "threshold.json"
    if kept.is_file():
        try:
            found = json.loads(kept.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{kept}: damaged; delete it to measure the threshold again") from None
        wanted = {"identity": embedder.identity, "target": far}
        if sets:  # a set of the same name may be another one meanwhile
            wanted |= {"sets": [str(path) for path in sets], "stamps": _stamps(sets)}
        if all(found.get(key) == value for key, value in wanted.items()):
            return found
    if not sets:
        return None
    found = measure_threshold(embedder, sets, far)
    try:
        write_json(kept, found)
    except OSError as error:
        print(f"the threshold cannot be kept in {kept} ({error.strerror})", file=sys.stderr)
    return found


def run_sets(model: Path) -> list[Path]:
    """The verification sets that a run's configuration names, where their files are there."""
    verify, data = run_settings(model if model.is_dir() else model.parent, "verify", "data") or ({}, {})
    root, sets = verify.get("root") or data.get("root") or ".", verify.get("sets")
    root = Path(str(root[0] if isinstance(root, list) else root))  # of several data sets the first
    names = map(str, sets if isinstance(sets, list) else [])
    paths = [Path(name) if name.endswith(".bin") else root / f"{name}.bin" for name in names]
    return [path for path in paths if path.is_file()]


def newest_run(folder: Path = Path("work_dirs")) -> Path:
    """The run directory whose weights were written last."""
    weights = [path for depth in ("*", "*/*") for path in folder.glob(f"{depth}/backbone.pdparams")]
    found = [path for path in weights if path.with_name("config.yaml").is_file()]
    if not found:
        raise UserError(f"no run with weights under {folder}/; name a model: --model RUN_OR_WEIGHTS")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def two_faces(args: argparse.Namespace) -> list[Face]:
    """The two faces: crops, of a landmark list, or the largest that the detector finds in each photo."""
    if args.landmarks is not None:
        listed = {face.path.resolve(): face for face in read_landmarks(args.landmarks, args.first.parent)}
        missing = [path for path in (args.first, args.second) if path.resolve() not in listed]
        if missing:
            raise UserError(f"{args.landmarks}: no landmarks of {missing[0]} in it")
        return [listed[args.first.resolve()], listed[args.second.resolve()]]
    if args.detector is None:
        return [Face(args.first), Face(args.second)]
    faces, empty = detect_faces([args.first, args.second], build_detector(args.detector, args.min_score), every=False)
    if empty:
        raise UserError(f"{empty[0]}: no face found; lower --min-score?")
    return faces


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = CommandLine(__doc__)
    parser.add_argument("first", type=Path, help="image of one face")
    parser.add_argument("second", type=Path, help="image of another")
    parser.add_argument("--model", type=Path, help="run directory, weights file or .onnx (default: the newest run)")
    parser.add_argument("--network", help="backbone name, where the model does not say it")
    parser.add_argument("--threshold", type=float, help="cosine above which two faces are the same person")
    parser.add_argument("--calibrate", type=Path, nargs="+", default=[], help=".bin sets to measure the threshold on")
    parser.add_argument("--far", type=float, default=1e-3, help="false-accept rate aimed at (default: %(default)s)")
    add_face_options(parser)
    add_engine_options(parser)
    add_device_option(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.far < 1:
        raise UserError(f"--far {args.far}: must be at least 0 and below 1")
    check_ranges(args, min_score=(0, 1))
    if args.threshold is not None and not -1 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold}: a cosine lies in -1 ... 1")
    if args.landmarks is not None and args.detector is not None:
        raise UserError("--landmarks and --detector exclude each other")
    distributed.init(args.device)
    model = args.model or newest_run()
    if args.model is None:
        print(f"model: {model}")
    faces = two_faces(args)
    embedder = load_embedder(model, args.network, args.engine, precision=args.precision)
    crops = AlignedFaces(faces, embedder.input_size, resize=args.resize)
    embedding_2D = unit_embedding(embedder, np.stack([crops[0], crops[1]]))
    similarity = float(embedding_2D[0] @ embedding_2D[1])
    sets = args.calibrate or run_sets(model)
    if args.threshold is not None and not sets:
        answer = "same" if similarity > args.threshold else "different"
        known = f"threshold {args.threshold:.4f} as given (its FAR is unknown: --calibrate lfw.bin measures it)"
        print(f"{answer}: similarity {similarity:.4f}, {known}")
        return
    if args.threshold is not None:
        found = measure_threshold(embedder, sets, args.far, args.threshold)
    else:
        found = find_threshold(embedder, model, sets, args.far)
    if found is None:
        raise UserError(
            f"similarity {similarity:.4f}, but no threshold is known for {model}: name a .bin set to measure it on "
            "(--calibrate lfw.bin), or give --threshold"
        )
    answer = "same" if similarity > found["threshold"] else "different"
    bound = f", below {3 / found['different']:.1e} with 95% confidence" if found["far"] == 0 else ""
    names = ", ".join(Path(path).name for path in found["sets"])
    measured = f"FAR {found['far']:.2e}{bound}: measured on {found['different']} different pairs of {names}"
    print(f"{answer}: similarity {similarity:.4f}, threshold {found['threshold']:.4f} ({measured})")


if __name__ == "__main__":
    main()

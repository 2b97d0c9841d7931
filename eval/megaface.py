"""MegaFace-style identification among distractors, on feature files.

    python eval/megaface.py --probes facescrub.npy --subjects facescrub.txt --distractors megaface.npy --result-dir out

``--probes``: [N, D] features of people with several images each; ``--subjects``: one name a line, line i being row i.
``--distractors``: [M, D] features of other people. ``.npy``, or a text list of single-vector ``.bin`` files as the
MegaFace tools write them (int32 rows, columns, stride, type, then float32).

For every ordered pair (probe, other image of the same person): found at rank k if fewer than k of the first n
distractors score at least as high (``--shuffle SEED`` draws another order of distractors). TAR@FAR: genuine pairs are
those same pairs (each once), impostor pairs are all probe x distractor pairs, FAR strict.

Legend: N probes, M distractors, D embedding size, G genuine pairs.
"""

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from prettytable import PrettyTable

from eval.plots import draw_roc
from eval.report import write_csv, write_json, write_report
from utils.errors import UserError, one_line_errors
from utils.progress import progress_bar

SIZES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
FARS = (1e-6, 1e-5, 1e-4, 1e-3)
_SCORES_PER_BLOCK = 1 << 22
_FLOAT32_MATRIX = 5  # OpenCV's type number of a one-channel float32 matrix


@dataclass(frozen=True)
class DistractorResult:
    """Rank-1 and rank-10 at each number of distractors, TAR at each FAR that the number of impostor pairs resolves."""

    sizes: tuple[int, ...]
    rank_1: tuple[float, ...]
    rank_10: tuple[float, ...]
    fars: tuple[float, ...]
    tar: tuple[float, ...]
    threshold: tuple[float, ...]
    num_genuine: int
    num_impostor: int


def identify_among_distractors(
    probe_ND: np.ndarray,
    subject_N: np.ndarray,
    distractor_MD: np.ndarray,
    sizes: tuple[int, ...] = SIZES,
    fars: tuple[float, ...] = FARS,
    show_progress: bool = False,
) -> DistractorResult:
    """The figures for features that need not be normalised; cosine in float64, distractors block by block.

    ``sizes`` beyond M become M (once). Memory: one block of scores, and the best ``max(fars)`` of all impostor scores.

    Raises:
        ValueError: shapes do not fit, values are not finite, or nobody has two images.
    """
    probe_ND, subject_N = _unit(probe_ND, "probes"), np.asarray(subject_N)
    if subject_N.shape != (len(probe_ND),):
        raise ValueError(f"{subject_N.size} subjects for {len(probe_ND)} probes; each needs one")
    if distractor_MD.ndim != 2 or distractor_MD.shape[1:] != probe_ND.shape[1:] or not len(distractor_MD):
        raise ValueError(
            f"distractors {distractor_MD.shape} for probes {probe_ND.shape}; [n, same size], n > 0, is needed"
        )
    _, inverse_N = np.unique(subject_N, return_inverse=True)
    same_NN = inverse_N[:, None] == inverse_N[None, :]
    np.fill_diagonal(same_NN, False)
    left_G, right_G = np.nonzero(same_NN)
    if not len(left_G):
        raise ValueError(f"none of {len(probe_ND)} probes shares its subject with another; genuine pairs are needed")
    genuine_G = np.einsum("gd,gd->g", probe_ND[left_G], probe_ND[right_G])
    num_distractors = len(distractor_MD)
    sizes = tuple(dict.fromkeys(min(size, num_distractors) for size in sorted(sizes)))
    num_impostor = len(probe_ND) * num_distractors
    fars = tuple(far for far in fars if far * num_impostor >= 1)
    highest = np.empty(0)
    # One more than may be accepted: the threshold lies above that one.
    num_kept = min(num_impostor, math.floor(max(fars, default=0) * num_impostor * (1 + 1e-12)) + 1)
    limit = -np.inf
    better_G, found = np.zeros(len(left_G), np.int64), {}
    height = max(1, _SCORES_PER_BLOCK // len(probe_ND))
    cuts = sorted({*range(0, num_distractors, height), *sizes, num_distractors} - {0})
    start = 0
    with progress_bar("distractors", num_distractors, enabled=show_progress) as advance:
        for stop in cuts:
            scores_NB = probe_ND @ _unit(distractor_MD[start:stop], f"distractors from row {start}").T
            scores_NB.sort(axis=1)
            for probe in range(len(probe_ND)):
                mine = slice(*np.searchsorted(left_G, [probe, probe + 1]))
                better_G[mine] += scores_NB.shape[1] - np.searchsorted(scores_NB[probe], genuine_G[mine], side="left")
            highest = np.concatenate([highest, scores_NB[scores_NB > limit]])
            if len(highest) > num_kept:
                highest = np.partition(highest, len(highest) - num_kept)[-num_kept:]
                limit = highest.min()
            if stop in sizes:
                found[stop] = (float(np.mean(better_G < 1)), float(np.mean(better_G < 10)))
            advance(stop - start)
            start = stop
    highest = np.sort(highest)[::-1]
    once_G = genuine_G[left_G < right_G]
    limits = [_limit(highest, math.floor(far * num_impostor * (1 + 1e-12)), num_impostor) for far in fars]
    return DistractorResult(
        sizes=sizes,
        rank_1=tuple(found[size][0] for size in sizes),
        rank_10=tuple(found[size][1] for size in sizes),
        fars=fars,
        tar=tuple(float(np.mean(once_G > limit)) for limit in limits),
        threshold=tuple(float(limit) for limit in limits),
        num_genuine=len(once_G),
        num_impostor=num_impostor,
    )


def load_features(path: Path) -> np.ndarray:
    """``.npy`` [N, D] (memory-mapped), or a text list of MegaFace ``.bin`` files, relative to the list's folder."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; a .npy of features or a list of .bin files is needed")
    if path.suffix == ".npy":
        try:
            feature_ND = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise UserError(f"{path}: not a .npy file of features ({error})") from None
        if feature_ND.ndim != 2 or feature_ND.dtype.kind != "f":
            raise UserError(f"{path}: {feature_ND.dtype} {feature_ND.shape}; float [images, size] is needed")
        return feature_ND
    rows = [read_megaface_vector(path.parent / line.strip()) for line in path.read_text().splitlines() if line.strip()]
    if not rows or len({row.shape for row in rows}) != 1:
        raise UserError(
            f"{path}: {len(rows)} features of sizes {sorted({len(row) for row in rows})}; one size is needed"
        )
    return np.stack(rows)


def read_megaface_vector(path: Path) -> np.ndarray:
    """One feature: int32 rows, columns, stride in bytes, OpenCV type 5, then float32 values -> [D] float32."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; it is on the list of features")
    data = path.read_bytes()
    header = np.frombuffer(data[:16], "<i4") if len(data) >= 16 else np.zeros(4, "<i4")
    rows, columns, _, kind = (int(value) for value in header)
    if kind != _FLOAT32_MATRIX or rows < 1 or columns < 1 or len(data) != 16 + 4 * rows * columns:
        raise UserError(
            f"{path}: {len(data)} bytes, header {header.tolist()}; not a float32 matrix of the MegaFace tools"
        )
    return np.frombuffer(data[16:], "<f4").astype(np.float32)


def write_megaface_vector(path: Path, vector_D: np.ndarray) -> None:
    """The file ``read_megaface_vector`` reads: one column."""
    vector_D = np.asarray(vector_D, "<f4")
    header = np.array([len(vector_D), 1, 4, _FLOAT32_MATRIX], "<i4")
    Path(path).write_bytes(header.tobytes() + vector_D.tobytes())


def _limit(highest: np.ndarray, allowed: int, num_impostor: int) -> float:
    return float(highest[allowed]) if allowed < num_impostor else -math.inf


def _unit(feature_ND: np.ndarray, what: str) -> np.ndarray:
    feature_ND = np.asarray(feature_ND, np.float64)
    if feature_ND.ndim != 2:
        raise ValueError(f"{what}: shape {feature_ND.shape}; [images, size] is needed")
    norm_N = np.sqrt(np.einsum("ij,ij->i", feature_ND, feature_ND))
    if not np.isfinite(norm_N).all():
        raise ValueError(f"{what}: row {int(np.flatnonzero(~np.isfinite(norm_N))[0])} holds NaN or infinity")
    return feature_ND / np.where(norm_N == 0, 1, norm_N)[:, None]


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probes", type=Path, required=True)
    parser.add_argument("--subjects", type=Path, required=True)
    parser.add_argument("--distractors", type=Path, required=True)
    parser.add_argument(
        "--sizes", default=",".join(map(str, SIZES)), help="numbers of distractors (default: %(default)s)"
    )
    parser.add_argument("--shuffle", type=int, help="seed of another order of distractors")
    parser.add_argument("--label", help="name of this run in reports (default: the probe file's)")
    parser.add_argument("--result-dir", type=Path, default=Path("work_dirs/megaface"))
    parser.add_argument("--report", type=Path, help="also write one self-contained HTML page")
    parser.add_argument("--compare", type=Path, nargs="*", default=[], help="result folders of other runs")
    args = parser.parse_args(argv)
    if not all(size.isdigit() and int(size) > 0 for size in args.sizes.split(",")):
        raise UserError(f"--sizes {args.sizes}: positive whole numbers, separated by commas")
    probe_ND, distractor_MD = load_features(args.probes), load_features(args.distractors)
    if not args.subjects.is_file():
        raise UserError(f"{args.subjects}: no such file; one subject a line, in the order of the probes, is needed")
    subjects = np.array([line.strip() for line in args.subjects.read_text().rstrip("\n").split("\n")])
    if args.shuffle is not None:
        distractor_MD = distractor_MD[np.random.default_rng(args.shuffle).permutation(len(distractor_MD))]
    try:
        sizes = tuple(int(size) for size in args.sizes.split(","))
        result = identify_among_distractors(probe_ND, subjects, distractor_MD, sizes, show_progress=True)
    except ValueError as error:
        raise UserError(f"{args.probes}, {args.distractors}: {error}") from error
    rank_rows = [
        [f"{size:,}", f"{100 * one:.2f}", f"{100 * ten:.2f}"]
        for size, one, ten in zip(result.sizes, result.rank_1, result.rank_10, strict=True)
    ]
    tar_rows = [[f"{far:g}", f"{100 * tar:.2f}"] for far, tar in zip(result.fars, result.tar, strict=True)]
    tables = [
        {"title": "Identification (%)", "head": ["Distractors", "Rank-1", "Rank-10"], "rows": rank_rows},
        {"title": "Verification (%)", "head": ["FAR", "strict TAR"], "rows": tar_rows},
    ]
    for item in tables:
        table = PrettyTable(item["head"])
        table.add_rows(item["rows"])
        print(table)
    folder = args.result_dir
    folder.mkdir(parents=True, exist_ok=True)
    curve = {"far": list(result.fars), "tar": list(result.tar)}
    label = args.label or args.probes.stem
    draw_roc({label: (curve["far"], curve["tar"])}, folder / "roc.png", "Probes against distractors")
    settings = {key: str(value) for key, value in vars(args).items() if value is not None}
    content = {"kind": "megaface", "label": label, "settings": settings, "figures": asdict(result), "tables": tables}
    write_json(folder / "megaface.json", content | {"roc": {"distractors": curve}, "pictures": []})
    write_csv(
        folder / "megaface.csv",
        [{"distractors": row[0].replace(",", ""), "rank_1": row[1], "rank_10": row[2]} for row in rank_rows],
    )
    print(f"results in {folder}")
    if args.report is not None:
        write_report(args.report, [folder, *args.compare])
        print(f"report {args.report}")


if __name__ == "__main__":
    main()

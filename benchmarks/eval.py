"""Evaluation speed and memory: our exact paths beside a straightforward implementation of the reference's steps.

    python benchmarks/eval.py --json eval.json            # full IJB-C size, about four minutes on two cores
    python benchmarks/eval.py --scale 0.05                # a quick look

Problem: synthetic, fixed seed, of full IJB-C size (469,375 x 512 float32 features, 23,124 templates with sparse ids,
15,658,489 pairs of which 19,557 genuine, shuffled). The peer is written here from the description of the steps: a loop
over templates and media, batched row gathers, ``roc_curve`` of scikit-learn; for 1:N a full argsort and a heap of the
best impostors; for verification a loop over folds and thresholds. Both sides work in float64 and may use all threads.
Each measurement of the template paths is a process of its own; ``peak_mb`` is the peak of its resident memory above
what it held once the features and lists were loaded.
"""

import heapq
import json
import math
import sys
import tempfile
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from sklearn.metrics import roc_curve
from sklearn.model_selection import KFold
from sklearn.preprocessing import normalize

from benchmarks.common import build_parser, case, run, timed, told_by
from eval.identification import cmc, pair_recall
from eval.metrics import ACCURACY_GRID, FARS, VAL_GRID, tar_at_far, verification_metrics
from eval.search import search
from eval.templates import pool_templates, score_pairs
from utils.errors import UserError
from utils.system import peak_bytes, reset_peak

NUM_IMAGES, NUM_GALLERY, NUM_PROBES = 469_375, 3_531, 19_593
NUM_PAIRS, NUM_GENUINE, MAX_ID, SIZE = 15_658_489, 19_557, 187_955, 512


def make_problem(folder: Path, scale: float, seed: int = 0) -> None:
    """Write the arrays of the template problem, each as ``.npy``."""
    rng = np.random.default_rng(seed)
    num_gallery, num_probes = max(20, int(NUM_GALLERY * scale)), max(60, int(NUM_PROBES * scale))
    num_templates = num_gallery + num_probes
    num_images = max(3 * num_templates, int(NUM_IMAGES * scale))
    num_pairs = min(int(NUM_PAIRS * scale * scale), num_gallery * num_probes // 2)
    num_genuine = min(num_probes, max(1, int(NUM_GENUINE * scale)))
    template_T = rng.permutation(rng.choice(MAX_ID, num_templates, replace=False) + 1)
    subject_T = np.concatenate([np.arange(num_gallery), rng.integers(0, num_gallery, num_probes)])
    owner_N = rng.permutation(
        np.append(np.arange(num_templates), rng.integers(0, num_templates, num_images - num_templates))
    )
    centre_SD = rng.normal(size=(num_gallery, SIZE)).astype(np.float32)
    # Noise of its own for each template, so that a share of the genuine pairs scores like impostors.
    spread_T = (1.5 + rng.exponential(2.5, num_templates)).astype(np.float32)
    feature_ND = np.empty((num_images, SIZE), np.float32)
    for start in range(0, num_images, 8192):
        owner = owner_N[start : start + 8192]
        noise = rng.normal(size=(len(owner), SIZE)).astype(np.float32)
        feature_ND[start : start + 8192] = centre_SD[subject_T[owner]] + spread_T[owner, None] * noise
    genuine = rng.choice(num_probes, num_genuine, replace=False)
    taken = rng.random(num_gallery * num_probes, dtype=np.float32) < 1.01 * num_pairs / (num_gallery * num_probes)
    taken[subject_T[num_gallery:] * num_probes + np.arange(num_probes)] = False
    cells = rng.permutation(np.flatnonzero(taken))[: num_pairs - num_genuine]
    cells = rng.permutation(np.append(cells, subject_T[num_gallery + genuine] * num_probes + genuine))
    left, right = cells // num_probes, cells % num_probes
    arrays = {
        "feature": feature_ND,
        "template": template_T[owner_N],
        "media": rng.integers(0, max(1, num_images // 3 // num_templates), num_images),
        "left": template_T[left],
        "right": template_T[num_gallery + right],
        "same": subject_T[left] == subject_T[num_gallery + right],
        "gallery": template_T[:num_gallery],
        "probe": template_T[num_gallery:],
        "probe_subject": subject_T[num_gallery:],
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def peer_pool(feature_ND, template_N, media_N):
    """Loop over templates, loop over media."""
    template_T = np.unique(template_N)
    pooled_TD = np.zeros((len(template_T), feature_ND.shape[1]))
    for row, template in enumerate(template_T):
        (index,) = np.where(template_N == template)
        feature, media = feature_ND[index].astype(np.float64), media_N[index]
        means = [np.mean(feature[np.where(media == medium)], axis=0, keepdims=True) for medium in np.unique(media)]
        pooled_TD[row] = np.sum(np.concatenate(means), axis=0)
    return template_T, normalize(pooled_TD)


def peer_table(feature_ND, template_N, media_N, left_P, right_P, same_P):
    """Pool, gather the rows of 100,000 pairs at a time, scikit-learn's curve, nearest FAR from the top down."""
    template_T, pooled_TD = peer_pool(feature_ND, template_N, media_N)
    row_of = np.zeros(template_T.max() + 1, dtype=int)
    row_of[template_T] = np.arange(len(template_T))
    score_P = np.zeros(len(left_P))
    for start in range(0, len(left_P), 100_000):
        part = slice(start, start + 100_000)
        score_P[part] = np.sum(pooled_TD[row_of[left_P[part]]] * pooled_TD[row_of[right_P[part]]], -1)
    fpr, tpr, _ = roc_curve(same_P, score_P)
    fpr, tpr = np.flipud(fpr), np.flipud(tpr)
    return [float(tpr[min(zip(abs(fpr - far), range(len(fpr)), strict=True))[1]]) for far in FARS]


def our_table(feature_ND, template_N, media_N, left_P, right_P, same_P):
    """The same from our library."""
    template_T, pooled_TD = pool_templates(feature_ND, template_N, media_N)
    score_P = score_pairs(template_T, pooled_TD, left_P, right_P)
    return [point.nearest for point in tar_at_far(score_P, same_P, FARS)]


def peer_identification(gallery_GD, probe_QD, mate_Q):
    """All similarities, argsort of every row, the best impostor pairs by a heap."""
    similarity = np.dot(probe_QD, gallery_GD.T)
    order = np.argsort(-similarity)
    num_probes = len(probe_QD)
    rates = [sum(mate_Q[row] in order[row, :rank] for row in range(num_probes)) / num_probes for rank in (1, 5, 10)]
    mates = []
    for row in range(num_probes):
        mates.append(similarity[row, mate_Q[row]])
        similarity[row, mate_Q[row]] = -2.0
    mates, tops = np.array(mates), [math.ceil(num_probes * far) for far in (0.01, 0.1)]
    best = heapq.nlargest(max(tops), similarity[np.where(similarity > -2.0)])
    return rates + [float(np.sum(mates > best[top - 1]) / num_probes) for top in tops]


def our_identification(gallery_GD, probe_QD, mate_Q):
    """The same from our library."""
    found = search(gallery_GD, np.arange(len(gallery_GD)), probe_QD, mate_Q, math.ceil(len(probe_QD) * 0.1))
    return [*cmc(found).rates, *(point.recall for point in pair_recall(found))]


def peer_verification(embedding_ND, same_P, num_folds=10, far_target=1e-3):
    """Loop over folds, loop over thresholds: accuracy, VAL and FAR; curves averaged over the folds."""
    embedding_ND = normalize(embedding_ND.astype(np.float64))
    distance = np.sum(np.square(embedding_ND[0::2] - embedding_ND[1::2]), 1)

    def counts(threshold, index):
        predicted, actual = np.less(distance[index], threshold), same_P[index]
        tp, fp = np.sum(predicted & actual), np.sum(predicted & ~actual)
        return tp, fp, np.sum(actual), np.sum(~actual)

    def accuracy(threshold, index):
        tp, fp, same, different = counts(threshold, index)
        tpr, fpr = (float(tp) / same if same else 0.0), (float(fp) / different if different else 0.0)
        return tpr, fpr, float(tp + different - fp) / len(index)

    grid, fine = np.arange(*ACCURACY_GRID), np.arange(*VAL_GRID)
    accuracies, vals, fars, tprs, fprs = [], [], [], [], []
    for train, test in KFold(num_folds, shuffle=False).split(np.arange(len(distance))):
        best = np.argmax([accuracy(threshold, train)[2] for threshold in grid])
        rates = [accuracy(threshold, test) for threshold in grid]
        tprs.append([rate[0] for rate in rates])
        fprs.append([rate[1] for rate in rates])
        accuracies.append(accuracy(grid[best], test)[2])
        far_train = np.array([fp / different for _, fp, _, different in (counts(t, train) for t in fine)])
        threshold = np.interp(far_target, far_train, fine) if far_train.max() >= far_target else 0.0
        tp, fp, same, different = counts(threshold, test)
        vals.append(tp / same)
        fars.append(fp / different)
    means = [np.mean(accuracies), np.std(accuracies), np.mean(vals), np.std(vals), np.mean(fars)]
    return [*map(float, means), *np.mean(tprs, 0).tolist(), *np.mean(fprs, 0).tolist()]


def our_verification(embedding_ND, same_P):
    """The same from our library."""
    m = verification_metrics(embedding_ND, same_P)
    return [m.accuracy, m.accuracy_std, m.val, m.val_std, m.far, *m.tpr_K.tolist(), *m.fpr_K.tolist()]


def watched(function, *arguments) -> dict:
    """Seconds, those of all threads (they tell a busy machine from slow code) and the figures found."""
    cpu_start = time.process_time()
    figures, seconds = timed(function, *arguments)
    return {"seconds": seconds, "cpu_seconds": time.process_time() - cpu_start, "figures": figures}


CASE_ARRAYS = {
    "features_to_table": ("feature", "template", "media", "left", "right", "same"),
    "one_to_n": ("feature", "template", "media", "gallery", "probe", "probe_subject"),
}
FUNCTIONS = {
    "features_to_table": {"ours": our_table, "peer": peer_table},
    "one_to_n": {"ours": our_identification, "peer": peer_identification},
}


def run_child(case: str, side: str, folder: str) -> None:
    """One measurement, in a process of its own: seconds, peak memory and the figures found."""
    load = {key: np.load(Path(folder, f"{key}.npy")) for key in CASE_ARRAYS[case]}
    if case == "one_to_n":
        template_T, pooled_TD = pool_templates(load["feature"], load["template"], load["media"])
        rows = [np.searchsorted(template_T, load[key]) for key in ("gallery", "probe")]
        load = {"gallery": pooled_TD[rows[0]], "probe": pooled_TD[rows[1]], "mate": load["probe_subject"]}
    held = reset_peak()
    found = watched(FUNCTIONS[case][side], *load.values())
    print(json.dumps(found | {"peak_mb": (peak_bytes() - held) / 2**20}))  # the kernel's own record


def compare(name: str, ours: list[dict], peer: list[dict], metrics: tuple[str, ...]) -> list[dict]:
    """Rows of the result file; the figures of both sides must agree exactly."""
    if ours[0]["figures"] != peer[0]["figures"]:
        raise AssertionError(f"{name}: figures differ: ours {ours[0]['figures'][:12]}, peer {peer[0]['figures'][:12]}")
    sides = {"ours": ours, "peer": peer}
    more = {"peer_runs": len(peer), "figures_identical": True}
    more["cpu_seconds"] = {side: min(run["cpu_seconds"] for run in runs) for side, runs in sides.items()}
    print(f"{name}: CPU seconds of all threads: {more['cpu_seconds']}")
    peer_name = "straightforward numpy + scikit-learn"
    return [
        case(name, metric, *([run[metric] for run in runs] for runs in sides.values()), peer_name, smaller=True, **more)
        for metric in metrics
    ]


def time_verification(runs: int, peer_runs: int, num_pairs: int = 6000) -> list[dict]:
    """6,000 pairs x 512 in this process."""
    rng = np.random.default_rng(0)
    same_P = np.arange(num_pairs) % (num_pairs // 10) < num_pairs // 20
    left = rng.normal(size=(num_pairs, SIZE))
    right = np.where(same_P[:, None], left, 0) + 1.9 * rng.normal(size=(num_pairs, SIZE))
    embedding_ND = np.stack([left, right], 1).reshape(-1, SIZE).astype(np.float32)

    our_verification(embedding_ND[:200], same_P[:100])
    ours, peer = [], []
    for _ in range(peer_runs):  # in turns
        ours += [watched(our_verification, embedding_ND, same_P) for _ in range(runs)]
        peer.append(watched(peer_verification, embedding_ND, same_P))
    return compare("verification/6000", ours, peer, ("seconds",))


def measure(args) -> list[dict]:
    """The cases that are asked for."""
    cases, rows = args.cases.split(","), []
    unknown = [case for case in cases if case not in ("verification", *CASE_ARRAYS)]
    if unknown or args.runs < 1 or not 0 < args.scale <= 1:
        raise UserError(f"--cases {args.cases}, --runs {args.runs}, --scale {args.scale}: known cases, >= 1, in (0, 1]")
    if "verification" in cases:
        rows += time_verification(max(5, args.runs), 3)
    with tempfile.TemporaryDirectory() as folder:
        if set(cases) & set(CASE_ARRAYS):
            make_problem(Path(folder), args.scale)
        for case in (case for case in CASE_ARRAYS if case in cases):
            turns = ["ours"] * args.runs + ["peer"] + ["ours"] * args.runs
            found = [
                told_by(f"{case}, {side}", [__file__, "--child", case, side, folder], threads=None) for side in turns
            ]
            peer = found.pop(args.runs)
            rows += compare(f"ijb/{case}", found, [peer], ("seconds", "peak_mb"))
    return rows


def main(argv: list[str] | None = None) -> None:
    """Run the cases and write the result file."""
    parser = build_parser(__doc__)
    parser.add_argument("--cases", default="verification,one_to_n,features_to_table")
    parser.add_argument("--scale", type=float, default=1.0, help="1 is full IJB-C size")
    runs_help = "runs of our side before the peer's one run, and again after it"
    parser.add_argument("--runs", type=int, default=3, help=runs_help)
    run(parser, argv, measure, "all threads on both sides", ("numpy", "scikit-learn"), run_child)


if __name__ == "__main__":
    main()

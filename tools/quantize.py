"""A network in int8, calibrated on your own faces: an ``.onnx`` file that every command takes as ``--model``.

    python tools/quantize.py --model work_dirs/run --images /data/faces_emore/lfw.bin --output work_dirs/run_int8.onnx
    python tools/quantize.py --model w600k_r50.onnx --images photos/ --detector mtcnn --output w600k_int8.onnx

``--images``: aligned crops in a folder, photos (with ``--landmarks`` or ``--detector``, as in tools/embed.py) or a
``.bin`` set. NNCF chooses the range of every layer on ``--count`` of them, drawn at random, and corrects its biases. Up
to 256 others are never shown to it: on these the cosine of each int8 embedding to its float32 one is taken, and both
networks are timed in turns. Of a ``.bin`` set the accuracy of both is computed too. A mean cosine below
``--least-cosine`` is an error and leaves nothing behind.

Weights use seven of their eight bits, because sums would overflow on processors without VNNI. Quantisation follows
Jacob et al. 2018 (arXiv:1712.05877). Needs the extra ``int8``: pip install -c constraints.txt '.[cpu,int8]'
"""

import argparse
import importlib.util
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
import zlib  # noqa: F401 - before paddle: 2.6 exports a zlib of its own, on which Python's then crashes
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from eval.bins import load_bin
from eval.embed import Embedder, load_embedder
from eval.engines import stdout_to_stderr
from eval.network_input import NetworkInput, read_onnx_input
from eval.options import add_face_options, print_table, print_warnings
from eval.pairs import SetResult, check_set, verify
from eval.remarks import landmark_remarks
from tools.embed import collect_faces
from tools.sources import pixel_digest
from utils import distributed
from utils.errors import COUNT, POSITIVE, CommandLine, UserError, check_ranges, one_line_errors
from utils.files import check_replaceable, written_whole
from utils.photos.faces import AlignedFaces
from utils.progress import progress
from utils.vectors import scale_to_unit

FEWEST = 32  # different images, for calibration and check together
MOST_CHECKED = 256
LEAST_COSINE = 0.97
ROUNDS = 5  # of timing
SECONDS = 0.5  # a turn of timing, at least


def choose(num_images: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows to calibrate on, rows to check on): disjoint, at random; a quarter of few images is kept for the check."""
    order = np.random.default_rng(seed).permutation(num_images)
    num_calibrated = min(count, num_images - num_images // 4)
    return order[:num_calibrated], order[num_calibrated:][:MOST_CHECKED]


def calibration_batches(image_NHWC: np.ndarray, network_input: NetworkInput) -> list[np.ndarray]:
    """What the network is given: an image at a time, or as many as it insists on, the first ones again at the end."""
    batch = network_input.batch or 1
    rows = np.resize(np.arange(len(image_NHWC)), -(-len(image_NHWC) // batch) * batch)
    return [network_input.prepare(image_NHWC[part]) for part in rows.reshape(-1, batch)]


def quantize(source: Path, image_NHWC: np.ndarray, output: Path) -> None:
    """Write the network at ``source`` in int8.

    Args:
        source: an ``.onnx`` file of weights in float32.
        image_NHWC: uint8 RGB faces to calibrate on.
        output: the ``.onnx`` file to write.

    Raises:
        UserError: NNCF cannot quantise this network.
    """
    os.environ["NNCF_CI"] = "1"  # otherwise it reports its use to its makers
    network_input = read_onnx_input(source)
    with stdout_to_stderr():
        import nncf
        import onnx
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

        nncf.set_log_level(logging.ERROR)
        model = onnx.load(str(source))
        if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
            raise UserError(f"{source}: is quantised already; give the float32 network")
        names = {tensor.name for tensor in model.graph.initializer}
        (name,) = (value.name for value in model.graph.input if value.name not in names)
        batches = calibration_batches(image_NHWC, network_input)
        data = nncf.Dataset(batches, lambda batch: {name: batch})
        try:
            quantized = nncf.quantize(
                model,
                data,
                preset=nncf.QuantizationPreset.PERFORMANCE,
                subset_size=len(batches),
                advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE),
            )
        except Exception as error:  # NNCF's, onnx's and onnxruntime's have no base class
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"{source}: NNCF cannot quantise it ({reason})") from error
        onnx.save(quantized, str(output))
    if (found := read_onnx_input(output)) != network_input:
        raise UserError(f"{source}: its input is {network_input}, but in int8 {found}; stay with float32")


def cosines(full: Embedder, reduced: Embedder, image_NHWC: np.ndarray) -> np.ndarray:
    """Cosine [N] between the embeddings (image plus mirror image) of two networks."""
    sums = (each.start(image_NHWC, "both").result().astype(np.float64).sum(1) for each in (full, reduced))
    full_ND, reduced_ND = map(scale_to_unit, sums)
    return np.einsum("nd,nd->n", full_ND, reduced_ND)


def images_per_second(embedders: Sequence[Embedder], image_NHWC: np.ndarray) -> list[float]:
    """Median speed of each, in turns, so that a slow minute of the machine hits all."""
    speeds: list[list[float]] = [[] for _ in embedders]
    for _ in range(ROUNDS + 1):
        for found, embedder in zip(speeds, embedders, strict=True):
            start, num_done = time.perf_counter(), 0
            while (passed := time.perf_counter() - start) < SECONDS or num_done == 0:
                embedder(image_NHWC[:64])
                num_done += len(image_NHWC[:64])
            found.append(num_done / passed)
    return [statistics.median(found[1:]) for found in speeds]  # the first turn warms up


def comparison(
    speed: dict[str, float], cosine_N: np.ndarray, results: dict[str, dict[str, SetResult]]
) -> list[list[str]]:
    """Head and rows of the printed table, a row a network by name; ``cosine_N``: the last one's to the first."""
    head, rows = ["Network", "Images/s", "Mean cosine", "Least cosine"], []
    for name, cosine in zip(speed, (np.ones(1), cosine_N), strict=True):
        row = [name, f"{speed[name]:.1f}", f"{cosine.mean():.5f}", f"{cosine.min():.5f}"]
        for result in results[name].values():
            row += [f"{result.metrics.accuracy:.5f}+-{result.metrics.accuracy_std:.5f}", f"{result.metrics.auc:.5f}"]
        rows.append(row)
    head += [f"{name} {figure}" for name in results["int8"] for figure in ("Accuracy-Flip", "AUC")]
    return [head, *rows]


def _read_images(args: argparse.Namespace, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(all images of a ``.bin`` set and whether its pairs are the same; or the images needed of a folder, None)."""
    if args.images.suffix.lower() == ".bin":
        if args.landmarks is not None or args.detector is not None:
            raise UserError(f"{args.images}: holds aligned faces; --landmarks and --detector are for photos")
        image_NHWC, same_P = load_bin(args.images, (size, size))
        check_set(str(args.images), same_P)
        return image_NHWC, same_P
    faces = collect_faces(argparse.Namespace(**vars(args), source=args.images, all_faces=False))
    needed = np.random.default_rng(args.seed).permutation(len(faces))[: args.count + MOST_CHECKED]
    crops = AlignedFaces([faces[i] for i in np.sort(needed)], size, resize=args.resize)
    image_NHWC = np.stack([crops[i] for i in progress(range(len(crops)), len(crops), "reading")])
    print_warnings(landmark_remarks(len(crops.outside), len(crops)))
    return image_NHWC, None


def _check_options(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("nncf") is None:
        raise UserError("int8 needs the package nncf: pip install -c constraints.txt '.[cpu,int8]'")
    check_ranges(args, count=POSITIVE, seed=COUNT, least_cosine=(0, 1), min_score=(0, 1))
    if args.output.suffix.lower() != ".onnx":
        raise UserError(f"--output {args.output}: the name must end in .onnx")
    check_replaceable(args.output)
    if args.output.exists() and Path(args.model).exists() and args.output.samefile(args.model):
        raise UserError(f"--output {args.output}: is the model itself; name another file")
    if args.landmarks is not None and args.detector is not None:
        raise UserError("--landmarks and --detector exclude each other")


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = CommandLine(__doc__)
    parser.add_argument("--model", required=True, help="run directory, weights file or .onnx")
    parser.add_argument("--network", help="backbone name, where the model does not say it")
    parser.add_argument("--which", default="last", choices=("last", "best"), help="weights of a run directory")
    parser.add_argument("--images", type=Path, required=True, help="your faces: a folder or a .bin set")
    parser.add_argument("--output", type=Path, required=True, help=".onnx file to write")
    parser.add_argument("--count", type=int, default=300, help="images to calibrate on (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which images those are (default: %(default)s)")
    parser.add_argument("--least-cosine", type=float, default=LEAST_COSINE, help="mean demanded (default: %(default)s)")
    add_face_options(parser)
    args = parser.parse_args(argv)
    _check_options(args)
    distributed.init("cpu")
    full = load_embedder(args.model, args.network, "openvino", which=args.which)
    image_NHWC, same_P = _read_images(args, full.input_size)
    different = np.array(list({pixel_digest(image): row for row, image in enumerate(image_NHWC)}.values()))
    if len(different) < FEWEST:
        raise UserError(f"{args.images}: {len(different)} different faces; at least {FEWEST} are needed")
    parts = choose(len(different), args.count, args.seed)
    calibrated, checked = (image_NHWC[different[rows]] for rows in parts)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        fresh = Path(folder) / "int8.onnx"
        with full.onnx_file() as source:
            quantize(source, calibrated, fresh)
        reduced = load_embedder(fresh, engine="openvino")
        cosine_N = cosines(full, reduced, checked)
        if not cosine_N.mean() >= args.least_cosine:
            found = f"its mean cosine to float32 is {cosine_N.mean():.4f} on {len(checked)} faces"
            remedy = "calibrate on more faces of the kind to be embedded, or stay with float32"
            raise UserError(f"{args.model} in int8: {found}, {args.least_cosine:g} wanted; {remedy}")
        sets = {} if same_P is None else {args.images.stem: (image_NHWC, same_P)}
        networks = {"float32": full, "int8": reduced}
        speed = dict(zip(networks, images_per_second((full, reduced), checked), strict=True))
        head, *rows = comparison(speed, cosine_N, {name: verify(each, sets) for name, each in networks.items()})
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(args.output) as aside:
            shutil.copyfile(fresh, aside)
    print_table(head, rows)
    used = f"calibrated on {len(calibrated)} faces, checked on {len(checked)} others"
    print(f"wrote {args.output} ({used}; int8 is {speed['int8'] / speed['float32']:.2f} times as fast here)")


if __name__ == "__main__":
    main()

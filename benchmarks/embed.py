"""Embedding speed on CPU: our automatic engine beside Paddle and PyTorch, and IJB from crops on disk to its table.

    python benchmarks/embed.py [--json FILE] [--networks iresnet18 vit_t] [--images 64] [--runs 5] [--threads 2]

From uint8 112x112 images (ORL's real faces where the package that holds them can be fetched) to embeddings on the host,
the same weights on every side, the same number of threads. Each side is a process of its own; they take turns, so that
a slow minute of the machine hits all of them. A side that computes something else is an error; bfloat16 counts where
its check passes, and its least cosine to float32 is printed.

    embed/<network>/pytorch       our best mode against PyTorch eager float32
    embed/<network>/dynamic       our best mode against Paddle's dynamic graph
    embed/<network>/predictor     our float32 against Paddle Inference
    embed/<network>/bf16_vs_fp32  our two modes, where the processor has bfloat16
    ijb/crops_to_table            network's time over the whole time from crops on disk to TAR@FAR: align, decode, pool

Bars with bfloat16: ``pytorch`` 2.5 for iResNets, 2.0 for others; ``bf16_vs_fp32`` 1.8; ``predictor`` 1.0;
``crops_to_table`` 0.909 (10 % overhead).
"""

import statistics
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.common import PACKAGES, ROOT, build_parser, case, run, serve, started, take_turns, timed

NETWORKS = ("iresnet18", "iresnet50", "mobilefacenet", "vit_t")
OURS = {"fp32": ("auto", "fp32"), "bf16": ("auto", "bf16")}
OURS |= {engine: (engine, "fp32") for engine in ("predictor", "dynamic")}
SIDES = (*OURS, "pytorch")
PEERS = {"pytorch": "PyTorch eager", "dynamic": "Paddle dynamic graph", "predictor": "Paddle Inference"}
NUM_CROPS = 768


def real_faces(count: int) -> tuple[np.ndarray, str]:
    """uint8 [count, 112, 112, 3] and what they are: ORL's faces over and over, or noise where they cannot be had."""
    from tools.demo.data import load_faces
    from utils.errors import UserError

    try:
        grey_NHW = load_faces(ROOT / "data" / "orl").image_NHW
    except UserError:
        images = np.random.default_rng(0).integers(0, 256, (count, 112, 112, 3), dtype=np.uint8)
        return images, "noise"
    chosen = np.random.default_rng(0).permutation(np.resize(np.arange(len(grey_NHW)), count))
    return np.repeat(grey_NHW[chosen][..., None], 3, axis=3), "ORL faces"


def make_weights(network: str, folder: Path, num_images: int) -> str:
    """``weights.pt`` of a PyTorch network and the images; returns what those are."""
    import torch

    from benchmarks import peer_backbones

    images, kind = real_faces(num_images)
    torch.manual_seed(0)
    torch.save(peer_backbones.randomise(peer_backbones.NETWORKS[network]()).state_dict(), folder / "weights.pt")
    np.save(folder / "images.npy", images)
    return kind


def run_child(side: str, network: str, *words: str) -> None:
    """For each line on stdin: embed all images, or run the protocol once."""
    folder, threads = Path(words[0]), int(words[1])
    if side == "ijb":
        answer, told = _ijb(network, folder, threads)
        serve(lambda _: answer(), lambda found: found, **told)
        return
    images = np.load(folder / "images.npy")
    if side == "pytorch":
        answer, told = _pytorch(network, folder, threads), {"engine": "eager", "precision": "fp32"}
    else:
        from eval.embed import load_embedder
        from utils.errors import UserError

        engine, precision = OURS[side]
        try:
            answer = load_embedder(folder / "weights.pt", network, engine, num_threads=threads, precision=precision)
        except UserError:  # no bfloat16 here
            answer = load_embedder(folder / "weights.pt", network, engine, num_threads=threads)
        told = {"engine": answer.engine, "precision": answer.precision}
    serve(lambda _: answer(images), lambda embedding_BD: np.save(folder / f"{side}.npy", embedding_BD), **told)


def _pytorch(network: str, folder: Path, threads: int):
    import torch

    from benchmarks.peer_backbones import NETWORKS as PEER_NETWORKS

    torch.set_num_threads(threads)
    net = PEER_NETWORKS[network]()
    net.load_state_dict(torch.load(folder / "weights.pt", weights_only=True), strict=True)
    net.eval()

    def embed(images_NHWC: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return net(torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)).numpy()

    return embed


def _ijb(network: str, folder: Path, threads: int):
    """A set of JPEG crops with landmarks, two images a template; the answer times the network alone and everything."""
    import cv2

    from eval.embed import load_embedder
    from eval.features import protocol_features
    from eval.protocols import read_csv_protocol
    from eval.tables import Setting, evaluate_templates
    from utils.files import write_csv
    from utils.photos.align import ARCFACE_TEMPLATE

    images, _ = real_faces(NUM_CROPS)
    point_N10 = np.ravel(ARCFACE_TEMPLATE) + 24 + np.random.default_rng(0).normal(0, 1, (NUM_CROPS, 10))
    columns = [f"{axis}{k}" for k in range(1, 6) for axis in "xy"]
    rows = []
    for index, (image, point_10) in enumerate(zip(images, point_N10.round(2), strict=True)):
        crop = cv2.copyMakeBorder(image, 24, 24, 24, 24, cv2.BORDER_REPLICATE)  # 160 x 160, as IJB's crops are larger
        cv2.imwrite(str(folder / f"{index}.jpg"), crop[..., ::-1])
        row = {"path": f"{index}.jpg", "template": index // 2, "media": index // 2, "score": 1}
        rows.append(row | dict(zip(columns, point_10, strict=True)))
    write_csv(folder / "images.csv", rows)
    templates = range(NUM_CROPS // 2)
    write_csv(folder / "pairs.csv", [{"left": t, "right": (t + 1) % len(templates), "same": t % 2} for t in templates])
    embedder = load_embedder(folder / "weights.pt", network, num_threads=threads, precision="auto")
    if embedder.undecided:
        embedder.settle(images)
    embedder.start(images[:64], "both").result()

    def whole() -> None:
        protocol = read_csv_protocol(folder)
        with tempfile.TemporaryDirectory() as cache:
            out = Path(cache) / "f.npy"
            features = protocol_features(protocol, lambda: embedder, "weights", out, num_threads=threads)
            evaluate_templates(protocol, features.feature_N2D, Setting())

    def answer() -> dict:
        _, alone = timed(lambda: embedder.start(images, "both").result())
        return {"network": alone, "whole": timed(whole)[1]}

    return answer, {"engine": embedder.engine, "precision": embedder.precision}


def commands(sides: tuple[str, ...], network: str, folder: Path, threads: int) -> dict[str, list]:
    """The child of each side."""
    return {side: [__file__, "--child", side, network, folder, threads] for side in sides}


def measure(network: str, num_images: int, runs: int, threads: int) -> list[dict]:
    """One network: all sides in turn; its cases."""
    from eval.embed import LEAST_COSINE

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kind = make_weights(network, folder, num_images)
        with started(commands(SIDES, network, folder, threads), threads) as children:
            told = {side: child.told for side, child in children.items()}
            turns = take_turns(children, runs, warm_up=1)
        rates = {side: [num_images / turn["seconds"] for turn in turns[side]] for side in SIDES}
        found = {side: np.load(folder / f"{side}.npy").astype(np.float64) for side in SIDES}
    scale = max(1.0, float(np.abs(found["pytorch"]).max()))
    difference = max(float(np.abs(found["fp32"] - found[side]).max()) for side in PEERS)
    if not difference < 1e-4 * scale:
        raise SystemExit(f"error: {network}: the sides' embeddings differ by {difference:.3g}")
    norms = np.linalg.norm(found["bf16"], axis=1) * np.linalg.norm(found["fp32"], axis=1)
    cosine = float(((found["bf16"] * found["fp32"]).sum(1) / norms).min())
    reduced = told["bf16"]["precision"] == "bf16"
    best = "bf16" if reduced and cosine >= LEAST_COSINE else "fp32"

    def compared(ours: str, side: str, name: str, peer_name: str, **more: object) -> dict:
        more |= {"images": kind, "largest_difference": difference, **told[ours]}
        return case(f"embed/{network}/{name}", "images_s", rates[ours], rates[side], peer_name, paired=True, **more)

    cases = [compared("fp32" if side == "predictor" else best, side, side, PEERS[side]) for side in PEERS]
    if reduced:
        cases.append(compared("bf16", "fp32", "bf16_vs_fp32", "our float32", least_cosine=cosine))
        print(f"  least cosine of bfloat16 to float32: {cosine:.6f} ({kind})")
    return cases


def measure_ijb(network: str, runs: int, threads: int) -> dict:
    """The case ``ijb/crops_to_table``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_weights(network, folder, 1)
        with started(commands(("ijb",), network, folder, threads), threads) as children:
            times, told = take_turns(children, runs, warm_up=1)["ijb"], children["ijb"].told
    alone, whole = ([one[key] for one in times] for key in ("network", "whole"))
    ratios = [a / b for a, b in zip(alone, whole, strict=True)]
    overhead = statistics.median(whole) / statistics.median(alone) - 1
    more = {"spread": [min(ratios), max(ratios)], "overhead": overhead, "network": network, **told}
    print(f"{NUM_CROPS} crops, {network}, {told['engine']} {told['precision']}: overhead {100 * overhead:.1f} %")
    return case("ijb/crops_to_table", "seconds", whole, alone, "the network alone", smaller=True, **more)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = build_parser(__doc__)
    networks = ("iresnet18", "iresnet34", "iresnet50", "iresnet100")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=(*networks, "mobilefacenet", "vit_t"))
    parser.add_argument("--images", type=int, default=64, help="images a turn (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="measured turns, after one that is not")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")
    parser.add_argument("--ijb-network", default="iresnet50", choices=(*networks, "none"), help="of ijb/crops_to_table")

    def measure_all(args) -> list[dict]:
        cases = [found for network in args.networks for found in measure(network, args.images, args.runs, args.threads)]
        if args.ijb_network != "none":
            cases.append(measure_ijb(args.ijb_network, max(1, args.runs // 2), args.threads))
        return cases

    run(parser, argv, measure_all, "{threads} threads a side", (*PACKAGES, "openvino"), run_child)


if __name__ == "__main__":
    main()

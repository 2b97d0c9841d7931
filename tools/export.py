"""Export a backbone for deployment: a Paddle inference model and ONNX, both with a free batch size, both checked.

    python tools/export.py --model work_dirs/run --output exported/
    python tools/export.py --model backbone.pdparams --network iresnet50 --output exported/ --format onnx

Input ``image``: float32 [B, 3, H, W], RGB, (pixel / 127.5) - 1. Output: raw embedding [B, D]. Each file is run (Paddle
Inference, onnxruntime) at batch 1, 7 and 64 and compared with the dynamic graph; a difference of 1e-4 or more (of the
largest value, where that is above 1) is an error and leaves nothing behind. The command says the difference of each.
"""

import shutil
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from prettytable import PrettyTable

from eval.embed import load_backbone
from eval.engines import OPSET, DynamicEngine, OnnxEngine, PredictorEngine, save_inference_model, save_onnx
from eval.options import add_device_option
from utils import distributed
from utils.data.labels import copy_identities
from utils.errors import COUNT, CommandLine, UserError, check_ranges, one_line_errors
from utils.system import threads_of_rank

FORMATS = ("paddle", "onnx")
BATCHES = (1, 7, 64)
_ENDINGS = (".json", ".onnx", ".pdiparams", ".pdmodel")


def export(
    layer,
    output: Path,
    formats: tuple[str, ...] = FORMATS,
    batches: tuple[int, ...] = BATCHES,
    tolerance: float = 1e-4,
    opset: int = OPSET,
    name: str = "model",
) -> list[dict]:
    """Write ``output/<name>.json`` and ``.pdiparams`` (``.pdmodel`` before Paddle 3) and ``output/<name>.onnx``.

    Returns:
        A row for each format and batch: ``format``, ``batch``, ``difference`` (largest), ``scale`` (largest value).

    Raises:
        UserError: a format cannot be written here, or differs from the dynamic graph by ``tolerance`` times
            max(1, largest value) or more.
    """
    existed = output.is_dir()
    output.mkdir(parents=True, exist_ok=True)
    num_threads = threads_of_rank()
    aside = Path(tempfile.mkdtemp(prefix=".exporting_", dir=output))
    try:
        running = {}
        if "paddle" in formats:
            running["paddle"] = PredictorEngine(save_inference_model(layer, aside / name), num_threads)
        if "onnx" in formats:
            running["onnx"] = _onnx_engine(layer, aside / f"{name}.onnx", opset, num_threads)
        rows = _compare(layer, running, batches, num_threads)
        bad = [row for row in rows if not row["difference"] < tolerance * max(1.0, row["scale"])]
        if bad:
            worst = max(bad, key=lambda row: row["difference"])
            raise UserError(
                f"{output}: {worst['format']} differs from the dynamic graph by {worst['difference']:.3g} at batch "
                f"{worst['batch']} (values up to {worst['scale']:.3g}, allowed {tolerance:g}); nothing was written"
            )
        for file in sorted(aside.iterdir()):
            file.replace(output / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if not existed and not any(output.iterdir()):
            output.rmdir()
    return rows


def _onnx_engine(layer, path: Path, opset: int, num_threads: int) -> OnnxEngine:
    try:
        save_onnx(layer, path, opset)
        return OnnxEngine(path, num_threads)
    except ImportError as error:
        raise UserError(f"ONNX export needs {error.name}: pip install 'paddle2onnx==2.1.0' onnx onnxruntime") from None


def _compare(layer, running: dict, batches: tuple[int, ...], num_threads: int) -> list[dict]:
    dynamic = DynamicEngine(layer, num_threads)
    rows = []
    for batch in batches:
        shape = (batch, 3, layer.input_size, layer.input_size)
        image_BCHW = np.random.default_rng(batch).uniform(-1, 1, shape).astype(np.float32)
        expected_BD = dynamic.run(image_BCHW)
        if not np.isfinite(expected_BD).all():
            raise UserError("the dynamic graph's embeddings are not finite: these weights are untrained or damaged")
        for name, engine in running.items():
            found_BD = engine.run(image_BCHW)
            if found_BD.shape != expected_BD.shape:
                raise UserError(f"{name}: gives {list(found_BD.shape)} at batch {batch}, not {list(expected_BD.shape)}")
            difference, scale = (float(np.abs(each).max()) for each in (found_BD - expected_BD, expected_BD))
            rows.append({"format": name, "batch": batch, "difference": difference, "scale": scale})
    return rows


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = CommandLine(__doc__)
    parser.add_argument("--model", required=True, help="run directory or weights file")
    parser.add_argument("--network", help="backbone name, where the model does not say it")
    parser.add_argument("--which", default="last", choices=("last", "best"), help="weights of a run directory")
    parser.add_argument("--output", type=Path, required=True, help="folder to write into")
    parser.add_argument("--format", default="paddle,onnx", help="paddle, onnx or both (default: %(default)s)")
    parser.add_argument("--name", default="model", help="file name without suffix (default: %(default)s)")
    parser.add_argument("--opset", type=int, default=OPSET, help="ONNX operator set (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="difference not to be reached (%(default)s)")
    add_device_option(parser)
    args = parser.parse_args(argv)
    check_ranges(args, tolerance=COUNT)
    if args.opset < 7:
        raise UserError(f"--opset {args.opset}: at least 7 is needed (default: {OPSET})")
    formats = tuple(dict.fromkeys(part.strip() for part in args.format.split(",") if part.strip()))
    unknown = [part for part in formats if part not in FORMATS]
    if unknown or not formats:
        raise UserError(f"--format {args.format}: choose from {', '.join(FORMATS)}")
    if not args.name or Path(args.name).name != args.name or args.name.endswith(_ENDINGS):
        raise UserError(f"--name {args.name}: a file name without folder and without {', '.join(_ENDINGS)} is needed")
    distributed.init(args.device)
    layer = load_backbone(args.model, args.network, args.which)
    rows = export(layer, args.output, formats, tolerance=args.tolerance, opset=args.opset, name=args.name)
    table = PrettyTable(["Format", "Batch", "Difference", "Values up to"])
    table.add_rows([[row["format"], row["batch"], f"{row['difference']:.1e}", f"{row['scale']:.3g}"] for row in rows])
    print(table)
    for ending in _ENDINGS:
        if (file := args.output / f"{args.name}{ending}").is_file():
            print(f"wrote {file}")
    if labels := copy_identities(args.model, args.output):
        print(f"wrote {labels}")


if __name__ == "__main__":
    main()

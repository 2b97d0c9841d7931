"""Test weights on every .bin set of a folder, as the Paddle ancestor's command did; the table goes to results.txt.

    python tools/model_test.py --network iresnet50 --weights backbone.pth --data faces/ms1m

Any weights that tools/convert.py reads will do, converted or not: .pdparams, .safetensors, .pt, .onnx, a run directory.
Accuracy-Flip (embedding plus that of the mirror image) is the figure that the published tables show.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prettytable import PrettyTable

from eval.bins import load_bin
from eval.embed import load_embedder
from eval.options import add_device_option, add_engine_options
from eval.pairs import KNOWN_SETS, result_row, result_table, verify
from utils import distributed
from utils.errors import UserError, one_line_errors
from utils.files import write_text

FAR = 1e-3


def find_sets(data: Path, targets: list[str]) -> list[Path]:
    """The ``.bin`` files of a folder, the known ones first in their usual order; or the named ones, all of them."""
    if not data.is_dir():
        raise UserError(f"{data}: no such folder; --data must hold the .bin sets")
    if targets:
        missing = [name for name in targets if not (data / f"{name}.bin").is_file()]
        if missing:
            raise UserError(f"{data}: {', '.join(f'{name}.bin' for name in missing)} missing")
        return [data / f"{name}.bin" for name in targets]
    found = sorted(data.glob("*.bin"), key=lambda path: (path.stem not in KNOWN_SETS, _order(path.stem), path.stem))
    if not found:
        raise UserError(f"{data}: no .bin set there")
    return found


def _order(name: str) -> int:
    return KNOWN_SETS.index(name) if name in KNOWN_SETS else 0


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line; ranks of a launcher share the work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", help="backbone name (default: told by the weights)")
    parser.add_argument("--weights", required=True, help="weights file or run directory")
    parser.add_argument("--data", type=Path, required=True, help="folder of .bin sets")
    parser.add_argument("--target", default="", help="comma-separated sets (default: every .bin there)")
    parser.add_argument("--output", type=Path, default=Path("results.txt"), help="table (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    add_engine_options(parser)
    add_device_option(parser)
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    distributed.init(args.device)
    embedder, paths, failure = None, [], None
    try:
        paths = find_sets(args.data, [name for name in args.target.split(",") if name])
        embedder = load_embedder(args.weights, args.network, args.engine, args.batch_size, precision=args.precision)
    except Exception as error:  # told to the other ranks, which wait
        failure = error
    distributed.raise_together(failure)
    rows = []
    for path in paths:  # one set in memory at a time
        results = verify(embedder, {path.stem: load_bin(path)}, args.batch_size, far_target=FAR, show_progress=True)
        rows.append(result_row(results[path.stem]))
    if distributed.get_rank() != 0:
        return
    head, body = result_table(rows, FAR)
    table = PrettyTable(head)
    table.add_rows(body)
    title = f"{args.network or args.weights}: {args.weights}"
    write_text(args.output, f"{title}\n{table}\n")
    print(f"{title}\n{table}\nwrote {args.output}")


if __name__ == "__main__":
    main()

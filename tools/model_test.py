"""Test weights on every .bin set of a folder, as arcface-Paddle's command does; the table goes to results.txt.

    python tools/model_test.py --network iresnet50 --weights backbone.pth --data faces/ms1m

Any weights that tools/convert.py reads will do, converted or not: .pdparams, .safetensors, .pt, .onnx, a run directory.
Accuracy-Flip (embedding plus that of the mirror image) is the figure that the published tables show.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prettytable import PrettyTable

from eval.bins import read_bin
from eval.embed import load_embedder
from eval.options import add_device_option, add_engine_options, print_warnings
from eval.pairs import KNOWN_SETS, check_set, find_sets, result_row, result_table, set_names, set_warnings, verify
from utils import distributed
from utils.errors import POSITIVE, CommandLine, UserError, check_ranges, one_line_errors
from utils.files import write_text

FAR = 1e-3


def choose_sets(data: Path, targets: list[str]) -> dict[str, Path]:
    """The ``.bin`` files of a folder, the known ones first in their usual order; or the named ones, all of them.

    Raises:
        UserError: one is missing, there is none, or one that cannot be judged: before anything is embedded.
    """
    found = find_sets(data, targets or [path.stem for path in sorted(data.glob("*.bin"), key=_order)], "--data")
    missing = [f"{name}.bin" for name in targets if name not in found]
    if missing:
        raise UserError(f"{data}: {', '.join(missing)} missing")
    if not found:
        raise UserError(f"{data}: no .bin set there")
    for path in found.values():
        check_set(str(path), read_bin(path)[1])
    return found


def _order(path: Path) -> tuple[int, str]:
    return (KNOWN_SETS.index(path.stem) if path.stem in KNOWN_SETS else len(KNOWN_SETS), path.stem)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line; ranks of a launcher share the work."""
    parser = CommandLine(__doc__)
    parser.add_argument("--network", help="backbone name (default: told by the weights)")
    parser.add_argument("--weights", required=True, help="weights file or run directory")
    parser.add_argument("--data", type=Path, required=True, help="folder of .bin sets")
    parser.add_argument("--target", default="", help="comma-separated sets (default: every .bin there)")
    parser.add_argument("--output", type=Path, default=Path("results.txt"), help="table (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    add_engine_options(parser)
    add_device_option(parser)
    args = parser.parse_args(argv)
    check_ranges(args, batch_size=POSITIVE)
    distributed.init(args.device)
    embedder, paths = None, {}
    with distributed.together():
        paths = choose_sets(args.data, set_names(args.target))
        embedder = load_embedder(args.weights, args.network, args.engine, args.batch_size, precision=args.precision)
    results = verify(embedder, paths, args.batch_size, far_target=FAR, show_progress=True)
    if distributed.get_rank() != 0:
        return
    head, body = result_table([result_row(result) for result in results.values()], FAR)
    table = PrettyTable(head)
    table.add_rows(body)
    title = f"{args.network or args.weights}: {args.weights}"
    warnings = set_warnings(results)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, "\n".join([title, str(table), *(f"warning: {text}" for text in warnings), ""]))
    print(f"{title}\n{table}")
    print_warnings(warnings)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

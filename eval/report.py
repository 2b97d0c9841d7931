"""One self-contained HTML page from the results of one or several evaluations.

    python eval/report.py RESULT_DIR [RESULT_DIR ...] --output report.html

A result folder is what ``eval/verification.py``, ``eval/ijb.py`` or ``eval/megaface.py`` wrote. Several runs stand side
by side: one column each in every table, one line each in every ROC picture.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.results import write_report
from utils.errors import CommandLine, one_line_errors


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = CommandLine(__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="result folders (or their .json files)")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    args = parser.parse_args(argv)
    write_report(args.output, args.results)
    print(args.output)


if __name__ == "__main__":
    main()

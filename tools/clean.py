"""Which labels of a data set are wrong: ``python tools/clean.py --help``; see ``tools/clean/command.py``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.clean.command import main

if __name__ == "__main__":
    main()

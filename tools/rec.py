"""Make, check and change RecordIO sets: ``python tools/rec.py --help``; see ``tools/rec/commands.py``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.rec.commands import main

if __name__ == "__main__":
    main()

"""The whole path on real faces: ``make demo`` or ``python tools/demo.py``; see ``tools/demo/stages.py``."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.demo.stages import main

if __name__ == "__main__":
    main()

"""The whole path on real faces: prepare, train on two ranks, evaluate, compare, report.

Launch: ``make demo`` or ``python tools/demo.py [--unseen 31-40] [--seed 2048] [--output work_dirs/orl_demo]``

Leaves ``results.json`` (every figure shown) and ``report.html`` in the output folder. Each stage is the command that a
user would type; it is printed before it runs.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.demo.stages import main

if __name__ == "__main__":
    main()

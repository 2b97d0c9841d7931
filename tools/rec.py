"""Make, check and change RecordIO face sets.

    python tools/rec.py pack   faces/ out/                    one folder an identity -> out/train.rec, .idx, property
    python tools/rec.py pack   train.lst out/ --resize crop   lines 'path label'; images of another size are cut to it
    python tools/rec.py pack   train.parquet out/             image and label columns, rows in their order
    python tools/rec.py info   data/ms1m                      what is in it
    python tools/rec.py verify data/ms1m                      read everything, report every bad record
    python tools/rec.py unpack data/ms1m faces/               original bytes to faces/000123/00000007.jpg
    python tools/rec.py shuffle data/ms1m out/ --seed 1       records in a random order, for sequential readers
    python tools/rec.py merge  data/a data/b out/             classes of b are numbered behind those of a
    python tools/rec.py subset data/ms1m out/ --classes 0-999 the first thousand identities

A data set is a folder with train.rec (see --prefix) or a .rec file. Outputs appear under their names when whole.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.rec.commands import main

if __name__ == "__main__":
    main()

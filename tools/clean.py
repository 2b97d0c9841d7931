"""What is wrong with the labels of a data set, told by a trained network.

    python tools/clean.py data/ms1m --model work_dirs/run --output work_dirs/clean
    python tools/clean.py faces/ --model w600k_r50.onnx --output work_dirs/clean --against lfw.bin,IJB_release/IJBC
    python tools/rec.py subset data/ms1m out/ --keys work_dirs/clean/keep.txt --relabel

DATASET is a record set, a folder with a folder an identity, or a list of ``path label`` lines; it is read once. The
output folder gets

    outliers.csv        key,label,nearest,cos_own,cos_nearest   images closer to another identity than to their own
    same_person.csv     label_a,label_b,cos                     identities that are one person
    several_people.csv  label,parts,cos                         identities that are several; parts.csv says who is who
    duplicates.csv      key_a,key_b,cos                         the same picture twice
    overlap.csv         label,set,image,cos                     identities that are in a set of --against
    keep.txt            the keys that none of this speaks against
    page.html           contact sheets, to decide by eye

and ``embeddings/``, which the next call uses again (it may be deleted). ``--against`` takes .bin sets, IJB folders,
record sets and folders of aligned images. Thresholds are measured on the data set itself (docs/tutorials/clean.md).
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.clean.command import main

if __name__ == "__main__":
    main()

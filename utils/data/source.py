"""The contract between a data source and the loader: bytes (or pixels) and a label for every sample number.

N samples, C classes. A source may be shared by threads.
"""

from collections.abc import Sequence

import numpy as np

from utils.decode import DecodeError, decode_image
from utils.errors import UserError
from utils.progress import progress


class Source:
    """What all sources share; a source of one's own sets ``keys`` (and what else it knows) and defines ``fetch``.

    Attributes:
        keys: int64 [N], a number a sample: the record key, or its ordinal.
        num_classes: C, or None where only the labels themselves could tell.
        labels: the labels of all samples [N] where they are known without reading the data, else None.
        identities: [C], what a class is called in the data (a folder's name, the label before it was renumbered), or
            None where the class number is all that there is.
        notes: lines for the log: what was passed over.
        numbered: True where the classes are numbered here, so that the labels need no check.
    """

    keys: np.ndarray
    num_classes: int | None = None
    labels: np.ndarray | None = None
    identities: Sequence | None = None
    notes: tuple[str, ...] = ()
    numbered: bool = False

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_draws(self) -> int:
        """Draws of an epoch: N, unless some samples are drawn more or less often than once."""
        return len(self)

    def draws(self, seed: int, epoch: int) -> np.ndarray:
        """The samples of an epoch, [num_draws], before they are shuffled. ``i + k * N`` is sample i drawn again."""
        return np.arange(len(self), dtype=np.int32 if len(self) < 2**31 else np.int64)

    def fetch(self, i: int) -> tuple[bytes | memoryview | np.ndarray, int]:
        """Encoded bytes (or uint8 RGB pixels) and label of sample i."""
        raise NotImplementedError

    def fetch_many(self, samples: np.ndarray) -> list[tuple[bytes | memoryview | np.ndarray, int]]:
        """``fetch`` of each sample; a source that knows a faster way overrides it."""
        return [self.fetch(i) for i in samples.tolist()]

    def read_labels(self, samples: np.ndarray | None = None) -> np.ndarray:
        """Labels of some samples, or of all, int64 (Python integers in an object array where they are larger)."""
        if self.labels is not None:
            return self.labels if samples is None else self.labels[samples]
        chosen = np.arange(len(self)) if samples is None else samples
        pairs = (self.fetch(i)[1] for i in chosen.tolist())
        return np.fromiter(progress(pairs, len(chosen), "reading labels"), np.int64, len(chosen))

    def describe(self, i: int) -> str:
        """Name of sample i for messages."""
        return f"sample {i}"

    def damaged(self, i: int, reason: str) -> ValueError:
        """The error for an image that does not decode."""
        return UserError(f"{self.describe(i)}: {reason}")

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        i = int(i) % len(self)
        data, label = self.fetch(i)
        if isinstance(data, np.ndarray):
            return data, label
        try:
            return decode_image(data), label
        except DecodeError as error:
            raise self.damaged(i, str(error)) from error


class SequenceSource(Source):
    """Anything with ``len`` and ``[i] -> (uint8 RGB [H, W, 3], label)`` as a source."""

    def __init__(self, samples: Sequence) -> None:
        self._samples = samples
        self.keys = np.arange(len(samples))

    def fetch(self, i: int) -> tuple[np.ndarray, int]:
        return self._samples[i]

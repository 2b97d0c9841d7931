"""Embeddings on disk by identity: unit rows in blocks, so that memory does not grow with the number of images.

Legend: N images, D embedding size, L identities (labels that occur), B one block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from utils.errors import UserError
from utils.system import release_pages
from utils.vectors import row_norms

BLOCK_BYTES = 1 << 26  # of a block of products
_READ_BYTES = 1 << 24  # of rows read at once: at random places, each brings its neighbours into memory


@dataclass(frozen=True)
class Rows:
    """Embeddings and labels of a data set."""

    feature_ND: np.ndarray  # raw embeddings, usually a memory map
    identity_N: np.ndarray  # int32, index of an image's label in label_L
    label_L: np.ndarray  # the labels that occur, ascending
    order_N: np.ndarray  # images sorted by identity
    start_L: np.ndarray  # those of identity i stand in it from start_L[i] to start_L[i + 1]
    name_of: Callable[[int], str]  # what to call image i in an error

    @classmethod
    def of(cls, feature_ND: np.ndarray, label_N: np.ndarray, name_of: Callable[[int], str] = "image {}".format):
        """Sort the images by label."""
        label_L, identity_N = np.unique(label_N, return_inverse=True)
        order_N = np.argsort(identity_N, kind="stable").astype(np.int64)
        start_L = np.concatenate([[0], np.cumsum(np.bincount(identity_N, minlength=len(label_L)))])
        return cls(feature_ND, identity_N.astype(np.int32), label_L, order_N, start_L, name_of)

    def __len__(self) -> int:
        return len(self.identity_N)

    @property
    def num_identities(self) -> int:
        return len(self.label_L)

    @property
    def embedding_size(self) -> int:
        return self.feature_ND.shape[1]

    @property
    def count_L(self) -> np.ndarray:
        """Images of each identity."""
        return np.diff(self.start_L)

    def images_of(self, identity: int) -> np.ndarray:
        """Image numbers of an identity."""
        return self.order_N[self.start_L[identity] : self.start_L[identity + 1]]

    def unit(self, image_B: np.ndarray) -> np.ndarray:
        """Rows of unit length, float32 [B, D].

        Raises:
            UserError: a row is zero or not finite.
        """
        row_BD = np.asarray(self.feature_ND[image_B], np.float32)
        release_pages(self.feature_ND)
        norm_B = row_norms(row_BD)
        bad = ~(np.isfinite(norm_B) & (norm_B > 0))
        if bad.any():
            name = self.name_of(int(image_B[int(np.argmax(bad))]))
            raise UserError(f"{name}: its embedding is zero or not finite; check the weights")
        row_BD /= norm_B[:, None]
        return row_BD

    def blocks(self, height: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(image numbers, unit rows) of all images in the order of their identities."""
        height = height or max(1, _READ_BYTES // (4 * self.embedding_size))
        for first in range(0, len(self), height):
            image_B = self.order_N[first : first + height]
            yield image_B, self.unit(image_B)

    def identities(self, largest: int) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """(identity, image numbers, unit rows), one identity at a time; no rows of those that have many images.

        ``largest``: how many they have at the most to come with their rows.
        """
        for identity, image_n, unit_nD in self.identity_blocks():
            if len(image_n) == self.count_L[identity] <= largest:
                yield identity, image_n, unit_nD
            elif image_n[0] == self.order_N[self.start_L[identity]]:  # the first of several pieces
                yield identity, self.images_of(identity), None

    def identity_blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(identity, image numbers, unit rows) one identity at a time; small ones are read many at once.

        An identity of more rows than a block comes in several pieces.
        """
        most = max(1, _READ_BYTES // (4 * self.embedding_size))
        first = 0
        while first < self.num_identities:
            end = self.start_L[first] + most
            stop = max(first + 1, int(np.searchsorted(self.start_L, end, side="right")) - 1)
            if stop > first + 1 or self.start_L[stop] <= end:
                image_B = self.order_N[self.start_L[first] : self.start_L[stop]]
                row_BD = self.unit(image_B)
                for identity in range(first, stop):
                    part = slice(*(self.start_L[[identity, identity + 1]] - self.start_L[first]))
                    yield identity, image_B[part], row_BD[part]
            else:
                image_n = self.images_of(first)
                for begin in range(0, len(image_n), most):
                    yield first, image_n[begin : begin + most], self.unit(image_n[begin : begin + most])
            first = stop


def joined(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Numbers of the groups that pairs of ``count`` things join, int64 [count]."""
    graph = coo_matrix((np.ones(len(left)), (left, right)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)

"""Rows of unit length: one definition for scores, templates, searches and files.

Legend: N rows, D embedding size.
"""

import numpy as np

from utils.errors import UserError


def row_norms(feature_ND: np.ndarray) -> np.ndarray:
    """Euclidean length of each row, [N] in the dtype that comes in, without a temporary of the rows' size."""
    return np.sqrt(np.einsum("nd,nd->n", feature_ND, feature_ND))


def scale_to_unit(feature_ND: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Rows divided by their length, into ``out`` (which may be ``feature_ND`` itself) where given; zero stays zero."""
    norm_N = row_norms(feature_ND)
    norm_N[norm_N == 0] = 1
    return np.divide(feature_ND, norm_N[:, None], out=out)


def unit_rows(feature_ND: np.ndarray, what: str = "features") -> np.ndarray:
    """A float64 copy with rows of unit length; a zero row stays zero.

    Raises:
        UserError: not two-dimensional, or a row holds NaN or infinity (``what`` and its number are named).
    """
    feature_ND = np.array(feature_ND, np.float64)
    if feature_ND.ndim != 2:
        raise UserError(f"{what}: shape {feature_ND.shape}; [images, size] is needed")
    norm_N = row_norms(feature_ND)
    if not np.isfinite(norm_N).all():
        raise UserError(f"{what}: row {int(np.flatnonzero(~np.isfinite(norm_N))[0])} holds NaN or infinity")
    norm_N[norm_N == 0] = 1
    feature_ND /= norm_N[:, None]
    return feature_ND

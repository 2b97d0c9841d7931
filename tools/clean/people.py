"""People within an identity: its tree of images is cut where two groups are less alike than one person's are.

Legend: L identities, S sampled identities, n images of one, P people of one, D embedding size.
"""

import numpy as np

from tools.clean.rows import Rows
from tools.clean.statistics import Rule, Tree, agreement, directions, halfway
from utils.progress import progress_bar

LARGEST_TREE = 2048  # an identity with more images: its people are found on a sample
_SMALLEST_PERSON, _SMALLEST_SHARE = 3, 0.1  # fewer images under one label are wrong labels, not a second person


def typical_agreement(rows: Rows, sample_S: np.ndarray) -> float:
    """Median agreement of sampled identities with four images or more (two, where none has four)."""
    for least in (4, 2):
        values = []
        for identity in sample_S[rows.count_L[sample_S] >= least].tolist():
            unit = rows.unit(rows.images_of(identity)[:LARGEST_TREE])
            values.append(agreement(unit.sum(0, keepdims=True), np.array([len(unit)]))[0])
        if values:
            return max(float(np.median(values)), 1e-3)
    return 0.5  # single images only: nothing measures it, and nothing but closeness between images depends on it


def find_people(
    rows: Rows, *, rule: Rule, typical: float, sample_S: np.ndarray, seed: int, show_progress=None
) -> tuple[dict[int, list[np.ndarray]], float]:
    """(identity -> image numbers of each of its people, largest first, where these are several; the threshold).

    Groups less close than the threshold are two people; it is NaN where no identity has images enough for two.
    ``seed``: of the samples of identities that are too large for a tree.
    """
    large_L = rows.count_L >= 2 * _SMALLEST_PERSON
    weakest_L = np.full(rows.num_identities, np.inf)
    with progress_bar("identities", int(large_L.sum()), enabled=show_progress) as advance:
        for identity, _, unit_nD in rows.identities(LARGEST_TREE):
            if large_L[identity]:
                unit_nD = rows.unit(_tree_images(rows, identity, seed)) if unit_nD is None else unit_nD
                weakest_L[identity] = Tree(unit_nD, _smallest_person(len(unit_nD)), typical).weakest
                advance(1)
    measured = weakest_L[np.isfinite(weakest_L)]
    if not len(measured):
        return {}, np.nan
    others = _between_identities(rows, sample_S, typical)
    own_falls_to = rule.fence(measured, -1)
    reach = rule.others_reach(others) if len(others) else own_falls_to
    threshold = halfway(reach, own_falls_to)
    several = {}
    for identity in np.flatnonzero(weakest_L < threshold).tolist():
        image_n = _tree_images(rows, identity, seed)
        unit_nD = rows.unit(image_n)
        people = Tree(unit_nD, _smallest_person(len(image_n)), typical).people(threshold)
        if len(people) > 1:
            several[identity] = _assign(rows, identity, [unit_nD[members].mean(0) for members in people])
    return several, threshold


def _smallest_person(num_images: int) -> int:
    return max(_SMALLEST_PERSON, int(np.ceil(_SMALLEST_SHARE * num_images)))


def _tree_images(rows: Rows, identity: int, rng_seed: int) -> np.ndarray:
    """The images that an identity's tree is made of: all, or a sample that is the same in every call."""
    image_n = rows.images_of(identity)
    if len(image_n) <= LARGEST_TREE:
        return image_n
    chosen = np.random.default_rng((rng_seed, identity)).permutation(len(image_n))[:LARGEST_TREE]
    return image_n[np.sort(chosen)]


def _between_identities(rows: Rows, sample_S: np.ndarray, typical: float) -> np.ndarray:
    """Closenesses of every two sampled identities."""
    count_S = rows.count_L[sample_S]
    sum_SD = np.stack([rows.unit(rows.images_of(i)[:LARGEST_TREE]).sum(0) for i in sample_S.tolist()])
    direction_SD = directions(sum_SD, np.minimum(count_S, LARGEST_TREE), typical)
    return (direction_SD @ direction_SD.T)[np.triu_indices(len(sample_S), 1)]


def _assign(rows: Rows, identity: int, centres: list[np.ndarray]) -> list[np.ndarray]:
    """Every image of an identity to the person whose images are closest on average."""
    centre_PD = np.stack(centres)
    image_n = rows.images_of(identity)
    blocks = (image_n[first : first + 8192] for first in range(0, len(image_n), 8192))
    chosen = np.concatenate([np.argmax(rows.unit(block) @ centre_PD.T, axis=1) for block in blocks])
    groups = [image_n[chosen == person] for person in range(len(centres))]
    return sorted((group for group in groups if len(group)), key=len, reverse=True)

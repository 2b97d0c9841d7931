"""Identities of a data set that are in a test set: what must leave before a figure on that test set means anything.

Test images are grouped to people where the set tells who is who (genuine pairs, subjects of templates, folders): a
group is compared as a whole with every part of the data set, at thresholds for so many images.

Legend: M test images, U people (groups) of the test set, K parts of the data set, D embedding size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from eval.bins import read_bin
from eval.embed import Embedder
from eval.features import aligned_image
from eval.protocols import read_ijb
from eval.stream import digest, embed_to_file
from tools.clean.analysis import Findings
from tools.clean.parts import add_to_sums, threshold_at
from tools.clean.reading import source_stamp
from tools.clean.rows import BLOCK_BYTES, Rows
from tools.clean.statistics import DEFAULT_RULE, SIZES, Rule, agreement, directions, halfway, halves
from tools.sources import NetworkImages, open_source, pixel_digest
from utils import distributed
from utils.decode import DecodeError, decode_image
from utils.errors import UserError
from utils.images import find_image_files
from utils.photos.faces import read_image
from utils.vectors import scale_to_unit

_BEST = 8  # parts looked at for each test person
_FEWEST_GROUPS = 5  # people from whom the test set's own typical agreement is measured
_PRIOR_PEOPLE = 10  # the data set's thresholds count as much as those of so many test people
_MOST_HALVES = 8000
_DRAWS = 4  # random halves of a test person, for each size


@dataclass(frozen=True)
class TestSet:
    """Images of a test set, read when asked for.

    Attributes:
        name: as it is written to ``overlap.csv``.
        get: (i, side of the network's input) -> uint8 RGB; what has landmarks comes aligned to that size.
        names_M: names of each image: a ``.bin`` set holds one image in several places.
        person_M: int64, which of them show one person.
        stamp: tells whether the files are the same as last time.
    """

    name: str
    get: Callable[[int, int], np.ndarray]
    names_M: Sequence[Sequence[str]]
    person_M: np.ndarray
    stamp: str


@dataclass(frozen=True)
class Overlap:
    """An identity of the data set that is a person of the test set.

    ``number_F`` are the person's test images, ``cos_F`` their cosines to the identity's centre, the closest first.
    """

    identity: int
    number_F: np.ndarray
    cos_F: np.ndarray


def open_test_set(path: Path, name: str) -> TestSet:
    """A ``.bin`` set, an IJB folder (``meta`` and ``loose_crop``), a record set, or a folder of images.

    Raises:
        UserError: nothing usable there.
        OSError: a file cannot be read.
    """
    if path.suffix == ".bin":
        return _open_bin(path, name)
    if not path.exists():
        raise UserError(f"--against {path}: no such file or folder; .bin sets, IJB folders, record sets and folders of "
                        "images are read")  # fmt: skip
    if (path / "meta").is_dir() and (path / "loose_crop").is_dir():
        return _open_ijb(path, name)
    if path.suffix == ".rec" or (path / "train.rec").is_file():
        return _open_records(path, name)
    return _open_folder(path, name)


def _joined(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Numbers of the groups that pairs join, [count]."""
    graph = coo_matrix((np.ones(len(left)), (left, right)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _open_bin(path: Path, name: str) -> TestSet:
    encoded, same_P = read_bin(path)
    # An image stands in several pairs: it counts once, under all its numbers.
    images = list(dict.fromkeys(encoded))
    number_of = {data: number for number, data in enumerate(images)}
    number_2P = np.array([number_of[data] for data in encoded])
    names: list[list[str]] = [[] for _ in images]
    for place, number in enumerate(number_2P.tolist()):
        names[number].append(str(place))
    pair_P2 = number_2P.reshape(-1, 2)[same_P]

    def get(i: int, size: int) -> np.ndarray:
        try:
            return decode_image(images[i])
        except DecodeError as error:
            raise UserError(f"{path}: image {names[i][0]} (pair {int(names[i][0]) // 2}): {error}") from error

    stat = path.stat()
    stamp = digest([path.resolve(), stat.st_size, stat.st_mtime_ns])
    return TestSet(name, get, names, _joined(len(images), *pair_P2.T), stamp)


def _open_ijb(path: Path, name: str) -> TestSet:
    lists = sorted((path / "meta").glob("*_face_tid_mid.txt"))
    if len(lists) != 1:
        raise UserError(f"{path}/meta: {len(lists)} files *_face_tid_mid.txt; one was expected")
    protocol = read_ijb(path, lists[0].name.removesuffix("_face_tid_mid.txt"))
    template_T, template_M = np.unique(protocol.template_N, return_inverse=True)
    left, right = (np.searchsorted(template_T, side[protocol.same_P]) for side in (protocol.left_P, protocol.right_P))
    stamp = digest([path.resolve(), *((file, file.stat().st_mtime_ns) for file in sorted((path / "meta").iterdir()))])

    def get(i: int, size: int) -> np.ndarray:
        return aligned_image(protocol, i, size)

    return TestSet(
        name, get, [[image] for image in protocol.image_N], _joined(len(template_T), left, right)[template_M], stamp
    )


def _open_records(path: Path, name: str) -> TestSet:
    source = open_source(path)
    labels = np.asarray(source.read_labels(), np.int64)
    keys = [[str(key)] for key in source.keys]
    return TestSet(name, lambda i, size: source[i][0], keys, labels, source_stamp(source, path))


def _open_folder(path: Path, name: str) -> TestSet:
    found = find_image_files(path)
    if not found.names:
        raise UserError(f"--against {path}: no images in it")
    # A folder an identity; what lies at the top is nobody's in particular.
    owner = [f"{name.rpartition('/')[0]}/" if "/" in name else name for name in found.names]
    _, person_M = np.unique(owner, return_inverse=True)
    paths = found.paths()
    stamp = digest([path.resolve(), *((file, file.stat().st_mtime_ns) for file in paths)])
    return TestSet(
        name, lambda i, size: read_image(paths[i]), [[name] for name in found.names], person_M.astype(np.int64), stamp
    )


def find_overlap(
    test_rows: Rows,
    pixels_M: np.ndarray,
    rows: Rows,
    findings: Findings,
    pixels_N: np.ndarray,
    rule: Rule = DEFAULT_RULE,
    seed: int = 0,
) -> list[Overlap]:
    """Identities of the data set that are in the test set, the closest first; every image of the person is named.

    Args:
        test_rows, pixels_M: embeddings and pixel digests of the test set (``embed_test_set``).
        rows, findings, pixels_N: those of the data set, and what ``analyse`` found in it.
        rule: how thresholds are read off.
        seed: of the random halves that thresholds are measured on.
    """
    person_k, _, part_k = _compare(test_rows, findings, rule, np.random.default_rng(seed))
    found: dict[int, list[np.ndarray]] = {}
    for person, part in zip(person_k.tolist(), part_k.tolist(), strict=True):
        found.setdefault(int(findings.parts.identity_K[part]), []).append(test_rows.images_of(person))
    # Equal pixels need no threshold.
    order = np.argsort(pixels_N, kind="stable")
    place = np.minimum(np.searchsorted(pixels_N[order], pixels_M), len(order) - 1)
    for image in np.flatnonzero(pixels_N[order[place]] == pixels_M).tolist():
        identity = int(rows.identity_N[order[place[image]]])
        found.setdefault(identity, []).append(np.array([image]))
    overlaps = []
    for identity, images in found.items():
        number_F = np.unique(np.concatenate(images))
        parts = np.flatnonzero(findings.parts.identity_K == identity)
        centre_PD = scale_to_unit(findings.parts.sum_KD[parts])
        cos_F = (test_rows.unit(number_F) @ centre_PD.T).max(1)
        order = np.argsort(-cos_F, kind="stable")
        overlaps.append(Overlap(identity, number_F[order], cos_F[order]))
    return sorted(overlaps, key=lambda overlap: -float(overlap.cos_F[0]))


def embed_test_set(test: TestSet, embedder: Embedder, folder: Path, resize: bool = False) -> tuple[Rows, np.ndarray]:
    """(embeddings by person, digests of the pixels); kept in ``folder``, used again for the same files and weights.

    Every rank enters.

    Raises:
        UserError: a test image that cannot be read or embedded.
    """
    stem = digest([test.stamp, len(test.names_M), embedder.identity, embedder.embedding_size, resize])
    features, pixels = folder / f"{stem}.npy", folder / f"{stem}.pixels.npy"
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{test.name}: image {image}" for image, *_ in test.names_M]
    with distributed.together():
        if distributed.get_rank() == 0 and not pixels.is_file():
            np.lib.format.open_memmap(pixels, "w+", np.uint64, (len(names),)).flush()
    if not features.is_file():
        pixels_M = np.load(pixels, mmap_mode="r+")

        def keep(i: int, image: np.ndarray) -> None:
            pixels_M[i] = pixel_digest(image)

        images = NetworkImages(
            lambda i: test.get(i, embedder.input_size), len(names), embedder.input_size, names.__getitem__, resize, keep
        )
        embed_to_file(embedder, images, features, flip="add", key=stem, name_of=names.__getitem__)
        pixels_M.flush()
    rows = Rows.of(np.load(features, mmap_mode="r"), test.person_M, names.__getitem__)
    return rows, np.load(pixels, mmap_mode="r")


def _compare(test_rows: Rows, findings: Findings, rule: Rule, rng: np.random.Generator):
    """(test people, closenesses, parts) of the same person, one entry a pair."""
    count_U = test_rows.count_L
    sum_UD = np.zeros((test_rows.num_identities, test_rows.embedding_size), np.float32)
    for image_B, unit_BD in test_rows.blocks():
        add_to_sums(test_rows.identity_N[image_B], unit_BD, np.ones(len(image_B), np.float32), sum_UD)
    # The test people may scatter more than those of the data set, which the network may have been trained on.
    agreement_U = agreement(sum_UD, count_U)[count_U >= 4 if (count_U >= 4).sum() >= _FEWEST_GROUPS else count_U >= 2]
    typical = max(float(np.median(agreement_U)), 1e-3) if len(agreement_U) >= _FEWEST_GROUPS else findings.parts.typical
    values: dict[int, list[float]] = {size: [] for size in SIZES}
    for _, _, unit_nD in test_rows.identity_blocks():
        if len(unit_nD) > 1 and len(values[1]) < _MOST_HALVES:
            for size in (size for size in SIZES if len(unit_nD) >= 2 * size):
                values[size] += [halves(unit_nD, size, typical, rng) for _ in range(_DRAWS)]
    direction_UD = directions(sum_UD, count_U, typical)
    direction_KD = findings.parts.direction_KD
    num_parts = len(direction_KD)
    most = min(_BEST, num_parts)
    best_UM = np.empty((len(direction_UD), most), np.int64)
    close_UM = np.empty((len(direction_UD), most), np.float32)
    height = max(1, BLOCK_BYTES // (4 * num_parts))
    for first in range(0, len(direction_UD), height):
        score = direction_UD[first : first + height] @ direction_KD.T
        score[:, findings.parts.count_K == 0] = -np.inf
        best = np.argpartition(score, num_parts - most, axis=1)[:, num_parts - most :]
        best_UM[first : first + len(score)] = best
        close_UM[first : first + len(score)] = np.take_along_axis(score, best, 1)
    falls_to = dict(findings.falls_to)
    for size, found in values.items():  # the test people may be harder for the network than its own
        share = len(found) / (len(found) + _DRAWS * _PRIOR_PEOPLE)
        low = rule.own_falls_to(np.array(found)) if found else np.inf
        if low < falls_to.get(size, np.inf):
            falls_to[size] = (1 - share) * falls_to.get(size, low) + share * low
    # The closest identity may be the person; the second closest is not, so that it tells how far others reach.
    second = np.partition(close_UM, -2, axis=1)[:, -2] if most > 1 else np.empty(0)
    second = second[np.isfinite(second)]
    reach = rule.fence(second, 1) if len(second) else np.inf
    thresholds = {size: halfway(reach, low) for size, low in falls_to.items()}
    if 1 in thresholds:  # a single image is weak evidence, and there are many of them: in doubt it is another person
        thresholds[1] = max(thresholds[1], reach)
    smaller_UM = np.minimum(count_U[:, None], findings.parts.count_K[best_UM])
    person, column = np.nonzero(close_UM > threshold_at(thresholds, smaller_UM))
    return person, close_UM[person, column], best_UM[person, column]

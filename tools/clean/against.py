"""Identities of a data set that are in a test set: what must leave before a figure on that test set means anything.

Test images are grouped to people where the set tells who is who (genuine pairs, subjects of templates, folders): a
group is compared as a whole with every part of the data set, at thresholds for so many images.

Legend: M test images, U people (groups) of the test set, K parts of the data set, D embedding size.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.bins import read_bin
from eval.embed import Embedder
from eval.features import read_aligned
from eval.protocols import read_ijb
from eval.stream import digest, embed_to_file
from tools.clean.analysis import Findings
from tools.clean.parts import closest_parts, linked_parts, others_reach, sums_of
from tools.clean.reading import kept_array, source_stamp
from tools.clean.rows import Rows, joined
from tools.clean.statistics import DEFAULT_RULE, Rule, agreement, directions, halfway, halves
from tools.sources import NetworkImages, open_source, pixel_digest
from utils.decode import DecodeError, decode_image
from utils.errors import UserError
from utils.images import find_image_files
from utils.photos.faces import read_image
from utils.vectors import scale_to_unit

_FEWEST_GROUPS = 5  # people from whom the test set's own typical agreement is measured
_PRIOR_PEOPLE = 10  # the data set's thresholds count as much as those of so many test people
_MOST_HALVED = 2000  # test people
_DRAWS = 4  # random halves of a test person, for each size


@dataclass(frozen=True)
class TestSet:
    """Images of a test set, read when asked for."""

    name: str  # as it is written to overlap.csv
    get: Callable[[int, int], np.ndarray]  # (i, side of the network's input, to align for) -> uint8 RGB
    names_M: Sequence[Sequence[str]]  # of each image: a .bin set holds one image in several places
    person_M: np.ndarray  # int64, which of them show one person
    stamp: str  # tells whether the files are the same as last time


@dataclass(frozen=True)
class Overlap:
    """An identity of the data set that is a person of the test set."""

    identity: int
    number_F: np.ndarray  # the person's test images, the closest first
    cos_F: np.ndarray  # their cosines to the identity's centre


def open_test_set(path: Path, name: str) -> TestSet:
    """A ``.bin`` set, an IJB folder (``meta`` and ``loose_crop``), a record set, or a folder of images.

    Raises:
        UserError: nothing usable there.
        OSError: a file cannot be read.
    """
    if path.suffix == ".bin":
        return _open_bin(path, name)
    if not path.exists():
        known = ".bin sets, IJB folders, record sets and folders of images are read"
        raise UserError(f"--against {path}: no such file or folder; {known}")
    if (path / "meta").is_dir() and (path / "loose_crop").is_dir():
        return _open_ijb(path, name)
    if path.suffix == ".rec" or (path / "train.rec").is_file():
        return _open_records(path, name)
    return _open_folder(path, name)


def _stamp(path: Path, files: Iterable[Path]) -> str:
    return digest([path.resolve(), *((file, file.stat().st_mtime_ns) for file in files)])


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
    return TestSet(name, get, names, joined(len(images), *pair_P2.T), stamp)


def _open_ijb(path: Path, name: str) -> TestSet:
    lists = sorted((path / "meta").glob("*_face_tid_mid.txt"))
    if len(lists) != 1:
        raise UserError(f"{path}/meta: {len(lists)} files *_face_tid_mid.txt; one was expected")
    protocol = read_ijb(path, lists[0].name.removesuffix("_face_tid_mid.txt"))
    template_T, template_M = np.unique(protocol.template_N, return_inverse=True)
    left, right = (np.searchsorted(template_T, side[protocol.same_P]) for side in (protocol.left_P, protocol.right_P))
    person_M = joined(len(template_T), left, right)[template_M]
    names = [[image] for image in protocol.image_N]
    stamp = _stamp(path, sorted((path / "meta").iterdir()))
    return TestSet(name, lambda i, size: read_aligned(protocol, i, size)[0], names, person_M, stamp)


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
    owner = [f"{image.rpartition('/')[0]}/" if "/" in image else image for image in found.names]
    _, person_M = np.unique(owner, return_inverse=True)
    paths, names = found.paths(), [[image] for image in found.names]
    return TestSet(name, lambda i, size: read_image(paths[i]), names, person_M.astype(np.int64), _stamp(path, paths))


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

    ``pixels_M``, ``pixels_N``: digests of the pixels of the test set and of the data set; ``seed``: of the random
    halves that thresholds are measured on.
    """
    person_k, part_k = _compare(test_rows, findings, rule, np.random.default_rng(seed))
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
    features, names = folder / f"{stem}.npy", [f"{test.name}: image {image}" for image, *_ in test.names_M]
    pixels_M = kept_array(folder / f"{stem}.pixels.npy", np.uint64, (len(names),))
    if not features.is_file():
        side, name_of = embedder.input_size, names.__getitem__

        def keep(i: int, image: np.ndarray) -> None:
            pixels_M[i] = pixel_digest(image)

        images = NetworkImages(lambda i: test.get(i, side), len(names), side, name_of, resize, keep)
        embed_to_file(embedder, images, features, flip="add", key=stem, name_of=name_of)
        pixels_M.flush()
    return Rows.of(np.load(features, mmap_mode="r"), test.person_M, names.__getitem__), pixels_M


def _compare(
    test_rows: Rows, findings: Findings, rule: Rule, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(test people, parts) that are one person, one entry a pair."""
    count_U, parts = test_rows.count_L, findings.parts
    sum_UD = sums_of(test_rows, test_rows.identity_N, test_rows.num_identities)
    # The test people may scatter more than those of the data set, which the network may have been trained on.
    agreement_U = agreement(sum_UD, count_U)[count_U >= 4 if (count_U >= 4).sum() >= _FEWEST_GROUPS else count_U >= 2]
    typical = max(float(np.median(agreement_U)), 1e-3) if len(agreement_U) >= _FEWEST_GROUPS else parts.typical
    units = (unit_nD for _, _, unit_nD in test_rows.identity_blocks() if len(unit_nD) > 1)
    values = halves(itertools.islice(units, _MOST_HALVED), _DRAWS, typical, rng)
    best_UM, close_UM = closest_parts(
        directions(sum_UD, count_U, typical), parts.direction_KD, parts.count_K, show_progress=False
    )
    falls_to = dict(findings.falls_to)
    for size, found in values.items():  # the test people may be harder for the network than its own
        share = len(found) / (len(found) + _DRAWS * _PRIOR_PEOPLE)
        low = rule.own_falls_to(np.array(found)) if found else np.inf
        if low < falls_to.get(size, np.inf):
            falls_to[size] = (1 - share) * falls_to.get(size, low) + share * low
    # The closest identity may be the person; the second closest is not, so that it tells how far others reach.
    reach = others_reach(rule, close_UM[:, 1:2])
    thresholds = {size: halfway(reach, low) for size, low in falls_to.items()}
    if 1 in thresholds:  # a single image is weak evidence, and there are many of them: in doubt it is another person
        thresholds[1] = max(thresholds[1], reach)
    person, column = np.nonzero(linked_parts(best_UM, close_UM, count_U, parts.count_K, thresholds))
    return person, best_UM[person, column]

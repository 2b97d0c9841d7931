"""A gallery of people on disk, and the search for who a face is: nobody is an answer.

A gallery is one safetensors file, written whole: ``embedding`` float32 [R, D] (unit rows, a person's together),
``person`` int32 [R], ``pixels`` uint64 [R] (digests, so that a photo is enrolled once), ``stranger`` float32 [I, D]
(people who are known not to be in it), ``impostor`` float32 [P] (scores of strangers, descending) and ``names`` (JSON
as bytes). What it was made with (model, alignment, detector) is JSON in its header. Reading maps the file: searches
need memory for a block.

The score of a person is the best cosine to one of the person's photos. The threshold is measured: how close do people
come who are not in the gallery? Each of a sample of photos is searched as if its person were not enrolled; or, where
given, photos of strangers are. Its rate is the share of strangers who would get a name.

Legend: R rows (photos), D embedding size, G people, Q queries, K chosen, B one block, P measured strangers.
"""

import json
import math
import secrets
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from utils.errors import UserError
from utils.files import describe_file, written_whole
from utils.progress import progress_bar
from utils.system import release_pages
from utils.vectors import row_norms

FORMAT = "arcface-paddle-pfc gallery 1"
MOST_PROBES = 5000  # photos that a threshold is measured on
_BLOCK_BYTES = 1 << 26
_DTYPES = {"embedding": "<f4", "person": "<i4", "pixels": "<u8", "stranger": "<f4", "impostor": "<f4", "names": "|u1"}


@dataclass(frozen=True)
class About:
    """What a gallery was made with."""

    model: str  # path, for the next call
    identity: str  # digest of the weights: embeddings of other ones cannot be compared
    alignment: str = "arcface"  # how faces are brought to crops
    detector: str | None = None  # name or file; None: the photos were aligned crops
    strangers: str = ""  # who the threshold was measured on
    id: str = field(default_factory=lambda: secrets.token_hex(8))  # of this very file: an index belongs to one state


@dataclass(frozen=True)
class Match:
    """A person and the best cosine to one of the person's photos."""

    name: str
    cos: float


@dataclass(frozen=True)
class Threshold:
    """``value``: who scores above it is known. ``far``: the share of ``strangers`` above it; 0 of few says little."""

    value: float
    far: float
    strangers: int

    def __str__(self) -> str:
        bound = "" if self.far else f", below {min(1.0, 3 / self.strangers):.1e} with 95% confidence"
        return f"threshold {self.value:.4f}, false-accept rate {self.far:.2e}{bound}, {self.strangers} searches"


class Gallery:
    """A gallery file, mapped: ``names`` [G] are in memory, the arrays (``embedding_RD``, ``person_R``, ...) on disk.

    Raises:
        UserError: not a gallery, or a damaged one.
        OSError: it cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such gallery; enrol people first (tools/search.py enrol)")
        tensors, self.about = _read(self.path)
        self.embedding_RD, self.person_R, self.pixels_R = (tensors[name] for name in ("embedding", "person", "pixels"))
        self.stranger_ID, self.impostor_P = tensors["stranger"], tensors["impostor"]
        try:
            self.names = json.loads(tensors["names"].tobytes())
        except ValueError:
            raise _damaged(self.path, "its names are not JSON") from None
        if not isinstance(self.names, list) or not all(isinstance(name, str) for name in self.names):
            raise _damaged(self.path, "its names are not a list of texts")
        counts = [len(rows) for rows in (self.embedding_RD, self.person_R, self.pixels_R)]
        if not counts[0] or len(set(counts)) > 1:
            raise _damaged(self.path, "{} embeddings, {} people numbers, {} digests".format(*counts))
        steps = np.diff(self.person_R, prepend=-1, append=len(self.names))
        if steps[0] != 1 or steps[-1] != 1 or not ((steps == 0) | (steps == 1)).all():
            raise _damaged(self.path, "people do not stand in order")
        if self.stranger_ID.shape[1] != self.embedding_RD.shape[1]:
            raise _damaged(self.path, "strangers and people have embeddings of different sizes")

    def __len__(self) -> int:
        return len(self.embedding_RD)

    def search(self, query_QD: np.ndarray, top: int = 5) -> list[list[Match]]:
        """The ``top`` people of each query (or all), the best first (equal cosines in the order of enrolment).

        Exact: blocks are multiplied in float32; what is too close to call, in float64. ``query_QD``: unit rows.
        """
        query_QD = np.asarray(query_QD, np.float64)
        result, narrow = [], query_QD.astype(np.float32)
        for first in range(0, len(query_QD), 16):  # people x queries are held at once
            part = slice(first, first + 16)
            best_QG = self._best_of_people(narrow[part])
            result += [self._exactly(query, best, top) for query, best in zip(query_QD[part], best_QG, strict=True)]
        return result

    def blocks(self, width: int) -> Iterable[tuple[int, np.ndarray]]:
        """First row and rows [B, D] of one block after the other, so many that ``width`` float32 a row fit."""
        height = max(1, _BLOCK_BYTES // (4 * width))
        for first in range(0, len(self), height):
            yield first, np.asarray(self.embedding_RD[first : first + height])
            release_pages(self.embedding_RD)

    def _best_of_people(self, query_QD: np.ndarray) -> np.ndarray:
        best_QG = np.full((len(query_QD), len(self.names)), -np.inf, np.float32)
        for first, block_BD in self.blocks(self.embedding_RD.shape[1]):
            score_QB = query_QD @ block_BD.T
            person_B = self.person_R[first : first + len(block_BD)]
            start = np.flatnonzero(np.diff(person_B, prepend=-1))
            low, high = int(person_B[0]), int(person_B[-1]) + 1
            np.maximum(best_QG[:, low:high], np.maximum.reduceat(score_QB, start, axis=1), out=best_QG[:, low:high])
        return best_QG

    def _exactly(self, query_D: np.ndarray, best_G: np.ndarray, top: int) -> list[Match]:
        top = min(top, len(best_G))
        error = (len(query_D) + 8) * 2.0**-24  # of a float32 product of unit vectors
        limit = np.partition(best_G, len(best_G) - top)[len(best_G) - top] - 2 * error
        candidate_K = np.flatnonzero(best_G >= limit)
        begin_K, end_K = (np.searchsorted(self.person_R, candidate_K, side) for side in ("left", "right"))
        rows = (np.asarray(self.embedding_RD[b:e], np.float64) for b, e in zip(begin_K, end_K, strict=True))
        return self.ranked(candidate_K, np.array([(rows_nD @ query_D).max() for rows_nD in rows]), top)

    def ranked(self, person_K: np.ndarray, cosine_K: np.ndarray, top: int) -> list[Match]:
        """The best ``top`` of chosen people."""
        order = np.lexsort((person_K, -cosine_K))[:top]
        return [Match(self.names[person_K[k]], float(cosine_K[k])) for k in order.tolist()]

    def threshold(self, far: float) -> Threshold | None:
        """The lowest threshold that at most a share ``far`` of the measured strangers exceed; None if none is there."""
        count = len(self.impostor_P)
        if not count:
            return None
        value = float(self.impostor_P[min(int(far * count), count - 1)])
        return Threshold(value, float(np.mean(self.impostor_P > value)), count)


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(f"{path}: a damaged gallery ({reason}); enrol again or restore a copy")


def _read(path: Path) -> tuple[dict[str, np.ndarray], About]:
    with open(path, "rb") as file:
        if FORMAT.encode() not in file.read(1024):  # the first that a header says
            raise UserError(f"{path}: not a gallery, but {describe_file(path)}; make one with tools/search.py enrol")
    tensors = {}
    try:
        with safe_open(path, "np"):  # checks the header against itself and the size of the file
            pass
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, dtype in _DTYPES.items():
            kind, shape, (begin, _) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
            if kind != _kind(dtype) or len(shape) != (2 if name in ("embedding", "stranger") else 1):
                raise ValueError(f"its {name} is {kind} {shape}")
            whole = math.prod(shape)  # nothing cannot be mapped
            place = 8 + length + begin
            tensors[name] = np.memmap(path, dtype, "r", place, tuple(shape)) if whole else np.empty(shape, dtype)
        about = json.loads(header["__metadata__"]["gallery"])
        told = {name: about[name] for name in ("model", "identity", "alignment", "detector", "strangers", "id")}
        texts = [value for name, value in told.items() if (name, value) != ("detector", None)]
        if about["format"] != FORMAT or not all(isinstance(text, str) for text in texts):
            raise ValueError("its header does not say what it was made with")
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None
    return tensors, About(**told)


def write_gallery(
    path: str | Path,
    about: About,
    names: list[str],
    person_R: np.ndarray,
    pixels_R: np.ndarray,
    rows: Callable[[np.ndarray], np.ndarray],
    stranger_ID: np.ndarray,
    seed: int = 0,
    show_progress: bool | None = None,
) -> Gallery:
    """Write a gallery whole, its threshold measured; what was at ``path`` is replaced when all is there.

    Args:
        names: [G]; each must have a row.
        person_R: index into ``names``, in any order.
        pixels_R: digests of the photos.
        rows: positions [n] -> unit rows float32 [n, D]; called block by block.
        stranger_ID: unit rows of people who are not in the gallery; [0, D] where there are none.
        seed: of the sample that the threshold is measured on.
    """
    order_R = np.argsort(person_R, kind="stable")
    count, size, probes = len(order_R), stranger_ID.shape[1], len(stranger_ID)
    if not probes and len(names) > 1:
        probes = min(count, MOST_PROBES)
    text = json.dumps(names, ensure_ascii=False).encode(errors="surrogatepass")  # names of folders are any bytes
    others = {
        "person": np.asarray(person_R)[order_R],
        "pixels": np.asarray(pixels_R)[order_R],
        "stranger": stranger_ID,
        "impostor": np.zeros(probes),  # until they are measured
        "names": np.frombuffer(text, np.uint8),
    }
    with written_whole(path) as aside:
        with open(aside, "wb") as file:
            file.write(_header(about, {"embedding": (count, size), **{name: x.shape for name, x in others.items()}}))
            height = max(1, _BLOCK_BYTES // (4 * size))
            with progress_bar("writing", count, enabled=show_progress) as advance:
                for first in range(0, count, height):
                    block = rows(order_R[first : first + height])
                    file.write(np.ascontiguousarray(block, _DTYPES["embedding"]).tobytes())
                    advance(len(block))
            for name, array in others.items():
                file.write(np.ascontiguousarray(array, _DTYPES[name]).tobytes())
        gallery = Gallery(aside)
        if probes:
            impostor_P = measure_strangers(gallery, seed, show_progress)
            with open(aside, "r+b") as file:
                file.seek(gallery.impostor_P.offset)
                file.write(np.sort(impostor_P)[::-1].astype(_DTYPES["impostor"]).tobytes())
        del gallery
    return Gallery(path)


def _kind(dtype: str) -> str:
    """What safetensors calls a dtype: F32 for ``<f4``."""
    return f"{dtype[1].upper()}{8 * int(dtype[2])}"


def _header(about: About, shapes: dict[str, tuple[int, ...]]) -> bytes:
    entries, place = {}, 0
    for name, shape in shapes.items():
        begin, place = place, place + math.prod(shape) * np.dtype(_DTYPES[name]).itemsize
        entries[name] = {"dtype": _kind(_DTYPES[name]), "shape": list(shape), "data_offsets": [begin, place]}
    told = {"format": FORMAT, **about.__dict__}
    # Escaped twice: safetensors takes no lone surrogates, which paths that are no UTF-8 have.
    text = json.dumps({"__metadata__": {"gallery": json.dumps(told)}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def measure_strangers(gallery: Gallery, seed: int = 0, show_progress: bool | None = None) -> np.ndarray:
    """[P] best score of each stranger: the given ones, else some of the gallery's photos without their people."""
    if len(gallery.stranger_ID):
        probe_PD = np.asarray(gallery.stranger_ID)
        begin_P = end_P = np.zeros(len(probe_PD), np.int64)
    else:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(gallery))[:MOST_PROBES])
        probe_PD, own_P = np.asarray(gallery.embedding_RD[chosen]), np.asarray(gallery.person_R[chosen])
        begin_P, end_P = (np.searchsorted(gallery.person_R, own_P, side) for side in ("left", "right"))
    best_P = np.full(len(probe_PD), -np.inf, np.float32)
    with progress_bar("threshold", len(gallery), enabled=show_progress) as advance:
        for first, block_BD in gallery.blocks(len(probe_PD)):
            score_PB = probe_PD @ block_BD.T
            own = np.flatnonzero((begin_P < first + score_PB.shape[1]) & (end_P > first))
            for probe in own.tolist():
                score_PB[probe, max(0, begin_P[probe] - first) : end_P[probe] - first] = -np.inf
            np.maximum(best_P, score_PB.max(1), out=best_P)
            advance(score_PB.shape[1])
    return best_P


def unit_float32(raw_nD: np.ndarray, name_of: Callable[[int], str]) -> np.ndarray:
    """Embeddings divided by their length, float32 [n, D]; ``UserError`` if one (named) is zero or not finite."""
    raw_nD = np.asarray(raw_nD, np.float64)
    norm_n = row_norms(raw_nD)
    bad = ~(np.isfinite(norm_n) & (norm_n > 0))
    if bad.any():
        raise UserError(f"{name_of(int(np.argmax(bad)))}: its embedding is zero or not finite; check the weights")
    return (raw_nD / norm_n[:, None]).astype(np.float32)

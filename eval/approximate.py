"""Search above a million photos: an inverted file of 8-bit rows (faiss), its answers scored exactly.

``GALLERY.faiss`` stands beside the gallery, ``GALLERY.faiss.json`` says which state of it was indexed and what share of
the exact answers the index finds. Needs the optional extra ``search`` (faiss-cpu).

Legend: R rows of the gallery, Q queries, K candidates.
"""

import json
from pathlib import Path

import numpy as np

from eval.gallery import Gallery, Match
from utils.errors import UserError
from utils.files import write_json, written_whole
from utils.progress import progress_bar

_WANTED_RECALL = 0.99
_PROBES = 200  # photos that recall is measured on
_CANDIDATES = 128


def load_faiss():
    """The module; ``UserError`` where it is not installed."""
    try:
        import faiss
    except ImportError:
        remedy = "pip install -c constraints.txt '.[search]', or --index exact"
        raise UserError(f"faiss is not installed: {remedy}") from None
    return faiss


def index_path(gallery: Path) -> Path:
    return gallery.with_name(gallery.name + ".faiss")


def build_index(gallery: Gallery, seed: int = 0, show_progress: bool | None = None) -> dict:
    """Build and write the index; so many of its lists are searched that the nearest photo is found for 99 % of photos.

    Returns:
        What ``GALLERY.faiss.json`` holds: ``gallery`` (its id), ``rows``, ``lists``, ``probed`` (lists
        searched) and what was measured beside the exact search on ``asked`` photos of the gallery, each left
        out itself: the share found of the nearest photos (``recall``) and of the ten nearest (``recall_10``).
    """
    faiss = load_faiss()
    count, size = gallery.embedding_RD.shape
    rng = np.random.default_rng(seed)
    num_lists = int(max(1, min(4 * np.sqrt(count), count // 39)))  # faiss wants 39 rows a list to train on
    chosen = np.sort(rng.permutation(count)[: 40 * num_lists])
    index = faiss.index_factory(size, f"IVF{num_lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(np.ascontiguousarray(gallery.embedding_RD[chosen]))
    with progress_bar("index", count, enabled=show_progress) as advance:
        for _, block_BD in gallery.blocks(size):
            index.add(block_BD)
            advance(len(block_BD))
    probe_R = np.sort(rng.permutation(count)[:_PROBES])
    exact_QK = _nearest_rows(gallery, probe_R, min(10, count - 1))
    probed, recalls = 1, (1.0, 1.0)
    while exact_QK.size:
        index.nprobe = probed
        _, found = index.search(np.ascontiguousarray(gallery.embedding_RD[probe_R]), min(_CANDIDATES, count))
        hit_QK = np.stack([np.isin(near, row) for near, row in zip(exact_QK, found, strict=True)])
        recalls = (float(hit_QK[:, 0].mean()), float(hit_QK.mean()))
        if recalls[0] >= _WANTED_RECALL or probed == num_lists:
            break
        probed = min(2 * probed, num_lists)
    about = {"gallery": gallery.about.id, "rows": count, "lists": num_lists, "probed": probed, "asked": len(probe_R)}
    about |= {"recall": recalls[0], "recall_10": recalls[1]}
    path = index_path(gallery.path)
    with written_whole(path) as aside:
        faiss.write_index(index, str(aside))
    write_json(f"{path}.json", about)
    return about


def _nearest_rows(gallery: Gallery, probe_R: np.ndarray, count: int) -> np.ndarray:
    """[Q, count] rows nearest to rows of the gallery, the nearest first, themselves left out; exact, block by block."""
    query_QD = np.asarray(gallery.embedding_RD[probe_R])
    score_QK = np.full((len(probe_R), count), -np.inf, np.float32)
    row_QK = np.zeros((len(probe_R), count), np.int64)
    for first, block_BD in gallery.blocks(len(probe_R)):
        score_QB = query_QD @ block_BD.T
        inside = np.flatnonzero((probe_R >= first) & (probe_R < first + len(block_BD)))
        score_QB[inside, probe_R[inside] - first] = -np.inf
        row_QB = np.broadcast_to(np.arange(first, first + len(block_BD)), score_QB.shape)
        score_QB, row_QB = np.concatenate([score_QK, score_QB], 1), np.concatenate([row_QK, row_QB], 1)
        best = np.argsort(-score_QB, axis=1, kind="stable")[:, :count]
        score_QK, row_QK = np.take_along_axis(score_QB, best, 1), np.take_along_axis(row_QB, best, 1)
    return row_QK


class ApproximateSearch:
    """``search`` as ``Gallery`` has it, by the index; ``about`` is what was measured when it was built.

    Raises:
        UserError: no index, or one of another state of the gallery; faiss is missing.
    """

    def __init__(self, gallery: Gallery):
        faiss = load_faiss()
        self.gallery = gallery
        path = index_path(gallery.path)
        again = f"build it with: python tools/search.py index {gallery.path}"
        try:
            self.about = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
            current = self.about["gallery"] == gallery.about.id and self.about["rows"] == len(gallery)
            probed, _ = int(self.about["probed"]), float(self.about["recall"])
        except FileNotFoundError:
            raise UserError(f"{path}: {len(gallery)} photos and no index; {again}, or give --index exact") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}.json: damaged ({error!r}); {again}") from None
        if not current or not path.is_file():
            raise UserError(f"{path}: an index of another state of the gallery; {again}")
        try:
            self.index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
            self.index.nprobe = probed
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:80]
            raise UserError(f"{path}: not an index that faiss can read ({reason}); {again}") from None
        if self.index.ntotal != len(gallery) or self.index.d != gallery.embedding_RD.shape[1]:
            raise UserError(f"{path}: {self.index.ntotal} rows of {self.index.d}, the gallery has other ones; {again}")

    def search(self, query_QD: np.ndarray, top: int = 5) -> list[list[Match]]:
        """The ``top`` people of each query among the candidates that the index finds, by exact cosines."""
        query_QD = np.asarray(query_QD, np.float64)
        wanted = min(max(_CANDIDATES, 16 * top), len(self.gallery))
        _, row_QK = self.index.search(np.ascontiguousarray(query_QD, np.float32), wanted)
        result = []
        for query, rows in zip(query_QD, row_QK, strict=True):
            row_K = np.sort(rows[rows >= 0])
            cosine_K = np.asarray(self.gallery.embedding_RD[row_K], np.float64) @ query
            person_K = np.asarray(self.gallery.person_R[row_K])
            person, start = np.unique(person_K, return_index=True)
            best = np.maximum.reduceat(cosine_K, start) if len(start) else np.empty(0)
            result.append(self.gallery.ranked(person, best, top))
        return result

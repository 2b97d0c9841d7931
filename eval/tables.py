"""From the embeddings of a template protocol to its tables: 1:1 (TAR@FAR) and 1:N.

Legend: N images, D embedding size, T templates, P pairs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from eval.identification import ClosedSet, OpenSet, PairRecall, cmc, pair_recall, tpir_at_fpir
from eval.metrics import FARS, TarAtFar, tar_at_far
from eval.protocols import SubjectList, TemplateProtocol
from eval.search import search
from eval.templates import pool_templates, score_pairs
from utils.errors import UserError
from utils.vectors import scale_to_unit


@dataclass(frozen=True)
class Setting:
    """The N/D/F switches (see ``eval/ijb.py``)."""

    norm: bool = True
    detector: bool = True
    flip: bool = True

    def __str__(self) -> str:
        return f"N{int(self.norm)}D{int(self.detector)}F{int(self.flip)}"

    def transform(self, score_N: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """Stored rows [n, 2, D] and their image indices -> features [n, D] float64."""

        def apply(rows: np.ndarray, index: np.ndarray) -> np.ndarray:
            feature = rows[:, 0].astype(np.float64)
            if self.flip:
                feature += rows[:, 1]
            if not self.norm:
                scale_to_unit(feature, out=feature)
            if self.detector:
                feature *= score_N[index][:, None]
            return feature

        return apply


ALL_SETTINGS = tuple(Setting(n, d, f) for n in (False, True) for d in (False, True) for f in (False, True))


@dataclass(frozen=True)
class TemplateResult:
    """What one setting gives: pooled templates, the score of every pair (float64) and the table."""

    setting: Setting
    template_T: np.ndarray = field(repr=False)
    feature_TD: np.ndarray = field(repr=False)
    score_P: np.ndarray = field(repr=False)
    table: tuple[TarAtFar, ...]


Tables = dict[str, tuple[TarAtFar, ...]]  # by setting


@dataclass(frozen=True)
class Identification:
    """1:N figures of one gallery; what a list does not allow (no non-mated probes, say) is None."""

    gallery: str
    closed: ClosedSet | None
    open: tuple[OpenSet, ...] | None
    reference: tuple[PairRecall, ...] | None = None


def evaluate_templates(protocol: TemplateProtocol, feature_N2D: np.ndarray, setting: Setting) -> TemplateResult:
    """Features to table. Raises ``UserError`` for features that are not finite."""
    transform = setting.transform(protocol.score_N)
    try:
        template_T, feature_TD = pool_templates(feature_N2D, protocol.template_N, protocol.media_N, transform)
    except UserError as error:
        raise UserError(f"{protocol.name}: {error}") from error
    score_P = score_pairs(template_T, feature_TD, protocol.left_P, protocol.right_P)
    return TemplateResult(setting, template_T, feature_TD, score_P, tuple(tar_at_far(score_P, protocol.same_P, FARS)))


def identify(protocol: TemplateProtocol, template_T: np.ndarray, feature_TD: np.ndarray) -> list[Identification]:
    """Every gallery by itself, then all together as the reference script has it."""
    if protocol.probes is None or not protocol.galleries:
        return []

    def of(listed: SubjectList) -> np.ndarray:
        return feature_TD[np.searchsorted(template_T, listed.template_T)]

    probe_QD, probes = of(protocol.probes), protocol.probes.subject_T
    rows = []
    for name, gallery in protocol.galleries.items():
        found = search(of(gallery), gallery.subject_T, probe_QD, probes)
        mated = found.mated_Q
        open_set = tuple(tpir_at_fpir(found)) if mated.any() and not mated.all() else None
        rows.append(Identification(name, cmc(found) if mated.any() else None, open_set))
    gallery_GD = np.concatenate([of(gallery) for gallery in protocol.galleries.values()])
    subject_G = np.concatenate([gallery.subject_T for gallery in protocol.galleries.values()])
    num_impostors = max(1, -(-len(probes) // 10))
    found = search(gallery_GD, subject_G, probe_QD, probes, num_impostors)
    if found.mated_Q.any() and found.num_subjects > 1:
        enough = len(found.impostor_K) >= num_impostors
        rows.append(Identification("all", cmc(found), None, tuple(pair_recall(found)) if enough else None))
    return rows


def _percent(rates: Iterable[float]) -> list[str]:
    return [f"{100 * rate:.2f}" for rate in rates]


def published_table(protocol: TemplateProtocol, tables: Tables) -> tuple[list[str], list[list[str]]]:
    """The reference's layout: one row a setting, percent with two decimals."""
    name = f"{protocol.name.lower()}-{protocol.name}"
    names = {setting: name if len(tables) == 1 else f"{name} {setting}" for setting in tables}
    body = [[names[setting], *_percent(point.nearest for point in table)] for setting, table in tables.items()]
    return ["Methods", *map(str, FARS)], body


def strict_table(result: TemplateResult) -> tuple[list[str], list[list[str]]]:
    """Strict TAR and the FAR actually used, beside the FAR that the published table used."""
    body = [
        ["strict TAR (%)", *_percent(point.strict for point in result.table)],
        ["FAR used", *(f"{point.strict_far:.3e}" for point in result.table)],
        ["threshold", *(f"{point.threshold:.4f}" for point in result.table)],
        ["nearest: TAR (%)", *_percent(point.nearest for point in result.table)],
        ["nearest: FAR used", *(f"{point.nearest_far:.3e}" for point in result.table)],
    ]
    return [str(result.setting), *map(str, FARS)], body


def identification_table(rows: list[Identification]) -> tuple[list[str], list[list[str]]]:
    """One row a gallery, percent."""
    head = ["Gallery", "Rank-1", "Rank-5", "Rank-10"]
    head += ["TPIR@FPIR=0.01", "TPIR@FPIR=0.1", "reference: FAR=0.01", "FAR=0.1"]
    body = []
    for row in rows:
        closed = _percent(row.closed.rates) if row.closed else ["-"] * 3
        tpir = _percent(point.tpir for point in row.open) if row.open else ["-"] * 2
        recall = _percent(point.recall for point in row.reference) if row.reference else ["-"] * 2
        body.append([row.gallery, *closed, *tpir, *recall])
    return head, body

"""Result folders of the evaluations: figures as JSON and CSV, pictures, and a page of one or several of them.

A result folder is what ``eval/verification.py``, ``eval/ijb.py`` or ``eval/megaface.py`` wrote: ``<kind>.json`` and
what it names.

Legend: P pairs, N images.
"""

import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from eval.distractors import DistractorResult
from eval.features import read_aligned
from eval.metrics import roc_at
from eval.pages import Page
from eval.pairs import Pairs, SetResult, result_row, result_table, set_warnings
from eval.plots import draw_errors, draw_histogram, draw_roc
from eval.protocols import TemplateProtocol
from eval.tables import Identification, Tables, TemplateResult, identification_table, published_table, strict_table
from utils.errors import UserError
from utils.files import check_replaceable, write_array, write_csv, write_json

KINDS = {
    "verification": "Verification",
    "ijb": "Templates (1:1 and 1:N)",
    "megaface": "Identification with distractors",
}
TEMPLATE_NOTES = (
    "TAR@FAR: the ROC point nearest in FAR, as published tables have it; it may lie above the FAR asked for. Strict: "
    "the lowest threshold whose FAR does not exceed it.",
    "Closed set: share of mated probes found within the best k subjects. Open set: TPIR is the share of mated probes "
    "accepted at rank 1, at the lowest threshold whose FPIR (share of non-mated probes with an accepted candidate) is "
    "not above the one asked for.",
    "All galleries together: the closed-set numbers of the reference script; its 'FAR' accepts as many impostor PAIRS "
    "as the given share of the probes, which is neither a pair rate nor FPIR.",
)
Curves = Mapping[str, Mapping[str, Sequence[float]]]  # name -> {"far": [K], "tar": [K]}


@dataclass(frozen=True)
class Result:
    """One result file: a label that is unique on the page, its content, and the folder its pictures lie in."""

    label: str
    content: dict
    folder: Path


def _write(path: Path, settings: dict, rows: Sequence[Mapping], content: dict) -> None:
    """``<kind>.json`` and, of its figures, ``<kind>.csv``. ``path`` is theirs without a suffix."""
    columns = {"tables": ("title", "head", "rows"), "pictures": ("file", "title")}
    named = {key: [dict(zip(names, row, strict=True)) for row in content[key]] for key, names in columns.items()}
    told = {"kind": path.name, "label": settings["label"], "settings": settings}
    write_json(path.with_suffix(".json"), {**told, **content, **named})
    write_csv(path.with_suffix(".csv"), rows)


def _roc(score_P: np.ndarray, same_P: np.ndarray, far_K: np.ndarray) -> dict[str, list[float]]:
    """The curve at those FARs that the number of impostors can show."""
    far_K = far_K[far_K >= 0.5 / np.count_nonzero(~same_P)]
    return {"far": far_K.tolist(), "tar": roc_at(score_P, same_P, far_K).tolist()}


def _draw_roc(curves: Curves, path: Path, title: str) -> None:
    draw_roc({name: (curve["far"], curve["tar"]) for name, curve in curves.items()}, path, title)


def write_pair_results(
    folder: Path, results: dict[str, SetResult], sets: Mapping[str, Pairs], settings: dict
) -> list[dict]:
    """``verification.json``, ``.csv`` and pictures into ``folder``; returns the rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [result_row(result, settings["threshold"]) for result in results.values()]
    roc, pictures = {}, [("roc.png", "ROC")]
    for name, result in results.items():
        cosine_P = 1 - result.distance_P / 2
        if 0 < result.same_P.sum() < len(result.same_P):
            roc[name] = _roc(cosine_P, result.same_P, np.logspace(-5, 0, 251))
        histogram, errors = f"{name}_histogram.png", f"{name}_errors.png"
        draw_histogram(cosine_P, result.same_P, folder / histogram, name, 1 - result.metrics.threshold / 2)
        worst = _worst_pairs(result, sets[name][0], settings["num_errors"])
        draw_errors(worst, folder / errors, f"{name}: most confident errors")
        pictures += [(histogram, f"{name}: score histogram"), (errors, f"{name}: most confident errors")]
    _draw_roc(roc, folder / "roc.png", "Verification")
    content = {"sets": {row["set"]: row for row in rows}, "warnings": set_warnings(results)}
    content |= {"tables": [("Sets", *result_table(rows, settings["far"]))], "roc": roc, "pictures": pictures}
    _write(folder / "verification", settings, rows, content)
    return rows


def _worst_pairs(result: SetResult, image_NHWC: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """The wrongly judged pairs furthest from the threshold, furthest first."""
    threshold = result.metrics.threshold
    wrong = np.flatnonzero((result.distance_P < threshold) != result.same_P)
    order = wrong[np.argsort(-np.abs(result.distance_P[wrong] - threshold), kind="stable")][:count]
    cells = []
    for pair in order:
        kind = "same" if result.same_P[pair] else "different"
        caption = f"pair {pair}, {kind}, cos {1 - result.distance_P[pair] / 2:.2f}"
        cells.append((image_NHWC[2 * pair], image_NHWC[2 * pair + 1], caption))
    return cells


def write_template_results(
    folder: Path,
    protocol: TemplateProtocol,
    result: TemplateResult,
    every: Tables,
    identification: list[Identification],
    settings: dict,
    warnings: Sequence[str],
) -> None:
    """``scores.npy``, ``ijb.json``, ``ijb.csv`` and pictures into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_array(folder / "scores.npy", result.score_P)
    name = protocol.name
    curve = _roc(result.score_P, protocol.same_P, np.logspace(-6, 0, 241))
    for suffix in ("pdf", "png"):
        _draw_roc({f"{settings['label']} {result.setting}": curve}, folder / f"roc.{suffix}", f"{name} 1:1")
    draw_histogram(result.score_P, protocol.same_P, folder / "histogram.png", f"{name}: template scores")
    pictures = [("roc.png", "ROC"), ("histogram.png", "Score histogram")]
    errors = _worst_templates(protocol, result, settings["num_errors"])
    if errors is not None:
        draw_errors(errors, folder / "errors.png", f"{name}: most alike impostors, least alike genuine pairs")
        pictures.append(("errors.png", "Worst pairs (first image of each template)"))
    tables = [
        (f"{name}: TAR@FAR (%), nearest point", *published_table(protocol, every)),
        (f"{name}: Strict TAR@FAR", *strict_table(result)),
    ]
    if identification:
        tables.append((f"{name}: Identification 1:N (%)", *identification_table(identification)))
    points = {setting: [asdict(point) for point in table] for setting, table in every.items()}
    rows = [{"setting": setting, **point} for setting, table in points.items() for point in table]
    content = {"tar_at_far": points, "identification": [asdict(row) for row in identification], "warnings": warnings}
    content |= {"tables": tables, "roc": {f"{name} 1:1": curve}, "pictures": pictures, "notes": TEMPLATE_NOTES}
    _write(folder / "ijb", settings, rows, content)


def _worst_templates(protocol: TemplateProtocol, result: TemplateResult, count: int):
    """Half impostors that score highest, half genuine pairs that score lowest; None where images are not at hand."""
    first = {int(template): index for index, template in reversed(list(enumerate(protocol.template_N)))}
    chosen = []
    for same, sign, share in ((False, -1, count - count // 2), (True, 1, count // 2)):
        pairs = np.flatnonzero(protocol.same_P == same)
        share = min(share, len(pairs))
        part = np.argpartition(sign * result.score_P[pairs], share - 1)[:share] if share else np.empty(0, np.int64)
        chosen += sorted(pairs[part].tolist(), key=lambda pair: (sign * result.score_P[pair], pair))
    cells = []
    for pair in chosen:
        ids = [int(side[pair]) for side in (protocol.left_P, protocol.right_P)]
        if not all((protocol.image_dir / protocol.image_N[first[template]]).is_file() for template in ids):
            return None
        kind = "same" if protocol.same_P[pair] else "different"
        images = [read_aligned(protocol, first[template], 112)[0] for template in ids]
        cells.append((*images, f"{ids[0]}, {ids[1]}: {kind}, {result.score_P[pair]:.2f}"))
    return cells


def write_distractor_results(
    folder: Path, result: DistractorResult, settings: dict, warnings: Sequence[str]
) -> list[tuple[str, list[str], list[list[str]]]]:
    """``megaface.json``, ``.csv`` and the ROC picture into ``folder``; returns title, head and rows of the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    found = list(zip(result.sizes, result.rank_1, result.rank_10, strict=True))
    rank_rows = [[f"{size:,}", f"{100 * one:.2f}", f"{100 * ten:.2f}"] for size, one, ten in found]
    tar_rows = [[f"{far:g}", f"{100 * tar:.2f}"] for far, tar in zip(result.fars, result.tar, strict=True)]
    tables = [
        ("Identification (%)", ["Distractors", "Rank-1", "Rank-10"], rank_rows),
        ("Verification (%)", ["FAR", "strict TAR"], tar_rows),
    ]
    curve = {"far": list(result.fars), "tar": list(result.tar)}
    _draw_roc({settings["label"]: curve}, folder / "roc.png", "Probes against distractors")
    shown = zip(result.sizes, rank_rows, strict=True)
    rows = [{"distractors": size, "rank_1": one, "rank_10": ten} for size, (_, one, ten) in shown]
    content = {"figures": asdict(result), "warnings": warnings, "tables": tables, "roc": {"distractors": curve}}
    _write(folder / "megaface", settings, rows, content | {"pictures": []})
    return tables


def load_results(folders: Sequence[Path]) -> list[Result]:
    """Every result file of the folders (or the files themselves), in order."""
    results = []
    for folder in map(Path, folders):
        files = [folder] if folder.is_file() else [folder / f"{kind}.json" for kind in KINDS]
        files = [file for file in files if file.is_file()]
        if not files:
            wanted = ", ".join(f"{kind}.json" for kind in KINDS)
            raise UserError(f"{folder}: no {wanted}; give a --result-dir of an evaluation")
        for file in files:
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                kind, label = content["kind"], content["label"]
                if kind not in KINDS:
                    raise UserError(f"{file}: kind {kind!r} is not one of {', '.join(KINDS)}")
                content["settings"], [(table["title"], table["head"], table["rows"]) for table in content["tables"]]
            except UserError:
                raise
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{file}: not a result of our evaluations ({error!r})") from None
            taken = [result.label for result in results if result.content["kind"] == kind]
            results.append(Result(_unique(label, taken), content, file.parent))
    return results


def check_report(report: Path | None, others: Sequence[Path]) -> None:
    """Refuse what ``tell`` could not do at the end: before anything is embedded."""
    if report is not None:
        check_replaceable(report)
    load_results(others)


def tell(folder: Path, report: Path | None, others: Sequence[Path]) -> None:
    """Say where results are, and make the page of them and of ``others`` that was asked for."""
    print(f"results in {folder}")
    if report is not None:
        write_report(report, [folder, *others])
        print(f"report {report}")


def write_report(path: Path, folders: Sequence[Path]) -> None:
    """Write the page for the result folders; it opens without a network."""
    results = load_results(folders)
    page = Page("Face recognition evaluation")
    page.text(f"Runs: {', '.join(dict.fromkeys(result.label for result in results))}.")
    for kind, title in KINDS.items():
        chosen = [result for result in results if result.content["kind"] == kind]
        if chosen:
            page.heading(title)
            for table_title, head, rows in _side_by_side(chosen):
                page.heading(table_title, 3)
                page.table(head, rows)
            _add_roc_pictures(page, chosen)
    for result in results:
        page.heading(f"{result.label}: {KINDS[result.content['kind']]}")
        if result.content.get("warnings"):
            page.heading("Warnings", 3)
            page.points(result.content["warnings"])
        for picture in result.content.get("pictures", []):
            file = result.folder / picture["file"]
            if file.is_file():
                page.picture(file, picture["title"])
        page.points(result.content.get("notes", []))
        page.heading("Run configuration", 3)
        page.code(json.dumps(result.content["settings"], indent=2))
    page.write(path)


def _side_by_side(results: Sequence[Result]) -> Iterator[tuple[str, list, list[list]]]:
    """(title, head, rows) of every table: rows of all runs merged by name, one column a run and value."""
    titles = dict.fromkeys(table["title"] for result in results for table in result.content["tables"])
    for title in titles:
        tables = {r.label: table for r in results for table in r.content["tables"] if table["title"] == title}
        first = next(iter(tables.values()))
        if len(tables) == 1:
            yield title, first["head"], first["rows"]
            continue
        # Value by value, the runs next to each other: that is what a reader compares.
        columns = dict.fromkeys(column for table in tables.values() for column in table["head"][1:])
        cells = list(itertools.product(columns, tables))
        value_of: dict[str, dict] = {}  # by row, then by cell
        for label, table in tables.items():
            for name, *values in table["rows"]:
                found = {(column, label): value for column, value in zip(table["head"][1:], values, strict=True)}
                value_of.setdefault(name, {}).update(found)
        head = [first["head"][0], *(f"{column}: {label}" for column, label in cells)]
        yield title, head, [[name, *(values.get(cell, "") for cell in cells)] for name, values in value_of.items()]


def _add_roc_pictures(page: Page, results: Sequence[Result]) -> None:
    names = dict.fromkeys(name for result in results for name in result.content.get("roc", {}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "roc.png"
        for name in names:
            curves = {r.label: r.content["roc"][name] for r in results if name in r.content.get("roc", {})}
            _draw_roc(curves, path, name)
            page.picture(path, f"ROC, {name}")


def _unique(label: str, taken: Sequence[str]) -> str:
    names = [label] + [f"{label} ({k})" for k in range(2, len(taken) + 2)]
    return next(name for name in names if name not in taken)

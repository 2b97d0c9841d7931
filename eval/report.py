"""One self-contained HTML page from the results of one or several evaluations.

    python eval/report.py RESULT_DIR [RESULT_DIR ...] --output report.html

A result folder is what ``eval/verification.py``, ``eval/ijb.py`` or ``eval/megaface.py`` wrote: ``<kind>.json`` and
pictures. Several runs stand side by side: one column each in every table, one line each in every ROC picture.
"""

import argparse
import base64
import csv
import html
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval.plots import draw_roc
from utils.errors import UserError, one_line_errors

KINDS = ("verification", "ijb", "megaface")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}th{background:#f3f3f3}
figure{display:inline-block;margin:.5rem;vertical-align:top}figcaption{font-size:.85rem;color:#555}
img{max-width:100%}pre{background:#f6f6f6;padding:.8rem;overflow:auto}h2{border-bottom:1px solid #ddd;margin-top:2.5rem}
"""


@dataclass(frozen=True)
class Result:
    """One result file: a label that is unique on the page, its content, and the folder its pictures lie in."""

    label: str
    content: dict
    folder: Path


def write_json(path: Path, content: Mapping) -> None:
    """JSON, written aside and renamed; NaN and infinity, which JSON lacks, become null."""
    _write_aside(path, json.dumps(_plain(content), indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping]) -> None:
    """One line a row; the columns are those of the first row."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _publish(file.name, path)


def load_results(folders: Sequence[Path]) -> list[Result]:
    """Every result file of the folders (or the files themselves), in order."""
    results = []
    for folder in map(Path, folders):
        files = [folder] if folder.is_file() else [folder / f"{kind}.json" for kind in KINDS]
        files = [file for file in files if file.is_file()]
        if not files:
            raise UserError(
                f"{folder}: no {', '.join(f'{kind}.json' for kind in KINDS)}; give a --result-dir of an evaluation"
            )
        for file in files:
            try:
                content = json.loads(file.read_text())
                kind, label = content["kind"], content["label"]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{file}: not a result of our evaluations ({error!r})") from None
            if kind not in KINDS:
                raise UserError(f"{file}: kind {kind!r} is not one of {', '.join(KINDS)}")
            results.append(
                Result(_unique(label, [r.label for r in results if r.content["kind"] == kind]), content, file.parent)
            )
    return results


def write_report(path: Path, folders: Sequence[Path]) -> None:
    """Write the page for the result folders; it opens without a network."""
    results = load_results(folders)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Face recognition evaluation</title>",
        f"<style>{_STYLE}</style><h1>Face recognition evaluation</h1>",
        f"<p>Runs: {html.escape(', '.join(dict.fromkeys(result.label for result in results)))}.</p>",
    ]
    titles = {
        "verification": "Verification",
        "ijb": "Templates (1:1 and 1:N)",
        "megaface": "Identification with distractors",
    }
    for kind in KINDS:
        chosen = [result for result in results if result.content["kind"] == kind]
        if chosen:
            parts.append(f"<h2>{titles[kind]}</h2>")
            for title, head, rows in _side_by_side(chosen):
                parts.append(f"<h3>{html.escape(title)}</h3>{_table(head, rows)}")
            parts += _roc_figures(chosen)
    for result in results:
        heading = f"{result.label}: {titles[result.content['kind']]}"
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        for picture in result.content.get("pictures", []):
            file = result.folder / picture["file"]
            if file.is_file():
                parts.append(_figure(file.read_bytes(), picture["title"]))
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in result.content.get("notes", []))
        parts.append(f"<ul>{notes}</ul>" if notes else "")
        parts.append(
            f"<h3>Run configuration</h3><pre>{html.escape(json.dumps(result.content['settings'], indent=2))}</pre>"
        )
    _write_aside(Path(path), "\n".join(parts) + "</html>\n")


def _side_by_side(results: Sequence[Result]):
    """(title, head, rows) of every table: rows of all runs merged by name, one column a run and value."""
    titles = dict.fromkeys(table["title"] for result in results for table in result.content["tables"])
    for title in titles:
        tables = [
            (result.label, table) for result in results for table in result.content["tables"] if table["title"] == title
        ]
        names = dict.fromkeys(row[0] for _, table in tables for row in table["rows"])
        if len(tables) == 1:
            yield title, tables[0][1]["head"], tables[0][1]["rows"]
            continue
        # Value by value, the runs next to each other: that is what a reader compares.
        columns = dict.fromkeys(column for _, table in tables for column in table["head"][1:])
        head = [tables[0][1]["head"][0]] + [f"{column}: {label}" for column in columns for label, _ in tables]
        lookup = {
            (label, row[0], column): value
            for label, table in tables
            for row in table["rows"]
            for column, value in zip(table["head"][1:], row[1:], strict=True)
        }
        yield (
            title,
            head,
            [[n] + [lookup.get((label, n, c), "") for c in columns for label, _ in tables] for n in names],
        )


def _roc_figures(results: Sequence[Result]) -> list[str]:
    names = dict.fromkeys(name for result in results for name in result.content.get("roc", {}))
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(names):
            curves = {
                r.label: (r.content["roc"][name]["far"], r.content["roc"][name]["tar"])
                for r in results
                if name in r.content.get("roc", {})
            }
            path = Path(folder) / f"{index}.png"
            draw_roc(curves, path, name)
            figures.append(_figure(path.read_bytes(), f"ROC, {name}"))
    return figures


def _table(head: Sequence, rows: Sequence[Sequence]) -> str:
    cells = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def _figure(data: bytes, caption: str) -> str:
    text, encoded = html.escape(caption, quote=True), base64.b64encode(data).decode()
    image = f'<img alt="{text}" src="data:image/png;base64,{encoded}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _unique(label: str, taken: Sequence[str]) -> str:
    names = [label] + [f"{label} ({k})" for k in range(2, len(taken) + 2)]
    return next(name for name in names if name not in taken)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _write_aside(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    _publish(file.name, path)


def _publish(temporary: str, path: Path) -> None:
    """Rename into place with the permissions any new file would get (a temporary file has 0600)."""
    mask = os.umask(0)
    os.umask(mask)
    Path(temporary).chmod(0o666 & ~mask)
    Path(temporary).replace(path)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="result folders (or their .json files)")
    parser.add_argument("--output", type=Path, default=Path("report.html"))
    args = parser.parse_args(argv)
    write_report(args.output, args.results)
    print(args.output)


if __name__ == "__main__":
    main()

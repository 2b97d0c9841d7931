"""Self-contained HTML pages: headings, tables and pictures in one file that opens without a network."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from utils.files import write_text

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}th{background:#f3f3f3}
figure{display:inline-block;margin:.5rem;vertical-align:top}figcaption{font-size:.85rem;color:#555}
img{max-width:100%}pre{background:#f6f6f6;padding:.8rem;overflow:auto}h2{border-bottom:1px solid #ddd;margin-top:2.5rem}
"""
_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg"}


class Page:
    """A page that grows from top to bottom. All text is escaped: it may come from file names and settings."""

    def __init__(self, title: str):
        title = html.escape(title)
        self._parts = [
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>',
            f"<style>{_STYLE}</style><h1>{title}</h1>",
        ]

    def heading(self, text: str, level: int = 2) -> None:
        """A heading; 2 starts a section, 3 a part of one."""
        self._parts.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """Text as it stands, its line breaks kept."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def points(self, texts: Sequence[str]) -> None:
        """A list; nothing where it is empty."""
        if texts:
            self._parts.append("<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>")

    def table(self, head: Sequence, rows: Sequence[Sequence]) -> None:
        """A table; the first column stands left, the others right."""
        cells = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head)
        lines = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
        self._parts.append(f"<table><tr>{cells}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>")

    def picture(self, picture: bytes | Path, caption: str) -> None:
        """A PNG or JPEG picture (its bytes or its file), kept inside the page."""
        data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
        kind = next((kind for start, kind in _KINDS.items() if data.startswith(start)), "png")
        text, encoded = html.escape(caption, quote=True), base64.b64encode(data).decode()
        image = f'<img alt="{text}" src="data:image/{kind};base64,{encoded}">'
        self._parts.append(f"<figure>{image}<figcaption>{text}</figcaption></figure>")

    def write(self, path: str | Path) -> None:
        """Write the file in one piece; its folder is made."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join(self._parts) + "</html>\n")

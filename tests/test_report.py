"""eval/report.py: one self-contained page, several runs side by side; pictures hold what they should."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from eval.plots import draw_errors, draw_histogram, draw_roc
from eval.report import main
from eval.results import write_report
from utils.files import write_csv, write_json


def result(label, accuracy, extra_set=False):
    rows = [["lfw", f"{accuracy:.5f}"], *([["calfw", "0.90000"]] if extra_set else [])]
    return {
        "kind": "verification",
        "label": label,
        "settings": {"model": f"work_dirs/{label}", "far": 0.001},
        "tables": [{"title": "Sets", "head": ["Set", "Accuracy-Flip"], "rows": rows}],
        "roc": {"lfw": {"far": [0.001, 0.1, 1.0], "tar": [accuracy / 2, accuracy, 1.0]}},
        "pictures": [{"file": "errors.png", "title": "errors of <lfw>"}],
        "notes": ["a note & more"],
    }


def write_run(folder, label, accuracy, **options):
    folder.mkdir()
    write_json(folder / "verification.json", result(label, accuracy, **options))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "errors.png")
    return folder


class Page(HTMLParser):
    """Collects the cells of every table row and all attributes that could load something."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.sources, self.open = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        self.open = tag in ("td", "th")

    def handle_data(self, data):
        if self.open:
            self.rows[-1].append(data)
        self.open = False


def test_one_run_on_a_page_that_needs_nothing_else(tmp_path):
    run = write_run(tmp_path / "a", "r50", 0.95)
    write_report(tmp_path / "page.html", [run])
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.rows == [["Set", "Accuracy-Flip"], ["lfw", "0.95000"]]
    assert len(page.sources) == 2  # ROC and the stored picture
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http" not in text.split("<body")[-1].replace("data:image", "")
    assert "errors of &lt;lfw&gt;" in text
    assert "a note &amp; more" in text
    assert "work_dirs/r50" in text


def test_several_runs_stand_side_by_side(tmp_path):
    runs = [write_run(tmp_path / "a", "r50", 0.95), write_run(tmp_path / "b", "r50", 0.97, extra_set=True)]
    main([*map(str, runs), "--output", str(tmp_path / "page.html")])
    page = Page((tmp_path / "page.html").read_text())
    assert page.rows == [
        ["Set", "Accuracy-Flip: r50", "Accuracy-Flip: r50 (2)"],
        ["lfw", "0.95000", "0.97000"],
        ["calfw", "0.90000"],  # the first run lacks it: an empty cell, which has no text
    ]
    assert len(page.sources) == 3  # one ROC for both, a picture each


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no verification.json"),
        ("{", "not a result"),
        ('{"kind": "x", "label": "y"}', "kind 'x'"),
        ("[]", "not a result"),
    ],
)
def test_bad_results_are_one_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "verification.json").write_text(content)
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--output", str(tmp_path / "page.html")])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "page.html").exists()


def test_json_has_no_nan_and_csv_has_a_header(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": (1, float("inf")), "c": tmp_path})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1, None], "c": str(tmp_path)}
    write_csv(tmp_path / "x.csv", [{"set": "lfw", "auc": 0.5}])
    assert (tmp_path / "x.csv").read_text().split() == ["set,auc", "lfw,0.5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.csv", "x.json"]
    assert (tmp_path / "x.csv").stat().st_mode & 0o044


def test_pictures(tmp_path):
    rng = np.random.default_rng(0)
    score, same = rng.normal(size=500), rng.random(500) < 0.3
    draw_roc({"a": ([1e-3, 1], [0.2, 1])}, tmp_path / "roc.pdf")
    assert (tmp_path / "roc.pdf").read_bytes()[:5] == b"%PDF-"
    draw_roc({}, tmp_path / "empty.png")
    draw_histogram(score, same, tmp_path / "histogram.png", threshold=0.1)
    draw_histogram(np.ones(4), np.array([True, True, False, False]), tmp_path / "constant.png")
    red, blue = np.zeros((112, 112, 3), np.uint8), np.zeros((112, 112, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    draw_errors([(red, blue, "x")] * 7, tmp_path / "errors.png", "t")
    draw_errors([], tmp_path / "none.png", "t")
    pixels = np.asarray(Image.open(tmp_path / "errors.png").convert("RGB")).astype(int)
    num_red = np.count_nonzero((pixels[..., 0] > 250) & (pixels[..., 1:].max(2) < 5))
    num_blue = np.count_nonzero((pixels[..., 2] > 250) & (pixels[..., :2].max(2) < 5))
    assert num_red > 5000
    assert abs(num_red - num_blue) < 0.05 * num_red
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        "constant.png",
        "empty.png",
        "errors.png",
        "histogram.png",
        "none.png",
    ]

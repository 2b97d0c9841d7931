"""tools/clean.py and tools/search.py with an .onnx model, from export to answer; judged by onnxruntime alone."""

import csv
import json

import cv2
import numpy as np
import onnxruntime
import pytest

from mxnet_reader import recordio
from tests.eval_data import faces
from tests.test_embed import trained_like
from tools import search
from tools.clean import command as clean
from tools.export import export

SIZE = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small network of the demo's kind, exported as the command does it."""
    folder = tmp_path_factory.mktemp("model")
    layer = trained_like("iresnet18", width=8, input_size=SIZE, embedding_size=64)
    export(layer, folder, formats=("onnx",), batches=(1,))
    return folder / "model.onnx"


def rows_of(model, images):
    """Unit rows float64 of images and their mirror images added, by the file and nothing of ours."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    small = np.stack([cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for image in images])
    raw = 0
    for pixels in (small, small[:, :, ::-1]):
        given = (pixels.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)
        raw = raw + session.run(None, {session.get_inputs()[0].name: given})[0].astype(np.float64)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


def png(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def test_search(model, tmp_path):
    images, person = faces(9, 4, noise=30)
    for k in range(32):  # the ninth is a stranger, each fourth picture is asked about
        if k % 4 < 3:
            path = tmp_path / "people" / f"person {person[k]}" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(images[k]))
    gallery = tmp_path / "gallery.safetensors"
    search.main(["enrol", str(tmp_path / "people"), str(gallery), "--model", str(model), "--engine", "onnx"])
    rows = rows_of(model, images)
    enrolled = (np.arange(36) % 4 < 3) & (person < 8)
    for asked in (7, 35):
        (tmp_path / "asked.png").write_bytes(png(images[asked]))
        search.main(
            [
                "find",
                str(tmp_path / "asked.png"),
                str(gallery),
                "--json",
                str(tmp_path / "a.json"),
                "--top",
                "8",
                "--engine",
                "onnx",
            ]
        )
        (answer,) = json.loads((tmp_path / "a.json").read_text())
        cosine = [(rows[enrolled & (person == p)] @ rows[asked]).max() for p in range(8)]
        order = np.argsort(cosine)[::-1]
        assert [match["name"] for match in answer["matches"]] == [f"person {p}" for p in order]
        np.testing.assert_allclose([match["cos"] for match in answer["matches"]], np.sort(cosine)[::-1], atol=1e-4)


def test_clean(model, tmp_path):
    images, person = faces(8, 10, noise=30)
    images[33] = np.clip(images[31] * 0.9 + 10, 0, 255).astype(np.uint8)  # near duplicate
    label = person.copy()
    label[25] = 6
    record = recordio.MXIndexedRecordIO(str(tmp_path / "train.idx"), str(tmp_path / "train.rec"), "w")
    for i in range(len(images)):
        record.write_idx(i + 1, recordio.pack(recordio.IRHeader(0, float(label[i]), i + 1, 0), png(images[i])))
    record.close()
    (tmp_path / "property").write_text("8,112,112\n")
    clean.main([str(tmp_path), "--model", str(model), "--output", str(tmp_path / "out")])
    tables = {}
    for name in ("outliers", "duplicates", "same_person", "several_people"):
        with open(tmp_path / "out" / f"{name}.csv", newline="") as file:
            tables[name] = list(csv.DictReader(file))
    assert [(row["key"], row["label"], row["nearest"]) for row in tables["outliers"]] == [("26", "6", "2")]
    rows = rows_of(model, images)
    (pair,) = tables["duplicates"]
    assert {pair["key_a"], pair["key_b"]} == {"32", "34"}
    assert float(pair["cos"]) == pytest.approx(rows[31] @ rows[33], abs=1e-4)
    assert not tables["same_person"] and not tables["several_people"]
    kept = {int(line) for line in (tmp_path / "out/keep.txt").read_text().split()}
    assert kept in ({*range(1, 81)} - {26, 34}, {*range(1, 81)} - {26, 32})

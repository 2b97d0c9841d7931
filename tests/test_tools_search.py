"""tools/search.py: enrolling, adding, finding, refusing."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from eval.gallery import Gallery
from tests.eval_data import ProjectionEmbedder, faces
from tools import search
from utils.photos.align import ARCFACE_TEMPLATE
from utils.photos.detect import DetectedFace


@pytest.fixture(autouse=True)
def projection(monkeypatch):
    """A stand-in network; a model named ``other`` has other weights."""
    embedders = {}

    def load(model, *args, **kwargs):
        if str(model) not in embedders:
            embedders[str(model)] = ProjectionEmbedder()
            if "other" in str(model):
                embedders[str(model)].matrix = np.random.default_rng(9).normal(size=(432, 24))
        return embedders[str(model)]

    monkeypatch.setattr(search, "load_embedder", load)
    return ProjectionEmbedder()


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imencode(".png", image[..., ::-1])[1].tofile(path)
    return path


@pytest.fixture
def album(tmp_path):
    """Twelve people with three photos each, names with dots, blanks and beyond ASCII; (folder, images, names)."""
    images, person = faces(12, 4, noise=25)
    names = [f"Zoë van .{number} x" for number in range(12)]
    for k, image in enumerate(images):
        if k % 4 < 3:
            save(tmp_path / "people" / names[person[k]] / f"photo {k % 4}.x.png", image)
    (tmp_path / "model").touch()
    return tmp_path / "people", images, names


def run(*arguments):
    search.main([str(argument) for argument in arguments])


def fail(capsys, *arguments):
    """The one line that is told."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 1 and len(lines) == 1
    return lines[0]


def unit_rows(embedder, images):
    raw = embedder(images).astype(np.float64) + embedder(images, flip=True)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


def test_enrol_and_find(tmp_path, album, projection, capsys):
    folder, images, names = album
    path = tmp_path / "g"
    run("enrol", folder, path, "--model", tmp_path / "model")
    told = capsys.readouterr().out
    assert "36 photos added, 0 were there; 36 photos of 12 people (12 new)" in told
    assert "36 searches: photos of these 12 people, each without its own person" in told
    assert "36 searches cannot show a rate of 0.01" in told
    rows, query = unit_rows(projection, images), unit_rows(projection, images[7:8])[0]
    enrolled = np.arange(48) % 4 < 3
    cosine = np.array([(rows[enrolled & (np.arange(48) // 4 == p)] @ query).max() for p in range(12)])
    order = np.argsort(-cosine)
    probe = save(tmp_path / "probe.png", images[7])
    run("find", probe, path, "--top", "3", "--json", tmp_path / "out/answer.json")
    (face,) = json.loads((tmp_path / "out/answer.json").read_text())
    assert list(face) == ["face", "box", "matches", "known"] and face["face"] == 0
    assert face["box"] == [0, 0, 112, 112] and face["known"] is True
    assert [match["name"] for match in face["matches"]] == [names[p] for p in order[:3]]
    np.testing.assert_allclose([match["cos"] for match in face["matches"]], cosine[order[:3]], atol=1e-5)
    told = capsys.readouterr().out
    assert f"face 0 at (0, 0, 112, 112): {names[1]}" in told and "false-accept rate" in told
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["g", "model", "out", "people", "probe.png"]


def test_nobody_is_an_answer(tmp_path, album, capsys):
    folder, _, _ = album
    run("enrol", folder, tmp_path / "g", "--model", tmp_path / "model")
    stranger = save(tmp_path / "s.png", faces(1, 1, seed=77)[0][0])
    run("find", stranger, tmp_path / "g", "--json", tmp_path / "a.json")
    (face,) = json.loads((tmp_path / "a.json").read_text())
    assert face["known"] is False and len(face["matches"]) == 5
    assert "nobody in the gallery" in capsys.readouterr().out
    run("find", stranger, tmp_path / "g", "--threshold", "-1", "--json", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())[0]["known"] is True
    assert "threshold -1.0000, false-accept rate 1.00e+00, 36 searches" in capsys.readouterr().out


def test_adding_people_and_photos(tmp_path, album, capsys):
    folder, images, names = album
    path = tmp_path / "g"
    first = tmp_path / "some"
    (folder / names[3]).rename(folder.parent / "late")
    run("enrol", folder, path, "--model", tmp_path / "model")
    before = Gallery(path)
    old = {name: np.array(before.embedding_RD[before.person_R == p]) for p, name in enumerate(before.names)}
    del before
    (first / names[3]).parent.mkdir()
    (folder.parent / "late").rename(first / names[3])
    save(first / names[0] / "new.png", images[3])
    save(first / names[0] / "again.png", images[0])  # the same pixels as an enrolled photo
    save(first / "Solo.png", images[4])
    capsys.readouterr()
    run("enrol", first, path)
    assert "5 photos added, 1 were there; 38 photos of 13 people (2 new)" in capsys.readouterr().out
    after = Gallery(path)
    assert sorted(after.names) == sorted([*names, "Solo"])
    for name, rows in old.items():
        found = np.array(after.embedding_RD[after.person_R == after.names.index(name)])
        assert len(found) == len(rows) + (name == names[0])
        np.testing.assert_array_equal(found[: len(rows)], rows)
    run("enrol", save(tmp_path / "lone.png", images[11]), path, "--name", names[3])
    assert len(Gallery(path)) == 39


def test_the_precision_is_the_gallery_s(tmp_path, album, monkeypatch, capsys):
    """Embeddings of two precisions are never mixed; ``auto`` follows the gallery, as one photo decides nothing."""
    asked = []

    def load(model, *args, precision):
        asked.append(precision)
        embedder = ProjectionEmbedder()
        embedder.precision = "fp32" if precision == "auto" else precision  # auto: decided against
        return embedder

    monkeypatch.setattr(search, "load_embedder", load)
    people, _, names = album
    photo = people / names[3] / "photo 0.x.png"
    for precision, other in (("bf16", "fp32"), ("auto", "bf16")):
        gallery = tmp_path / f"{precision}.safetensors"
        run("enrol", people, gallery, "--model", tmp_path / "model", "--precision", precision)
        told = fail(capsys, "find", photo, gallery, "--precision", other)
        assert f"use --precision {'bf16' if precision == 'bf16' else 'fp32'}" in told
        told = fail(capsys, "enrol", photo, gallery, "--name", "x", "--precision", other)
        assert "or enrol again" in told
        run("find", photo, gallery, "--precision", "auto")
        assert names[3] in capsys.readouterr().out
    assert asked == ["bf16", "fp32", "fp32", "bf16", "auto", "bf16", "bf16", "fp32"]


def test_strangers_set_the_threshold_and_stay(tmp_path, album, projection, capsys):
    folder, images, _ = album
    others = faces(9, 2, seed=5)[0]
    for k, image in enumerate(others):
        save(tmp_path / "others" / f"{k}.png", image)
    run("enrol", folder, tmp_path / "g", "--model", tmp_path / "model", "--impostors", tmp_path / "others")
    assert "18 searches: 18 photos of others" in capsys.readouterr().out
    rows = unit_rows(projection, images[np.arange(48) % 4 < 3])
    expected = np.sort((unit_rows(projection, others) @ rows.T).max(1))[::-1]
    np.testing.assert_allclose(Gallery(tmp_path / "g").impostor_P, expected, atol=1e-5)
    run("enrol", save(tmp_path / "New One.png", images[3]), tmp_path / "g")  # measured again, with the same strangers
    assert "18 searches: 18 photos of others" in capsys.readouterr().out
    rows = np.concatenate([rows, unit_rows(projection, images[3:4])])
    expected = np.sort((unit_rows(projection, others) @ rows.T).max(1))[::-1]
    np.testing.assert_allclose(Gallery(tmp_path / "g").impostor_P, expected, atol=1e-5)


def test_record_sets_and_names(tmp_path, album, capsys):
    from tools.rec import commands

    folder, images, names = album
    commands.main(["pack", str(folder), str(tmp_path / "rec")])
    run("enrol", tmp_path / "rec", tmp_path / "g", "--model", tmp_path / "model")
    assert Gallery(tmp_path / "g").names == [str(number) for number in range(12)]
    (tmp_path / "names.txt").write_text("\n".join(sorted(names)))
    run("enrol", tmp_path / "rec", tmp_path / "h", "--model", tmp_path / "model", "--names", tmp_path / "names.txt")
    run("find", save(tmp_path / "p.png", images[7]), tmp_path / "h", "--json", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())[0]["matches"][0]["name"] == names[1]
    (tmp_path / "names.txt").write_text("Ann\n")
    line = fail(capsys, "enrol", tmp_path / "rec", tmp_path / "i", "--model", tmp_path / "model", "--names",
                tmp_path / "names.txt")  # fmt: skip
    assert "1 names, but" in line and not (tmp_path / "i").exists()


def test_every_face_of_a_photo(tmp_path, album, monkeypatch, capsys):
    folder, images, names = album
    template = np.asarray(ARCFACE_TEMPLATE)

    def build(name, min_score=None):
        assert name == "mtcnn"

        def detect(photo):
            places = [(x, 20) for x in (30, 200) if photo.shape[1] > x + 112]
            return [DetectedFace(template + place, 0.9, (*place, place[0] + 112, place[1] + 112)) for place in places]

        return detect

    monkeypatch.setattr(search, "build_detector", build)
    run("enrol", folder, tmp_path / "g", "--model", tmp_path / "model")
    photo = np.full((160, 330, 3), 90, np.uint8)
    photo[20:132, 30:142], photo[20:132, 200:312] = images[7], faces(1, 1, seed=77)[0][0]
    run("find", save(tmp_path / "two.png", photo), tmp_path / "g", "--detector", "mtcnn", "--json", tmp_path / "a.json")
    first, second = json.loads((tmp_path / "a.json").read_text())
    assert (first["face"], second["face"]) == (0, 1)
    assert first["box"] == [30, 20, 142, 132] and second["box"] == [200, 20, 312, 132]
    assert first["known"] and first["matches"][0]["name"] == names[1] and not second["known"]
    empty = save(tmp_path / "none.png", np.full((50, 60, 3), 90, np.uint8))
    assert "none.png: no face found" in fail(
        capsys, "find", empty, tmp_path / "g", "--detector", "mtcnn", "--json", tmp_path / "b.json"
    )
    assert not (tmp_path / "b.json").exists()


def test_bad_input_is_one_line(tmp_path, album, capsys):
    folder, images, _ = album
    path, model = tmp_path / "g", tmp_path / "model"
    run("enrol", folder, path, "--model", model)
    whole = path.read_bytes()
    probe = save(tmp_path / "p.png", images[7])
    big = save(tmp_path / "big.png", np.zeros((200, 300, 3), np.uint8))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").touch()
    for arguments, told in (
        (["find", probe, path, "--model", tmp_path / "other"], "enrolled with other weights"),
        (["enrol", folder, path, "--model", tmp_path / "other"], "enrolled with other weights"),
        (["find", probe, tmp_path / "none"], "no such gallery"),
        (["find", tmp_path / "none.png", path], "none.png: no such photo"),
        (["find", tmp_path / "text.png", path], "text.png: not an image that can be decoded"),
        (["find", big, path], "big.png: 300x200 pixels, the network takes aligned 112x112 crops"),
        (["find", probe, probe], "not a gallery, but a PNG picture"),
        (["find", probe, path, "--far", "1"], "--far 1.0: must be"),
        (["find", probe, path, "--top", "0"], "--top 0: must be"),
        (["find", probe, path, "--exact-rows", "-5"], "--exact-rows -5: must be"),
        (["find", probe, path, "--device", "abacus"], "device 'abacus'"),
        (["enrol", folder, path, "--model", model, "--batch-size", "-1"], "--batch-size -1: must be"),
        (["find", probe, path, "--threshold", "2"], "--threshold 2.0: a cosine"),
        (["find", probe, path, "--index", "faiss"], "no index; build it with"),
        (["enrol", tmp_path / "empty", path], "empty: no images in it"),
        (["enrol", tmp_path / "nowhere", path], "nowhere: no such file or folder"),
        (["enrol", folder, tmp_path / "new"], "a new gallery needs --model"),
        (["enrol", folder, tmp_path / "empty", "--model", model], "empty: is a folder"),
        (["enrol", tmp_path / "text.png", path], "text.png: not an image"),
    ):
        assert told in fail(capsys, *arguments), arguments
    assert path.read_bytes() == whole
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "big.png", "empty", "g", "model", "other", "p.png", "people", "text.png"
    ]  # fmt: skip
    path.write_bytes(whole[:-100])
    assert "a damaged gallery" in fail(capsys, "find", probe, path)
    assert "a damaged gallery" in fail(capsys, "enrol", folder, path, "--model", model)
    path.write_bytes(whole)
    model.unlink()
    assert "is not there; name it: --model" in fail(capsys, "find", probe, path)


def test_a_single_person(tmp_path, album, capsys):
    _, images, _ = album
    anna = save(tmp_path / "anna.png", images[0])
    run("enrol", anna, tmp_path / "g", "--model", tmp_path / "model")
    assert "one person alone: no threshold can be measured" in capsys.readouterr().err
    assert "one person alone" in fail(capsys, "find", anna, tmp_path / "g")
    run("find", anna, tmp_path / "g", "--threshold", "0.5")
    assert "anna" in (told := capsys.readouterr().out) and "its false-accept rate is not known" in told


def test_above_the_limit_an_index_answers(tmp_path, album, capsys):
    pytest.importorskip("faiss")
    folder, images, names = album
    run("enrol", folder, tmp_path / "g", "--model", tmp_path / "model", "--exact-rows", "10")
    assert "beside the exact search, on 36 photos" in capsys.readouterr().out
    run("find", save(tmp_path / "p.png", images[7]), tmp_path / "g", "--exact-rows", "10")
    told = capsys.readouterr().out
    assert f"): {names[1]}" in told and "searched by index" in told
    run("find", tmp_path / "p.png", tmp_path / "g", "--exact-rows", "10", "--index", "exact")
    assert "searched by index" not in capsys.readouterr().out


def test_info(tmp_path, album, capsys):
    run("enrol", album[0], tmp_path / "g", "--model", tmp_path / "model")
    capsys.readouterr()
    run("info", tmp_path / "g", "--people")
    told = capsys.readouterr().out
    assert "36 photos of 12 people, 24 numbers each" in told and told.count("\n3\t") == 12


def test_an_interrupted_enrolment_goes_on(tmp_path, album, projection, monkeypatch):
    folder, _, _ = album
    failing = ProjectionEmbedder(fail_after=1)
    monkeypatch.setattr(search, "load_embedder", lambda *args, **kwargs: failing)
    with pytest.raises(KeyboardInterrupt):
        run("enrol", folder, tmp_path / "g", "--model", tmp_path / "model")
    assert not (tmp_path / "g").exists()
    monkeypatch.setattr(search, "load_embedder", lambda *args, **kwargs: projection)
    run("enrol", folder, tmp_path / "g", "--model", tmp_path / "model")
    assert len(Gallery(tmp_path / "g")) == 36
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["g", "model", "people"]


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_names_that_are_no_utf8(tmp_path, projection, capsys):
    """What an old camera or an unpacked archive leaves: two people that only these bytes tell apart stay two."""
    images, person = faces(2, 3, noise=25)
    folders = [b"Jos\xe9", b"Jos\xe8"]
    for k, image in enumerate(images):
        save(Path(os.fsdecode(os.fsencode(tmp_path) + b"/people/" + folders[person[k]])) / f"{k}.png", image)
    (tmp_path / "model").touch()
    run("enrol", tmp_path / "people", tmp_path / "g", "--model", tmp_path / "model")
    assert sorted(Gallery(tmp_path / "g").names) == sorted(map(os.fsdecode, folders))
    probe = save(tmp_path / "p.png", images[0])
    run(
        "find",
        probe,
        tmp_path / "g",
        "--model",
        tmp_path / "model",
        "--json",
        tmp_path / "answer.json",
        "--threshold",
        "0",
    )
    (answer,) = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))
    assert answer["matches"][0]["name"] == "Jos\udce9"

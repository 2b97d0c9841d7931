"""tools/embed.py, tools/compare.py, tools/model_test.py and utils/photos/faces.py."""

import json
import pickle
from types import SimpleNamespace

import cv2
import numpy as np
import paddle
import pytest
import yaml

from eval.embed import infer, load_embedder
from tests.test_embed import NETWORK, state_of, trained_like
from tools import compare, embed, model_test
from utils.errors import UserError
from utils.owner import claim
from utils.photos.align import ARCFACE_TEMPLATE, align_face
from utils.photos.detect import build_detector
from utils.photos.faces import AlignedFaces, Face, detect_faces, find_images, read_landmarks
from utils.weights.states import save_pdparams


@pytest.fixture(scope="module")
def layer():
    paddle.seed(0)
    return trained_like(width=8, embedding_size=32)


@pytest.fixture(autouse=True)
def quick_engine(monkeypatch):
    """What the engines do is tested elsewhere; building the fast one costs seconds."""
    monkeypatch.setattr("eval.embed.AUTO_ORDER", ("dynamic",))


@pytest.fixture
def run_dir(layer, tmp_path):
    folder = tmp_path / "work_dirs/run"
    folder.mkdir(parents=True)
    save_pdparams(folder / "backbone.pdparams", state_of(layer))
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": NETWORK}))
    return folder


def picture(seed, height=112, width=112):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save_picture(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])
    return path


def unit(embedder, image):
    """Independent of the tools: sum over flips, unit length, float64."""
    total = embedder(image[None]).astype(np.float64) + embedder(image[None, :, ::-1])
    return (total / np.linalg.norm(total))[0]


def fail(main, *args):
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    assert caught.value.code == 1
    return caught


def test_aligned_crops_of_a_folder(tmp_path, run_dir, layer, capsys):
    for index in range(5):
        save_picture(tmp_path / "photos" / ("sub" if index % 2 else "") / f"{index}.png", picture(index))
    (tmp_path / "photos/notes.txt").write_text("no image")
    output = tmp_path / "faces.npz"
    arguments = [str(tmp_path / "photos"), "--model", str(run_dir), "--output", str(output)]
    embed.main([*arguments, "--batch-size", "2", "--engine", "predictor"])
    assert "5 faces by predictor, 32 numbers each" in capsys.readouterr().out
    found = np.load(output)
    assert [path.rsplit("/", 1)[1] for path in found["path"]] == ["0.png", "2.png", "4.png", "1.png", "3.png"]
    embedder = load_embedder(layer)
    expected = [unit(embedder, picture(index)) for index in (0, 2, 4, 1, 3)]
    np.testing.assert_allclose(found["embedding"], expected, atol=1e-4)
    raw = embedder(picture(0)[None]) + embedder(picture(0)[None, :, ::-1])
    np.testing.assert_allclose(found["norm"][0], np.linalg.norm(raw), rtol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces.npz", "photos", "work_dirs"]


def test_landmarks_align(tmp_path, run_dir, layer):
    """The listed points are those of a turned and enlarged crop; what is embedded is close to the crop itself."""
    crop = cv2.GaussianBlur(picture(3), (0, 0), 6)
    matrix = cv2.getRotationMatrix2D((56, 56), 20, 1.7)
    matrix[:, 2] += 60
    photo = cv2.warpAffine(crop, matrix, (240, 240), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    points = np.asarray(ARCFACE_TEMPLATE) @ matrix[:, :2].T + matrix[:, 2]
    save_picture(tmp_path / "photos/a b.png", photo)
    (tmp_path / "points.csv").write_text("name,x1,y1\n\na b.png," + ",".join(map(str, points.ravel())) + ",0.99\n")
    arguments = [str(tmp_path / "photos"), "--model", str(run_dir), "--landmarks", str(tmp_path / "points.csv")]
    embed.main([*arguments, "--output", str(tmp_path / "faces.npz")])
    found = np.load(tmp_path / "faces.npz")
    embedder = load_embedder(layer)
    np.testing.assert_allclose(found["embedding"][0], unit(embedder, align_face(photo, points)), atol=1e-4)
    assert found["embedding"][0] @ unit(embedder, crop) > 0.98
    np.testing.assert_allclose(found["landmark"][0], points, rtol=1e-5)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("0.png 1 2 3 4 5 6 7 8 9", "9 finite numbers"),
        ("0.png 1 2 3 4 5 6 7 8 9 nan", "10 finite numbers"),
        ("0.png 1 2 3 4 5 6 7 8 9 x", "ten numbers expected"),
        ("9.png 1 2 3 4 5 6 7 8 9 10", "no such image"),
        ("", "no landmarks in it"),
    ],
)
def test_landmark_lists_are_checked(tmp_path, line, told):
    save_picture(tmp_path / "0.png", picture(0))
    (tmp_path / "l.txt").write_text(f"\n{line}\n")
    with pytest.raises(UserError, match=told):
        read_landmarks(tmp_path / "l.txt", tmp_path)


@pytest.mark.parametrize("points", ["1 1 " * 5, "1e30 51 73 51 56 71 41 92 70 92"])
def test_landmarks_that_no_face_has_name_the_photo(tmp_path, run_dir, capsys, points):
    save_picture(tmp_path / "photos/a.png", picture(0))
    (tmp_path / "l.txt").write_text(f"a.png {points}\n")
    output = ["--model", run_dir, "--output", tmp_path / "o.npz"]
    fail(embed.main, tmp_path / "photos", "--landmarks", tmp_path / "l.txt", *output)
    assert "a.png: landmarks [[1" in capsys.readouterr().err


def test_bad_sources_are_one_line(tmp_path, run_dir, capsys):
    save_picture(tmp_path / "big/a.png", picture(0, 130, 120))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.jpg").write_bytes(b"no jpeg")
    (tmp_path / "empty").mkdir()
    output = ["--model", run_dir, "--output", tmp_path / "o.npz"]
    for arguments, told in (
        ([tmp_path / "big", *output], "a.png: 120x130 pixels, the network takes aligned 112x112 crops"),
        ([tmp_path / "broken", *output], "a.jpg: not an image that can be decoded"),
        ([tmp_path / "empty", *output], "no images there"),
        ([tmp_path / "none", *output], "no such file or folder"),
        ([tmp_path / "big", *output, "--detector", tmp_path / "no.onnx"], "no such detector"),
        ([tmp_path / "big", "--model", run_dir, "--output", tmp_path / "o.csv"], "must end in .npz"),
    ):
        fail(embed.main, *arguments)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and told in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "broken", "empty", "work_dirs"]
    embed.main([str(tmp_path / "big"), *map(str, output), "--resize"])
    assert np.load(tmp_path / "o.npz")["embedding"].shape == (1, 32)


class FakeYuNet:
    """Finds one face for each saturated red pixel, box and points around it, as FaceDetectorYN's rows say."""

    def __init__(self):
        self.size = None

    def setInputSize(self, size):
        self.size = size

    def detect(self, image_bgr):
        assert self.size == (image_bgr.shape[1], image_bgr.shape[0])
        rows = []
        for number, (y, x) in enumerate(np.argwhere((image_bgr == (0, 0, 255)).all(axis=2))):
            points = np.asarray(ARCFACE_TEMPLATE) + np.array([x, y])
            rows.append([x, y, 112 + number, 112, *points.ravel(), 0.95 - 0.01 * number])
        return 1, np.array(rows, np.float32) if rows else None


def test_detector_takes_the_largest_face_or_all(tmp_path, run_dir, layer, monkeypatch, capsys):
    photo = np.full((300, 400, 3), 30, np.uint8)
    photo[20:132, 40:152], photo[150:262, 200:312] = picture(1) // 2, picture(2) // 2
    photo[20, 40] = photo[150, 200] = (255, 0, 0)
    save_picture(tmp_path / "photos/two.png", photo)
    save_picture(tmp_path / "photos/zero.png", np.full((90, 80, 3), 30, np.uint8))
    model = tmp_path / "yunet.onnx"
    model.write_bytes(b"stand-in")
    fake = SimpleNamespace(create=lambda *_: FakeYuNet())
    monkeypatch.setattr(cv2, "FaceDetectorYN", fake)
    arguments = [str(tmp_path / "photos"), "--model", str(run_dir), "--detector", str(model)]
    embed.main([*arguments, "--output", str(tmp_path / "one.npz")])
    embed.main([*arguments, "--output", str(tmp_path / "all.npz"), "--all-faces"])
    assert "no face found in 1 of 2 photos" in capsys.readouterr().err
    one, both = np.load(tmp_path / "one.npz"), np.load(tmp_path / "all.npz")
    embedder = load_embedder(layer)
    # The rows' points sit on the template, so that alignment cuts out exactly the square at the red pixel.
    squares = [photo[20:132, 40:152], photo[150:262, 200:312]]
    np.testing.assert_allclose(both["embedding"], [unit(embedder, square) for square in squares], atol=1e-3)
    np.testing.assert_allclose(one["embedding"][0], unit(embedder, squares[1]), atol=1e-3)  # its box is wider
    np.testing.assert_allclose(both["score"], [0.95, 0.94], rtol=1e-5)


def test_a_file_that_is_no_detector(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"\x00nothing")
    with pytest.raises(UserError, match="cannot load it as a YuNet detector"):
        build_detector(tmp_path / "x.onnx")


def test_photos_obey_exif_and_crops_do_not(tmp_path):
    from PIL import Image

    image = Image.fromarray(picture(0, 112, 112))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    stored = AlignedFaces([Face(tmp_path / "a.jpg")], 112)[0]
    turned = AlignedFaces([Face(tmp_path / "a.jpg", np.asarray(ARCFACE_TEMPLATE))], 112)[0]
    np.testing.assert_array_equal(turned, np.rot90(stored, -1))
    np.testing.assert_array_equal(AlignedFaces([Face(tmp_path / "a.png")], 112)[0], picture(0))
    assert find_images(tmp_path / "a.png") == [tmp_path / "a.png"]
    assert detect_faces([tmp_path / "a.png"], lambda _: [], every=True) == ([], [tmp_path / "a.png"])


# --- compare


def write_bin(path, num_pairs, seed=0):
    """Pairs 2i are an image and a noisy copy, pairs 2i+1 two images; returns the pairs and labels."""
    rng = np.random.default_rng(seed)
    images, same = [], []
    for pair in range(num_pairs):
        first, second = (rng.integers(0, 256, (112, 112, 3), dtype=np.uint8) for _ in range(2))
        if pair % 2 == 0:
            second = np.clip(first.astype(int) + rng.integers(-9, 10, first.shape), 0, 255).astype(np.uint8)
        images += [first, second]
        same.append(pair % 2 == 0)
    encoded = [cv2.imencode(".png", image[..., ::-1])[1].tobytes() for image in images]
    path.write_bytes(pickle.dumps((encoded, same)))
    return images, np.array(same)


@pytest.mark.parametrize("far", [0.2, 0.0])
def test_compare_measures_the_threshold(tmp_path, run_dir, layer, capsys, far):
    images, same = write_bin(tmp_path / "pairs.bin", 20)
    embedder = load_embedder(layer)
    vectors = np.array([unit(embedder, image) for image in images])
    scores = np.sum(vectors[0::2] * vectors[1::2], axis=1)
    different = np.sort(scores[~same])[::-1]
    expected = different[2] if far else different[0]  # ten pairs: two may pass at 0.2
    a, b = save_picture(tmp_path / "a.png", images[2]), save_picture(tmp_path / "b.png", images[3])
    arguments = [str(a), str(b), "--model", str(run_dir), "--calibrate", str(tmp_path / "pairs.bin"), "--far", str(far)]
    compare.main(arguments)
    told = capsys.readouterr().out
    answer = "same" if scores[1] > expected else "different"
    assert told.startswith(f"{answer}: similarity {scores[1]:.3f}"[:-1])
    kept = json.loads((run_dir / "threshold.json").read_text())
    assert abs(kept["threshold"] - expected) < 1e-4
    assert kept["far"] == (0.2 if far else 0.0) and kept["different"] == 10 and kept["same"] == 10
    assert f"FAR {far:.2e}" in told and "10 different pairs of pairs.bin" in told
    assert ("below 3.0e-01 with 95% confidence" in told) == (far == 0.0)
    (tmp_path / "pairs.bin").unlink()  # the kept measurement serves the next time
    compare.main([str(a), str(a), "--model", str(run_dir), "--far", str(far)])
    assert capsys.readouterr().out.startswith("same: similarity 1.0000")


def test_compare_by_the_newest_run_and_its_own_sets(tmp_path, run_dir, monkeypatch, capsys):
    images, _ = write_bin(tmp_path / "own.bin", 8)
    content = {"model": NETWORK, "data": {"root": str(tmp_path)}, "verify": {"sets": ["own"]}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(content))
    a, b = save_picture(tmp_path / "a.png", images[0]), save_picture(tmp_path / "b.png", images[1])
    monkeypatch.chdir(tmp_path)
    compare.main([str(a), str(b), "--far", "0.1"])
    told = capsys.readouterr().out
    assert "model: work_dirs/run" in told and "same: similarity" in told and "pairs of own.bin" in told
    compare.main([str(a), str(b), "--threshold", "1.0"])
    assert "different: similarity" in capsys.readouterr().out


def test_other_weights_are_measured_anew(tmp_path, run_dir, layer, capsys):
    images, _ = write_bin(tmp_path / "pairs.bin", 12)
    a = save_picture(tmp_path / "a.png", images[0])
    arguments = [str(a), str(a), "--model", str(run_dir), "--calibrate", str(tmp_path / "pairs.bin")]
    compare.main(arguments)
    first = json.loads((run_dir / "threshold.json").read_text())
    state = state_of(layer)
    state["features.bias"] = state["features.bias"] + 1.0
    save_pdparams(run_dir / "backbone.pdparams", state)
    compare.main(arguments)
    second = json.loads((run_dir / "threshold.json").read_text())
    assert first["identity"] != second["identity"] and first["threshold"] != second["threshold"]


def test_a_set_that_changed_under_its_name_is_measured_anew(tmp_path, run_dir, capsys):
    images, _ = write_bin(tmp_path / "pairs.bin", 12)
    a = save_picture(tmp_path / "a.png", images[0])
    arguments = [str(a), str(a), "--model", str(run_dir), "--calibrate", str(tmp_path / "pairs.bin"), "--device", "cpu"]
    compare.main(arguments)
    first = json.loads((run_dir / "threshold.json").read_text())
    write_bin(tmp_path / "pairs.bin", 12, seed=1)
    compare.main(arguments)
    second = json.loads((run_dir / "threshold.json").read_text())
    assert first["identity"] == second["identity"] and first["threshold"] != second["threshold"]


def test_cut_jpegs_are_refused_by_every_tool(tmp_path, run_dir, capsys):
    """Training refuses them; OpenCV would fill in grey."""
    whole = cv2.imencode(".jpg", picture(0))[1].tobytes()
    cut = tmp_path / "photos/cut.jpg"
    cut.parent.mkdir()
    cut.write_bytes(whole[: len(whole) // 2])
    fail(embed.main, tmp_path / "photos", "--model", run_dir, "--output", tmp_path / "o.npz")
    assert "cut.jpg: not an image that can be decoded" in capsys.readouterr().err
    fail(compare.main, cut, cut, "--model", run_dir, "--threshold", "0.5")
    assert "cut.jpg: not an image that can be decoded" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"cut\.jpg: not an image that can be decoded"):
        infer(cut, backbone="iresnet18", pretrained=run_dir)
    assert not (tmp_path / "o.npz").exists()


def test_landmarks_outside_of_a_photo_are_said(tmp_path, run_dir, capsys):
    save_picture(tmp_path / "photos/a.png", picture(0))
    points = np.asarray(ARCFACE_TEMPLATE) + 80
    (tmp_path / "points.txt").write_text("a.png " + " ".join(map(str, points.ravel())) + "\n")
    arguments = [tmp_path / "photos", "--model", run_dir, "--landmarks", tmp_path / "points.txt"]
    embed.main([*map(str, arguments), "--output", str(tmp_path / "o.npz")])
    assert "warning: 1 of 1 images have a landmark outside of the picture" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.npz", "photos", "points.txt", "work_dirs"]


def test_two_embeddings_into_one_file(tmp_path, run_dir, capsys):
    save_picture(tmp_path / "photos/a.png", picture(0))
    arguments = [tmp_path / "photos", "--model", run_dir, "--output", tmp_path / "o.npz"]
    with claim(tmp_path, name="o.npz.owner"):
        fail(embed.main, *arguments)
        assert "in use by process" in capsys.readouterr().err
        embed.main([*map(str, arguments[:-1]), str(tmp_path / "other.npz")])
    embed.main([*map(str, arguments)])


def test_compare_without_any_threshold(tmp_path, run_dir, monkeypatch, capsys):
    a = save_picture(tmp_path / "a.png", picture(0))
    fail(compare.main, a, a, "--model", run_dir)
    assert "no threshold is known" in capsys.readouterr().err
    compare.main([str(a), str(a), "--model", str(run_dir), "--threshold", "0.5"])
    assert "same: similarity 1.0000, threshold 0.5000 as given (its FAR is unknown" in capsys.readouterr().out
    fail(compare.main, a, a, "--model", run_dir, "--threshold", "1.5")
    assert "a cosine lies in" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "work_dirs/run")
    fail(compare.main, a, a)
    assert "no run with weights under work_dirs/" in capsys.readouterr().err


# --- model_test


def test_model_test_writes_the_table_of_all_sets(tmp_path, layer, capsys, monkeypatch):
    """arcface-Paddle's command, for any network: every .bin of the folder, the known ones first."""
    (tmp_path / "data").mkdir()
    for seed, name in enumerate(("zebra", "cplfw", "lfw")):
        write_bin(tmp_path / f"data/{name}.bin", 10, seed)
    save_pdparams(tmp_path / "w.pdparams", state_of(layer))
    monkeypatch.chdir(tmp_path)
    arguments = ["--network", "iresnet18", "--weights", str(tmp_path / "w.pdparams"), "--data", str(tmp_path / "data")]
    model_test.main(arguments)
    text = (tmp_path / "results.txt").read_text()
    assert text.strip() in capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert rows == ["Set", "lfw", "cplfw", "zebra"]
    assert "1.00000+-0.00000" in next(line for line in text.splitlines() if "lfw" in line)
    model_test.main([*arguments, "--target", "cplfw", "--output", str(tmp_path / "other.txt")])
    assert "zebra" not in (tmp_path / "other.txt").read_text()
    capsys.readouterr()
    model_test.main([*arguments, "--target", " cplfw.bin, lfw", "--output", str(tmp_path / "new/table.txt")])
    written = (tmp_path / "new/table.txt").read_text()
    assert "warning: cplfw: FAR 0.001 lies below what" in written and "warning: lfw" in written
    capsys.readouterr()
    for extra, told in ((["--target", "lfw,agedb_30"], "agedb_30.bin missing"), (["--batch-size", "0"], "at least 1")):
        fail(model_test.main, *arguments, *extra)
        assert told in capsys.readouterr().err
    fail(model_test.main, "--network", "iresnet200", "--weights", tmp_path / "w.pdparams", "--data", tmp_path / "data")
    assert "does not fit IResNet" in capsys.readouterr().err

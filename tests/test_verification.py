"""eval/verification.py: the command, the function training calls, the same result on any number of ranks."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import paddle
import pytest
from PIL import Image

from eval import verification
from eval.bins import save_bin
from eval.metrics import verification_metrics
from eval.options import default_result_dir
from eval.pairs import load_sets, verify
from eval.protocols import read_pair_files, read_pair_list
from eval.verification import main
from tests.eval_data import ProjectionEmbedder, faces, pairs_of
from tests.ranks import run_ranks
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def embedder(monkeypatch):
    """The commands find this stand-in instead of a network."""
    stand_in = ProjectionEmbedder()
    monkeypatch.setattr(verification, "load_embedder", lambda *_, **__: stand_in)
    return stand_in


def encode(image, suffix=".png"):
    return cv2.imencode(suffix, image[..., ::-1] if image.ndim == 3 else image)[1].tobytes()


def write_set(folder, name, num_pairs=24, seed=0, noise=90):
    images, person = faces(8, 5, seed=seed, noise=noise)
    index, same = pairs_of(person, num_pairs, seed)
    folder.mkdir(exist_ok=True)
    save_bin(folder / f"{name}.bin", [encode(images[k]) for k in index], same.tolist())
    return images[index], same


def expected(embedder, images, same):
    plain = np.concatenate([embedder(image[None]) for image in images]).astype(np.float64)
    mirrored = np.concatenate([embedder(image[None], flip=True) for image in images]).astype(np.float64)
    xnorm = (np.linalg.norm(plain, axis=1).mean() + np.linalg.norm(mirrored, axis=1).mean()) / 2
    return verification_metrics(plain + mirrored, same), verification_metrics(plain, same), xnorm


def test_command_writes_what_it_prints(tmp_path, capsys, embedder):
    images, same = write_set(tmp_path / "sets", "lfw", noise=160)
    write_set(tmp_path / "sets", "agedb_30", seed=1)
    main(["--model", "m", "--data-dir", str(tmp_path / "sets"), "--result-dir", str(tmp_path / "out"),
          "--report", str(tmp_path / "page.html"), "--threshold", "1.2", "--batch-size", "7"])  # fmt: skip
    flip, plain, xnorm = expected(embedder, images, same)
    printed = capsys.readouterr().out
    assert f"[lfw]Accuracy-Flip: {flip.accuracy:1.5f}+-{flip.accuracy_std:1.5f}" in printed
    assert f"[lfw]Accuracy: {plain.accuracy:1.5f}+-{plain.accuracy_std:1.5f}" in printed
    assert "[lfw]XNorm: " in printed
    assert "VAL@FAR=0.001" in printed
    assert "agedb_30" in printed
    assert "lfw" in printed.split("agedb_30")[0]  # in the order of the known sets
    row = json.loads((tmp_path / "out" / "verification.json").read_text())["sets"]["lfw"]
    for key in ("val", "val_std", "far", "auc", "eer", "threshold"):
        assert row[key] == getattr(flip, key), key
    assert (row["accuracy_flip"], row["accuracy"]) == (flip.accuracy, plain.accuracy)
    assert 0.5 < flip.accuracy < 1
    assert row["xnorm"] == pytest.approx(xnorm, rel=1e-6)
    assert row["fixed_threshold"] == 1.2
    with open(tmp_path / "out" / "verification.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["set"] for line in lines] == ["lfw", "agedb_30"]
    assert float(lines[0]["accuracy_flip"]) == flip.accuracy
    for name in ("roc.png", "lfw_histogram.png", "lfw_errors.png"):
        assert Image.open(tmp_path / "out" / name).size[0] > 300
    assert (tmp_path / "page.html").stat().st_size > 50_000


def test_missing_sets_are_named_unless_allowed(tmp_path, capsys):
    """Sets that are missing are not skipped in silence."""
    write_set(tmp_path, "lfw")
    with pytest.raises(SystemExit) as stop:
        main(["--model", "m", "--data-dir", str(tmp_path), "--target", "lfw,cfp_fp,calfw"])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "cfp_fp.bin, calfw.bin missing" in line
    assert " lfw.bin" not in line
    out = tmp_path / "out"
    main(
        [
            "--model",
            "m",
            "--data-dir",
            str(tmp_path),
            "--target",
            "lfw,cfp_fp",
            "--allow-missing",
            "--result-dir",
            str(out),
        ]
    )
    assert list(json.loads((out / "verification.json").read_text())["sets"]) == ["lfw"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "nowhere"], "nowhere: no such folder"),
        (["--data-dir", "."], "none of lfw.bin"),
        ([], "nothing to judge"),
        (["--image-dir", "."], "--image-dir and --pairs belong together"),
        (["--data-dir", ".", "--num-folds", "1"], "--num-folds 1: must be at least 2"),
        (["--data-dir", ".", "--num-errors", "-3"], "--num-errors -3: must be at least 0"),
        (["--data-dir", ".", "--far", "-1"], "--far -1.0: must lie between"),
    ],
)
def test_one_line_errors(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["--model", "m", *arguments])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_broken_set_is_one_line(tmp_path, capsys):
    write_set(tmp_path, "lfw")
    (tmp_path / "lfw.bin").write_bytes((tmp_path / "lfw.bin").read_bytes()[:5000])
    with pytest.raises(SystemExit):
        main(["--model", "m", "--data-dir", str(tmp_path), "--target", "lfw"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "lfw.bin" in line


def test_grey_and_odd_sized_images_and_sets_smaller_than_a_batch(tmp_path, embedder):
    """arcface-Paddle fills its last batch with images before it, of which a small set has too few."""
    images, person = faces(3, 2)
    index, same = pairs_of(person, 6)
    encoded = [encode(images[k]) for k in index]
    encoded[1] = encode(images[index[1]][..., 0])
    encoded[2] = encode(cv2.resize(images[index[2]], (97, 131)), ".jpg")
    save_bin(tmp_path / "tiny.bin", encoded, same.tolist())
    sets = load_sets(tmp_path, ["tiny"])
    assert sets["tiny"][0].shape == (12, 112, 112, 3)
    result = verify(embedder, sets, batch_size=64)["tiny"]
    assert result.metrics.num_folds == 6
    whole = verify(embedder, sets, batch_size=1)["tiny"]
    assert result == whole
    np.testing.assert_array_equal(result.distance_P, whole.distance_P)


def test_images_are_brought_to_the_networks_size(embedder):
    images, person = faces(3, 4, size=80)
    index, same = pairs_of(person, 10)
    resized = np.stack([cv2.resize(image, (112, 112), interpolation=cv2.INTER_LINEAR) for image in images[index]])
    assert verify(embedder, {"a": (images[index], same)}) == verify(embedder, {"a": (resized, same)})


def test_embeddings_that_are_not_finite_name_the_set(embedder):
    images, person = faces(3, 4)
    index, same = pairs_of(person, 10)
    embedder.matrix[0, 0] = np.nan
    with pytest.raises(UserError, match="lfw: embedding 0 holds NaN"):
        verify(embedder, {"lfw": (images[index], same)})


def write_lfw(folder):
    images, person = faces(4, 3, noise=90)
    for k, image in enumerate(images):
        name = f"Person_{person[k]}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name / f"{name}_{k % 3 + 1:04d}.png"), image[..., ::-1])
    return images


def test_lfw_from_a_folder_and_either_kind_of_pair_list(tmp_path, embedder):
    images = write_lfw(tmp_path / "lfw")
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("1\t2\nPerson_0\t1\t3\nPerson_2 2 1\nPerson_0\t1\tPerson_3\t2\r\nPerson_1\t2\tPerson_2\t3\n")
    wanted = images[[0, 2, 7, 6, 0, 10, 4, 8]]
    got, same = read_pair_list(pairs, tmp_path / "lfw", 112)
    np.testing.assert_array_equal(got, wanted)
    assert same.tolist() == [True, True, False, False]
    listed = tmp_path / "lfw_test_pair.txt"
    names = [f"Person_{k // 3}/Person_{k // 3}_{k % 3 + 1:04d}.png" for k in (0, 2, 7, 6, 0, 10, 4, 8)]
    # No newline after the last line: a reader that cuts the last character of every line loses one there.
    listed.write_text("\n".join(f"{names[2 * p]} {names[2 * p + 1]} {int(same[p])}" for p in range(4)))
    again, same_again = read_pair_list(listed, tmp_path / "lfw", 112)
    np.testing.assert_array_equal(again, wanted)
    np.testing.assert_array_equal(same_again, same)
    out = tmp_path / "out"
    main(["--model", "m", "--data-dir", str(tmp_path / "lfw"), "--pairs", str(listed), "--threshold", "0.9",
          "--num-folds", "2", "--result-dir", str(out)])  # fmt: skip
    row = json.loads((out / "verification.json").read_text())["sets"]["lfw_test_pair"]
    distance = verify(embedder, {"x": (wanted, same)}, num_folds=2)["x"].distance_P
    assert row["fixed_accuracy"] == np.mean((distance < 0.9) == same)
    assert row["pairs"] == 4
    write_set(tmp_path / "sets", "calfw")
    both = [
        "--model",
        "m",
        "--data-dir",
        str(tmp_path / "sets"),
        "--image-dir",
        str(tmp_path / "lfw"),
        "--pairs",
        str(pairs),
    ]
    main([*both, "--num-folds", "2", "--result-dir", str(out)])
    assert list(json.loads((out / "verification.json").read_text())["sets"]) == ["calfw", "pairs"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Person_0 1 9\n", r"Person_0_0009.jpg: no such file"),
        ("Person_0 x Person_1 2\n", r"pairs.txt line 1: 'Person_0 x Person_1 2'"),
        ("a.jpg b.jpg 2\n", "line 1"),
        ("10 300\n", "no pairs"),
        ("", "empty"),
    ],
)
def test_bad_pair_lists(tmp_path, text, message):
    write_lfw(tmp_path / "lfw")
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_pair_list(tmp_path / "pairs.txt", tmp_path / "lfw", 112)


PAIRS = "J.K._Row 1 2\n王 小明\t1\tJ.K._Row\t2\n王 小明\t1\t3\na b/c d.x.jpg\tJ.K._Row/J.K._Row_0001.jpg\t-1\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gbk"])
def test_dots_blanks_and_encodings_in_pair_lists(tmp_path, encoding):
    """``J.K._Row_0001.jpg`` is not a suffix of ``J.K``, which lies there too; tabs keep names with blanks whole."""
    names = ["J.K._Row/J.K._Row_0001.jpg", "J.K._Row/J.K._Row_0002.PNG", "王 小明/王 小明_0001.webp",
             "王 小明/王 小明_0003.jpeg", "a b/c d.x.jpg", "J.K._Row/J.K.jpg"]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "pairs.v1.txt").write_bytes(PAIRS.encode(encoding))
    files = [tmp_path / name for name in names]
    assert read_pair_files(tmp_path / "pairs.v1.txt", tmp_path) == [
        (files[0], files[1], True),
        (files[2], files[1], False),
        (files[2], files[3], True),
        (files[4], files[0], False),
    ]


def test_names_of_sets_as_people_type_them(tmp_path, embedder, capsys):
    for name in ("lfw", "cfp.fp"):
        write_set(tmp_path / "sets", name)
    out = tmp_path / "out"
    main(["--model", "m", "--data-dir", str(tmp_path / "sets"), "--target", "lfw.bin, cfp.fp ,lfw", "--result-dir",
          str(out)])  # fmt: skip
    assert list(json.loads((out / "verification.json").read_text())["sets"]) == ["lfw", "cfp.fp"]
    assert (out / "cfp.fp_errors.png").is_file()


def test_results_of_runs_with_dots_lie_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("r50_lr0.1", "r50_lr0.2.pdparams", "r50_lr0.2.onnx", "backbone.pdparams")
    found = [default_result_dir(name, "verification").name for name in names]
    assert found == ["r50_lr0.1", "r50_lr0.2", "r50_lr0.2", "backbone"]
    (tmp_path / "r50_lr0.1").mkdir()
    assert default_result_dir("r50_lr0.1", "ijb/IJBC") == Path("r50_lr0.1/ijb/IJBC")


def test_one_pair_is_refused_before_anything_is_embedded(tmp_path, embedder, capsys):
    write_set(tmp_path, "lfw", num_pairs=1)
    with pytest.raises(SystemExit):
        main(["--model", "m", "--data-dir", str(tmp_path)])
    assert "lfw.bin: 1 pair in it" in capsys.readouterr().err
    assert embedder.calls == 0


class TinyNet(paddle.nn.Layer):
    """A network small enough for many ranks, with batch norm so that buffers matter."""

    input_size, embedding_size, in_channels = 112, 8, 3

    def __init__(self):
        super().__init__()
        self.conv = paddle.nn.Conv2D(3, 4, 16, stride=16)
        self.norm = paddle.nn.BatchNorm2D(4)
        self.fc = paddle.nn.Linear(196, 8)

    def forward(self, image):
        return self.fc(self.norm(self.conv(image)).flatten(1))


def test_a_layer_keeps_its_mode_and_its_buffers(monkeypatch):
    monkeypatch.undo()
    paddle.seed(0)
    net = TinyNet()
    net.train()
    net.fc.eval()
    before = [value.numpy().copy() for value in net.state_dict().values()]
    assert len(before) == 8  # running statistics among them
    images, person = faces(3, 4)
    index, same = pairs_of(person, 10)
    first = verify(net, {"a": (images[index], same)}, batch_size=4)["a"]
    assert net.training
    assert net.norm.training
    assert not net.fc.training
    for now, value in zip(net.state_dict().values(), before, strict=True):
        np.testing.assert_array_equal(now.numpy(), value)
    other = verify(net, {"a": (images[index], same)}, batch_size=9)["a"]
    np.testing.assert_allclose(first.distance_P, other.distance_P, atol=1e-5)


RANKS = """
import sys
import numpy as np
import paddle
from tests.eval_data import faces, pairs_of
from tests.test_verification import TinyNet
from eval.pairs import verify
from utils import distributed

distributed.init("cpu")
paddle.seed(0)
net = TinyNet()
for value in (net.norm._mean, net.norm._variance):  # running statistics, which Paddle keeps as frozen parameters
    value.set_value(value * 2 + 0.25)
own = [value.numpy() for value in net.state_dict().values()]
assert len(own) == 8
images, person = faces(5, 5, noise=120)
sets = {}
for name, num_pairs in (("few", 2), ("odd", 37)):
    index, same = pairs_of(person, num_pairs)
    sets[name] = (images[index], same)
for name, result in verify(net, sets, batch_size=8).items():
    print("RESULT", name, result.metrics, result.no_flip.accuracy, result.xnorm, result.distance_P.tobytes().hex())
assert all((now.numpy() == value).all() for now, value in zip(net.state_dict().values(), own))
"""


@pytest.mark.distributed
def test_the_same_numbers_on_one_two_and_three_ranks():
    outputs = {num_ranks: run_ranks(RANKS, num_ranks) for num_ranks in (1, 2, 3)}
    lines = [
        [line for line in output.splitlines() if line.startswith("RESULT")]
        for ranks in outputs.values()
        for output in ranks
    ]
    assert len(lines) == 6
    assert len(lines[0]) == 2
    assert all(other == lines[0] for other in lines)


FAILING = """
from tests.eval_data import ProjectionEmbedder, faces, pairs_of
from eval.pairs import verify
from utils import distributed
from utils.errors import one_line_errors

@one_line_errors
def main():
    distributed.init("cpu")
    embedder = ProjectionEmbedder()
    if distributed.get_rank() == 1:
        def broken(*_, **__):
            raise RuntimeError("the second rank's network broke")
        embedder.__class__.__call__ = broken
    images, person = faces(3, 3)
    index, same = pairs_of(person, 10)
    verify(embedder, {"a": (images[index], same)}, batch_size=4)
    print("NOT REACHED")

main()
"""


@pytest.mark.distributed
def test_a_failure_on_one_rank_ends_all():
    *outputs, status = run_ranks(FAILING, 2, check=False)
    assert status != "0"
    assert any("the second rank's network broke" in output for output in outputs)
    assert not any("NOT REACHED" in output for output in outputs)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_script_itself_alone_and_under_the_launcher(tmp_path):
    from backbones import build_backbone

    options = {"network": "mobilefacenet", "embedding_size": 16}
    paddle.seed(0)
    net = build_backbone(**{"name" if key == "network" else key: value for key, value in options.items()})
    run = tmp_path / "run"
    run.mkdir()
    paddle.save(net.state_dict(), str(run / "backbone.pdparams"))
    (run / "config.yaml").write_text("model: " + json.dumps(options) + "\n")
    write_set(tmp_path, "lfw", noise=160)
    arguments = [
        "--model",
        str(run),
        "--data-dir",
        str(tmp_path),
        "--engine",
        "dynamic",
        "--batch-size",
        "8",
        "--result-dir",
    ]
    alone = subprocess.run(
        [sys.executable, "eval/verification.py", *arguments, str(tmp_path / "1")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Accuracy-Flip" in alone.stdout
    run_ranks("eval/verification.py", 2, [*arguments, str(tmp_path / "2")])
    first, second = (json.loads((tmp_path / k / "verification.json").read_text())["sets"]["lfw"] for k in "12")
    assert first == second

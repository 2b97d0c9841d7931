"""eval/ijb.py, its readers and its cache: figures against plain loops, resuming, one-line errors."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.metrics import roc_curve

from eval import features, ijb
from eval.ijb import main
from eval.metrics import FARS
from eval.protocols import read_csv_protocol, read_ijb, read_pairs
from eval.tables import ALL_SETTINGS, Setting, evaluate_templates, identify
from tests.eval_data import ProjectionEmbedder, write_ijb
from tests.ranks import run_ranks
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def embedder(monkeypatch):
    """The command finds this stand-in instead of a network; the file ``model`` holds its "weights"."""
    stand_in = ProjectionEmbedder()
    monkeypatch.setattr(ijb, "load_embedder", lambda *_, **__: stand_in)
    return stand_in


@pytest.fixture
def mini(tmp_path):
    """An IJB-shaped folder, the command's usual arguments, and what the folder was made from."""
    made = write_ijb(tmp_path / "MINI")
    (tmp_path / "model").write_bytes(b"weights")
    arguments = ["--model", str(tmp_path / "model"), "--image-path", str(tmp_path / "MINI"), "--target", "MINI"]
    return tmp_path, [*arguments, "--result-dir", str(tmp_path / "out")], made


def loop_scores(made, plain, mirrored, setting):
    """The protocol written out: features, media means, template sums, pair by pair."""
    feature = plain.astype(np.float64) + (mirrored if setting.flip else 0)
    if not setting.norm:
        feature = feature / np.linalg.norm(feature, axis=1, keepdims=True)
    if setting.detector:
        feature = feature * made["score"][:, None]
    pooled = {}
    for template in np.unique(made["template"]):
        mine = made["template"] == template
        means = [feature[mine & (made["media"] == media)].mean(0) for media in np.unique(made["media"][mine])]
        total = np.sum(means, axis=0)
        pooled[template] = total / np.linalg.norm(total)
    return np.array([pooled[a] @ pooled[b] for a, b, _ in made["pairs"]])


def nearest(made, score):
    fpr, tpr, _ = (np.flipud(part) for part in roc_curve(made["pairs"][:, 2], score))
    return [tpr[min(zip(abs(fpr - far), range(len(fpr)), strict=True))[1]] for far in FARS]


def test_command_gives_the_figures_of_plain_loops_for_all_eight_settings(mini, embedder, capsys):
    folder, arguments, made = mini
    main([*arguments, "--all-settings", "--batch-size", "5", "--report", str(folder / "page.html")])
    printed = capsys.readouterr().out
    # The crops hold the images shifted by whole pixels, so alignment brings them back exactly.
    plain, mirrored = embedder(made["images"]), embedder(made["images"], flip=True)
    content = json.loads((folder / "out" / "ijb.json").read_text())
    rows = []
    for setting in ALL_SETTINGS:
        wanted = nearest(made, loop_scores(made, plain, mirrored, setting))
        assert [point["nearest"] for point in content["tar_at_far"][str(setting)]] == wanted
        rows.append(" | ".join([f"| mini-MINI {setting}", *(f"{100 * value:.2f}" for value in wanted)]) + " |")
    squeezed = "\n".join(" ".join(line.split()) for line in printed.splitlines())
    assert all(row in squeezed for row in rows)
    assert len({str(content["tar_at_far"][str(setting)]) for setting in ALL_SETTINGS}) > 4  # the switches matter
    score = np.load(folder / "out" / "scores.npy")
    assert score.dtype == np.float64
    np.testing.assert_allclose(score, loop_scores(made, plain, mirrored, Setting()), atol=1e-12)
    assert "| Methods | 1e-06 | 1e-05 | 0.0001 | 0.001 | 0.01 | 0.1 |" in squeezed
    assert "FAR used" in printed
    for name in ("roc.pdf", "roc.png", "histogram.png", "errors.png", "ijb.csv"):
        assert (folder / "out" / name).stat().st_size > 0
    with open(folder / "out" / "ijb.csv") as file:
        assert len(list(csv.DictReader(file))) == 8 * len(FARS)
    assert (folder / "page.html").stat().st_size > 50_000


def test_switches_turn_off(mini, embedder, capsys):
    folder, arguments, made = mini
    main([*arguments, "--no-use-norm-score", "--no-use-detector-score", "--no-use-flip-test"])
    plain = embedder(made["images"])
    wanted = loop_scores(made, plain, plain, Setting(False, False, False))
    np.testing.assert_allclose(np.load(folder / "out" / "scores.npy"), wanted, atol=1e-12)


def test_switches_by_hand():
    """N1 keeps the norm, N0 removes it; D1 weighs by the detector; F1 adds the mirror image."""
    rows, index, score = np.array([[[3.0, 4.0], [1.0, 0.0]]], np.float32), np.array([2]), np.array([9.0, 9.0, 0.5])
    expected = {
        (True, False, False): [3, 4],
        (True, False, True): [4, 4],
        (True, True, True): [2, 2],
        (False, False, False): [0.6, 0.8],
        (False, True, False): [0.3, 0.4],
        (False, False, True): [0.5**0.5, 0.5**0.5],
    }
    for switches, feature in expected.items():
        np.testing.assert_allclose(Setting(*switches).transform(score)(rows, index), [feature], rtol=1e-15)
    assert [str(setting) for setting in ALL_SETTINGS][:3] == ["N0D0F0", "N0D0F1", "N0D1F0"]


def test_identification_of_the_folder(mini, embedder):
    folder, _, made = mini
    protocol = read_ijb(folder / "MINI", "MINI")
    stored = np.stack([embedder(made["images"]), embedder(made["images"], flip=True)], 1)
    result = evaluate_templates(protocol, stored, Setting())
    rows = {row.gallery: row for row in identify(protocol, result.template_T, result.feature_TD)}
    assert list(rows) == ["G1", "G2", "all"]
    # Six people, three in each gallery; each has two probe templates.
    assert (rows["G1"].closed.num_probes, rows["G1"].closed.num_subjects) == (6, 3)
    assert rows["all"].closed.num_probes == 12
    feature = dict(zip(result.template_T.tolist(), result.feature_TD, strict=True))
    gallery = {person: feature[person * 1000 + 7] for person in range(6)}
    ranks, best = {}, {}
    for template in feature:
        if template % 1000 != 7:
            scores = {person: feature[template] @ gallery[person] for person in (0, 2, 4)}
            best[template] = max(scores.values())
            if template // 1000 in scores:
                ranks[template] = sum(s > scores[template // 1000] for s in scores.values()) + 1
    assert rows["G1"].closed.rates[0] == np.mean([rank == 1 for rank in ranks.values()])
    strangers = sorted((score for template, score in best.items() if template not in ranks), reverse=True)
    assert rows["G1"].open[0].threshold == pytest.approx(strangers[0])
    hits = [ranks[t] == 1 and best[t] > strangers[0] for t in ranks]
    assert rows["G1"].open[0].tpir == np.mean(hits)
    assert rows["all"].reference is not None


def test_features_are_kept_and_used_again(mini, embedder, capsys):
    folder, arguments, _ = mini
    cache = ["--features", str(folder / "f.npy")]
    main([*arguments, *cache])
    first, calls = np.load(folder / "out" / "scores.npy"), embedder.calls
    main([*arguments[2:], *cache])  # no model needed
    assert embedder.calls == calls
    np.testing.assert_array_equal(first, np.load(folder / "out" / "scores.npy"))
    (folder / "model").write_bytes(b"other weights")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*arguments, *cache])
    assert "f.npy: made by other weights" in capsys.readouterr().err
    landmarks = folder / "MINI" / "meta" / "mini_name_5pts_score.txt"
    lines = landmarks.read_text().splitlines()
    name, first_value, rest = lines[0].split(" ", 2)
    landmarks.write_text("\n".join([f"{name} {float(first_value) + 1} {rest}", *lines[1:]]))
    with pytest.raises(SystemExit):
        main([*arguments[2:], *cache])
    assert "other images" in capsys.readouterr().err


def test_without_a_name_the_cache_lies_with_the_results_and_follows_the_weights(mini, embedder, capsys):
    folder, arguments, _ = mini
    main(arguments)
    first, calls = np.load(folder / "out" / "scores.npy"), embedder.calls
    main([*arguments, "--no-use-flip-test"])
    assert embedder.calls == calls
    (folder / "model").write_bytes(b"other weights")
    embedder.matrix[:] = np.random.default_rng(9).normal(size=embedder.matrix.shape)
    main(arguments)
    assert "made anew" in capsys.readouterr().err
    assert embedder.calls == 2 * calls
    assert not np.array_equal(first, np.load(folder / "out" / "scores.npy"))


@pytest.mark.parametrize("own", [False, True])
def test_crops_that_were_overwritten_are_embedded_again(mini, embedder, capsys, own):
    """Under the same names and in the same folder, as a second detector leaves them; sizes alone or times alone too."""
    folder, arguments, made = mini
    if own:
        write_csv_protocol(folder / "own", made)
        arguments = ["--model", str(folder / "model"), "--protocol", str(folder / "own"), *arguments[-2:]]
    crops = folder / "own" if own else folder / "MINI" / "loose_crop"
    main(arguments)
    first, calls = np.load(folder / "out" / "scores.npy"), embedder.calls
    capsys.readouterr()
    main(arguments)
    told = capsys.readouterr().err
    assert embedder.calls == calls and "features of 36 images reused from" in told and "same images" in told
    for path in crops.glob("*.png"):
        cv2.imwrite(str(path), 255 - cv2.imread(str(path)))
    main(arguments)
    assert "made anew" in capsys.readouterr().err and embedder.calls == 2 * calls
    assert not np.array_equal(first, np.load(folder / "out" / "scores.npy"))
    path = next(crops.glob("*.png"))
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    main(arguments)
    assert embedder.calls == 3 * calls
    path.write_bytes(path.read_bytes() + b" ")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    main(arguments)
    assert embedder.calls == 4 * calls


def test_a_named_cache_of_overwritten_crops_is_an_error_with_a_way_out(mini, embedder, capsys):
    folder, arguments, _ = mini
    cache = ["--features", str(folder / "f.npy")]
    main([*arguments, *cache])
    calls = embedder.calls
    for path in (folder / "MINI" / "loose_crop").iterdir():
        os.utime(path, ns=(0, 0))
    with pytest.raises(SystemExit):
        main([*arguments, *cache])
    assert "sizes or times of the image files are not those it was made from" in capsys.readouterr().err
    (folder / "f.npy.json").unlink()
    main([*arguments, *cache])
    assert "on trust" in capsys.readouterr().err
    shutil.rmtree(folder / "MINI" / "loose_crop")
    (folder / "MINI" / "loose_crop").mkdir()
    main([*arguments, *cache])  # the features alone are enough
    assert embedder.calls == calls


def test_an_unfinished_cache_embeds_again_what_changed_and_nothing_else(mini, embedder, monkeypatch):
    folder, arguments, _ = mini
    monkeypatch.setattr(features, "CHUNK", 5)
    main([*arguments, "--features", str(folder / "whole.npy")])
    embedder.calls, embedder.fail_after = 0, 7  # three chunks of five, two passes each
    cache = ["--features", str(folder / "f.npy")]
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, *cache])
    second = read_ijb(folder / "MINI", "MINI").image_N[7]  # in the second chunk
    os.utime(folder / "MINI" / "loose_crop" / second, ns=(0, 0))
    embedder.calls, embedder.fail_after = 0, None
    main([*arguments, *cache])
    assert embedder.calls == 2 * 6  # five chunks that were left and the one with the changed file
    np.testing.assert_array_equal(np.load(folder / "whole.npy"), np.load(folder / "f.npy"))


OTHER = """
import sys, time
from eval.stream import claimed
with claimed(sys.argv[1], "x", sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("what", ["folder", "cache"])
def test_one_process_a_result_folder_and_a_cache(mini, embedder, capsys, what):
    folder, arguments, _ = mini
    out = folder / "out"
    place = (out, "owner") if what == "folder" else (folder, "f.npy.owner")
    other = subprocess.Popen([sys.executable, "-c", OTHER, *map(str, place)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(SystemExit):
            main([*arguments, "--features", str(folder / "f.npy")])
        (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
        assert f"in use by process {other.pid}" in line
        assert not (folder / "f.npy").exists() and embedder.calls == 0
    finally:
        other.kill()
        other.wait()
    main([*arguments, "--features", str(folder / "f.npy")])  # the dead one's claim is taken over
    assert (out / "ijb.json").is_file() and not list(folder.glob("**/*owner_*"))


def test_an_interrupted_run_goes_on_where_it_stopped(mini, embedder, capsys, monkeypatch):
    folder, arguments, _ = mini
    monkeypatch.setattr(features, "CHUNK", 5)
    main([*arguments, "--features", str(folder / "whole.npy")])
    wanted = np.load(folder / "out" / "scores.npy")
    embedder.calls, embedder.fail_after = 0, 7  # three chunks of five, two passes each, then Ctrl-C
    cache = folder / "f.npy"
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "--features", str(cache)])
    assert not cache.exists()
    embedder.calls, embedder.fail_after = 0, None
    main([*arguments, "--batch-size", "4", "--features", str(cache)])
    assert embedder.calls == 2 * 5  # the 21 images left, in fives
    np.testing.assert_array_equal(wanted, np.load(folder / "out" / "scores.npy"))
    assert sorted(path.name for path in folder.glob("f.npy*")) == ["f.npy", "f.npy.json"]


def test_batch_size_does_not_matter(mini, embedder, monkeypatch):
    folder, arguments, _ = mini
    scores = []
    for chunk in (1, 7, 64):  # the stand-in takes a chunk as one batch
        monkeypatch.setattr(features, "CHUNK", chunk)
        main([*arguments, "--num-threads", "1", "--features", str(folder / f"f{chunk}")])
        scores.append(np.load(folder / "out" / "scores.npy"))
    np.testing.assert_array_equal(scores[0], scores[1])
    np.testing.assert_array_equal(scores[0], scores[2])


RANKS = """
import sys
from eval import features, ijb
from tests.eval_data import ProjectionEmbedder
features.CHUNK = 5
stand_in = ProjectionEmbedder()
ijb.load_embedder = lambda *_, **__: stand_in
try:
    ijb.main(sys.argv[1:])
finally:
    print("calls", stand_in.calls)
"""


@pytest.mark.distributed
def test_ranks_share_the_embedding_and_fail_together(mini, embedder):
    folder, arguments, _ = mini
    main(arguments)
    alone = [(folder / "out" / name).read_bytes() for name in ("scores.npy", "features.npy")]
    both = run_ranks(RANKS, 2, args=(*arguments[:-1], folder / "two"))
    assert [(folder / "two" / name).read_bytes() for name in ("scores.npy", "features.npy")] == alone
    assert ["calls 8" in text for text in both] == [True, True]  # four of the eight chunks each, two passes
    assert "FAR used" in both[0] and "FAR used" not in both[1]
    (folder / "MINI" / "loose_crop" / "5.png").unlink()  # in rank 1's first chunk
    failed = run_ranks(RANKS, 2, args=(*arguments[:-1], folder / "three"), check=False)
    assert all("5.png: no such file" in text for text in failed[:2])
    left = {path.name for path in (folder / "three").iterdir()}  # what a second run goes on from, no result
    assert left <= {"features.npy.part", "features.npy.done", "features.npy.json"}


def edit(path, change):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")


BAD_FILES = [
    ("face_tid_mid.txt", lambda lines: [*lines[:4], lines[4].rsplit(" ", 1)[0]], "line 5", "truncated"),
    ("face_tid_mid.txt", lambda lines: lines[:-1], "36 lines", "has 35"),
    ("name_5pts_score.txt", lambda lines: [lines[1], lines[0], *lines[2:]], "line 1: image", "has '"),
    ("name_5pts_score.txt", lambda lines: lines[:20], "20 lines", "has 36"),
    ("name_5pts_score.txt", lambda lines: [*lines[:-1], lines[-1][:40]], "line 36", "fields"),
    (
        "name_5pts_score.txt",
        lambda lines: [" ".join([*lines[0].split()[:-1], "nan"]), *lines[1:]],
        "line 1",
        "not finite",
    ),
    ("name_5pts_score.txt", lambda lines: [" ".join([*lines[0].split()[:-1], "x"]), *lines[1:]], "line 1", "'x'"),
    ("template_pair_label.txt", lambda lines: [*lines[:7], "7 1007"], "line 8", "truncated"),
    ("template_pair_label.txt", lambda lines: ["7 424242 0", *lines], "template 424242 (row 1)", "no image"),
    ("template_pair_label.txt", lambda lines: ["7 1007 2", *lines], "line 1", "0 or 1"),
    ("template_pair_label.txt", lambda lines: ["7 oops 0", *lines], "line 1", "oops"),
    (
        "template_pair_label.txt",
        lambda lines: [x for x in lines if x.endswith("0")],
        "0 genuine pairs",
        "needs genuine",
    ),
    ("template_pair_label.txt", lambda lines: [], "empty", "template_pair_label"),
    ("1N_gallery_G1.csv", lambda lines: [*lines, "9,"], "line 5", "truncated"),
    ("1N_gallery_G1.csv", lambda lines: [*lines, "99,1"], "template 99", "no image"),
    ("1N_probe_mixed.csv", lambda lines: [*lines, "11,3"], "template 11", "subjects 0 and 3"),
    ("1N_probe_mixed.csv", lambda lines: lines[:1], "no templates", "probe_mixed"),
]


@pytest.mark.parametrize(("name", "change", "where", "what"), BAD_FILES)
def test_damaged_meta_files_are_one_line(mini, embedder, capsys, name, change, where, what):
    folder, arguments, _ = mini
    edit(folder / "MINI" / "meta" / f"mini_{name}", change)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert "mini_" in line
    assert where in line
    assert what in line
    assert not (folder / "out").exists()


def test_missing_and_broken_images_and_embeddings_are_one_line(mini, embedder, capsys):
    folder, arguments, _ = mini
    crop = folder / "MINI" / "loose_crop" / "3.png"
    data = crop.read_bytes()

    def fails():
        with pytest.raises(SystemExit):
            main(arguments)
        (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
        return line

    crop.write_bytes(data[:100])
    assert "3.png: not an image that can be decoded" in fails()
    crop.unlink()
    assert "3.png: no such file" in fails()
    crop.write_bytes(data)
    embedder.matrix[0, 0] = np.nan
    assert "its embedding holds NaN" in fails()
    assert not (folder / "out" / "scores.npy").exists()


def test_cached_features_that_hold_nan_name_the_template(mini, embedder, capsys):
    folder, arguments, made = mini
    cache = folder / "f.npy"
    main([*arguments, "--features", str(cache)])
    stored = np.load(cache)
    stored[11, 0, 3] = np.nan
    np.save(cache, stored)
    with pytest.raises(SystemExit):
        main([*arguments, "--features", str(cache)])
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"template {made['template'][11]}" in line
    np.save(cache, stored[:-1])
    with pytest.raises(SystemExit):
        main([*arguments, "--features", str(cache)])
    assert "float [36, 2, size] is needed" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m", "--image-path", "nowhere"], "no such folder"),
        (["--model", "m"], "give either --image-path"),
        (["--image-path", "x"], "give --model, or --features"),
    ],
)
def test_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_pairs_with_crlf_and_blank_end(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"1 11065 1\r\n187955 2 0\r\n\r\n")
    left, right, same = read_pairs(tmp_path / "p.txt")
    assert (left.tolist(), right.tolist(), same.tolist()) == ([1, 187955], [11065, 2], [True, False])


def write_csv_protocol(folder, made, landmarks=False):
    folder.mkdir()
    lines = ["path, template ,media,score"]
    for k, image in enumerate(made["images"]):
        cv2.imwrite(str(folder / f"{k}.png"), image[..., ::-1])
        lines.append(f"{k}.png,t{made['template'][k]},m{made['media'][k]},{made['score'][k]}")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    pairs = [f"t{a},t{b},{same}" for a, b, same in made["pairs"]]
    (folder / "pairs.csv").write_text("\n".join(["left,right,same", *pairs]) + "\n")


def test_a_protocol_from_csv_gives_the_same_scores(mini, embedder):
    folder, arguments, made = mini
    main(arguments)
    wanted = np.load(folder / "out" / "scores.npy")
    write_csv_protocol(folder / "own", made)
    (folder / "own" / "gallery_A.csv").write_text("template,subject\n" + "".join(f"t{p}007,{p}\n" for p in (1, 2, 3)))
    (folder / "own" / "probe.csv").write_text("template,subject\n" + "".join(f"t{p}011,{p}\n" for p in (1, 2, 4)))
    out = folder / "csv"
    main(["--model", str(folder / "model"), "--protocol", str(folder / "own"), "--result-dir", str(out)])
    np.testing.assert_allclose(np.load(out / "scores.npy"), wanted, atol=1e-12)
    (row, merged) = json.loads((out / "ijb.json").read_text())["identification"]
    assert (row["gallery"], row["closed"]["num_probes"], merged["gallery"]) == ("A", 2, "all")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("images.csv", lambda lines: ["path,template", *lines[1:]], "lacks media"),
        ("images.csv", lambda lines: [*lines, "x.png,,m"], "no value for template"),
        ("images.csv", lambda lines: [*lines, "x.png,t7,m1,high"], "score is 'high'"),
        ("pairs.csv", lambda lines: [*lines, "t7,t8,1"], "template 't8' has no image"),
        ("pairs.csv", lambda lines: [*lines, "t7,t11,yes"], "same is 'yes'"),
        ("pairs.csv", lambda lines: lines[:1], "0 genuine pairs of 0"),
    ],
)
def test_bad_csv_protocols(mini, name, change, message):
    folder, _, made = mini
    write_csv_protocol(folder / "own", made)
    edit(folder / "own" / name, change)
    with pytest.raises(UserError, match=message):
        read_csv_protocol(folder / "own")


def test_weights_are_told_apart_by_content(tmp_path):
    (tmp_path / "a").write_bytes(b"1" * 3_000_000)
    (tmp_path / "b").write_bytes(b"1" * 2_999_999 + b"2")
    assert features.weights_digest(tmp_path / "a") != features.weights_digest(tmp_path / "b")
    with pytest.raises(UserError, match="no such weights file"):
        features.weights_digest(tmp_path / "c")


@pytest.mark.slow
def test_the_script_itself_and_its_engines_agree(tmp_path):
    import paddle

    from backbones import build_backbone

    paddle.seed(0)
    run = tmp_path / "run"
    run.mkdir()
    net = build_backbone("mobilefacenet", embedding_size=16)
    paddle.save(net.state_dict(), str(run / "backbone.pdparams"))
    (run / "config.yaml").write_text("model: {network: mobilefacenet, embedding_size: 16}\n")
    write_ijb(tmp_path / "MINI")
    scores = []
    for engine in ("dynamic", "predictor"):
        done = subprocess.run(
            [sys.executable, "eval/ijb.py", "--model", str(run), "--image-path", str(tmp_path / "MINI"),
             "--target", "MINI", "--engine", engine, "--result-dir", str(tmp_path / engine)],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "mini-MINI" in done.stdout
        scores.append(np.load(tmp_path / engine / "scores.npy"))
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)

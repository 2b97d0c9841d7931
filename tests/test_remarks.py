"""eval/remarks.py: what makes figures mean less is said, in print, JSON and page; healthy sets are left alone."""

import json

import numpy as np
import pytest

from eval import ijb, verification
from eval.distractors import identify_among_distractors
from eval.pairs import verify
from eval.protocols import TemplateProtocol
from eval.remarks import distractor_remarks, far_remarks, score_remarks, set_remarks, template_remarks
from tests.eval_data import ProjectionEmbedder, faces, pairs_of, write_ijb
from tests.test_verification import write_set


def pictures(count):
    return np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


def test_a_healthy_set_has_no_remark():
    same = np.tile([True, False], 3000)
    assert set_remarks(np.random.default_rng(0).integers(0, 256, (12000, 3, 3, 3), dtype=np.uint8), same) == []
    assert score_remarks(np.array([0.1, 0.9])) == []


@pytest.mark.parametrize(
    ("same", "words"),
    [
        ([True] * 20, ["all 20 pairs are genuine: without impostor pairs"]),
        ([False] * 20, ["all 20 pairs are impostor: without genuine pairs"]),
        ([True] * 6 + [False] * 4, ["6 of 10 folds have no impostor pair (the first is fold 1)",
                                    "4 of 10 folds have no genuine pair (the first is fold 7)"]),
        ([True, False] * 3, ["6 pairs for 10 folds"]),
        ([True, False] * 400, ["FAR 0.001 lies below what 360 impostor pairs of all folds but one can show"]),
    ],
)  # fmt: skip
def test_lists_that_lack_something(same, words):
    found = set_remarks(pictures(2 * len(same)), np.array(same))
    for word in words:
        assert sum(word in line for line in found) == 1, found
    assert all("\n" not in line for line in found)


def test_the_same_image_twice_and_pairs_listed_again():
    images = pictures(24)
    same = np.tile([True, False], 6)
    images[5] = images[4]  # pair 2, called the same person
    images[7] = images[6]  # pair 3, called different people
    images[8:10] = images[[1, 0]]  # pair 4 is pair 0 in the other order
    images[10:12] = images[[0, 1]]  # pair 5 is pair 0 with the other label
    found = set_remarks(images, same)
    assert "2 pairs hold the same image on both sides (the first is pair 2), 1 of them called different people" in found
    assert "2 of 12 pairs repeat an earlier one, 1 times with the other label: they count again" in found


@pytest.mark.parametrize(
    ("score", "word"),
    [([0.5] * 8, "are equal (0.500000)"), ([1.0, 1.0 - 1e-12], "are equal"), ([0.5, 0.502], "lie within 0.002")],
)
def test_scores_that_say_nothing(score, word):
    (line,) = score_remarks(np.array(score))
    assert word in line


def test_rates_below_what_pairs_resolve():
    assert far_remarks((1e-6, 1e-2), 100) == [
        "FAR 1e-06 lies below what 100 impostor pairs can show (1/100 = 1.0e-02): no impostor is accepted there"
    ]
    assert far_remarks((0.01,), 100) == [] and far_remarks((0.1,), 0) == []


class Constant(ProjectionEmbedder):
    """A network that has collapsed."""

    def __call__(self, images_NHWC, flip=False):
        return np.full((len(images_NHWC), self.embedding_size), self.value, np.float32)

    value = 1.0


def test_constant_and_zero_embeddings_keep_their_figures():
    images, person = faces(3, 4)
    index, same = pairs_of(person, 20)
    result = verify(Constant(), {"a": (images[index], same)})["a"]
    assert result.metrics.accuracy == 0.5
    assert any("scores of all pairs are equal (1.000000)" in line for line in result.warnings)
    nothing = Constant()
    nothing.value = 0.0
    warnings = verify(nothing, {"a": (images[index], same)})["a"].warnings
    assert any("40 of 40 embeddings are zero" in line for line in warnings)


def test_the_command_says_it_in_print_json_and_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verification, "load_embedder", lambda *_, **__: Constant())
    write_set(tmp_path / "sets", "lfw")
    verification.main(["--model", "m", "--data-dir", str(tmp_path / "sets"), "--result-dir", str(tmp_path / "out"),
                       "--report", str(tmp_path / "page.html")])  # fmt: skip
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: lfw: ")]
    stored = json.loads((tmp_path / "out" / "verification.json").read_text())["warnings"]
    assert [line.removeprefix("warning: ") for line in printed] == stored
    assert any("are equal" in line for line in stored) and any("FAR 0.001" in line for line in stored)
    page = (tmp_path / "page.html").read_text()
    assert "<h3>Warnings</h3>" in page and "tell nobody apart" in page


def protocol(left, right, same, num_templates=4):
    return TemplateProtocol(
        name="x", image_dir=None, image_N=[""] * num_templates, template_N=np.arange(num_templates),
        media_N=np.arange(num_templates), score_N=np.ones(num_templates), landmark_N52=None,
        left_P=np.array(left), right_P=np.array(right), same_P=np.array(same, bool),
    )  # fmt: skip


def test_template_pairs():
    own = protocol([0, 1, 2, 3, 3], [1, 0, 2, 1, 0], [1, 0, 1, 0, 0])
    found = template_remarks(own, np.diag([1.0, 1, 1, 0]), np.linspace(0, 1, 5), (1e-1, 0.5))
    assert found == [
        "1 of 4 templates are zero (the first is number 3): their scores mean nothing",
        "FAR 0.1 lies below what 3 impostor pairs can show (1/3 = 3.3e-01): no impostor is accepted there",
        "1 pairs compare a template with itself",
        "1 of 5 pairs repeat an earlier one, 1 times with the other label: they count again",
    ]
    large = protocol([0, 2**40, -3], [2**40, 0, 1], [1, 0, 0])
    assert "1 of 3 pairs repeat an earlier one, 1 times" in template_remarks(large, np.eye(4), np.arange(3.0), ())[-1]


def test_landmarks_outside_and_equal_scores_of_templates(tmp_path, capsys, monkeypatch):
    """Counted while the crops are read, kept with the features, so that a run which embeds nothing says it too."""
    monkeypatch.setattr(ijb, "load_embedder", lambda *_, **__: Constant())
    write_ijb(tmp_path / "MINI")
    (tmp_path / "model").write_bytes(b"weights")
    path = tmp_path / "MINI" / "meta" / "mini_name_5pts_score.txt"
    lines = path.read_text().splitlines()
    for row in (3, 4):
        name, x, rest = lines[row].split(" ", 2)
        lines[row] = f"{name} {float(x) + 400 * (-1) ** row} {rest}"
    path.write_text("\n".join(lines) + "\n")
    arguments = ["--model", str(tmp_path / "model"), "--image-path", str(tmp_path / "MINI"), "--target", "MINI",
                 "--result-dir", str(tmp_path / "out")]  # fmt: skip
    for again in (False, True):
        ijb.main([*arguments, "--report", str(tmp_path / "page.html")])
        printed = capsys.readouterr()
        assert ("features of 36 images reused" in printed.err) == again
        assert "warning: 2 of 36 images have a landmark outside of the picture" in printed.out
        assert "warning: the scores of all pairs are equal" in printed.out
        stored = json.loads((tmp_path / "out" / "ijb.json").read_text())["warnings"]
        assert "2 of 36 images have a landmark outside" in stored[0]
        assert "tell nobody apart" in (tmp_path / "page.html").read_text()


def test_distractors():
    probe = np.random.default_rng(0).normal(size=(8, 4))
    result = identify_among_distractors(probe, np.arange(8) // 2, probe[:3] + 1.0, (2, 10), (1e-3, 0.5))
    found = distractor_remarks(result, (2, 10), (1e-3, 0.5), 3)
    assert found[0] == "10 distractors were asked for, there are 3: the figures stop there"
    assert "FAR 0.001 lies below what 24 impostor pairs" in found[1] and len(found) == 2
    flat = identify_among_distractors(np.ones((4, 4)), np.arange(4) // 2, np.ones((3, 4)), (3,), ())
    assert "are equal" in distractor_remarks(flat, (3,), (), 3)[0]

"""The statistics and passes of tools/clean/ beside dense float64 numpy, hand-worked cases and planted faults."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import make_pipeline

from tools.clean import analysis, duplicates, rows, statistics
from tools.clean import parts as parts_module
from tools.clean import people as people_module
from tools.clean.analysis import analyse
from tools.clean.faults import KINDS, Planted, Score, best_threshold, findings_of, judge, nearest_centre_scores, plant
from tools.clean.parts import nearest_parts
from tools.clean.reading import thumbnail
from tools.clean.rows import Rows
from tools.clean.statistics import DEFAULT_RULE, Rule, Tree
from tools.demo.data import load_faces
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
SIZE = 24


def unit(array):
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def people(sizes, noise=0.6, seed=0, size=SIZE):
    """(unit rows float32, person of each), people of the given sizes."""
    rng = np.random.default_rng(seed)
    person = np.repeat(np.arange(len(sizes)), sizes)
    centre = unit(rng.normal(size=(len(sizes), size)))
    return unit(centre[person] + noise * rng.normal(size=(len(person), size)) / size**0.5).astype(np.float32), person


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in every pass."""
    monkeypatch.setattr(rows, "_READ_BYTES", 4 * SIZE * 17)
    for module in (analysis, parts_module):
        monkeypatch.setattr(module, "BLOCK_BYTES", 4 * SIZE * 17)


# --- statistics


def test_agreement_is_the_mean_cosine_of_pairs():
    given = people([7])[0].astype(np.float64)
    cosine = given @ given.T
    expected = np.mean([cosine[i, j] for i in range(7) for j in range(7) if i != j])
    sums, count = np.stack([given.sum(0), given[0], np.zeros(SIZE)]), np.array([7, 1, 0])
    np.testing.assert_allclose(statistics.agreement(sums, count), [expected, 0, 0], atol=1e-12)
    steady = statistics.steady_agreement(np.array([0.9, 0.0, -0.5]), np.array([4, 1, 3]), 0.6)
    np.testing.assert_allclose(steady, [(6 * 0.9 + 0.6) / 7, 0.6, 0.18])  # -0.225 is below 0.3 x 0.6


def test_closeness_does_not_depend_on_sizes():
    """Of people whose true directions have a known cosine; cosines of centres do depend on them."""
    rng = np.random.default_rng(0)
    left, other = np.linalg.qr(rng.normal(size=(64, 2)))[0].T
    right = 0.6 * left + 0.8 * other
    closeness, cosine = [], []
    for count in (3, 12, 100):
        values = []
        for _ in range(200):
            sums = np.stack([unit(mean + 0.12 * rng.normal(size=(count, 64))).sum(0) for mean in (left, right)])
            first, second = statistics.directions(sums, np.array([count, count]), 0.5)
            values.append((first @ second, sums[0] @ sums[1] / np.linalg.norm(sums[0]) / np.linalg.norm(sums[1])))
        closeness.append(np.mean(values, axis=0)[0])
        cosine.append(np.mean(values, axis=0)[1])
    np.testing.assert_allclose(closeness, 0.6, atol=0.03)
    assert cosine[0] < 0.5 < 0.58 < cosine[2]


def test_rule_by_hand():
    rule = Rule(deviations=2.0, share=0.25, others_share=0.25)
    values = np.array([1.0, 2.0, 3.0, 4.0, 100.0])  # median 3, deviations 2 1 0 1 97: median 1
    assert rule.fence(values, 1) == pytest.approx(3 + 2 * 1.4826) and rule.fence(values, -1) == pytest.approx(
        3 - 2 * 1.4826
    )
    assert rule.own_falls_to(values) == 2 and rule.others_reach(values) == 4
    assert statistics.halfway(0.2, 0.8) == 0.5 and statistics.halfway(0.9, 0.8) == 0.8


def dense_closeness(cosine, left, right, floor):
    def within(group):
        return np.mean([cosine[i, j] for i in group for j in group if i != j])

    between = np.mean([cosine[i, j] for i in left for j in right])
    return between / np.sqrt(max(within(left), floor) * max(within(right), floor))


def test_the_tree_tells_two_people_apart():
    given, person = people([9, 6], seed=3)
    order = np.random.default_rng(1).permutation(15)
    tree = Tree(given[order], 3, typical=0.7)
    cosine = given[order].astype(np.float64) @ given[order].T.astype(np.float64)
    groups = [np.flatnonzero(person[order] == p).tolist() for p in (0, 1)]
    expected = dense_closeness(cosine, *groups, floor=0.21)
    assert tree.weakest == pytest.approx(expected, abs=1e-5)
    assert [sorted(group) for group in tree.people(expected + 0.01)] == groups  # the larger first
    assert len(tree.people(expected - 0.01)) == 1
    assert len(Tree(given[:9], 3, 0.7).people(0.4)) == 1


def test_loose_images_are_no_person():
    given, _ = people([8, 2], seed=4)
    (members,) = Tree(given, 3, 0.7).people(0.5)
    assert set(range(8)) <= set(members)
    assert not np.isfinite(Tree(given[:4], 3, 0.7).weakest)


# --- rows and passes


def test_blocks_hold_every_image_once(small_blocks):
    given, person = people([40, 1, 3, 30, 2, 2, 2, 2])
    shuffled = np.random.default_rng(0).permutation(len(person))
    data = Rows.of(5 * given[shuffled], person[shuffled] * 10 + 3)
    assert data.label_L.tolist() == [3, 13, 23, 33, 43, 53, 63, 73] and data.count_L.tolist() == [
        40,
        1,
        3,
        30,
        2,
        2,
        2,
        2,
    ]
    seen = []
    for identity, images, unit_rows in data.identity_blocks():
        assert (person[shuffled][images] == identity).all() and len(images) <= 17
        np.testing.assert_allclose(unit_rows, given[shuffled][images], atol=1e-6)
        seen.append(images)
    assert sorted(np.concatenate(seen).tolist()) == list(range(len(person)))
    assert sorted(np.concatenate([images for images, _ in data.blocks()]).tolist()) == list(range(len(person)))


def test_a_zero_embedding_is_named():
    given, person = people([3, 3])
    given[4] = 0
    with pytest.raises(UserError, match="image 4: its embedding is zero"):
        analyse(Rows.of(given, person), show_progress=False)


def test_nearest_parts_beside_the_dense_product(small_blocks):
    given, person = people([5] * 30, seed=2)
    sums = np.stack([given[person == p].sum(0) for p in range(30)])
    identity = np.concatenate([np.arange(28), [4, 9]])  # two identities with two parts
    count = np.full(30, 5)
    count[7] = 0
    near, close = nearest_parts(sums, identity, count, show_progress=False)
    dense = sums.astype(np.float64) @ sums.T
    dense[identity[:, None] == identity[None]] = -np.inf
    dense[:, 7] = dense[7] = -np.inf
    order = np.argsort(-dense, axis=1)[:, : near.shape[1]]
    np.testing.assert_array_equal(np.delete(near, 7, 0), np.delete(order, 7, 0))
    np.testing.assert_allclose(np.delete(close, 7, 0), np.sort(np.delete(dense, 7, 0), 1)[:, ::-1][:, :8], rtol=1e-5)
    assert (near[7] == -1).all()


def test_cosines_leave_the_image_out(small_blocks):
    """Own and nearest cosines of a clear case, against dense float64: an image does not vouch for itself."""
    given, person = people([12] * 10, noise=0.5, seed=6)
    label = person.copy()
    wrong = {5: 3, 40: 7, 77: 0}
    for image, other in wrong.items():
        label[image] = other
    found = analyse(Rows.of(3 * given, label), show_progress=False)
    assert set(found.outlier_F.tolist()) == set(wrong)
    for image, nearest, own, other in zip(
        found.outlier_F, found.nearest_F, found.cos_own_F, found.cos_nearest_F, strict=True
    ):
        assert nearest == person[image]
        kept = [k for k in range(120) if k not in wrong]
        centres = {p: unit(given[[k for k in kept if label[k] == p]].astype(np.float64).sum(0)) for p in range(10)}
        assert own == pytest.approx(given[image] @ centres[wrong[image]], abs=1e-4)
        assert other == pytest.approx(given[image] @ centres[person[image]], abs=1e-4)
    assert not len(found.same_P2) and not found.several


def test_two_images_that_disagree():
    """Of two, the one that belongs elsewhere goes; the other has nobody left to speak against it."""
    given, person = people([10] * 12 + [2], noise=0.5, seed=8)
    given[121] = unit(given[5] + 0.1 * given[6])
    found = analyse(Rows.of(given, person), show_progress=False)
    assert found.outlier_F.tolist() == [121] and found.nearest_F.tolist() == [0]


def test_single_images_and_tiny_sets():
    given, _ = people([1] * 6)
    found = analyse(Rows.of(given, np.arange(6)), show_progress=False)
    assert not len(found.outlier_F) and not found.several and found.notes
    for count in (1, 2, 5):
        found = analyse(Rows.of(given[:count], np.zeros(count, int)), show_progress=False)
        assert not len(found.outlier_F) and not len(found.same_P2)


def planted_well(seed, each=12, num_people=24):
    given, person = people([each] * num_people, noise=0.6, seed=seed)
    return given, plant(person, seed)


@pytest.mark.parametrize("seed", range(3))
def test_well_separated_people_are_judged_without_mistake(seed, small_blocks):
    given, planted = planted_well(seed)
    found = findings_of(given, planted, DEFAULT_RULE)
    assert {kind: found[kind] for kind in KINDS} == planted.truth


def test_blocks_do_not_matter(monkeypatch):
    given, planted = planted_well(5)
    whole = analyse(Rows.of(given[planted.row_N], planted.label_N), show_progress=False)
    monkeypatch.setattr(rows, "_READ_BYTES", 4 * SIZE * 5)
    for module in (analysis, parts_module):
        monkeypatch.setattr(module, "BLOCK_BYTES", 4 * SIZE * 11)
    cut = analyse(Rows.of(given[planted.row_N], planted.label_N), show_progress=False)
    assert set(whole.outlier_F.tolist()) == set(cut.outlier_F.tolist())
    np.testing.assert_allclose(np.sort(whole.close_N), np.sort(cut.close_N), atol=1e-5)
    assert set(map(tuple, whole.same_P2.tolist())) == set(map(tuple, cut.same_P2.tolist()))


def test_a_sample_finds_the_people_of_a_large_identity(monkeypatch, small_blocks):
    for module in (people_module, parts_module):
        monkeypatch.setattr(module, "LARGEST_TREE", 25)
    given, person = people([50, 30, *[12] * 10], seed=9)
    label = np.where(person == 1, 0, person)
    found = analyse(Rows.of(given, label), show_progress=False)
    assert list(found.several) == [0]
    assert [sorted(images.tolist()) for images in found.several[0]] == [list(range(50)), list(range(50, 80))]


# --- duplicates


def test_exact_pairs_and_what_is_left_out():
    pixels = np.array([5, 9, 5, 7, 9, 5], np.uint64)
    assert sorted(map(tuple, duplicates.exact_pairs(pixels).tolist())) == [(0, 2), (0, 5), (1, 4)]
    left = duplicates.surplus(np.array([[0, 2], [0, 5], [1, 4], [2, 3]]), 7)
    assert np.flatnonzero(left).tolist() == [2, 3, 4, 5]  # 3 hangs on 2
    assert not duplicates.surplus(np.empty((0, 2), int), 3).any()


def test_near_duplicates_are_sought_where_they_can_be(monkeypatch, small_blocks):
    monkeypatch.setattr(duplicates, "_BLOCK", 7)
    given, person = people([20, 20, 20], noise=0.7, seed=1)
    given[12], given[33] = given[3], unit(given[50] + 0.02 * given[2])  # within an identity; under another label
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(60)]
    pictures[12] = pictures[3][:, ::-1]  # mirrored
    pictures[33] = np.clip(pictures[50] * 0.8 + 20, 0, 255).astype(np.uint8)
    thumbnails = np.stack([thumbnail(picture) for picture in pictures])
    data = Rows.of(given, person)
    pairs = duplicates.near_pairs(data, thumbnails, np.empty((0, 2), int), np.array([33]), np.array([2]))
    assert pairs.tolist() == [[3, 12], [33, 50]]
    cosine = duplicates.pair_cosines(data, pairs)
    np.testing.assert_allclose(cosine, [given[3] @ given[12], given[33] @ given[50]], atol=1e-6)
    pairs = duplicates.near_pairs(data, thumbnails, np.array([[1, 2]]), np.empty(0, int), np.empty(0, int))
    assert pairs.tolist() == [[3, 12], [33, 50]]
    assert duplicates.near_pairs(
        data, thumbnails, np.empty((0, 2), int), np.empty(0, int), np.empty(0, int)
    ).tolist() == [[3, 12]]


# --- planted faults


def test_faults_are_planted_as_said():
    person = np.repeat(np.arange(20), 10)
    planted = plant(person, 3)
    shown = person[planted.row_N]
    assert len(planted.truth["outliers"]) == round(0.05 * len(shown))
    true = planted.label_N.copy()
    for label in range(planted.label_N.max() + 1):
        right = [k for k in np.flatnonzero(true == label) if k not in planted.truth["outliers"]]
        assert len(set(shown[right])) == (2 if label in planted.truth["several_people"] else 1)
    for left, right in planted.truth["same_person"]:
        both = [shown[k] for k in np.flatnonzero(np.isin(true, (left, right))) if k not in planted.truth["outliers"]]
        assert len(set(both)) == 1
    tested = {int(shown[k]) for k in np.flatnonzero(np.isin(true, list(planted.truth["overlap"])))
              if k not in planted.truth["outliers"]}  # fmt: skip
    assert len(tested) == 3 and tested <= set(planted.person_M.tolist())
    assert not set(planted.row_M.tolist()) & set(planted.row_N.tolist())


def test_scores_by_hand():
    assert judge({1, 2, 3}, {2, 3, 4, 5}) == Score(2, 1, 4)
    score = Score(2, 1, 4) + Score(1, 0, 1)
    assert (score.precision, score.recall, score.f1) == (3 / 4, 3 / 5, 2 * 3 / (4 + 5))
    assert best_threshold([({"a": 0.9, "b": 0.5}, {"a"}), ({"c": 0.8, "d": 0.1}, {"c"})]) == pytest.approx(0.65)


def test_orl_with_planted_faults_beside_the_nearest_centre():
    """Fisherfaces of one half of the people clean the other half: the quick form of benchmarks/clean.py."""
    faces = load_faces(ROOT / "data" / "orl")
    mine, others = list(range(21, 41)), list(range(1, 21))
    trained, shown = faces.of(others), faces.of(mine)

    def pixels(images):
        small = [cv2.resize(image, (28, 28), interpolation=cv2.INTER_AREA) for image in images]
        return np.stack(small).reshape(len(small), -1) / 255

    fisher = make_pipeline(PCA(60, random_state=0), LinearDiscriminantAnalysis())
    fisher.fit(pixels(trained.image_NHW), trained.person_N)
    rows_ND = unit(fisher.transform(pixels(shown.image_NHW))).astype(np.float32)
    ours, plain = Score(), Score()
    for seed in range(4):
        planted: Planted = plant(shown.person_N, seed)
        found = findings_of(rows_ND, planted, DEFAULT_RULE)
        ours += judge(found["outliers"], planted.truth["outliers"])
        plain += judge(set(nearest_centre_scores(rows_ND, planted)["outliers"]), planted.truth["outliers"])
    assert ours.recall > 0.65 and ours.precision > 2 * plain.precision and ours.f1 > plain.f1 + 0.2

"""eval/identification.py against hand-worked searches and brute force."""

import heapq
import math

import numpy as np
import pytest

import eval.search as search_module
from eval.identification import closed_set, cmc, open_set, pair_recall, tpir_at_fpir
from eval.search import search


def brute_force(gallery, gallery_subject, probe, probe_subject, ranks, fpirs):
    """Sort every row, subject by subject (first appearance breaks ties)."""
    subjects = list(dict.fromkeys(gallery_subject.tolist()))
    rank_of, mate, non_mated, mated = [], [], [], []
    for row, subject in zip(probe, probe_subject.tolist(), strict=True):
        best = np.array(
            [max(row @ g for g, s in zip(gallery, gallery_subject, strict=True) if s == t) for t in subjects]
        )
        if subject not in subjects:
            non_mated.append(best.max())
            continue
        column = subjects.index(subject)
        rank_of.append(1 + np.argsort(-best, kind="stable").tolist().index(column))
        mate.append(best[column])
        mated.append(subject)
    rates = tuple(sum(r <= k for r in rank_of) / len(rank_of) for k in ranks)
    points = []
    for fpir in fpirs:
        candidates = sorted({-np.inf, *non_mated})
        limit = next(t for t in candidates if sum(s > t for s in non_mated) / len(non_mated) <= fpir)
        points.append(sum(r == 1 and s > limit for r, s in zip(rank_of, mate, strict=True)) / len(mate))
    return rates, points


@pytest.mark.parametrize("templates_each", [1, 3])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("block", [1, 1 << 21])
def test_equal_to_brute_force(monkeypatch, templates_each, ties, block):
    monkeypatch.setattr(search_module, "_SCORES_PER_BLOCK", block)
    rng = np.random.default_rng(templates_each)
    centre = rng.normal(size=(30, 6))
    subject = np.repeat(np.arange(20), templates_each)
    order = rng.permutation(len(subject))
    gallery_subject, probe_subject = subject[order], rng.integers(0, 30, 150)
    gallery = centre[gallery_subject] + rng.normal(size=(len(order), 6))
    probe = centre[probe_subject] + 1.5 * rng.normal(size=(150, 6))
    if ties:
        gallery, probe = np.round(gallery), np.round(probe)
    rates, points = brute_force(gallery, gallery_subject, probe, probe_subject, (1, 5, 10), (0.01, 0.1, 0.5))
    closed = closed_set(gallery, gallery_subject, probe, probe_subject)
    assert closed.rates == rates
    assert closed.num_probes == int((probe_subject < 20).sum())
    assert closed.num_subjects == 20
    opened = open_set(gallery, gallery_subject, probe, probe_subject, (0.01, 0.1, 0.5))
    assert [point.tpir for point in opened] == pytest.approx(points)
    assert all(point.actual_fpir <= point.fpir for point in opened)
    assert 0 < rates[0] < 1


@pytest.mark.parametrize("templates_each", [1, 2])
def test_what_float32_cannot_tell_apart(templates_each):
    """All gallery features within 1e-9 of each other: ranks, best scores and impostors are those of float64."""
    rng = np.random.default_rng(5)
    subject = np.repeat(np.arange(12), templates_each)
    gallery = rng.normal(size=8) + 1e-9 * rng.normal(size=(len(subject), 8))
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    probe = rng.normal(size=(40, 8))
    probe /= np.linalg.norm(probe, axis=1, keepdims=True)
    mate = rng.integers(0, 16, 40)
    found = search(gallery, subject, probe, mate, num_impostors=30)
    scores = (probe @ gallery.T).reshape(40, 12, templates_each).max(2)
    np.testing.assert_allclose(found.best_score_Q, scores.max(1), rtol=0, atol=1e-14)
    impostors = []
    for row, wanted in enumerate(mate):
        if wanted < 12:
            assert found.mate_rank_Q[row] == 1 + (scores[row] > scores[row, wanted]).sum()
        impostors += np.delete(scores[row], wanted).tolist() if wanted < 12 else scores[row].tolist()
    np.testing.assert_allclose(found.impostor_K, sorted(impostors)[-30:][::-1], rtol=0, atol=1e-14)
    assert len(set(found.mate_rank_Q.tolist())) > 5


def test_features_far_from_unit_length_are_refused():
    with pytest.raises(ValueError, match="normalise"):
        search(1e9 * np.eye(2), np.arange(2), 1e9 * np.eye(2), np.arange(2))


def test_hand_worked():
    # Gallery: subjects a (1, 0) and b (0, 1). Probes: a found at rank 1 with 0.9; b at rank 2 with 0.5 (a has 0.6);
    # b at rank 1 with 0.3; strangers c and d, best scores 0.8 and 0.2.
    probe = np.array([[0.9, 0.1], [0.6, 0.5], [0.1, 0.3], [0.8, 0.0], [0.2, 0.1]])
    args = (np.eye(2), np.array(["a", "b"]), probe, np.array(["a", "b", "b", "c", "d"]))
    assert closed_set(*args, ranks=(1, 2)).rates == (2 / 3, 1.0)
    strict, loose, every = open_set(*args, fpirs=(0.4, 0.5, 1.0))
    assert (strict.tpir, strict.actual_fpir, strict.threshold) == (1 / 3, 0.0, 0.8)
    assert (loose.tpir, loose.actual_fpir, loose.threshold) == (2 / 3, 0.5, 0.2)
    assert (every.tpir, every.actual_fpir) == (2 / 3, 1.0)
    assert open_set(*args, fpirs=(0.5,), rank=2)[0].tpir == 1.0


def test_the_reference_scripts_numbers():
    """Its 'FAR' takes the k best impostor pairs of all, k = ceil(probes * far), as threshold."""
    rng = np.random.default_rng(7)
    gallery, mate = rng.normal(size=(15, 5)), rng.integers(0, 15, 60)
    probe = gallery[mate] + rng.normal(size=(60, 5))
    similarity = probe @ gallery.T
    order = np.argsort(-similarity)
    rates = [np.mean([mate[q] in order[q, :k] for q in range(60)]) for k in (1, 5, 10)]
    mates = similarity[np.arange(60), mate]
    similarity[np.arange(60), mate] = -np.inf
    best = heapq.nlargest(6, similarity[similarity > -np.inf])
    wanted = [np.mean(mates > best[math.ceil(60 * far) - 1]) for far in (0.01, 0.1)]
    found = search(gallery, np.arange(15), probe, mate, num_impostors=6)
    assert [point.recall for point in pair_recall(found)] == wanted
    assert list(cmc(found).rates) == rates
    with pytest.raises(ValueError, match="needs 12 impostor scores; the search kept 6"):
        pair_recall(found, (0.2,))


def test_all_equal_features_do_not_look_like_success():
    same = np.ones((10, 3))
    assert closed_set(same, np.arange(10), same, np.arange(10)).rates == (0.1, 0.5, 1.0)


def test_bad_input():
    one = np.ones((2, 3))
    with pytest.raises(ValueError, match="none of 2 probes has its subject in the gallery"):
        closed_set(one, np.array([0, 1]), one, np.array([5, 6]))
    with pytest.raises(ValueError, match="0 non-mated and 2 mated probes"):
        open_set(one, np.array([0, 1]), one, np.array([0, 1]))
    with pytest.raises(ValueError, match="probe: row 1 holds NaN"):
        search(one, np.array([0, 1]), np.array([[1.0, 1, 1], [1, np.nan, 1]]), np.array([0, 1]))
    with pytest.raises(ValueError, match="gallery features have size 3, probe features 4"):
        search(one, np.array([0, 1]), np.ones((2, 4)), np.array([0, 1]))
    with pytest.raises(ValueError, match=r"gallery: features \(0, 3\)"):
        search(np.ones((0, 3)), np.array([]), one, np.array([0, 1]))
    assert tpir_at_fpir(search(one, np.array([0, 1]), one, np.array([0, 9])))[0].tpir == 0.0

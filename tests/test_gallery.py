"""eval/gallery.py and eval/approximate.py beside dense float64 numpy and the safetensors package."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from eval import approximate, gallery
from eval.gallery import About, Gallery, write_gallery
from utils.errors import UserError

SIZE = 16


def unit(array):
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def people():
    """(unit rows of 40 people in random order, person of each row)."""
    rng = np.random.default_rng(0)
    person = rng.permutation(np.concatenate([np.arange(40), rng.integers(0, 40, 360)]))
    rows = unit(rng.normal(size=(40, SIZE))[person] + 0.4 * rng.normal(size=(400, SIZE))).astype(np.float32)
    return rows, person


def write(path, rows, person, strangers=None, names=None, **about):
    names = names or [f"p{number}" for number in range(int(person.max()) + 1)]
    strangers = np.empty((0, rows.shape[1]), np.float32) if strangers is None else strangers
    told = About(**{"model": "m", "identity": "abc", **about})
    pixels = np.arange(len(rows)).astype(np.uint64)
    return write_gallery(path, told, names, person, pixels, lambda place: rows[place], strangers, show_progress=False)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks, cut inside people."""
    monkeypatch.setattr(gallery, "_BLOCK_BYTES", 4 * SIZE * 37)


def test_the_file_is_safetensors(tmp_path, people, small_blocks):
    rows, person = people
    found = write(tmp_path / "a gallery.ü", rows, person, names=[f"Ann {k}\n.é" for k in range(40)])
    loaded = load_file(tmp_path / "a gallery.ü")
    order = np.argsort(person, kind="stable")
    np.testing.assert_array_equal(loaded["embedding"], rows[order])
    np.testing.assert_array_equal(loaded["person"], person[order])
    np.testing.assert_array_equal(loaded["pixels"], order)
    assert json.loads(loaded["names"].tobytes()) == found.names == [f"Ann {k}\n.é" for k in range(40)]
    assert [path.name for path in tmp_path.iterdir()] == ["a gallery.ü"]


def test_search_beside_all_cosines_in_float64(tmp_path, people, small_blocks):
    rows, person = people
    found = write(tmp_path / "g", rows, person)
    query = unit(np.random.default_rng(1).normal(size=(33, SIZE)))
    cosine = query @ rows.T.astype(np.float64)
    for k, matches in enumerate(found.search(query, top=7)):
        best = np.array([cosine[k, person == p].max() for p in range(40)])
        order = np.argsort(-best, kind="stable")[:7]
        assert [match.name for match in matches] == [f"p{p}" for p in order]
        np.testing.assert_allclose([match.cos for match in matches], best[order], atol=1e-12)
    assert len(found.search(query[:1], top=100)[0]) == 40


def test_equal_cosines_keep_the_order_of_enrolment(tmp_path):
    rows = np.tile(unit(np.ones(SIZE)).astype(np.float32), (5, 1))
    found = write(tmp_path / "g", rows, np.array([3, 1, 2, 0, 4]))
    assert [match.name for match in found.search(rows[:1], top=3)[0]] == ["p0", "p1", "p2"]


def test_float32_does_not_decide_between_near_equals(tmp_path):
    """Cosines that differ by less than float32 can tell are ranked by float64."""
    rng = np.random.default_rng(5)
    base = unit(rng.normal(size=SIZE)).astype(np.float32)
    rows = np.stack([np.nextafter(base, base + rng.choice([-1, 1], SIZE)).astype(np.float32) for _ in range(200)])
    found = write(tmp_path / "g", rows, np.arange(200))
    query = unit(rng.normal(size=SIZE))
    cosine = rows.astype(np.float64) @ query
    assert [match.name for match in found.search(query[None], top=5)[0]] == [f"p{p}" for p in np.argsort(-cosine)[:5]]


def dense_impostors(rows, person):
    """Best cosine of every row to another person's."""
    cosine = rows.astype(np.float64) @ rows.T.astype(np.float64)
    cosine[person[:, None] == person[None]] = -np.inf
    return cosine.max(1)


def test_the_threshold_is_measured_without_the_own_person(tmp_path, people, small_blocks):
    rows, person = people
    found = write(tmp_path / "g", rows, person)
    expected = np.sort(dense_impostors(rows, person))[::-1]
    np.testing.assert_allclose(found.impostor_P, expected, atol=1e-6)
    limit = found.threshold(0.05)  # 20 of 400 may pass
    assert limit.value == pytest.approx(expected[20], abs=1e-6) and limit.strangers == 400
    assert limit.far == np.mean(expected > expected[20] + 1e-6) <= 0.05  # two may be nearest to each other: equal
    assert f"{limit.far:.2e}" in str(limit)
    none = found.threshold(0.001)
    assert none.far == 0 and none.value == pytest.approx(expected[0], abs=1e-6)
    assert "below 7.5e-03 with 95% confidence" in str(none)  # 3 / 400


def test_a_sample_where_there_are_many(tmp_path, people, monkeypatch):
    rows, person = people
    monkeypatch.setattr(gallery, "MOST_PROBES", 50)
    found = write(tmp_path / "g", rows, person)
    every = dense_impostors(rows, person)
    assert len(found.impostor_P) == 50
    assert all(np.abs(every - score).min() < 1e-6 for score in found.impostor_P)


def test_strangers_are_compared_with_everybody(tmp_path, people, small_blocks):
    rows, person = people
    strangers = unit(np.random.default_rng(3).normal(size=(60, SIZE))).astype(np.float32)
    found = write(tmp_path / "g", rows, person, strangers)
    expected = np.sort((strangers.astype(np.float64) @ rows.T.astype(np.float64)).max(1))[::-1]
    np.testing.assert_allclose(found.impostor_P, expected, atol=1e-6)
    np.testing.assert_array_equal(found.stranger_ID, strangers)


def test_one_person_measures_nothing(tmp_path, people):
    found = write(tmp_path / "g", people[0], np.zeros(400, np.int64))
    assert found.threshold(0.01) is None and len(found.impostor_P) == 0


def test_what_fails_leaves_the_old_gallery(tmp_path, people):
    rows, person = people
    write(tmp_path / "g", rows, person)
    before = (tmp_path / "g").read_bytes()

    def broken(place):
        raise UserError("an image")

    with pytest.raises(UserError, match="an image"):
        write_gallery(tmp_path / "g", About("m", "i"), ["x"], np.zeros(3, int), np.zeros(3, np.uint64), broken,
                      np.empty((0, SIZE), np.float32))  # fmt: skip
    assert (tmp_path / "g").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_damaged_galleries(tmp_path, people):
    rows, person = people
    write(tmp_path / "g", rows, person)
    whole = (tmp_path / "g").read_bytes()
    header = int.from_bytes(whole[:8], "little")
    cases = {
        "cut": whole[:-5],
        "cut in the header": whole[: header // 2],
        "empty": b"",
        "text": b"hello, this is a text of some length",
        "huge header": b"\xff" * 64,
        "dtype": whole.replace(b'"F32"', b'"F64"', 1),
        "shape": whole.replace(b"[400, 16]", b"[401, 16]", 1),
        "negative": whole.replace(b"[400, 16]", b"[-40, 16]", 1),
        "names": whole[:-3] + b"zzz",
        "nan shape": whole.replace(b"[400, 16]", b"[400, NaN]"[:9], 1),
    }
    for what, data in cases.items():
        assert data != whole, what
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(UserError, match=r"bad: (a damaged gallery|not a gallery)"):
            Gallery(tmp_path / "bad")
    tensors = dict(load_file(tmp_path / "g"))
    save_file(tensors, tmp_path / "bad")
    with pytest.raises(UserError, match="not a gallery"):
        Gallery(tmp_path / "bad")
    for value in (tensors["person"][::-1].copy(), tensors["person"] + 1, np.full(400, -1, np.int32)):
        with open(tmp_path / "bad", "wb") as file:
            begin = whole.index(tensors["person"].tobytes())
            file.write(whole[:begin] + value.astype("<i4").tobytes() + whole[begin + 1600 :])
        with pytest.raises(UserError, match="people do not stand in order"):
            Gallery(tmp_path / "bad")
    with pytest.raises(UserError, match="no such gallery"):
        Gallery(tmp_path / "none")


def test_approximate_search_beside_the_exact_one(tmp_path, small_blocks):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(7)
    person = np.repeat(np.arange(500), 8)
    rows = unit(rng.normal(size=(500, SIZE))[person] + 0.2 * rng.normal(size=(4000, SIZE))).astype(np.float32)
    found = write(tmp_path / "g", rows, person)
    about = approximate.build_index(found, show_progress=False)
    assert about["recall"] >= 0.99 and about["probed"] < about["lists"] and about["rows"] == 4000
    search = approximate.ApproximateSearch(Gallery(tmp_path / "g"))
    query = unit(rows[::40] + 0.05 * rng.normal(size=(100, SIZE)))
    exact, near = found.search(query, 3), search.search(query, 3)
    assert np.mean([a[0] == b[0] for a, b in zip(exact, near, strict=True)]) >= 0.98  # the cosine too: scored exactly


def test_recall_is_that_of_the_index(tmp_path, small_blocks):
    """The figure kept beside the index, counted again from dense products and faiss itself."""
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(8)
    rows = unit(rng.normal(size=(1500, SIZE))).astype(np.float32)
    found = write(tmp_path / "g", rows, np.arange(1500))
    about = approximate.build_index(found, seed=4, show_progress=False)
    index = faiss.read_index(str(tmp_path / "g.faiss"))
    index.nprobe = about["probed"]
    generator = np.random.default_rng(4)
    generator.permutation(1500)
    probes = np.sort(generator.permutation(1500)[: about["asked"]])
    cosine = rows[probes] @ rows.T
    cosine[np.arange(len(probes)), probes] = -np.inf
    nearest = np.argsort(-cosine, axis=1)[:, :10]
    _, candidates = index.search(rows[probes], 128)
    hits = np.array([np.isin(a, b) for a, b in zip(nearest, candidates, strict=True)])
    assert about["recall"] == pytest.approx(hits[:, 0].mean()) and about["recall_10"] == pytest.approx(hits.mean())


def test_indexes_of_another_state(tmp_path, people):
    pytest.importorskip("faiss")
    rows, person = people
    found = write(tmp_path / "g", rows, person)
    with pytest.raises(UserError, match=r"400 photos and no index; build it with: python tools/search.py index"):
        approximate.ApproximateSearch(found)
    approximate.build_index(found, show_progress=False)
    (tmp_path / "g.faiss").write_bytes((tmp_path / "g.faiss").read_bytes()[:100])
    with pytest.raises(UserError, match="not an index that faiss can read"):
        approximate.ApproximateSearch(found)
    (tmp_path / "g.faiss.json").write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        approximate.ApproximateSearch(found)
    approximate.build_index(found, show_progress=False)
    again = write(tmp_path / "g", rows, person)
    with pytest.raises(UserError, match="another state"):
        approximate.ApproximateSearch(again)


def test_without_faiss(tmp_path, people, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"faiss is not installed: pip install"):
        approximate.build_index(write(tmp_path / "g", *people))

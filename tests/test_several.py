"""Several sets as one: labels behind one another or shared, weights, the same order whoever resumes it."""

import numpy as np
import pytest

from config import load_config
from dataset import build_source, build_train_loader, recognise
from tests.loader_sources import Numbered
from tests.test_labels import jpeg, make_list, make_rec
from tests.test_shards import sample, write_tar
from utils.data.several import SeveralSources
from utils.errors import UserError


def make_folder(root, people):
    for name, count in people.items():
        for n in range(count):
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / f"{n}.jpg").write_bytes(jpeg(n))
    return root


@pytest.fixture
def sets(tmp_path):
    """Records of labels 0..2, shards of labels 0..1, a folder of two people, a list of labels 0..1."""
    make_rec(tmp_path / "rec", [0, 1, 2, 0], 3)
    write_tar(tmp_path / "wds" / "a.tar", sample("x", 1, 5) + sample("y", 0, 6) + sample("z", 1, 7))
    make_folder(tmp_path / "folder", {"1": 2, "anna": 1})
    make_list(tmp_path / "list", [1, 0])
    return [str(tmp_path / name) for name in ("rec", "wds", "folder", "list/a.lst")]


def test_kinds_are_recognised(sets, tmp_path):
    assert [recognise(place) for place in sets] == ["rec", "wds", "folder", "list"]
    assert recognise(tmp_path / "rec" / "train.rec") == "rec" and recognise(f"{tmp_path}/wds/{{a,b}}.tar") == "wds"
    assert recognise(tmp_path / "none") is None


def test_labels_behind_one_another(sets):
    source = build_source("rec", root=sets)
    parts = [build_source(kind, root=root) for kind, root in zip(("rec", "wds", "folder"), sets, strict=False)]
    parts.append(build_source("list", list_file=sets[3]))
    wanted, first = [], 0
    for part in parts:
        wanted += [(bytes(data), label + first) for data, label in (part.fetch(i) for i in range(len(part)))]
        first += part.num_classes
    assert source.num_classes == first == 9 and len(source) == 12
    assert [(bytes(data), label) for data, label in source.fetch_many(np.arange(12))] == wanted
    order = np.random.default_rng(0).permutation(12)
    assert [(bytes(d), n) for d, n in source.fetch_many(order)] == [wanted[i] for i in order]
    assert [source.fetch(i)[1] for i in range(12)] == [label for _, label in wanted] == source.read_labels().tolist()
    assert source.read_labels(order).tolist() == [wanted[i][1] for i in order]
    assert source.identities[3] == f"{sets[1]}: 0" and source.identities[6] == f"{sets[2]}: anna"
    assert "member x.jpg" in source.describe(4) and source.describe(7).endswith("folder/1/0.jpg")


def test_labels_shared_by_name(sets):
    """Label 1 of the records, of the shards and of the list, and the folder called 1, are one person."""
    source = build_source("rec", root=sets, shared_identities=True)
    assert source.read_labels().tolist() == [0, 1, 2, 0, 1, 0, 1, 1, 1, 3, 1, 0]
    assert source.identities == ["0", "1", "2", "anna"]


def test_labels_shared_by_a_list(sets, tmp_path):
    (tmp_path / "same.txt").write_text("1\t2\tAnna K.\n3\tanna\tAnna K.\n\n4 0 bert\n2\t1\tbert\n")
    source = build_source("rec", root=sets, shared_identities=str(tmp_path / "same.txt"))
    labels = source.read_labels()
    assert source.num_classes == 7  # nine, and two people occur twice
    assert labels[2] == labels[9] and source.identities[labels[2]] == "Anna K."
    assert labels[4] == labels[6] == labels[11] and source.identities[labels[4]] == "bert"
    assert len(set(labels.tolist())) == 7
    for line, message in (("5\t0\tx", "sets 1..4"), ("1\t7\tx", "set 1 has no class '7'"), ("1\t2", "was expected"),
                          ("1\t2\ta\n1\t2\tb", "is 'a' above")):  # fmt: skip
        (tmp_path / "bad.txt").write_text(line + "\n")
        with pytest.raises(UserError, match=r"bad\.txt: line \d: .*" + message):
            build_source("rec", root=sets, shared_identities=str(tmp_path / "bad.txt"))


def test_each_part_is_checked_and_may_be_renumbered(sets, tmp_path):
    bad = str(make_list(tmp_path / "bad", [0, 1000]))
    with pytest.raises(UserError, match=r"bad/a\.lst: labels from 0 to 1000"):
        build_source("rec", root=[*sets, bad])
    source = build_source("rec", root=[*sets, bad], relabel=True)
    assert source.num_classes == 11 and source.identities[-1] == f"{bad}: 1000"


def weighted(weights, counts=(10, 6)):
    return SeveralSources([Numbered(count) for count in counts], ["a", "b"], weights=weights)


@pytest.mark.parametrize(("weights", "expected"), [((1, 1), 16), ((2, 0.5), 23), ((0.25, 3), 20), ((1.5, 1.5), 24)])
def test_weights(weights, expected):
    """Every sample floor(weight) times, the rest of the weight drawn without repetition; another part each epoch."""
    source = weighted(weights)
    assert source.num_draws == expected
    seen = []
    for epoch in range(40):
        draws = source.draws(3, epoch)
        assert len(draws) == expected and len(set(draws.tolist())) == expected
        assert np.array_equal(draws, source.draws(3, epoch))
        counts = np.bincount(draws % 16, minlength=16)
        for part, weight in ((counts[:10], weights[0]), (counts[10:], weights[1])):
            assert part.min() >= int(weight) and part.max() <= -int(-weight // 1)
        seen.append(counts)
    average = np.mean(seen, 0)
    assert abs(average[:10].mean() - round(weights[0] * 10) / 10) < 1e-9
    assert np.abs(average[:10] - weights[0]).max() < 0.3 and np.abs(average[10:] - weights[1]).max() < 0.3


def test_weighted_epochs_resume_at_another_world_size():
    options = {"image_size": 8, "seed": 4}

    def given(loader):
        found = []
        for image, _ in loader:
            found.append(list(zip(loader.last_keys.tolist(), [i.tobytes() for i in image.numpy()], strict=True)))
        return found

    reference = given(build_train_loader(weighted((2, 0.5)), 4, **options))
    assert len(reference) == 5
    loader = build_train_loader(weighted((2, 0.5)), 4, **options)
    for _ in zip(range(2), loader, strict=False):
        pass
    ranks = []
    for rank in range(2):
        resumed = build_train_loader(weighted((2, 0.5)), 2, rank=rank, world_size=2, **options)
        resumed.load_state_dict(loader.state_dict())
        ranks.append(given(resumed))
    assert [a + b for a, b in zip(*ranks, strict=True)] == reference[2:]
    flips = {}
    for key, pixels in (pair for batch in reference for pair in batch):
        flips.setdefault(key, set()).add(pixels)
    assert max(map(len, flips.values())) <= 2
    with pytest.raises(UserError, match="num_samples was 23, here it is 16"):
        build_train_loader(weighted((1, 1)), 4, **options).load_state_dict(loader.state_dict())


def test_draws_of_one_sample_are_augmented_each_in_its_way():
    source, found = SeveralSources([Numbered(64)], ["a"], weights=(4,)), {}
    augment = {"erase": {"probability": 1.0, "noise": True}}
    loader = build_train_loader(source, 8, image_size=8, augment=augment)
    for image, _ in loader:
        for key, pixels in zip(loader.last_keys.tolist(), image.numpy(), strict=True):
            found.setdefault(key, set()).add(pixels.tobytes())
    assert len(found) == 64 and np.mean([len(pictures) for pictures in found.values()]) > 3.5


def test_bad_settings_are_named(sets):
    with pytest.raises(UserError, match=r"data\.weights: 2 weights for 4 data sets"):
        build_source("rec", root=sets, weights=(1, 2))
    with pytest.raises(UserError, match=r"data\.weights: .*numbers above 0"):
        weighted((1, 0))
    with pytest.raises(UserError, match=r"data\.weights: .* is for several sets"):
        load_config(None, ["data.root=a", "data.weights=[1]"]).source_options()
    with pytest.raises(UserError, match=r"data\.root: \(\) names no data set"):
        load_config(None, ["data.root=[]"]).source_options()
    options = load_config(None, ["data.root=[a, b]", "data.weights=[1, 0.5]", "data.relabel=true"]).source_options()
    assert options["root"] == ("a", "b") and options["weights"] == (1, 0.5) and options["relabel"] is True

"""eval/megaface.py against brute force."""

import json

import numpy as np
import pytest

import eval.distractors as distractors
from eval.distractors import identify_among_distractors, load_features, read_megaface_vector
from eval.megaface import main
from utils.errors import UserError


def problem(seed=0, num_distractors=700):
    rng = np.random.default_rng(seed)
    subject = rng.permutation(np.repeat(np.arange(12), [4] * 11 + [1]))
    centre = rng.normal(size=(12, 6))
    probe = (centre[subject] + 0.8 * rng.normal(size=(45, 6))).astype(np.float32)
    return probe, subject, rng.normal(size=(num_distractors, 6)).astype(np.float32)


@pytest.mark.parametrize("block", [45 * 13, 1 << 22])
def test_equal_to_brute_force(monkeypatch, block):
    monkeypatch.setattr(distractors, "_SCORES_PER_BLOCK", block)
    probe, subject, distractor = problem()
    got = identify_among_distractors(probe, subject, distractor, (10, 100, 650, 10**6), (1e-6, 1e-3, 1e-2))
    unit, other = (x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (probe, distractor))
    pairs = [(i, j) for i in range(45) for j in range(45) if i != j and subject[i] == subject[j]]
    assert got.sizes == (10, 100, 650, 700)
    for size, one, ten in zip(got.sizes, got.rank_1, got.rank_10, strict=True):
        better = [int(np.sum(other[:size] @ unit[i] >= unit[i] @ unit[j])) for i, j in pairs]
        assert one == np.mean([b == 0 for b in better])
        assert ten == np.mean([b < 10 for b in better])
    assert 0 < got.rank_1[-1] < 1
    assert got.fars == (1e-3, 1e-2)  # 31,500 impostor pairs do not resolve 1e-6
    impostor = np.sort((unit @ other.T).reshape(-1))[::-1]
    genuine = np.array([unit[i] @ unit[j] for i, j in pairs if i < j])
    for far, tar in zip(got.fars, got.tar, strict=True):
        assert tar == np.mean(genuine > impostor[int(far * len(impostor))])
    assert (got.num_genuine, got.num_impostor) == (66, 31500)


def test_command_and_files(tmp_path, capsys):
    probe, subject, distractor = problem()
    np.save(tmp_path / "probe.npy", probe)
    (tmp_path / "subject.txt").write_text("\n".join(map(str, subject)) + "\n")
    names = []
    for k, row in enumerate(distractor[:50]):
        (tmp_path / f"{k}.bin").write_bytes(np.array([len(row), 1, 4, 5], "<i4").tobytes() + row.tobytes())
        names.append(f"{k}.bin")
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
    np.testing.assert_array_equal(load_features(tmp_path / "list.txt"), distractor[:50])
    arguments = ["--probes", str(tmp_path / "probe.npy"), "--subjects", str(tmp_path / "subject.txt")]
    arguments += ["--distractors", str(tmp_path / "list.txt"), "--result-dir", str(tmp_path / "o")]
    main([*arguments, "--sizes", "10,50", "--report", str(tmp_path / "page.html")])
    wanted = identify_among_distractors(probe, subject, distractor[:50], (10, 50))
    assert json.loads((tmp_path / "o" / "megaface.json").read_text())["figures"]["rank_1"] == list(wanted.rank_1)
    assert f"{100 * wanted.rank_1[0]:.2f}" in capsys.readouterr().out
    assert "Identification with distractors" in (tmp_path / "page.html").read_text()
    (tmp_path / "subject.txt").write_text("a\nb\n")
    with pytest.raises(SystemExit):
        main(arguments)
    assert "2 subjects for 45 probes" in capsys.readouterr().err


def test_bad_input(tmp_path):
    probe, subject, distractor = problem()
    with pytest.raises(ValueError, match="none of 45 probes"):
        identify_among_distractors(probe, np.arange(45), distractor)
    with pytest.raises(ValueError, match=r"distractors \(700, 5\)"):
        identify_among_distractors(probe, subject, distractor[:, :5])
    distractor[3, 1] = np.inf
    with pytest.raises(ValueError, match="row 3 holds NaN"):
        identify_among_distractors(probe, subject, distractor)
    (tmp_path / "x.bin").write_bytes(b"123")
    with pytest.raises(UserError, match=r"x.bin: 3 bytes"):
        read_megaface_vector(tmp_path / "x.bin")
    (tmp_path / "x.npy").write_bytes(b"123")
    with pytest.raises(UserError, match=r"not a \.npy"):
        load_features(tmp_path / "x.npy")

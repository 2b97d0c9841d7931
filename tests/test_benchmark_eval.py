"""benchmarks/eval.py: both sides of every case give the same figures, and the result file has the agreed layout."""

import json

import numpy as np
import pytest

from benchmarks import eval as benchmark
from eval.templates import pool_templates


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    folder = tmp_path_factory.mktemp("problem")
    benchmark.make_problem(folder, 0.01)
    return {path.stem: np.load(path) for path in folder.glob("*.npy")}


def test_tables_are_identical(problem):
    arguments = [problem[key] for key in benchmark.CASE_ARRAYS["features_to_table"]]
    ours = benchmark.our_table(*arguments)
    assert ours == benchmark.peer_table(*arguments)
    assert ours[0] < ours[-1]
    assert problem["same"].sum() == 195


def test_identification_is_identical(problem):
    template, feature = pool_templates(problem["feature"], problem["template"], problem["media"])
    gallery, probe = (feature[np.searchsorted(template, problem[key])] for key in ("gallery", "probe"))
    probe = probe + 0.2 * np.random.default_rng(0).normal(size=probe.shape)
    ours = benchmark.our_identification(gallery, probe, problem["probe_subject"])
    assert ours == benchmark.peer_identification(gallery, probe, problem["probe_subject"])
    assert 0 < ours[0] < 1


def test_verification_is_bit_equal():
    rows = benchmark.time_verification(1, 1, num_pairs=600)
    assert rows[0]["figures_identical"]


@pytest.mark.slow
def test_result_file(tmp_path):
    path = tmp_path / "eval.json"
    benchmark.main(["--scale", "0.01", "--runs", "1", "--json", str(path)])
    cases = json.loads(path.read_text())["cases"]
    found = {(case["name"], case["metric"]) for case in cases}
    assert found == {
        ("verification/6000", "seconds"),
        ("ijb/one_to_n", "seconds"),
        ("ijb/one_to_n", "peak_mb"),
        ("ijb/features_to_table", "seconds"),
        ("ijb/features_to_table", "peak_mb"),
    }
    for case in cases:
        assert case["ratio"] == case["peer"] / case["ours"]
        assert len(case["spread"]) == 2

"""benchmarks/dispatch.py: what an update asks of the host, held so that it cannot creep back."""

import json

import pytest

from benchmarks import dispatch
from benchmarks.dispatch import count

pytestmark = [pytest.mark.device, pytest.mark.distributed]

# What was set out for: uploads whatever the chunks, reads of an update that is not logged, calls outside the backbone
# with one chunk, calls of each further chunk.
BOUNDS = {"uploads": 3, "reads": 1, "calls_outside_backbone": 500, "calls_per_chunk": 35}


@pytest.mark.parametrize(("rate", "num_ranks"), [(1.0, 1), (0.3, 2)])
def test_an_update_stays_within_its_counts(rate, num_ranks):
    """They depend on the number of chunks, not on the number of classes."""
    found = count("iresnet50", 600, rate, num_ranks)
    assert found["calls_outside_backbone"] > 50, "the head and the optimiser ask for something"
    for name, bound in BOUNDS.items():
        assert found[name] <= bound, found


def test_a_logged_update_reads_once_more():
    found = count("iresnet18", 60, 1.0, 1, "log.every_steps=1")
    assert found["uploads"] <= BOUNDS["uploads"]
    assert found["reads"] <= BOUNDS["reads"] + 1


@pytest.mark.slow
def test_result_file(tmp_path):
    path = tmp_path / "dispatch.json"
    small = ["--networks", "iresnet18", "--classes", "300", "--rates", "1.0", "--ranks", "1", "--rounds", "1"]
    dispatch.main(["--json", str(path), *small])
    cases = json.loads(path.read_text())["cases"]
    assert {case["name"] for case in cases} == {"dispatch/iresnet18/300/1.0/1"}
    counted = {case["metric"]: case for case in cases}
    assert set(counted) == {"uploads", "reads", "calls_outside_backbone", "calls_per_chunk", "host_ms"}
    host = counted.pop("host_ms")
    assert host["ratio"] == host["peer"] / host["ours"]
    assert all(case["value"] >= 0 for case in counted.values())

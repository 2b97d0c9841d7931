"""Ranks killed at random moments, during saving too: the run ends with the bits of an undisturbed one."""

import pytest

from tools.soak import soak

pytestmark = pytest.mark.distributed


def test_a_few_kills(tmp_path):
    figures = soak(tmp_path, kills=3, seed=11, steps=24)
    assert figures["kills"] == 3 and figures["finished_runs"] >= 1
    assert figures["slowest_end_s"] < 60, "the other ranks must not wait for a collective forever"


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    figures = soak(tmp_path, kills=50, seed=12)
    assert figures["kills"] == 50 and figures["kills_in_save"] >= 5

"""tools/gpu_check.py: the whole of it in its small form on the CPU; what it must notice; with a GPU, the full form."""

import json
import subprocess

import numpy as np
import pytest

from tools import gpu_check
from utils.errors import UserError


@pytest.fixture
def checker(tmp_path):
    return gpu_check.Checker("cpu", gpu_check.SMALL, tmp_path, tmp_path / "report.json", minutes=5)


@pytest.mark.distributed
def test_the_small_form_passes_on_the_cpu(tmp_path, capsys):
    gpu_check.main(["--device", "cpu", "--output", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    checks = report["checks"]
    assert all(found["passed"] for found in checks.values()), checks
    assert {"smoke", "fp32", "compiled", "recomputed", "NHWC", "accumulated", "two ranks", "resume"} <= set(checks)
    # Two ranks compute what one does: a wrong factor between ranks would be a difference of 0.5 or more.
    assert max(checks["two ranks"][part] for part in ("rows", "row momentum", "backbone")) < 1e-3
    assert report["speeds"]["train iresnet18 fp32 x2"]["images_s"] > 0
    assert report["speeds"]["head 1000 fp32"]["ms"] > 0
    assert (tmp_path / "report.profile.txt").stat().st_size > 0
    assert "5004" in capsys.readouterr().out  # the published table beside ours


def test_what_breaks_or_hangs_is_a_result(checker):
    def hang():
        raise subprocess.TimeoutExpired("train.py", 600)

    def breaks():
        raise UserError("train.py ended with status 139: out of memory")

    assert checker.note("checks", "hang", hang)["problem"] == "no end after 600 s"
    assert "139" in checker.note("checks", "breaks", breaks)["problem"]
    written = json.loads(checker.output.read_text())["checks"]  # already there while the rest is to come
    assert [written[name]["passed"] for name in ("hang", "breaks")] == [False, False]
    checker.stop = 0.0
    assert checker.note("checks", "late", breaks) | {"seconds": 0} == {
        "passed": None, "problem": "not run: out of time (--minutes)", "seconds": 0,
    }  # fmt: skip


def test_differences_are_relative_to_what_training_changed(checker, monkeypatch, tmp_path):
    start = {"conv.weight": np.full(4, 100.0), "bn._mean": np.zeros(2)}
    checker.start, checker.rows_CD = {"iresnet18": start}, np.full((2, 2), 50.0)

    def run(step):
        arrays = {f"backbone/{key}": value + step for key, value in start.items()}
        arrays |= {
            "rows": checker.rows_CD + step,
            "row momentum": np.full((2, 2), step),
            "conv/velocity": np.ones(4) * step,
        }
        return {"losses": [4.0, 2.0 + step], "arrays": arrays}

    runs = {"ours": run(1.1), "theirs": run(1.0)}
    monkeypatch.setattr(gpu_check, "read_run", runs.get)
    found = checker.compare("ours", "theirs", "iresnet18")
    assert found["loss"] == pytest.approx(0.1 / 3)
    parts = ("rows", "row momentum", "backbone", "backbone momentum", "statistics")
    assert [found[part] for part in parts] == [pytest.approx(0.1)] * 5  # not 0.1 of a weight of 100


def test_without_a_gpu_it_says_so_in_one_line(capsys):
    import paddle

    if paddle.device.is_compiled_with_cuda():
        pytest.skip("this Paddle is built for GPUs")
    with pytest.raises(SystemExit) as end:
        gpu_check.main([])
    assert end.value.code == 1 and "no usable GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_every_check_passes(tmp_path):
    gpu_check.main(["--output", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(check["passed"] for check in report["checks"].values())

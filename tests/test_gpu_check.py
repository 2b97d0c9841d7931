"""tools/gpu_check.py: its CPU half here (two gloo ranks against one), the whole of it where there is a GPU."""

import json

import pytest

from tools.gpu_check import main, run_checks

pytestmark = pytest.mark.distributed


def test_two_gloo_ranks_give_the_gradient_of_one(tmp_path):
    report = run_checks(tmp_path, ["gloo_2"])
    assert report["gloo_2"]["passed"], report
    assert report["gloo_2"]["gradient"] < 2e-2, "a wrong factor between ranks would be 0.5 or more"


def test_without_a_gpu_it_says_so_in_one_line(capsys):
    import paddle

    if paddle.device.is_compiled_with_cuda():
        pytest.skip("this Paddle is built for GPUs")
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 1 and "no usable GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_every_check_passes(tmp_path):
    main(["--output", str(tmp_path / "report.json")])
    assert all(check["passed"] for check in json.loads((tmp_path / "report.json").read_text())["checks"].values())

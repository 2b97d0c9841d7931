"""tools/plan.py against the measured peak of a training process, and against sums worked out by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.plan import BackboneFacts, Setup, head_rows, main, measure_backbone, predict_memory, predict_traffic
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FACTS = BackboneFacts(parameters=4_000_000, buffers=1000, fixed=10_000, per_image=500_000)
# classes, rate, batch, backbone
SIZES = [
    (20_000, 1.0, 16, "mobilefacenet"),
    pytest.param(200_000, 0.1, 32, "mobilefacenet", marks=pytest.mark.slow),
    pytest.param(50_000, 1.0, 8, "iresnet18", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("classes", "rate", "batch", "backbone"), SIZES)
def test_prediction_within_a_tenth_of_the_measured_peak(classes, rate, batch, backbone):
    setup = Setup(classes, 1, batch, rate, backbone, device="cpu")
    predicted = sum(predict_memory(setup, measure_backbone(backbone, 512, "cpu")).values())
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.plan_child",
        str(classes),
        str(rate),
        str(batch),
        backbone,
        "1",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    measured = int(done.stdout.split()[-1])
    assert predicted == pytest.approx(measured, rel=0.1)


def test_head_by_hand():
    """10 M classes on 8 ranks at 0.1: 1.25 M rows of 512 floats, 125,000 in an update, 1,024 samples in all."""
    setup = Setup(10_000_000, 8, 128, 0.1, "iresnet100")
    assert head_rows(setup) == (1_250_000, 125_000)
    memory = predict_memory(setup, FACTS)
    assert memory["class weights"] == 1_250_000 * 512 * 4
    assert memory["class optimiser"] == 1_250_000 * (512 + 1) * 4
    assert memory["logits"] == 125_000 * 1024 * 4
    assert memory["class gradients"] == 125_000 * 512 * 4  # 1,024 samples are more than 512 dimensions
    assert memory["backbone gradients and activations"] == 10_000 + 128 * 500_000
    moved = predict_traffic(setup, FACTS)
    assert moved["backbone gradients (all-reduce)"] == 2 * 7 * 4_000_000 // 8
    assert moved["embeddings (all-gather)"] == 7 * 1024 * 512 * 4 // 8
    assert sum(predict_traffic(Setup(100, 1, 8, 1.0, "x"), FACTS).values()) == 0


def test_half_precision_and_recomputation():
    """Activations at two bytes and a copy of the weights; what recomputation saves is measured."""
    full, half = (predict_memory(Setup(100, 1, 8, 1.0, "x", precision=name), FACTS) for name in ("fp32", "bf16"))
    kept = "backbone gradients and activations"
    assert full[kept] - half[kept] == 8 * 250_000
    weights = "backbone weights and buffers"
    assert half[weights] - full[weights] == 4_000_000 // 2
    with pytest.raises(UserError, match="--precision: fp16"):
        Setup(100, 1, 8, 1.0, "x", device="cpu", precision="fp16")
    keep, again = (measure_backbone("iresnet18", 64, "gpu", recompute=flag) for flag in (False, True))
    assert again.parameters == keep.parameters and again.per_image < 0.7 * keep.per_image


def test_positives_beyond_the_quota_and_accumulation():
    assert head_rows(Setup(1000, 2, 64, 0.0, "x"))[1] == 64
    one, four = (predict_memory(Setup(1000, 1, 64, 1.0, "x", accumulate=k), FACTS) for k in (1, 4))
    assert four["logits"] == 4 * one["logits"] and one["class gradients"] == 0


def test_command_line(tmp_path, capsys):
    """Prints both tables, writes them, and warns when a rank does not fit."""
    path = tmp_path / "plan.json"
    command = ["--classes", "100000", "--gpus", "2", "--batch", "8", "--sample-rate", "0.1", "--backbone", "mnist_2d"]
    main([*command, "--memory", "0.01", "--json", str(path)])
    shown = capsys.readouterr()
    assert "50,000 rows each, 5,000 of them in an update" in shown.out and "class weights" in shown.out
    assert shown.err.strip().startswith("warning: a rank needs") and "has 0.0" in shown.err
    stored = json.loads(path.read_text())
    assert stored["total"] == sum(stored["memory"].values()) and stored["moved"]["embeddings (all-gather)"] == 16384
    main([*command, "--memory", "64"])
    assert "warning" not in capsys.readouterr().err
    for wrong, words in ((["--backbone", "iresnet1000"], "iresnet1000"), (["--sample-rate", "2"], "--sample-rate")):
        with pytest.raises(SystemExit) as error:
            main([*command, *wrong])
        assert error.value.code == 1 and words in capsys.readouterr().err

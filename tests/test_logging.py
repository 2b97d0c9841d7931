"""Logs, meters, spikes, angles, stop signals: the small things around an update."""

import contextlib
import io
import json
import math
import os
import signal

import numpy as np
import paddle
import pytest

from losses import build_margin
from partial_fc import PartialFC
from tests.ranks import run_ranks
from utils.distributed import agree
from utils.head.angles import log_angles
from utils.run.log import RunLog, StepMetrics, duration
from utils.run.meters import SpikeDetector, due
from utils.run.state import fit_batch, seed_update
from utils.run.steps import StopSignal

FIGURES = {
    "epoch": 0.5, "loss": 3.25, "lr": 0.1, "images_s": 100.0, "data_wait": 0.25, "grad_norm": 2.0, "theta_own": 60.0,
    "theta_other": 80.0, "train_accuracy": 0.5, "loss_scale": 1.0, "skipped": 0, "memory_mb": 10.0, "eta_s": 3700.0,
}  # fmt: skip


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_figure_reaches_every_place(tmp_path, capsys):
    log = RunLog(tmp_path, tensorboard=True)
    log.train(StepMetrics(step=5, **FIGURES))
    log.verify(5, "lfw", {"accuracy": 0.75})
    log.event(5, "spike", records=[1, 2])
    log.close()
    train, verify, event = lines(tmp_path)
    assert train["kind"] == "train" and {key: train[key] for key in FIGURES} == FIGURES and train["step"] == 5
    assert (verify["kind"], verify["set"], verify["accuracy"]) == ("verify", "lfw", 0.75)
    assert (event["kind"], event["what"], event["records"]) == ("event", "spike", [1, 2])
    told = capsys.readouterr().out
    for words in ("step 5", "loss 3.2500", "100.0 images/s", "wait 25%", "theta 60.0/80.0", "ETA 1:01:40"):
        assert words in told and words in (tmp_path / "train.log").read_text()
    events = next((tmp_path / "events").iterdir()).read_bytes()
    for tag in (b"train/loss", b"train/theta_own", b"verify/lfw/accuracy"):
        assert tag in events


def test_names_that_are_no_utf8_and_late_warnings_end_no_run(tmp_path, capsys):
    log = RunLog(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):  # the command line makes stdout take them
        log.info("data in Jos\udce9")
    log.close()
    log.warning("a rank is gone")  # the watchdog's, while the run comes down
    assert "data in Jos\\udce9" in (tmp_path / "train.log").read_text(encoding="utf-8")
    assert "a rank is gone" in capsys.readouterr().out


def test_no_nan_in_json(tmp_path):
    log = RunLog(tmp_path)
    log.train(StepMetrics(step=1, **{**FIGURES, "loss": math.nan, "eta_s": math.inf}))
    log.close()
    assert lines(tmp_path)[0]["loss"] is None
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_a_resume_drops_lines_that_will_come_again(tmp_path):
    log = RunLog(tmp_path)
    for step in (2, 4, 6):
        log.train(StepMetrics(step=step, **FIGURES))
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # cut by a kill
    log = RunLog(tmp_path, resume_step=4)
    log.train(StepMetrics(step=6, **FIGURES))
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]
    RunLog(tmp_path).close()
    assert lines(tmp_path) == []


def test_other_ranks_write_no_files(tmp_path, capsys):
    log = RunLog(tmp_path / "run", rank=1, tensorboard=True)
    log.train(StepMetrics(step=1, **FIGURES))
    log.info("hello")
    log.event(1, "spike")
    log.warning("own trouble")
    log.warning("told by rank 0", first_rank=True)
    log.close()
    assert not (tmp_path / "run").exists()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "warning (rank 1): own trouble\n"


def test_visualdl_where_it_is_installed(tmp_path):
    pytest.importorskip("visualdl")
    log = RunLog(tmp_path, visualdl=True)
    log.train(StepMetrics(step=1, **FIGURES))
    log.close()
    assert list((tmp_path / "visualdl").iterdir())


def test_duration():
    assert [duration(59.6), duration(3723), duration(math.inf)] == ["1:00", "1:02:03", "?"]


def test_spikes():
    detector = SpikeDetector(3.0, warm=5)
    rng = np.random.default_rng(0)
    assert not any(detector.observe(10 + 0.1 * rng.normal()) for _ in range(50))
    assert not detector.observe(10.6), "beyond three deviations, but not half the mean more"
    assert detector.observe(16.0)
    assert not detector.observe(math.nan)
    other = SpikeDetector(3.0, warm=5)
    other.load_state(detector.state())
    assert other.observe(16.0) and not other.observe(10.0)
    assert not SpikeDetector(3.0).observe(1e9), "the first losses only teach"


@pytest.mark.parametrize("backend", ["paddle", "numpy"])
@pytest.mark.parametrize("margin", ["arcface", "linear", "filtered"])
def test_angles_against_float64(backend, margin):
    """Logits that are cosines, that are not, and filtered ones; rows in chunks; two samples of a class."""
    rng = np.random.default_rng(1)
    margin = build_margin("arcface", interclass_threshold=0.1) if margin == "filtered" else build_margin(margin)
    head = PartialFC(40, 8, margin, backend=backend, chunk_rows=7)
    weight, embedding = rng.normal(size=(40, 8)).astype(np.float32), rng.normal(size=(6, 8)).astype(np.float32)
    label = np.array([0, 3, 3, 39, 17, 5])
    embedding[1] = 2.5 * weight[3]  # the first of class 3 lies on its centre
    head.weight.set_value(weight)
    head(paddle.to_tensor(embedding), label)
    found = log_angles(head)
    unit = [
        a.astype(np.float64) / np.linalg.norm(a.astype(np.float64), axis=1, keepdims=True) for a in (embedding, weight)
    ]
    degrees = np.degrees(np.arccos(np.clip(unit[0] @ unit[1].T, -1, 1)))
    own = degrees[np.arange(6), label]
    degrees[np.arange(6), label] = 999.0
    assert found.theta_own == pytest.approx(own.mean(), abs=0.02)
    assert found.theta_other == pytest.approx(degrees.min(axis=1).mean(), abs=0.02)
    assert found.accuracy == pytest.approx((own < degrees.min(axis=1)).mean())


@pytest.mark.parametrize("margin", ["arcface", "linear"])
def test_angles_over_ranks(margin):
    """Sampled rows of two shards: the own class on its rank, the nearest other one on any."""
    code = f"""
head = PartialFC(41, 8, build_margin("{margin}"), 0.5, rank, world)
rng = np.random.default_rng(5)
weight, embedding = rng.normal(size=(41, 8)), rng.normal(size=(world * 3, 8))
label = np.array([0, 40, 7, 7, 22, 20])
head.weight.set_value(weight[head.shard.start : head.shard.stop].astype(np.float32))
mine = slice(rank * 3, rank * 3 + 3)
head(paddle.to_tensor(embedding[mine].astype(np.float32)), label[mine])
found = log_angles(head)
taking_part = np.concatenate(distributed.all_gather_object(head.sampled))
assert len(taking_part) < 41
unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (embedding, weight)]
degrees = np.degrees(np.arccos(unit[0] @ unit[1].T))
own = degrees[np.arange(6), label]
degrees[np.arange(6), label] = 999.0
other = degrees[:, taking_part].min(axis=1)
assert abs(found.theta_own - own.mean()) < 0.02 and abs(found.theta_other - other.mean()) < 0.02
assert found.accuracy == (own < other).mean()
print("agreed")
"""
    start = """
import numpy as np, paddle
from utils import distributed
from losses import build_margin
from partial_fc import PartialFC
from utils.head.angles import log_angles
distributed.init("cpu")
rank, world = distributed.get_rank(), distributed.get_world_size()
"""
    assert all("agreed" in output for output in run_ranks(start + code, 2))


def test_signals_are_taken_note_of_and_handlers_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher sends several
        assert stop.received == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_cadence_and_agreement():
    assert [step for step in range(1, 10) if due(step, 3)] == [3, 6, 9]
    assert not any(due(step, 0) for step in range(5))
    assert agree(True, False) == (True, False)


def meta(global_batch, world_size):
    return {"run": {"global_batch": global_batch}, "world_size": world_size}


def test_global_batch_is_kept_or_the_change_is_said():
    assert fit_batch(None, 8, 2, 4) == (8, 2, None)
    assert fit_batch(meta(64, 4), 8, 2, 4) == (8, 2, None)
    assert fit_batch(meta(32, 4), 8, 1, 2)[:2] == (8, 2), "half the ranks: twice the micro-batches"
    assert fit_batch(meta(32, 4), 8, 1, 8)[:2] == (4, 1), "twice the ranks: half the batch"
    assert fit_batch(meta(36, 3), 12, 1, 2)[:2] == (9, 2), "18 a rank: 9 is the largest divisor up to 12"
    batch, accumulation, told = fit_batch(meta(32, 4), 8, 1, 3)
    assert (batch, accumulation) == (8, 1) and "changes from 32 to 24" in told
    assert "changes from 64 to 32" in fit_batch(meta(64, 4), 8, 1, 4)[2]
    assert "changes" in fit_batch(meta(26, 2), 8, 1, 1)[2] or fit_batch(meta(26, 2), 8, 1, 1)[:2] == (13, 2)


def test_updates_are_seeded_by_seed_step_and_rank():
    def draw(*key):
        seed_update(*key)
        return paddle.rand([3]).numpy().tolist()

    assert draw(1, 5, 0) == draw(1, 5, 0)
    assert len({tuple(draw(*key)) for key in ((1, 5, 0), (1, 6, 0), (1, 5, 1), (2, 5, 0))}) == 4

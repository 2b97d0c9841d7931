"""Training on real ranks: bit-exact and elastic resume, equality of the ranks, skips, bad input, signals, two nodes.

Several checks share a launch, because a launch of ranks costs seconds.
"""

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import run_ranks
from utils.launch import launch_command, rank_environment
from utils.owner import claim
from utils.run.checkpoint import list_checkpoints, load_checkpoint, read_meta

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.distributed

TINY = """
run: {output: OUTPUT, device: cpu, seed: 3, batch_size: BATCH, epochs: 2, hang_timeout: 100}
data: {kind: synthetic, num_classes: 11, num_images: 56, num_threads: 2}
model: {network: iresnet18, width: 8, input_size: 32, embedding_size: 32, dropout: 0.2}
head: {margin: {name: arcface, s: 16.0, m: 0.2}, sample_rate: 0.5}
optim: {lr: 0.05}
schedule: {name: poly, warmup_steps: 3}
verify: {every_steps: 0}
checkpoint: {every_steps: 4, keep: 20}
log: {every_steps: 2, tensorboard: false}
"""


def tiny(tmp_path, name, batch, **replace):
    text = TINY.replace("OUTPUT", str(tmp_path / name)).replace("BATCH", str(batch))
    for old, new in replace.items():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / f"{name}.yaml"
    path.write_text(text)
    return path


def arrays(path):
    """Name -> digest of every array file of a checkpoint."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.glob("*.safetensors"))}


def metrics(run, kind="train"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


PRELUDE = f"""
import contextlib, hashlib, io, json, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, paddle
import train
from utils import distributed
distributed.init("cpu")
rank = distributed.get_rank()

def say(name, value):
    print("RESULT " + json.dumps([name, value]), flush=True)

def run(*argv):
    config = train.parse_arguments(list(argv), train.DEFAULT_CONFIG, "")
    parts = train.build(config)
    train.train(parts)
    parts.watchdog.stop()
    parts.log.close()
    parts.loader.close()
    return parts

def digest(parts):
    state = parts.replica.backbone.state_dict()
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()
"""


def results(output):
    """The RESULT lines of one rank's log."""
    pairs = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("RESULT ")]
    return dict(pairs)


TWO_RANKS = (
    PRELUDE
    + """
folder = sys.argv[1]
whole = run(f"{folder}/whole.yaml")
say("digest", digest(whole))
# In the middle of the second epoch (7 updates an epoch), into another folder.
part = run(f"{folder}/resumed.yaml", "--resume", f"{folder}/whole/checkpoints/step_00000008")
say("resumed", digest(part))
# A run that saves nothing before its end, and logs on every update.
run(f"{folder}/unsaved.yaml", "checkpoint.every_steps=0", "log.every_steps=1", "log.angles=false")

# Rank 1 alone meets an infinite gradient in its head: both skip the update.
config = train.parse_arguments([f"{folder}/skipping.yaml"], train.DEFAULT_CONFIG, "")
parts = train.build(config)
before = digest(parts), parts.head.export_weight().tobytes(), parts.optimizer.state()
iterator = iter(parts.loader)
image, label = next(iterator)
if rank == 1:
    parts.head.found_nonfinite = lambda: True
done = train.update(parts, [(image, label)], 0.05)
same = before[0] == digest(parts) and before[1] == parts.head.export_weight().tobytes() and not parts.optimizer.state()
say("skipped", [done.skipped, same, parts.scaler.skips])
if rank == 1:
    del parts.head.found_nonfinite
# A NaN image on rank 0: the running statistics must not keep it.
if rank == 0:
    image = image * float("nan")
done = train.update(parts, [(image, label)], 0.05)
finite = all(np.isfinite(t.numpy()).all() for t in parts.replica.backbone.state_dict().values())
say("nan", [done.skipped, finite, digest(parts) == before[0]])
done = train.update(parts, [next(iterator)], 0.05)
say("after", [done.skipped, digest(parts) != before[0]])
parts.log.close(); parts.loader.close()
"""
)


@pytest.mark.oldest
def test_two_ranks_resume_bit_for_bit_and_agree(tmp_path):
    for name in ("whole", "resumed", "unsaved", "skipping"):
        tiny(tmp_path, name, 4)
    first, second = (results(output) for output in run_ranks(TWO_RANKS, 2, [tmp_path], timeout=240))
    assert first["digest"] == second["digest"], "both ranks hold the same backbone, running statistics included"
    assert first["resumed"] == first["digest"]
    final = list_checkpoints(tmp_path / "whole")[0]
    assert final.name == "step_00000014"
    for other in ("resumed", "unsaved"):
        assert arrays(tmp_path / other / "checkpoints" / final.name) == arrays(final), other
    assert [path.name for path in list_checkpoints(tmp_path / "unsaved")] == ["step_00000014"], "no others were saved"
    lines = metrics(tmp_path / "whole")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"], "training reduces the loss"
    assert {"images_s", "lr", "data_wait", "grad_norm", "theta_own", "theta_other", "eta_s", "memory_mb"} <= set(
        lines[0]
    )
    assert lines[0]["lr"] == pytest.approx(0.05 / 3), "the first update is warmed up"
    assert [line["step"] for line in metrics(tmp_path / "resumed")] == [10, 12, 14]
    for each in (first, second):
        assert each["skipped"] == [True, True, 1]
        assert each["nan"] == [True, True, True]
        assert each["after"] == [False, True]


def test_elastic_resume_restores_every_row_and_keeps_the_global_batch(tmp_path):
    """Saved by 3 ranks, continued by 1, 2 and 4; the position is kept in samples of the global permutation."""
    tiny(tmp_path, "three", 4, **{"num_images: 56": "num_images: 60", "epochs: 2": "epochs: 2, max_steps: 7"})
    run_ranks(ROOT / "train.py", 3, [tmp_path / "three.yaml"], timeout=200)
    saved = tmp_path / "three" / "checkpoints" / "step_00000004"
    source = PRELUDE + (
        """
folder, saved = sys.argv[1:3]
import utils.run.state
config = train.parse_arguments([f"{folder}/elastic.yaml", "--resume", saved], train.DEFAULT_CONFIG, "")
parts = train.build(config)
state = parts.head.row_state()
position = parts.loader.state_dict()["position"]
say("restored", [parts.head.shard.start, {name: value.tolist() for name, value in state.items()}, position])
say("batch", [parts.loader.batch_size, parts.accumulation, parts.images_per_update, parts.schedule_step])
train.train(parts)
say("end", [parts.progress.step, digest(parts)])
parts.watchdog.stop(); parts.log.close(); parts.loader.close()
"""
    )
    whole = load_checkpoint(saved, 0, 11)
    for world_size in (1, 2, 4):
        tiny(tmp_path, "elastic", 4, **{"num_images: 56": "num_images: 60", "epochs: 2": "epochs: 2, max_steps: 7"})
        outputs = run_ranks(source, world_size, [tmp_path, saved], timeout=200)
        each = [results(output) for output in outputs]
        for name, value in whole.rows.items():
            found = np.concatenate([np.array(result["restored"][1][name], value.dtype) for result in each])
            np.testing.assert_array_equal(found, value, err_msg=f"{name} at {world_size} ranks")
        assert {result["restored"][2] for result in each} == {4 * 12}, "48 samples were consumed"
        batch, accumulation, images, step = each[0]["batch"]
        assert images == batch * accumulation * world_size == 12 and step == 4
        assert {tuple(result["end"]) for result in each} == {(7, each[0]["end"][1])}, "all ranks end alike"
        if world_size != 3:
            assert "global batch of 12 kept" in (tmp_path / "elastic" / "train.log").read_text()


BAD = (
    PRELUDE
    + """
folder = sys.argv[1]
def attempt(name, *argv):
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        try:
            train.main(list(argv))
            status = 0
        except SystemExit as end:
            status = end.code
    say(name, [status, told.getvalue()])
good = f"{folder}/good.yaml"
attempt("missing", good, "data.kind=rec", f"data.root={folder}/nowhere")
attempt("no list", good, "data.kind=list", f"data.list_file={folder}/none.lst")
attempt("empty", good, "data.kind=folder", f"data.root={folder}/empty", "data.num_classes=null")
attempt("classes", good, "data.kind=rec", f"data.root={folder}/rec", "data.num_classes=12")
attempt("network", good, "model.network=iresnet51")
attempt("typo", good, "optim.learnig_rate=3")
attempt("margin", good, "head.margin.name=arkface")
attempt("precision", good, "run.precision=bf16")
attempt("sets", good, "verify.sets=[lfw]", f"verify.root={folder}")
attempt("resume", good, "--resume")
attempt("changed", good, "--resume", f"{folder}/before", "data.num_classes=12")
before = f"{folder}/before"
attempt("images", good, "--resume", before, "data.num_images=40")
attempt("optimiser", good, "--resume", before, "optim.name=adamw")
attempt("frozen", good, "--resume", before, "init.freeze=conv1")
attempt("few", good, "run.batch_size=40")
attempt("fewer", good, "data.num_classes=1")
attempt("init", good, f"init.backbone={folder}/none.pdparams")
attempt("freeze", good, "init.freeze=[stage9]")
attempt("sync_bn", good, "run.sync_bn=true")
attempt("owned", good, f"run.output={folder}/owned")
attempt("label", good, "data.kind=rec", f"data.root={folder}/rec", "data.num_classes=null", "run.batch_size=5")
"""
)


def write_rec(folder, labels, num_classes):
    """A record set whose property file names ``num_classes``, whatever its labels."""
    import cv2

    from mxnet_reader.recordio import IRHeader, MXIndexedRecordIO, pack

    folder.mkdir()
    writer = MXIndexedRecordIO(str(folder / "train.idx"), str(folder / "train.rec"), "w")
    rng = np.random.default_rng(0)
    for key, label in enumerate(labels, 1):
        image = cv2.imencode(".png", rng.integers(0, 255, (32, 32, 3), dtype=np.uint8))[1].tobytes()
        writer.write_idx(key, pack(IRHeader(0, float(label), key, 0), image))
    writer.close()
    (folder / "property").write_text(f"{num_classes},32,32\n")


@pytest.mark.oldest
def test_bad_input_is_one_line_on_every_rank(tmp_path):
    tiny(tmp_path, "good", 4, **{"epochs: 2": "epochs: 1"})
    tiny(tmp_path, "before", 4, **{"epochs: 2": "max_steps: 1"})
    (tmp_path / "empty").mkdir()
    write_rec(tmp_path / "rec", [0, 1, 2, 1, 0, 2, 1, 0, 2, 7], num_classes=3)
    source = BAD.replace("good = f", 'run(f"{folder}/before.yaml")\ngood = f', 1)
    with claim(tmp_path / "owned"):  # by this process
        outputs = [results(output) for output in run_ranks(source, 2, [tmp_path], timeout=200)]
    expected = {
        "missing": "nowhere/train.rec: no such file",
        "no list": f"error: data.list_file: {tmp_path}/none.lst: no such file",
        "empty": "empty",
        "classes": "data.num_classes: 12",
        "network": "'iresnet51'; did you mean 'iresnet50'",
        "typo": "'optim.learnig_rate'; did you mean",
        "margin": "arkface",
        "precision": "run.precision: bf16",
        "sets": "lfw.bin missing",
        "resume": "no usable checkpoint",
        "changed": "num_classes is 11 there and 12",
        "images": "has 56 images there and 40 here",
        "optimiser": "optim.name is 'sgd' there and 'adamw' in this configuration",
        "frozen": "init.freeze is [] there and ['conv1'] in this configuration",
        "few": "do not fill one batch of 40",
        "fewer": "num_classes",
        "init": "none.pdparams: no such file",
        "freeze": "'stage9'",
        "sync_bn": "run.sync_bn",
        "owned": f"owned: in use by process {os.getpid()} on",
        "label": "label 7 of record 10 is not in [0, 3)",
    }
    for rank, found in enumerate(outputs):
        for name, told in expected.items():
            status, message = found[name]
            lines = [line for line in message.splitlines() if line.startswith("error: ")]
            assert status == 1 and len(lines) == 1, (rank, name, message)
            assert told in lines[0], (rank, name, lines)
            assert "Traceback" not in message
    assert not (tmp_path / "good" / "checkpoints").exists(), "nothing half-written is left"


def start(arguments, num_ranks, folder, extra=(), env=None):
    """train.py under the launcher, in the background."""
    environment = {**rank_environment("cpu", threads=1), **(env or {})}
    command = launch_command(num_ranks, ROOT / "train.py", arguments, folder, extra)
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def wait_for_update(run, update, process, timeout=90):
    """Pids of the two ranks once both have passed an update."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        try:
            beats = [json.loads((run / "heartbeat" / f"rank_{rank:04d}.json").read_text()) for rank in range(2)]
            if all(beat["step"] >= update for beat in beats):
                return [beat["pid"] for beat in beats]
        except (OSError, ValueError):
            pass
        time.sleep(0.05)
    raise AssertionError(f"no update {update} (exit status {process.poll()})")


def logs(folder):
    return {path.name: path.read_text() for path in sorted(Path(folder).glob("workerlog.*"))}


def test_a_signal_to_one_rank_saves_and_ends_all(tmp_path):
    """SIGTERM to rank 1 only; the resumed run then ends with the bits of one that was never stopped."""
    long = {"epochs: 2": "epochs: 400", "every_steps: 4, keep: 20": "every_steps: 0"}
    run = tmp_path / "stopped"
    process = start([tiny(tmp_path, "stopped", 4, **long)], 2, tmp_path / "log")
    os.kill(wait_for_update(run, 3, process)[1], signal.SIGTERM)
    assert process.wait(60) == 0, logs(tmp_path / "log")
    (saved,) = list_checkpoints(run)
    step = read_meta(saved)["step"]
    assert "stopped by a signal" in (run / "train.log").read_text()
    assert not any("Traceback" in log for log in logs(tmp_path / "log").values())
    # Stopping saved the state after a whole update: an undisturbed run of as many updates has the same bits.
    whole = tiny(tmp_path, "whole", 4, **long)
    outputs = run_ranks(
        PRELUDE
        + """
config = train.parse_arguments([sys.argv[1]], train.DEFAULT_CONFIG, "")
parts = train.build(config)
iterator = iter(parts.loader)
class Never: received, agreed = None, False
from utils.run.steps import fetch
while parts.progress.step < int(sys.argv[2]):
    batches = fetch(parts, iterator, Never)
    if batches is None:
        iterator = iter(parts.loader)
        continue
    train.update(parts, batches, parts.schedule(parts.progress.step))
    parts.progress.step += 1
train.save(parts, wait=True)
parts.log.close(); parts.loader.close()
""",
        2,
        [whole, step],
        timeout=120,
    )
    assert outputs and arrays(list_checkpoints(tmp_path / "whole")[0]) == arrays(saved)


def test_a_dead_and_a_hanging_rank_end_the_others_with_the_cause(tmp_path):
    long = {"epochs: 2": "epochs: 4000", "hang_timeout: 100": "hang_timeout: 8"}
    run = tmp_path / "hanging"
    process = start([tiny(tmp_path, "hanging", 4, **long)], 2, tmp_path / "log_hang")
    pids = wait_for_update(run, 2, process)
    os.kill(pids[1], signal.SIGSTOP)
    began = time.monotonic()
    try:
        assert process.wait(60) != 0
    finally:
        with_kill = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        for pid in with_kill:
            os.kill(pid, signal.SIGKILL)
    assert time.monotonic() - began < 45
    told = logs(tmp_path / "log_hang")["workerlog.0"]
    assert "no update was finished for" in told and "rank 1 in" in told and "restart with --resume" in told

    run = tmp_path / "dying"
    process = start([tiny(tmp_path, "dying", 4, **long)], 2, tmp_path / "log_die")
    pids = wait_for_update(run, 2, process)
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    assert process.wait(60) != 0
    assert time.monotonic() - began < 30
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids), "no rank is left behind"


@pytest.mark.oldest
def test_two_launchers_equal_one(tmp_path):
    """``--nnodes 2`` with two launchers on this machine gives the bits of one launcher with two ranks."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tiny(tmp_path, "nodes", 4, **{"epochs: 2": "epochs: 1"})
    nodes = []
    for number in range(2):
        extra = ["--nnodes", "2", "--rank", str(number), "--master", f"127.0.0.1:{port}"]
        nodes.append(start([path], 1, tmp_path / f"log_node{number}", extra))
    assert [node.wait(120) for node in nodes] == [0, 0], {n: logs(tmp_path / f"log_node{n}") for n in range(2)}
    run_ranks(ROOT / "train.py", 2, [tiny(tmp_path, "one", 4, **{"epochs: 2": "epochs: 1"})], timeout=120)
    ours, reference = (list_checkpoints(tmp_path / name)[0] for name in ("nodes", "one"))
    assert read_meta(ours)["world_size"] == 2
    assert arrays(ours) == arrays(reference)

"""utils/run/checkpoint.py: what is on disk, damage, fallback, pruning, full disks, and rows at any other world size."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import utils.run.checkpoint as checkpoint
from utils.errors import UserError
from utils.files import write_text
from utils.run.checkpoint import (
    CheckpointWriter,
    Snapshot,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_meta,
)
from utils.run.folder import open_run_folder

pytestmark = pytest.mark.oldest
ROOT = Path(__file__).resolve().parent.parent
NUM_CLASSES, DIM = 23, 5


def shard(rank, world_size, num_classes=NUM_CLASSES):
    """(start, count), written out independently of partial_fc.ClassShard."""
    counts = [num_classes // world_size + (r < num_classes % world_size) for r in range(world_size)]
    return sum(counts[:rank]), counts[rank]


def whole_rows(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "weight": rng.normal(size=(NUM_CLASSES, DIM)).astype(np.float32),
        "velocity": rng.normal(size=(NUM_CLASSES, DIM)).astype(np.float32),
        "stamp": rng.integers(0, 99, NUM_CLASSES).astype(np.int32),
    }


def snapshot(step, rank=0, world_size=1, rows=None, meta=None):
    start, count = shard(rank, world_size)
    rows = rows or whole_rows()
    return Snapshot(
        step=step,
        rows={name: value[start : start + count] for name, value in rows.items()},
        row_start=start,
        table={"transition": np.arange(8.0).reshape(2, 2, 2) + step},
        shared={"backbone": {"conv.weight": np.full((2, 3), step, np.float32)}, "optimizer": {"w/v": np.ones(3)}},
        meta={"run": {"num_classes": NUM_CLASSES}, **(meta or {})},
    )


def save(folder, step, world_size=1, best=False, **options):
    """A checkpoint of ``world_size`` ranks, written by as many writers in this one process."""
    writers = []
    for rank in range(world_size):
        writer = CheckpointWriter(folder, **options)
        writer.rank, writer.world_size = rank, world_size
        writers.append(writer)
        writer.start(snapshot(step, rank, world_size), best=best)
    for writer in writers:
        writer.wait()
        assert not writer.failed and not writer.pending and writer.busy
    for writer in reversed(writers):
        final = writer.finish(any_failed=False)
    return final


@pytest.mark.parametrize("saved_at", [1, 2, 3, 4])
@pytest.mark.parametrize("loaded_at", [1, 2, 3, 4, 7])
def test_every_row_lands_on_its_rank_at_any_world_size(tmp_path, saved_at, loaded_at):
    """23 classes divide by none of these; weight, momentum and stamp of each class follow it."""
    path = save(tmp_path, 12, saved_at)
    expected = whole_rows()
    for rank in range(loaded_at):
        start, count = shard(rank, loaded_at)
        loaded = load_checkpoint(path, start, count)
        for name, value in expected.items():
            np.testing.assert_array_equal(loaded.rows[name], value[start : start + count])
            assert loaded.rows[name].dtype == value.dtype
        np.testing.assert_array_equal(loaded.table["transition"], np.arange(8.0).reshape(2, 2, 2) + 12)
        np.testing.assert_array_equal(loaded.shared["backbone"]["conv.weight"], np.full((2, 3), 12, np.float32))


def test_rows_that_do_not_exist_are_refused(tmp_path):
    path = save(tmp_path, 1, 2)
    with pytest.raises(UserError, match=r"covers 23 classes.*init\.backbone"):
        load_checkpoint(path, 20, 10)


def test_no_pickles_in_a_checkpoint(tmp_path):
    path = save(tmp_path, 3, 2)
    suffixes = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert suffixes == {".safetensors", ".json"}
    assert (tmp_path / "latest").read_text() == "step_00000003\n"
    import paddle

    assert paddle.load(str(tmp_path / "backbone.pdparams"))["conv.weight"].numpy().tolist() == [[3.0] * 3] * 2


def damage_cut(path):
    file = path / "head_0001_of_0002.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def damage_bit(path):
    file = path / "backbone.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def damage_missing(path):
    (path / "optimizer.safetensors").unlink()


def damage_meta(path):
    (path / "meta.json").write_text('{"format": 1, "ste')


def damage_meta_value(path):
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, "step": 4}))


def damage_no_meta(path):
    (path / "meta.json").unlink()


def damage_format(path):
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, "format": 99}))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (damage_cut, "head_0001_of_0002.safetensors has"),
        (damage_bit, "backbone.safetensors has another checksum"),
        (damage_missing, "optimizer.safetensors is missing"),
        (damage_meta, "meta.json"),
        (damage_meta_value, "meta.json has another checksum"),
        (damage_no_meta, "meta.json is missing"),
        (damage_format, "format 99"),
    ],
)
def test_damage_is_told_and_the_checkpoint_before_is_used(tmp_path, damage, told):
    save(tmp_path, 10, 2)
    damage(save(tmp_path, 20, 2))
    warnings = []
    assert find_checkpoint(tmp_path, "latest", warnings.append).name == "step_00000010"
    assert len(warnings) == 1 and told in warnings[0] and "step_00000020" in warnings[0]


def test_half_written_folders_are_never_candidates(tmp_path):
    save(tmp_path, 10)
    shutil.copytree(tmp_path / "checkpoints" / "step_00000010", tmp_path / "checkpoints" / "step_00000020.partial")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000010"]
    assert find_checkpoint(tmp_path, "auto").name == "step_00000010"
    save(tmp_path, 30)
    assert not (tmp_path / "checkpoints" / "step_00000020.partial").exists(), "leftovers go with the next save"


def test_latest_pointer_is_a_hint_only(tmp_path):
    """A kill between rename and pointer: the newer folder is whole and is used."""
    save(tmp_path, 10)
    save(tmp_path, 20)
    write_text(tmp_path / "latest", "step_00000010\n")
    assert find_checkpoint(tmp_path, "latest").name == "step_00000020"


def test_where_to_resume_from(tmp_path):
    run = tmp_path / "run"
    assert find_checkpoint(run, "auto") is None
    with pytest.raises(UserError, match="no usable checkpoint"):
        find_checkpoint(run, "latest")
    first = save(run, 10)
    save(run, 20)
    assert find_checkpoint(tmp_path / "other", str(first)) == first
    assert find_checkpoint(tmp_path / "other", str(run)).name == "step_00000020"
    with pytest.raises(UserError, match="nowhere"):
        find_checkpoint(run, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="give the folder of a whole checkpoint"):
        read_meta(tmp_path)


def test_newest_and_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep=2, best=step == 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step_00000002",
        "step_00000004",
        "step_00000005",
    ]
    assert (tmp_path / "best").read_text() == "step_00000002\n"


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, 2)
    path = save(tmp_path, 5, 1)
    assert read_meta(path)["world_size"] == 1
    assert find_checkpoint(tmp_path, "latest") == path


def test_full_disk_leaves_the_old_checkpoint_and_says_so(tmp_path, monkeypatch):
    save(tmp_path, 10)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", full)
    writer = CheckpointWriter(tmp_path)
    writer.start(snapshot(20))
    writer.wait()
    assert writer.failed
    with pytest.raises(UserError, match=r"step_00000020: could not be written: No space left on device; older"):
        writer.finish(any_failed=True)
    assert not writer.busy
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000010"]
    assert find_checkpoint(tmp_path, "latest").name == "step_00000010"


FILE_LIMIT = """
import resource, signal, sys
sys.path.insert(0, {root!r})
from tests.test_checkpoint import save, snapshot
from utils.run.checkpoint import CheckpointWriter
import numpy as np, dataclasses
save({folder!r}, 10)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
big = dataclasses.replace(snapshot(20), rows={{"weight": np.ones((23, 500), np.float32)}})
writer = CheckpointWriter({folder!r})
writer.start(big)
writer.wait()
try:
    writer.finish(writer.failed)
except ValueError as error:
    print("TOLD", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_a_write_that_the_system_refuses(tmp_path):
    """A real failing write (a file-size limit set in a child), not a mocked one."""
    source = FILE_LIMIT.format(root=str(ROOT), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert "TOLD" in done.stdout and "could not be written" in done.stdout, done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000010"]


def test_a_failing_publish_is_told_too(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path)
    writer.start(snapshot(20))
    writer.wait()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(UserError, match="No space left"):
        writer.finish(any_failed=False)


def test_asynchronous_saving_takes_copies(tmp_path, monkeypatch):
    """What the caller does to its arrays after ``start`` must not reach the disk: Snapshot holds copies by contract,
    and the writer thread is still at work when ``start`` returns."""
    import threading

    gate = threading.Event()
    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *args: (gate.wait(10), real(*args))[1])
    writer = CheckpointWriter(tmp_path)
    writer.start(snapshot(20))
    assert writer.pending and writer.busy
    gate.set()
    writer.wait()
    assert writer.finish(False).name == "step_00000020"
    synchronous = CheckpointWriter(tmp_path, asynchronous=False)
    synchronous.start(snapshot(30))
    assert not synchronous.pending
    synchronous.finish(False)


def test_a_fresh_run_moves_an_earlier_one_aside(tmp_path):
    save(tmp_path, 10)
    (tmp_path / "metrics.jsonl").write_text("old\n")
    assert open_run_folder(tmp_path, fresh=False) is None
    assert list_checkpoints(tmp_path)
    told = open_run_folder(tmp_path, fresh=True)
    assert "previous_1" in told
    assert (tmp_path / "previous_1" / "metrics.jsonl").read_text() == "old\n"
    assert list_checkpoints(tmp_path / "previous_1") and not list_checkpoints(tmp_path)
    save(tmp_path, 5)
    assert "previous_2" in open_run_folder(tmp_path, fresh=True)

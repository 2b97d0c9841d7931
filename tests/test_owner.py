"""One process a folder: real processes that claim, are killed, race; owners elsewhere judged by signs of life alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest

from utils import owner
from utils.errors import UserError
from utils.owner import claim, is_running
from utils.run.folder import owned_run_folder

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys
from utils.errors import UserError
from utils.owner import claim
try:
    held = claim(sys.argv[1], "name another folder")
except UserError as error:
    sys.exit(f"error: {error}")
print("held", flush=True)
sys.stdin.read()
held.release()
"""


def start(folder):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A suite that was started in the background ignores SIGINT, and so would its children.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, text=True, preexec_fn=heed, **pipes)


def claims(folder):
    return sorted(path.name for path in Path(folder).glob("owner_*.json"))


def elsewhere(folder, number=1, **changes):
    """A claim as a process of another machine would leave it."""
    values = {"host": "node7", "pid": os.getpid(), "started": "1", "machine": "other-boot", "command": "train.py",
              "since": "2026-01-01 00:00:00", "token": "cafe"} | changes  # fmt: skip
    path = Path(folder) / f"owner_{number}.json"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(owner, "BEAT", 0.1)
    monkeypatch.setattr(owner, "STALE", 1.0)


def test_the_second_ends_in_one_line_and_a_killed_owner_is_followed_at_once(tmp_path):
    folder = tmp_path / "run"
    first = start(folder)
    assert first.stdout.readline() == "held\n"
    second = start(folder)
    _, told = second.communicate()
    assert second.returncode == 1 and told.count("\n") == 1
    for words in (str(folder), f"process {first.pid} on {os.uname().nodename}", "name another folder", "owner_1.json"):
        assert words in told
    first.kill()
    first.wait()
    assert claims(folder) == ["owner_1.json"]  # nobody could clean up
    began = time.monotonic()
    with claim(folder):
        assert time.monotonic() - began < 2
        assert claims(folder) == ["owner_2.json"]
    assert claims(folder) == []


def test_a_killed_owner_that_nobody_has_waited_for_is_dead_too(tmp_path):
    first = start(tmp_path)
    first.stdout.readline()
    first.kill()
    time.sleep(0.3)  # a zombie: its parent is this process
    with claim(tmp_path):
        pass
    first.wait()


@pytest.mark.parametrize("dead_before", [False, True])
def test_of_many_starts_at_once_one_gets_the_folder(tmp_path, dead_before):
    if dead_before:
        elsewhere(tmp_path, 7, machine=owner._machine(), pid=os.getpid(), started="1")
    starts = [start(tmp_path) for _ in range(6)]
    outcomes = [process.stdout.readline() for process in starts]  # a line, or the end of a refused one
    assert outcomes.count("held\n") == 1
    holder = starts[outcomes.index("held\n")]
    for process in starts:
        _, told = process.communicate()
        assert process is holder or f"process {holder.pid} on" in told or "at this moment" in told
    assert claims(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_releases_and_an_empty_folder_that_was_made_goes(tmp_path, number):
    process = start(tmp_path / "made")
    process.stdout.readline()
    process.send_signal(number)
    process.communicate()
    assert process.returncode == -number
    assert not (tmp_path / "made").exists()


def test_an_error_releases_but_keeps_what_is_in_the_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "made"):
        (tmp_path / "made" / "result").write_text("1")
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["result"]


def test_a_process_number_that_is_used_again_is_no_owner(tmp_path):
    mine = claim(tmp_path / "mine")
    live = mine.claim
    mine.release()
    (tmp_path / "owner_1.json").write_text(json.dumps(asdict(live)))
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} "):
        claim(tmp_path)
    (tmp_path / "owner_1.json").write_text(json.dumps(asdict(replace(live, started=str(int(live.started) - 1)))))
    claim(tmp_path).release()
    assert is_running(os.getpid(), live.started) and not is_running(os.getpid(), "1")


@pytest.mark.parametrize("skew", [-(10**6), 10**6])
def test_an_owner_elsewhere_is_judged_by_what_moves_not_by_the_clock(tmp_path, quick, skew, capsys):
    path = elsewhere(tmp_path)
    beats, stop = iter(range(10**6)), threading.Event()

    def beat():
        while not stop.wait(0.1):
            other_clock = time.time() + skew + next(beats)
            os.utime(path, (other_clock, other_clock))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"in use by process .* on node7"):
            claim(tmp_path)
    finally:
        stop.set()
        thread.join()
    began = time.monotonic()
    with claim(tmp_path):  # it stands still now
        assert 0.9 < time.monotonic() - began < 5
        assert claims(tmp_path) == ["owner_2.json"]
    assert "waiting for a sign of life" in capsys.readouterr().err


def test_a_cut_claim_counts_while_it_moves(tmp_path, quick):
    (tmp_path / "owner_1.json").write_text('{"host": "no')
    claim(tmp_path).release()


def test_the_owner_shows_signs_of_life(tmp_path, quick):
    with claim(tmp_path) as held:
        before = held.path.stat().st_mtime_ns
        deadline = time.monotonic() + 5
        while held.path.stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_claim_that_someone_removed_is_written_again(tmp_path, quick):
    with claim(tmp_path) as held:
        held.path.unlink()
        deadline = time.monotonic() + 5
        while not held.path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(UserError, match="in use"):
            claim(tmp_path)


def test_an_owner_that_was_taken_over_ends(tmp_path):
    script = "import time; from utils import owner; owner.BEAT = 0.1; held = owner.claim('FOLDER'); "
    script += "print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", script.replace("FOLDER", str(tmp_path))]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    elsewhere(tmp_path, 2)
    (tmp_path / "owner_1.json").unlink()
    _, told = process.communicate(timeout=20)
    assert process.returncode == owner.LOST_STATUS
    assert "was taken over by process" in told and "node7" in told and told.count("\n") == 1


def test_without_links_the_name_is_made_exclusively(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with claim(tmp_path) as held:
        assert json.loads(held.path.read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match="in use"):
            claim(tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_that_find_each_other_step_back(tmp_path, monkeypatch):
    create, rival = owner._create, []

    def meet(path, mine):
        done = create(path, mine)
        if not rival:  # another start saw an older state and took another number
            rival.append(elsewhere(tmp_path, 5, machine=mine.machine, pid=1, started=owner._started(1)))
        return done

    monkeypatch.setattr(owner, "_create", meet)
    with pytest.raises(UserError, match="in use by process 1 on node7"):
        claim(tmp_path)
    assert claims(tmp_path) == ["owner_5.json"]


def test_claims_of_different_names_do_not_meet(tmp_path):
    with claim(tmp_path, name="ijbb"), claim(tmp_path, name="ijbc"), pytest.raises(UserError, match="in use"):
        claim(tmp_path, name="ijbc")


def test_a_forked_child_owns_nothing(tmp_path):
    with claim(tmp_path) as held:
        child = os.fork()
        if child == 0:
            held.release()
            os._exit(0)
        os.waitpid(child, 0)
        assert held.path.exists()


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"
    with pytest.raises(UserError, match=r"cannot be written: .*run\.output"), owned_run_folder(folder):
        pass


CONFIG = """
run: {device: cpu, batch_size: 2, max_steps: 100000}
data: {kind: synthetic, num_classes: 11, num_images: 56, num_threads: 1}
model: {network: mnist_2d, width: 8, input_size: 28, embedding_size: 2}
verify: {every_steps: 0}
checkpoint: {every_steps: 20}
log: {every_steps: 1, tensorboard: false, angles: false}
"""


def test_two_trainings_in_one_folder(tmp_path):
    """A trains, B ends in one line and moves nothing, A is killed, B starts at once and moves A's files aside."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    output = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "train.py", str(tmp_path / "run.yaml"), f"run.output={output}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    first = subprocess.Popen(command, cwd=ROOT, **pipes)

    def wait_for_checkpoint(process):
        deadline = time.monotonic() + 90
        while not (output / "latest").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)

    try:
        wait_for_checkpoint(first)
        second = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
        assert second.returncode == 1 and second.stderr.count("\n") == 1 and "Traceback" not in second.stderr
        assert f"{output}: in use by process {first.pid} on" in second.stderr and "run.output" in second.stderr
        assert first.poll() is None and not (output / "previous_1").exists()
    finally:
        first.kill()
        first.communicate()
    third = subprocess.Popen(command, cwd=ROOT, **pipes)
    try:
        deadline = time.monotonic() + 90
        while not (output / "previous_1").exists() or claims(output) != ["owner_2.json"]:
            assert third.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        third.terminate()
        third.communicate()
    assert claims(output) == [] and (output / "previous_1" / "checkpoints").is_dir()
